# SPDX-License-Identifier: Apache-2.0
"""Teacher signals as data: a teacher that runs once, whose signals any number of students read from disk.

A cache is a folder: ``cache.json``, which says what teacher and which signals, and shards of safetensors. Every example
is found by what it is, a hash of its token ids, never by where it stood: order, batches, epochs and processes cannot
mispair it. Signals of tokens are stored without padding.

A shard has an index, which is small, is read whole by everyone who opens the cache, and has a checksum of its own; and
the signals, which are mapped into memory, and of which each example has its checksum, compared whenever it is read. So
nobody ever reads, or trusts, more of a cache than what is asked of it.

Reads top to bottom: the format, writing, reading, the teacher, the column of a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from pydistill.capture import ATTENTION_KINDS, LOGITS, Capture, capture, evaluating, unreachable_parameters
from pydistill.hashes import hash_json, hash_model, hash_tokenizer
from pydistill.packing import SEGMENTS
from pydistill.report import replacing
from pydistill.teachers import RECORDED_LOGITS, TEACHER_PREFIX, input_names

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of batch keys of cached signals; with the teacher's prefix, which an evaluation of the student alone leaves out.
_CACHED = f"{TEACHER_PREFIX}cached:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMAT = 2
_MANIFEST = "cache.json"
_SHARDS = "signals-*.safetensors"
_KEY = np.dtype("S16")
_SHARD_BYTES = 256 << 20
# Of a shard's tensors, those with an example's checksums: this prefix, then the name of the tensor that they are of.
_CRC = "crc32:"
# Texts that are tokenized in one call: enough to keep a fast tokenizer's threads busy.
_CHUNK = 1024
# No write takes as long: an older temporary file was left behind by a process that was killed.
_LEFTOVER_SECONDS = 3600


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
    """The key of one example, 16 bytes: a hash of its tokens, padding left out."""
    digest = hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<i4").tobytes(), digest_size=_KEY.itemsize)
    # Models take missing token types for zeros.
    if token_types is not None and token_types.any():
        digest.update(b"types" + np.ascontiguousarray(token_types, dtype="<i4").tobytes())
    return digest.digest()


def hash_teacher(model: PreTrainedModel, signals: Sequence[str]) -> str:
    """Hash of what the signals of a model depend on: weights behind the last of them, such as those of a pooler that
    the checkpoint does not have, are left out."""
    frozen = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)}
        if "token_type_ids" in input_names(model):
            # One token of either text: some heads read the two apart.
            inputs["token_type_ids"] = torch.arange(2, device=model.device)[None]
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


def _index_checksum(index: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Of what a shard says about its signals: keys, places, their checksums, and the metadata beside this one."""
    told = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(hash_json(told).encode())
    for name in sorted(index):
        digest.update(f"{name} {index[name].dtype} {list(index[name].shape)}".encode())
        digest.update(np.ascontiguousarray(index[name]).data)
    return digest.hexdigest()


def _checksums(signal: Tensor, starts: Sequence[int]) -> np.ndarray:
    """CRC-32 of each example: of the entries ``starts[i]`` to ``starts[i + 1]`` of a signal."""
    content = signal.reshape(-1).view(torch.uint8).numpy().data
    width = signal[:1].numel() * signal.element_size()
    found = [zlib.crc32(content[begin * width : end * width]) for begin, end in pairwise(starts)]
    return np.array(found, dtype=np.uint32)


# --------------------------------------------------------------------------- writing


