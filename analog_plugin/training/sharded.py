"""Training whose weights are sharded over processes by FSDP2."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers
from analog_plugin.processes import process_rank


def keep_ranges_whole(plugin: Any, model: nn.Module) -> None:
    """Have Accelerate shard all but the input ranges, which every process keeps whole, in fp32.

    Ranges are a few numbers a layer; they are found and updated in place, in forward too.

    Args:
        plugin: Accelerate's ``FullyShardedDataParallelPlugin``.
        model: The analog model, before it is sharded.

    Raises:
        AnalogError: It is the first version of FSDP.
    """
    check_plugin(plugin, saves=False)
    ignored = plugin.ignored_modules or []
    if isinstance(ignored, str):
        pattern = re.compile(ignored)
        ignored = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    ranges = nn.ParameterList(layer.input_range for _, layer in analog_layers(model))
    plugin.ignored_modules = [*ignored, ranges]
    # Every process has the weights, and ranges that are not sharded could not be sent this way.
    plugin.cpu_ram_efficient_loading = False


def check_plugin(plugin: Any, saves: bool) -> None:
    """Refuse ways of sharding that do not serve.

    Args:
        plugin: Accelerate's ``FullyShardedDataParallelPlugin``.
        saves: Whether training checkpoints will be written, and read again.

    Raises:
        AnalogError: It is the first version of FSDP, or checkpoints would be read by pickle.
    """
    if plugin.fsdp_version != 2:
        raise AnalogError(
            "FSDP of version 1 flattens weights, so that their columns are lost; write "
            "fsdp_version: 2."
        )
    if saves and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise AnalogError(
            "Sharded training checkpoints are read by pickle, which runs what a file says; write "
            "fsdp_state_dict_type: FULL_STATE_DICT, or in the recipe training: {save_strategy: "
            '"no"}.'
        )


class Unhooked(nn.Module):
    """A module without its hooks: FSDP's would take each piece of a loss for a whole forward.

    The weights must be gathered already, as those of a head are from the model's forward to its
    backward.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes."""
        return self.module.forward(x)


class Skeleton:
    """A model without its weights, from before they were sharded.

    Args:
        model: Not sharded yet.
    """

    def __init__(self, model: nn.Module) -> None:
        empty: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().new_empty(0), p.requires_grad)
            for p in model.parameters()
        }
        self.model = copy.deepcopy(model, empty)

    def filled(self, sharded: nn.Module) -> nn.Module:
        """The model with the weights of ``sharded``, in the first process; elsewhere ``sharded``.

        All processes must call it.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = dict(get_model_state_dict(sharded, options=options))
        if process_rank() > 0:
            return sharded
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.data = state[name].to(parameter.device, parameter.dtype)
            for name, buffer in self.model.named_buffers():
                if name in state:
                    buffer.copy_(state[name])
        return self.model.eval()
