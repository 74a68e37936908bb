"""`qvla export`: a policy in the public layout, quantized ones with their rounded weights."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from qvla_jax.commands.results import written
from qvla_jax.errors import InputError
from qvla_jax.families.registry import public_family
from qvla_jax.inference import load_policy
from qvla_jax.inference.dequantizing import LeftOut, export_dequantized
from qvla_jax.inference.loading import stays_in_files
from qvla_jax.inference.places import policy_folder
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.pipeline.policies import load_named_policy
from qvla_jax.progress import ProgressBars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Writes a policy in the public layout of its family, such as OpenVLA's on Hugging Face.

    A public directory passes through the import one tensor at a time and comes back bit for bit;
    any other policy, or one whose dtype or settings change, is loaded first.
    """

    # A preset with weights, or a directory that holds a policy (saved or public); see also
    # --dequantized.
    model: str
    # An empty or new folder.
    out: Path
    # Dtype of all tensors; by default unchanged or, with --dequantized, bfloat16 if the parameters
    # that are not quantized fit in it.
    dtype: Literal["float32", "bfloat16"] | None = None
    # The model is quantized (a .qvla file, or a name such as libero-mini@runs/mini:3.5): write the
    # values that its weights are rounded to, and measure what changes in the actions.
    dequantized: bool = False
    # With --dequantized: what may get lost because the public layout has no room for it.
    leave_out: tuple[LeftOut, ...] = ()


def main(config: Config) -> Result:
    """Exports a policy; reports the peak resident memory."""
    if config.dequantized:
        return _dequantized(config)
    if config.leave_out:
        raise InputError("leave_out: only what is written with --dequantized may lose anything")
    with ProgressBars() as progress:
        folder = policy_folder(config.model, config, progress=progress)
    family = public_family(folder) if config.dtype is None else None
    if family is None or not family.reexport(folder, config.out, config):
        # Each tensor that can stay in its file is read when it is written, in its own dtype.
        mapped = stays_in_files(config.model)
        policy = load_policy(config.model, mapped=mapped, **config.said())
        policy.export(config.out, dtype=config.dtype and jnp.dtype(config.dtype))
    return written(config.out)


def _dequantized(config: Config) -> Result:
    policy = load_named_policy(config.model, config)
    dtype = config.dtype and jnp.dtype(config.dtype)
    record, parity = export_dequantized(policy, config.out, dtype=dtype, leave_out=config.leave_out)
    result = written(config.out)
    lines = [f"{record['dtype']}: {parity}"]
    lines += [
        f"left out: {kind.replace('-', ' ')} of {len(layers)} layers"
        for kind, layers in record["left_out"].items()
    ]
    if unread := record["zeros_for_unread"]:
        lines.append(f"zeros: {len(unread)} tensors that inference never reads")
    content = {**result.content, **record, "parity": dataclasses.asdict(parity)}
    return Result(content, (*result.lines, *lines))