@dataclass(frozen=True, eq=False)
class Summary:
    """What a call of `write_cache` did: distinct examples of its share, those that it computed, their tokens, bytes,
    seconds; and under which keys the signals of all rows are found, in the order of the rows."""

    keys: np.ndarray  # [rows]
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
            ``teacher_`` where there are any. Texts become rows by `tokenized`.
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
        ValueError: an argument breaks its rule, there are no rows, a row has no tokens, or a signal is not finite.
    """
    names = tuple(sorted(set(signals)))
    _check_arguments(names, dtype, top_k, share, batch_size_tokens)
    captured = capture(model, names)
    definition = _definition(model, tokenizer, names, dtype, top_k)
    started = time.perf_counter()
    examples = _Examples(rows, input_names(model), share, progress)
    folder = Path(folder).expanduser()
    definition = _open_folder(folder, definition)
    missing = np.flatnonzero(_Index(folder, definition).places(examples.keys)[:, 0] < 0)
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
    return Summary(examples.keys_of_rows, len(examples.keys), len(missing), int(lengths.sum()), writer.written, seconds)


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


def tokenized(
    texts: Iterable[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[dict[str, Sequence[int]]]:
    """Rows for `write_cache` of texts: each a tuple of one text, or of the two of a pair.

    Args:
        texts: any number; read once, a thousand at a time.
        tokenizer: the teacher's.
        max_length: tokens kept per row, special tokens included.

    Raises:
        ValueError: a text is missing.
    """
    texts, number = iter(texts), 0
    while chunk := list(islice(texts, _CHUNK)):
        for row in chunk:
            if not all(isinstance(text, str) for text in row):
                _fail("tokenized", f"row {number} must be text, got {' | '.join(map(repr, row))}")
            number += 1
        # One list per column; a single column must not be passed as a pair with nothing.
        columns = [list(column) for column in zip(*chunk, strict=True)]
        # Some tokenizers come with padding switched on.
        encoded = tokenizer(
            *columns, truncation=True, max_length=max_length, padding=False, return_attention_mask=False
        )
        for values in zip(*encoded.values(), strict=True):
            yield dict(zip(encoded, values, strict=True))


def batches_of_one_length(lengths: np.ndarray, batch_size_tokens: int) -> Iterator[slice]:
    """Slices of `lengths` (sorted) that hold one length each and at most `batch_size_tokens` tokens."""
    boundaries = np.flatnonzero(np.diff(lengths)) + 1
    for first, last in pairwise([0, *boundaries.tolist(), len(lengths)]):
        size = max(1, batch_size_tokens // max(1, int(lengths[first])))
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


class _Examples:
    """Distinct examples, their keys, and their tokens in flat arrays: lists of Python integers would take ten times the
    memory."""

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        model_inputs: frozenset[str],
        share: tuple[int, int],
        progress: bool,
    ) -> None:
        flat = {"input_ids": bytearray(), "token_type_ids": bytearray()}
        of_rows, lengths = bytearray(), []
        distinct: set[bytes] = set()
        keys = bytearray()
        typed, any_types = "token_type_ids" in model_inputs, False
        for number, row in enumerate(tqdm(rows, desc="tokens", unit="row", unit_scale=True, disable=not progress)):
            if SEGMENTS in row:
                _fail("write_cache", "rows must hold one text each, got packed rows; set corpus.packing to truncate")
            prefix = TEACHER_PREFIX if f"{TEACHER_PREFIX}input_ids" in row else ""
            if f"{prefix}input_ids" not in row:
                _fail("write_cache", f"row {number} must have input_ids, got only {', '.join(sorted(row))}")
            ids = np.asarray(row[f"{prefix}input_ids"], dtype="<i4")
            if ids.ndim != 1 or ids.size == 0:
                _fail("write_cache", f"row {number} must have at least one token id, got {list(ids.shape)}")
            types = np.zeros_like(ids)
            if typed and f"{prefix}token_type_ids" in row:
                types = np.asarray(row[f"{prefix}token_type_ids"], dtype="<i4")
            key = key_of(ids, types)
            of_rows += key
            if key in distinct or int.from_bytes(key[:4], "big") % share[1] != share[0]:
                continue
            distinct.add(key)
            keys += key
            lengths.append(len(ids))
            flat["input_ids"] += ids.tobytes()
            flat["token_type_ids"] += types.tobytes()
            any_types = any_types or bool(types.any())
        if not of_rows:
            _fail("write_cache", "rows must hold at least one, got none")
        self.keys_of_rows, self.keys = (np.frombuffer(one, _KEY) for one in (of_rows, keys))
        self.lengths = np.array(lengths, dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        # A teacher that was never asked to tell texts apart is not asked now: the same inputs as in training.
        if not any_types:
            del flat["token_type_ids"]
        self._flat = {name: np.frombuffer(content, "<i4") for name, content in flat.items()}
        self._mask = "attention_mask" in model_inputs

    def batch(self, chosen: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Inputs of the model for examples of one length: each ``[B, N]``, no padding."""
        places = self._starts[chosen][:, None] + np.arange(self.lengths[chosen[0]])[None, :]
        found = {name: torch.from_numpy(flat[places].astype(np.int64)).to(device) for name, flat in self._flat.items()}
        return found | ({"attention_mask": torch.ones_like(found["input_ids"])} if self._mask else {})


