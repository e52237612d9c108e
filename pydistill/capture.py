# SPDX-License-Identifier: Apache-2.0
"""What is read out of a model's forward: logits, hidden states, queries, keys and values of single layers.

Queries, keys and values are taken where every attention implementation takes them: transformers' `AttentionInterface`.
A recording function stands in its registry for the duration of a call, notes what it is given, and hands on to the
implementation that the user chose. Hidden states come from forward hooks. What is asked for decides how much of the
model runs: the forward ends with the last signal.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

LOGITS = "logits"
ATTENTION_KINDS = ("queries", "keys", "values")
HIDDEN_STATES = "hidden_states"
EMBEDDINGS = "embeddings"

# Attention modules that call no `AttentionInterface`, and their query, key and value projections.
_PROJECTIONS = {
    "transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": (
        "query_proj",
        "key_proj",
        "value_proj",
    ),
    "transformers.models.mpnet.modeling_mpnet.MPNetSelfAttention": ("q", "k", "v"),
}
# The name of a delegate stays part of ours: transformers looks for "flash" in it.
_RECORDING = "pydistill_capture_"


def capture(model: nn.Module, signals: Iterable[str], *, stop_early: bool = True) -> Capture:
    """Read signals out of a model's forward, and run no more of the model than they need.

    A signal is ``"logits"`` or ``"<kind>@<layer>"``, where ``<kind>`` is

    - ``queries``, ``keys`` or ``values``: ``[B, H, N, d]``, as the attention function receives them, after the rotary
      embedding and before the softmax. Keys and values of grouped-query models have fewer heads than queries; they are
      not repeated;
    - ``hidden_states``: ``[B, N, D]``, what the layer's module returns. A normalisation that follows the last layer is
      a module of its own (``hidden_states@model.norm``);

    and ``<layer>`` is

    - an index: 0 is the first layer, -1 the last;
    - the dotted name of a module, as in ``model.named_modules()``: ``hidden_states@bert.encoder.layer.3``. Queries,
      keys and values may name an attention module or whatever contains exactly one;
    - ``embeddings``, for hidden states only: what the first layer receives.

    A module that runs several times in one forward is read the first time.

    The captured model computes the same bits as the model alone. Nothing stays behind after a call, whether it succeeds
    or raises. Signals carry their graph, so a loss on them trains the model; call under ``torch.no_grad()`` where none
    is wanted. Layers whose queries, keys or values are read are exempt from gradient checkpointing during the call, all
    others are recomputed as ever.

    DeBERTa-v2 and MPNet do not use transformers' attention interface; their queries, keys and values are the outputs of
    the projections. These are exact, but the attention scores of these two models have further terms for the relative
    position, which no product of queries and keys contains.

    Args:
        model: any module for ``logits`` and named hidden states; a transformers model for the rest. It must not be
            compiled or wrapped for data parallelism: compile or wrap the module that calls this one instead. Inside a
            compiled module, a captured forward runs eagerly.
        signals: at least one.
        stop_early: end the forward as soon as every signal is there. Where ``logits`` are asked for, or FSDP shards a
            part of the model, it runs to its end in any case. FSDP knows a layer's outputs only: shard those whose
            queries, keys or values are read with ``reshard_after_forward=False``.

    Returns:
        a `Capture`: call it as the model is called.

    Raises:
        TypeError, ValueError: an argument breaks its rule, the model has no such layer or logits, or what stands there
            has no attention, or several, that can be read.

    Example::

        captured = capture(model, ["queries@-1", "keys@-1"])(input_ids=ids, attention_mask=mask)
        captured["queries@-1"]  # [B, H, N, d]
    """
    return Capture(model, signals, stop_early=stop_early)


class Capture:
    """A model and the signals to read from it, see `capture`.

    Attributes:
        model: as given.
        signals: names of what a call returns, in the order asked for.
    """

    def __init__(self, model: nn.Module, signals: Iterable[str], *, stop_early: bool = True) -> None:
        _check_model(model)
        self.model = model
        self.signals = _check_names(signals)
        self.stop_early = stop_early and LOGITS not in self.signals
        self._modules = dict(model.named_modules())
        self._hidden: list[_Hidden] = []
        self._attention: list[_Attention] = []
        for signal in self.signals:
            kind, _, layer = signal.partition("@")
            if kind == LOGITS:
                _check_head(model)
            elif kind == HIDDEN_STATES:
                entering = layer == EMBEDDINGS
                self._hidden.append(_Hidden(signal, self._find(signal, "0" if entering else layer), entering))
            else:
                module = self._sole_attention(signal, self._find(signal, layer))
                self._attention.append(_Attention(signal, kind, module, _projection(module, kind)))
        # Only reads through the interface need the configuration switched.
        through_interface = [source.module for source in self._attention if source.projection is None]
        self._configs = list({id(module.config): module.config for module in through_interface}.values())
        read = {id(source.module) for source in self._attention}
        self._checkpointed = [
            module
            for module in self._modules.values()
            if isinstance(module, GradientCheckpointingLayer) and any(id(part) in read for part in module.modules())
        ]

    def __call__(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        """Run the model on `args` and `inputs` as far as needed, and return the signals by name.

        Raises:
            RuntimeError: the forward did not run a module that is to be read, or gave something else than expected.
        """
        if not self._hidden and not self._attention:
            return {LOGITS: _logits(self.model, self.model(*args, **inputs))}
        return self._recorded_forward(*args, **inputs)

    @torch.compiler.disable
    def _recorded_forward(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        _check_not_compiled(self.model)
        inner = {name for name in self.signals if name != LOGITS}
        recorder = _Recorder(self._attention, inner, self.stop_early and not _is_sharded(self.model))
        with self._recording(recorder):
            try:
                outputs = self.model(*args, **inputs)
            except _Complete as complete:
                if complete.recorder is not recorder:
                    raise
        for name in sorted(inner - recorder.recorded.keys()):
            raise RuntimeError(
                f"capture: the forward of {type(self.model).__name__} ended without running what {name!r} reads; ask "
                "for a layer that every forward runs"
            )
        if LOGITS in self.signals:
            recorder.recorded[LOGITS] = _logits(self.model, outputs)
        return {name: recorder.recorded[name] for name in self.signals}

    @contextmanager
    def _recording(self, recorder: _Recorder) -> Iterator[None]:
        with ExitStack() as undo:
            for layer in self._checkpointed:
                # An exception must not cross a checkpoint, and the reentrant kind has no graph inside.
                undo.enter_context(_changes.held(_switch, layer, "gradient_checkpointing", False))
            for config in self._configs:
                undo.enter_context(_recording_attention(config))
            for source in self._hidden:
                undo.enter_context(_hidden_hook(source, recorder))
            for attention in self._attention:
                if attention.projection is not None:
                    undo.enter_context(_projection_hook(attention, recorder))
            token = _active.set((*_active.get(), recorder))
            undo.callback(_active.reset, token)
            yield

    def _find(self, signal: str, layer: str) -> nn.Module:
        if re.fullmatch(r"-?\d+", layer):
            layers = _stack_of_layers(self.model, signal)
            index = int(layer)
            if not -len(layers) <= index < len(layers):
                _fail(
                    f"{signal!r}: {type(self.model).__name__} has {len(layers)} layers, so the index must be from "
                    f"{-len(layers)} to {len(layers) - 1}, got {index}"
                )
            return layers[index]
        if layer not in self._modules:
            close = difflib.get_close_matches(layer, self._modules, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else "see model.named_modules()"
            _fail(f"{signal!r}: {type(self.model).__name__} has no module {layer!r}; {hint}")
        return self._modules[layer]

    def _sole_attention(self, signal: str, module: nn.Module) -> nn.Module:
        inside = {id(part) for part in module.modules() if _is_attention(part)}
        names = [name for name, part in self._modules.items() if id(part) in inside]
        kind = signal.partition("@")[0]
        if not names:
            _fail(
                f"{signal!r}: {type(module).__name__} of {type(self.model).__name__} has no attention whose {kind} can "
                "be read: none calls transformers' AttentionInterface, or is DeBERTa-v2's or MPNet's; read hidden "
                "states instead, or pass a model whose attention calls the interface"
            )
        if len(names) > 1:
            choices = ", ".join(f"'{kind}@{name}'" for name in names[:4])
            _fail(
                f"{signal!r}: {type(module).__name__} of {type(self.model).__name__} must have one attention, and has "
                f"{len(names)} (cross-attention?); name the one to read: {choices}"
            )
        return self._modules[names[0]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode; each of its modules is left in the mode that it was found in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unreachable_parameters(
    model: nn.Module, signals: Iterable[str], inputs: Mapping[str, Any], *, stop_early: bool = True
) -> list[str]:
    """Names of the trainable parameters that no loss on `signals` can give a gradient.

    For instance the last layer's feed-forward where only its queries and keys are read. Found by following the graph of
    one captured forward, as data parallelism does; the model is left as it was found, and so is the random stream.

    Args:
        model, signals, stop_early: see `capture`.
        inputs: one batch, as the model takes it.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    # Without dropout, and without the layers that some models leave out at random.
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
        captured = capture(model, signals, stop_early=stop_early)(**inputs)
        reached = {id(leaf) for leaf in _leaves(captured.values())}
    return [name for name, parameter in trainable.items() if id(parameter) not in reached]


