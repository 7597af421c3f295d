"""``to_lightning`` and the profile ``lightning``: our analog models, to train on elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analog_integrations.lightning.config import ENUM_FIELDS, LightningConfig
from analog_integrations.lightning.importing import CONFIG_FILE
from analog_integrations.lightning.schemes import config_of, not_carried
from analog_integrations.lightning.weights import BIN_FILE, COUNT, RANGE
from analog_plugin.checkpoint.load import load_checkpoint
from analog_plugin.checkpoint.profiles import ANALOG_ONLY
from analog_plugin.checkpoint.save import save_checkpoint
from analog_plugin.errors import AnalogError, require
from analog_plugin.layers import AnalogLinear, analog_layers, model_scheme
from analog_plugin.ops.weights import column_maximum, fake_quantize_columns
from analog_plugin.paths import refuse_around
from analog_plugin.pretrained import load_tokenizer


@dataclass
class LightningPlan:
    """What is written beside the weights.

    Args:
        config: Of all analog layers.
        digital: Names of the linear layers that stay digital.
        notes: Sentences for the model card.
    """

    config: LightningConfig
    digital: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def usage(self) -> list[str]:
        """How the directory is loaded."""
        return [*_USAGE.format(digital=list(self.digital)).splitlines(), ""]


_USAGE = """\
## Use

```python
import pickle

import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("this-directory"))
with open("this-directory/rpu_config", "rb") as file:
    rpu_config = pickle.load(file)
model = convert_to_analog(model, rpu_config, exclude_modules={digital})
model.load_state_dict(torch.load("this-directory/pytorch_model.bin", weights_only=True))
```

Back to analog-plugin: `torch.save(dict(model.state_dict()), "pytorch_model.bin")`, then
`optimum-cli analog import`.
"""


def to_lightning(
    model: nn.Module | str | Path,
    output: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write an analog model in the format of the published ones, for aihwkit-lightning.

    Args:
        model: A model with analog layers, or a directory of the profile ``analog-fp``.
        output: The target: ``config.json``, ``pytorch_model.bin``, ``rpu_config``; it appears when
            everything is written.
        tokenizer: Saved beside it; None: that of the directory.
        overwrite: Replace a directory that is not empty.

    Raises:
        AnalogError: The model has what aihwkit-lightning cannot express, or that is not installed.
    """
    if isinstance(model, (str, Path)):
        refuse_around(output, model)
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        loaded = load_checkpoint(model)
    else:
        loaded = model
    return save_checkpoint(
        loaded, output, profile="lightning", tokenizer=tokenizer, overwrite=overwrite
    )


def check_lightning(model: nn.Module) -> None:
    """Refuse what aihwkit-lightning cannot express.

    Raises:
        AnalogError: It cannot, or it is not installed.
    """
    require("aihwkit_lightning.simulator.configs", "lightning")
    scheme = model_scheme(model)
    faults = {
        "a digital prefix": scheme.prefix is not None,
        "layers with fields of their own (overrides)": any(
            change != "digital" for _, change in scheme.overrides
        ),
        "no ADC bound yet": scheme.output_bits is not None and scheme.out_bound is None,
    }
    for name, layer in analog_layers(model):
        faults[f"a transposed layer ({name})"] = not isinstance(layer, AnalogLinear)
        if scheme.weight_bits is not None:
            weight = layer.tile_weight.detach()
            peak = column_maximum(weight, layer.tiles)
            rounded = fake_quantize_columns(weight, peak, layer.tiles, scheme.weight_bits)
            faults[f"weights that are rounded in training alone ({name})"] = not torch.allclose(
                weight, rounded, rtol=0, atol=1e-5 * float(peak.max())
            )
    for fault, found in faults.items():
        if found:
            raise AnalogError(
                f"The model has {fault}, which aihwkit-lightning cannot express; export it with "
                "the profile analog-fp, or train it with a scheme without."
            )


def plan_lightning(
    model: nn.Module, *, batches: Iterable[Mapping[str, Tensor]] | None = None
) -> LightningPlan:
    """The configuration, and what it does not carry; ``batches`` are not needed."""
    scheme = model_scheme(model)
    lost = not_carried(scheme)
    notes = []
    if lost:
        notes.append(
            "aihwkit-lightning has no counterpart of these fields of the scheme, of which none "
            f"changes the forward in evaluation: {', '.join(lost)}."
        )
    digital = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, AnalogLinear)
    )
    return LightningPlan(config_of(scheme), tuple(digital), notes)


def write_lightning(model: Any, directory: Path, plan: LightningPlan) -> None:
    """Write the configuration, the plain state dictionary and the pickled ``rpu_config``."""
    layers = dict(analog_layers(model))
    model.config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(
            directory / "generation_config.json", keys_to_pop=["compile_config"]
        )
    ours = {f"{name}.{part}" for name in layers for part in ANALOG_ONLY}
    state = {name: t.detach().cpu() for name, t in model.state_dict().items() if name not in ours}
    if plan.config.has_ranges:
        for name, layer in layers.items():
            state |= _ranges(name, layer, plan.config)
    torch.save(state, directory / BIN_FILE)
    with (directory / CONFIG_FILE).open("wb") as file:
        pickle.dump(_native(plan.config), file, protocol=4)


def _ranges(name: str, layer: Any, config: LightningConfig) -> dict[str, Tensor]:
    """An initialisation that is finished; extremes as aihwkit-lightning begins with them."""
    value = layer.input_range.detach().cpu().clone()
    return {
        f"{name}.{RANGE}": value,
        f"{name}.{COUNT}": torch.full_like(value, config.init_from_data),
        f"{name}.x_min": torch.full_like(value, -1e-5),
        f"{name}.x_max": torch.full_like(value, 1e-5),
    }


def _native(config: LightningConfig) -> Any:
    """The same in aihwkit-lightning's own classes."""
    configs = require("aihwkit_lightning.simulator.configs", "lightning")
    made = configs.TorchInferenceRPUConfig()
    values = asdict(config)
    for name in ("clip_type", "noise_type", "quantization_type"):
        values[name] = getattr(configs, ENUM_FIELDS[name])(values[name])
    made.clip.type, made.clip.sigma = values.pop("clip_type"), values.pop("clip_sigma")
    del values["modifier_type"]  # of version 1; the default says nothing
    made.modifier.res = values.pop("weight_res")
    parts = made.forward, made.modifier, made.mapping, made.pre_post.input_range
    for name, value in values.items():
        (holder,) = (part for part in parts if hasattr(part, name))
        setattr(holder, name, value)
    return made
