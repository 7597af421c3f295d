"""``optimum-cli analog generate``: arguments only; the work is in ``generate.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import add_place, errors_are_sentences

_GENERATE = """\
Sample training tokens from a model itself into shards: parquet files with a manifest each. Many
processes and machines may fill one directory, and any shard can be made again elsewhere.
"""

_EXAMPLES = """\
examples:
  optimum-cli analog generate --model demo:smollm2-135m-instruct --tokens 40k \\
      --sequence-length 128 --shards 8 tokens
  optimum-cli analog generate --model meta-llama/Llama-3.2-1B-Instruct --tokens 20B --top-k 50 \\
      --sequence-length 4096 --shards 1200 --shard 17 tokens
  optimum-cli analog generate --merge --validation 0.125 tokens
  then, in the recipe:  data: {source: tokens}

Without --shard all shards are made that are missing or damaged; the same command goes on where it
was interrupted, and started several times it shares the work.
"""


class AnalogGenerateCommand(BaseOptimumCLICommand):
    """Training tokens in shards."""

    COMMAND = CommandInfo(name="generate", help="Sample training tokens into shards.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _GENERATE
        parser.epilog = _EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("output", type=Path, help="directory of the shards")
        parser.add_argument(
            "-m", "--model", help="hub id, local directory, or demo:smollm2-135m-instruct"
        )
        parser.add_argument("--revision", help="of a hub model")
        parser.add_argument("--tokens", help="in all shards together: 20B, 500M, 10k")
        parser.add_argument("--sequence-length", type=int, help="tokens of a row")
        parser.add_argument("--shards", type=int, default=1, help="how many (default: 1)")
        parser.add_argument("--shard", help="which to make: 17, 0-9 or 1,4,7-9 (default: all)")
        parser.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")
        parser.add_argument(
            "--temperature", type=float, default=1.0, help="of the sampling (default: 1)"
        )
        parser.add_argument(
            "--top-k", type=int, help="sample from so many likely tokens (default: from all)"
        )
        parser.add_argument("--bos-token-id", type=int, help="first token (default: the model's)")
        parser.add_argument(
            "--ignore-eos",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="sample on after an end of sequence, or pack the documents that end there "
            "(default: on)",
        )
        parser.add_argument(
            "--batch-size", type=int, default=32, help="rows sampled together (default: 32)"
        )
        parser.add_argument(
            "--backend",
            default="transformers",
            choices=("transformers", "vllm", "ray"),
            help="what samples; ray is transformers in many workers (default: transformers)",
        )
        parser.add_argument(
            "--workers", type=int, default=1, help="processes of the backend ray (default: 1)"
        )
        add_place(parser, "weights")
        parser.add_argument(
            "--merge", action="store_true", help="check that all shards are whole; write splits"
        )
        parser.add_argument(
            "--validation", type=float, default=0.0, help="share of shards kept from training"
        )

    def run(self) -> None:
        """Run :func:`main_generate`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("finished shards are kept; the same command goes on from there"):
            from analog_integrations.optimum.generate import main_generate

            options = {name: getattr(given, name) for name in _ARGUMENTS}
            main_generate(given.model, given.output, **options)


_ARGUMENTS = (
    "tokens", "sequence_length", "shards", "shard", "seed", "temperature", "top_k", "bos_token_id",
    "ignore_eos", "batch_size", "backend", "workers", "revision", "device", "dtype", "merge",
    "validation",
)  # fmt: skip
