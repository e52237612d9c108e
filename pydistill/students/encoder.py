# SPDX-License-Identifier: Apache-2.0
"""Encoder students: a smaller configuration of the teacher's own architecture, and weights to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

Initialization = Literal["random", "layers", "svd"]
INITIALIZATIONS: tuple[Initialization, ...] = ("random", "layers", "svd")

# What the configurations call the width of the feed-forward block.
_INTERMEDIATE_NAMES = ("intermediate_size", "hidden_dim")
# Share of the mean variance that is added to each variance of a least-squares fit.
_RIDGE = 1e-3


def smaller_config(
    teacher_config: PretrainedConfig,
    *,
    num_hidden_layers: int | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
) -> PretrainedConfig:
    """Return the teacher's configuration with other sizes: vocabulary, positions and everything else stay.

    Args:
        teacher_config: of an encoder (BERT, RoBERTa, ELECTRA, DistilBERT and others of their kind).
        num_hidden_layers, hidden_size, num_attention_heads: None keeps the teacher's.
        intermediate_size: None keeps the teacher's ratio to the hidden size.

    Returns:
        A new configuration of the same class, in float32. An embedding size of its own (ELECTRA) follows the hidden
        size where the teacher's two are equal.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the hidden size, or an architecture whose
            layers have settings of their own or whose heads have a size or number apart from these.
    """
    given = {
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
    }
    for name, size in given.items():
        if size is not None and size < 1:
            _fail("smaller_config", f"{name} must be positive, got {size}")
    kind = teacher_config.model_type
    for name in ("num_key_value_heads", "head_dim"):
        if getattr(teacher_config, name, None) is not None:
            _fail("smaller_config", f"{kind} sets {name} apart from the other sizes; pass make_student your own config")
    content = teacher_config.to_dict()
    layers, heads = teacher_config.num_hidden_layers, teacher_config.num_attention_heads
    if num_hidden_layers not in (None, layers):
        per_layer = [name for name, value in content.items() if isinstance(value, list) and len(value) == layers > 1]
        per_layer = [name for name in per_layer if name != "architectures"]
        if per_layer:
            _fail(
                "smaller_config",
                f"{kind} describes its {layers} layers one by one in {', '.join(per_layer)}; pass make_student your "
                "own config",
            )
    width = hidden_size or teacher_config.hidden_size
    heads = num_attention_heads or heads
    if width % heads:
        fitting = [count for count in range(1, 65) if width % count == 0]
        _fail("smaller_config", f"num_attention_heads must divide hidden_size {width}, got {heads}; one of {fitting}")
    inner = next((name for name in _INTERMEDIATE_NAMES if name in content), None)
    if inner is None:
        _fail("smaller_config", f"{kind} has no intermediate_size; pass make_student your own config")
    names = dict(teacher_config.attribute_map)
    changes = {
        names.get("num_hidden_layers", "num_hidden_layers"): num_hidden_layers or layers,
        names.get("hidden_size", "hidden_size"): width,
        names.get("num_attention_heads", "num_attention_heads"): heads,
        inner: intermediate_size or round(content[inner] * width / teacher_config.hidden_size),
        "dtype": "float32",
    }
    if content.get("embedding_size") == teacher_config.hidden_size:
        changes["embedding_size"] = width
    for name in ("_name_or_path", "architectures"):
        content.pop(name, None)
    return type(teacher_config).from_dict(content | changes)


def spaced_layers(teacher_layers: int, count: int) -> list[int]:
    """Return ``count`` of ``teacher_layers`` layer indices, evenly spaced, the last always among them.

    Raises:
        ValueError: more layers are wanted than there are, or none.
    """
    if not 1 <= count <= teacher_layers:
        _fail("spaced_layers", f"count must be from 1 to the teacher's {teacher_layers} layers, got {count}")
    return [(position + 1) * teacher_layers // count - 1 for position in range(count)]


def make_student(
    teacher: PreTrainedModel,
    config: PretrainedConfig,
    *,
    initialization: Initialization = "random",
    layers: Sequence[int] | None = None,
    sample: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    r"""Build the encoder that ``config`` describes (without any head) and give it weights to start from.

    ``"random"``: as the architecture initialises itself.

    ``"layers"``: the embeddings and the teacher's ``layers`` are copied; every size but the number of layers must be
    the teacher's.

    ``"svd"``: for smaller hidden sizes. The student works in the subspace of the teacher's hidden states that holds
    most of them. With :math:`H_l` the hidden states ``[n, d_t]`` of the sample's tokens:

    1. Subspace: :math:`P` ``[d_t, d_s]``, the leading eigenvectors of :math:`\sum_l H_l^\top H_l / \|H_l\|^2` over the
       embeddings' output and the states before, within and after every chosen layer (uncentred PCA). The student's
       hidden states aim at :math:`G = H P`.
    2. Embeddings: every table :math:`E \to E\,(I - 11^\top/d_t)\,\mathrm{diag}(\gamma)\,P`, which passes the
       teacher's LayerNorm (weight :math:`\gamma`) exactly but for its division.
    3. What a layer reads: :math:`H \approx G_s R + r` by ridge regression on the student's own states
       :math:`G_s`, so that errors of the layers below are corrected; a teacher's map :math:`W h + b` becomes
       :math:`W R^\top g + W r + b`.
    4. Heads, one to one: the teacher's head space of size :math:`k_t` is cut to :math:`k_s` by the leading
       eigenvectors :math:`U` of :math:`Q^\top Q/\|Q\|^2 + K^\top K/\|K\|^2` for queries and keys, of
       :math:`V^\top V` for values: the :math:`U` that keeps most of :math:`QQ^\top`, :math:`KK^\top`,
       :math:`VV^\top`, and with them :math:`QK^\top`. Scaled by :math:`(k_s/k_t)^{1/4}`, relations divided by
       :math:`\sqrt{k_s}` equal those divided by :math:`\sqrt{k_t}` up to what :math:`U` drops.
    5. Feed-forward: the neurons with the largest :math:`\mathrm{std}(a_j)\,\|w_j\|` (activation, outgoing weights).
    6. What a block writes: ridge regression of its own activations on the teacher's output times :math:`P`.
    7. LayerNorms: weight and bias of each coordinate by least squares against :math:`H P`.

    Everything is closed-form, in float64, and deterministic (signs fixed); a pooler stays random.

    Args:
        teacher: the encoder, or a model with a head on one; left as it was found.
        config: the student's, e.g. from :func:`smaller_config`.
        initialization: see above.
        layers: which teacher layers the student's stand for, one for each, from 0; None spaces them evenly and
            includes the last.
        sample: ``"svd"`` only: ``input_ids [B, N]`` and ``attention_mask [B, N]`` of texts like those of the training,
            at least 4 real tokens for each hidden unit of the student.
        seed: of the random weights; the global random state is left alone.

    Returns:
        The student in training mode, float32, on the CPU.

    Raises:
        ValueError: an unknown initialization, layers that do not exist or are not one for each of the student's, sizes
            that the initialization cannot bridge, an architecture that ``"svd"`` does not know, or a missing or too
            small sample.
    """
    if initialization not in INITIALIZATIONS:
        _fail("make_student", f"initialization must be one of {', '.join(INITIALIZATIONS)}, got {initialization!r}")
    base = cast(PreTrainedModel, teacher.base_model)
    if config.model_type != base.config.model_type and initialization != "random":
        _fail(
            "make_student",
            f"initialization {initialization!r} needs a student of the teacher's architecture {base.config.model_type},"
            f" got {config.model_type}; pass initialization='random'",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = cast(PreTrainedModel, AutoModel.from_config(config, dtype=torch.float32))
    if initialization != "random":
        chosen = _chosen_layers(base.config.num_hidden_layers, config.num_hidden_layers, layers)
        if initialization == "layers":
            _copy_layers(base, student, chosen)
        else:
            _project(base, student, chosen, sample)
    return student.train()


def _chosen_layers(available: int, count: int, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return spaced_layers(available, count)
    if len(layers) != count:
        _fail("make_student", f"layers must name one teacher layer for each of the student's {count}, got {layers}")
    if not all(0 <= layer < available for layer in layers):
        _fail("make_student", f"layers must be from 0 to {available - 1}, got {list(layers)}")
    return list(layers)


def _copy_layers(teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> None:
    stack = _stack_name(teacher)
    source = teacher.state_dict()
    copied = {}
    for name, value in student.state_dict().items():
        origin = name
        if name.startswith(f"{stack}."):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            origin = f"{stack}.{layers[int(index)]}.{rest}"
        if origin not in source and name.startswith("pooler."):
            continue  # the teacher was built without one
        if origin not in source or source[origin].shape != value.shape:
            theirs = list(source[origin].shape) if origin in source else "none"
            _fail(
                "make_student",
                f"initialization 'layers' needs the teacher's sizes: {name} is {list(value.shape)}, the teacher's "
                f"{theirs}; pass initialization='svd' or 'random'",
            )
        copied[name] = source[origin]
    student.load_state_dict(copied, strict=False)


def _stack_name(model: PreTrainedModel) -> str:
    """Return the name of the module list that holds the layers."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    _fail("make_student", f"{type(model).__name__} has no list of {count} layers; pass initialization='random'")


