"""An observer of outputs that gives each layer its scale before llm-compressor uses it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.observers.base import Observer
from llmcompressor.observers.min_max import StaticMinMaxObserver
from torch import Tensor, nn

from analog_integrations.compressed_tensors.presets import OUTPUT_OBSERVER


@Observer.register(OUTPUT_OBSERVER)
class OutputObserver(StaticMinMaxObserver):
    """The largest magnitude of all outputs, written into the layer as it grows.

    While llm-compressor calibrates, it already quantizes outputs, with a scale that it sets only
    at the end: until then whatever was in memory. With this observer the scale always holds the
    outputs at hand.
    """

    module: Any = None

    def attach(self, module: nn.Module) -> None:
        """Remember whose outputs these are."""
        self.module = weakref.ref(module)

    def detach(self, module: nn.Module) -> None:
        """Forget it."""
        self.module = None

    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """Take the outputs in, and write the scale of all until now."""
        super().update_statistics_from_observed(observed)
        module = None if self.module is None else self.module()
        if module is None:
            return
        with torch.no_grad():
            found = calculate_qparams(self.min_vals, self.max_vals, self.args)
        for part, value in zip(("scale", "zero_point"), found, strict=True):
            if hasattr(module, f"{self.base_name}_{part}"):
                update_offload_parameter(module, f"{self.base_name}_{part}", value)
