"""``main_ablate``: the Python twin of ``optimum-cli analog ablate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analog_integrations.optimum.evaluate import check_counts, identity, versions
from analog_integrations.optimum.export import effective_recipe, load_model
from analog_plugin import AnalogRecipe
from analog_plugin.errors import AnalogError, require
from analog_plugin.evaluation import NoiseReport
from analog_plugin.evaluation.report import write_report
from analog_plugin.training.ablation import ablate


def main_ablate(
    model: str,
    output: str | Path,
    recipe: str | Path | Mapping[str, Any] | AnalogRecipe,
    *,
    ingredients: Sequence[str] | None = None,
    corpus: str | None = None,
    steps: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, NoiseReport]:
    """Train a model several times, each time with one ingredient changed, and write tables.

    Args:
        model: Hub id, local directory or ``demo:smollm2-135m-instruct``.
        output: Directory of ``runs.jsonl``, ``report.html``, the tables and the figures.
        recipe: An llm-compressor recipe file with an ``AnalogModifier``, or its fields.
        ingredients: ``"noise"``, ``"clipping"``, ``"adc"``, ``"ranges"``, ``"distillation"``,
            ``"tokens"``; None: all that the recipe has room for.
        corpus: Text to train on instead of own tokens, for ``"tokens"``.
        steps: Training steps of each run instead of the recipe's.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the trained weights.
        overwrite: Forget the runs in ``output``.

    Returns:
        A report by run.

    Raises:
        AnalogError: Something given is wrong; one sentence says what. Finished runs are kept.
    """
    for module in ("scipy.stats", "matplotlib"):  # before the long work, not after it
        require(module, "eval")
    check_counts(output, steps=(steps, 1))
    settings = effective_recipe(recipe)
    if steps is not None and settings.training is not None:
        training = settings.training | {"max_steps": steps}
        settings = settings.model_copy(update={"training": training})
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    if tokenizer is None:
        raise AnalogError(f"The model {model} has no tokenizer beside it; give one that has.")
    place = next(loaded.parameters()).device.type
    own = {"model": identity(model), "dtype": dtype, "device": place, "versions": versions()}
    reports = ablate(
        loaded,
        settings,
        output,
        tokenizer=tokenizer,
        ingredients=ingredients,
        corpus=corpus,
        settings=own,
        overwrite=overwrite,
    )
    measured = settings.evaluation
    assert measured is not None  # ablate refused it
    notes = [
        f"Every run began with the same calibrated {model} and was measured on the same hardware, "
        f"chips and text: {measured.blocks} blocks of {measured.length} tokens of "
        f"{measured.corpus}, in {dtype}. KL and top-1 are to the original.",
    ]
    text = write_report(reports, output, title=f"What training {model} takes", notes=notes)
    print(f"\n{text}\nWritten to {output}; the page is {Path(output) / 'report.html'}.")
    return reports
