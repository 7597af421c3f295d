"""Training whose gradients and optimizer are sharded over processes by DeepSpeed's ZeRO-2.

The engine keeps fp32 copies of the trained weights ("masters"), a flat part of them in each
process, and steps those; the model's weights are cast from them. Input ranges stay out of it: every
process has them whole, in fp32, with an optimizer of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError, shown
from analog_plugin.layers import analog_layers
from analog_plugin.ops.clip import clip_bound


def check_zero(config: Mapping[str, Any], saves: bool) -> None:
    """Refuse ways of DeepSpeed that do not serve.

    Args:
        config: DeepSpeed's configuration.
        saves: Whether training checkpoints will be written, and read again.

    Raises:
        AnalogError: It is not ZeRO-2, or something that clipping, ranges and skipped steps do not
            reach, or checkpoints would be read by pickle.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 2:
        raise AnalogError(
            f"DeepSpeed is taken with ZeRO-2 alone, not with stage {shown(zero.get('stage'))}; "
            "write stage: 2, or shard the weights too by FSDP2 (fsdp_version: 2)."
        )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            raise AnalogError(f"ZeRO-2 is taken without offloading; leave {name} out.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise AnalogError(
                f"DeepSpeed's own {name} would leave out the input ranges; leave {name} out of its "
                "configuration: the recipe's training says what to use."
            )
    if (config.get("fp16") or {}).get("enabled") in (True, "true"):
        raise AnalogError(
            "Under DeepSpeed fp16 scales losses where input ranges do not see it; train in bf16 "
            "(bf16: true) or float32."
        )
    if "gradient_clipping" not in config:
        raise AnalogError(
            "DeepSpeed's configuration has no gradient_clipping, so that max_grad_norm would do "
            'nothing; write "gradient_clipping": "auto".'
        )
    if saves:
        raise AnalogError(
            "DeepSpeed's training checkpoints are read by pickle, which runs what a file says; "
            'write in the recipe training: {save_strategy: "no"}.'
        )


class ZeroTwo:
    """DeepSpeed's engine as an optimizer that steps when it is told to, and the ranges beside it.

    Args:
        model: The analog model, before the engine has it.
        ranges: The optimizer of the input ranges; None: they are not trained.
        relative: Its learning rate in that of the weights.
    """

    def __init__(
        self, model: nn.Module, ranges: torch.optim.Optimizer | None, relative: float
    ) -> None:
        self.ranges, self.relative = ranges, relative
        self._skip = False
        self._known_norm: Tensor | None = None
        own = {id(layer.input_range) for _, layer in analog_layers(model)}
        self._whole = [p for p in model.parameters() if id(p) in own]
        self._dtypes = [(p, p.dtype) for p in model.parameters() if id(p) not in own]
        # The engine casts all parameters, those too that it does not train.
        self._kept = {
            id(p): p.detach().to("cpu", copy=True)
            for p in model.parameters()
            if id(p) in own or not p.requires_grad
        }

    def attach(self, accelerator: Any, engine: Any, optimizer: Any) -> None:
        """Take the engine's step out of Accelerate's backward into ``optimizer.step()``.

        Args:
            accelerator: Accelerate's, which prepared the engine.
            engine: DeepSpeed's.
            optimizer: Accelerate's wrapper of the engine's optimizer, whose step does nothing.
        """
        self.engine = engine
        accelerator.deepspeed_engine_wrapped = _Backward(engine, self)
        counted = optimizer.step  # by the learning rate's schedule

        @functools.wraps(counted)
        def step() -> None:
            counted()
            self.step()

        optimizer.step = step
        # The engine asks whether gradients overflowed, and drops the step where they did.
        self._partitioned.check_grad_overflow = True
        self._partitioned.check_overflow = self._answer
        # It is asked for by the Trainer, by the callback and by the engine's step.
        self._measured_norm = self._partitioned.scaled_global_norm
        self._partitioned.scaled_global_norm = self._norm
        for parameter in self._whole:
            parameter.data = self._kept.pop(id(parameter)).to(parameter.device)

    @property
    def _partitioned(self) -> Any:
        return self.engine.optimizer

    def _answer(self, partition_gradients: bool = True) -> None:
        self._partitioned.overflow = self._skip

    def _norm(self, norm_type: float = 2) -> Tensor:
        if self._known_norm is None:
            self._known_norm = self._measured_norm(norm_type)
        return self._known_norm

    def gradient_norm(self) -> float:
        """Norm of the weights' gradients over all processes, found once a step.

        All processes must ask for it.
        """
        return float(self._norm())

    def skip(self) -> None:
        """Let the next step change nothing."""
        self._skip = True

    def step(self) -> None:
        """The step of the weights, and that of the ranges with their gradients."""
        self.engine.step()
        self._known_norm = None
        self._partitioned.overflow = False  # the schedule goes on, as without an engine
        if self.ranges is not None and not self._skip:
            for group in self.ranges.param_groups:
                group["lr"] = self.relative * self._partitioned.param_groups[0]["lr"]
            self.ranges.step()
        self._skip = False

    @torch.no_grad()
    def clip(self, weight: nn.Parameter, tiles: Tensor, alpha: float) -> None:
        """Clamp a weight, and this process's part of its master, to ``alpha`` deviations of a row.

        The deviations are those of the model's weight, which all processes have alike. Rounding
        keeps order, so the clamped weight still is the clamped master cast.

        Args:
            weight: The parameter.
            tiles: The same values [out, in], a view.
            alpha: See :func:`~analog_plugin.ops.clip.clip_to_sigma`.
        """
        bound = clip_bound(tiles, alpha)
        rounded = bound.to(tiles.dtype)
        tiles.clamp_(-rounded, rounded)
        whole = bound.expand(tiles.shape)
        flat = (whole if tiles.stride() == weight.stride() else whole.t()).reshape(-1)
        kept = self._kept.get(id(weight))
        if kept is not None:
            limit = flat.to(kept.device).view_as(kept)
            kept.clamp_(-limit, limit)
        part = getattr(weight, "_hp_mapping", None)
        if part is None:  # other processes have it, or it is not trained
            return
        place = part.lp_fragment_address
        own = flat.narrow(0, place.start, place.numel)
        part.get_hp_fragment().clamp_(-own, own)

    @torch.no_grad()
    def release(self) -> None:
        """Give the model its trained weights in the types that it came with, and end the engine.

        All processes must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter, dtype in self._dtypes:
            kept = self._kept.get(id(parameter))
            values = safe_get_full_fp32_param(parameter) if kept is None else kept
            parameter.data = values.to(parameter.device, dtype)
        self.engine.destroy()


class _Backward:
    """Accelerate's wrapper of an engine, but for the step."""

    def __init__(self, engine: Any, zero: ZeroTwo) -> None:
        self.engine, self.zero = engine, zero

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        return self.zero.gradient_norm()
