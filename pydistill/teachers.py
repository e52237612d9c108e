# SPDX-License-Identifier: Apache-2.0
"""Where teacher signals come from: models that run beside the student, or logits recorded once.

Signals of any kind that are kept on disk, for any number of students, are in `pydistill.cache`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pydistill.capture import LOGITS, Capture, capture, evaluating
from pydistill.packing import model_inputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Batch keys of a teacher that reads its own tokenization: this prefix, then the name of the input.
TEACHER_PREFIX = "teacher_"
RECORDED_LOGITS = "teacher_logits"


@runtime_checkable
class Teacher(Protocol):
    """Gives the teacher signals of a batch. Never an ``nn.Module``, so that no student ever owns its weights.

    Attributes:
        batch_keys: keys of the batch that it may read.
        log_probabilities: optional; whether its logits are log-probabilities, which are as good as logits to everything
            but a comparison of raw logits.
        collator: optional; ``collator(collate)`` returns a collator that adds what the teacher reads to its batches.
    """

    @property
    def batch_keys(self) -> frozenset[str]: ...

    def check(self, names: frozenset[str]) -> None:
        """Raise a ValueError that says why, if it cannot give all of the signals `names`."""
        ...

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the signals `names` for `batch`: tensors that do not require grad."""
        ...


class OnlineTeacher:
    """A teacher model that runs on every batch, always in eval mode and without gradients.

    It takes the model over: parameters are frozen, and cast where `dtype` says so. The forward runs outside autocast,
    in the model's own dtype, whatever precision the student trains in, and on the device of the batch. It ends with the
    last signal that is asked for: a teacher whose fourth layer is read never runs its fifth (see `capture`).

    Args:
        model: called with those keys of the batch that its forward names.
        dtype: cast the model's floating-point parameters, for instance to ``torch.bfloat16``; None keeps
            them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, nn.Module):
            _fail("OnlineTeacher", f"model must be an nn.Module, got {type(model).__name__}", TypeError)
        self.model = model.requires_grad_(False).eval()
        if dtype is not None:
            self.model = self.model.to(dtype)
        self.input_names = input_names(model)
        self._captures: dict[frozenset[str], Capture] = {}

    @property
    def batch_keys(self) -> frozenset[str]:
        """The model's inputs, each with and without the prefix ``teacher_``."""
        return self.input_names | {TEACHER_PREFIX + name for name in self.input_names}

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        self._capture(names)

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Run the model on the keys ``teacher_<input>`` of `batch`, or on the student's inputs if there are none.

        Raises:
            ValueError: `batch` holds none of the model's inputs, or the model cannot give the signals `names`.
        """
        inputs = {
            name: batch[TEACHER_PREFIX + name] for name in self.input_names if TEACHER_PREFIX + name in batch
        } or {name: batch[name] for name in self.input_names if name in batch}
        if not inputs:
            _fail(
                "OnlineTeacher",
                f"the batch holds no input of {type(self.model).__name__}, only {', '.join(sorted(batch))}",
            )
        device = next(iter(inputs.values())).device
        first = next(self.model.parameters(), None)
        if first is not None and first.device != device:
            self.model.to(device)
        self.model.eval()
        # Not inference_mode: a loss that autograd differentiates may save the teacher's tensors, and
        # inference tensors cannot be saved.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._capture(names)(**model_inputs(inputs, batch))

    def _capture(self, names: frozenset[str]) -> Capture:
        if names not in self._captures:
            self._captures[names] = capture(self.model, sorted(names))
        return self._captures[names]


class EnsembleTeacher:
    r"""Several teachers as one: the mean of their class probabilities (Liu et al. 2019, arXiv 1904.09482, equation 3).

    .. math:: \text{logits} = \log \frac{1}{K} \sum_k \operatorname{softmax}(z_k)

    Given as logarithms, so that a soft target at temperature 1 is the mean itself; at another temperature it is that
    mean softened. The mean of the logits would be another distribution. Of teachers with one output, which is a
    regression, the mean is that of the outputs.

    Args:
        teachers: teachers, or models (made `OnlineTeacher`), of the same classes in the same order; at least one.
    """

    log_probabilities = True

    def __init__(self, teachers: Sequence[Teacher | nn.Module]) -> None:
        self.teachers = [OnlineTeacher(one) if isinstance(one, nn.Module) else one for one in teachers]
        if not self.teachers:
            _fail("EnsembleTeacher", "teachers must hold at least one, got none")

    @property
    def batch_keys(self) -> frozenset[str]:
        """Those of all of them."""
        return frozenset().union(*(one.batch_keys for one in self.teachers))

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        if other := sorted(names - {LOGITS}):
            _fail(
                "EnsembleTeacher", f"only logits have a mean, got {', '.join(other)}; pass one of the models as teacher"
            )
        for one in self.teachers:
            one.check(names)

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """`collate` with what each of them adds to a batch."""
        for one in self.teachers:
            collate = with_signals(one, collate)
        return collate

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the logarithm of the mean of the probabilities, in fp32 (of one output: the mean).

        Raises:
            ValueError: the teachers have different numbers of classes.
        """
        found = [one.signals(batch, names)[LOGITS].float() for one in self.teachers]
        sizes = {tuple(logits.shape) for logits in found}
        if len(sizes) > 1:
            _fail("EnsembleTeacher", f"all teachers must have the same classes, got logits {sorted(map(list, sizes))}")
        return {LOGITS: mean_prediction(torch.stack(found))}


def mean_prediction(logits: Tensor) -> Tensor:
    """Logits of K teachers ``[K, ..., C]`` -> the logarithm of the mean of their probabilities ``[..., C]``; of one
    output, which is a score, the mean."""
    if logits.shape[-1] == 1:
        return logits.mean(0)
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def with_signals(
    teacher: Teacher | None, collate: Callable[[list[Any]], dict[str, Any]]
) -> Callable[[list[Any]], dict[str, Any]]:
    """`collate`, with what the teacher adds to batches where it adds anything."""
    collator = getattr(teacher, "collator", None)
    return collate if collator is None else collator(collate)


class RecordedTeacher:
    """A teacher whose logits come with the batch, as ``teacher_logits [B, C]`` (see `label_transfer_set`)."""

    batch_keys = frozenset({RECORDED_LOGITS})

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        if other := sorted(names - {LOGITS}):
            _fail(
                "RecordedTeacher", f"only logits are recorded, got {', '.join(other)}; pass the model itself as teacher"
            )

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the recorded logits.

        Raises:
            ValueError: `batch` has none.
        """
        if RECORDED_LOGITS not in batch:
            _fail(
                "RecordedTeacher",
                f"the batch has no {RECORDED_LOGITS!r}, only {', '.join(sorted(batch))}; label the training rows "
                "with label_transfer_set first",
            )
        return {LOGITS: batch[RECORDED_LOGITS]}


def input_names(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that a model's forward takes, ``labels`` excepted."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named) - {"labels"}


# --------------------------------------------------------------------------- labelling a transfer set once

_FORMAT = 1
_MANIFEST = "manifest.json"
_SHARDS = "logits-*.safetensors"
# What a configuration says about where it came from or how it is run, not about what the model computes.
_VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation_internal",
)

Row = tuple[str, ...]


class TransferSetError(ValueError):
    """A folder of recorded logits belongs to another transfer set or teacher, or is damaged."""


def label_transfer_set(
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_columns: str | Sequence[str],
    output: str | Path,
    shared: bool = False,
    batch_size_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
    max_length: int = 128,
    resume: bool = True,
    progress: bool = True,
    flush_seconds: float = 30.0,
) -> Dataset:
    """Record a teacher's logits for every row, once per distinct text.

    The texts are sorted by their number of tokens and run longest first, in batches of one length: nothing is
    padded, so a row's logits are its own whatever it shares a batch with, and what does not fit in memory shows
    at once. What is finished is written to `output` every `flush_seconds`, in files that appear whole or not at
    all: after an interruption the same call goes on where the last one stopped, and the result is the same to
    the bit. A finished folder is read back without running anything.

    Rows are paired with logits by their text, so the same folder serves the rows in any order and any number
    of times. The folder belongs to exactly these texts, tokenizer, weights, `dtype` and `max_length`.

    Args:
        dataset: rows to label.
        model: the teacher; left as it was found. Runs on the device it is on.
        tokenizer: the teacher's.
        text_columns: one column, or two for sentence pairs.
        output: folder to keep the logits in; new, empty, or of an earlier call.
        shared: `output` keeps the logits of any number of transfer sets, each in a folder named by its key (texts,
            tokenizer, weights and settings).
        batch_size_tokens: most tokens per batch (a single longer row is a batch).
        dtype: arithmetic of the forward; a model of another dtype is copied and cast.
        max_length: tokens kept per row, special tokens included.
        resume: go on with, or reuse, what `output` holds; False refuses a folder that holds anything.
        progress: show progress bars.
        flush_seconds: at most this much finished work is lost when the process is killed.

    Returns:
        `dataset` with a column ``teacher_logits``, fp32 ``[C]`` per row.

    Raises:
        TransferSetError: `output` belongs to something else (the message says what differs), or is damaged.
        ValueError: an argument breaks its rule, a text is missing, or the teacher's logits are not finite.
    """
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    _check_arguments(dataset, model, columns, batch_size_tokens, max_length)
    rows = _texts(dataset, columns)
    distinct = sorted(set(rows))
    manifest = {
        "format": _FORMAT,
        "texts": _hash_texts(distinct),
        "tokenizer": hash_tokenizer(tokenizer),
        "teacher": hash_model(model),
        "settings": {"dtype": str(dtype).removeprefix("torch."), "max_length": max_length},
        "rows": len(distinct),
    }
    folder = Path(output) / hash_json(manifest)[:16] if shared else Path(output)
    store = _LogitStore(folder, manifest, resume)
    missing = store.missing()
    if missing.size:
        with inference_copy(model, dtype) as teacher:
            _label(
                store,
                distinct,
                missing,
                teacher,
                tokenizer,
                max_length,
                batch_size_tokens,
                flush_seconds,
                progress,
            )
    assert store.logits is not None
    position = {row: index for index, row in enumerate(distinct)}
    order = np.fromiter((position[row] for row in rows), dtype=np.int64, count=len(rows))
    return _with_logits(dataset, store.logits[order])


def _check_arguments(
    dataset: Dataset, model: PreTrainedModel, columns: Row, batch_size_tokens: int, max_length: int
) -> None:
    name = "label_transfer_set"
    if not 1 <= len(columns) <= 2:
        _fail(name, f"text_columns must name one column or two, got {list(columns)}")
    for column in columns:
        if column not in dataset.column_names:
            _fail(
                name,
                f"text_columns: the data has no column {column!r}, only {', '.join(dataset.column_names)}",
            )
    if RECORDED_LOGITS in dataset.column_names:
        _fail(name, f"the data has a column {RECORDED_LOGITS!r} already; remove it to label the rows again")
    if len(dataset) == 0:
        _fail(name, "dataset must have at least one row, got none")
    if batch_size_tokens < 1:
        _fail(name, f"batch_size_tokens must be at least 1, got {batch_size_tokens}")
    if max_length < 1:
        _fail(name, f"max_length must be at least 1, got {max_length}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < max_length:
        _fail(name, f"max_length must be at most the model's {limit} positions, got {max_length}")


def _texts(dataset: Dataset, columns: Row) -> list[Row]:
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    lists = [table.column(column).to_pylist() for column in columns]
    for column, values in zip(columns, lists, strict=True):
        for index, value in enumerate(values):
            if not isinstance(value, str):
                _fail("label_transfer_set", f"row {index} of column {column!r} must be text, got {value!r}")
    return list(zip(*lists, strict=True))


def _with_logits(dataset: Dataset, logits: np.ndarray) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    values = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    column = Dataset(pa.table({RECORDED_LOGITS: values}))
    return concatenate_datasets([dataset, column], axis=1)


def _label(
    store: _LogitStore,
    distinct: Sequence[Row],
    missing: np.ndarray,  # [M] positions in `distinct`
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size_tokens: int,
    flush_seconds: float,
    progress: bool,
) -> None:
    tokens = _Tokens(tokenizer, [distinct[index] for index in missing], max_length, progress, input_names(model))
    # Longest first; equal lengths in the order of the texts, so that the batches depend on nothing else.
    order = np.lexsort((missing, -tokens.lengths))
    done, started, flushed = 0, time.perf_counter(), time.perf_counter()
    bar = tqdm(total=int(tokens.lengths.sum()), desc="label", unit="tok", unit_scale=True, disable=not progress)
    try:
        with bar, torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            for batch in batches_of_one_length(tokens.lengths[order], batch_size_tokens):
                chosen = order[batch]
                logits = model(**tokens.batch(chosen, model.device)).logits.float().cpu().numpy()
                _check_logits(logits, [distinct[index] for index in missing[chosen]])
                store.add(missing[chosen], logits)
                done += len(chosen)
                now = time.perf_counter()
                if now - flushed >= flush_seconds:
                    store.flush()
                    flushed = now
                bar.set_postfix_str(f"{done}/{len(missing)} texts, {done / (now - started):.0f} texts/s", refresh=False)
                bar.update(int(tokens.lengths[chosen].sum()))
    finally:
        # Also on the way out of an interruption: what is finished is kept.
        store.flush()


def batches_of_one_length(lengths: np.ndarray, batch_size_tokens: int) -> Iterator[slice]:
    """Slices of `lengths` (sorted) that hold one length each and at most `batch_size_tokens` tokens."""
    boundaries = np.flatnonzero(np.diff(lengths)) + 1
    for first, last in pairwise([0, *boundaries.tolist(), len(lengths)]):
        size = max(1, batch_size_tokens // max(1, int(lengths[first])))
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


def _check_logits(logits: np.ndarray, rows: Sequence[Row]) -> None:
    if logits.ndim != 2 or len(logits) != len(rows):
        _fail(
            "label_transfer_set",
            f"the teacher must give logits [B, C], got {list(logits.shape)} for {len(rows)} rows",
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        text = " | ".join(rows[int(np.argmin(finite))])
        _fail(
            "label_transfer_set",
            f"the teacher's logits for {text!r} are not finite; with a dtype of short range pass dtype=torch.float32",
        )


class FlatTokens:
    """Inputs of many rows in flat arrays, each `lengths` long: lists of Python integers would take ten times the
    memory."""

    def __init__(self, lengths: Sequence[int], flat: dict[str, np.ndarray]) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.flat = flat
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def batch(self, chosen: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Inputs of the model for the rows `chosen`, all of one length: each ``[B, N]``, no padding, no mask."""
        places = self._starts[chosen][:, None] + np.arange(self.lengths[chosen[0]])[None, :]
        return {name: torch.from_numpy(flat[places].astype(np.int64)).to(device) for name, flat in self.flat.items()}


