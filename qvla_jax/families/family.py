"""`Family`: everything that the street asks of one kind of policies.

A family has a configuration, a network, a processor and, unless only we write such policies, a
public layout. `Policy`, quantization, the pipeline and the servers go through this interface and
know no family.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.checkpoints.weights import Source
from qvla_jax.errors import InputError
from qvla_jax.families.layout import Layout
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.options import LoadOptions
from qvla_jax.models.abstract import abstract

_NO_LAYOUT: Final = "policies of the family {!r} have no public layout; save them instead"


class Config(Protocol):
    """What the street reads of a configuration: a frozen dataclass of a family."""

    # The family's name.
    family: ClassVar[str]

    @property
    def name(self) -> str:
        """The policy's name."""
        ...

    @property
    def action_horizon(self) -> int:
        """Actions of a chunk."""
        ...

    @property
    def action_dim(self) -> int:
        """Entries of an action of the network."""
        ...

    @property
    def unnorm_key(self) -> str | None:
        """The data set whose statistics are used; None: the only one there is."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Family.config` is the inverse."""
        ...

    def identity(self) -> dict[str, Any]:
        """`to_dict` without the entries that change no action; part of a fingerprint."""
        ...


class Network(nnx.Module):
    """A policy's network: a pytree of model inputs -> normalized action chunks."""

    def __call__(self, inputs: Any) -> Float[Array, "b h a"]:
        """Normalized action chunk of each observation; differentiable."""
        raise NotImplementedError

    def actions(self, inputs: Any, conditioning: Any = None) -> Float[Array, "b h a"]:
        """The normalized chunk that the robot executes.

        Args:
            inputs: what a call takes.
            conditioning: what `Family.conditioning` returned for this network.
        """
        return self(inputs)

    def complete(self, inputs: Any) -> Any:
        """Adds everything that a call would decode first, so that the call is one pass."""
        return inputs

    def loss(self, inputs: Any, chunks: Float[Array, "b h a"], key: jax.Array) -> Float[Array, ""]:
        """What training lowers; by default the mean absolute error of an action entry.

        Args:
            inputs: what a call takes.
            chunks: the demonstrated actions, normalized.
            key: of what is drawn, if anything.
        """
        del key
        return jnp.mean(jnp.abs(self(inputs) - chunks))


class Processor(abc.ABC):
    """Host-side pre- and postprocessing of one policy."""

    @abc.abstractmethod
    def __call__(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> Any:
        """A batch of observations -> model inputs: a pytree of numpy arrays [b, ...].

        Args:
            batch: see `Policy.infer`, each entry with a first axis of observations.
            preprocessed: the images are what the reference's processor receives.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """

    @abc.abstractmethod
    def normalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Any = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Actions in the robot's units -> the normalized action space; see `Policy`."""

    @abc.abstractmethod
    def unnormalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Any = None
    ) -> Float[np.ndarray, "*b h a"]:
        """The inverse: normalized actions -> the robot's units; see `Policy`."""

    def to_robot(self, actions: Float[np.ndarray, "*b r"]) -> Float[np.ndarray, "*b r"]:
        """The standard form of data sets (`data.episode`) -> the robot's units; the same here."""
        return actions

    def from_robot(self, actions: Float[np.ndarray, "*b r"]) -> Float[np.ndarray, "*b r"]:
        """The inverse of `to_robot`."""
        return actions

    @property
    def action_units(self) -> Float[np.ndarray, " a"]:
        """The robot's units in one unit of each entry of a normalized action."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """What the processor needs besides configuration and statistics: file name -> content."""
        return {}

    def widened(self, batches: Sequence[Any]) -> list[Any]:
        """Prepared batches, padded so that their arrays fit together."""
        return list(batches)

    def join(self, batches: Sequence[Any]) -> Any:
        """Several prepared batches as one."""
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *self.widened(batches))

    def history(self, inputs: Any) -> list[str]:
        """`history` of the next observations, from inputs that `Policy.complete` completed.

        Raises:
            InputError: observations of this policy have no history.
        """
        raise InputError("observations of this policy have no history")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A policy without its network."""

    config: Any
    processor: Processor
    # Data set name -> its public statistics; null for numbers that are not finite.
    statistics: Mapping[str, Any]


