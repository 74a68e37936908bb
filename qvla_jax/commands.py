"""What the subcommands do: run a stage with progress bars, and return what came out."""

import collections
import contextlib
import dataclasses
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from tyro.conf import Positional

from qvla_jax import __version__, pipeline, sharding
from qvla_jax.output import Result
from qvla_jax.pipeline import files
from qvla_jax.pipeline.closed_loop import EPISODES_FILE, ClosedLoopConfig
from qvla_jax.pipeline.closed_loop import closed_loop as run_closed_loop
from qvla_jax.pipeline.collect import CollectConfig
from qvla_jax.pipeline.collect import collect as run_collect
from qvla_jax.progress import ProgressBars
from qvla_jax.report.page import size_text
from qvla_jax.report.study import study_tables
from qvla_jax.report.svg import number
from qvla_jax.report.terminal import (
    comparison_table,
    drift_line,
    methods_table,
    spearman_line,
    success_table,
    sweep_table,
    times_table,
)
from qvla_jax.serving.config import ServeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Says what a policy is made of: parameters, bytes and output channels of every module."""

    # A preset, a directory that holds a policy (a saved one or a public one), or a .qvla file.
    model: Positional[str]
    # Load the weights and print the fingerprint that results name the policy by.
    fingerprint: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig(pipeline.SensitivityConfig):
    """Measures what each output channel costs at each bit-width; writes sensitivity.safetensors.

    A run that was killed goes on where it stopped when it is started again. On several hosts, start
    it on each with the same options and another --process; --out has to hold the same
    calibration.json everywhere, and results are written by process 0.
    """

    # HOST:PORT of process 0, for a sweep of several processes.
    coordinator: str | None = None
    # How many there are, and which one this is.
    processes: int = 1
    process: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Checks this installation, and says of what is missing how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a policy in the public (Hugging Face) layout.

    A public directory passes through the import one tensor at a time and comes back bit for bit;
    any other policy, and one whose dtype shall change, is loaded whole.
    """

    # A preset with weights, or a directory that holds a policy: a saved one or a public one.
    model: str
    # An empty or new folder.
    out: Path
    # Of all tensors; left out: as they are.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Statistics entry, where a public directory holds several.
    unnorm_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Imports a public directory into one of ours, one tensor at a time, weights in orbax."""

    # A public OpenVLA, OpenVLA-OFT or UniVLA directory.
    model: Path
    # An empty or new folder.
    out: Path
    # Of the weights; public checkpoints are published in bfloat16.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Statistics entry, where the directory holds several.
    unnorm_key: str | None = None
    # Cameras, which the files do not tell; left out: 2 for OpenVLA-OFT, else 1.
    num_images: int | None = None
    # Crop raw images to the central 90 % of their area; left out: not for OpenVLA.
    center_crop: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Writes a public directory with random bfloat16 weights, for measurements at full size."""

    # A preset without FiLM.
    preset: str = "openvla-7b"
    # An empty or new folder; openvla-7b takes 15 GB.
    out: Path
    seed: int = 0


def export(config: ExportConfig) -> Result:
    """Exports a policy; names the peak resident memory."""
    from qvla_jax.checkpoints.export import reexport
    from qvla_jax.checkpoints.huggingface import is_huggingface
    from qvla_jax.inference import load_policy

    if config.dtype is None and is_huggingface(Path(config.model)):
        reexport(Path(config.model), config.out)
    else:
        import jax.numpy as jnp

        policy = load_policy(config.model, unnorm_key=config.unnorm_key)
        policy.export(config.out, dtype=config.dtype and jnp.dtype(config.dtype))
    return _written(config.out)


def import_(config: ImportConfig) -> Result:
    """Imports a public directory; names the peak resident memory."""
    import jax.numpy as jnp

    from qvla_jax.inference import import_policy

    import_policy(
        config.model,
        config.out,
        unnorm_key=config.unnorm_key,
        num_images=config.num_images,
        center_crop=config.center_crop,
        dtype=jnp.dtype(config.dtype),
    )
    return _written(config.out)


