"""Directories as openpi publishes them, with random weights, for measurements at full size."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.atomic import write_bytes
from qvla_jax.checkpoints.files import TOKENIZER_FILE
from qvla_jax.errors import InputError
from qvla_jax.families.openpi.checkpoint import export
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.names import parameters
from qvla_jax.families.openpi.network import abstract_model
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.families.openpi.tokenizer import word_tokenizer

# Random numbers that all tensors are made of; odd, so that rows of no width begin at the same one.
_NUMBERS: Final = (1 << 22) + 1


def synthesize(config: OpenpiConfig, out: Path, *, seed: int = 0) -> None:
    """Writes a directory with random bfloat16 weights and statistics of unit range.

    About 6.7 GB for pi0.5 and 6.5 GB for pi0, one tensor at a time. `tokenizer.json` is a stand-in
    that knows no word: every one is `<unk>`.

    Args:
        config: of a preset that names its robot.
        out: an empty or new folder.
        seed: of the weights.

    Raises:
        InputError: the preset serves several robots, or `out` holds files already.
    """
    if config.robot is None or config.asset_id is None:
        raise InputError(
            f"{config.name}: serves several robots and names none; synthesize a preset of one, "
            f"such as {config.variant}_libero"
        )
    shapes = {path: variable.shape for path, variable in parameters(abstract_model(config))}
    export(config, _Random(shapes, seed), unit_statistics(config), out)
    write_bytes(out / TOKENIZER_FILE, word_tokenizer(()).to_str().encode())


def unit_statistics(config: OpenpiConfig) -> dict[str, Any]:
    """Statistics of unit range, of a configuration that names its robot and its statistics."""
    assert config.robot is not None
    assert config.asset_id is not None
    robot = ROBOTS[config.robot]
    unit = {
        block: {"mean": [0.0] * n, "std": [1.0] * n, "q01": [-1.0] * n, "q99": [1.0] * n}
        for block, n in (("state", robot.state_dim), ("actions", robot.action_dim))
    }
    return {config.asset_id: {"norm_stats": unit}}


class _Random(Mapping[str, np.ndarray]):
    """Parameters of given shapes in Flax's layout, bfloat16; each is made on request.

    Entries of matrices are Student's t with 5 degrees of freedom, of deviation 0.02. The deviations
    of output channels spread around it as a log-normal does (sigma 0.5), and those of one input in
    128 are four times as large. Factors of norms are around 1, all other vectors around 0.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self._shapes = shapes
        rng = np.random.default_rng(seed)
        deviation = (5 / 3) ** 0.5  # of the distribution
        numbers = (0.02 / deviation * rng.standard_t(5, _NUMBERS)).astype(np.float32)
        self._numbers = np.concatenate([numbers, numbers])  # a slice may begin anywhere
        self._channels = rng.lognormal(sigma=0.5, size=_NUMBERS >> 4).astype(np.float32)
        self._inputs = np.where(rng.random(_NUMBERS >> 4) < 1 / 128, 4, 1).astype(np.float32)

    def __getitem__(self, path: str) -> Float[np.ndarray, "..."]:
        shape = self._shapes[path]
        made = np.empty((math.prod(shape[:-1]), shape[-1]), ml_dtypes.bfloat16)
        begin = sum(path.encode()) * 7919
        # Gemma's norms multiply by 1 + scale.
        center = np.float32(path.startswith("PaliGemma.img.") and path.endswith(".scale"))
        channels = np.resize(self._channels, shape[-1])
        matrix, rows = path.endswith(".kernel"), _NUMBERS // shape[-1]
        for start in range(0, len(made), rows):
            count = min(rows, len(made) - start)
            first = (begin + start * shape[-1]) % _NUMBERS
            block = self._numbers[first : first + count * shape[-1]].reshape(count, -1)
            if matrix:
                inputs = self._inputs[(start + np.arange(count)) % len(self._inputs)]
                block = block * channels * inputs[:, None]
            made[start : start + count] = block + center
        return made.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
