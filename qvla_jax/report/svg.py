"""The few SVG shapes that the report draws with.

Colors are CSS classes and variables of the page, never literals, so that one figure serves the
light and dark themes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """Returns one element; names like `class_` and `font_size` become `class` and `font-size`."""
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_format(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{text}>{content}</{tag}>" if content else f"<{tag}{text}/>"


def label(content: str, x: float, y: float, **attributes: object) -> str:
    """Returns a text element with its content escaped."""
    return element("text", escape(content), x=x, y=y, **attributes)


def figure(width: float, height: float, parts: Iterable[str], *, title: str) -> str:
    """Returns a scalable SVG with a title for screen readers."""
    content = element("title", escape(title)) + "".join(parts)
    return element(
        "svg",
        content,
        viewBox=f"0 0 {_format(width)} {_format(height)}",
        role="img",
        aria_label=title,
        xmlns="http://www.w3.org/2000/svg",
    )


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to coordinates, and knows its ticks.

    Attributes:
        low: the value at `start`.
        high: the value at `end`.
        start: the coordinate of `low`.
        end: the coordinate of `high`.
        log: logarithmic; `low` must be positive.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the coordinate of a value; values outside are clipped to the ends."""
        low, high, value = (self._scale(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns about five to eight round values within the axis."""
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first + 1) / 8))
            return [10.0**exponent for exponent in range(first, last + 1, stride)]
        raw = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def span(
    values: Sequence[float], *, log: bool = False, margin: float = 0.06
) -> tuple[float, float]:
    """Returns the range of `values`, slightly widened."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    extra = margin * (high - low) or 0.5
    low, high = low - extra, high + extra
    return (10.0**low, 10.0**high) if log else (low, high)


def number(value: float) -> str:
    """Formats a number for display: three significant digits, powers of ten as such."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        text = f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"
        return f"{value:.0f}" if "e" in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    mantissa = mantissa.removesuffix(".0")
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _format(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
