# SPDX-License-Identifier: Apache-2.0
"""The BiLSTM student of Tang et al. (arXiv 1903.12136): one bidirectional LSTM layer over word vectors, a
ReLU layer, a classifier; siamese for sentence pairs. CPU runs the recurrence below, CUDA runs cuDNN's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput


class BiLSTMConfig(PretrainedConfig):
    """Configuration of `BiLSTMForSequenceClassification`.

    Args:
        vocab_size: rows of the word-vector table, padding and unknown word included.
        embedding_size: width E of one word vector.
        multichannel: True feeds the LSTM a frozen and a trainable copy of the table side by side (2 E wide),
            False the trainable one alone.
        hidden_size: width H of one LSTM direction (the paper: 150 or 300).
        classifier_size: width of the ReLU layer (the paper: 200 or 400).
        num_labels: classes; 1 means regression. Left out: as many as `id2label` names, else 2.
        pair: two sentences through the same LSTM, classified from [h1, h2, h1*h2, |h1-h2|].
        dropout: after the ReLU layer.
        pad_token_id: its row stays zero; positions that hold it are padding when no mask is given.
        unk_token_id: the word that unknown words and "[MASK]" become.
        initializer_range: standard deviation of the random table that a new model starts from.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), a special id outside the vocabulary, or a
            num_labels that contradicts id2label.
    """

    model_type = "pydistill_bilstm"

    def __init__(
        self,
        vocab_size: int = 30_000,
        embedding_size: int = 300,
        multichannel: bool = True,
        hidden_size: int = 150,
        classifier_size: int = 200,
        num_labels: int | None = None,
        pair: bool = False,
        dropout: float = 0.1,
        pad_token_id: int = 0,
        unk_token_id: int = 1,
        initializer_range: float = 0.1,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "classifier_size": classifier_size,
        }
        if num_labels is not None:
            sizes["num_labels"] = num_labels
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"BiLSTMConfig: {key} must be at least 1, got {value}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"BiLSTMConfig: dropout must lie in [0, 1), got {dropout}")
        for key, value in {"pad_token_id": pad_token_id, "unk_token_id": unk_token_id}.items():
            if not 0 <= value < vocab_size:
                raise ValueError(f"BiLSTMConfig: {key} must lie in [0, vocab_size={vocab_size}), got {value}")
        named = kwargs.get("id2label")
        if named is not None and num_labels is not None and len(named) != num_labels:
            raise ValueError(
                f"BiLSTMConfig: num_labels must agree with id2label, got {num_labels} and {len(named)} "
                "names; give one of the two"
            )
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.multichannel = multichannel
        self.hidden_size = hidden_size
        self.classifier_size = classifier_size
        self.pair = pair
        self.dropout = dropout
        self.initializer_range = initializer_range
        if named is None:
            kwargs["num_labels"] = 2 if num_labels is None else num_labels
        kwargs.update(pad_token_id=pad_token_id, unk_token_id=unk_token_id)
        super().__init__(**kwargs)


class _Packed(NamedTuple):
    """Every word of a batch once, step by step: at step t the rows still alive, longest row first."""

    words: Tensor  # [U] the distinct word ids of the batch, ascending
    forward: Tensor  # [T] index into words, first word of every row first
    backward: Tensor  # [T] the same, last word of every row first
    counts: list[int]  # rows alive at step t; sums to T
    order: Tensor  # [B] batch row of each packed row
    place: Tensor  # [B] packed row of each batch row


def _pack(input_ids: Tensor, mask: Tensor, pad_token_id: int) -> _Packed:
    """Pack the words of `input_ids` [B, N] that `mask` [B, N] (bool) shows, wherever they stand; B, N >= 1.

    A row without any word becomes one padding word: lengths are clamped to 1.
    """
    empty = ~mask.any(dim=1)
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    mask = mask | (empty[:, None] & first)
    ids = torch.where(empty[:, None], pad_token_id, input_ids)

    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    alive = (lengths[:, None] > torch.arange(mask.shape[1], device=mask.device)).sum(dim=0)  # [N]
    start = alive.cumsum(dim=0) - alive  # [N] packed position of each step's first row

    row, _ = mask.nonzero(as_tuple=True)
    step = mask.cumsum(dim=1)[mask] - 1
    words, index = ids[mask].unique(return_inverse=True)
    forward, backward = torch.empty_like(index), torch.empty_like(index)
    forward[start[step] + place[row]] = index
    backward[start[lengths[row] - 1 - step] + place[row]] = index
    return _Packed(words, forward, backward, [count for count in alive.tolist() if count], order, place)


class _Recurrence(torch.autograd.Function):
    """Last hidden states of both LSTM directions from input projections that are already there.

    Step t of each direction, rows n = counts[t] (torch.nn.LSTM's gate order i, f, g, o):
        a = projected[index] + h W_hh^T;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)

    Faster than torch.nn.LSTM on CPU: the caller projects each distinct word of the batch once, both
    directions share every step, the backward forms its elementwise factors for all steps at once and the
    gradient of W_hh as one product over all steps. Same values up to the order of the sums.

    Inputs: projected [U, 2, 4H], index [2, T] into its words, weight_hh [2, 4H, H], counts.
    Returns [2, B, H] in the order of the packed rows.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, projected: Tensor, index: Tensor, weight_hh: Tensor, counts: Sequence[int]) -> Tensor:
        hidden, rows, total = weight_hh.shape[2], counts[0], index.shape[1]
        # word u of direction d is row 2 u + d of the flattened projections
        flat = index * 2 + torch.tensor([[0], [1]])
        gates = projected.view(-1, 4 * hidden)[flat]  # [2, T, 4H], turned into activations in place
        weight_t = weight_hh.transpose(1, 2).contiguous()
        before_h, before_c, tanh_c = (gates.new_empty(2, total, hidden) for _ in range(3))  # [2, T, H]
        last = gates.new_empty(2, rows, hidden)
        before_h[:, :rows] = 0
        before_c[:, :rows] = 0
        start = 0
        for step, count in enumerate(counts):
            stop = start + count
            now = gates[:, start:stop]
            if step:
                torch.baddbmm(now, before_h[:, start:stop], weight_t, out=now)
            i, f, g, o = now.split(hidden, dim=-1)
            now[..., : 2 * hidden].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c = torch.mul(f, before_c[:, start:stop]).addcmul_(i, g)
            squashed = torch.tanh(c, out=tanh_c[:, start:stop])
            h = o * squashed
            after = counts[step + 1] if step + 1 < len(counts) else 0
            before_h[:, stop : stop + after] = h[:, :after]
            before_c[:, stop : stop + after] = c[:, :after]
            last[:, after:count] = h[:, after:]
            start = stop
        ctx.save_for_backward(flat, weight_hh, gates, before_h, before_c, tanh_c)
        ctx.counts, ctx.words = counts, projected.shape[0]
        return last

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_last: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        flat, weight_hh, gates, before_h, before_c, tanh_c = ctx.saved_tensors
        hidden = weight_hh.shape[2]
        i, f, g, o = gates.split(hidden, dim=-1)
        # what multiplies grad_c (i, f, g) and grad_h (o) to give the gradient of each pre-activation
        grad = torch.empty_like(gates)
        grad_i, grad_f, grad_g, grad_o = grad.split(hidden, dim=-1)
        torch.addcmul(i, i, i, value=-1, out=grad_i).mul_(g)
        torch.addcmul(f, f, f, value=-1, out=grad_f).mul_(before_c)
        torch.addcmul(i, i * g, g, value=-1, out=grad_g)
        torch.addcmul(o, o, o, value=-1, out=grad_o).mul_(tanh_c)
        through_tanh = torch.addcmul(o, o * tanh_c, tanh_c, value=-1)

        grad_h, grad_c = grad_last.clone(), torch.zeros_like(grad_last)
        stop = gates.shape[1]
        for step in range(len(ctx.counts) - 1, -1, -1):
            count = ctx.counts[step]
            start = stop - count
            # rows that end at this step still hold the gradient of their last state
            now_h, now_c, now = grad_h[:, :count], grad_c[:, :count], grad[:, start:stop]
            now_c.addcmul_(now_h, through_tanh[:, start:stop])
            now[..., : 3 * hidden].unflatten(-1, (3, hidden)).mul_(now_c.unsqueeze(2))
            now[..., 3 * hidden :].mul_(now_h)
            if step:
                now_c.mul_(f[:, start:stop])
                torch.bmm(now, weight_hh, out=now_h)
            stop = start
        grad_projected = torch.zeros(2 * ctx.words, 4 * hidden, dtype=grad.dtype)
        grad_projected.index_add_(0, flat.view(-1), grad.view(-1, 4 * hidden))
        grad_weight = torch.bmm(grad.transpose(1, 2), before_h)
        return grad_projected.view(-1, 2, 4 * hidden), None, grad_weight, None


