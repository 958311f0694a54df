"""Statistics of a handful of runs: what may be said about a method from ten seeds, and how surely.

Averages with percentile-bootstrap intervals and performance profiles (Agarwal et al., 2021), rates with Clopper and Pearson's exact intervals (1934),
differences as probability of improvement with Mann and Whitney's test (1947) or as rates with Fisher's exact test, corrected by Holm (1979).

A sample is an array (n) of one number a run; the strata of a sample, such as several environments, are resampled each by itself. Intervals are of 95 %.
At n = 10 a percentile-bootstrap interval of a mean covers it in about 90 of 100 studies (tests/test_studies.py measures that), at n = 5 in 79 to 85,
at n = 3 in 60 to 77: read intervals of small arms as too narrow. Intervals and tests of rates are exact. Mann and Whitney's test is exact where a sample
has eight runs or fewer, else the normal approximation, whose p-values are a little larger at ten runs (0.026 for 0.023). An interquartile mean
hides collapse (two runs of ten at -300 leave it where it was), so rates always stand beside it.
"""

from math import comb

import numpy as np
from scipy.stats import PermutationMethod, binomtest, bootstrap, fisher_exact, levene, mannwhitneyu, rankdata, trim_mean

CONFIDENCE = 0.95


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half of the runs."""
    return trim_mean(x, 0.25, axis=axis)


AVERAGES = dict(mean=np.mean, median=np.median, iqm=iqm)


def interval(statistic, *strata: np.ndarray, reps: int = 5000) -> tuple[float, float]:
    """Percentile-bootstrap interval of statistic(*strata, axis=...), each stratum resampled by itself; NaN below two runs a stratum."""
    if min(map(len, strata)) < 2:
        return np.nan, np.nan
    found = bootstrap(
        strata, statistic, n_resamples=reps, confidence_level=CONFIDENCE, method="percentile", vectorized=True, rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def average(name: str, *strata: np.ndarray, reps: int = 5000) -> tuple[float, float, float]:
    """Mean, median or iqm over all runs of all strata: value, low, high."""

    def pooled(*parts, axis=-1):
        return AVERAGES[name](np.concatenate(parts, axis), axis=axis)

    return float(pooled(*strata)), *interval(pooled, *strata, reps=reps)


def rate(hits: int, runs: int) -> tuple[float, float, float]:
    """Share of runs, low, high: Clopper and Pearson's exact interval. 0 of 10 only bounds a rate at 31 %."""
    found = binomtest(hits, runs).proportion_ci(CONFIDENCE, "exact")
    return hits / runs, float(found.low), float(found.high)


def share_test(hits: int, runs: int, share: float) -> float:
    """p of the exact two-sided test that the true rate is `share`."""
    return float(binomtest(hits, runs, share).pvalue)


def improvement_of(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """P(a run of x scores higher than one of y), ties count half: the mean rank of x among both."""
    n, m = x.shape[axis], y.shape[axis]
    ranks = np.take(rankdata(np.concatenate([x, y], axis), axis=axis), np.arange(n), axis=axis)
    return (ranks.sum(axis) - n * (n + 1) / 2) / (n * m)


def improvement(x: np.ndarray, y: np.ndarray, reps: int = 5000) -> tuple[float, float, float, float]:
    """Probability of improvement of x over y, low, high, and p of Mann and Whitney's two-sided test: the exact one for small samples,
    also if runs tie (with ten runs each the approximation will do).

    Where one is always higher, resampling knows no doubt, and there is no interval (NaN).
    """
    both = np.concatenate([x, y])
    small_with_ties = len(np.unique(both)) < len(both) and comb(len(both), len(x)) <= 20_000  # scipy's own exact test knows no ties
    p = mannwhitneyu(x, y, method=PermutationMethod(20_000) if small_with_ties else "auto").pvalue if np.ptp(both) else 1.0
    share = float(improvement_of(x, y))
    return share, *((np.nan, np.nan) if share in (0, 1) else interval(improvement_of, x, y, reps=reps)), float(p)


def spread(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Mean distances of the runs of x and of y to their own medians, and p of Brown and Forsythe's two-sided test (1974) that they are one.

    A rank test of these distances finds too much (12 of 100 studies by chance) where scores have two humps; this one 7 of 100.
    """
    far, near = (np.abs(z - np.median(z)) for z in (x, y))
    with np.errstate(divide="ignore"):  # all distances of each sample may be equal
        p = float(levene(x, y, center="median").pvalue) if far.any() or near.any() else 1.0
    return float(far.mean()), float(near.mean()), p


def fisher(hits: int, runs: int, other_hits: int, other_runs: int) -> float:
    """p of Fisher's exact two-sided test that two rates are one."""
    return float(fisher_exact([[hits, runs - hits], [other_hits, other_runs - other_hits]]).pvalue)


def holm(pvalues: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): that chance puts any of them below 0.05 happens in at most 5 of 100 studies."""
    p = np.asarray(pvalues, float)
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def profile(x: np.ndarray, taus: np.ndarray, reps: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Performance profile: share of runs that score above each of `taus` (K), and its low and high, each (K)."""
    low, high = bands((x[:, None] > taus).astype(float), np.mean, reps)
    return (x[:, None] > taus).mean(0), low, high


def bands(curves: np.ndarray, statistic=iqm, reps: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise percentile-bootstrap interval (K), (K) of the statistic of curves (n, K); whole runs are resampled."""
    draws = np.random.default_rng(0).integers(len(curves), size=(reps, len(curves)))
    tail = 50 * (1 - CONFIDENCE)
    return tuple(np.percentile(statistic(curves[draws], axis=1), [tail, 100 - tail], axis=0))
