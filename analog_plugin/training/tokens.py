"""The tokens of a run: to train on, to calibrate with, and to be measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from analog_plugin.data import evaluation_tokens, generate_dataset, load_tokens
from analog_plugin.data.limits import check_sequence_length, check_token_ids
from analog_plugin.data.shards.rows import ShardRows, TokenRows, is_shards
from analog_plugin.errors import AnalogError
from analog_plugin.presets import resolve_scheme
from analog_plugin.recipe import AnalogRecipe, split_training


def evaluation_rows(model: nn.Module, recipe: AnalogRecipe, tokenizer: Any) -> Tensor | None:
    """What the table is measured on, [blocks, length]; None where the recipe measures nothing.

    Raises:
        AnalogError: There is no tokenizer, or the corpus does not fit the model.
    """
    settings = recipe.evaluation
    if settings is None:
        return None
    if tokenizer is None:
        raise AnalogError(
            "The evaluation needs a tokenizer; give tokenizer=, or write evaluation: null."
        )
    check_sequence_length(model, settings.length, "evaluation.length")
    tokens = evaluation_tokens(tokenizer, settings.blocks, settings.length, settings.corpus)
    check_token_ids(model, tokens, "The evaluation corpus")
    return tokens


#: What is chosen by its effect on the whole model looks at fewer rows.
_HELD_OUT = 64


def training_rows(
    model: nn.Module, recipe: AnalogRecipe, tokenizer: Any, dataset: Any
) -> TokenRows:
    """Training tokens [rows, length]: sampled from the digital ``model``, or read.

    Args:
        dataset: Instead of the recipe's ``data.source``: what ``load_tokens`` reads, or token ids.

    Raises:
        AnalogError: They cannot be read, or do not fit the model.
    """
    data = recipe.data
    source = data.source if dataset is None else dataset
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.shape[0] == 0 or source.shape[1] < 2:
            raise AnalogError(
                f"The dataset has the shape {tuple(source.shape)}, but must be token ids "
                "[rows, length] with at least one row and two tokens."
            )
        check_sequence_length(model, source.shape[1])
        check_token_ids(model, source, "The dataset")
        return source.long()
    if isinstance(source, str) and source == "self":
        return generate_dataset(
            model,
            data.tokens,
            data.sequence_length,
            bos_token_id=data.bos_token_id,
            temperature=data.temperature,
            top_k=data.top_k,
            ignore_eos=data.ignore_eos,
            batch_size=data.batch_size,
            seed=data.seed,
        )
    if is_shards(source):
        return _shard_rows(model, recipe, source)
    check_sequence_length(model, data.sequence_length)
    rows = load_tokens(
        source, tokenizer, data.sequence_length, tokens=data.tokens, text_column=data.text_column
    )
    check_token_ids(model, rows, "The dataset")
    return rows


def _shard_rows(model: nn.Module, recipe: AnalogRecipe, source: Any) -> ShardRows:
    """All rows of a directory of shards, but for what the recipe itself says."""
    data = recipe.data
    rows = ShardRows(source)
    length = rows.shape[1]
    if "sequence_length" in data.model_fields_set and data.sequence_length != length:
        raise AnalogError(
            f"sequence_length is {data.sequence_length}, but the rows of {source} have {length} "
            f"tokens; write data: {{sequence_length: {length}}}."
        )
    if "tokens" in data.model_fields_set:
        rows = ShardRows(source, rows=max(data.tokens // length, 1))
    check_sequence_length(model, length)
    check_token_ids(model, torch.tensor([rows.largest_token]), f"The dataset {source}")
    return rows


class TrainingTokens(Dataset):
    """What a Trainer reads: rows [rows, length], each when it is asked for."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def calibration_batches(
    model: nn.Module, rows: TokenRows, recipe: AnalogRecipe
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Batches for calibration, and the rows behind them (the last ones where none are left)."""
    size = split_training(recipe.training)[1].get("per_device_train_batch_size", 8)
    device = next(model.parameters()).device
    used = min(resolve_scheme(recipe.scheme).range_init_batches * size, len(rows))
    batches = rows[:used].split(size)
    rest = rows[used : used + _HELD_OUT]
    held_out = rest if len(rest) else rows[-size:]
    return [{"input_ids": batch.to(device)} for batch in batches], held_out
