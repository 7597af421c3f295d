"""Matrix products into memory that is there already, or of a type that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out[...] = a @ b``; ``out`` may be a strided block or of another type."""
    b = b.to(a.dtype)
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)


def product_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of two matrices of one type, in ``dtype``; autocast or not."""
    if dtype == torch.float32 != a.dtype and sums_in_fp32(a.device):
        return torch.mm(a, b, out_dtype=dtype)
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    product(a, b, out)
    return out


def sums_in_fp32(device: torch.device) -> bool:
    """Whether products of half precision there give their fp32 sums as they are."""
    return device.type == "cuda" and torch.version.hip is None
