"""Policies by name, quantized ones included: `libero-mini`, `libero-mini@4`, `libero-mini@runs/x`.

After the `@` comes a bit-width (uniform round-to-nearest) or the folder of a run, whose chosen
allocation is applied with the quantizer that it was made for, in float32 on exactly the values of
the grids; `runs/x:3.5` and `runs/x:uniform4` are the run's allocations at another budget, and
`runs/x:gptq-w4` is what `qvla quantize --method gptq-w4` left there. A `.qvla` file, such as the
run's own policy.qvla, runs from its packed weights.
"""

import re
from pathlib import Path

from qvla_jax.errors import InputError
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.pipeline.methods import is_method, load_method, method_file
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
    folder, budget = _folder_and_budget(quantized)
    if not folder.is_dir():
        raise InputError(f"{name}: {quantized!r} is neither a bit-width nor the folder of a run")
    made_from = {"policy fingerprint": policy.fingerprint}
    if is_method(budget):
        return unpacked(policy, load_method(method_file(folder, budget), made_from))
    path = folder / files.ALLOCATION
    allocations = Allocations.load(path)
    files.check_same(
        path,
        allocations.made_from,
        made_from,
        remedy="name the policy that the run was made with",
    )
    table = load_tables(folder)[0]
    bits = allocations.at(budget).bits if budget else allocations.chosen.bits
    return quantize(policy, bits, quantizer=table.quantizer, packed=False)


def _folder_and_budget(text: str) -> tuple[Path, str]:
    """Splits `runs/x:uniform4`; a folder whose name holds a colon is a folder."""
    folder, separator, budget = text.rpartition(":")
    return (Path(folder), budget) if separator and not Path(text).is_dir() else (Path(text), "")
