"""Which files of a public directory are read, by their names: for those that are elsewhere."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qvla_jax.checkpoints.files import CONFIG_FILE, STATISTICS_FILE, TOKENIZER_FILE
from qvla_jax.checkpoints.tensor_files import INDEX_FILE
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic.checkpoint.components import COMPONENTS, check_tensor_names
from qvla_jax.families.prismatic.checkpoint.huggingface import TOWERS_FILE
from qvla_jax.families.prismatic.checkpoint.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    check_read_format,
)

_SETTINGS: Final = (
    CONFIG_FILE,
    STATISTICS_FILE,
    TOKENIZER_FILE,
    TOWERS_FILE,
    INDEX_FILE,
    "added_tokens.json",
    "generation_config.json",
    "modeling_prismatic.py",  # tells OpenVLA-OFT from OpenVLA
    "preprocessor_config.json",
    "tokenizer_config.json",
)


def public_files(
    source: str, names: Sequence[str], settings: Mapping[str, Any], options: LoadOptions
) -> list[str]:
    """See `Family.public_files`."""
    adapters = [name for name in names if name.rpartition("/")[2] == ADAPTER_CONFIG]
    if CONFIG_FILE not in names:
        return adapters  # without weights: reading them says what to do
    if "model_type" not in settings:
        return []
    directly = [name for name in names if "/" not in name]
    check_tensor_names(source, directly)
    weights = fnmatch.filter(directly, "*.safetensors")
    if not weights:
        check_read_format(source, directly)
    parts = [name for pattern in COMPONENTS.values() for name in fnmatch.filter(names, pattern)]
    merged = [name for name in names if name.startswith(f"{ADAPTER_FOLDER}/")]
    return [
        *(name for name in _SETTINGS if name in directly),
        *(name for name in adapters if name.count("/") <= 1),
        *weights,
        *(name for name in parts if name in directly),
        *(merged if options.merge_adapter else ()),
    ]
