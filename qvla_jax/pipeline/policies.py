"""Policies by name, quantized ones included: `libero-mini`, `libero-mini@4`, `libero-mini@runs/x`.

After the `@` comes a bit-width (uniform round-to-nearest) or the folder of a run, whose chosen
allocation is applied with the quantizer that it was made for, in float32 on exactly the values of
the grids; `runs/x:3.5` and `runs/x:uniform4` are the run's allocations at another budget, and
`runs/x:gptq-w4` is the result of `qvla quantize --method gptq-w4` there. A `.qvla` file, such as
the run's own policy.qvla, runs from its packed weights. In `OWNER/NAME@REVISION`, a model of the
Hugging Face Hub, the first `@` names a revision, and another one may follow.
"""

import re
from pathlib import Path
from typing import Final

from qvla_jax.checkpoints.files import CONFIG_FILE, read_json
from qvla_jax.checkpoints.packed_file import SUFFIX, PackedFile
from qvla_jax.errors import InputError
from qvla_jax.families.registry import family_of, from_record, public_family
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.places import policy_folder
from qvla_jax.inference.quantize import quantize, quantize_uniform
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.model_options import ModelOptions
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.pipeline.methods import is_method, load_method, method_file
from qvla_jax.pipeline.quantize import embedding_bits
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.remote.hub import looks_like_one

# A bit-width after the `@`; a revision may have more digits.
_BITS: Final = r"\d{1,2}"


def load_named_policy(name: str, options: ModelOptions | None = None) -> Policy:
    """Loads a policy by its name.

    Args:
        name: as described above.
        options: what its files do not say.

    Raises:
        InputError: there is no such policy or run, or the allocation is another policy's.
    """
    model, quantized = model_of(name)
    policy = load_policy(model, **({} if options is None else options.said()))
    if not quantized:
        return policy
    if re.fullmatch(_BITS, quantized):
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
    allocation = allocations.at(budget) if budget else allocations.chosen
    # As the run packed them, if it got that far.
    file = folder / files.POLICY
    embeddings = embedding_bits(file, policy) if file.is_file() else SOURCE
    return quantize(
        policy, allocation, quantizer=table.quantizer, packed=False, embedding_bits=embeddings
    )


def model_of(name: str) -> tuple[str, str]:
    """The model in a policy's name, and the part after the `@`, which may be empty."""
    model, separator, quantized = name.rpartition("@")
    if not separator or Path(name).is_dir():
        return name, ""
    if looks_like_one(model, "model") and not Path(model).exists():
        # After the name of a model on the Hub, all but bits and runs is a revision.
        run = "/" in quantized and not quantized.startswith("refs/")
        if not (run or re.fullmatch(_BITS, quantized) or _folder_and_budget(quantized)[0].is_dir()):
            return name, ""
    return model, quantized


def takes_options(model: str) -> bool:
    """Whether options of public directories apply to a model: it is one, or was made from one.

    Raises:
        CheckpointError: a file that tells is missing or damaged.
    """
    folder = policy_folder(model)
    if folder.suffix == SUFFIX and folder.is_file():
        record = PackedFile(folder).header.get("config")
    elif not folder.is_dir() or public_family(folder) is not None:
        return folder.is_dir()
    else:
        record = read_json(folder / CONFIG_FILE)
    config = from_record(record, folder)
    return family_of(config).takes_options(config)


def check_acting(model: str, options: ModelOptions) -> None:
    """Checks that everything is said that success in the simulator depends on.

    Raises:
        InputError: a public directory does not say it, and neither do the options.
    """
    folder = policy_folder(model, options)
    if (family := public_family(folder)) is not None:
        family.check_acting(folder, options)


def _folder_and_budget(text: str) -> tuple[Path, str]:
    """Splits `runs/x:uniform4`; an existing folder may have a colon in its name."""
    folder, separator, budget = text.rpartition(":")
    return (Path(folder), budget) if separator and not Path(text).is_dir() else (Path(text), "")
