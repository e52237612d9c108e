# SPDX-License-Identifier: Apache-2.0
"""Words for the BiLSTM student: a whole-word tokenizer from the training sentences, and one vector per word,
from a word2vec or GloVe file or from the sub-word embeddings of a Transformer teacher."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNK, MASK = "[PAD]", "[UNK]", "[MASK]"

# BERT's basic tokenizer cuts at punctuation, which would tear "[MASK]" into three; here it is one piece. It
# is no word of the vocabulary, so it becomes [UNK], as in Tang et al.
_PIECES = Regex(r"(?i:\[mask\])|[\p{P}$+<=>^`|~]")
_NUMERIC = b"0123456789+-.eEnaifNAIF \t"  # the characters of numbers, nan and inf included
_BLOCK = 1 << 20  # bytes read at a time from a binary vector file
_TEACHER_BATCH = 4096  # words whose sub-words are gathered at a time


def build_word_tokenizer(
    sentences: Iterable[str], *, max_size: int | None = None, min_count: int = 1, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """Whole-word tokenizer with the words of `sentences`, most frequent first (ties in alphabetical order).

    Text is cleaned, lower-cased and cut at white space and punctuation as by BERT's basic tokenizer. [PAD] is
    0, [UNK] is 1; unknown words and "[MASK]" become [UNK]. Nothing is added around a sentence. The result
    goes through `save_pretrained` and AutoTokenizer.

    Args:
        sentences: the training texts (of both columns for a pair task).
        max_size: at most this many entries, [PAD] and [UNK] included; None for all.
        min_count: leave out words that occur less often.
        lowercase: lower-case the text and strip accents, here and whenever the tokenizer is used.

    Raises:
        ValueError: max_size below 3, min_count below 1, sentences that are not text or hold no such word.
    """
    if max_size is not None and max_size < 3:
        raise ValueError(f"build_word_tokenizer: max_size must be at least 3 ([PAD], [UNK], a word), got {max_size}")
    if min_count < 1:
        raise ValueError(f"build_word_tokenizer: min_count must be at least 1, got {min_count}")
    if isinstance(sentences, str):
        raise ValueError("build_word_tokenizer: sentences must be an iterable of texts, got one str")
    tokenizer = Tokenizer(models.WordLevel({PAD: 0, UNK: 1}, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_PIECES, behavior="isolated")]
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=2**31 - 1, min_frequency=min_count, show_progress=False, special_tokens=[PAD, UNK]
    )
    tokenizer.train_from_iterator(_texts(sentences), trainer)
    found = tokenizer.get_vocab(with_added_tokens=False)
    words = [word for word in sorted(found, key=found.__getitem__) if word.upper() not in (PAD, UNK, MASK)]
    if not words:
        raise ValueError(
            f"build_word_tokenizer: sentences must hold a word at least min_count={min_count} times, got none"
        )
    tokenizer.model = models.WordLevel(
        {word: index for index, word in enumerate([PAD, UNK, *words][:max_size])}, unk_token=UNK
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        model_input_names=["input_ids", "attention_mask"],
    )


def _texts(sentences: Iterable[str]) -> Iterator[str]:
    for index, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"build_word_tokenizer: sentences must be texts, got {type(sentence).__name__} at {index}")
        yield sentence


def load_word_vectors(path: str | Path, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [V, E] (float32, zero where missing) and found mask [V] (bool) of `words` [V], from a file.

    Formats, told apart by content: GloVe text (a word and E numbers per line), word2vec text (the same below
    a line "count E"), word2vec binary (below that line, each word, a space and E little-endian float32); each
    gzip-compressed or not. The file is streamed, only the rows asked for are kept, and reading stops when all
    are found. Words match exactly; of a word that occurs twice the first vector counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, a line or record that does not fit the format, numbers that are not finite,
            or fewer vectors than the header promises; with the file and the line or record number.
    """
    path, wanted = Path(path), {word.encode() for word in words}
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with cast(BinaryIO, gzip.open(path)) if zipped else open(path, "rb") as file:
            size, rows = _read_vectors(path, file, wanted)
    except EOFError as error:
        raise ValueError(f"load_word_vectors: {path}: the gzip file is cut off; fetch it again") from error
    vectors, found = np.zeros((len(words), size), dtype=np.float32), np.zeros(len(words), dtype=bool)
    for index, word in enumerate(words):
        if (row := rows.get(word.encode())) is not None:
            vectors[index], found[index] = row, True
    return vectors, found


