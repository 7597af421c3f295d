"""lm-eval's model type ``analog``."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from analog_integrations.optimum.export import resolve_device
from analog_plugin.checkpoint import load_checkpoint
from analog_plugin.errors import AnalogError
from analog_plugin.pretrained import load_tokenizer


@register_model("analog")
class AnalogLM(HFLM):
    """An analog checkpoint, programmed under one noise seed: one chip.

    Args:
        pretrained: Directory or hub id of the profile ``analog-fp``.
        noise: Programming noise, ``"pcm"``, ``"gaussian:0.02"``, ``"hermes@1d"``; None: none.
        seed: Its seed.
        dtype: Type of the weights.
        device: Where to compute.
        **kwargs: For ``HFLM``: ``batch_size``, ``max_length``, ``add_bos_token``, ...

    Raises:
        AnalogError: The directory holds no analog model, or no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        noise: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        import torch

        place = resolve_device(device, dtype)
        model = load_checkpoint(pretrained, noise=noise, seed=seed, dtype=getattr(torch, dtype))
        tokenizer = load_tokenizer(pretrained)
        if tokenizer is None:
            raise AnalogError(f"{pretrained} has no tokenizer beside the model; copy it there.")
        super().__init__(pretrained=model.to(place), tokenizer=tokenizer, **kwargs)
