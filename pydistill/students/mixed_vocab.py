# SPDX-License-Identifier: Apache-2.0
"""The system of Zhao et al. 2019 (arXiv 1909.11687v1): teacher and student trained together, on two vocabularies.

The teacher reads words cut by either vocabulary and predicts masked pieces of both; the student, of the same depth and
narrower, reads and predicts its own. What ties them together are projections between their weights (the paper) or
between their hidden states. Both are trained by `DualTraining`; the student is all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from pydistill.data.mixed_vocab import IGNORED, NO_WORD, STUDENT
from pydistill.data.vocabulary import PREFIX, check_wordpiece
from pydistill.distiller import Distiller
from pydistill.losses.shared_projection import REDUCTIONS, Direction, SharedProjections
from pydistill.objective import Objective
from pydistill.students.encoder import smaller_config

Projected = Literal["parameters", "embeddings", "hidden_states"]
PROJECTED: tuple[Projected, ...] = ("parameters", "embeddings", "hidden_states")
# By model type: where a model for masked pieces keeps the parts of a `MaskedHead`: dense, norm and bias.
HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
}


def student_config(
    teacher: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
) -> PretrainedConfig:
    """Return the configuration of a student: the teacher's with another width, and the vocabulary of ``tokenizer``.

    The number of layers is the teacher's: each layer has its counterpart. See
    `pydistill.students.encoder.smaller_config` for the sizes, and what it refuses; ``make_student`` builds the model.
    """
    config = smaller_config(
        teacher,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
    )
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    return config


class MaskedHead(nn.Module):
    """What BERT puts before its softmax over pieces: dense, activation, LayerNorm; ``[..., D] -> [..., E]``.

    The softmax is tied: the logits are products with the rows of an embedding table, plus a bias, see `masked_loss`.
    """

    def __init__(self, config: PretrainedConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, width)
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
        # ELECTRA's own is fixed, whatever its layers have.
        self.activation = ACT2FN["gelu" if config.model_type == "electra" else activation]
        self.norm = nn.LayerNorm(width, eps=getattr(config, "layer_norm_eps", 1e-12))
        nn.init.normal_(self.dense.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the tables are multiplied with."""
        return self.norm(self.activation(self.dense(hidden)))


