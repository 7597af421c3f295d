"""``main_export``: the Python twin of ``optimum-cli export analog``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analog_plugin.checkpoint import save_checkpoint
from analog_plugin.checkpoint.card import result_table
from analog_plugin.demo import resolve_model
from analog_plugin.errors import AnalogError
from analog_plugin.paths import check_output
from analog_plugin.plugins import exporters, lookup
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.pipeline import AnalogResult, train_analog


def main_export(
    model: str,
    output: str | Path,
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe,
    *,
    dataset: Any = None,
    profile: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    no_train: bool = False,
    task: str = "text-generation",
    overwrite: bool = False,
) -> AnalogResult:
    """Load a model, make it analog, train it, measure it, and write a checkpoint.

    An argument beats the recipe; the recipe in force is written into the checkpoint.

    Args:
        model: Hub id, local directory or ``demo:smollm2-135m-instruct``.
        output: The checkpoint's directory; it appears when all is done.
        recipe: An llm-compressor recipe file with an ``AnalogModifier``, or its fields.
        dataset: Training text instead of the recipe's ``data``; see
            :func:`~analog_plugin.data.load_tokens`.
        profile: Instead of the recipe's ``deploy: {profile: ...}``.
        seed: Instead of the recipe's.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the trained weights.
        no_train: Convert, calibrate and measure only.
        task: ``"text-generation"``, the only one.
        overwrite: Replace an output directory that is not empty.

    Raises:
        AnalogError: Something given is wrong; one sentence says what, and nothing was written.
    """
    if task != "text-generation":
        raise AnalogError(f"task is {task!r}, but only text-generation is offered.")
    settings = effective_recipe(recipe, profile=profile, seed=seed)
    check_output(output, overwrite)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    result = train_analog(
        loaded, settings, tokenizer=tokenizer, dataset=dataset, train=not no_train
    )
    save_checkpoint(
        result.model,
        output,
        profile=settings.deploy.profile,
        tokenizer=tokenizer,
        result=result,
        overwrite=overwrite,
    )
    print()
    print(result_table(result))
    print(f"Written to {output} (profile {settings.deploy.profile}).")
    return result


def effective_recipe(
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe, **overrides: Any
) -> AnalogRecipe:
    """Read ``recipe`` and put the given arguments over it, saying so."""
    if isinstance(recipe, (str, Path)):
        from analog_integrations.llmcompressor.recipes import read_recipe

        settings = read_recipe(recipe)
    elif isinstance(recipe, AnalogRecipe):
        settings = recipe
    else:
        settings = AnalogRecipe.parse(recipe)
    if (profile := overrides.get("profile")) is not None:
        lookup(exporters(), profile, "deploy profile")
        if profile != settings.deploy.profile:
            print(f"profile: {profile} (the recipe says {settings.deploy.profile})")
        deploy = settings.deploy.model_copy(update={"profile": profile})
        settings = settings.model_copy(update={"deploy": deploy})
    if (seed := overrides.get("seed")) is not None:
        if seed != settings.seed:
            print(f"seed: {seed} (the recipe says {settings.seed})")
        settings = settings.model_copy(update={"seed": seed})
    return settings


def load_model(model: str, *, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer (None where it has none).

    Raises:
        AnalogError: The model is missing or no causal language model, or the device is not there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(str(model))
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise AnalogError(
            f"The model {model} is neither a local model directory nor a hub model within reach: "
            f"{_first_line(error)}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise AnalogError(
            f"The model {model} is of type {config.model_type!r}, which has no causal language "
            "model; give one for text generation."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise AnalogError(
            f"The model {model} is quantized already; give the full-precision model it was made of."
        )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = loaded.to(place)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise AnalogError(f"The model {model} does not load: {_first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
    return loaded, tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
