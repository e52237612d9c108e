# SPDX-License-Identifier: Apache-2.0
"""Teacher signals on disk: what is written comes back for the right example, and nothing else ever does."""

from __future__ import annotations

import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import in_a_new_process
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, tiny_bert, tiny_rows, tiny_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DistilBertConfig, DistilBertModel, TrainingArguments

from pydistill import AttentionRelation, ProjectedMSE, SoftTarget, soft_target_loss
from pydistill.cache import CachedTeacher, TeacherCache, TeacherCacheError, _from_top_k, _to_top_k, write_cache
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
    alone = [write(tmp_path / "c", ROWS.select([0]), share=(number, 2)) for number in range(2)]
    assert sorted(one.computed for one in alone) == [0, 1] and all(len(one.keys) == 1 for one in alone)
    batch = batch_of(ROWS, [3, 20, 7])
    one, other = read(cached(tmp_path / "a"), batch), read(cached(tmp_path / "b"), batch)
    for name in SIGNALS:
        # A product over more rows rounds in another order.
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


WRITER = """
import time
from pathlib import Path
import pydistill.cache as cache, test_cache

name, share, folder = {name!r}, {share}, Path({folder!r})
# All start when the last one is ready, and none is done before the others have begun.
add = cache._Writer.add
cache._Writer.add = lambda *given: (time.sleep(0.05), add(*given))[1]
(folder.parent / f"{{name}}.ready").touch()
while len(list(folder.parent.glob("*.ready"))) < 2:
    time.sleep(0.01)
started = time.time()
done = test_cache.write(folder, share=share, flush_seconds=0.0)
print(started, time.time(), done.examples, done.computed)
"""


@pytest.mark.parametrize("shares", [((0, 2), (1, 2)), ((0, 1), (0, 1))], ids=["divided", "everything twice"])
def test_two_processes_write_at_the_same_time(tmp_path, shares):
    """Into a folder that neither of them finds: nothing is lost, refused or mixed up, and a share is nobody else's."""
    folder = tmp_path / "cache"
    codes = [WRITER.format(name=f"writer{n}", share=share, folder=str(folder)) for n, share in enumerate(shares)]
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda code: in_a_new_process(["-c", code]), codes))
    started, ended, examples, computed = zip(*(map(float, one.split()) for one in printed), strict=True)
    assert max(started) < min(ended)
    if shares[0] != shares[1]:
        assert sum(examples) == sum(computed) == 24 and min(computed) > 5
    assert len(TeacherCache(folder)) == 24 and write(folder).computed == 0
    batch = batch_of(ROWS, list(range(24)))
    expected = truth(batch)
    for name, signal in read(cached(folder), batch).items():
        mine, theirs = (without_padding(name, one, batch["attention_mask"]) for one in (signal, expected[name]))
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


def top_k(logits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a cache gives back, without the files."""
    stored = {name: part.to(dtype) if part.is_floating_point() else part for name, part in _to_top_k(logits, k).items()}
    return _from_top_k(**stored, classes=logits.shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_k(tmp_path, dtype):
    """Fewer than all classes: the largest are exact, and the rest has its mass, evenly. The files add nothing."""
    model = tiny_bert(seed=1, layers=1, num_labels=6)
    write(tmp_path, signals=("logits",), model=model, top_k=2, dtype=dtype)
    batch = batch_of(ROWS, [4, 9, 1])
    found = read(cached(tmp_path, ("logits",)), batch)["logits"]
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(found, top_k(logits, 2, found.dtype), rtol=tolerance, atol=1e-6)
    expected, found = logits.softmax(-1), found.float()
    largest = expected.topk(2).indices
    torch.testing.assert_close(found.exp().gather(-1, largest), expected.gather(-1, largest), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3), rtol=tolerance, atol=0)
    rest = found.exp().scatter(-1, largest, 0)
    assert all(len(row[row > 0].unique()) == 1 for row in rest)


def loss_and_gradient(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = soft_target_loss(student, teacher, temperature=temperature)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def peaked(rows: int = 12, classes: int = 40) -> tuple[Tensor, Tensor]:
    """Logits of a student, and of a teacher that is sure of a few classes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, classes, generator=generator)
    return student, 4 * teacher


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("k", [40, 39])
def test_top_k_is_exact_where_nothing_is_shared_out(k, temperature):
    """All classes, or all but one, which has the tail to itself: loss and gradient to rounding, at any temperature."""
    student, teacher = peaked()
    exact, found = (loss_and_gradient(student, one, temperature) for one in (teacher, top_k(teacher, k)))
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_top_k_is_exact_for_an_even_tail(temperature):
    """A teacher that does not tell the others apart, as one trained with smoothed labels: any k and temperature."""
    student, teacher = peaked()
    largest = teacher.topk(3)
    teacher = torch.full_like(teacher, -2.0).scatter(-1, largest.indices, largest.values)
    exact, found = (loss_and_gradient(student, one, temperature) for one in (teacher, top_k(teacher, 3)))
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_k_at_temperature_one(k):
    """The gradient of the k classes is exact, and so is the sum of all others'; at another temperature neither is."""
    student, teacher = peaked()
    largest = teacher.topk(k).indices
    for temperature, is_exact in ((1.0, True), (2.0, False)):
        exact, found = (loss_and_gradient(student, one, temperature)[1] for one in (teacher, top_k(teacher, k)))
        close = [
            torch.allclose(found.gather(-1, largest), exact.gather(-1, largest), rtol=1e-4, atol=1e-7),
            torch.allclose(*(one.scatter(-1, largest, 0).sum(-1) for one in (found, exact)), rtol=1e-4, atol=1e-6),
        ]
        assert close == [is_exact] * 2


