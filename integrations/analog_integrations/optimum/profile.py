"""``main_profile``: the Python twin of ``optimum-cli analog profile``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_integrations.optimum.export import resolve_device
from analog_plugin.checkpoint.load import load_checkpoint
from analog_plugin.checkpoint.save import plan_export, save_profiles
from analog_plugin.data import evaluation_tokens, generate_dataset, load_tokens
from analog_plugin.data.limits import check_sequence_length, check_token_ids
from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.layers import digital_layers
from analog_plugin.layers.prefix import without_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.paths import check_output, refuse_around
from analog_plugin.plugins import exporters, lookup
from analog_plugin.pretrained import load_tokenizer
from analog_plugin.recipe import DeploySettings

#: Rows that scales and bits are found on, their tokens, and how many at a time.
_ROWS, _LENGTH, _BATCH = 32, 128, 4
#: Files that hold weights, by the ends of their names.
_WEIGHTS = (".safetensors", ".bin", ".npz")


def main_profile(
    directory: str | Path,
    output: str | Path,
    *,
    profile: str | Sequence[str],
    weight_scale: str | None = None,
    average_bits: float | None = None,
    max_bytes: int | None = None,
    g_max: float | None = None,
    dataset: Any = None,
    corpus: str = "pydoc_data.topics",
    blocks: int = 4,
    length: int = 256,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Mapping[str, float]]:
    """Derive digital profiles from a checkpoint of the profile ``analog-fp``, and measure them.

    Args:
        directory: The checkpoint, or a hub id; it is not changed.
        output: Directory of the profile, or of several each in a directory of its name.
        profile: One or several names, for instance ``"w4-in-w8"``.
        weight_scale, average_bits, max_bytes: Options of digital profiles; see
            :func:`~analog_plugin.checkpoint.digital.plan_profile`.
        g_max: Of ``conductances``: µS of each column's largest weight (25).
        dataset: Text to find scales and bits on (see :func:`~analog_plugin.data.load_tokens`);
            None: 4,096 tokens sampled from the model, where any are needed.
        corpus, blocks, length: What the profiles are measured on; see
            :func:`~analog_plugin.data.evaluation_tokens`. 0 blocks: they are not.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the weights before they are rounded, and of all that stays in full precision;
            None: the checkpoint's.
        overwrite: Replace an output directory that is not empty.

    Returns:
        ``perplexity``, ``kl`` (to the model with its full-precision weights and inputs, nats a
        token), ``agreement`` and ``megabytes`` (of the weights' files) by profile.

    Raises:
        AnalogError: Something given is wrong; one sentence says what, and nothing was written.
    """
    names = (profile,) if isinstance(profile, str) else tuple(profile)
    given = {"weight_scale": weight_scale, "average_bits": average_bits, "max_bytes": max_bytes}
    deploy = DeploySettings.read({"profile": names, "g_max": g_max} | given, "deploy")
    deploy.check()
    if blocks < 0 or length < 2:
        raise AnalogError(
            f"blocks is {blocks} and length {length}, but they must be at least 0 and 2."
        )
    if "analog-fp" in deploy.profiles:
        raise AnalogError(
            "analog-fp is what profiles are derived from, with the record of its training; copy "
            "the directory instead."
        )
    check_output(output, overwrite)
    refuse_around(output, directory)
    place = resolve_device(device, dtype or "float32")
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = load_checkpoint(directory, **options).to(place)
    known = [lookup(exporters(), name, "deploy profile") for name in deploy.profiles]
    for exporter in known:  # all of them before the first one's data
        exporter.check(model, **deploy.options(exporter.name))
    tokenizer = load_tokenizer(str(directory))
    tokens = None
    if all(exporter.reading is None for exporter in known):
        blocks = 0  # no loader computes anything of these
    if blocks and tokenizer is None:
        print("There is no tokenizer beside the checkpoint, so nothing is measured.")
    elif blocks:
        check_sequence_length(model, length, "length")
        tokens = evaluation_tokens(tokenizer, blocks, length, corpus)
        check_token_ids(model, tokens, "The corpus")
    batches = _Batches(model, tokenizer, dataset)
    plans = {
        name: plan_export(model, name, batches=batches, **deploy.options(name))
        for name in deploy.profiles
    }
    measured = (
        {}
        if tokens is None
        else _measure(model, plans, tokens, f"{blocks} blocks of {length} tokens of {corpus}")
    )
    save_profiles(model, output, plans, tokenizer=tokenizer, overwrite=overwrite)
    results: dict[str, Mapping[str, float]] = {}
    for name in plans:
        at = Path(output) if len(plans) == 1 else Path(output) / name
        size = sum(p.stat().st_size for p in at.rglob("*") if p.suffix in _WEIGHTS)
        results[name] = {**measured.get(name, {}), "megabytes": size / 1e6}
    print(_table(results))
    print(f"Written to {output}.")
    return results


class _Batches:
    """Batches [4, 128] of token ids, made when they are first asked for."""

    def __init__(self, model: Any, tokenizer: Any, dataset: Any) -> None:
        self.model, self.tokenizer, self.dataset = model, tokenizer, dataset

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.rows.split(_BATCH):
            yield {"input_ids": batch.to(self.model.device)}

    @cached_property
    def rows(self) -> Tensor:
        """Token ids [32, 128], sampled from the model with full-precision weights, or read."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        length = min(_LENGTH, context or _LENGTH)
        if self.dataset is None:
            with digital_layers(self.model), without_prefix(self.model):
                return generate_dataset(self.model, _ROWS * length, length, batch_size=_ROWS)
        rows = load_tokens(self.dataset, self.tokenizer, length, tokens=_ROWS * length)
        check_token_ids(self.model, rows, "The dataset")
        return rows


def _measure(
    model: Any, plans: Mapping[str, Any], tokens: Tensor, what: str
) -> dict[str, Mapping[str, float]]:
    """Metrics by profile; they become notes of the model cards too."""
    with digital_layers(model), without_prefix(model), evaluation_mode(model):
        reference = Reference.of(model, tokens, keep_logits=True)
    found = {}
    for name, plan in plans.items():
        reading = lookup(exporters(), name, "deploy profile").reading
        if reading is None:
            continue
        with reading(model, plan), evaluation_mode(model):
            metrics = fidelity(model, tokens, reference)
        found[name] = metrics
        if hasattr(plan, "notes"):
            plan.notes.append(
                f"Measured on {what}: perplexity {metrics['perplexity']:.2f}, KL to the model with "
                f"full-precision weights and inputs {metrics['kl']:.4f} nats a token, top-1 "
                f"agreement {metrics['agreement']:.1%}."
            )
    return found


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| profile | size | perplexity | KL (nats) | top-1 |", "|---|---|---|---|---|"]
    for name, row in results.items():
        cells = [f"{row['megabytes']:.1f} MB"]
        for metric, form in (("perplexity", ".2f"), ("kl", ".4f"), ("agreement", ".1%")):
            cells.append(format(row[metric], form) if metric in row else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