_Rows = dict[bytes, np.ndarray]


def _read_vectors(path: Path, file: BinaryIO, wanted: set[bytes]) -> tuple[int, _Rows]:
    """Width E and the vectors of the `wanted` words of an open file of any of the formats."""
    first = file.readline(_BLOCK)
    fields = first.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        count, size = int(fields[0]), int(fields[1])
        if size < 1:
            raise ValueError(f"load_word_vectors: {path}: line 1: the width must be at least 1, got {size}")
        line = file.read(_BLOCK).lstrip().partition(b"\n")[0]
        numbers = line.replace(b"\t", b" ").partition(b" ")[2].rstrip()
        file.seek(len(first))
        # text has a digit and a blank per number at least; float32 bytes are never all such characters
        if len(numbers) >= min(2 * size - 1, 8) and not numbers[: 4 * size].strip(_NUMERIC):
            return size, _read_text(path, file, 2, size, wanted, count)
        return size, _read_binary(path, file, size, wanted, count)
    if len(fields) < 2:
        raise ValueError(f"load_word_vectors: {path}: line 1: must hold a word and its numbers, got {first[:80]!r}")
    file.seek(0)
    return len(fields) - 1, _read_text(path, file, 1, len(fields) - 1, wanted, None)


def _read_text(path: Path, file: BinaryIO, first_line: int, size: int, wanted: set[bytes], count: int | None) -> _Rows:
    """Lines of a word and `size` numbers; `count` is what the header promises."""
    rows: _Rows = {}
    seen = 0
    for number, line in enumerate(file, first_line):
        line = line.strip()
        if not line:
            continue
        seen += 1
        where = f"load_word_vectors: {path}: line {number}: "
        if line.count(b" ") + line.count(b"\t") < size:
            raise ValueError(f"{where}must hold a word and {size} numbers, got {len(line.split()) - 1} numbers")
        word = line.split(None, 1)[0]
        if word not in wanted or word in rows:
            continue
        name, *numbers = line.rsplit(None, size)
        try:
            row = np.array([float(text) for text in numbers], dtype=np.float32)
        except ValueError as error:
            raise ValueError(f"{where}must hold a word and {size} numbers, got {error}") from error
        if name != word:  # GloVe has words with spaces, which no tokenizer of ours yields
            if _is_number(name.split()[1]):
                raise ValueError(f"{where}must hold a word and {size} numbers, got more")
            continue
        if not np.isfinite(row).all():
            raise ValueError(f"{where}numbers must be finite, got NaN or infinite")
        rows[word] = row
        if len(rows) == len(wanted):
            return rows
    if count is not None and seen < count:
        raise ValueError(f"load_word_vectors: {path}: the header promises {count} vectors, the file has {seen}")
    return rows


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_binary(path: Path, file: BinaryIO, size: int, wanted: set[bytes], count: int) -> _Rows:
    """`count` records of a word, a space and `size` little-endian float32, newlines between them or not."""
    rows: _Rows = {}
    buffer, position = b"", 0
    for number in range(1, count + 1):
        # one record at least: the blank after the word, then the numbers
        while (blank := buffer.find(b" ", position)) < 0 or blank + 1 + 4 * size > len(buffer):
            block = file.read(_BLOCK)
            if not block:
                raise ValueError(
                    f"load_word_vectors: {path}: the header promises {count} vectors of {size} float32, "
                    f"the file ends in vector {number}"
                )
            buffer, position = buffer[position:] + block, 0
        word, position = buffer[position:blank].lstrip(b"\n"), blank + 1 + 4 * size
        if word not in wanted or word in rows:
            continue
        row = np.frombuffer(buffer, dtype="<f4", count=size, offset=blank + 1)
        if not np.isfinite(row).all():
            raise ValueError(f"load_word_vectors: {path}: vector {number}: numbers must be finite, got NaN or infinite")
        rows[word] = row.astype(np.float32)
        if len(rows) == len(wanted):
            break
    return rows


