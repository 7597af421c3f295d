"""Several processes of one run: joining them, sums over them, and what the first does for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from analog_plugin.errors import AnalogError

T = TypeVar("T")
Reduction = Literal["SUM", "MAX"]

#: Seconds that a collective of the training waits for a process, unless ``ddp_timeout`` says else.
DEFAULT_TIMEOUT = 1800
# While the first process samples or measures, for hours maybe, the others wait. They need no limit
# to end with it: its death closes their connections.
_PATIENCE = timedelta(days=365)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


class ProcessFailed(AnalogError):
    """Another process of the run failed, and said why itself."""


def join(device: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started; alone, do nothing.

    Args:
        device: Where to compute; None: a GPU if there is one.
        timeout: Seconds after which a collective that some process does not reach is an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _joined():
        return
    from accelerate import PartialState

    cpu = not torch.cuda.is_available() if device is None else torch.device(device).type == "cpu"
    PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))


def process_rank() -> int:
    """Index of this process; 0 is the first."""
    return dist.get_rank() if _joined() else 0


def process_count() -> int:
    """Number of processes."""
    return dist.get_world_size() if _joined() else 1


def all_reduce(values: Tensor, op: Reduction = "SUM", group: Any = None) -> Tensor:
    """Reduce ``values`` over all processes, or a group of them, in place; alone, do nothing."""
    if _joined() and not _alone.get():
        dist.all_reduce(values, op=getattr(dist.ReduceOp, op), group=group)
    return values


def by_first(work: Callable[[], T]) -> T:
    """Let the first process do ``work`` alone while the others wait, and give all its result.

    Within it nothing is reduced over processes.

    Args:
        work: Its result is pickled for the others; large tensors go by :func:`share_model`.

    Raises:
        ProcessFailed: In the other processes, when ``work`` failed in the first.
    """
    if process_count() == 1:
        return work()
    with _patient_group() as group:
        if process_rank() > 0:
            made: list[Any] = [None, None]
            dist.broadcast_object_list(made, src=0, group=group)
            if made[0] is not None:
                raise ProcessFailed(made[0])
            return made[1]
        token = _alone.set(True)
        try:
            result = work()
        except BaseException as error:
            failed = f"The first process failed: {str(error) or type(error).__name__}"
            with contextlib.suppress(RuntimeError):  # the others may be gone too
                dist.broadcast_object_list([failed, None], src=0, group=group)
            raise
        finally:
            _alone.reset(token)
        dist.broadcast_object_list([None, result], src=0, group=group)
        return result


def gathered(value: T) -> list[T]:
    """What each process has, in the order of processes."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * process_count()
    dist.all_gather_object(found, value)
    return found


@torch.no_grad()
def share_model(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers, in place."""
    if process_count() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _patient_group() -> Iterator[Any]:
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
