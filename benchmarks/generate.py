"""Tokens a second sampled into shards, beside plain batches of `model.generate`.

    python benchmarks/generate.py [--model demo:smollm2-135m-instruct] [--rows 16] [--length 32]
        [--repeats 3] [--vllm build/vllm/bin/python] [--output benchmarks/results/generate.json]

Every way makes as many rows of the same length in one batch, at temperature 1, from the
beginning-of-sequence token alone; they take turns, on one thread. Figures are medians of paired
ratios of CPU time with their interquartile range:

- model.generate: as one would write it, `min_new_tokens` keeping documents from ending;
- analog-plugin: a shard, with its hashes, its parquet file and its manifest on disk;
- vLLM, where `make build/vllm/.ready` has installed it: the rows of a shard, by the backend vllm.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from models import SIZES, random_model
from serve import Worker

from analog_plugin.data.shards import ModelSampler, ShardRequest, ShardStore, make_shards
from analog_plugin.demo import resolve_model
from analog_plugin.pretrained import load_causal_lm

PLAIN, VLLM = "model.generate", "vLLM"
_SHARDS = 1000  # more than rounds


def plain_way(model: Any, arguments: argparse.Namespace) -> Callable[[], object]:
    prompt = torch.full((arguments.rows, 1), 1, device=arguments.device)
    new = arguments.length - 1

    def generate() -> object:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip

    return generate


def our_way(model: Any, arguments: argparse.Namespace, target: Path) -> Callable[[], object]:
    request = ShardRequest(
        model=arguments.model, fingerprint="of no matter", vocabulary=model.config.vocab_size,
        tokens=_SHARDS * arguments.rows * arguments.length, sequence_length=arguments.length,
        shards=_SHARDS, seed=0, bos_token_id=1, temperature=1.0, batch_size=arguments.rows,
    )  # fmt: skip
    store, shards = ShardStore.begin(target, request), itertools.count()
    return lambda: make_shards(store, lambda: ModelSampler(model, request), [next(shards)])


def vllm_way(arguments: argparse.Namespace) -> Worker | None:
    if arguments.model in SIZES or not arguments.vllm.exists():
        return None
    root = Path(__file__).parents[1]
    return Worker(
        arguments.vllm, script="generate_worker.py", path=f"{root}:{root / 'integrations'}",
        directory=resolve_model(arguments.model), rows=arguments.rows, length=arguments.length,
    )  # fmt: skip


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way."""
    torch.set_num_threads(1)
    if arguments.model in SIZES:
        model: Any = random_model(arguments.model, None, arguments.device)
    else:
        source = resolve_model(arguments.model)
        model = load_causal_lm(source, dtype=torch.float32).eval().to(arguments.device)
    worker = vllm_way(arguments)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        ways = {
            PLAIN: plain_way(model, arguments),
            peers.OURS: our_way(model, arguments, Path(scratch) / "shards"),
        }
        try:
            for round_ in range(1 + arguments.repeats):
                turn = dict(reversed(ways.items())) if round_ % 2 else ways
                one = measure.interleave(turn, 1, arguments.device, warmup=0)
                if worker is not None:
                    one[VLLM] = [worker.generate()]
                for name, seconds in one.items() if round_ else ():
                    times.setdefault(name, []).extend(seconds)
        finally:
            if worker is not None:
                worker.close()
    tokens = arguments.rows * arguments.length
    return [
        {
            "dtype": "float32",
            "peer": name,
            "seconds": seconds,
            "tokens_per_second": round(tokens / statistics.median(seconds), 2),
            "to_generate": measure.ratio(times[PLAIN], seconds),
            **(worker.about if name == VLLM and worker is not None else {}),
        }
        for name, seconds in sorted(times.items(), key=lambda item: item[0] != PLAIN)
    ]


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what :func:`measure.record` gave: ``"generate"``."""
    settings = record["settings"]
    given = settings["arguments"]
    lines = [
        [row["peer"], f"{row['tokens_per_second']:.1f}", measure.shown(row["to_generate"])]
        for row in record["rows"]
    ]
    table = measure.markdown(["who", "tokens per second", "throughput / model.generate"], lines)
    caption = (
        f"{given['model']}, float32, {given['rows']} rows of {given['length']} tokens, "
        f"{settings['machine']}:"
    )
    return {"generate": f"{caption}\n\n{table}"}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=16, help="sampled together")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--vllm", type=Path, default=Path("build/vllm/bin/python"))
    arguments = parser.parse_args()
    measure.begin(arguments)
    rows = compare(arguments)
    arguments.vllm = str(arguments.vllm)
    made = measure.record(arguments, rows)
    measure.finish(arguments, made, tables(made).values())


if __name__ == "__main__":
    main()
