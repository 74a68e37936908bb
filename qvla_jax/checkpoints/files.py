"""The files of a public directory: which hold the policy, and the errors if one is missing."""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from qvla_jax.errors import CheckpointError, InputError

CONFIG_FILE: Final = "config.json"
STATISTICS_FILE: Final = "dataset_statistics.json"
TOKENIZER_FILE: Final = "tokenizer.json"
ADAPTER_FOLDER: Final = "lora_adapter"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
# Parts that may have their own file, which then replaces them in the weights, and the file's name.
# The public code requires the part's name and "checkpoint" in it.
COMPONENTS: Final = {
    "action_head": "*action_head*checkpoint*.pt",
    "proprio_projector": "*proprio_projector*checkpoint*.pt",
    "vision_backbone": "*vision_backbone*checkpoint*.pt",
    "action_decoder": "action_decoder*.pt",
}
# Leftovers of training, and other forms of the same weights: not read.
_NOT_READ: Final = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "training_args*",
    "training_state*",
    "trainer_state*",
    "pytorch_model*.bin",
)
# Files that hold tensors: each is read, deliberately not read, or refused.
_TENSORS: Final = ("*.pt", "*.pth", "*.ckpt", "*.bin")
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_OTHER_FORMATS: Final = ("*.gguf", "*.bin", "*.h5", "*.msgpack", "*.pth", "*.ckpt", "*.onnx")


def component_file(folder: Path, name: str) -> Path | None:
    """The `.pt` file of a component; None if the directory has none.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(folder.glob(COMPONENTS[name]))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: several {name} files: {[p.name for p in found]}; leave the one of the "
            "weights' training step"
        )
    return found[0] if found else None


def check_tensor_files(folder: Path) -> None:
    """Checks that no file holds tensors that would be silently ignored.

    Raises:
        CheckpointError: there is one. The message names it.
    """
    for path in sorted(folder.iterdir()):
        name = path.name
        if not path.is_file() or not _matches(name, _TENSORS):
            continue
        if _matches(name, _NOT_READ) or _matches(name, COMPONENTS.values()):
            continue
        if "noisy_action_projector" in name:
            raise CheckpointError(
                f"{path}: belongs to a diffusion head, which is not supported; L1 heads are"
            )
        part = next((part for part in COMPONENTS if part in name), None)
        raise CheckpointError(
            f"{path}: would be passed over; "
            + (
                "take it away if it is no part of the policy"
                if part is None
                else f"call it {part}--0_checkpoint.pt if it is the {part}, or take it away"
            )
        )
    if (folder / ADAPTER_CONFIG).is_file() and not is_adapter_only(folder):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: an adapter beside weights, where transformers would load "
            f"its base instead of them; take it away if the weights hold it, or move it to "
            f"{ADAPTER_FOLDER}/ if they do not"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
