"""`Policy`: observation in, action chunk out."""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from qvla_jax import devices, sharding
from qvla_jax.array_typing import Array, Float
from qvla_jax.atomic import write_json, write_text
from qvla_jax.checkpoints import load_weights, public_tensors, save_weights
from qvla_jax.checkpoints.files import (
    CONFIG_FILE,
    STATISTICS_FILE,
    check_fetched,
    read_json,
)
from qvla_jax.checkpoints.orbax_weights import load_orbax, save_orbax
from qvla_jax.checkpoints.packed_file import SUFFIX, PackedFile, write_packed
from qvla_jax.checkpoints.weights import assign_tensors, public_items
from qvla_jax.data.samples import bundled_policy_path
from qvla_jax.errors import CheckpointError, InputError, unknown
from qvla_jax.families.layout import Layout
from qvla_jax.families.prismatic import specs
from qvla_jax.families.prismatic.checkpoint.directory import PublicTensors
from qvla_jax.families.prismatic.checkpoint.export import check_empty, export_model
from qvla_jax.families.prismatic.checkpoint.huggingface import (
    check_tokenizer,
    is_huggingface,
    read_config,
)
from qvla_jax.families.prismatic.checkpoint.options import ActionNormalization, LoadOptions
from qvla_jax.families.prismatic.checkpoint.statistics import check_entry, finite
from qvla_jax.families.prismatic.checkpoint.univla import check_latent_tokens
from qvla_jax.families.prismatic.config import PRESETS, OpenVLAConfig, preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import ModelInputs, Prismatic, abstract_model, make_model
from qvla_jax.families.prismatic.normalization import Normalizer
from qvla_jax.families.prismatic.processor import Processor
from qvla_jax.families.prismatic.unread import DROPPED, drop_unread, is_dropped
from qvla_jax.families.prismatic.word_tokenizer import word_tokenizer
from qvla_jax.inference.packed_linear import packed_layers, replace_by_packed
from qvla_jax.models import named_modules
from qvla_jax.precision import in_32_bits
from qvla_jax.provenance import package_versions