def _written(folder: Path) -> Result:
    peak = _peak()
    return Result(
        {"policy": str(folder), "peak_resident_bytes": peak}, (f"{folder}; {_peak_line(peak)}",)
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_line(peak: int) -> str:
    return f"peak resident memory {peak / 2**30:.2f} GiB"


def synthesize(config: SynthesizeConfig) -> Result:
    """Writes a synthetic directory."""
    from qvla_jax.checkpoints.export import synthesize as write
    from qvla_jax.config import preset
    from qvla_jax.inference.word_tokenizer import word_tokenizer

    write(preset(config.preset), config.out, seed=config.seed)
    word_tokenizer().save(str(config.out / "tokenizer.json"))
    return Result(
        {"policy": str(config.out), "preset": config.preset},
        (f"{config.out}: {config.preset} with random weights",),
    )


def run(config: pipeline.RunConfig) -> Result:
    """Runs the whole walk; the table of methods."""
    with ProgressBars() as progress:
        content = pipeline.run(config, progress=progress)
    return _report(content, config.out)


def calibrate(config: pipeline.CalibrateConfig) -> Result:
    """Draws the calibration frames."""
    with ProgressBars() as progress:
        drawn = pipeline.calibrate(config, progress=progress)
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
    found, path = drawn.describe(), config.out / files.CALIBRATION
    name = f"{found['dataset']}, {found['split']}" if len(sources) == 1 else "all"
    lines.append(f"{drawn.frames} frames of {found['episodes']} episodes ({name}): {path}")
    content = {**found, "sources": sources, "left_out": left_out, "file": str(path)}
    return Result(content, tuple(lines))


def sensitivity(config: SensitivityConfig) -> Result:
    """Measures the sensitivities."""
    if config.coordinator is not None:
        sharding.join_processes(config.coordinator, config.processes, config.process)
    with ProgressBars() as progress:
        validation = pipeline.sensitivity(config, progress=progress)
    path = config.out / files.SENSITIVITY
    content = {"method": config.method, "file": str(path), "validation": validation}
    if not sharding.is_main_process():
        return Result(content, ())
    lines = () if validation is None else (spearman_line(validation, config.method),)
    return Result(content, (*lines, f"Sensitivities: {path}"))


def validate(config: pipeline.ValidateConfig) -> Result:
    """Studies the sensitivities."""
    with ProgressBars() as progress:
        study = pipeline.validate(config, progress=progress)
    tables = [line for table in study_tables(study) for line in (table, "")]
    place = f"Study: {config.out / files.STUDY}, {config.out / files.STUDY_FIGURE}"
    return Result(study, (*tables, place))


def allocate(config: pipeline.AllocateConfig) -> Result:
    """Allocates bits; what each solver reached."""
    with ProgressBars() as progress:
        allocations = pipeline.allocate(config, progress=progress)
    table = Table("allocation", box=None)
    for heading in ("budget", "stored", "cost", "lower bound", "seconds"):
        table.add_column(heading, justify="right")
    for a in allocations.items:
        table.add_row(
            f"{a.sensitivity}, {a.solver}",
            f"{a.budget_bits:g} bits",
            size_text(a.stored_bytes),
            number(a.predicted_sse_normalized),
            number(a.lower_bound),
            f"{a.seconds:.2f}",
        )
    path = config.out / files.ALLOCATION
    found = [{"name": a.name, **a.describe()} for a in allocations.items]
    content = {"chosen": allocations.chosen.name, "allocations": found, "file": str(path)}
    return Result(content, (table, f"Allocation: {path}"))


def compare_solvers(config: pipeline.CompareSolversConfig) -> Result:
    """Compares the solvers, and says where the figure lies."""
    with ProgressBars() as progress:
        compared = pipeline.compare_solvers(config, progress=progress)
    figure = () if config.figure is None else (f"Pareto figure: {config.figure}",)
    return Result(compared.to_json(), (str(compared.comparison), *figure))


def measure_solvers(config: pipeline.MeasureSolversConfig) -> Result:
    """Measures the solvers' allocations."""
    with ProgressBars() as progress:
        records = pipeline.measure_solvers(config, progress=progress)
    table = Table("joint action error, SSE", box=None, padding=(0, 1))
    for heading in ("budget", "stored", "predicted", "calibration", "held-out", "paired change"):
        table.add_column(heading, justify="right")
    for heading in ("changed", "measured", "seconds"):
        table.add_column(heading, justify="right")
    for r in records:
        budget = f"{r['budget_bits']:g} bits"
        if "error" in r:
            table.add_row(r["solver"], budget, r["error"])
            continue
        table.add_row(
            r["solver"],
            budget,
            size_text(r["stored_bytes"]),
            number(r["predicted_sse_normalized"]),
            number(r["calibration_sse_normalized"]),
            number(r["heldout_sse_normalized"]),
            f"{r['heldout_change']:+.1e} ± {r['heldout_change_error']:.0e}",
            f"{r['channels_changed']:,}",
            str(r.get("evaluations", 1)),
            f"{r['seconds']:.1f}",
        )
    note = "The paired change is that of the held-out error against the first solver's allocation."
    return Result({"allocations": records}, (table, note))


def quantize(config: pipeline.QuantizeConfig) -> Result:
    """Packs the chosen allocation."""
    with ProgressBars() as progress:
        pipeline.quantize(config, progress=progress)
    return _packed(config.out / files.POLICY)


def quantize_by_methods(config: pipeline.MethodConfig) -> Result:
    """Quantizes by methods' names."""
    with ProgressBars() as progress:
        written = pipeline.quantize_by_methods(config, progress=progress)
    packed = {name: _packed(path) for name, path in written.items()}
    return Result(
        {name: result.content for name, result in packed.items()},
        tuple(line for result in packed.values() for line in result.lines),
    )


def study(config: pipeline.StudyConfig) -> Result:
    """Makes the table of results."""
    with ProgressBars() as progress:
        content = pipeline.study(config, progress=progress)
    table = (config.out / files.RESULTS_TABLE).read_text("utf-8")
    place = f"Results: {config.out / files.RESULTS}, {config.out / files.RESULTS_TABLE}"
    return Result(content, (table, place))


def pack(config: pipeline.PackConfig) -> Result:
    """Packs a policy; names the peak resident memory."""
    with ProgressBars() as progress:
        pipeline.pack(config, progress=progress)
    packed, peak = _packed(config.file), _peak()
    return Result(
        {**packed.content, "peak_resident_bytes": peak}, (*packed.lines, _peak_line(peak))
    )


def evaluate(config: pipeline.EvaluateConfig) -> Result:
    """Evaluates; the table of methods."""
    with ProgressBars() as progress:
        content = pipeline.evaluate(config, progress=progress)
    place = f"Evaluation: {config.out / files.EVALUATION}"
    return Result(content, (methods_table(content["methods"]), place))


def closed_loop(config: ClosedLoopConfig) -> Result:
    """Runs policies in the simulator; their success."""
    with ProgressBars() as progress:
        content = run_closed_loop(config, progress=progress)
    lines: list[str | Table] = [success_table(content["policies"])]
    for comparison in content["comparisons"]:
        lines += ["", comparison_table(comparison)]
        if comparison["drift"]:
            lines.append(drift_line(comparison["drift"]))
    lines.append(
        f"Episodes: {config.out / EPISODES_FILE}; summary: {config.out / files.CLOSED_LOOP}"
    )
    return Result(content, tuple(lines))


def collect(config: CollectConfig) -> Result:
    """Collects episodes; how many of each task there were."""
    with ProgressBars() as progress:
        collected = run_collect(config, progress=progress)
    table = Table("task", box=None, padding=(0, 1))
    for heading in ("run", "solved", "kept", "steps kept"):
        table.add_column(heading, justify="right")
    tasks = []
    for task in sorted({r.episode.task for r in collected.results}):
        found = [r for r in collected.results if r.episode.task == task]
        kept = [r for r in collected.kept if r.episode.task == task]
        counts = (len(found), sum(r.success for r in found), len(kept), sum(r.steps for r in kept))
        name = found[0].task_name.replace("_", " ")
        table.add_row(f"{task} {name}", *(f"{count:,}" for count in counts))
        keys = ("run", "solved", "kept", "steps_kept")
        tasks.append({"task": task, "name": name, **dict(zip(keys, counts, strict=True))})
    content = {"dataset": str(collected.folder), "tasks": tasks}
    return Result(content, (table, f"Data set: {collected.folder}"))


def report(config: pipeline.ReportConfig) -> Result:
    """Writes the report."""
    return _report(pipeline.report(config), config.out)


def train(config: Any) -> Result:
    """Trains a policy."""
    from qvla_jax.training import train as behaviour_cloning

    with ProgressBars() as progress:
        folder = behaviour_cloning(config, progress=progress)
    return Result({"policy": str(folder)}, (f"Policy: {folder}",))


def serve(config: ServeConfig) -> None:
    """Serves a policy until it is told to stop."""
    import jax.numpy as jnp

    from qvla_jax.inference import load_policy
    from qvla_jax.serving import serve as run_server

    config.read_token()  # whatever is wrong with it shall not take the time of loading
    if config.token_file is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"qvla: warning: everybody who reaches {config.host} can use this policy; --token-file "
            "names the token that clients have to send",
            file=sys.stderr,
        )
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBars())

        def ready(text: str) -> None:
            stack.close()  # the bars
            print(text, flush=True)

        policy = load_policy(
            config.policy, unnorm_key=config.unnorm_key, dtype=jnp.dtype(config.dtype)
        )
        run_server(policy, config, progress=progress, ready=ready)


