# SPDX-License-Identifier: Apache-2.0
"""Teacher signals on disk: what is written comes back for the right example, and nothing else ever does."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import in_a_new_process
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_rows, tiny_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DistilBertConfig, DistilBertModel, TrainingArguments

from pydistill import AttentionRelation, ProjectedMSE, SoftTarget, soft_target_loss
from pydistill.cache import CachedTeacher, TeacherCache, TeacherCacheError, write_cache
from pydistill.capture import capture
from pydistill.distiller import Distiller
from pydistill.objective import Objective
from pydistill.teachers import EnsembleTeacher
from pydistill.trainer import DistillationCollator, DistillationTrainer

SIGNALS = ("logits", "hidden_states@-1", "queries@-1", "keys@0", "values@-1")
ROWS = tiny_rows(24)


def teacher() -> Any:
    return tiny_bert(seed=1, layers=2, dropout=0.1)


def write(folder: Path, rows: Any = ROWS, signals: Any = SIGNALS, **options: Any) -> Any:
    given = {"dtype": "float32", "batch_size_tokens": 40, "progress": False, "tokenizer": tiny_tokenizer()} | options
    return write_cache(rows, given.pop("model", None) or teacher(), signals, folder, **given)


def cached(folder: Path, signals: Any = SIGNALS, **options: Any) -> CachedTeacher:
    found = CachedTeacher(TeacherCache(folder), **options)
    found.check(frozenset(signals))
    return found


def read(teacher: CachedTeacher, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step would be given."""
    return teacher.signals(teacher.read(batch), frozenset(teacher._wanted))


def batch_of(rows: Dataset, chosen: list[int]) -> dict[str, Tensor]:
    return DistillationCollator(tiny_tokenizer())([rows[index] for index in chosen])


def truth(batch: dict[str, Tensor], signals: Any = SIGNALS) -> dict[str, Tensor]:
    with torch.no_grad():
        return capture(teacher().eval(), signals)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def without_padding(name: str, signal: Tensor, mask: Tensor) -> Tensor:
    if name == "logits":
        return signal
    return (signal.transpose(1, 2) if "hidden" not in name else signal)[mask.bool()]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_signals_come_back_in_any_order(tmp_path, dtype, tolerance):
    """Other batches, another order, other padding, in workers too: each example has its own."""
    summary = write(tmp_path, dtype=dtype)
    assert summary.examples == summary.computed == 24
    teacher = cached(tmp_path)
    loader = DataLoader(
        ROWS, batch_size=5, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(0),
        collate_fn=teacher.collator(DistillationCollator(tiny_tokenizer())),
    )  # fmt: skip
    seen = 0
    for batch in loader:
        found, expected = teacher.signals(batch, frozenset(SIGNALS)), truth(batch)
        mask = batch["attention_mask"]
        for name in SIGNALS:
            assert found[name].shape == expected[name].shape
            mine, theirs = (without_padding(name, one[name].float(), mask) for one in (found, expected))
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-5)
            if name != "logits":
                assert not without_padding(name, found[name], 1 - mask).any()
        seen += len(mask)
    assert seen == 24


