"""Figures of a model's layers: sensitivity, input ranges, and the weights on their devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from analog_plugin.evaluation.distributions import BINS, Distributions
from analog_plugin.evaluation.plots import COLOURS, MUTED, axes, legend, names_as_they_are
from analog_plugin.evaluation.sensitivity import SensitivityReport


def sensitivity_maps(found: Mapping[str, SensitivityReport], part: str = "all") -> dict[str, Any]:
    """KL of every layer alone, by block and kind, as :func:`analyze_sensitivity` measured it.

    One figure a model, all with the same colours.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    values = {
        model: {row.name: row.kl for row in report.rows if row.part == part}
        for model, report in found.items()
    }
    return _heat_maps(values, "KL when one layer alone is analog (nats)")


def range_maps(found: Mapping[str, Distributions]) -> dict[str, Any]:
    """The input ranges of each model that has some, by block and kind, with the same colours.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    largest = {
        model: {name: max(ranges) for name, ranges in each.ranges.items()}
        for model, each in found.items()
        if each.ranges
    }
    return _heat_maps(largest, "input range, of the layer's widest tile")


def weight_figure(found: Mapping[str, Distributions]) -> Any:
    """How much of their columns' full conductance the weights of each model use.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with names_as_they_are():
        figure, axis = axes("share of the weights", 3.2)
        lines: dict[str, Any] = {}
        edges = [i / BINS for i in range(BINS + 1)]
        for index, (model, each) in enumerate(found.items()):
            colour = COLOURS[index % len(COLOURS)]
            label = f"{model}, mean {each.mean:.3f}"
            lines[label] = axis.stairs(each.weights, edges, color=colour, lw=1.4)
        # The largest weight of every column is 1 by definition: it would hide the rest.
        highest = max((max(each.weights[:-1]) for each in found.values()), default=0.0)
        axis.set_ylim(0, 1.1 * highest if highest > 0 else None)
        axis.set_xlim(0, 1)
        axis.set_xlabel("weight, as a share of its column's largest", fontsize=8, color=MUTED)
        legend(axis, lines)
    return figure


def _heat_maps(models: Mapping[str, Mapping[str, float]], title: str) -> dict[str, Any]:
    positive = [value for values in models.values() for value in values.values() if value > 0]
    limits = (min(positive), max(positive)) if positive else None
    return {model: _heat_map(values, title, limits) for model, values in models.items()}


def _place(name: str) -> tuple[int, str]:
    """Block (-1: of none) and kind of a layer: what stands behind the block's number."""
    words = name.split(".")
    number = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return (-1, name) if number is None else (int(words[number]), ".".join(words[number + 1 :]))


def _heat_map(values: Mapping[str, float], title: str, limits: tuple[float, float] | None) -> Any:
    """``values`` by the layer's name, over blocks and kinds; colours are logarithmic."""
    placed = {_place(name): value for name, value in values.items()}
    short = {kind: kind.rpartition(".")[2] for _, kind in placed}
    if len(set(short.values())) == len(short):  # GPT-2 has attn.c_proj and mlp.c_proj
        placed = {(block, short[kind]): value for (block, kind), value in placed.items()}
    blocks = sorted({block for block, _ in placed})
    kinds = list(dict.fromkeys(kind for _, kind in sorted(placed)))
    table = [[placed.get((block, kind), math.nan) for kind in kinds] for block in blocks]
    with names_as_they_are():
        figure, axis = axes(title, 1.2 + 0.16 * len(blocks))
        from matplotlib.colors import LogNorm

        norm = LogNorm(*limits) if limits is not None else None
        shown = axis.imshow(table, aspect="auto", cmap="viridis", norm=norm)
        axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=7)
        names = ["–" if block < 0 else str(block) for block in blocks]
        axis.set_yticks(range(len(blocks)), names, fontsize=6)
        axis.set_ylabel("block", fontsize=8, color=MUTED)
        axis.grid(False)
        figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
    return figure
