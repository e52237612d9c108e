# SPDX-License-Identifier: Apache-2.0
"""The numbers that say how good answers are: of classes, of scores, and of rankings."""

from __future__ import annotations

from collections.abc import Sequence

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


def metrics_of(logits: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """What `classification_metrics` says of logits ``[N, C]``, or, without classes, `regression_metrics` of scores.

    Args:
        logits: ``[N, C]``, or ``[N, 1]``.
        labels: class ids, or true scores ``[N]``.
        classes: how many classes there are; 0: the labels are scores.
    """
    if classes:
        return classification_metrics(logits.argmax(-1), labels, classes)
    return regression_metrics(logits[:, 0], labels)


def ranking_metrics(scores: Sequence[np.ndarray], right: Sequence[int]) -> dict[str, float]:
    """How often the right candidate of a query comes first, and the mean reciprocal rank.

    A candidate with the same score counts as being in front: a model that tells nothing apart gets no credit.

    Args:
        scores: of each query, those of its candidates ``[C]``.
        right: which of them is right, of each query.
    """
    ranks = np.array([int((one >= one[place]).sum()) for one, place in zip(scores, right, strict=True)])
    return {"hits": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}
