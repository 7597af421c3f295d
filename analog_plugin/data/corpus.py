"""Text for evaluation that needs no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.data.load import load_tokens
from analog_plugin.errors import AnalogError

#: Python's own reference texts, part of every CPython: about 465,000 characters of technical
#: English.
PYDOC_TOPICS = "pydoc_data.topics"


def evaluation_tokens(
    tokenizer: Any, blocks: int, length: int, corpus: Any = PYDOC_TOPICS
) -> Tensor:
    """Evenly spaced blocks [blocks, length] of a text.

    Where the tokenizer puts a beginning-of-sequence token before every text, each block begins with
    it too, and has none elsewhere.

    Args:
        corpus: ``"pydoc_data.topics"``, or any source that
            :func:`~analog_plugin.data.load_tokens` reads.

    Raises:
        AnalogError: The text is shorter than ``blocks`` blocks.
    """
    start = _leading_token(tokenizer)
    body = length if start is None else length - 1
    if corpus == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
        ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        rows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    else:
        rows = load_tokens(corpus, tokenizer, body, special_tokens=False)
    if rows.shape[0] < blocks:
        raise AnalogError(
            f"The corpus {corpus} has {rows.shape[0]} blocks of {length} tokens, but {blocks} were "
            f"asked for; write blocks: {rows.shape[0]}."
        )
    chosen = rows[torch.arange(blocks) * rows.shape[0] // blocks]
    if start is None:
        return chosen
    return torch.cat([torch.full((blocks, 1), start), chosen], dim=1)


def _leading_token(tokenizer: Any) -> int | None:
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None
