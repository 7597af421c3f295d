"""Read a pickled ``rpu_config`` without running it.

What :class:`~analog_integrations.lightning.machine.Machine` builds of it are plain values,
:class:`Record` and :class:`Member`; every class outside the lists is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analog_integrations.lightning.machine import Machine, Refused
from analog_plugin.errors import AnalogError, one_line, shown

#: Published ones have about 1,200 bytes.
_LONGEST = 1 << 16
_LONGEST_NAME = 100
_PACKAGE = "aihwkit_lightning.simulator"

#: The classes of a configuration and the modules that define them, in versions 1 and 2 alike.
DATACLASSES = {
    "TorchInferenceRPUConfig": f"{_PACKAGE}.configs.configs",
    "IOParameters": f"{_PACKAGE}.parameters.io",
    "WeightModifierParameter": f"{_PACKAGE}.parameters.inference",
    "WeightClipParameter": f"{_PACKAGE}.parameters.inference",
    "MappingParameter": f"{_PACKAGE}.parameters.mapping",
    "PrePostProcessingParameter": f"{_PACKAGE}.parameters.pre_post",
    "InputRangeParameter": f"{_PACKAGE}.parameters.pre_post",
}
ENUMS = {
    "WeightModifierType": f"{_PACKAGE}.parameters.enums",
    "WeightNoiseInjectionType": f"{_PACKAGE}.parameters.enums",
    "WeightQuantizationType": f"{_PACKAGE}.parameters.enums",
    "WeightClipType": f"{_PACKAGE}.parameters.enums",
}


@dataclass(frozen=True)
class Record:
    """What stands for an object: the name of its class, and its attributes.

    Args:
        name: A name in :data:`DATACLASSES`.
        fields: Its attributes; their values are strings, numbers, booleans, None, dictionaries,
            tuples, records and members.
    """

    name: str
    # Not shown: what refers to itself again and again is endless when it is written out.
    fields: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Member:
    """A member of an enumeration: a name in :data:`ENUMS`, and the member's value."""

    name: str
    value: str


def read_record(path: Path) -> Record:
    """Read a pickled configuration; nothing in it is executed and no class is imported.

    Raises:
        AnalogError: It is missing, too long, no pickle, or holds anything but the configuration
            classes of aihwkit-lightning.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise AnalogError(
                f"{path.parent} has no {path.name}; give an analog model's directory."
            )
        if path.stat().st_size > _LONGEST:
            raise AnalogError(
                f"{path} has {path.stat().st_size} bytes, but a configuration of aihwkit-lightning "
                f"has about 1,200; more than {_LONGEST} are not read."
            )
        data = path.read_bytes()
    except OSError as error:
        raise AnalogError(f"{path} cannot be read: {one_line(error)}.") from None
    return parse_record(data, str(path))


def parse_record(data: bytes, name: str = "rpu_config") -> Record:
    """Read a pickled configuration from bytes; see :func:`read_record`.

    Args:
        data: The pickle.
        name: Of the file, for errors.
    """
    if len(data) > _LONGEST:
        raise AnalogError(f"{name} has {len(data)} bytes; more than {_LONGEST} are not read.")
    try:
        record = _Configuration().run(data)
        if not isinstance(record, Record):
            raise Refused(f"a {type(record).__name__} instead of a configuration")
        return record
    except Refused as error:
        raise AnalogError(
            f"{name} is refused: it holds {error}; give the rpu_config of an aihwkit-lightning "
            "model, a TorchInferenceRPUConfig dumped by pickle or dill with protocol 2 or newer."
        ) from None
    # The parser of opcodes raises whatever a broken file leads to.
    except Exception as error:
        raise AnalogError(f"{name} cannot be read as a pickle: {one_line(error)}.") from None


@dataclass(frozen=True)
class _Class:
    """One of the listed classes, on the stack."""

    name: str
    enum: bool


class _Configuration(Machine):
    """Makes records of the listed classes, and members of the listed enumerations."""

    def find(self, module: Any, name: Any) -> _Class:
        """The class of that name, if it is one of the lists; both must be the very strings."""
        if type(module) is str and type(name) is str:
            for known, enum in ((DATACLASSES, False), (ENUMS, True)):
                if known.get(name) == module:
                    return _Class(name, enum)
        raise Refused(f"{shown(module)} {shown(name)}, which is no class of a configuration")

    def new(self, made: Any, arguments: Any) -> Record:
        """A record without attributes."""
        if not isinstance(made, _Class) or made.enum or arguments != ():
            raise Refused("an object made in another way than a configuration's are")
        return Record(made.name)

    def call(self, made: Any, arguments: Any) -> Member:
        """Only of an enumeration with a member's value, which is not called either."""
        plain = type(arguments) is tuple and len(arguments) == 1 and type(arguments[0]) is str
        if not isinstance(made, _Class) or not made.enum or not plain:
            raise Refused("a call of something that is no enumeration")
        return Member(made.name, arguments[0])

    def build(self, made: Any, state: Any) -> None:
        """Attributes of a record that has none yet."""
        if type(made) is not Record or type(state) is not dict or made.fields:
            raise Refused("attributes of something that is no configuration")
        # Names are quoted in errors and in model cards.
        if any(not name.isidentifier() or len(name) > _LONGEST_NAME for name in state):
            raise Refused("attributes whose names are none")
        made.fields.update(state)
