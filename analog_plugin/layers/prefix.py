"""Digital prefix: keys and values of the first tokens, computed once in full precision.

The first token of a sequence draws massive activations (attention sinks, arXiv 2309.17453), which
one static input range cannot hold beside all others. Its keys and values are constants, so a chip
can have them preloaded in its key-value cache at no cost (PrefixQuant, arXiv 2410.05265): every
sequence then begins after the prefix, and no analog layer ever sees it.

Where a sequence itself begins with the prefix tokens, these are taken for the prefix and not
repeated: nothing attends to them, and their final hidden states are the stored, exact ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.prefix_attention import (
    IMPLEMENTATION,
    PrefixRuntime,
    register_attention,
    repeated_columns,
)

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
    if not hasattr(config, "num_key_value_heads"):
        raise _refusal(model)
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
    runtime = PrefixRuntime(made)
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
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
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


@contextlib.contextmanager
def without_prefix(model: Any) -> Iterator[None]:
    """Within this context ``model`` has no prefix."""
    prefix = installed_prefix(model)
    remove_prefix(model)
    try:
        yield
    finally:
        if prefix is not None:
            install_prefix(model, prefix)


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
    return None if found is None else repeated_columns(found, input_ids.shape[1])


def _runtime(model: Any) -> PrefixRuntime | None:
    return getattr(getattr(model, "base_model", model), "digital_prefix", None)


def _attention_modules(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    }


def _compute(model: Any, tokens: tuple[int, ...]) -> Prefix:
    """Run the prefix at the two places it can have, and check on other tokens that it is exact."""
    modules = _attention_modules(model)
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    places = torch.arange(-len(tokens), 0, device=device), torch.arange(len(tokens), device=device)
    training = [module for module in model.modules() if module.training]
    refusal = _refusal(model)
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


def _refusal(model: Any) -> AnalogError:
    return AnalogError(
        f"{type(model).__name__} cannot have a digital prefix: it needs rotary position embeddings "
        "and transformers' attention interface; write prefix: null."
    )


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
