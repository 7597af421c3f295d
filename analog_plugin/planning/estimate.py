"""Memory, time and communication of training and sampling, by formulas; docs/scaling.md tells them.

Sources: operations of a step as counted in this project's benchmarks; sharding as in ZeRO (arXiv
1910.02054); an all-reduce of B bytes sends 2·B·(N-1)/N from each of N GPUs, an all-gather or a
reduce-scatter half of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from analog_plugin.errors import AnalogError, is_number, shown
from analog_plugin.planning.hardware import Gpu
from analog_plugin.planning.shapes import ModelShape

Sharding = Literal["ddp", "fsdp"]
SHARDINGS = ("ddp", "fsdp")
_HALF, _SINGLE = 2, 4
#: Bytes of a chunk for each logit: in half precision those of both models and the gradient. Where a
#: teacher was stored torch's operators compute, with at most so many in float32.
_OF_LOGIT, _OF_LOGIT_STORED = 3 * _HALF, 5 * _SINGLE
#: Rows that a GPU samples together: fewer leave it waiting for its memory, more bring little.
_FEWEST, _MOST = 16, 512


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no formula gives.

    Args:
        efficiency: Share of a GPU's operations that training reaches. 38 to 43 % were reported for
            Llama 3 405B on H100 (arXiv 2407.21783, table 4).
        analog: Time of a step of hardware-aware distillation, in that of plain distillation. 1.18
            is what ``benchmarks/step.py`` measured on an H200: Llama-3.2-1B's shapes, 4096 tokens,
            teachers in bfloat16.
        network: Share of links' and networks' bandwidth that collectives reach.
        memory_bandwidth: Share of the memory's bandwidth that sampling reaches.
        usable: Share of the memory that tensors may fill: the rest is fragments and libraries.
    """

    efficiency: float = 0.35
    analog: float = 1.18
    network: float = 0.7
    memory_bandwidth: float = 0.6
    usable: float = 0.9

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            low, high = (1.0, 100.0) if name == "analog" else (0.001, 1.0)
            if not is_number(value) or not low <= value <= high:
                raise AnalogError(
                    f"{name} is {shown(value)}, but must be between {low:g} and {high:g}."
                )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done; defaults are the paper's for Llama-3.2-1B.

    Args:
        tokens: To sample, and to train on in each epoch.
        epochs: How often they are trained on.
        length: Tokens of a row.
        rows: Rows that a GPU takes at a time.
        accumulation: Micro-batches of an optimizer step.
        sharding: ``"ddp"``: every GPU holds everything. ``"fsdp"``: weights, gradients and
            optimizer states are shared out; the teacher is whole everywhere.
        checkpointing: Whether blocks are computed again in the backward.
        chunk: Positions whose logits exist at the same time.
        keep_noise: Whether noisy weights are kept for the backward.
        teacher: Whether the full-precision model runs beside; False: it was stored.
    """

    tokens: float = 20e9
    epochs: float = 2
    length: int = 4096
    rows: int = 1
    accumulation: int = 1
    sharding: Sharding = "fsdp"
    checkpointing: bool = True
    chunk: int = 512
    keep_noise: bool = True
    teacher: bool = True

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise AnalogError(
                f"sharding is {shown(self.sharding)}, but must be one of {', '.join(SHARDINGS)}."
            )
        for name in ("tokens", "epochs", "length", "rows", "accumulation", "chunk"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= 1e15:
                raise AnalogError(f"{name} is {shown(value)}, but must be a positive number.")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job takes on a number of GPUs.

    Args:
        gpus: Their number.
        memory: Bytes of each GPU while it trains, by what they hold.
        fits: Whether they are less than it has to give.
        step_seconds: An optimizer step: the longer of the two below, which overlap.
        compute_seconds, network_seconds: What it computes; what it sends.
        sent: Bytes that each GPU sends in it.
        tokens_per_step: Of all GPUs.
        tokens_per_second: In training.
        training_hours: All epochs.
        sampling_gpus: GPUs that hold one copy of the model to sample from.
        sampling_batch: Rows that such a copy samples together.
        sampled_per_second: Tokens of all GPUs.
        sampling_hours: All tokens.
    """

    gpus: int
    memory: dict[str, float] = field(default_factory=dict)
    fits: bool
    step_seconds: float
    compute_seconds: float
    network_seconds: float
    sent: float
    tokens_per_step: float
    tokens_per_second: float
    training_hours: float
    sampling_gpus: int
    sampling_batch: int
    sampled_per_second: float
    sampling_hours: float

    @property
    def gpu_hours(self) -> float:
        """Of sampling and training."""
        return self.gpus * (self.training_hours + self.sampling_hours)

    def cost(self, price: float) -> float:
        """At ``price`` for a GPU and hour."""
        return self.gpu_hours * price

    def to_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return dataclasses.asdict(self) | {"gpu_hours": self.gpu_hours}


