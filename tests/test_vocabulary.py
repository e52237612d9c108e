# SPDX-License-Identifier: Apache-2.0
"""Vocabularies for students: what is trained, what it shares with the teacher's, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mixed_vocab_data import SENTENCES, TEACHER_SPECIAL, special_ids, student_tokenizer, teacher_tokenizer
from tiny_models import tiny_tokenizer
from transformers import AutoTokenizer, BertConfig, BertTokenizer

from pydistill.cli import main
from pydistill.data.vocabulary import VocabularyError, check_wordpiece, train_vocabulary

# Accents, capitals, Chinese characters, control characters, several kinds of white space, a special token as text.
HARD = "The KEEPER's  Café—naïve; \u7ef4\u57fa liked\tthe\u00a0machine\x07s [MASK] (1915)"


def test_size_and_special_tokens() -> None:
    tokenizer = student_tokenizer()
    assert len(tokenizer) == 90 and sorted(tokenizer.get_vocab().values()) == list(range(90))
    # The same tokens as the teacher's, with their roles; the ids are the first.
    assert special_ids(tokenizer) == {name: index for index, name in enumerate(special_ids(tokenizer))}
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == TEACHER_SPECIAL
    assert special_ids(teacher_tokenizer()) != special_ids(tokenizer)


def test_words_are_cut_and_normalised_as_the_teacher_does_it() -> None:
    ours, theirs = student_tokenizer(), teacher_tokenizer()
    for text in [*SENTENCES, HARD]:
        words = [
            [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
            for backend in (ours.backend_tokenizer, theirs.backend_tokenizer)
        ]
        assert words[0] == words[1] and len(words[0]) > 3
    assert "keeper" in words[0] and "cafe" in words[0]
    cased = BertTokenizer(vocab={token: index for index, token in enumerate(TEACHER_SPECIAL)}, do_lower_case=False)
    assert any(piece[0].isupper() for piece in train_vocabulary(SENTENCES, cased, size=75).get_vocab())
    assert not any(piece != piece.lower() for piece in set(ours.get_vocab()) - set(TEACHER_SPECIAL))


def test_frequent_words_are_one_piece_and_everything_can_be_read() -> None:
    tokenizer = student_tokenizer()
    assert tokenizer.tokenize("the machine") == ["the", "machine"]
    for text in SENTENCES:
        assert tokenizer.unk_token not in tokenizer.tokenize(text)
    assert tokenizer.decode(tokenizer(SENTENCES[3])["input_ids"], skip_special_tokens=True).startswith("a small model")


def test_the_same_texts_give_the_same_vocabulary() -> None:
    # The order of the texts does not matter either. Many pairs occur equally often here.
    for texts in (iter(SENTENCES), reversed(SENTENCES), SENTENCES):
        again = train_vocabulary(texts, teacher_tokenizer(), size=90, min_frequency=1)
        assert again.get_vocab() == student_tokenizer().get_vocab()


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path: Path) -> None:
    tokenizer = student_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer(SENTENCES[0], HARD)
    for config in (False, True):
        if config:  # beside a model, AutoTokenizer looks at its type
            BertConfig(vocab_size=90).save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert dict(loaded(SENTENCES[0], HARD)) == dict(expected)
        assert special_ids(loaded) == special_ids(tokenizer) and loaded.model_max_length == 64
    assert expected["input_ids"][0] == tokenizer.cls_token_id and set(expected["token_type_ids"]) == {0, 1}


def test_rare_characters_do_not_crowd_out_pieces() -> None:
    chinese = "".join(chr(0x4E00 + offset) for offset in range(500))
    found = train_vocabulary([chinese, *SENTENCES], teacher_tokenizer(), size=230, min_frequency=1).get_vocab()
    # The alphabet holds at most 100, and those of the sentences are more frequent.
    assert 1 < sum("\u4e00" <= piece <= "\u9fff" for piece in found) < 100
    assert set("abcdefghiklmn") | {"##a", "##n"} < found.keys() and "machine" in found


def test_what_is_refused() -> None:
    teacher = teacher_tokenizer()
    with pytest.raises(
        VocabularyError, match=r"size must be above 57, the special tokens and the characters .*, got 5"
    ):
        train_vocabulary(SENTENCES, teacher, size=5)
    with pytest.raises(VocabularyError, match=r"yield \d+ pieces that occur 2 times, not 4,928; .* or --size \d+"):
        train_vocabulary(SENTENCES, teacher)
    with pytest.raises(VocabularyError, match="teacher's tokenizer must cut text into words as BERT .*WordLevel"):
        check_wordpiece("teacher", tiny_tokenizer())
    without = BertTokenizer(vocab={token: index for index, token in enumerate(TEACHER_SPECIAL)})
    without.mask_token = None
    with pytest.raises(VocabularyError, match="the student's tokenizer has no mask_token"):
        check_wordpiece("student", without)


# ------------------------------------------------------------------------- command line


def words(folder: Path, *more: str) -> list[str]:
    return ["vocab", f"{folder}/corpus.txt", f"{folder}/out", "--teacher", f"{folder}/teacher", *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES * 2), encoding="utf-8")
    teacher_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path


def test_vocab_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, "--size", "90")) == 0
    printed = capsys.readouterr().out
    assert f"{folder}/out: 90 pieces" in printed and "among the teacher's 171" in printed
    loaded = AutoTokenizer.from_pretrained(folder / "out")
    assert len(loaded) == 90 and loaded.tokenize("the machine") == ["the", "machine"]
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "out", "teacher"]


def test_vocab_replaces_only_what_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, "--size", "90")) == 0
    before = (folder / "out" / "tokenizer.json").read_bytes()
    assert main(words(folder, "--size", "80")) == 2
    assert "out exists; pass --overwrite" in capsys.readouterr().err
    # A failure leaves what was there.
    assert main(words(folder, "--size", "9000", "--overwrite")) == 2
    assert (folder / "out" / "tokenizer.json").read_bytes() == before
    assert main(words(folder, "--size", "80", "--overwrite")) == 0
    assert len(AutoTokenizer.from_pretrained(folder / "out")) == 80
    # A model's folder has a tokenizer, too. It is refused before the texts are read.
    (folder / "out" / "model.safetensors").write_text("weights")
    (folder / "corpus.txt").rename(folder / "elsewhere.txt")
    assert main(words(folder, "--size", "80", "--overwrite")) == 2
    assert "out holds model.safetensors, which is no part of a tokenizer, and is not" in capsys.readouterr().err
    assert (folder / "out" / "model.safetensors").read_text() == "weights"
    (folder / "out" / "model.safetensors").unlink()
    (folder / "out" / "tokenizer.json").rename(folder / "out" / "vocab.txt")
    assert main(words(folder, "--size", "80", "--overwrite")) == 2
    assert "holds no tokenizer and is not replaced" in capsys.readouterr().err
    assert not list(folder.glob(".*"))


def test_vocab_refuses_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for replaced, rule in (
        ({1: f"{folder}/none.txt"}, "none.txt: there is no such file"),
        ({4: f"{folder}/nobody"}, "--teacher: .*nobody: "),
    ):
        given = [replaced.get(place, word) for place, word in enumerate(words(folder))]
        assert main(given) == 2
        assert re.search(rule, capsys.readouterr().err)
    (folder / "corpus.txt").write_text("\n \n")
    assert main(words(folder)) == 2
    assert "holds no text" in capsys.readouterr().err
    assert not (folder / "out").exists()
