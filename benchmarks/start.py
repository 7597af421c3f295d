"""What each lever of the preset `AFM_PLUS` is worth on the demo model, trained or not.

Tokens, evaluation blocks, metrics and device errors are those of `reference.py`, which runs the
published method with aihwkit-lightning: figures compare seed by seed.

    python benchmarks/start.py [--variants all,prefix,rescale,...] [--steps 80] [--tokens 40960]
        [--blocks 40] [--seeds 10] [--threads 2] [--output benchmarks/results/start.json]

`all` is the preset; every other variant is the preset with one lever left out. `--steps 0` does not
train. Prints a Markdown table; writes every cell as JSON, anew after each variant, and goes on from
there when started again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from analog_plugin import AnalogRecipe, train_analog
from analog_plugin.demo import resolve_model
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

MODEL = "demo:smollm2-135m-instruct"
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
    "per_device_train_batch_size": 4,
    "learning_rate": 2.0e-4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "bf16": True,
    "trainable": "analog",
    "range_learning_rate": 0.005,
    "logging_steps": 5,
}


def recipe(variant: str, arguments: argparse.Namespace) -> AnalogRecipe:
    scheme = {"preset": "AFM_PLUS", "clip_sigma": arguments.clip_sigma} | VARIANTS[variant]
    training = TRAINING | {"max_steps": arguments.steps} if arguments.steps else None
    return AnalogRecipe.parse(
        {
            "scheme": scheme,
            "data": {"tokens": arguments.tokens, "sequence_length": 128, "batch_size": 80},
            "training": training,
            "evaluation": {"blocks": arguments.blocks, "length": 256, "seeds": arguments.seeds},
        }
    )


def run(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    source = resolve_model(MODEL)
    model = load_causal_lm(source, name=MODEL, dtype=torch.float32).eval()
    start = time.perf_counter()
    result = train_analog(model, recipe(variant, arguments), tokenizer=load_tokenizer(source))
    means = {
        name: {
            noise: {m: [r.mean(noise, m), r.std(noise, m)] for m in ("kl", "perplexity")}
            for noise in ("none", "pcm")
        }
        for name, r in result.reports.items()
    }
    return {
        "means": means,
        "training": result.training,
        "reports": {name: report.to_dict() for name, report in result.reports.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(runs: dict[str, Any]) -> str:
    lines = ["| without | model | KL | KL, pcm | perplexity, pcm | prepared in |"]
    lines.append("|---|---|---|---|---|---|")
    for variant, record in runs.items():
        for name, noises in record["means"].items():
            clean, noisy = noises["none"]["kl"][0], noises["pcm"]
            kl, perplexity = (
                f"{noisy[m][0]:.3f} ± {noisy[m][1]:.3f}" for m in ("kl", "perplexity")
            )
            seconds = record["training"]["seconds"]["calibration"]
            left_out = "–" if variant == "all" else variant
            lines.append(
                f"| {left_out} | {name} | {clean:.3f} | {kl} | {perplexity} | {seconds:.0f} s |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--clip-sigma", type=float, default=12.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/start.json"))
    arguments = parser.parse_args()
    chosen = arguments.variants.split(",")
    for variant in chosen:
        if variant not in VARIANTS:
            parser.error(f"there is no variant {variant!r}; known: {', '.join(VARIANTS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "variants")}
    record: dict[str, Any] = {"settings": settings, "runs": {}}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if before["settings"] == settings:
            record = before
    packages = ("analog-plugin", "torch", "transformers")
    record["versions"] = {"python": platform.python_version()} | {n: version(n) for n in packages}
    for variant in chosen:
        if variant not in record["runs"]:
            record["runs"][variant] = run(variant, arguments)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table({variant: record["runs"][variant] for variant in chosen}))


if __name__ == "__main__":
    main()
