"""The files of a public directory: which hold the policy, and the errors if one is missing."""

import json
from pathlib import Path
from typing import Any, Final

from qvla_jax.errors import CheckpointError, InputError

CONFIG_FILE: Final = "config.json"
STATISTICS_FILE: Final = "dataset_statistics.json"
TOKENIZER_FILE: Final = "tokenizer.json"
ADAPTER_FOLDER: Final = "lora_adapter"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_OTHER_FORMATS: Final = ("*.gguf", "*.bin", "*.h5", "*.msgpack", "*.pth", "*.ckpt", "*.onnx")


def adapter_folders(folder: Path) -> list[Path]:
    """Folders in a directory that hold an adapter of PEFT."""
    found = {path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")}
    if (folder / ADAPTER_FOLDER).is_dir():
        found.add(folder / ADAPTER_FOLDER)
    return sorted(found)


def is_adapter_only(folder: Path) -> bool:
    """Whether a directory holds an adapter, and no weights that it could adapt."""
    adapters = adapter_folders(folder) or (folder / ADAPTER_CONFIG).is_file()
    weights = [path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS]
    return bool(adapters) and not weights and not any(folder.glob("pytorch_model*.bin"))


def check_not_adapter_only(folder: Path) -> None:
    """Raises a `CheckpointError` that says what to do with an adapter without its base."""
    if not folder.is_dir() or not is_adapter_only(folder):
        return
    adapter = next(iter(adapter_folders(folder)), folder)
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    named = f", {base!r:.200}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{folder}: a run with an adapter only ({adapter / ADAPTER_CONFIG}); merge it into its "
        f"base{named}, with vla-scripts/merge_lora_weights_and_save.py of OpenVLA-OFT, or put the "
        "base's weights and config.json beside it and load with merge_adapter=True"
    )


def missing_weights(folder: Path, index: Path) -> CheckpointError:
    """The error for missing weights; names what the directory has instead."""
    check_not_adapter_only(folder)
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    if shards:
        return CheckpointError(
            f"{index}: missing; the shards are there ({shards[0]}"
            f"{f' and {len(shards) - 1} more' if len(shards) > 1 else ''}): fetch the index again"
        )
    for pattern in _OTHER_FORMATS:
        others = sorted(
            p.name for p in folder.glob(pattern) if pattern != "*.bin" or "model" in p.name
        )
        if others:
            return CheckpointError(
                f"{folder}: the weights are {others[0]}"
                f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which are not read; "
                "convert them to safetensors (model.safetensors, or shards with "
                f"{index.name})"
            )
    return CheckpointError(
        f"{folder / 'model.safetensors'}: missing, and so is {index.name}: there are no weights"
    )


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


def check_empty(out: Path) -> None:
    """Raises an `InputError` if a folder already holds files."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds files already; name an empty or a new folder")
