"""The main job: from a digital model to a trained analog one and the table that judges it."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.save import plan_export
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport, evaluate_noise
from analog_plugin.layers import analog_layers, convert_to_analog, to_digital
from analog_plugin.layers.prefix import install_prefix, prefix_tokens, remove_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import resolve_noise
from analog_plugin.plugins import exporters, lookup
from analog_plugin.plugins.types import Exporter
from analog_plugin.presets import resolve_scheme
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.ranges import calibrate_plain_ranges
from analog_plugin.training.run import TrainingRun, rehearse_training, run_training
from analog_plugin.training.start import prepare_start, prepares, published_start
from analog_plugin.training.stored import StoredTeacher
from analog_plugin.training.tokens import calibration_batches, evaluation_rows, training_rows


@dataclass
class AnalogResult:
    """What :func:`train_analog` made.

    Attributes:
        model: The analog model, in evaluation mode.
        recipe: The settings in force.
        reports: Measurements by name: ``"original, digital"`` (converters off; under noise: the
            noise alone), ``"off the shelf"`` (published ranges, nothing else; measured where the
            scheme prepares more), ``"original"`` (prepared, untrained), ``"analog-trained"``, and
            ``"loaded plainly"`` (what loaders without this package make of the deploy profile; of
            several, ``"loaded plainly, <name>"``).
        plans: What each deploy profile writes beside the weights, for ``save_profiles``.
        training: Steps, tokens, seeds, times in seconds, package versions, loss history, and under
            ``start`` what :func:`~analog_plugin.training.start.prepare_start` did.
    """

    model: nn.Module
    recipe: AnalogRecipe
    reports: dict[str, NoiseReport] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def train_analog(
    model: nn.Module,
    recipe: AnalogRecipe | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dataset: Any = None,
    train: bool = True,
) -> AnalogResult:
    """Convert ``model`` in place, calibrate its ranges, train it and measure it.

    Args:
        model: A digital causal language model; it becomes the analog one.
        recipe: The settings, or their mapping.
        tokenizer: Needed to read text and for the default evaluation corpus.
        dataset: Training tokens instead of ``recipe.data.source``: whatever
            :func:`~analog_plugin.data.load_tokens` reads, or token ids [rows, length].
        train: False: calibrate and measure only.

    Raises:
        AnalogError: A setting does not fit the model or the data; the model is digital as before.
    """
    recipe = AnalogRecipe.parse(recipe)
    train = train and recipe.training is not None
    times: dict[str, float] = {}
    result = AnalogResult(model, recipe)
    run = TrainingRun()

    # All that can be refused is refused before the long work begins.
    tokens = evaluation_rows(model, recipe, tokenizer)
    stored = None
    if train:
        loss = recipe.distillation
        if loss.teacher is not None:
            stored = StoredTeacher(loss.teacher)
            stored.check_loss(loss.temperature, loss.top_k, loss.teacher_dtype)
        rehearse_training(model, recipe)
    # The teacher keeps the original weights; it is never saved.
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    scheme = resolve_scheme(recipe.scheme)
    start: dict[str, Any] = {}
    convert_to_analog(model, scheme, recipe.ignore, recipe.targets)
    with _digital_again_on_error(model, teacher):
        for profile in recipe.deploy.profiles:
            exporter = lookup(exporters(), profile, "deploy profile")
            exporter.check(model, **recipe.deploy.options(profile))
        prefix = None
        if scheme.prefix is not None:
            prefix = install_prefix(teacher, prefix_tokens(teacher, scheme.prefix))
        if stored is not None:
            stored.check(teacher)
        remove_prefix(teacher)  # for now: tokens are sampled from the model as it came
        with _timed(times, "data"):
            rows = training_rows(teacher, recipe, tokenizer, dataset)
        if stored is not None:
            stored.dataset(rows)  # refuses other tokens
        batches, held_out = calibration_batches(model, rows, recipe)
        with _timed(times, "evaluation"):
            measure = measure_plain = _Measurement(teacher, result, tokens)
            measure("original, digital", converters=False)
            if tokens is not None and prepares(scheme):
                with published_start(model, batches, held_out):
                    measure("off the shelf")
        if prefix is not None:
            install_prefix(teacher, prefix)
            install_prefix(model, prefix)
            measure = _Measurement(teacher, result, tokens)  # the original has the prefix too
        in_training = train and scheme.range_init_in_training
        if not in_training or tokens is not None or prepares(scheme):
            with _timed(times, "calibration"):
                noise = resolve_noise(recipe.calibration.noise)
                start = prepare_start(model, batches, held_out, noise)
        with _timed(times, "evaluation"):
            measure("original")
    if train:
        source = teacher if stored is None else stored
        if stored is not None:  # what is measured from now on needs but its head
            measure.forget_model()
            measure_plain.forget_model()
        del teacher
        with _timed(times, "training"):
            run = run_training(model, source, rows, recipe)
        with _timed(times, "evaluation"):
            measure("analog-trained")
    model.eval()
    if scheme.prefix is not None:
        with _timed(times, "calibration"):
            calibrate_plain_ranges(model, batches)
    for profile in recipe.deploy.profiles:
        with _timed(times, "export"):
            options = recipe.deploy.options(profile)
            plan = plan_export(model, profile, batches=batches, **options)
            result.plans[profile] = plan
        with _timed(times, "evaluation"):
            measure_plain.reading(lookup(exporters(), profile, "deploy profile"), plan)
    layers = dict(analog_layers(model))
    result.training = {
        "steps": run.steps,
        "skipped_steps": run.skipped_steps,
        "tokens": run.tokens,
        "precision": run.precision,
        "dataset_tokens": rows.numel(),
        "sequence_length": rows.shape[1],
        "seed": recipe.seed,
        "analog_layers": len(layers),
        "analog_weights": sum(layer.weight.numel() for layer in layers.values()),
        "start": start,
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "versions": _versions(),
        "loss_history": run.history,
    }
    return result


class _Measurement:
    """Puts reports into a result: the model against its teacher, as the recipe asks."""

    def __init__(self, teacher: nn.Module, result: AnalogResult, tokens: Tensor | None) -> None:
        self.settings, self.result, self.tokens = result.recipe.evaluation, result, tokens
        if self.settings is not None and tokens is not None:
            self.reference = Reference.of(teacher, tokens, self.settings.batch_size)

    def forget_model(self) -> None:
        """Keep nothing of the teacher but its head and what it made of the tokens."""
        if self.settings is not None and self.tokens is not None:
            self.reference.states = self.reference.states.head_alone()

    def __call__(self, name: str, **options: Any) -> None:
        if self.settings is None or self.tokens is None:
            return
        self.result.reports[name] = evaluate_noise(
            self.result.model,
            self.tokens,
            (None, *self.settings.noise),
            self.settings.seeds,
            reference=self.reference,
            batch_size=self.settings.batch_size,
            label=name,
            **options,
        )

    def reading(self, exporter: Exporter, plan: Any) -> None:
        """Measure what loaders without this package will make of the profile."""
        if self.settings is None or self.tokens is None or exporter.reading is None:
            return
        model, size = self.result.model, self.settings.batch_size
        try:
            with exporter.reading(model, plan), evaluation_mode(model):
                metrics = dict(fidelity(model, self.tokens, self.reference, size))
        except torch.OutOfMemoryError:  # rounded weights stand beside the others; training is done
            return
        several = len(self.result.recipe.deploy.profiles) > 1
        name = f"loaded plainly, {exporter.name}" if several else "loaded plainly"
        self.result.reports[name] = NoiseReport([NoiseCell("none", None, metrics)])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "analog-plugin",
        "torch",
        "transformers",
        "compressed-tensors",
        "llmcompressor",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextlib.contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent in the block to ``times[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        times[name] = times.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def _digital_again_on_error(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """What fails in the block leaves ``model`` as it was before its conversion."""
    try:
        yield
    except BaseException:
        remove_prefix(model)
        to_digital(model)
        with torch.no_grad():  # rescaling may have been folded in
            for parameter, kept in zip(model.parameters(), original.parameters(), strict=True):
                parameter.copy_(kept)
        raise