WEIGHTS_FILE = "model.safetensors"
ORBAX_FOLDER = "weights"
TOKENIZER_FILE = "tokenizer.json"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    graphdef: nnx.GraphDef[Prismatic],
    mesh: jax.sharding.Mesh,
    state: nnx.State,
    inputs: ModelInputs,
) -> Float[Array, "b h a"]:
    # Each device runs its share of the batch by itself: XLA cannot partition a custom call, and
    # would run the packed layers of the whole batch on every device.
    def actions(state: nnx.State, inputs: ModelInputs) -> Float[Array, "b h a"]:
        return nnx.merge(graphdef, state).actions(inputs)

    batch = jax.sharding.PartitionSpec(sharding.DATA_AXIS)
    return jax.shard_map(
        actions,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), batch),
        out_specs=batch,
        check_vma=False,
    )(state, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _complete(
    graphdef: nnx.GraphDef[Prismatic], state: nnx.State, inputs: ModelInputs
) -> ModelInputs:
    return nnx.merge(graphdef, state).complete(inputs)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network with everything it needs between sensors and motors, packed or not.

    >>> import qvla_jax
    >>> policy = qvla_jax.random_policy("tiny-test")
    >>> observation = policy.fake_observation()
    >>> sorted(observation)
    ['image', 'instruction', 'state', 'wrist_image']
    >>> policy.infer(observation).shape  # the next 8 actions of 7 numbers, in the robot's units
    (8, 7)
    >>> policy.save("tiny")
    >>> isinstance(qvla_jax.load_policy("tiny"), qvla_jax.Policy)
    True
    """

    config: OpenVLAConfig
    model: Prismatic
    processor: Processor
    # The public dataset_statistics.json, kept for `save`; null for numbers that are not finite.
    statistics: Mapping[str, Any]
    # How the weights were quantized: quantizer, fingerprint of the source policy, calibration
    # hash. None in full precision.
    quantization: Mapping[str, Any] | None = None

    @property
    def layout(self) -> Layout:
        """Names of the network's modules and numbers of a call, for everything behind it."""
        return layout(self.config)

    def inputs_spec(self, batch_size: int = 1) -> ModelInputs:
        """Shapes and dtypes of the output of `prepare`; see `qvla_jax.families.prismatic.specs`."""
        return specs.inputs_spec(self.config, batch_size=batch_size)

    def fake_observation(self, seed: int = 0) -> dict[str, Any]:
        """An observation of noise for `infer`, for trials and for warming up."""
        return specs.fake_observation(self.config, seed=seed)

    def prepare(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> ModelInputs:
        """A batch of observations -> model inputs; see `Processor.__call__`."""
        return self.processor(batch, preprocessed=preprocessed)

    def infer_normalized(
        self, batch: Mapping[str, Any], *, preprocessed: bool = False
    ) -> Float[np.ndarray, "b h a"]:
        """A batch of observations -> the normalized action chunks that the robot executes, float32.

        The batch is split over all local devices, with padding if it does not divide evenly.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        return self.run(self.prepare(batch, preprocessed=preprocessed))

    @in_32_bits
    def run(self, inputs: ModelInputs) -> Float[np.ndarray, "b h a"]:
        """Prepared inputs -> normalized action chunks; see `infer_normalized`."""
        mesh = sharding.data_mesh()
        padded, count = sharding.pad_batch(inputs, mesh.size)
        graphdef, state = nnx.split(self.model)
        with jax.default_matmul_precision("float32"):
            chunk = _forward(graphdef, mesh, state, sharding.shard_batch(mesh, padded))
        return np.asarray(chunk)[:count]

    @in_32_bits
    def run_all(self, batches: Sequence[ModelInputs]) -> list[Float[np.ndarray, "b h a"]]:
        """As `run` for each of many batches: the weights are put on the devices once.

        Args:
            batches: prepared inputs; the size of each is a multiple of the number of devices.
        """
        mesh = sharding.data_mesh()
        graphdef, state = nnx.split(self.model)
        state = sharding.replicate(mesh, state)
        with jax.default_matmul_precision("float32"):
            chunks = [
                _forward(graphdef, mesh, state, sharding.shard_batch(mesh, inputs))
                for inputs in batches
            ]
        return [np.asarray(chunk) for chunk in chunks]

    @in_32_bits
    def complete(self, inputs: ModelInputs) -> ModelInputs:
        """Prepared inputs, with the decoded tokens of a policy that decodes them.

        A call of the model on completed inputs is one differentiable pass.

        Args:
            inputs: on the devices where they will be used.
        """
        if self.config.decoding == "l1":
            return inputs
        graphdef, state = nnx.split(self.model)
        with jax.default_matmul_precision("float32"):
            return _complete(graphdef, state, inputs)

    def infer(
        self, observation: Mapping[str, Any], *, preprocessed: bool = False
    ) -> Float[np.ndarray, "h a"]:
        """One observation -> the un-normalized action chunk, float32.

        Args:
            observation: `image` u8[H, W, 3]; the images of the other cameras
                (`config.camera_keys`) and `state` f32[p] where the policy takes them;
                `instruction`; for UniVLA, `history` (see
                `Processor.history`), empty or left out in the first call of an episode.
            preprocessed: the images are what the reference's processor receives (resized and
                cropped uint8).

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        batch = {
            key: [value] if isinstance(value, str) else np.asarray(value)[None]
            for key, value in observation.items()
        }
        return self.unnormalize_actions(self.infer_normalized(batch, preprocessed=preprocessed)[0])

    def normalize_actions(self, actions: Float[np.ndarray, "... a"]) -> Float[np.ndarray, "... a"]:
        """Metric actions -> the normalized action space."""
        return self.processor.actions.normalize(actions)

    def unnormalize_actions(
        self, actions: Float[np.ndarray, "... a"]
    ) -> Float[np.ndarray, "... a"]:
        """Normalized actions -> metric units."""
        return self.processor.actions.unnormalize(actions)

    def replace(self, *, model: Prismatic) -> "Policy":
        """The same policy with another network."""
        return dataclasses.replace(self, model=model)

    def with_unnorm_key(self, unnorm_key: str) -> "Policy":
        """The same policy, whose actions and state are scaled by other statistics that it holds.

        The network is shared, so this costs almost nothing.

        Args:
            unnorm_key: name of a data set among `statistics`.

        Raises:
            InputError: the name is unknown, or its statistics do not fit the policy.
        """
        if unnorm_key == self.config.unnorm_key:
            return self
        if unnorm_key not in self.statistics:
            raise InputError(
                f"unnorm_key {unnorm_key!r:.60}: the policy has no such statistics; there are: "
                f"{', '.join(self.statistics)}"
            )
        config = dataclasses.replace(self.config, unnorm_key=unnorm_key)
        scaled = make_policy(
            config, self.model, self.processor.tokenizer, self.statistics, source=config.name
        )
        return dataclasses.replace(scaled, quantization=self.quantization)

    @functools.cached_property
    @in_32_bits
    def fingerprint(self) -> str:
        """SHA-256 over configuration, statistics and weights; identifies the policy in results."""
        digest = hashlib.sha256()
        digest.update(
            json.dumps([self.config.identity(), self.statistics], sort_keys=True).encode()
        )
        for name, tensor in public_items(self.model):
            digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
            digest.update(tensor.tobytes())
        for name, layer in packed_layers(self.model).items():
            digest.update(name.encode())
            inputs = layer.inputs
            if not inputs.is_plain:
                digest.update(str(inputs.activation_bits).encode())
                digest.update(b"rotated" if inputs.rotated else b"")
            for array in (*jax.tree.leaves(layer.weight), *jax.tree.leaves(inputs.scale)):
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    @in_32_bits
    def save(self, path: str | Path, *, dtype: jnp.dtype | None = None) -> None:
        """Writes a directory, or one `.qvla` file if packed, for `load_policy`.

        Args:
            path: a quantized policy needs a name that ends in `.qvla`, others a folder.
            dtype: cast full-precision weights to this; None keeps their own.

        Raises:
            InputError: the name does not fit the policy, or the quantized weights are not packed.
        """
        if Path(path).suffix == SUFFIX or self.quantization is not None:
            self._save_packed(Path(path))
            return
        folder = Path(path)
        if (folder / ORBAX_FOLDER).is_dir():
            raise InputError(f"{folder}: holds an imported policy; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS_FILE, dtype=dtype)
        self.save_settings(folder)

    def save_settings(self, folder: Path) -> None:
        """Writes everything but the weights; the configuration, which loading needs, is last."""
        write_text(folder / TOKENIZER_FILE, self.processor.tokenizer.to_str(pretty=True))
        write_json(folder / STATISTICS_FILE, self.statistics)
        write_json(folder / CONFIG_FILE, self.config.to_dict())

    @in_32_bits
    def export(self, path: str | Path, *, dtype: Any = None) -> None:
        """Writes the policy as a public directory, for PyTorch and for `load_policy`.

        Loading it again gives the same weights bit for bit and the same fingerprint, unless `dtype`
        rounds. See `export_model` of the family's checkpoints, also for what it raises.

        Args:
            path: an empty or new folder.
            dtype: of all tensors, such as bfloat16; None keeps the parameters' own.
        """
        folder = Path(path)
        if self.quantization is not None:
            raise InputError(f"{folder}: a quantized policy has no public layout; save it instead")
        export_model(self.config, self.model, self.statistics, folder, dtype=dtype)
        write_text(folder / TOKENIZER_FILE, self.processor.tokenizer.to_str(pretty=True))

    def _save_packed(self, path: Path) -> None:
        layers = packed_layers(self.model)
        if not layers:
            raise InputError(
                f"{path}: no layer of the policy is packed; quantize it with packed=True first"
            )
        if path.suffix != SUFFIX:
            raise InputError(f"{path}: a packed policy is one file; give a name ending in {SUFFIX}")
        write_packed(
            path,
            layers=((name, layer.weight, layer.inputs) for name, layer in layers.items()),
            tensors=public_tensors(self.model),
            tokenizer=self.processor.tokenizer.to_str(),
            header={
                "config": self.config.to_dict(),
                "statistics": self.statistics,
                "quantization": self.quantization,
                "packages": package_versions(),
                **({"unread": DROPPED} if is_dropped(self.model) else {}),
            },
        )


@in_32_bits
def make_policy(
    config: OpenVLAConfig,
    model: Prismatic,
    tokenizer: tokenizers.Tokenizer,
    statistics: Mapping[str, Any],
    *,
    source: str,
) -> Policy:
    """Assembles a policy from its parts.

    Args:
        config: architecture.
        model: the network.
        tokenizer: its tokenizer.
        statistics: data set name -> public statistics.
        source: file named in errors.

    Raises:
        CheckpointError: the statistics lack the policy's data set, or do not fit it.
    """
    key = config.unnorm_key
    if key is None and len(statistics) == 1:
        key = next(iter(statistics))
    if key is None or key not in statistics:
        raise CheckpointError(f"{source}: {unknown('statistics', key, statistics)}")
    statistics = finite(statistics)
    check_entry(statistics, key, source)
    entry = statistics[key]
    blocks = {"action": config.action_dim}
    if config.proprio_dim:
        blocks["proprio"] = config.proprio_dim
    normalizers = {}
    for block, size in blocks.items():
        where = f"{source}: {key}.{block}"
        if block not in entry:
            raise CheckpointError(f"{where}: missing")
        normalizer = Normalizer.from_statistics(
            entry[block],
            where=where,
            kind=config.action_normalization,
            clip_unscaled=block == "proprio",
        )
        if len(normalizer.low) != size:
            raise CheckpointError(f"{where}: {len(normalizer.low)} entries, the policy has {size}")
        normalizers[block] = normalizer
    processor = Processor(
        config=config,
        tokenizer=tokenizer,
        actions=normalizers["action"],
        proprio=normalizers.get("proprio"),
    )
    return Policy(config=config, model=model, processor=processor, statistics=statistics)


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
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    mapped: bool = False,
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
            file written by `Policy.save`, one written by `import_policy`, or a public OpenVLA,
            OpenVLA-OFT or UniVLA directory.
        unnorm_key: which data set's statistics un-normalize the actions; optional if there is only
            one, or one is recorded.
        num_images: for public directories, the number of cameras, which the files do not say; by
            default 1 without a regression head, else that of the robot (see `action_horizon`).
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
        dtype: dtype of the weights in memory, by default float32. bfloat16 halves them; arithmetic
            stays in float32.
        sharding: sharding of every weight; None uses the default device.
        mapped: for public directories, leave the weights in their files, in the files' dtypes. They
            are checked once and read again on each use: for streamed sweeps of policies that do not
            fit in memory, not for inference.

    Raises:
        InputError: neither a preset nor a directory; the message lists close matches. Or `mapped`
            with weights that are not in a public directory, or with `dtype` or `sharding`. Or an
            argument contradicts what is recorded.
        CheckpointError: a file of the directory is missing, broken or requires something
            unsupported, or an argument is needed.

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
    )
    folder = Path(source)
    if mapped and (not is_huggingface(folder) or dtype is not None or sharding is not None):
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
    if is_huggingface(folder):
        public = _read_public(folder, options)
        model = abstract_model(public.config, dtype=dtype)
        tensors = PublicTensors(folder, merge=merge_adapter)
        assign_tensors(model, tensors, source=tensors.file_of, sharding=sharding, mapped=mapped)
        return public.replace(model=model)
    try:
        config = OpenVLAConfig.from_dict(read_json(folder / CONFIG_FILE))
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    config = _with_options(config, options, folder / CONFIG_FILE)
    model = abstract_model(config, dtype=dtype)
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
        _read_tokenizer(folder / TOKENIZER_FILE),
        read_json(folder / STATISTICS_FILE),
        source=str(folder / STATISTICS_FILE),
    )


