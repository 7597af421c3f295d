"""Write the benchmarks' tables into the documentation, and draw them.

    python benchmarks/page.py [--results benchmarks/results] [--page docs/performance.md]
        [--picture docs/images/performance.png]

Tables go between the comments `<!-- begin NAME -->` and `<!-- end NAME -->` of the page; what a
benchmark has not measured stays as it is there. Those of `gpu/` among the results go between
`<!-- begin gpu-NAME -->` and its end, those of another setting, as `step-OTHER.json`, between
`<!-- begin NAME-OTHER -->` and its end.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import generate
import linear
import loss
import matplotlib
import noise
import peers
import step
from matplotlib.figure import Figure

matplotlib.use("Agg")

BENCHMARKS = {"linear": linear, "loss": loss, "step": step, "noise": noise, "generate": generate}
#: Told apart with any colour vision (Okabe and Ito's palette).
COLOURS = {
    step.DISTILLATION: "#999999", peers.OURS: "#0072b2", peers.LIGHTNING: "#d55e00",
    peers.AIHWKIT: "#009e73", linear.FLOOR: "#cccccc",
}  # fmt: skip


def fill(text: str, texts: Mapping[str, str]) -> str:
    """The page with each table between its comments."""
    for name, table in texts.items():
        around = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not around.search(text):
            raise SystemExit(f"The page has no <!-- begin {name} --> ... <!-- end {name} -->.")
        text = around.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


def measured(results: Path) -> dict[str, Any]:
    """The records of the benchmarks that a directory holds, by their files' names."""
    paths = sorted(results.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if _benchmark(path.stem)}


def _benchmark(name: str) -> Any:
    """The script of a record, or None."""
    return BENCHMARKS.get(name.partition("-")[0])


def tables(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """The tables of a record, by the comments that they go between."""
    _, dash, setting = name.partition("-")
    made = _benchmark(name).tables(record)
    return {f"{table}{dash}{setting}": text for table, text in made.items()}


def versions(records: Mapping[str, Mapping[str, Any]]) -> str:
    """On what was measured, in a sentence for each different answer."""
    said: dict[str, list[str]] = {}
    for name, record in records.items():
        script = f"`{name.partition('-')[0]}.py`"
        runs = {script: record["settings"]}
        runs |= {f"{script} ({type_})": of for type_, of in record.get("earlier", {}).items()}
        for run, settings in runs.items():
            packages = (f"{package} {number}" for package, number in settings["versions"].items())
            where = f"{settings['machine']}; {', '.join(packages)}"
            if run not in said.setdefault(where, []):
                said[where].append(run)
    return "\n".join(f"Measured by {', '.join(names)} on {where}." for where, names in said.items())


def draw(records: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Ratios as bars: whole steps, and single layers in either type."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    first, *rest = figure.subplots(1, 3, width_ratios=[1, 1.5, 1.5])
    rows = records["step"]["rows"]
    values = {
        name: {
            r["dtype"]: r["to_fine_tuning"] for r in rows if r["peer"] == name and "why" not in r
        }
        for name in (step.DISTILLATION, peers.OURS, peers.LIGHTNING)
    }
    _bars(first, values, "whole step / fine-tuning")
    layers = [r for r in records["linear"]["rows"] if r["tile_rows"] is None and "why" not in r]
    for axis, dtype in zip(rest, ("float32", "bfloat16"), strict=True):
        values = {
            name: {
                r["shape"]: r["to_linear"]
                for r in layers
                if r["peer"] == name and r["dtype"] == dtype
            }
            for name in (linear.FLOOR, peers.OURS, peers.LIGHTNING, peers.AIHWKIT)
        }
        _bars(axis, values, f"one layer / nn.Linear, {dtype}")
    handles = {label: h for axis in (first, *rest) for h, label in _handles(axis)}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    machines = [records["step"]["settings"]["machine"]]
    machines += [f"{d}: {of['machine']}" for d, of in records["step"].get("earlier", {}).items()]
    title = f"Time beside digital training, one tile a layer: {'; '.join(machines)}"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)


def _bars(axis: Any, values: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """One group a key of the inner mappings, one bar a name, with its interquartile range."""
    shown = {name: found for name, found in values.items() if found}
    groups = list(dict.fromkeys(key for found in shown.values() for key in found))
    width = 0.8 / max(len(shown), 1)
    for place, (name, found) in enumerate(shown.items()):
        at = [groups.index(key) + (place - (len(shown) - 1) / 2) * width for key in found]
        heights = [figure["median"] for figure in found.values()]
        spread = [figure["iqr"] / 2 for figure in found.values()]
        axis.bar(
            at, heights, 0.92 * width, yerr=spread, color=COLOURS[name], label=name,
            error_kw={"lw": 0.8},
        )  # fmt: skip
        for x, height in zip(at, heights, strict=True):
            axis.annotate(
                f"{height:.2f}", (x, 0.05), ha="center", fontsize=5.5, color="white", rotation=90
            )
    axis.axhline(1.0, color="#222222", lw=0.8)
    axis.set_xticks(range(len(groups)), groups, fontsize=7)
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _handles(axis: Any) -> list[tuple[Any, str]]:
    return list(zip(*axis.get_legend_handles_labels(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/performance.png"))
    arguments = parser.parse_args()
    records = measured(arguments.results)
    texts = {"machine": versions(records)}
    for name, record in records.items():
        texts |= tables(name, record)
    on_gpu = measured(arguments.results / "gpu")
    if on_gpu:
        texts["gpu-machine"] = versions(on_gpu)
    for name, record in on_gpu.items():
        texts |= {f"gpu-{table}": text for table, text in tables(name, record).items()}
    arguments.page.write_text(fill(arguments.page.read_text("utf-8"), texts), "utf-8")
    if {"step", "linear"} <= set(records):
        draw(records, arguments.picture)


if __name__ == "__main__":
    main()
