"""KL divergence of rows of logits, with its analytic gradient and without autograd.

With q = softmax(s/t) the student's and p the teacher's probabilities at temperature t, the
gradient of ``t² · KL(p ‖ q)`` with respect to the student's logits s is ``t · (q - p)`` (Hinton et
al., arXiv 1503.02531). So nothing is kept for a backward pass, and a few rows at a time suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from analog_plugin.errors import AnalogError
from analog_plugin.ops.device import has_kernels

_IGNORED = -100
# What the kernel takes.
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Logits worked on together. On a CPU all passes over them then stay in its cache, and temporaries
#: of this size come from memory that is mapped already; an accelerator wants long kernels instead.
_BLOCK_CPU, _BLOCK = 2**18, 2**25


@dataclass(frozen=True)
class TopTokens:
    """What is kept of a teacher: its k most likely tokens, and "any other token" as one outcome.

    Args:
        tokens: [..., k] token ids.
        log_probabilities: [..., k] their log-probabilities at the temperature, in nats.
        log_rest: [...] log-probability of all other tokens together; -inf where there are none.
    """

    tokens: Tensor
    log_probabilities: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopTokens:
        """The k most likely tokens of logits [N, V], in blocks of rows.

        Raises:
            AnalogError: k is greater than the vocabulary.
        """
        if k > logits.shape[-1]:
            raise AnalogError(
                f"top_k is {k}, but the teacher's vocabulary has {logits.shape[-1]} tokens; write "
                f"at most top_k: {logits.shape[-1]}, or top_k: null for the whole distribution."
            )
        parts = [cls._block(part, k, temperature) for part in logits.split(_rows(logits))]
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @staticmethod
    def _block(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        log_p = _log_softmax(logits, temperature)
        top, tokens = log_p.topk(k, dim=-1)
        return tokens, top, _log_rest(log_p, tokens)

    def flat(self) -> TopTokens:
        """The same with one row for each position: [N, k] and [N]."""
        k = self.tokens.shape[-1]
        return TopTokens(
            self.tokens.reshape(-1, k), self.log_probabilities.reshape(-1, k),
            self.log_rest.reshape(-1),
        )  # fmt: skip

    def __getitem__(self, rows: slice | Tensor) -> TopTokens:
        return TopTokens(self.tokens[rows], self.log_probabilities[rows], self.log_rest[rows])

    def to(self, device: torch.device) -> TopTokens:
        """The same on another device."""
        return TopTokens(
            self.tokens.to(device), self.log_probabilities.to(device), self.log_rest.to(device)
        )


@dataclass(frozen=True)
class Divergence:
    """``(1 - c) · t² · KL + c · cross-entropy`` of rows of logits, and its gradient.

    Args:
        temperature: t.
        cross_entropy: c.
        top_k: Compare this many of the teacher's tokens, and the others as one outcome.
    """

    temperature: float = 1.0
    cross_entropy: float = 0.0
    top_k: int | None = None

    @property
    def compares(self) -> bool:
        """Whether the teacher counts."""
        return self.cross_entropy < 1

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | TopTokens | None,
        targets: Tensor | None,
        gradient: Tensor | None,
    ) -> Tensor:
        """The sum over rows; NaN or +inf on either side makes it NaN.

        Args:
            student: Logits [N, V]; only read.
            teacher: Logits [N, V], or what is kept of them; None where it does not count.
            targets: [N] token ids for the cross-entropy, -100 for none; None: without it.
            gradient: [N, V], written: the gradient with respect to ``student``.

        Returns:
            A scalar in fp32, or in float64 for such logits.
        """
        if isinstance(teacher, Tensor) and self._fuses(student, teacher, gradient):
            return self._fused(student, teacher, gradient)
        total = torch.zeros((), dtype=_precision(student), device=student.device)
        size = _rows(student)
        for start in range(0, student.shape[0], size):
            rows = slice(start, start + size)
            target = None if targets is None else targets[rows]
            out = None if gradient is None else gradient[rows]
            total += self._block(
                student[rows], None if teacher is None else teacher[rows], target, out
            )
        return total

    def _block(
        self,
        student: Tensor,
        teacher: Tensor | TopTokens | None,
        target: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        log_q = _log_softmax(student, self.temperature)
        wanted = out is not None
        if isinstance(teacher, Tensor) and self.top_k is not None:
            teacher = TopTokens.of(teacher, self.top_k, self.temperature)
        if teacher is None:  # not 0 times a KL that may be infinite
            kl, slope = log_q.new_zeros(()), torch.zeros_like(log_q) if wanted else None
        elif isinstance(teacher, Tensor):
            kl, slope = _whole(log_q, _log_softmax(teacher, self.temperature), wanted)
        else:
            kl, slope = _top(log_q, teacher, wanted)
        kl_weight = 1.0 - self.cross_entropy
        loss = kl_weight * self.temperature**2 * kl
        if slope is not None:
            slope.mul_(kl_weight * self.temperature)
        if self.cross_entropy > 0 and target is not None:
            if self.temperature != 1:
                log_q = _log_softmax(student, 1.0)
            entropy, other = _cross_entropy(log_q, target, wanted)
            loss = loss + self.cross_entropy * entropy
            if slope is not None and other is not None:
                slope.add_(other, alpha=self.cross_entropy)
        if out is not None and slope is not None:
            out.copy_(slope)
        return loss

    def _fuses(self, student: Tensor, *others: Tensor | None) -> bool:
        """Whether :meth:`_fused` computes it."""
        return (
            self.cross_entropy == 0
            and self.top_k is None
            and all(
                t.dtype in _TYPES and t.stride(-1) == 1
                and (t.shape, t.device) == (student.shape, student.device)
                for t in (student, *others) if t is not None
            )
            and has_kernels(student.device, [1])
        )  # fmt: skip

    def _fused(self, student: Tensor, teacher: Tensor, gradient: Tensor | None) -> Tensor:
        from analog_plugin.training.kernels import whole_divergence

        t = self.temperature
        return t**2 * whole_divergence(student, teacher, t, t, gradient)


def _whole(log_q: Tensor, log_p: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """KL of whole distributions, summed, and its gradient with respect to the scaled logits."""
    p = log_p.exp()
    # Where p is 0, by a logit of -inf or by underflow, the term is 0.
    kl = log_p.sub_(log_q).masked_fill_(p == 0, 0.0).mul_(p).sum()
    return kl, log_q.exp().sub_(p) if wanted else None


def _top(log_q: Tensor, teacher: TopTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """KL over the k tokens and "any other token", and its gradient; see :func:`_whole`."""
    tokens = teacher.tokens
    log_p = teacher.log_probabilities.to(log_q.dtype)
    log_rest = teacher.log_rest.to(log_q.dtype)
    p, rest = log_p.exp(), log_rest.exp()
    student_rest = _log_rest(log_q, tokens)
    others = rest != 0
    kl = (log_p - log_q.gather(-1, tokens)).masked_fill_(p == 0, 0.0).mul_(p).sum()
    kl = kl + torch.where(others, rest * (log_rest - student_rest), 0.0).sum()
    if not wanted:
        return kl, None
    mass = p.sum(-1) + rest
    slope = log_q.exp().mul_(mass[:, None])
    top = slope.gather(-1, tokens).sub_(p)
    # A token among the others has its part of their probability, however small that is.
    part = torch.sub(log_q, torch.where(others, student_rest, 0.0)[:, None]).exp_()
    slope.sub_(part.mul_(rest[:, None])).scatter_(-1, tokens, top)
    return kl, slope


def _cross_entropy(log_q: Tensor, target: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    entropy = F.nll_loss(log_q, target, ignore_index=_IGNORED, reduction="sum")
    if not wanted:
        return entropy, None
    scored = (target != _IGNORED)[:, None]
    index = target.clamp_min(0)[:, None]
    slope = log_q.exp()
    slope.scatter_add_(-1, index, torch.full_like(index, -1, dtype=slope.dtype))
    return entropy, slope.masked_fill_(~scored, 0.0)


def _log_rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability [N] of all tokens but ``tokens`` [N, k]."""
    return log_probabilities.scatter(-1, tokens, float("-inf")).logsumexp(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    precise = logits.to(_precision(logits))
    return F.log_softmax(precise if temperature == 1 else precise / temperature, dim=-1)


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _rows(logits: Tensor) -> int:
    size = _BLOCK_CPU if logits.device.type == "cpu" else _BLOCK
    return max(size // logits.shape[-1], 1)
