"""A transformers Trainer that distills an analog model from its digital original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from analog_plugin.errors import AnalogError
from analog_plugin.layers import analog_layers, forward_state
from analog_plugin.training.callback import AnalogCallback
from analog_plugin.training.hidden import HiddenStates
from analog_plugin.training.loss import distillation_loss


class AnalogTrainer(Trainer):
    """Train a model from ``convert_to_analog`` to match its full-precision self.

    Args:
        model: The analog student.
        teacher: The digital original; frozen here, moved to the student's device.
        temperature, cross_entropy, chunk: See
            :func:`~analog_plugin.training.loss.distillation_loss`.
        range_learning_rate: Learning rate of the input ranges, relative to each range: 0.003 lets
            a range change by 0.3 % in a step. It follows the same schedule; ranges get no weight
            decay and do not count into the gradient norm.
        noise_seed: Seed of the training noise; None: ``args.seed``.
        **kwargs: Everything else that ``transformers.Trainer`` takes.

    Example:
        >>> trainer = AnalogTrainer(model, teacher=original, args=args, train_dataset=tokens)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        chunk: int = 512,
        range_learning_rate: float = 3e-3,
        noise_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        forward_state(model)  # one clear error, early, for a model that is not analog
        if teacher is model:
            raise AnalogError(
                "teacher and model are the same object; give the digital original, for instance "
                "copy.deepcopy(model) made before convert_to_analog."
            )
        super().__init__(model, **kwargs)
        self.analog_callback = AnalogCallback(seed=noise_seed)
        self.add_callback(self.analog_callback)
        self.temperature, self.cross_entropy, self.chunk = temperature, cross_entropy, chunk
        self.range_learning_rate = range_learning_rate
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        # The loss is normalised here, not by the model.
        self.model_accepts_loss_kwargs = False
        self._teacher_states = HiddenStates.of(self.teacher)
        self._student_states = HiddenStates(model, split=self._teacher_states.split)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """KL to the teacher at every position that the masks let through."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        given = labels is not None
        tokens, attention = inputs["input_ids"], inputs.get("attention_mask")
        if labels is None:
            labels = tokens
        targets = torch.full_like(labels, -100)
        targets[:, :-1] = labels[:, 1:]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if attention is not None:
            mask &= attention.bool()
            targets[:, :-1] = targets[:, :-1].masked_fill(attention[:, 1:] == 0, -100)
        if given:
            mask &= targets != -100
        with torch.no_grad():
            reference = self._teacher_states(None, **inputs)
        hidden = self._student_states(model, **inputs)
        loss = distillation_loss(
            hidden,
            reference,
            self._student_states.head,
            self._teacher_states.head,
            mask=mask,
            labels=targets if self.cross_entropy > 0 else None,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            chunk=self.chunk,
        )
        if model.training and not bool(loss.detach().isfinite()):
            self.analog_callback.skip_step()
        return (loss, {"hidden": hidden}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the input ranges in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        ranges = self._ranges()
        for parameter in ranges:  # hidden from the usual grouping
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(*(() if model is None else (model,)))
        finally:
            for parameter in ranges:
                parameter.requires_grad_(True)
        if ranges:
            optimizer.add_param_group(
                {"params": ranges, "lr": self.range_learning_rate, "weight_decay": 0.0}
            )
        return optimizer

    def _ranges(self) -> list[nn.Parameter]:
        unique = {
            id(layer.input_range): layer.input_range for _, layer in analog_layers(self.model)
        }
        return [parameter for parameter in unique.values() if parameter.requires_grad]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the weights' gradients; the ranges' are of another scale and stay out of it."""
        kept = [(parameter, parameter.grad) for parameter in self._ranges()]
        for parameter, _ in kept:
            parameter.grad = None
        try:
            return super()._clip_grad_norm(model)
        finally:
            for parameter, grad in kept:
                parameter.grad = grad

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a training checkpoint; ranges shared by a group are written for each layer."""
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        for name in state:
            if name.endswith("input_range"):
                state[name] = state[name].clone()
        super()._save(output_dir, state)
