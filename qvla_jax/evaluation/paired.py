"""Success rates with intervals, and paired comparisons of two policies.

Two policies are compared on the same episodes (task, initial state, seed), so only the episodes
that one solves and the other does not distinguish them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from scipy import stats

from qvla_jax.errors import InputError

Key = TypeVar("Key")

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Success:
    """A success rate.

    Attributes:
        successes: episodes solved.
        episodes: episodes run.
    """

    DERIVED_KEYS: ClassVar[tuple[str, ...]] = ("rate", "interval_95")

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """Share of the episodes that were solved."""
        return self.successes / self.episodes

    @property
    def interval_95(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %."""
        return wilson_interval(self.successes, self.episodes)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two policies on the same episodes.

    Attributes:
        both: episodes that both solve.
        candidate_only: episodes that only the candidate solves.
        reference_only: episodes that only the reference solves.
        neither: episodes that neither solves.
    """

    DERIVED_KEYS: ClassVar[tuple[str, ...]] = (
        "episodes",
        "difference",
        "interval_95",
        "mcnemar_exact_p",
    )

    both: int
    candidate_only: int
    reference_only: int
    neither: int

    @property
    def episodes(self) -> int:
        """Pairs of episodes."""
        return self.both + self.candidate_only + self.reference_only + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the candidate minus that of the reference."""
        return (self.candidate_only - self.reference_only) / self.episodes

    @property
    def interval_95(self) -> tuple[float, float]:
        """Newcombe's interval of the difference at 95 %."""
        return newcombe_interval(self)

    @property
    def mcnemar_exact_p(self) -> float:
        """The p-value of McNemar's exact test."""
        return mcnemar_exact(self.candidate_only, self.reference_only)


def compare(candidate: Mapping[Key, bool], reference: Mapping[Key, bool]) -> Comparison:
    """Pairs the outcomes of two policies by episode; leaves out episodes that only one has run.

    Raises:
        InputError: they have no episode in common.
    """
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for key in candidate.keys() & reference.keys():
        counts[bool(candidate[key]), bool(reference[key])] += 1
    if not any(counts.values()):
        raise InputError("the two policies have no episode in common: nothing to compare")
    return Comparison(
        both=counts[True, True],
        candidate_only=counts[True, False],
        reference_only=counts[False, True],
        neither=counts[False, False],
    )


def wilson_interval(
    successes: int, episodes: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction.

    Raises:
        InputError: there are no episodes, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes < 1:
        raise InputError(f"{successes} successes in {episodes} episodes: no success rate")
    interval = stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe_interval(counts: Comparison, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of the difference of two paired proportions.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17 (1998), method 10: Wilson's intervals of both rates,
    combined with their correlation, continuity corrected where it is positive.
    """
    n = counts.episodes
    solved, reference = counts.both + counts.candidate_only, counts.both + counts.reference_only
    p, q = solved / n, reference / n
    p_low, p_high = wilson_interval(solved, n, confidence=confidence)
    q_low, q_high = wilson_interval(reference, n, confidence=confidence)
    phi = _correlation(counts)

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2.0 * phi * x * y + y * y, 0.0))

    difference = p - q
    low = difference - distance(p - p_low, q_high - q)
    high = difference + distance(p_high - p, q - q_low)
    return max(low, -1.0), min(high, 1.0)


def mcnemar_exact(candidate_only: int, reference_only: int) -> float:
    """Two-sided p-value of McNemar's exact test: is one policy better on the episodes that differ?

    Without such episodes nothing distinguishes the policies, and the value is 1.
    """
    differing = candidate_only + reference_only
    if not differing:
        return 1.0
    return float(stats.binomtest(candidate_only, differing, 0.5).pvalue)


def _correlation(counts: Comparison) -> float:
    a, b, c, d = counts.both, counts.candidate_only, counts.reference_only, counts.neither
    scale = (a + b) * (c + d) * (a + c) * (b + d)
    if not scale:
        return 0.0
    numerator = float(a * d - b * c)
    if numerator > 0:
        numerator = max(numerator - counts.episodes / 2.0, 0.0)
    return numerator / math.sqrt(scale)
