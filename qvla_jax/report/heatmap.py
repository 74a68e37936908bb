"""The layer-by-channel map of sensitivities: a small PNG inside an SVG with the layers' names."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qvla_jax.array_typing import Float, NpArray
from qvla_jax.report.figures import margin_of
from qvla_jax.report.svg import Axis, element, figure, label, number

# Anchors of a perceptually uniform map from dark violet to yellow (after matplotlib's "magma").
_ANCHORS = np.array(
    [
        [12, 9, 38], [48, 17, 95], [96, 26, 128], [145, 43, 129], [194, 58, 116], [231, 91, 93],
        [250, 142, 96], [254, 193, 135], [252, 243, 191],
    ],
    np.float64,
)  # fmt: skip
_COLUMNS = 512


def heatmap(
    names: Sequence[str],
    layers: Sequence[Float[NpArray, " c"]],
    *,
    bounds: tuple[float, float],
    title: str,
) -> str:
    """Draws one row for each layer, its channels from the most to the least sensitive.

    Args:
        names: the layers' short names.
        layers: for each layer the cost of every channel at one bit-width. Rows are stretched to
            the same width, however many channels a layer has.
        bounds: costs of the darkest and the brightest color; values outside are clipped.
        title: text for screen readers.
    """
    rows = np.stack([_resample(np.sort(costs)[::-1]) for costs in layers])
    row, width, top = 14, 940, 46
    texts = [f"{name}  {len(costs)}" for name, costs in zip(names, layers, strict=True)]
    left = margin_of(texts)
    height = top + row * len(layers) + 4
    parts = [
        element(
            "image",
            href=_png(_shade(rows, bounds)),
            x=left,
            y=top,
            width=width - left,
            height=row * len(layers),
            preserveAspectRatio="none",
            style="image-rendering: pixelated",
        )
    ]
    for i, text in enumerate(texts):
        parts.append(label(text, left - 8, top + row * i + 10.5, class_="end mono"))
    parts += _colour_bar(bounds, left, width)
    return figure(width, height, parts, title=title)


def cost_bounds(costs: Float[NpArray, "..."]) -> tuple[float, float]:
    """Returns the range of costs to color: from the largest to four to eight decades below."""
    positive = costs[costs > 0]
    if not positive.size:
        return 1e-9, 1.0
    high = float(positive.max())
    low = float(np.quantile(positive, 0.02))
    return min(max(low, high * 1e-8), high * 1e-4), high


def _resample(costs: np.ndarray) -> np.ndarray:
    """Nearest-neighbor stretch of a row to a fixed number of columns."""
    return costs[np.arange(_COLUMNS) * len(costs) // _COLUMNS]


def _shade(rows: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    low, high = np.log10(bounds)
    share = (np.log10(np.maximum(rows, 1e-300)) - low) / (high - low)
    place = np.clip(share, 0, 1) * (len(_ANCHORS) - 1)
    index = np.minimum(place.astype(int), len(_ANCHORS) - 2)
    fraction = (place - index)[..., None]
    return ((1 - fraction) * _ANCHORS[index] + fraction * _ANCHORS[index + 1]).astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(128).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour_bar(bounds: tuple[float, float], left: float, width: int) -> list[str]:
    ramp = np.geomspace(*bounds, 256)[None]
    axis = Axis(*bounds, width - 380, width, log=True)
    parts = [
        element(
            "image",
            href=_png(_shade(ramp, bounds)),
            x=axis.start,
            y=4,
            width=380,
            height=9,
            preserveAspectRatio="none",
        ),
        label("most sensitive channel of the layer", left, 38),
        label("least sensitive", width, 38, class_="end"),
    ]
    for value in axis.ticks():
        place = axis(value)
        near_end = "end" if place > width - 20 else "middle" if place > axis.start + 20 else ""
        parts.append(label(number(value), place, 25, class_=near_end))
    return parts
