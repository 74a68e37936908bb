"""Imports public directories into ours, one tensor at a time."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qvla_jax.checkpoints.files import ORBAX_FOLDER, check_empty, emptied_on_error
from qvla_jax.checkpoints.orbax_weights import save_orbax
from qvla_jax.errors import InputError
from qvla_jax.families.options import ActionNormalization, LoadOptions
from qvla_jax.families.registry import public_family
from qvla_jax.inference.places import policy_folder
from qvla_jax.inference.saving import save_settings
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress


@in_32_bits
def import_policy(
    source: str | Path,
    out: str | Path,
    *,
    unnorm_key: str | None = None,
    num_images: int | None = None,
    center_crop: bool | None = None,
    action_horizon: int | None = None,
    action_normalization: ActionNormalization | None = None,
    merge_adapter: bool = False,
    preset: str | None = None,
    tokenizer: str | Path | None = None,
    executed_steps: int | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> None:
    """Imports a public directory into one of ours, with its weights as an orbax checkpoint.

    No more than one tensor is in memory at a time. `load_policy` reads the result.

    Args:
        source: a public directory; see `load_policy`.
        out: an empty or new folder.
        unnorm_key: see `load_policy`, as for all that follow.
        num_images: see there.
        center_crop: see there.
        action_horizon: see there.
        action_normalization: see there.
        merge_adapter: see there.
        preset: see there.
        tokenizer: see there.
        executed_steps: see there.
        dtype: dtype of all weights; by default bfloat16, as published.
        progress: see there.

    Raises:
        InputError: `source` is not a public directory, or `out` already holds files.
        CheckpointError: a file is missing or damaged, or a tensor does not fit its model.

    Warns:
        CheckpointWarning: there is an adapter that is not merged.
    """
    options = LoadOptions(
        unnorm_key=unnorm_key,
        num_images=num_images,
        center_crop=center_crop,
        action_horizon=action_horizon,
        action_normalization=action_normalization,
        merge_adapter=merge_adapter,
        preset=preset,
        tokenizer=None if tokenizer is None else str(tokenizer),
        executed_steps=executed_steps,
    )
    out = Path(out)
    check_empty(out)
    folder = policy_folder(source, options, progress=progress)
    if (family := public_family(folder)) is None:
        raise InputError(
            f"{folder}: not a public directory: there is no config.json of one, and no checkpoint "
            "of openpi"
        )
    parts = family.read(folder, options)
    model = family.abstract_model(parts.config, dtype=dtype or jnp.bfloat16)
    tensors = family.tensors(folder, parts.config, options)
    with emptied_on_error(out):
        save_orbax(out / ORBAX_FOLDER, model, tensors, source=tensors.file_of)
        save_settings(parts.config, parts.processor, parts.statistics, out)
