"""What the subcommands do: run a stage with progress bars, then say what came out."""

import collections
import contextlib
import dataclasses
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from qvla_jax import __version__, pipeline, sharding
from qvla_jax.errors import QvlaError
from qvla_jax.pipeline import files
from qvla_jax.pipeline.closed_loop import EPISODES_FILE, ClosedLoopConfig
from qvla_jax.pipeline.closed_loop import closed_loop as run_closed_loop
from qvla_jax.pipeline.collect import CollectConfig
from qvla_jax.pipeline.collect import collect as run_collect
from qvla_jax.progress import ProgressBars
from qvla_jax.report.page import size_text
from qvla_jax.report.study import study_tables
from qvla_jax.report.svg import number
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


def export(config: ExportConfig) -> None:
    """Exports a policy and prints the peak resident memory."""
    from qvla_jax.checkpoints.export import reexport
    from qvla_jax.checkpoints.huggingface import is_huggingface
    from qvla_jax.inference import load_policy

    if config.dtype is None and is_huggingface(Path(config.model)):
        reexport(Path(config.model), config.out)
    else:
        import jax.numpy as jnp

        policy = load_policy(config.model, unnorm_key=config.unnorm_key)
        policy.export(config.out, dtype=config.dtype and jnp.dtype(config.dtype))
    _say(f"{config.out}; {_peak()}")


def import_(config: ImportConfig) -> None:
    """Imports a public directory and prints the peak resident memory."""
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
    _say(f"{config.out}; {_peak()}")


def _peak() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"peak resident memory {peak / 2**20:.2f} GiB"


def synthesize(config: SynthesizeConfig) -> None:
    """Writes a synthetic directory."""
    from qvla_jax.checkpoints.export import synthesize as write
    from qvla_jax.config import preset
    from qvla_jax.inference.word_tokenizer import word_tokenizer

    write(preset(config.preset), config.out, seed=config.seed)
    word_tokenizer().save(str(config.out / "tokenizer.json"))
    _say(f"{config.out}: {config.preset} with random weights")


def run(config: pipeline.RunConfig) -> None:
    """Runs the whole walk and prints the table of methods."""
    with ProgressBars() as progress:
        content = pipeline.run(config, progress=progress)
    show_report(content)
    _say(f"Report: {config.out / files.REPORT_HTML}")


def calibrate(config: pipeline.CalibrateConfig) -> None:
    """Draws the calibration frames."""
    with ProgressBars() as progress:
        drawn = pipeline.calibrate(config, progress=progress)
    sources = drawn.manifest["sources"]
    for place, source in enumerate(sources if len(sources) > 1 else ()):
        steps = [episode for at, episode in drawn.episode_keys if at == place]
        _say(
            f"{source['dataset']} ({source['split']}): {len(steps)} frames of {len(set(steps))} "
            "episodes"
        )
    if left_out := drawn.manifest["left_out"]:
        _say(f"Too small a share for a frame: {', '.join(left_out)}")
    found = drawn.describe()
    name = f"{found['dataset']}, {found['split']}" if len(sources) == 1 else "all"
    _say(
        f"{drawn.frames} frames of {found['episodes']} episodes ({name}): "
        f"{config.out / files.CALIBRATION}"
    )


def sensitivity(config: SensitivityConfig) -> None:
    """Measures the sensitivities."""
    if config.coordinator is not None:
        sharding.join_processes(config.coordinator, config.processes, config.process)
    with ProgressBars() as progress:
        validation = pipeline.sensitivity(config, progress=progress)
    if not sharding.is_main_process():
        return
    if validation is not None:
        _say(spearman_line(validation, config.method))
    _say(f"Sensitivities: {config.out / files.SENSITIVITY}")


def validate(config: pipeline.ValidateConfig) -> None:
    """Studies the sensitivities and prints what was found."""
    with ProgressBars() as progress:
        study = pipeline.validate(config, progress=progress)
    for table in study_tables(study):
        _print(table)
        _say("")
    _say(f"Study: {config.out / files.STUDY}, {config.out / files.STUDY_FIGURE}")


def allocate(config: pipeline.AllocateConfig) -> None:
    """Allocates bits and prints what each solver reached."""
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
    _print(table)
    _say(f"Allocation: {config.out / files.ALLOCATION}")


