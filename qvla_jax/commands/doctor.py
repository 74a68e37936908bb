"""`qvla doctor`: what works here. Imports only the standard library, so that it always runs."""

import dataclasses
import platform

from qvla_jax import __version__, doctor
from qvla_jax.output import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Checks this installation, and says how to install what is missing."""


def main(config: Config) -> Result:
    """What works here, what is missing and how to get it; fails if the core lacks something."""
    del config
    made = list(doctor.checks())
    lines = [f"qvla_jax {__version__}, {platform.system()} {platform.machine()}"]
    for check in made:
        lines.append(f"{check.status:<8} {check.name}: {check.found}")
        if check.remedy:
            lines.append(f"{'':<8}   {check.remedy}")
    lacking = [check for check in made if check.needed and check.status != "ok"]
    blamed = [check for check in lacking if check.variable]
    content = {
        "version": __version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "checks": [dataclasses.asdict(check) for check in made],
    }
    failure = f"the core does not work without: {', '.join(check.name for check in lacking)}"
    failure += "".join(f"; {check.found}" for check in blamed)
    return Result(content, tuple(lines), failure if lacking else None, bad_input=lacking == blamed)
