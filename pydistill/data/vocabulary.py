# SPDX-License-Identifier: Apache-2.0
"""A WordPiece vocabulary of any size for a student, which reads text as its teacher does: ``pydistill vocab``."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pydistill.config import UserError

if TYPE_CHECKING:
    from pydistill.data.corpus import CorpusSection

SIZE = 4928  # Zhao et al.
PREFIX = "##"
# What a WordPiece tokenizer must have; each is one token in either vocabulary, and means the same there.
SPECIAL_TOKENS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
# What a tokenizer's save_pretrained writes; a folder that holds anything else is not a vocabulary's.
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"}
)


class VocabularyError(UserError):
    """A vocabulary cannot be trained or used as asked."""


def check_wordpiece(role: str, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the ``tokenizers.Tokenizer`` inside a tokenizer of BERT's kind: DistilBERT, ELECTRA, MiniLM, MobileBERT.

    Raises:
        VocabularyError: another kind, or a special token that is missing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(getattr(backend, "model", None)).__name__
    parts = (type(getattr(backend, "normalizer", None)), type(getattr(backend, "pre_tokenizer", None)))
    if kind != "WordPiece" or parts != (normalizers.BertNormalizer, pre_tokenizers.BertPreTokenizer):
        raise VocabularyError(
            f"vocabulary: the {role}'s tokenizer must cut text into words as BERT does and words by WordPiece, got "
            f"{type(tokenizer).__name__} with {kind}; take a model of the BERT family"
        )
    if missing := [name for name in SPECIAL_TOKENS if getattr(tokenizer, name) is None]:
        raise VocabularyError(f"vocabulary: the {role}'s tokenizer has no {', '.join(missing)}")
    assert isinstance(backend, Tokenizer)
    return backend


def train_vocabulary(
    texts: Iterable[str],
    teacher: PreTrainedTokenizerBase,
    *,
    size: int = SIZE,
    min_frequency: int = 2,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer whose words are the teacher's: the same normalisation, the same cuts, fewer pieces.

    The special tokens are the teacher's; they have the ids from 0, padding first. Then come the characters, for the
    beginning of a word and for its inside, the most frequent ones: at most a tenth of ``size`` (100 if that is more),
    so that rare ones do not crowd out pieces. The rest is found as `tokenizers` does it, by merging the most frequent
    pair first.

    Args:
        texts: read once.
        teacher: a tokenizer of BERT's kind, see `check_wordpiece`.
        size: pieces, special tokens included.
        min_frequency: a pair that is rarer is not merged.
        progress: show how many texts were read, and the merging.

    Returns:
        a tokenizer of exactly ``size`` entries, the same for the same texts; goes through ``save_pretrained`` and
        ``AutoTokenizer``.

    Raises:
        VocabularyError: a teacher of another kind, or a size that the texts do not fill or whose alphabet exceeds it.
    """
    source = check_wordpiece("teacher", teacher)
    special = [str(getattr(teacher, name)) for name in SPECIAL_TOKENS]
    words = _count_words(texts, source, progress)
    limit = max(100, size // 10)
    characters = _characters(words)[:limit]
    first = [*special, *sorted(characters), *sorted(PREFIX + character for character in characters)]
    if size <= len(first):
        raise VocabularyError(
            f"vocabulary: size must be above {len(first)}, the special tokens and the characters of the texts at the "
            f"beginning and within words, got {size:,}"
        )
    pieces = _merge(words, first, size, min_frequency, progress)
    if len(pieces) < size:
        raise VocabularyError(
            f"vocabulary: the texts yield {len(pieces):,} pieces that occur {min_frequency} times, not {size:,}; give "
            f"more text, or --size {len(pieces)}"
        )
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=str(teacher.unk_token), continuing_subword_prefix=PREFIX))
    tokenizer.normalizer, tokenizer.pre_tokenizer = source.normalizer, source.pre_tokenizer
    cls, sep = str(teacher.cls_token), str(teacher.sep_token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, pieces[cls]), (sep, pieces[sep])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    names: dict[str, Any] = dict(zip(SPECIAL_TOKENS, special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=teacher.model_max_length,
        model_input_names=teacher.model_input_names,
        **names,
    )


def split_words(backend: Tokenizer, text: str) -> list[str]:
    """Return the words of a text, normalised."""
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def _count_words(texts: Iterable[str], backend: Tokenizer, progress: bool) -> Counter[str]:
    # A blank always ends a word, and nothing that the normaliser does reaches over one. So whatever stands between two
    # blanks is looked at once, however often it occurs.
    chunks: Counter[str] = Counter()
    for text in tqdm(texts, desc="vocabulary", unit=" texts", disable=not progress):
        chunks.update(text.split(" "))
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word in split_words(backend, chunk):
            words[word] += count
    return words


def _characters(words: Mapping[str, int]) -> list[str]:
    """Every character, the most frequent first."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return sorted(counts, key=lambda character: (-counts[character], character))


def _merge(words: Mapping[str, int], first: list[str], size: int, min_frequency: int, progress: bool) -> dict[str, int]:
    """Return the ids of ``first``, in that order, and of the pieces that merging adds to them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=first[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        # All that the trainer would otherwise find by itself, in an order that differs from run to run, and with it
        # which of two equally frequent pairs is merged.
        special_tokens=first,
        limit_alphabet=0,
        continuing_subword_prefix=PREFIX,
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    return tokenizer.get_vocab()


def _repeated(words: Mapping[str, int], block: int = 10_000) -> Iterator[str]:
    for word, count in words.items():
        for start in range(0, count, block):
            yield " ".join([word] * min(block, count - start))


def write_vocabulary(
    section: CorpusSection,
    teacher: PreTrainedTokenizerBase,
    output: Path,
    *,
    size: int = SIZE,
    overwrite: bool = False,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train on the texts of a corpus and write the tokenizer to the folder ``output``, whole or not at all.

    Raises:
        VocabularyError: ``output`` exists and is not to be replaced, or holds more than a tokenizer, or what
            `train_vocabulary` refuses.
        CorpusError: the corpus cannot be read.
    """
    from pydistill.data.corpus import corpus_texts

    if output.exists() and not overwrite:
        raise VocabularyError(f"vocabulary: {output} exists; pass --overwrite to replace it")
    if output.exists() and not (output / "tokenizer.json").is_file():
        raise VocabularyError(f"vocabulary: {output} holds no tokenizer and is not replaced; name another folder")
    if output.exists() and (others := {path.name for path in output.iterdir()} - TOKENIZER_FILES):
        raise VocabularyError(
            f"vocabulary: {output} holds {min(others)}, which is no part of a tokenizer, and is not replaced; name "
            "another folder"
        )
    tokenizer = train_vocabulary(corpus_texts(section), teacher, size=size, progress=progress)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer
