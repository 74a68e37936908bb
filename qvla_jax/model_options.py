"""Settings, shared by commands, for what the files of a public checkpoint do not say."""

import dataclasses
from typing import Any

from qvla_jax.families.prismatic.checkpoint.options import LoadOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """Settings of a public OpenVLA, OpenVLA-OFT or UniVLA directory, as `load_policy` takes them.

    `load_policy` takes settings that are not given from the files, and asks if those are ambiguous.

    >>> ModelOptions(unnorm_key="bridge_orig", center_crop=False).said()
    {'unnorm_key': 'bridge_orig', 'center_crop': False}
    """

    def said(self) -> dict[str, Any]:
        """Keyword arguments for `load_policy`: those that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(ModelOptions)
            if (value := getattr(self, field.name)) != field.default
        }