def inspect(config: InspectConfig) -> Result:
    """What a policy or a file holds."""
    if config.model.endswith(".qvla"):
        return _packed(Path(config.model), layers=True)
    from qvla_jax.quantization.layout import uniform_bytes
    from qvla_jax.report.modules import describe, modules_table

    described = describe(config.model)
    index = described.index
    uniform = {bits: uniform_bytes(index, bits) for bits in (16, 8, 4, 3, 2)}
    content: dict[str, Any] = {
        "name": described.config.name,
        "source": described.source,
        "parameters": described.parameters,
        "stored_bytes": described.stored_bytes,
        "quantizable": {
            "layers": len(index.layers),
            "channels": len(index),
            "weights": index.num_weights,
            "bytes_by_uniform_bits": uniform,
        },
        "modules": [dataclasses.asdict(module) for module in described.modules],
    }
    lines: list[str | Table] = [
        f"{described.config.name} ({described.source})",
        f"{described.parameters:,} parameters in {described.stored_bytes:,} bytes; "
        f"{index.num_weights:,} of them are the weights of {len(index):,} quantizable output "
        f"channels of {len(index.layers)} layers",
    ]
    if config.fingerprint:
        from qvla_jax.inference import load_policy

        content["fingerprint"] = load_policy(config.model).fingerprint
        lines.append(f"fingerprint {content['fingerprint']}")
    table = Table("uniform bits", box=None)
    table.add_column("bytes of the quantized layers", justify="right")
    for bits, stored in uniform.items():
        table.add_row("source" if bits == 16 else str(bits), f"{stored:,}")
    lines += ["", modules_table(described.modules), "", table]
    return Result(content, tuple(lines))


