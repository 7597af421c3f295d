"""``optimum-cli analog inspect``: what a directory holds, told by a command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import tiny, word_tokenizer

from analog_integrations.optimum import main_inspect
from analog_plugin import AnalogError

CLI = Path(sys.executable).with_name("optimum-cli")


def run(*arguments, **options):
    return subprocess.run(
        [str(CLI), "analog", "inspect", *map(str, arguments)], capture_output=True, text=True,
        **options,
    )  # fmt: skip


def test_a_sound_checkpoint_is_described(checkpoints, tmp_path):
    result = run(checkpoints / "analog-fp", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("analog-fp", "14 layers on 30 tiles", "down_proj", "none found"):
        assert text in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = run(checkpoints / "w8a8", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["profile"], values["problems"]) == ("w8a8", [])
    assert values["sizes"]["bits_per_weight"] > 8
    assert {row["name"]: row["takes"] for row in values["loaders"]}["AutoModelForCausalLM"]


def test_a_broken_one_is_exit_status_1_with_every_problem(checkpoints, tmp_path):
    out = shutil.copytree(checkpoints / "analog-fp", tmp_path / "out")
    (out / "tokenizer.json").unlink()
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-100])
    result = run(out)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "lacks tokenizer.json" in result.stdout and "cannot be read" in result.stdout
    assert json.loads(run(out, "--json").stdout)["problems"]
    result = run(out, "--no-verify")
    assert result.returncode == 1 and "tokenizer.json" not in result.stdout


def test_a_directory_that_is_not_there_is_one_sentence(tmp_path):
    result = run("absent", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "error: There is no directory absent; give a model directory."
    )
    with pytest.raises(AnalogError, match="no directory"):
        main_inspect(tmp_path / "absent")


@pytest.mark.parametrize(
    ("scheme", "layout", "bits", "vllm"),
    [("W8A8", "int-quantized", 8, True), ("W4A16", "pack-quantized", 4, True),
     ("FP8_DYNAMIC", "float-quantized", None, None)],
)  # fmt: skip
def test_what_llm_compressor_made_is_told_from_our_own(
    scheme, layout, bits, vllm, tmp_path, capsys
):
    source = tmp_path / "source"
    tiny("llama", num_attention_heads=2, num_key_value_heads=2, hidden_size=128,
         intermediate_size=128).save_pretrained(source)  # fmt: skip
    word_tokenizer().save_pretrained(source)
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=str(source), recipe=recipe, output_dir=str(tmp_path / "out"))
    found = main_inspect(tmp_path / "out")
    assert found.problems == ()
    assert (found.kind, found.layout, found.profile) == ("quantized", layout, None)
    assert [group.bits for group in found.groups] == [bits] and len(found.quantized) == 14
    assert found.loaders[2].takes is vllm
    assert f"quantized by another tool ({layout})" in capsys.readouterr().out


def test_help_explains_the_command_without_loading_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = run("--help", env=os.environ | {"PYTHONPATH": paths})
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout and "exit status is 1" in result.stdout
