# SPDX-License-Identifier: Apache-2.0
"""Capture: the right tensors of the right layers, the same bits, no layer too many, nothing left behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import tiny_bert
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from pydistill.capture import capture, freeze_unreachable, unreachable_parameters

QKV = ("queries", "keys", "values")
LAYERS = 3

# By name: the model's class, what its configuration calls sizes, and where its layers are.
SIZES = {
    "vocab_size": 45,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", {}, "bert.encoder.layer"),
    "roberta": ("RobertaForSequenceClassification", {"pad_token_id": 0}, "roberta.encoder.layer"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 16, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": 4},
        "distilbert.transformer.layer",
    ),
    # Its embeddings are narrower than its layers.
    "electra": ("ElectraForSequenceClassification", {"embedding_size": 8}, "electra.encoder.layer"),
    # Window and full attention in turn, so that the layers get different masks.
    "modernbert": (
        "ModernBertForSequenceClassification",
        {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
        "model.layers",
    ),
    "llama": ("LlamaForSequenceClassification", {"num_key_value_heads": 4, "pad_token_id": 0}, "model.layers"),
    # Grouped queries.
    "qwen2": ("Qwen2ForSequenceClassification", {"num_key_value_heads": 2, "pad_token_id": 0}, "model.layers"),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        # As published: keys are projected a second time, from the relative positions.
        {"relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "position_buckets": 8},
        "deberta.encoder.layer",
    ),
    "mpnet": ("MPNetForSequenceClassification", {}, "mpnet.encoder.layer"),
}
THROUGH_INTERFACE = [name for name in MODELS if name not in ("deberta-v2", "mpnet")]


def tiny(name: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    head, extra, _ = MODELS[name]
    kind = getattr(transformers, head)
    sizes = {
        key: value for key, value in SIZES.items() if name != "distilbert" or not key.startswith(("num_h", "num_a"))
    }
    return kind(kind.config_class(**sizes | extra | options)).eval()


def batch(rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Padded on the right in one row."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, 45, (rows, length), generator=generator), "attention_mask": mask}


def every_signal(layers: int = LAYERS) -> list[str]:
    kinds = (*QKV, "hidden_states")
    return ["logits", "hidden_states@embeddings", *(f"{kind}@{layer}" for kind in kinds for layer in range(layers))]


def spied_attention(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Queries, keys and values of every call of sdpa, in order, taken without any code of ours."""
    calls: list[tuple[Any, ...]] = []
    sdpa = AttentionInterface._global_mapping["sdpa"]

    def spy(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        calls.append((query, key, value))
        return sdpa(module, query, key, value, *args, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
        model(**inputs)
    return calls


def state_of(model: nn.Module) -> Any:
    """Everything that a capture touches."""
    return (
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        [vars(module).get("gradient_checkpointing") for module in model.modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
    )


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", THROUGH_INTERFACE)
def test_attention_inputs_are_those_of_the_attention_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(name), batch()
    expected = spied_attention(model, inputs, monkeypatch)
    assert len(expected) == LAYERS
    signals = [f"{kind}@{layer}" for layer in range(LAYERS) for kind in QKV]
    with torch.no_grad():
        captured = capture(model, signals)(**inputs)
    assert list(captured) == signals
    for layer, tensors in enumerate(expected):
        for kind, tensor in zip(QKV, tensors, strict=True):
            assert torch.equal(captured[f"{kind}@{layer}"], tensor), (kind, layer)
    heads = 2 if name == "qwen2" else 4
    assert captured["queries@0"].shape == (3, 4, 7, 4) and captured["keys@0"].shape == (3, heads, 7, 4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_bits_of_the_uncaptured_model(name: str, implementation: str) -> None:
    """With everything read at once; hidden states are transformers' own, and gradients agree too."""
    if name not in THROUGH_INTERFACE and implementation == "sdpa":
        pytest.skip("computes its attention itself")
    model, inputs = tiny(name, attn_implementation=implementation), batch()
    expected = model(**inputs, output_hidden_states=True)
    expected.logits.sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    before = state_of(model)
    captured = capture(model, every_signal())(**inputs)
    assert state_of(model) == before
    assert torch.equal(captured["logits"], expected.logits)
    captured["logits"].sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[key]), key
    assert torch.equal(captured["hidden_states@embeddings"], expected.hidden_states[0])
    for layer in range(LAYERS - 1):
        assert torch.equal(captured[f"hidden_states@{layer}"], expected.hidden_states[layer + 1]), layer
    # Of the last layer transformers returns what the final normalisation made of it, where there is one.
    last = captured[f"hidden_states@{LAYERS - 1}"]
    norm = {"modernbert": "final_norm", "llama": "norm", "qwen2": "norm"}.get(name)
    last = last if norm is None else model.get_submodule(f"model.{norm}")(last)
    assert torch.equal(last, expected.hidden_states[-1])


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_projections_give_queries_keys_and_values(name: str) -> None:
    """Outside the attention interface: the projections applied to what enters the attention."""
    model, inputs = tiny(name), batch()
    prefix = MODELS[name][2]
    attention = model.get_submodule(f"{prefix}.1.attention." + ("self" if name == "deberta-v2" else "attn"))
    names = ("query_proj", "key_proj", "value_proj") if name == "deberta-v2" else ("q", "k", "v")
    with torch.no_grad():
        captured = capture(model, ["hidden_states@0", *(f"{kind}@1" for kind in QKV)])(**inputs)
        for kind, projection in zip(QKV, names, strict=True):
            expected = attention.get_submodule(projection)(captured["hidden_states@0"])  # [B, N, H * d]
            assert torch.equal(captured[f"{kind}@1"], expected.view(3, 7, 4, 4).transpose(1, 2)), kind


def test_queries_and_keys_reproduce_the_attention_probabilities() -> None:
    model, inputs = tiny("llama", attn_implementation="eager"), batch()
    expected = model(**inputs, output_attentions=True).attentions[1]
    captured = capture(model, ["queries@1", "keys@1"])(**inputs)
    scores = captured["queries@1"] @ captured["keys@1"].transpose(-1, -2) / 2  # sqrt(d) = 2
    visible = torch.ones(7, 7, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    torch.testing.assert_close(F.softmax(scores.masked_fill(~visible, -torch.inf), -1), expected)


def test_layers_by_index_from_either_end_and_by_name() -> None:
    model, inputs = tiny("bert"), batch()
    names = ["queries@1", f"queries@{1 - LAYERS}", "queries@bert.encoder.layer.1"]
    names += ["queries@bert.encoder.layer.1.attention.self", "hidden_states@1", "hidden_states@bert.encoder.layer.1"]
    names += ["hidden_states@bert.embeddings", "hidden_states@embeddings", "queries@2"]
    captured = capture(model, names)(**inputs)
    assert list(captured) == names
    for other in names[1:4]:
        assert captured[other] is captured["queries@1"], other
    assert not torch.equal(captured["queries@1"], captured["queries@2"])
    assert captured["hidden_states@1"] is captured["hidden_states@bert.encoder.layer.1"]
    assert captured["hidden_states@bert.embeddings"] is captured["hidden_states@embeddings"]


def test_decoder_with_cross_attention_is_read_by_name() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    model, inputs = transformers.BertLMHeadModel(config).eval(), batch()
    other = torch.randn(3, 5, 16)
    name = "keys@bert.encoder.layer.1.crossattention.self"
    captured = capture(model, [name])(**inputs, encoder_hidden_states=other)
    assert captured[name].shape == (3, 4, 5, 4)
    with pytest.raises(ValueError, match=r"'keys@1': BertLayer of BertLMHeadModel must have one attention, and has 2"):
        capture(model, ["keys@1"])


# --------------------------------------------------------------------------- early stop


def executed(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the modules without children that were called, in order."""
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda module, args: called.append(name)

    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in leaves.items()]
    run()
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("name", MODELS)
def test_nothing_runs_behind_the_last_signal(name: str) -> None:
    model, inputs, prefix = tiny(name), batch(), MODELS[name][2]
    every = executed(model, lambda: model(**inputs))
    attention = executed(model, lambda: capture(model, ["queries@1", "keys@1", "values@1"])(**inputs))
    hidden = executed(model, lambda: capture(model, ["hidden_states@1"])(**inputs))
    whole = executed(model, lambda: capture(model, ["queries@1"], stop_early=False)(**inputs))
    assert whole == every
    for part in (attention, hidden):
        assert part == every[: len(part)]
        assert any(leaf.startswith(f"{prefix}.0.") for leaf in part)
        assert not any(leaf.startswith(f"{prefix}.2.") for leaf in part)
    # Of the layer that is read, the hidden states need all, and the attention no more than its first linear maps.
    layer = [leaf for leaf in every if leaf.startswith(f"{prefix}.1.")]
    assert hidden[-1] == layer[-1]
    read = [leaf for leaf in attention if leaf.startswith(f"{prefix}.1.")]
    linear = [leaf for leaf in read if isinstance(model.get_submodule(leaf), nn.Linear)]
    assert len(linear) == (1 if name == "modernbert" else 3) and len(read) <= 4
    assert set(read) < set(layer)


def test_signals_of_several_layers_run_up_to_the_highest() -> None:
    model, inputs = tiny("bert"), batch()
    called = executed(model, lambda: capture(model, ["keys@1", "hidden_states@0", "values@0"])(**inputs))
    assert called[-1] in ("bert.encoder.layer.1.attention.self.key", "bert.encoder.layer.1.attention.self.value")


def test_logits_need_the_whole_forward() -> None:
    model, inputs = tiny("bert"), batch()
    every = executed(model, lambda: model(**inputs))
    assert executed(model, lambda: capture(model, ["queries@0", "logits"])(**inputs)) == every


def test_stopping_early_saves_the_time_of_what_is_not_run() -> None:
    """One layer of twelve is read: a fifth of the time leaves a factor of two for the noise of the clock."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12})
    model, inputs = transformers.BertModel(config).eval(), batch(4, 64)
    partly, wholly = capture(model, ["keys@0"]), capture(model, ["keys@0"], stop_early=False)

    def seconds(run: Callable[..., Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(**inputs)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        assert seconds(partly) < seconds(wholly) / 5


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_flow_through_captured_tensors(name: str) -> None:
    model, inputs = tiny(name), batch()
    captured = capture(model, ["values@1"])(**inputs)
    captured["values@1"].square().sum().backward()
    assert all(
        parameter.grad is not None
        for parameter in model.get_submodule(f"{MODELS[name][2]}.0").parameters()
        if parameter.requires_grad
    )
    assert all(parameter.grad is None for parameter in model.get_submodule(f"{MODELS[name][2]}.2").parameters())


def test_a_frozen_model_gives_tensors_without_a_graph() -> None:
    model, inputs = tiny("bert").requires_grad_(False), batch()
    assert not any(value.requires_grad for value in capture(model, ["queries@1", "hidden_states@1"])(**inputs).values())
    with torch.no_grad():
        assert not capture(tiny("bert"), ["queries@1"])(**inputs)["queries@1"].requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "qwen2", "deberta-v2"])
@pytest.mark.parametrize("signals", [["values@1"], ["keys@0", "hidden_states@1"], ["queries@1", "logits"]])
def test_gradient_checkpointing_changes_no_bit(name: str, reentrant: bool, signals: list[str]) -> None:
    inputs = batch()

    def gradients(checkpointed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        model = tiny(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        before = state_of(model)
        captured = capture(model, signals)(**inputs)
        assert state_of(model) == before
        sum(value.square().sum() for value in captured.values()).backward()
        return captured, {key: parameter.grad for key, parameter in model.named_parameters()}

    expected, expected_gradients = gradients(False)
    captured, found = gradients(True)
    for key in expected:
        assert torch.equal(captured[key], expected[key]), key
    for key, gradient in expected_gradients.items():
        # A reentrant checkpoint hands zeros to parameters that others leave without.
        if gradient is None:
            assert found[key] is None or not found[key].any(), key
        else:
            assert found[key] is not None and torch.equal(found[key], gradient), key


def test_layers_that_are_not_read_are_recomputed() -> None:
    model, inputs = tiny("bert").train(), batch()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    captured = capture(model, ["values@2"])(**inputs)
    again = executed(model, lambda: captured["values@2"].sum().backward())
    assert {leaf.split(".")[3] for leaf in again if leaf.startswith("bert.encoder")} == {"0", "1"}


def test_unreachable_parameters_are_those_without_a_gradient() -> None:
    model, inputs = tiny("bert", hidden_dropout_prob=0.5).train(), batch()
    model.bert.embeddings.eval()
    model.bert.pooler.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    signals = ["queries@1", "keys@1"]
    names = unreachable_parameters(model, signals, inputs)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert [module.training for module in model.modules()] == modes
    grads = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"classifier.weight"} and bool((model.classifier.weight.grad == 1).all())

    model.zero_grad()
    sum(value.sum() for value in capture(model, signals)(**inputs).values()).backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None and parameter.requires_grad]
    assert names == without
    assert {"bert.encoder.layer.1.attention.self.value.weight", "classifier.bias"} <= set(names)
    assert freeze_unreachable(model, signals, inputs) == names
    assert unreachable_parameters(model, signals, inputs) == []
    assert not any(model.get_parameter(key).requires_grad for key in names)


def test_a_model_that_is_all_frozen_has_nothing_to_reach() -> None:
    model = tiny("bert")
    every = [name for name, _ in model.named_parameters()]
    with torch.no_grad():  # does not matter
        reached = set(every) - set(unreachable_parameters(model, ["logits"], batch()))
    assert reached == set(every)
    assert unreachable_parameters(model.requires_grad_(False), ["logits"], batch()) == []


# --------------------------------------------------------------------------- surroundings


def test_autocast_reaches_the_captured_tensors() -> None:
    model, inputs = tiny("bert"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**inputs).logits
        captured = capture(model, ["queries@1", "logits"])(**inputs)
    assert captured["queries@1"].dtype == torch.bfloat16
    assert torch.equal(captured["logits"], expected)
    captured["queries@1"].sum().backward()
    assert model.bert.encoder.layer[1].attention.self.query.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("signals", [["queries@1"], ["hidden_states@0"], ["queries@0", "hidden_states@2", "logits"]])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_an_exception_leaves_nothing_behind(name: str, signals: list[str]) -> None:
    model, inputs = tiny(name), batch()
    model.train()
    if name == "bert":
        model.activation_checkpointing_enable()
    before = state_of(model)
    broken = capture(model, signals)
    with pytest.raises(IndexError):
        broken(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    assert state_of(model) == before
    broken(**inputs)
    assert state_of(model) == before


def test_a_forward_that_stopped_keeps_no_activations_alive() -> None:
    import gc
    import weakref

    model, inputs = tiny("bert"), batch()
    alive: list[Any] = []
    handle = model.bert.encoder.layer[0].register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output))
    )
    gc.disable()
    try:
        with torch.no_grad():
            captured = capture(model, ["queries@1"])(**inputs)
        assert alive[0]() is None
    finally:
        gc.enable()
        handle.remove()
    assert captured["queries@1"].shape == (3, 4, 7, 4)


def test_student_within_teacher_each_with_its_own_implementation() -> None:
    """A forward inside another's, of a model that shares its configuration or has its own."""
    outer, inputs = tiny("bert", seed=1, attn_implementation="eager"), batch()
    for inner in (tiny("bert", attn_implementation="sdpa"), transformers.BertModel(outer.config).eval()):
        own = inner.config._attn_implementation
        expected_outer = capture(outer, ["queries@2"])(**inputs)["queries@2"]
        expected_inner = capture(inner, ["queries@1"])(**inputs)["queries@1"]
        nested: list[Any] = []
        handle = outer.bert.encoder.layer[0].register_forward_hook(
            lambda *_, inner=inner, nested=nested: nested.append(capture(inner, ["queries@1"])(**inputs)["queries@1"])
        )
        captured = capture(outer, ["queries@2"])(**inputs)["queries@2"]
        handle.remove()
        assert torch.equal(captured, expected_outer) and torch.equal(nested[0], expected_inner)
        assert (outer.config._attn_implementation, inner.config._attn_implementation) == ("eager", own)


def test_threads_that_share_a_model_do_not_see_each_other() -> None:
    """Captures of different layers, and plain forwards, of one model at once."""
    model = tiny("bert")
    inputs = [batch(rows, 7) for rows in (2, 3, 4, 5)]
    before = state_of(model)
    expected: list[Any] = [capture(model, [f"queries@{number % 3}"])(**given) for number, given in enumerate(inputs)]
    plain = model(**inputs[0]).logits
    failures: list[str] = []

    def work(number: int) -> None:
        reader = capture(model, [f"queries@{number % 3}"])
        for _ in range(20):
            for name, value in reader(**inputs[number]).items():
                if not torch.equal(value, expected[number][name]):
                    failures.append(f"{number} {name}")
            if not torch.equal(model(**inputs[0]).logits, plain):
                failures.append(f"{number} logits")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state_of(model) == before


def test_a_compiled_model_is_refused_and_a_compiled_caller_is_exact() -> None:
    model, inputs = tiny("bert"), batch()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, **given: Any) -> Any:
            captured = capture(self.model, ["queries@1", "keys@1"])(**given)
            return (self.factor * (captured["queries@1"] - captured["keys@1"])).square().mean()

    step = Step()
    expected = step(**inputs)
    expected.backward()
    gradients = [parameter.grad for parameter in step.parameters()]
    step.zero_grad()
    found = torch.compile(step, backend="aot_eager")(**inputs)
    torch.testing.assert_close(found, expected)
    found.backward()
    for parameter, gradient in zip(step.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)

    with pytest.raises(ValueError, match="model must not be compiled.*OptimizedModule is: pass"):
        capture(torch.compile(model), ["queries@1"])  # type: ignore[arg-type]
    reader = capture(model, ["hidden_states@1"])
    model.bert.encoder.layer[1].compile(backend="eager")
    for refused in (lambda: capture(model, ["queries@1"]), lambda: reader(**inputs)):
        with pytest.raises(ValueError, match="model must not be compiled.*bert.encoder.layer.1 is: pass"):
            refused()


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from test_capture import batch, tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pydistill.capture import capture, freeze_unreachable

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny("bert")
        self.read = capture(self.model, ["values@1"])

    def forward(self, **inputs):
        return self.read(**inputs)["values@1"].square().mean()

whole = batch(4)
half = {name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()}
step = Step()
assert freeze_unreachable(step.model, ["values@1"], half)
parallel = DistributedDataParallel(step)
for _ in range(2):  # a parameter without a gradient makes the second step fail
    parallel.zero_grad()
    parallel(**half).backward()
alone = Step()
alone(**whole).backward()
for (name, ours), theirs in zip(step.named_parameters(), alone.parameters()):
    if ours.requires_grad:
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
dist.destroy_process_group()
print("done")
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Data parallelism around the module that captures; without freezing, its second step would raise."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out.strip() == "done", error


# --------------------------------------------------------------------------- any module, and refusals


class Plain(nn.Module):
    """No transformers model: two blocks, tuples between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.GRU(4, 5, batch_first=True)

    def forward(self, inputs: Any) -> Any:
        return self.second(self.first(inputs))[0].mean()


def test_any_module_gives_hidden_states_by_name() -> None:
    model, inputs = Plain(), torch.randn(2, 3, 4)
    captured = capture(model, ["hidden_states@second", "hidden_states@first"])(inputs)
    assert torch.equal(captured["hidden_states@first"], model.first(inputs))
    assert torch.equal(captured["hidden_states@second"], model.second(model.first(inputs))[0])


def test_the_public_name_is_the_function() -> None:
    """Also once the module of the same name has been imported."""
    import pydistill.capture

    captured = pydistill.capture(tiny("bert"), ["queries@-1"])(**batch())
    assert captured["queries@-1"].shape == (3, 4, 7, 4)


def test_a_copied_model_is_read_through_the_copied_capture() -> None:
    reader = capture(tiny("bert"), ["queries@1", "hidden_states@1"])
    again = copy.deepcopy(reader)
    expected = reader(**batch())
    nn.init.zeros_(reader.model.get_parameter("bert.encoder.layer.1.attention.self.query.weight"))
    found = again(**batch())
    assert again.model is not reader.model and torch.equal(found["queries@1"], expected["queries@1"])


@pytest.mark.parametrize(
    ("build", "signals", "words"),
    [
        (tiny_bert, [], "signals must name at least one signal, got none"),
        (tiny_bert, ["query@0"], "a signal must be 'logits' or .* got 'query@0'"),
        (tiny_bert, ["queries"], "a signal must be .* got 'queries'"),
        (tiny_bert, ["keys@"], "a signal must be .* got 'keys@'"),
        (tiny_bert, ["keys@embeddings"], "a signal must be .* got 'keys@embeddings'"),
        (tiny_bert, ["keys@1"], "'keys@1': BertForSequenceClassification has 1 layers.* from -1 to 0, got 1"),
        (tiny_bert, ["hidden_states@-2"], "has 1 layers.* from -1 to 0, got -2"),
        (
            tiny_bert,
            ["keys@bert.encoder.layers.0"],
            "BertForSequenceClassification has no module 'bert.encoder.layers.0'; did you mean bert.encoder.layer.0,",
        ),
        (tiny_bert, ["keys@classifier"], "Linear of BertForSequenceClassification has no attention whose keys can be"),
        (lambda: tiny("bert").bert, ["logits"], "'logits': BertModel has no head .*AutoModelFor"),
        (
            Plain,
            ["hidden_states@0"],
            "an index needs one list of layers, and Plain has none .* name the layer's module",
        ),
        (Plain, ["queries@second"], "GRU of Plain has no attention whose queries can be read"),
        (
            lambda: nn.DataParallel(Plain()),
            ["hidden_states@first"],
            "must not be wrapped in DataParallel.*model.module",
        ),
    ],
)
def test_refuses(build: Any, signals: list[str], words: str) -> None:
    with pytest.raises(ValueError, match="capture: .*" + words):
        capture(build(), signals)


def test_refuses_what_is_no_model_or_no_list() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        capture("bert-base-uncased", ["logits"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the string 'logits'; pass \['logits'\]"):
        capture(tiny_bert(), "logits")
    with pytest.raises(TypeError, match="signals must hold strings, got 3"):
        capture(tiny_bert(), [3])  # type: ignore[list-item]


def test_refuses_to_count_layers_of_an_encoder_and_a_decoder_or_of_shared_ones() -> None:
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 45, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = transformers.BartModel(transformers.BartConfig(**sizes, **heads)).eval()
    with pytest.raises(ValueError, match="BartModel has an encoder and a decoder; name the layer's module"):
        capture(bart, ["hidden_states@0"])
    with pytest.raises(ValueError, match=r"must have one attention, and has 2 \(cross-attention\?\).*encoder_attn"):
        capture(bart, ["keys@decoder.layers.1"])
    name = "keys@decoder.layers.1.encoder_attn"
    assert capture(bart, [name])(input_ids=batch()["input_ids"])[name].shape == (3, 2, 7, 4)
    albert = transformers.AlbertModel(transformers.AlbertConfig(**SIZES | {"embedding_size": 8}))
    with pytest.raises(ValueError, match="AlbertModel has none of config.num_hidden_layers modules"):
        capture(albert, ["hidden_states@0"])


def test_what_the_forward_does_not_run_or_give_is_named() -> None:
    model = Plain()
    model.register_module("third", nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="forward of Plain ended without running what 'hidden_states@third' reads"):
        capture(model, ["hidden_states@third", "hidden_states@first"])(torch.randn(2, 3, 4))
    with pytest.raises(
        RuntimeError, match=r"'hidden_states@classifier' must be a tensor \[B, N, D\].*Linear gave \[3, 2\]"
    ):
        capture(tiny("bert"), ["hidden_states@classifier"])(**batch())
    with pytest.raises(RuntimeError, match="'logits' must be in the output of Plain, which gave Tensor"):
        capture(Plain(), ["logits"])(torch.randn(2, 3, 4))
