"""Groups of similar channels: the layers of one module type, at any depth."""

import numpy as np

from qvla_jax.array_typing import Int
from qvla_jax.families.layout import Layout
from qvla_jax.quantization.index import ChannelIndex


def module_types(index: ChannelIndex, layout: Layout) -> tuple[list[str], Int[np.ndarray, " C"]]:
    """The module types of an index in alphabetical order, and the number of each channel's."""
    of_layer = [layout.module_type(path) for path in index.paths]
    types = sorted(set(of_layer))
    numbers = np.asarray([types.index(kind) for kind in of_layer])
    return types, numbers[index.layer_of]