def freeze_unreachable(
    model: nn.Module, signals: Iterable[str], inputs: Mapping[str, Any], *, stop_early: bool = True
) -> list[str]:
    """Freeze the `unreachable_parameters`, which data parallelism would wait for in vain; returns their names."""
    names = unreachable_parameters(model, signals, inputs, stop_early=stop_early)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


# --------------------------------------------------------------------------- one call


class _Hidden(NamedTuple):
    signal: str
    module: nn.Module
    entering: bool  # what the module receives, instead of what it returns


class _Attention(NamedTuple):
    signal: str
    kind: str
    module: nn.Module
    projection: nn.Module | None  # None: read through the AttentionInterface


class _Recorder:
    """What one call has read so far."""

    def __init__(self, attention: Sequence[_Attention], wanted: set[str], stop: bool) -> None:
        self.recorded: dict[str, Tensor] = {}
        self._wanted = len(wanted)
        self._stop = stop
        self._attention: dict[int, list[_Attention]] = {}
        for source in attention:
            if source.projection is None:
                self._attention.setdefault(id(source.module), []).append(source)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Note what an attention module hands to its attention function."""
        given = dict(zip(ATTENTION_KINDS, (query, key, value), strict=True))
        for source in self._attention.get(id(module), ()):
            self.note(source.signal, given[source.kind])

    def note(self, signal: str, value: Tensor) -> None:
        """Keep a signal; raises `_Complete` with the last one."""
        self.recorded.setdefault(signal, value)
        if self._stop and len(self.recorded) == self._wanted:
            raise _Complete(self)


class _Complete(BaseException):
    """Ends a forward of which nothing more is needed; no ``except Exception`` of a model may hold it up."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__("every signal has been read")
        self.recorder = recorder


