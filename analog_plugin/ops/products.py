"""Matrix products into memory that is there already."""

from __future__ import annotations

from torch import Tensor, matmul


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out[...] = a @ b``; ``out`` may be a strided block or of another type."""
    b = b.to(a.dtype)
    if out.dtype == a.dtype:
        matmul(a, b, out=out)
    else:
        out.copy_(a @ b)
