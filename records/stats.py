"""Student's t by the incomplete beta function, and Welch's test of two groups of runs; nothing but `math`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Mean, standard deviation (n - 1 in the denominator; nan for n = 1) and size of one group's scores."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, math.nan, 1)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b), by Lentz's continued fraction (Numerical Recipes 6.4), to about 1e-14."""
    if not 0.0 < x < 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on the other side only
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, c, d = 1e-300, 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1.0 / ((1.0 + step * d) or tiny)
            c = (1.0 + step / c) or tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * fraction


def t_above(t: float, df: float) -> float:
    """P(T > t) for Student's t with `df` degrees of freedom (df need not be whole)."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    tail = 0.5 * incomplete_beta(df / 2.0, 0.5, df / (df + t * t))
    return tail if t >= 0 else 1.0 - tail


@dataclass(frozen=True)
class Test:
    """t, degrees of freedom and one-sided p of "the gain exceeds the margin"; nan where a group has no spread."""

    t: float
    df: float
    p: float


def welch(reference: Sample, new: Sample, margin: float = 0.0) -> Test:
    """Welch's t of H1: reference.mean - new.mean > margin (lower scores are better). Needs n >= 2 on both sides.

    A reference without a spread (a published mean alone) is taken as exact: the test is then the one-sample t.
    """
    excess = reference.mean - new.mean - margin
    parts = [(s.std**2 / s.n, s.n) for s in (reference, new) if not math.isnan(s.std)]
    if math.isnan(new.std) or (math.isnan(reference.std) and reference.n > 0):
        return Test(math.nan, math.nan, math.nan)
    variance = sum(v for v, _ in parts)
    if variance == 0.0:
        return Test(math.copysign(math.inf, excess) if excess else 0.0, math.nan, 0.0 if excess > 0 else 1.0)
    df = variance**2 / sum(v * v / (n - 1) for v, n in parts)
    t = excess / math.sqrt(variance)
    return Test(t, df, t_above(t, df))
