"""What hardware-aware training adds to each optimizer step, for any transformers Trainer."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from analog_plugin.errors import AnalogError
from analog_plugin.layers import ForwardState, analog_layers, forward_state
from analog_plugin.ops.clip import clip_all, peak_to_sigma
from analog_plugin.ops.shards import is_sharded, local_part
from analog_plugin.processes import all_reduce
from analog_plugin.training.range_steps import RangeSteps, forget_counts
from analog_plugin.training.zero import ZeroTwo

logger = logging.getLogger(__name__)


_SETTINGS = ("seed", "max_skipped", "noise_per", "keep_noise")
#: What a resumed run goes on with.
_CARRIED = ("skipped_steps", "skipped_in_a_row", "clip_start")


class TrainingDiverged(AnalogError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class AnalogCallback(TrainerCallback, ExportableState):
    """Keys the noise, applies range decay and clipping, and skips steps that are not finite.

    Works with any ``transformers.Trainer`` (TRL's too) over a model from ``convert_to_analog``:
    ``Trainer(..., callbacks=[AnalogCallback()])``.

    Per optimizer step: the noise is keyed by (seed, layer, step, micro-batch); the ranges' decay
    is added once, from clip counts over all micro-batches and processes; the optimizer's update of
    a range is taken relative to the range (Adam cancels the factor λ in its gradient) and kept
    positive; weights are clipped.

    Args:
        seed: Seed of the noise; None: the Trainer's ``args.seed``.
        max_skipped: Consecutive skipped steps that end the run.
        noise_per: ``"forward"``: every micro-batch meets noise of its own, as in the paper.
            ``"step"``: all micro-batches of an optimizer step meet the same noisy weights, which
            are made once: the noise costs less by the number of micro-batches, and their gradients
            no longer average it out.
        keep_noise: False: each backward draws its noise again instead of keeping noisy weights for
            it: a copy of the analog weights less in memory, one draw more in time. The gradients
            are the same.

    Attributes:
        skipped_steps: Steps skipped so far because the loss or a gradient was not finite.
        skipped_in_a_row: How many of them are the latest steps.
        clip_start: Where the annealed clip of each layer began; see :func:`clip_alpha`.
        zero: DeepSpeed's engine, where :class:`~analog_plugin.training.trainer.AnalogTrainer`
            trains by it.
    """

    def __init__(
        self,
        seed: int | None = None,
        max_skipped: int = 10,
        noise_per: str = "forward",
        keep_noise: bool = True,
    ) -> None:
        ForwardState().noise_per = noise_per  # refuses what it does not know
        self.seed, self.max_skipped = seed, max_skipped
        self.noise_per, self.keep_noise = noise_per, keep_noise
        self.skipped_steps = self.skipped_in_a_row = 0
        self.clip_start: dict[str, float] = {}
        self.zero: ZeroTwo | None = None
        self._skip = False
        self._ranges = RangeSteps()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves with its checkpoints and restores on resume."""
        return {
            "args": {name: getattr(self, name) for name in _SETTINGS},
            "attributes": {name: getattr(self, name) for name in _CARRIED},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed the noise, and begin or go on: counts, and from where an annealed clip starts."""
        if self.zero is None:
            refuse_deepspeed(args)
        model = kwargs["model"]
        self._begin(state)
        shared = forward_state(model)
        shared.seed = args.seed if self.seed is None else self.seed
        shared.noise_per, shared.keep_noise = self.noise_per, self.keep_noise
        for name, layer in analog_layers(model):
            if is_sharded(layer.input_range):
                raise AnalogError(
                    "FSDP sharded the input ranges; before training call "
                    "keep_ranges_whole(trainer.accelerator.state.fsdp_plugin, model) from "
                    "analog_plugin.training.sharded, or use AnalogTrainer, which does."
                )
            layer.clip_counts.zero_()
            if layer.scheme.clip_schedule == "anneal" and name not in self.clip_start:
                self.clip_start[name] = peak_to_sigma(layer.tile_weight)

    def _begin(self, state: Any) -> None:
        """Go on as the checkpoint says, whether or not the Trainer restores callbacks."""
        self.skipped_steps = self.skipped_in_a_row = 0
        self.clip_start = {}
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            for name in _CARRIED:
                setattr(self, name, saved["attributes"].get(name, getattr(self, name)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on noise is drawn anew, not keyed by the last step."""
        forward_state(kwargs["model"]).seed = None
        self._forget_step_weights(kwargs["model"])
        if self.zero is not None:
            self.zero.release()
            self.zero = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Key the noise of the step's first micro-batch."""
        shared: ForwardState = forward_state(kwargs["model"])
        shared.step, shared.micro_batch = state.global_step, args.process_index
        self._skip = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Key the noise of the next micro-batch: indices run over all processes."""
        forward_state(kwargs["model"]).micro_batch += args.world_size

    def skip_step(self) -> None:
        """Let the running optimizer step change nothing (its loss is not finite)."""
        self._skip = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip a step that is not finite; else add the ranges' decay to their gradients."""
        model = kwargs["model"]
        self._forget_step_weights(model)  # the optimizer writes other ones
        self._skip = self._skip_anywhere(model, args.device)
        if self._skip:
            if self.zero is not None:
                self.zero.skip()
            self._count_skipped(state.global_step)
            for parameter in model.parameters():
                parameter.grad = None
            forget_counts([layer.clip_counts for _, layer in analog_layers(model)])
            return
        self.skipped_in_a_row = 0
        layers = [layer for _, layer in analog_layers(model)]
        self._ranges.begin(layers, args.world_size, whole=self.zero is not None)

    def _forget_step_weights(self, model: nn.Module) -> None:
        for _, layer in analog_layers(model):
            layer.forget_step_weight()

    def _skip_anywhere(self, model: nn.Module, device: torch.device) -> bool:
        """Whether the step is not finite in any process: all skip it, or they would part."""
        skip = self._skip or not _finite_gradients(model)
        if self.zero is not None:
            skip |= not math.isfinite(self.zero.gradient_norm())
        return bool(all_reduce(torch.tensor(float(skip), device=device)) > 0)

    def _count_skipped(self, step: int) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingDiverged(
                f"Training stopped at step {step}: the loss or a gradient was not finite in "
                f"{self.skipped_in_a_row} steps in a row; write a smaller learning_rate or "
                "weight_noise, or train in bf16 instead of fp16."
            )
        logger.warning(
            "Step %d was skipped: its loss or a gradient is not finite (%d skipped so far).",
            step,
            self.skipped_steps,
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the ranges' update relative to them, and clip the weights."""
        if self._skip:
            return
        self._ranges.end()
        done = (state.global_step + 1) / max(state.max_steps, 1)
        clipped: dict[float, list[Tensor]] = {}
        for name, layer in analog_layers(kwargs["model"]):
            alpha = clip_alpha(layer.scheme, self.clip_start.get(name), done)
            if alpha is not None and self.zero is not None:
                self.zero.clip(layer.weight, layer.tile_weight, alpha)
            elif alpha is not None:
                clipped.setdefault(alpha, []).append(layer.tile_weight)
        for alpha, weights in clipped.items():
            clip_all(weights, alpha)


def refuse_deepspeed(args: Any) -> None:
    """Refuse a trainer that takes its step where nothing can be added to it.

    Raises:
        AnalogError: ``args`` name DeepSpeed.
    """
    kind = getattr(getattr(args, "distributed_state", None), "distributed_type", "")
    if getattr(args, "deepspeed", None) or "DEEPSPEED" in str(kind):
        raise AnalogError(
            "Under DeepSpeed a Trainer takes its optimizer step within the backward, where "
            "AnalogCallback cannot add to it; train by AnalogTrainer, or shard by FSDP2 instead "
            "(accelerate launch with fsdp_version: 2)."
        )


def clip_alpha(scheme: Any, start: float | None, done: float) -> float | None:
    """α after a share ``done`` of the training; None: no clipping.

    ``"anneal"`` runs geometrically from ``start``, where nothing is clipped, to ``clip_sigma``.
    """
    target = scheme.clip_sigma
    if target is None or scheme.clip_schedule == "constant" or start is None or start <= target:
        return target
    share = min(done / scheme.clip_anneal_share, 1.0)
    return start ** (1 - share) * target**share


def _finite_gradients(model: nn.Module) -> bool:
    grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    return not grads or bool(torch.nn.utils.get_total_norm(grads).isfinite())
