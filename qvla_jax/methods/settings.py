"""Names of rows: `gptq-w4`, `rtn-w4-g128`, `smoothquant-w8a8`, `qvla-w3.5`."""

import dataclasses
import re
from typing import Final

from qvla_jax.errors import InputError

_NAME: Final = re.compile(
    r"(?P<method>[a-z]+(?:-[a-z]+)*?)-w(?P<bits>\d+(?:\.\d+)?)"
    r"(?:a(?P<activation>\d+(?:\.\d+)?))?(?:-g(?P<group>\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its bits."""

    method: str
    # Bits of every weight's code; for methods that allocate, the budget in bits per weight.
    bits: float
    # Bits of activations; 16 does not round them. For methods that allocate them, the budget,
    # averaged over multiplications.
    activation_bits: float = 16
    # Inputs that share a scale; None: the whole row.
    group: int | None = None

    @property
    def name(self) -> str:
        """What `parse` takes."""
        activation = f"a{self.activation_bits:g}" if self.activation_bits != 16 else ""
        group = f"-g{self.group}" if self.group is not None else ""
        return f"{self.method}-w{self.bits:g}{activation}{group}"

    @classmethod
    def parse(cls, name: str) -> "Setting":
        """Reads a name.

        Raises:
            InputError: it is not of the form METHOD-wBITS[aBITS][-gGROUP].
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise InputError(
                f"method {name!r}: expected METHOD-wBITS, then aBITS for activations and -gGROUP "
                "where wanted, such as gptq-w4, smoothquant-w8a8 or rtn-w4-g128"
            )
        return cls(
            method=found["method"],
            bits=float(found["bits"]),
            activation_bits=float(found["activation"] or 16),
            group=int(found["group"]) if found["group"] else None,
        )
