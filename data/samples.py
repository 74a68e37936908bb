"""The locations of the bundled episodes and policies."""

from pathlib import Path

_BUNDLED = Path(__file__).parent / "bundled"


def bundled_path() -> Path:
    """The bundled LIBERO-Spatial sample: an RLDS directory, splits "calibration" and "heldout"."""
    return _BUNDLED / "libero_spatial" / "1.0.0"


def bundled_policy_path(name: str) -> Path:
    """Where the weights of a bundled policy would be; it may not exist."""
    return _BUNDLED / "policies" / name
