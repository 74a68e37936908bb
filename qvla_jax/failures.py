"""Explains exceptions of libraries and the system that are not bugs, in one sentence each.

This is the command line's last line of defense: known exceptions become one line, and everything
else keeps its traceback.
"""

import errno
import os
import traceback
from typing import Final

from qvla_jax.errors import InputError, QvlaError

_PACKAGE: Final = __name__.partition(".")[0]
# Errors of the system: those caused by the input, and those that are nobody's fault.
_INPUT: Final = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY),
    }
)
_SYSTEM: Final = {
    errno.ENOSPC: "make room, and repeat the command",
    errno.EDQUOT: "make room, and repeat the command",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger file",
    errno.EIO: "the disk or the network file system fails",
    errno.ESTALE: "the network file system fails",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "less memory is free than is needed",
    errno.EAGAIN: "raise `ulimit -u`",
}
_MEMORY: Final = (
    "; smaller batches, fewer frames or --streamed take less, where the command has them"
)


def in_one_line(error: Exception) -> QvlaError | None:
    """What an exception means to a user; None if it may be a bug.

    Args:
        error: anything but a `QvlaError`.
    """
    if isinstance(error, ImportError):
        return broken_package(error)
    if isinstance(error, MemoryError):
        return QvlaError(f"out of memory ({_text(error)}){_MEMORY}")
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return QvlaError(f"out of memory on the device ({_text(error)}){_MEMORY}")
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        if error.errno in _INPUT:
            return InputError(f"{place}{error.strerror}")
        if error.errno in _SYSTEM:
            return QvlaError(f"{place}{error.strerror}; {_SYSTEM[error.errno]}")
    return None


def broken_package(error: Exception) -> InputError | None:
    """What a failed import means to a user; None if the fault may be in this package."""
    named = error.name if isinstance(error, ImportError) else None
    package = (named or "").partition(".")[0] or _raised_in(error)
    if package == _PACKAGE:
        return None
    if isinstance(error, ModuleNotFoundError) and named:
        said = f"{package} is not installed"
    else:
        said = f"{_variables(str(error))}{package} is broken ({_text(error)})"
    return InputError(f"{said}; `qvla doctor` says what to install")


def _variables(text: str) -> str:
    """Environment variables whose value an error quotes, as `NAME='value': `."""
    quoted = [
        f"{name}={value!r}"
        for name, value in sorted(os.environ.items())
        if len(value) > 2 and (repr(value) in text or f'"{value}"' in text)
    ]
    return f"{', '.join(quoted)}: " if quoted else ""


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an exception."""
    names = [
        str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    own = [name for name in names if not name.startswith("importlib")]
    return own[-1].partition(".")[0] if own else _PACKAGE


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name
