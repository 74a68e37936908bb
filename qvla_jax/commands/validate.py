"""`qvla validate`: whether the sensitivities can be trusted."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import ValidateConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars
from qvla_jax.report.validation import validation_tables


def main(config: Config) -> Result:
    """Studies the sensitivities."""
    with ProgressBars() as progress:
        validation = pipeline.validate(config, progress=progress)
    tables = [line for table in validation_tables(validation) for line in (table, "")]
    place = f"{config.out / files.VALIDATION}, {config.out / files.VALIDATION_FIGURE}"
    return Result(to_plain(validation), (*tables, place))
