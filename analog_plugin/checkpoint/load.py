"""Read a checkpoint directory back as the analog model: safetensors and JSON only."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from analog_plugin.checkpoint.layout import AnalogConfig, sha256_of, verify_manifest
from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers, convert_to_analog
from analog_plugin.noise import resolve_noise
from analog_plugin.scheme import AnalogScheme


def load_checkpoint(
    directory: str | Path,
    *,
    noise: str | Mapping[str, Any] | Any | None = None,
    seed: int = 0,
    verify: bool = True,
    **kwargs: Any,
) -> Any:
    """Load the analog model from a directory of the profile ``analog-fp``.

    Args:
        directory: A local directory, or a hub id.
        noise: Program all layers with this noise model (``"pcm"``, ``"gaussian:0.02"``, ...).
        seed: Seed of the programming; the same seed gives the same weights.
        verify: Check every file against the manifest first.
        **kwargs: For ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``device_map``, ...

    Returns:
        A ``PreTrainedModel`` in evaluation mode whose linear layers are analog.

    Raises:
        AnalogError: The directory is missing, holds no analog model, or is truncated or altered.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = _local(directory)
    values = _read_json(directory / "config.json")
    if "analog_config" not in values:
        kind = "a purely digital checkpoint" if "quantization_config" in values else "a plain model"
        raise AnalogError(
            f"{directory} is {kind} without analog state; give a directory of the profile "
            "analog-fp, which optimum-cli export analog writes."
        )
    analog = AnalogConfig.read(values["analog_config"], directory)
    if verify:
        verify_manifest(directory)
    if sha256_of(directory / analog.state.file) != analog.state.sha256:
        raise AnalogError(
            f"{directory / analog.state.file} is not the file that config.json describes; copy the "
            "checkpoint again or export it again."
        )
    model_of_noise = resolve_noise(noise)
    config = AutoConfig.from_pretrained(directory)
    # The full-precision weights are wanted, not the digital quantization around them.
    for key in ("quantization_config", "analog_config"):
        if hasattr(config, key):
            delattr(config, key)
    kwargs |= {"use_safetensors": True, "trust_remote_code": False}
    with _expected_extra_tensors():
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, **kwargs)
    _restore_analog(model, analog, directory)
    if model_of_noise is not None:
        for _, layer in analog_layers(model):
            layer.program(model_of_noise, seed)
    return model.eval()


def _restore_analog(model: nn.Module, analog: AnalogConfig, directory: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    scheme = AnalogScheme.from_dict(analog.scheme)
    known = {name for name, _ in model.named_modules()}
    unknown = [name for name in analog.tiles if name not in known]
    if unknown:
        raise AnalogError(
            f"{directory}/config.json names the layer {unknown[0]!r}, which the model "
            "does not have; export the checkpoint again."
        )
    convert_to_analog(model, scheme, ignore=(), targets=tuple(analog.tiles))
    try:
        state = load_file(directory / analog.state.file)
    except SafetensorError as error:
        raise AnalogError(f"{directory / analog.state.file} cannot be read: {error}.") from None
    for name, layer in analog_layers(model):
        ranges = state.get(f"{name}.input_range")
        if ranges is None or analog.tiles.get(name) != layer.tiles:
            raise AnalogError(
                f"{directory} does not describe the tiles of {name} as the model has them "
                f"({layer.tiles}); export the checkpoint again."
            )
        layer.set_input_range(ranges)


class _expected_extra_tensors:
    """Silence the report of ``input_scale``, which the analog model does not need."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("transformers.modeling_utils")
        self.filter = lambda record: "input_scale" not in record.getMessage()
        self.logger.addFilter(self.filter)

    def __exit__(self, *error: object) -> None:
        self.logger.removeFilter(self.filter)


def _local(directory: str | Path) -> Path:
    path = Path(directory)
    if path.is_dir():
        return path
    if path.is_absolute() or str(directory).count("/") != 1:
        raise AnalogError(f"There is no directory {directory}; give a checkpoint or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(directory)))
    except Exception as error:  # offline, unknown, gated: all mean that it cannot be had
        raise AnalogError(
            f"{directory} is neither a local directory nor a hub model within reach "
            f"({type(error).__name__})."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise AnalogError(f"{path.parent} has no {path.name}; give a model directory.") from None
    except (OSError, ValueError) as error:
        raise AnalogError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(values, dict):
        raise AnalogError(f"{path} does not hold a JSON object.")
    return values
