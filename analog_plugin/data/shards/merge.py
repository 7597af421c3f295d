"""Checking that all shards are whole, and splitting them for training and validation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from analog_plugin.data.shards.records import INDEX, ShardIndex, derived
from analog_plugin.data.shards.store import ShardStore
from analog_plugin.errors import AnalogError
from analog_plugin.paths import atomic_file
from analog_plugin.progress import progress_bar

_SHOWN = 5
_CARD = "README.md"


def merge_shards(directory: str | Path, validation: float = 0.0) -> ShardIndex:
    """Check every shard against its manifest and all against the request; write the splits.

    Nothing is copied: ``index.json`` names the files of each split, whole shards drawn by the
    request's seed, and the dataset card tells them to ``datasets.load_dataset``.

    Args:
        directory: Of the shards.
        validation: The share of shards that are not trained on, at most a half; 0: none.

    Raises:
        AnalogError: A shard is missing or damaged, or the share is less than one shard.
    """
    store = ShardStore(directory)
    asked = store.request
    held_out = _number(validation, asked.shards)
    faults: dict[int, str] = {}
    digest = hashlib.sha256()
    for shard in progress_bar(range(asked.shards), desc="Checking the shards"):
        try:
            digest.update(store.whole(shard).tokens_sha256.encode())
        except AnalogError as error:
            faults[shard] = str(error)
    if faults:
        told = "; ".join(
            f"shard {shard}: {fault}" for shard, fault in list(faults.items())[:_SHOWN]
        )
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise AnalogError(
            f"{directory} is not complete ({told}{more}); make them with optimum-cli analog "
            f"generate --shard {','.join(map(str, list(faults)[:_SHOWN]))}."
        )
    drawn = sorted(range(asked.shards), key=lambda shard: derived(asked.seed, f"split {shard}"))
    splits: dict[Any, list[int]] = {"train": sorted(drawn[held_out:])}
    if held_out:
        splits["validation"] = sorted(drawn[:held_out])
    rows = {name: sum(map(asked.rows_of, split)) for name, split in splits.items()}
    index = ShardIndex(
        request=asked,
        splits={name: [asked.name_of(s) for s in split] for name, split in splits.items()},
        rows=rows,
        tokens={name: count * asked.sequence_length for name, count in rows.items()},
        tokens_sha256=digest.hexdigest(),
    )
    try:
        for name, text in ((_CARD, _card(index)), (INDEX, index.json_text())):
            with atomic_file(store.directory / name) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AnalogError(f"{directory} cannot be written ({error}).") from None
    return index


def _number(validation: float, shards: int) -> int:
    if not 0 <= validation <= 0.5:
        raise AnalogError(f"validation is {validation}, but must be a share between 0 and 0.5.")
    number = round(validation * shards)
    if validation and number in (0, shards):
        raise AnalogError(
            f"validation is {validation}, less than one of {shards} shards; write {_least(shards)}."
        )
    return number


def _least(shards: int) -> str:
    return "0, or make more shards" if shards == 1 else f"{1 / shards:.3g} for one of them"


def _card(index: ShardIndex) -> str:
    """What ``datasets.load_dataset`` reads, and people."""
    asked = index.request
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, names in index.splits.items():
        lines += [f"  - split: {split}", "    path:", *(f"    - {name}" for name in names)]
    rows = "; ".join(f"{name}: {count:,} rows" for name, count in index.rows.items())
    lines += [
        "---", "",
        "# Tokens that a language model sampled from itself", "",
        f"Rows of {asked.sequence_length} token ids (`input_ids`) of the model with the "
        f"fingerprint `{asked.fingerprint}`, sampled at temperature {asked.temperature:g}, top-k "
        f"{asked.top_k or 'none'}. {rows}.", "",
        "Each shard's manifest tells how it was made; `index.json` lists the splits.", "",
    ]  # fmt: skip
    return "\n".join(lines)
