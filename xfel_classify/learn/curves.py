"""Curves and intervals that judge a score against labels, in numpy.

Ties are handled exactly: events of one score pass the threshold together.  Axes: N events,
T thresholds.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Curves", "curves", "wilson"]


@dataclass(frozen=True)
class Curves:
    """ROC and precision-recall of one score, from the strictest threshold to the loosest.

    ``threshold_T`` starts with +inf (nothing is called a hit).  ``auc`` is the area under the
    ROC curve, the probability that a hit scores above a miss, ties counting half;
    ``average_precision`` the sum of precision times the step in recall.
    """

    threshold_T: np.ndarray
    false_positive_rate_T: np.ndarray
    recall_T: np.ndarray
    precision_T: np.ndarray
    auc: float
    average_precision: float
    hits: int
    misses: int


def curves(scores_N: np.ndarray, labels_N: np.ndarray) -> Curves | None:
    """Curves of finite ``scores_N`` against ``labels_N`` (1 hit, 0 miss).

    None when there are no events of one of the classes: neither curve exists then.
    """
    scores_N, hit_N = np.asarray(scores_N, np.float64), np.asarray(labels_N) == 1
    hits, misses = int(hit_N.sum()), int((~hit_N).sum())
    if not hits or not misses:
        return None
    order = np.argsort(-scores_N, kind="stable")
    sorted_N, hit_N = scores_N[order], hit_N[order]
    last = np.append(np.nonzero(np.diff(sorted_N))[0], len(sorted_N) - 1)
    true = np.append(0, np.cumsum(hit_N)[last])
    false = np.append(0, np.cumsum(~hit_N)[last])
    recall, rate = true / hits, false / misses
    called = true + false
    precision = np.divide(true, called, out=np.ones(len(true)), where=called > 0)
    auc = float(np.sum(np.diff(rate) * (recall[1:] + recall[:-1]) / 2))
    average = float(np.sum(np.diff(recall) * precision[1:]))
    return Curves(np.append(np.inf, sorted_N[last]), rate, recall, precision, auc, average, hits,
                  misses)


def wilson(part: int, whole: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209); NaN of none."""
    if not whole:
        return math.nan, math.nan
    share, room = part / whole, z * z / whole
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / whole + room / (4 * whole))
    return max(0.0, middle - half), min(1.0, middle + half)
