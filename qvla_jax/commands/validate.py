"""`qvla validate`: whether the sensitivities can be trusted."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import ValidateConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars
from qvla_jax.report.study import study_tables


def main(config: Config) -> Result:
    """Studies the sensitivities."""
    with ProgressBars() as progress:
        study = pipeline.validate(config, progress=progress)
    tables = [line for table in study_tables(study) for line in (table, "")]
    place = f"Study: {config.out / files.STUDY}, {config.out / files.STUDY_FIGURE}"
    return Result(to_plain(study), (*tables, place))
