"""``AnalogModelForCausalLM``: the loader that Optimum's users expect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analog_plugin.checkpoint import load_checkpoint
from analog_plugin.errors import AnalogError


class AnalogModelForCausalLM:
    """Load analog models. What it returns is the architecture's own ``PreTrainedModel`` with analog
    layers in it, so ``generate``, ``pipeline`` and PEFT work on it.

    Example:
        >>> model = AnalogModelForCausalLM.from_pretrained("demo-out", noise="pcm", seed=0)
        >>> model = AnalogModelForCausalLM.from_pretrained("gpt2", export=True, recipe=recipe)
    """

    def __init__(self) -> None:
        raise TypeError("Use AnalogModelForCausalLM.from_pretrained(directory).")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        noise: str | Mapping[str, Any] | Any | None = None,
        seed: int | None = None,
        export: bool = False,
        recipe: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint directory of the profile ``analog-fp``, or make one from a model.

        Args:
            model: The directory or hub id; with ``export`` a digital model.
            noise: Program the weights with this noise model, for instance ``"pcm"``.
            seed: Seed of the programming, 0 where not given; with ``export`` of the training too,
                and the recipe's where not given.
            export: Run ``recipe`` on a digital model and return the result.
            recipe: For ``export``: a recipe file or its fields.
            **kwargs: For transformers' ``from_pretrained``; with ``export``: ``dataset``,
                ``device``, ``dtype`` as in ``main_export``.

        Raises:
            AnalogError: The directory holds no analog model, or was altered.
        """
        if not export:
            if recipe is not None:
                raise AnalogError("recipe is only used with export=True; write export=True.")
            return load_checkpoint(model, noise=noise, seed=seed or 0, **kwargs)
        if recipe is None:
            raise AnalogError('export=True needs a recipe; write recipe="recipe.yaml".')
        from analog_integrations.optimum.export import effective_recipe, load_model
        from analog_plugin.layers import analog_layers
        from analog_plugin.noise import resolve_noise
        from analog_plugin.training.pipeline import train_analog

        settings = effective_recipe(recipe, seed=seed)
        programming = resolve_noise(noise)
        dataset = kwargs.pop("dataset", None)
        where = {"dtype": kwargs.pop("dtype", "float32"), "device": kwargs.pop("device", None)}
        if kwargs:
            raise AnalogError(f"export=True does not take {', '.join(sorted(kwargs))}.")
        loaded, tokenizer = load_model(str(model), **where)
        analog = train_analog(loaded, settings, tokenizer=tokenizer, dataset=dataset).model
        for _, layer in analog_layers(analog):
            if programming is not None:
                layer.program(programming, settings.seed)
        return analog
