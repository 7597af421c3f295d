"""Write an analog model as a checkpoint directory: whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from analog_plugin.checkpoint.card import model_card
from analog_plugin.checkpoint.layout import CARD_FILE, RECIPE_FILE, TRAINING_FILE, write_manifest
from analog_plugin.data.shards.rows import is_shards
from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers, forward_state, model_scheme
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.paths import atomic_directory, check_output


def save_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    profile: str = "analog-fp",
    plan: Any = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
    result: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write ``model`` to ``directory``.

    Args:
        model: A model with analog layers; it is not changed.
        directory: The target; it appears when everything is written.
        profile: A name from the hook ``analog_exporters``: ``"analog-fp"`` keeps the analog model,
            all others of this package's are purely digital.
        plan: What :func:`plan_export` made for this profile, instead of ``batches`` and options;
            None: the one of ``result``, if there is any and nothing else is said.
        batches: Keyword arguments of the model's forward, to find scales on; profiles with
            quantized outputs and mixed ones need them.
        tokenizer: Saved beside it.
        result: The :class:`~analog_plugin.training.pipeline.AnalogResult` that made the model: its
            recipe, training record and tables are saved too.
        overwrite: Replace a directory that is not empty.
        **options: Of the profile; see :func:`~analog_plugin.checkpoint.digital.plan_profile`.

    Returns:
        The directory.

    Raises:
        AnalogError: The directory is not empty or not writable, the model is not analog or has no
            calibrated ranges, or the profile is unknown, cannot hold this model or has no such
            option.
    """
    from analog_plugin.plugins import exporters, lookup

    exporter = lookup(exporters(), profile, "deploy profile")
    check_output(directory, overwrite)
    if plan is None and result is not None and not options and batches is None:
        plan = result.plans.get(profile)
    if plan is None:
        plan = plan_export(model, profile, batches=batches, **options)
    elif options or batches is not None:
        raise AnalogError("A plan holds options and scales already; give it alone.")
    made_for = getattr(getattr(plan, "profile", None), "name", profile)
    if made_for != profile:
        raise AnalogError(f"The plan was made for the profile {made_for}, not for {profile}.")
    with atomic_directory(directory, overwrite) as target:
        analog_config = (
            exporter.write(model, target)
            if exporter.prepare is None
            else exporter.write(model, target, plan)
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if analog_config is not None:
            config = json.loads((target / "config.json").read_text())
            config["analog_config"] = dict(analog_config)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if result is not None:
            _write_record(target, result)
        write_manifest(target)
        (target / CARD_FILE).write_text(model_card(model, profile, result, plan))
    return Path(directory)


def save_profiles(
    model: nn.Module,
    directory: str | Path,
    plans: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    result: Any = None,
    overwrite: bool = False,
) -> None:
    """Write one profile to ``directory``, or several to directories of their names below it.

    Args:
        model: A model with analog layers; it is not changed.
        directory: The target; it appears when everything is written.
        plans: What :func:`plan_export` made, by profile.
        tokenizer, result, overwrite: See :func:`save_checkpoint`.

    Raises:
        AnalogError: See :func:`save_checkpoint`.
    """
    beside = {"tokenizer": tokenizer, "result": result}
    if len(plans) == 1:
        ((profile, plan),) = plans.items()
        save_checkpoint(model, directory, profile=profile, plan=plan, overwrite=overwrite, **beside)
        return
    with atomic_directory(directory, overwrite) as target:
        for profile, plan in plans.items():
            save_checkpoint(model, target / profile, profile=profile, plan=plan, **beside)


def plan_export(
    model: nn.Module,
    profile: str = "analog-fp",
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> Any:
    """Find what ``profile`` writes beside the weights: scales, bits of each layer.

    Args:
        model: A model with analog layers; it is not changed.
        profile: A name from the hook ``analog_exporters``.
        batches: Keyword arguments of the model's forward, to find scales on; None: from the model's
            own ranges.
        **options: Of the profile; see :func:`~analog_plugin.checkpoint.digital.plan_profile`.

    Returns:
        For :func:`save_checkpoint`; None where the exporter needs nothing.

    Raises:
        AnalogError: The model is not analog or has no calibrated ranges, or the profile is unknown,
            cannot hold this model or has no such option.
    """
    from analog_plugin.plugins import exporters, lookup

    exporter = lookup(exporters(), profile, "deploy profile")
    for name in options:
        if name not in exporter.options:
            raise AnalogError(
                f"The profile {profile} has no option {name}; it has "
                f"{', '.join(exporter.options) or 'none'}."
            )
    forward_state(model)
    for _, layer in analog_layers(model):
        layer.require_ranges()
    if model_scheme(model).prefix is not None and installed_prefix(model) is None:
        raise AnalogError(
            "The scheme has a digital prefix, but the model has none installed; call "
            "prepare_start(model, batches, held_out, noise), which does it."
        )
    exporter.check(model, **options)
    return None if exporter.prepare is None else exporter.prepare(model, batches=batches, **options)


def _write_record(target: Path, result: Any) -> None:
    import yaml

    (target / RECIPE_FILE).parent.mkdir(exist_ok=True)
    fields = result.recipe.model_dump(mode="json")
    data = result.recipe.data
    if is_shards(data.source):  # they say themselves what the recipe left open
        fields["data"] = data.model_dump(mode="json", exclude_unset=True)
    stage = {"analog_stage": {"analog_modifiers": {"AnalogModifier": fields}}}
    (target / RECIPE_FILE).write_text(yaml.safe_dump(stage, sort_keys=False))
    record = dict(result.training)
    record["evaluation"] = {name: report.to_dict() for name, report in result.reports.items()}
    (target / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
