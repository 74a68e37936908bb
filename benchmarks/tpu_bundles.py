"""Reads the programs that libtpu's compiler dumps, and counts the bundles that they execute.

A TPU core issues one bundle a cycle, in the order of the program. Which bundles run depends on its
scalar registers alone, so `executed` follows these: additions, comparisons, scalar memory and
branches. What comes from vectors or from arguments is unknown; a region whose branch is unknown
counts as executed once. Bundles without instructions are latencies and count as well. Waits for
memory do not.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import numpy as np

# Bundles after a branch that run before it takes effect.
_DELAY: Final = 4
_WORD: Final = 2**32
_BUNDLE: Final = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{")
_INSTRUCTION: Final = re.compile(r"^%?(\w+) = ([a-z]\w*(?:\.\w+)*) ?(.*)$", re.DOTALL)
_PREDICATE: Final = re.compile(r"\s*\((!?)%(\w+)\),?\s*")
# `smov (%p, a), b` moves b where p holds, and a elsewhere.
_CHOICE: Final = re.compile(r"^\((!?)%(\w+), ([^)]*)\), (.*)$")
_BRANCH: Final = re.compile(r"target bundleno = (\d+)")
_COMMENT: Final = re.compile(r"/\*.*?\*/", re.DOTALL)
_MEMORY: Final = re.compile(r"\[smem:(.*)\]$")
_SUM: Final = re.compile(r"\[?(?P<base>#?%?\w+)(?: \+ (?P<offset>\S+?))?\]?$")

# A number of 32 bits, a truth value, or a place in scalar memory; None: unknown.
_Value: TypeAlias = int | tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A scalar instruction: `target = name arguments`, under a predicate."""

    target: str
    name: str
    arguments: tuple[str, ...]
    # Register, and the value that lets the instruction run; None: always.
    predicate: tuple[str, bool] | None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What one bundle does to the scalar unit; `branch` is the bundle that it may jump to."""

    instructions: tuple[Instruction, ...]
    branch: int | None = None
    # As of an instruction; None: the branch is taken.
    condition: tuple[str, bool] | None = None


def parse(text: str) -> list[Bundle]:
    """The bundles of a `*-packed-bundles-post-ra.txt` dump, in order.

    Raises:
        ValueError: bundles are not numbered from 0 on.
    """
    bodies: list[str] = []
    for line in text.splitlines():
        if found := _BUNDLE.match(line):
            if int(found.group(1), 0) != len(bodies):
                raise ValueError(f"bundle {found.group(1)} comes after {len(bodies)} bundles")
            bodies.append(line[found.end() :])
        elif bodies:
            bodies[-1] += "\n" + line
    return [_bundle(body) for body in bodies]


def _bundle(body: str) -> Bundle:
    instructions: list[Instruction] = []
    branch = condition = None
    for part in _COMMENT.sub("", body).rstrip().rstrip("}").split(";;"):
        found = _INSTRUCTION.match(part.strip())
        if not found:
            continue
        target, name, rest = found.groups()
        predicate = None
        if guard := _PREDICATE.search(rest):  # before or behind the arguments
            predicate = (_register(guard.group(2)), not guard.group(1))
            rest = rest[: guard.start()] + rest[guard.end() :]
        elif choice := _CHOICE.match(rest):
            negated, chooser, *values = choice.groups()
            name, values = "scalar_select", values if negated else values[::-1]
            rest = ", ".join([f"%{chooser}", *values])
        if name.startswith("sbr"):
            if jump := _BRANCH.search(rest):
                branch, condition = int(jump.group(1)), predicate
        elif name[0] in "spi" or name.startswith(("scalar", "dma")):
            # A store separates its place and its value by a space.
            rest = rest.replace("]] ", "]], ", 1) if name == "sst" else rest
            arguments = tuple(a.strip() for a in rest.split(","))
            instructions.append(Instruction(_register(target), name, arguments, predicate))
    return Bundle(tuple(instructions), branch, condition)


def _register(name: str) -> str:
    """The physical register of `s14070_s24`."""
    return name.rsplit("_", 1)[-1]


def slots(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Of a `*per-bundle-utilization.txt` dump.

    Returns:
        The names of the slots, int64 [slots] how many of each a bundle has, and int64 [bundles,
        slots] how many each bundle uses.
    """
    head, body = text.split("== UTILIZATION:")
    _, names, capacity = head.strip().splitlines()
    used = [[int(n) for n in line.split()] for line in body.splitlines() if line.strip()]
    return (
        tuple(name.strip() for name in names.split(",")),
        np.array(capacity.split(), np.int64),
        np.array(used, np.int64),
    )


def executed(program: list[Bundle], tables: Mapping[int, np.ndarray]) -> np.ndarray:
    """How often each bundle runs, int64 [bundles].

    Args:
        program: the bundles.
        tables: contents of operands that are copied to scalar memory, by their number.

    Raises:
        ValueError: the end of a loop depends on something unknown.
    """
    counts = np.zeros(len(program), np.int64)
    unit = _ScalarUnit(tables)
    at, jump, left = 0, None, 0
    while at < len(program):
        bundle = program[at]
        counts[at] += 1
        if bundle.branch is not None and jump is None:
            taken = unit.holds(bundle.condition)
            if taken is None and bundle.branch <= at:
                raise ValueError(f"bundle {at}: the end of the loop is unknown")
            if taken:
                jump, left = bundle.branch, _DELAY + 1
        unit.run(bundle)
        at += 1
        if jump is not None:
            left -= 1
            if not left:
                at, jump = jump, None
    return counts


