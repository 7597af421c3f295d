"""Whether the tensors of a directory are those of the model that its ``config.json`` describes.

Without building it: numbers of blocks, sizes of embeddings, and for the usual shape of a decoder
those of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from analog_plugin.errors import shown
from analog_plugin.inspection.quantized import Modules, QuantizedLayer
from analog_plugin.inspection.tensors import and_more

#: Model types whose layers have the sizes of Llama's.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")

_BLOCK = re.compile(r"\.(?:layers|h)\.(\d{1,9})\.")
_EMBEDDINGS = ("embed_tokens", "wte", "lm_head")


def shape_faults(config: Any, modules: Modules, layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """Sentences on blocks that are missing and weights of other sizes.

    Args:
        config: The model's configuration, as transformers reads it.
        modules: Tensors by module and part.
        layers: The quantized layers, whose tensors may not have their weights' shapes.
    """
    text = config.get_text_config()
    faults = []
    blocks = {int(found[1]) for name in modules if (found := _BLOCK.search(f"{name}."))}
    count = getattr(text, "num_hidden_layers", None)
    if isinstance(count, int) and blocks:
        missing = next((i for i in range(len(blocks) + 1) if i < count and i not in blocks), None)
        if missing is not None:
            faults.append(
                f"config.json says that the model has {count} blocks, but the files hold no "
                f"weight of block {missing}; give the files that belong to it."
            )
        elif count < len(blocks) and text.model_type in _LIKE_LLAMA:
            faults.append(
                f"config.json says that the model has {count} blocks, but the files hold "
                f"{len(blocks)}; give the files that belong to it."
            )
    wrong = [
        f"{shown(name)} is {list(shape)} instead of {list(expected)}"
        for name, shape, expected in _shapes(text, modules, layers)
        if shape != expected
    ]
    if wrong:
        faults.append(
            f"By config.json {wrong[0]}{and_more(wrong)}; give the files that belong to it."
        )
    return faults


def _shapes(
    config: Any, modules: Modules, layers: Mapping[str, QuantizedLayer]
) -> Iterator[tuple[str, tuple[int, ...], tuple[Any, Any]]]:
    """Names and shapes of weights, and the shapes that the configuration asks for."""
    hidden = getattr(config, "hidden_size", None)
    vocabulary = getattr(config, "vocab_size", None)
    sizes = dict.fromkeys(_EMBEDDINGS, (vocabulary, hidden))
    heads = getattr(config, "num_attention_heads", None)
    if config.model_type in _LIKE_LLAMA and isinstance(hidden, int) and isinstance(heads, int):
        groups, inner = config.num_key_value_heads, config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // max(heads, 1)
        # Values that are no numbers were refused before; here they must only do no harm.
        if all(isinstance(value, int) for value in (groups, inner, head)):
            sizes |= {
                "q_proj": (heads * head, hidden),
                "k_proj": (groups * head, hidden),
                "v_proj": (groups * head, hidden),
                "o_proj": (hidden, heads * head),
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner),
            }
    for name, parts in modules.items():
        expected = sizes.get(name.rpartition(".")[2])
        layer = layers.get(name)
        weight = parts.get("weight")
        shape = layer.shape if layer is not None else None if weight is None else weight.shape
        if shape is not None and expected is not None and isinstance(expected[0], int):
            yield f"{name}.weight", shape, expected