def compare_solvers(config: pipeline.CompareSolversConfig) -> None:
    """Prints the table of solvers, and says where the figure lies."""
    with ProgressBars() as progress:
        comparison = pipeline.compare_solvers(config, progress=progress)
    _say(str(comparison))
    if config.figure is not None:
        _say(f"Pareto figure: {config.figure}")


def measure_solvers(config: pipeline.MeasureSolversConfig) -> None:
    """Measures the solvers' allocations and prints the table."""
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
    _print(table)
    _say("The paired change is that of the held-out error against the first solver's allocation.")


def quantize(config: pipeline.QuantizeConfig) -> None:
    """Packs the chosen allocation."""
    with ProgressBars() as progress:
        pipeline.quantize(config, progress=progress)
    show_packed(config.out / files.POLICY)


def quantize_by_methods(config: pipeline.MethodConfig) -> None:
    """Quantizes by methods' names."""
    with ProgressBars() as progress:
        written = pipeline.quantize_by_methods(config, progress=progress)
    for path in written.values():
        show_packed(path)


def study(config: pipeline.StudyConfig) -> None:
    """Makes the table of results and prints it."""
    with ProgressBars() as progress:
        pipeline.study(config, progress=progress)
    _say((config.out / files.RESULTS_TABLE).read_text("utf-8"))
    _say(f"Results: {config.out / files.RESULTS}, {config.out / files.RESULTS_TABLE}")


def pack(config: pipeline.PackConfig) -> None:
    """Packs a policy and prints the peak resident memory."""
    with ProgressBars() as progress:
        pipeline.pack(config, progress=progress)
    show_packed(config.file)
    _say(_peak())


def evaluate(config: pipeline.EvaluateConfig) -> None:
    """Evaluates and prints the table of methods."""
    with ProgressBars() as progress:
        content = pipeline.evaluate(config, progress=progress)
    _print(methods_table(content["methods"]))
    _say(f"Evaluation: {config.out / files.EVALUATION}")


def closed_loop(config: ClosedLoopConfig) -> None:
    """Runs policies in the simulator and prints their success."""
    with ProgressBars() as progress:
        content = run_closed_loop(config, progress=progress)
    _print(success_table(content["policies"]))
    for comparison in content["comparisons"]:
        _say("")
        _print(comparison_table(comparison))
        if comparison["drift"]:
            _say(drift_line(comparison["drift"]))
    _say(f"Episodes: {config.out / EPISODES_FILE}; summary: {config.out / files.CLOSED_LOOP}")


def collect(config: CollectConfig) -> None:
    """Collects episodes and prints how many of each task there were."""
    with ProgressBars() as progress:
        collected = run_collect(config, progress=progress)
    table = Table("task", box=None, padding=(0, 1))
    for heading in ("run", "solved", "kept", "steps kept"):
        table.add_column(heading, justify="right")
    for task in sorted({r.episode.task for r in collected.results}):
        found = [r for r in collected.results if r.episode.task == task]
        kept = [r for r in collected.kept if r.episode.task == task]
        counts = (len(found), sum(r.success for r in found), len(kept), sum(r.steps for r in kept))
        name = found[0].task_name.replace("_", " ")
        table.add_row(f"{task} {name}", *(f"{count:,}" for count in counts))
    _print(table)
    _say(f"Data set: {collected.folder}")


def report(config: pipeline.ReportConfig) -> None:
    """Writes the report."""
    show_report(pipeline.report(config))
    _say(f"Report: {config.out / files.REPORT_HTML}")


def train(config: Any) -> None:
    """Trains a policy."""
    from qvla_jax.training import train as behaviour_cloning

    with ProgressBars() as progress:
        behaviour_cloning(config, progress=progress)


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


