"""Memory for tensors of a weight's size, which each forward and backward asks for anew."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# glibc keeps smaller blocks for the next call; a larger one is mapped and unmapped each time, and
# its first write then waits for the kernel page by page: longer than for drawing half the noise.
_MAPPED = 32 * 2**20


def large_empty(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``torch.empty``; large and on Linux in huge pages (2 MiB), which spare the kernel's time."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < _MAPPED or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages, or without the memory: torch says so better
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(block, dtype=dtype).view(shape)
