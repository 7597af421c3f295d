"""``main_evaluate``: the Python twin of ``optimum-cli analog evaluate``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from analog_integrations.optimum.export import load_model, resolve_device
from analog_plugin import AnalogScheme, convert_to_analog
from analog_plugin.checkpoint import load_checkpoint
from analog_plugin.data import evaluation_tokens
from analog_plugin.data.limits import check_sequence_length, check_token_ids
from analog_plugin.demo import resolve_model
from analog_plugin.errors import AnalogError, require
from analog_plugin.evaluation import NoiseReport
from analog_plugin.evaluation.distributions import describe_models
from analog_plugin.evaluation.report import write_report
from analog_plugin.evaluation.sensitivity import SensitivityReport
from analog_plugin.evaluation.sweep import SweepModel, layer_by_layer, sweep
from analog_plugin.noise import at_times, resolve_noise
from analog_plugin.pretrained import load_causal_lm, load_tokenizer, read_model_config

#: How a full-precision model is programmed: noise alone, without converters.
NOISE_ONLY = AnalogScheme(input_bits=None, output_bits=None, tile_rows=512)


def main_evaluate(
    models: str | Sequence[str] | Mapping[str, str],
    output: str | Path,
    *,
    noise: Sequence[str | Mapping[str, Any]] = ("pcm",),
    time: Sequence[str | float] = (),
    seeds: int | Sequence[int] = 10,
    original: str | None = None,
    corpus: str = "pydoc_data.topics",
    blocks: int = 16,
    length: int = 256,
    batch_size: int = 4,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    sensitivity: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, NoiseReport]:
    """Measure models under noise, and write tables; finished cells are kept and not run again.

    Args:
        models: Directories, hub ids or ``demo:`` names, or these by the names that they get in the
            tables. Analog checkpoints run with their converters, full-precision models with the
            noise alone in 512-row tiles, quantized ones without noise.
        output: Directory of ``cells.jsonl``, ``report.html``, the tables and the figures.
        noise: Noise models; without noise is measured always.
        time: Times since programming (``"1h"``) at which each noise model is read that has drift or
            read noise; none: as programmed.
        seeds: Number of noise seeds, or a list of them.
        original: Full-precision original, for KL and agreement; None: the first of ``models`` that
            is one.
        corpus, blocks, length: What to measure on; see
            :func:`~analog_plugin.data.evaluation_tokens`.
        batch_size: Blocks, or questions of a task, evaluated together.
        tasks: Tasks or groups of lm-eval, scored beside perplexity and KL; ``"offline"`` (needs no
            download) and ``"paper"`` are sets of them.
        include_path: A directory with further tasks of lm-eval.
        limit: Questions of each task; None: all.
        sensitivity: Measure each layer of the analog checkpoints alone, under the first noise and
            seed 0, on two of the blocks: one evaluation a layer.
        device: Where to compute; None: a GPU if there is one.
        dtype: Type of the weights.
        overwrite: Forget the cells in ``output``.

    Returns:
        A report by model.

    Raises:
        AnalogError: Something given is wrong; one sentence says what. Finished cells are kept.
    """
    for module in ("scipy.stats", "matplotlib"):  # before the long work, not after it
        require(module, "eval")
    check_counts(
        output, blocks=(blocks, 1), length=(length, 2), batch_size=(batch_size, 1), limit=(limit, 1)
    )
    named = named_models(models)
    noises = [None, *at_times(noise, time)]
    for item in noises:  # refused before anything is loaded
        resolve_noise(item)
    kinds = {name: kind_of(source, length) for name, source in named.items()}
    place = resolve_device(device, dtype)
    if original is None:
        original = next((named[n] for n, kind in kinds.items() if kind == "full"), None)
    elif kind_of(original, length) != "full":
        raise AnalogError(f"The original {original} is no full-precision model; give one.")
    first = original or next(iter(named.values()))
    tokenizer = load_tokenizer(resolve_model(first), first)
    if tokenizer is None:
        raise AnalogError(f"The model {first} has no tokenizer beside it; give one that has.")
    tokens = evaluation_tokens(tokenizer, blocks, length, corpus)
    evaluators: list[Any] = ["fidelity"]
    if tasks:
        from analog_integrations.lm_eval.tasks import task_evaluators

        evaluators += task_evaluators(
            tasks, tokenizer, directory=Path(output) / "tasks", include_path=include_path,
            limit=limit,
        )  # fmt: skip

    identity_of = functools.cache(identity)  # reads every file of a model

    def entry(source: str, kind: str) -> SweepModel:
        def load() -> Any:
            model = load_entry(source, kind, dtype, place)
            check_token_ids(model, tokens, f"The corpus, read for {source},")
            return model

        return SweepModel(load, identity_of(source), noisy=kind != "quantized")

    entries = {name: entry(source, kinds[name]) for name, source in named.items()}
    reports = sweep(
        entries,
        tokens,
        noises,
        seeds,
        output,
        original=None if original is None else entry(original, "original"),
        evaluators=evaluators,
        batch_size=batch_size,
        settings={"dtype": dtype, "device": place.partition(":")[0], "versions": versions()},
        overwrite=overwrite,
    )
    notes = [f"Measured on {blocks} blocks of {length} tokens of {corpus}, in {dtype}."]
    if original is not None:
        notes.append(f"KL and top-1 are to {original}.")
    programmable = {name: model for name, model in entries.items() if model.noisy}
    described = describe_models(programmable, output, overwrite=overwrite)
    layers: dict[str, SensitivityReport] = {}
    if sensitivity:
        analog = {n: model for n, model in programmable.items() if kinds[n] == "analog"}
        first_noise = noises[1] if noises[1:] else None
        layers = layer_by_layer(analog, tokens[:2], first_noise, output, overwrite=overwrite)
    title = f"{', '.join(named)} under hardware noise"
    text = write_report(
        reports, output, title=title, notes=notes, sensitivity=layers, distributions=described
    )
    print(f"\n{text}\nWritten to {output}; the page is {Path(output) / 'report.html'}.")
    return reports


def named_models(models: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Models by name: the last part of what they are called, where that tells them apart.

    Raises:
        AnalogError: There is none, or one twice.
    """
    if isinstance(models, str):
        models = [models]
    if not models:
        raise AnalogError("No model was given; give a directory, a hub id or demo:NAME.")
    if isinstance(models, Mapping):
        return dict(models)
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    if len(set(models)) != len(models):
        raise AnalogError(f"A model is given twice among {', '.join(models)}; give each once.")
    return dict(zip(short if len(set(short)) == len(short) else models, models, strict=True))


