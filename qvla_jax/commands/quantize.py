"""`qvla quantize`: packs the weights at the chosen bits."""

from qvla_jax import pipeline
from qvla_jax.commands.results import packed
from qvla_jax.output import Result
from qvla_jax.pipeline import QuantizeConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Packs the chosen allocation."""
    with ProgressBars() as progress:
        pipeline.quantize(config, progress=progress)
    return packed(config.out / files.POLICY)
