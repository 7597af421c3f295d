"""``main_generate``: the Python twin of ``optimum-cli analog generate``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analog_integrations.optimum.arguments import count_of
from analog_integrations.optimum.evaluate import identity
from analog_integrations.optimum.export import load_model, resolve_device
from analog_plugin.data.limits import check_sequence_length
from analog_plugin.data.sampling import first_token
from analog_plugin.data.shards.merge import merge_shards
from analog_plugin.data.shards.records import ShardRequest
from analog_plugin.data.shards.store import ShardStore
from analog_plugin.data.shards.work import ModelSampler, Sampler, ShardWork, make_shards
from analog_plugin.demo import resolve_model
from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.pretrained import read_model_config

BACKENDS = ("transformers", "vllm", "ray")


def main_generate(
    model: str | None,
    output: str | Path,
    *,
    tokens: int | str | None = None,
    sequence_length: int | None = None,
    shards: int = 1,
    shard: int | str | Sequence[int] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    bos_token_id: int | None = None,
    ignore_eos: bool = True,
    batch_size: int = 32,
    backend: str = "transformers",
    workers: int = 1,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    merge: bool = False,
    validation: float = 0.0,
) -> ShardWork:
    """Sample training tokens from a model into shards, all of them or some; or merge them.

    Shards that are whole are left as they are. Which tokens a shard holds depends on the arguments
    and its number, the versions of packages and the kind of device alone.

    Args:
        model: Hub id, local directory or ``demo:smollm2-135m-instruct``; None: only merge.
        output: Directory of the shards, new or of the same request.
        tokens: In all shards together, ``20B``, ``500M`` or a number; rounded up to whole rows.
        sequence_length: Tokens of a row.
        shards: How many.
        shard: Which to make: ``17``, ``"0-9"``, ``"1,4,7-9"``, or numbers; None: all.
        seed: From which each shard's own is derived.
        temperature, top_k, bos_token_id, ignore_eos: See
            :func:`~analog_plugin.data.generate_dataset`.
        batch_size: Rows sampled together.
        backend: ``"transformers"``; ``"ray"``, the same in many processes; or ``"vllm"``.
        workers: Processes of the backend ``"ray"``.
        revision: Of a hub model.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the weights.
        merge: Check then that all shards are there and whole, and write the splits.
        validation: The share of shards for validation, of a merge.

    Raises:
        AnalogError: Something given is wrong; shards that were finished are kept.
    """
    if validation and not merge:
        raise AnalogError(
            "validation is a share of merged shards; write --merge (merge=True), too."
        )
    work = ShardWork()
    if model is not None:
        if backend not in BACKENDS:
            raise AnalogError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}.")
        if workers != 1 and backend != "ray":
            raise AnalogError("workers is of the backend ray; write --backend ray.")
        if workers < 1:
            raise AnalogError(f"workers is {workers}, but must be at least 1.")
        place = resolve_device(device, dtype)
        source = model_directory(model, revision)
        request = _request(
            model,
            source,
            tokens,
            sequence_length,
            bos_token_id,
            ignore_eos,
            revision=revision,
            shards=shards,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            batch_size=batch_size,
            backend="vllm" if backend == "vllm" else "transformers",
            dtype=dtype,
        )
        chosen = chosen_shards(shard)
        store = ShardStore.begin(output, request)
        sampler = partial(_sampler, str(source), request, place)
        if backend == "ray":
            from analog_integrations.ray.work import make_shards_with_ray

            gpus = 1 if place.startswith("cuda") else 0
            work = make_shards_with_ray(store, sampler, chosen, workers=workers, gpus=gpus)
        else:
            work = make_shards(store, sampler, chosen)
        print(f"{output}: {_counted(work.made)} made, {_counted(work.kept)} there already.")
    elif not merge:
        raise AnalogError("There is nothing to do; give a model to sample from, or --merge.")
    if merge:
        index = merge_shards(output, validation)
        told = ", ".join(f"{name} {count:,} tokens" for name, count in index.tokens.items())
        print(f"{output} is complete: {told}. Train with data: {{source: {output}}} in the recipe.")
    return work


def model_directory(model: str, revision: str | None = None) -> Path:
    """The local directory of a model; that of a hub model is fetched where it is not kept.

    Raises:
        AnalogError: There is no such model within reach.
    """
    source = resolve_model(str(model))
    if Path(source).is_dir():
        if revision is not None:
            raise AnalogError(f"revision is {revision!r}, but {model} is no hub model.")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:  # no pickles, and none of what is beside the model
        files = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    # The hub's client raises errors of its own, of HTTP libraries and of the system.
    except Exception as error:
        raise AnalogError(
            f"The model {model} is neither a local model directory nor a hub model within reach: "
            f"{one_line(error)}"
        ) from error


def chosen_shards(given: int | str | Sequence[int] | None) -> list[int] | None:
    """The numbers of shards that ``--shard`` names; None: all.

    Raises:
        AnalogError: It names none.
    """
    if given is None:
        return None
    if isinstance(given, int):
        return [given]
    if not isinstance(given, str):
        return [shard for each in given for shard in chosen_shards(each) or ()]
    chosen: list[int] = []
    for part in given.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last - first > 99_999:
            raise AnalogError(
                f"shard is {shown(given)}, but must be a number, a range or several: 17, 0-9, 1,4."
            )
        chosen += range(first, last + 1)
    return chosen


def _request(
    model: str,
    source: Path,
    tokens: int | str | None,
    sequence_length: int | None,
    bos_token_id: int | None,
    ignore_eos: bool,
    **given: Any,
) -> ShardRequest:
    """Everything that can be refused without the model's weights is refused here."""
    from transformers import GenerationConfig

    if tokens is None or sequence_length is None:
        raise AnalogError("tokens and sequence_length are needed, such as 20B and 4096.")
    config = read_model_config(source, model)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):  # few models need one
        generation = None
    check_sequence_length(config, sequence_length)
    text = config.get_text_config()
    start = first_token(model, generation, text) if bos_token_id is None else bos_token_id
    if not 0 <= start < text.vocab_size:
        raise AnalogError(
            f"bos_token_id is {start}, but the model's ids run from 0 to {text.vocab_size - 1}."
        )
    ends = None if ignore_eos else text.eos_token_id
    try:
        return ShardRequest(
            model=model,
            fingerprint=identity(str(source)),
            vocabulary=text.vocab_size,
            tokens=count_of(tokens),
            sequence_length=sequence_length,
            bos_token_id=start,
            eos_token_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
            **given,
        )
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"]))
        value = f"{what} is {shown(first['input'])}: " if what else ""
        raise AnalogError(f"{value}{first['msg'].removeprefix('Value error, ')}.") from None


def _sampler(source: str, request: ShardRequest, device: str) -> Sampler:
    if request.backend == "vllm":
        from analog_integrations.vllm.sampler import VllmSampler

        return VllmSampler(Path(source), request)
    model, _ = load_model(source, dtype=request.dtype, device=device)
    return ModelSampler(model, request)


def _counted(shards: Sequence[int]) -> str:
    return f"{len(shards)} shard{'' if len(shards) == 1 else 's'}"
