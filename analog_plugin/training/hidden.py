"""Hidden states before the language-model head, and that head, of any causal language model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers import digital_layers
from analog_plugin.modes import evaluation_mode


@dataclass
class HiddenStates:
    """Reads hidden states from a causal LM without letting it make all logits.

    Args:
        model: The model (not wrapped by DDP or the like).
        split: Whether logits are ``head(hidden)``; where a model does more behind its head
            (softcapping, scaling), the logits themselves stand in for the hidden states.
        kind: Class of the model; None: ``model``'s.
    """

    model: Any
    split: bool
    kind: type | None = None

    @classmethod
    def of(cls, model: Any) -> HiddenStates:
        """Find out, by a forward of two tokens, whether the head can be applied by itself.

        Raises:
            AnalogError: The model has no language-model head.
        """
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise AnalogError(
                f"{type(model).__name__} has no language-model head; give a causal language model."
            )
        takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        return cls(model, split=takes_positions and _head_comes_last(model))

    def alike(self, model: Any) -> HiddenStates:
        """Read another model in the same way; one of another class always by its logits."""
        return HiddenStates(model, split=self.split and type(model) is self._kind)

    def head_alone(self) -> HiddenStates:
        """The same without the rest of the model: :attr:`head` and :meth:`alike`."""
        return HiddenStates(_Head(self.head), self.split, self._kind)

    @property
    def _kind(self) -> type:
        return type(self.model) if self.kind is None else self.kind

    @property
    def head(self) -> nn.Module:
        """From hidden states to logits."""
        return self.model.get_output_embeddings() if self.split else nn.Identity()

    def __call__(self, wrapped: Any = None, **inputs: Any) -> Tensor:
        """Hidden states [B, S, H] (or logits, see ``split``) of a forward of ``wrapped``."""
        module = self.model if wrapped is None else wrapped
        inputs.setdefault("use_cache", False)
        if not self.split:
            return module(**inputs).logits
        # The model's own use of its head is thrown away: an analog one must not take its range
        # or its clip counts from it.
        with digital_layers(self.head):
            hidden, _ = _capture(self.model, module, logits_to_keep=1, **inputs)
        assert hidden is not None
        return hidden


class _Head(nn.Module):
    """A language-model head that stands for its model."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@torch.no_grad()
def _head_comes_last(model: Any) -> bool:
    """Whether the head's inputs are the base model's outputs, and its outputs the logits.

    The head's outputs are replaced by values so large that nothing behind it (softcapping,
    scaling) could leave them as they are; real ones may be too small to tell.
    """
    fed: list[Tensor] = []
    given: list[Tensor] = []

    def replace(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fed.append(args[0])
        given.append(torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output))
        return given[-1]

    token = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    handle = model.get_output_embeddings().register_forward_hook(replace)
    try:
        with evaluation_mode(model):
            hidden, output = _capture(
                model, model, input_ids=token, logits_to_keep=1, use_cache=False
            )
    finally:
        handle.remove()
    return (
        hidden is not None
        and len(fed) == 1
        and torch.equal(fed[0], hidden[:, -1:])
        and torch.equal(output.logits.float(), given[0].float())
    )


def _capture(model: Any, module: Any, **inputs: Any) -> tuple[Tensor | None, Any]:
    """What ``model``'s base model gave during a forward of ``module``, and what that gave."""
    seen: list[Tensor | None] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else None
        seen.append(getattr(output, "last_hidden_state", first))

    handle = model.base_model.register_forward_hook(keep)
    try:
        output = module(**inputs)
    finally:
        handle.remove()
    return (seen[0] if seen else None), output
