"""`qvla pack`: packs a policy without calibration."""

from qvla_jax import pipeline
from qvla_jax.commands.results import packed, peak_line, peak_memory
from qvla_jax.output import Result
from qvla_jax.pipeline import PackConfig as Config
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Packs a policy; reports the peak resident memory."""
    with ProgressBars() as progress:
        pipeline.pack(config, progress=progress)
    found, peak = packed(config.file), peak_memory()
    return Result({**found.content, "peak_resident_bytes": peak}, (*found.lines, peak_line(peak)))
