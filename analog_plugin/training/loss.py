"""Distillation loss: KL divergence to the teacher, in token chunks, from hidden states.

The logits of student and teacher exist for one chunk at a time; gradients with respect to the
hidden states and the head are made chunk by chunk in the forward pass. Those of the logits are
analytic (:mod:`analog_plugin.training.divergence`), the head's are autograd's, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.ops.products import sums_in_fp32
from analog_plugin.training.divergence import Divergence, TopTokens

Head = Callable[[Tensor], Tensor]

#: Positions of a chunk. On a CPU fewer cost time in matrix products, more cost page faults; an
#: accelerator would read and write its head's weight more often for the sake of spare memory.
_CHUNK_CPU, _CHUNK = 256, 512


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each row of logits [T, V], in nats, fp32 [T].

    Where the teacher's probability is 0 (a logit of -inf, or underflow) the term is 0. A row that
    holds NaN or +inf on either side is NaN.
    """
    student = F.log_softmax(student_logits.float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    probability = teacher.exp()
    return torch.where(probability == 0, 0.0, probability * (teacher - student)).sum(-1)


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | TopTokens,
    student_head: nn.Module | Head,
    teacher_head: nn.Module | Head | None,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    top_k: int | None = None,
    chunk: int | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Mean distillation loss per scored token.

    ``(1 - c) · t² · KL(softmax(teacher/t) ‖ softmax(student/t)) + c · cross-entropy`` with c the
    share ``cross_entropy`` and t the ``temperature`` (Hinton et al., arXiv 1503.02531; the paper,
    arXiv 2505.09663, uses t = 1 and c = 0).

    With ``top_k`` the KL is that of k + 1 outcomes: the teacher's k most likely tokens, and "any
    other token", which holds the rest of the probability of teacher and student alike. It is never
    above the KL of the whole distributions (data processing inequality), and equals it where k is
    the vocabulary.

    Args:
        student_hidden: [B, S, H] hidden states before the language-model head.
        teacher_hidden: Likewise [B, S, H'], or what is kept of the teacher's distributions
            [B, S, k] at this temperature.
        student_head, teacher_head: From hidden states [T, H] to logits [T, V]; None for a teacher
            of which distributions were kept.
        mask: [B, S] true where a position is scored; None: all are.
        labels: [B, S] the token that each position predicts, -100 for none; needed for a
            cross-entropy share only.
        temperature: t, greater than 0.
        cross_entropy: c, between 0 and 1.
        top_k: k, at most V; None: the whole distribution, or all that is kept of it.
        chunk: Positions whose logits exist at the same time; None: 256 on a CPU, 512 elsewhere.
        count: What the sum over positions is divided by, for a batch that comes in parts; None:
            the number of scored positions here.

    Returns:
        A scalar; 0 where no position is scored.

    Raises:
        AnalogError: ``top_k`` is greater than the vocabulary, or not what is kept.
    """
    kept = slice(None) if mask is None else mask.reshape(-1).bool()
    student = student_hidden.reshape(-1, student_hidden.shape[-1])[kept]
    targets = None if labels is None else labels.reshape(-1)[kept]
    if isinstance(teacher_hidden, TopTokens):
        held = teacher_hidden.tokens.shape[-1]
        if top_k not in (None, held):
            raise AnalogError(
                f"top_k is {top_k}, but {held} tokens of the teacher are kept; write "
                f"top_k: {held}, or keep others."
            )
        teacher: Callable[[slice], Tensor | TopTokens] = teacher_hidden.flat()[kept].__getitem__
    else:
        assert teacher_head is not None
        hidden, apply = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[kept], teacher_head

        def teacher(piece: slice) -> Tensor:
            return apply(hidden[piece])

    if chunk is None:
        chunk = _CHUNK_CPU if student.device.type == "cpu" else _CHUNK
    if count is None:
        count = max(student.shape[0], 1)
    work = _Work(
        student_head, teacher, targets, Divergence(temperature, cross_entropy, top_k), chunk
    )
    parameters = [p for p in getattr(student_head, "parameters", lambda: ())() if p.requires_grad]
    return _ChunkedLoss.apply(student, work, *parameters) / count


@dataclass(frozen=True)
class _Work:
    """What the sum over chunks is made of, beside the tensors that get gradients."""

    head: nn.Module | Head
    teacher: Callable[[slice], Tensor | TopTokens]
    targets: Tensor | None
    divergence: Divergence
    chunk: int


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the divergence over chunks, its gradients computed on the way."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, work: _Work, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[2:])
        gradients = _Gradients(student, work.head, parameters) if wanted else None
        total = torch.zeros((), device=student.device)
        for start in range(0, student.shape[0], work.chunk):
            piece = slice(start, start + work.chunk)
            hidden = student[piece].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = work.head(hidden)
            goal = work.teacher(piece).to(logits.device) if work.divergence.compares else None
            target = None if work.targets is None else work.targets[piece]
            slope = None if gradients is None else gradients.of_logits(logits)
            total = total + work.divergence(logits.detach(), goal, target, slope)
            del goal
            if gradients is not None and slope is not None:
                gradients.add(piece, hidden, logits, slope)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of this distillation loss were given out already: a second backward "
                "needs a second forward."
            )
        made = ctx.gradients.scaled(outer[0])
        ctx.gradients = None
        return made[0], None, *made[1:]


class _Gradients:
    """Gradients of the hidden states and the head's parameters, summed chunk by chunk."""

    def __init__(
        self, student: Tensor, head: nn.Module | Head, parameters: Sequence[Tensor]
    ) -> None:
        self.hidden = torch.zeros_like(student)
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self.plain = head if _is_plain(head, student, parameters) else None
        self.slope: Tensor | None = None

    def of_logits(self, logits: Tensor) -> Tensor:
        """Room for the gradient of a chunk's logits, the same for every chunk."""
        if self.slope is None:
            self.slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return self.slope[: logits.shape[0]]

    def add(self, piece: slice, hidden: Tensor, logits: Tensor, slope: Tensor) -> None:
        """Go from the gradient of a chunk's logits to those of what made them."""
        asked = () if self.plain is not None else self.parameters
        # Autocast is for the forward: a gradient has the type of what it belongs to.
        with torch.autocast(hidden.device.type, enabled=False):
            made = torch.autograd.grad(logits, [hidden, *asked], slope, allow_unused=True)
            if self.plain is not None:
                self._add_plain(hidden.detach(), slope)
        self.hidden[piece] = made[0]
        for i, grad in enumerate(made[1:]):
            if grad is not None:
                self._sum(i).add_(grad)

    def _add_plain(self, hidden: Tensor, slope: Tensor) -> None:
        """Without a tensor of the weight's size for each chunk; under autocast of its type."""
        for i, parameter in enumerate(self.parameters):
            kept, inputs = self._sum(i), hidden.to(slope.dtype)
            if parameter.dim() != 2:
                kept.add_(slope.sum(0))
            elif kept.dtype == slope.dtype:
                kept.addmm_(slope.T, inputs)
            elif kept.dtype == torch.float32 and sums_in_fp32(kept.device):
                torch.addmm(kept, slope.T, inputs, out_dtype=kept.dtype, out=kept)
            else:
                kept.add_(slope.T @ inputs)

    def _sum(self, i: int) -> Tensor:
        """The sum for parameter ``i``, as yet 0 or not; None stays what never had a gradient."""
        kept = self.sums[i]
        if kept is None:
            kept = self.sums[i] = torch.zeros_like(self.parameters[i])
        return kept

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """All of them times ``factor``, in place: once."""
        return [None if kept is None else kept.mul_(factor) for kept in (self.hidden, *self.sums)]


def _is_plain(head: Any, student: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether ``head`` is a matrix product and nothing else, of one type or under autocast."""
    hooked = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not any(getattr(head, name) for name in hooked)
        and all(p is head.weight or p is head.bias for p in parameters)
        and all(type(p) is nn.Parameter for p in parameters)
        and (
            torch.is_autocast_enabled(student.device.type)
            or all(p.dtype == student.dtype for p in parameters)
        )
    )
