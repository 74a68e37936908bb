"""Configurations of pi0 and pi0.5, and presets named like openpi's training configurations.

A checkpoint says neither its horizon, its prompt length, its robot, nor how its actions are
normalized: openpi keeps these in code, under the name of a training configuration
(`openpi/training/config.py`). The presets here have the same names and say the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from qvla_jax.errors import InputError, unknown
from qvla_jax.plain import from_plain, to_plain

# Rows of PaliGemma's embeddings.
PALIGEMMA_TOKENS: Final = 257152


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The vision tower, a ViT without class token."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """One expert of the language model, in openpi's terms."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


# What both experts share: their attention is one.
_SHARED: Final = ("depth", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenpiConfig:
    """A flow-matching policy of openpi: SigLIP, PaliGemma's Gemma, and an action expert."""

    family: ClassVar[str] = "openpi"

    name: str
    # pi0 has a state token and mixes time into the action tokens; pi0.5 reads the state from the
    # prompt, if at all, and modulates the action expert's norms by time.
    variant: Literal["pi0", "pi05"]
    vision: SiglipConfig
    language: GemmaConfig
    action_expert: GemmaConfig
    vocab_size: int = PALIGEMMA_TOKENS
    # Entries of the state and of an action that the network takes: those of the robot, padded.
    action_dim: int = 32
    action_horizon: int = 50
    # Longest prompt in tokens; shorter ones are padded, longer ones cut.
    max_prompt_tokens: int
    # Actions of a chunk, from the first, that the robot's client executes before it asks again;
    # None: all. Errors count these.
    executed_steps: int | None = None
    # Euler steps from noise to actions.
    num_steps: int = 10
    # Of the arithmetic. The public policy server computes in bfloat16.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The normalized state is written into the prompt, in 256 bins.
    discrete_state: bool
    # How state and actions become the network's: by mean and deviation, or by quantiles.
    normalization: Literal["zscore", "quantile"]
    # Whose observation keys, cameras and units; None where a checkpoint serves several.
    robot: Literal["libero", "droid", "aloha"] | None = None
    # Joints are predicted relative to the present state, grippers are not.
    delta_actions: bool = False
    # ALOHA's joint signs and gripper units are converted to those that the policy was trained in.
    adapt_to_pi: bool = True
    # Folder below `assets/` whose statistics are used.
    asset_id: str | None = None
    # Used if an observation has no instruction.
    default_prompt: str | None = None
    # Joints [rad] of each arm that the robot's client resets it to; told to clients.
    reset_pose: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raises an `InputError` if sizes do not fit each other."""
        for field in _SHARED:
            first, second = getattr(self.language, field), getattr(self.action_expert, field)
            if first != second:
                raise InputError(
                    f"{self.name}: language.{field} is {first} and action_expert.{field} is "
                    f"{second}; the experts attend together, so both must be equal"
                )
        if self.language.num_heads % self.language.num_kv_heads:
            raise InputError(
                f"{self.name}: {self.language.num_heads} heads do not divide into "
                f"{self.language.num_kv_heads} key-value heads"
            )
        if self.num_steps < 1:
            raise InputError(f"{self.name}: num_steps is {self.num_steps}, expected at least 1")
        if self.executed_steps is not None and self.executed_steps < 1:
            raise InputError(
                f"{self.name}: executed_steps is {self.executed_steps}, expected at least 1"
            )
        if self.action_expert.width % 2:
            raise InputError(
                f"{self.name}: action_expert.width is {self.action_expert.width}; the time's sines "
                "and cosines take half of it each, so it must be even"
            )

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower takes, in pixels."""
        return self.vision.image_size

    @property
    def unnorm_key(self) -> str | None:
        """The statistics that are used: `asset_id`."""
        return self.asset_id

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return to_plain(self)

    def identity(self) -> dict[str, Any]:
        """`to_dict` without what clients are told or do, which changes no action.

        Part of a fingerprint.
        """
        of_clients = ("reset_pose", "executed_steps")
        return {key: value for key, value in self.to_dict().items() if key not in of_clients}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OpenpiConfig":
        """Inverse of `to_dict`.

        Raises:
            InputError: a key is unknown, missing or of the wrong type; the message names it.
        """
        return from_plain(cls, values, "config")


SIGLIP: Final[Mapping[str, SiglipConfig]] = {
    "So400m/14": SiglipConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16),
}
GEMMA: Final[Mapping[str, GemmaConfig]] = {
    "gemma_2b": GemmaConfig(
        width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "gemma_300m": GemmaConfig(
        width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}


def variant_defaults(variant: Literal["pi0", "pi05"]) -> dict[str, Any]:
    """The defaults of openpi's `Pi0Config` and data configurations."""
    pi05 = variant == "pi05"
    return dict(
        variant=variant,
        max_prompt_tokens=200 if pi05 else 48,
        discrete_state=pi05,
        normalization="quantile" if pi05 else "zscore",
    )


def _preset(name: str, **settings: Any) -> OpenpiConfig:
    sizes: dict[str, Any] = dict(
        vision=SIGLIP["So400m/14"], language=GEMMA["gemma_2b"], action_expert=GEMMA["gemma_300m"]
    )
    variant: Any = "pi05" if name.startswith("pi05") else "pi0"
    return OpenpiConfig(name=name, **(sizes | variant_defaults(variant) | settings))


# How many actions of a chunk are executed is in the code of openpi's clients, in `examples/`:
# `replan_steps` of LIBERO's, `open_loop_horizon` of DROID's, `action_horizon` of ALOHA's.
_LIBERO: dict[str, Any] = dict(
    robot="libero", asset_id="physical-intelligence/libero", executed_steps=5
)
_DROID: dict[str, Any] = dict(robot="droid", asset_id="droid", executed_steps=8)
# Actions are joint positions there, and joint velocities in the others.
_DROID_POSITIONS: dict[str, Any] = dict(**_DROID, delta_actions=True)
# Their client is that of PolaRiS, which openpi does not hold.
_POLARIS: dict[str, Any] = _DROID_POSITIONS | dict(executed_steps=None)
_ALOHA: dict[str, Any] = dict(
    robot="aloha", asset_id="trossen", delta_actions=True, executed_steps=25
)
_MINI: dict[str, Any] = dict(depth=5, num_heads=6, num_kv_heads=1, head_dim=32)
_RESET: Final = (0.0, -1.5, 1.5, 0.0, 0.0, 0.0)

PRESETS: Final[Mapping[str, OpenpiConfig]] = {
    c.name: c
    for c in (
        # The base checkpoints serve several robots; openpi has no configuration of this name.
        _preset("pi0_base"),
        _preset("pi05_base"),
        _preset("pi0_libero", **_LIBERO, delta_actions=True),
        _preset("pi0_libero_low_mem_finetune", **_LIBERO, delta_actions=True),
        _preset("pi05_libero", **_LIBERO, action_horizon=10, discrete_state=False),
        _preset("pi0_droid", **_DROID, action_horizon=10),
        _preset("pi05_droid", **_DROID, action_horizon=15),
        _preset("pi05_droid_finetune", **_DROID, action_horizon=16),
        _preset("pi05_full_droid_finetune", **_DROID_POSITIONS, action_horizon=16),
        _preset(
            "pi0_droid_jointpos_polaris",
            **_POLARIS,
            action_horizon=10,
            max_prompt_tokens=100,
        ),
        _preset(
            "pi0_droid_jointpos_100k_polaris",
            **_POLARIS,
            action_horizon=10,
            max_prompt_tokens=100,
        ),
        _preset("pi05_droid_jointpos_polaris", **_POLARIS, action_horizon=15),
        _preset("paligemma_diffusion_droid", **_DROID, action_dim=8, action_horizon=10),
        _preset("pi0_aloha", **_ALOHA, reset_pose=_RESET),
        _preset("pi05_aloha", **_ALOHA, reset_pose=_RESET),
        _preset("pi0_aloha_towel", **_ALOHA, reset_pose=_RESET, default_prompt="fold the towel"),
        _preset(
            "pi0_aloha_tupperware",
            **_ALOHA,
            reset_pose=_RESET,
            default_prompt="open the tupperware and put the food on the plate",
        ),
        _preset("pi0_aloha_pen_uncap", **_ALOHA, default_prompt="uncap the pen"),
        _preset("pi05_aloha_pen_uncap", **_ALOHA, default_prompt="uncap the pen"),
        _preset(
            "pi0_aloha_sim",
            robot="aloha",
            asset_id="lerobot/aloha_sim_transfer_cube_human",
            executed_steps=10,
            default_prompt="Transfer cube",
        ),
        # pi0.5's architecture with 5 million parameters, for two cores; not one of openpi's.
        _preset(
            "pi-mini",
            variant="pi05",
            vision=SiglipConfig(
                width=160, depth=4, mlp_dim=640, num_heads=5, patch_size=16, image_size=128
            ),
            language=GemmaConfig(width=192, mlp_dim=512, **_MINI),
            action_expert=GemmaConfig(width=128, mlp_dim=384, **_MINI),
            vocab_size=96,
            action_dim=7,
            action_horizon=10,
            max_prompt_tokens=20,
            robot="libero",
            asset_id="libero",
            executed_steps=5,
            discrete_state=False,
            normalization="quantile",
        ),
    )
}


# Short names of variants, where nothing depends on the robot.
SHORT_NAMES: Final[Mapping[str, OpenpiConfig]] = {
    variant: PRESETS[f"{variant}_libero"] for variant in ("pi0", "pi05")
}


def preset(name: str) -> OpenpiConfig:
    """Returns the configuration called `name`.

    Raises:
        InputError: the name is unknown (the message lists close matches), or one of pi0-FAST.
    """
    if name not in PRESETS:
        if name.startswith(("pi0_fast", "paligemma")):
            raise InputError(
                f"{name!r}: policies that decode action tokens (pi0-FAST, the PaliGemma baselines) "
                "are not supported; take a checkpoint of pi0 or pi0.5"
            )
        raise InputError(unknown("openpi preset", name, PRESETS))
    return PRESETS[name]
