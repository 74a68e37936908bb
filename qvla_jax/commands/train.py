"""`qvla train`: behavior cloning."""

from qvla_jax.output import Result
from qvla_jax.progress import ProgressBars
from qvla_jax.training import TrainConfig as Config
from qvla_jax.training import train


def main(config: Config) -> Result:
    """Trains a policy."""
    with ProgressBars() as progress:
        folder = train(config, progress=progress)
    return Result({"policy": str(folder)}, (f"Policy: {folder}",))