# --------------------------------------------------------------------------- svd


@dataclass(frozen=True)
class _Layer:
    """The modules of one post-norm encoder layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    context: nn.Linear  # reads the concatenated heads
    middle_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    norm: nn.LayerNorm


# Where the architectures keep those modules. RoBERTa, ELECTRA, XLM-R, CamemBERT and others are built like BERT.
_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "context": "attention.output.dense",
    "middle_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "context": "attention.out_lin",
    "middle_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm": "output_layer_norm",
}
_EMBEDDING_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _layers_of(model: PreTrainedModel) -> list[_Layer]:
    stack = cast(nn.ModuleList, model.get_submodule(_stack_name(model)))
    for paths in (_BERT_LAYER, _DISTILBERT_LAYER):
        try:
            return [
                _Layer(**{name: cast(Any, layer.get_submodule(path)) for name, path in paths.items()})
                for layer in stack
            ]
        except AttributeError:
            continue
    _unknown_architecture(model)


def _unknown_architecture(model: PreTrainedModel) -> NoReturn:
    _fail(
        "make_student",
        f"initialization 'svd' knows post-norm encoders built like BERT or DistilBERT with embeddings as wide as the "
        f"layers, got {type(model).__name__}; pass initialization='random', or 'layers' where the sizes are equal",
    )


def _embeddings_of(model: PreTrainedModel) -> tuple[list[nn.Embedding], nn.LayerNorm]:
    embeddings = getattr(model, "embeddings", None)
    tables = [getattr(embeddings, name) for name in _EMBEDDING_TABLES if hasattr(embeddings, name)]
    norm = getattr(embeddings, "LayerNorm", None)
    widths = {table.embedding_dim for table in tables}
    if not isinstance(norm, nn.LayerNorm) or widths != {model.config.hidden_size}:
        _unknown_architecture(model)
    return tables, norm


def _check_sizes(teacher: PretrainedConfig, student: PretrainedConfig, layers: Sequence[_Layer]) -> None:
    if student.num_attention_heads != teacher.num_attention_heads:
        _fail(
            "make_student",
            f"initialization 'svd' keeps the heads one to one: num_attention_heads must be the teacher's "
            f"{teacher.num_attention_heads}, got {student.num_attention_heads}; pass initialization='random'",
        )
    widths = {
        "hidden_size": (student.hidden_size, teacher.hidden_size),
        "intermediate_size": (_width(student), layers[0].up.out_features),
    }
    for name, (ours, theirs) in widths.items():
        if ours > theirs:
            _fail("make_student", f"initialization 'svd' needs {name} of at most the teacher's {theirs}, got {ours}")


def _width(config: PretrainedConfig) -> int:
    return next(getattr(config, name) for name in _INTERMEDIATE_NAMES if hasattr(config, name))


@dataclass
class _Read:
    """What a teacher layer has at the sample's tokens, float32."""

    before: Tensor  # [n, d_t]
    attended: Tensor  # [n, d_t], what attention adds
    middle: Tensor  # [n, d_t]
    deviation: Tensor  # [f_t], of each neuron's activation
    fed: Tensor  # [n, d_t], what the feed-forward block adds
    after: Tensor  # [n, d_t]


