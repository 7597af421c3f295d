"""In fp32 nothing may change: analog and digital logits before saving and after loading."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, token_ids
from transformers import AutoModelForCausalLM

from analog_plugin import AnalogError, load_checkpoint, save_checkpoint
from analog_plugin.checkpoint import plain_view
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.layers import analog_layers
from optimum.analog import AnalogModelForCausalLM

#: Every profile, and options that change its weights.
CASES = [
    ("analog-fp", {}), ("w8a8", {}), ("w8a8o8", {}), ("w4-in-w8", {}), ("w4a8", {}),
    ("w4a8", {"weight_scale": "mse"}), ("w4a8o8", {}), ("w3-in-w8", {}), ("w3a8", {}),
    ("w2-in-w8", {"weight_scale": "mse"}), ("w2a8", {}), ("mixed", {"average_bits": 3.5}),
    ("mixed-in-w8", {"average_bits": 4.5}),
]  # fmt: skip
TIES = pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=5)).logits


@TIES
@NAMES
def test_analog_logits_survive_saving(name, tie, make_analog, tmp_path):
    model = make_analog(name, tie)
    save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(AnalogModelForCausalLM.from_pretrained(tmp_path / "out")),
                       logits(model))  # fmt: skip


@pytest.mark.parametrize(("profile", "options"), CASES)
@TIES
@NAMES
def test_a_plain_load_equals_the_emulation_of_its_arithmetic(
    name, tie, profile, options, make_analog, tmp_path
):
    model = make_analog(name, tie)
    plan = plan_export(model, profile, batches=[{"input_ids": token_ids(seed=2)}], **options)
    save_checkpoint(model, tmp_path / "out", profile=profile, plan=plan)
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(plain, logits(plain_view(model, plan)))
    assert not torch.equal(plain, logits(model))  # it has neither tiles nor an ADC


def test_gpt2_keeps_its_analog_logits_and_claims_no_digital_quantization(make_analog, tmp_path):
    model = make_analog("gpt2")
    save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model))))


def test_gpt2_refuses_an_integer_profile_and_leaves_nothing(make_analog, tmp_path):
    with pytest.raises(AnalogError, match="Conv1D layers, which compressed-tensors does not"):
        save_checkpoint(make_analog("gpt2"), tmp_path / "out", profile="w8a8")
    assert list(tmp_path.iterdir()) == []


def test_an_untied_analog_head_survives(make_analog, tmp_path):
    model = make_analog(ignore=())
    save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert "lm_head" in dict(analog_layers(loaded))
    assert torch.equal(logits(loaded), logits(model))


def test_programmed_noise_depends_on_the_seed_alone(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "out")

    def load(**options):
        return logits(load_checkpoint(tmp_path / "out", **options))

    assert torch.equal(load(noise="pcm", seed=3), load(noise="pcm", seed=3))
    assert not torch.equal(load(noise="pcm", seed=3), load(noise="pcm", seed=4))
    assert not torch.equal(load(noise="pcm", seed=3), load())
    assert torch.equal(load(seed=3), load())


def test_half_precision_keeps_exact_ranges(make_analog, tmp_path):
    model = make_analog(dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for (_, ours), (_, theirs) in zip(analog_layers(model), analog_layers(loaded), strict=True):
        assert theirs.input_range.dtype == torch.float32
        assert torch.equal(ours.input_range, theirs.input_range)
    # Not against ``model``: casting it rounded its rotary frequencies, which loading does not.
    save_checkpoint(loaded, tmp_path / "again")
    assert torch.equal(logits(load_checkpoint(tmp_path / "again")), logits(loaded))


def test_saving_again_changes_no_tensor(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "a")
    save_checkpoint(load_checkpoint(tmp_path / "a"), tmp_path / "b")
    for file in ("model.safetensors", "analog/analog_state.safetensors"):
        first, second = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_fused_groups_have_one_input_scale(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "out", profile="w8a8")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for prefix in ("model.layers.0", "model.layers.1"):
        q, k, v = (state[f"{prefix}.self_attn.{x}_proj.input_scale"] for x in "qkv")
        assert torch.equal(q, k) and torch.equal(k, v)
        gate, up = (state[f"{prefix}.mlp.{x}_proj.input_scale"] for x in ("gate", "up"))
        assert torch.equal(gate, up)


def test_a_value_clipped_below_the_range_differs_by_one_code(make_analog):
    """The one known difference between the DAC and plain loaders, measured."""
    model = make_analog(tile_rows=None, output_bits=None)
    name = "model.layers.0.mlp.down_proj"
    layer, plain = (
        model.get_submodule(name),
        plain_view(model, plan_export(model)).get_submodule(name),
    )
    step = float(plain.input_scale)
    x = torch.zeros(2, layer.in_features)
    x[0, 0], x[1, 0] = -1000.0, 1000.0
    difference = plain(x) - layer(x)
    column = layer.weight[:, 0]
    torch.testing.assert_close(difference[0], -step * column, rtol=1e-3, atol=1e-5)
    assert torch.allclose(difference[1], torch.zeros(()), atol=1e-5)


def test_a_loaded_model_generates_and_serves_a_pipeline(make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "out")
    model = load_checkpoint(tmp_path / "out", noise="pcm")
    made = model.generate(token_ids(), max_new_tokens=5, do_sample=False)
    assert made.shape == (3, 22)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))


def test_a_machine_without_the_plugin_loads_the_digital_model(make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "out")
    torch.save(
        {"ids": token_ids(seed=5), "logits": logits(plain_view(model, plan_export(model)))},
        tmp_path / "x.pt",
    )
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('analog_plugin', 'analog_integrations'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"case = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "with torch.no_grad():\n"
        "    same = torch.equal(model(case['ids']).logits, case['logits'])\n"
        "print('same' if same else 'different')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert result.stdout.strip() == "same", result.stderr
