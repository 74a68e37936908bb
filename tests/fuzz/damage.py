"""Ways to damage a file: its bytes, a value of its JSON, or a value of a container's header."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

_BYTES = b'\x00\x7f\x80\x90\xc0\xc6\xdb\xdd\xdf\xff[]{}",:\\'
# Stands for JSON nested deeper than any parser goes, which `json.dumps` could not write.
_DEEP = "nested-deeper-than-any-parser-goes"
_STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**32 + 1, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "x" * 500, "../../etc/passwd", "\ud800", "\x00", [], {},
    [[]], [None], [0, 0], [2**62, 4], {"": 0}, _DEEP,
)  # fmt: skip


def damage_bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Changes, drops, repeats or inserts bytes, or splices two files, a few times over."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 16))
        way = rng.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(changed):
            changed[at] = rng.choice(_BYTES)
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
        elif way == 4:
            changed[at:at] = rng.randbytes(length)
        else:
            other = rng.choice(others)
            changed[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(changed)


def damage_json(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Replaces, drops, repeats or renames values, and now and then damages bytes."""
    tree = _parsed(content)
    if tree is None or not rng.randrange(8):
        return damage_bytes(content, rng, others)
    return _dumps(_damage_tree(tree, rng))


def damage_safetensors(
    content: bytes, rng: random.Random, others: list[bytes], *, sign: Callable[[Any], None]
) -> bytes:
    """Damages a value of the container's header or of our own header in it, or bytes.

    `sign` may put checksums right, so that the checks behind them are reached.
    """
    parts = _split(content)
    if parts is None or not rng.randrange(4):
        return damage_bytes(content, rng, others)
    header, data = parts
    own = header.get("__metadata__")
    own = own if isinstance(own, dict) else {}
    inner = _parsed(str(own.get("header")).encode("utf-8", "replace"))
    if inner is not None and rng.randrange(3):
        own["header"] = _dumps(_damage_tree(inner, rng)).decode("utf-8", "replace")
        if rng.randrange(8):
            sign(own)
    else:
        header = _damage_tree(header, rng)
    text = _dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def _split(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    if len(content) < 8:
        return None
    (length,) = struct.unpack("<Q", content[:8])
    header = _parsed(content[8 : 8 + length]) if length < len(content) else None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _dumps(tree: Any) -> bytes:
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        text = "{}"
    deep = "[" * 20_000 + "]" * 20_000
    return text.replace(json.dumps(_DEEP), deep).encode("utf-8", "surrogatepass")


def _damage_tree(tree: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(_STRANGE))
        holder, key = rng.choice(places)
        way = rng.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[str(rng.choice(_STRANGE))[:40]] = holder.pop(key)
        elif way == 1:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif way == 2 and isinstance(holder[key], int | float):
            holder[key] += rng.choice((-1, 1, 2, 8, 2**20))
        elif way == 3:
            other, name = rng.choice(places)
            # The same value twice; a copy, so that the tree stays one.
            if _has(other, name):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(rng.choice(_STRANGE))
    return tree


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of each value."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict | list):
            continue
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            pending.append(value)
