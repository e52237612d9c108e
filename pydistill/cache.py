# SPDX-License-Identifier: Apache-2.0
"""Teacher signals as data: a teacher that runs once, whose signals any number of students read from disk.

A cache is a folder: ``cache.json``, which says what teacher and which signals, and shards of safetensors. Every example
is found by what it is, a hash of its token ids, never by where it stood: order, batches, epochs and processes cannot
mispair it. Signals of tokens are stored without padding.

Reads top to bottom: the format, writing, reading, the teacher.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from pydistill.capture import ATTENTION_KINDS, LOGITS, Capture, capture, evaluating, unreachable_parameters
from pydistill.packing import SEGMENTS
from pydistill.report import replacing
from pydistill.teachers import (
    TEACHER_PREFIX,
    FlatTokens,
    batches_of_one_length,
    hash_json,
    hash_model,
    hash_tokenizer,
    input_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of batch keys of cached signals; with the teacher's prefix, which an evaluation of the student alone leaves out.
_CACHED = f"{TEACHER_PREFIX}cached:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMAT = 1
_MANIFEST = "cache.json"
_SHARDS = "signals-*.safetensors"
_KEY_BYTES = 16
_SHARD_BYTES = 256 << 20


class TeacherCacheError(ValueError):
    """A cache belongs to another teacher or other signals, lacks an example, or is damaged."""


# --------------------------------------------------------------------------- the format


@dataclass(frozen=True)
class Definition:
    """What a cache holds, and of whom.

    Attributes:
        teacher: hash of the class, the configuration and the weights that the signals depend on.
        tokenizer: hash of the tokenizer that made the token ids; None if nobody said.
        signals: names as `capture` takes them, sorted.
        dtype: of the stored numbers.
        top_k: how many log-probabilities of each row of logits are stored; None: all logits.
        token_types: whether the teacher reads them, so that they tell examples apart.
    """

    teacher: str
    tokenizer: str | None
    signals: tuple[str, ...]
    dtype: str
    top_k: int | None
    token_types: bool
    format: int = _FORMAT

    @property
    def key(self) -> str:
        return hash_json(asdict(self))

    def differences(self, other: Definition) -> list[str]:
        """What of `other` is not as it is here, in words; a tokenizer that nobody named agrees with any."""
        found = []
        if self.format != other.format:
            found.append(f"the file format ({self.format} there, {other.format} here)")
        if self.teacher != other.teacher:
            found.append("the teacher's weights, their dtype or its configuration")
        if None not in (self.tokenizer, other.tokenizer) and self.tokenizer != other.tokenizer:
            found.append("the tokenizer")
        for name in ("signals", "dtype", "top_k"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name} ({getattr(self, name)} there, {getattr(other, name)} here)")
        return found


def key_of(token_ids: np.ndarray, token_types: np.ndarray | None = None) -> bytes:
    """The key of one example, 32 hexadecimal digits: a hash of its tokens, padding left out."""
    digest = hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<i4").tobytes(), digest_size=_KEY_BYTES)
    # Models take missing token types for zeros.
    if token_types is not None and token_types.any():
        digest.update(b"types" + np.ascontiguousarray(token_types, dtype="<i4").tobytes())
    return digest.hexdigest().encode()


def hash_teacher(model: PreTrainedModel, signals: Sequence[str]) -> str:
    """Hash of what the signals of a model depend on: weights behind the last of them, such as those of a pooler that
    the checkpoint does not have, are left out."""
    frozen = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
        return hash_model(model, unreachable_parameters(model, signals, inputs))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _definition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    signals: tuple[str, ...],
    dtype: str,
    top_k: int | None,
) -> Definition:
    named = None if tokenizer is None else hash_tokenizer(tokenizer)
    typed = "token_type_ids" in input_names(model)
    return Definition(hash_teacher(model, signals), named, signals, dtype, top_k, typed)


def _by_token(name: str, signal: Tensor) -> Tensor:
    """``[B, N, ...]`` of signals that tokens have, ``[B, C]`` of logits that rows have."""
    return signal.transpose(1, 2) if name.partition("@")[0] in ATTENTION_KINDS else signal


def _to_top_k(logits: Tensor, k: int) -> dict[str, Tensor]:
    """The k largest log-probabilities of each row, their classes, and the logarithm of what the others have together.

    Log-probabilities at temperature 1; where k is the number of classes nothing is lost but the logits' common shift.
    """
    log_probabilities = logits.float().log_softmax(-1)
    values, indices = log_probabilities.topk(k, dim=-1)
    rest = log_probabilities.scatter(-1, indices, -math.inf)
    return {"values": values, "indices": indices.int(), "tail": rest.logsumexp(-1)}


def _from_top_k(values: Tensor, indices: Tensor, tail: Tensor, classes: int) -> Tensor:
    """Log-probabilities of all classes, the tail's mass shared out evenly."""
    others = classes - values.shape[-1]
    even = tail.float() - math.log(others) if others else torch.full_like(tail.float(), -math.inf)
    dense = even.unsqueeze(-1).expand(*tail.shape, classes).to(values.dtype)
    return dense.scatter(-1, indices.long(), values)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of a shard: its tensors, and what it says of them beside this checksum."""
    told = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(hash_json(told).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Summary:
    """What a call of `write_cache` did: distinct examples, those that it computed, their tokens, bytes, seconds."""

    examples: int
    computed: int
    tokens: int
    bytes: int
    seconds: float


def write_cache(
    rows: Iterable[Mapping[str, Any]],
    model: PreTrainedModel,
    signals: Sequence[str],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "bfloat16",
    top_k: int | None = None,
    share: tuple[int, int] = (0, 1),
    batch_size_tokens: int = 4096,
    flush_seconds: float = 60.0,
    progress: bool = True,
) -> Summary:
    """Run a teacher once over every distinct example, and keep its signals in `folder`.

    Examples run longest first, in batches of one length: nothing is padded, so an example's signals are its own
    whatever it shares a batch with. What is finished is written every `flush_seconds` in files that appear whole or not
    at all; the same call, with the same rows or others, computes what is missing. Any number of processes may write
    into one folder at the same time: each computes its `share`.

    Args:
        rows: each with ``input_ids``, and ``token_type_ids`` where the teacher reads them; the columns with the prefix
            ``teacher_`` where there are any.
        model: the teacher, on the device and in the dtype it is to run in; left as it was found.
        signals: what to keep, see `capture`: ``logits``, ``hidden_states@-1``, ``values@11``, ...
        folder: new, empty, or a cache of the same teacher and signals.
        tokenizer: what made the token ids; its hash is kept, and held against that of a reader.
        dtype: of the stored numbers: float32, bfloat16 or float16.
        top_k: of logits, keep the k largest log-probabilities (at temperature 1) and the logarithm of the mass of the
            others; None keeps the logits.
        share: ``(i, n)``: the examples that fall to the i-th of n writers.
        batch_size_tokens: most tokens per batch (a single longer example is a batch).
        flush_seconds: at most this much finished work is lost when the process is killed.
        progress: show a progress bar.

    Raises:
        TeacherCacheError: `folder` belongs to another teacher or other signals, or is damaged; the message says what.
        ValueError: an argument breaks its rule, a row has no tokens, or a signal is not finite in `dtype`.
    """
    names = tuple(sorted(set(signals)))
    _check_arguments(names, dtype, top_k, share, batch_size_tokens)
    captured = capture(model, names)
    definition = _definition(model, tokenizer, names, dtype, top_k)
    started = time.perf_counter()
    examples = _Examples(rows, input_names(model), share)
    folder = Path(folder)
    definition = _open_folder(folder, definition)
    there = _Index(folder, definition)
    missing = np.flatnonzero(~there.holds(examples.keys))
    writer = _Writer(folder, definition)
    lengths = examples.lengths[missing]
    order = missing[np.lexsort((examples.keys[missing], -lengths))]
    bar = tqdm(total=int(lengths.sum()), desc="cache", unit="tok", unit_scale=True, disable=not progress)
    flushed = time.perf_counter()
    try:
        with bar, evaluating(model), torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            for batch in batches_of_one_length(examples.lengths[order], batch_size_tokens) if len(order) else ():
                chosen = order[batch]
                found = captured(**examples.batch(chosen, model.device))
                writer.add(examples.keys[chosen], int(examples.lengths[chosen[0]]), found)
                if writer.pending_bytes >= _SHARD_BYTES or time.perf_counter() - flushed >= flush_seconds:
                    writer.flush()
                    flushed = time.perf_counter()
                bar.update(int(examples.lengths[chosen].sum()))
    finally:
        # Also on the way out of an interruption: what is finished is kept.
        writer.flush()
    seconds = time.perf_counter() - started
    return Summary(len(examples.keys), len(missing), int(lengths.sum()), writer.written, seconds)


def _check_arguments(
    names: tuple[str, ...], dtype: str, top_k: int | None, share: tuple[int, int], batch_size_tokens: int
) -> None:
    where = "write_cache"
    if not names:
        _fail(where, "signals must name at least one, such as 'logits' or 'values@-1'")
    if dtype not in DTYPES:
        _fail(where, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if top_k is not None and top_k < 1:
        _fail(where, f"top_k must be at least 1, or None to keep all logits, got {top_k}")
    if top_k is not None and LOGITS not in names:
        _fail(where, f"top_k is about logits, and signals are {', '.join(names)}; leave it out")
    if not 0 <= share[0] < share[1]:
        _fail(where, f"share must be (i, n) with 0 <= i < n, got {share}")
    if batch_size_tokens < 1:
        _fail(where, f"batch_size_tokens must be at least 1, got {batch_size_tokens}")


class _Examples(FlatTokens):
    """Distinct examples, and their keys."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], model_inputs: frozenset[str], share: tuple[int, int]) -> None:
        parts: dict[str, list[np.ndarray]] = {"input_ids": [], "token_type_ids": []}
        keys: dict[bytes, None] = {}
        typed = "token_type_ids" in model_inputs
        for number, row in enumerate(rows):
            if SEGMENTS in row:
                _fail("write_cache", "rows must hold one text each, got packed rows; set corpus.packing to truncate")
            prefix = TEACHER_PREFIX if f"{TEACHER_PREFIX}input_ids" in row else ""
            if f"{prefix}input_ids" not in row:
                _fail("write_cache", f"row {number} must have input_ids, got only {', '.join(sorted(row))}")
            ids = np.asarray(row[f"{prefix}input_ids"], dtype=np.int32)
            if ids.ndim != 1 or ids.size == 0:
                _fail("write_cache", f"row {number} must have at least one token id, got {list(ids.shape)}")
            types = np.zeros_like(ids)
            if typed and f"{prefix}token_type_ids" in row:
                types = np.asarray(row[f"{prefix}token_type_ids"], dtype=np.int32)
            key = key_of(ids, types)
            if key in keys or int(key[:8], 16) % share[1] != share[0]:
                continue
            keys[key] = None
            parts["input_ids"].append(ids)
            parts["token_type_ids"].append(types)
        self.keys = np.array(list(keys), dtype=f"S{2 * _KEY_BYTES}")
        # A teacher that was never asked to tell texts apart is not asked now: the same inputs as in training.
        if not any(array.any() for array in parts["token_type_ids"]):
            del parts["token_type_ids"]
        lengths = [len(ids) for ids in parts["input_ids"]]
        super().__init__(lengths, {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays})
        self.mask = "attention_mask" in model_inputs

    def batch(self, chosen: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Inputs of the model for examples of one length: each ``[B, N]``, no padding."""
        found = super().batch(chosen, device)
        return found | ({"attention_mask": torch.ones_like(found["input_ids"])} if self.mask else {})


class _Writer:
    """Collects signals, and writes them as shards: ``keys``, where the tokens of each example begin, and the
    signals, those of tokens one example after the other."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        self.folder, self.definition = folder, definition
        self.pending_bytes = self.written = 0
        self._keys: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._signals: dict[str, list[Tensor]] = {}
        self._by_row: set[str] = set()  # signals that rows have, not tokens
        self._classes = 0

    def add(self, keys: np.ndarray, length: int, signals: Mapping[str, Tensor]) -> None:
        """Take over the signals of examples of one length; they are on disk after the next `flush`."""
        dtype = DTYPES[self.definition.dtype]
        for name, signal in signals.items():
            signal = _by_token(name, signal)
            if signal.dim() > 2:
                signal = signal.flatten(0, 1)
            else:
                self._by_row.add(name)
            if name == LOGITS and self.definition.top_k is not None:
                self._classes = signal.shape[-1]
                if self.definition.top_k > self._classes:
                    _fail(
                        "write_cache", f"top_k must be at most the {self._classes} classes, got {self.definition.top_k}"
                    )
                parts = {f"{name}.{part}": value for part, value in _to_top_k(signal, self.definition.top_k).items()}
            else:
                parts = {name: signal}
            for part, value in parts.items():
                if value.is_floating_point():
                    value = value.to(dtype)
                    # Where the top k are all classes the others have no mass: its logarithm may be infinite.
                    if not part.endswith(".tail") and not bool(value.isfinite().all()):
                        _fail(
                            "write_cache",
                            f"{name} is not finite in {self.definition.dtype}; choose a dtype of wider range",
                        )
                value = value.cpu().contiguous()
                self._signals.setdefault(part, []).append(value)
                self.pending_bytes += value.numel() * value.element_size()
        self._keys.append(keys)
        self._lengths += [length] * len(keys)

    def flush(self) -> None:
        """Write what was added since the last flush as one shard, whole or not at all."""
        if not self._keys:
            return
        from safetensors.torch import save_file

        keys = np.concatenate(self._keys)
        tensors = {name: torch.cat(parts) for name, parts in self._signals.items()}
        tensors["keys"] = torch.from_numpy(keys.view(np.uint8).reshape(len(keys), -1).copy())
        tensors["starts"] = torch.tensor([0, *np.cumsum(self._lengths)], dtype=torch.int64)
        metadata = {
            "definition": self.definition.key,
            "classes": str(self._classes),
            "by_row": ",".join(sorted(self._by_row)),
        }
        metadata["sha256"] = _checksum(tensors, metadata)
        # Named by what it holds: two writers that computed the same write the same file.
        with replacing(self.folder / f"signals-{metadata['sha256'][:20]}.safetensors") as temporary:
            save_file(tensors, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            self.written += temporary.stat().st_size
        self._keys, self._lengths, self._signals, self.pending_bytes = [], [], {}, 0


# --------------------------------------------------------------------------- reading


def _open_folder(folder: Path, definition: Definition) -> Definition:
    """Make the folder a cache of this definition, or make sure that it is one; returns what it says itself."""
    if folder.exists() and not folder.is_dir():
        _refuse(folder, "is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if _MANIFEST not in content:
        if content:
            _refuse(folder, f"holds {content[0]} but no {_MANIFEST}, so it is no teacher cache; name another folder")
        # Of several writers the first one says what the folder is: unlike a rename, a link replaces nothing.
        temporary = folder / f".{_MANIFEST}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(asdict(definition) | {"key": definition.key}, indent=2) + "\n")
        try:
            os.link(temporary, folder / _MANIFEST)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    found = _read_definition(folder)
    _check_same(folder, found, definition)
    return found


def _read_definition(folder: Path) -> Definition:
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        key = found.pop("key")
        definition = Definition(**found | {"signals": tuple(found["signals"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _refuse(folder, f"is no teacher cache: {_MANIFEST} cannot be read ({error}); write one with pydistill cache")
    if definition.key != key:
        _refuse(folder, f"is damaged: {_MANIFEST} does not match its key; delete the folder and write it again")
    return definition


def _check_same(folder: Path, found: Definition, wanted: Definition) -> None:
    if differing := found.differences(wanted):
        _refuse(
            folder,
            f"was written for something else: different {', '.join(differing)}; name another folder, or delete it",
        )


# Signals of one example by name: of its tokens [L, ...], or of the whole [C].
Example = dict[str, Tensor]


class _Place(NamedTuple):
    shard: int
    row: int


class _Index:
    """Where each example lies: sorted keys, their shards and rows."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        from safetensors import SafetensorError, safe_open

        self.paths = sorted(folder.glob(_SHARDS))
        self.classes = 0
        keys, shards, rows = [np.empty(0, dtype=f"S{2 * _KEY_BYTES}")], [np.empty(0, int)], [np.empty(0, int)]
        self.starts: list[np.ndarray] = []
        for number, path in enumerate(self.paths):
            try:
                with safe_open(path, framework="np") as shard:
                    metadata = shard.metadata() or {}
                    found, starts = shard.get_tensor("keys"), shard.get_tensor("starts")
            except (SafetensorError, OSError) as error:
                _refuse(folder, f"is damaged: {path.name} cannot be read ({error}); delete that file and write again")
            if metadata.get("definition") != definition.key:
                _refuse(folder, f"is damaged: {path.name} belongs to another cache; delete that file")
            self.classes = max(self.classes, int(metadata.get("classes", 0)))
            self.starts.append(starts)
            keys.append(np.ascontiguousarray(found).view(f"S{2 * _KEY_BYTES}").reshape(-1))
            shards.append(np.full(len(found), number))
            rows.append(np.arange(len(found)))
        order = np.argsort(np.concatenate(keys), kind="stable")
        self.keys, self.shards, self.rows = (np.concatenate(one)[order] for one in (keys, shards, rows))

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which of these keys are there."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=bool)
        return self.keys[self._positions(keys)] == keys

    def place(self, key: bytes) -> _Place | None:
        """Of one example; the first of several that writers wrote without knowing of each other."""
        keys = np.array([key], dtype=self.keys.dtype)
        if not self.holds(keys)[0]:
            return None
        at = self._positions(keys)[0]
        return _Place(int(self.shards[at]), int(self.rows[at]))

    def _positions(self, keys: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)


class TeacherCache:
    """A folder of teacher signals, see `write_cache`; reads them for a batch, from memory-mapped files.

    It can be handed to worker processes; files are opened, and checked against their checksums, when they are first
    read from.

    Args:
        folder: as written.
        model, tokenizer: the teacher, if it is to be made sure that the cache is its.

    Raises:
        TeacherCacheError: there is no cache, it is another teacher's, or it is damaged; the message says what.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.definition = found = _read_definition(self.folder)
        if model is not None:
            wanted = _definition(model, tokenizer, found.signals, found.dtype, found.top_k)
            _check_same(self.folder, found, wanted)
        self._index = _Index(self.folder, found)
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(np.unique(self._index.keys))

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files stay with the process that opened them.
        return self.__dict__ | {"_shards": {}}

    def find(self, token_ids: np.ndarray, token_types: np.ndarray | None, names: Iterable[str]) -> Example | None:
        """The signals `names` of one example, in the stored dtype; None if it is not there."""
        place = self._index.place(key_of(token_ids, token_types))
        return None if place is None else {name: self._read(place, name) for name in names}

    def _read(self, place: _Place, name: str) -> Tensor:
        shard = self._open(place.shard)
        starts = self._index.starts[place.shard]
        begin, end = place.row, place.row + 1
        by_row = name in shard.metadata()["by_row"].split(",")
        if not by_row:
            begin, end = int(starts[begin]), int(starts[end])
        parts = [f"{name}.{part}" for part in ("values", "indices", "tail")] if self._is_top_k(name) else [name]
        pieces = [shard.get_slice(part)[begin:end] for part in parts]
        if self._is_top_k(name):
            values, indices, tail = pieces
            signal = _from_top_k(values, indices, tail, self._index.classes)
        else:
            signal = pieces[0]
        return signal[0] if by_row else signal

    def _is_top_k(self, name: str) -> bool:
        return name == LOGITS and self.definition.top_k is not None

    def _open(self, number: int) -> Any:
        if number not in self._shards:
            from safetensors import safe_open

            path = self._index.paths[number]
            shard = safe_open(path, framework="pt")
            metadata = shard.metadata()
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}
            if _checksum(tensors, metadata) != metadata.get("sha256"):
                _refuse(
                    self.folder,
                    f"is damaged: the content of {path.name} does not match its checksum; delete that file and write "
                    "its examples again",
                )
            self._shards[number] = shard
        return self._shards[number]


def teacher_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's tokens in a batch: ``teacher_input_ids`` and its kin where there are any, else the student's."""
    prefix = TEACHER_PREFIX if f"{TEACHER_PREFIX}input_ids" in batch else ""
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = {name: batch[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in batch}
    if "input_ids" not in found:
        _fail("CachedTeacher", f"the batch holds no input_ids, only {', '.join(sorted(batch))}")
    if SEGMENTS in batch:
        _fail("CachedTeacher", "rows must hold one text each, got packed rows; set corpus.packing to truncate")
    return {"attention_mask": torch.ones_like(found["input_ids"])} | found


# --------------------------------------------------------------------------- the teacher


class CachedTeacher:
    """A teacher whose signals come from a cache: the collator reads them, in the workers of the data loader.

    Args:
        cache: a `TeacherCache`, or its folder.
        model: the teacher itself, to compute what the cache does not have; None refuses such examples. It runs where
            the batch is collated: not in worker processes.

    Example::

        teacher = CachedTeacher(TeacherCache("cache", model=model))
        trainer = DistillationTrainer(Distiller(student, teacher, objective), ...)
    """

    def __init__(self, cache: TeacherCache | str | Path, model: PreTrainedModel | None = None) -> None:
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache, model=model)
        self.model = model
        # Several caches may add to one batch.
        self._prefix = f"{_CACHED}{self.cache.definition.key[:12]}:"
        self._wanted: set[str] = set()
        self._captures: dict[tuple[str, ...], Capture] = {}

    @property
    def log_probabilities(self) -> bool:
        """Whether its logits are log-probabilities: those that top-k keeps are."""
        return self.cache.definition.top_k is not None

    @property
    def batch_keys(self) -> frozenset[str]:
        """Cached signals, and the tokens by which they are found."""
        tokens = {f"{TEACHER_PREFIX}{name}" for name in ("input_ids", "attention_mask", "token_type_ids")}
        return frozenset({self._prefix + name for name in self.cache.definition.signals} | tokens)

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        if other := sorted(names - set(self.cache.definition.signals)):
            _fail(
                "CachedTeacher",
                f"{self.cache.folder} holds {', '.join(self.cache.definition.signals)}, not {', '.join(other)}; write "
                f"a cache with pydistill cache --signals {' '.join(sorted(names))}",
            )
        self._wanted |= names

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """`collate` with the cached signals added to its batches."""
        return _CachedCollator(self, collate)

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the signals that the collator put into the batch.

        Raises:
            ValueError: it did not.
        """
        if absent := sorted(name for name in names if self._prefix + name not in batch):
            _fail(
                "CachedTeacher",
                f"the batch holds no cached {', '.join(absent)}; train with DistillationTrainer, or collate with "
                "teacher.collator(...)",
            )
        return {name: batch[self._prefix + name] for name in names}

    def read(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The wanted signals by batch key: from the cache, or computed where it lacks them; zero where padding is.

        Queries, keys and values are ``[B, H, N, d]``, hidden states ``[B, N, D]``, logits ``[B, C]`` or ``[B, N, C]``.

        Raises:
            TeacherCacheError: an example is not in the cache, and there is no model; or the cache is damaged.
        """
        inputs = {name: tensor.numpy() for name, tensor in teacher_inputs(batch).items()}
        mask = inputs["attention_mask"].astype(bool)
        names = sorted(self._wanted)
        examples: list[Example] = []
        absent = 0
        if not self.cache.definition.token_types:
            inputs.pop("token_type_ids", None)
        for row, valid in enumerate(mask):
            tokens = {name: array[row, valid] for name, array in inputs.items()}
            example = self.cache.find(tokens["input_ids"], tokens.get("token_type_ids"), names)
            if example is None and self.model is not None:
                example = self._compute(self.model, tokens, tuple(names))
            absent += example is None
            examples.append(example or {})
        if absent:
            raise TeacherCacheError(
                f"CachedTeacher: {self.cache.folder} lacks {absent} of the {len(mask)} examples of a batch; run "
                "pydistill cache on these texts, which computes only what is missing, or pass the model"
            )
        return {
            self._prefix + name: _by_token(name, _padded([example[name] for example in examples], mask))
            for name in names
        }

    def _compute(self, model: PreTrainedModel, tokens: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Example:
        """As the cache would have it: the example alone, without padding. Logits are whole, also where the cache keeps
        the largest."""
        if get_worker_info() is not None:
            _fail("CachedTeacher", "model computes what is missing where batches are collated: set num_workers to 0")
        known = input_names(model)
        inputs = {
            name: torch.from_numpy(array)[None].to(model.device) for name, array in tokens.items() if name in known
        }
        with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            found = self._capture(names)(**inputs)
        dtype = DTYPES[self.cache.definition.dtype]
        return {name: _by_token(name, signal)[0].to("cpu", dtype) for name, signal in found.items()}

    def _capture(self, names: tuple[str, ...]) -> Capture:
        assert self.model is not None
        if names not in self._captures:
            self._captures[names] = capture(self.model, names)
        return self._captures[names]


def _padded(signals: Sequence[Tensor], mask: np.ndarray) -> Tensor:
    """Signals of the valid tokens of each row -> ``[B, N, ...]``; signals of whole rows are stacked."""
    if signals[0].dim() == 1:
        return torch.stack(list(signals))
    padded = signals[0].new_zeros(*mask.shape, *signals[0].shape[1:])
    for row, (valid, signal) in enumerate(zip(mask, signals, strict=True)):
        padded[row, torch.from_numpy(valid)] = signal
    return padded


class _CachedCollator:
    def __init__(self, teacher: CachedTeacher, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.teacher, self.collate = teacher, collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        return batch | self.teacher.read(batch)


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise TeacherCacheError(f"teacher cache {folder} {reason}")


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
