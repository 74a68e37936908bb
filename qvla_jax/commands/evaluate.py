"""`qvla evaluate`: the action error on held-out frames."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import EvaluateConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars
from qvla_jax.report.terminal import methods_table


def main(config: Config) -> Result:
    """Evaluates; returns the table of methods."""
    with ProgressBars() as progress:
        evaluation = pipeline.evaluate(config, progress=progress)
    place = f"Evaluation: {config.out / files.EVALUATION}"
    return Result(to_plain(evaluation), (methods_table(evaluation.methods), place))
