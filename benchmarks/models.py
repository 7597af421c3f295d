"""Random causal language models with the shapes of real ones: speed does not depend on weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_SIZES: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "phi-3-mini": (3072, 8192, 32, 32, 32, 32_064, False),  # with its projections not fused
    "tiny": (64, 96, 2, 4, 2, 128, True),
}
SIZES = tuple(_SIZES)


def random_model(size: str, layers: int | None, device: torch.device) -> LlamaForCausalLM:
    """A Llama of that size in float32; ``layers``: of so many decoder layers instead of all."""
    fields = dict(zip(_FIELDS, _SIZES[size], strict=True))
    if layers is not None:
        fields["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=8192)).eval()
