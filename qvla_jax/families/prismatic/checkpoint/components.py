"""Files of single components in OpenVLA-OFT's and UniVLA's directories."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qvla_jax.errors import CheckpointError
from qvla_jax.families.prismatic.checkpoint.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    is_adapter_only,
)

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
    check_tensor_names(folder, (path.name for path in folder.iterdir() if path.is_file()))
    if (folder / ADAPTER_CONFIG).is_file() and not is_adapter_only(folder):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: an adapter beside weights, where transformers would load "
            f"its base instead of them; take it away if the weights hold it, or move it to "
            f"{ADAPTER_FOLDER}/ if they do not"
        )


def check_tensor_names(folder: Path | str, names: Iterable[str]) -> None:
    """The same by the names of the files that lie directly in a directory, here or elsewhere."""
    for name in sorted(names):
        if not _matches(name, _TENSORS):
            continue
        if _matches(name, _NOT_READ) or _matches(name, COMPONENTS.values()):
            continue
        path = f"{folder}/{name}"
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


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
