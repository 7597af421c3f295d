"""Load a causal language model with transformers: whatever is wrong with it is one sentence.

No code from the model's directory is run, and transformers is never left to ask for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, one_line, shown, torchvision_explained
from analog_plugin.files import read_json

#: Of these transformers makes lists as it reads a configuration.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_labels")
_MOST = 10_000


@torchvision_explained()
def read_model_config(source: str | Path, name: str | None = None) -> Any:
    """Read the transformers configuration of a causal language model.

    Args:
        source: A local directory or a hub id.
        name: What the user called it, for errors; None: ``source``.

    Raises:
        AnalogError: It is missing, cannot be read, or is of no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    name = name or str(source)
    path = Path(source) / "config.json"
    if path.is_file() and (fault := absurd_fault(read_json(path))) is not None:
        raise AnalogError(f"The configuration of the model {name} cannot be read: {fault}")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # Besides its own errors, transformers raises whatever the values in the file lead to.
    except Exception as error:
        what = (
            f"The configuration of the model {name} cannot be read"
            if Path(source).is_dir()
            else f"The model {name} is neither a local model directory nor a hub model within reach"
        )
        raise AnalogError(f"{what}: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise AnalogError(
            f"The model {name} is of type {config.model_type!r}, which has no causal language "
            "model; give one for text generation."
        )
    # These load as causal models too, only with a mask that lets tokens see what follows.
    decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if type(config) in AutoModelForMaskedLM._model_mapping and not decoder:
        raise AnalogError(
            f"The model {name} is of type {config.model_type!r} without is_decoder, so it is no "
            "causal language model; give one for text generation."
        )
    return config


def absurd_fault(values: Mapping[str, Any]) -> str | None:
    """A sentence on so many blocks or labels that to read them would take all memory."""
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for name in _COUNTS:
            number = part.get(name)
            if isinstance(number, int) and number > _MOST:
                return (
                    f"config.json says {name}: {shown(number)}, more than any model has; give the "
                    "files that belong together."
                )
    return None


@torchvision_explained()
def load_causal_lm(
    source: str | Path | None, *, name: str | None = None, config: Any = None, **options: Any
) -> Any:
    """Load a causal language model whose files hold every tensor of it.

    Args:
        source: A local directory or a hub id; None: ``state_dict`` among the options holds all
            tensors, and ``name`` and ``config`` are given.
        name: What the user called it, for errors; None: ``source``.
        config: Its configuration; None: :func:`read_model_config`.
        **options: For transformers' ``from_pretrained``: ``dtype``, ``device_map``, ...

    Raises:
        AnalogError: It is missing or no causal language model, its files cannot be read, or their
            tensors are not those that the configuration asks for.
    """
    from transformers import AutoModelForCausalLM

    name = name or str(source)
    if config is None:
        assert source is not None
        config = read_model_config(source, name)
    # Sizes are compared below, where they can be told.
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
    loader: Any = AutoModelForCausalLM
    if source is None:
        loader = AutoModelForCausalLM._model_mapping[type(config)]
    with _quiet_report():
        try:
            model, found = loader.from_pretrained(
                source, config=config, output_loading_info=True, **options
            )
        # Broken weights and impossible sizes fail anywhere in transformers, safetensors and torch.
        except Exception as error:
            raise AnalogError(f"The model {name} does not load: {one_line(error)}") from error
    _refuse_incomplete(name, found)
    return model


@torchvision_explained()
def load_tokenizer(source: str | Path, name: str | None = None) -> Any | None:
    """Load the tokenizer beside a model; None where there is none.

    Args:
        source: A local directory or a hub id.
        name: What the user called it, for errors; None: ``source``.

    Raises:
        AnalogError: There is one, but its files cannot be read, or not be written again.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # JSON can spell characters that no file can hold: better now than after a training.
        settings = [getattr(tokenizer, name, None) for name in ("init_kwargs", "chat_template")]
        json.dumps(settings, ensure_ascii=False, default=str).encode()
        return tokenizer
    # Where files are missing or broken, each kind of tokenizer raises something else.
    except Exception as error:
        if not str(source) or not any(Path(source).glob("tokenizer*")):
            return None
        raise AnalogError(
            f"The tokenizer of the model {name or source} cannot be read: {one_line(error)}"
        ) from error


def _refuse_incomplete(name: str, found: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers."""
    ask = "give the files that belong to its config.json."
    if missing := sorted(found["missing_keys"]):
        raise AnalogError(
            f"The weights of the model {name} lack {missing[0]}{_others(missing)}; {ask}"
        )
    if wrong := sorted(found["mismatched_keys"]):
        tensor, there, expected = wrong[0]
        raise AnalogError(
            f"The weights of the model {name} hold {tensor} of shape {list(there)} instead of "
            f"{list(expected)}{_others(wrong)}; {ask}"
        )
    if errors := found["error_msgs"]:
        raise AnalogError(f"The model {name} does not load: {one_line(RuntimeError(errors[0]))}")


def _others(found: list[Any]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


class _quiet_report:
    """Silence transformers' table of tensors where it tells what is an error here, or expected.

    What is missing or of another shape raises; ``input_scale`` stands in every checkpoint of ours.
    """

    def __enter__(self) -> None:
        self.logger = logging.getLogger("transformers.modeling_utils")
        self.logger.addFilter(self.filter)

    @staticmethod
    def filter(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(word in text for word in ("input_scale", "MISSING", "MISMATCH"))

    def __exit__(self, *error: object) -> None:
        self.logger.removeFilter(self.filter)
