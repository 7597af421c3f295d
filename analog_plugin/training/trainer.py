"""A transformers Trainer that distills an analog model from its digital original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from analog_plugin.errors import AnalogError, shown
from analog_plugin.layers import analog_layers, digital_layers, forward_state
from analog_plugin.layers.prefix import repeated_positions
from analog_plugin.training.callback import AnalogCallback
from analog_plugin.training.divergence import TopTokens
from analog_plugin.training.hidden import HiddenStates
from analog_plugin.training.loss import distillation_loss
from analog_plugin.training.sharded import Unhooked, keep_ranges_whole
from analog_plugin.training.stored import StoredTeacher, taken
from analog_plugin.training.zero import ZeroTwo, check_zero


class AnalogTrainer(Trainer):
    """Train a model from ``convert_to_analog`` to match its full-precision self.

    Args:
        model: The analog student.
        teacher: The digital original; frozen here, moved to the student's device. Or a
            :class:`~analog_plugin.training.stored.StoredTeacher`: ``train_dataset`` is then its
            ``dataset(rows)``.
        teacher_dtype: Type that the teacher is cast to, such as ``"bfloat16"``: its forward and
            memory shrink, its logits lose what the type cannot hold; None: as it is.
        temperature, cross_entropy, top_k, chunk: See
            :func:`~analog_plugin.training.loss.distillation_loss`.
        range_learning_rate: Learning rate of the input ranges, relative to each range: 0.003 lets
            a range change by 0.3 % in a step. It follows the same schedule; ranges get no weight
            decay and do not count into the gradient norm.
        noise_seed: Seed of the training noise; None: ``args.seed``.
        noise_per, keep_noise: See :class:`~analog_plugin.training.callback.AnalogCallback`.
        **kwargs: Everything else that ``transformers.Trainer`` takes.

    Example:
        >>> trainer = AnalogTrainer(model, teacher=original, args=args, train_dataset=tokens)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | StoredTeacher,
        teacher_dtype: str | torch.dtype | None = None,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        top_k: int | None = None,
        chunk: int | None = None,
        range_learning_rate: float = 3e-3,
        noise_seed: int | None = None,
        noise_per: str = "forward",
        keep_noise: bool = True,
        **kwargs: Any,
    ) -> None:
        forward_state(model)  # one clear error, early, for a model that is not analog
        if teacher is model:
            raise AnalogError(
                "teacher and model are the same object; give the digital original, for instance "
                "copy.deepcopy(model) made before convert_to_analog."
            )
        args = kwargs.get("args")
        if args is not None and args.ddp_find_unused_parameters is None:
            # The head is used outside the wrapped forward, where DDP would not find its use.
            args.ddp_find_unused_parameters = False
        super().__init__(model, **kwargs)
        if self.args.n_gpu > 1:
            raise AnalogError(
                f"One process sees {self.args.n_gpu} GPUs, but AnalogTrainer takes one each; start "
                f"with torchrun --nproc-per-node {self.args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0."
            )
        if self.is_fsdp_enabled:
            keep_ranges_whole(self.accelerator.state.fsdp_plugin, model)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            check_zero(config, saves=self.args.save_strategy != "no")
        self._add_callback(seed=noise_seed, noise_per=noise_per, keep_noise=keep_noise)
        self.temperature, self.cross_entropy = temperature, cross_entropy
        self.top_k, self.chunk = top_k, chunk
        self.range_learning_rate = range_learning_rate
        # Tokens are counted over a whole optimizer step, and the loss divided by their number.
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None:  # the loss needs no labels, in evaluation either
            self.label_names: list[str] = []
            self.can_return_loss = True
        self.teacher = teacher
        if isinstance(teacher, StoredTeacher):
            teacher.check_loss(temperature, top_k, teacher_dtype)
            self.args.remove_unused_columns = False  # the model knows nothing of its logits
            with digital_layers(model):
                self._student_states = HiddenStates.of(model)
            return
        teacher.eval().requires_grad_(False).to(self.args.device)
        if teacher_dtype is not None:
            _cast_weights(teacher, _floating(teacher_dtype))
        self._teacher_states = HiddenStates.of(teacher)
        self._student_states = self._teacher_states.alike(model)

    @property
    def analog_callback(self) -> AnalogCallback:
        """The callback at work; resuming may have replaced the one that was added."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, AnalogCallback))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As a Trainer's, with its backwards in this thread.

        Autograd has a thread of its own for each GPU, which it wakes for the step and for each
        chunk of the loss, and in which Python runs no faster.
        """
        with torch.autograd.set_multithreading_enabled(False):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """KL to the teacher at every position that the masks let through."""
        inputs = dict(inputs)
        targets, mask = self._scored(inputs)
        inputs.pop("labels", None)
        if isinstance(self.teacher, StoredTeacher):
            reference: Tensor | TopTokens = taken(inputs)
        else:
            with torch.no_grad():
                reference = self._teacher_states(None, **inputs)
        hidden = self._student_states(model, **inputs)
        if model.training:
            self._initialize_head_ranges(hidden, mask)
        with self.accelerator.autocast():
            loss = distillation_loss(
                hidden,
                reference,
                self._student_head,
                self._teacher_head,
                mask=mask,
                labels=targets if self.cross_entropy > 0 else None,
                temperature=self.temperature,
                cross_entropy=self.cross_entropy,
                top_k=self.top_k,
                chunk=self.chunk,
                count=num_items_in_batch,
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
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
        if ranges and not self.is_deepspeed_enabled:
            optimizer.add_param_group(
                {"params": ranges, "lr": self.range_learning_rate, "weight_decay": 0.0}
            )
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        given = max_steps, train_dataloader, resume_from_checkpoint
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(*given)
        if resume_from_checkpoint is not None:
            raise AnalogError(
                "DeepSpeed's checkpoints are read by pickle, which runs what a file says; leave "
                "resume_from_checkpoint out."
            )
        if self.accelerator.deepspeed_engine_wrapped is not None:
            raise AnalogError("Under DeepSpeed an AnalogTrainer trains once; make another one.")
        if self.args.learning_rate == 0:
            raise AnalogError("Under DeepSpeed learning_rate must not be 0; write a tiny one.")
        zero = ZeroTwo(
            self.model,
            self._range_optimizer(),
            relative=self.range_learning_rate / self.args.learning_rate,
        )
        prepared = super()._prepare_for_training(*given)
        zero.attach(self.accelerator, self.model_wrapped, self.optimizer)
        self.analog_callback.zero = zero
        return prepared

    def _range_optimizer(self) -> torch.optim.Optimizer | None:
        ranges = self._ranges()
        if not ranges:
            return None
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        changed = {"lr": self.range_learning_rate, "weight_decay": 0.0}
        return kind(ranges, **settings | changed)

    def _ranges(self) -> list[nn.Parameter]:
        unique = {
            id(layer.input_range): layer.input_range for _, layer in analog_layers(self.model)
        }
        return [parameter for parameter in unique.values() if parameter.requires_grad]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._without_ranges(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._without_ranges(model), grad_norm)

    def _without_ranges(self, model: nn.Module) -> nn.Module:
        """The parameters whose gradients are clipped: those of ranges are of another scale."""
        ranges = {id(parameter) for parameter in self._ranges()}
        return nn.ParameterList(p for p in model.parameters() if id(p) not in ranges)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Scored positions of one optimizer step, over all its micro-batches and processes."""
        if not batch_samples:
            return None
        counts = [self._scored(batch)[1].sum().to(device) for batch in batch_samples]
        count = torch.stack(counts).sum()
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count.clamp_min(1)

    def _add_callback(self, **settings: Any) -> None:
        if not any(isinstance(c, AnalogCallback) for c in self.callback_handler.callbacks):
            self.add_callback(AnalogCallback(**settings))
            return
        usual = AnalogCallback()
        given = {name: v for name, v in settings.items() if v != getattr(usual, name)}
        if given:
            names = " and ".join("noise_seed" if n == "seed" else n for n in given)
            written = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise AnalogError(
                f"AnalogTrainer was given {names}, but callbacks hold an AnalogCallback, which has "
                f"settings of its own; write AnalogCallback({written}) alone."
            )

    @property
    def _student_head(self) -> nn.Module:
        head = self._student_states.head
        return Unhooked(head) if self.is_fsdp_enabled else head

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        # As the rest of the teacher: in its own precision, not in the student's autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return self._teacher_states.head(hidden)

    def _initialize_head_ranges(self, hidden: Tensor, mask: Tensor) -> None:
        """Let an analog head see a whole micro-batch: from then on it gets it in chunks."""
        for _, head in analog_layers(self._student_states.head):
            head.initialize_ranges(hidden, mask.reshape(-1))

    def _scored(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The token that each position [B, S] predicts (-100 for none), and which are scored."""
        tokens, labels = inputs["input_ids"], inputs.get("labels")
        attention = inputs.get("attention_mask")
        source = tokens if labels is None else labels
        targets = torch.full_like(source, -100)
        targets[:, :-1] = source[:, 1:]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if attention is not None:
            mask &= attention.bool()
            targets[:, :-1] = targets[:, :-1].masked_fill(attention[:, 1:] == 0, -100)
        if labels is not None:
            mask &= targets != -100
        repeated = repeated_positions(self._student_states.model, tokens, attention)
        if repeated is not None:  # what the digital prefix predicts is no analog layer's doing
            mask &= ~repeated
        return targets, mask


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is stored of a model, as loading it in that type would.

    What is not stored keeps its type: bfloat16 would round rotary frequencies by up to 0.2 %, which
    over some hundreds of positions comes to a radian.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _floating(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2):
        raise AnalogError(
            f"teacher_dtype is {shown(dtype)}, but must be float32, bfloat16, float16 or float64; "
            "write teacher_dtype='bfloat16'."
        )
    return found
