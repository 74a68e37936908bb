"""What the files of a public checkpoint do not tell, as settings that commands share."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Settings of a public OpenVLA, OpenVLA-OFT or UniVLA directory: `load_policy`'s arguments.

    Policies that this package saved hold all of it. What is not said is left to `load_policy`,
    which follows the files, and asks where they do not decide.

    >>> ModelOptions(unnorm_key="bridge_orig", center_crop=False).said()
    {'unnorm_key': 'bridge_orig', 'center_crop': False}
    """

    # Public directories: which data set's statistics un-normalize the actions.
    unnorm_key: str | None = None
    # Public directories: cameras; left out, what the files and their kind of policy say.
    num_images: int | None = None
    # Public directories: --center-crop crops raw images to the central 90 % of their area, for
    # policies that were trained with random crops; --no-center-crop leaves them whole.
    center_crop: bool | None = None
    # Public directories: actions in a chunk, where the files do not tell.
    action_horizon: int | None = None
    # Public directories: what the actions' range maps to -1 and 1, quantiles (q01, q99) or min_max.
    action_normalization: Literal["quantiles", "min_max"] | None = None
    # Public directories: merge the adapter that lies beside the weights into them.
    merge_adapter: bool = False

    def said(self) -> dict[str, Any]:
        """Keyword arguments for `load_policy`: those that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(ModelOptions)
            if (value := getattr(self, field.name)) != field.default
        }


def in_words(said: dict[str, Any]) -> str:
    """Options as the command line spells them.

    >>> in_words({"unnorm_key": "bridge_orig", "center_crop": False})
    '--unnorm-key bridge_orig --no-center-crop'

    Args:
        said: from `ModelOptions.said`.
    """
    words = []
    for name, value in said.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {value}")
    return " ".join(words)