class _ScalarUnit:
    """Registers and scalar memory."""

    def __init__(self, tables: Mapping[int, np.ndarray]) -> None:
        self.tables = tables
        self.registers: dict[str, _Value] = {}
        self.memory: dict[tuple[str, int], _Value] = {}

    def holds(self, predicate: tuple[str, bool] | None) -> bool | None:
        """Whether a predicate holds; None if that is unknown."""
        if predicate is None:
            return True
        value = self.registers.get(predicate[0])
        return None if value is None else bool(value) == predicate[1]

    def run(self, bundle: Bundle) -> None:
        """Instructions of a bundle read what was there before it."""
        registers: dict[str, _Value] = {}
        memory: dict[tuple[str, int], _Value] = {}
        for instruction in bundle.instructions:
            name = instruction.name
            if name == "sphi" or name.startswith("int_to_ptr"):  # of one register, for the compiler
                continue
            if self.holds(instruction.predicate) is False:
                continue
            if name == "sst":
                place = self._place(instruction.arguments[0])
                if place is not None:
                    memory[place] = self._value(instruction.arguments[1])
            elif name.startswith("dma") and name.endswith("_to_smem"):
                self._copy(instruction.arguments)
            elif name[0] in "sip":
                registers[instruction.target] = self._result(name, instruction.arguments)
        self.registers |= registers
        self.memory |= memory

    def _copy(self, arguments: tuple[str, ...]) -> None:
        source, place = (self._value(arguments[i]) for i in (0, 2))
        if isinstance(source, tuple) and isinstance(place, tuple):
            for i, value in enumerate(self.tables.get(source[1], ())):
                self.memory[place[0], place[1] + i] = int(value) % _WORD

    def _result(self, name: str, arguments: tuple[str, ...]) -> _Value:
        if name.startswith("inlined_call_operand"):
            number = re.search(r"index: (\d+)", ",".join(arguments))
            return ("operand", int(number.group(1))) if number else None
        if name == "sld":
            place = self._place(arguments[0])
            return None if place is None else self.memory.get(place)
        if name.startswith("scalar_lea"):
            base, offset = (self._value(a) for a in arguments[:2])
            if isinstance(base, tuple) and isinstance(offset, int):
                return base[0], base[1] + offset
            return None
        if name.startswith("scalar_select"):
            chosen = self._value(arguments[0])
            return self._select(None if chosen is None else bool(chosen), *arguments[1:3])
        values = [self._value(a) for a in arguments]
        if name in ("smov", "smov.u32", "pmov"):
            return values[0]
        if name == "sshll.u32" and isinstance(values[0], tuple):  # its address, in bytes
            return values[0]
        known = [v for v in values if isinstance(v, int)]
        if name in _LOGIC:
            return _logic(name, values)
        operation = _OPERATIONS.get(name.split(".")[0])
        if operation and len(known) == len(values) == 2:
            a, b = known
            return operation(a, b) % _WORD
        if name.startswith("scmp") and len(known) == 2:
            _, relation, kind = name.split(".")[:3]
            a, b = (_signed(v) if kind == "s32" else v for v in known)
            return int(_RELATIONS[relation](a, b))
        return None

    def _select(self, chosen: bool | None, first: str, second: str) -> _Value:
        if chosen is None:
            return None
        return self._value(first if chosen else second)

    def _place(self, text: str) -> tuple[str, int] | None:
        found = _MEMORY.match(text)
        value = self._value(found.group(1)) if found else None
        return value if isinstance(value, tuple) else None

    def _value(self, text: str) -> _Value:
        found = _SUM.match(text)
        if not found:
            return None
        base, offset = found.group("base"), found.group("offset")
        if base.startswith("%"):
            value = self.registers.get(_register(base[1:]))
        elif base.startswith("#"):
            value = base, 0
        else:
            return int(base, 0) % _WORD if base[0].isdigit() else None
        if offset is None:
            return value
        more = self._value(offset.lstrip("$"))
        if isinstance(value, tuple) and isinstance(more, int):
            return value[0], value[1] + more
        return None


def _signed(value: int) -> int:
    return value - _WORD if value >= _WORD // 2 else value


def _logic(name: str, values: list[_Value]) -> _Value:
    if name == "pneg":
        return None if values[0] is None else int(not values[0])
    either, decided = name in ("por", "pnor"), None
    # One operand can decide alone: true for `or`, false for `and`.
    if any(v is not None and bool(v) == either for v in values):
        decided = either
    elif None not in values:
        decided = not either
    return None if decided is None else int(decided != name.startswith("pn"))


_LOGIC: Final = ("pneg", "por", "pand", "pnor", "pnand")
_OPERATIONS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sshll": lambda a, b: a << b,
    "sshrl": lambda a, b: a >> b,
    "sshra": lambda a, b: _signed(a) >> b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": lambda a, b: min(_signed(a), _signed(b)),
    "smax": lambda a, b: max(_signed(a), _signed(b)),
}
_RELATIONS: Final[Mapping[str, Callable[[int, int], bool]]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