def inspect(config: InspectConfig) -> None:
    """Prints what a policy or a file holds."""
    if config.model.endswith(".qvla"):
        show_packed(Path(config.model), layers=True)
        return
    from qvla_jax.quantization.layout import uniform_bytes
    from qvla_jax.report.modules import describe, modules_table

    described = describe(config.model)
    index = described.index
    _say(f"{described.config.name} ({described.source})")
    _say(
        f"{described.parameters:,} parameters in {described.stored_bytes:,} bytes; "
        f"{index.num_weights:,} of them are the weights of {len(index):,} quantizable output "
        f"channels of {len(index.layers)} layers"
    )
    if config.fingerprint:
        from qvla_jax.inference import load_policy

        _say(f"fingerprint {load_policy(config.model).fingerprint}")
    _say("")
    _print(modules_table(described.modules))
    _say("")
    table = Table("uniform bits", box=None)
    table.add_column("bytes of the quantized layers", justify="right")
    for bits in (16, 8, 4, 3, 2):
        label = "source" if bits == 16 else str(bits)
        table.add_row(label, f"{uniform_bytes(index, bits):,}")
    _print(table)


def doctor(config: DoctorConfig) -> None:
    """Prints what works here, what is missing and how to get it.

    Raises:
        QvlaError: Something that the core needs is missing.
    """
    del config
    from qvla_jax.doctor import checks

    _say(f"qvla_jax {__version__}, {platform.system()} {platform.machine()}")
    lacking = []
    for check in checks():
        _say(f"{check.status:<8} {check.name}: {check.found}")
        if check.remedy:
            _say(f"{'':<8}   {check.remedy}")
        if check.needed and check.status != "ok":
            lacking.append(check.name)
    if lacking:
        raise QvlaError(f"the core does not work without: {', '.join(lacking)}")


def show_packed(path: Path, *, layers: bool = False) -> None:
    """Prints what a .qvla file holds, from its header."""
    from qvla_jax.checkpoints.packed_file import PackedFile

    file = PackedFile(path)
    entries = file.layers.values()
    weights = sum(entry.shape[0] * entry.shape[1] for entry in entries)
    channels: collections.Counter[int] = collections.Counter()
    table = Table("layer", "shape", "channels by bits", box=None)
    table.add_column("stored", justify="right")
    for entry in entries:
        own = {s.bits: s.rows for s in entry.segments}
        if pruned := entry.shape[0] - sum(own.values()):
            own[0] = pruned
        channels.update(own)
        counts = ", ".join(f"{bits}: {own[bits]}" for bits in sorted(own, reverse=True))
        shape = f"{entry.shape[0]} × {entry.shape[1]}"
        table.add_row(entry.path, shape, counts, size_text(entry.nbytes))
    if layers:
        _print(table)
    by_bits = ", ".join(f"{channels[b]:,} at {b}" for b in sorted(channels, reverse=True))
    _say(
        f"{path}: {size_text(path.stat().st_size)}; {len(file.layers)} packed layers of "
        f"{weights:,} weights store {file.packed_bytes:,} bytes, "
        f"{8 * file.packed_bytes / weights:.3f} bits per weight; all else {file.other_bytes:,} "
        "bytes"
    )
    _say(f"channels by bits: {by_bits}")


def show_report(content: Mapping[str, Any]) -> None:
    """Prints a report's validation and its table of methods."""
    if content["validation"] is not None:
        _say(spearman_line(content["validation"], content["sensitivity"]["method"]))
    _print(methods_table(content["methods"]))
    _say("")
    _print(sweep_table([*content["methods"], *content["sweep"]]))
    _say(content["packed"]["note"])


def spearman_line(validation: Mapping[str, Any], method: str) -> str:
    """Returns the rank correlations in one line."""
    ranks = ", ".join(f"{r['spearman']:.4f} at {r['bits']} bits" for r in validation["spearman"])
    return f"Spearman({method}, exact) on {validation['channels']} channels: {ranks}"


def methods_table(entries: list[Mapping[str, Any]]) -> Table:
    """Returns the table of methods: bytes, bits and errors."""
    table = Table("method", box=None, padding=(0, 1))
    for heading in ("stored", "bits/weight", "MSE", "L1", "worst", "grip flips", "L1 expert"):
        table.add_column(heading, justify="right")
    for e in entries:
        errors, expert = e["versus_full_precision"], e["versus_expert"]
        full = e["family"] == "full"
        table.add_row(
            e["label"],
            size_text(e["stored_bytes"]),
            f"{e['stored_bits_per_weight']:.2f}",
            "-" if full else number(errors["action_mse_normalized"]),
            "-" if full else number(errors["action_l1_normalized"]),
            "-" if full else number(max(errors["worst_by_dimension"])),
            "-" if full else f"{errors['gripper_flip_rate']:.2%}",
            f"{expert['action_l1_normalized']:.4f}",
        )
    return table


