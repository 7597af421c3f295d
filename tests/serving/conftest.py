"""vLLM in an environment of its own, and tiny checkpoints that it can serve.

`make test-vllm` builds the environment and runs these tests; `make test` leaves them out.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny, token_ids, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from analog_plugin import AnalogScheme, calibrate_ranges, convert_to_analog
from analog_plugin.checkpoint.save import plan_export, save_checkpoint
from analog_plugin.training.ranges import calibrate_plain_ranges
from analog_plugin.training.start import prepare_start

ENVIRONMENT = Path(__file__).parents[2] / "build" / "vllm"
#: vLLM's attention on CPUs needs heads of 32 or more; its 4-bit kernel needs multiples of 32.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OPTIONS = {"mixed": {"average_bits": 4}, "mixed-in-w8": {"average_bits": 4}}
PROMPT, TOKENS = 12, 16


@pytest.fixture(scope="session")
def engine():
    """The ``bin`` of vLLM's environment."""
    if not (ENVIRONMENT / ".ready").exists():
        pytest.fail(f"There is no vLLM in {ENVIRONMENT}; run make test-vllm, which installs it.")
    return ENVIRONMENT / "bin"


@pytest.fixture(scope="session")
def engine_variables():
    """The environment variables of vLLM's processes."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # GiB for keys and values, where nothing else is said; and nothing is sent anywhere.
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="session")
def in_vllm(engine, engine_variables, tmp_path_factory):
    """What vLLM makes of directories, each in a dtype, all in one process; see worker.py."""

    def run(runs):
        job = {
            "runs": [(str(directory), dtype) for directory, dtype in runs],
            "prompts": learnt()[:, :PROMPT].tolist(),
            "tokens": TOKENS,
        }
        log = tmp_path_factory.mktemp("log") / "vllm.log"
        with log.open("w") as stderr:
            done = subprocess.run(
                [engine / "python", Path(__file__).with_name("worker.py")],
                input=json.dumps(job), stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=engine_variables,
            )  # fmt: skip
        if done.returncode:
            pytest.fail(f"vLLM's worker failed:\n{log.read_text()[-4000:]}")
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def computes():
    """Skips a test where this processor lacks what vLLM needs to compute a profile rightly."""
    has = torch.cpu.get_capabilities()
    x86 = has["architecture"] == "x86_64"

    def check(profile):
        if x86 and profile == "w8a8" and not (has["avx512_vnni"] or has["avx_vnni"]):
            pytest.skip("without VNNI the int8 products of oneDNN saturate at 16 bits")
        if x86 and profile == "w4a8o8" and not has["avx512_f"]:
            pytest.skip("without AVX-512 vLLM has no 4-bit kernel, and fails where it wants one")

    return check


@pytest.fixture(scope="session")
def sizes():
    """Of a model that vLLM serves."""
    return SIZES


def learnt():
    """The sequences that the models learn by heart."""
    return token_ids(8, PROMPT + TOKENS).clamp_min(4)  # those before are special


def analog(architecture, tie=False, ignore=("lm_head",), prefix=None):
    """A model that has learnt the sequences by heart.

    A random one has no opinion: its most likely tokens are a hair apart, and no two programs agree.
    """
    model = tiny(architecture, tie, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        model(learnt(), labels=learnt()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    convert_to_analog(model, AnalogScheme(tile_rows=64, prefix=prefix), ignore)
    batches = [{"input_ids": learnt()}]
    if prefix is None:
        calibrate_ranges(model, batches)
        return model
    prepare_start(model, batches, learnt(), None)
    calibrate_plain_ranges(model, batches)
    for name in ("mlp.down_proj", "self_attn.k_proj"):  # as if its first token were massive there
        layer = model.model.layers[1].get_submodule(name)
        layer.plain_range = layer.input_range.detach().max().reshape(1) * 8.1
    return model


@pytest.fixture(scope="session")
def analog_models():
    """A model of each architecture, and what else decides how a directory looks."""
    return {name: analog(name) for name in ARCHITECTURES} | {
        "tied embeddings": analog("llama", tie=True),
        "analog head": analog("llama", ignore=()),
        "prefix": analog("llama", prefix=1),
    }


@pytest.fixture(scope="session")
def checkpoint(analog_models, tmp_path_factory):
    """Writes a model in a profile, once, with a tokenizer that can chat."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"

    def write(name, profile):
        directory = root / name / profile
        if not directory.exists():
            model, batches = analog_models[name], [{"input_ids": learnt()}]
            plan = plan_export(model, profile, batches=batches, **OPTIONS.get(profile, {}))
            save_checkpoint(model, directory, profile=profile, plan=plan, tokenizer=tokenizer)
        return directory

    return write


@dataclass(frozen=True)
class Steps:
    """What vLLM did, step by step, and what transformers says to the same tokens.

    Args:
        generated: Tokens [prompts, steps].
        vllm, exact, rounded: Logprobs [prompts, steps, vocabulary] of vLLM, of transformers in
            float32 and of transformers in bfloat16.
    """

    generated: Tensor
    vllm: Tensor
    exact: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, directory, made):
        """Those of a directory's part of vLLM's report."""
        generated = torch.tensor(made["generated"])
        tokens = torch.cat([learnt()[:, :PROMPT], generated], 1)
        exact, rounded = (
            _logprobs(directory, dtype, tokens) for dtype in (torch.float32, torch.bfloat16)
        )
        return cls(generated, torch.tensor(made["logprobs"]), exact, rounded)


@torch.no_grad()
def _logprobs(directory, dtype, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model(tokens).logits.float().log_softmax(-1)[:, PROMPT - 1 : -1]


@pytest.fixture(scope="session")
def steps():
    """Compares a directory's part of vLLM's report with transformers."""
    return Steps.of
