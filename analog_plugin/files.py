"""Reading files: text, JSON objects, YAML, and hashes of content."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import yaml

from analog_plugin.errors import AnalogError, one_line, shown

# No configuration, index or manifest is so long; a file that is would take all memory.
_LONGEST = 64 << 20
# PyYAML reads about 100,000 bytes a second; an override for each of 40,000 layers fits.
_LONGEST_YAML = 4 << 20
# Settings nest a handful deep. Deeper than Python recurses, PyYAML fails after seconds or minutes.
_DEEPEST_YAML = 100


def read_text(path: Path, longest: int = _LONGEST) -> str:
    """Read a file of text of at most ``longest`` bytes.

    Raises:
        AnalogError: It is too long, or no file: a device or a pipe may have no end.
        OSError, UnicodeDecodeError: It is missing or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise AnalogError(f"{shown(str(path))} is no file; give a file.")
    if status.st_size > longest:
        raise AnalogError(
            f"{shown(str(path))} has {status.st_size} bytes, more than any such file; copy it "
            "again."
        )
    return path.read_text(encoding="utf-8")


def read_yaml_text(path: Path) -> str:
    """Read the text of a YAML file, for :func:`parse_yaml`; raises as :func:`read_text` does."""
    return read_text(path, _LONGEST_YAML)


def parse_yaml(text: str, what: str) -> Any:
    """Values of YAML text, of plain types alone.

    Raises:
        AnalogError: ``what`` is not YAML, nested more than 100 deep, or merges mappings (``<<``).
    """
    try:
        return yaml.load(text, _BoundedLoader)  # a SafeLoader: no tag of the text makes an object
    # ValueError: of a date that does not exist, or a number of thousands of digits.
    except (yaml.YAMLError, ValueError) as error:
        raise AnalogError(f"{what} is not valid YAML: {one_line(error)}.") from None
    except _Refused as refused:
        raise AnalogError(f"{what} {refused}") from None


class _Refused(Exception):
    pass


class _BoundedLoader(yaml.SafeLoader):
    """Refuses what takes time or memory out of proportion to a file's length.

    Deep nesting is met as nodes are composed: the scanner goes no further than they ask for.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == _DEEPEST_YAML:
            raise _Refused(
                f"is nested more than {_DEEPEST_YAML} deep; settings are a few levels deep."
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        # Merges of merges grow without bound; an alias alone is the same mapping once more.
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise _Refused("merges mappings by <<; write their fields out.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AnalogError: It is missing, too long, not JSON, or holds something else.
    """
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        raise AnalogError(f"{path.parent} has no {path.name}; give a model directory.") from None
    except AnalogError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise AnalogError(f"{path} cannot be read as JSON: {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise AnalogError(f"{path} cannot be read: it does not hold a JSON object.")
    return values


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
