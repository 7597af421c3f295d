"""What the benchmarks share: interleaved timing, paired ratios, memory, tables, JSON files."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from analog_plugin.training.run import computes_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = (
    "analog-plugin", "torch", "transformers", "aihwkit-lightning", "aihwkit", "torchao",
    "liger-kernel",
)  # fmt: skip

#: Operators that torch's table of operations knows by another name.
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


#: On a GPU an action is run so often between two readings of the clock: as in a model, the next is
#: called while the one before still computes.
TOGETHER = 10


def clock(device: torch.device) -> float:
    """Seconds of CPU time of this process; on a GPU of wall time, once its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleave(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each action in each round; on a GPU one of :data:`TOGETHER` runs.

    Every round runs all actions, each time beginning with another one: what slows the machine down
    for a while falls on all of them, and none always follows the same one.
    """
    together = TOGETHER if device.type == "cuda" else 1
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = clock(device)
            for _ in range(together):
                actions[name]()
            if round_ >= warmup:
                times[name].append((clock(device) - start) / together)
    return times


def graphed(action: Callable[[], object]) -> Callable[[], object] | None:
    """``action`` as a CUDA graph, which the GPU runs without Python; None: it cannot be one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            action()
    except RuntimeError:
        torch.cuda.synchronize()
        # The generator would go on taking itself to be captured.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        return None
    return graph.replay


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios a / b, and their interquartile range."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    low, high = min(pairs), max(pairs)
    if len(pairs) > 1:
        low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return {"median": round(statistics.median(pairs), 4), "iqr": round(high - low, 4)}


def shown(figure: Mapping[str, float] | None) -> str:
    """A ratio in a table: median (interquartile range)."""
    return "" if figure is None else f"{figure['median']:.2f} ({figure['iqr']:.2f})"


def megabytes(number: float | None) -> str:
    return "" if number is None else f"{number / 1e6:.1f} MB"


class MemoryUse:
    """Bytes of the tensors made within this context: at the worst moment, and left at its end.

    Attributes:
        peak, left: Known after the context. On a CPU they are the sum over the storages of all
            tensors that operators took or gave and that were not there before, without what an
            operator itself needs; on a GPU the allocator's own figures.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = self.left = 0
        self._live = None if device.type == "cuda" else _LiveBytes()

    def __enter__(self) -> MemoryUse:
        if self._live is not None:
            self._live.__enter__()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
            self.peak, self.left = self._live.peak, self._live.now
        else:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._before
            self.left = torch.cuda.memory_allocated() - self._before


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators meet and that were not there before, until they are freed.

    Also those that no operator made, such as memory that a tensor was laid over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> _LiveBytes:
        before = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
        before += [t.grad for t in before if t.is_leaf and t.grad is not None]
        for storage in _storages(before):
            self._note(storage, 0)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for storage in _storages((args, kwargs, made)):
            self._note(storage, storage.nbytes())
        return made

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, a multiplication and an addition as two.

    Not those within attention: torch's formula refuses heads that share keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        formula = flop_registry.get(_IN_PLACE.get(packet, packet))
        if formula is not None and "attention" not in str(packet):
            # A type that the result is to have is no part of the formulas.
            given = (arg for arg in args if not isinstance(arg, torch.dtype))
            self.operations += formula(*given, **(kwargs or {}), out_val=made)
        return made


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def kept_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that ``forward`` leaves for its backward, beside parameters, inputs and its output."""
    forward()  # what is made once and kept is none of it
    with MemoryUse(device) as use:
        output = forward()
    return use.left - output.untyped_storage().nbytes()


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the arguments that all benchmarks have."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument(
        "--dtypes",
        help="float32,bfloat16 (default: both; float32 where a processor only emulates bfloat16; "
        "bfloat16 on a GPU)",
    )
    made.add_argument("--output", type=Path, help="also write everything as JSON")
    return made


def begin(arguments: argparse.Namespace) -> list[str]:
    """One thread, one seed; the names of the types to measure."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.dtypes:
        return arguments.dtypes.split(",")
    if arguments.device.type == "cuda":
        return ["bfloat16"]
    # Emulated, it would be the emulation that is measured.
    return ["float32", "bfloat16"] if computes_bf16(arguments.device) else ["float32"]


def machine(device: torch.device) -> str:
    """The processor that is measured, by the name that it gives itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(named, name).partition(":")[2].strip() or name
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {torch.get_num_threads()} thread"


def record(
    arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """All that was measured, and where and with what, as plain values.

    What ``--output`` already holds of other types stays, with the settings of its own run under
    ``"earlier"``: a processor that only emulates bfloat16 does not lose what another one measured.
    """
    given = {k: v for k, v in vars(arguments).items() if k not in ("device", "output")}
    settings = {
        "machine": machine(arguments.device),
        "arguments": given | {"device": str(arguments.device)},
        "versions": {"python": platform.python_version(), **_versions()},
    }
    made = {"settings": settings, "rows": list(rows), **more}
    return made | _of_earlier_runs(made, arguments.output)


def _of_earlier_runs(made: Mapping[str, Any], output: Path | None) -> dict[str, Any]:
    """Lists of ``made`` with what an earlier run of the same arguments has of other types."""
    try:
        old = json.loads(output.read_text()) if output is not None else {}
    except (OSError, ValueError):  # none, or what an interrupted run left
        return {}
    now = made["settings"]["arguments"]
    before = old.get("settings", {}).get("arguments", {})
    same = all(before[name] == now[name] for name in before.keys() & now.keys() - {"dtypes"})
    types = {row["dtype"] for row in made["rows"] if "dtype" in row}
    others = {row.get("dtype") for row in old.get("rows", ())} - types - {None}
    if not (types and others and same):
        return {}
    lists = {
        name: value + [row for row in old.get(name, ()) if row["dtype"] in others]
        for name, value in made.items()
        if isinstance(value, list)
    }
    of_type = {t: old.get("earlier", {}).get(t, old["settings"]) for t in sorted(others)}
    return lists | {"earlier": of_type}


def earlier(record: Mapping[str, Any]) -> str:
    """What a table says below it of the types that this run did not measure."""
    return "".join(
        f"\n\n{dtype}: of an earlier run, on {settings['machine']}."
        for dtype, settings in record.get("earlier", {}).items()
    )


def finish(arguments: argparse.Namespace, made: Mapping[str, Any], tables: Iterable[str]) -> None:
    """Print the tables, and write the record where ``--output`` says."""
    print("\n\n".join(tables))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(made, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
