"""What the layers of one model share during a forward pass: noise key and padding mask."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError, shown
from analog_plugin.layers.prefix import repeated_positions
from analog_plugin.scheme import AnalogScheme


class ForwardState:
    """Shared by all analog layers of a model.

    Args:
        seed: Seed of the training noise; None: noise comes from torch's global generator.
        scheme: The model's; layers may have others by its ``overrides``.

    Attributes:
        seed: As above. Setting it begins a run, even with the same seed: steps of another run are
            other steps, though their numbers may be equal.
        step: Optimizer step, set by :class:`~analog_plugin.training.AnalogCallback`.
        micro_batch: Index of the micro-batch within the step, over all processes. Noise is a
            function of (seed, layer, step, micro-batch) alone, so that the same seed gives the same
            draws on any number of processes and in the recomputation of gradient checkpointing.
        noise_per: ``"forward"``: each forward draws noise of its own. ``"step"``: noise is a
            function of (seed, layer, step): all micro-batches of an optimizer step, on all
            processes, meet the same weights, which are made once. Without a seed there is no step.
        keep_noise: False: a backward draws its noise again, instead of the forward keeping noisy
            weights for it: less memory by a copy of all analog weights, more time by one draw.
        attention_mask: [B, S] mask of the running forward, or None.
        repeated: [B, S] bool, the tokens of the running forward that are the digital prefix, or
            None.
    """

    def __init__(self, seed: int | None = None, scheme: AnalogScheme | None = None) -> None:
        self.scheme = scheme
        self.run = 0
        self.seed = seed
        self.step = 0
        self.micro_batch = 0
        self._noise_per = "forward"
        self.keep_noise = True
        self.attention_mask: Tensor | None = None
        self.repeated: Tensor | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the training noise."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed
        self.run += 1

    @property
    def noise_per(self) -> str:
        """What meets noise of its own."""
        return self._noise_per

    @noise_per.setter
    def noise_per(self, noise_per: str) -> None:
        if noise_per not in ("forward", "step"):
            raise AnalogError(
                f"noise_per is {shown(noise_per)}, but must be 'forward' or 'step'; write "
                "noise_per='step' to share noise among the micro-batches of an optimizer step."
            )
        self._noise_per = noise_per

    def generator(self, layer_name: str, device: torch.device) -> torch.Generator | None:
        """Generator of this layer's noise now; None where noise is not keyed."""
        if self.seed is None:
            return None
        key = f"{self.seed}/{layer_name}/{self.step}"
        if self.noise_per == "forward":
            key += f"/{self.micro_batch}"
        return keyed_generator(key, device)

    @property
    def reuses_noise(self) -> bool:
        """Whether noisy weights serve a whole optimizer step."""
        return self.noise_per == "step" and self.keep_noise and self.seed is not None

    def row_mask(self, x: Tensor) -> Tensor | None:
        """[T] bool mask of the tokens of ``x`` [B, S, in] that count: no padding and no prefix."""
        masks = [self.attention_mask, None if self.repeated is None else ~self.repeated]
        found = None
        for mask in masks:
            if mask is None or mask.dim() != 2 or x.dim() != 3 or mask.shape[0] != x.shape[0]:
                continue
            if mask.shape[1] < x.shape[1]:
                continue
            rows = mask[:, -x.shape[1] :].reshape(-1).bool()
            found = rows if found is None else found & rows
        return found

    def watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note for the layers below which tokens do not count."""
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
            mask = args[1]
        self.attention_mask = mask if isinstance(mask, Tensor) else None
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.repeated = None
        if isinstance(ids, Tensor) and kwargs.get("past_key_values") is None:
            self.repeated = repeated_positions(module, ids, self.attention_mask)


def keyed_generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of ``key`` alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    return generator


def drawn_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed comes from torch's global one."""
    generator = torch.Generator(device)
    generator.manual_seed(int(torch.randint(2**63 - 1, ())))
    return generator


def model_scheme(model: nn.Module) -> AnalogScheme:
    """The scheme of a converted model, of which layers may be exceptions by its ``overrides``.

    Raises:
        AnalogError: The model has no analog layer.
    """
    scheme = forward_state(model).scheme
    assert scheme is not None  # convert_to_analog gives it
    return scheme


def forward_state(model: nn.Module) -> ForwardState:
    """Return the state that the analog layers of ``model`` share.

    Raises:
        AnalogError: The model has no analog layer.
    """
    from analog_plugin.layers.base import AnalogLayer

    for module in model.modules():
        if isinstance(module, AnalogLayer) and module.state is not None:
            return module.state
    raise AnalogError("The model has no analog layer; call convert_to_analog(model, scheme) first.")
