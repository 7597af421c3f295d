"""The analog layer in training, unoptimized: whole tensors, ordinary operations, autograd.

What the package computes in portions, in place, from codes and from indices is here one line each.
The same generator gives the same noise, draw for draw.
"""

import torch


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Clamp(torch.autograd.Function):
    """Clamp whose bound is learned by the paper's gradient."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(x, bound)
        return torch.maximum(torch.minimum(x, bound), -bound)

    @staticmethod
    def backward(ctx, grad):
        x, bound = ctx.saved_tensors
        above, below = grad[x >= bound], grad[x <= -bound]
        change = above.clamp(max=0).sum() - below.clamp(min=0).sum()
        return torch.where(x.abs() > bound, 0.0, grad), bound * change


def plain_forward(x, weight, ranges, scheme, tiles, generator):
    """x [T, in], weight [out, in], ranges [K]; differentiable in all three."""
    epsilon = torch.empty(weight.shape).normal_(generator=generator)
    y = 0.0
    blocks = zip(
        x.split(tiles, 1), weight.split(tiles, 1), epsilon.split(tiles, 1), ranges, strict=True
    )
    for inputs, w, noise, value in blocks:
        levels, bound = scheme.input_levels, scheme.output_levels
        # Divided by the scale before rounding; half the codes' range keeps products small.
        scale = value.detach() / levels
        codes = _Round.apply(_Clamp.apply(inputs, value) / scale)
        peak = w.detach().abs().amax(1)
        noisy = w + scheme.weight_noise * peak[:, None] * noise
        products = codes @ noisy.t()
        step = scheme.out_bound * levels / bound * peak
        inverse = torch.where(step > 0, 1 / step, 0.0)
        out = _Round.apply(products * inverse)
        saturated = out.detach().abs() > bound
        out = torch.where(saturated, out.detach().clamp(-bound, bound), out)
        y = y + out * (step * scale)
    return y
