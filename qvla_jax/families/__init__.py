"""Families of policies: each folder has its configuration, network, checkpoints and processor.

`FAMILIES` is the only list of them. Nothing outside a family's folder imports from it: code asks
`policy.family`, or `registry` by a name or a directory.
"""

from typing import Final

# Name in files -> module with the family, as `FAMILY`. Imported when it is first asked for.
FAMILIES: Final = {
    "prismatic": "qvla_jax.families.prismatic.family",
    "openpi": "qvla_jax.families.openpi.family",
}
