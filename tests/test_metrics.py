# SPDX-License-Identifier: Apache-2.0
"""Metrics against hand counts, and against scikit-learn and SciPy where they are installed."""

from __future__ import annotations

import numpy as np
import pytest

from pydistill.metrics import classification_metrics, regression_metrics


def test_metrics_against_hand_counts() -> None:
    labels, answers = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])
    found = classification_metrics(answers, labels, 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert classification_metrics(np.zeros(3, int), np.zeros(3, int), 2)["matthews"] == 0.0


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_metrics_against_scikit_learn(metric: str) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = np.random.default_rng(0)
    for classes in (2, 4):
        labels, answers = draw.integers(classes, size=200), draw.integers(classes, size=200)
        expected = {
            "accuracy": sklearn.accuracy_score(labels, answers),
            "f1": sklearn.f1_score(labels, answers, average="binary" if classes == 2 else "macro"),
            "matthews": sklearn.matthews_corrcoef(labels, answers),
        }
        assert classification_metrics(answers, labels, classes)[metric] == pytest.approx(expected[metric])


def test_correlations_against_hand_counts() -> None:
    # Ranks 1, 2, 3, 4 against 1, 2, 4, 3: 1 - 6 * 2 / (4 * 15).
    found = regression_metrics(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 9.0, 4.0]))
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(8 / np.sqrt(5 * 38))
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + 0.8) / 2)
    assert regression_metrics(np.zeros(3), np.arange(3.0)) == dict.fromkeys(found, 0.0)


def test_correlations_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    draw = np.random.default_rng(0)
    # Rounded, so that some are equal and share a rank.
    answers, scores = draw.normal(size=200).round(1), draw.integers(6, size=200).astype(np.float32)
    found = regression_metrics(answers.astype(np.float32), scores)
    assert found["pearson"] == pytest.approx(stats.pearsonr(answers, scores)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(answers, scores)[0], abs=1e-6)