@torch.no_grad()
def _project(
    teacher: PreTrainedModel, student: PreTrainedModel, chosen: Sequence[int], sample: Mapping[str, Tensor] | None
) -> None:
    theirs, ours = _layers_of(teacher), _layers_of(student)
    tables, norm = _embeddings_of(teacher)
    own_tables, own_norm = _embeddings_of(student)
    _check_sizes(teacher.config, student.config, theirs)
    for own, table in zip(own_tables, tables, strict=True):
        if own.num_embeddings != table.num_embeddings:
            _fail(
                "make_student",
                f"initialization 'svd' needs embedding tables of the teacher's {table.num_embeddings} rows, got "
                f"{own.num_embeddings}: keep its vocabulary and positions",
            )
    inputs, mask = _checked_sample(sample, 4 * student.config.hidden_size)

    embedded, reads = _read_teacher(teacher, norm, [theirs[index] for index in chosen], inputs, mask)
    states = [embedded, *(state for read in reads for state in (read.before, read.middle, read.after))]
    basis = _leading(_mean_gram(states), student.config.hidden_size)

    through = (norm.weight.double()[:, None] * basis).cpu()
    through -= through.mean(0)
    for own, table in zip(own_tables, tables, strict=True):
        own.weight.copy_(table.weight.double().cpu() @ through)
    student.eval()
    summed = _input_of(student, own_norm, inputs, mask)
    current = _fit_norm(own_norm, summed, embedded.double() @ basis)

    activation = ACT2FN[getattr(student.config, "hidden_act", None) or student.config.activation]
    heads = student.config.num_attention_heads
    for layer, source, read in zip(ours, [theirs[index] for index in chosen], reads, strict=True):
        reading = _fit(current, read.before.double())
        for names in (("query", "key"), ("value",)):
            maps = [_through(getattr(source, name), reading) for name in names]
            for name, cut in zip(names, _cut_heads(maps, current, heads, layer.query.out_features), strict=True):
                _set(getattr(layer, name), cut)
        # The one thing that this file does not compute itself: attention, whatever the architecture does in it.
        attended = _input_of(student, layer.context, inputs, mask)
        _set(layer.context, _fit(attended, read.attended.double() @ basis))
        summed = current + _apply(layer.context, attended)
        middle = _fit_norm(layer.middle_norm, summed, read.middle.double() @ basis)

        importance = read.deviation * source.down.weight.double().cpu().norm(dim=0)
        kept = importance.topk(layer.up.out_features).indices.sort().values
        _set(layer.up, _through(source.up, _fit(middle, read.middle.double()))[kept])
        activated = activation(_apply(layer.up, middle))
        _set(layer.down, _fit(activated, read.fed.double() @ basis))
        current = _fit_norm(layer.norm, middle + _apply(layer.down, activated), read.after.double() @ basis)


