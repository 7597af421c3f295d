"""A torchvision that does not fit this torch: one sentence, wherever it strikes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny

from analog_plugin import AnalogError
from analog_plugin.pretrained import read_model_config

CLI = Path(sys.executable).with_name("optimum-cli")
SENTENCE = "operator torchvision::nms does not exist (RuntimeError); run: pip uninstall torchvision"


@pytest.fixture(scope="module")
def misfit(tmp_path_factory):
    """A package that fails as one built for another torch: its operators are not there."""
    site = tmp_path_factory.mktemp("site")
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text(
        "import torch\n\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def meta_nms(dets, scores, iou_threshold): ...\n"
    )
    (site / "torchvision-0.28.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    (site / "torchvision-0.28.0.dist-info" / "METADATA").write_text(metadata)
    return os.environ | {"PYTHONPATH": str(site)}


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


WAYS_IN = (
    "from analog_plugin import load_checkpoint",
    "from analog_plugin.pretrained import load_causal_lm as load; load('model')",
)
#: Each in a process of its own, all with one import of torch.
ATTEMPTS = """
import os, sys, torch
for code in sys.argv[1:]:
    if os.fork() == 0:
        try:
            exec(code)
            print("no error", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_imports_say_what_to_run(misfit, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    transformers = "from transformers import LlamaForCausalLM"
    result = run(sys.executable, "-c", ATTEMPTS, transformers, *WAYS_IN, env=misfit, cwd=tmp_path)
    alone, *ours = result.stdout.splitlines()
    assert alone.startswith("ModuleNotFoundError") and "torchvision" not in alone  # helps nobody
    assert len(ours) == len(WAYS_IN)
    for line in ours:
        assert line.startswith("BrokenTorchvision") and SENTENCE in line


def test_commands_say_what_to_run(misfit, tmp_path):
    result = run(CLI, "analog", "to-aihwkit", tmp_path, env=misfit)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: torchvision is installed but does not")
    assert SENTENCE in result.stderr and "Traceback" not in result.stderr


def test_where_torchvision_is_well_errors_stay_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # put back afterwards
    del sys.modules["torchvision"]
    with pytest.raises(AnalogError, match="nowhere is neither a local model directory"):
        read_model_config("nowhere")
    assert "torchvision" in sys.modules  # it was tried
