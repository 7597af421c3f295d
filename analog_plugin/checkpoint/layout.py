"""Names of a checkpoint's files, the schema of ``analog_config``, and the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from analog_plugin.errors import AnalogError
from analog_plugin.scheme import AnalogScheme

VERSION = 1
STATE_FILE = "analog/analog_state.safetensors"
RECIPE_FILE = "analog/recipe.yaml"
TRAINING_FILE = "analog/training.json"
MANIFEST_FILE = "analog/manifest.json"
CARD_FILE = "README.md"

_Name = str


class StateFile(BaseModel):
    """The file with the exact analog state, and its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # One literal name: a checkpoint cannot point its reader anywhere else.
    file: Literal["analog/analog_state.safetensors"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class AnalogConfig(BaseModel):
    """The top-level key ``analog_config`` of ``config.json``.

    Args:
        version: Of this schema.
        profile: The deploy profile that wrote the directory.
        scheme: The fields of the :class:`~analog_plugin.AnalogScheme`.
        tiles: Rows of each tile, by layer name.
        state: The file with the input ranges.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1]
    profile: str
    scheme: dict[str, Any]
    tiles: dict[_Name, list[int]] = Field(min_length=1)
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
                f"{directory}/config.json holds an analog_config of version {found!r}, but this "
                f"analog-plugin reads version {VERSION}; install the version that wrote it."
            )
        try:
            config = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise AnalogError(
                f"{directory}/config.json: analog_config.{path} is wrong ({first['msg']}); the "
                "checkpoint was altered, export it again."
            ) from None
        AnalogScheme.from_dict(config.scheme)
        return config


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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


def verify_manifest(directory: Path) -> None:
    """Check every file that the manifest lists.

    Raises:
        AnalogError: The manifest is missing or damaged, or a file is missing, truncated or altered.
    """
    try:
        files = json.loads((directory / MANIFEST_FILE).read_text())["files"]
        entries = [(str(name), int(e["size"]), str(e["sha256"])) for name, e in files.items()]
    except FileNotFoundError:
        raise AnalogError(
            f"{directory} has no {MANIFEST_FILE}: it was not written whole; export it again."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnalogError(
            f"{directory}/{MANIFEST_FILE} cannot be read ({type(error).__name__}); export the "
            "checkpoint again."
        ) from None
    root = directory.resolve()
    for name, size, digest in entries:
        path = directory / name
        # Parts are checked, not the resolved file: a hub cache holds links to its blobs.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise AnalogError(f"{directory}/{MANIFEST_FILE} names {name!r}, outside {root}.")
        if not path.is_file():
            raise AnalogError(f"{directory} lacks {name}; copy it again or export it again.")
        if path.stat().st_size != size:
            raise AnalogError(
                f"{path} has {path.stat().st_size} bytes, but the manifest says {size}: it is "
                "truncated or was altered; copy it again or export it again."
            )
        if sha256_of(path) != digest:
            raise AnalogError(
                f"{path} does not have the SHA-256 that the manifest says: it was altered; copy it "
                "again or export it again."
            )
