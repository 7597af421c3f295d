"""A teacher on disk: its most likely tokens for every training row, computed once."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from analog_plugin.data.generate import fingerprint
from analog_plugin.data.shards.rows import TokenRows
from analog_plugin.errors import AnalogError, first_fault, one_line
from analog_plugin.files import read_json, sha256_of
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.paths import atomic_directory, check_output
from analog_plugin.progress import progress_counter
from analog_plugin.training.divergence import TopTokens
from analog_plugin.training.hidden import HiddenStates

MANIFEST = "teacher.json"
#: What a row of the dataset holds beside its tokens: a field of ``TopTokens`` each.
FIELDS = {
    "teacher_tokens": torch.int32,
    "teacher_log_probabilities": torch.float32,
    "teacher_log_rest": torch.float32,
}
#: Positions whose logits exist at the same time.
_POSITIONS = 1024
#: Rows in memory at the same time, where they come from shards.
_ROWS = 256
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_Count = Annotated[int, Field(gt=0, lt=2**31)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=r"^rows-[0-9]{6}\.safetensors$")  # nowhere else than beside
    rows: _Count
    sha256: _Digest


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    top_k: _Count
    temperature: float = Field(gt=0, allow_inf_nan=False)
    vocabulary: _Count
    length: _Count
    tokens: _Digest
    teacher: _Digest
    prefix: list[int]
    files: list[_File] = Field(min_length=1)


@torch.no_grad()
def store_teacher(
    teacher: Any,
    rows: TokenRows,
    output: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    rows_per_file: int = 256,
    overwrite: bool = False,
) -> StoredTeacher:
    """Compute a teacher's ``top_k`` most likely tokens at every position of ``rows``, and keep it.

    A position takes ``8 k + 4`` bytes. The directory appears when all is done.

    Args:
        teacher: The digital original, with the digital prefix installed if training has one.
        rows: Training tokens [rows, length].
        output: The directory, new or empty.
        top_k: k; see :func:`~analog_plugin.training.loss.distillation_loss`.
        temperature: That of the training's loss.
        batch_size: Rows computed together.
        rows_per_file: Rows in each file.
        overwrite: Replace a directory that is not empty.

    Raises:
        AnalogError: k is no number of tokens, the temperature not positive, ``rows`` are none, the
            teacher gives no probabilities, or ``output`` cannot be written.
    """
    from safetensors.torch import save_file

    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise AnalogError(f"{name} is {value}, but must be at least 1.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise AnalogError(f"temperature is {temperature}, but must be greater than 0.")
    if rows.dim() != 2 or rows.numel() == 0:
        raise AnalogError(
            f"The rows have the shape {tuple(rows.shape)}, but must be token ids [rows, length]."
        )
    check_output(output, overwrite)
    states, device = HiddenStates.of(teacher), next(teacher.parameters()).device
    files: list[dict[str, Any]] = []
    vocabulary = 0
    bar = progress_counter(desc="Computing the teacher", total=rows.numel(), unit="tok")
    with evaluation_mode(teacher), atomic_directory(output, overwrite) as target, bar as progress:
        for number, part in enumerate(_pieces(rows, rows_per_file)):
            made = []
            for batch in part.split(batch_size):
                hidden = states(None, input_ids=batch.to(device)).flatten(0, 1)
                for piece in hidden.split(_POSITIONS):
                    logits = states.head(piece)
                    vocabulary = logits.shape[-1]
                    made.append(TopTokens.of(logits, top_k, temperature))
                    if not bool(made[-1].log_probabilities.isfinite().all()):
                        raise AnalogError(
                            "The teacher's logits hold NaN or infinity; write dtype float32, or "
                            "give another model."
                        )
                progress.update(batch.numel())
            shape = part.shape
            parts = (
                torch.cat([t.tokens for t in made]).view(*shape, top_k),
                torch.cat([t.log_probabilities for t in made]).view(*shape, top_k),
                torch.cat([t.log_rest for t in made]).view(shape),
            )
            named = zip(FIELDS.items(), parts, strict=True)
            name = f"rows-{number:06d}.safetensors"
            save_file({n: p.cpu().to(t).contiguous() for (n, t), p in named}, target / name)
            digest = sha256_of(target / name)
            files.append({"name": name, "rows": len(part), "sha256": digest})
        manifest = {
            "format": 1,
            "top_k": top_k,
            "temperature": float(temperature),
            "vocabulary": vocabulary,
            "length": rows.shape[1],
            "tokens": token_digest(rows),
            "teacher": fingerprint(teacher),
            "prefix": _prefix(teacher),
            "files": files,
        }
        (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return StoredTeacher(output, verify=False)


class StoredTeacher:
    """What :func:`store_teacher` wrote; rows are read when they are asked for.

    Args:
        directory: Where it is.
        verify: Whether to compare the files with their hashes.

    Raises:
        AnalogError: It is not there, damaged, or of another format.

    Attributes:
        top_k, temperature, vocabulary: What was stored.
    """

    def __init__(self, directory: str | Path, verify: bool = True) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.is_file():
            raise AnalogError(
                f"{directory} holds no stored teacher; write one with optimum-cli analog teacher."
            )
        try:
            manifest = _Manifest.model_validate(read_json(path))
            damaged = [
                file.name
                for file in manifest.files
                if verify and sha256_of(self.directory / file.name) != file.sha256
            ]
        except ValidationError as error:
            raise self._unreadable(f"{MANIFEST}: {first_fault(error)}") from None
        except (AnalogError, OSError) as error:
            raise self._unreadable(str(error).rstrip(".")) from None
        if damaged:
            raise self._unreadable(f"{damaged[0]} is not the file that was written")
        self._manifest = manifest
        self.top_k, self.temperature = manifest.top_k, manifest.temperature
        self.vocabulary = manifest.vocabulary
        self._starts = [0]
        for file in manifest.files:
            self._starts.append(self._starts[-1] + file.rows)

    def _unreadable(self, why: str) -> AnalogError:
        return AnalogError(
            f"The stored teacher {self.directory} cannot be read: {why}; write it anew with "
            "optimum-cli analog teacher."
        )

    def check_loss(
        self, temperature: float = 1.0, top_k: int | None = None, teacher_dtype: Any = None
    ) -> None:
        """Refuse settings of a loss other than what was stored.

        Raises:
            AnalogError: One of them is, or is about a teacher in memory.
        """
        told = {
            f"temperature {self.temperature}, not {temperature}": self.temperature == temperature,
            f"top_k {self.top_k}, not {top_k}": top_k in (None, self.top_k),
            f"a type of its own, not {teacher_dtype}": teacher_dtype is None,
        }
        other = [what for what, same in told.items() if not same]
        if other:
            raise AnalogError(
                f"The stored teacher {self.directory} has {other[0]}; write the loss so, or store "
                "the teacher anew with optimum-cli analog teacher."
            )

    def check(self, teacher: nn.Module) -> None:
        """Refuse to stand in for another teacher.

        Args:
            teacher: The digital original, with its prefix.

        Raises:
            AnalogError: The model or its digital prefix is not what was stored.
        """
        own = self._manifest
        if own.teacher != fingerprint(teacher):
            raise self._another("model")
        if own.prefix != _prefix(teacher):
            raise self._another(f"digital prefix (it was stored with {own.prefix})")

    def _another(self, what: str) -> AnalogError:
        return AnalogError(
            f"The stored teacher {self.directory} is for another {what}; write it anew with "
            "optimum-cli analog teacher and the same model and recipe."
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Tensor]:
        """Row ``index``: its tokens' ids and log-probabilities [length, k], and the rest [length].

        Raises:
            AnalogError: The file does not hold such values.
        """
        from safetensors import SafetensorError, safe_open

        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        file, at = self._manifest.files[number], index - self._starts[number]
        length, k = self._manifest.length, self.top_k
        shapes = [(length, k), (length, k), (length,)]
        try:
            with safe_open(self.directory / file.name, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in FIELDS}
                if any(each.get_shape()[0] != file.rows for each in slices.values()):
                    raise self._wrong(file, f"it does not hold {file.rows} rows")
                found = {name: each[at] for name, each in slices.items()}
        except (SafetensorError, OSError, IndexError) as error:
            raise self._wrong(file, one_line(error)) from None
        for (name, dtype), shape in zip(FIELDS.items(), shapes, strict=True):
            if found[name].dtype != dtype or tuple(found[name].shape) != shape:
                raise self._wrong(file, f"{name} of row {at} is not {dtype} {list(shape)}")
        tokens, log_p, log_rest = found.values()
        sound = (tokens >= 0).all() and (tokens < self.vocabulary).all()
        sound = sound and (log_p < 1e-3).all() and (log_rest < 1e-3).all()  # neither NaN nor more
        if not sound:
            raise self._wrong(file, f"row {at} holds no probabilities of known tokens")
        return found

    def _wrong(self, file: _File, why: str) -> AnalogError:
        return AnalogError(
            f"The stored teacher {self.directory} cannot be used: {file.name}: {why}; write it "
            "anew with optimum-cli analog teacher."
        )

    def dataset(self, rows: TokenRows) -> Dataset:
        """Training rows [rows, length] without padding, each with what is stored for it.

        Raises:
            AnalogError: They are not those that the teacher was computed on.
        """
        if len(rows) != len(self) or token_digest(rows) != self._manifest.tokens:
            raise self._another("set of training tokens")
        return _Rows(self, rows)


class _Rows(Dataset):
    def __init__(self, teacher: StoredTeacher, rows: TokenRows) -> None:
        self.teacher, self.rows = teacher, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]} | self.teacher.row(index)


def taken(inputs: dict[str, Any]) -> TopTokens:
    """What a batch holds of the teacher, taken out of ``inputs``.

    Raises:
        AnalogError: It holds none.
    """
    if not all(name in inputs for name in FIELDS):
        raise AnalogError(
            "A batch has nothing of the stored teacher; give its dataset(rows) as train_dataset, "
            "and for an evaluation the dataset of another one that was stored for those rows."
        )
    tokens, log_probabilities, log_rest = (inputs.pop(name) for name in FIELDS)
    return TopTokens(tokens.long(), log_probabilities, log_rest)


def token_digest(rows: TokenRows) -> str:
    """Hash of token ids [rows, length]."""
    digest = hashlib.sha256(f"{tuple(rows.shape)}".encode())
    for part in _pieces(rows, _ROWS):
        digest.update(part.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pieces(rows: TokenRows, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _prefix(teacher: Any) -> list[int]:
    prefix = installed_prefix(teacher)
    tokens: Sequence[int] = () if prefix is None else prefix.tokens
    return [int(token) for token in tokens]
