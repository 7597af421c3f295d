"""A sweep over models, noise models and seeds: each cell is kept when it ends and never rerun."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport, known, named_cells, programmed
from analog_plugin.evaluation.records import RecordFile
from analog_plugin.evaluation.sensitivity import SensitivityReport, analyze_sensitivity
from analog_plugin.layers import forward_state
from analog_plugin.layers.prefix import install_prefix, installed_prefix, remove_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import noise_label
from analog_plugin.plugins.types import Evaluator
from analog_plugin.progress import progress_bar

Found = TypeVar("Found")

#: The file of finished cells in an output directory.
CELLS = "cells.jsonl"

#: Noise, seed and evaluator of one cell.
CellKey = tuple[str, int | None, str]


@dataclass(frozen=True)
class SweepModel:
    """One model of a sweep, loaded only where a cell of it is still to run.

    Args:
        load: Returns the model.
        identity: Changes whenever the model does; cells of another identity do not count.
        noisy: False for a digital model, which is measured without noise alone.
    """

    load: Callable[[], Any]
    identity: str = ""
    noisy: bool = True


def _check(record: dict[str, Any]) -> None:
    hash((record["noise"], record["seed"]))
    for value in record["metrics"].values():
        float(value)
    str(record["model"] + record["identity"] + record["evaluator"])


@torch.no_grad()
def sweep(
    models: Mapping[str, SweepModel],
    tokens: Tensor,
    noise: Sequence[str | Mapping[str, Any] | None],
    seeds: int | Sequence[int],
    output: str | Path,
    *,
    original: SweepModel | None = None,
    evaluators: Sequence[str | Evaluator] = ("fidelity",),
    batch_size: int = 4,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, NoiseReport]:
    """Evaluate each model under each noise and seed; go on from where an earlier call ended.

    Args:
        models: By the names that they have in the table.
        tokens: [N, S] token ids.
        noise: Noise models (see :func:`~analog_plugin.noise.resolve_noise`); None: noise-free.
        seeds: Seeds, or their number (0, 1, ...).
        output: Directory of ``cells.jsonl``, in which finished cells are kept: one a model, noise,
            seed and evaluator.
        original: The digital original, for KL and agreement. A digital prefix of a model stands
            before its tokens too.
        evaluators: Names from the hook ``analog_evaluators``, or such records.
        batch_size: Rows of tokens evaluated together.
        settings: Further values that must be equal for cells to be used again.
        overwrite: Forget what ``output`` holds.

    Returns:
        A report by model, with the cells in the order asked for.

    Raises:
        AnalogError: A noise model or evaluator is unknown, ``output`` holds another sweep, or a
            model that is to have noise is not analog.
    """
    cells, measures = named_cells(noise, seeds), known(evaluators)
    own = {
        "tokens": _digest(tokens),
        "shape": list(tokens.shape),
    }
    file = RecordFile(Path(output) / CELLS, own | dict(settings or {}), _check, overwrite)
    references = _References(original, tokens, batch_size)
    reports: dict[str, NoiseReport] = {}
    for name, entry in models.items():
        # Figures of a model depend on the original that it is compared with.
        identity = entry.identity + ("" if original is None else f" to {original.identity}")
        found: dict[CellKey, dict[str, float]] = {
            (r["noise"], r["seed"], r["evaluator"]): r["metrics"]
            for r in file.records
            if (r["model"], r["identity"]) == (name, identity)
        }
        asked = [cell for cell in cells if entry.noisy or cell.noise is None]
        missing = [
            (cell, todo)
            for cell in asked
            if (todo := [e for e in measures if (cell.label, cell.seed, e.name) not in found])
        ]
        if missing:
            model = entry.load()
            if entry.noisy:
                forward_state(model)  # a digital one would not be programmed
            reference = references.of(model)
            for cell, todo in progress_bar(missing, desc=f"Evaluating {name}"):
                with evaluation_mode(model), programmed(model, cell.noise, cell.seed):
                    for evaluator in todo:
                        metrics = evaluator.evaluate(model, tokens, reference, batch_size)
                        key = (cell.label, cell.seed, evaluator.name)
                        found[key] = dict(metrics)
                        file.add(
                            {
                                "model": name,
                                "identity": identity,
                                "noise": cell.label,
                                "seed": cell.seed,
                                "evaluator": evaluator.name,
                                "metrics": found[key],
                            }
                        )
            del model
        reports[name] = NoiseReport()
        for cell in asked:
            parts = [found[cell.label, cell.seed, evaluator.name] for evaluator in measures]
            together = {metric: value for part in parts for metric, value in part.items()}
            reports[name].cells.append(NoiseCell(cell.label, cell.seed, together))
    return reports


def layer_by_layer(
    models: Mapping[str, SweepModel],
    tokens: Tensor,
    noise: str | Mapping[str, Any] | None,
    output: str | Path,
    *,
    overwrite: bool = False,
) -> dict[str, SensitivityReport]:
    """Measure each layer of analog models alone; models that were measured are not loaded.

    Args:
        models: By the names that they have in the table.
        tokens: [N, S] token ids.
        noise: Programming noise, under seed 0; None: converters only.
        output: Directory of ``sensitivity.jsonl``.
        overwrite: Forget what that holds.
    """
    return once_each(
        models,
        Path(output) / "sensitivity.jsonl",
        lambda model: analyze_sensitivity(model, tokens, noise=noise).to_dict(),
        SensitivityReport.from_dict,
        settings={"tokens": _digest(tokens), "noise": noise_label(noise)},
        overwrite=overwrite,
    )


def once_each(
    models: Mapping[str, SweepModel],
    path: Path,
    measure: Callable[[Any], Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], Found],
    *,
    settings: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, Found]:
    """``read(measure(model))`` of each model; what the file at ``path`` holds is not measured."""

    def check(record: dict[str, Any]) -> None:
        str(record["model"] + record["identity"])
        read(record)

    file = RecordFile(path, settings, check, overwrite)
    kept = {(r["model"], r["identity"]): r for r in file.records}
    found = {}
    for name, entry in models.items():
        if (name, entry.identity) not in kept:
            made = {"model": name, "identity": entry.identity} | dict(measure(entry.load()))
            file.add(made)
            kept[name, entry.identity] = made
        found[name] = read(kept[name, entry.identity])
    return found


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


class _References:
    """The original on the tokens, computed once for each digital prefix."""

    def __init__(self, original: SweepModel | None, tokens: Tensor, batch_size: int) -> None:
        self.original, self.tokens, self.batch_size = original, tokens, batch_size
        self.model: Any = None
        self.found: dict[tuple[int, ...] | None, Reference] = {}

    def of(self, model: Any) -> Reference | None:
        if self.original is None:
            return None
        prefix = installed_prefix(model)
        key = None if prefix is None else prefix.tokens
        if key not in self.found:
            if self.model is None:
                self.model = self.original.load()
            if key is not None:
                install_prefix(self.model, key)
            self.found[key] = Reference.of(self.model, self.tokens, self.batch_size)
            remove_prefix(self.model)
        return self.found[key]
