"""Sampling rows of tokens from a model, in batches and with a key-value cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analog_plugin.data.pack import pack_documents
from analog_plugin.errors import AnalogError
from analog_plugin.modes import evaluation_mode
from analog_plugin.progress import progress_counter


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rows are drawn; see :func:`~analog_plugin.data.generate_dataset`.

    Args:
        eos_token_ids: Tokens at which a document ends; empty: every row is sampled to its end.
    """

    sequence_length: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int | None = None
    batch_size: int = 32


@torch.no_grad()
def sample_rows(model: Any, sampling: Sampling, rows: int, seed: int) -> Tensor:
    """Token ids [rows, sequence_length], each row begun with the beginning-of-sequence token.

    Where documents end, they are packed into rows. torch's global generators are left as they were.
    """
    length, stops = sampling.sequence_length, set(sampling.eos_token_ids)
    device = next(model.parameters()).device
    documents: list[Tensor] = []
    have = 0
    with (
        evaluation_mode(model),
        own_generation_config(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress_counter(desc="Sampling training tokens", total=rows * length, unit="tok") as bar,
    ):
        torch.manual_seed(seed)
        while have < rows * length:
            count = min(sampling.batch_size, math.ceil((rows * length - have) / length))
            prompt = torch.full((count, 1), sampling.bos_token_id, device=device)
            made = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=1.0,
                min_new_tokens=length - 1 if not stops else None,
                max_new_tokens=length - 1,
                max_length=None,
                eos_token_id=sorted(stops) if stops else None,
                pad_token_id=0,
                repetition_penalty=1.0,
                use_cache=True,
            ).cpu()
            for row in made:
                document = until_end(row, stops)
                documents.append(document)
                have += len(document)
                bar.update(len(document))
    return pack_documents(documents, length)[:rows]


@contextlib.contextmanager
def own_generation_config(model: Any) -> Iterator[None]:
    """Within this context only the arguments of ``generate`` count.

    What a model brings (beams, penalties, suppressed tokens, a time limit) would bias the samples.
    """
    kept = model.generation_config
    model.generation_config = type(kept)()
    try:
        yield
    finally:
        model.generation_config = kept


def until_end(row: Tensor, stops: set[int]) -> Tensor:
    """The row up to and with its first end-of-sequence token after the start."""
    if not stops:
        return row
    ends = [i for i, token in enumerate(row.tolist()) if i > 0 and token in stops]
    return row[: ends[0] + 1] if ends else row


def first_token(name: str, *configs: Any) -> int:
    """The token that the first of a model's configurations to have one begins sequences with.

    Raises:
        AnalogError: None of them names one.
    """
    for source in configs:
        start = getattr(source, "bos_token_id", None)
        if isinstance(start, list):
            start = start[0] if start else None
        if start is not None:
            return int(start)
    raise AnalogError(
        f"{name} names no beginning-of-sequence token to sample from; write "
        "data: {bos_token_id: N} or give a dataset."
    )
