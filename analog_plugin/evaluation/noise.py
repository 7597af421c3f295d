"""Evaluation under programming noise: the seed is the unit of replication."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError, shown
from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.layers import analog_layers, digital_layers, forward_state
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import noise_label, resolve_noise
from analog_plugin.plugins.types import Evaluator
from analog_plugin.progress import progress_bar


@dataclass(frozen=True)
class NoiseCell:
    """Metrics of one noise model under one seed (None: no noise)."""

    noise: str
    seed: int | None
    metrics: dict[str, float]


@dataclass
class NoiseReport:
    """Metrics by noise and seed, and their mean and standard deviation over seeds."""

    cells: list[NoiseCell] = field(default_factory=list)

    def values(self, noise: str, metric: str) -> list[float]:
        """The metric under each seed."""
        return [
            cell.metrics[metric]
            for cell in self.cells
            if cell.noise == noise and metric in cell.metrics
        ]

    def mean(self, noise: str, metric: str) -> float:
        """Mean over seeds; NaN where it was not measured."""
        values = self.values(noise, metric)
        return statistics.fmean(values) if values else math.nan

    def std(self, noise: str, metric: str) -> float:
        """Standard deviation over seeds (n - 1); NaN for a single one."""
        values = self.values(noise, metric)
        # statistics itself fails on infinities and NaN.
        enough = len(values) > 1 and all(map(math.isfinite, values))
        return statistics.stdev(values) if enough else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one record a cell; :meth:`from_dict` reads them back."""
        return {"cells": [asdict(cell) for cell in self.cells]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseReport:
        """A report from what :meth:`to_dict` gave, as ``analog/training.json`` holds it."""
        return cls([NoiseCell(**cell) for cell in values["cells"]])


@torch.no_grad()
def evaluate_noise(
    model: nn.Module,
    tokens: Tensor,
    noise: Sequence[str | Mapping[str, Any] | Any | None] = (None, "pcm"),
    seeds: int | Sequence[int] = 10,
    *,
    reference: Reference | None = None,
    evaluators: Sequence[str | Evaluator] = ("fidelity",),
    converters: bool = True,
    batch_size: int = 4,
    label: str = "",
) -> NoiseReport:
    """Evaluate an analog model without and with programming noise.

    Each seed programs every layer anew; the same seed gives the same device errors, whatever was
    evaluated before. The clean weights are never touched, and programming is undone even after an
    interruption.

    Args:
        model: A model with analog layers.
        tokens: [N, S] token ids.
        noise: Noise models (see :func:`~analog_plugin.noise.resolve_noise`); None: noise-free.
        seeds: Seeds, or their number (0, 1, ...).
        reference: The digital original on the same tokens, for KL and agreement.
        evaluators: Names from the hook ``analog_evaluators``, or such records.
        converters: False: without DAC and ADC, the noise alone.
        batch_size: Rows of tokens evaluated together.
        label: Shown with the progress bar.

    Raises:
        AnalogError: The model is not analog, or an evaluator or noise model is unknown.
    """
    forward_state(model)
    measure = known(evaluators)
    report = NoiseReport()
    cells = noise_cells(noise, seeds)
    with evaluation_mode(model), digital_layers(model, not converters):
        for name, model_of_noise, seed in progress_bar(cells, desc=f"Evaluating {label}".strip()):
            metrics: dict[str, float] = {}
            with programmed(model, model_of_noise, seed):
                for evaluator in measure:
                    metrics |= evaluator.evaluate(model, tokens, reference, batch_size)
            report.cells.append(NoiseCell(name, seed, metrics))
    return report


def known(evaluators: Sequence[str | Evaluator]) -> list[Evaluator]:
    """The evaluators, looked up where they are given by name.

    Raises:
        AnalogError: There is none of this name.
    """
    from analog_plugin.plugins import evaluators as offered
    from analog_plugin.plugins import lookup

    return [lookup(offered(), e, "evaluator") if isinstance(e, str) else e for e in evaluators]


class CellRequest(NamedTuple):
    """One noise model under one seed (both None: no noise), and its name in tables."""

    label: str
    noise: Any | None
    seed: int | None


def noise_cells(
    noise: Sequence[str | Mapping[str, Any] | Any | None], seeds: int | Sequence[int]
) -> list[CellRequest]:
    """All cells of an evaluation: each noise model under each seed, or one if it draws nothing.

    Raises:
        AnalogError: A noise model is unknown, or there is no seed.
    """
    seeds = check_seeds(seeds)
    cells = [
        CellRequest(noise_label(item), model, seed)
        for item in noise
        for model in (resolve_noise(item),)
        for seed in ((None,) if model is None else seeds[: None if _draws(model) else 1])
    ]
    # One that is named twice is no second chip.
    return list({(cell.label, cell.seed, id(cell.noise)): cell for cell in cells}.values())


def check_seeds(seeds: int | Sequence[int]) -> Sequence[int]:
    """The seeds that their number, or a list of them, stands for.

    Raises:
        AnalogError: There is none.
    """
    if isinstance(seeds, int):
        if seeds < 1 or isinstance(seeds, bool):
            raise AnalogError(f"seeds is {seeds}, but must be at least 1; write seeds: 10.")
        return range(seeds)
    if not seeds:
        raise AnalogError("seeds is an empty list; give at least one seed, or their number.")
    return seeds


def _draws(noise: Any) -> bool:
    return bool(getattr(noise, "random", True))


def named_cells(
    noise: Sequence[str | Mapping[str, Any] | None], seeds: int | Sequence[int]
) -> list[CellRequest]:
    """As :func:`noise_cells`, of noise models that a file can name.

    Raises:
        AnalogError: As there, and where a noise model is an object, which has no name to know it
            again by.
    """
    for item in noise:
        if not (item is None or isinstance(item, (str, Mapping))):
            raise AnalogError(
                f"noise is {shown(item)}, but what is kept in a file needs a noise model by name; "
                "write noise: pcm, or offer it through the hook analog_noise_models."
            )
    cells = noise_cells(noise, seeds)
    return list({(cell.label, cell.seed): cell for cell in cells}.values())


@contextlib.contextmanager
def programmed(model: nn.Module, noise: Any | None, seed: int | None) -> Iterator[None]:
    """Within this context all analog layers hold weights programmed under ``seed``.

    Without noise they hold the clean ones. Afterwards they hold what they held before.
    """
    before = [
        (layer, layer.programmed_weight, layer.programmed_maximum, layer.programmed_disturbances)
        for _, layer in analog_layers(model)
    ]
    try:
        for layer, *_ in before:
            layer.restore()
            if noise is not None and seed is not None:
                layer.program(noise, seed)
        yield
    finally:
        for layer, weight, maximum, disturbances in before:
            layer.programmed_weight, layer.programmed_maximum = weight, maximum
            layer.programmed_disturbances = disturbances
