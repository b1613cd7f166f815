"""Welch's test of two groups of runs, by scipy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from run import UserError


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


@dataclass(frozen=True)
class Test:
    """t, degrees of freedom and one-sided p of "the gain exceeds the margin"; nan where a group has no spread."""

    t: float
    df: float
    p: float


def welch(reference: Sample, new: Sample, margin: float = 0.0) -> Test:
    """Welch's t of H1: reference.mean - new.mean > margin (lower scores are better). Needs n >= 2 on both sides.

    A reference without a spread (a published mean alone) is taken as exact: the test is then the one-sample t. Without
    scipy a `UserError`.
    """
    try:
        from scipy import stats
    except ImportError:
        raise UserError("the test of significance needs scipy: pip install scipy") from None
    excess = reference.mean - new.mean - margin
    if math.isnan(new.std) or (math.isnan(reference.std) and reference.n > 0):
        return Test(math.nan, math.nan, math.nan)
    if new.std == 0.0 and not reference.std > 0.0:
        return Test(math.copysign(math.inf, excess) if excess else 0.0, math.nan, 0.0 if excess > 0 else 1.0)
    if math.isnan(reference.std):
        t, df = excess / (new.std / math.sqrt(new.n)), float(new.n - 1)
        return Test(t, df, float(stats.t.sf(t, df)))
    groups = (excess, reference.std, reference.n, 0.0, new.std, new.n)
    found = stats.ttest_ind_from_stats(*groups, equal_var=False, alternative="greater")
    parts = [(s.std**2 / s.n, s.n) for s in (reference, new)]
    df = sum(v for v, _ in parts) ** 2 / sum(v * v / (n - 1) for v, n in parts)
    return Test(float(found.statistic), df, float(found.pvalue))
