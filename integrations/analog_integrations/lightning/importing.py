"""``import_lightning``: from a published analog model to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from analog_integrations.lightning.config import (
    LEARNABLE,
    PER_CHANNEL,
    config_of_record,
)
from analog_integrations.lightning.config import LightningConfig as Config
from analog_integrations.lightning.pickles import read_record
from analog_integrations.lightning.schemes import scheme_of
from analog_integrations.lightning.weights import (
    CLIP,
    COUNT,
    RANGE,
    forward_weight,
    full_scale_ratios,
    part_state,
    read_tensors,
)
from analog_plugin import AnalogScheme
from analog_plugin.checkpoint.load import local_directory, refuse_adapter
from analog_plugin.checkpoint.save import plan_export, save_checkpoint
from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.layers import analog_layers, convert_to_analog
from analog_plugin.paths import check_output, refuse_around
from analog_plugin.pretrained import load_causal_lm, load_tokenizer, read_model_config

CONFIG_FILE = "rpu_config"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Args:
        directory: The checkpoint.
        scheme: Of its analog layers.
        layers: Their names.
        notes: Sentences on what was not taken over or is another thing here; the model card has
            them too.
    """

    directory: Path
    scheme: AnalogScheme
    layers: tuple[str, ...]
    notes: tuple[str, ...]


def import_lightning(
    path: str | Path,
    output: str | Path,
    *,
    adc_bound: Literal["clean", "noisy"] = "clean",
    ignore: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
) -> Imported:
    """Turn a model trained with aihwkit-lightning into a checkpoint of the profile ``analog-fp``.

    Nothing in the directory is executed, and aihwkit-lightning is not needed: tensors are read by
    safetensors or a reader that knows only tensors, ``rpu_config`` by one that knows only the
    configuration's classes.

    Args:
        path: A local directory or a hub id: ``config.json``, ``pytorch_model*.bin`` (or
            ``model*.safetensors``) and the pickled ``rpu_config``.
        output: Directory of the checkpoint; it appears when everything is written.
        adc_bound: Whether the ADC of programmed weights keeps the clean weights' full scale, or
            takes the noisy ones', as aihwkit-lightning does.
        ignore: Layers that were digital, where no input ranges tell (dynamic ranges, no
            converters): see :func:`~analog_plugin.convert_to_analog`.
        dtype: Type of the weights (``"float32"``, ...); None: as they are stored.
        overwrite: Replace an output directory that is not empty.

    Raises:
        AnalogError: Something in the directory is missing, damaged or hostile, or has no
            counterpart here; one sentence says what, and nothing was written.
    """
    if dtype not in (None, *_DTYPES):
        raise AnalogError(f"dtype is {shown(dtype)}, but must be one of {', '.join(_DTYPES)}.")
    check_output(output, overwrite)
    source = local_directory(path)
    refuse_around(output, source)
    refuse_adapter(source)
    config, notes = config_of_record(read_record(source / CONFIG_FILE))
    scheme, differing = scheme_of(config, adc_bound)
    weights, layers = part_state(read_tensors(source))
    _check_layers(config, scheme, weights, layers)
    counts = [part[COUNT] for part in layers.values() if COUNT in part]
    if config.has_ranges and any(bool((c < config.init_from_data).any()) for c in counts):
        differing.append(
            f"Some input ranges had not seen all {config.init_from_data} batches of their "
            "initialisation; training does not go on with it."
        )
    model = _model(source, weights, "lm_head" in layers, dtype)
    if layers:
        ignore, targets = (), tuple(layers)
    else:  # nothing in the file tells which layers were analog
        targets = ("Linear",)
    convert_to_analog(model, scheme, ignore, targets)
    differing += _take_over(model, layers, config)
    plan = plan_export(model)
    plan.notes.extend(notes + differing)
    save_checkpoint(model, output, plan=plan, tokenizer=load_tokenizer(source), overwrite=overwrite)
    names = tuple(name for name, _ in analog_layers(model))
    return Imported(Path(output), scheme, names, tuple(notes + differing))


