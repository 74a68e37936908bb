"""report.html: one file that opens from disk, in light and dark, on a screen or a phone."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from qvla_jax.array_typing import Float, NpArray
from qvla_jax.evaluation.latency import Latency
from qvla_jax.evaluation.results import MethodResult
from qvla_jax.evaluation.success import ClosedLoop
from qvla_jax.report import figures
from qvla_jax.report.closed_loop import Rollout, closed_loop_section
from qvla_jax.report.contents import Report
from qvla_jax.report.heatmap import cost_bounds, heatmap
from qvla_jax.report.svg import number
from qvla_jax.stage_times import StageSeconds


@dataclasses.dataclass(frozen=True)
class SensitivityMap:
    """What the heatmap shows: `costs[C, n]` of the channels, in layer order.

    Attributes:
        names: the layers' short names.
        offsets: first channel of each layer, and C at the end.
        bits: the n bit options.
        costs: sensitivities.
    """

    names: Sequence[str]
    offsets: Sequence[int]
    bits: Sequence[int]
    costs: Float[NpArray, "C n"]


def render(
    report: Report,
    sensitivity: SensitivityMap,
    *,
    rollouts: Sequence[Rollout] = (),
) -> str:
    """Returns the page for a report.

    Args:
        report: see docs/file_formats.md for its schema.
        sensitivity: what the heatmaps show.
        rollouts: videos of closed-loop episodes, if there are any.
    """
    style = resources.files("qvla_jax.report").joinpath("style.css").read_text("utf-8")
    budget = number(report.budget.bits_per_weight)
    title = f"{report.model.name} at {budget} bits per weight"
    sections = [
        _head(report, title),
        _cards(report),
        _methods(report),
        _curve(report),
        _read_front(report),
        closed_loop_section(report.closed_loop, rollouts) if report.closed_loop else "",
        _additivity_and_spearman(report),
        _heatmaps(sensitivity),
        _bits(report),
        _times(report),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def size_text(size: float) -> str:
    """Formats bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024 or unit == "MiB":
            return f"{size:,.0f} {unit}" if unit == "B" or size >= 100 else f"{size:,.2f} {unit}"
        size /= 1024
    raise AssertionError


def _head(report: Report, title: str) -> str:
    model, calibration, heldout = report.model, report.calibration, report.heldout
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="lead">{model.channels:,} output channels in {model.layers} layers, '
        f"calibrated on {calibration['frames']} frames of {escape(calibration['dataset'])} "
        f"({escape(calibration['split'])}) and measured on {heldout['frames']} other frames "
        f"({escape(heldout['split'])}). {escape(report.packed.note)}</p>\n"
    )


