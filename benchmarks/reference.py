"""The published method on the demo model, run with aihwkit-lightning, to compare ours with.

'Analog Foundation Models' (arXiv 2505.09663) with the library that its authors released: 8-bit
inputs and outputs with one fixed ADC bound, one tile a layer, input ranges of 18 standard
deviations, 3 % weight noise per column, KL divergence to the original. Weights are not clipped: on
so few tokens that costs more than it gives. Training tokens, evaluation blocks, metrics and device
errors are those of analog-plugin, so that figures compare seed by seed.

    python benchmarks/reference.py [--steps 80] [--checkpoints 40,80] [--tokens 40960]
        [--blocks 40] [--seeds 10] [--threads 2] [--output benchmarks/results/reference.json]

Prints a Markdown table and all settings; writes every cell as JSON, anew after each evaluation. The
learning rate falls to zero at ``--steps``, whatever the checkpoints. A smoke run of two minutes:

    python benchmarks/reference.py --steps 2 --tokens 2048 --blocks 2 --seeds 1 --output smoke.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from analog_plugin import AnalogScheme, generate_dataset
from analog_plugin.data import evaluation_tokens
from analog_plugin.demo import resolve_model
from analog_plugin.evaluation.fidelity import METRICS, Reference, fidelity
from analog_plugin.evaluation.noise import NoiseCell, NoiseReport
from analog_plugin.layers.state import keyed_generator
from analog_plugin.modes import evaluation_mode
from analog_plugin.noise import PCMNoise
from analog_plugin.pretrained import load_causal_lm, load_tokenizer
from analog_plugin.progress import progress_bar, progress_counter
from analog_plugin.training.hidden import HiddenStates
from analog_plugin.training.loss import distillation_loss

with contextlib.redirect_stdout(sys.stderr):  # it prints which kernels it has
    from aihwkit_lightning.nn import AnalogLinear
    from aihwkit_lightning.nn.conversion import convert_to_analog
    from aihwkit_lightning.simulator import configs

MODEL = "demo:smollm2-135m-instruct"
LENGTH, ROWS, BLOCK_LENGTH, SEED = 128, 4, 256, 0
CALIBRATION_BATCHES = 16
#: The paper's optimizer; its learning rate suits this model and budget.
ADAMW = {"lr": 5e-5, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0
TILES = AnalogScheme(tile_rows=512)


def lightning_config() -> configs.TorchInferenceRPUConfig:
    config = configs.TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254  # 2 * 127 steps: 8 bits
    config.forward.out_bound = 14.0
    # Only with this clip type is the ADC scaled per column; so wide, it clips nothing.
    config.clip.type, config.clip.sigma = configs.WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 1e6
    config.modifier.noise_type = configs.WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.03
    ranges = config.pre_post.input_range
    ranges.enable = ranges.learn_input_range = True
    ranges.init_from_data, ranges.init_std_alpha = CALIBRATION_BATCHES, 18.0
    ranges.decay, ranges.input_min_percentage = 0.01, 0.95
    config.mapping.max_input_size = -1
    return config


def analog_layers(model: nn.Module) -> dict[str, AnalogLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AnalogLinear)}


def calibrate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Initialise the input ranges as the library does it: in training mode, weight noise on."""
    model.train()
    with torch.no_grad():
        for batch in progress_bar(batches, desc="Initialising input ranges"):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    for layer in analog_layers(model).values():  # also where there were fewer batches
        layer.input_range_update_idx.fill_(CALIBRATION_BATCHES)


@contextlib.contextmanager
def programmed(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Within this context weights hold the device errors that analog-plugin's layers would have."""
    layers = analog_layers(model)
    clean = {name: layer.weight.data for name, layer in layers.items()}
    noise = PCMNoise()
    try:
        if seed is not None:
            for name, layer in layers.items():
                generator = keyed_generator(f"program/{seed}/{name}", layer.weight.device)
                blocks = clean[name].split(TILES.tiles(layer.in_features), dim=1)
                noisy = [noise.program(block, generator) for block in blocks]
                layer.weight.data = torch.cat(noisy, dim=1)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = clean[name]


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: Tensor, reference: Reference, seeds: int, label: str
) -> NoiseReport:
    report = NoiseReport()
    with evaluation_mode(model):
        for seed in progress_bar([None, *range(seeds)], desc=f"Evaluating {label}"):
            with programmed(model, seed):
                metrics = dict(fidelity(model, tokens, reference))
            report.cells.append(NoiseCell("none" if seed is None else "pcm", seed, metrics))
    return report


