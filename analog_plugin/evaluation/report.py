"""One HTML page of a sweep, which needs no network: tables, figures, and what was measured how."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from analog_plugin.evaluation.distributions import BINS, Distributions
from analog_plugin.evaluation.layer_plots import range_maps, sensitivity_maps, weight_figure
from analog_plugin.evaluation.noise import NoiseReport
from analog_plugin.evaluation.plots import figures, svg
from analog_plugin.evaluation.sensitivity import SensitivityReport
from analog_plugin.evaluation.tables import (
    TITLES,
    Row,
    comma_separated,
    markdown,
    paired_rows,
    rows,
)

_STYLE = """
:root { color-scheme: light; --ink: #222; --muted: #666; --line: #ddd; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; padding: 1rem;
  max-width: 60rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, li { max-width: 44rem; } .muted { color: var(--muted); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { white-space: normal; vertical-align: bottom; max-width: 9rem; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
td:first-child { white-space: normal; min-width: 8rem; }
td small { color: var(--muted); display: block; }
.figures { display: grid; gap: .5rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; } figcaption { color: var(--muted); font-size: .85rem; }
figure svg { width: 100%; height: auto; display: block; }
@media print { body { max-width: none; font-size: 12px; } figure, tr { break-inside: avoid; }
  h2, h2 + .muted { break-after: avoid; } .wide { overflow: visible; } }
"""

_TITLES = {
    "seeds": "Every seed",
    "level": "Against the noise level",
    "time": "Over time",
    "sensitivity": "Layer by layer",
    "weights": "Weights on their devices",
    "ranges": "Input ranges",
}
_SAID = {
    "seeds": "One point is one noise seed, that is one chip; the bar is their mean.",
    "level": "Mean over seeds, the band its 95 % confidence interval; dotted: from no noise.",
    "time": "The same devices read later; the band is the 95 % confidence interval over seeds.",
    "sensitivity": "KL to the digital model when one layer alone is analog, under one noise seed.",
    "weights": "Of all analog layers, without noise. A column's largest weight has the full "
    "conductance: the further right the others are, the smaller is noise beside them. Columns are "
    "those of a model's own tiles (512 rows in full precision): longer ones have larger maxima.",
    "ranges": "What the DAC of a layer can take, in the units of its inputs. White: digital.",
}
#: Figures that are one a model, whose name stands below.
_BY_MODEL = ("sensitivity", "ranges")


def write_report(
    reports: Mapping[str, NoiseReport],
    output: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    sensitivity: Mapping[str, SensitivityReport] | None = None,
    distributions: Mapping[str, Distributions] | None = None,
) -> str:
    """Write ``report.html``, ``table.md``, ``table.csv`` and each figure as PNG.

    With ``distributions`` also ``weights.csv`` and ``ranges.csv``, with ``sensitivity`` also
    ``sensitivity.csv``.

    Args:
        reports: By model, in the order of the table; differences are to the first.
        output: An existing directory.
        title: Of the page.
        notes: Sentences on what was measured.
        sensitivity: Layer by layer, for some of the models.
        distributions: Weights and input ranges, for some of the models.

    Returns:
        The tables as Markdown.

    Raises:
        MissingExtra: matplotlib or scipy is not installed.
    """
    directory = Path(output)
    table, differences = rows(reports), paired_rows(reports)
    text = markdown(table)
    if differences:
        text += "\nPaired differences to the first model, seed by seed:\n\n" + markdown(differences)
    said = (*notes, "Mean ± standard deviation over seeds, [95 % confidence interval of the mean].")
    text += "\n" + " ".join(said) + "\n"
    (directory / "table.md").write_text(text, encoding="utf-8")
    (directory / "table.csv").write_text(comma_separated(table + differences), encoding="utf-8")
    made = figures(reports)
    if sensitivity:
        made |= {f"sensitivity-{name}": f for name, f in sensitivity_maps(sensitivity).items()}
        layers = [
            (name, row.name, row.part, row.kl) for name, r in sensitivity.items() for row in r.rows
        ]
        _write_csv(directory / "sensitivity.csv", ("model", "layer", "part", "kl"), layers)
    if distributions:
        made["weights"] = weight_figure(distributions)
        made |= {f"ranges-{name}": figure for name, figure in range_maps(distributions).items()}
        _write_distributions(directory, distributions)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    parts += ["<h2>Figures of merit</h2>", _table(table)]
    for kind in _TITLES:
        chosen = {name: f for name, f in made.items() if name.partition("-")[0] == kind}
        if not chosen:
            continue
        parts += [f"<h2>{_TITLES[kind]}</h2>", f'<p class="muted">{_SAID[kind]}</p>']
        parts.append('<div class="figures">')
        for name, figure in chosen.items():
            figure.savefig(directory / f"{file_name(name)}.png", dpi=160)
            label = html.escape(name, quote=True)
            caption = f"<figcaption>{html.escape(name.partition('-')[2])}</figcaption>"
            shown = svg(figure, name) + (caption if kind in _BY_MODEL else "")
            parts.append(f'<figure role="img" aria-label="{label}">{shown}</figure>')
        parts.append("</div>")
    if differences:
        parts += [
            "<h2>Paired differences</h2>",
            '<p class="muted">Each model minus the first, seed by seed: layers of the same name, '
            "shape and tiles had the same device errors.</p>",
            _table(differences),
        ]
    parts.append(f'<p class="muted">{html.escape(said[-1])}</p>')
    (directory / "report.html").write_text(page(title, parts), encoding="utf-8")
    return text


def _write_distributions(directory: Path, found: Mapping[str, Distributions]) -> None:
    weights = [
        (name, i / BINS, (i + 1) / BINS, share)
        for name, each in found.items()
        for i, share in enumerate(each.weights)
    ]
    ranges = [
        (name, layer, tile, value)
        for name, each in found.items()
        for layer, values in each.ranges.items()
        for tile, value in enumerate(values)
    ]
    _write_csv(directory / "weights.csv", ("model", "from", "to", "share"), weights)
    _write_csv(directory / "ranges.csv", ("model", "layer", "tile", "range"), ranges)


def _write_csv(path: Path, head: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])


def _table(table: Sequence[Row]) -> str:
    metrics = list(dict.fromkeys(row.metric for row in table))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in table:
        found.setdefault((row.model, row.noise), {})[row.metric] = row
    titles = (html.escape(TITLES.get(m, m)).replace("_", "_<wbr>") for m in metrics)
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = []
    for (model, noise), cells in found.items():
        values = "".join(
            f"<td>{cells[m].summary} <small>{cells[m].summary.interval}</small></td>"
            if m in cells
            else "<td>–</td>"
            for m in metrics
        )
        names = f"<td>{html.escape(model)}</td><td>{html.escape(noise)}</td>"
        lines.append(f"<tr>{names}{values}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr><th>model</th><th>noise</th>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page from its parts, which are HTML already."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def file_name(name: str) -> str:
    """A figure's name with nothing in it that a file's name cannot have."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
