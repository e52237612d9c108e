# SPDX-License-Identifier: Apache-2.0
"""Several tasks, one student: rows in batches of one task each, and their loss (MT-DNN and MT-DNN-KD).

Liu et al. 2019, arXiv 1901.11504 (the tasks and algorithm 1), and arXiv 1904.09482 (their teachers). The model is
`pydistill.students.multitask.MultiTaskModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from pydistill.losses.soft_target import soft_target_loss
from pydistill.students.multitask import KINDS, Kind
from pydistill.teachers import RECORDED_LOGITS
from pydistill.trainer import REPEATED, DistillationCollator

Strategy = Literal["proportional", "square_root", "uniform", "capped"]
STRATEGIES: tuple[Strategy, ...] = ("proportional", "square_root", "uniform", "capped")
TASK = "task"
# Rows [B] of a ranking's candidates, as [G, C] places in the batch; -1 where a query has fewer.
CANDIDATES = "candidates"
# Rows of so many steps are sorted by length together: little padding, and still another order every epoch.
SORTED_STEPS = 50
# Stands where a query has fewer candidates than others: no mass on either side, and nothing that is not a number.
NO_CANDIDATE = -1e9


class TaskMixture(Dataset[dict[str, Any]]):
    """Tokenized rows of several tasks. `DistillationTrainer` reads it in batches of one task each.

    An epoch takes from each task as many rows as the strategy says. A task's rows are an endless sequence of its
    permutations, in which each epoch goes on where the last one stopped: rows of a task that is read in part are read
    equally often, and those of a small one come again.

    Args:
        tasks: by name, each with ``input_ids``, ``labels`` and whatever else `TaskCollator` reads. A row of a ranking
            is a query: its ``input_ids`` hold one list for each candidate.
        strategy: rows per epoch: ``proportional``: all (the paper); of as many in all, ``square_root``: in proportion
            to the square roots of the tasks' sizes, ``uniform``: equally many; ``capped``: at most ``cap`` of each.
        cap: for ``capped`` alone.
        pack_once: put the same rows together in every epoch, which changes only the order of the batches (the
            algorithm as printed); otherwise they are packed anew. For ``proportional`` alone: of a task that is read in
            part, the rest would never be seen.

    Raises:
        ValueError: no task, a task without rows, an unknown strategy, a cap that is missing or not wanted, or
            ``pack_once`` with a strategy that reads in part.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        strategy: Strategy = "proportional",
        cap: int | None = None,
        pack_once: bool = False,
    ) -> None:
        if not tasks:
            _fail("TaskMixture", "tasks must hold at least one, got none")
        for name, rows in tasks.items():
            if len(rows) == 0:
                _fail("TaskMixture", f"task {name!r} must have at least one row, got none")
        if strategy not in STRATEGIES:
            _fail("TaskMixture", f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if (strategy == "capped") != (cap is not None) or (cap is not None and cap < 1):
            _fail(
                "TaskMixture",
                f"cap must be at least 1 with strategy 'capped' and None with others, got {cap} with {strategy!r}",
            )
        if pack_once and strategy != "proportional":
            _fail(
                "TaskMixture",
                f"pack_once must be False with strategy {strategy!r}, which reads tasks in part: the rest of their "
                "rows would never be seen",
            )
        self.tasks = dict(tasks)
        self.pack_once = pack_once
        self.epoch = 0
        sizes = np.array([len(rows) for rows in tasks.values()])
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.rows_per_epoch = dict(zip(tasks, _rows_per_epoch(sizes, strategy, cap), strict=True))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row of a task; ``-1 - index`` is the same row, which then counts nothing, see `TaskBatches`."""
        again = index < 0
        index = -1 - index if again else index
        task = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = list(self.tasks)[task]
        row = dict(self.tasks[name][int(index - self._starts[task])]) | {TASK: name}
        return row | {REPEATED: True} if again else row

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader: batches depend on seed and epoch alone, so that a run resumes in mid-epoch."""
        self.epoch = epoch

    def batches(self, size: int, parts: int, seed: int, *, by_length: bool = False) -> TaskBatches:
        """The batches of an epoch, see `TaskBatches`."""
        return TaskBatches(self, size, parts, seed, by_length=by_length)


def _rows_per_epoch(sizes: np.ndarray, strategy: Strategy, cap: int | None) -> list[int]:
    if cap is not None:
        return np.minimum(sizes, cap).tolist()
    if strategy == "proportional":
        return sizes.tolist()
    shares = np.sqrt(sizes) if strategy == "square_root" else np.ones(len(sizes))
    return np.maximum(1, np.round(sizes.sum() * shares / shares.sum())).astype(int).tolist()


class TaskBatches(Sampler[list[int]]):
    """Yields the batches of an epoch, each as row numbers of one task of a `TaskMixture`.

    They come in groups of ``parts``, which make one optimizer step and are of one task: the batches of all processes
    and of gradient accumulation. What is left of a task at the end of an epoch is shared out among the parts of a
    smaller step. A part that gets none repeats a row, numbered from -1 downwards, which counts nothing: steps
    and their rows are the same however they are cut into parts.

    Args:
        size: rows per batch.
        parts: batches per step, that is processes times accumulation.
        seed: of all permutations.
        by_length: put rows of similar length together.
    """

    def __init__(self, mixture: TaskMixture, size: int, parts: int, seed: int, *, by_length: bool = False) -> None:
        self.mixture, self.size, self.parts, self.seed = mixture, size, parts, seed
        self.lengths = {name: _lengths(rows) for name, rows in mixture.tasks.items()} if by_length else None

    def __len__(self) -> int:
        return self.parts * sum(self._steps(rows) for rows in self.mixture.rows_per_epoch.values())

    def _steps(self, rows: int) -> int:
        return -(-rows // (self.size * self.parts))

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.mixture.epoch
        steps: list[tuple[int, np.ndarray]] = []
        for number, (name, count) in enumerate(self.mixture.rows_per_epoch.items()):
            rows = self._stream(number, name, 0 if self.mixture.pack_once else epoch * count, count)
            each = self.size * self.parts
            if self.lengths is not None:
                window = SORTED_STEPS * each
                lengths = self.lengths[name]
                pieces = [rows[start : start + window] for start in range(0, len(rows), window)]
                rows = np.concatenate([piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces])
            steps += [(number, rows[step * each : (step + 1) * each]) for step in range(self._steps(count))]
        for index in np.random.default_rng([self.seed, epoch]).permutation(len(steps)):
            number, rows = steps[index]
            rows = rows + self.mixture._starts[number]
            for part in np.array_split(rows, self.parts):
                yield part.tolist() or [-1 - int(rows[0])]

    def _stream(self, number: int, name: str, start: int, count: int) -> np.ndarray:
        """``count`` rows of a task, from place ``start`` of its endless sequence of permutations."""
        size = len(self.mixture.tasks[name])
        passes = range(start // size, (start + count - 1) // size + 1)
        # Three numbers seed a permutation, two the order of the steps: no two generators are the same.
        drawn = [np.random.default_rng([self.seed, number, one]).permutation(size) for one in passes]
        first = start - passes[0] * size
        return np.concatenate(drawn)[first : first + count]


def _lengths(rows: Any) -> np.ndarray:
    return np.array([sum(map(len, ids)) if _is_group(ids) else len(ids) for ids in rows["input_ids"]])


def _is_group(ids: Sequence[Any]) -> bool:
    return len(ids) > 0 and isinstance(ids[0], (list, tuple, np.ndarray))


class TaskCollator:
    """Rows of one task -> padded tensors, and its name under ``task``, which is no tensor.

    Candidates of a ranking become rows of their own; ``candidates [G, C]`` says which rows compete with each other (-1:
    none), and ``labels [G]`` which of them is right.

    Args:
        tokenizer: see `DistillationCollator`, which does the rest.

    Raises:
        ValueError: rows of several tasks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.collate = DistillationCollator(tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = sorted({str(row[TASK]) for row in rows})
        if len(names) > 1:
            _fail(
                "TaskCollator",
                f"a batch must hold rows of one task, got {', '.join(names)}; read them with TaskMixture.batches",
            )
        batch: dict[str, Any] = {REPEATED: True} if rows[0].get(REPEATED) else {}
        rows = [{name: value for name, value in row.items() if name != REPEATED} for row in rows]
        if _is_group(rows[0]["input_ids"]):
            sizes = [len(row["input_ids"]) for row in rows]
            batch[CANDIDATES] = _places(sizes)
            labels = torch.tensor([int(row["labels"]) for row in rows])
            columns = [name for name in rows[0] if name not in ("labels", TASK)]
            rows = [{name: row[name][one] for name in columns} for row in rows for one in range(len(row["input_ids"]))]
            batch |= self.collate(rows) | {"labels": labels}
        else:
            batch |= self.collate(rows)
        return batch | {TASK: names[0]}


def _places(sizes: Sequence[int]) -> Tensor:
    places = torch.full((len(sizes), max(sizes)), -1)
    start = 0
    for query, size in enumerate(sizes):
        places[query, :size] = torch.arange(start, start + size)
        start += size
    return places


class TaskLoss(nn.Module):
    r"""The task-specific loss of Liu et al. as a term of an objective (arXiv 1901.11504, equations 6 to 9; with a
    teacher arXiv 1904.09482, section 3).

    With hard labels :math:`y` and the teacher's mean probabilities :math:`Q` (for scores its mean prediction)

    .. math::
        L = w \, \mathrm{CE}(y, z) + (1 - w) \Big({-\sum_c} Q_c \log \operatorname{softmax}(z)_c\Big), \qquad
        L = w \, (y - z)^2 + (1 - w) \, (Q - z)^2,

    the first for classes, and for rankings, whose classes are the candidates of a query; the second for scores. Where
    the batch has no ``teacher_logits`` the hard part stands alone. Means run over rows (queries of a ranking).

    Reads from the batch, beside ``labels``: ``task``; ``teacher_logits``, the logarithm of Q or the prediction, one row
    per row of logits; ``candidates`` of a ranking, see `TaskCollator`. Its value is logged
    under the name of the task, too.

    Args:
        kinds: of each task: ``classification``, ``regression`` or ``ranking``.
        hard_weight: w, from 0 to 1; the paper's average is 0.5. One for all, or by task.

    Raises:
        ValueError: an unknown kind, a weight outside [0, 1] or of a task that is none.
    """

    name = "task"
    weight = 1.0
    student_signals = frozenset({"logits"})
    teacher_signals: frozenset[str] = frozenset()
    batch_keys = frozenset({TASK, CANDIDATES, RECORDED_LOGITS, REPEATED})

    def __init__(self, kinds: Mapping[str, Kind], *, hard_weight: float | Mapping[str, float] = 0.5) -> None:
        super().__init__()
        for task, kind in kinds.items():
            if kind not in KINDS:
                _fail("TaskLoss", f"kinds: that of {task} must be one of {', '.join(KINDS)}, got {kind!r}")
        weights = hard_weight if isinstance(hard_weight, Mapping) else dict.fromkeys(kinds, hard_weight)
        if unknown := sorted(weights.keys() ^ kinds.keys()):
            _fail(
                "TaskLoss",
                f"hard_weight must name the tasks of kinds, and only one of the two has {', '.join(unknown)}",
            )
        for task, value in weights.items():
            if not 0 <= value <= 1:
                _fail("TaskLoss", f"hard_weight must lie in [0, 1], got {value} of {task}")
        self.kinds = dict(kinds)
        self.hard_weights = dict(weights)

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """Rows of the batch, or queries of a ranking."""
        return batch["labels"].shape[0]

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Student logits ``[B, C]``, or scores ``[B, 1]``, and the batch -> the loss, 0-d, in fp32."""
        task = batch[TASK]
        if task not in self.kinds:
            _fail("TaskLoss", f"task must be one of {', '.join(self.kinds)}, got {task!r}")
        logits, labels = student["logits"].float(), batch["labels"]
        soft, weight = batch.get(RECORDED_LOGITS), self.hard_weights[task]
        items = self.count_items(batch) if num_items is None else num_items
        if self.kinds[task] == "regression":
            scores = logits.squeeze(-1)
            loss = F.mse_loss(scores, labels.float(), reduction="sum")
            if soft is not None:
                loss = weight * loss + (1 - weight) * F.mse_loss(scores, soft.squeeze(-1).float(), reduction="sum")
            return loss / items
        if self.kinds[task] == "ranking":
            logits = _by_query(logits, batch[CANDIDATES])
            soft = None if soft is None else _by_query(soft.float(), batch[CANDIDATES])
        if soft is None:
            return F.cross_entropy(logits, labels, reduction="sum") / items
        return soft_target_loss(
            logits, soft, labels, divergence="cross_entropy", hard_weight=weight, num_items=num_items
        )

    def forward_with_parts(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, and the loss once more under the task's name."""
        loss = self(student, teacher, batch, num_items)
        return loss, {batch[TASK]: loss.detach()}

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return ", ".join(f"{task}: {kind}, hard_weight={self.hard_weights[task]}" for task, kind in self.kinds.items())


def _by_query(scores: Tensor, candidates: Tensor) -> Tensor:
    """Scores ``[B, 1]`` of all candidates -> ``[G, C]``."""
    return scores.squeeze(-1)[candidates.clamp(min=0)].masked_fill(candidates < 0, NO_CANDIDATE)


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