def teacher_word_vectors(
    teacher_model: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> np.ndarray:
    """Vectors [V, E] (float32) of `words` [V]: the mean of the teacher's input embeddings of their sub-words.

    Only the embedding table is read, the model does not run. The tokenizer sees a word as inside a sentence:
    after a space where that makes a difference (byte-level BPE). A word that leaves no sub-word gets zeros.

    Raises:
        ValueError: the teacher's input embeddings are no table of [its vocabulary, E].
    """
    embedding = teacher_model.get_input_embeddings()
    table = getattr(embedding, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2:
        raise ValueError(
            "teacher_word_vectors: teacher_model must have a table of input embeddings, got "
            f"{type(embedding).__name__} from {type(teacher_model).__name__}"
        )
    pieces = teacher_tokenizer.tokenize("a a")
    inside = " " if pieces[0] != pieces[-1] else ""
    vectors = np.zeros((len(words), table.shape[1]), dtype=np.float32)
    for start in range(0, len(words), _TEACHER_BATCH):
        batch = [inside + word for word in words[start : start + _TEACHER_BATCH]]
        ids = teacher_tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        flat = torch.tensor([index for row in ids for index in row], dtype=torch.long)
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
        rows = table.detach()[flat.to(table.device)].float().cpu()
        means = F.embedding_bag(torch.arange(len(flat)), rows, ends[:-1], mode="mean")
        vectors[start : start + len(batch)] = means.numpy()
    return vectors


def word_vectors(
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str | Path | None = None,
    teacher: PreTrainedModel | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    std: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Table [V, E] (float32) for a BiLSTM's `embeddings_from`, one row per id of `tokenizer`.

    From a file (`load_word_vectors`) or from a teacher (`teacher_word_vectors`). The padding row is zero, the
    unknown word's is the mean of the words found; words without a vector get normal random values with the
    standard deviation of those found, the same for the same seed. `std` scales the table so that the words found have
    this standard deviation: a Transformer's input embeddings are several times smaller than word2vec's (about 0.25).

    Raises:
        ValueError: `std` not above 0, not exactly one of path and teacher, a teacher without its tokenizer, a tokenizer
            without padding or unknown token, or no word found.
    """
    if (path is None) == (teacher is None):
        raise ValueError("word_vectors: exactly one of path and teacher must be given")
    if (teacher is None) != (teacher_tokenizer is None):
        raise ValueError("word_vectors: teacher and teacher_tokenizer must be given together")
    if std is not None and not std > 0:
        raise ValueError(f"word_vectors: std must be above 0, got {std}")
    pad, unk = tokenizer.pad_token_id, tokenizer.unk_token_id
    if pad is None or unk is None:
        raise ValueError(f"word_vectors: tokenizer must have a padding and an unknown token, got {pad} and {unk}")
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if path is not None:
        vectors, found = load_word_vectors(path, words)
    else:
        assert teacher is not None and teacher_tokenizer is not None
        vectors = teacher_word_vectors(teacher, teacher_tokenizer, words)
        found = np.asarray(vectors.any(axis=1))
    found[[pad, unk]] = False
    if not found.any():
        raise ValueError(
            f"word_vectors: {path or type(teacher).__name__} must have a vector for at least one of the "
            f"{len(words)} words, got none, such as {words[2:5]}; language and letter case must agree"
        )
    if std is not None:
        vectors *= std / vectors[found].std()
    noise = np.random.default_rng(seed).standard_normal((int((~found).sum()), vectors.shape[1]))
    vectors[~found] = noise * vectors[found].std()
    vectors[unk] = vectors[found].mean(axis=0)
    vectors[pad] = 0
    return torch.from_numpy(vectors)
