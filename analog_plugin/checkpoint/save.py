"""Write an analog model as a checkpoint directory: whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from analog_plugin.checkpoint.card import model_card
from analog_plugin.checkpoint.layout import CARD_FILE, RECIPE_FILE, TRAINING_FILE, write_manifest
from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers, forward_state, model_scheme
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.paths import atomic_directory


def save_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    profile: str = "analog-fp",
    tokenizer: Any = None,
    result: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` to ``directory``.

    Args:
        model: A model with analog layers; it is not changed.
        directory: The target; it appears when everything is written.
        profile: A name from the hook ``analog_exporters``: ``"analog-fp"`` keeps the analog model,
            ``"w8a8"`` is purely digital.
        tokenizer: Saved beside it.
        result: The :class:`~analog_plugin.training.pipeline.AnalogResult` that made the model: its
            recipe, training record and tables are saved too.
        overwrite: Replace a directory that is not empty.

    Returns:
        The directory.

    Raises:
        AnalogError: The directory is not empty or not writable, the model is not analog or has no
            calibrated ranges, or the profile is unknown or cannot hold this model.
    """
    from analog_plugin.plugins import exporters, lookup

    forward_state(model)
    for _, layer in analog_layers(model):
        layer.require_ranges()
    if model_scheme(model).prefix is not None and installed_prefix(model) is None:
        raise AnalogError(
            "The scheme has a digital prefix, but the model has none installed; call "
            "prepare_start(model, batches, held_out, noise), which does it."
        )
    exporter = lookup(exporters(), profile, "deploy profile")
    exporter.check(model)
    with atomic_directory(directory, overwrite) as target:
        analog_config = exporter.write(model, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if analog_config is not None:
            config = json.loads((target / "config.json").read_text())
            config["analog_config"] = dict(analog_config)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if result is not None:
            _write_record(target, result)
        write_manifest(target)
        (target / CARD_FILE).write_text(model_card(model, profile, result))
    return Path(directory)


def _write_record(target: Path, result: Any) -> None:
    import yaml

    (target / RECIPE_FILE).parent.mkdir(exist_ok=True)
    fields = result.recipe.model_dump(mode="json")
    stage = {"analog_stage": {"analog_modifiers": {"AnalogModifier": fields}}}
    (target / RECIPE_FILE).write_text(yaml.safe_dump(stage, sort_keys=False))
    record = dict(result.training)
    record["evaluation"] = {name: report.to_dict() for name, report in result.reports.items()}
    (target / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
