# SPDX-License-Identifier: Apache-2.0
"""Sentences, and two WordPiece vocabularies of them, small enough to be trained in milliseconds."""

from __future__ import annotations

import functools

from transformers import BertTokenizer, PreTrainedTokenizerFast

from pydistill.data.vocabulary import SPECIAL_TOKENS, train_vocabulary

SENTENCES = """\
I like machine learning, and the machines like to learn.
The lighthouse keeper learned to mend the great machine in the harbour.
Nobody liked the harbour in winter; the keepers were lonely there.
A small model learns from a large one what the large one has learned.
Learning is slow at first, then it is quick, and at last it is done.
The winter was long, the harbour was quiet, and the keeper was content.
Great machines break in small ways. Small machines break in great ways!
He mended what was broken and kept what was whole.
""".splitlines()

TEACHER_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def teacher_tokenizer() -> BertTokenizer:
    """BERT's own class, lower-casing; its special tokens lie elsewhere than the student's, as BERT's do."""
    blank = BertTokenizer(vocab={token: index for index, token in enumerate(TEACHER_SPECIAL)})
    trained = train_vocabulary(SENTENCES, blank, size=170, min_frequency=1)
    # Pieces that the student has and its teacher has not.
    missing = {"machine", "learn", "##nd"}
    pieces = sorted(set(trained.get_vocab()) - set(TEACHER_SPECIAL) - missing)
    unused = [f"[unused{number}]" for number in range(1 + len(missing))]
    order = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(order)}, model_max_length=64)


@functools.cache
def student_tokenizer() -> PreTrainedTokenizerFast:
    """About half as many pieces."""
    return train_vocabulary(SENTENCES, teacher_tokenizer(), size=90, min_frequency=1)


def special_ids(tokenizer: object) -> dict[str, int]:
    """The id of each special token by its role."""
    return {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}
