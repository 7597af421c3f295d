"""``main_teacher``: the Python twin of ``optimum-cli analog teacher``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analog_integrations.optimum.export import effective_recipe, load_model
from analog_plugin import AnalogRecipe
from analog_plugin.errors import AnalogError
from analog_plugin.layers.prefix import install_prefix, prefix_tokens
from analog_plugin.paths import check_output
from analog_plugin.presets import resolve_scheme
from analog_plugin.training.stored import StoredTeacher, store_teacher
from analog_plugin.training.tokens import training_rows

_TOP_K = 64


def main_teacher(
    model: str,
    output: str | Path,
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe,
    *,
    dataset: Any = None,
    top_k: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> StoredTeacher:
    """Compute once what training reads of its teacher, for a recipe's training tokens.

    Args:
        model: Hub id, local directory or ``demo:smollm2-135m-instruct``.
        output: Directory of the result; it appears when all is done.
        recipe: An llm-compressor recipe file with an ``AnalogModifier``, or its fields: its data,
            digital prefix and temperature count.
        dataset: Training text instead of the recipe's ``data``.
        top_k: Most likely tokens kept at each position; None: the recipe's, else 64.
        batch_size: Rows computed together.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the weights: that of the training.
        overwrite: Replace an output directory that is not empty.

    Raises:
        AnalogError: Something given is wrong; one sentence says what, and nothing was written.
    """
    if top_k is not None and top_k < 1:
        raise AnalogError(f"top_k is {top_k}, but must be at least 1.")
    settings = effective_recipe(recipe)
    check_output(output, overwrite)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    rows = training_rows(loaded, settings, tokenizer, dataset)
    prefix = resolve_scheme(settings.scheme).prefix
    if prefix is not None:
        install_prefix(loaded, prefix_tokens(loaded, prefix))
    stored = store_teacher(
        loaded,
        rows,
        output,
        top_k=top_k or settings.distillation.top_k or _TOP_K,
        temperature=settings.distillation.temperature,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    size = sum(path.stat().st_size for path in Path(output).iterdir())
    print(
        f"Written to {output}: the {stored.top_k} most likely tokens at {rows.numel():,} positions "
        f"({size / 1e6:.1f} MB). Train with distillation: {{teacher: {output}}} in the recipe."
    )
    return stored