def test_writing_goes_on_and_writers_share(tmp_path):
    """What is there is not computed again; duplicates are one example; two writers at once divide the work."""
    first = write(tmp_path / "a", ROWS.select(range(10)), flush_seconds=0.0)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    again = write(tmp_path / "a", [*ROWS, *ROWS])
    assert (first.computed, again.computed, again.examples) == (10, 14, 24)
    assert len(TeacherCache(tmp_path / "a")) == 24
    assert write(tmp_path / "a", tokenizer=None).computed == 0
    shared = [write(tmp_path / "b", share=(number, 2)) for number in range(2)]
    assert sum(one.computed for one in shared) == 24 and all(0 < one.computed < 24 for one in shared)
    batch = batch_of(ROWS, [3, 20, 7])
    one, other = read(cached(tmp_path / "a"), batch), read(cached(tmp_path / "b"), batch)
    for name in SIGNALS:
        # A product over more rows rounds in another order.
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_writers_at_the_same_time(tmp_path):
    """Three processes write everything at once, into a folder that none of them finds: nothing is lost or refused."""
    folder = str(tmp_path / "c")
    code = f"from pathlib import Path; import test_cache; test_cache.write(Path({folder!r}), flush_seconds=0.0)"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: in_a_new_process(["-c", code]), range(3)))
    assert len(TeacherCache(tmp_path / "c")) == 24
    batch = batch_of(ROWS, [0, 11, 23])
    for name, signal in read(cached(tmp_path / "c"), batch).items():
        mine, theirs = (without_padding(name, one, batch["attention_mask"]) for one in (signal, truth(batch)[name]))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
    """Only whole shards are left, and the next call computes the rest."""
    code = f"""
import os, pydistill.cache as cache, test_cache
from pathlib import Path
flush, count = cache._Writer.flush, 0
def counting(writer):
    global count
    flush(writer)
    count += 1
    if count == 3:
        (writer.folder / ".signals-half.safetensors.1.tmp").write_bytes(b"half")
        os._exit(9)
cache._Writer.flush = counting
test_cache.write(Path({str(tmp_path)!r}), flush_seconds=0.0)
"""
    with pytest.raises(AssertionError):
        in_a_new_process(["-c", code])
    left = len(TeacherCache(tmp_path))
    assert 0 < left < 24
    assert write(tmp_path).computed == 24 - left
    assert len(TeacherCache(tmp_path)) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": tiny_bert(seed=2, layers=2)}, "different the teacher's weights, their dtype or its configuration"),
        ({"signals": ("logits",)}, r"different signals \(.*keys@0.* there, \('logits',\) here\)"),
        ({"dtype": "bfloat16"}, r"different dtype \(float32 there, bfloat16 here\)"),
        ({"top_k": 1}, r"different top_k \(None there, 1 here\)"),
    ],
)
def test_another_cache_is_refused(tmp_path, change, message):
    write(tmp_path, ROWS.select(range(3)))
    with pytest.raises(TeacherCacheError, match=message):
        write(tmp_path, **change)


def test_a_stale_cache_is_refused(tmp_path):
    write(tmp_path, ROWS.select(range(3)))
    TeacherCache(tmp_path, model=teacher(), tokenizer=tiny_tokenizer())
    with pytest.raises(TeacherCacheError, match="different the teacher's weights"):
        TeacherCache(tmp_path, model=tiny_bert(seed=5, layers=2))
    with pytest.raises(TeacherCacheError, match="different the tokenizer"):
        TeacherCache(tmp_path, model=teacher(), tokenizer=tiny_tokenizer(padding_side="left"))
    with pytest.raises(TeacherCacheError, match=r"no teacher cache: cache.json cannot be read"):
        TeacherCache(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(TeacherCacheError, match=r"holds notes.txt but no cache.json"):
        write(tmp_path / "other")


def test_weights_behind_the_signals_do_not_matter(tmp_path):
    """A pooler that no checkpoint has is new every time."""
    write(tmp_path, signals=("values@0",))
    changed = teacher()
    torch.nn.init.normal_(changed.bert.pooler.dense.weight)
    TeacherCache(tmp_path, model=changed)
    torch.nn.init.normal_(changed.bert.encoder.layer[0].attention.self.value.weight)
    with pytest.raises(TeacherCacheError, match="weights"):
        TeacherCache(tmp_path, model=changed)


def test_token_types_tell_examples_apart(tmp_path):
    """But zeros are no types at all, and to a teacher that does not read them all are the same."""
    ids = ROWS[0]["input_ids"]
    typed = [{"input_ids": ids, "token_type_ids": [kind] * len(ids)} for kind in (0, 1)]
    assert write(tmp_path / "a", [{"input_ids": ids}, *typed]).examples == 2
    batch = {name: torch.tensor([typed[1][name]]) for name in typed[1]}
    found = read(cached(tmp_path / "a"), batch)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, teacher().eval()(**batch).logits)
    distil = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    assert write(tmp_path / "b", typed, ["hidden_states@0"], model=distil).examples == 1
    assert read(cached(tmp_path / "b", ["hidden_states@0"]), batch)


