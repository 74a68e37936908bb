"""Settings of the stages: frozen dataclasses, shared by the Python API and the command line.

`RunConfig` inherits every stage's settings, so each stage accepts it.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from qvla_jax.errors import InputError
from qvla_jax.model_options import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage needs."""

    # Folder that the stages read from and write to.
    out: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedConfig(StageConfig):
    """What stages need that draw."""

    # Seed of every random draw.
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramesConfig(SeedConfig):
    """The calibration frames."""

    # "bundled", the directory of an RLDS or LeRobot data set, or its address (gs://...); with
    # --mixture, the folder or address that holds the mixture's data sets.
    dataset: str = "bundled"
    # A mixture of Open-X by name, such as oxe_magic_soup_plus: weights times frames of each set.
    mixture: str | None = None
    # Several data sets instead of one: pairs of DIRECTORY and SHARE of the frames.
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    # Specification of the data set: the name of one, or a JSON file; by default, found by its name.
    spec: str | None = None
    # Split to calibrate on; by default "calibration" if there is one, else "train".
    split: str | None = None
    # Maximum number of episodes to draw from in each data set; of larger sets only some files or
    # episodes are read.
    max_episodes: int = 512
    # Frames to draw. Few frames overfit: 8 cost a factor of 10 to 60 in held-out error.
    frames: int = 128
    # Share of them to draw where the expert is about to open or close the gripper; by default all
    # steps are equally likely.
    gripper_share: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "frames", "max_episodes")
        if self.gripper_share is not None and not 0 <= self.gripper_share <= 1:
            raise InputError(f"gripper_share must lie between 0 and 1, got {self.gripper_share}")
        if self.weights and (self.mixture is not None or self.dataset != "bundled"):
            raise InputError("--weights name the data sets: no --dataset or --mixture beside them")
        if self.mixture is not None and self.spec is not None:
            raise InputError("the sets of a --mixture are read by their names: no --spec beside it")
        if self.mixture is not None and self.dataset == "bundled":
            raise InputError("--mixture needs the folder of its data sets: --dataset FOLDER")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig(FramesConfig):
    """Draws the calibration frames and writes their manifest, calibration.json."""

    # Number of expert actions with each frame; must be the policy's horizon.
    horizon: int = 8

    def __post_init__(self) -> None:
        FramesConfig.__post_init__(self)
        _positive(self, "horizon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoroughConfig(StageConfig):
    """How much is compared with the result."""

    # Adds the proxy of the released code for comparison, exact probing of 256 channels (unless
    # --baselines and --validate say otherwise), and every solver at every budget. Takes twice as
    # long.
    thorough: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig(ThoroughConfig, SeedConfig, ModelOptions):
    """Measures what each output channel costs at each bit-width; writes sensitivity.safetensors."""

    # A policy that ships with the package, or a directory that holds one.
    model: str = "libero-mini"
    # jacobian (first order, all channels at once), exact (a forward pass each) or refined (first
    # order, corrected by exact probing where it is least certain).
    estimator: str = "jacobian"
    # Forward passes that refined may take, as a share of those of exact.
    exact_share: float = 0.01
    # Random probe vectors for each frame (jacobian).
    probes: int = 8
    # Other estimators for comparison, each in its own file.
    baselines: tuple[str, ...] = ()
    # Sampled channels whose sensitivity is also measured exactly, to validate the rest; 0 skips it.
    validate: int = 0
    # Calibration frames used for validation.
    validate_frames: int = 8
    # Devices of all processes along the mesh's channel axis; the others split the frames.
    channel_devices: int = 1
    # Split the policy's weights over the channel axis, too (jacobian, refined, taylor).
    split_weights: bool = False
    # Leave the weights of a public directory in their files, and move them to one device a stage at
    # a time, for policies that do not fit in memory. Allows neither validation nor baselines;
    # rounding is to nearest, and joint factors are not measured.
    streamed: bool = False

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        _positive(self, "probes", "validate_frames", "channel_devices")
        if self.thorough:
            object.__setattr__(self, "baselines", self.baselines or ("input_hessian",))
            object.__setattr__(self, "validate", self.validate or 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocateConfig(ThoroughConfig):
    """Chooses a bit-width for every channel; writes allocation.safetensors."""

    # Bits per quantized weight, counting everything stored (scales, biases, index, padding).
    budget_bits: float = 4.0
    # Bits per weight that a call of the policy reads, each weight counted as often as it is read: a
    # second budget, for time, beside that of the bytes stored. By default any.
    budget_read: float | None = None
    # Minimum bits of layers: pairs of PATTERN (a regular expression on their paths) and BITS.
    minimum_bits: dict[str, int] = dataclasses.field(default_factory=dict)
    # Solvers to compare; the first one is the result, the others are baselines at its budget. With
    # --budget-read, lagrangian unless others are named.
    solvers: tuple[str, ...] = ("greedy:marginal", "greedy:qvla")
    # Further budgets, for the curve of error against bytes.
    sweep: tuple[float, ...] = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
    # Uniform grids whose exact bytes are budgets too, for comparisons at the same size.
    match_uniform: tuple[int, ...] = (3, 4)

    def __post_init__(self) -> None:
        if self.budget_read is not None:
            if not 0 < self.budget_read <= 16:
                raise InputError(
                    f"budget_read must lie above 0 and at most 16 bits, got {self.budget_read}"
                )
            if self.solvers == AllocateConfig.solvers:
                object.__setattr__(self, "solvers", ("lagrangian",))  # as `allocate` does
        if not self.solvers:
            raise InputError("at least one solver is needed, such as greedy:marginal")
        for bits in (self.budget_bits, *self.sweep):
            if not 0 < bits <= 16:
                raise InputError(f"a budget must lie above 0 and at most 16 bits, got {bits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(StageConfig, ModelOptions):
    """Packs the weights at the chosen bits; writes policy.qvla, which `load_policy` runs."""

    # The policy that the bits were chosen for.
    model: str = "libero-mini"
    # Bits of the rows of token embeddings: 8, with a scale for each row, or 16, as they are. They
    # are not part of the budget.
    embedding_bits: Literal[8, 16] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutConfig(SeedConfig, ModelOptions):
    """The frames that results are measured on."""

    # A policy that ships with the package, or a directory that holds one.
    model: str = "libero-mini"
    # "bundled", the directory of an RLDS or LeRobot data set, or its address (gs://...).
    eval_dataset: str = "bundled"
    # Its specification: the name of one, or a JSON file; by default, found by its name.
    eval_spec: str | None = None
    # Split to evaluate on; must differ from the calibration split.
    eval_split: str = "heldout"
    # Frames to draw from it; 0 takes all of them.
    eval_frames: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(HeldoutConfig):
    """Measures the action error of every allocation on held-out frames; writes evaluation.json."""

    # Uniform round-to-nearest baselines.
    uniform_bits: tuple[int, ...] = (2, 3, 4, 8)
    # Frames per forward pass; few frames stay in a CPU's cache.
    eval_batch: int = 8
    # Timed calls of the full and the packed policy, one observation each; 0 skips timing.
    latency_calls: int = 50

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        _positive(self, "eval_batch")
        if self.latency_calls < 0:
            raise InputError(f"latency_calls must not be negative, got {self.latency_calls}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    """Writes report.json and report.html from the files of the other stages."""

    # Folder of `qvla evaluate --sim` whose success, drift and videos the report shows.
    simulation: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig(HeldoutConfig):
    """Studies whether the sensitivities in a folder can be trusted.

    Writes validation.json and validation.png.
    """

    # Number of sampled channels to probe exactly, and number of frames.
    channels: int = 256
    frames: int = 8
    # Estimators to compare with exact probing, in addition to the table's own.
    estimators: tuple[str, ...] = ("jacobian", "refined", "taylor", "input_hessian")
    # Budgets, in bits per weight, at which to compare predicted and measured joint error.
    budgets: tuple[float, ...] = (2.5, 3.0, 4.0, 6.0)
    # Frames and seeds of other calibration sets, for stability.
    sizes: tuple[int, ...] = (8, 32, 128, 512)
    seeds: tuple[int, ...] = (1, 2)
    # Draws of other noise for the same frames, for the stability of policies that sample.
    noises: tuple[int, ...] = (1, 2)
    # Number of whole trajectories for the cumulative sensitivity; 0 skips it.
    trajectories: int = 8

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        _positive(self, "channels", "frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig(ModelOptions):
    """Packs a policy layer by layer, rounded to nearest, without calibration.

    The weights of a public directory stay in their files, so policies that do not fit in memory can
    be packed. Weights that inference never reads are left out.
    """

    # A policy that ships with the package, or a directory that holds one.
    model: str = "libero-mini"
    # The file to write; its name ends in .qvla.
    file: Path
    # Bits of every channel: 2, 3, 4, 8 or 16.
    bits: int = 4
    # Instead of --bits: mixed bits with the smallest weight error, this many on average, counting
    # everything stored. For measuring size and speed; `qvla run` allocates by effect on the
    # actions.
    mean_bits: float | None = None
    # Bits of the linear layers that are not quantized (projectors, head, output layer): 8 or 16.
    kept_bits: Literal[8, 16] = 16
    # Bits of the rows of token embeddings: 8, with a scale for each row, or 16, as they are.
    embedding_bits: Literal[8, 16] = 16
    # Bits of the inputs of quantized layers: 16 does not round, 8 rounds token by token.
    activation_bits: Literal[8, 16] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(
    FramesConfig, SensitivityConfig, AllocateConfig, QuantizeConfig, EvaluateConfig, ReportConfig
):
    """Runs the whole pipeline: calibrate, sensitivity, allocate, quantize, evaluate, report.

    >>> from pathlib import Path
    >>> from qvla_jax import RunConfig
    >>> config = RunConfig(out=Path("runs/three"), model="libero-mini", budget_bits=3.0)
    >>> config.frames, config.estimator, config.solvers
    (128, 'jacobian', ('greedy:marginal', 'greedy:qvla'))
    >>> RunConfig(out=Path("runs/three"), budget_bits=0.0)
    Traceback (most recent call last):
    qvla_jax.errors.InputError: a budget must lie above 0 and at most 16 bits, got 0.0
    """

    def __post_init__(self) -> None:
        for base in (FramesConfig, SensitivityConfig, AllocateConfig, EvaluateConfig):
            base.__post_init__(self)


def _positive(config: StageConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
