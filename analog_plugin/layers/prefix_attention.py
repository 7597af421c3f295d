"""What a digital prefix does during a forward: attention to it, and tokens that repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from analog_plugin.layers.prefix import Prefix

#: The name under which transformers knows the attention below.
IMPLEMENTATION = "sdpa_with_prefix"


@dataclass
class Repeated:
    """Rows that begin with the prefix: flags [B], and the column where each begins [B]."""

    flags: Tensor
    starts: Tensor
    length: int


class PrefixRuntime:
    """Shared by a model's attention modules: the prefix, and what the running forward repeats."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.repeated: Repeated | None = None
        self.prefill = True
        self.handles: list[Any] = []
        self.implementation = "sdpa"

    def find(self, input_ids: Tensor, mask: Tensor | None) -> Repeated | None:
        """Rows of ``input_ids`` [B, S] whose first tokens are the prefix."""
        length = len(self.prefix.tokens)
        if input_ids.shape[1] < length:
            return None
        starts = torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        if mask is not None and mask.dim() == 2:
            starts = mask.to(torch.int8).argmax(1)
        index = starts[:, None] + torch.arange(length, device=input_ids.device)
        first = input_ids.gather(1, index.clamp_max(input_ids.shape[1] - 1))
        wanted = torch.tensor(self.prefix.tokens, device=input_ids.device)
        flags = (first == wanted).all(1) & (index[:, -1] < input_ids.shape[1])
        return Repeated(flags, starts, length) if bool(flags.any()) else None

    def before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note which rows repeat the prefix; left padding gets the position ids it needs."""
        cache = kwargs.get("past_key_values")
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        self.prefill = cache is None or cache.get_seq_length() == 0
        if self.prefill:
            self.repeated = None if ids is None else self.find(ids, mask)
        else:
            self.repeated = getattr(cache, "repeated_prefix", None)
        if kwargs.get("position_ids") is None and mask is not None and mask.dim() == 2:
            length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            kwargs["position_ids"] = positions[:, -length:]
        return args, kwargs

    def after(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the note with the cache, and put the exact hidden states of repeated tokens in."""
        cache = output.past_key_values if hasattr(output, "past_key_values") else None
        if cache is not None:
            cache.repeated_prefix = self.repeated
        if self.repeated is None or not self.prefill:
            return output
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        index = torch.arange(hidden.shape[1], device=hidden.device) - self.repeated.starts[:, None]
        exact = self.prefix.hidden.to(hidden)[index.clamp(0, self.repeated.length - 1)]
        columns = repeated_columns(self.repeated, hidden.shape[1])
        hidden = torch.where(columns[..., None], exact, hidden)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output


def repeated_columns(repeated: Repeated, length: int) -> Tensor:
    """[B, length] bool: the columns that are the prefix."""
    index = torch.arange(length, device=repeated.starts.device) - repeated.starts[:, None]
    return (index >= 0) & (index < repeated.length) & repeated.flags[:, None]


def register_attention() -> None:
    """Let transformers know :data:`IMPLEMENTATION`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of transformers with the prefix before the keys and values."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, repeated = key.shape[0], module.digital_prefix.repeated
    mask = attention_mask
    if mask is None:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        mask = ones.tril(key.shape[2] - query.shape[2])[None, None]
    before = module.prefix_key[0].to(key).expand(rows, -1, -1, -1)
    if repeated is not None:
        at_start = module.prefix_key[1].to(key)
        before = torch.where(repeated.flags[:, None, None, None], at_start, before)
        hidden = repeated_columns(repeated, key.shape[2])[:, None, None]
        # The columns of the repeated tokens, which none attends to.
        low = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        mask = mask.masked_fill(hidden, low)
    visible = 0.0 if mask.is_floating_point() else True
    mask = F.pad(mask, (before.shape[2], 0), value=visible)
    key = torch.cat([before, key], dim=2)
    value = torch.cat([module.prefix_value.to(value).expand(rows, -1, -1, -1), value], dim=2)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
