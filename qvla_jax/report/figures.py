"""The figures of the report, as SVG that takes its colors from the page."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from qvla_jax.evaluation.results import Family, MethodResult
from qvla_jax.quantization.allocation import FrontPoint
from qvla_jax.report.contents import LayerFacts
from qvla_jax.report.svg import Axis, element, figure, label, number, span

# CSS class of the first series of each family of methods.
STYLES = {
    "ours": "ours",
    "other_solver": "qvla",
    "baseline": "hessian",
    "uniform": "uniform",
    "full": "full",
}
# For series without their own color, in this order, then starting over.
MORE_STYLES = ("violet", "gold", "rose", "teal", "brown")


@dataclasses.dataclass(frozen=True)
class AdditivityPoint:
    """An allocation's summed sensitivities and its measured joint error, both positive."""

    series: str
    label: str
    predicted: float
    measured: float


def styles_of(families: Iterable[tuple[str, Family]]) -> dict[str, str]:
    """Series -> CSS class: that of its family for the first one, another for those after it.

    Args:
        families: the series and family of each entry.
    """
    styles: dict[str, str] = {}
    more = itertools.cycle(MORE_STYLES)
    for series, family in families:
        if series not in styles:
            own = STYLES[family]
            styles[series] = next(more) if own in styles.values() else own
    return styles


def margin_of(names: Iterable[str]) -> float:
    """Width that names need on the left of a figure, in the small fixed font (`mono`)."""
    return 14 + 5.8 * max(map(len, names))


def error_against_bytes(
    entries: Sequence[MethodResult], styles: Mapping[str, str], *, mebibytes: bool = False
) -> str:
    """Draws measured action error (log) against the bytes actually stored, one line per series.

    Args:
        entries: evaluated methods, as in report.json's `methods` and `sweep`.
        styles: CSS class of each series.
        mebibytes: unit of the horizontal axis; kibibytes otherwise.
    """
    unit, name = (2**20, "MiB") if mebibytes else (2**10, "KiB")
    points = [
        (e.stored_bytes / unit, e.versus_full_precision.action_sse_normalized, e)
        for e in entries
        if e.versus_full_precision.action_sse_normalized > 0
    ]
    width, height, left, bottom = 940, 400, 62, 46
    x = Axis(*span([p[0] for p in points], margin=0.04), left, width - 14)
    y = Axis(*span([p[1] for p in points], log=True), height - bottom, 12, log=True)
    parts = _frame(x, y, width, height, bottom, f"bytes stored for the quantized layers ({name})")
    for series in dict.fromkeys(p[2].series for p in points):
        line = sorted((p[0], p[1], p[2].label) for p in points if p[2].series == series)
        style = styles[series]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in line)
        parts.append(element("polyline", points=path, class_=f"series {style}"))
        for size, error, text in line:
            tip = element("title", f"{text}: {number(error)} at {size:,.0f} {name}")
            parts.append(
                element("circle", tip, cx=x(size), cy=y(error), r=4.5, class_=f"point {style}")
            )
    return figure(width, height, parts, title="Action error against stored bytes")


