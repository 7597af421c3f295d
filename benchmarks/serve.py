"""Tokens a second that vLLM generates on a CPU, from exported directories beside the original one.

    python benchmarks/serve.py ORIGINAL DIRECTORY [DIRECTORY...] [--dtypes float32,bfloat16]
        [--rows 4] [--prompt 32] [--tokens 64] [--repeats 5] [--compile]
        [--vllm build/vllm/bin/python] [--output benchmarks/results/serve.json]

`make build/vllm/.ready` installs vLLM. ORIGINAL is the model as it was, unquantized. Each directory
has a process of its own; one at a time generates, greedily, from the same random prompts, and they
take turns. Figures are medians of paired ratios of CPU time of one thread with their interquartile
range, tokens a second of that time, prompts included, and the size of the weights' files. What vLLM
refuses is listed with what it says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import torch


class Worker:
    """vLLM with one directory, in a process of its own environment.

    Args:
        python: Of that environment.
        script: Beside this file: what the process runs.
        path: Where else it finds modules.
        **job: For the script.
    """

    def __init__(
        self, python: Path, script: str = "serve_worker.py", path: str = "", **job: Any
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=kept | {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        self.about = self._answer()

    def generate(self) -> float:
        """Seconds of CPU time."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("vLLM's process ended; its log above says why.")
        return json.loads(line)


def prompts(directory: Path, rows: int, length: int) -> list[list[int]]:
    """Random tokens of the vocabulary."""
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, (rows, length)).tolist()


def size(directory: Path) -> int:
    """Bytes of the weights' files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def compare(dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a directory."""
    job = {
        "dtype": dtype,
        "prompts": prompts(arguments.directories[0], arguments.rows, arguments.prompt),
        "tokens": arguments.tokens,
        "eager": not arguments.compile,
    }
    workers: dict[Path, Worker] = {}
    try:
        for path in arguments.directories:
            workers[path] = Worker(arguments.vllm, directory=str(path), **job)
        able = {path: worker for path, worker in workers.items() if "why" not in worker.about}
        if arguments.directories[0] not in able:
            raise SystemExit(workers[arguments.directories[0]].about["why"])
        seconds = take_turns(able, arguments.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for path, worker in workers.items():
        row = {"dtype": dtype, "peer": str(path), "bytes": size(path), **worker.about}
        if path in able:
            made = arguments.rows * arguments.tokens / statistics.median(seconds[path])
            row |= {
                "seconds": seconds[path],
                "tokens_per_second": round(made, 2),
                "to_original": measure.ratio(seconds[path], seconds[arguments.directories[0]]),
            }
        rows.append(row)
    return rows


def take_turns(workers: Mapping[Path, Worker], repeats: int) -> dict[Path, list[float]]:
    """Seconds of each in each round but the first; every round begins with another one."""
    order = list(workers)
    seconds: dict[Path, list[float]] = {path: [] for path in order}
    for round_ in range(1 + repeats):
        first = round_ % len(order)
        for path in order[first:] + order[:first]:
            taken = workers[path].generate()
            if round_:
                seconds[path].append(taken)
    return seconds


def table(made: Mapping[str, Any]) -> str:
    """Markdown of what :func:`measure.record` gave."""
    lines = [
        [
            row["dtype"], row["peer"], ", ".join(row.get("kernels", [])),
            row["why"].splitlines()[0] if "why" in row else f"{row['tokens_per_second']:.1f}",
            measure.shown(row.get("to_original")), measure.megabytes(row["bytes"]),
        ]
        for row in made["rows"]
    ]  # fmt: skip
    headings = ["type", "directory", "kernel", "tokens per second", "time / original", "on disk"]
    given = made["settings"]["arguments"]
    caption = (
        f"{given['rows']} rows of {given['prompt']} tokens and {given['tokens']} generated ones, "
        f"{'compiled' if given['compile'] else 'eager'}, {made['settings']['machine']}:"
    )
    return f"{caption}\n\n{measure.markdown(headings, lines)}{measure.earlier(made)}"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("directories", nargs="+", type=Path, help="first the original")
    parser.add_argument("--rows", type=int, default=4, help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--vllm", type=Path, default=Path("build/vllm/bin/python"))
    arguments = parser.parse_args()
    if len(set(arguments.directories)) < len(arguments.directories):
        parser.error("a directory is given twice")
    if not arguments.vllm.exists():
        parser.error(f"there is no {arguments.vllm}; run make build/vllm/.ready, or give --vllm")
    rows = [row for dtype in measure.begin(arguments) for row in compare(dtype, arguments)]
    arguments.directories = [path.name for path in arguments.directories]
    arguments.vllm = str(arguments.vllm)
    made = measure.record(arguments, rows)
    measure.finish(arguments, made, [table(made)])


if __name__ == "__main__":
    main()
