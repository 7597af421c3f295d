"""Tables of a sweep: mean, deviation and confidence interval over seeds, and paired differences."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analog_plugin.errors import require
from analog_plugin.evaluation.noise import NoiseReport

#: How metrics are called in tables.
TITLES = {"perplexity": "perplexity", "kl": "KL to the original (nats)", "agreement": "top-1"}


@dataclass(frozen=True)
class Summary:
    """One metric over seeds.

    Attributes:
        count: Seeds.
        mean, std: Mean and standard deviation (n - 1); NaN where there are too few.
    """

    count: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise one value a seed."""
        mean = statistics.fmean(values) if values else math.nan
        # statistics itself fails on infinities and NaN.
        enough = len(values) > 1 and all(map(math.isfinite, values))
        return cls(len(values), mean, statistics.stdev(values) if enough else math.nan)

    @property
    def low(self) -> float:
        """Lower end of the 95 % confidence interval of the mean; NaN where there is no std."""
        return self.mean - self._half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self._half

    @property
    def _half(self) -> float:
        """Half of the interval: Student's t over seeds (scipy, of the extra ``eval``)."""
        if math.isnan(self.std):
            return math.nan
        quantile = float(require("scipy.stats", "eval").t.ppf(0.975, self.count - 1))
        return quantile * self.std / math.sqrt(self.count)

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "–" if self.count == 0 else "not finite"
        digits = 1 if abs(self.mean) >= 10 else 3
        text = f"{self.mean:.{digits}f}"
        return text if math.isnan(self.std) else f"{text} ± {self.std:.{digits}f}"

    @property
    def interval(self) -> str:
        """The confidence interval as text; empty where there is none."""
        if math.isnan(self.low):
            return ""
        digits = 1 if abs(self.mean) >= 10 else 3
        return f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Row:
    """One line of a table: a model, or the difference of two, under one noise.

    Attributes:
        model, noise: Their names.
        metric: The metric's name.
        summary: Over seeds.
    """

    model: str
    noise: str
    metric: str
    summary: Summary


def rows(reports: Mapping[str, NoiseReport]) -> list[Row]:
    """One row for each model, noise and metric."""
    return [
        Row(model, noise, metric, Summary.of(report.values(noise, metric)))
        for model, report in reports.items()
        for noise in _noises(report)
        for metric in _metrics(report)
    ]


def paired_rows(reports: Mapping[str, NoiseReport]) -> list[Row]:
    """Each model minus the first, seed by seed.

    Layers of the same name, shape and tiles had the same device errors.
    """
    names = list(reports)
    found = []
    for name in names[1:]:
        first, other = reports[names[0]], reports[name]
        for noise in _noises(other):
            base = {c.seed: c.metrics for c in first.cells if c.noise == noise}
            pairs = [
                (cell.metrics, base[cell.seed])
                for cell in other.cells
                if cell.noise == noise and cell.seed is not None and cell.seed in base
            ]
            for metric in _metrics(other):
                gains = [a[metric] - b[metric] for a, b in pairs if metric in a and metric in b]
                if gains:
                    found.append(Row(f"{name} − {names[0]}", noise, metric, Summary.of(gains)))
    return found


def markdown(table: Sequence[Row]) -> str:
    """A Markdown table, one line a model and noise; the interval stands behind each figure."""
    metrics = list(dict.fromkeys(row.metric for row in table))
    cells: dict[tuple[str, str], dict[str, Summary]] = {}
    for row in table:
        cells.setdefault((row.model, row.noise), {})[row.metric] = row.summary
    lines = [
        "| model | noise | " + " | ".join(TITLES.get(m, m) for m in metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for (model, noise), found in cells.items():
        values = [f"{found[m]} {found[m].interval}".strip() if m in found else "–" for m in metrics]
        names = (text.replace("|", "\\|") for text in (model, noise))
        lines.append("| " + " | ".join([*names, *values]) + " |")
    return "\n".join(lines) + "\n"


def comma_separated(table: Sequence[Row]) -> str:
    """CSV with one line a model, noise and metric: seeds, mean, deviation, interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "noise", "metric", "seeds", "mean", "std", "low", "high"])
    for row in table:
        s = row.summary
        numbers = ["" if math.isnan(x) else repr(x) for x in (s.mean, s.std, s.low, s.high)]
        writer.writerow([row.model, row.noise, row.metric, s.count, *numbers])
    return text.getvalue()


def _noises(report: NoiseReport) -> list[str]:
    return list(dict.fromkeys(cell.noise for cell in report.cells))


def _metrics(report: NoiseReport) -> list[str]:
    return list(dict.fromkeys(metric for cell in report.cells for metric in cell.metrics))