class NextSentenceHead(nn.Module):
    """What BERT predicts the next sentence with: dense, tanh and two classes; last hidden states ``[B, N, D]`` ->
    ``[B, 2]``, of [CLS]."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classes = nn.Linear(config.hidden_size, 2)
        for layer in (self.dense, self.classes):
            nn.init.normal_(layer.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits: 0 is the next sentence, 1 another."""
        return self.classes(torch.tanh(self.dense(hidden[:, 0])))

    def loss(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """Sum of the cross-entropies of the rows that are pairs, 0-d; ``kinds`` ``[B]``."""
        return F.cross_entropy(self(hidden).float(), kinds, ignore_index=IGNORED, reduction="sum")


def masked_loss(
    head: MaskedHead,
    hidden: Tensor,  # [B, N, D]
    labels: Tensor,  # [B, N]
    table: Tensor,  # [V, E]
    bias: Tensor,  # [V]
) -> Tensor:
    """Sum of the cross-entropies of the ``M`` pieces with a label, 0-d; head and logits ``[M, V]`` know no others."""
    chosen = labels != IGNORED
    logits = F.linear(head(hidden[chosen]), table, bias)
    return F.cross_entropy(logits, labels[chosen], reduction="sum")


class MixedVocabularyTeacher(nn.Module):
    """An encoder with a second table of embeddings and a second softmax, for the student's vocabulary.

    A piece is looked up in the table of the vocabulary that cut its word. A masked piece is predicted over that
    vocabulary alone: one head, two tied softmaxes. Everything trains but the pooler, which nothing reads.

    The second table starts from the first, see `second_table` (ours; the paper does not say). The head is the model's
    own where it has one of a kind in `HEADS`; others get a new one, which has to be trained: `new_head` says so.

    Args:
        model: an encoder of BERT's kind, with or without a head; taken over, not copied.
        tokenizer: its own.
        student_tokenizer: see `pydistill.data.vocabulary.train_vocabulary`.
        freeze_encoder: train only tables, head and biases, so that the encoder cannot move towards the student.
        learning_rate_scale: of what was trained before, encoder and tables, against all else that trains: head,
            projections, student. A pretrained encoder forgets at the rate that a new one needs; `DistillationTrainer`
            reads it.
        seed: of a new head; the global random state is left alone.

    Raises:
        VocabularyError: a tokenizer that is not of BERT's kind.
        ValueError: a table that is smaller than its vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        freeze_encoder: bool = False,
        learning_rate_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not learning_rate_scale > 0:
            _fail("MixedVocabularyTeacher", f"learning_rate_scale must be positive, got {learning_rate_scale}")
        self.encoder = cast(PreTrainedModel, model.base_model)
        rows, width = self.table.shape
        if rows < len(tokenizer):
            _fail("MixedVocabularyTeacher", f"the model has {rows} embeddings, the tokenizer {len(tokenizer)} pieces")
        self.student_embeddings = nn.Embedding.from_pretrained(
            second_table(self.table.detach(), tokenizer, student_tokenizer), freeze=False
        )
        for pretrained in (self.encoder, self.student_embeddings):
            pretrained.learning_rate_scale = learning_rate_scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = MaskedHead(self.encoder.config, width)
        self.bias = nn.Parameter(torch.zeros(rows))
        self.student_bias = nn.Parameter(torch.zeros(len(student_tokenizer)))
        weights = dict(model.named_parameters())
        dense, norm, bias = HEADS.get(model.config.model_type, ("", "", ""))
        self.new_head = bias not in weights
        if not self.new_head:
            self.head.dense.load_state_dict(model.get_submodule(dense).state_dict())
            self.head.norm.load_state_dict(model.get_submodule(norm).state_dict())
            self.bias.data.copy_(weights[bias])
        for name, parameter in self.encoder.named_parameters():
            if name.startswith("pooler.") or (freeze_encoder and parameter is not self.table):
                parameter.requires_grad_(False)

    @property
    def table(self) -> Tensor:
        """The embeddings of the teacher's own vocabulary, ``[V, E]``."""
        return cast(Tensor, self.encoder.get_input_embeddings().weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, vocabulary: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the hidden states of every layer, each ``[B, N, D]``; see `MixedVocabularyCollator` for the inputs."""
        of_student = vocabulary == STUDENT
        # Either table is asked for every piece, and one of the answers is used: no shape depends on the draws.
        own = self.encoder.get_input_embeddings()(input_ids.masked_fill(of_student, 0))
        other = self.student_embeddings(input_ids.masked_fill(~of_student, 0))
        embedded = torch.where(of_student.unsqueeze(-1), other, own)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(inputs_embeds=embedded, attention_mask=attention_mask, output_hidden_states=True, **types)
        return tuple(output.hidden_states[1:])

    def loss(self, hidden: Tensor, labels: Tensor, vocabulary: Tensor) -> Tensor:
        """Sum of the cross-entropies of the masked pieces, each over its own vocabulary, 0-d."""
        of_student = vocabulary == STUDENT
        own = masked_loss(self.head, hidden, labels.masked_fill(of_student, IGNORED), self.table, self.bias)
        other = masked_loss(
            self.head,
            hidden,
            labels.masked_fill(~of_student, IGNORED),
            self.student_embeddings.weight,
            self.student_bias,
        )
        return own + other


def second_table(table: Tensor, tokenizer: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Tensor:
    """Return what a teacher's ``table`` ``[V, E]`` says of the student's pieces, ``[V_s, E]``.

    The row of the same piece, or the mean of the rows of the pieces that the teacher cuts it into.
    """
    known = tokenizer.get_vocab()
    model = check_wordpiece("teacher", tokenizer).model

    def row(piece: str) -> Tensor:
        ids = [known[piece]] if piece in known else [part.id for part in model.tokenize(piece.removeprefix(PREFIX))]
        return table[ids].float().mean(0)

    return torch.stack([row(piece) for piece in student.convert_ids_to_tokens(list(range(len(student))))])


class DualObjective(Objective):
    r"""The objective of `DualTraining`: :math:`L = L_s + L_t + \varepsilon L_p`.

    Unlike the terms of other objectives its parts share the teacher's forward, and the teacher, which trains, is a
    part of it: its weights lie with the objective's, not with the student's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: MixedVocabularyTeacher | None,
        *,
        direction: Direction | None,
        projected: Projected,
        projection_weight: float,
        project_embeddings: bool,
        project_norms: bool,
        reduction: str,
        next_sentence: bool,
        seed: int,
    ) -> None:
        nn.Module.__init__(self)
        # In a tuple, where nn.Module does not find it: the distiller owns the student.
        self._student = (student,)
        self.teacher = teacher
        self.projected = projected
        self.projection_weight = projection_weight
        self.project_embeddings = project_embeddings
        self.project_norms = project_norms
        self.reduction = reduction
        table = self._table
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student_head = MaskedHead(student.config, table.size(1))
            self.next_sentence_heads = nn.ModuleDict()
            if next_sentence:
                self.next_sentence_heads["student"] = NextSentenceHead(student.config)
            if next_sentence and teacher is not None:
                self.next_sentence_heads["teacher"] = NextSentenceHead(teacher.encoder.config)
        self.student_bias = nn.Parameter(torch.zeros(table.size(0)))
        self.projections: SharedProjections | None = None
        if direction is not None:
            assert teacher is not None  # DualTraining has seen to it
            if projected == "hidden_states":
                # One row stands for any number of words, the same on both sides.
                tables = [f"layer {layer}" for layer in range(self._depth)]
                ours, theirs = (
                    {layer: torch.zeros(1, model.config.hidden_size) for layer in tables}
                    for model in (student, teacher.encoder)
                )
                reduction = "sum"  # of all words; they are counted as the masked pieces are
            else:
                ours, theirs = self.matched_parameters()
                tables = [name for name in ours if "embeddings." in name and ours[name].dim() == 2]
            self.projections = SharedProjections(ours, theirs, direction, tables=tables, reduction=reduction, seed=seed)

    @property
    def _table(self) -> Tensor:
        return cast(Tensor, self._student[0].get_input_embeddings().weight)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of the loss that are switched on."""
        present = (True, self.teacher is not None, self.projections is not None)
        names = zip(("student", "teacher", "projection"), present, strict=True)
        return (*(name for name, there in names if there), *(f"{side}_next" for side in self.next_sentence_heads))

    @property
    def student_signals(self) -> frozenset[str]:
        """The last hidden states, or those of every layer where they are projected."""
        if self.projections is not None and self.projected == "hidden_states":
            return frozenset(f"hidden_states@{layer}" for layer in range(self._depth))
        return frozenset({f"hidden_states@{self._depth - 1}"})

    @property
    def teacher_signals(self) -> frozenset[str]:
        """None: the teacher is not asked for signals, it is a part of the objective."""
        return frozenset()

    @property
    def batch_keys(self) -> frozenset[str]:
        """What is read from the batch beside the student's inputs, the labels, and keys that begin with teacher_."""
        return frozenset({"word_ids", "next_sentence"} if self.next_sentence_heads else {"word_ids"})

    @property
    def _depth(self) -> int:
        return cast(int, self._student[0].config.num_hidden_layers)

    def matched_parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the student's parameters and the teacher's that stand for each other, by name; nothing is copied.

        Everything in the encoders but the pooler, or the tables of embeddings alone. Against the student's table of
        pieces stands the teacher's second table; the first has no counterpart.
        """
        assert self.teacher is not None
        student, teacher = self._student[0], self.teacher
        ours, theirs = dict(student.named_parameters()), dict(teacher.encoder.named_parameters())
        pieces = next(name for name, value in ours.items() if value is self._table)
        theirs[pieces] = teacher.student_embeddings.weight

        def counts(name: str) -> bool:
            if name == pieces:
                return self.project_embeddings
            if "layernorm" in name.lower().replace("_", ""):
                return self.project_norms and self.projected == "parameters"
            return name.startswith("embeddings.") or (self.projected == "parameters" and not name.startswith("pooler."))

        names = [name for name in ours if counts(name)]
        return {name: ours[name] for name in names}, {name: theirs[name] for name in names}

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many items each part's mean runs over, fp32 ``[K]``: masked pieces of either side, words, then pairs.

        Projections of parameters count as one item per batch.
        """
        counts = [(batch["labels"] != IGNORED).sum()]
        if self.teacher is not None:
            counts.append((batch["teacher_labels"] != IGNORED).sum())
        if self.projections is not None:
            words = self.projected == "hidden_states"
            counts.append(_common_words(batch)[1].sum() if words else torch.ones_like(counts[0]))
        counts += [(batch["next_sentence"] != IGNORED).sum() for _ in self.next_sentence_heads]
        return torch.stack(counts).float()

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.forward`; ``teacher`` is empty, and ``batch`` is a `MixedVocabularyCollator`'s."""
        if num_items is None:
            num_items = self.count_items(batch).clamp(min=1)
        items = torch.as_tensor(num_items, device=batch["labels"].device).expand(len(self.names))
        last = student[f"hidden_states@{self._depth - 1}"]
        lasts = {"student": last}
        sums = [masked_loss(self.student_head, last, batch["labels"], self._table, self.student_bias)]
        if self.teacher is not None:
            vocabulary = batch["teacher_vocabulary"]
            types = batch["teacher_token_type_ids"] if self.next_sentence_heads else None
            hidden = self.teacher(batch["teacher_input_ids"], batch["teacher_attention_mask"], vocabulary, types)
            lasts["teacher"] = hidden[-1]
            sums.append(self.teacher.loss(hidden[-1], batch["teacher_labels"], vocabulary))
            if self.projections is not None:
                words = self.projected == "hidden_states"
                sums.append(self._of_words(student, hidden, batch) if words else self._of_parameters())
        for side, head in self.next_sentence_heads.items():
            sums.append(cast(NextSentenceHead, head).loss(lasts[side], batch["next_sentence"]))
        values = torch.stack(sums) / items
        weights = values.new_tensor([self.projection_weight if name == "projection" else 1.0 for name in self.names])
        return (weights * values).sum(), dict(zip(self.names, values.detach().unbind(), strict=True))

    def _of_parameters(self) -> Tensor:
        assert self.projections is not None
        return self.projections(*self.matched_parameters())

    def _of_words(
        self, student: Mapping[str, Tensor], hidden: tuple[Tensor, ...], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum over words and layers of the squares' sum or mean over the features."""
        assert self.projections is not None and self.teacher is not None
        places, present = _common_words(batch)

        def means(states: Tensor, place: Tensor) -> Tensor:
            """Hidden states ``[B, N, D]`` -> the mean over the pieces of each common word, ``[W, D]``."""
            sums = states.new_zeros(len(present) + 1, states.size(-1), dtype=torch.float32)
            sums = sums.index_add(0, place.flatten(), states.flatten(0, 1).float())
            pieces = torch.bincount(place.flatten(), minlength=len(sums))
            return sums[:-1][present] / pieces[:-1][present].unsqueeze(-1)

        value = self.projections(
            {f"layer {layer}": means(student[f"hidden_states@{layer}"], places[0]) for layer in range(self._depth)},
            {f"layer {layer}": means(states, places[1]) for layer, states in enumerate(hidden)},
        )
        if self.reduction == "sum":
            return value
        target = self._student[0] if self.projections.direction == "down" else self.teacher.encoder
        return value / target.config.hidden_size


def _common_words(batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return where each piece's word goes in a list of all words ([B, N] for each side), and which words both have.

    The list holds as many places per text as the longest text has words, and one at its end for what is no word.
    """
    sides = [batch["word_ids"], batch["teacher_word_ids"]]
    longest = int(max(side.max() for side in sides)) + 1
    count = len(sides[0]) * longest
    offsets = torch.arange(len(sides[0]), device=sides[0].device).unsqueeze(1) * longest
    student, teacher = (torch.where(side == NO_WORD, count, offsets + side) for side in sides)
    present = [torch.bincount(side.flatten(), minlength=count + 1)[:count] > 0 for side in (student, teacher)]
    return (student, teacher), present[0] & present[1]


class DualTraining(Distiller):
    r"""Teacher and student trained together, as one step: :math:`L = L_s + L_t + \varepsilon L_p`.

    - :math:`L_s`: cross-entropy of the student's masked pieces, a mean;
    - :math:`L_t`: the same of the teacher, on rows of both vocabularies; with ``next_sentence``, both also ask whether
      the second half of a row belongs to the first;
    - :math:`L_p`: projections between the two, see ``projected``.

    The paper's rows: NoKD is ``teacher=None``; DualTrain ``direction=None``; DualTrain+SharedProjDown ``"down"``;
    DualTrain+SharedProjUp ``"up"``. Without a projection the two have nothing in common but the step: the student
    gets the gradients that it would get alone. ``projected="embeddings"`` ties them by the tables alone: that of
    pieces, which the teacher has learned to use in its own contexts, and those of positions and token types.

    A `Distiller` whose teacher is no guest: it trains, and its weights lie with the objective's. `DistillationTrainer`
    takes it: checkpoints hold the student alone in hub format, and teacher, head and projections beside it in
    ``objective.safetensors``, for a resume. The student's head is the objective's too.

    Args:
        student: an encoder without a head (`make_student` with `student_config`), of the teacher's architecture and
            depth.
        teacher: None trains the student alone.
        direction: ``"down"`` projects the teacher to the student's sizes, ``"up"`` the student to the teacher's; None:
            no projection.
        projected: ``"parameters"``: every matched weight, as in the paper. ``"embeddings"``: the tables alone.
            ``"hidden_states"``: the output of every layer, a mean over the pieces of each word, since the two sides cut
            words differently.
        projection_weight: :math:`\varepsilon`.
        project_embeddings: of parameters, compare the student's table of pieces with the teacher's second table.
        project_norms: of parameters, compare the weights and biases of LayerNorms.
        reduction: ``"sum"`` (the paper) or ``"mean"`` of the squares of each pair, see `shared_projection_loss`; of
            hidden states, of the squares of each word, which are then averaged over the words.
        next_sentence: predict the next sentence, too, as BERT does; by heads of their own, which are not kept.
        seed: of head and projections; the global random state is left alone.

    The forward takes the batch of `pydistill.data.mixed_vocab.MixedVocabularyCollator`; ``parts`` of its output are
    ``student``, ``teacher`` and ``projection``, ``student_next`` and ``teacher_next``, as far as they are switched on.

    Raises:
        ValueError: a student of another depth or architecture than the teacher, a projection without a teacher, or an
            option out of its range.
    """

    objective: DualObjective

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: MixedVocabularyTeacher | None = None,
        *,
        direction: Direction | None = None,
        projected: Projected = "parameters",
        projection_weight: float = 1.0,
        project_embeddings: bool = True,
        project_norms: bool = True,
        reduction: str = "sum",
        next_sentence: bool = False,
        seed: int = 0,
    ) -> None:
        if projected not in PROJECTED:
            _fail("DualTraining", f"projected must be one of {', '.join(PROJECTED)}, got {projected!r}")
        if direction is not None and teacher is None:
            _fail("DualTraining", f"direction {direction!r} projects between two models; pass a teacher, or None")
        if reduction not in REDUCTIONS:
            _fail("DualTraining", f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not projection_weight >= 0:
            _fail("DualTraining", f"projection_weight must not be negative, got {projection_weight}")
        if next_sentence and getattr(student.config, "type_vocab_size", 0) < 2:
            _fail("DualTraining", f"next_sentence: {student.config.model_type} does not tell two texts of a row apart")
        if teacher is not None:
            ours, theirs = student.config, teacher.encoder.config
            kinds = [(config.model_type, config.num_hidden_layers) for config in (ours, theirs)]
            if kinds[0] != kinds[1]:
                _fail(
                    "DualTraining",
                    "the student must have the teacher's architecture and number of layers, got {} with {} and {} "
                    "with {}; build it with student_config".format(*kinds[0], *kinds[1]),
                )
            if student.get_input_embeddings().num_embeddings != teacher.student_embeddings.num_embeddings:
                _fail(
                    "DualTraining",
                    f"the student has {student.get_input_embeddings().num_embeddings} embeddings, the teacher's "
                    f"second table {teacher.student_embeddings.num_embeddings}: both must be of one vocabulary",
                )
        super().__init__(
            student,
            None,
            DualObjective(
                student,
                teacher,
                direction=direction,
                projected=projected,
                projection_weight=projection_weight,
                project_embeddings=project_embeddings,
                project_norms=project_norms,
                reduction=reduction,
                next_sentence=next_sentence,
                seed=seed,
            ),
        )

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the activations of both models in the backward."""
        super().activation_checkpointing_enable(**options)
        if self.objective.teacher is not None:
            self.objective.teacher.encoder.activation_checkpointing_enable(**options)


@torch.no_grad()
def held_out_losses(step: DualTraining, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the mean of each part of the loss over all items of ``batches``, without dropout.

    ``student`` is the cross-entropy per masked piece, in nats, by which students of one vocabulary are compared.

    Raises:
        ValueError: there is no batch.
    """
    training, device = step.training, step.student.device
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    step.eval()
    try:
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items()}
            parts = step(**given).parts
            assert parts is not None
            counts.append(step.objective.count_items(given))
            sums.append(torch.stack(list(parts.values())) * counts[-1])
    finally:
        step.train(training)
    if not sums:
        _fail("held_out_losses", "batches must hold at least one, got none")
    means = torch.stack(sums).sum(0) / torch.stack(counts).sum(0).clamp(min=1)
    return dict(zip(step.objective.names, means.tolist(), strict=True))


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
