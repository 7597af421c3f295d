"""Packing: documents of any length become rows of one length."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def pack_documents(documents: Iterable[Tensor | list[int]], length: int) -> Tensor:
    """Concatenate ``documents`` and cut them into rows [N, length]; an incomplete end is dropped.

    Example:
        >>> pack_documents([[1, 2, 3], [4, 5]], 2).tolist()
        [[1, 2], [3, 4]]
    """
    pieces = [torch.as_tensor(document, dtype=torch.long).reshape(-1) for document in documents]
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
    rows = stream.numel() // length
    return stream[: rows * length].view(rows, length)