def kind_of(source: str, length: int = 0) -> str:
    """``analog`` (a checkpoint of ours), ``quantized`` or ``full``.

    Raises:
        AnalogError: It is no causal language model, or reads fewer than ``length`` tokens.
    """
    config = read_model_config(resolve_model(source), source)
    check_sequence_length(config, length, "length")
    if getattr(config, "analog_config", None) is not None:
        return "analog"
    return "quantized" if getattr(config, "quantization_config", None) is not None else "full"


def load_entry(source: str, kind: str, dtype: str, device: str) -> Any:
    """Load a model of :func:`kind_of`, ready to be programmed if it can be.

    Args:
        source: What the user called it.
        kind: As told by ``kind_of``, or ``"original"``: full precision, left digital.
        dtype, device: Of its weights.
    """
    import torch

    if kind == "analog":
        return load_checkpoint(source, dtype=getattr(torch, dtype)).to(device)
    if kind == "quantized":
        options = {"dtype": getattr(torch, dtype)}
        return load_causal_lm(resolve_model(source), name=source, **options).to(device).eval()
    model, _ = load_model(source, dtype=dtype, device=device)
    return model.eval() if kind == "original" else convert_to_analog(model.eval(), NOISE_ONLY)


def identity(source: str) -> str:
    """What changes with the model: a digest of its files, or a hub id and its commit."""
    directory = Path(resolve_model(source))
    if not directory.is_dir():
        commit = getattr(read_model_config(str(directory), source), "_commit_hash", None)
        return f"{source}@{commit}"
    digest = hashlib.sha256()
    # Not all that may lie there: measurements of it, for instance, or the time that it took.
    for path in sorted(
        path for folder in ("", "analog") for path in (directory / folder).glob("*")
    ):
        loaded = path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja")
        if not loaded or path.name == "training.json" or not path.is_file():
            continue
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    found = {}
    for package in ("analog-plugin", "torch", "transformers", "aihwkit", "lm-eval"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def check_counts(output: str | Path, **counts: tuple[int | None, int]) -> None:
    """Refuse an output that is no directory, and counts below their least value.

    Args:
        output: The directory of measurements.
        **counts: Value (None: not given) and least value, by the argument's name.
    """
    if Path(output).exists() and not Path(output).is_dir():
        raise AnalogError(f"The output {output} is a file; give a directory.")
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise AnalogError(f"{name} is {value}, but must be at least {least}.")