# The calls under way in this thread, outermost first: a model run by another thread, or by the backward that recomputes
# a checkpoint, finds none.
_active: ContextVar[tuple[_Recorder, ...]] = ContextVar("pydistill_capture", default=())


class _Changes:
    """Changes to what threads share, made by the first that needs one and undone by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[Any, ...], tuple[int, Callable[[], object]]] = {}  # users, and how to undo it

    @contextmanager
    def held(self, make: Callable[..., Callable[[], object]], *place: Any) -> Iterator[None]:
        """Within, ``make(*place)`` has been called; it returns how to undo what it did."""
        key = (make, *(part if isinstance(part, str | bool) else id(part) for part in place))
        with self._lock:
            users, undo = self._held.get(key) or (0, make(*place))
            self._held[key] = (users + 1, undo)
        try:
            yield
        finally:
            with self._lock:
                users, undo = self._held.pop(key)
                if users > 1:
                    self._held[key] = (users - 1, undo)
                else:
                    undo()


_changes = _Changes()


def _switch(owner: Any, attribute: str, value: Any) -> Callable[[], object]:
    if attribute in vars(owner):
        undo: Callable[[], object] = partial(setattr, owner, attribute, vars(owner)[attribute])
    else:
        undo = partial(delattr, owner, attribute)
    setattr(owner, attribute, value)
    return undo


# --------------------------------------------------------------------------- sources


@contextmanager
def _recording_attention(config: Any) -> Iterator[None]:
    """Models of this configuration hand queries, keys and values to `_record_and_attend`."""
    delegate = str(config._attn_implementation).removeprefix(_RECORDING)
    # Not the property: it would set every configuration inside this one too.
    attribute = "_attn_implementation_internal"
    with _changes.held(_register, delegate), _changes.held(_switch, config, attribute, _RECORDING + delegate):
        yield


def _register(delegate: str) -> Callable[[], object]:
    name = _RECORDING + delegate
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    functions[name] = cast(Any, partial(_record_and_attend, delegate))
    if delegate in masks:
        masks[name] = masks[delegate]

    def undo() -> None:
        functions.pop(name, None)
        masks.pop(name, None)

    return undo


def _record_and_attend(
    delegate: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> Any:
    for recorder in _active.get():
        recorder.attend(module, query, key, value)
    # As the attention module itself would look it up: some models keep a registry of their own, and each its own eager
    # implementation.
    names = _forward_of(module).__globals__
    attend = names["ALL_ATTENTION_FUNCTIONS"].get_interface(delegate, names["eager_attention_forward"])
    return attend(module, query, key, value, *args, **options)


@contextmanager
def _hidden_hook(source: _Hidden, recorder: _Recorder) -> Iterator[None]:
    def note(value: Any) -> None:
        if recorder not in _active.get():
            return
        if isinstance(value, tuple | list) and value:
            value = value[0]
        if not isinstance(value, Tensor) or value.dim() != 3:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RuntimeError(
                f"capture: {source.signal!r} must be a tensor [B, N, D], and {type(source.module).__name__} gave "
                f"{got}; name another module"
            )
        recorder.note(source.signal, value)

    if source.entering:
        handle = source.module.register_forward_pre_hook(
            lambda module, args, options: note(args[0] if args else options.get(HIDDEN_STATES)), with_kwargs=True
        )
    else:
        handle = source.module.register_forward_hook(lambda module, args, output: note(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _projection_hook(source: _Attention, recorder: _Recorder) -> Iterator[None]:
    heads = cast(int, source.module.num_attention_heads)

    def note(module: nn.Module, args: Any, output: Tensor) -> None:  # [B, N, H * d]
        if recorder in _active.get():
            recorder.note(source.signal, output.view(*output.shape[:-1], heads, -1).transpose(1, 2))

    assert source.projection is not None
    handle = source.projection.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _is_attention(module: nn.Module) -> bool:
    if _known_projections(module) is not None:
        return True
    code = getattr(_forward_of(module), "__code__", None)
    uses_interface = code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)
    return uses_interface and hasattr(getattr(module, "config", None), "_attn_implementation_internal")


def _known_projections(module: nn.Module) -> tuple[str, str, str] | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((_PROJECTIONS[name] for name in names if name in _PROJECTIONS), None)


def _projection(module: nn.Module, kind: str) -> nn.Module | None:
    names = _known_projections(module)
    return None if names is None else module.get_submodule(names[ATTENTION_KINDS.index(kind)])


def _stack_of_layers(model: nn.Module, signal: str) -> nn.ModuleList:
    """The list of layers that an index counts in: the one as long as its configuration says that there are layers."""
    counts: dict[str, int] = {}  # of layers, by name of the module whose configuration says so
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            _fail(
                f"{signal!r}: an index needs one stack of layers, and {type(model).__name__} has an encoder and a "
                "decoder; name the layer's module instead, see model.named_modules()"
            )
        layers = getattr(config, "num_hidden_layers", None)
        if isinstance(layers, int):
            counts[name] = layers
        if not isinstance(module, nn.ModuleList) or any(_is_within(name, outer) for outer in stacks):
            continue
        owner = max((outer for outer in counts if _is_within(name, outer)), key=len, default=None)
        if owner is not None and len(module) == counts[owner]:
            stacks[name] = module
    # A list of heads may happen to be as long.
    attending = {name: stack for name, stack in stacks.items() if any(_is_attention(part) for part in stack.modules())}
    stacks = attending or stacks
    if len(stacks) != 1:
        found = f"has {', '.join(stacks)}" if stacks else "has none of config.num_hidden_layers modules"
        _fail(
            f"{signal!r}: an index needs one list of layers, and {type(model).__name__} {found}; name the layer's "
            "module instead, see model.named_modules()"
        )
    return next(iter(stacks.values()))


def _is_within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _is_sharded(model: nn.Module) -> bool:
    # By name: not every build of torch has torch.distributed.
    sharding = {"FSDPModule", "FullyShardedDataParallel"}
    return any(base.__name__ in sharding for kind in {type(part) for part in model.modules()} for base in kind.__mro__)


def _logits(model: nn.Module, outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        given = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise RuntimeError(
            f"capture: 'logits' must be in the output of {type(model).__name__}, which gave {given}; load it with a "
            "head (AutoModelFor...), or ask for other signals"
        )
    return logits


def _leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that a gradient of `tensors` would arrive at."""
    pending: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            pending.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    seen = set(pending)
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