def test_damage_is_noticed(tmp_path):
    write(tmp_path, ROWS.select(range(4)))
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    tensors["logits"][0, 0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(TeacherCacheError, match="does not match its checksum"):
        read(cached(tmp_path), batch_of(ROWS, [0, 1, 2, 3]))
    # What it says of itself counts, too.
    tensors["logits"][0, 0] -= 1
    save_file(tensors, path, metadata)
    assert read(cached(tmp_path), batch_of(ROWS, [0, 1, 2, 3]))
    save_file(tensors, path, metadata | {"by_row": ""})
    with pytest.raises(TeacherCacheError, match="does not match its checksum"):
        read(cached(tmp_path), batch_of(ROWS, [0]))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TeacherCacheError, match=r"is damaged: signals-.* cannot be read"):
        TeacherCache(tmp_path)


def test_what_is_missing(tmp_path):
    """Refused, or computed to what the cache would hold."""
    write(tmp_path, ROWS.select(range(10)))
    batch = batch_of(ROWS, [2, 12, 20])
    with pytest.raises(TeacherCacheError, match=r"lacks 2 of 3 examples; run pydistill cache on these texts"):
        read(cached(tmp_path), batch)
    computed = read(cached(tmp_path, model=teacher()), batch)
    write(tmp_path)
    for name, signal in read(cached(tmp_path), batch).items():
        torch.testing.assert_close(computed[name], signal, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds hidden_states@-1, .* not values@1; write a cache with"):
        cached(tmp_path, ["values@1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_k(tmp_path, dtype):
    """All classes: the same distribution. Fewer: the largest are exact, and the rest has its mass."""
    model = tiny_bert(seed=1, layers=1, num_labels=6)
    expected = None
    for k in (6, 2):
        write(tmp_path / str(k), signals=("logits",), model=model, top_k=k, dtype=dtype)
        batch = batch_of(ROWS, [4, 9, 1])
        found = read(cached(tmp_path / str(k), ("logits",)), batch)["logits"].float()
        with torch.no_grad():
            expected = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        largest = expected.topk(k).indices
        torch.testing.assert_close(
            found.exp().gather(-1, largest), expected.gather(-1, largest), rtol=tolerance, atol=1e-6
        )
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(3), rtol=tolerance, atol=0)
        if k < 6:
            rest = found.exp().scatter(-1, largest, 0)
            assert all(len(row[row > 0].unique()) == 1 for row in rest)


def test_top_k_of_a_peaked_teacher(tmp_path):
    """Loss and gradient of a student against those with all classes: exact with k of all, and close with a few."""
    model = tiny_bert(seed=1, num_labels=40)
    model.classifier.weight.data *= 5
    batch = batch_of(ROWS, list(range(12)))
    found = {}
    for k in (None, 40, 10):
        write(tmp_path / str(k), signals=("logits",), model=model, top_k=k)
        logits = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        teacher_logits = read(cached(tmp_path / str(k), ("logits",)), batch)["logits"]
        loss = soft_target_loss(logits, teacher_logits)
        found[k] = loss.detach(), torch.autograd.grad(loss, logits)[0]
        assert k != 10 or teacher_logits.softmax(-1).topk(10).values.sum(-1).min() > 0.95
    torch.testing.assert_close(found[40], found[None], rtol=1e-5, atol=1e-6)
    for close, exact in zip(found[10], found[None], strict=True):
        assert (close - exact).norm() / exact.norm() < 0.02
        assert (close - exact).norm() > 0


def test_log_probabilities_are_no_logits(tmp_path):
    """A term that compares raw logits is refused, unless there is one output, which has no probabilities."""
    model = tiny_bert(seed=1, layers=2, num_labels=3)
    write(tmp_path, signals=("logits",), model=model, top_k=2)
    sources: list[Any] = [CachedTeacher(TeacherCache(tmp_path)), EnsembleTeacher([model])]
    for source in sources:
        with pytest.raises(ValueError, match=r"soft_target compares raw logits, and \w+Teacher has log-probabilities"):
            Distiller(tiny_bert(num_labels=3), source, SoftTarget(divergence="mse"))
        Distiller(tiny_bert(num_labels=3), source, SoftTarget())
    numbers = EnsembleTeacher([tiny_bert(seed=seed, num_labels=1) for seed in (1, 2)])
    Distiller(tiny_bert(num_labels=1), numbers, SoftTarget(divergence="mse"))


def test_an_ensemble_of_caches(tmp_path):
    """Each adds its own signals to a batch."""
    models = [tiny_bert(seed=seed) for seed in (1, 2)]
    for number, model in enumerate(models):
        write(tmp_path / str(number), signals=("logits",), model=model)
    ensemble = EnsembleTeacher([CachedTeacher(TeacherCache(tmp_path / str(number))) for number in range(2)])
    ensemble.check(frozenset({"logits"}))
    batch = ensemble.collator(DistillationCollator(tiny_tokenizer()))([ROWS[index] for index in (3, 5)])
    expected = EnsembleTeacher(models).signals(batch, frozenset({"logits"}))["logits"]
    torch.testing.assert_close(ensemble.signals(batch, frozenset({"logits"}))["logits"], expected)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    student = Distiller(tiny_bert(), ensemble, SoftTarget())
    DistillationTrainer(student, arguments, ROWS, processing_class=tiny_tokenizer()).train()


def test_training_reads_what_it_would_have_computed(tmp_path):
    """The same losses as with the teacher beside the student, to rounding: it ran with other padding. What the student
    is evaluated on is not in the cache."""
    terms = [SoftTarget(temperature=2.0), AttentionRelation(), ProjectedMSE(16, 16)]
    logs = {}
    write(tmp_path / "cache", signals=sorted(Objective(terms).teacher_signals))
    for kind in ("online", "cached"):
        torch.manual_seed(0)
        objective = Objective([SoftTarget(temperature=2.0), AttentionRelation(), ProjectedMSE(16, 16)])
        source = teacher() if kind == "online" else CachedTeacher(TeacherCache(tmp_path / "cache", model=teacher()))
        arguments = TrainingArguments(
            str(tmp_path / kind), per_device_train_batch_size=5, gradient_accumulation_steps=2, num_train_epochs=2,
            learning_rate=1e-2, optim="sgd", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, eval_strategy="epoch",
        )  # fmt: skip
        trainer = DistillationTrainer(
            Distiller(tiny_bert(seed=0), source, objective), arguments, ROWS, tiny_rows(6, seed=9),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.train()
        logs[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs["online"]) > 4
    assert logs["cached"] == pytest.approx(logs["online"], rel=1e-5)


def test_bad_arguments(tmp_path):
    for options, message in (
        ({"signals": ()}, "signals must name at least one"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"signals": ("values@0",), "top_k": 3}, "top_k is about logits"),
        ({"top_k": 3}, "top_k must be at most the 2 classes, got 3"),
        ({"share": (2, 2)}, r"share must be \(i, n\)"),
        ({"rows": [{"ids": [1]}]}, "row 0 must have input_ids, got only ids"),
        ({"rows": [{"input_ids": []}]}, "row 0 must have at least one token id"),
        ({"rows": [{"input_ids": [5], "segment_ids": [1]}]}, "packed rows; set corpus.packing to truncate"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, **options)
    write(tmp_path / "fine", ROWS.select(range(2)))
    with pytest.raises(ValueError, match=r"holds no cached logits; train with DistillationTrainer"):
        cached(tmp_path / "fine").signals(batch_of(ROWS, [0]), frozenset({"logits"}))
    assert len(pickle.loads(pickle.dumps(TeacherCache(tmp_path / "fine")))) == 2
