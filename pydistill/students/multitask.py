# SPDX-License-Identifier: Apache-2.0
"""One encoder and a head for each of several tasks: the model of MT-DNN (Liu et al. 2019, arXiv 1901.11504)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

Kind = Literal["classification", "regression", "ranking"]
KINDS: tuple[Kind, ...] = ("classification", "regression", "ranking")
Head = Literal["linear", "san"]
HEADS: tuple[Head, ...] = ("linear", "san")


def task_settings(
    kind: Kind = "classification",
    *,
    labels: tuple[str, ...] | list[str] = (),
    pair: bool = False,
    head: Head = "linear",
    dropout: float | None = None,
    steps: int = 5,
    prediction_dropout: float = 0.1,
) -> dict[str, Any]:
    """Return one task's entry in `MultiTaskConfig.tasks`, checked.

    Args:
        kind: ``classification`` of texts or pairs; ``regression``, one score; ``ranking``, one score by which the
            candidates of a query (pairs with the same first text) compete.
        labels: the names of the classes in the order of their ids; classification only.
        pair: whether rows are two texts.
        head: ``linear``: what the encoder's own architecture puts on top of itself to classify; ``san``: the stochastic
            answer module for pairs, see `AnswerModule`.
        dropout: before the head's last layer; None: the architecture's own (linear), 0.1 (san).
        steps, prediction_dropout: of the answer module.

    Raises:
        ValueError: a value breaks its rule.
    """
    if kind not in KINDS:
        _fail("task_settings", f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if head not in HEADS:
        _fail("task_settings", f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if (kind == "classification") != (len(labels) >= 2):
        _fail("task_settings", f"labels must name two classes or more for classification alone, got {list(labels)}")
    if not pair and (kind == "ranking" or head == "san"):
        what = "kind 'ranking'" if kind == "ranking" else "head 'san'"
        _fail("task_settings", f"{what} is for pairs of texts, got pair=False")
    for name, value in (("dropout", dropout), ("prediction_dropout", prediction_dropout)):
        if value is not None and not 0.0 <= value < 1.0:
            _fail("task_settings", f"{name} must lie in [0, 1), got {value}")
    if steps < 1:
        _fail("task_settings", f"steps must be at least 1, got {steps}")
    settings: dict[str, Any] = {"kind": kind, "labels": list(labels), "pair": pair, "head": head, "dropout": dropout}
    return settings | ({"steps": steps, "prediction_dropout": prediction_dropout} if head == "san" else {})


class MultiTaskConfig(PretrainedConfig):
    """Configuration of `MultiTaskModel`.

    Args:
        encoder: the configuration of the shared encoder, as a dictionary with its ``model_type``.
        tasks: by name, see `task_settings`.
        task: the task of a forward that names none; None: it has to be named, unless there is only one.

    Raises:
        ValueError: `task` is none of the tasks.
    """

    model_type = "pydistill_multitask"

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder = dict(encoder or {})
        self.tasks = {name: dict(settings) for name, settings in (tasks or {}).items()}
        super().__init__(**kwargs)
        self.task = task
        if task is not None:
            self.select(task)
        elif len(self.tasks) == 1:
            self.select(next(iter(self.tasks)))

    def select(self, task: str) -> None:
        """Make ``task`` the one that a forward means which names none.

        Raises:
            ValueError: there is no such task.
        """
        labels = self.settings(task)["labels"] or ["score"]
        self.task = task
        self.id2label = dict(enumerate(labels))
        self.label2id = {name: index for index, name in self.id2label.items()}
        self.problem_type = _problem_type(self.settings(task))
        self.pair = self.settings(task)["pair"]

    def settings(self, task: str) -> dict[str, Any]:
        """What was said of ``task``, see `task_settings`."""
        if task not in self.tasks:
            _fail("MultiTaskConfig", f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        return self.tasks[task]

    def classifier(self, task: str) -> PretrainedConfig:
        """The configuration of a sequence classifier of the encoder's architecture, for ``task`` alone."""
        settings = self.settings(task)
        config = copy.deepcopy(AutoConfig.for_model(**self.encoder))
        config.id2label = dict(enumerate(settings["labels"] or ["score"]))
        config.label2id = {name: index for index, name in config.id2label.items()}
        config.problem_type = _problem_type(settings)
        if settings["dropout"] is not None:
            _set_dropout(config, settings["dropout"])
        return config


def _problem_type(settings: Mapping[str, Any]) -> Literal["single_label_classification", "regression"]:
    return "single_label_classification" if settings["kind"] == "classification" else "regression"


