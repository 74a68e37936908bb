"""`qvla calibrate`: the calibration frames."""

from qvla_jax import pipeline
from qvla_jax.output import Result
from qvla_jax.pipeline import CalibrateConfig as Config
from qvla_jax.pipeline import files
from qvla_jax.progress import ProgressBars


def main(config: Config) -> Result:
    """Draws the calibration frames."""
    with ProgressBars() as progress:
        drawn = pipeline.calibrate(config, horizon=config.horizon, progress=progress)
    sources = []
    for place, source in enumerate(drawn.manifest["sources"]):
        steps = [episode for at, episode in drawn.episode_keys if at == place]
        counts = {"frames": len(steps), "episodes": len(set(steps))}
        sources.append({"dataset": source["dataset"], "split": source["split"], **counts})
    lines = [
        f"{s['dataset']} ({s['split']}): {s['frames']} frames of {s['episodes']} episodes"
        for s in (sources if len(sources) > 1 else ())
    ]
    left_out = drawn.manifest["left_out"]
    if left_out:
        lines.append(f"Too small a share for a frame: {', '.join(left_out)}")
    lines += [
        f"{source['dataset']}: {source['unlabeled']} episodes without an instruction passed over"
        for source in drawn.manifest["sources"]
        if source["unlabeled"]
    ]
    found, path = drawn.describe(), config.out / files.CALIBRATION
    name = f"{found['dataset']}, {found['split']}" if len(sources) == 1 else "all"
    lines.append(f"{drawn.frames} frames of {found['episodes']} episodes ({name}): {path}")
    content = {**found, "sources": sources, "left_out": left_out, "file": str(path)}
    return Result(content, tuple(lines))
