"""The rows of the table of results, measured along a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport, evaluate_noise
from analog_plugin.modes import evaluation_mode
from analog_plugin.plugins.types import Exporter
from analog_plugin.recipe import AnalogRecipe


class Measurement:
    """Puts reports by name into ``reports``: a model against its teacher, as the recipe asks.

    Args:
        teacher: The digital original.
        recipe: Its ``evaluation`` says what is measured.
        tokens: [blocks, length]; None: nothing is measured.
        reports: What is there already is not measured again.
    """

    def __init__(
        self,
        teacher: nn.Module,
        recipe: AnalogRecipe,
        tokens: Tensor | None,
        reports: dict[str, NoiseReport],
    ) -> None:
        self.recipe, self.settings, self.reports = recipe, recipe.evaluation, reports
        self.tokens = None if self.settings is None else tokens
        if self.settings is not None and self.tokens is not None:
            self.reference = Reference.of(teacher, self.tokens, self.settings.batch_size)

    def forget_model(self) -> None:
        """Keep nothing of the teacher but its head and what it made of the tokens."""
        if self.tokens is not None:
            self.reference.states = self.reference.states.head_alone()

    def __call__(self, name: str, model: nn.Module, **options: Any) -> None:
        """Measure ``model`` without noise and under the recipe's."""
        if self.settings is None or self.tokens is None or name in self.reports:
            return
        self.reports[name] = evaluate_noise(
            model,
            self.tokens,
            (None, *self.settings.noise),
            self.settings.seeds,
            reference=self.reference,
            batch_size=self.settings.batch_size,
            label=name,
            **options,
        )

    def reading(self, model: nn.Module, exporter: Exporter, plan: Any) -> None:
        """Measure what loaders without this package will make of a profile."""
        if self.settings is None or self.tokens is None or exporter.reading is None:
            return
        try:
            with exporter.reading(model, plan), evaluation_mode(model):
                size = self.settings.batch_size
                metrics = dict(fidelity(model, self.tokens, self.reference, size))
        except torch.OutOfMemoryError:  # rounded weights stand beside the others; training is done
            return
        several = len(self.recipe.deploy.profiles) > 1
        name = f"loaded plainly, {exporter.name}" if several else "loaded plainly"
        self.reports[name] = NoiseReport([NoiseCell("none", None, metrics)])


def plain_reports(reports: Mapping[str, NoiseReport]) -> dict[str, Any]:
    """Reports as plain values, by name."""
    return {name: report.to_dict() for name, report in reports.items()}
