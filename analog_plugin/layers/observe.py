"""Watch the inputs of analog layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.convert import digital_layers
from analog_plugin.modes import evaluation_mode
from analog_plugin.progress import progress_bar

#: Called with a layer's input [..., in] and the [T] mask of the tokens that count, or None.
Observer = Callable[[Tensor, Tensor | None], None]


@torch.no_grad()
def observe_inputs(
    model: nn.Module,
    layers: Mapping[str, Any],
    observers: Mapping[str, Observer],
    batches: Iterable[Mapping[str, Tensor]],
    desc: str,
    total: int | None = None,
) -> None:
    """Run ``batches`` in digital operation; each layer's inputs go to the observer of its name.

    Args:
        model: A model with analog layers; converters and noise are off meanwhile.
        layers: The analog layers by name.
        observers: By the same names.
        batches: Keyword arguments of the model's forward.
        desc: Shown with the progress bar.
        total: Number of batches, for the progress bar.

    Raises:
        AnalogError: There is no batch.
    """
    try:
        for name, observer in observers.items():
            layers[name].observer = observer
        with evaluation_mode(model), digital_layers(model):
            run_batches(model, batches, desc, total, watched=layers.values())
    finally:
        for name in observers:
            layers[name].observer = None


@torch.no_grad()
def run_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    desc: str,
    total: int | None = None,
    *,
    watched: Collection[nn.Module],
    before: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> None:
    """Run ``batches`` for what the ``watched`` modules see; ``before`` is called with each.

    Raises:
        AnalogError: There is no batch.
    """
    count = 0
    head = getattr(model, "get_output_embeddings", lambda: None)()
    spared = (
        all(head is not module for module in watched)
        and "logits_to_keep" in signature(model.forward).parameters
    )
    for batch in progress_bar(batches, desc=desc, total=total):
        options: dict[str, Any] = {"use_cache": False}
        if spared and "labels" not in batch:  # which are compared with all logits
            options["logits_to_keep"] = 1
        if before is not None:
            before(batch)
        model(**(options | dict(batch)))
        count += 1
    if count == 0:
        raise AnalogError("The calibration data is empty; give at least one batch of tokens.")


def unreached(name: str) -> AnalogError:
    """The error for a layer whose inputs no batch told."""
    return AnalogError(
        f"No calibration input reached {name}; keep it digital with ignore: [{name}]."
    )


def static_inputs(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Those of ``layers`` (pairs of name and layer) whose DAC has a range of its own."""
    return {
        name: layer
        for name, layer in layers
        if layer.scheme.input_bits is not None and layer.scheme.input_range != "dynamic"
    }
