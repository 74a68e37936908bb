"""What every method is handed, and the frame around those that look at one layer at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from qvla_jax.array_typing import Array, Float
from qvla_jax.baselines.moments import InputMoments
from qvla_jax.baselines.numerics import QuantizedRows
from qvla_jax.baselines.packing import packed_policy
from qvla_jax.baselines.settings import Setting
from qvla_jax.inference.policy import Policy
from qvla_jax.progress import Progress
from qvla_jax.quantization import LayerRules, policy_index, quantizable_layers
from qvla_jax.sensitivity.batches import Calibration

Moments = Mapping[str, InputMoments]
# Rows [c, k] and the moments of their inputs; None for layers that no forward pass reaches.
RowsOf = Callable[[Float[Array, "c k"], InputMoments | None], QuantizedRows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a method works on."""

    # Full precision.
    policy: Policy
    # The only frames that it may see.
    calibration: Calibration
    setting: Setting
    rules: LayerRules
    # Empty where the method reads none.
    moments: Moments
    progress: Progress

    @property
    def made_with(self) -> dict[str, str | None]:
        """The calibration set, for the file's header."""
        return {"calibration hash": self.calibration.manifest["sha256"]}


def layer_by_layer(
    job: Job, rows_of: RowsOf, *, made_with: Mapping[str, object] | None = None
) -> Policy:
    """The packed policy of a method that looks at one layer at a time.

    Args:
        job: what to work on.
        rows_of: the method.
        made_with: of the file's header; None: the calibration set.
    """
    index = policy_index(job.policy, job.rules)
    layers = quantizable_layers(job.policy.model, job.rules)

    def rows() -> Iterator[QuantizedRows]:
        for done, path in enumerate(index.paths):
            job.progress(job.setting.name, done, len(index.paths))
            yield rows_of(layers[path].kernel[...].T, job.moments.get(path))
        job.progress(job.setting.name, len(index.paths), len(index.paths))

    return packed_policy(
        job.policy, index, rows(), job.setting, rules=job.rules,
        made_with=job.made_with if made_with is None else made_with,
    )  # fmt: skip
