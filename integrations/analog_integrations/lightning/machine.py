"""A machine for the opcodes of pickle that can only build inert values.

It has no way to call or import anything: what a name, a call, an object or its attributes stand for
is up to a subclass, whose methods get inert values and give inert values.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, ClassVar


class Refused(Exception):
    """What the file holds and must not."""


class Mark:
    """The opcode MARK on the stack."""


class Machine:
    """A stack and a memo, both of inert values: strings, numbers, booleans, None, dictionaries with
    strings as keys, tuples, and what the subclass makes.

    By itself it refuses every name, call, object and reference out of the file.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle builds.

        Raises:
            Refused: It holds an opcode that is not one of those listed below, or upon something
                that it may not work on.
            Exception: Whatever the parser of opcodes makes of a broken file.
        """
        for opcode, argument, _ in pickletools.genops(data):
            self._step(opcode.name, argument)
        # The parser ends at STOP, or fails without one.
        if len(self.stack) != 1:
            raise Refused("more or less than one value")
        return self.stack[0]

    def find(self, module: Any, name: Any) -> Any:
        """What stands for a name in a module; both may be anything."""
        raise Refused("a name")

    def new(self, made: Any, arguments: Any) -> Any:
        """What stands for an object of a class."""
        raise Refused("an object")

    def call(self, made: Any, arguments: Any) -> Any:
        """What stands for the result of a call."""
        raise Refused("a call")

    def build(self, made: Any, state: Any) -> None:
        """Give attributes to what a method of these made."""
        raise Refused("attributes")

    def refer(self, reference: Any) -> Any:
        """What stands for something that the pickle refers to outside itself."""
        raise Refused("a persistent id")

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _NUMBERS or name in _STRINGS:
            self._push(argument)
        elif name in self._OPCODES:
            self._OPCODES[name](self, argument)
        else:
            raise Refused(f"the opcode {name}, which no such file needs")

    def _pop(self) -> Any:
        if not self.stack:
            raise Refused("an opcode without what it works on")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[place], Mark):
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise Refused("an opcode without its mark")

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Refused("a number that nothing in such a file can be")
        self.stack.append(value)

    def _skip(self, argument: Any) -> None:
        """Protocol number, frames and the end: they hold nothing."""

    def _mark(self, argument: Any) -> None:
        self.stack.append(Mark())

    def _memoize(self, argument: Any) -> None:
        if not self.stack:
            raise Refused("an opcode without what it works on")
        # MEMOIZE numbers what it keeps itself.
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def _get(self, argument: Any) -> None:
        if argument not in self.memo:
            raise Refused("a reference to what it does not hold")
        self.stack.append(self.memo[argument])

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append({})

    def _dict(self, argument: Any) -> None:
        values: dict[str, Any] = {}
        _set_items(values, self._pop_to_mark())
        self.stack.append(values)

    def _set_item(self, argument: Any) -> None:
        value, key = self._pop(), self._pop()
        _set_items(self._top_dict(), [key, value])

    def _set_many(self, argument: Any) -> None:
        items = self._pop_to_mark()
        _set_items(self._top_dict(), items)

    def _top_dict(self) -> dict[str, Any]:
        top = self.stack[-1] if self.stack else None
        if type(top) is not dict:
            raise Refused("items of something that is no dictionary")
        return top

    def _tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self, argument: Any) -> None:
        self.stack.append((self._pop(),))

    def _tuple2(self, argument: Any) -> None:
        second, first = self._pop(), self._pop()
        self.stack.append((first, second))

    def _tuple3(self, argument: Any) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self.stack.append((first, second, third))

    def _find(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.find(module, name))

    def _stack_find(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(self.find(module, name))

    def _new(self, argument: Any) -> None:
        arguments, made = self._pop(), self._pop()
        self.stack.append(self.new(made, arguments))

    def _reduce(self, argument: Any) -> None:
        arguments, made = self._pop(), self._pop()
        self.stack.append(self.call(made, arguments))

    def _build(self, argument: Any) -> None:
        state = self._pop()
        self.build(self.stack[-1] if self.stack else None, state)

    def _refer(self, argument: Any) -> None:
        self.stack.append(self.refer(self._pop()))

    _OPCODES: ClassVar[dict[str, Callable[[Machine, Any], None]]] = {
        "PROTO": _skip,
        "FRAME": _skip,
        "STOP": _skip,
        "MARK": _mark,
        "MEMOIZE": _memoize,
        "PUT": _memoize,
        "BINPUT": _memoize,
        "LONG_BINPUT": _memoize,
        "GET": _get,
        "BINGET": _get,
        "LONG_BINGET": _get,
        "EMPTY_DICT": _empty_dict,
        "DICT": _dict,
        "SETITEM": _set_item,
        "SETITEMS": _set_many,
        "TUPLE": _tuple,
        "TUPLE1": _tuple1,
        "TUPLE2": _tuple2,
        "TUPLE3": _tuple3,
        "GLOBAL": _find,
        "STACK_GLOBAL": _stack_find,
        "NEWOBJ": _new,
        "REDUCE": _reduce,
        "BUILD": _build,
        "BINPERSID": _refer,
    }


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT")
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE")


def _set_items(target: dict[str, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise Refused("a key without its value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Strings alone: to hash a nested tuple can take forever.
        if type(key) is not str or isinstance(value, Mark):
            raise Refused("a dictionary with other keys than names")
        target[key] = value
