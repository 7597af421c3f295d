"""A kernel for GPUs: the KL divergence of rows of logits and its gradient, in two readings.

:mod:`~analog_plugin.training.divergence` calls it. Torch's operators pass over the logits about
twenty times, in fp32; this reads them twice, in their own type, and writes the gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from analog_plugin.ops.kernels import launch

_BLOCK = 2048


def whole_divergence(
    student: Tensor, teacher: Tensor, temperature: float, scale: float, gradient: Tensor | None
) -> Tensor:
    """KL(teacher ‖ student) of logits [N, V] over ``temperature``, summed over rows: fp32 scalar.

    ``gradient`` [N, V], written: ``scale`` times that with respect to ``student / temperature``.
    """
    # Summed in one order whatever runs first.
    sums = torch.empty(len(student), dtype=torch.float32, device=student.device)
    out = student if gradient is None else gradient
    launch(
        _divergence, (len(student), 1, 1), student, teacher, out, sums, student.shape[1],
        student.stride(0), teacher.stride(0), out.stride(0), 1 / temperature, scale,
        BLOCKS=-(-student.shape[1] // _BLOCK), GRAD=gradient is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return sums.sum()


@triton.jit
def _divergence(student, teacher, out, sums, columns, student_row, teacher_row, out_row, inverse,
                scale, BLOCKS: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of logits [V]: ``sums`` gets its KL, ``out`` the gradient."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    out += row * out_row
    place = tl.arange(0, BLOCK)
    peak_s = float("-inf")
    peak_t = float("-inf")
    mass_s = 0.0
    mass_t = 0.0
    for block in range(BLOCKS):
        start = block * BLOCK
        inside = start + place < columns
        s = _scaled(student + start + place, inside, inverse)
        t = _scaled(teacher + start + place, inside, inverse)
        peak_s, mass_s = _more(peak_s, mass_s, s)
        peak_t, mass_t = _more(peak_t, mass_t, t)
    kl = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        start = block * BLOCK
        inside = start + place < columns
        s = _scaled(student + start + place, inside, inverse) - peak_s
        t = _scaled(teacher + start + place, inside, inverse) - peak_t
        p = tl.where(inside, tl.exp(t) / mass_t, 0.0)
        # Where p is 0, by a logit of -inf or by underflow, the term is 0.
        kl += tl.where(p == 0, 0.0, p * (t - s))
        if GRAD:
            tl.store(out + start + place, (tl.exp(s) / mass_s - p) * scale, mask=inside)
    # One number a row, but a part of all of its terms: rounding it would not average out.
    rest = tl.log(tl.cast(mass_s, tl.float64)) - tl.log(tl.cast(mass_t, tl.float64))
    tl.store(sums + row, (tl.sum(kl).to(tl.float64) + rest).to(tl.float32))


@triton.jit
def _scaled(at, inside, inverse):
    return tl.load(at, mask=inside, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _more(peak, mass, x):
    """Largest of all so far, and their sum of exponentials relative to it."""
    new = tl.maximum(peak, tl.max(x))
    reference = tl.where(new == float("-inf"), 0.0, new)  # as yet none is finite
    return new, mass * tl.exp(peak - reference) + tl.sum(tl.exp(x - reference))
