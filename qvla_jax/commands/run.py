"""`qvla run`: the whole pipeline."""

from qvla_jax import pipeline
from qvla_jax.commands.results import report
from qvla_jax.output import Result
from qvla_jax.pipeline import RunConfig as Config
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Runs the whole pipeline; returns the table of methods."""
    with ProgressBars() as progress:
        content = pipeline.run(config, progress=progress)
    return report(content, config.out)
