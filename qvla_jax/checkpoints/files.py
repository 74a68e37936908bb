"""Files of a policy's directory: names that families share, and errors if one is unreadable."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qvla_jax.errors import CheckpointError, InputError

CONFIG_FILE: Final = "config.json"
STATISTICS_FILE: Final = "dataset_statistics.json"
TOKENIZER_FILE: Final = "tokenizer.json"
# Weights in a directory of ours: one file, or an orbax checkpoint.
WEIGHTS_FILE: Final = "model.safetensors"
ORBAX_FOLDER: Final = "weights"
_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def check_fetched(path: Path) -> None:
    """Checks that a file is there itself, not the note that a clone without Git LFS leaves.

    Raises:
        CheckpointError: it is such a note.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError:
        return  # the reader has an error of its own
    if begin == _POINTER:
        raise CheckpointError(
            f"{path}: a pointer of Git LFS stands in place of the file; fetch the content (git lfs "
            "pull, or hf download)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, not JSON, or not an object.
    """
    check_fetched(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def folder_name(folder: Path) -> str:
    """The name of a policy's directory; in the cache of the Hugging Face Hub, the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def check_empty(out: Path) -> None:
    """Raises an `InputError` if a folder already holds files."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds files already; name an empty or a new folder")


@contextlib.contextmanager
def emptied_on_error(out: Path) -> Iterator[None]:
    """Removes a folder that was empty or new if filling it fails: another attempt can succeed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
