"""``main_plan``: the Python twin of ``optimum-cli analog plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analog_integrations.optimum.arguments import count_of
from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.planning import Assumptions, Estimate, Gpu, Job, ModelShape, estimate


def main_plan(
    model: str | Path,
    *,
    gpu: str = "h100",
    gpus: Sequence[int] = (8, 64, 256, 1024),
    tokens: int | str = "20B",
    price: float | None = None,
    assumptions: Assumptions | None = None,
    as_json: bool = False,
    **job: Any,
) -> list[Estimate]:
    """Print what sampling and training will take: memory, time, communication, cost.

    Args:
        model: A size (``1b``, ``4b``, ``8b``, ``70b``), or a directory with a ``config.json``.
        gpu: One of ``v100``, ``a100``, ``h100``, ``h200``.
        gpus: Numbers of GPUs, a row of the table each.
        tokens: To sample, and to train on in each epoch.
        price: Of a GPU and hour, in any currency; None: no cost is told.
        assumptions: What no formula gives.
        as_json: Print it for machines.
        **job: Other fields of :class:`~analog_plugin.planning.Job`.

    Raises:
        AnalogError: A value is out of range, or there is no such model or GPU.
    """
    if price is not None and (not is_number(price) or price < 0):
        raise AnalogError(f"price is {shown(price)}, but must be a number of 0 or more.")
    if not gpus:
        raise AnalogError("gpus is empty; write for instance --gpus 8,64.")
    shape, kind = ModelShape.of(model), Gpu.named(gpu)
    wanted, guess = Job(tokens=count_of(tokens), **job), assumptions or Assumptions()
    found = [estimate(shape, kind, number, wanted, guess) for number in gpus]
    if as_json:
        print(json.dumps([row.to_dict() for row in found], indent=2))
        return found
    print(
        f"{model}: {_short(shape.parameters)} parameters, {_short(shape.analog_weights)} of them "
        f"analog; {wanted.tokens:.3g} tokens, {wanted.epochs:g} epochs, {wanted.sharding} on {gpu}."
    )
    print(table(found, kind, guess, price))
    if any(row.network_seconds > row.compute_seconds for row in found):
        print("* waits for the network: more --rows help, with ddp more --accumulation too.")
    return found


def table(
    found: Sequence[Estimate], gpu: Gpu, guess: Assumptions, price: float | None = None
) -> str:
    """The estimates as a Markdown table."""
    heads = [
        "GPUs", "memory each", "tokens a step", "step", "computing", "sending",
        "tokens/s", "training", "sampling", "GPU-hours",
    ]  # fmt: skip
    rows = []
    for row in found:
        used, room = sum(row.memory.values()), gpu.memory * guess.usable
        waits = "*" if row.network_seconds > row.compute_seconds else ""
        rows.append(
            [
                str(row.gpus),
                f"{used / 1e9:.1f} GB" + ("" if row.fits else f" of {room / 1e9:.0f}: too much"),
                _short(row.tokens_per_step),
                f"{row.step_seconds:.3g} s{waits}",
                f"{row.compute_seconds:.3g} s",
                f"{row.network_seconds:.3g} s",
                _short(row.tokens_per_second),
                f"{row.training_hours:.3g} h",
                f"{row.sampling_hours:.3g} h" if row.sampling_batch else "does not fit",
                _short(row.gpu_hours) if row.sampling_batch else "",
            ]
        )
        if price is not None:
            rows[-1].append(_short(row.cost(price)) if row.sampling_batch else "")
    heads += [] if price is None else ["cost"]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(number: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
