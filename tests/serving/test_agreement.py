"""vLLM computes from a directory what transformers computes from it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        torch.cpu._is_amx_tile_supported(),
        reason="on CPUs with AMX vLLM has kernels that ignore the static input scale",
    ),
]

W8A8 = ("w8a8", "w4-in-w8", "w3-in-w8", "w2-in-w8", "mixed-in-w8")
#: Models of one architecture whose directories look different.
VARIANTS = ("tied embeddings", "analog head", "prefix")
CASES = [
    *((name, profile, "float32") for name in ARCHITECTURES for profile in W8A8),
    *((name, "w8a8", "bfloat16") for name in ARCHITECTURES),
    *((name, "w4a8o8", "bfloat16") for name in ARCHITECTURES),
    *((name, "w8a8", "float32") for name in VARIANTS),
    *((name, "w4a8o8", "bfloat16") for name in VARIANTS),
]
INT8 = ("CompressedTensorsW8A8Int8", "CPUInt8ScaledMMLinearKernel")
KERNELS = dict.fromkeys(W8A8, INT8)
KERNELS["w4a8o8"] = ("CompressedTensorsWNA8O8Int", "CPUWNA16LinearKernel")


@pytest.fixture(scope="module")
def served(checkpoint, in_vllm):
    """Of every case its directory and what vLLM made of it."""
    runs = [(checkpoint(name, profile), dtype) for name, profile, dtype in CASES]
    made = zip(runs, in_vllm(runs), strict=True)
    return {case: (run[0], report) for case, (run, report) in zip(CASES, made, strict=True)}


def kl(p, q):
    """Nats at each step, of logprobs [..., vocabulary]."""
    return (p.exp() * (p - q)).sum(-1)


def same_token(p, q):
    return (p.argmax(-1) == q.argmax(-1)).float().mean()


def same_in_float32(steps):
    """Equal but for summation order, which moves a value over an edge between codes now and then.

    Half of all steps have none of these and agree to a few units in float32's last place of the
    logits; one code moves single logprobs by tenths, but the distribution hardly.
    """
    apart = (steps.vllm - steps.exact).abs().amax(-1)
    return (
        same_token(steps.vllm, steps.exact) >= 0.95
        and apart.median() < 1e-4
        and kl(steps.exact, steps.vllm).mean() < 1e-3
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_vllm_agrees_with_transformers(case, served, steps, computes):
    _, profile, dtype = case
    computes(profile)
    directory, made = served[case]
    assert "error" not in made
    assert set(map(tuple, made["layers"].values())) == {KERNELS[profile]}
    taken = steps(directory, made)
    assert (taken.generated == taken.vllm.argmax(-1)).all()
    if dtype == "float32":
        assert same_in_float32(taken)
        return
    # In bfloat16 inputs are rounded by up to half a code, so no two programs have the same ones.
    # vLLM is as far from float32 as transformers in bfloat16 is; a quarter more is chance.
    assert same_token(taken.vllm, taken.rounded) >= 0.95
    transformers_is = kl(taken.exact, taken.rounded).mean()
    assert kl(taken.exact, taken.vllm).mean() < 1.25 * transformers_is


def test_wrong_scales_are_noticed(checkpoint, in_vllm, steps, tmp_path):
    directory = checkpoint("llama", "w4-in-w8")
    wrong = [tmp_path / part for part in ("input_scale", "weight_scale")]
    for path in wrong:
        shutil.copytree(directory, path)
        state = load_file(path / "model.safetensors")
        state[f"model.layers.1.mlp.down_proj.{path.name}"] *= 1.05
        save_file(state, path / "model.safetensors", {"format": "pt"})
    for path, made in zip(wrong, in_vllm([(p, "float32") for p in wrong]), strict=True):
        assert not same_in_float32(steps(directory, made))
        assert same_in_float32(steps(path, made))
