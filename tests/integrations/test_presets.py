"""Stock llm-compressor recipes name analog hardware, and what they make loads anywhere."""

import os
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from tiny_models import tiny, token_ids
from transformers import AutoModelForCausalLM

from analog_integrations.compressed_tensors import PRESETS, register_presets
from analog_plugin import AnalogError, inspect_checkpoint

RECIPE = """
quant_stage:
  quant_modifiers:
    QuantizationModifier: {targets: [Linear], ignore: [lm_head], scheme: NAME}
"""


@pytest.fixture
def compress(model_directory, tmp_path):
    def run(name):
        ids = token_ids(rows=8)
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        oneshot(
            model=str(model_directory), tokenizer=str(model_directory), precision="float32",
            dataset=Dataset.from_dict(rows), recipe=RECIPE.replace("NAME", name),
            output_dir=str(tmp_path / name), num_calibration_samples=8, max_seq_length=17,
        )  # fmt: skip
        return tmp_path / name

    return run


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_a_stock_recipe_makes_what_the_name_says(name, compress):
    directory = compress(name)
    state = load_file(directory / "model.safetensors")
    bits, outputs = PRESETS[name]
    model = tiny("llama")
    layers = [n for n, _ in model.named_modules() if n.endswith("_proj")]
    seen = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda module, x, y, layer=layer: seen.update({layer: (x[0], y)})
        )
    exact = model(token_ids(rows=8)).logits
    for layer in layers:
        assert state[f"{layer}.input_scale"].shape == (1,)
        assert (f"{layer}.weight_scale" in state) == (bits is not None)
        assert (f"{layer}.output_scale" in state) == outputs
        for part, values in zip(("input", "output"), seen[layer], strict=True):
            scale = state.get(f"{layer}.{part}_scale")
            if scale is not None:  # the scales of outputs too are those of the data
                largest = float(values.abs().max())
                rough = 0.5 if bits == 4 else 0.1
                assert 127.5 * float(scale) == pytest.approx(largest, rel=rough)
    loaded = AutoModelForCausalLM.from_pretrained(directory)(token_ids(rows=8)).logits
    error = (loaded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < (0.4 if bits == 4 else 0.05)

    found = inspect_checkpoint(directory)
    assert not found.problems
    assert [group.bits for group in found.groups] == [bits]
    assert (found.kind, found.inputs.static) == ("quantized", True)
    assert (found.outputs is not None) == outputs


def test_a_machine_without_the_plugin_loads_quantized_outputs(compress):
    directory = compress("AIMC_SI8_W8_O8")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('analog_plugin', 'analog_integrations'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r})\n"
        "print(model.model.layers[0].mlp.up_proj.output_scale.item() > 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert result.stdout.strip() == "True", result.stderr


def test_registering_again_is_harmless_and_a_clash_names_both(monkeypatch):
    register_presets()
    register_presets()
    assert preset_name_to_scheme("aimc_si8_w4", ["Linear"]).weights.num_bits == 4
    other = {"weights": QuantizationArgs(num_bits=3, type="int", strategy="tensor")}
    monkeypatch.setitem(PRESET_SCHEMES, "AIMC_SI8_W4", other)
    with pytest.raises(AnalogError, match=r"weights: 3-bit int a tensor.*weights: 4-bit int a ch"):
        register_presets()
    assert PRESET_SCHEMES["AIMC_SI8_W4"] is other


@pytest.mark.parametrize(
    ("absent", "line", "registered"),
    [
        ("none", "import analog_integrations.compressed_tensors", True),
        ("llmcompressor", "import analog_integrations.compressed_tensors", True),
        ("none", "from analog_integrations.llmcompressor import AnalogModifier", True),
        ("none", "import analog_integrations.llmcompressor", False),
    ],
    ids=["own import", "without llm-compressor", "with the modifier", "package alone"],
)
def test_what_registers_the_presets(absent, line, registered):
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"hide = lambda name: None if name.startswith({absent!r}) else find(name)\n"
        "importlib.util.find_spec = hide\n"
        f"{line}\n"
        "from compressed_tensors.quantization import is_preset_scheme\n"
        "print(is_preset_scheme('AIMC_SI8'), 'llmcompressor' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    imported = absent == "none" and registered
    assert result.stdout.split()[-2:] == [str(registered), str(imported)], result.stderr
