"""A sweep over models, noise models and seeds: each cell is kept when it ends and never rerun."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, one_line
from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport, known, noise_cells, programmed
from analog_plugin.layers import forward_state
from analog_plugin.layers.prefix import install_prefix, installed_prefix, remove_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.plugins.types import Evaluator
from analog_plugin.progress import progress_bar

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


@dataclass
class SweepFile:
    """Finished cells in a file of JSON lines, the first of which holds the settings.

    Args:
        path: The file; made with the first cell.
        settings: What cells must have in common to stand in one table.

    Raises:
        AnalogError: The file holds a sweep with other settings, or no sweep.
    """

    path: Path
    settings: Mapping[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        # What was being written when a run was killed is no line yet.
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        lines = kept.decode("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    found = record["settings"]
                    continue
                hash((record["noise"], record["seed"]))
                dict(record["metrics"])
                str(record["model"] + record["identity"] + record["evaluator"])
            except (ValueError, KeyError, TypeError) as error:
                raise AnalogError(
                    f"Line {number} of {self.path} is no cell of a sweep: {one_line(error)}; "
                    "remove the line, or give another output directory."
                ) from None
            self.records.append(record)
        if lines and found != json.loads(json.dumps(self.settings)):
            keys = {**found, **self.settings}
            changed = [key for key in keys if found.get(key) != self.settings.get(key)]
            raise AnalogError(
                f"{self.path} holds a sweep with other settings ({', '.join(sorted(changed))}); "
                "give another output directory, or --overwrite (overwrite=True) to begin anew."
            )

    def metrics(self, name: str, identity: str) -> dict[CellKey, dict[str, float]]:
        """What was measured of one model, by noise, seed and evaluator."""
        return {
            (r["noise"], r["seed"], r["evaluator"]): r["metrics"]
            for r in self.records
            if (r["model"], r["identity"]) == (name, identity)
        }

    def add(self, name: str, identity: str, key: CellKey, metrics: Mapping[str, float]) -> None:
        """Keep a cell: it is on disk when this returns."""
        noise, seed, evaluator = key
        cell = {"noise": noise, "seed": seed, "evaluator": evaluator, "metrics": dict(metrics)}
        record = {"model": name, "identity": identity, **cell}
        new = not self.path.exists() or self.path.stat().st_size == 0
        lines = [{"settings": self.settings}, record] if new else [record]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


@torch.no_grad()
def sweep(
    models: Mapping[str, SweepModel],
    tokens: Tensor,
    noise: Sequence[str | Mapping[str, Any] | Any | None],
    seeds: int | Sequence[int],
    output: str | Path,
    *,
    original: SweepModel | None = None,
    evaluators: Sequence[str | Evaluator] = ("fidelity",),
    batch_size: int = 4,
    settings: Mapping[str, Any] | None = None,
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

    Returns:
        A report by model, with the cells in the order asked for.

    Raises:
        AnalogError: A noise model or evaluator is unknown, ``output`` holds another sweep, or a
            model that is to have noise is not analog.
    """
    cells, measures = noise_cells(noise, seeds), known(evaluators)
    own = {
        "tokens": hashlib.sha256(tokens.contiguous().cpu().numpy().tobytes()).hexdigest()[:16],
        "shape": list(tokens.shape),
        "original": None if original is None else original.identity,
    }
    file = SweepFile(_directory(output) / CELLS, own | dict(settings or {}))
    references = _References(original, tokens, batch_size)
    reports: dict[str, NoiseReport] = {}
    for name, entry in models.items():
        found = file.metrics(name, entry.identity)
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
                        file.add(name, entry.identity, key, metrics)
                        found[key] = dict(metrics)
            del model
        reports[name] = NoiseReport()
        for cell in asked:
            parts = [found[cell.label, cell.seed, evaluator.name] for evaluator in measures]
            together = {metric: value for part in parts for metric, value in part.items()}
            reports[name].cells.append(NoiseCell(cell.label, cell.seed, together))
    return reports


def _directory(output: str | Path) -> Path:
    directory = Path(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnalogError(f"The output {output} cannot be written ({error}).") from None
    return directory


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
