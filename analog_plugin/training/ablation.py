"""What each ingredient of training is worth: runs from one start, with one of them changed each.

As the paper's ablations (arXiv 2505.09663): training noise, clipping, the converters in training,
and what is imitated on which text. All runs begin with the same calibrated model and are measured
on the same hardware, chips and text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseReport, evaluate_noise
from analog_plugin.evaluation.records import RecordFile
from analog_plugin.layers import scheme_changed
from analog_plugin.layers.prefix import install_prefix, installed_prefix
from analog_plugin.presets import resolve_scheme
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.pipeline import train_analog
from analog_plugin.training.run import run_training
from analog_plugin.training.tokens import evaluation_rows, training_rows

#: Names of the rows beside the ingredients'.
WHOLE, UNTRAINED = "as the recipe says", "not trained"
#: The file of finished runs in an output directory.
RUNS = "runs.jsonl"
#: In the order of the table.
INGREDIENTS = ("noise", "clipping", "adc", "ranges", "distillation", "tokens")


@dataclass(frozen=True)
class Variant:
    """One run of an ablation.

    Args:
        title: Its row in the table.
        scheme: Fields of the scheme that are others while it trains.
        recipe: Parts of the recipe that are others.
    """

    title: str
    scheme: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def variant(name: str, recipe: AnalogRecipe, corpus: str | None = None) -> Variant | str:
    """The run without (or, where the recipe goes without, with) one ingredient.

    Args:
        name: One of ``INGREDIENTS``: training ``noise``, ``clipping`` of weights, the ``adc`` in
            training, learned input ``ranges``, ``distillation`` (against cross-entropy on the same
            tokens), own ``tokens`` (against ``corpus``).
        recipe: What is varied.
        corpus: A file, directory or hub id of text, for ``tokens``.

    Returns:
        The run; or, where the recipe gives no room for it, a sentence that says why.

    Raises:
        AnalogError: There is no such ingredient.
    """
    scheme = resolve_scheme(recipe.scheme)
    if name == "noise":
        if scheme.weight_noise > 0:
            return Variant("without training noise", {"weight_noise": 0.0})
        return Variant("with 3 % training noise", {"weight_noise": 0.03})
    if name == "clipping":
        if scheme.clip_sigma is not None:
            return Variant("without clipping", {"clip_sigma": None})
        return Variant("with clipping at 2.5 σ", {"clip_sigma": 2.5})
    if name == "adc":
        if scheme.output_bits is None:
            return "The scheme has no ADC that training could do without."
        return Variant("trained without the ADC", {"output_bits": None})
    if name == "ranges":
        if scheme.input_range != "learned":
            return "The scheme's input ranges are not learned."
        return Variant("ranges as calibrated", {"input_range": "static"})
    if name == "distillation":
        if recipe.distillation.cross_entropy == 1:
            return "The recipe's loss is the cross-entropy already."
        loss = recipe.distillation.model_copy(update={"cross_entropy": 1.0})
        return Variant("cross-entropy instead of distillation", recipe={"distillation": loss})
    if name == "tokens":
        if corpus is None:
            return "Own tokens are compared with a text, and no corpus was given."
        data = recipe.data.model_copy(update={"source": corpus})
        return Variant(f"text of {Path(corpus).name} instead of own tokens", recipe={"data": data})
    raise AnalogError(f"There is no ingredient {name!r}; write one of {', '.join(INGREDIENTS)}.")


def ablate(
    model: nn.Module,
    recipe: AnalogRecipe | Mapping[str, Any],
    output: str | Path,
    *,
    tokenizer: Any,
    ingredients: Sequence[str] | None = None,
    corpus: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, NoiseReport]:
    """Train once as the recipe says and once a changed ingredient, and measure all alike.

    Every finished run is kept in ``output`` and not repeated by a later call.

    Args:
        model: A digital causal language model; it is not changed.
        recipe: The settings, with ``training`` and ``evaluation``.
        output: Directory of ``runs.jsonl``.
        tokenizer: The model's.
        ingredients: Of ``INGREDIENTS``; None: all that the recipe has room for.
        corpus: Text to train on instead of own tokens, for ``"tokens"``.
        settings: Further values that must be equal for runs to be used again.
        overwrite: Forget what ``output`` holds.

    Returns:
        Reports by row: the recipe's own, the start, and one an ingredient.

    Raises:
        AnalogError: The recipe does not train or measure, an ingredient is unknown or has no room
            in it, or ``output`` holds runs of other settings.
    """
    recipe = AnalogRecipe.parse(recipe)
    if recipe.training is None or recipe.evaluation is None:
        raise AnalogError("An ablation trains and measures; the recipe needs both sections.")
    runs = [Variant(WHOLE), Variant(UNTRAINED), *_variants(recipe, ingredients, corpus)]
    own = {"recipe": recipe.model_dump(mode="json"), "corpus": corpus} | dict(settings or {})
    file = RecordFile(
        Path(output) / RUNS,
        own,
        lambda r: (r["run"], NoiseReport.from_dict(r["report"])),
        overwrite,
    )
    found = {r["run"]: NoiseReport.from_dict(r["report"]) for r in file.records}
    missing = [run for run in runs if run.title not in found]
    if missing:
        tokens = evaluation_rows(model, recipe, tokenizer)
        assert tokens is not None
        # Before the long work: a text that cannot be read ends it here.
        changed = {
            run.title: AnalogRecipe.parse(dict(recipe) | dict(run.recipe)) for run in missing
        }
        rows = {
            title: training_rows(model, each, tokenizer, None) for title, each in changed.items()
        }
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        start = copy.deepcopy(model)
        prepare = recipe.model_copy(update={"evaluation": None})
        train_analog(start, prepare, tokenizer=tokenizer, train=False)
        prefix = installed_prefix(start)
        if prefix is not None:
            install_prefix(teacher, prefix)
        reference = Reference.of(teacher, tokens, recipe.evaluation.batch_size)
        for run in missing:
            print(f"Run {runs.index(run) + 1} of {len(runs)}: {run.title}")
            student = copy.deepcopy(start)
            if run.title != UNTRAINED:
                with scheme_changed(student, run.scheme):
                    run_training(student, teacher, rows[run.title], changed[run.title])
            found[run.title] = evaluate_noise(
                student.eval(),
                tokens,
                (None, *recipe.evaluation.noise),
                recipe.evaluation.seeds,
                reference=reference,
                batch_size=recipe.evaluation.batch_size,
                label=run.title,
            )
            file.add({"run": run.title, "report": found[run.title].to_dict()})
    return {run.title: found[run.title] for run in runs}


def _read(record: Mapping[str, Any]) -> tuple[str, NoiseReport]:
    return str(record["run"]), NoiseReport.from_dict(record["report"])


def _variants(
    recipe: AnalogRecipe, ingredients: Sequence[str] | None, corpus: str | None
) -> list[Variant]:
    """The runs asked for; without a choice, those that the recipe gives room for."""
    made = [variant(name, recipe, corpus) for name in ingredients or INGREDIENTS]
    refused = [reason for reason in made if isinstance(reason, str)]
    if ingredients and refused:
        raise AnalogError(f"{refused[0]} Leave this ingredient out.")
    found = [run for run in made if isinstance(run, Variant)]
    return list({run.title: run for run in found}.values())
