"""What ``torch.save`` wrote of a dictionary of tensors, read without running it.

``torch.load(weights_only=True)`` runs nothing either, but it can be made to take all memory
(``bytearray`` of any size) or never to return (tuples within tuples as keys). Here the description
of the tensors goes through :class:`~analog_integrations.lightning.machine.Machine`.
"""

from __future__ import annotations

import mmap
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_integrations.lightning.machine import Machine, Refused
from analog_plugin.errors import AnalogError, one_line, shown

RESAVE = 'torch.save(dict(model.state_dict()), "pytorch_model.bin")'
#: The description of tensors within a file: about 100 bytes for each.
_LONGEST_DESCRIPTION = 8 << 20
#: Storages and their types. Of complex, quantized and 8-bit floating point tensors no model is.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = frozenset(_STORAGES.values())
_ORDERED, _TENSOR, _PARAMETER = _FUNCTIONS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)


def read_archive(path: Path) -> dict[str, Any]:
    """The tensors of a file, mapped into memory; what is no tensor is left as it is described.

    Raises:
        AnalogError: It is no archive of ``torch.save``, is more than it seems, or holds more than a
            dictionary of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(path, archive.infolist())
            names = [name for name in records if f"/{name}".endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} descriptions of tensors instead of one")
            data, prefix = archive.read(names[0]), names[0].removesuffix("data.pkl")
            order = f"{prefix}byteorder"
            if order in records and archive.read(order) != sys.byteorder.encode():
                raise ValueError("its bytes are in the order of another machine")
        values = _Description().run(data)
        if not isinstance(values, dict):
            raise Refused(f"a {type(values).__name__}")
        with path.open("rb") as file:
            # A private copy of what is written to, so that tensors are like any others.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {
            key: _tensor(value, content, records.get(f"{prefix}data/{value.storage.key}"))
            if isinstance(value, _Described)
            else value
            for key, value in values.items()
        }
    except AnalogError:
        raise
    except Refused as error:
        raise AnalogError(
            f"{path} holds more than a dictionary of tensors, which is never unpickled ({error}); "
            "a raw state_dict() of aihwkit-lightning carries its configuration along: where you "
            f"trust the file, load it once and write {RESAVE}."
        ) from None
    # Broken files fail anywhere in zipfile, the parser of opcodes and torch.
    except Exception as error:
        raise AnalogError(
            f"{path} cannot be read as a file of torch.save: {one_line(error)}; copy it again, or "
            f"write it anew: {RESAVE}."
        ) from None


def _records(path: Path, found: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name; refuses those that are more than they seem."""
    plain = all(
        record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        for record in found
    )
    records = {record.filename: record for record in found}
    together = sum(record.file_size for record in found)
    if not plain or together > path.stat().st_size or len(records) < len(found):
        raise AnalogError(
            f"{path} is compressed or holds parts that overlap, which torch.save never writes; "
            f"write it anew: {RESAVE}."
        )
    described = sum(r.file_size for r in found if r.filename.endswith((".pkl", "byteorder")))
    if described > _LONGEST_DESCRIPTION:
        raise AnalogError(
            f"{path} describes its tensors in {described} bytes, more than any model needs; write "
            f"it anew: {RESAVE}."
        )
    return records


@dataclass(frozen=True)
class _Function:
    """A function of a description, which is not called."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Numbers of one type, in a record of their own."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Described:
    """A tensor: ``size`` and ``stride`` within a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Description(Machine):
    """Makes descriptions of tensors."""

    def find(self, module: Any, name: Any) -> torch.dtype | _Function:
        """A type of storage, or one of three functions."""
        if type(module) is str and type(name) is str:
            if module == "torch" and name in _STORAGES:
                return _STORAGES[name]
            if f"{module}.{name}" in _FUNCTIONS:
                return _Function(f"{module}.{name}")
        raise Refused(f"{shown(module)} {shown(name)}")

    def refer(self, reference: Any) -> _Storage:
        """A storage; the device that it was on does not matter."""
        kinds = [type(part) for part in reference] if type(reference) is tuple else []
        if kinds != [str, torch.dtype, str, str, int] or reference[0] != "storage":
            raise Refused("a reference to something that is no storage")
        return _Storage(reference[1], reference[2], reference[4])

    def call(self, made: Any, arguments: Any) -> dict[str, Any] | _Described:
        """An empty dictionary, a tensor, or a tensor as parameter."""
        name = made.name if isinstance(made, _Function) else ""
        if name == _ORDERED and arguments == ():
            return {}
        if name == _TENSOR and type(arguments) is tuple and len(arguments) >= 4:
            storage, offset, size, stride = arguments[:4]
            numbers = all(type(part) is tuple and _whole(*part) for part in (size, stride))
            if isinstance(storage, _Storage) and _whole(offset) and numbers:
                return _Described(storage, offset, size, stride)
        parameter = name == _PARAMETER and type(arguments) is tuple and len(arguments) > 0
        if parameter and isinstance(arguments[0], _Described):
            return arguments[0]
        raise Refused("a call that makes no plain tensor")

    def build(self, made: Any, state: Any) -> None:
        """Attributes of a dictionary: versions of modules, which nothing here asks for."""
        if type(made) is not dict:
            raise Refused("attributes of something that is no dictionary")


def _whole(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _tensor(described: _Described, content: mmap.mmap, record: zipfile.ZipInfo | None) -> Tensor:
    """The tensor over the mapped file, which must hold all of it."""
    storage = described.storage
    if record is None or not 0 <= storage.count * storage.dtype.itemsize <= record.file_size:
        raise ValueError(f"the storage {shown(storage.key)} is not there or shorter than described")
    # Behind 30 bytes of the record's own header: its name, and what aligns the content.
    header = content[record.header_offset : record.header_offset + 30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = record.header_offset + len(header) + lengths
    if header[:4] != b"PK\x03\x04" or start + record.file_size > len(content):
        raise ValueError(f"the storage {shown(storage.key)} lies outside the file")
    if storage.count == 0:
        flat = torch.empty(0, dtype=storage.dtype)
    else:
        flat = torch.frombuffer(content, dtype=storage.dtype, count=storage.count, offset=start)
    return flat.as_strided(described.size, described.stride, described.offset)
