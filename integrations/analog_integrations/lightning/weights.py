"""The tensors of a published analog model, read safely: its weights and its analog state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_integrations.lightning.archives import DTYPES, RESAVE, read_archive
from analog_integrations.lightning.config import LEARNABLE, PER_CHANNEL, LightningConfig
from analog_plugin.checkpoint.layout import WEIGHTS_FILE, WEIGHTS_INDEX, weight_files
from analog_plugin.errors import AnalogError, one_line, shown

BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
RANGE = "input_range"
COUNT = "input_range_update_idx"
CLIP = "learnable_weight_clip"
#: What aihwkit-lightning's layers hold beside weight and bias.
ANALOG_STATE = (RANGE, COUNT, "x_min", "x_max", CLIP)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, on the CPU; of ``.bin`` files mapped, not read.

    Raises:
        AnalogError: There are none or two sets of them, or a file is no plain dictionary of
            tensors.
    """
    kinds = ((BIN_FILE, BIN_INDEX), (WEIGHTS_FILE, WEIGHTS_INDEX))
    there = [kind for kind in kinds if any((directory / name).is_file() for name in kind)]
    found = directory.glob("pytorch_model-*-of-*.bin")
    shards = sorted(path.name for path in found if path.is_file())
    if len(there) > 1:
        raise AnalogError(
            f"{directory} holds both {BIN_FILE} and {WEIGHTS_FILE}; remove the files that are not "
            "the analog model's."
        )
    if there:
        names = [name for name in weight_files(directory, *there[0]) if not name.endswith(".json")]
    elif shards:  # published without an index
        names = shards
        _refuse_missing_shards(directory, shards)
    else:
        raise AnalogError(
            f"{directory} has neither {BIN_FILE} nor {WEIGHTS_FILE}, whole or in shards; give the "
            "directory of a published analog model."
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = directory / name
        read = read_archive if name.endswith(".bin") else _read_safetensors
        for key, tensor in read(path).items():
            _check_tensor(path, key, tensor)
            if key in tensors:
                raise AnalogError(f"{path} holds {shown(key)} a second time; copy the files again.")
            tensors[key] = tensor
    return tensors


def _refuse_missing_shards(directory: Path, shards: list[str]) -> None:
    last = shards[0].removesuffix(".bin").rpartition("-of-")[2]
    count = int(last) if last.isdecimal() and len(last) <= 5 else 0
    wanted = [f"pytorch_model-{i:0{len(last)}}-of-{last}.bin" for i in range(1, count + 1)]
    if shards != wanted:
        missing = sorted(set(wanted) - set(shards))
        lack = f"lacks {missing[0]}" if missing else f"has {shards[-1]}, of another set,"
        raise AnalogError(f"{directory} {lack} beside {shards[0]}; copy the files again.")


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AnalogError(f"{path} cannot be read: {one_line(error)}; copy it again.") from None


def _check_tensor(path: Path, name: Any, value: Any) -> None:
    plain = (
        isinstance(name, str)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.dtype in DTYPES
        # numel() of absurd sizes overflows
        and math.prod(value.shape) * value.element_size() <= value.untyped_storage().nbytes()
    )
    if not plain:
        kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
        raise AnalogError(
            f"{path} holds {shown(name)}, a {kind}, instead of a plain tensor; write {RESAVE}."
        )


def part_state(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The model's own tensors, and by layer what aihwkit-lightning adds."""
    weights: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part in ANALOG_STATE:
            layers.setdefault(layer, {})[part] = tensor
        else:
            weights[key] = tensor
    return weights, layers


def forward_weight(
    weight: Tensor, tiles: list[int], clip: Tensor | None, config: LightningConfig
) -> Tensor:
    """The weights [out, in] that every forward of aihwkit-lightning multiplies by, noise apart.

    Args:
        weight: As stored, [out, in].
        tiles: Rows of each tile.
        clip: [K, out] learnt clipping, with the clip type of that name.
        config: What may round or clip them.
    """
    rounds = config.quantization_type != "None"
    if clip is None and not rounds:
        return weight
    blocks = []
    for k, block in enumerate(weight.float().split(tiles, dim=1)):
        peak = block.abs().amax(1, keepdim=True) if clip is None else clip[k].float()[:, None]
        if rounds:
            if config.quantization_type == "Discretize" and clip is None:
                peak = peak.amax()
            steps = max(config.weight_res, 1 / config.weight_res)
            step, most = _resolution(peak / steps, 2.0), steps / 2
            block = (block / step.clamp_min(_TINY)).clamp(-most, most).round() * step
        else:
            unit = _resolution(peak, 1.0)
            block = (block / unit.clamp_min(_TINY)).clamp(-1, 1) * unit
        blocks.append(block)
    return torch.cat(blocks, dim=1).to(weight.dtype)


_TINY = torch.finfo(torch.float32).tiny


def _resolution(value: Tensor, factor: float) -> Tensor:
    """As aihwkit-lightning reads it: where all are above 1 it takes them for numbers of steps."""
    found = factor / value if bool((value > 1).all()) else factor * value
    return torch.where(found == 0, 1.0, found)


def full_scale_ratios(
    stored: Tensor, weight: Tensor, tiles: list[int], clip: Tensor | None, config: LightningConfig
) -> Tensor:
    """ADC full scale of each tile's columns here over that in aihwkit-lightning, [K, out].

    Here it follows the column's largest weight; there only with two of the clip types, else the
    largest of the whole tile, and with learnt clipping the clip itself. Columns of zeros give 1.

    Args:
        stored: As in the file, [out, in].
        weight: What :func:`forward_weight` made of it.
        tiles, clip, config: See there.
    """
    ratios = []
    for k, block in enumerate(weight.float().split(tiles, dim=1)):
        ours = block.abs().amax(1)
        theirs = stored.float().split(tiles, dim=1)[k].abs().amax(1)
        if config.clip_type == LEARNABLE and clip is not None:
            theirs = clip[k].float().abs()
        elif config.clip_type != PER_CHANNEL:
            theirs = theirs.amax().expand_as(theirs)
        ratios.append(torch.where(ours > 0, ours / theirs.clamp_min(_TINY), torch.ones_like(ours)))
    return torch.stack(ratios)
