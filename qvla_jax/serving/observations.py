"""Converts robots' messages to the policy's inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError
from qvla_jax.inference import Policy
from qvla_jax.serving.pictures import decode_pictures

# Our names, and those of openpi's LIBERO example, of OpenVLA and of OpenVLA-OFT.
NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("image", "observation/image", "full_image"),
    "wrist_image": ("wrist_image", "observation/wrist_image"),
    "left_wrist_image": ("left_wrist_image", "observation/left_wrist_image"),
    "right_wrist_image": ("right_wrist_image", "observation/right_wrist_image"),
    "state": ("state", "observation/state"),
    "instruction": ("instruction", "prompt"),
    "history": ("history",),
}
# Maximum characters of an instruction. The tokenizer has its own limit, but reads all of it first.
MAX_INSTRUCTION: Final = 2000


@dataclasses.dataclass(frozen=True)
class Observation:
    """A client's observation, ready for the network.

    Attributes:
        inputs: a batch of one.
        state: `state` of the observation [1, p]; None if the policy takes none.
        policy: the served policy with the statistics that the client requested, which scaled its
            state and un-normalize its actions.
    """

    inputs: Any
    state: Float[np.ndarray, "1 p"] | None
    policy: Policy


class ObservationReader:
    """Checks the messages of clients and prepares them for one policy."""

    def __init__(self, policy: Policy, *, max_image_side: int, key_needed: bool = False) -> None:
        """Sets up the checks.

        Args:
            policy: its processor prepares the observations.
            max_image_side: largest side of raw images, in pixels.
            key_needed: messages must have `unnorm_key`, because no statistics were chosen.
        """
        self._key_needed = key_needed
        self._policy = policy
        # By the statistics that requests name, each made on first use.
        self._policies: dict[str, Policy] = {}
        self._max_image_side = max_image_side
        self._spec = policy.observation

    def __call__(self, message: Mapping[str, Any]) -> Observation:
        """One observation -> model inputs with a batch of one, and the policy with its statistics.

        Args:
            message: what `Policy.observation` lists: images u8[H, W, 3], or the bytes of JPEG or
                PNG files, such as `image`; `state`, p finite numbers; `instruction`; each under one
                of its `NAMES`; or what clients of this kind of policies send
                (`ObservationSpec.from_client`). Policies that sample take `noise` [h, a] or `seed`.
                `unnorm_key` names statistics of the policy; without it, its own apply. Other
                entries are ignored.

        Raises:
            InputError: an entry is missing, has the wrong type, shape or dtype, or is too large; or
                the policy has no statistics of this name.
        """
        spec = self._spec
        message = decode_pictures(message, self._max_image_side)
        if spec.from_client is not None:
            message = spec.from_client(message)
        policy = self._with_statistics(message.get("unnorm_key"))
        needed = {*spec.cameras, *spec.texts} - spec.optional
        batch: dict[str, Any] = {
            camera: self._image(camera, _entry(message, camera))[None]
            for camera in spec.cameras
            if camera in needed or _found(message, camera)
        }
        if spec.state_dim:
            batch["state"] = _state(_entry(message, "state"), spec.state_dtype)[None]
        for name in spec.texts:
            if name in needed or _found(message, name):
                batch[name] = [_text(name, _entry(message, name))]
        if spec.sampled:
            batch |= _sampling(message)
        return Observation(policy.prepare(batch), batch.get("state"), policy)

    def _with_statistics(self, key: Any) -> Policy:
        """The policy with the statistics that a client requests."""
        if key is None and self._key_needed:
            raise InputError(
                "observation has no unnorm_key, and the policy has statistics of several data "
                f"sets: {', '.join(self._policy.statistics)}"
            )
        if key is not None and not isinstance(key, str):
            raise InputError(f"unnorm_key: expected text, got {type(key).__name__}")
        if key is None or key == self._own_key:
            return self._policy
        if key not in self._policies:
            self._policies[key] = self._policy.with_unnorm_key(key)
        return self._policies[key]

    @property
    def unnorm_key(self) -> str | None:
        """The statistics that apply if a client names none; None: a client must name them."""
        return None if self._key_needed else self._own_key

    @property
    def _own_key(self) -> str:
        return self._policy.config.unnorm_key or next(iter(self._policy.statistics))

    def _image(self, name: str, image: Any) -> np.ndarray:
        """Bounds the work of the policy's processor, which checks everything else."""
        if not isinstance(image, np.ndarray):
            raise InputError(
                f"{name}: expected an array, or a JPEG or PNG picture, got {type(image).__name__}"
            )
        if max(image.shape, default=0) > self._max_image_side:
            raise InputError(
                f"{name}: {' x '.join(map(str, image.shape[:2]))} pixels, expected at most "
                f"{self._max_image_side} on each side"
            )
        return image


def _found(message: Mapping[str, Any], name: str) -> list[str]:
    """Which of an entry's names a message has."""
    return [alias for alias in NAMES.get(name, (name,)) if alias in message]


def _entry(message: Mapping[str, Any], name: str) -> Any:
    found = _found(message, name)
    if len(found) > 1:
        raise InputError(f"observation has {' and '.join(found)}, which mean the same")
    if not found:
        held = ", ".join(sorted(message)[:16]) or "nothing"
        names = " or ".join(NAMES.get(name, (name,)))
        raise InputError(f"observation has no {names}; it holds: {held[:300]}")
    return message[found[0]]


def _sampling(message: Mapping[str, Any]) -> dict[str, Any]:
    """What sampling starts from, as a batch of one; nothing if the message does not say."""
    if "noise" in message and "seed" in message:
        raise InputError("observation has noise and seed, which say the same")
    if "noise" in message:
        noise = message["noise"]
        if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
            raise InputError(f"noise: expected floats [h, a], got {_kind(noise)}")
        if not np.isfinite(noise).all():
            raise InputError("noise: holds NaN or inf")
        return {"noise": noise[None]}
    if "seed" in message:
        seed = message["seed"]
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise InputError(f"seed: expected a whole number below 2^32, got {_kind(seed)}")
        return {"seed": [seed]}
    return {}


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__


def _state(value: Any, dtype: type[np.floating[Any]]) -> np.ndarray:
    if isinstance(value, list) and all(type(v) in (int, float) for v in value):
        try:
            value = np.asarray(value, np.float64)
        except OverflowError as error:
            raise InputError(f"state: {error}") from error
    if not isinstance(value, np.ndarray):
        raise InputError(f"state: expected an array, got {type(value).__name__}")
    if value.ndim != 1 or value.dtype.kind not in "fiu":
        raise InputError(f"state: expected numbers [p], got {value.dtype} {list(value.shape)}")
    with np.errstate(over="ignore"):  # overflow becomes inf, which the processor refuses
        return value.astype(dtype)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text, got {type(value).__name__}")
    if len(value) > MAX_INSTRUCTION:
        raise InputError(f"{name}: {len(value)} characters, expected at most {MAX_INSTRUCTION}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: holds half a character ({error.reason})") from error
    return value