def _checked_sample(sample: Mapping[str, Tensor] | None, least: int) -> tuple[dict[str, Tensor], Tensor]:
    if sample is None or "input_ids" not in sample:
        _fail("make_student", "initialization 'svd' needs sample: input_ids and attention_mask of some texts")
    ids = sample["input_ids"]
    mask = sample.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        _fail("make_student", f"sample: attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}")
    if int(mask.sum()) < least:
        _fail(
            "make_student",
            f"sample must hold at least {least} real tokens (4 for each hidden unit), got {int(mask.sum())}; "
            "pass more texts",
        )
    return {"input_ids": ids, "attention_mask": mask}, mask.bool().cpu()


def _read_teacher(
    teacher: PreTrainedModel, norm: nn.LayerNorm, layers: Sequence[_Layer], inputs: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, list[_Read]]:
    """Run the teacher once; return the embeddings' output ``[n, d_t]`` and what the chosen layers have."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []

    def keep(key: tuple[int, str], module: nn.Module, of_input: bool = False, deviation: bool = False) -> None:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            rows = (arguments[0] if of_input else output)[mask.to(output.device)]
            found[key] = rows.float().std(0).cpu() if deviation else rows.float().cpu()

        handles.append(module.register_forward_hook(hook))

    training = teacher.training
    try:
        keep((-1, "embedded"), norm)
        for index, layer in enumerate(layers):
            keep((index, "before"), layer.query, of_input=True)
            keep((index, "attended"), layer.context)
            keep((index, "middle"), layer.middle_norm)
            keep((index, "deviation"), layer.down, of_input=True, deviation=True)
            keep((index, "fed"), layer.down)
            keep((index, "after"), layer.norm)
        teacher.eval()
        teacher(**{name: value.to(teacher.device) for name, value in inputs.items()})
    finally:
        teacher.train(training)
        for handle in handles:
            handle.remove()
    names = tuple(_Read.__dataclass_fields__)
    reads = [_Read(**{name: found[index, name] for name in names}) for index in range(len(layers))]
    return found[-1, "embedded"], reads


class _Reached(Exception):
    """The forward has come to the module that was waited for."""


@contextmanager
def _stopping_at(module: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def _input_of(model: PreTrainedModel, module: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Run ``model`` up to ``module`` and return its input at the real tokens, float64 ``[n, d]``."""
    found: list[Tensor] = []
    with _stopping_at(module, found):
        model(**{name: value.cpu() for name, value in inputs.items()})
    return found[0][mask].double()


