"""The Trainer's part of the pipeline: a rehearsal that refuses wrong arguments, and the run."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from analog_plugin.data.shards.rows import TokenRows
from analog_plugin.errors import AnalogError, one_line
from analog_plugin.layers import analog_layers, forward_state
from analog_plugin.modes import evaluation_mode
from analog_plugin.processes import by_first, process_rank
from analog_plugin.recipe import AnalogRecipe, split_training
from analog_plugin.training.kept import KeptRun
from analog_plugin.training.sharded import Skeleton, check_plugin
from analog_plugin.training.signals import (
    KeptInterrupts,
    StopsOnRequest,
    Termination,
    TrainingStopped,
)
from analog_plugin.training.stored import StoredTeacher
from analog_plugin.training.tokens import TrainingTokens
from analog_plugin.training.trainer import AnalogTrainer
from analog_plugin.training.zero import check_zero

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """What a run did.

    Attributes:
        steps, skipped_steps: Optimizer steps, and those of them whose loss was not finite.
        tokens: Tokens trained on, a token counted each time.
        precision: Type that the matrix products were computed in.
        history: The Trainer's log entries that hold a loss.
    """

    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    precision: str = "float32"
    history: list[dict[str, Any]] = field(default_factory=list)


def rehearse_training(model: Any, recipe: AnalogRecipe, saves: bool = False) -> None:
    """Begin the training on rows of two tokens, and stop before a step changes anything.

    Args:
        model: The digital model; it is not changed.
        recipe: Its ``training`` is looked at.
        saves: Whether training checkpoints will be written.

    Raises:
        AnalogError: The recipe's training does not run.
    """
    from transformers import Trainer

    tokens = torch.zeros(2, dtype=torch.long)
    with (
        _kept(model),
        evaluation_mode(model),
        torch.enable_grad(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        try:
            args = _arguments(model, recipe, scratch, saves)
            if args.bf16 and not computes_bf16(next(model.parameters()).device):
                logger.warning(
                    "This processor has no bfloat16 arithmetic and emulates it, many times more "
                    "slowly than float32; write bf16: auto for bfloat16 only where it is at home."
                )
            # The first takes minutes, the others leave hooks where training stops halfway.
            args.torch_compile, args.neftune_noise_alpha, args.debug = False, None, []
            rows = [{"input_ids": tokens, "labels": tokens}] * args.train_batch_size
            trainer = Trainer(model, args=args, train_dataset=rows)
            if saves and args.save_only_model:
                raise AnalogError(
                    "training: save_only_model keeps no optimizer, so nothing could be resumed; "
                    'leave it out, or write save_strategy: "no".'
                )
            if trainer.is_fsdp_enabled:
                check_plugin(trainer.accelerator.state.fsdp_plugin, saves)
                return  # beginning would shard the model
            if trainer.is_deepspeed_enabled:
                plugin = trainer.accelerator.state.deepspeed_plugin
                check_zero(plugin.deepspeed_config, saves)
                # Refuses what the two configurations say differently.
                plugin.hf_ds_config.trainer_config_finalize(args, model, 1)
                return
            # Instead of those that would open a run in a logging service.
            trainer.callback_handler.callbacks = [_StopBeforeStep()]
            with contextlib.suppress(_Rehearsed):
                trainer.train()
        except AnalogError:
            raise
        # Optimizers, schedulers, loaders and loggers of many packages raise whatever they like.
        except Exception as error:
            raise AnalogError(f"training: {one_line(error)}") from error
        finally:
            model.zero_grad()


class _Rehearsed(Exception):
    """All that a step needs has been there."""


class _StopBeforeStep(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _Rehearsed


def run_training(
    model: Any,
    teacher: Any,
    rows: TokenRows,
    recipe: AnalogRecipe,
    kept: KeptRun | None = None,
    termination: Termination | None = None,
) -> tuple[TrainingRun, Any]:
    """Train the analog ``model`` on ``rows``; all but its weights is afterwards as before.

    Args:
        model: The analog student; afterwards in evaluation mode.
        teacher: The digital original, or what is stored of it for these rows.
        rows: Token ids [rows, length].
        recipe: The settings.
        kept: Where training checkpoints go, and from where training goes on; None: nowhere.
        termination: Ends the training after a step, once it is requested.

    Returns:
        What was done, and the trained model: ``model`` itself, but where FSDP sharded it another
        one, whole, in the first process.

    Raises:
        AnalogError: Training diverged, has no whole batch, or a checkpoint could not be written.
        TrainingStopped: SIGTERM came; there is a checkpoint of the last step.
    """
    own, _ = split_training(recipe.training)
    with _kept(model), torch.enable_grad(), tempfile.TemporaryDirectory() as scratch:
        args = _arguments(model, recipe, scratch, saves=kept is not None)
        if args.dataloader_drop_last and len(rows) < args.train_batch_size * args.world_size:
            raise AnalogError(
                f"training: dataloader_drop_last leaves no batch of {args.train_batch_size} from "
                f"{len(rows)} rows; write dataloader_drop_last: false."
            )
        if own.trainable == "analog":
            analog = {id(p) for _, layer in analog_layers(model) for p in layer.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in analog and parameter.requires_grad)
        trainer = _KeepingTrainer(
            model,
            teacher=teacher,
            args=args,
            train_dataset=teacher.dataset(rows)
            if isinstance(teacher, StoredTeacher)
            else TrainingTokens(rows),
            noise_seed=recipe.seed,
            range_learning_rate=own.range_learning_rate,
            noise_per=own.noise_per,
            keep_noise=own.keep_noise,
            **recipe.distillation.model_dump(exclude={"teacher"}),
        )
        trainer.kept = kept
        skeleton = Skeleton(model) if trainer.is_fsdp_enabled else None
        termination = Termination() if termination is None else termination
        interrupts, stops = KeptInterrupts(), StopsOnRequest(termination)
        trainer.add_callback(interrupts)
        if kept is not None:
            trainer.add_callback(stops)
        checkpoint = None if kept is None else by_first(kept.latest_checkpoint)
        if checkpoint is not None and process_rank() == 0:
            print(f"Training goes on from {checkpoint}.")
        try:
            with interrupts.kept(), termination.deferred():
                trainer.train(None if checkpoint is None else str(checkpoint))
        finally:
            model.eval()
            model.zero_grad()
            forward_state(model).seed = None
    if stops.stopped:
        raise TrainingStopped(
            f"The training was stopped by SIGTERM after step {trainer.state.global_step}, and "
            "goes on from there with --resume (resume=True)."
        )
    run = TrainingRun(
        trainer.state.global_step,
        trainer.analog_callback.skipped_steps,
        trainer.state.num_input_tokens_seen,
        _precision(model, args),
        [entry for entry in trainer.state.log_history if "loss" in entry],
    )
    return run, model if skeleton is None else skeleton.filled(model)


class _KeepingTrainer(AnalogTrainer):
    """Puts its checkpoints into a :class:`KeptRun`, whole or not at all."""

    kept: KeptRun | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # After the last step the trained weights are kept, without the optimizer.
        if self.kept is None or self.state.global_step >= self.state.max_steps:
            return
        usual = self.args.output_dir

        def write(place: Path) -> None:
            self.args.output_dir = str(place)
            super(_KeepingTrainer, self)._save_checkpoint(model, trial)

        try:
            self.kept.save_checkpoint(self.state.global_step, write)
        finally:
            self.args.output_dir = usual


def _arguments(model: Any, recipe: AnalogRecipe, scratch: str, saves: bool = False) -> Any:
    from transformers import TrainingArguments

    _, given = split_training(recipe.training)
    device = next(model.parameters()).device
    if given.get("bf16") == "auto":
        given["bf16"] = computes_bf16(device)
    defaults = {
        "report_to": "none",
        "ddp_find_unused_parameters": False,
        "save_total_limit": 2,
        "seed": recipe.seed,
        "logging_steps": 10,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
    }
    # The record of the training tells the tokens.
    fixed = {"output_dir": scratch, "include_num_input_tokens_seen": "all"}
    if not saves:
        fixed["save_strategy"] = "no"
    args = TrainingArguments(**(defaults | given | fixed))
    if args.device.type == "cpu" and args.device.index is not None:
        # What several processes on CPUs are given; torch.load knows no cpu:0.
        vars(args)["_setup_devices"] = torch.device("cpu")
    return args


def computes_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on ``device`` as such; elsewhere they are emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _precision(model: Any, args: Any) -> str:
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@contextlib.contextmanager
def _kept(model: Any) -> Iterator[None]:
    """What the Trainer changes of a model beside its weights is afterwards as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = dict(vars(model.config))
    checkpointing = model.is_gradient_checkpointing
    # Under bf16 Accelerate leaves its wrapper around forward.
    wrapped = {name: vars(model).get(name) for name in ("forward", "_original_forward")}
    try:
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        vars(model.config).clear()
        vars(model.config).update(config)
        if model.is_gradient_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        for name, value in wrapped.items():
            vars(model).pop(name, None)
            if value is not None:
                vars(model)[name] = value