class _Tokens(FlatTokens):
    """Texts, tokenized."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        max_length: int,
        progress: bool,
        model_inputs: frozenset[str],
        chunk: int = 8192,
    ) -> None:
        names = [name for name in ("input_ids", "token_type_ids") if name in model_inputs]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        lengths: list[int] = []
        with tqdm(total=len(rows), desc="tokenize", unit="text", unit_scale=True, disable=not progress) as bar:
            for start in range(0, len(rows), chunk):
                # One list per column; a single column must not be passed as a pair with nothing.
                texts = [list(column) for column in zip(*rows[start : start + chunk], strict=True)]
                encoded = tokenizer(
                    *texts, truncation=True, max_length=max_length, padding=False, return_attention_mask=False
                )
                lengths += [len(ids) for ids in encoded["input_ids"]]
                for name in [name for name in names if name in encoded]:
                    parts[name].append(np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded[name]]))
                bar.update(len(texts[0]))
        super().__init__(lengths, {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays})


@contextmanager
def inference_copy(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """`model` in eval mode and of `dtype`: the model itself where it has that dtype, otherwise a copy."""
    if any(parameter.is_floating_point() and parameter.dtype != dtype for parameter in model.parameters()):
        converted: Any = copy.deepcopy(model)
        yield converted.to(dtype).eval()
        return
    with evaluating(model):
        yield model


# --------------------------------------------------------------------------- the folder of recorded logits


class _LogitStore:
    """A folder of recorded logits: a manifest that says whose, and shards ``(index [n], logits [n, C])``.

    `index` is the position in the sorted distinct texts. Shards may come in any order and cover any rows.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.manifest = manifest
        self.key = hash_json(manifest)
        self.logits: np.ndarray | None = None  # [rows, C], allocated when C is known
        self.done = np.zeros(manifest["rows"], dtype=bool)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._open(resume)

    def missing(self) -> np.ndarray:
        """Positions that have no logits yet, ascending."""
        return np.flatnonzero(~self.done)

    def add(self, index: np.ndarray, logits: np.ndarray) -> None:
        """Take over the logits of some rows; they are on disk after the next `flush`."""
        self._fill(index, logits)
        self._pending.append((index, logits))

    def flush(self) -> None:
        """Write what was added since the last flush as one shard, whole or not at all."""
        if not self._pending:
            return
        from safetensors.numpy import save_file

        index = np.concatenate([part for part, _ in self._pending]).astype(np.int64)
        logits = np.concatenate([part for _, part in self._pending]).astype(np.float32)
        metadata = {"key": self.key, "sha256": _hash_shard(index, logits)}
        path = self.folder / f"logits-{metadata['sha256'][:16]}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({"index": index, "logits": logits}, temporary, metadata)
        os.replace(temporary, path)
        self._pending = []

    def _open(self, resume: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            self._refuse("is a file, not a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        # A kill between the two steps of a write leaves a temporary file, never anything that is read.
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        content = sorted(path.name for path in self.folder.iterdir())
        if content and not resume:
            self._refuse(f"holds {content[0]} already and resume=False; pass an empty folder, or resume=True")
        if _MANIFEST not in content:
            if content:
                self._refuse(f"holds {content[0]} but no {_MANIFEST}, so it is no folder of recorded logits")
            _write_text(self.folder / _MANIFEST, json.dumps(self.manifest | {"key": self.key}, indent=2) + "\n")
            return
        self._check_manifest()
        for path in sorted(self.folder.glob(_SHARDS)):
            self._read(path)

    def _check_manifest(self) -> None:
        try:
            found = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            found_key = found.pop("key")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            self._refuse(f"is damaged: {_MANIFEST} cannot be read ({error}); delete the folder to label again")
        if found_key == self.key:
            return
        words = {
            "format": "the file format",
            "teacher": "the teacher's weights or configuration",
            "settings": "settings",
        }
        words |= {"texts": "the texts", "tokenizer": "the tokenizer"}
        differing = [name for name in words if found.get(name) != self.manifest[name]]
        reasons = [
            f"{words[name]} ({found.get(name)} there, {self.manifest[name]} here)"
            if name in ("format", "settings")
            else words[name]
            for name in differing
        ]
        self._refuse(
            f"was recorded for something else: different {', '.join(reasons) or 'key'}; pass another folder, "
            "or delete this one to label again"
        )

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as shard:
                metadata = shard.metadata() or {}
                index, logits = shard.get_tensor("index"), shard.get_tensor("logits")
        except (SafetensorError, OSError) as error:
            self._refuse(f"is damaged: {path.name} cannot be read ({error}); delete that file to label its rows again")
        if metadata.get("key") != self.key:
            self._refuse(f"is damaged: {path.name} belongs to another transfer set; delete that file")
        if metadata.get("sha256") != _hash_shard(index, logits):
            self._refuse(
                f"is damaged: the content of {path.name} does not match its checksum; delete that file to label "
                "its rows again"
            )
        self._fill(index, logits)

    def _fill(self, index: np.ndarray, logits: np.ndarray) -> None:
        if self.logits is None:
            self.logits = np.full((len(self.done), logits.shape[1]), np.nan, dtype=np.float32)
        self.logits[index] = logits
        self.done[index] = True

    def _refuse(self, reason: str) -> NoReturn:
        raise TransferSetError(f"label_transfer_set: output {self.folder} {reason}")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _hash_shard(index: np.ndarray, logits: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(index).tobytes())
    digest.update(np.ascontiguousarray(logits).tobytes())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash_texts(distinct: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in distinct:
        for text in row:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are set by every call.
        state = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    else:
        state = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            **tokenizer.init_kwargs,
        }
    sides = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id)
    return hash_json([state, sides])


def hash_model(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """Of a model's class, configuration and weights, those `without` excepted."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE_CONFIG}
    digest = hashlib.sha256(hash_json([type(model).__name__, config]).encode())
    for name, tensor in model.state_dict().items():
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fail(where: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{where}: {message}")
