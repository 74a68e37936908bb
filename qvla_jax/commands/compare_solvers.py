"""`qvla compare-solvers`: all solvers on one problem."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import CompareSolversConfig as Config
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Compares the solvers; returns the table and the figure's path."""
    with ProgressBars() as progress:
        compared = pipeline.compare_solvers(config, progress=progress)
    figure = () if config.figure is None else (f"Pareto figure: {config.figure}",)
    return Result(compared.to_json(), (str(compared.comparison), *figure))
