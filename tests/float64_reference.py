"""The analog layer written out plainly in float64, from the formulas of docs/analog-layer.md."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Outcome:
    y: Tensor
    grad_x: Tensor
    grad_w: Tensor
    grad_range: Tensor
    range_terms: Tensor  # the sum of the magnitudes of the terms of grad_range
    codes: list[Tensor]
    adc_position: list[Tensor]  # where between two ADC codes each output fell, before rounding


def analog_reference(
    x, weight, ranges, grad, *, tiles, input_bits=8, output_bits=8, out_bound=14.0, noise=None,
    gamma=0.0, estimator="paper", weight_bits=None, bound_weight=None,
):  # fmt: skip
    """Forward and gradients; x [T, in], weight [out, in], ranges [K], grad [T, out]."""
    x, weight, ranges, grad = (t.double() for t in (x, weight, ranges, grad))
    levels = 2 ** (input_bits - 1) - 1 if input_bits else None
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    zeros = torch.zeros_like(ranges)
    outcome = Outcome(
        y, torch.zeros_like(x), torch.zeros_like(weight), zeros, zeros.clone(), [], []
    )
    start = 0
    for k, rows in enumerate(tiles):
        part = slice(start, start + rows)
        start += rows
        xk, wk = x[:, part], weight[:, part]
        peak = wk.abs().amax(1)
        bound_peak = peak if bound_weight is None else bound_weight.double()[:, part].abs().amax(1)
        used = wk
        if weight_bits is not None:
            scale = (peak / (2 ** (weight_bits - 1) - 1))[:, None]
            used = torch.where(scale > 0, (wk / scale).round() * scale, wk)
        if noise is not None:
            used = used + gamma * peak[:, None] * noise.double()[:, part]
        if levels is None:
            quantized = xk
            outcome.codes.append(xk)
        else:
            scale = ranges[k] / levels
            codes = (xk.clamp(-ranges[k], ranges[k]) / scale).round()
            outcome.codes.append(codes)
            quantized = codes * scale
        product = quantized @ used.T
        passed = torch.ones_like(product, dtype=torch.bool)
        if output_bits is not None:
            out_levels = 2 ** (output_bits - 1) - 1
            step = out_bound * ranges[k] * bound_peak / out_levels
            position = torch.where(step > 0, product / step, 0.0)
            outcome.adc_position.append(position)
            passed = position.round().abs() <= out_levels
            product = position.round().clamp(-out_levels, out_levels) * step
        outcome.y += product
        gk = grad * passed
        grad_q = gk @ used
        outcome.grad_w[:, part] = gk.T @ quantized
        if levels is None:
            outcome.grad_x[:, part] = grad_q
            continue
        above, below = xk >= ranges[k], xk <= -ranges[k]
        if estimator == "paper":
            up, down = grad_q[above].clamp(max=0), grad_q[below].clamp(min=0)
            terms = ranges[k] * torch.cat([up, -down])
        else:
            inside = ~(above | below)
            residual = (outcome.codes[k] - xk / scale) / levels
            terms = torch.cat([grad_q[above], -grad_q[below], (grad_q * residual)[inside]])
        outcome.grad_range[k] = terms.sum()
        outcome.range_terms[k] = terms.abs().sum() + 1e-30
        outcome.grad_x[:, part] = grad_q * (xk.abs() <= ranges[k])
    return outcome
