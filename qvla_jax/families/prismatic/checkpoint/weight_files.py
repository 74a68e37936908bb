"""Whether a public directory has weights and adapters, and the errors if it lacks the former."""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qvla_jax.checkpoints.tensor_files import INDEX_FILE, SINGLE_FILE
from qvla_jax.errors import CheckpointError

ADAPTER_FOLDER: Final = "lora_adapter"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
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


def check_weights(folder: Path) -> None:
    """Checks that there are weights.

    Raises:
        CheckpointError: there are none; the message names what the directory has instead.
    """
    index = folder / INDEX_FILE
    if not index.is_file() and not (folder / SINGLE_FILE).is_file():
        raise _missing_weights(folder, index)


def check_read_format(folder: Path | str, names: Iterable[str]) -> None:
    """Checks that the weights are not in another format.

    Args:
        folder: the directory, here or elsewhere, for errors.
        names: of the files in it, without safetensors.

    Raises:
        CheckpointError: they are; the message names the files.
    """
    names = list(names)
    for pattern in _OTHER_FORMATS:
        found = fnmatch.filter(names, pattern)
        others = sorted(name for name in found if pattern != "*.bin" or "model" in name)
        if others:
            raise CheckpointError(
                f"{folder}: the weights are {others[0]}"
                f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which are not read; "
                f"convert them to safetensors ({SINGLE_FILE}, or shards with {INDEX_FILE})"
            )


def _missing_weights(folder: Path, index: Path) -> CheckpointError:
    check_not_adapter_only(folder)
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    if shards:
        return CheckpointError(
            f"{index}: missing; the shards are there ({shards[0]}"
            f"{f' and {len(shards) - 1} more' if len(shards) > 1 else ''}): fetch the index again"
        )
    check_read_format(folder, (path.name for path in folder.iterdir()))
    return CheckpointError(
        f"{folder / 'model.safetensors'}: missing, and so is {index.name}: there are no weights"
    )
