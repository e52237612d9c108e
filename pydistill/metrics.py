# SPDX-License-Identifier: Apache-2.0
"""The numbers that say how good answers are: of classes, and of scores."""

from __future__ import annotations

import numpy as np
import pandas


def classification_metrics(answers: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, F1 (of class 1 for two classes, otherwise the mean over the classes) and Matthews correlation.

    Args:
        answers: predicted class ids ``[N]``.
        labels: true class ids ``[N]``.
        classes: how many classes there are.
    """
    table = np.zeros((classes, classes))  # [true, predicted]
    np.add.at(table, (labels, answers), 1)
    hits, true, predicted = np.diag(table), table.sum(1), table.sum(0)
    total = table.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.nan_to_num(2 * hits / (true + predicted))
        spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
        matthews = np.nan_to_num((hits.sum() * total - (true * predicted).sum()) / np.sqrt(spread))
    return {
        "accuracy": float(hits.sum() / total),
        "f1": float(f1[1] if classes == 2 else f1.mean()),
        "matthews": float(matthews),
    }


def regression_metrics(answers: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation and the mean of the two; 0 where the answers, or the scores, are all equal.

    Args:
        answers: predicted ``[N]``.
        scores: true ``[N]``.
    """
    frame = pandas.DataFrame({"answers": answers, "scores": scores}, dtype=np.float64)
    pearson, spearman = (float(np.nan_to_num(frame.corr(method=name).iloc[0, 1])) for name in ("pearson", "spearman"))
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