def estimate(
    model: ModelShape,
    gpu: Gpu,
    gpus: int,
    job: Job | None = None,
    assumptions: Assumptions | None = None,
) -> Estimate:
    """What ``job`` takes on ``gpus`` GPUs, with mixed precision over float32 weights.

    Raises:
        AnalogError: The number of GPUs is not positive.
    """
    job, guess = job or Job(), assumptions or Assumptions()
    if not isinstance(gpus, int) or isinstance(gpus, bool) or not 0 < gpus <= 10**6:
        raise AnalogError(f"gpus is {shown(gpus)}, but must be a positive whole number.")
    memory = training_memory(model, gpus, job)
    tokens = job.rows * job.length * job.accumulation
    operations = tokens * step_operations(model, job)
    compute = operations * guess.analog / (gpu.flops * guess.efficiency)
    sent = sent_bytes(model, gpus, job)
    slowest = gpu.link if gpus <= gpu.in_node else min(gpu.link, gpu.network)
    network = sent / (slowest * guess.network)
    step = max(compute, network)
    copy, batch, sampled = _sampling(model, gpu, gpus, job, guess)
    return Estimate(
        gpus=gpus,
        memory=memory,
        fits=sum(memory.values()) <= gpu.memory * guess.usable,
        step_seconds=step,
        compute_seconds=compute,
        network_seconds=network,
        sent=sent,
        tokens_per_step=tokens * gpus,
        tokens_per_second=tokens * gpus / step,
        training_hours=job.tokens * job.epochs / (tokens * gpus / step) / 3600,
        sampling_gpus=copy,
        sampling_batch=batch,
        sampled_per_second=sampled,
        sampling_hours=job.tokens / sampled / 3600 if sampled else float("inf"),
    )


def step_operations(model: ModelShape, job: Job) -> float:
    """Operations of a training step for each token: student, teacher, heads, attention.

    A backward takes twice a forward; checkpointing and the teacher take one forward each. Causal
    attention looks at half of the row on average.
    """
    forward = model.forward_operations(job.length / 2)
    again = forward - 2 * model.head if job.checkpointing else 0.0
    teacher = forward if job.teacher else 0.0
    return 3 * forward + again + teacher


def training_memory(model: ModelShape, gpus: int, job: Job) -> dict[str, float]:
    """Bytes of each GPU at the worst moment of a step, by what they hold.

    That is either the loss, when all activations are there and of the gradients only the head's, or
    the end of the backward, when it is the other way round: an embedding that is the head too gets
    a gradient of its own before it is added. Of several micro-batches all but the first find all
    gradients there. The loss also holds the head in half precision.
    """
    shares = gpus if job.sharding == "fsdp" else 1
    tokens, parameters = job.rows * job.length, model.parameters
    of_block = float(_HALF * model.block_weights), float(tokens * model.kept_bytes)
    noisy = 1 if job.checkpointing or not job.keep_noise else model.blocks
    live = 1 if job.checkpointing else model.blocks
    borders = tokens * _HALF * model.hidden * model.blocks if job.checkpointing else 0
    # Gathered for the block that runs, and for the next one.
    gathered = 2 * of_block[0] if job.sharding == "fsdp" and gpus > 1 else 0.0
    whole = {
        "weights": _SINGLE * parameters / shares,
        "optimizer": 2 * _SINGLE * parameters / shares,
        "teacher": float(_HALF * parameters) if job.teacher else 0.0,
    }
    gradients, of_head = _SINGLE * parameters / shares, float(_SINGLE * model.head)
    of_logit = _OF_LOGIT if job.teacher else _OF_LOGIT_STORED
    at_loss = whole | {
        "gradients": of_head + (gradients if job.accumulation > 1 else 0.0),
        "noisy and gathered weights": of_block[0] * noisy + gathered,
        "activations": of_block[1] * live + borders,
        "loss": float(of_logit * min(job.chunk, tokens) * model.vocabulary + _HALF * model.head),
    }
    at_end = whole | {
        "gradients": gradients + (of_head if model.tied else 0.0),
        "noisy and gathered weights": of_block[0] + gathered,
        "activations": of_block[1],
        "loss": 0.0,
    }
    return max(at_loss, at_end, key=lambda held: sum(held.values()))


def sent_bytes(model: ModelShape, gpus: int, job: Job) -> float:
    """Bytes that each GPU sends in an optimizer step; gradients are summed in float32.

    ``"fsdp"`` gathers weights for each forward and backward of the student, and sums gradients in
    every micro-batch; ``"ddp"`` sums them once a step.
    """
    share = (gpus - 1) / gpus * model.parameters
    if job.sharding == "ddp":
        return share * 2 * _SINGLE
    return share * job.accumulation * (2 * _HALF + _SINGLE)


def _sampling(
    model: ModelShape, gpu: Gpu, gpus: int, job: Job, guess: Assumptions
) -> tuple[int, int, float]:
    """GPUs of a copy of the model, rows sampled together, and tokens a second of all copies.

    A token of all rows takes the time to read weights and caches, or to compute. A copy is shared
    out over as few GPUs of a node as leave room for enough rows; what they send is not counted.
    """
    weights, cache = _HALF * model.parameters, model.cache_bytes(job.length)
    copy, batch = 1, 0
    while True:
        room = copy * gpu.memory * guess.usable - weights
        batch = min(int(room / cache), _MOST * copy) if room > 0 else 0
        if batch >= _FEWEST * copy or copy * 2 > min(gpus, gpu.in_node):
            break
        copy *= 2
    if batch == 0:
        return copy, 0, 0.0
    read = weights + batch * cache / 2
    operations = batch * model.forward_operations(job.length / 2)
    seconds = max(
        read / (copy * gpu.bandwidth * guess.memory_bandwidth),
        operations / (copy * gpu.flops * guess.efficiency),
    )
    return copy, batch, batch / seconds * (gpus // copy)
