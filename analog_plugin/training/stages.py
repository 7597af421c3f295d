"""The stages of one run: before the first step, the training, and after the last."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analog_plugin import processes
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.data.shards.rows import ShardRows, TokenRows
from analog_plugin.evaluation.noise import NoiseReport
from analog_plugin.layers import analog_layers, convert_to_analog, model_scheme, to_digital
from analog_plugin.layers.prefix import (
    Prefix,
    install_prefix,
    installed_prefix,
    prefix_tokens,
    remove_prefix,
)
from analog_plugin.noise import resolve_noise
from analog_plugin.plugins import exporters, lookup
from analog_plugin.presets import resolve_scheme
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.kept import START, TRAINED, AnotherRun, KeptRun, become
from analog_plugin.training.measurement import Measurement, plain_reports
from analog_plugin.training.ranges import calibrate_plain_ranges
from analog_plugin.training.record import Record
from analog_plugin.training.run import TrainingRun, rehearse_training, run_training
from analog_plugin.training.signals import Termination
from analog_plugin.training.start import prepare_start, prepares, published_start
from analog_plugin.training.stored import StoredTeacher, token_digest
from analog_plugin.training.tokens import calibration_batches, evaluation_rows, training_rows


@dataclass
class AnalogResult:
    """What :func:`~analog_plugin.training.pipeline.train_analog` made.

    Attributes:
        model: The analog model, in evaluation mode: the one given, but where FSDP sharded that.
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


