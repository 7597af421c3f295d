"""Where the kernels of :mod:`~analog_plugin.ops.kernels` run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def has_kernels(device: torch.device, tiles: list[int]) -> bool:
    """Whether kernels compute on ``device``: on an NVIDIA GPU, where Triton is.

    It comes with torch's builds for GPUs. ``ANALOG_PLUGIN_KERNELS=0`` in the environment leaves all
    to torch's operators. With ``TRITON_INTERPRET=1`` kernels run on a CPU too, slowly, for tests.

    Args:
        device: That of the tensors.
        tiles: Rows of each tile; kernels take them as a scheme has them: the first may have one row
            more than the others.
    """
    if device.type == "cuda":
        asked = torch.version.hip is None
    else:
        asked = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        asked
        and os.environ.get("ANALOG_PLUGIN_KERNELS") != "0"
        and _has_triton()
        and tiles[0] - tiles[-1] <= 1
        and tiles == sorted(tiles, reverse=True)
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
