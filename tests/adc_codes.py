"""Outputs of two simulations of one analog layer, compared by ADC codes."""

import torch


def adc_step(layer):
    """[out] what one ADC code stands for in each column: the largest of the tiles."""
    blocks = layer.tile_weight.detach().float().split(layer.tiles, dim=1)
    scheme = layer.scheme
    steps = [
        scheme.out_bound * value * block.abs().amax(1) / scheme.output_levels
        for value, block in zip(layer.input_range.detach(), blocks, strict=True)
    ]
    return torch.stack(steps).amax(0)


def count_flips(layer, y, z):
    """Outputs that fall on another ADC code, and all; the others agree to 1e-6 of the largest.

    None may be more than one code apart.
    """
    rounding = 1e-6 * float(z.abs().max())
    difference = (y - z).abs()
    assert bool((difference <= adc_step(layer) * 1.001 + rounding).all())
    return int((difference > rounding).sum()), z.numel()