def _mean_gram(states: Sequence[Tensor]) -> Tensor:
    """Return the mean of the states' second moments, each of trace 1: float64 ``[d, d]``."""
    grams = (state.T @ state / state.square().sum() for state in map(Tensor.double, states))
    return torch.stack(list(grams)).mean(0)


def _leading(gram: Tensor, count: int) -> Tensor:
    """Return the leading eigenvectors of a symmetric ``[d, d]``, largest first, signs fixed: ``[d, count]``."""
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :count]
    # An eigenvector is only defined up to its sign: its largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _fit(source: Tensor, target: Tensor) -> Tensor:
    """Ridge regression of ``target [n, b]`` on ``source [n, a]`` with intercept: ``[b, a + 1]``, the bias last."""
    mean, wanted = source.mean(0), target.mean(0)
    centred = source - mean
    gram = centred.T @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    weight = torch.linalg.solve(gram, centred.T @ (target - wanted)).T
    return torch.cat([weight, (wanted - weight @ mean)[:, None]], dim=1)


def _fit_norm(norm: nn.LayerNorm, source: Tensor, target: Tensor) -> Tensor:
    """Set weight and bias of ``norm`` so that it takes ``source`` near ``target`` (both ``[n, d]``); return it."""
    unit = nn.functional.layer_norm(source, norm.normalized_shape, eps=norm.eps)
    mean, wanted = unit.mean(0), target.mean(0)
    spread = (unit - mean).square().sum(0).clamp(min=torch.finfo(unit.dtype).tiny)
    weight = ((unit - mean) * (target - wanted)).sum(0) / spread
    norm.weight.copy_(weight)
    norm.bias.copy_(wanted - weight * mean)
    return unit * norm.weight.double() + norm.bias.double()


def _through(linear: nn.Linear, reading: Tensor) -> Tensor:
    """The teacher's ``linear`` behind ``reading [d_t, d_s + 1]``: ``[out, d_s + 1]``, the bias last."""
    joined = linear.weight.double().cpu() @ reading
    joined[:, -1] += linear.bias.double().cpu()
    return joined


def _cut_heads(maps: Sequence[Tensor], states: Tensor, heads: int, width: int) -> list[Tensor]:
    """Cut the heads of ``maps [d_t, d_s + 1]`` to ``width`` in all, in one subspace per head that they share."""
    size, kept = maps[0].shape[0] // heads, width // heads
    cut = [torch.empty(width, states.shape[1] + 1, dtype=states.dtype) for _ in maps]
    values = [states @ single[:, :-1].T + single[:, -1] for single in maps]  # [n, d_t]
    for head in range(heads):
        theirs, ours = slice(head * size, (head + 1) * size), slice(head * kept, (head + 1) * kept)
        parts = [value[:, theirs] for value in values]
        subspace = _leading(_mean_gram(parts), kept)
        for target, single in zip(cut, maps, strict=True):
            target[ours] = (kept / size) ** 0.25 * subspace.T @ single[theirs]
    return cut


def _apply(linear: nn.Linear, rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, linear.weight.double(), linear.bias.double())


def _set(linear: nn.Linear, joined: Tensor) -> None:
    linear.weight.copy_(joined[:, :-1])
    linear.bias.copy_(joined[:, -1])


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