class BiLSTMForSequenceClassification(PreTrainedModel):
    """The student: word vectors -> BiLSTM -> last hidden states h of both directions -> ReLU layer -> logits.

    The frozen copy of the vectors is a buffer: saved and loaded with the model, never seen by an optimizer.
    After `import pydistill.students`, AutoConfig, AutoModel and AutoModelForSequenceClassification load it.
    """

    config_class = BiLSTMConfig
    main_input_name = "input_ids"

    config: BiLSTMConfig
    frozen_embeddings: Tensor

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        width = config.embedding_size
        self.embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if config.multichannel:
            self.register_buffer("frozen_embeddings", torch.zeros(config.vocab_size, width))
        self.lstm = nn.LSTM(width * (1 + config.multichannel), config.hidden_size, bidirectional=True)
        self.hidden = nn.Linear((8 if config.pair else 2) * config.hidden_size, config.classifier_size)
        self.dropout = nn.Dropout(config.dropout)
        assert config.num_labels is not None  # BiLSTMConfig sets it
        self.classifier = nn.Linear(config.classifier_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.LSTM, nn.Linear)):
            module.reset_parameters()  # torch's own: uniform within 1/sqrt(H), 1/sqrt(inputs) for the layers
        elif isinstance(module, BiLSTMForSequenceClassification):
            if module.config.multichannel:
                init.copy_(module.frozen_embeddings, module.embeddings.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Embedding:
        """The trainable channel."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the trainable channel by an `nn.Embedding` of the same shape.

        Raises:
            ValueError: anything else; both channels belong to the vocabulary.
        """
        shape = [self.config.vocab_size, self.config.embedding_size]
        if not isinstance(value, nn.Embedding) or list(value.weight.shape) != shape:
            got = list(value.weight.shape) if isinstance(value, nn.Embedding) else type(value).__name__
            raise ValueError(
                f"set_input_embeddings: value must be an nn.Embedding of shape {shape}, got {got}; "
                "for another vocabulary build a new model and fill it with embeddings_from"
            )
        self.embeddings = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """The trainable channel, which has a row per word and no other size.

        Raises:
            ValueError: another size; both channels belong to the vocabulary.
        """
        if pad_to_multiple_of is not None or new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings: new_num_tokens must be vocab_size={self.config.vocab_size}, got "
                f"{new_num_tokens}; for another vocabulary build a new model and fill it with embeddings_from"
            )
        return self.embeddings

    @torch.no_grad()
    def embeddings_from(self, matrix: Tensor | np.ndarray) -> None:
        """Fill both channels with `matrix` [V, E] (any float dtype); the padding row is set to zero.

        Raises:
            ValueError: a shape other than [vocab_size, embedding_size], or values that are not finite.
        """
        values = torch.as_tensor(matrix)
        if values.shape != self.embeddings.weight.shape:
            raise ValueError(
                f"embeddings_from: matrix must have shape {list(self.embeddings.weight.shape)} "
                f"(vocab_size, embedding_size), got {list(values.shape)}"
            )
        if not values.isfinite().all():
            raise ValueError("embeddings_from: matrix must be finite, got NaN or infinite values")
        self.embeddings.weight.copy_(values)
        self.embeddings.weight[self.config.pad_token_id] = 0
        if self.config.multichannel:
            self.frozen_embeddings.copy_(self.embeddings.weight)

    # The steps depend on the lengths of the batch: under torch.compile each batch would be compiled anew.
    @torch.compiler.disable
    def last_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [B, 2H] of both directions: after the last word, after the first word.

        Padding may stand right, left or in between and hold any id: hidden positions are never read. A row
        without words counts as one padding word (a zero vector).

        Args:
            input_ids: [B, N] int.
            attention_mask: [B, N], zero where padded; left out: zero where input_ids is pad_token_id.

        Raises:
            ValueError: shapes that are not [B, N], or ids outside the vocabulary (on CUDA: its assertion).
        """
        mask = self._mask(input_ids, attention_mask)
        rows, columns = input_ids.shape
        if rows == 0:
            return self.embeddings.weight.new_zeros(0, 2 * self.config.hidden_size)
        if columns == 0:
            input_ids, mask = F.pad(input_ids, (0, 1)), F.pad(mask, (0, 1))
        packed = _pack(input_ids, mask, self.config.pad_token_id)
        return self._recurrence(packed) if packed.words.is_cpu else self._torch_lstm(packed)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, N] bool, True where `input_ids` holds a word."""
        if input_ids.dim() != 2:
            raise ValueError(f"BiLSTM: input_ids must have shape [B, N], got {list(input_ids.shape)}")
        if attention_mask is None:
            return input_ids != self.config.pad_token_id
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                "BiLSTM: attention_mask must match input_ids, "
                f"got {list(attention_mask.shape)} vs {list(input_ids.shape)}"
            )
        return attention_mask != 0

    def _recurrence(self, packed: _Packed) -> Tensor:
        """`last_states` by `_Recurrence`."""
        lowest, highest = packed.words[0].item(), packed.words[-1].item()
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"BiLSTM: input_ids must lie in [0, vocab_size={self.config.vocab_size}), got {lowest} to "
                f"{highest}; was the text encoded by the student's tokenizer?"
            )
        weight_ih, weight_hh, bias_ih, bias_hh = (
            torch.stack(both) for both in zip(*self.lstm.all_weights, strict=True)
        )
        width = self.config.embedding_size
        weight, bias = weight_ih.flatten(0, 1), (bias_ih + bias_hh).flatten()  # [8H, 2E or E], [8H]
        # one product per channel: autograd then forms no gradient for the frozen half
        projected = F.linear(self.embeddings(packed.words), weight[:, -width:], bias)  # [U, 8H]
        if self.config.multichannel:
            frozen = F.embedding(packed.words, self.frozen_embeddings)
            projected = projected + F.linear(frozen, weight[:, :width])
        last = _Recurrence.apply(
            projected.view(len(packed.words), 2, 4 * self.config.hidden_size),
            torch.stack([packed.forward, packed.backward]),
            weight_hh,
            packed.counts,
        )
        return torch.cat([last[0], last[1]], dim=1)[packed.place]

    def _torch_lstm(self, packed: _Packed) -> Tensor:
        """`last_states` by torch.nn.LSTM, whose cuDNN kernels run all steps in a few launches."""
        words = packed.words[packed.forward]
        vectors = self.embeddings(words)
        if self.config.multichannel:
            vectors = torch.cat([F.embedding(words, self.frozen_embeddings), vectors], dim=1)
        sequence = PackedSequence(vectors, torch.tensor(packed.counts), packed.order, packed.place)
        _, (last, _) = self.lstm(sequence)
        return torch.cat([last[0], last[1]], dim=1)

    def _pair_states(
        self, ids: tuple[Tensor, Tensor], masks: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """`last_states` of both sentences [B, 2H] each, in one pass over 2 B rows."""
        shown = [self._mask(row_ids, mask) for row_ids, mask in zip(ids, masks, strict=True)]
        if ids[0].shape[0] != ids[1].shape[0]:
            raise ValueError(
                "BiLSTM: input_ids and pair_input_ids must have as many rows, "
                f"got {ids[0].shape[0]} vs {ids[1].shape[0]}"
            )
        width = max(row_ids.shape[1] for row_ids in ids)
        both, mask = (torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]) for parts in (ids, shown))
        first, second = self.last_states(both, mask).chunk(2)
        return first, second

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits, and a loss when labels are given.

        Args:
            input_ids, attention_mask: [B, N] words of the (first) sentence; see `last_states`.
            pair_input_ids, pair_attention_mask: [B, M] words of the second sentence, when config.pair.
            labels: [B] class ids (cross-entropy), or values when num_labels is 1 (mean squared error).

        Raises:
            ValueError: a second sentence missing or too much, and what `last_states` raises.
        """
        if self.config.pair != (pair_input_ids is not None):
            raise ValueError(
                f"BiLSTM: pair_input_ids must be given exactly when config.pair is set, got config.pair = "
                f"{self.config.pair} and {'no ' if pair_input_ids is None else ''}pair_input_ids"
            )
        if pair_input_ids is None:
            features = self.last_states(input_ids, attention_mask)
        else:
            first, second = self._pair_states((input_ids, pair_input_ids), (attention_mask, pair_attention_mask))
            features = torch.cat([first, second, first * second, (first - second).abs()], dim=1)
        logits = self.classifier(self.dropout(torch.relu(self.hidden(features))))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig)
AutoModel.register(BiLSTMConfig, BiLSTMForSequenceClassification)
AutoModelForSequenceClassification.register(BiLSTMConfig, BiLSTMForSequenceClassification)