def test_top_k_errs_less_with_more_classes_and_more_with_temperature():
    """What docs/teacher_cache.py tabulates, here in small: relative errors of loss and gradient."""
    student, teacher = peaked()
    errors = {}
    for temperature in (1.0, 2.0, 4.0):
        exact = loss_and_gradient(student, teacher, temperature)
        for k in (2, 5, 10, 20):
            found = loss_and_gradient(student, top_k(teacher, k), temperature)
            errors[temperature, k] = [
                float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(found, exact, strict=True)
            ]
    for of in (0, 1):
        for temperature in (1.0, 2.0, 4.0):
            falling = [errors[temperature, k][of] for k in (2, 5, 10, 20)]
            assert falling == sorted(falling, reverse=True) and falling[-1] > 0
        assert errors[1.0, 10][of] < errors[2.0, 10][of] < errors[4.0, 10][of]
    assert max(errors[1.0, 10]) < 0.02


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


def losses(folder: Path, source: Any, rows: Any, batch: int = 4, held_out: Any = None, **options: Any) -> list[float]:
    """Of a training with shuffling, accumulation and epochs, step by step."""
    torch.manual_seed(0)
    objective = Objective([SoftTarget(temperature=2.0), AttentionRelation(), ProjectedMSE(16, 16)])
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=2, num_train_epochs=3,
        learning_rate=1e-2, optim="sgd", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, eval_strategy="no" if held_out is None else "epoch", **options,
    )  # fmt: skip
    student = Distiller(tiny_bert(seed=0), source, objective)
    trainer = DistillationTrainer(student, arguments, rows, held_out, processing_class=tiny_tokenizer())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TERMS = sorted(Objective([SoftTarget(), AttentionRelation(), ProjectedMSE(16, 16)]).teacher_signals)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_has_the_bits_of_a_live_teacher(tmp_path, workers):
    """Where both run the same shapes: texts of one length, in batches of as many rows. In workers that live on, too."""
    texts = [" ".join(random.Random(seed).choices(WORDS, k=7)) for seed in range(20)]
    rows = Dataset.from_dict({"input_ids": tiny_tokenizer()(texts)["input_ids"], "labels": [0, 1] * 10})
    write(tmp_path / "cache", rows, TERMS, batch_size_tokens=4 * 9)
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    cached = losses(tmp_path, CachedTeacher(TeacherCache(tmp_path / "cache")), rows, **options)
    live = losses(tmp_path, teacher(), rows)
    assert len(live) == 9 and live[-1] < live[0]
    assert cached == live


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_training_reads_what_it_would_have_computed(tmp_path, dtype, tolerance):
    """Of texts of any length: to rounding, for the live teacher runs with padding, and to the stored precision. What
    the student is evaluated on is not in the cache."""
    write(tmp_path / "cache", ROWS, TERMS, dtype=dtype)
    cached = CachedTeacher(TeacherCache(tmp_path / "cache", model=teacher()))
    held_out = tiny_rows(6, seed=9)
    mine, theirs = (losses(tmp_path, one, ROWS, 5, held_out) for one in (cached, teacher()))
    assert len(theirs) == 9
    assert mine == pytest.approx(theirs, rel=tolerance)
    assert dtype == "float32" or mine != pytest.approx(theirs, rel=tolerance / 100)


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
