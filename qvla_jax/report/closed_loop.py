"""The report's section on closed-loop episodes: success, drift, and rollouts to look at."""

import base64
import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qvla_jax.evaluation.success import ClosedLoop, PolicyComparison, PolicySuccess
from qvla_jax.report.figures import MORE_STYLES, margin_of
from qvla_jax.report.svg import Axis, element, figure, label, number, span

# Colors of the policies, after the page's families; the first policy is the reference.
_COLOURS = ("full", "ours", "qvla", "hessian", "uniform", *MORE_STYLES)
# Rollouts are embedded in the page: few enough that it still opens quickly on a phone.
_MOST_VIDEOS, _MOST_VIDEO_BYTES = 8, 6 * 2**20


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A video (mp4) of one episode, and what to write below it."""

    path: Path
    caption: str


def closed_loop_section(summary: ClosedLoop, rollouts: Sequence[Rollout] = ()) -> str:
    """Returns the section for a closed_loop.json (see docs/closed_loop.md).

    Args:
        summary: its content.
        rollouts: videos, the most informative first; those that would make the page too large are
            left out.
    """
    episodes = summary.policies[0].overall.episodes
    parts = [
        "<h2>Success in closed loop</h2>",
        f'<p class="note">{escape(summary.suite)} in the simulator, {episodes} episodes of the '
        f"reference from official initial states, {summary.settings.open_loop_steps} actions "
        "executed before the policy is asked again; every policy on the same episodes.</p>",
        f'<figure><div class="scroll">{_success_chart(summary.policies)}</div>'
        f'<div class="scroll">{_success_table(summary)}</div><figcaption>Share of solved episodes '
        "with Wilson&#39;s 95 % interval; the paired difference to the first policy with "
        "Newcombe&#39;s interval, and the p-value of McNemar&#39;s exact test.</figcaption>"
        "</figure>",
        _drift(summary.comparisons),
        _videos(rollouts),
    ]
    return "".join(parts) + "\n"


def choose_rollouts(folder: Path, summary: ClosedLoop) -> list[Rollout]:
    """The videos of a simulation's folder, failures first, the reference's last.

    Args:
        folder: `videos/` of a run of `qvla evaluate --sim`.
        summary: the run's closed_loop.json.
    """
    if not folder.is_dir():
        return []
    tasks = {entry.task: entry.task_name.replace("_", " ") for entry in summary.policies[0].tasks}
    found: list[tuple[tuple[bool, int], Rollout]] = []
    for path in sorted(folder.glob("*.mp4")):
        policy, _, rest = path.stem.partition(f"_{summary.suite}_")
        task, outcome, state = rest.split("_")
        caption = f"{policy}, {outcome}: {tasks.get(int(task), task)} (initial state {int(state)})"
        found.append(((outcome == "success", int(task)), Rollout(path, caption)))
    return [rollout for _, rollout in sorted(found, key=lambda pair: pair[0])]


def _success_chart(policies: Sequence[PolicySuccess]) -> str:
    row, width, top = 26, 940, 8
    left = margin_of(_short(entry.policy) for entry in policies)
    height = top + row * len(policies) + 24
    x = Axis(0, 1, left, width - 60)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = x(share)
        parts.append(element("line", x1=at, y1=top, x2=at, y2=height - 24, class_="grid"))
        parts.append(label(f"{share:.0%}", at, height - 8, class_="middle"))
    for place, entry in enumerate(policies):
        found, y = entry.overall, top + row * place + row / 2
        low, high = found.interval_95
        style = _colour(place)
        tip = element("title", escape(f"{entry.policy}: {found.successes} of {found.episodes}"))
        parts.append(label(_short(entry.policy), left - 10, y + 4, class_="end mono"))
        parts.append(element("line", x1=x(low), y1=y, x2=x(high), y2=y, class_=f"series {style}"))
        parts.append(element("circle", tip, cx=x(found.rate), cy=y, r=5, class_=f"point {style}"))
        parts.append(label(f"{found.rate:.1%}", width - 4, y + 4, class_="end strong"))
    return figure(width, height, parts, title="Success of each policy")


def _success_table(summary: ClosedLoop) -> str:
    compared = {entry.candidate: entry for entry in summary.comparisons}
    rows = []
    for place, entry in enumerate(summary.policies):
        found = entry.overall
        low, high = found.interval_95
        cells = [
            f'<i class="dot {_colour(place)}"></i>{escape(entry.policy)}',
            f"{found.successes} of {found.episodes}",
            f"{low:.0%} to {high:.0%}",
        ]
        pair = compared.get(entry.policy)
        if pair is None:
            cells += ["–"] * 3
        else:
            against = pair.overall
            low, high = against.interval_95
            total = None if pair.drift is None else pair.drift.deviation_total
            points = 100 * against.difference
            cells += [
                f"{points:+.1f} points ({_whole(low)} to {_whole(high)})",
                number(against.mcnemar_exact_p),
                "–" if total is None else number(total),
            ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = (
        "policy", "solved", "95 % interval", "difference to the first", "p",
        "accumulated deviation",
    )  # fmt: skip
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _drift(comparisons: Sequence[PolicyComparison]) -> str:
    drifts = [
        (place, c.candidate, c.drift)
        for place, c in enumerate(comparisons, start=1)
        if c.drift is not None
    ]
    if not drifts:
        return ""
    distance = [
        (place, drift.seconds, [100 * v for v in drift.distance_median])
        for place, _, drift in drifts
    ]
    deviation = [
        (place, drift.seconds, drift.deviation_mean)
        for place, _, drift in drifts
        if any(value > 0 for value in drift.deviation_mean)
    ]
    legend = "".join(
        f'<span><i class="dot {_colour(place)}"></i>{escape(candidate)}</span>'
        for place, candidate, _ in drifts
    )
    parts = [
        f'<div class="legend">{legend}</div><div class="columns"><figure>',
        _lines(distance, log=False, title="Distance of the end effectors over time (cm)"),
        "<figcaption>Median distance (cm) between the end effectors of paired episodes, over the "
        "seconds since the start.</figcaption></figure>",
    ]
    if deviation:
        parts += [
            "<figure>",
            _lines(deviation, log=True, title="Accumulated action deviation over time"),
            "<figcaption>Squared normalized action deviation along the rollouts of the first "
            "policy, added up over the episode (QVLA&#39;s cumulative error).</figcaption>"
            "</figure>",
        ]
    return "".join(parts) + "</div>"


def _lines(
    series: Sequence[tuple[int, Sequence[float], Sequence[float]]], *, log: bool, title: str
) -> str:
    """Lines over seconds; values that a log axis cannot show are left out."""
    width, height, left, bottom = 460, 300, 56, 40
    drawn = [
        (place, [(a, b) for a, b in zip(seconds, values, strict=False) if b > 0 or not log])
        for place, seconds, values in series
    ]
    x = Axis(0, max(a for _, points in drawn for a, _ in points) or 1, left, width - 10)
    y = Axis(
        *span([b for _, points in drawn for _, b in points], log=log),
        height - bottom, 10, log=log,
    )  # fmt: skip
    parts = []
    for value in y.ticks():
        parts.append(element("line", x1=x.start, y1=y(value), x2=x.end, y2=y(value), class_="grid"))
        parts.append(label(number(value), left - 6, y(value) + 4, class_="end"))
    for value in x.ticks():
        parts.append(label(f"{value:g}", x(value), height - bottom + 16, class_="middle"))
    parts.append(label("seconds", (x.start + x.end) / 2, height - 4, class_="middle"))
    for place, points in drawn:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(element("polyline", points=path, class_=f"series {_colour(place)}"))
    return figure(width, height, parts, title=title)


def _videos(rollouts: Sequence[Rollout]) -> str:
    shown, size = [], 0
    for rollout in rollouts:
        content = rollout.path.read_bytes()
        if len(shown) == _MOST_VIDEOS or size + len(content) > _MOST_VIDEO_BYTES:
            break
        size += len(content)
        source = "data:video/mp4;base64," + base64.b64encode(content).decode()
        shown.append(
            f'<figure><video controls muted playsinline preload="metadata" src="{source}"></video>'
            f"<figcaption>{escape(rollout.caption)}</figcaption></figure>"
        )
    if not shown:
        return ""
    return f'<div class="columns">{"".join(shown)}</div>'


def _short(policy: str) -> str:
    """A policy's name for a narrow margin: the end is more informative than the beginning."""
    return policy[-48:]


def _whole(share: float) -> str:
    """A share as percentage points with its sign, except for zero."""
    return f"{round(100 * share):+d}".replace("+0", "0")


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]