def _cards(report: Report) -> str:
    ours, uniform = report.ours, _by_family(report, "uniform")
    (full,) = (e for e in report.methods if e.family == "full")
    errors = ours.versus_full_precision
    cards = [
        (
            f"{full.stored_bytes / ours.stored_bytes:.1f}× smaller",
            f"{size_text(ours.stored_bytes)} instead of {size_text(full.stored_bytes)} for "
            "the quantized layers, scales, biases and index included",
        ),
        (
            number(errors.action_mse_normalized),
            "mean squared action error against full precision, normalized actions",
        ),
    ]
    matched = next((e for e in report.methods if e.matches_uniform_bits), ours)
    error = matched.versus_full_precision.action_mse_normalized
    if uniform is not None and error > 0:
        ratio = uniform.versus_full_precision.action_mse_normalized / error
        share = matched.stored_bytes / uniform.stored_bytes
        text = f"{number(ratio)}× less error" if ratio >= 1 else f"{number(1 / ratio)}× more error"
        cards.append((text, f"than {uniform.label}, at {share:.0%} of its bytes"))
    cards.append(
        (
            f"{errors.gripper_flip_rate:.2%}",
            "of gripper commands flipped against full precision",
        )
    )
    cards += _latency_card(report.latency) + _success_cards(report.closed_loop)
    inner = "".join(
        f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{inner}</div>\n'


def _latency_card(latency: Latency | None) -> list[tuple[str, str]]:
    if latency is None:
        return []
    full, packed = latency.full, latency.packed
    return [
        (
            f"{packed.median_ms:.1f} ms",
            f"for one chunk from packed weights (95th percentile {packed.p95_ms:.1f} ms); full "
            f"precision takes {full.median_ms:.1f} ms, {latency.speed_up:.2f} times as long, "
            "call by call in turn",
        )
    ]


def _success_cards(closed_loop: ClosedLoop | None) -> list[tuple[str, str]]:
    if closed_loop is None:
        return []
    reference, *others = closed_loop.policies
    full = f"the first policy {reference.overall.rate:.1%}"
    return [
        (
            f"{entry.overall.rate:.1%}",
            f"of {entry.overall.episodes} episodes solved by {entry.policy}, {full}",
        )
        for entry in others[:2]
    ]


def _methods(report: Report) -> str:
    heads = (
        "method", "stored", "bits per weight, all counted", "action MSE", "action L1",
        "worst entry", "gripper flips", "L1 to the expert",
    )  # fmt: skip
    styles, chosen = _styles(report), report.ours
    rows = "".join(
        _method_row(entry, styles[entry.series], report.action_names, best=entry is chosen)
        for entry in report.methods
    )
    return (
        "<h2>Methods</h2>"
        '<p class="note">Errors are against the full-precision policy on held-out frames, in the '
        "normalized action space; the last column is against the demonstrator.</p>"
        f'<figure><div class="scroll">{_table(heads, rows)}</div></figure>\n'
    )


def _method_row(entry: MethodResult, style: str, names: Sequence[str], *, best: bool) -> str:
    errors, expert = entry.versus_full_precision, entry.versus_expert
    worst = int(np.argmax(errors.worst_by_dimension))
    where = names[worst] if worst < len(names) else str(worst)
    full = entry.family == "full"
    cells = [
        f'<i class="dot {style}"></i>{escape(entry.label)}',
        size_text(entry.stored_bytes),
        f"{entry.stored_bits_per_weight:.2f}",
        "–" if full else number(errors.action_mse_normalized),
        "–" if full else number(errors.action_l1_normalized),
        "–" if full else f"{number(errors.worst_by_dimension[worst])} ({where})",
        "–" if full else f"{errors.gripper_flips} ({errors.gripper_flip_rate:.2%})",
        f"{expert.action_l1_normalized:.4f}",
    ]
    return f"<tr{' class=best' if best else ''}>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _curve(report: Report) -> str:
    entries = [e for e in (*report.methods, *report.sweep) if e.family != "full"]
    styles = _styles(report)
    chart = figures.error_against_bytes(
        entries, styles, mebibytes=max(e.stored_bytes for e in entries) > 64 * 2**20
    )
    return (
        "<h2>Action error against bytes</h2>"
        f"<figure>{_legend((e.series for e in entries), styles)}"
        f'<div class="scroll">{chart}</div><figcaption>Squared error of a chunk, summed over its '
        "entries and averaged over held-out frames, against full precision. Bytes are those of the "
        "packed layout: words, scales, biases and the channel index. Hover for values."
        "</figcaption></figure>\n"
        f"{_budgets(entries)}"
    )


def _read_front(report: Report) -> str:
    """Bytes stored against bytes read, where a call reads some weights more often than others."""
    if not report.front:
        return ""
    own = next(a for a in report.allocations if a.method == report.chosen)
    assert own.read_bytes is not None  # there is a front
    chart = figures.read_against_stored(
        report.front,
        (own.stored_bytes, own.read_bytes),
        mebibytes=max(p.read_bytes for p in report.front) > 64 * 2**20,
    )
    return (
        "<h2>Bytes read against bytes stored</h2>"
        f'<figure><div class="scroll">{chart}</div><figcaption>A call of this policy reads some '
        "weights several times, such as those of an action expert in every step. Each line holds "
        "allocations of one predicted error: that of a budget of bytes stored alone, which is its "
        "end with the fewest bytes stored. The large point is the chosen allocation. Hover for "
        "values.</figcaption></figure>\n"
    )


def _budgets(entries: Sequence[MethodResult]) -> str:
    """The curve as a table: action MSE of every series at every budget."""
    entries = [e for e in entries if not e.matches_uniform_bits]
    series = list(dict.fromkeys(e.series for e in entries))
    rows = []
    for bits in sorted({e.requested_bits for e in entries if e.requested_bits is not None}):
        cells = [f"{bits:g} bits"]
        for name in series:
            found = [e for e in entries if (e.series, e.requested_bits) == (name, bits)]
            error = "–"
            if found:
                error = number(found[0].versus_full_precision.action_mse_normalized)
            cells.append(error)
        rows.append(f"<tr>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    table = _table(("budget, or bits of the uniform grid", *series), "".join(rows))
    return (
        f'<figure><div class="scroll">{table}</div><figcaption>Action MSE against full precision. '
        "A budget counts everything stored; a uniform grid of the same name stores more, because "
        "its scales come on top.</figcaption></figure>\n"
    )


def _additivity_and_spearman(report: Report) -> str:
    points = [
        figures.AdditivityPoint(
            e.series,
            e.label,
            e.predicted_sse_normalized,
            e.versus_full_precision.action_sse_normalized,
        )
        for e in (*report.methods, *report.sweep)
        if e.family in ("ours", "other_solver") and e.predicted_sse_normalized is not None
    ]
    points = [p for p in points if p.predicted > 0 and p.measured > 0]
    styles = _styles(report)
    parts = ["<h2>Can the sensitivities be trusted?</h2>"]
    parts.append('<div class="columns">')
    validation = report.validation
    if validation is not None:
        rows = "".join(
            f"<tr><td>{row.bits} bits</td><td>{row.spearman:.4f}</td>"
            f"<td>{table.spearman:.4f}</td></tr>"
            for row, table in zip(validation.spearman, validation.spearman_table, strict=True)
        )
        parts.append(
            f"<figure>{_table(('Spearman rank correlation', 'same frames', 'whole table'), rows)}"
            f"<figcaption>{escape(report.sensitivity.method)} against the exact sensitivity "
            f"of {validation.channels} channels drawn from all layers, on "
            f"{validation.frames} calibration frames: computed on these frames, and as it is in "
            "the table that the allocation used, an average over all calibration frames."
            "</figcaption></figure>"
        )
    if points:
        parts.append(
            f"<figure>{_legend((p.series for p in points), styles)}"
            f"{figures.predicted_against_measured(points, styles)}"
            "<figcaption>Summed squared error of a chunk: the sum of the chosen channels' "
            "sensitivities, and what the jointly quantized policy really shows on held-out frames. "
            "Dashed: equal; faint: a factor of four.</figcaption></figure>"
        )
    return "".join(parts) + "</div>\n"


def _heatmaps(sensitivity: SensitivityMap) -> str:
    finite = [i for i, bits in enumerate(sensitivity.bits) if bits < 16]
    bounds = cost_bounds(sensitivity.costs[:, finite])
    inputs = []
    views = []
    rules = []
    shown = 2 if 2 in [sensitivity.bits[i] for i in finite] else sensitivity.bits[finite[0]]
    for i in finite:
        bits = sensitivity.bits[i]
        name = "pruned (0 bits)" if bits == 0 else f"{bits} bits"
        layers = [
            sensitivity.costs[a:b, i]
            for a, b in zip(sensitivity.offsets[:-1], sensitivity.offsets[1:], strict=True)
        ]
        checked = " checked" if bits == shown else ""
        inputs.append(
            f'<input type="radio" name="map" id="map{bits}"{checked}>'
            f'<label for="map{bits}">{name}</label>'
        )
        image = heatmap(
            sensitivity.names,
            layers,
            bounds=bounds,
            title=f"Sensitivity of every channel at {name}",
        )
        views.append(f'<div class="view scroll" id="view{bits}">{image}</div>')
        rules.append(f"#map{bits}:checked ~ #view{bits} {{ display: block; }}")
    return (
        "<h2>Sensitivity of every channel</h2>"
        f"<style>{' '.join(rules)}</style>"
        f'<figure><div class="views">{"".join(inputs)}{"".join(views)}</div>'
        "<figcaption>Squared error of the normalized action chunk when this one channel is "
        "quantized. Each row is a layer (and its number of channels), stretched to the same width."
        "</figcaption></figure>\n"
    )


def _bits(report: Report) -> str:
    widths = sorted({int(b) for layer in report.layers for b in layer.channels_by_bits})
    legend = "".join(
        f'<span><i class="dot b{b}"></i>{"pruned" if b == 0 else f"{b} bits"}</span>'
        for b in widths
    )
    return (
        "<h2>Bits chosen</h2>"
        f'<figure><div class="legend">{legend}</div>'
        f'<div class="scroll">{figures.bit_histogram(report.layers)}</div>'
        "<figcaption>Share of each layer's channels at each bit-width "
        f"({escape(report.ours.label)}); "
        "on the right the mean, without scales and index.</figcaption></figure>\n"
    )


def _times(report: Report) -> str:
    """Where the time of the run went; nothing where the stages ran one by one."""
    if report.stages is None:
        return ""
    rows = "".join(
        f"<tr{' class=best' if name == 'all' else ''}><td>{escape(name)}</td>"
        f"{''.join(f'<td>{value:,.1f}</td>' for value in values)}</tr>"
        for name, *values in stage_rows(report.stages)
    )
    heads = ("stage", "seconds", "of these compiling", "seconds of all cores")
    return (
        "<h2>Where the time goes</h2>"
        f'<figure><div class="scroll">{_table(heads, rows)}</div><figcaption>Stages of the run up '
        "to this report. XLA compiles a program when it is first used.</figcaption></figure>\n"
    )


def stage_rows(
    stages: Sequence[StageSeconds],
) -> list[tuple[str, float, float, float]]:
    """Name, seconds, seconds of compiling and CPU seconds of each stage, and of all together."""
    rows = [(s.stage, s.seconds, s.compiling, s.cpu) for s in stages]
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    return [*rows, ("all", total[0], total[1], total[2])]


def _provenance(report: Report) -> str:
    made, sensitivity = report.provenance, report.sensitivity
    device = made["device"]
    items = {
        "policy": f"{report.model.name}, fingerprint {report.model.fingerprint[:16]}",
        "calibration": _frames_text(report.calibration),
        "held out": _frames_text(report.heldout),
        "sensitivity": f"{sensitivity.method}, bits {list(sensitivity.bits)}",
        "seed": made["seed"],
        "device": f"{device['count']} × {device['kind']} ({device['platform']})",
        "commit": made["commit"] or "not from a checkout",
        "Python": made["python"],
        "packages": ", ".join(f"{k} {v}" for k, v in made["packages"].items()),
        "seconds": ", ".join(f"{k} {v:.1f}" for k, v in vars(report.seconds).items() if v),
        "made": report.created,
    }
    inner = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items() if v is not None
    )
    return f"<h2>Provenance</h2><figure><dl>{inner}</dl></figure>\n"


def _frames_text(frames: Mapping[str, Any]) -> str:
    return (
        f"{frames['frames']} frames of {frames['dataset']} {frames['version']}, {frames['split']} "
        f"split, {frames['episodes']} episodes, manifest {frames['hash'][:16]}"
    )


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _legend(names: Iterable[str], styles: Mapping[str, str]) -> str:
    inner = "".join(
        f'<span><i class="dot {styles[series]}"></i>{escape(series)}</span>'
        for series in dict.fromkeys(names)
    )
    return f'<div class="legend">{inner}</div>'


def _styles(report: Report) -> dict[str, str]:
    """The color of every series, the same throughout the page."""
    return figures.styles_of((e.series, e.family) for e in (*report.methods, *report.sweep))


def _by_family(report: Report, family: str) -> MethodResult | None:
    return next((e for e in report.methods if e.family == family), None)
