"""Digital prefix: keys and values of the first tokens, computed once in full precision.

The first token of a sequence draws massive activations (attention sinks, arXiv 2309.17453), which
one static input range cannot hold beside all others. Its keys and values are constants, so a chip
can have them preloaded in its key-value cache at no cost (PrefixQuant, arXiv 2410.05265): every
sequence then begins after the prefix, and no analog layer ever sees it.

Where a sequence itself begins with the prefix tokens, these are taken for the prefix and not
repeated: nothing attends to them, and their final hidden states are the stored, exact ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analog_plugin.errors import AnalogError

_IMPLEMENTATION = "sdpa_with_prefix"
_TOKENS, _HIDDEN = "prefix.tokens", "prefix.hidden"
_KEY, _VALUE = ".prefix_key", ".prefix_value"


@dataclass(frozen=True)
class Prefix:
    """What is kept of P prefix tokens.

    Args:
        tokens: Their ids.
        keys: By attention module, [2, heads, P, head size]: as seen by a sequence that begins
            after the prefix, and by one that begins with it.
        values: By attention module, [heads, P, head size].
        hidden: [P, hidden size] final hidden states.
    """

    tokens: tuple[int, ...]
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    hidden: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors, as a checkpoint's state file holds them."""
        tensors = {_TOKENS: torch.tensor(self.tokens, dtype=torch.float32), _HIDDEN: self.hidden}
        tensors |= {name + _KEY: key for name, key in self.keys.items()}
        return tensors | {name + _VALUE: value for name, value in self.values.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Prefix | None:
        """Read what :meth:`to_tensors` wrote; None where there is no prefix."""
        if _TOKENS not in tensors:
            return None
        parts = {
            end: {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}
            for end in (_KEY, _VALUE)
        }
        tokens = tuple(int(token) for token in tensors[_TOKENS].reshape(-1))
        return cls(tokens, parts[_KEY], parts[_VALUE], tensors[_HIDDEN])


def prefix_shapes(model: Any, length: int) -> dict[str, list[int]]:
    """Shapes of the tensors of a prefix of ``length`` tokens for ``model``, by name."""
    config = model.config.get_text_config()
    shapes = {_TOKENS: [length], _HIDDEN: [length, config.hidden_size]}
    for name, module in _attention_modules(model).items():
        size = [config.num_key_value_heads, length, module.head_dim]
        shapes |= {name + _KEY: [2, *size], name + _VALUE: size}
    return shapes


def prefix_tokens(model: Any, prefix: int | Sequence[int]) -> tuple[int, ...]:
    """Token ids that a scheme's ``prefix`` names: 1 is the beginning-of-sequence token.

    Raises:
        AnalogError: The model has no such token, or an id is beyond its vocabulary.
    """
    if isinstance(prefix, int):
        start = getattr(model.config, "bos_token_id", None)
        if start is None:
            raise AnalogError(
                f"{type(model).__name__} names no beginning-of-sequence token for prefix: 1; write "
                "its id, prefix: [N], or prefix: null."
            )
        prefix = [start]
    size = model.get_input_embeddings().weight.shape[0]
    if not all(0 <= token < size for token in prefix):
        raise AnalogError(
            f"prefix is {list(prefix)}, but the model's token ids run from 0 to {size - 1}."
        )
    return tuple(prefix)


@torch.no_grad()
def install_prefix(model: Any, prefix: Prefix | Sequence[int]) -> Prefix:
    """Let every sequence of ``model`` begin after a prefix.

    Position ids, masks and the length of the cache stay as the caller knows them, so ``generate``,
    left padding and gradient checkpointing work unchanged: the prefix lies at the positions before
    0, which is exact for rotary position embeddings.

    Args:
        model: A causal language model; with token ids it must be the digital original.
        prefix: Token ids, whose keys and values are computed here, or the prefix of another model.

    Returns:
        The prefix, for :func:`install_prefix` on another model.

    Raises:
        AnalogError: The model's attention does not go through transformers' interface, or its
            positions are not relative, so that a prefix would not be exact.
    """
    remove_prefix(model)
    made = prefix if isinstance(prefix, Prefix) else _compute(model, tuple(prefix))
    runtime = _Runtime(made)
    modules = _attention_modules(model)
    if modules.keys() != made.keys.keys():
        raise AnalogError(
            f"The prefix is for other attention layers than {type(model).__name__} has; compute it "
            "again from the original model."
        )
    for name, module in modules.items():
        like = {"device": next(module.parameters()).device, "dtype": model.dtype}
        module.register_buffer("prefix_key", made.keys[name].to(**like), persistent=False)
        module.register_buffer("prefix_value", made.values[name].to(**like), persistent=False)
        module.digital_prefix = runtime
    base = model.base_model
    base.digital_prefix = runtime
    runtime.handles = [
        base.register_forward_pre_hook(runtime.before, with_kwargs=True),
        base.register_forward_hook(runtime.after, with_kwargs=True),
    ]
    runtime.implementation = model.config._attn_implementation
    _register()
    model.set_attn_implementation(_IMPLEMENTATION)
    return made


def remove_prefix(model: Any) -> None:
    """Undo :func:`install_prefix`; nothing happens where there is no prefix."""
    runtime = _runtime(model)
    if runtime is None:
        return
    for handle in runtime.handles:
        handle.remove()
    for module in _attention_modules(model).values():
        del module.prefix_key, module.prefix_value, module.digital_prefix
    del model.base_model.digital_prefix
    model.set_attn_implementation(runtime.implementation)


def installed_prefix(model: Any) -> Prefix | None:
    """The prefix of ``model``, or None."""
    runtime = _runtime(model)
    return None if runtime is None else runtime.prefix


def repeated_positions(model: Any, input_ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """[B, S] bool: positions of ``input_ids`` [B, S] that are the prefix itself; None: none are."""
    runtime = _runtime(model)
    if runtime is None:
        return None
    found = runtime.find(input_ids, mask)
    return None if found is None else _columns(found, input_ids.shape[1])


@dataclass
class _Repeated:
    """Rows that begin with the prefix: flags [B], and the column where each begins [B]."""

    flags: Tensor
    starts: Tensor
    length: int


class _Runtime:
    """Shared by a model's attention modules: the prefix, and what the running forward repeats."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.repeated: _Repeated | None = None
        self.prefill = True
        self.handles: list[Any] = []
        self.implementation = "sdpa"

    def find(self, input_ids: Tensor, mask: Tensor | None) -> _Repeated | None:
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
        return _Repeated(flags, starts, length) if bool(flags.any()) else None

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
        hidden = output.last_hidden_state
        index = torch.arange(hidden.shape[1], device=hidden.device) - self.repeated.starts[:, None]
        exact = self.prefix.hidden.to(hidden)[index.clamp(0, self.repeated.length - 1)]
        columns = _columns(self.repeated, hidden.shape[1])
        output.last_hidden_state = torch.where(columns[..., None], exact, hidden)
        return output


def _columns(repeated: _Repeated, length: int) -> Tensor:
    """[B, length] bool: the columns that are the prefix."""
    index = torch.arange(length, device=repeated.starts.device) - repeated.starts[:, None]
    return (index >= 0) & (index < repeated.length) & repeated.flags[:, None]


def _runtime(model: Any) -> _Runtime | None:
    return getattr(getattr(model, "base_model", model), "digital_prefix", None)


def _attention_modules(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    }


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


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
        hidden = _columns(repeated, key.shape[2])[:, None, None]
        # The columns of the repeated tokens, which none attends to.
        low = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        mask = mask.masked_fill(hidden, low)
    visible = 0.0 if mask.is_floating_point() else True
    mask = F.pad(mask, (before.shape[2], 0), value=visible)
    key = torch.cat([before, key], dim=2)
    value = torch.cat([module.prefix_value.to(value).expand(rows, -1, -1, -1), value], dim=2)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _compute(model: Any, tokens: tuple[int, ...]) -> Prefix:
    """Run the prefix at the two places it can have, and check on other tokens that it is exact."""
    modules = _attention_modules(model)
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    places = torch.arange(-len(tokens), 0, device=device), torch.arange(len(tokens), device=device)
    training = [module for module in model.modules() if module.training]
    refusal = AnalogError(
        f"{type(model).__name__} cannot have a digital prefix: it needs rotary position embeddings "
        "and transformers' attention interface; write prefix: null."
    )
    if not modules or not model._supports_sdpa or not model._can_set_attn_implementation():
        raise refusal
    for module in training:
        module.training = False
    try:
        runs = [
            model.base_model(input_ids=ids, position_ids=place[None], use_cache=True)
            for place in places
        ]
        keys, values = {}, {}
        for name, module in modules.items():
            layers = [run.past_key_values.layers[module.layer_idx] for run in runs]
            keys[name] = torch.stack([layer.keys[0].float() for layer in layers])
            values[name] = layers[0].values[0].float()
        made = Prefix(tokens, keys, values, runs[1].last_hidden_state[0].float())
        if not _exact(model, made):
            raise refusal
    except (IndexError, RuntimeError) as error:  # a table of positions has no negative ones
        raise refusal from error
    finally:
        for module in training:
            module.training = True
    return made


def _exact(model: Any, prefix: Prefix) -> bool:
    """Whether tokens after the prefix get the hidden states that they have behind its tokens."""
    device, size = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    probe = (torch.arange(1, 9, device=device) * 7919 % size)[None]
    start = torch.tensor([prefix.tokens], device=device)
    wanted = model.base_model(input_ids=torch.cat([start, probe], 1)).last_hidden_state
    install_prefix(model, prefix)
    try:
        found = model.base_model(input_ids=probe).last_hidden_state
    finally:
        remove_prefix(model)
    wanted = wanted[:, len(prefix.tokens) :].float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((found.float() - wanted).norm() <= tolerance * wanted.norm())
