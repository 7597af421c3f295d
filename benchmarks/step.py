"""One whole optimizer step of a language model: ours beside plain training and aihwkit-lightning.

    python benchmarks/step.py [--model smollm2-135m] [--layers 30] [--rows 4] [--length 128]
        [--tile-rows 512] [--repeats 5]

The peers train copies of one random model on the same tokens, interleaved in one process, on one
thread; all parameters are trained, gradients are clipped to a norm of 1, the optimizer is AdamW:

- fine-tuning: cross-entropy of the digital model;
- distillation: the digital model from a digital teacher, KL from the whole logits of both;
- analog-plugin: the analog model by `AnalogTrainer` in a real `trainer.train()`; a callback runs
  the other peers between its steps;
- aihwkit-lightning: its analog model, KL from whole logits, its `AnalogOptimizer`, which clips.

With bfloat16 the students compute under autocast; teachers stay in float32, as in `AnalogTrainer`,
unless `--teacher-dtype` says otherwise.
Figures are medians of paired ratios of CPU time with their interquartile range, the peak of tensor
bytes that a step makes (gradients included; not weights and optimizer states, which are there
before), the operations of all matrix products, and the share of each part in our step. The default
needs 12 GB of memory.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import measure
import peers
import torch
from loss import kl, log_probabilities
from models import SIZES, random_model
from parts import MeasuredCallback, MeasuredTrainer, Parts
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from analog_plugin import convert_to_analog
from analog_plugin.layers import analog_layers

FINE_TUNING, DISTILLATION = "fine-tuning", "distillation"
MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1e-4
WARMUP = 1


class PlainStep:
    """One optimizer step a call, as a program without a Trainer does it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], Any],
    ) -> None:
        self.model, self.loss, self.optimizer = model.train(), loss, optimizer
        self.autocast = autocast

    def __call__(self) -> None:
        with self.autocast():
            loss = self.loss(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def others(
    model: nn.Module, teacher: nn.Module, tokens: Tensor, tile_rows: int | None, dtype: str
) -> dict[str, PlainStep]:
    """The peers of ours, each with a copy of ``model``."""
    device = tokens.device.type

    def autocast(enabled: bool = dtype == "bfloat16") -> Any:
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    def cross_entropy(student: nn.Module) -> Tensor:
        return student(input_ids=tokens, labels=tokens, use_cache=False).loss

    def whole_logits(student: nn.Module) -> Tensor:
        with torch.no_grad(), autocast(enabled=False):
            goal = log_probabilities(teacher(input_ids=tokens, use_cache=False).logits)
        made = log_probabilities(student(input_ids=tokens, use_cache=False).logits)
        return kl(made.flatten(0, 1), goal.flatten(0, 1))

    made = {}
    for name, loss in ((FINE_TUNING, cross_entropy), (DISTILLATION, whole_logits)):
        student = _trainable_copy(model)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        made[name] = PlainStep(student, loss, optimizer, autocast)
    if peers.why_not(peers.LIGHTNING) is None:
        student, optimizer = _lightning(model, tile_rows)
        made[peers.LIGHTNING] = PlainStep(student, whole_logits, optimizer, autocast)
    return made


def _trainable_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(True)


def _lightning(model: nn.Module, tile_rows: int | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    from aihwkit_lightning.nn import AnalogLinear
    from aihwkit_lightning.nn.conversion import convert_to_analog
    from aihwkit_lightning.optim import AnalogOptimizer

    student = convert_to_analog(
        _trainable_copy(model), peers.lightning_config(tile_rows), exclude_modules=["lm_head"],
        inplace=True, ensure_analog_root=False,
    )  # fmt: skip
    layers = [module for module in student.modules() if isinstance(module, AnalogLinear)]
    optimizer = AnalogOptimizer(
        torch.optim.AdamW, lambda: iter(layers), student.parameters(), lr=LEARNING_RATE,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    return student, optimizer


class Rounds(TrainerCallback):
    """Times our steps and, between them, runs and times one step of each other peer.

    A step of ours is all from the end of the one before: its data and the Trainer's own work too.
    In the last round memory and operations are counted instead.
    """

    def __init__(self, steps: Mapping[str, PlainStep], parts: Parts, repeats: int) -> None:
        self.steps, self.parts, self.device = steps, parts, parts.device
        self.last = WARMUP + repeats
        self.times: dict[str, list[float]] = {name: [] for name in (peers.OURS, *steps)}
        self.shares: list[dict[str, float]] = []
        self.peaks: dict[str, int] = {}
        self.operations: dict[str, int] = {}
        self._memory = measure.MemoryUse(self.device)
        self._products = measure.Products()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.parts.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        round_ = state.global_step - 1
        total, parts = self.parts.end()
        if round_ == self.last:
            self._products.__exit__(None, None, None)
            self._memory.__exit__(None, None, None)
            self.peaks[peers.OURS] = self._memory.peak
            self.operations[peers.OURS] = self._products.operations
        if WARMUP <= round_ < self.last:
            self.times[peers.OURS].append(total)
            self.shares.append({name: spent / total for name, spent in parts.items()})
        names = list(self.steps)
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            self._other(name, round_)
        if round_ == self.last - 1:
            self._memory.__enter__()
            self._products.__enter__()
        self.parts.begin()

    def _other(self, name: str, round_: int) -> None:
        if round_ == self.last:
            with measure.MemoryUse(self.device) as use, measure.Products() as products:
                self.steps[name]()
            self.peaks[name] = use.peak
            self.operations[name] = products.operations
            return
        start = measure.clock(self.device)
        self.steps[name]()
        if round_ >= WARMUP:
            self.times[name].append(measure.clock(self.device) - start)


def compare(dtype: str, arguments: argparse.Namespace) -> tuple[list[dict], list[dict], int]:
    """Rows of the peers and of the parts of our step, and the number of analog weights."""
    device = arguments.device
    model = random_model(arguments.model, arguments.layers, device).requires_grad_(False)
    teacher = copy.deepcopy(model).to(measure.DTYPES[arguments.teacher_dtype])
    shape = arguments.rows, arguments.length
    tokens = torch.randint(model.config.vocab_size, shape, device=device)
    steps = others(model, teacher, tokens, arguments.tile_rows, dtype)
    student = _trainable_copy(model)
    convert_to_analog(student, peers.scheme(arguments.tile_rows))
    for _, layer in analog_layers(student):
        layer.set_input_range(peers.RANGE)
    parts = Parts(device)
    rounds = Rounds(steps, parts, arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MeasuredTrainer(
            student,
            teacher=teacher,
            parts=parts,
            args=TrainingArguments(
                scratch, max_steps=WARMUP + arguments.repeats + 1, bf16=dtype == "bfloat16",
                per_device_train_batch_size=arguments.rows, learning_rate=LEARNING_RATE,
                max_grad_norm=MAX_GRAD_NORM, weight_decay=0.0, use_cpu=device.type == "cpu",
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=[{"input_ids": row.cpu()} for row in tokens],
            callbacks=[MeasuredCallback(parts), rounds],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows: list[dict[str, Any]] = []
    for name in (FINE_TUNING, DISTILLATION, peers.OURS, peers.LIGHTNING):
        if name not in rounds.times:
            rows.append({"dtype": dtype, "peer": name, "why": peers.why_not(name)})
            continue
        seconds = rounds.times[name]
        rows.append(
            {
                "dtype": dtype,
                "peer": name,
                "seconds": seconds,
                "to_fine_tuning": measure.ratio(seconds, rounds.times[FINE_TUNING]),
                "to_distillation": measure.ratio(seconds, rounds.times[DISTILLATION]),
                "ours_to_it": measure.ratio(rounds.times[peers.OURS], seconds),
                "peak_bytes": rounds.peaks[name],
                "operations": rounds.operations[name],
            }
        )
    profile = [
        {
            "dtype": dtype,
            "part": name,
            "share": round(statistics.median(share[name] for share in rounds.shares), 4),
        }
        for name in rounds.shares[0]
    ]
    return rows, profile, sum(layer.weight.numel() for _, layer in analog_layers(student))


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what :func:`measure.record` gave: ``"step"`` and ``"parts"``."""
    settings = record["settings"]
    given = settings["arguments"]
    lines = []
    for row in record["rows"]:
        figures = [row.get("why") or f"{statistics.median(row['seconds']):.2f} s"]
        for key in ("to_fine_tuning", "to_distillation", "ours_to_it"):
            figures.append(measure.shown(row.get(key)))
        lines.append(
            [row["dtype"], row["peer"], *figures, measure.megabytes(row.get("peak_bytes"))]
        )
        counted = row.get("operations")
        lines[-1].append("" if counted is None else f"{counted / 1e9:.0f}")
    heads = ["type", "step", "time", f"/ {FINE_TUNING}", f"/ {DISTILLATION}", "ours / it", "peak"]
    heads.append("GFLOP")
    tiles = f"{given['tile_rows']} rows" if given["tile_rows"] else "one a layer"
    caption = (
        f"{given['model']}, {given['layers'] or 'all'} decoder layers, {given['rows']} x "
        f"{given['length']} tokens, tiles: {tiles}, teachers in "
        f"{given.get('teacher_dtype', 'float32')}, {settings['machine']}:"
    )
    step = f"{caption}\n\n{measure.markdown(heads, lines)}\n\n{_noise_sentence(record)}"
    return {"step": step + measure.earlier(record), "parts": _parts_table(record["profile"])}


def _noise_sentence(record: Mapping[str, Any]) -> str:
    millions = record["analog_weights"] / 1e6
    return (
        f"Beside its products, our step draws a normal number for each of {millions:.1f} million "
        "analog weights."
    )


def _parts_table(profile: Sequence[Mapping[str, Any]]) -> str:
    dtypes = list(dict.fromkeys(row["dtype"] for row in profile))
    shares = {(row["part"], row["dtype"]): row["share"] for row in profile}
    lines = [
        [part, *(f"{100 * shares[part, dtype]:.1f} %" for dtype in dtypes)]
        for part in dict.fromkeys(row["part"] for row in profile)
    ]
    return measure.markdown(["part of our step", *dtypes], lines)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=SIZES, help="(smollm2-135m; on a GPU llama-3.2-1b)")
    parser.add_argument("--layers", type=int, help="decoder layers (the model's; on a GPU 4)")
    parser.add_argument("--rows", type=int, help="sequences a step (4; on a GPU 1)")
    parser.add_argument("--length", type=int, help="tokens of each (128; on a GPU 4096)")
    parser.add_argument("--tile-rows", type=int, help="rows of a tile (default: one tile a layer)")
    parser.add_argument(
        "--teacher-dtype", choices=measure.DTYPES, default="float32", help="(float32)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    arguments = parser.parse_args()
    dtypes = measure.begin(arguments)
    gpu = arguments.device.type == "cuda"
    arguments.model = arguments.model or ("llama-3.2-1b" if gpu else "smollm2-135m")
    arguments.layers = arguments.layers or (4 if gpu else None)
    arguments.rows = arguments.rows or (1 if gpu else 4)
    arguments.length = arguments.length or (4096 if gpu else 128)
    rows: list[dict[str, Any]] = []
    profile: list[dict[str, Any]] = []
    for dtype in dtypes:
        made, parts, weights = compare(dtype, arguments)
        rows += made
        profile += parts
    made = measure.record(arguments, rows, profile=profile, analog_weights=weights)
    measure.finish(arguments, made, tables(made).values())


if __name__ == "__main__":
    main()