def _named(source: str) -> OpenVLAConfig:
    """The preset of a name; an error tells what was looked for, such as a folder."""
    path = Path(source)
    if path.exists():
        raise InputError(f"{source}: is no directory; give the one that holds the policy")
    if source not in PRESETS and (len(path.parts) > 1 or path.suffix == SUFFIX):
        raise InputError(
            f"{source}: there is no such file or directory. If this names a model on the Hugging "
            f"Face hub, fetch it (hf download {source} --local-dir DIR) and give DIR"
            if len(path.parts) == 2 and not path.is_absolute() and path.suffix != SUFFIX
            else f"{source}: there is no such file or directory"
        )
    return preset(source)


def _with_options(config: OpenVLAConfig, options: LoadOptions, source: Path) -> OpenVLAConfig:
    """A recorded configuration with the options that may differ from it: statistics and crop.

    Raises:
        InputError: an option contradicts the record.
    """
    for name in ("num_images", "action_horizon", "action_normalization"):
        said, recorded = getattr(options, name), getattr(config, name)
        if said not in (None, recorded):
            raise InputError(f"{source}: {name}={said!r} contradicts the recorded {recorded!r}")
    if options.merge_adapter:
        raise InputError(f"{source}: merge_adapter: only public directories hold adapters")
    if options.center_crop and config.image_chain != "openvla":
        raise InputError(
            f"{source}: center_crop=True: {config.name} takes its images as they are, without a "
            "crop"
        )
    changes = {"unnorm_key": options.unnorm_key, "center_crop": options.center_crop}
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})


