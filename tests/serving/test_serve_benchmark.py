"""The serving benchmark compares directories with the original, and lists what vLLM refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
OPTIONS = "--dtypes bfloat16 --rows 2 --prompt 4 --tokens 4 --repeats 2"


def test_directories_are_measured_beside_the_original(checkpoint, engine, sizes, tmp_path):
    original = tmp_path / "original"
    tiny("llama", **sizes).save_pretrained(original)
    directories = [original, checkpoint("llama", "w8a8"), checkpoint("llama", "w8a8o8")]
    command = [sys.executable, ROOT / "benchmarks" / "serve.py", *directories, *OPTIONS.split()]
    command += ["--vllm", engine / "python", "--output", tmp_path / "serve.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Failed to find a kernel" in done.stdout and "1 thread:\n\n| " in done.stdout
    before, served, refused = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert before["to_original"] == {"median": 1.0, "iqr": 0.0} and before["kernels"] == []
    assert served["kernels"] == ["CPUInt8ScaledMMLinearKernel"]
    assert len(served["seconds"]) == 2 and served["tokens_per_second"] > 0
    assert served["bytes"] < before["bytes"] and "seconds" not in refused
