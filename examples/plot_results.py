"""Draw what `optimum-cli export analog` measured: one point a noise seed, original and trained.

python examples/plot_results.py demo-out demo.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, MUTED = "#222222", "#777777"
COLOURS = {"off the shelf": "#8a8a8a", "original": "#b4552d", "analog-trained": "#1f6f8b"}


def values(report: dict, noise: str, metric: str) -> list[float]:
    return [cell["metrics"][metric] for cell in report["cells"] if cell["noise"] == noise]


def draw(directory: Path, target: Path) -> None:
    record = json.loads((directory / "analog" / "training.json").read_text())
    reports = record["evaluation"]
    shown = [name for name in COLOURS if name in reports]
    if not shown:
        raise SystemExit(f"{directory} was exported with evaluation: null; nothing can be drawn.")
    noises = list(dict.fromkeys(cell["noise"] for cell in reports[shown[0]]["cells"]))
    height = 0.8 + 0.45 * len(noises) * len(shown)
    figure, axes = plt.subplots(1, 2, figsize=(8, height), layout="constrained")
    for axis, (metric, title) in zip(
        axes,
        (("kl", "KL to the original, nats per token"), ("perplexity", "perplexity")),
        strict=True,
    ):
        rows = [(noise, name) for noise in reversed(noises) for name in reversed(shown)]
        for row, (noise, name) in enumerate(rows):
            points = values(reports[name], noise, metric)
            mean = sum(points) / len(points)
            axis.scatter(points, [row] * len(points), s=14, color=COLOURS[name], alpha=0.5, lw=0)
            axis.plot([mean, mean], [row - 0.28, row + 0.28], color=COLOURS[name], lw=2)
            axis.annotate(f"{mean:.3g}", (mean, row + 0.32), ha="center", fontsize=8, color=INK)
        labels = [f"{name}, {'no noise' if noise == 'none' else noise}" for noise, name in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_ylim(-0.6, len(rows) - 0.2)
        axis.set_xlim(left=0)
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.tick_params(colors=MUTED, labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[1].set_yticks([])
    figure.savefig(target, dpi=160)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/plot_results.py CHECKPOINT PICTURE.png")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