def _set_dropout(config: PretrainedConfig, dropout: float) -> None:
    for name in ("classifier_dropout", "seq_classif_dropout", "summary_last_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
            return
    _fail("MultiTaskConfig", f"{config.model_type} has no dropout of its head to set; leave dropout out")


class AnswerModule(nn.Module):
    r"""The stochastic answer module (Liu et al. 2018, arXiv 1712.03556): several guesses about a pair, averaged.

    With the hidden states :math:`M^p` of the first text (premise) and :math:`M^h` of the second (hypothesis),

    .. math::
        s^0 = \sum_j \alpha_j M^h_j, \quad \alpha = \operatorname{softmax}(w_1^\top M^h), \qquad
        x^k = \sum_j \beta_j M^p_j, \quad \beta = \operatorname{softmax}(s^{k\top} W_2 M^p)

    .. math::
        P^k = \operatorname{softmax}(W_3 [s^k; x^k; |s^k - x^k|; s^k x^k]), \quad s^{k+1} = \operatorname{GRU}(x^k, s^k)
        \qquad P = \frac{1}{K} \sum_k P^k

    In training each guess is left out of the mean with probability `prediction_dropout`, in every row by its own draw;
    where all would be, none is. A score in the place of classes is averaged the same way, without a softmax.

    Args:
        width: D of the hidden states.
        classes: C; 1 is a score.
        steps: K, the number of guesses.
        dropout: on what `P^k` is made from.
        prediction_dropout: see above.
    """

    def __init__(self, width: int, classes: int, steps: int, dropout: float, prediction_dropout: float) -> None:
        super().__init__()
        self.steps = steps
        self.prediction_dropout = prediction_dropout
        self.query = nn.Linear(width, 1, bias=False)
        self.bilinear = nn.Linear(width, width, bias=False)
        self.cell = nn.GRUCell(width, width)
        self.dropout = nn.Dropout(dropout)
        self.answer = nn.Linear(4 * width, classes)

    def forward(self, hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Hidden states ``[B, N, D]`` and the masks ``[B, N]`` (bool) of both texts -> ``[B, C]``: log-probabilities,
        or scores where C is 1. Each text has at least one token."""
        state = _attended(self.query(hidden).squeeze(-1), hidden, second)
        keys = self.bilinear(hidden)
        answers = []
        for step in range(self.steps):
            seen = _attended(torch.einsum("bnd,bd->bn", keys, state), hidden, first)
            features = torch.cat([state, seen, (state - seen).abs(), state * seen], -1)
            answers.append(self.answer(self.dropout(features)))
            if step + 1 < self.steps:
                state = self.cell(seen, state)
        guesses = torch.stack(answers, 1).float()  # [B, K, C]
        kept = torch.ones_like(guesses[..., 0])
        if self.training and self.prediction_dropout > 0:
            drawn = torch.bernoulli(kept, 1 - self.prediction_dropout)
            kept = torch.where(drawn.any(1, keepdim=True), drawn, kept)
        weights = (kept / kept.sum(1, keepdim=True)).unsqueeze(-1)  # [B, K, 1]
        if guesses.size(-1) == 1:
            return (weights * guesses).sum(1)
        return (guesses.log_softmax(-1) + weights.log()).logsumexp(1)


def _attended(scores: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the hidden states ``[B, N, D]`` that ``mask`` shows, weighted by the softmax of ``scores [B, N]``."""
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(hidden.dtype)
    return torch.einsum("bn,bnd->bd", weights, hidden)


class MultiTaskModel(PreTrainedModel):
    """A shared encoder with a head per task.

    A linear head is all that the encoder's architecture has in ``AutoModelForSequenceClassification`` beyond the
    encoder itself (BERT: dropout and a linear layer on the pooled [CLS]), so that each task alone is a plain sequence
    classifier to the bit, see `classifier`.

    Example::

        tasks = {"sst2": task_settings(labels=["bad", "good"]), "stsb": task_settings("regression", pair=True)}
        model = MultiTaskModel.from_encoder("bert-base-uncased", tasks)
        model(**tokenizer("a fine film", return_tensors="pt"), task="sst2").logits  # [1, 2]
    """

    config_class = MultiTaskConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiTaskConfig) -> None:
        super().__init__(config)
        if not config.tasks:
            _fail("MultiTaskModel", "config.tasks must hold at least one task, got none")
        plain = AutoConfig.for_model(**config.encoder)
        self.encoder = cast(PreTrainedModel, AutoModelForSequenceClassification.from_config(plain).base_model)
        self.heads = nn.ModuleDict({name: self._head(name) for name in config.tasks})
        self.post_init()

    @classmethod
    def from_encoder(
        cls, source: str | Path | PreTrainedModel, tasks: Mapping[str, Mapping[str, Any]], *, seed: int = 0
    ) -> MultiTaskModel:
        """A pretrained encoder under new heads.

        Args:
            source: a folder or hub name; of a `MultiTaskModel`, its encoder is taken. Or a model, whose weights are
                copied.
            tasks: see `task_settings`.
            seed: of the new heads, and of what the encoder needs to classify and the source lacks (a pooler); the
                global random state is left alone.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            whole: Any = source
            if not isinstance(source, PreTrainedModel):
                config = AutoConfig.from_pretrained(source)
                kind: Any = cls if isinstance(config, MultiTaskConfig) else AutoModelForSequenceClassification
                whole = kind.from_pretrained(source, dtype=torch.float32)
            encoder = whole.base_model
            model = cls(MultiTaskConfig(encoder=encoder.config.to_dict(), tasks=tasks))
        model.encoder.load_state_dict(encoder.state_dict(), strict=False)
        return model

    def _head(self, task: str) -> nn.Module:
        config, settings = self.config.classifier(task), self.config.settings(task)
        if settings["head"] == "san":
            return AnswerModule(
                config.hidden_size,
                len(config.id2label),
                settings["steps"],
                0.1 if settings["dropout"] is None else settings["dropout"],
                settings["prediction_dropout"],
            )
        # Where the heads are made (a real device, or the one without memory while weights are loaded) ...
        device = torch.empty(0).device
        with torch.device("meta"):
            whole = AutoModelForSequenceClassification.from_config(config)
        # ... without the encoder, which costs no memory there and is not kept.
        del whole._modules[whole.base_model_prefix]
        return whole.to_empty(device=device)

    def _init_weights(self, module: nn.Module) -> None:
        # Heads of the encoder's architecture are initialised by their own class; these are the answer module's.
        spread = getattr(self.encoder.config, "initializer_range", 0.02)
        if isinstance(module, (nn.Linear, nn.GRUCell)):
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=spread)

    def forward(
        self,
        input_ids: Tensor,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        token_type_ids: Tensor | None = None,  # [B, N]
        task: str | None = None,
        labels: Tensor | None = None,  # [B]
    ) -> SequenceClassifierOutput:
        """Logits ``[B, C]`` of one task, or scores ``[B, 1]``; with ``labels`` the cross-entropy or squared error, too.

        Raises:
            ValueError: no such task, or none named where there are several; labels of a ranking, whose loss is about
                candidates (see `pydistill.multitask.TaskLoss`).
        """
        task = task or self.config.task
        if task is None:
            _fail("MultiTaskModel", f"task must name one of {', '.join(self.config.tasks)}")
        settings = self.config.settings(task)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = {name: value for name, value in given.items() if value is not None}
        if settings["head"] == "san":
            logits = self._answer(task, inputs)
        else:
            head = cast(PreTrainedModel, self.heads[task])
            # Found as an attribute, registered nowhere: the encoder is the parent's, once.
            head.__dict__[head.base_model_prefix] = self.encoder
            logits = head(**inputs).logits
        loss = None
        if labels is not None:
            if settings["kind"] == "ranking":
                _fail("MultiTaskModel", f"labels: {task} ranks candidates; train it with TaskLoss")
            if settings["kind"] == "classification":
                loss = F.cross_entropy(logits.float(), labels)
            else:
                loss = F.mse_loss(logits.float().squeeze(-1), labels.float())
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _answer(self, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if "token_type_ids" not in inputs:
            _fail("MultiTaskModel", f"token_type_ids: the answer module of {task} reads from them which text is which")
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        second = inputs["token_type_ids"].bool() & mask
        hidden = self.encoder(**inputs).last_hidden_state
        return self.heads[task](hidden, mask & ~second, second)

    def classifier(self, task: str) -> PreTrainedModel:
        """A plain sequence classifier of the encoder's architecture that gives this task's logits, with weights of its
        own.

        Raises:
            ValueError: the task's head is an answer module, which no such classifier has.
        """
        if self.config.settings(task)["head"] != "linear":
            _fail("MultiTaskModel", f"{task} has an answer module, which no plain classifier has; keep the whole model")
        with torch.random.fork_rng(devices=[]):
            whole = AutoModelForSequenceClassification.from_config(self.config.classifier(task))
        weights = {f"{whole.base_model_prefix}.{name}": value for name, value in self.encoder.state_dict().items()}
        whole.load_state_dict(weights | self.heads[task].state_dict())
        return whole.to(self.device).train(self.training)


AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig)
AutoModel.register(MultiTaskConfig, MultiTaskModel)
AutoModelForSequenceClassification.register(MultiTaskConfig, MultiTaskModel)


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