class _Writer:
    """Collects signals, and writes them as shards: ``keys``, where the tokens of each example begin, and the
    signals, those of tokens one example after the other."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        self.folder, self.definition = folder, definition
        self.pending_bytes = self.written = 0
        self._keys: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._signals: dict[str, list[Tensor]] = {}
        self._by_row: set[str] = set()  # of them, those that rows have, not tokens
        self._classes = 0

    def add(self, keys: np.ndarray, length: int, signals: Mapping[str, Tensor]) -> None:
        """Take over the signals of examples of one length, all or none; they are on disk after the next `flush`."""
        dtype = DTYPES[self.definition.dtype]
        found: dict[str, Tensor] = {}
        for name, signal in signals.items():
            signal = _by_token(name, signal)
            by_row = signal.dim() == 2
            if not by_row:
                signal = signal.flatten(0, 1)
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
                    stored = value.to(dtype)
                    # Where the top k are all classes the others have no mass: its logarithm may be infinite.
                    if not part.endswith(".tail") and not bool(stored.isfinite().all()):
                        where = f"{name} of an example of {length} tokens"
                        if not bool(value.isfinite().all()):
                            _fail(
                                "write_cache",
                                f"the teacher's {where} are not finite; run it in a dtype of wider range than "
                                f"{str(value.dtype).removeprefix('torch.')}",
                            )
                        _fail("write_cache", f"{where} are not finite in {self.definition.dtype}; store another dtype")
                    value = stored
                if by_row:
                    self._by_row.add(part)
                found[part] = value.cpu().contiguous()
        for part, value in found.items():
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
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        signals = {name: torch.cat(parts) for name, parts in self._signals.items()}
        index: dict[str, np.ndarray] = {"keys": keys.view(np.uint8).reshape(len(keys), -1), "starts": starts}
        for name, signal in signals.items():
            places = range(len(keys) + 1) if name in self._by_row else starts.tolist()
            index[_CRC + name] = _checksums(signal, places)
        metadata = {
            "definition": self.definition.key,
            "classes": str(self._classes),
            "by_row": ",".join(sorted(self._by_row)),
        }
        metadata["sha256"] = _index_checksum(index, metadata)
        tensors = signals | {name: torch.from_numpy(array) for name, array in index.items()}
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
    for leftover in folder.glob(".*.tmp*"):
        with suppress(FileNotFoundError):  # another writer's, who has just moved it to its place
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
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


def _open_shard(folder: Path, path: Path, framework: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        _refuse(folder, f"is damaged: {path.name} cannot be read ({error}); delete that file and write again")


# Signals of one example by name: of its tokens [L, ...], or of the whole [C].
Example = dict[str, Tensor]


class _Index:
    """Where each example lies, and its checksums; read whole, and checked."""

    def __init__(self, folder: Path, definition: Definition) -> None:
        self.paths = sorted(folder.glob(_SHARDS))
        self.classes = 0
        self.by_row: list[set[str]] = []  # of each shard, the tensors that rows have, not tokens
        self.starts: list[np.ndarray] = []
        self.checksums: list[dict[str, np.ndarray]] = []
        keys, places = [np.empty(0, dtype=_KEY)], [np.empty((0, 2), dtype=np.int64)]
        for number, path in enumerate(self.paths):
            with _open_shard(folder, path, "np") as shard:
                metadata = shard.metadata() or {}
                names = [name for name in shard.keys() if name in ("keys", "starts") or name.startswith(_CRC)]
                index = {name: shard.get_tensor(name) for name in names}
            if metadata.get("definition") != definition.key:
                _refuse(folder, f"is damaged: {path.name} belongs to another cache; delete that file")
            if metadata.get("sha256") != _index_checksum(index, metadata):
                _refuse_content(folder, path)
            self.classes = max(self.classes, int(metadata["classes"]))
            self.by_row.append(set(metadata["by_row"].split(",")))
            self.starts.append(index["starts"])
            self.checksums.append({name.removeprefix(_CRC): index[name] for name in names if name.startswith(_CRC)})
            keys.append(index["keys"].view(_KEY).reshape(-1))
            places.append(np.stack([np.full(len(keys[-1]), number), np.arange(len(keys[-1]))], axis=1))
        # Stable: of several that writers wrote without knowing of each other, the first is found.
        order = np.argsort(np.concatenate(keys), kind="stable")
        self.keys, self._places = np.concatenate(keys)[order], np.concatenate(places)[order]

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Shard of each key, and row in it, ``[n, 2]``; -1 for what is not there."""
        if not len(self.keys):
            return np.full((len(keys), 2), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[at] == keys)[:, None], self._places[at], -1)


