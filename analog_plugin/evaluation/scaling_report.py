"""One HTML page of test-time scaling: accuracy against the number of samples."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analog_plugin.evaluation.plots import COLOURS, MUTED, axes, legend, names_as_they_are, svg
from analog_plugin.evaluation.report import file_name, page
from analog_plugin.evaluation.scaling import Point, ScalingReport

_SAID = {
    "majority": "majority vote",
    "any": "any of the samples",
    "best": "best score",
    "weighted": "vote weighted by scores",
}
Curves = dict[tuple[str, str, str], list[Point]]


def write_scaling_report(
    reports: Mapping[str, ScalingReport],
    output: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """Write ``test-time.html``, ``test-time.md``, ``test-time.csv`` and each figure as PNG.

    Args:
        reports: By model.
        output: An existing directory.
        title: Of the page.
        notes: Sentences on what was measured.

    Returns:
        The table as Markdown.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    directory = Path(output)
    curves: Curves = {
        (model, noise, strategy): report.curve(noise, strategy)
        for model, report in reports.items()
        for noise in dict.fromkeys(answer.noise for answer in report.answers)
        for strategy in report.strategies
    }
    said = (*notes, "[ ]: 95 % bootstrap interval over problems and chips.")
    text = _markdown(curves) + "\n" + " ".join(said) + "\n"
    (directory / "test-time.md").write_text(text, encoding="utf-8")
    (directory / "test-time.csv").write_text(_comma_separated(curves), encoding="utf-8")
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in said)]
    parts.append('<div class="figures">')
    for strategy in dict.fromkeys(key[2] for key in curves):
        name = f"samples-{strategy}"
        with names_as_they_are():
            figure = _figure({key: found for key, found in curves.items() if key[2] == strategy})
        figure.savefig(directory / f"{file_name(name)}.png", dpi=160)
        label = html.escape(_SAID[strategy], quote=True)
        parts.append(f'<figure role="img" aria-label="{label}">{svg(figure, name)}</figure>')
    parts += ["</div>", _table(curves)]
    (directory / "test-time.html").write_text(page(title, parts), encoding="utf-8")
    return text


def _counts(curves: Curves) -> list[int]:
    return sorted({point.samples for points in curves.values() for point in points})


def _cells(points: Sequence[Point], counts: Sequence[int]) -> list[tuple[str, str]]:
    """Mean and interval for each of ``counts``, as text."""
    by_count = {point.samples: point for point in points}
    return [
        (f"{p.mean:.3f}", f"[{p.low:.3f}, {p.high:.3f}]") if (p := by_count.get(n)) else ("–", "")
        for n in counts
    ]


def _markdown(curves: Curves) -> str:
    counts = _counts(curves)
    lines = ["| model | noise | strategy | " + " | ".join(f"n = {n}" for n in counts) + " |"]
    lines.append("|---|---|---|" + "---|" * len(counts))
    for names, points in curves.items():
        values = [" ".join(cell).strip() for cell in _cells(points, counts)]
        escaped = [name.replace("|", "\\|") for name in names]
        lines.append("| " + " | ".join([*escaped, *values]) + " |")
    return "\n".join(lines) + "\n"


def _table(curves: Curves) -> str:
    counts = _counts(curves)
    head = "".join(f"<th>n = {n}</th>" for n in counts)
    body = ""
    for (model, noise, strategy), points in curves.items():
        values = "".join(f"<td>{a} <small>{b}</small></td>" for a, b in _cells(points, counts))
        names = f"{html.escape(model)}, {html.escape(noise)}"
        body += f"<tr><td>{names}</td><td>{html.escape(_SAID[strategy])}</td>{values}</tr>\n"
    return (
        '<h2>Accuracy</h2><div class="wide"><table><thead><tr><th>model, noise</th>'
        f"<th>strategy</th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _comma_separated(curves: Curves) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "noise", "strategy", "samples", "accuracy", "low", "high"])
    for names, points in curves.items():
        for point in points:
            writer.writerow([*names, point.samples, point.mean, point.low, point.high])
    return text.getvalue()


def _figure(curves: Curves) -> Any:
    (strategy,) = {key[2] for key in curves}
    figure, axis = axes(f"Accuracy, {_SAID[strategy]}", 3.4)
    models = list(dict.fromkeys(key[0] for key in curves))
    noises = list(dict.fromkeys(key[1] for key in curves))
    lines: dict[str, Any] = {}
    for (model, noise, _), points in curves.items():
        colour = COLOURS[models.index(model) % len(COLOURS)]
        line = ("-", "--", ":", "-.")[noises.index(noise) % 4]
        xs = [point.samples for point in points]
        label = f"{model}, {'no noise' if noise == 'none' else noise}"
        means = [point.mean for point in points]
        (lines[label],) = axis.plot(xs, means, f"o{line}", color=colour, ms=4, lw=1.5)
        axis.fill_between(
            xs, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, lw=0
        )
    counts = _counts(curves)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("samples a problem", fontsize=8, color=MUTED)
    legend(axis, lines)
    return figure
