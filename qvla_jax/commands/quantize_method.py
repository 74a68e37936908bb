"""`qvla quantize --method`: quantizes by other methods, by name."""

from qvla_jax import pipeline
from qvla_jax.commands.results import packed
from qvla_jax.output import Result
from qvla_jax.pipeline import MethodConfig as Config
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Quantizes by named methods."""
    with ProgressBars() as progress:
        written = pipeline.quantize_by_methods(config, progress=progress)
    found = {name: packed(path) for name, path in written.items()}
    return Result(
        {name: result.content for name, result in found.items()},
        tuple(line for result in found.values() for line in result.lines),
    )
