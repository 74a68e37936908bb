"""What an observation of a policy holds, for servers, simulators and trials."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """The entries of an observation.

    Attributes:
        cameras: keys of the images u8[H, W, 3], in the order that the policy takes them.
        state_dim: entries of `state`; 0 if the policy takes none.
        texts: keys of texts: `instruction`, and `history`, which `Processor.history` made from the
            inputs of the episode's previous call.
        optional: keys of cameras and texts that may be missing.
        image_size: side of the pictures that a camera usually gives, in pixels.
        sampled: whether actions are sampled: an observation may have `noise` f32[h, a] that
            sampling starts from, or the `seed` that it is drawn from.
        state_dtype: of `state`, as the processor takes it.
        from_client: for policies that come with servers and clients of their own, what such a
            client sends -> these entries; an observation that has them already stays as it is. It
            raises an `InputError` that names the client's key.
        metadata: what such a client is told on connecting.
    """

    cameras: tuple[str, ...] = ()
    state_dim: int = 0
    texts: tuple[str, ...] = ("instruction",)
    optional: frozenset[str] = frozenset()
    image_size: int = 0
    sampled: bool = False
    state_dtype: type[np.floating[Any]] = np.float32
    from_client: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_history(self) -> bool:
        """Whether a call leaves something that the next one of an episode takes."""
        return "history" in self.texts

    def fake(self, seed: int = 0) -> dict[str, Any]:
        """An observation of noise with exactly the entries that are not optional.

        Args:
            seed: of the noise.
        """
        rng = np.random.default_rng(seed)
        side = self.image_size
        observation: dict[str, Any] = {
            camera: rng.integers(0, 256, (side, side, 3), np.uint8)
            for camera in self.cameras
            if camera not in self.optional
        }
        if self.state_dim:
            observation["state"] = rng.uniform(-1.0, 1.0, self.state_dim).astype(np.float32)
        text = "pick up the black bowl and place it on the plate"
        return observation | {key: text for key in self.texts if key not in self.optional}