class Stages:
    """One run of :func:`~analog_plugin.training.pipeline.train_analog`, into its result."""

    def __init__(
        self,
        model: nn.Module,
        recipe: AnalogRecipe,
        tokenizer: Any,
        dataset: Any,
        train: bool,
        kept: KeptRun | None,
        termination: Termination,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.tokenizer, self.dataset, self.train = tokenizer, dataset, train
        self.kept, self.termination = kept, termination
        self.times: dict[str, float] = {}
        self.result = AnalogResult(model, recipe)
        self.start: dict[str, Any] = {}
        self.done: TrainingRun | None = None
        self.restored = False  # the trained model, not only the start

    def run(self) -> AnalogResult:
        """Go through all of them."""
        recipe, train = self.recipe, self.train
        # All that can be refused is refused before the long work begins.
        self.tokens = processes.by_first(
            lambda: evaluation_rows(self.model, recipe, self.tokenizer)
        )
        self.stored = None
        if train:
            loss = recipe.distillation
            if loss.teacher is not None:
                self.stored = StoredTeacher(loss.teacher)
                self.stored.check_loss(loss.temperature, loss.top_k, loss.teacher_dtype)
            rehearse_training(self.model, recipe, self.kept is not None)
        if self.kept is not None:
            processes.by_first(self.kept.open)
        # The teacher keeps the original weights; it is never saved.
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.scheme = resolve_scheme(recipe.scheme)
        with _digital_again_on_error(self.model, self.teacher):
            shared = processes.by_first(self._prepare)
            if processes.process_rank() > 0:
                self._follow(*shared)
            processes.share_model(self.model)
        if train and self.done is None:
            source = self.teacher if self.stored is None else self.stored
            if self.stored is not None:  # what is measured from now on needs but its head
                self.measure.forget_model()
                self.measure_plain.forget_model()
            del self.teacher
            with self._timed("training"):
                self.done, self.model = run_training(
                    self.model, source, self.rows, recipe, self.kept, self.termination
                )
            self.result.model = self.model
        processes.by_first(self._finish)
        return self.result

    def _prepare(self) -> tuple[Any, ...]:
        """All before the first step, or what was kept of it; returns what other processes need."""
        model, recipe, scheme, teacher = self.model, self.recipe, self.scheme, self.teacher
        state = None if self.kept is None else self.kept.state()
        if state is None:
            convert_to_analog(model, scheme, recipe.ignore, recipe.targets)
            for profile in recipe.deploy.profiles:
                exporter = lookup(exporters(), profile, "deploy profile")
                exporter.check(model, **recipe.deploy.options(profile))
        prefix = None
        if scheme.prefix is not None:
            prefix = install_prefix(teacher, prefix_tokens(teacher, scheme.prefix))
        if self.stored is not None:
            self.stored.check(teacher)
        remove_prefix(teacher)  # for now: tokens are sampled from the model as it came
        with self._timed("data"):
            self.rows = training_rows(teacher, recipe, self.tokenizer, self.dataset)
        if self.stored is not None:
            self.stored.dataset(self.rows)  # refuses other tokens
        if state is not None:
            assert self.kept is not None
            self._restore(self.kept, *state)
        self.batches, held_out = calibration_batches(model, self.rows, recipe)
        reports = self.result.reports
        with self._timed("evaluation"):
            measure = measure_plain = Measurement(teacher, recipe, self.tokens, reports)
            if state is None:
                measure("original, digital", model, converters=False)
                if self.tokens is not None and prepares(scheme):
                    with published_start(model, self.batches, held_out):
                        measure("off the shelf", model)
        if prefix is not None:
            install_prefix(teacher, prefix)
            if state is None:
                install_prefix(model, prefix)
            # The original has the prefix too.
            measure = Measurement(teacher, recipe, self.tokens, reports)
        self.measure, self.measure_plain = measure, measure_plain
        if state is None:
            in_training = self.train and scheme.range_init_in_training
            if not in_training or self.tokens is not None or prepares(scheme):
                with self._timed("calibration"):
                    noise = resolve_noise(recipe.calibration.noise)
                    self.start = prepare_start(model, self.batches, held_out, noise)
            with self._timed("evaluation"):
                measure("original", model)
            self._keep(START)
        return (
            self.rows,
            model_scheme(model).to_dict(),
            _portable(prefix),
            _portable(installed_prefix(model)),
            self.done,
        )

    def _follow(self, rows: TokenRows, scheme: Any, prefix: Any, own: Any, done: Any) -> None:
        """Take over in another process what the first prepared, but for the weights."""
        self.rows, self.done = rows, done
        become(self.model, scheme, own, self.recipe)
        if prefix is not None:
            install_prefix(self.teacher, prefix)
        self.measure = self.measure_plain = Measurement(self.teacher, self.recipe, None, {})

    def _finish(self) -> None:
        """All after the last step."""
        model, recipe, result = self.model, self.recipe, self.result
        if self.done is not None and self.train:
            if not self.restored:
                self._keep(TRAINED)
            with self._timed("evaluation"):
                self.measure("analog-trained", model)
        model.eval()
        if self.scheme.prefix is not None:
            with self._timed("calibration"):
                calibrate_plain_ranges(model, self.batches)
        for profile in recipe.deploy.profiles:
            with self._timed("export"):
                options = recipe.deploy.options(profile)
                plan = plan_export(model, profile, batches=self.batches, **options)
                result.plans[profile] = plan
            with self._timed("evaluation"):
                exporter = lookup(exporters(), profile, "deploy profile")
                self.measure_plain.reading(model, exporter, plan)
        layers = dict(analog_layers(model))
        run = TrainingRun() if self.done is None else self.done
        result.training = {
            "steps": run.steps,
            "skipped_steps": run.skipped_steps,
            "tokens": run.tokens,
            "precision": run.precision,
            "dataset_tokens": self.rows.numel(),
            "sequence_length": self.rows.shape[1],
            "seed": recipe.seed,
            "processes": processes.process_count(),
            "analog_layers": len(layers),
            "analog_weights": sum(layer.weight.numel() for layer in layers.values()),
            "start": self.start,
            "seconds": {name: round(value, 1) for name, value in self.times.items()},
            "versions": _versions(),
            "loss_history": run.history,
        }

    def _keep(self, name: str) -> None:
        if self.kept is None:
            return
        record = {
            "tokens": _hash(self.rows),
            "start": self.start,
            "reports": plain_reports(self.result.reports),
            "seconds": self.times,
            "run": None if self.done is None else asdict(self.done),
        }
        self.kept.save_state(name, self.model, record)

    def _restore(self, kept: KeptRun, place: Path, record: Record) -> None:
        if record.tokens != _hash(self.rows):
            raise AnotherRun(
                f"{kept.directory} is another run: it began with other training tokens; resume "
                "with those, or delete it and begin anew."
            )
        kept.restore(self.model, place, self.recipe)
        print(f"Resumed what {place} holds.")
        self.start, self.times = dict(record.start), dict(record.seconds)
        reports = self.result.reports
        reports |= {name: NoiseReport.from_dict(r) for name, r in record.reports.items()}
        if record.run is not None:
            self.done, self.restored = TrainingRun(**record.run), True

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the block to ``times[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start


def _hash(rows: TokenRows) -> str:
    """Of shards without reading them."""
    return rows.sha256 if isinstance(rows, ShardRows) else token_digest(rows)


def _portable(prefix: Prefix | None) -> Prefix | None:
    """On the CPU: another process would unpickle it onto this one's GPU."""
    if prefix is None:
        return None
    return Prefix.from_tensors({name: t.cpu() for name, t in prefix.to_tensors().items()})


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
def _digital_again_on_error(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """What fails in the block leaves ``model`` as it was before its conversion."""
    try:
        yield
    except BaseException:
        remove_prefix(model)
        if any(analog_layers(model)):
            to_digital(model)
        with torch.no_grad():  # rescaling may have been folded in
            for parameter, kept in zip(model.parameters(), original.parameters(), strict=True):
                parameter.copy_(kept)
        raise
