"""Whole runs in processes of their own, which may be killed: forked from one that has imported all.

A fresh process takes many seconds to import torch and transformers; a fork of a prepared one takes
none. Nothing computes in the prepared one, so no threads are lost by forking.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["accelerate", "transformers.models.llama.modeling_llama", "analog_integrations.optimum.cli",
     "analog_integrations.optimum.export", "optimum.commands", "runs"]
)  # fmt: skip


class Run:
    """``work(*arguments)`` in a process of its own, its output in ``log``."""

    def __init__(self, log, work, *arguments, **environment):
        kept = {k: v for k, v in os.environ.items() if k.startswith(("ANALOG_", "HF_"))}
        environment = kept | {"OMP_NUM_THREADS": "1"} | environment
        self.log = Path(log)
        self.log.write_text("")  # of a run before this one
        self.process = _context.Process(
            target=_child, args=(str(log), environment, work, arguments), daemon=True
        )
        self.process.start()

    def wait(self, seconds=None):
        """The exit status, negative for a signal; None: still running after ``seconds``."""
        self.process.join(seconds)
        return self.process.exitcode

    def send(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    @property
    def output(self):
        return self.log.read_text()


def launch(count, log, work, *arguments, **environment):
    """The same work in ``count`` processes, as ``accelerate launch`` starts them."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(count),
    } | environment  # fmt: skip
    return [
        Run(f"{log}.{rank}", work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def export(*arguments):
    """``optimum-cli export analog`` with these arguments."""
    from optimum.commands.optimum_cli import main

    sys.argv = ["optimum-cli", "export", "analog", *map(str, arguments)]
    main()


def broken_export(before, *arguments):
    """The same after ``before()``, which breaks something."""
    before()
    export(*arguments)


def sharded_export(*arguments):
    """The same with the weights sharded by FSDP2."""
    _allow_fsdp_on_cpu()
    export(*arguments)


def zero_export(*arguments):
    """The same with gradients and optimizer sharded by DeepSpeed's ZeRO-2."""
    _allow_deepspeed_on_cpu()
    export(*arguments)


def _allow_deepspeed_on_cpu():
    """Let Accelerate use DeepSpeed on a CPU, which it reserves for accelerators; DeepSpeed can."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    usual = AcceleratorState.__init__

    def init(self, *args, deepspeed_plugin=None, **kwargs):
        usual(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if deepspeed_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins, self._mixed_precision = deepspeed_plugin, "no"
            self.distributed_type = PartialState._shared_state["distributed_type"] = (
                DistributedType.DEEPSPEED
            )

    AcceleratorState.__init__ = init


def _allow_fsdp_on_cpu():
    """Let Accelerate use FSDP on a CPU, which it reserves for accelerators; torch can."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    usual = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )

    AcceleratorState.__init__ = init


def tensors(directory):
    """All tensors of a checkpoint, by file and name."""
    return {
        f"{path.relative_to(directory)}/{name}": tensor
        for path in sorted(Path(directory).rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def different(first, second):
    """Names of tensors that two checkpoints do not hold alike, to the bit."""
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys() and one
    return [name for name in one if not torch.equal(one[name], two[name])]


def _child(log, environment, work, arguments):
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        try:
            work(*arguments)
        except Exception:
            traceback.print_exc()
            raise


def clip_in_parts(shapes, alpha):
    """Compare clipping of weights in parts, by rows and by columns, with that of whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    from analog_plugin import processes
    from analog_plugin.ops.clip import clip_to_sigma, peak_to_sigma

    processes.join("cpu")
    mesh = init_device_mesh("cpu", (processes.process_count(),))
    for seed, shape in enumerate(shapes):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for transposed in (False, True):  # as FSDP2 shards nn.Linear's and Conv1D's weights
            stored = whole.t().contiguous() if transposed else whole.clone()
            parts = distribute_tensor(stored, mesh, [Shard(0)])
            seen = parts.t() if transposed else parts
            peak = peak_to_sigma(whole)
            assert abs(peak_to_sigma(seen) - peak) <= 1e-6 * peak, (shape, transposed)
            expected = whole.clone()
            clip_to_sigma(expected, alpha)
            clip_to_sigma(seen, alpha)
            made = parts.full_tensor()
            torch.testing.assert_close(
                made.t() if transposed else made, expected, rtol=1e-6, atol=1e-7
            )
    print("compared", len(shapes))


def train_by_zero(output, dtype, bf16, trainable):
    """Train in ZeRO-2 and look after each step at weights, their fp32 masters and the ranges."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from tiny_models import tiny, token_ids
    from transformers import TrainerCallback, TrainingArguments

    from analog_plugin import (
        AnalogScheme,
        AnalogTrainer,
        calibrate_ranges,
        convert_to_analog,
        processes,
    )
    from analog_plugin.layers import analog_layers
    from analog_plugin.ops.clip import clip_to_sigma

    _allow_deepspeed_on_cpu()
    processes.join("cpu")
    teacher = tiny().to(dtype)
    # Narrow ranges: each clips inputs, and so has a gradient that differs between processes.
    scheme = AnalogScheme(tile_rows=32, range_init_std=1.5)
    model = convert_to_analog(tiny().to(dtype), scheme)
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable == "all" or "_proj" in name)
    fixed = model.model.layers[0].self_attn.q_proj.weight
    fixed.requires_grad_(trainable == "all")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    layers = [(name, layer) for name, layer in analog_layers(model) if layer.weight.requires_grad]
    ranges = [layer.input_range.detach().clone() for _, layer in layers]
    seen, norms = [], []
    usual_norm = DeepSpeedZeroOptimizer.scaled_global_norm

    def counted_norm(*args, **kwargs):
        norms.append(usual_norm(*args, **kwargs))
        return norms[-1]

    DeepSpeedZeroOptimizer.scaled_global_norm = counted_norm

    class Lost(AnalogTrainer):
        """The second step's loss is not a number in the second process."""

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            lost = self.state.global_step == 1 and processes.process_rank() == 1
            return loss * float("nan") if lost else loss

    def masters():
        return {name: safe_get_full_fp32_param(layer.weight) for name, layer in layers}

    class Looks(TrainerCallback):
        """Before and after the clipping: its own callback comes later."""

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.unclipped = masters()

        def on_step_end(self, args, state, control, **kwargs):
            clipped = masters()
            for name, layer in layers:
                before = self.unclipped[name]
                if state.global_step != 2:  # which is skipped
                    bound = 2.5 * before.to(layer.weight.dtype).double().std(1, keepdim=True)
                    expected = before.double().clamp(-bound, bound)
                    torch.testing.assert_close(
                        clipped[name].double(), expected, rtol=1e-5, atol=1e-8
                    )
                    assert not torch.equal(clipped[name], before), name
                assert torch.equal(layer.weight, clipped[name].to(layer.weight.dtype)), name
                assert layer.input_range.dtype == torch.float32
            moments = safe_get_full_optimizer_state(layers[0][1].weight, "exp_avg")
            seen.append((clipped, moments, [layer.input_range.clone() for _, layer in layers]))

    arguments = TrainingArguments(
        output_dir=output, max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=2, learning_rate=1e-3, bf16=bf16, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    arguments.device  # noqa: B018
    vars(arguments)["_setup_devices"] = torch.device("cpu")
    rows = [{"input_ids": row} for row in token_ids(24, 16, seed=1)]
    trainer = Lost(
        model, teacher=teacher, args=arguments, train_dataset=rows, callbacks=[Looks()],
        noise_seed=0,
    )  # fmt: skip
    callback = trainer.analog_callback
    trainer.train()

    assert len(norms) == 3  # one a step, the Trainer's log and clipping included
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged[0] == float(norms[0]) and logged[2] == float(norms[2]) != logged[0]
    (first, momentum, _), (skipped, same, held), (last, _, _) = seen
    assert callback.skipped_steps == 1 and torch.equal(momentum, same)
    assert all(torch.equal(first[name], skipped[name]) for name in first)
    assert not any(torch.equal(last[name], skipped[name]) for name in last)
    for old, before, now in zip(ranges, seen[0][2], held, strict=True):
        assert torch.equal(before, now) and not torch.equal(old, now)
    for name, layer in layers:
        assert layer.weight.dtype == dtype and torch.equal(layer.weight, last[name].to(dtype))
    for name, parameter in model.named_parameters():
        if parameter is fixed and name in frozen:  # clipped all the same, in both steps
            clip_to_sigma(frozen[name], 2.5)
            clip_to_sigma(frozen[name], 2.5)
            torch.testing.assert_close(parameter.detach(), frozen[name], rtol=1e-3, atol=0)
        else:
            assert name not in frozen or torch.equal(parameter, frozen[name]), name
    for parameter in model.parameters():  # alike in all processes
        assert all(torch.equal(parameter, other) for other in processes.gathered(parameter.data))
    print("compared", len(layers), "layers")