def success_table(policies: list[Mapping[str, Any]]) -> Table:
    """Returns the success of each policy, per task and overall, with Wilson's 95 % intervals."""
    table = Table("success (95 % interval)", box=None, padding=(0, 1))
    for entry in policies:
        table.add_column(entry["policy"], justify="right")
    for rows in zip(*(entry["tasks"] for entry in policies), strict=True):
        table.add_row(
            f"{rows[0]['task']} {rows[0]['task_name'].replace('_', ' ')}",
            *(success_text(row) for row in rows),
        )
    table.add_row("all", *(success_text(entry["overall"]) for entry in policies))
    return table


def success_text(success: Mapping[str, Any]) -> str:
    """Returns a success rate with its counts and its interval."""
    low, high = success["interval_95"]
    return (
        f"{success['successes']}/{success['episodes']} = {success['rate']:.1%} "
        f"({low:.0%} to {high:.0%})"
    )


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Returns a paired comparison, per task and overall."""
    table = Table(
        f"{comparison['candidate']} against {comparison['reference']}", box=None, padding=(0, 1)
    )
    for heading in ("pairs", "only it solves", "only the other", "difference (95 %)", "p, McNemar"):
        table.add_column(heading, justify="right")
    rows = [(str(row["task"]), row) for row in comparison["tasks"]]
    for label, row in [*rows, ("all", comparison["overall"])]:
        low, high = row["interval_95"]
        table.add_row(
            label,
            str(row["episodes"]),
            str(row["candidate_only"]),
            str(row["reference_only"]),
            f"{row['difference']:+.1%} ({low:+.0%} to {high:+.0%})",
            f"{row['mcnemar_exact_p']:.3g}",
        )
    return table


def drift_line(drift: Mapping[str, Any]) -> str:
    """Returns how far a policy drifts from the reference, in words."""
    at = min(range(len(drift["seconds"])), key=lambda k: abs(drift["seconds"][k] - 2.0))
    text = (
        f"End effectors after {drift['seconds'][at]:.1f} s: "
        f"{100 * drift['distance_median'][at]:.1f}"
        f" cm apart (median of {drift['pairs'][at]} pairs)"
    )
    if drift["deviation_total"] is None:
        return text
    error = drift["deviation_standard_error"]
    spread = "" if error is None else f" ± {number(error)}"
    return (
        f"{text}; action deviation accumulated along the reference's rollouts: "
        f"{number(drift['deviation_total'])}{spread} ({drift['deviation_episodes']} episodes)"
    )


def sweep_table(entries: list[Mapping[str, Any]]) -> Table:
    """Returns our errors over the budgets: measured, predicted, and beside a uniform grid's.

    A grid is compared where its stored bytes were the budget.
    """
    uniform = {e["requested_bits"]: e for e in entries if e["family"] == "uniform"}
    table = Table("budget", box=None, padding=(0, 1))
    for heading in ("stored", "MSE", "uniform MSE", "times less", "SSE predicted", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("ratio", justify="right")
    ours = [e for e in entries if e["family"] == "ours"]
    for e in sorted(ours, key=lambda e: e["stored_bytes"]):
        errors = e["versus_full_precision"]
        mse, sse = errors["action_mse_normalized"], errors["action_sse_normalized"]
        predicted, bits = e["predicted_sse_normalized"], e.get("matches_uniform_bits")
        other = times = "-"
        if bits in uniform:
            grid = uniform[bits]["versus_full_precision"]["action_mse_normalized"]
            other, times = number(grid), number(grid / mse) if mse else "-"
        table.add_row(
            f"{e['requested_bits']:g} bits" if bits is None else f"uniform {bits} bits",
            size_text(e["stored_bytes"]),
            number(mse),
            other,
            times,
            number(predicted),
            number(sse),
            number(sse / predicted) if predicted else "-",
        )
    return table


def _say(text: str) -> None:
    print(text)


def _print(table: Table) -> None:
    # A fixed width where there is no terminal, so that piped output is not folded at 80 columns.
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=140)
    console.print(table)
