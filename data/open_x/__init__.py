"""Open-X Embodiment: what each data set stores and means, and its conversion to standard form.

    spec = open_x.get("bridge_orig")          # or read from a JSON file, or made: DatasetSpec(...)
    open_x.MIXTURES["oxe_magic_soup_plus"]    # weights of OpenVLA's training mixture

`qvla_jax.data.RldsDataset` finds the specification by the data set's name. docs/data.md says how to
add one.
"""

from qvla_jax.data.open_x.mixtures import MIXTURES as MIXTURES
from qvla_jax.data.open_x.mixtures import below as mixture_below
from qvla_jax.data.open_x.mixtures import get as mixture
from qvla_jax.data.open_x.spec import ActionSpec as ActionSpec
from qvla_jax.data.open_x.spec import DatasetSpec as DatasetSpec
from qvla_jax.data.open_x.spec import JointActionSpec as JointActionSpec
from qvla_jax.data.open_x.specs import NAMES as NAMES
from qvla_jax.data.open_x.specs import SPECS as SPECS
from qvla_jax.data.open_x.specs import find as find
from qvla_jax.data.open_x.specs import get as get
from qvla_jax.data.open_x.specs import load as load
from qvla_jax.data.open_x.specs import not_found as not_found

__all__ = [
    "MIXTURES",
    "NAMES",
    "SPECS",
    "ActionSpec",
    "DatasetSpec",
    "JointActionSpec",
    "find",
    "get",
    "load",
    "mixture",
    "mixture_below",
    "not_found",
]
