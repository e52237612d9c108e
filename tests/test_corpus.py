# SPDX-License-Identifier: Apache-2.0
"""The corpus: what becomes a row, in which order, exactly resumed, and packed rows inside models."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_encoder import CONFIGS, SMALL, teacher_of
from tiny_models import WORDS, tiny_bert, tiny_rows, tiny_sentences, tiny_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, ModernBertConfig, TrainerCallback, TrainingArguments

from pydistill import SoftTarget
from pydistill.data.corpus import (
    Corpus,
    CorpusError,
    CorpusSection,
    PackedCollator,
    load_corpus,
)
from pydistill.distiller import Distiller
from pydistill.packing import block_mask, check_packing, first_position
from pydistill.teachers import OnlineTeacher
from pydistill.trainer import DistillationTrainer


def corpus(texts: list[str], **options: Any) -> Corpus:
    return Corpus(texts, tiny_tokenizer(), **{"max_length": 16, "endless": False} | options)


def words(rows: Any) -> list[list[str]]:
    """The words of each row, without the special tokens."""
    tokenizer = tiny_tokenizer()
    return [tokenizer.convert_ids_to_tokens(row["input_ids"], skip_special_tokens=True) for row in rows]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------- sources


def test_lines_of_several_files_become_rows_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", ["w3 w4", "", "  ", "w5"])
    write(tmp_path / "a.txt", ["w0", "w1 w2"])
    write(tmp_path / "z.txt", ["w6"])
    section = CorpusSection(files=[f"{tmp_path}/[ab].txt", f"{tmp_path}/z.txt", f"{tmp_path}/a.txt"], shuffle_buffer=1)
    rows = itertools.islice(load_corpus(section, tiny_tokenizer()), 10)
    once = [["w0"], ["w1", "w2"], ["w3", "w4"], ["w5"], ["w6"]]
    assert words(rows) == once + once


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_files_with_columns_and_data_sets(tmp_path: Path, suffix: str) -> None:
    import pandas

    texts = ["w1 w2", "w3", "w4 w5 w6"]
    frame = pandas.DataFrame({"id": [1, 2, 3], "body": texts})
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    else:
        frame.to_csv(path, sep="\t" if suffix == "tsv" else ",") if suffix != "parquet" else frame.to_parquet(path)
    for keys in ({"files": str(path)}, {"dataset": f"{tmp_path}:train"}):
        section = CorpusSection(**keys, text_column="body", shuffle_buffer=1)
        assert load_corpus(section, tiny_tokenizer()).first_texts(5) == texts
        with pytest.raises(CorpusError, match=r"there is no column 'text', only .*id, body"):
            load_corpus(CorpusSection(**keys), tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.txt", b"", "empty.txt: holds no text"),
        ("blank.txt", b"\n  \n", "blank.txt: holds no text"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "latin.txt: must be readable UTF-8"),
        ("none.jsonl", b'{"text": ""}\n', "none.jsonl: holds no text"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl: datasets cannot read it"),
    ],
)
def test_files_without_usable_text_are_named(tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / name)]
    if name.endswith(".txt"):
        files.insert(0, write(tmp_path / "good.txt", ["w1"]))
    with pytest.raises(CorpusError, match=rule):
        load_corpus(CorpusSection(files=files), tiny_tokenizer())


def test_what_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", ["w1"])
    with pytest.raises(CorpusError, match=r"corpus.files: .*/none.\*: there is no such file"):
        load_corpus(CorpusSection(files=[good, f"{tmp_path}/none.*"]), tiny_tokenizer())
    (tmp_path / "other.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(CorpusError, match="must be of one kind, got json, text"):
        load_corpus(CorpusSection(files=[good, f"{tmp_path}/other.jsonl"]), tiny_tokenizer())
    with pytest.raises(CorpusError, match="datasets cannot read it"):
        load_corpus(CorpusSection(dataset=f"{tmp_path}/none"), tiny_tokenizer())
    with pytest.raises(CorpusError, match="corpus.held_out: is 0"):
        load_corpus(CorpusSection(files=good), tiny_tokenizer(), part="held_out")
    for keys, rule in (({}, "either files or dataset"), ({"files": good, "held_out": 1}, "keep every text out")):
        with pytest.raises(ValidationError, match=rule):
            CorpusSection(**keys)
    with pytest.raises(CorpusError, match="no text is held out with held_out 5"):
        list(corpus(["w1"], every=5, held_out=True))
    without = tiny_tokenizer()
    without.pad_token = None
    with pytest.raises(CorpusError, match="no padding token"):
        Corpus(["w1"], without, max_length=8)
    with pytest.raises(CorpusError, match="cannot be read by 2 workers"):
        next(iter(DataLoader(corpus(["w1", "w2"]), batch_size=None, num_workers=2)))


# ------------------------------------------------------------------------- order


def test_every_kth_text_is_held_out() -> None:
    texts = WORDS[:10]
    assert words(corpus(texts, every=4, shuffle_buffer=1)) == [[w] for w in texts if w not in ("w3", "w7")]
    assert words(corpus(texts, every=4, held_out=True, shuffle_buffer=1)) == [["w3"], ["w7"]]


def test_shuffling_is_by_block_and_follows_seed_and_pass() -> None:
    def order(passes: int = 1, **options: Any) -> list[list[str]]:
        stream = itertools.islice(corpus(WORDS, endless=True, shuffle_buffer=16, **options), passes * len(WORDS))
        flat = [row[0] for row in words(stream)]
        return [flat[start : start + len(WORDS)] for start in range(0, len(flat), len(WORDS))]

    first, second = order(2)
    assert order(2) == [first, second] and first != second and order(seed=1)[0] not in (first, second)
    for once in (first, second):
        assert once != WORDS
        # Blocks of 16, 16 and 8, each of them whole.
        for start in (0, 16, 32):
            assert set(once[start : start + 16]) == set(WORDS[start : start + 16])


def test_long_texts_are_cut_with_their_special_tokens() -> None:
    (row,) = corpus([" ".join(WORDS[:20])], max_length=6)
    assert tiny_tokenizer().convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "w0", "w1", "w2", "w3", "[SEP]"]


def test_seen_rows_cost_no_tokenization_and_change_nothing() -> None:
    texts = tiny_sentences(50)
    full = list(itertools.islice(corpus(texts, endless=True, shuffle_buffer=20, seed=3), 130))
    # In the middle of a block, at the end of a pass, in a later pass.
    for rows in (7, 50, 73):
        stream = corpus(texts, endless=True, shuffle_buffer=20, seed=3).seen(rows)
        again = list(itertools.islice(stream, 130))
        assert again[rows:] == full[rows:]
        assert all(row == {"input_ids": [0]} for row in again[:rows])
    # How many texts fill a packed row is known only from their tokens.
    packed = corpus(texts, packing="packed")
    assert list(packed.seen(2)) == list(packed)


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class _Recording:
    """A collator that hands on what `inner` makes and keeps what it was given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.batches: list[list[Any]] = []

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        self.batches.append(rows)
        return self.inner(rows)


