"""Reads pickles of plain data without running them.

A small machine interprets the opcodes that build dicts, lists, tuples, numbers and text. No name is
ever imported, and nothing is ever called: a subclass says which names it knows, and builds what it
makes of them itself.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, ClassVar, Final

from qvla_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that a pickle mentions; it is never looked up."""

    name: str


_MARK: Final = Global("mark")


class Machine:
    """Interprets one pickle; subclasses add opcodes as methods `_op_` and their name.

    Attributes:
        error: what is raised about a pickle that is refused.
        what: the pickle in error messages.
        whole: what it should be.
        operations: how many it may have; each may leave 60 bytes in memory.
    """

    error: ClassVar[type[InputError]]
    what: ClassVar[str]
    whole: ClassVar[str]
    operations: ClassVar[int]

    def __init__(self, data: bytes):
        """Prepares to read `data`."""
        self._data = data
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle builds.

        Raises:
            InputError: an opcode, name or call has no place in it (of the type `error`).
            ValueError: it is no pickle, or incomplete.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._data)):
            if opcode.name == "STOP":
                return self._pop()
            if count >= self.operations:
                raise self.error(f"the {self.what} has more than {self.operations} operations")
            action: Callable[[Any], None] | None = getattr(self, f"_op_{opcode.name.lower()}", None)
            if action is None:
                raise self.error(f"opcode {opcode.name} has no place in {self.whole}")
            action(argument)
        raise self.error(f"the {self.what} has no end")

    def _known(self, name: str) -> Global:
        """A name that is known.

        Args:
            name: module and name with a space between.

        Raises:
            InputError: it is not known.
        """
        raise NotImplementedError

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.error(f"the {self.what} takes more than it has put")
        return self._stack.pop()

    def _to_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise self.error(f"the {self.what} closes what it has not opened")
        self._stack.pop()
        return items[::-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _op_proto(self, version: int) -> None:
        if version > 5:
            raise self.error(f"{self.what} of unknown version {version}")

    def _op_frame(self, _: int) -> None:
        pass

    def _op_mark(self, _: None) -> None:
        self._push(_MARK)

    def _op_none(self, _: None) -> None:
        self._push(None)

    def _op_newtrue(self, _: None) -> None:
        self._push(True)

    def _op_newfalse(self, _: None) -> None:
        self._push(False)

    # Numbers and strings come parsed.
    _op_binint = _op_binint1 = _op_binint2 = _op_long1 = _op_binfloat = _push
    _op_binunicode = _op_short_binunicode = _push

    def _op_empty_dict(self, _: None) -> None:
        self._push({})

    def _op_empty_list(self, _: None) -> None:
        self._push([])

    def _op_empty_tuple(self, _: None) -> None:
        self._push(())

    def _op_tuple(self, _: None) -> None:
        self._push(tuple(self._to_mark()))

    def _op_tuple1(self, _: None) -> None:
        self._push((self._pop(),))

    def _op_tuple2(self, _: None) -> None:
        second = self._pop()
        self._push((self._pop(), second))

    def _op_tuple3(self, _: None) -> None:
        third, second = self._pop(), self._pop()
        self._push((self._pop(), second, third))

    def _op_append(self, _: None) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _op_appends(self, _: None) -> None:
        values = self._to_mark()
        self._top(list).extend(values)

    def _op_setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set(key, value)

    def _op_setitems(self, _: None) -> None:
        items = self._to_mark()
        if len(items) % 2:
            raise self.error("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise self.error(f"a key of type {type(key).__name__}")
        self._top(dict)[key] = value

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self.error(f"expected a {kind.__name__} to add to")
        return self._stack[-1]

    def _op_memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _op_binput(self, slot: int) -> None:
        self._memo[slot] = self._peek()

    _op_long_binput = _op_binput

    def _peek(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _op_binget(self, slot: int) -> None:
        if slot not in self._memo:
            raise self.error(f"refers to slot {slot}, which is empty")
        self._push(self._memo[slot])

    _op_long_binget = _op_binget

    def _op_global(self, name: str) -> None:
        self._push(self._known(name))

    def _op_stack_global(self, _: None) -> None:
        attribute, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise self.error("a name that is not text")
        self._push(self._known(f"{module} {attribute}"))
