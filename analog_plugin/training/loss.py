"""Distillation loss: KL divergence to the teacher, in token chunks, from hidden states.

The logits of student and teacher exist for one chunk at a time; gradients with respect to the
hidden states and the head are made chunk by chunk in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


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
    teacher_hidden: Tensor,
    student_head: nn.Module | Head,
    teacher_head: nn.Module | Head,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    chunk: int = 512,
    count: Tensor | int | None = None,
) -> Tensor:
    """Mean distillation loss per scored token.

    ``(1 - c) · t² · KL(softmax(teacher/t) ‖ softmax(student/t)) + c · cross-entropy`` with c the
    share ``cross_entropy`` and t the ``temperature`` (Hinton et al., arXiv 1503.02531; the paper,
    arXiv 2505.09663, uses t = 1 and c = 0).

    Args:
        student_hidden, teacher_hidden: [B, S, H] hidden states before the language-model head.
        student_head, teacher_head: From hidden states [T, H] to logits [T, V].
        mask: [B, S] true where a position is scored; None: all are.
        labels: [B, S] the token that each position predicts, -100 for none; needed for a
            cross-entropy share only.
        temperature: t, greater than 0.
        cross_entropy: c, between 0 and 1.
        chunk: Positions whose logits exist at the same time.
        count: What the sum over positions is divided by, for a batch that comes in parts; None:
            the number of scored positions here.

    Returns:
        A scalar; 0 where no position is scored.
    """
    student = student_hidden.reshape(-1, student_hidden.shape[-1])
    teacher = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    targets = None if labels is None else labels.reshape(-1)
    if mask is not None:
        kept = mask.reshape(-1).bool()
        student, teacher = student[kept], teacher[kept]
        targets = None if targets is None else targets[kept]

    def chunk_loss(hidden: Tensor, reference: Tensor, target: Tensor | None) -> Tensor:
        logits = student_head(hidden)
        with torch.no_grad():
            goal = teacher_head(reference)
        kl = kl_divergence(logits / temperature, goal.to(logits.device) / temperature).sum()
        loss = (1.0 - cross_entropy) * temperature**2 * kl
        if cross_entropy > 0 and target is not None:
            loss = loss + cross_entropy * F.cross_entropy(
                logits.float(), target, ignore_index=-100, reduction="sum"
            )
        return loss

    if count is None:
        count = max(student.shape[0], 1)
    parameters = [p for p in getattr(student_head, "parameters", lambda: ())() if p.requires_grad]
    total = _ChunkedLoss.apply(student, teacher, targets, chunk_loss, chunk, *parameters)
    return total / count


class _ChunkedLoss(torch.autograd.Function):
    """Sum of ``chunk_loss`` over chunks, its gradients computed on the way."""

    @staticmethod
    def forward(ctx: Any, student, teacher, targets, chunk_loss, chunk, *parameters):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:])
        grad_hidden = torch.zeros_like(student) if wanted else None
        grads: list[Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, student.shape[0], chunk):
            piece = slice(start, start + chunk)
            hidden = student[piece].detach().requires_grad_(wanted)
            target = None if targets is None else targets[piece]
            with torch.set_grad_enabled(wanted):
                loss = chunk_loss(hidden, teacher[piece], target)
            total += loss.detach()
            if not wanted:
                continue
            # Autocast is for the forward: a gradient has the type of what it belongs to.
            with torch.autocast(student.device.type, enabled=False):
                made = torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)
            assert grad_hidden is not None
            grad_hidden[piece] = made[0]
            for i, grad in enumerate(made[1:]):
                if grad is not None:
                    kept = grads[i]
                    grads[i] = grad if kept is None else kept.add_(grad)
        ctx.grads = (grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer):  # type: ignore[no-untyped-def]
        scaled = [None if grad is None else grad * outer[0] for grad in ctx.grads]
        ctx.grads = ()
        return scaled[0], None, None, None, None, *scaled[1:]
