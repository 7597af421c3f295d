"""The tokens of a run: to train on, to calibrate with, and to be measured on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from analog_plugin.data import evaluation_tokens, generate_dataset, load_tokens
from analog_plugin.data.limits import check_sequence_length, check_token_ids
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


def training_rows(model: nn.Module, recipe: AnalogRecipe, tokenizer: Any, dataset: Any) -> Tensor:
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
    check_sequence_length(model, data.sequence_length)
    rows = load_tokens(
        source, tokenizer, data.sequence_length, tokens=data.tokens, text_column=data.text_column
    )
    check_token_ids(model, rows, "The dataset")
    return rows


def calibration_batches(
    model: nn.Module, rows: Tensor, recipe: AnalogRecipe
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Batches for calibration, and the rows behind them (the last ones where none are left)."""
    size = split_training(recipe.training)[1].get("per_device_train_batch_size", 8)
    device = next(model.parameters()).device
    batches = rows.split(size)[: resolve_scheme(recipe.scheme).range_init_batches]
    rest = rows[sum(map(len, batches)) :]
    held_out = rest if len(rest) else rows[-size:]
    return [{"input_ids": batch.to(device)} for batch in batches], held_out
