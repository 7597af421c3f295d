"""A model on aihwkit's tiles, programmed by aihwkit and read as time passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from analog_integrations.aihwkit.noise import seeded
from analog_plugin.errors import AnalogError
from analog_plugin.evaluation import NoiseReport, Reference
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.evaluation.noise import NoiseCell, check_seeds
from analog_plugin.layers.state import keyed_generator
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise.programming import parse_time
from analog_plugin.progress import progress_bar


@torch.no_grad()
def evaluate_drift(
    model: Any,
    tokens: Tensor,
    times: Sequence[str | float] = ("0s", "1h", "1d", "1y"),
    seeds: int | Sequence[int] = 5,
    *,
    reference: Reference | None = None,
    label: str = "programmed",
    batch_size: int = 4,
) -> NoiseReport:
    """Program a model on aihwkit's tiles under each seed, and read it at each time.

    The noise model and the drift compensation are those of its tiles. A seed is one chip: the same
    devices with the same drift coefficients are read at every time. At ``0s`` there is read noise
    already; as programmed there is none.

    Args:
        model: From :func:`~analog_integrations.aihwkit.to_aihwkit`. Afterwards its tiles hold the
            clean weights.
        tokens: [N, S] token ids.
        times: Times since the end of programming (units s, min, h, d, y).
        seeds: Seeds, or their number (0, 1, ...).
        reference: The digital original on the same tokens, for KL and agreement.
        label: What the cells are called: ``none``, ``label`` as programmed, and ``label@time``.
        batch_size: Rows of tokens evaluated together.

    Raises:
        AnalogError: The model has no tiles of aihwkit, or a time or the seeds are wrong.
    """
    seconds = {str(time): parse_time(time) for time in times}
    seeds = check_seeds(seeds)
    if not hasattr(model, "analog_tiles"):
        raise AnalogError(
            f"{type(model).__name__} has no tiles of aihwkit; call to_aihwkit(model) first."
        )
    report = NoiseReport()

    def measure(name: str, seed: int | None) -> None:
        metrics = dict(fidelity(model, tokens, reference, batch_size))
        report.cells.append(NoiseCell(name, seed, metrics))

    with evaluation_mode(model):
        restore_tiles(model)
        try:
            measure("none", None)
            for seed in progress_bar(seeds, desc="Chips"):
                draws = keyed_generator(f"aihwkit/{seed}")
                program, read = torch.randint(2**62, (2,), generator=draws).tolist()
                restore_tiles(model)
                with seeded(program):
                    model.program_analog_weights()
                measure(label, seed)
                for time, passed in seconds.items():
                    with seeded(read):
                        model.drift_analog_weights(passed)
                    measure(f"{label}@{time}", seed)
        finally:
            restore_tiles(model)
    return report


@torch.no_grad()
def restore_tiles(model: Any) -> None:
    """Give aihwkit's tiles their weights as before programming, and forget the rest of it.

    Programming anew does not suffice: the factor of the last drift compensation would stay.
    """
    for tile in model.analog_tiles():
        if tile.reference_combined_weights is not None:
            tile.tile.set_weights(tile.reference_combined_weights)
        tile.reference_combined_weights = tile.programmed_weights = None
        tile.drift_noise_parameters = tile.drift_baseline = None
        tile.drift_readout_tensor = None
        tile.alpha = torch.ones_like(tile.alpha).reshape(-1)[:1]
