"""What is known of a run beside its weights, and by what two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from analog_plugin.data.generate import fingerprint
from analog_plugin.recipe import AnalogRecipe

#: What comes after training: at resume it may be another.
_FREE = {"deploy"}


class Record(BaseModel):
    """What is known beside the weights.

    Attributes:
        identity: Of the run: see :func:`run_identity`.
        scheme: The model's, with all that was chosen for it.
        start: What :func:`~analog_plugin.training.start.prepare_start` did.
        reports: Measurements so far.
        seconds: Time spent so far, by part.
        tokens: Hash of the training tokens.
        run: What the training did, once it is done.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1] = 1
    identity: dict[str, Any]
    scheme: dict[str, Any]
    tokens: str
    start: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    run: dict[str, Any] | None = None


def run_identity(model: nn.Module, recipe: AnalogRecipe, dataset: Any, processes: int) -> dict:
    """What must be the same where a run is resumed, as plain values by name.

    Args:
        model: The digital original.
        recipe: The settings in force.
        dataset: What is trained on instead of the recipe's data.
        processes: Their number.
    """
    if isinstance(dataset, Tensor):
        dataset = f"{tuple(dataset.shape)} tokens, {int(dataset.sum())}"
    fields = recipe.model_dump(mode="json", exclude=_FREE)
    return {
        "model": fingerprint(model),
        "dataset": None if dataset is None else str(dataset),
        "processes": processes,
        "recipe": json.loads(json.dumps(fields)),
    }


def difference(before: Any, now: Any, where: str = "") -> str | None:
    """The first difference between two plain values, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            below = key if where in ("", "recipe") else f"{where}.{key}"
            found = difference(before.get(key), now.get(key), below)
            if found is not None:
                return found
        return None
    if before == now:
        return None
    if where == "model":
        return "it began with another model, or in another dtype"
    return f"{where} was {before!r}, and is {now!r}"
