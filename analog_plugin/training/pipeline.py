"""The main job: from a digital model to a trained analog one and the table that judges it."""

from __future__ import annotations

import contextlib
import copy
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.data import evaluation_tokens, generate_dataset, load_tokens
from analog_plugin.data.generate import check_sequence_length
from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.fidelity import Reference
from analog_plugin.evaluation.noise import NoiseReport, evaluate_noise
from analog_plugin.layers import analog_layers, convert_to_analog, forward_state
from analog_plugin.presets import resolve_scheme
from analog_plugin.recipe import AnalogRecipe, split_training
from analog_plugin.training.ranges import calibrate_ranges
from analog_plugin.training.trainer import AnalogTrainer


@dataclass
class AnalogResult:
    """What :func:`train_analog` made.

    Attributes:
        model: The analog model, in evaluation mode.
        recipe: The settings in force.
        reports: Measurements by name: ``"original, digital"`` (converters off; under noise: the
            noise alone), ``"original"`` (calibrated, untrained), ``"analog-trained"``.
        training: Steps, tokens, seeds, times in seconds, package versions, loss history.
    """

    model: nn.Module
    recipe: AnalogRecipe
    reports: dict[str, NoiseReport] = field(default_factory=dict)
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
        AnalogError: A setting does not fit the model or the data.
    """
    if not isinstance(recipe, AnalogRecipe):
        recipe = AnalogRecipe.parse(recipe)
    scheme = resolve_scheme(recipe.scheme)
    own, arguments = split_training(recipe.training)
    times: dict[str, float] = {}

    # All that can be refused is refused before the long work begins.
    check_sequence_length(model, recipe.data.sequence_length)
    tokens = reference = None
    if recipe.evaluation is not None:
        if tokenizer is None:
            raise AnalogError(
                "The evaluation needs a tokenizer; give tokenizer=, or write evaluation: null."
            )
        check_sequence_length(model, recipe.evaluation.length)
        tokens = evaluation_tokens(
            tokenizer, recipe.evaluation.blocks, recipe.evaluation.length, recipe.evaluation.corpus
        )
    # The teacher keeps the original weights; it is never saved.
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    convert_to_analog(model, scheme, recipe.ignore, recipe.targets)
    result = AnalogResult(model, recipe)
    train = train and recipe.training is not None
    with _timed(times, "data"):
        rows = _training_tokens(teacher, recipe, tokenizer, dataset)
    if not (train and tokens is None and scheme.range_init_in_training):
        with _timed(times, "calibration"):
            size = int(arguments.get("per_device_train_batch_size", 8))
            batches = rows.split(size)[: scheme.range_init_batches]
            device = next(model.parameters()).device
            calibrate_ranges(model, ({"input_ids": b.to(device)} for b in batches), len(batches))

    def measure(name: str, **options: Any) -> None:
        settings = recipe.evaluation
        if settings is None or tokens is None:
            return
        result.reports[name] = evaluate_noise(
            model,
            tokens,
            (None, *settings.noise),
            settings.seeds,
            reference=reference,
            batch_size=settings.batch_size,
            label=name,
            **options,
        )

    with _timed(times, "evaluation"):
        if tokens is not None:
            size = recipe.evaluation.batch_size if recipe.evaluation else 4
            reference = Reference.of(teacher, tokens, size)
        measure("original, digital", converters=False)
        measure("original")
    history: list[dict[str, Any]] = []
    steps = skipped = 0
    if train:
        with _timed(times, "training"):
            history, steps, skipped = _train(model, teacher, rows, recipe, own, arguments)
        with _timed(times, "evaluation"):
            measure("analog-trained")
    model.eval()
    layers = dict(analog_layers(model))
    result.training = {
        "steps": steps,
        "skipped_steps": skipped,
        "tokens": steps * _tokens_per_step(rows, arguments),
        "dataset_tokens": rows.numel(),
        "sequence_length": rows.shape[1],
        "seed": recipe.seed,
        "analog_layers": len(layers),
        "analog_weights": sum(layer.weight.numel() for layer in layers.values()),
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "versions": _versions(),
        "loss_history": history,
    }
    return result


def _training_tokens(
    model: nn.Module, recipe: AnalogRecipe, tokenizer: Any, dataset: Any
) -> Tensor:
    data = recipe.data
    if isinstance(dataset, Tensor):
        if dataset.dim() != 2 or dataset.numel() == 0:
            raise AnalogError(
                f"The dataset has the shape {tuple(dataset.shape)}, but must be token ids "
                "[rows, length] with at least one row."
            )
        check_sequence_length(model, dataset.shape[1])
        return dataset
    source = data.source if dataset is None else dataset
    if isinstance(source, str) and source == "self":
        return generate_dataset(
            model,
            data.tokens,
            data.sequence_length,
            bos_token_id=data.bos_token_id,
            temperature=data.temperature,
            top_k=data.top_k,
            ignore_eos=data.ignore_eos,
            batch_size=data.batch_size,
            seed=data.seed,
        )
    return load_tokens(
        source, tokenizer, data.sequence_length, tokens=data.tokens, text_column=data.text_column
    )


def _train(
    model: nn.Module,
    teacher: nn.Module,
    rows: Tensor,
    recipe: AnalogRecipe,
    own: Any,
    arguments: dict[str, Any],
) -> tuple[list[dict[str, Any]], int, int]:
    """Run the Trainer; the model's flags are afterwards as they were before."""
    from transformers import TrainingArguments

    required = {name: p.requires_grad for name, p in model.named_parameters()}
    analog = {id(p) for _, layer in analog_layers(model) for p in layer.parameters()}
    for parameter in model.parameters():
        wanted = own.trainable == "all" or id(parameter) in analog
        parameter.requires_grad_(wanted and parameter.requires_grad)
    defaults = {
        "report_to": "none",
        "save_strategy": "no",
        "seed": recipe.seed,
        "logging_steps": 10,
        "remove_unused_columns": False,
        "use_cpu": next(model.parameters()).device.type == "cpu",
    }
    examples = [{"input_ids": row} for row in rows]
    with torch.enable_grad(), tempfile.TemporaryDirectory() as scratch:
        try:
            args = TrainingArguments(**{"output_dir": scratch, **defaults, **arguments})
        except (ValueError, TypeError) as error:
            raise AnalogError(f"training: {str(error).splitlines()[0]}") from error
        trainer = AnalogTrainer(
            model,
            teacher=teacher,
            args=args,
            train_dataset=examples,
            noise_seed=recipe.seed,
            range_learning_rate=own.range_learning_rate,
            **recipe.distillation.model_dump(),
        )
        forward = model.__dict__.get("forward")
        try:
            trainer.train()
        finally:
            # Under bf16 Accelerate leaves its wrapper around forward.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if forward is None:
                model.__dict__.pop("forward", None)
            model.eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required[name])
                parameter.grad = None
            forward_state(model).seed = None
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.state.global_step, trainer.analog_callback.skipped_steps


def _tokens_per_step(rows: Tensor, arguments: Mapping[str, Any]) -> int:
    size = int(arguments.get("per_device_train_batch_size", 8))
    return size * int(arguments.get("gradient_accumulation_steps", 1)) * rows.shape[1]


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
