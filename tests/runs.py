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