def _load_packed(path: Path, options: LoadOptions) -> Policy:
    """Reads a `.qvla` file, layer by layer."""
    file = PackedFile(path)
    try:
        config = OpenVLAConfig.from_dict(file.header["config"])
        statistics, quantization = file.header["statistics"], file.header["quantization"]
    except (InputError, KeyError) as error:
        raise CheckpointError(f"{path}: unusable header ({error})") from error
    config = _with_options(config, options, path)
    model = abstract_model(config)
    if file.header.get("unread") == DROPPED:
        # Files of large policies; those saved from memory load with the same dtypes, and so the
        # same fingerprint.
        drop_unread(model)
        _keep_dtype(model.language_model.model.embed_tokens.embedding, file.tensors)
    linears = named_modules(model, nnx.Linear)
    for name, entry in file.layers.items():
        expected = linears[name].kernel.shape[::-1] if name in linears else None
        if entry.shape != expected:
            raise CheckpointError(
                f"{path}: layer {name} of shape {list(entry.shape)}: {config.name} has "
                f"{'no such layer' if expected is None else list(expected)}"
            )
    file.check_others()
    # Neighbors in the model follow one another.
    names = sorted(file.layers, key=lambda name: name.rpartition("."))
    weights = ((name, file.weight(name)) for name in names)
    inputs = {name: file.inputs(name) for name in names}
    replace_by_packed(model, weights, inputs, same_input=layout(config).same_input)
    assign_tensors(model, file.tensors, source=str(path))
    try:
        tokenizer = _whole_text(tokenizers.Tokenizer.from_str(file.tokenizer))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: unusable tokenizer ({error})") from error
    policy = make_policy(config, model, tokenizer, statistics, source=str(path))
    return dataclasses.replace(policy, quantization=quantization)


