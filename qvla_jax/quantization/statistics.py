"""`InputStatistics`: mean and covariance of every quantized layer's inputs over calibration data.

Measured once (sensitivity.statistics), used by the bias correction, by error feedback and by the
sensitivities of that quantizer alike. Layers with equal statistics, such as q, k and v, share their
arrays, in memory and in the file. The matrices are large (k = 11008: 485 MB in float32), so they
have their own file, are read one layer at a time, and are not part of a sensitivity table.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import safetensors

from qvla_jax.array_files import write_arrays
from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError
from qvla_jax.quantization.index import ChannelIndex

# How tokens are weighted: equally, or by how much the action depends on the layer there.
Weighting: TypeAlias = Literal["tokens", "action"]

_KIND: Final = "qvla_jax.input_statistics"
_MEAN, _COVARIANCE = "mean.", "covariance."


@dataclasses.dataclass(frozen=True, eq=False)
class InputStatistics:
    """Weighted moments of the inputs x of each layer, over calibration frames and tokens.

    Invariants: `means` has an entry for each layer; a covariance is symmetric, positive
    semidefinite, about the mean, and of the mean's size.
    """

    # Path -> E[x]; zeros for a layer that no action depends on.
    means: Mapping[str, Float[np.ndarray, " k"]]
    # Path -> E[(x - E[x]) (x - E[x])^T]; empty where only means were measured.
    covariances: Mapping[str, Float[np.ndarray, "k k"]] = dataclasses.field(default_factory=dict)
    # JSON object that names policy, calibration set and settings.
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weighting: Weighting = "tokens"

    def check(self, index: ChannelIndex, *, covariances: bool) -> None:
        """Checks that the statistics fit these layers.

        Raises:
            InputError: a layer's mean or, if needed, covariance is missing, has another shape, or
                is not finite.
        """
        for layer in index.layers:
            mean = self.means.get(layer.path)
            if mean is None or np.shape(mean) != (layer.fan_in,) or not np.isfinite(mean).all():
                found = "none" if mean is None else f"{np.shape(mean)}, maybe not finite"
                raise InputError(
                    f"means: {layer.path} needs {layer.fan_in} finite mean inputs, got {found}"
                )
            if covariances and layer.path not in self.covariances:
                raise InputError(
                    f"covariances: {layer.path} has none, and error feedback needs it; measure "
                    "the statistics again"
                )

    def covariance(self, path: str) -> Float[np.ndarray, "k k"]:
        """Covariance of a layer's inputs.

        Raises:
            InputError: it is missing, of the wrong shape, or not finite.
        """
        matrix, size = self.covariances.get(path), len(self.means[path])
        if matrix is None or matrix.shape != (size, size) or not np.isfinite(matrix).all():
            found = "none" if matrix is None else f"{matrix.shape}, maybe not finite"
            raise InputError(f"covariances: {path} needs finite {(size, size)}, got {found}")
        return matrix

    def save(self, path: str | os.PathLike[str], *, exact: bool = False) -> None:
        """Writes one safetensors file, completely or not at all.

        Args:
            path: the file.
            exact: covariances in float64, not in float32.
        """
        arrays: dict[str, np.ndarray] = {}
        stored: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, mean in self.means.items():
            arrays[_MEAN + name] = np.asarray(mean, np.float64)
        for name, matrix in self.covariances.items():
            shared[name] = stored.setdefault(id(matrix), name)
            if shared[name] == name:
                arrays[_COVARIANCE + name] = np.asarray(matrix, np.float64 if exact else np.float32)
        header = {
            "made_from": dict(self.made_from), "shared": shared, "weighting": self.weighting
        }  # fmt: skip
        write_arrays(path, arrays, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InputStatistics":
        """Opens a file; covariances are read when they are asked for.

        Raises:
            InputError: the file is missing, truncated, of another kind, or inconsistent.
        """
        name = os.fspath(path)
        if not os.path.isfile(name):
            raise InputError(f"{name}: there is no such file; measure the input statistics again")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                header = json.loads((file.metadata() or {})["header"])
                names = set(file.keys())
                if header["kind"] != _KIND or header["version"] != 1:
                    raise ValueError(f"kind {header['kind']!r}, version {header['version']!r}")
                means = {
                    key[len(_MEAN) :]: file.get_tensor(key)
                    for key in sorted(names)
                    if key.startswith(_MEAN)
                }
            shared = {str(k): str(v) for k, v in header["shared"].items()}
            made_from = dict(header["made_from"])
            weighting = header.get("weighting", "tokens")
            if weighting not in ("tokens", "action"):
                raise ValueError(f"weighting {weighting!r}")
        except (
            OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError,
            safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise InputError(
                f"{name}: not input statistics of this version, or damaged ({error}); measure "
                "them again"
            ) from error
        if lost := sorted(v for v in shared.values() if _COVARIANCE + v not in names):
            raise InputError(f"{name}: the covariance of {lost[0]} is missing; measure again")
        return cls(means, _Stored(name, shared), made_from, weighting)


class _Stored(Mapping[str, np.ndarray]):
    """Covariances in a file, read one at a time."""

    def __init__(self, path: str, shared: Mapping[str, str]):
        self._path, self._shared = path, shared

    def __getitem__(self, name: str) -> np.ndarray:
        key = _COVARIANCE + self._shared[name]
        with safetensors.safe_open(self._path, "numpy") as file:
            return file.get_tensor(key)

    def __contains__(self, name: object) -> bool:
        return name in self._shared

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)
