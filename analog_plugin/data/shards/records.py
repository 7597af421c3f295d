"""What is asked for, what a shard holds, and what was merged: records that are kept as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from analog_plugin.data.sampling import Sampling
from analog_plugin.errors import AnalogError, first_fault
from analog_plugin.files import read_json

REQUEST, INDEX = "request.json", "index.json"
#: A parquet column of lists counts its values in 32 bits.
_MOST_IN_A_SHARD = 2**31 - 1
_Count = Annotated[int, Field(gt=0, lt=2**62)]
_Small = Annotated[int, Field(gt=0, lt=2**31)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it from a file.

        Raises:
            AnalogError: The file is missing or holds something else.
        """
        values = read_json(path)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise AnalogError(f"{path} cannot be read: {first_fault(error)}.") from None

    def json_text(self) -> str:
        """As :meth:`load` reads it."""
        return json.dumps(self.model_dump(), indent=1) + "\n"


class ShardRequest(_Record):
    """All that decides which tokens come out, but for versions and the kind of device.

    Args:
        model, revision: What the user calls the model; told, not compared.
        fingerprint: Of the model's files.
        vocabulary: Its number of tokens.
        tokens: At least so many in all shards together; rounded up to whole rows.
        sequence_length: Tokens of a row.
        shards: How many.
        seed: From which each shard's own is derived.
        bos_token_id, eos_token_ids, temperature, top_k, batch_size: See
            :class:`~analog_plugin.data.sampling.Sampling`.
        backend: What samples.
        dtype: Type of the weights.
    """

    format: Literal[1] = 1
    model: str
    revision: str | None = None
    fingerprint: str = Field(min_length=1)
    vocabulary: _Small
    tokens: _Count
    sequence_length: int = Field(gt=1, lt=2**31)
    shards: int = Field(gt=0, le=99_999)
    seed: int = Field(ge=0, lt=2**63)
    bos_token_id: _Token
    eos_token_ids: list[_Token] = []
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_k: _Small | None = None
    batch_size: _Small
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rows < self.shards:
            raise ValueError(f"{self.rows} rows are fewer than {self.shards} shards")
        if self.rows_of(0) * self.sequence_length > _MOST_IN_A_SHARD:
            raise ValueError(f"a shard would hold {self.rows_of(0) * self.sequence_length} tokens")
        return self

    @property
    def rows(self) -> int:
        """Of all shards."""
        return math.ceil(self.tokens / self.sequence_length)

    @property
    def sampling(self) -> Sampling:
        """How rows are drawn."""
        return Sampling(
            sequence_length=self.sequence_length,
            bos_token_id=self.bos_token_id,
            eos_token_ids=tuple(self.eos_token_ids),
            temperature=self.temperature,
            top_k=self.top_k,
            batch_size=self.batch_size,
        )

    def rows_of(self, shard: int) -> int:
        """Rows of a shard: the first ones have one more where they do not divide evenly."""
        base, extra = divmod(self.rows, self.shards)
        return base + (shard < extra)

    def seed_of(self, shard: int) -> int:
        """The seed of a shard, which depends on no other shard."""
        return derived(self.seed, f"shard {shard}")

    def name_of(self, shard: int) -> str:
        """The name of a shard's parquet file."""
        return f"shard-{shard:05d}-of-{self.shards:05d}.parquet"

    def differences(self, other: ShardRequest) -> list[str]:
        """What ``other`` has otherwise, in words."""
        told = {"model", "revision"}
        mine, theirs = self.model_dump(exclude=told), other.model_dump(exclude=told)
        return [f"{k} {theirs[k]}, not {v}" for k, v in mine.items() if theirs[k] != v]


class MadeWith(_Record):
    """What a shard's tokens also depend on: versions of packages, the device, its threads."""

    versions: dict[str, str]
    device: str
    threads: _Small


class ShardManifest(_Record):
    """What a finished shard holds; beside its file.

    Args:
        request, shard: What was asked for, and which part of it this is.
        seed: The shard's own.
        made_with: What else its tokens depend on.
        rows, tokens: How many it has.
        largest_token: The largest id in it.
        bytes, sha256: Of the parquet file.
        tokens_sha256: Of the ids as little-endian 32-bit integers, row after row.
    """

    format: Literal[1] = 1
    request: ShardRequest
    shard: int = Field(ge=0)
    seed: int = Field(ge=0)
    made_with: MadeWith
    rows: _Count
    tokens: _Count
    largest_token: _Token
    bytes: _Count
    sha256: _Digest
    tokens_sha256: _Digest


class ShardIndex(_Record):
    """What :func:`~analog_plugin.data.shards.merge_shards` found, and how it split the shards.

    Args:
        request: That of all shards.
        splits: Shards of ``train``, and of ``validation`` where there is one, as names of files.
        rows, tokens: Of each split.
        tokens_sha256: Of the shards' own hashes, in order.
    """

    format: Literal[1] = 1
    request: ShardRequest
    splits: dict[Literal["train", "validation"], list[str]]
    rows: dict[Literal["train", "validation"], _Count]
    tokens: dict[Literal["train", "validation"], _Count]
    tokens_sha256: _Digest

    @model_validator(mode="after")
    def _all_shards(self) -> Self:
        names = [name for split in self.splits.values() for name in split]
        asked = self.request
        if sorted(names) != [asked.name_of(shard) for shard in range(asked.shards)]:
            raise ValueError("the splits do not name every shard once")
        if not self.splits.get("train") or set(self.rows) != set(self.splits):
            raise ValueError("the splits have no rows")
        return self


def derived(seed: int, purpose: str) -> int:
    """A seed of 63 bits for one purpose."""
    digest = hashlib.sha256(f"{seed}: {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def made_with(device: Any, *packages: str) -> MadeWith:
    """Versions of ``packages``, and the kind of the torch ``device``."""
    import platform
    from importlib.metadata import version

    import torch

    place = torch.device(device)
    if place.type == "cuda":
        kind = f"cuda, {torch.cuda.get_device_name(place)}"
    elif place.type == "cpu":
        kind = f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    else:
        kind = place.type
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return MadeWith(versions=versions, device=kind, threads=torch.get_num_threads())
