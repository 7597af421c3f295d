"""``AnalogModifier``: hardware-aware training as a modifier of llm-compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, model_validator

from analog_plugin.checkpoint.save import save_profiles
from analog_plugin.data import pack_documents
from analog_plugin.errors import AnalogError
from analog_plugin.pretrained import load_tokenizer
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.pipeline import AnalogResult, train_analog


class AnalogModifier(Modifier):
    """Train a model to survive analog in-memory computing hardware.

    After 'Analog Foundation Models' (arXiv 2505.09663): the model, run through simulated analog
    layers, is distilled from its own full-precision self.

    Example recipe::

        analog_stage:
          analog_modifiers:
            AnalogModifier:
              scheme: {preset: AFM, tile_rows: 512}
              ignore: [lm_head]
              training: {max_steps: 80, learning_rate: 5.0e-5}
              deploy: {profile: analog-fp}

    The fields are those of :class:`~analog_plugin.recipe.AnalogRecipe`; a dataset given to
    ``oneshot`` takes the place of ``data``.

    Lifecycle:
        - on_initialize: keep the dataset and the tokenizer
        - on_calibration_start: convert, calibrate, train, measure
        - on_finalize: put the checkpoint exporter in the place of ``model.save_pretrained``
    """

    scheme: str | dict[str, Any] = "AFM"
    targets: list[str] = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    assignment: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    distillation: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] | None = Field(default_factory=dict)
    evaluation: dict[str, Any] | None = Field(default_factory=dict)
    deploy: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    _dataset: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)
    _result: AnalogResult | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _reject_wrong_settings(self) -> AnalogModifier:
        self.analog_recipe()
        return self

    def analog_recipe(self) -> AnalogRecipe:
        """The settings as the core takes them, validated."""
        return AnalogRecipe.parse({name: getattr(self, name) for name in AnalogRecipe.model_fields})

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Keep what training needs."""
        self._dataset = _token_rows(kwargs.get("calib_data"), self.analog_recipe())
        # The one beside the model: llm-compressor hands its own to no modifier.
        self._tokenizer = load_tokenizer(state.model.config.name_or_path)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Do the work: the same core function as the command runs."""
        with torch.enable_grad():
            self._result = train_analog(
                state.model, self.analog_recipe(), tokenizer=self._tokenizer, dataset=self._dataset
            )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """From here on ``model.save_pretrained(directory)`` writes the analog checkpoint."""
        if self._result is None:
            raise AnalogError(
                "AnalogModifier was finalized without having run; use it through "
                "llmcompressor.oneshot."
            )
        result, tokenizer = self._result, self._tokenizer

        def save_pretrained(directory: str | Path, **_host_options: Any) -> None:
            # Beside a single one llm-compressor saves it itself.
            beside = tokenizer if len(result.plans) > 1 else None
            save_profiles(state.model, directory, result.plans, tokenizer=beside, result=result)

        state.model.save_pretrained = save_pretrained
        self._dataset = self._tokenizer = None
        return True


def _token_rows(loader: Any, recipe: AnalogRecipe) -> torch.Tensor | None:
    """The tokens of a calibration dataloader, padding removed, packed into rows."""
    if loader is None:
        return None
    documents = []
    for batch in loader:
        if "input_ids" not in batch:
            raise AnalogError(
                "The dataset given to oneshot has batches without input_ids; give it a tokenizer "
                "too, or tokenized rows."
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        documents += [row[kept] for row, kept in zip(ids, keep, strict=True)]
    lengths = {len(document) for document in documents}
    if len(lengths) == 1:  # whole sequences already: keep them as they are
        return torch.stack(documents)
    rows = pack_documents(documents, recipe.data.sequence_length)
    if rows.shape[0] == 0:
        raise AnalogError(
            "The dataset given to oneshot is empty or shorter than one sequence of "
            f"{recipe.data.sequence_length} tokens; give more text or write a smaller "
            "data: {sequence_length: N}."
        )
    return rows
