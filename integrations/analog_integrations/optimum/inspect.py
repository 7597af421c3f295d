"""``main_inspect``: the Python twin of ``optimum-cli analog inspect``."""

from __future__ import annotations

import json
from pathlib import Path

from analog_plugin.inspection.overview import overview
from analog_plugin.inspection.reader import inspect_checkpoint
from analog_plugin.inspection.records import Inspection


def main_inspect(
    directory: str | Path, *, as_json: bool = False, verify: bool = True
) -> Inspection:
    """Print what a directory holds, which loaders take it, and what is wrong with it.

    Args:
        directory: Any local directory.
        as_json: Print it for machines.
        verify: Also compare all files with the hashes in the manifest.

    Raises:
        AnalogError: There is no such directory.
    """
    found = inspect_checkpoint(directory, verify=verify)
    print(json.dumps(found.to_dict(), indent=2) if as_json else overview(found))
    return found