@pytest.mark.parametrize("packing", ["truncate", "packed"])
def test_training_resumed_in_mid_pass_is_bit_identical(tmp_path: Path, packing: Any) -> None:
    # 90 texts, 2 x 4 rows a step: 12 steps go through the corpus more than once when rows are texts.
    texts = tiny_sentences(90)

    def trainer(name: str, rows: Any, *callbacks: Any) -> DistillationTrainer:
        def collate(batch: list[Any]) -> dict[str, Tensor]:
            return PackedCollator(0)(batch) if packing == "packed" else tiny_collator(batch)

        arguments = TrainingArguments(
            str(tmp_path / name),
            max_steps=12,
            save_steps=5,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        return DistillationTrainer(
            Distiller(tiny_bert(dropout=0.1), tiny_bert(seed=1), SoftTarget()),
            arguments,
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            data_collator=_Recording(collate),
            callbacks=list(callbacks),
        )

    def stream() -> Corpus:
        return corpus(texts, endless=True, packing=packing, shuffle_buffer=32, max_length=24)

    whole = trainer("whole", stream())
    whole.train()
    trainer("cut", stream(), _Stop(8)).train()
    resumed = trainer("cut", stream().seen(5 * 8))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    weights = zip(whole.distiller.student.parameters(), resumed.distiller.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert resumed.data_collator.batches[10:] == whole.data_collator.batches[10:]
    other = trainer("other", corpus(texts, endless=True, packing=packing, shuffle_buffer=32, max_length=24, seed=1))
    other.train()
    weights = zip(whole.distiller.student.parameters(), other.distiller.student.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)


def tiny_collator(rows: list[Any]) -> dict[str, Tensor]:
    return dict(tiny_tokenizer().pad(rows, return_tensors="pt"))


# ------------------------------------------------------------------------- packing


def test_packing_keeps_every_text_whole_and_wastes_little() -> None:
    texts = tiny_sentences(300)
    rows = list(corpus(texts, packing="packed", max_length=32, shuffle_buffer=1))
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        assert len(row["input_ids"]) == len(row["segment_ids"]) == len(row["position_ids"]) <= 32
        assert row["segment_ids"] == sorted(row["segment_ids"]) and row["segment_ids"][0] == 1
        for segment, group in itertools.groupby(zip(*row.values(), strict=True), key=lambda item: item[1]):
            tokens, _, positions = zip(*group, strict=True)
            assert list(positions) == list(range(len(tokens))) and segment <= len(row["input_ids"])
            found[tokens] += 1
    assert found == Counter(tuple(ids) for ids in tiny_tokenizer()(texts)["input_ids"])
    # The rows that were still open at the end of the pass are not full.
    assert sum(len(row["input_ids"]) for row in rows[:-16]) > 0.9 * 32 * len(rows[:-16])


def test_packed_batches_are_padded_with_segment_zero() -> None:
    rows = [
        {"input_ids": [2, 5, 3, 2, 3], "segment_ids": [1, 1, 1, 2, 2], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [2, 3], "segment_ids": [1, 1], "position_ids": [0, 1]},
    ]
    batch = PackedCollator(9, first_position=2, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[2, 5, 3, 2, 3, 9, 9, 9], [2, 3, 9, 9, 9, 9, 9, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3, 2, 2, 2], [2, 3, 2, 2, 2, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    mask = block_mask(batch["segment_ids"])
    assert mask.shape == (2, 1, 8, 8)
    assert mask[0, 0, 3].tolist() == [False, False, False, True, True, False, False, False]
    assert mask.any(-1).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_row_gives_the_hidden_states_of_its_texts(kind: str) -> None:
    model = teacher_of(kind).eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 50, (length,), generator=generator).tolist() for length in (7, 1, 12, 4)]
    rows = [
        {
            "input_ids": [token for text in group for token in text],
            "segment_ids": [number for number, text in enumerate(group, 1) for _ in text],
            "position_ids": [position for text in group for position in range(len(text))],
        }
        for group in (texts[:3], texts[3:])  # the second row is mostly padding
    ]
    batch = PackedCollator(1, first_position(model))(rows)
    with torch.no_grad():
        hidden = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=block_mask(batch["segment_ids"]),
        ).last_hidden_state
        alone = [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
        plain = model(**{key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}).last_hidden_state
    assert torch.isfinite(hidden).all()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], torch.cat(alone), atol=2e-5, rtol=0)
    # Without the block mask the texts see each other: the comparison above can fail.
    assert not torch.allclose(plain[real], torch.cat(alone), atol=1e-2)
    check_packing(model)