def read_against_stored(
    points: Sequence[FrontPoint], chosen: tuple[int, int], *, mebibytes: bool = False
) -> str:
    """Draws bytes read in a call against bytes stored, a line for each predicted error.

    Args:
        points: of `allocation.read_front`, not empty.
        chosen: bytes stored and read by the run's own allocation.
        mebibytes: unit of both axes; kibibytes otherwise.
    """
    unit, name = (2**20, "MiB") if mebibytes else (2**10, "KiB")
    width, height, left, bottom = 940, 400, 62, 46
    stored = [chosen[0] / unit, *(p.stored_bytes / unit for p in points)]
    read = [chosen[1] / unit, *(p.read_bytes / unit for p in points)]
    x = Axis(*span(stored, margin=0.06), left, width - 14)
    y = Axis(*span(read, margin=0.06), height - bottom, 12)
    caption = f"bytes stored for the quantized layers ({name}); upward: read in a call ({name})"
    parts = _frame(x, y, width, height, bottom, caption)
    for bits, group in itertools.groupby(points, lambda p: p.budget_bits):
        line = list(group)
        places = [(x(p.stored_bytes / unit), y(p.read_bytes / unit)) for p in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(element("polyline", points=path, class_="series qvla"))
        parts.append(label(f"error of {bits:g} bits", places[0][0] + 6, places[0][1] - 4))
        for p, (a, b) in zip(line, places, strict=True):
            sizes = f"{p.stored_bytes / unit:,.0f} {name} stored, {p.read_bytes / unit:,.0f} read"
            tip = element("title", f"{number(p.cost)} with {sizes}")
            parts.append(element("circle", tip, cx=a, cy=b, r=3.5, class_="point qvla"))
    tip = element("title", "chosen")
    place = dict(cx=x(chosen[0] / unit), cy=y(chosen[1] / unit))
    parts.append(element("circle", tip, **place, r=6, class_="point ours"))
    return figure(width, height, parts, title="Bytes read against bytes stored")


def predicted_against_measured(points: Sequence[AdditivityPoint], styles: Mapping[str, str]) -> str:
    """Draws the summed sensitivities of each allocation against its measured joint error.

    Args:
        points: at least one.
        styles: CSS class of each series.
    """
    width, height, left, bottom = 460, 380, 60, 46
    bounds = span(
        [p.predicted for p in points] + [p.measured for p in points], log=True, margin=0.08
    )
    x = Axis(*bounds, left, width - 14, log=True)
    y = Axis(*bounds, height - bottom, 12, log=True)
    parts = _frame(x, y, width, height, bottom, "predicted: sum of sensitivities")
    low, high = bounds
    for factor, style in ((1.0, "equal"), (4.0, "grid"), (0.25, "grid")):
        begin, end = max(low, low / factor), min(high, high / factor)
        parts.append(
            element(
                "line",
                x1=x(begin),
                y1=y(begin * factor),
                x2=x(end),
                y2=y(end * factor),
                class_=style,
            )
        )
    for p in points:
        tip = element("title", f"{p.label}: {number(p.predicted)} → {number(p.measured)}")
        style = styles[p.series]
        parts.append(
            element(
                "circle",
                tip,
                cx=x(p.predicted),
                cy=y(p.measured),
                r=5,
                class_=f"point {style}",
            )
        )
    return figure(width, height, parts, title="Predicted and measured joint error")


def bit_histogram(layers: Sequence[LayerFacts]) -> str:
    """Draws one bar for each layer: the share of its channels at each bit-width."""
    row, width, right, top = 14, 940, 54, 22
    left = margin_of(layer.name for layer in layers)
    height = top + row * len(layers) + 4
    x = Axis(0, 1, left, width - right)
    parts = [
        label(f"{share:.0%}", x(share), 12, class_="middle") for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(label("bits", width - 4, 12, class_="end"))
    for number_, layer in enumerate(layers):
        y = top + row * number_
        total = sum(layer.channels_by_bits.values())
        parts.append(label(layer.name, left - 8, y + 9.5, class_="end mono"))
        done = 0
        for bits, count in sorted(layer.channels_by_bits.items(), key=lambda kv: int(kv[0])):
            if count:
                tip = element("title", f"{layer.path}: {count} of {total} channels at {bits} bits")
                begin, end = x(done / total), x((done + count) / total)
                parts.append(
                    element(
                        "rect",
                        tip,
                        x=begin,
                        y=y,
                        width=end - begin,
                        height=row - 3,
                        class_=f"b{bits}",
                    )
                )
            done += count
        parts.append(label(f"{layer.average_bits:.2f}", width - 4, y + 9.5, class_="end mono"))
    return figure(width, height, parts, title="Bits chosen in each layer")


def _frame(x: Axis, y: Axis, width: int, height: int, bottom: int, caption: str) -> list[str]:
    """Grid lines, tick labels and the caption of the horizontal axis."""
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(element("line", x1=x.start, y1=at, x2=x.end, y2=at, class_="grid"))
        parts.append(label(number(value), x.start - 8, at + 4, class_="end"))
    for value in x.ticks():
        at = x(value)
        text = number(value) if x.log else f"{value:,g}"
        parts.append(element("line", x1=at, y1=y.start, x2=at, y2=y.end, class_="grid"))
        parts.append(label(text, at, height - bottom + 17, class_="middle"))
    parts.append(element("line", x1=x.start, y1=y.start, x2=x.end, y2=y.start, class_="axis"))
    parts.append(label(caption, (x.start + x.end) / 2, height - 6, class_="middle"))
    return parts
