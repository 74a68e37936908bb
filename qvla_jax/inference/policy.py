"""`Policy`: observation in, action chunk out."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Float
from qvla_jax.checkpoints.weights import Source, public_items
from qvla_jax.errors import InputError
from qvla_jax.families.family import Family, Processor
from qvla_jax.families.layout import Layout
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.registry import family_of
from qvla_jax.inference import saving
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.plain import finite
from qvla_jax.precision import in_32_bits


class Structure:
    """A network without its arrays, as a static argument: it is hashed once, not in every call."""

    def __init__(self, graphdef: nnx.GraphDef[Any], treedef: Any) -> None:
        self._parts = graphdef, treedef
        self._hash = hash(self._parts)

    @classmethod
    def split(cls, model: Any) -> tuple["Structure", tuple[Any, ...]]:
        """A network without its arrays, and the arrays."""
        graphdef, state = nnx.split(model)
        arrays, treedef = jax.tree.flatten(state)
        return cls(graphdef, treedef), tuple(arrays)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Structure):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._parts == other._parts)

    def merge(self, arrays: Sequence[Any]) -> Any:
        """The network of these arrays."""
        graphdef, treedef = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A network on the devices, as a call takes it.

    Attributes:
        structure: the network without its arrays.
        mesh: the devices, among which a batch is divided.
        arrays: its arrays, on every device.
        conditioning: what every call reads and no observation changes, on every device.
    """

    structure: Structure
    mesh: jax.sharding.Mesh
    arrays: tuple[Any, ...]
    conditioning: Any

    def __call__(self, inputs: Any) -> Float[Array, "b h a"]:
        """Prepared inputs, as many as devices or a multiple -> normalized chunks."""
        placed = sharding.shard_batch(self.mesh, inputs)
        return forward(self.structure, self.mesh, self.arrays, placed, self.conditioning)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(
    structure: Structure,
    mesh: jax.sharding.Mesh,
    arrays: tuple[Any, ...],
    inputs: Any,
    conditioning: Any,
) -> Float[Array, "b h a"]:
    """What `Policy.run` compiles: normalized chunks, of a batch that is split over the mesh."""

    # Each device runs its share of the batch by itself: XLA cannot partition a custom call, and
    # would run the packed layers of the whole batch on every device.
    def actions(arrays: tuple[Any, ...], inputs: Any, conditioning: Any) -> Float[Array, "b h a"]:
        return structure.merge(arrays).actions(inputs, conditioning)

    batch, whole = jax.sharding.PartitionSpec(sharding.DATA_AXIS), jax.sharding.PartitionSpec()
    return jax.shard_map(
        actions,
        mesh=mesh,
        in_specs=(whole, batch, whole),
        out_specs=batch,
        check_vma=False,
    )(arrays, inputs, conditioning)


