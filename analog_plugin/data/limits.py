"""The limits that a model sets to its input: positions and vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError


def check_sequence_length(model: Any, length: int, field: str = "sequence_length") -> None:
    """Refuse sequences that the model's positions do not reach.

    Args:
        model: The model that will read them, or its configuration.
        length: Their length.
        field: What the user calls it.

    Raises:
        AnalogError: ``length`` is longer than the model allows.
    """
    config = getattr(model, "config", model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        limit = getattr(config, "n_positions", None)
    if limit is not None and length > limit:
        raise AnalogError(
            f"{field} is {length}, but the model allows at most {limit}; write {field}: {limit}."
        )


def check_token_ids(model: Any, ids: Tensor, source: str) -> None:
    """Refuse tokens that the model does not have.

    Args:
        model: The model that will read them.
        ids: Token ids of any shape.
        source: What the user calls them.

    Raises:
        AnalogError: They are no whole numbers, or one is negative or beyond the vocabulary.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise AnalogError(
            f"{source} holds values of type {ids.dtype}, but must hold token ids (torch.long)."
        )
    size = model.get_input_embeddings().weight.shape[0]
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise AnalogError(
            f"{source} holds the token id {int(wrong[0])}, but the model's ids run from 0 to "
            f"{size - 1}; give ids, or a tokenizer, of this model."
        )
