"""Loads policies: presets with weights, directories of ours and public ones, packed files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qvla_jax import devices
from qvla_jax.checkpoints import load_weights
from qvla_jax.checkpoints.files import (
    CONFIG_FILE,
    ORBAX_FOLDER,
    STATISTICS_FILE,
    WEIGHTS_FILE,
    check_fetched,
    read_json,
)
from qvla_jax.checkpoints.orbax_weights import load_orbax
from qvla_jax.checkpoints.packed_file import SUFFIX, PackedFile
from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.data.samples import bundled_policy_path
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.family import Family
from qvla_jax.families.options import ActionNormalization, LoadOptions
from qvla_jax.families.registry import family_of, from_record, preset, public_family
from qvla_jax.inference.packed_embed import PackedEmbed
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.places import policy_folder
from qvla_jax.inference.policy import Policy, make_policy
from qvla_jax.inference.saving import DROPPED
from qvla_jax.models import named_modules, replace_modules
from qvla_jax.models.linear import Embed
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress


@in_32_bits
def load_policy(
    source: str | Path,
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
    sharding: jax.sharding.Sharding | None = None,
    mapped: bool = False,
    progress: Progress | None = None,
) -> Policy:
    """Loads a policy; weights are read, cast and placed one at a time.

    >>> import qvla_jax
    >>> policy = qvla_jax.load_policy("libero-mini")
    >>> policy.config.action_horizon, policy.config.action_dim
    (8, 7)
    >>> policy.processor.tokenizer.encode("pick up the black bowl").tokens[-1]
    'bowl'

    Args:
        source: the name of a preset that ships with weights ("libero-mini"), a directory or `.qvla`
            file written by `Policy.save`, one written by `import_policy`, or a public directory: of
            OpenVLA, OpenVLA-OFT or UniVLA, or a checkpoint of openpi (pi0, pi0.5). A directory may
            be elsewhere: `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hugging Face Hub, or an
            address such as gs://BUCKET/FOLDER; what is read of it is fetched into a cache. A path
            that exists is never taken for another place.
        unnorm_key: which data set's statistics un-normalize the actions (openpi's asset id);
            optional if there is only one, or one is recorded or told by the preset.
        num_images: for public directories of OpenVLA's kind, the number of cameras, which the files
            do not say; by default 1 without a regression head, else that of the robot (see
            `action_horizon`).
        center_crop: whether raw images are cropped to the central 90 % of their area; by default as
            recorded or, for public directories, off for OpenVLA and on for the others.
        action_horizon: for OpenVLA-OFT, actions per chunk, which the files do not say; by default
            that of LIBERO, ALOHA or Bridge, if the name and the size of the statistics identify one
            of them. Policies of other robots need it.
        action_normalization: as for `action_horizon`, whether the quantiles q01 and q99 map to -1
            and 1 ("quantiles"), or minimum and maximum ("min_max").
        merge_adapter: for public directories, merge `lora_adapter/` into the weights; only if they
            are its base. The public scripts leave it next to weights into which it is already
            merged.
        preset: for checkpoints of openpi, its training configuration ("pi05_libero"), which says
            what no file does.
        tokenizer: for checkpoints of openpi, the file of PaliGemma's tokenizer, which comes with
            none of them.
        executed_steps: for pi0 and pi0.5, actions of a chunk that the robot's client executes
            before it asks again, which sensitivities and errors count; by default as the preset
            says, or all.
        dtype: dtype of the weights in memory, by default float32. bfloat16 halves them; arithmetic
            stays in float32.
        sharding: sharding of every weight; None uses the default device.
        mapped: for public directories, leave the weights in their files, in the files' dtypes. They
            are checked once and read again on each use: for streamed sweeps of policies that do not
            fit in memory, not for inference. Those of a compressed checkpoint (openpi's `params/`)
            are decoded once into a temporary file (in TMPDIR), which is gone with the policy.
        progress: called with the megabytes that arrive, if the policy is elsewhere.

    Raises:
        InputError: neither a preset nor a directory; the message lists close matches. Or `mapped`
            with weights that are not in a public directory, or with `dtype` or `sharding`. Or an
            argument does not apply, or contradicts what is recorded.
        CheckpointError: a file of the directory is missing, broken or requires something
            unsupported, or an argument is needed.
        RemoteError: a name or an address leads nowhere, or a file cannot be fetched.

    Warns:
        CheckpointWarning: there is an adapter that is not merged.
    """
    devices.ready()
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
    folder = policy_folder(source, options, progress=progress)
    if mapped and (not stays_in_files(folder) or dtype is not None or sharding is not None):
        raise InputError(
            f"{folder}: only the weights of a public directory can stay in their files, in their "
            "own dtypes and on no device"
        )
    if folder.suffix == SUFFIX and not folder.is_dir():
        return _load_packed(folder, options)
    if not folder.is_dir():
        config = _named(str(source))
        folder = bundled_policy_path(config.name)
        if not folder.is_dir():
            raise InputError(
                f"{config.name!r} ships without weights; give a directory that holds them"
            )
    if (family := public_family(folder)) is not None:
        return _load_public(family, folder, options, dtype, sharding, mapped=mapped)
    return _load_saved(folder, options, dtype, sharding)


def stays_in_files(source: str | Path, *, progress: Progress | None = None) -> bool:
    """Whether the weights of a policy may stay in their files: see `mapped` of `load_policy`."""
    folder = policy_folder(source, progress=progress)
    family = public_family(folder)
    return family is not None and family.stays_in_files(folder)


def _named(source: str) -> Any:
    """The preset of a name; an error tells what was looked for, such as a folder."""
    path = Path(source)
    if path.exists():
        raise InputError(f"{source}: is no directory; give the one that holds the policy")
    try:
        return preset(source)
    except InputError:
        if len(path.parts) == 1 and path.suffix != SUFFIX:
            raise
    raise InputError(f"{source}: there is no such file or directory")


def _load_public(
    family: Family,
    folder: Path,
    options: LoadOptions,
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    *,
    mapped: bool,
) -> Policy:
    parts = family.read(folder, options)
    model = family.abstract_model(parts.config, dtype=dtype)
    tensors = family.tensors(folder, parts.config, options)
    assign_tensors(model, tensors, source=tensors.file_of, sharding=sharding, mapped=mapped)
    return Policy(
        config=parts.config, model=model, processor=parts.processor, statistics=parts.statistics
    )


def _load_saved(
    folder: Path, options: LoadOptions, dtype: Any, sharding: jax.sharding.Sharding | None
) -> Policy:
    path = folder / CONFIG_FILE
    config = from_record(read_json(path), path)
    family = family_of(config)
    config = family.adjusted(config, options, path)
    model = family.abstract_model(config, dtype=dtype)
    if (folder / ORBAX_FOLDER).is_dir() and (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder}: holds weights twice, in {WEIGHTS_FILE} and in {ORBAX_FOLDER}/; take away "
            "those of the other policy"
        )
    if (folder / ORBAX_FOLDER).is_dir():
        load_orbax(model, folder / ORBAX_FOLDER, sharding=sharding)
    else:
        load_weights(model, folder / WEIGHTS_FILE, sharding=sharding)
    return make_policy(
        config,
        model,
        _read_files(folder, family.files),
        read_json(folder / STATISTICS_FILE),
        source=lambda name: str(folder / name),
    )


def _read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Content of those that there are."""
    found = {}
    for path in (folder / name for name in names):
        check_fetched(path)
        if path.is_file():
            found[path.name] = path.read_bytes()
    return found


def _load_packed(path: Path, options: LoadOptions) -> Policy:
    """Reads a `.qvla` file, layer by layer."""
    file = PackedFile(path)
    try:
        record, statistics, quantization = (
            file.header[key] for key in ("config", "statistics", "quantization")
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: unusable header (it has no {error})") from error
    config = from_record(record, path)
    family = family_of(config)
    config = family.adjusted(config, options, path)
    model = family.abstract_model(config)
    if file.header.get("unread") == DROPPED:
        # Files of large policies; those saved from memory load with the same dtypes, and so the
        # same fingerprint.
        family.drop_unread(model)
        _keep_dtypes(model, file.tensors)
    linears, embeds = named_modules(model, nnx.Linear), named_modules(model, Embed)
    for name, entry in file.layers.items():
        expected = linears[name].kernel.shape[::-1] if name in linears else None
        expected = embeds[name].embedding.shape if name in embeds else expected
        if entry.shape != expected:
            raise CheckpointError(
                f"{path}: layer {name} of shape {list(entry.shape)}: {config.name} has "
                f"{'no such layer' if expected is None else list(expected)}"
            )
    file.check_others()
    # Neighbors in the model follow one another.
    layers = [name for name in file.layers if name not in embeds]
    names = sorted(layers, key=lambda name: name.rpartition("."))
    weights = ((name, file.weight(name)) for name in names)
    inputs = {name: file.inputs(name) for name in names}
    replace_by_packed(model, weights, inputs, same_input=family.layout(config).same_input)
    for name in file.layers.keys() & embeds.keys():
        try:
            table = PackedEmbed(file.weight(name), dtype=embeds[name].dtype)
        except InputError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
        replace_modules(model, {name: table})
    assign_tensors(model, file.tensors, source=str(path))
    place: Callable[[str], str] = lambda name: f"{path}: {name}"  # noqa: E731
    policy = make_policy(config, model, file.files, statistics, source=place)
    return dataclasses.replace(policy, quantization=quantization)


def _keep_dtypes(model: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Holds token embeddings as stored; rows are converted on lookup.

    All other parameters that are not packed are small.
    """
    for path, embed in named_modules(model, Embed).items():
        if (stored := tensors.get(f"{path}.weight")) is not None:
            table: Any = embed.embedding  # whose type promises an array
            table.set_value(jax.ShapeDtypeStruct(table.shape, stored.dtype))


@in_32_bits
def random_policy(name: str, *, seed: int = 0) -> Policy:
    """A small preset with random weights and statistics of unit range, for tests and examples.

    >>> import qvla_jax
    >>> qvla_jax.random_policy("tiny-test", seed=1).config.name
    'tiny-test'

    Args:
        name: a preset, such as "tiny-test"; large ones take their full memory.
        seed: of the weights.

    Raises:
        InputError: unknown preset, or one whose family makes no policies at random.
    """
    devices.ready()
    config = preset(name)
    family = family_of(config)
    statistics, files = family.random_parts(config)
    model = family.make_model(config, rngs=nnx.Rngs(seed))
    return make_policy(config, model, files, statistics, source=name)
