# SPDX-License-Identifier: Apache-2.0
"""Students; importing this package registers them with the Auto classes of transformers."""

from __future__ import annotations

from pydistill.students.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from pydistill.students.multitask import MultiTaskConfig, MultiTaskModel

__all__ = ["BiLSTMConfig", "BiLSTMForSequenceClassification", "MultiTaskConfig", "MultiTaskModel"]