def doctor(config: DoctorConfig) -> Result:
    """What works here, what is missing and how to get it; failed if the core lacks something."""
    del config
    from qvla_jax.doctor import checks

    made = list(checks())
    lines = [f"qvla_jax {__version__}, {platform.system()} {platform.machine()}"]
    for check in made:
        lines.append(f"{check.status:<8} {check.name}: {check.found}")
        if check.remedy:
            lines.append(f"{'':<8}   {check.remedy}")
    lacking = [check.name for check in made if check.needed and check.status != "ok"]
    content = {
        "version": __version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "checks": [dataclasses.asdict(check) for check in made],
    }
    failure = f"the core does not work without: {', '.join(lacking)}" if lacking else None
    return Result(content, tuple(lines), failure)


def _packed(path: Path, *, layers: bool = False) -> Result:
    """What a .qvla file holds, from its header."""
    from qvla_jax.checkpoints.packed_file import PackedFile

    file = PackedFile(path)
    entries = file.layers.values()
    weights = sum(entry.shape[0] * entry.shape[1] for entry in entries)
    channels: collections.Counter[int] = collections.Counter()
    described = []
    table = Table("layer", "shape", "channels by bits", box=None)
    table.add_column("stored", justify="right")
    for entry in entries:
        own = {s.bits: s.rows for s in entry.segments}
        if pruned := entry.shape[0] - sum(own.values()):
            own[0] = pruned
        channels.update(own)
        by_bits = {bits: own[bits] for bits in sorted(own, reverse=True)}
        counts = ", ".join(f"{bits}: {count}" for bits, count in by_bits.items())
        table.add_row(
            entry.path, f"{entry.shape[0]} × {entry.shape[1]}", counts, size_text(entry.nbytes)
        )
        described.append(
            {
                "path": entry.path,
                "shape": list(entry.shape),
                "channels_by_bits": by_bits,
                "stored_bytes": entry.nbytes,
            }
        )
    size, bits_per_weight = path.stat().st_size, 8 * file.packed_bytes / weights
    all_bits = {bits: channels[bits] for bits in sorted(channels, reverse=True)}
    content = {
        "file": str(path),
        "file_bytes": size,
        "quantized_weights": weights,
        "packed_bytes": file.packed_bytes,
        "other_bytes": file.other_bytes,
        "stored_bits_per_weight": bits_per_weight,
        "channels_by_bits": all_bits,
        "layers": described,
    }
    text = (
        f"{path}: {size_text(size)}; {len(file.layers)} packed layers of "
        f"{weights:,} weights store {file.packed_bytes:,} bytes, "
        f"{bits_per_weight:.3f} bits per weight; all else {file.other_bytes:,} bytes"
    )
    summary = ", ".join(f"{count:,} at {bits}" for bits, count in all_bits.items())
    lines = (text, f"channels by bits: {summary}")
    return Result(content, (table, *lines) if layers else lines)


def _report(content: Mapping[str, Any], folder: Path) -> Result:
    """A report's validation and its table of methods."""
    validation = content["validation"]
    lines: list[str | Table] = []
    if validation is not None:
        lines.append(spearman_line(validation, content["sensitivity"]["method"]))
    lines += [
        methods_table(content["methods"]),
        "",
        sweep_table([*content["methods"], *content["sweep"]]),
        content["packed"]["note"],
    ]
    if content["stages"] is not None:
        lines += ["", times_table(content["stages"]), ""]
    lines.append(f"Report: {folder / files.REPORT_HTML}")
    return Result(content, tuple(lines))