class PublicTensors(Mapping[str, np.ndarray]):
    """The weights of a public directory, under the names and in the layouts of `checkpoints`.

    Each is read on request; requests in the order of iteration read the files once.
    """

    @abc.abstractmethod
    def file_of(self, name: str) -> str:
        """The file that holds a tensor or, if none does, the file that should."""


class Family(abc.ABC):
    """One kind of policies. An instance holds no state.

    Attributes:
        name: in files, and in `families.FAMILIES`.
        kinds: what messages call its policies.
        options: names of the `LoadOptions` that public directories take.
        files: names of files that `make_processor` may want.
        input_images, input_state: names of the fields of model inputs that hold the images and the
            normalized state, which training augments; None where there is none.
    """

    name: ClassVar[str]
    kinds: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset({"unnorm_key"})
    files: ClassVar[tuple[str, ...]] = ()
    input_images: ClassVar[str | None] = None
    input_state: ClassVar[str | None] = None

    # Configurations.

    @property
    @abc.abstractmethod
    def presets(self) -> Mapping[str, Any]:
        """Configurations by name."""

    @abc.abstractmethod
    def config(self, values: Mapping[str, Any]) -> Any:
        """A configuration from what its `to_dict` returned.

        Raises:
            InputError: a key is unknown, missing or of the wrong type; the message names it.
        """

    def with_statistics(self, config: Any, unnorm_key: str) -> Any:
        """The configuration, with the statistics of another data set."""
        return dataclasses.replace(config, unnorm_key=unnorm_key)

    def public_statistics(self, config: Any, statistics: Mapping[str, Any]) -> dict[str, Any]:
        """Statistics of data sets in the layout that this family's checkpoints have.

        Args:
            config: of the policy whose statistics they become.
            statistics: data set name -> statistics as OpenVLA's dataset_statistics.json has them.
        """
        return dict(statistics)

    def check_options(self, options: LoadOptions, source: str | Path) -> None:
        """Checks the options of a public directory.

        Raises:
            InputError: this family does not take one of them; the message names it.
        """
        for name in options.said():
            if name not in self.options:
                raise InputError(
                    f"{source}: {name}: {self.kinds} policies do not take it, only "
                    f"{', '.join(sorted(self.options))}"
                )

    def adjusted(self, config: Any, options: LoadOptions, source: str | Path) -> Any:
        """A recorded configuration with the options that may differ from it: the statistics.

        Args:
            config: as recorded.
            options: what the user says.
            source: the file that holds the record, for errors.

        Raises:
            InputError: an option contradicts the record, or does not apply to one.
        """
        self.check_options(options, source)
        for name, said in options.said().items():
            if name == "unnorm_key":
                config = self.with_statistics(config, said)
            elif said != (recorded := getattr(config, name, None)):
                raise InputError(f"{source}: {name}={said!r} contradicts the recorded {recorded!r}")
        return config

    def takes_options(self, config: Any) -> bool:
        """Whether options still apply to a policy whose configuration is recorded."""
        return False

    # Network.

    @abc.abstractmethod
    def make_model(self, config: Any, *, rngs: nnx.Rngs) -> Any:
        """The `Network` that a configuration describes, with random weights."""

    def abstract_model(self, config: Any, *, dtype: Any = None) -> Any:
        """The network with shapes and dtypes in place of arrays: costs no memory, cannot run.

        Args:
            config: the architecture.
            dtype: of all parameters; float32 by default. The arithmetic's does not change.
        """
        return abstract(self.make_model, config, dtype=dtype)

    @abc.abstractmethod
    def layout(self, config: Any) -> Layout:
        """What the street knows of the network, as data."""

    def conditioning(self, model: Any) -> Any:
        """What every call reads and no observation changes, computed once for a policy.

        Returns:
            A pytree of arrays for `Network.actions`; None if there is nothing.
        """
        return None

    def decodes(self, config: Any) -> bool:
        """Whether `Network.complete` decodes anything."""
        return False

    def drop_unread(self, model: Any) -> None:  # noqa: B027 (nothing to remove)
        """Removes, in place, what inference never reads; the model may be abstract."""

    def is_dropped(self, model: Any) -> bool:
        """Whether `drop_unread` removed anything from this model."""
        return False

    # Observations and actions.

    @abc.abstractmethod
    def observation(self, config: Any) -> ObservationSpec:
        """What an observation holds."""

    @abc.abstractmethod
    def make_processor(
        self,
        config: Any,
        statistics: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        source: Source,
    ) -> Processor:
        """The processor of a policy.

        Args:
            config: of the policy.
            statistics: data set name -> its public statistics, without NaN and infinities.
            files: those of `files` that there are.
            source: file named in errors, or a function from a file's name.

        Raises:
            CheckpointError: the statistics lack the policy's data set or do not fit it, or a file
                is missing or damaged.
        """

    def random_parts(self, config: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Statistics and files of a policy with random weights, for tests and examples.

        Raises:
            InputError: there are none.
        """
        raise InputError(f"{config.name}: {self.kinds} policies are not made at random")

    # The public layout. Without one, these stay as they are.

    def recognizes(self, folder: Path) -> bool:
        """Whether a directory holds a public checkpoint of this family.

        Raises:
            CheckpointError: a file that would tell is damaged.
        """
        return False

    def public_files(
        self, source: str, names: Sequence[str], settings: Mapping[str, Any], options: LoadOptions
    ) -> list[str]:
        """The files that loading a public directory reads, of one that is elsewhere.

        Args:
            source: the directory, for errors.
            names: paths of all its files.
            settings: the content of its config.json; empty without one.
            options: what the files do not say; some need more files.

        Returns:
            Some of `names`; none if this is no directory of the family.

        Raises:
            CheckpointError: its weights are in no format that is read, or a file would be passed
                over.
        """
        return []

    def read(self, folder: Path, options: LoadOptions) -> Parts:
        """A public directory without its weights.

        Raises:
            InputError: an option does not apply.
            CheckpointError: a file is missing or damaged, asks for something unsupported, or an
                option is needed or contradicts the files.
        """
        raise InputError(_NO_LAYOUT.format(self.name))

    def tensors(self, folder: Path, config: Any, options: LoadOptions) -> PublicTensors:
        """The weights of a public directory.

        Raises:
            CheckpointError: a file is missing, damaged or refused, or an adapter does not fit.

        Warns:
            CheckpointWarning: an adapter is ignored.
        """
        raise InputError(_NO_LAYOUT.format(self.name))

    def stays_in_files(self, folder: Path) -> bool:
        """Whether the weights of a public directory can be used from their files, unloaded."""
        return False

    def survey(self, folder: Path) -> tuple[Any, Mapping[str, np.dtype[Any]]]:
        """Configuration of a public directory, as far as it has sizes, and dtypes as stored.

        Returns:
            The configuration, of which only the shapes of parameters are certain, and the dtype of
            each tensor, whose names and shapes are checked. No weight is read.

        Raises:
            CheckpointError: a file is missing or damaged, or the tensors do not fit.
        """
        raise InputError(_NO_LAYOUT.format(self.name))

    def undecided_statistics(self, folder: Path, options: LoadOptions) -> list[str]:
        """Data sets of a public directory, if neither it nor the options choose one of several."""
        return []

    def check_acting(self, folder: Path, options: LoadOptions) -> None:  # noqa: B027
        """Checks that files and options say everything that success in the simulator depends on.

        Raises:
            InputError: they do not; the message says what to say.
        """

    def export(
        self,
        config: Any,
        model: Any,
        statistics: Mapping[str, Any],
        out: Path,
        *,
        dtype: Any = None,
    ) -> None:
        """Writes a policy as a public directory, without the files of its processor.

        Args:
            config: of the policy.
            model: with arrays.
            statistics: data set name -> public statistics.
            out: an empty or new folder.
            dtype: of all tensors; None keeps the parameters' own.

        Raises:
            InputError: `out` holds files already, or there is no public layout.
            CheckpointError: the layout cannot hold the model.
        """
        raise InputError(_NO_LAYOUT.format(self.name))

    def reexport(self, folder: Path, out: Path, options: LoadOptions) -> bool:
        """Writes a public directory again, bit for bit, one tensor at a time.

        Returns:
            Whether it did; False if the options change what is written, or there is no such way:
            load the policy and export it.
        """
        return False

    def synthesize(self, config: Any, out: Path, *, seed: int = 0) -> None:
        """Writes a public directory with random weights, for measurements at full size.

        Raises:
            InputError: there is no such directory of this configuration.
        """
        raise InputError(f"{config.name}: {self.kinds} policies are not synthesized")