def _keep_dtype(embedding: nnx.Variable, tensors: Mapping[str, np.ndarray]) -> None:
    """Holds the token embeddings as stored; rows are converted on lookup.

    All other parameters that are not packed are small.
    """
    stored = tensors.get("language_model.model.embed_tokens.weight")
    if stored is not None:
        embedding.set_value(jax.ShapeDtypeStruct(embedding.shape, stored.dtype))


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
    dtype: Any = None,
) -> None:
    """Imports a public directory into one of ours, with its weights as an orbax checkpoint.

    No more than one tensor is in memory at a time. `load_policy` reads the result.

    Args:
        source: a public OpenVLA, OpenVLA-OFT or UniVLA directory.
        out: an empty or new folder.
        unnorm_key: see `load_policy`, as for all that follow.
        num_images: see there.
        center_crop: see there.
        action_horizon: see there.
        action_normalization: see there.
        merge_adapter: see there.
        dtype: dtype of all weights; by default bfloat16, as published.

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
    )
    folder, out = Path(source), Path(out)
    if not is_huggingface(folder):
        raise InputError(f"{folder}: not a public directory: there is no config.json of one")
    check_empty(out)
    public = _read_public(folder, options)
    model = abstract_model(public.config, dtype=dtype or jnp.bfloat16)
    tensors = PublicTensors(folder, merge=merge_adapter)
    try:
        save_orbax(out / ORBAX_FOLDER, model, tensors, source=tensors.file_of)
        public.save_settings(out)
    except BaseException:
        # The folder was empty or new; remove our files so that another attempt can succeed.
        shutil.rmtree(out, ignore_errors=True)
        raise


def _read_public(folder: Path, options: LoadOptions) -> Policy:
    """A public directory without its weights: the model is abstract."""
    tokenizer = _read_tokenizer(folder / TOKENIZER_FILE)
    check_tokenizer(folder, tokenizer)
    config, statistics = read_config(
        folder, options, empty_token_id=tokenizer.token_to_id("\u2581")
    )
    if tokenizer.get_vocab_size() > config.text.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: has {tokenizer.get_vocab_size()} tokens, but the language "
            f"model has {config.text.vocab_size} (vocab_size of text_config)"
        )
    check_latent_tokens(config, tokenizer.token_to_id("<ACT_0>"), folder)
    statistics_file = folder / STATISTICS_FILE
    source = statistics_file if statistics_file.is_file() else folder / CONFIG_FILE
    return make_policy(config, abstract_model(config), tokenizer, statistics, source=str(source))


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
        InputError: unknown preset.
    """
    devices.ready()
    config = preset(name)
    unit = {
        size: {"q01": [-1.0] * size, "q99": [1.0] * size}
        for size in (config.action_dim, config.proprio_dim)
    }
    action = {**unit[config.action_dim], "mask": [True] * (config.action_dim - 1) + [False]}
    key = config.unnorm_key or "random"
    return make_policy(
        config,
        make_model(config, rngs=nnx.Rngs(seed)),
        word_tokenizer(),
        {key: {"action": action, "proprio": unit[config.proprio_dim]}},
        source=name,
    )


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    check_fetched(path)
    try:
        return _whole_text(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizers file ({error})") from error


def _whole_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Disables truncation and padding that its file may request, as transformers does."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