def _check_layers(
    config: Config,
    scheme: AnalogScheme,
    weights: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Refuse analog state that does not fit the configuration or the weights."""
    if config.has_ranges and not layers:
        raise AnalogError(
            "rpu_config asks for input ranges, but the weights hold none (no tensor is called "
            "*.input_range); give the files that belong together."
        )
    wanted = ({RANGE} if config.has_ranges else set()) | (
        {CLIP} if config.clip_type == LEARNABLE else set()
    )
    for name, parts in layers.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.dim() != 2:
            raise AnalogError(
                f"The weights hold analog state of {shown(name)}, but no matrix "
                f"{shown(f'{name}.weight')}; only linear layers can be imported."
            )
        for part in (RANGE, CLIP):
            if (part in parts) != (part in wanted):
                there = "lacks" if part in wanted else "has"
                raise AnalogError(
                    f"The layer {shown(name)} {there} {part}, against what rpu_config says; give "
                    "the files that belong together."
                )
        tiles = scheme.tiles(weight.shape[1])
        shapes = {RANGE: [len(tiles)], CLIP: [len(tiles), weight.shape[0]]}
        for part in wanted:
            values = parts[part]
            fits = list(values.shape) == shapes[part]
            if not fits or not bool(((values > 0) & values.float().isfinite()).all()):
                raise AnalogError(
                    f"{shown(f'{name}.{part}')} must be {shapes[part]} positive numbers (one for "
                    f"each tile of at most {scheme.tile_rows or 'all'} rows), but has the shape "
                    f"{list(values.shape)} or others; give the files that belong together."
                )


@torch.no_grad()
def _take_over(model: Any, layers: Mapping[str, Mapping[str, Tensor]], config: Config) -> list[str]:
    """Give the analog layers their ranges, and the weights that every forward multiplied by.

    Returns:
        A sentence where ADCs have another full scale here, with figures.
    """
    ratios = []
    for name, layer in analog_layers(model):
        parts = layers.get(name, {})
        if RANGE in parts:
            layer.set_input_range(parts[RANGE].float())
        stored, clip = layer.weight.detach(), parts.get(CLIP)
        weight = forward_weight(stored, layer.tiles, clip, config)
        if config.has_adc:
            ratios.append(full_scale_ratios(stored, weight, layer.tiles, clip, config).flatten())
        if weight is not stored:
            layer.weight.data = weight
    found = torch.cat(ratios) if ratios else torch.ones(1)
    # Codes of rounded weights miss the column's maximum by fp32 rounding.
    if bool(((found - 1).abs() < 1e-5).all()):
        return []
    return [
        "The ADC's full scale follows the largest weight of each column here, there "
        f"{_full_scale_there(config)}: here it is {found.median():.3g} times as large in the "
        f"median column, {found.min():.3g} to {found.max():.3g} times in all, and where it is "
        "smaller, outputs are rounded finer and clipped earlier."
    ]


def _full_scale_there(config: Config) -> str:
    if config.clip_type == LEARNABLE:
        return "the learnt clipping"
    if config.clip_type == PER_CHANNEL:
        return "that before rounding"
    return "that of the whole tile"


def _model(source: Path, weights: dict[str, Tensor], own_head: bool, dtype: str | None) -> Any:
    """The digital model with these weights."""
    config = read_model_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise AnalogError(
            f"{source}/config.json says that the weights are quantized, but an analog model has "
            "them in full precision; give the files that belong together."
        )
    if own_head:  # an analog head has its own copy of the embedding
        config.tie_word_embeddings = False
    matrices = (t.dtype for t in weights.values() if t.is_floating_point() and t.dim() == 2)
    model = load_causal_lm(
        None,
        name=str(source),
        config=config,
        state_dict=weights,
        dtype=next(matrices, torch.float32) if dtype is None else getattr(torch, dtype),
    )
    if (source / "generation_config.json").is_file():
        model.generation_config = _generation_config(source)
    unused = sorted(weights.keys() - model.state_dict().keys())
    if unused:
        raise AnalogError(
            f"The weights hold {shown(unused[0])}"
            + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
            + ", which the model of config.json does not have; give the files that belong together."
        )
    return model


def _generation_config(source: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source)
    # Broken values fail anywhere in transformers.
    except Exception as error:
        raise AnalogError(
            f"{source}/generation_config.json cannot be read: {one_line(error)}."
        ) from error
