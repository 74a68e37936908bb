"""Builds the pages of the API from the docstrings: `make docs`, or python docs/build_api.py OUT."""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

PACKAGES = (
    "qvla_jax",
    "qvla_jax.allocation",
    "qvla_jax.array_typing",
    "qvla_jax.methods",
    "qvla_jax.checkpoints",
    "qvla_jax.families.prismatic.config",
    "qvla_jax.errors",
    "qvla_jax.evaluation",
    "qvla_jax.inference",
    "qvla_jax.kernels",
    "qvla_jax.models",
    "qvla_jax.pipeline",
    "qvla_jax.quantization",
    "qvla_jax.report",
    "qvla_jax.sensitivity",
    "qvla_jax.serving",
    "qvla_jax.sharding",
    "qvla_jax.training",
)


def build(out: Path) -> None:
    """Writes one page for each package; a name that does not resolve is an error."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            getattr(module, name)  # what is loaded on first use is there, then
    pdoc.render.configure(docformat="google", footer_text="qvla_jax", math=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*PACKAGES, output_directory=out)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