class TeacherCache:
    """A folder of teacher signals, see `write_cache`; reads them for a batch, from memory-mapped files.

    It can be handed to worker processes. Of the signals only what is asked for is read from disk, and compared with its
    checksum every time.

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
        self.folder = Path(folder).expanduser()
        self.definition = found = _read_definition(self.folder)
        if model is not None:
            wanted = _definition(model, tokenizer, found.signals, found.dtype, found.top_k)
            _check_same(self.folder, found, wanted)
        self._index = _Index(self.folder, found)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(np.unique(self._index.keys))

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files stay with the process that opened them.
        return self.__dict__ | {"_shards": {}}

    def find(self, keys: np.ndarray, names: Iterable[str]) -> list[Example | None]:
        """The signals `names` of each example, in the stored dtype; None for one that is not there."""
        names = list(names)
        return [
            None if shard < 0 else {name: self._signal(shard, row, name) for name in names}
            for shard, row in self._index.places(keys).tolist()
        ]

    def stack(self, keys: np.ndarray, name: str) -> Tensor:
        """One signal of many examples at once, ``[n, C]`` in the stored dtype: of rows, as a classifier's logits are.

        Raises:
            TeacherCacheError: an example is not there, or is damaged.
            ValueError: it is a signal of tokens.
        """
        if not len(keys):
            _fail("TeacherCache", "keys must be at least one, got none")
        places = self._index.places(keys)
        if absent := int((places[:, 0] < 0).sum()):
            _lacks(self.folder, absent, len(keys))
        chosen, found = [], []
        for number in np.unique(places[:, 0]).tolist():
            if self._parts(name)[0] not in self._index.by_row[number]:
                _fail(
                    "TeacherCache",
                    f"{name} must be of rows, as a classifier's logits are; {self.folder} has one of tokens",
                )
            chosen.append(np.flatnonzero(places[:, 0] == number))
            rows = places[chosen[-1], 1]
            parts = [self._shard(number)[part][torch.from_numpy(rows)] for part in self._parts(name)]
            found.append(self._checked(number, rows, range(len(rows) + 1), name, parts))
        signal = torch.empty(len(keys), found[0].shape[1], dtype=found[0].dtype)
        signal[torch.from_numpy(np.concatenate(chosen))] = torch.cat(found)
        return signal

    def _signal(self, number: int, row: int, name: str) -> Tensor:
        by_row = self._parts(name)[0] in self._index.by_row[number]
        begin, end = (row, row + 1) if by_row else self._index.starts[number][row : row + 2].tolist()
        parts = [self._shard(number)[part][begin:end] for part in self._parts(name)]
        signal = self._checked(number, [row], (0, end - begin), name, parts)
        return signal[0] if by_row else signal

    def _checked(
        self, number: int, rows: Sequence[int] | np.ndarray, starts: Sequence[int], name: str, parts: Sequence[Tensor]
    ) -> Tensor:
        """The signal of `rows` from what it is stored as, `parts`, whose examples begin at `starts`."""
        for part, stored in zip(self._parts(name), parts, strict=True):
            if not np.array_equal(_checksums(stored, starts), self._index.checksums[number][part][rows]):
                _refuse_content(self.folder, self._index.paths[number])
        if len(parts) == 1:
            return parts[0]
        values, indices, tail = parts
        return _from_top_k(values, indices, tail, self._index.classes)

    def _parts(self, name: str) -> list[str]:
        """The tensors of a shard that a signal is made of."""
        is_top_k = name == LOGITS and self.definition.top_k is not None
        return [f"{name}.{part}" for part in ("values", "indices", "tail")] if is_top_k else [name]

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            # The tensors are views of the mapped file: what nobody looks at is not read.
            with _open_shard(self.folder, self._index.paths[number], "pt") as shard:
                self._shards[number] = {name: shard.get_tensor(name) for name in self._index.checksums[number]}
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
        if not self.cache.definition.token_types:
            inputs.pop("token_type_ids", None)
        rows = [{name: array[row, valid] for name, array in inputs.items()} for row, valid in enumerate(mask)]
        keys = np.array([key_of(row["input_ids"], row.get("token_type_ids")) for row in rows], dtype=_KEY)
        examples: list[Example] = []
        absent = 0
        for row, example in zip(rows, self.cache.find(keys, names), strict=True):
            if example is None and self.model is not None:
                example = self._compute(self.model, row, tuple(names))
            absent += example is None
            examples.append(example or {})
        if absent:
            _lacks(self.cache.folder, absent, len(rows))
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


# --------------------------------------------------------------------------- the column of a data set


def whole_logits(folder: str | Path) -> Definition | None:
    """What a folder of a classifier's whole logits says of itself; None where there is no cache yet.

    Raises:
        TeacherCacheError: it is a cache of something else.
    """
    folder = Path(folder).expanduser()
    if not (folder / _MANIFEST).exists():
        return None
    found = _read_definition(folder)
    if LOGITS not in found.signals or found.top_k is not None:
        held = f"the {found.top_k} largest of its logits" if LOGITS in found.signals else ", ".join(found.signals)
        _refuse(folder, f"must hold whole logits, and holds {held}; write one with pydistill cache --signals logits")
    return found


def record_logits(
    texts: Iterable[Sequence[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_length: int,
    batch_size_tokens: int,
    progress: bool,
) -> np.ndarray:
    """See to it that a cache holds a classifier's logits for all texts; returns their keys, in order.

    A cache that is there says itself in what dtype it keeps them, and what else; a new one keeps fp32.

    Args:
        texts, max_length: see `tokenized`.
        model, folder, tokenizer, batch_size_tokens, progress: see `write_cache`.

    Raises:
        TeacherCacheError, ValueError: as `write_cache`; or the cache holds no whole logits.
    """
    kept = whole_logits(folder)
    summary = write_cache(
        tokenized(texts, tokenizer, max_length),
        model,
        kept.signals if kept else [LOGITS],
        folder,
        tokenizer=tokenizer,
        dtype=kept.dtype if kept else "float32",
        batch_size_tokens=batch_size_tokens,
        progress=progress,
    )
    return summary.keys


def with_logits(dataset: Dataset, cache: TeacherCache, keys: np.ndarray) -> Dataset:
    """`dataset` with a column ``teacher_logits``, fp32 ``[C]`` per row, for a `RecordedTeacher`.

    For students that do not read the teacher's tokens, from which a `CachedTeacher` would find them.

    Args:
        dataset: rows without such a column.
        cache: of a classifier's logits.
        keys: of the rows, in their order, as `write_cache` returns them.

    Raises:
        TeacherCacheError: an example is not in the cache, or is damaged.
        ValueError: the rows have the column already, or are of another number.
    """
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    if RECORDED_LOGITS in dataset.column_names:
        _fail("with_logits", f"the data has a column {RECORDED_LOGITS!r} already; remove it")
    if len(dataset) != len(keys):
        _fail("with_logits", f"keys must be one per row, got {len(keys)} for {len(dataset)} rows")
    logits = cache.stack(keys, LOGITS).float().numpy()
    values = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    return concatenate_datasets([dataset, Dataset(pa.table({RECORDED_LOGITS: values}))], axis=1)


def _lacks(folder: Path, absent: int, of: int) -> NoReturn:
    _refuse(
        folder,
        f"lacks {absent:,} of {of:,} examples; run pydistill cache on these texts, which computes only what is "
        "missing, or give CachedTeacher the model",
    )


def _refuse_content(folder: Path, path: Path) -> NoReturn:
    _refuse(
        folder,
        f"is damaged: the content of {path.name} does not match its checksum; delete that file and write its examples "
        "again",
    )


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise TeacherCacheError(f"teacher cache {folder} {reason}")


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
