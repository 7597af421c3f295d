"""What a directory holds, and what is wrong with it: headers, scales and codes are read.

No model is built and nothing is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from analog_plugin.checkpoint.conductances import CONDUCTANCES_FILE
from analog_plugin.checkpoint.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_INDEX,
    AnalogConfig,
    read_manifest,
    require_listed,
    verify_file,
    weight_files,
)
from analog_plugin.checkpoint.load import read_analog_config, read_state
from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.files import read_json
from analog_plugin.inspection.analog_part import AnalogPart, analog_faults, analog_part
from analog_plugin.inspection.codes import examined
from analog_plugin.inspection.kinds import (
    architecture_of,
    average_bits,
    converter,
    digital_profile,
    head_size,
    method_of,
    weight_groups,
)
from analog_plugin.inspection.loaders import Facts, loaders
from analog_plugin.inspection.quantized import (
    QuantizedLayer,
    modules_of,
    quantized_layers,
    read_quantization,
    split_groups,
    unequal_groups,
)
from analog_plugin.inspection.records import Inspection
from analog_plugin.inspection.shapes import shape_faults
from analog_plugin.inspection.sizes import sizes_of
from analog_plugin.inspection.tensors import StoredTensor, indexed_faults, stored_tensors
from analog_plugin.pretrained import absurd_fault, read_model_config

#: What directories without a model are known by.
_OTHERS = {"adapter": "adapter_config.json", "conductances": CONDUCTANCES_FILE}


def inspect_checkpoint(directory: str | Path, *, verify: bool = True) -> Inspection:
    """Look at a directory without loading it.

    Args:
        directory: Any local directory.
        verify: Also read all files that its manifest lists, to compare their hashes.

    Returns:
        What it holds; ``problems`` names everything that is wrong, so that a broken checkpoint is
        an answer and no error.

    Raises:
        AnalogError: There is no such directory.
    """
    path = Path(directory)
    if not path.is_dir():
        raise AnalogError(f"There is no directory {directory}; give a model directory.")
    return _Reader(path).inspection(verify)


class _Reader:
    """Reads one part after the other; what fails becomes a problem, and the rest goes on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.layers: list[QuantizedLayer] = []
        self.broken = False

    def inspection(self, verify: bool) -> Inspection:
        """All of it."""
        if not (self.directory / CONFIG_FILE).is_file():
            there = (k for k, name in _OTHERS.items() if (self.directory / name).is_file())
            return self._no_model(next(there, "nothing"), verify)
        self.config = self._try(lambda: read_json(self.directory / CONFIG_FILE)) or {}
        self.broken = bool(self.problems)
        ours = (self.directory / MANIFEST_FILE).is_file()
        self._read_tensors()
        modules = modules_of(self.tensors)
        ignored = self._read_quantized(modules, symmetric=ours)
        analog = self._read_analog(modules)
        if verify and (ours or analog is not None):
            state = [STATE_FILE] if "analog_config" in self.config else []
            names = [] if self.broken else weight_files(self.directory)
            self._verify((CONFIG_FILE, *state, *names))
        self._read_leftovers(analog is not None)
        kind, profile, layout = self._kind(ours, analog)
        refused = None if self.broken else self._read_model(kind, modules)
        unequal = self._unequal(ours)
        sizes = sizes_of(
            self.directory, self.tensors, self.layers, () if analog is None else analog[0].tiles
        )
        return Inspection(
            str(self.directory),
            kind,
            profile,
            layout,
            architecture=architecture_of(self.config),
            dtypes=tuple(sorted(sizes.dtypes)),
            parameters=sizes.parameters,
            quantized=tuple(layer.name for layer in self.layers),
            ignored=ignored,
            groups=weight_groups(self.layers),
            average_bits=average_bits(self.layers),
            inputs=converter(self.layers, "input"),
            outputs=converter(self.layers, "output"),
            analog=None if analog is None else analog[1],
            sizes=sizes,
            loaders=loaders(
                self._facts(kind, refused, unequal, bool(split_groups(self.layers, modules)))
            ),
            problems=tuple(dict.fromkeys(self.problems)),
            notes=tuple(self.notes),
        )

    def _try(self, read: Callable[[], Any]) -> Any:
        """What ``read`` gives; None and a problem where it fails."""
        try:
            return read()
        except AnalogError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{self.directory} cannot be read: {one_line(error)}.")
        return None

    def _no_model(self, kind: str, verify: bool) -> Inspection:
        if kind == "conductances" and verify:
            self._verify((CONDUCTANCES_FILE,))
        elif kind == "nothing":
            inner = sorted(path.parent.name for path in self.directory.glob(f"*/{CONFIG_FILE}"))
            below = (
                f", but {', '.join(inner[:20])} below it have; give one of these" if inner else ""
            )
            self.problems.append(
                f"{self.directory} has no {CONFIG_FILE}{below or '; give a model directory'}."
            )
        return Inspection(
            str(self.directory),
            kind,
            loaders=loaders(Facts(kind)),
            problems=tuple(self.problems),
        )

    def _read_tensors(self) -> None:
        index = self.directory / WEIGHTS_INDEX
        names = self._try(lambda: weight_files(self.directory))
        for name in names or ():
            if name != WEIGHTS_INDEX:
                found = self._try(partial(stored_tensors, self.directory / name))
                self.broken |= found is None
                self.tensors |= found or {}
        self.broken |= names is None
        if names and names[0] == WEIGHTS_INDEX and not self.broken:
            weight_map = read_json(index)["weight_map"]
            self.problems += indexed_faults(weight_map, self.tensors.values(), index)

    def _read_quantized(
        self, modules: Mapping[str, Mapping[str, StoredTensor]], *, symmetric: bool
    ) -> tuple[str, ...]:
        """Find the quantized layers; gives the names that are left out."""
        values = self.config.get("quantization_config")
        if values is None or method_of(values) != "compressed-tensors":
            return ()
        config = self._try(lambda: read_quantization(values))
        if config is None:
            self.broken = True
            return ()
        found = self._try(lambda: quantized_layers(config, modules))
        for layer in [] if found is None or self.broken else found[0]:
            seen, faults = examined(layer, symmetric=symmetric)
            self.layers.append(seen)
            self.problems += faults
        if found is not None and not self.broken:
            self.problems += found[1]
        return tuple(config.ignore or ())

    def _read_analog(
        self, modules: Mapping[str, Mapping[str, StoredTensor]]
    ) -> tuple[AnalogConfig, AnalogPart] | None:
        if "analog_config" not in self.config:
            return None
        config = self._try(lambda: read_analog_config(self.directory))
        if config is None:
            return None
        state = self._try(lambda: read_state(self.directory, config))
        if not self.broken:
            self.problems += analog_faults(self.directory, config, state, modules)
        return config, analog_part(self.directory, config, state)

    def _verify(self, required: Iterable[str]) -> None:
        """Compare all files with the manifest, which must list those ``required``."""
        files = self._try(lambda: read_manifest(self.directory))
        if files is None:
            return
        for name in required:
            self._try(partial(require_listed, self.directory, files, name))
        for name, entry in files.items():
            self._try(partial(verify_file, self.directory, name, entry))

    def _read_leftovers(self, analog: bool) -> None:
        folder = self.directory / "analog"
        if "analog_config" in self.config:
            if not analog and not self.problems:
                self.problems.append(f"{self.directory}/{CONFIG_FILE} has no whole analog_config.")
        elif (self.directory / STATE_FILE).exists() or (
            folder.is_dir() and not (self.directory / MANIFEST_FILE).exists()
        ):
            self.problems.append(
                f"{folder} was left over: config.json has no analog_config, as after saving with "
                "another tool; export it again, or delete the folder."
            )

    def _kind(self, ours: bool, analog: Any) -> tuple[str, str | None, str | None]:
        """Kind, profile and layout."""
        values = self.config.get("quantization_config")
        layout = self.layers[0].layout if self.layers else method_of(values)
        if "analog_config" in self.config:
            return "analog-fp", None if analog is None else analog[0].profile, layout
        if values is None:
            return "plain", None, None
        profile = digital_profile(self.layers)
        if ours and method_of(values) == "compressed-tensors":
            return "digital", profile, layout
        return "quantized", profile, layout

    def _read_model(
        self, kind: str, modules: Mapping[str, Mapping[str, StoredTensor]]
    ) -> str | None:
        """Compare the files with the model; gives what transformers has against the latter."""
        if (fault := absurd_fault(self.config)) is not None:
            self.problems.append(fault)
            return fault
        try:
            config = read_model_config(self.directory)
        except AnalogError as error:
            if kind == "analog-fp":
                self.problems.append(str(error))
            return str(error)
        self.problems += shape_faults(config, modules, {la.name: la for la in self.layers})
        return None

    def _unequal(self, ours: bool) -> bool:
        found = unequal_groups(self.layers)
        for part, names in found.items():
            if names:
                sentence = (
                    f"{len(names)} groups of layers that engines fuse (q/k/v, gate/up) have "
                    f"unequal {part} scales, the first with {shown(names[0])}"
                )
                if ours:
                    self.problems.append(f"{sentence}; export it again.")
                else:
                    self.notes.append(f"{sentence}.")
        return any(found.values())

    def _facts(self, kind: str, refused: str | None, unequal: bool, split: bool) -> Facts:
        first = self.layers[0] if self.layers else None
        arguments = [a for layer in self.layers for a in layer.arguments.values()]
        widths = {
            layer.arguments["weights"].num_bits
            for layer in self.layers
            if "weights" in layer.arguments
        }
        inputs = None
        if first is not None and "input_activations" in first.arguments:
            inputs = "static" if first.is_static("input_activations") else "dynamic"
        return Facts(
            kind,
            broken=self.broken,
            faulty=bool(self.problems),
            refused=refused,
            layout=None if first is None else first.layout,
            weight_bits=frozenset(widths),
            inputs=inputs,
            outputs=first is not None and "output_activations" in first.arguments,
            foreign=method_of(self.config.get("quantization_config"))
            not in (None, "compressed-tensors"),
            integer=all(a.type == "int" and a.symmetric for a in arguments),
            unequal=unequal,
            split=split,
            head_size=head_size(self.config),
        )
