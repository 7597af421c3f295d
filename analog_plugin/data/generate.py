"""Tokens that the model generates itself: what an analog foundation model is distilled on."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.data.limits import check_sequence_length, check_token_ids
from analog_plugin.data.sampling import Sampling, first_token, sample_rows
from analog_plugin.errors import AnalogError
from analog_plugin.files import read_json
from analog_plugin.paths import atomic_directory, cache_directory, check_output

_FORMAT = 1


def generate_dataset(
    model: nn.Module,
    tokens: int,
    sequence_length: int,
    *,
    bos_token_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    ignore_eos: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    cache: bool | Path = True,
) -> Tensor:
    """Sample training rows from ``model``, starting from the beginning-of-sequence token alone.

    As in 'Analog Foundation Models' (arXiv 2505.09663): temperature 1, top-k 50 (Llama) or none
    (Phi-3), end-of-sequence ignored. Generation is batched with a key-value cache. The result is
    kept on disk under a key of the model's weights and all arguments, and reused.

    Args:
        model: A causal language model, digital.
        tokens: At least so many tokens; rounded up to whole rows.
        sequence_length: Tokens of a row, the first included.
        bos_token_id: The token to start from; None: the model's.
        temperature: Greater than 0.
        top_k: Sample from so many most likely tokens; None: from all.
        ignore_eos: Sample on after an end-of-sequence token; otherwise a document ends there and
            documents are packed into rows.
        batch_size: Rows sampled together.
        seed: Seed of the sampling; torch's global generators are left as they were.
        cache: Whether, or in which directory, to keep the tokens.

    Returns:
        Token ids [rows, sequence_length].

    Raises:
        AnalogError: The model has no such beginning-of-sequence token, its context is shorter, or
            the cache cannot be written.
    """
    config = model.config
    start = bos_token_id
    if start is None:
        configs = (getattr(model, "generation_config", None), config)
        start = first_token(type(model).__name__, *configs)
    check_token_ids(model, torch.tensor([start]), "bos_token_id")
    check_sequence_length(model, sequence_length)
    if tokens < sequence_length:
        raise AnalogError(
            f"tokens is {tokens}, but must be at least one sequence of {sequence_length}; write "
            f"tokens: {sequence_length * 64}."
        )
    request = {
        "format": _FORMAT,
        "model": fingerprint(model),
        "architecture": type(model).__name__,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "bos_token_id": start,
        "eos_token_id": None if ignore_eos else getattr(config, "eos_token_id", None),
        "temperature": temperature,
        "top_k": top_k,
        "batch_size": batch_size,
        "seed": seed,
    }
    directory = None
    if cache is not False:
        root = cache_directory("data") if cache is True else Path(cache)
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]
        directory = root / name
        if (found := _read(directory, request)) is not None:
            return found
        check_output(directory, overwrite=True)
    rows = sample_rows(model, _sampling(request), math.ceil(tokens / sequence_length), seed)
    if directory is not None:
        _write(directory, request, rows)
    return rows


def _sampling(request: dict[str, Any]) -> Sampling:
    eos = request["eos_token_id"]
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    names = ("sequence_length", "bos_token_id", "temperature", "top_k", "batch_size")
    return Sampling(eos_token_ids=tuple(stops), **{name: request[name] for name in names})


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, types and a sample of every parameter's values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(flat.numel() // 2048, 1)
        sample = flat[::stride].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + sample)
    return digest.hexdigest()


def _read(directory: Path, request: dict[str, Any]) -> Tensor | None:
    """Cached rows, or None where there are none or they are damaged (they are made again)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = read_json(directory / "manifest.json")
        rows = load_file(directory / "tokens.safetensors")["input_ids"]
    except (AnalogError, OSError, SafetensorError, KeyError):
        return None
    if manifest.get("request") != request or manifest.get("sha256") != _hash(rows):
        return None
    return rows.long()


def _write(directory: Path, request: dict[str, Any], rows: Tensor) -> None:
    from safetensors.torch import save_file

    rows = rows.to(torch.int32).contiguous()
    with atomic_directory(directory, overwrite=True) as target:
        save_file({"input_ids": rows}, target / "tokens.safetensors")
        manifest = {"request": request, "rows": rows.shape[0], "sha256": _hash(rows)}
        (target / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _hash(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
