"""What each lever of the preset `AFM_PLUS` is worth on the demo model, trained or not.

Tokens, evaluation blocks, metrics and device errors are those of `reference.py`, which runs the
published method with aihwkit-lightning: figures compare seed by seed. With the digital prefix, KL
is to the original with the same prefix.

    python benchmarks/start.py [--variants all,prefix,rescale,...] [--steps 0,40,80,176]
        [--blocks 40] [--seeds 10] [--threads 2] [--output benchmarks/results/start.json]
        [--curve docs/images/curve.png]

`all` is the preset; every other variant is the preset with one lever left out. Each number of steps
(of 512 tokens; 0 does not train) is a run of its own, from the same start and with its own
schedule. Prints a Markdown table; writes every cell as JSON, anew after each run, and goes on from
there when started again. `--curve` draws KL against training tokens, beside the reference's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from analog_plugin import AnalogRecipe, evaluate_noise, train_analog
from analog_plugin.data import evaluation_tokens
from analog_plugin.demo import resolve_model
from analog_plugin.evaluation import NoiseReport, Reference
from analog_plugin.layers import analog_layers, model_scheme
from analog_plugin.layers.prefix import install_prefix, installed_prefix
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

MODEL = "demo:smollm2-135m-instruct"
LENGTH, ROWS, BLOCK_LENGTH = 128, 4, 256
#: Tokens to calibrate on, and to train on where the steps do not need more.
TOKENS = 40_960
#: The scheme's fields that leave one lever out.
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "prefix": {"prefix": None},
    "rescale": {"rescale": None},
    "output ranges": {"range_init": "mse"},
    "chosen bound": {"out_bound": 14.0},
    "tiles": {"tile_rows": None},
    "digital layers": {"digital_share": 0.0},
}
TRAINING = {
    "per_device_train_batch_size": ROWS,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "bf16": True,
    "trainable": "analog",
    "range_learning_rate": 0.005,
    "logging_steps": 5,
}


def recipe(variant: str, steps: int) -> AnalogRecipe:
    return AnalogRecipe.parse(
        {
            "scheme": {"preset": "AFM_PLUS"} | VARIANTS[variant],
            "data": {
                "tokens": max(TOKENS, steps * ROWS * LENGTH),
                "sequence_length": LENGTH,
                "batch_size": 80,
            },
            "training": TRAINING | {"max_steps": max(steps, 1)},
            "evaluation": None,
        }
    )


def run(variant: str, steps: int, blocks: int, seeds: int) -> dict[str, Any]:
    """One model, made and measured."""
    source = resolve_model(MODEL)
    tokenizer = load_tokenizer(source)
    original = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    model = copy.deepcopy(original)
    result = train_analog(model, recipe(variant, steps), tokenizer=tokenizer, train=steps > 0)
    prefix = installed_prefix(model)
    if prefix is not None:
        install_prefix(original, prefix)
    tokens = evaluation_tokens(tokenizer, blocks, BLOCK_LENGTH)
    start = time.perf_counter()
    # 2 GB of logits, instead of the head and its product anew for each seed.
    reference = Reference.of(original, tokens, keep_logits=True)
    report = evaluate_noise(model, tokens, (None, "pcm"), seeds, reference=reference)
    result.training["start"].pop("sensitivity", None)  # 210 rows; the layers chosen stay
    analog = sum(layer.weight.numel() for _, layer in analog_layers(model))
    linear = sum(
        module.weight.numel()
        for name, module in original.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    return {
        "digital_share": round(1 - analog / linear, 4),
        "out_bound": model_scheme(model).out_bound,
        "training": result.training,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "report": report.to_dict(),
    }


def table(runs: dict[str, Any]) -> str:
    lines = [
        "| without | training tokens | KL | KL, pcm | perplexity, pcm | digital | prepared in |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, record in runs.items():
        variant = key.rpartition("/")[0]
        report = NoiseReport.from_dict(record["report"])
        kl, perplexity = (
            f"{report.mean('pcm', m):.3f} ± {report.std('pcm', m):.3f}"
            for m in ("kl", "perplexity")
        )
        training = record["training"]
        cells = [
            "–" if variant == "all" else variant,
            f"{training['tokens']:,}",
            f"{report.mean('none', 'kl'):.3f}",
            kl,
            perplexity,
            f"{record['digital_share']:.1%}",
            f"{training['seconds']['calibration']:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(runs: dict[str, Any], reference: dict[str, Any], target: Path) -> None:
    """Draw KL against training tokens: `all`, and the published method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    step = ROWS * LENGTH
    ours = {
        record["training"]["tokens"]: NoiseReport.from_dict(record["report"])
        for key, record in runs.items()
        if key.startswith("all/")
    }
    theirs = {
        (0 if "start" in name else step * int("".join(filter(str.isdigit, name)))): (
            NoiseReport.from_dict(report)
        )
        for name, report in reference["reports"].items()
        if name != "digital original"
    }
    for label, points, colour in (
        ("aihwkit-lightning, published method", theirs, "#d55e00"),
        ("AFM_PLUS", ours, "#0072b2"),
    ):
        tokens = sorted(points)
        for noise, line, said in (("pcm", "-", "PCM noise"), ("none", "--", "no noise")):
            means = [points[t].mean(noise, "kl") for t in tokens]
            spread = [points[t].std(noise, "kl") if noise == "pcm" else 0.0 for t in tokens]
            axis.errorbar(
                tokens, means, spread, fmt=f"o{line}", color=colour, ms=4, lw=1.5, capsize=3,
                label=f"{label}, {said}",
            )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.set_xlabel("training tokens", fontsize=8)
    axis.set_title(
        "KL to the original, nats per token (± over 10 noise seeds)", fontsize=9, loc="left"
    )
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", lw=0.6)
    axis.legend(fontsize=7, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", default="0", help="numbers of training steps: 0,80")
    parser.add_argument("--blocks", type=int, default=40, help="of 256 tokens to evaluate on")
    parser.add_argument("--seeds", type=int, default=10, help="number of noise seeds")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/start.json"))
    parser.add_argument("--curve", type=Path, help="draw KL against training tokens here")
    arguments = parser.parse_args()
    chosen = arguments.variants.split(",")
    for variant in chosen:
        if variant not in VARIANTS:
            parser.error(f"there is no variant {variant!r}; known: {', '.join(VARIANTS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    packages = ("analog-plugin", "torch", "transformers")
    settings = {
        "model": f"{MODEL}, float32, lm_head digital",
        "evaluation": f"{arguments.blocks} blocks of {BLOCK_LENGTH} tokens of pydoc_data.topics",
        "noise_seeds": arguments.seeds,
        "training": TRAINING,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
    }
    record: dict[str, Any] = {"settings": settings, "runs": {}}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if before["settings"] == settings:
            record = before
    for variant in chosen:
        for steps in map(int, arguments.steps.split(",")):
            key = f"{variant}/{steps}"
            if key not in record["runs"]:
                made = run(variant, steps, arguments.blocks, arguments.seeds)
                record["runs"][key] = made
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["runs"]))
    if arguments.curve:
        reference = json.loads(Path("benchmarks/results/reference.json").read_text())
        curve(record["runs"], reference, arguments.curve)


if __name__ == "__main__":
    main()
