"""`qvla report`: report.json and report.html."""

from qvla_jax import pipeline
from qvla_jax.commands import results
from qvla_jax.output import Result
from qvla_jax.pipeline import ReportConfig as Config


def main(config: Config) -> Result:
    """Writes the report."""
    return results.report(pipeline.report(config), config.out)