@functools.partial(jax.jit, static_argnums=0)
def _complete(graphdef: nnx.GraphDef[Any], state: nnx.State, inputs: Any) -> Any:
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

    # Of its family; see `families.family.Config` for what all of them have.
    config: Any
    # A `families.family.Network`. To change it, make another policy by `replace`: what the first
    # call has put on the devices is what later calls run.
    model: Any
    processor: Processor
    # Data set name -> its public statistics, kept for `save`; null for numbers that are not finite.
    statistics: Mapping[str, Any]
    # How the weights were quantized: quantizer, fingerprint of the source policy, calibration
    # hash. None in full precision.
    quantization: Mapping[str, Any] | None = None

    @property
    def family(self) -> Family:
        """The kind of policy, which answers all that this class does not know."""
        return family_of(self.config)

    @property
    def layout(self) -> Layout:
        """Names of the network's modules and numbers of a call, for everything behind it."""
        return self.family.layout(self.config)

    @property
    def observation(self) -> ObservationSpec:
        """What an observation holds."""
        return self.family.observation(self.config)

    @property
    def decodes(self) -> bool:
        """Whether `complete` decodes anything: a call is then more than one pass."""
        return self.family.decodes(self.config)

    def inputs_spec(self, batch_size: int = 1) -> Any:
        """Shapes and dtypes of the output of `prepare`, for `jax.eval_shape` and compiling ahead.

        Args:
            batch_size: observations in a batch.

        Returns:
            Model inputs with a `jax.ShapeDtypeStruct` in place of each array.
        """
        inputs = self.prepare(batch_of_one(self.fake_observation()))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), inputs
        )

    def fake_observation(self, seed: int = 0) -> dict[str, Any]:
        """An observation of noise for `infer`, for trials and for warming up."""
        return self.observation.fake(seed)

    def prepare(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> Any:
        """A batch of observations -> model inputs; see `Processor.__call__` of the family."""
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
    def run(self, inputs: Any) -> Float[np.ndarray, "b h a"]:
        """Prepared inputs -> normalized action chunks; see `infer_normalized`."""
        padded, count = sharding.pad_batch(inputs, self._placed.mesh.size)
        with jax.default_matmul_precision("float32"):
            chunk = self._placed(padded)
        return np.asarray(chunk)[:count]

    @in_32_bits
    def run_all(self, batches: Sequence[Any]) -> list[Float[np.ndarray, "b h a"]]:
        """As `run` for each of many batches, none of which waits for the one before.

        Args:
            batches: prepared inputs; the size of each is a multiple of the number of devices.
        """
        with jax.default_matmul_precision("float32"):
            chunks = [self._placed(inputs) for inputs in batches]
        return [np.asarray(chunk) for chunk in chunks]

    @functools.cached_property
    @in_32_bits
    def _placed(self) -> _Placed:
        """The network on the devices; a change of `model` after the first call is not seen."""
        mesh = sharding.data_mesh()
        structure, arrays = Structure.split(self.model)
        placed = sharding.replicate(mesh, (arrays, self.conditioning))
        return _Placed(structure, mesh, *placed)

    @functools.cached_property
    @in_32_bits
    def conditioning(self) -> Any:
        """What every call reads and no observation changes, computed once."""
        with jax.default_matmul_precision("float32"):
            return self.family.conditioning(self.model)

    @in_32_bits
    def complete(self, inputs: Any) -> Any:
        """Prepared inputs, with the decoded tokens of a policy that decodes them.

        A call of the model on completed inputs is one differentiable pass.

        Args:
            inputs: on the devices where they will be used.
        """
        if not self.decodes:
            return inputs
        graphdef, state = nnx.split(self.model)
        with jax.default_matmul_precision("float32"):
            return _complete(graphdef, state, inputs)

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        preprocessed: bool = False,
        noise: Float[np.ndarray, "h a"] | None = None,
        seed: int | None = None,
    ) -> Float[np.ndarray, "h a"]:
        """One observation -> the un-normalized action chunk.

        The same observation, noise or seed, and weights give the same chunk.

        Args:
            observation: what `observation` lists: images u8[H, W, 3] of the cameras, such as
                `image` and `wrist_image`, and `state` f32[p] where the policy takes them;
                `instruction`; where the policy takes it, `history` (see `Processor.history`), empty
                or left out in the first call of an episode.
            preprocessed: the images are what the reference's processor receives (resized and
                cropped uint8).
            noise: for policies that sample, what sampling starts from; None draws it.
            seed: of that noise; 0 if left out.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype, or the policy samples
                nothing.
        """
        batch = batch_of_one(observation)
        for name, value in (("noise", noise), ("seed", seed)):
            if value is not None:
                if not self.observation.sampled:
                    raise InputError(f"{name}: {self.config.name} samples nothing")
                batch[name] = np.asarray(value)[None]
        chunks = self.infer_normalized(batch, preprocessed=preprocessed)
        return self.unnormalize_actions(chunks, batch.get("state"))[0]

    def normalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Float[np.ndarray, "*b p"] | None = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Actions in the robot's units -> the normalized action space.

        Args:
            actions: chunks.
            state: that of the observation of each chunk; needed by policies whose actions are
                relative to it.
        """
        return self.processor.normalize_actions(actions, state)

    def unnormalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Float[np.ndarray, "*b p"] | None = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Normalized actions -> the robot's units; arguments as of `normalize_actions`."""
        return self.processor.unnormalize_actions(actions, state)

    def normalize_standard(
        self, actions: Float[np.ndarray, "*b h a"], state: Float[np.ndarray, "*b p"] | None = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Actions of a data set, in standard form (`data.episode`) -> the normalized action space.

        Arguments are as of `normalize_actions`.
        """
        return self.normalize_actions(self.processor.to_robot(actions), state)

    def standard_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Float[np.ndarray, "*b p"] | None = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Normalized actions -> the standard form of data sets: the inverse."""
        return self.processor.from_robot(self.unnormalize_actions(actions, state))

    def replace(self, *, model: Any) -> "Policy":
        """The same policy with another network."""
        return dataclasses.replace(self, model=model)

    def with_unnorm_key(self, unnorm_key: str) -> "Policy":
        """The same policy, whose actions and state are scaled by other statistics that it holds.

        The network is shared; only the processor is made anew.

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
        config = self.family.with_statistics(self.config, unnorm_key)
        scaled = make_policy(
            config, self.model, self.processor.files(), self.statistics, source=config.name
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
            digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
        for name, layer in packed_layers(self.model).items():
            digest.update(name.encode())
            inputs = layer.inputs
            if not inputs.is_plain:
                digest.update(str(inputs.activation_bits).encode())
                digest.update(b"rotated" if inputs.rotated else b"")
            for array in (*jax.tree.leaves(layer.weight), *jax.tree.leaves(inputs.scale)):
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
        for name, table in packed_embeddings(self.model).items():
            digest.update(name.encode())
            for array in jax.tree.leaves(table.weight):
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
        saving.save(self, Path(path), dtype=dtype)

    @in_32_bits
    def export(self, path: str | Path, *, dtype: Any = None) -> None:
        """Writes the policy as a public directory, for PyTorch and for `load_policy`.

        Loading it again gives the same weights bit for bit and the same fingerprint, unless `dtype`
        rounds. See `Family.export`, also for what it raises.

        Args:
            path: an empty or new folder.
            dtype: of all tensors, such as bfloat16; None keeps the parameters' own.
        """
        saving.export(self, Path(path), dtype=dtype)


@in_32_bits
def make_policy(
    config: Any,
    model: Any,
    files: Mapping[str, bytes],
    statistics: Mapping[str, Any],
    *,
    source: Source,
) -> Policy:
    """Assembles a policy from its parts.

    Args:
        config: a family's configuration.
        model: the network.
        files: what the family's processor needs besides, such as `tokenizer.json`: name -> content.
        statistics: data set name -> public statistics.
        source: file named in errors, or a function from a file's name.

    Raises:
        CheckpointError: the statistics lack the policy's data set or do not fit it, or a file is
            missing or damaged.
    """
    statistics = finite(statistics)
    processor = family_of(config).make_processor(config, statistics, files, source=source)
    return Policy(config=config, model=model, processor=processor, statistics=statistics)


def batch_of_one(observation: Mapping[str, Any]) -> dict[str, Any]:
    """An observation for `Policy.infer` as a batch for `Policy.prepare`."""
    return {
        key: [value] if isinstance(value, str) else np.asarray(value)[None]
        for key, value in observation.items()
    }
