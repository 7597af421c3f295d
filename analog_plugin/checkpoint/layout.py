"""Names of a checkpoint's files, the schema of ``analog_config``, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
)

from analog_plugin.errors import AnalogError, first_fault, one_line, shown
from analog_plugin.files import read_json, sha256_of
from analog_plugin.scheme import AnalogScheme

VERSION = 1
CONFIG_FILE = "config.json"
STATE_FILE = "analog/analog_state.safetensors"
RECIPE_FILE = "analog/recipe.yaml"
TRAINING_FILE = "analog/training.json"
MANIFEST_FILE = "analog/manifest.json"
CARD_FILE = "README.md"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class StateFile(BaseModel):
    """The file with the exact analog state, and its hash."""

    model_config = _STRICT
    # One literal name: a checkpoint cannot point its reader anywhere else.
    file: Literal["analog/analog_state.safetensors"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class AnalogConfig(BaseModel):
    """The top-level key ``analog_config`` of ``config.json``.

    Args:
        version: Of this schema.
        profile: The deploy profile that wrote the directory.
        scheme: The :class:`~analog_plugin.AnalogScheme`, made from its fields.
        tiles: Rows of each tile, by layer name.
        state: The file with the input ranges.
    """

    model_config = _STRICT
    version: Literal[1]
    profile: str
    scheme: Annotated[InstanceOf[AnalogScheme], BeforeValidator(AnalogScheme.from_dict)]
    tiles: dict[str, list[int]] = Field(min_length=1)
    state: StateFile

    @classmethod
    def read(cls, values: Any, directory: Path) -> AnalogConfig:
        """Validate; an unknown version is refused by name.

        Raises:
            AnalogError: The values do not fit the schema.
        """
        found = values.get("version") if isinstance(values, dict) else None
        if found != VERSION:
            raise AnalogError(
                f"{directory}/config.json holds an analog_config of version {shown(found)}, "
                f"but this analog-plugin reads version {VERSION}; install the version that wrote "
                "it."
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise AnalogError(
                f"{directory}/config.json: analog_config.{first_fault(error)}; the checkpoint was "
                "altered, export it again."
            ) from None


class ManifestEntry(BaseModel):
    """What a file must be."""

    model_config = _STRICT
    size: int
    sha256: str


class Manifest(BaseModel):
    """The content of ``analog/manifest.json``: files by their names below the directory."""

    model_config = _STRICT
    version: Literal[1]
    files: dict[str, ManifestEntry]


def weight_files(
    directory: Path, single: str = WEIGHTS_FILE, index: str = WEIGHTS_INDEX
) -> list[str]:
    """Names of the files that transformers takes the weights from.

    Args:
        directory: The model.
        single: The name of the file where there is one alone.
        index: The name of the index where there are several.

    Raises:
        AnalogError: There are none, or the index of shards names something else than files in the
            directory.
    """
    if (directory / single).is_file():
        return [single]
    if not (directory / index).is_file():
        raise AnalogError(
            f"{directory} has neither {single} nor {index}; copy the checkpoint "
            "again or export it again."
        )
    shards = read_json(directory / index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    for name in names:
        if not isinstance(name, str) or not _is_inside(name):
            raise AnalogError(f"{directory}/{index} names {shown(name)}, {_OUTSIDE}")
    if not names:
        raise AnalogError(f"{directory}/{index} names no file; export it again.")
    return [index, *sorted(set(names))]


def write_manifest(directory: Path) -> None:
    """List size and SHA-256 of every file but the model card and the manifest itself."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST_FILE, CARD_FILE):
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    target = directory / MANIFEST_FILE
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"version": VERSION, "files": files}, indent=2) + "\n")


def verify_manifest(directory: Path, required: Iterable[str] = ()) -> None:
    """Check every file that the manifest lists.

    Args:
        directory: The checkpoint.
        required: Files that must be in the list, or their damage would go unseen.

    Raises:
        AnalogError: The manifest is missing or damaged, or a file is missing, truncated or altered.
    """
    files = read_manifest(directory)
    for name in required:
        require_listed(directory, files, name)
    for name, entry in files.items():
        verify_file(directory, name, entry)


def read_manifest(directory: Path) -> dict[str, ManifestEntry]:
    """What the manifest says of each file.

    Raises:
        AnalogError: It is missing or damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise AnalogError(
            f"{directory} has no {MANIFEST_FILE}: it was not written whole; export it again."
        )
    try:
        return Manifest.model_validate(read_json(path)).files
    except ValidationError as error:
        raise AnalogError(
            f"{path} cannot be read: {first_fault(error)}; export the checkpoint again."
        ) from None


def require_listed(directory: Path, files: Mapping[str, ManifestEntry], name: str) -> None:
    """Refuse a manifest that passes over a file whose damage would go unseen.

    Raises:
        AnalogError: ``name`` is not in it.
    """
    if name not in files:
        raise AnalogError(
            f"{directory / MANIFEST_FILE} does not list {name}; export the checkpoint again."
        )


def verify_file(directory: Path, name: str, entry: ManifestEntry) -> None:
    """Check one file of the manifest.

    Raises:
        AnalogError: It is missing, truncated or altered, or its name leads out of the directory.
    """
    if not _is_inside(name):
        raise AnalogError(f"{directory}/{MANIFEST_FILE} names {shown(name)}, {_OUTSIDE}")
    path = directory / name
    try:
        size = path.stat().st_size if path.is_file() else None
        digest = sha256_of(path) if size == entry.size else None
    except OSError as error:
        raise AnalogError(f"{directory}: {shown(name)}: {one_line(error)}.") from None
    if size is None:
        raise AnalogError(f"{directory} lacks {name}; copy it again or export it again.")
    if size != entry.size:
        raise AnalogError(
            f"{path} has {size} bytes, but the manifest says {entry.size}: it is truncated or was "
            "altered; copy it again or export it again."
        )
    if digest != entry.sha256:
        raise AnalogError(
            f"{path} does not have the SHA-256 that the manifest says: it was altered; copy it "
            "again or export it again."
        )


_OUTSIDE = "which is outside the directory or no name; export the checkpoint again."


def _is_inside(name: str) -> bool:
    """Whether a name from a file can be that of a file below the directory.

    Its parts are looked at, not the resolved file: a hub cache holds links to its blobs.
    """
    path = Path(name)
    relative = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return relative and name.isprintable() and len(name) < 256
