"""Figures of a sweep: one point a seed, scores against noise level, and drift over time."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analog_plugin.errors import require
from analog_plugin.evaluation.noise import NoiseReport
from analog_plugin.evaluation.tables import TITLES, Summary
from analog_plugin.noise.programming import SECONDS
from analog_plugin.noise.specification import NoiseName, split_label

#: Told apart with any colour vision, and by lightness in print (Okabe and Ito's palette).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK, MUTED = "#222222", "#666666"


def figures(reports: Mapping[str, NoiseReport]) -> dict[str, Any]:
    """Every figure that the reports allow, one metric each.

    Their names begin with ``seeds-``, ``level-`` or ``time-``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with names_as_they_are():
        return _figures(reports)


@contextlib.contextmanager
def names_as_they_are() -> Iterator[None]:
    """Within this context text of figures is text: a dollar sign begins no formula."""
    require("matplotlib", "eval")
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def legend(axis: Any, lines: Mapping[str, Any]) -> None:
    """A legend of lines by name; matplotlib's own leaves out names that begin with ``_``."""
    axis.legend(lines.values(), lines.keys(), fontsize=7, frameon=False)


def _figures(reports: Mapping[str, NoiseReport]) -> dict[str, Any]:
    cells = [cell for report in reports.values() for cell in report.cells]
    labels = list(dict.fromkeys(cell.noise for cell in cells))
    metrics = list(dict.fromkeys(metric for cell in cells for metric in cell.metrics))
    names = {label: split_label(label) for label in labels}
    made = {f"seeds-{metric}": _dots(reports, labels, metric) for metric in metrics}
    for kind in ("level", "time"):
        for (name, rest), members in _groups(names, kind).items():
            group = name if rest is None else f"{name}-{rest:g}"
            for metric in metrics:
                made[f"{kind}-{group}-{metric}"] = _curves(reports, members, metric, name, kind)
    return made


def svg(figure: Any, salt: str) -> str:
    """The figure as an ``<svg>`` element, the same text for the same figure."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):  # names of its parts: unique on a page, not random
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _groups(
    names: Mapping[str, NoiseName], along: str
) -> dict[tuple[str, float | None], list[tuple[float, str]]]:
    """(value, label) of the noise models that were measured at several values of ``along``.

    ``along`` is ``"level"`` or ``"time"``; models differ in name or in the other of the two.
    """
    other = {"level": "time", "time": "level"}[along]
    groups: dict[tuple[str, float | None], list[tuple[float, str]]] = {}
    for label, part in names.items():
        value = getattr(part, along)
        if value is None or (along == "time" and value == 0):  # its axis is logarithmic
            continue
        groups.setdefault((part.name, getattr(part, other)), []).append((value, label))
    return {key: sorted(found) for key, found in groups.items() if len(found) > 1}


def axes(title: str, height: float) -> tuple[Any, Any]:
    """A figure of this height in inches, with one pair of axes in the house's style."""
    from matplotlib.figure import Figure  # not pyplot: no window, whatever the process shows

    figure = Figure(figsize=(4.8, height), layout="constrained")
    axis = figure.subplots()
    axis.tick_params(colors=MUTED, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.set_title(TITLES.get(title, title), fontsize=9, color=INK, loc="left")
    return figure, axis


def _dots(reports: Mapping[str, NoiseReport], labels: Sequence[str], metric: str) -> Any:
    lines = [
        (noise, model, colour)
        for noise in labels
        for (model, report), colour in zip(reports.items(), _colours(reports), strict=True)
        if report.values(noise, metric)
    ][::-1]
    figure, axis = axes(metric, 0.6 + 0.26 * len(lines))
    for row, (noise, model, colour) in enumerate(lines):
        points = reports[model].values(noise, metric)
        mean = sum(points) / len(points)
        axis.scatter(points, [row] * len(points), s=12, color=colour, alpha=0.45, lw=0)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, lw=2)
        said = "0" if abs(mean) < 1e-6 else f"{mean:.3g}"  # KL to itself is rounding
        axis.annotate(
            said, (max(points), row), xytext=(6, -3), textcoords="offset points", fontsize=7,
            color=INK,
        )  # fmt: skip
    words = {"none": "no noise"}
    shown = [f"{model}, {words.get(noise, noise)}" for noise, model, _ in lines]
    axis.set_yticks(range(len(lines)), shown, fontsize=7)
    axis.set_ylim(-0.7, len(lines) - 0.3)
    axis.margins(x=0.15)
    return figure


def _curves(
    reports: Mapping[str, NoiseReport],
    members: Sequence[tuple[float, str]],
    metric: str,
    name: str,
    kind: str,
) -> Any:
    figure, axis = axes(metric, 3.2)
    lines: dict[str, Any] = {}
    for (model, report), colour in zip(reports.items(), _colours(reports), strict=True):
        found = [(x, Summary.of(report.values(label, metric))) for x, label in members]
        found = [(x, summary) for x, summary in found if summary.count]
        if not found:
            continue
        xs = [x for x, _ in found]
        means = [summary.mean for _, summary in found]
        (lines[model],) = axis.plot(xs, means, "o-", color=colour, ms=4, lw=1.5)
        low, high = ([getattr(s, end) for _, s in found] for end in ("low", "high"))
        axis.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)
        clean = report.mean("none", metric)
        if kind == "level" and not math.isnan(clean):
            axis.plot([0, xs[0]], [clean, found[0][1].mean], ":", color=colour, lw=1.2)
    if kind == "time":
        axis.set_xscale("log")
        axis.set_xticks([x for x, _ in members], [duration(x) for x, _ in members])
        axis.minorticks_off()
    said = "time since programming" if kind == "time" else "level"
    axis.set_xlabel(f"{name}: {said}", fontsize=8, color=MUTED)
    legend(axis, lines)
    return figure


def duration(seconds: float) -> str:
    """A time in its largest whole unit: 3600 seconds are ``"1h"``."""
    for unit, size in reversed(SECONDS.items()):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _colours(reports: Mapping[str, NoiseReport]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(reports))]
