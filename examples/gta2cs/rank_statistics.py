"""Rank correlations, with ties and missing values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties share the mean of theirs."""
    x = np.asarray(values, dtype=float)
    order = np.argsort(x, kind="stable")
    _, first, count = np.unique(x[order], return_index=True, return_counts=True)
    result = np.empty(len(x))
    result[order] = np.repeat(first + (count + 1) / 2, count)
    return result


def spearman(x: Sequence[float | None], y: Sequence[float | None]) -> float:
    """Pearson's correlation of the ranks; NaN where one side is constant."""
    a, b = _finite(x, y)
    if len(a) < 2:
        return float("nan")
    a, b = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else float("nan")


def kendall(x: Sequence[float | None], y: Sequence[float | None]) -> float:
    """Tau-b: concordant less discordant pairs, over the pairs that are tied on neither side."""
    a, b = _finite(x, y)
    i, j = np.triu_indices(len(a), 1)
    da, db = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    size = np.sqrt((da != 0).sum() * (db != 0).sum())
    return float((da * db).sum() / size) if size > 0 else float("nan")


def _finite(x: Sequence[float | None], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.array([[np.nan if v is None else v for v in side] for side in (x, y)], dtype=float)
    kept = np.isfinite(a) & np.isfinite(b)
    return a[kept], b[kept]
