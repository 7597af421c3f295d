"""Memory for tensors of a weight's size, which each forward and backward asks for anew."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

# The C library keeps smaller blocks for the next call. A larger one it maps and unmaps each time,
# and the first writing then waits for the kernel page by page: half as long as drawing the noise.
_MAPPED = 32 * 2**20
_free: dict[int, list[mmap.mmap]] = {}


def large_empty(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``torch.empty``; large ones on a CPU in memory that an earlier one of their size gave back.

    So no more memory is kept than was in use at one time; :func:`release_memory` gives it up.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < _MAPPED or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _free.get(size)
    try:
        block = (
            blocks.pop()
            if blocks
            else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
    except OSError:  # torch says better how much was asked for
        return torch.empty(shape, dtype=dtype, device=device)
    # The tensor holds this array alone, which goes when the last tensor on its memory does.
    array = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(array, _give_back, block, size).atexit = False
    return torch.from_numpy(array).view(dtype).view(shape)


def release_memory() -> None:
    """Give the memory that waits for its next use back to the system."""
    _free.clear()


def _give_back(block: mmap.mmap, size: int) -> None:
    _free.setdefault(size, []).append(block)
