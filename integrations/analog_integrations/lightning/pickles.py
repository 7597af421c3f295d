"""Read a pickled ``rpu_config`` without running it: a small machine that can only make records.

The machine has no way to call or import anything. Of the opcodes of pickle it knows those by which
a configuration is written, and what they build are plain values, :class:`Record` and
:class:`Member`; every other opcode, and every class outside the lists, is an error.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, one_line, shown

#: Published ones have about 1,200 bytes.
_LONGEST = 1 << 16
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
    fields: dict[str, Any] = field(default_factory=dict)


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
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.result()
    except _Refused as error:
        raise AnalogError(
            f"{name} is refused: it holds {error}; give the rpu_config of an aihwkit-lightning "
            "model, a TorchInferenceRPUConfig dumped by pickle or dill with protocol 2 or newer."
        ) from None
    # The parser of opcodes raises whatever a broken file leads to.
    except Exception as error:
        raise AnalogError(f"{name} cannot be read as a pickle: {one_line(error)}.") from None


class _Refused(Exception):
    """What the file holds and must not."""


class _Mark:
    """The opcode MARK on the stack."""


@dataclass(frozen=True)
class _Class:
    """One of the listed classes, on the stack."""

    name: str
    enum: bool


class _Machine:
    """A stack and a memo, both of inert values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.stopped = False

    def step(self, name: str, argument: Any) -> None:
        """Do one opcode.

        Raises:
            _Refused: It is not one of the opcodes listed below, or not upon what it may be.
        """
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _NUMBERS or name in _STRINGS:
            self._push(argument)
        elif name in _OPCODES:
            _OPCODES[name](self, argument)
        else:
            raise _Refused(f"the opcode {name}, which no configuration needs")

    def result(self) -> Record:
        """What is left when all is done."""
        if not self.stopped or len(self.stack) != 1 or not isinstance(self.stack[0], Record):
            kind = type(self.stack[-1]).__name__ if self.stack else "nothing"
            raise _Refused(f"{kind} instead of a configuration")
        return self.stack[0]

    def _pop(self) -> Any:
        if not self.stack:
            raise _Refused("an opcode without what it works on")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[place], _Mark):
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise _Refused("an opcode without its mark")

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _Refused("a number that no field can have")
        self.stack.append(value)

    def _skip(self, argument: Any) -> None:
        """Protocol number and frames: they hold nothing."""

    def _mark(self, argument: Any) -> None:
        self.stack.append(_Mark())

    def _stop(self, argument: Any) -> None:
        self.stopped = True

    def _memoize(self, argument: Any) -> None:
        if not self.stack:
            raise _Refused("an opcode without what it works on")
        # MEMOIZE numbers what it keeps itself.
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def _get(self, argument: Any) -> None:
        if argument not in self.memo:
            raise _Refused("a reference to what it does not hold")
        self.stack.append(self.memo[argument])

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append({})

    def _dict(self, argument: Any) -> None:
        values: dict[str, Any] = {}
        _set_items(values, self._pop_to_mark())
        self.stack.append(values)

    def _set_item(self, argument: Any) -> None:
        value, key = self._pop(), self._pop()
        _set_items(self._top(dict), [key, value])

    def _set_many(self, argument: Any) -> None:
        items = self._pop_to_mark()
        _set_items(self._top(dict), items)

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _Refused("items of something that is no dictionary")
        return self.stack[-1]

    def _tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self, argument: Any) -> None:
        self.stack.append((self._pop(),))

    def _tuple2(self, argument: Any) -> None:
        second, first = self._pop(), self._pop()
        self.stack.append((first, second))

    def _find(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_listed(module, name))

    def _stack_find(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(_listed(module, name))

    def _new(self, argument: Any) -> None:
        arguments, made = self._pop(), self._pop()
        if not isinstance(made, _Class) or made.enum or arguments != ():
            raise _Refused("an object made in another way than a configuration's are")
        self.stack.append(Record(made.name))

    def _reduce(self, argument: Any) -> None:
        """A call: only of an enumeration with a member's value, which is not called either."""
        arguments, made = self._pop(), self._pop()
        plain = type(arguments) is tuple and len(arguments) == 1 and type(arguments[0]) is str
        if not isinstance(made, _Class) or not made.enum or not plain:
            raise _Refused("a call of something that is no enumeration")
        self.stack.append(Member(made.name, arguments[0]))

    def _build(self, argument: Any) -> None:
        state = self._pop()
        made = self.stack[-1] if self.stack else None
        if type(made) is not Record or type(state) is not dict or made.fields:
            raise _Refused("attributes of something that is no configuration")
        made.fields.update(state)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT")
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE")
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._skip,
    "FRAME": _Machine._skip,
    "MARK": _Machine._mark,
    "STOP": _Machine._stop,
    "MEMOIZE": _Machine._memoize,
    "PUT": _Machine._memoize,
    "BINPUT": _Machine._memoize,
    "LONG_BINPUT": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "EMPTY_DICT": _Machine._empty_dict,
    "DICT": _Machine._dict,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_many,
    "TUPLE": _Machine._tuple,
    "TUPLE1": _Machine._tuple1,
    "TUPLE2": _Machine._tuple2,
    "GLOBAL": _Machine._find,
    "STACK_GLOBAL": _Machine._stack_find,
    "NEWOBJ": _Machine._new,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
}


def _listed(module: Any, name: Any) -> _Class:
    """The class of that name, if it is one of the list; both must be the very strings."""
    if type(module) is str and type(name) is str:
        for known, enum in ((DATACLASSES, False), (ENUMS, True)):
            if known.get(name) == module:
                return _Class(name, enum)
    raise _Refused(f"{shown(module)} {shown(name)}, which is no class of a configuration")


def _set_items(target: dict[str, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise _Refused("a key without its value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Strings alone: to hash a nested tuple can take forever.
        if type(key) is not str or isinstance(value, _Mark):
            raise _Refused("a dictionary with other keys than names")
        target[key] = value
