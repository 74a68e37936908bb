"""Policies by name, quantized ones included: `libero-mini`, `libero-mini@4`, `libero-mini@runs/x`.

After the `@` comes a bit-width (uniform round-to-nearest) or the folder of a run, whose chosen
allocation is applied with the quantizer that it was made for, in float32 on exactly the values of
the grids. A `.qvla` file, such as the run's own policy.qvla, runs from its packed weights.
"""

import re
from pathlib import Path

from qvla_jax.errors import InputError
from qvla_jax.inference import Policy, load_policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.quantization import quantize, quantize_uniform


def load_named_policy(name: str) -> Policy:
    """Loads a policy by its name.

    Raises:
        InputError: There is no such policy or run, or the allocation is another policy's.
    """
    model, separator, quantized = name.rpartition("@")
    if not separator or Path(name).is_dir():
        return load_policy(name)
    policy = load_policy(model)
    if re.fullmatch(r"\d+", quantized):
        return quantize_uniform(policy, int(quantized), packed=False)
    folder = Path(quantized)
    if not folder.is_dir():
        raise InputError(f"{name}: {quantized!r} is neither a bit-width nor the folder of a run")
    path = folder / files.ALLOCATION
    allocations = Allocations.load(path)
    files.check_same(
        path,
        allocations.made_from,
        {"policy fingerprint": policy.fingerprint},
        remedy="name the policy that the run was made with",
    )
    table = load_tables(folder)[0]
    return quantize(policy, allocations.chosen.bits, quantizer=table.quantizer, packed=False)
