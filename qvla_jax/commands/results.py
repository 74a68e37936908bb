"""Results that several commands share: a packed file, a report, a written folder."""

import collections
import resource
from pathlib import Path

from rich.table import Table

from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.output import Result
from qvla_jax.pipeline import files
from qvla_jax.plain import to_plain
from qvla_jax.report.contents import Report
from qvla_jax.report.page import size_text
from qvla_jax.report.terminal import methods_table, spearman_line, sweep_table, times_table


def written(folder: Path) -> Result:
    """Where a policy was written, and the peak resident memory."""
    peak = peak_memory()
    return Result(
        {"policy": str(folder), "peak_resident_bytes": peak}, (f"{folder}; {peak_line(peak)}",)
    )


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_line(peak: int) -> str:
    """The same in words."""
    return f"peak resident memory {peak / 2**30:.2f} GiB"


def packed(path: Path, *, layers: bool = False) -> Result:
    """What a .qvla file holds, from its header."""
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


def report(content: Report, folder: Path) -> Result:
    """A report's validation and its table of methods."""
    lines: list[str | Table] = []
    if content.validation is not None:
        lines.append(spearman_line(content.validation, content.sensitivity.method))
    lines += [
        methods_table(content.methods),
        "",
        sweep_table([*content.methods, *content.sweep]),
        content.packed.note,
    ]
    if content.stages is not None:
        lines += ["", times_table(content.stages), ""]
    lines.append(f"Report: {folder / files.REPORT_HTML}")
    return Result(to_plain(content), tuple(lines))