class Distillation:
    """One optimizer step a call; returns the loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module, steps: int) -> None:
        self.student, self.goal = student, HiddenStates.of(teacher)
        self.states = self.goal.alike(student)
        self.optimizer = torch.optim.AdamW(student.parameters(), **ADAMW)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0 - step / steps)

    def __call__(self, tokens: Tensor) -> float:
        self.student.train()
        with torch.no_grad():
            goal = self.goal(input_ids=tokens)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.states(input_ids=tokens)
            loss = distillation_loss(hidden, goal, self.states.head, self.teacher_head)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return round(float(loss.detach()), 4)

    def teacher_head(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # the teacher stays exact
            return self.goal.head(hidden)


def settings(arguments: argparse.Namespace, layers: int, batches: int) -> dict[str, Any]:
    config = json.dumps(asdict(lightning_config()), default=lambda choice: choice.value)
    return {
        "model": f"{MODEL}, float32; {layers} analog layers, lm_head digital",
        "aihwkit_lightning": json.loads(config),
        "range_initialisation": f"{min(batches, CALIBRATION_BATCHES)} batches, weight noise on",
        "loss": "KL to the digital original at temperature 1, all positions",
        "data": f"{batches * ROWS} rows of {LENGTH} tokens sampled from the model, {ROWS} a step",
        "optimizer": {"name": "AdamW", **ADAMW, "max_grad_norm": MAX_GRAD_NORM},
        "trained": "all parameters and input ranges, in one group",
        "schedule": f"linear to zero over {arguments.steps} steps, no warm-up",
        "training_precision": "bfloat16 autocast, teacher in float32",
        "evaluation": f"{arguments.blocks} blocks of {BLOCK_LENGTH} tokens of pydoc_data.topics",
        "evaluation_precision": "float32",
        "noise_seeds": arguments.seeds,
        "noise": f"PCM in tiles of {TILES.tile_rows} rows; ADC bound from the programmed weights",
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }


def markdown(reports: dict[str, NoiseReport]) -> str:
    lines = ["| | noise | perplexity | KL | top-1 agreement |", "|---|---|---|---|---|"]
    for name, report in reports.items():
        for noise in dict.fromkeys(cell.noise for cell in report.cells):
            cells = [name, noise]
            for metric, digits in zip(METRICS, (1, 3, 3), strict=True):
                std = report.std(noise, metric)  # NaN for a single value
                spread = f" ± {std:.{digits}f}" if std == std else ""
                cells.append(f"{report.mean(noise, metric):.{digits}f}{spread}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="of 512 tokens")
    parser.add_argument("--checkpoints", default="", help="evaluate after these steps too: 40,80")
    parser.add_argument("--tokens", type=int, help="to train on (default: new in each step)")
    parser.add_argument("--blocks", type=int, default=40, help="of 256 tokens to evaluate on")
    parser.add_argument("--seeds", type=int, default=10, help="number of noise seeds")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reference.json"))
    arguments = parser.parse_args()
    stops = {int(stop) for stop in arguments.checkpoints.split(",") if stop}
    if any(not 1 <= stop <= arguments.steps for stop in stops):
        parser.error("--checkpoints must lie between 1 and --steps")
    arguments.stops = stops | {arguments.steps}
    if arguments.tokens is None:
        arguments.tokens = arguments.steps * ROWS * LENGTH
    if min(arguments.steps, arguments.tokens // (ROWS * LENGTH), arguments.blocks) < 1:
        parser.error(f"--steps and --blocks must be at least 1, --tokens {ROWS * LENGTH}")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    packages = ("analog-plugin", "aihwkit-lightning", "torch", "transformers")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    seconds: dict[str, float] = {}
    reports: dict[str, NoiseReport] = {}
    record: dict[str, Any] = {"versions": versions}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def measure(name: str, losses: list[float]) -> None:
        with timed("evaluation"):
            reports[name] = evaluate(student, tokens, reference, arguments.seeds, name)
        record["steps"], record["tokens"] = len(losses), len(losses) * ROWS * LENGTH
        record["seconds"] = {task: round(value, 1) for task, value in seconds.items()}
        record["losses"] = losses
        record["reports"] = {label: report.to_dict() for label, report in reports.items()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")

    source = resolve_model(MODEL)
    teacher = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    tokens = evaluation_tokens(load_tokenizer(source), arguments.blocks, BLOCK_LENGTH)
    with timed("data"):
        rows = generate_dataset(teacher, arguments.tokens, LENGTH, batch_size=80, seed=SEED)
    batches = [batch for batch in rows.split(ROWS) if len(batch) == ROWS]
    # In place and without a wrapper around the root, whose class must stay the teacher's.
    student = convert_to_analog(
        copy.deepcopy(teacher), lightning_config(), exclude_modules=["lm_head"],
        inplace=True, ensure_analog_root=False,
    )  # fmt: skip
    teacher.requires_grad_(False)

    torch.manual_seed(SEED)
    with timed("range_initialisation"):
        calibrate(student, batches[:CALIBRATION_BATCHES])
    record["settings"] = settings(arguments, len(analog_layers(student)), len(batches))
    with timed("evaluation"):
        reference = Reference.of(teacher, tokens)
        original = NoiseCell("none", None, dict(fidelity(teacher, tokens, reference)))
    reports["digital original"] = NoiseReport([original])
    measure("calibrated start", [])
    losses: list[float] = []
    step = Distillation(student, teacher, arguments.steps)
    with progress_counter(desc="Training", total=arguments.steps, unit="step") as bar:
        while len(losses) < arguments.steps:
            with timed("training"):
                losses.append(step(batches[len(losses) % len(batches)]))
            bar.set_postfix(loss=losses[-1])
            bar.update(1)
            if len(losses) in arguments.stops:
                measure(f"trained, {len(losses)} steps", losses)
    print(markdown(reports))
    shown = {key: record[key] for key in ("settings", "versions", "seconds")}
    print(f"\n```json\n{json.dumps(shown, indent=2)}\n```")


if __name__ == "__main__":
    main()
