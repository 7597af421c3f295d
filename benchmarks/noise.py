"""Programming a whole model under device noise: seeds per minute.

    python benchmarks/noise.py [--model smollm2-135m] [--layers 30] [--tile-rows 512] [--repeats 5]

Every linear layer but the head is programmed anew for each seed, without a forward. The ways run
interleaved in one process, on one thread. Figures are medians of CPU time, and of its ratio to the
floor, with the interquartile range:

- the floor: a copy `weight + sigma * randn` of every weight matrix, without column maxima or tiles;
- analog-plugin: `program` of every layer, with Gaussian noise relative to each column of a tile,
  with the PCM model, and with aihwkit's PCM-like model as a noise model of ours;
- aihwkit: `program_analog_weights` of its converted model with its PCM-like model.

aihwkit-lightning has no programming noise.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import measure
import peers
import torch
from models import SIZES, random_model
from torch import nn

from analog_plugin import convert_to_analog
from analog_plugin.layers import analog_layers
from analog_plugin.noise import resolve_noise

FLOOR = "weight + sigma * randn"
SIGMA = 0.03
#: Way, its noise model, and what ours needs for it.
OURS = {"gaussian": None, "pcm": None, "pcm_like": peers.AIHWKIT}


def ways(
    model: nn.Module, tile_rows: int, fp32: bool
) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[tuple[str, str], str]]:
    """(who, noise model) to what programs one seed; and to why it cannot be measured here."""
    weights = [
        module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]

    def floor() -> object:
        return [weight + SIGMA * torch.randn_like(weight) for weight in weights]

    made: dict[tuple[str, str], Callable[[], object]] = {(FLOOR, "gaussian"): floor}
    away: dict[tuple[str, str], str] = {}
    analog = convert_to_analog(copy.deepcopy(model), peers.scheme(tile_rows))
    for name, needed in OURS.items():
        if needed is not None and (why := peers.why_not(needed)) is not None:
            away[peers.OURS, name] = why
        else:
            made[peers.OURS, name] = _our_way(analog, name)
    if (why := peers.why_not(peers.AIHWKIT)) is not None:
        away[peers.AIHWKIT, "pcm_like"] = why
    elif fp32:  # aihwkit computes in nothing else
        made[peers.AIHWKIT, "pcm_like"] = _aihwkit_way(model, tile_rows)
    return made, away


def _our_way(model: nn.Module, name: str) -> Callable[[], None]:
    noise = resolve_noise({"name": name, "sigma": SIGMA} if name == "gaussian" else name)
    seeds = itertools.count()

    def program() -> None:
        seed = next(seeds)
        for _, layer in analog_layers(model):
            layer.program(noise, seed)

    return program


def _aihwkit_way(model: nn.Module, tile_rows: int) -> Callable[[], None]:
    from aihwkit.nn.conversion import convert_to_analog

    converted = convert_to_analog(
        copy.deepcopy(model), peers.aihwkit_config(tile_rows), exclude_modules=["lm_head"]
    ).eval()
    return converted.program_analog_weights


def compare(dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way."""
    model = random_model(arguments.model, arguments.layers, arguments.device)
    model.to(measure.DTYPES[dtype])
    with torch.no_grad():
        made, away = ways(model, arguments.tile_rows, dtype == "float32")
        actions = {f"{who}/{noise}": way for (who, noise), way in made.items()}
        times = measure.interleave(actions, arguments.repeats, arguments.device, warmup=1)
    floor = times[f"{FLOOR}/gaussian"]
    rows: list[dict[str, Any]] = []
    for who, noise in [*made, *away]:
        row: dict[str, Any] = {"dtype": dtype, "peer": who, "noise": noise}
        if (who, noise) in away:
            rows.append(row | {"why": away[who, noise]})
            continue
        seconds = times[f"{who}/{noise}"]
        per_minute = round(60 / statistics.median(seconds), 2)
        figures = {"seconds": seconds, "seeds_per_minute": per_minute}
        rows.append(row | figures | {"to_floor": measure.ratio(seconds, floor)})
    return rows


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what :func:`measure.record` gave: ``"noise"``."""
    settings = record["settings"]
    given = settings["arguments"]
    lines = []
    for row in record["rows"]:
        rate = row.get("why") or f"{row['seeds_per_minute']:.1f}"
        ratio = measure.shown(row.get("to_floor"))
        lines.append([row["dtype"], row["peer"], row["noise"], rate, ratio])
    table = measure.markdown(["type", "who", "noise", "seeds per minute", "time / floor"], lines)
    caption = (
        f"{given['model']}, {given['layers'] or 'all'} decoder layers, tiles of "
        f"{given['tile_rows']} rows, {settings['machine']}:"
    )
    return {"noise": f"{caption}\n\n{table}{measure.earlier(record)}"}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=SIZES, help="(smollm2-135m; on a GPU llama-3.2-1b)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all of the model's)")
    parser.add_argument("--tile-rows", type=int, default=512, help="rows of a tile")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    arguments = parser.parse_args()
    gpu = arguments.device.type == "cuda"
    arguments.dtypes = arguments.dtypes or ("bfloat16" if gpu else "float32")
    arguments.model = arguments.model or ("llama-3.2-1b" if gpu else "smollm2-135m")
    rows = [row for dtype in measure.begin(arguments) for row in compare(dtype, arguments)]
    made = measure.record(arguments, rows)
    measure.finish(arguments, made, tables(made).values())


if __name__ == "__main__":
    main()
