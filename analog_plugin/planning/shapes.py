"""Sizes of decoder models: weights, what a token costs in operations and in kept bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, shown
from analog_plugin.files import read_json


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of Llama's kind: gated MLP, grouped attention, linear layers without biases.

    Args:
        hidden, intermediate: Widths of the residual stream and of the MLP.
        blocks: Decoder blocks.
        heads, kv_heads, head_size: Of the attention.
        vocabulary: Tokens.
        tied: Whether the head is the embedding.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, model: str | Path) -> ModelShape:
        """One of :data:`MODELS` by its name, or what a directory's ``config.json`` says.

        Raises:
            AnalogError: There is neither, or the configuration is not of Llama's kind.
        """
        if str(model) in MODELS:
            return MODELS[str(model)]
        path = Path(model)
        if not path.is_dir():
            raise AnalogError(
                f"model is {shown(str(model))}, but must be one of {', '.join(MODELS)}, or a "
                "directory with a config.json."
            )
        return cls.of_config(read_json(path / "config.json"))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a transformers configuration.

        Raises:
            AnalogError: A size is missing or no positive whole number.
        """

        def size(name: str, default: Any = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
                raise AnalogError(
                    f"config.json: {name} is {shown(config.get(name))}, but must be a positive "
                    "whole number; models of Llama's kind (Llama, Phi-3, Qwen, Mistral) have it."
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            hidden=hidden,
            intermediate=size("intermediate_size"),
            blocks=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_size=size("head_dim", hidden // heads),
            vocabulary=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def attention(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of the keys of all heads; that of the values too."""
        return self.kv_heads * self.head_size

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of a block."""
        attention = self.hidden * (2 * self.attention + 2 * self.keys)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def analog_weights(self) -> int:
        """Weights of all linear layers but the head."""
        return self.blocks * self.block_weights

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters: linear layers, embeddings, norms."""
        norms = (2 * self.blocks + 1) * self.hidden
        return self.analog_weights + self.head * (1 if self.tied else 2) + norms

    def forward_operations(self, context: float) -> float:
        """Of a token: products with weights, and attention to ``context`` tokens."""
        products = 2 * (self.analog_weights + self.head)
        return products + 4 * self.blocks * self.attention * context

    def cache_bytes(self, length: int) -> int:
        """Keys and values of a sequence, in half precision."""
        return 2 * self.blocks * 2 * self.keys * length

    @property
    def kept_bytes(self) -> int:
        """What one block keeps of a token for its backward, in half precision on a GPU.

        Analog layers keep their inputs, which query, key and value share, and gate and up, and a
        bit for each output; norms, attention and the gated product keep their operands, and norms
        compute in float32.
        """
        inputs = 2 * (2 * self.hidden + self.attention + self.intermediate)
        outputs = self.attention + 2 * self.keys + 2 * self.hidden + 2 * self.intermediate
        norms = 2 * (4 + 2) * self.hidden
        attention = 2 * (2 * self.attention + 2 * self.keys)
        gated = 2 * 4 * self.intermediate
        return inputs + outputs // 8 + norms + attention + gated


#: Llama-3.2-1B, Phi-3-mini, Llama-3.1-8B and Llama-3.1-70B.
MODELS = {
    "1b": ModelShape(
        hidden=2048,
        intermediate=8192,
        blocks=16,
        heads=32,
        kv_heads=8,
        head_size=64,
        vocabulary=128256,
        tied=True,
    ),
    "4b": ModelShape(
        hidden=3072,
        intermediate=8192,
        blocks=32,
        heads=32,
        kv_heads=32,
        head_size=96,
        vocabulary=32064,
        tied=False,
    ),
    "8b": ModelShape(
        hidden=4096,
        intermediate=14336,
        blocks=32,
        heads=32,
        kv_heads=8,
        head_size=128,
        vocabulary=128256,
        tied=False,
    ),
    "70b": ModelShape(
        hidden=8192,
        intermediate=28672,
        blocks=80,
        heads=64,
        kv_heads=8,
        head_size=128,
        vocabulary=128256,
        tied=False,
    ),
}
