"""The input of every method, and the driver of methods that process one layer at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from qvla_jax.array_typing import Array, Float
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.methods.measurements import Measurements, Moments
from qvla_jax.methods.moments import InputMoments
from qvla_jax.methods.packing import packed_policy
from qvla_jax.methods.settings import Setting
from qvla_jax.quantization import LayerRules, quantizable_layers
from qvla_jax.quantization.rows import QuantizedRows
from qvla_jax.sensitivity.batches import Calibration

# Rows [c, k] and the moments of their inputs; None for layers that no forward pass reaches.
RowsOf = Callable[[Float[Array, "c k"], InputMoments | None], QuantizedRows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a method works on."""

    # The policy, the frames, and what is measured on them.
    measured: Measurements
    setting: Setting

    @property
    def policy(self) -> Policy:
        """Full precision."""
        return self.measured.policy

    @property
    def calibration(self) -> Calibration:
        """The only frames that a method may see."""
        return self.measured.calibration

    @property
    def rules(self) -> LayerRules:
        """Which layers are quantized."""
        return self.measured.rules

    def progress(self, stage: str, done: int, total: int) -> None:
        """Reports how far it is."""
        self.measured.progress(stage, done, total)

    @property
    def made_with(self) -> dict[str, str | None]:
        """The calibration set, for the file's header."""
        return {"calibration hash": self.calibration.manifest["sha256"]}


def layer_by_layer(
    job: Job,
    rows_of: RowsOf,
    moments: Moments,
    *,
    made_with: Mapping[str, object] | None = None,
) -> Policy:
    """The packed policy of a method that processes one layer at a time.

    Args:
        job: what to work on.
        rows_of: the method.
        moments: of the layers' inputs; empty if the method reads none.
        made_with: entries of the file's header; None records the calibration set.
    """
    index = policy_index(job.policy, job.rules)
    layers = quantizable_layers(job.policy.model, job.rules)

    def rows() -> Iterator[QuantizedRows]:
        for done, path in enumerate(index.paths):
            job.progress(job.setting.name, done, len(index.paths))
            yield rows_of(layers[path].kernel[...].T, moments.get(path))
        job.progress(job.setting.name, len(index.paths), len(index.paths))

    return packed_policy(
        job.policy, index, rows(), job.setting, rules=job.rules,
        made_with=job.made_with if made_with is None else made_with,
    )  # fmt: skip
