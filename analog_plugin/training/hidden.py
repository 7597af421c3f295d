"""Hidden states before the language-model head, and that head, of any causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError


@dataclass
class HiddenStates:
    """Reads hidden states from a causal LM without letting it make all logits.

    Args:
        model: The model (not wrapped by DDP or the like).
        split: Whether logits are ``head(hidden)``; where a model does more behind its head
            (softcapping, scaling), the logits themselves stand in for the hidden states.
    """

    model: Any
    split: bool

    @classmethod
    def of(cls, model: Any) -> HiddenStates:
        """Find out, by a forward of one token, whether the head can be applied by itself.

        Raises:
            AnalogError: The model has no language-model head.
        """
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise AnalogError(
                f"{type(model).__name__} has no language-model head; give a causal language model."
            )
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            return cls(model, split=False)
        self = cls(model, split=True)
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        with torch.no_grad():
            token = torch.ones(1, 2, dtype=torch.long, device=device)
            hidden, output = self._capture(model, input_ids=token)
            same = hidden is not None and torch.equal(
                self.head(hidden[:, -1:]).float(), output.logits[:, -1:].float()
            )
        model.train(training)
        return cls(model, split=same)

    @property
    def head(self) -> nn.Module | Callable[[Tensor], Tensor]:
        """From hidden states to logits."""
        if not self.split:
            return nn.Identity()
        return self.model.get_output_embeddings()

    def __call__(self, wrapped: Any = None, **inputs: Any) -> Tensor:
        """Hidden states [B, S, H] (or logits, see ``split``) of a forward of ``wrapped``."""
        module = self.model if wrapped is None else wrapped
        inputs.setdefault("use_cache", False)
        if not self.split:
            return module(**inputs).logits
        hidden, _ = self._capture(module, logits_to_keep=1, **inputs)
        assert hidden is not None
        return hidden

    def _capture(self, module: Any, **inputs: Any) -> tuple[Tensor | None, Any]:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        handle = self.model.base_model.register_forward_hook(keep)
        try:
            output = module(**inputs)
        finally:
            handle.remove()
        return (seen[0] if seen else None), output
