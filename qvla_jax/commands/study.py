"""`qvla study`: the table of results."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import StudyConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Builds the table of results."""
    with ProgressBars() as progress:
        content = pipeline.study(config, progress=progress)
    table = (config.out / files.STUDY_TABLE).read_text("utf-8")
    place = f"Study: {config.out / files.STUDY}, {config.out / files.STUDY_TABLE}"
    return Result(to_plain(content), (table, place))
