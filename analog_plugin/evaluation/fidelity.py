"""How close a model is to its reference: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analog_plugin.layers.prefix import repeated_positions
from analog_plugin.modes import evaluation_mode
from analog_plugin.progress import progress_bar
from analog_plugin.training.hidden import HiddenStates
from analog_plugin.training.loss import kl_divergence

#: Logits that :class:`Reference` may keep.
_KEPT_BYTES = 2**32
METRICS = ("perplexity", "kl", "agreement")


@dataclass
class Reference:
    """The digital original's hidden states on the evaluation tokens, computed once.

    Hidden states and the head take a small part of the memory that logits would. Where there are
    few tokens and many models to compare, ``kept`` holds the logits all the same.

    Args:
        hidden: [N, S, H].
        states: Reads the original.
        kept: [N, S, V], or None.
    """

    hidden: Tensor
    states: HiddenStates
    kept: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, tokens: Tensor, batch_size: int = 4, *, keep_logits: bool = False
    ) -> Reference:
        """Run ``model`` over ``tokens`` [N, S].

        Args:
            keep_logits: Keep them, if they take at most 4 GiB.
        """
        states = HiddenStates.of(model)
        device = next(model.parameters()).device
        batches = progress_bar(tokens.split(batch_size), desc="Running the original")
        with evaluation_mode(model):
            hidden = [states(input_ids=batch.to(device)).cpu() for batch in batches]
            found = cls(torch.cat(hidden), states)
            one = found.logits(slice(0, 1), slice(0, 1))
            size = found.hidden.shape[:2].numel() * one.numel() * one.element_size()
            if keep_logits and size <= _KEPT_BYTES:
                found.kept = found.logits(slice(None), slice(None))
        return found

    def logits(self, rows: slice, position: slice) -> Tensor:
        """Logits [rows, positions, V] of the original."""
        if self.kept is not None:
            return self.kept[rows, position]
        device = next(self.states.model.parameters(), self.hidden).device
        return self.states.head(self.hidden[rows, position].to(device))


@torch.no_grad()
def fidelity(
    model: nn.Module, tokens: Tensor, reference: Reference | None, batch_size: int = 4
) -> Mapping[str, float]:
    """Metrics of ``model`` on ``tokens`` [N, S], over every next-token prediction.

    What a digital prefix predicts, where the tokens begin with it, is left out.

    Returns:
        ``perplexity`` (exp of the mean negative log-likelihood); with a reference also ``kl``
        (mean KL(reference ‖ model), nats per token) and ``agreement`` (share of positions at which
        the most likely token is the reference's).
    """
    states = HiddenStates.of(model) if reference is None else reference.states.alike(model)
    device = next(model.parameters()).device
    nll = kl = agree = 0.0
    count = 0
    for start in range(0, tokens.shape[0], batch_size):
        batch = tokens[start : start + batch_size].to(device)
        hidden = states(input_ids=batch)
        repeated = repeated_positions(model, batch)
        for row in range(batch.shape[0]):  # one row's logits at a time
            first = 0 if repeated is None else int(repeated[row].sum())
            logits = states.head(hidden[row, first:-1]).float()
            nll += float(F.cross_entropy(logits, batch[row, first + 1 :], reduction="sum"))
            count += logits.shape[0]
            if reference is not None:
                goal = reference.logits(slice(start + row, start + row + 1), slice(first, -1))[0]
                kl += float(kl_divergence(logits, goal.to(logits.device)).double().sum())
                agree += int((logits.argmax(-1) == goal.argmax(-1).to(logits.device)).sum())
    result = {"perplexity": math.exp(min(nll / count, 700.0)) if count else math.nan}
    if reference is not None and count:
        result |= {"kl": kl / count, "agreement": agree / count}
    return result
