"""The command in two processes over gloo, as launchers start them, beside one process."""

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip
WAYS = {"ddp": (runs.export, {}), "fsdp2": (runs.sharded_export, FSDP)}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(EXAMPLES / "zero2.json"),
}  # fmt: skip


@pytest.fixture
def recipe(fields, write_recipe):
    """The same global batch in each recipe: one process takes twice as many micro-batches."""

    def make(processes, steps, training=None, **changes):
        training = fields["training"] | {
            "max_steps": steps, "learning_rate": 1e-4, "logging_steps": 1, "save_steps": 2,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // processes,
        } | (training or {})  # fmt: skip
        data = fields["data"] | {"tokens": 1024}
        made = fields | {"training": training, "data": data} | changes
        return write_recipe(made, f"{processes}.yaml")

    return make


@pytest.fixture
def export(model_directory, recipe, tmp_path):
    def start(way, steps, *options, out=None, **changes):
        ways = WAYS | {None: (runs.export, {}), "zero2": (runs.zero_export, ZERO)}
        work, environment = ways[way]
        processes = 1 if way is None else 2
        arguments = [
            "--model", model_directory, "--recipe", recipe(processes, steps, **changes),
            "--device", "cpu", *options, tmp_path / (out or str(way)),
        ]  # fmt: skip
        log = tmp_path / "log"
        if way is None:
            return [runs.Run(log, work, *arguments)]
        return runs.launch(processes, log, work, *arguments, **environment)

    return start


def finished(started):
    statuses = [run.wait(240) for run in started]
    assert statuses == [0] * len(started), [run.output[-3000:] for run in started]


def losses(directory):
    record = json.loads((directory / "analog" / "training.json").read_text())
    return torch.tensor([entry["loss"] for entry in record["loss_history"]])


def farthest(first, second):
    """The largest difference between the tensors of two checkpoints."""
    one, two = runs.tensors(first), runs.tensors(second)
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


def test_two_processes_do_what_one_does_with_twice_the_micro_batches(export, tmp_path):
    for way in (None, *WAYS):
        finished(export(way, 4))
    for way in WAYS:
        record = json.loads((tmp_path / way / "analog" / "training.json").read_text())
        assert record["processes"] == 2 and record["steps"] == 4
        assert (losses(tmp_path / way) - losses(tmp_path / "None")).abs().max() < 1e-6
        assert farthest(tmp_path / way, tmp_path / "None") < 1e-4
        # The other process says nothing and writes nothing.
        assert "Written to" not in (tmp_path / "log.1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_stopped_by_sigterm_go_on_to_the_same_losses(way, export, tmp_path):
    steps = 12
    finished(export(way, steps, out="whole"))
    stopped = export(way, steps, out="out")
    while "'epoch'" not in stopped[0].output:
        assert stopped[0].wait(0.05) is None, stopped[0].output
    stopped[1].send(signal.SIGTERM)  # one of them is told, both save and stop
    assert [run.wait(240) for run in stopped] == [143, 143], stopped[0].output
    assert "stopped by SIGTERM after step" in stopped[0].output
    assert "Go on with: optimum-cli export analog" in stopped[0].output
    finished(export(way, steps, "--resume", out="out"))
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "out"))
    assert runs.different(tmp_path / "whole", tmp_path / "out") == []


def test_where_a_process_dies_the_other_ends_with_an_error(export, tmp_path):
    started = export("ddp", 100_000)
    while "'epoch'" not in started[0].output:
        assert started[0].wait(0.05) is None, started[0].output
    begin = time.monotonic()
    started[1].send(signal.SIGKILL)
    assert started[0].wait(120) not in (None, 0)
    assert time.monotonic() - begin < 120
    assert not (tmp_path / "ddp").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_loss_curves_agree_over_fifty_steps(way, export, tmp_path):
    for name in (None, way):
        finished(export(name, 50))
    assert len(losses(tmp_path / way)) == 50
    assert (losses(tmp_path / way) - losses(tmp_path / "None")).abs().max() < 1e-4
    assert farthest(tmp_path / way, tmp_path / "None") < 1e-4


@needs_deepspeed
def test_two_processes_under_zero2_do_what_one_does(export, fields, tmp_path):
    narrow = fields["scheme"] | {"range_init_std": 1.5}  # ranges clip, and have gradients
    for way in (None, "zero2"):
        finished(export(way, 10, training={"save_strategy": "no"}, scheme=narrow))
    assert (losses(tmp_path / "zero2") - losses(tmp_path / "None")).abs().max() < 1e-6
    assert farthest(tmp_path / "zero2", tmp_path / "None") < 1e-4


@needs_deepspeed
def test_two_processes_under_zero2_begin_in_bf16_where_one_does(export, tmp_path):
    for way in (None, "zero2"):
        training = {"save_strategy": "no", "bf16": True}
        finished(export(way, 1, "--dtype", "bfloat16", training=training))
    assert (losses(tmp_path / "zero2") - losses(tmp_path / "None")).abs().max() < 1e-7


@needs_deepspeed
@pytest.mark.parametrize(
    "dtype, bf16, trainable",
    [
        (torch.float32, False, "all"),
        (torch.float32, True, "all"),
        (torch.float32, True, "analog"),
        (torch.bfloat16, True, "all"),
    ],
    ids=["fp32", "bf16", "bf16 with frozen weights", "bf16 model"],
)
def test_zero2_clips_the_fp32_weights_and_skips_in_all_processes(dtype, bf16, trainable, tmp_path):
    log = tmp_path / "log"
    finished(runs.launch(2, log, runs.train_by_zero, tmp_path, dtype, bf16, trainable, **ZERO))


@needs_deepspeed
def test_zero2_keeps_no_checkpoints(export):
    for run in export("zero2", 4):
        assert run.wait(240) == 1
        assert 'write in the recipe training: {save_strategy: "no"}' in run.output
