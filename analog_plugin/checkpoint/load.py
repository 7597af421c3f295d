"""Read a checkpoint directory back as the analog model: safetensors and JSON only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.layout import (
    CONFIG_FILE,
    STATE_FILE,
    AnalogConfig,
    verify_manifest,
    weight_files,
)
from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.files import read_json, sha256_of
from analog_plugin.layers import analog_layers, convert_to_analog
from analog_plugin.layers.prefix import Prefix, install_prefix, prefix_shapes, prefix_tokens
from analog_plugin.noise import resolve_noise
from analog_plugin.pretrained import load_causal_lm, read_model_config


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
    directory = local_directory(directory)
    analog = read_analog_config(directory)
    weights = weight_files(directory)
    if verify:
        verify_manifest(directory, (CONFIG_FILE, STATE_FILE, *weights))
    state = read_state(directory, analog)
    model_of_noise = resolve_noise(noise)
    config = read_model_config(directory)
    # The full-precision weights are wanted: no quantization around them, no file of another name.
    for key in ("quantization_config", "analog_config", "transformers_weights"):
        if hasattr(config, key):
            delattr(config, key)
    kwargs |= {"use_safetensors": True}
    model = load_causal_lm(directory, config=config, **kwargs)
    _restore_analog(model, analog, state, directory)
    if model_of_noise is not None:
        for _, layer in analog_layers(model):
            layer.program(model_of_noise, seed)
    return model.eval()


def read_analog_config(directory: Path) -> AnalogConfig:
    """What ``config.json`` says of the analog model.

    Raises:
        AnalogError: It is missing or damaged, or says nothing.
    """
    values = read_json(directory / CONFIG_FILE)
    if "analog_config" not in values:
        kind = "a plain model without analog state"
        if "quantization_config" in values:
            kind = "purely digital: its full-precision weights are gone, and without them it cannot"
            kind += " become analog"
        raise AnalogError(
            f"{directory} is {kind}; give a directory of the profile analog-fp, which optimum-cli "
            "export analog writes."
        )
    refuse_adapter(directory)
    return AnalogConfig.read(values["analog_config"], directory)


def local_directory(directory: str | Path) -> Path:
    """A directory as it is, or the files of a hub id.

    Raises:
        AnalogError: It is neither.
    """
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


def refuse_adapter(directory: Path) -> None:
    """Refuse what transformers would load too, and the model that it names instead of this one.

    Raises:
        AnalogError: The directory holds an adapter.
    """
    if (directory / "adapter_config.json").exists():
        raise AnalogError(
            f"{directory} holds an adapter, which no checkpoint has; put it into a directory of "
            "its own and load it with peft."
        )


def read_state(directory: Path, analog: AnalogConfig) -> dict[str, Tensor]:
    """The tensors of the state file, which must be the one that ``config.json`` describes.

    Raises:
        AnalogError: It is missing, another one, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / analog.state.file
    again = "copy the checkpoint again or export it again."
    if not path.is_file():
        raise AnalogError(f"{directory} lacks {analog.state.file}; {again}")
    try:
        if sha256_of(path) != analog.state.sha256:
            raise AnalogError(f"{path} is not the file that config.json describes; {again}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AnalogError(f"{path} cannot be read: {one_line(error)}; {again}") from None


def _restore_analog(
    model: nn.Module, analog: AnalogConfig, state: dict[str, Tensor], directory: Path
) -> None:
    """Convert the layers that have tiles, and give them their ranges; all must fit exactly."""
    convert_to_analog(model, analog.scheme, ignore=(), targets=tuple(analog.tiles))
    layers = dict(analog_layers(model))
    for name in sorted(analog.tiles.keys() | layers.keys()):
        has = layers[name].tiles if name in layers else "none"
        if analog.tiles.get(name) != has:
            raise AnalogError(
                f"{directory}/config.json does not describe the tiles of {shown(name)} as "
                f"the model has them ({has}); export the checkpoint again."
            )
    expected = {f"{name}.input_range": [len(layer.tiles)] for name, layer in layers.items()}
    prefix = analog.scheme.prefix
    if prefix is not None:
        expected |= prefix_shapes(model, len(prefix_tokens(model, prefix)))
    if any(name.endswith(".plain_range") for name in state):
        with_dac = (n for n, layer in layers.items() if layer.scheme.input_levels is not None)
        expected |= {f"{name}.plain_range": [1] for name in with_dac}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name) or state[name].dtype != torch.float32:
            raise AnalogError(
                f"{directory / STATE_FILE} does not fit the model: {shown(name)} should be "
                f"{_tensor(expected.get(name))}; export the checkpoint again."
            )
    for name, tensor in state.items():
        positive = not name.endswith(".plain_range") or bool((tensor > 0).all())
        if not (positive and bool(tensor.isfinite().all())):
            raise AnalogError(
                f"{directory / STATE_FILE}: {shown(name)} holds values that are not finite, or a "
                "range that is not positive; export the checkpoint again."
            )
    for name, layer in layers.items():
        layer.set_input_range(state[f"{name}.input_range"])
        if layer.scheme.range_init_in_training:  # they are found, and not to be found anew
            layer.range_batches.fill_(layer.scheme.range_init_batches)
        plain = state.get(f"{name}.plain_range")
        layer.plain_range = None if plain is None else plain.to(layer.input_range.device)
    read = Prefix.from_tensors(state)
    if prefix is not None and read is not None:
        tokens = prefix_tokens(model, prefix)
        if state["prefix.tokens"].tolist() != list(tokens):
            raise AnalogError(
                f"{directory / STATE_FILE} holds a prefix of other tokens than config.json names "
                f"({list(tokens)}); export the checkpoint again."
            )
        install_prefix(model, read)


def _tensor(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"float32 of shape {shape}"