def test_teacher_and_student_read_packed_rows_of_a_batch() -> None:
    texts = tiny_sentences(6)
    rows = list(corpus(texts, packing="packed", max_length=24, shuffle_buffer=1))
    batch = PackedCollator(0)(rows)
    assert len(rows) < 6
    single = tiny_collator([{"input_ids": row} for row in tiny_tokenizer()(texts)["input_ids"]])
    teacher = OnlineTeacher(tiny_bert(layers=2))
    names = frozenset({"queries@-1", "hidden_states@0"})
    packed, plain = teacher.signals(batch, names), teacher.signals(single, names)
    for name in names:
        # [B, N, ...] with the tokens in front; queries are [B, H, N, d].
        found, expected = (
            (side[name].transpose(1, 2) if name.startswith("queries") else side[name]) for side in (packed, plain)
        )
        by_text = {
            tuple(row[keep].tolist()): out[keep]
            for row, keep, out in zip(single["input_ids"], single["attention_mask"].bool(), expected, strict=True)
        }
        for row, segments, out in zip(batch["input_ids"], batch["segment_ids"], found, strict=True):
            for number in range(1, int(segments.max()) + 1):
                keep = segments == number
                torch.testing.assert_close(out[keep], by_text[tuple(row[keep].tolist())], atol=1e-5, rtol=0)
    distiller = Distiller(tiny_bert(seed=3), teacher, SoftTarget())
    masks: list[Tensor] = []
    distiller.student.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    distiller(**batch).loss.backward()
    assert torch.equal(masks[0], block_mask(batch["segment_ids"]))


def test_models_that_cannot_read_packed_rows_are_refused() -> None:
    eager = AutoModel.from_config(CONFIGS["bert"](), attn_implementation="eager")
    with pytest.raises(ValueError, match=r"BertModel cannot read packed rows: its attention is 'eager'; load it with"):
        check_packing(eager)
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 2}
    ids = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    window = AutoModel.from_config(ModernBertConfig(**SMALL, **small, **ids))
    with pytest.raises(ValueError, match="attend within a window"):
        check_packing(window)

    class Deaf(type(teacher_of("bert"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return super().forward(input_ids=input_ids)

    deaf = Deaf(CONFIGS["bert"]())
    with pytest.raises(ValueError, match=r"differ from those of the texts one by one; or set corpus.packing"):
        check_packing(deaf)


def test_rows_of_a_corpus_are_those_of_a_tokenized_table() -> None:
    table = tiny_rows(20)
    rows = list(corpus(table["sentence"][:], shuffle_buffer=1))
    assert [row["input_ids"] for row in rows] == table["input_ids"][:]
