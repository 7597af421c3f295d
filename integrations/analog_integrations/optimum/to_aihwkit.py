"""``main_to_aihwkit``: the Python twin of ``optimum-cli analog to-aihwkit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_integrations.optimum.evaluate import check_counts, kind_of, load_entry
from analog_integrations.optimum.export import resolve_device
from analog_plugin.checkpoint import load_checkpoint
from analog_plugin.data import evaluation_tokens
from analog_plugin.data.limits import check_sequence_length, check_token_ids
from analog_plugin.errors import AnalogError, require
from analog_plugin.evaluation import NoiseReport, Reference
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.evaluation.noise import NoiseCell, check_seeds
from analog_plugin.evaluation.tables import comma_separated, markdown, rows
from analog_plugin.layers import digital_layers
from analog_plugin.layers.prefix import without_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import noise_label
from analog_plugin.noise.programming import parse_time
from analog_plugin.paths import atomic_directory, check_output
from analog_plugin.pretrained import load_tokenizer

#: How the two simulations of one checkpoint are called in the table.
HERE, THERE = "analog-plugin", "aihwkit"


def main_to_aihwkit(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    noise: Any = "hermes",
    time: Sequence[str | float] = ("0s", "1h", "1d", "1y"),
    seeds: int | Sequence[int] = 5,
    drift_compensation: bool = True,
    tiles: str = "torch",
    original: str | None = None,
    corpus: str = "pydoc_data.topics",
    blocks: int = 4,
    length: int = 256,
    batch_size: int = 4,
    device: str | None = None,
    overwrite: bool = False,
) -> dict[str, NoiseReport]:
    """Convert an analog checkpoint to aihwkit, program it there and measure it as time passes.

    Args:
        directory: A checkpoint of the profile ``analog-fp``, or its hub id.
        output: Directory of ``table.md`` and ``table.csv``; None: they are only printed.
        noise, drift_compensation, tiles: See :func:`~analog_integrations.aihwkit.to_aihwkit`.
        time: Times since programming at which the model is read, such as ``"1h"``.
        seeds: Number of chips, or their seeds.
        original: Full-precision model that KL and agreement are to; None: the checkpoint's own
            full-precision weights, without converters.
        corpus, blocks, length: What to measure on; see
            :func:`~analog_plugin.data.evaluation_tokens`.
        batch_size: Blocks evaluated together.
        device: Where to compute; None: a GPU if there is one.
        overwrite: Replace an output directory that is not empty.

    Returns:
        The reports of the plugin's own layers without noise and of aihwkit's, by these names. The
        cell ``none`` of the latter also has ``kl_to_here``, the KL to the former.

    Raises:
        AnalogError: Something given is wrong; one sentence says what, and nothing was written.
    """
    from analog_integrations.aihwkit import evaluate_drift, to_aihwkit
    from analog_integrations.aihwkit.configuration import require_tiles
    from analog_integrations.aihwkit.convert import noise_model_of

    require("scipy.stats", "aihwkit")  # before the long work, not after it
    counts = {"blocks": (blocks, 1), "length": (length, 2), "batch_size": (batch_size, 1)}
    check_counts(Path() if output is None else output, **counts)
    check_seeds(seeds)
    for item in time:
        parse_time(item)
    noise_model_of(noise)
    require_tiles(tiles)
    if output is not None:
        check_output(output, overwrite)
    if original is not None and kind_of(original, length) != "full":
        raise AnalogError(f"The original {original} is no full-precision model; give one.")
    place = resolve_device(device)
    ours = load_checkpoint(directory, dtype=torch.float32).to(place)
    tokenizer = load_tokenizer(str(directory))
    if tokenizer is None:
        raise AnalogError(f"There is no tokenizer beside {directory}; copy the whole directory.")
    check_sequence_length(ours, length, "length")
    tokens = evaluation_tokens(tokenizer, blocks, length, corpus)
    check_token_ids(ours, tokens, "The corpus")
    theirs = to_aihwkit(ours, noise, drift_compensation=drift_compensation, tiles=tiles)
    reference = _reference(ours, original, tokens, batch_size, place)
    with evaluation_mode(ours):
        here = NoiseReport(
            [NoiseCell("none", None, dict(fidelity(ours, tokens, reference, batch_size)))]
        )
        agreement = fidelity(theirs, tokens, Reference.of(ours, tokens, batch_size), batch_size)
    report = evaluate_drift(
        theirs, tokens, time, seeds, reference=reference, label=noise_label(noise),
        batch_size=batch_size,
    )  # fmt: skip
    table = rows({HERE: here, THERE: report})
    notes = [
        f"Measured on {blocks} blocks of {length} tokens of {corpus}, in float32, {tiles} tiles. "
        f"KL and top-1 are to {original or 'the same weights in full precision'}.",
        "Without noise, from the plugin's own layers to aihwkit's: KL "
        f"{agreement['kl']:.1e} nats, top-1 {agreement['agreement']:.2%}.",
    ]
    report.cells[0].metrics["kl_to_here"] = agreement["kl"]
    text = markdown(table) + "\n" + "\n\n".join(notes)
    print(f"\n{text}")
    if output is not None:
        with atomic_directory(output, overwrite) as target:
            (target / "table.md").write_text(text + "\n", encoding="utf-8")
            (target / "table.csv").write_text(comma_separated(table), encoding="utf-8")
        print(f"Written to {output}.")
    return {HERE: here, THERE: report}


def _reference(
    ours: Any, original: str | None, tokens: Tensor, batch_size: int, place: str
) -> Reference:
    if original is not None:
        return Reference.of(load_entry(original, "original", "float32", place), tokens, batch_size)
    # Kept, since the layers are analog again when they are asked for.
    with digital_layers(ours), without_prefix(ours), evaluation_mode(ours):
        return Reference.of(ours, tokens, batch_size, keep_logits=True)