# --------------------------------------------------------------------------- checks


def _check_names(signals: Iterable[str]) -> tuple[str, ...]:
    if isinstance(signals, str):
        _fail(f"signals must be a list of names, got the string {signals!r}; pass [{signals!r}]", TypeError)
    names = tuple(dict.fromkeys(signals))
    if not names:
        _fail("signals must name at least one signal, got none")
    for name in names:
        if not isinstance(name, str):
            _fail(f"signals must hold strings, got {name!r}", TypeError)
        kind, at, layer = name.partition("@")
        known = kind in (*ATTENTION_KINDS, HIDDEN_STATES)
        if (name != LOGITS and not (known and at and layer)) or (layer == EMBEDDINGS and kind in ATTENTION_KINDS):
            _fail(
                f"a signal must be 'logits' or '<kind>@<layer>' with kind queries, keys, values or hidden_states and "
                "layer an index or the name of a module (hidden_states@embeddings: what enters the first), got "
                f"{name!r}"
            )
    return names


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        _fail(f"model must be an nn.Module, got {type(model).__name__}", TypeError)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        _fail(
            f"model must not be wrapped in {type(model).__name__}, whose forward must not end early; pass "
            "model.module, and wrap the module that calls the capture"
        )
    _check_not_compiled(model)


def _check_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            _fail(
                f"model must not be compiled, a compiled forward passes over the hooks that read it; "
                f"{name or type(module).__name__} is: pass the model as it was before, and compile what uses the "
                "signals"
            )


def _check_head(model: nn.Module) -> None:
    from transformers import MODEL_MAPPING

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or MODEL_MAPPING.get(type(config), None) is not type(model):
        return
    # What AutoModel loads has no head as a rule. A model may be registered there for want of a headless one.
    code = _forward_of(model).__code__
    words = {
        *code.co_varnames,
        *(word for constant in code.co_consts if isinstance(constant, tuple) for word in constant),
    }
    if LOGITS not in words:
        _fail(
            f"'logits': {type(model).__name__} has no head that gives logits; load it with one (AutoModelFor...), or "
            "ask for other signals"
        )


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"capture: {message}")


class _CallableModule(ModuleType):
    """This module, callable: importing it sets the package's attribute ``capture``, also the public function."""

    def __call__(self, *arguments: Any, **options: Any) -> Capture:
        return capture(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
