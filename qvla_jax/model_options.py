"""Settings, shared by commands, for what the files of a public checkpoint do not say."""

import dataclasses

from qvla_jax.families.options import LoadOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """Settings of a public directory, as `load_policy` takes them.

    `load_policy` takes settings that are not given from the files, and asks if those are ambiguous.
    """
