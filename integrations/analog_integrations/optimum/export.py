"""``main_export``: the Python twin of ``optimum-cli export analog``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from analog_plugin import processes
from analog_plugin.checkpoint.card import result_table
from analog_plugin.checkpoint.save import save_profiles
from analog_plugin.demo import resolve_model
from analog_plugin.errors import AnalogError, one_line
from analog_plugin.paths import check_output
from analog_plugin.pretrained import load_causal_lm, load_tokenizer, read_model_config
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.kept import forget_run, training_directory
from analog_plugin.training.lock import run_lock
from analog_plugin.training.pipeline import AnalogResult, train_analog

_DTYPES = ("float32", "bfloat16", "float16")


def main_export(
    model: str,
    output: str | Path,
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe,
    *,
    dataset: Any = None,
    profile: str | Sequence[str] | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    no_train: bool = False,
    task: str = "text-generation",
    overwrite: bool = False,
    resume: bool = False,
) -> AnalogResult:
    """Load a model, make it analog, train it, measure it, and write a checkpoint.

    An argument beats the recipe; the recipe in force is written into the checkpoint.

    Args:
        model: Hub id, local directory or ``demo:smollm2-135m-instruct``.
        output: The checkpoint's directory; it appears when all is done.
        recipe: An llm-compressor recipe file with an ``AnalogModifier``, or its fields.
        dataset: Training text instead of the recipe's ``data``; see
            :func:`~analog_plugin.data.load_tokens`.
        profile: Instead of the recipe's ``deploy: {profile: ...}``; of several each is a directory
            of its name below ``output``.
        seed: Instead of the recipe's.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the trained weights.
        no_train: Convert, calibrate and measure only.
        task: ``"text-generation"``, the only one.
        overwrite: Replace an output directory that is not empty.
        resume: Go on with a run that was broken off, from what it keeps in ``OUTPUT.training``
            until it is done; where there is none, begin.

    Under ``accelerate launch`` all processes train, and the first one does all else.

    Raises:
        AnalogError: Something given is wrong; one sentence says what, and nothing was written.
        TrainingStopped: SIGTERM came; what was done is kept in ``OUTPUT.training``.
    """
    processes.join(device)
    if processes.process_rank() > 0:  # one of them shows what is going on
        disable_progress_bar()
    if task != "text-generation":
        raise AnalogError(f"task is {task!r}, but only text-generation is offered.")
    settings = processes.by_first(lambda: effective_recipe(recipe, profile=profile, seed=seed))
    processes.by_first(lambda: check_output(output, overwrite))
    keep = training_directory(output)
    with run_lock(keep):
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
        result = train_analog(
            loaded,
            settings,
            tokenizer=tokenizer,
            dataset=dataset,
            train=not no_train,
            keep=keep,
            resume=resume,
            overwrite=overwrite,
        )
        processes.by_first(lambda: _write(result, output, tokenizer, overwrite, keep))
    return result


def _write(
    result: AnalogResult, output: str | Path, tokenizer: Any, overwrite: bool, keep: Path
) -> None:
    save_profiles(
        result.model,
        output,
        result.plans,
        tokenizer=tokenizer,
        result=result,
        overwrite=overwrite,
    )
    forget_run(keep)
    print()
    print(result_table(result))
    profiles = result.recipe.deploy.profiles
    several = "profile" if len(profiles) == 1 else "below it a directory each of the profiles"
    print(f"Written to {output} ({several} {', '.join(profiles)}).")


def effective_recipe(
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe,
    *,
    profile: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> AnalogRecipe:
    """Read ``recipe`` and put the given arguments over it, saying so.

    Raises:
        AnalogError: The recipe cannot be read, or holds or is given a wrong value.
    """
    if isinstance(recipe, (str, Path)):
        from analog_integrations.llmcompressor.recipes import read_recipe

        settings = read_recipe(recipe)
    else:
        settings = AnalogRecipe.parse(recipe)
    if profile is not None and not isinstance(profile, str):
        profile = profile[0] if len(profile) == 1 else tuple(profile)
    given = {"profile": profile, "seed": seed}
    said = {"profile": settings.deploy.profile, "seed": settings.seed}
    deploy = settings.deploy.model_dump() | ({} if profile is None else {"profile": profile})
    fields = dict(settings) | {"deploy": deploy} | ({} if seed is None else {"seed": seed})
    settings = AnalogRecipe.parse(fields)
    for name, value in given.items():
        if value not in (None, said[name]):
            print(f"{name}: {_shown(value)} (the recipe says {_shown(said[name])})")
    return settings


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def load_model(model: str, *, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer (None where it has none).

    Raises:
        AnalogError: The model is missing or no full-precision causal language model, its files
            cannot be read, or the device is not there.
    """
    import torch

    place = resolve_device(device, dtype)
    source = resolve_model(str(model))
    config = read_model_config(source, str(model))
    if getattr(config, "quantization_config", None) is not None:
        raise AnalogError(
            f"The model {model} is quantized already; give the full-precision model it was made of."
        )
    tokenizer = load_tokenizer(source, str(model))
    options = {"config": config, "dtype": getattr(torch, dtype)}
    loaded = load_causal_lm(source, name=str(model), **options)
    try:
        return loaded.to(place), tokenizer
    except RuntimeError as error:
        raise AnalogError(
            f"The model {model} does not fit on {place}: {one_line(error)}"
        ) from error


def resolve_device(device: str | None, dtype: str = "float32") -> str:
    """The device to compute on: ``device`` itself, or a GPU if there is one.

    Raises:
        AnalogError: It cannot be used, or ``dtype`` is none of the types that models may have.
    """
    import torch

    if dtype not in _DTYPES:
        raise AnalogError(f"dtype is {dtype!r}, but must be one of {', '.join(_DTYPES)}.")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "cuda" and processes.process_count() > 1:
        place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=place).item()
    # Wrong names, drivers and devices that hold nothing fail in as many ways as there are backends.
    except Exception as error:
        raise AnalogError(
            f"The device {place!r} cannot be used: {one_line(error)}; write cpu or cuda."
        ) from error
    return place
