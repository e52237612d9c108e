# SPDX-License-Identifier: Apache-2.0
"""DistillationTrainer: ``transformers.Trainer``, plus what distillation needs and nothing more."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import find_batch_size, slice_tensors
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import has_length
from transformers.utils import logging

from pydistill.capture import ATTENTION_KINDS, LOGITS
from pydistill.config import UserError
from pydistill.distiller import Distiller
from pydistill.teachers import RECORDED_LOGITS, TEACHER_PREFIX, with_signals

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

OBJECTIVE_WEIGHTS = "objective.safetensors"
TRAINING_ARGUMENTS = "training_args.bin"
TRAINER_STATE = "trainer_state.json"
STUDENT_PREFIX = "student."
# A training batch with this key holds rows that another batch of its step has: it takes part and counts nothing.
REPEATED = "repeated"


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, where ``TrainingArguments.optim`` does not offer it or its arguments.

    Args:
        name: ``"adadelta"`` (Zeiler 2012, arXiv 1212.5701; Tang et al. 2019 train with it) or ``"adamw"``.
        learning_rate: None is 1.0 for adadelta, and ``TrainingArguments.learning_rate`` for adamw.
        rho: decay of adadelta's running averages.
        eps: None is the optimizer's own default (adadelta) or ``TrainingArguments.adam_epsilon`` (adamw).

    Weight decay, betas and the schedule come from the ``TrainingArguments``. Mind that their default schedule
    falls linearly to 0; for the paper's adadelta pass ``lr_scheduler_type="constant"``.
    """

    name: Literal["adadelta", "adamw"] = "adamw"
    learning_rate: float | None = None
    rho: float = 0.95
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("adadelta", "adamw"):
            _fail("OptimizerConfig", f"name must be 'adadelta' or 'adamw', got {self.name!r}")

    def resolve(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The optimizer's class and its arguments."""
        if self.name == "adadelta":
            options: dict[str, Any] = {
                "lr": 1.0 if self.learning_rate is None else self.learning_rate,
                "rho": self.rho,
            }
            return torch.optim.Adadelta, options | ({} if self.eps is None else {"eps": self.eps})
        return torch.optim.AdamW, {
            "lr": args.learning_rate if self.learning_rate is None else self.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon if self.eps is None else self.eps,
            "fused": True,  # several times faster on tables of word vectors
        }


class DistillationTrainer(Trainer):
    """``transformers.Trainer`` for a `Distiller`.

    What it adds:

    - the value of each term of the objective in the logs, as ``loss_<name>``, averaged over the steps of the logging
      window that have it;
    - checkpoints that are the student alone, in hub format: ``AutoModel*.from_pretrained(checkpoint)`` works.
      Parameters of the objective, where it has any, lie beside it in ``objective.safetensors``;
    - exact resume: training that was stopped at a checkpoint and continued ends with the same bits as
      training in one go. ``train(resume_from_checkpoint=True)`` takes the last checkpoint that was completely
      written;
    - evaluation and prediction run the student alone; ``eval_loss`` is the student's own loss on the labels.
      Where no term reads the student's logits, there may be no head, or one that nothing trains: ``eval_loss`` is
      then the objective's, teacher included, and there are no predictions. Neither advances the random stream of
      training;
    - student parameters that the objective cannot reach are frozen while it trains, and listed in the log: the
      layers above the last one that is read, for instance. Data parallelism would wait for their gradients;
    - the denominators of all terms are counted over the whole accumulated batch of all processes, so ``1 x 32``
      equals ``4 x 8``, in one process or in four. The rows that accelerate repeats, where the last batch of an epoch
      does not divide by the processes, count nothing;
    - a checkpoint of another number of processes is continued where a step still has as many rows, and refused where
      it has not;
    - ``train_sampling_strategy="group_by_length"`` that is exactly resumable and finds lengths without
      reading the rows one by one; evaluation keeps the order of the rows;
    - batches of a `pydistill.multitask.TaskMixture`, each of one task, and the same one in every process;
    - `optimizer` by name.

    Args:
        distiller: the student, its teacher and the objective.
        args: see ``transformers.TrainingArguments``.
        train_dataset, eval_dataset: rows of token ids, see `DistillationCollator`.
        processing_class: the student's tokenizer; saved with every checkpoint.
        data_collator: None is a `DistillationCollator` of `processing_class`.
        optimizer: None is what `args` says.
        **options: further arguments of ``transformers.Trainer`` (``compute_metrics``, ``callbacks``, ...).

    Raises:
        ValueError: label smoothing (the objective decides about the loss), several GPUs in one process
            (``torch.nn.DataParallel``, which knows nothing of the teacher), processes whose epochs end at different
            steps, or FSDP where it shards nothing or what the objective reads.
    """

    model: Distiller

    def __init__(
        self,
        distiller: Distiller,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        optimizer: OptimizerConfig | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(distiller, Distiller):
            _fail(
                "DistillationTrainer",
                f"distiller must be a Distiller, got {type(distiller).__name__}",
                TypeError,
            )
        if args is None:
            args = TrainingArguments(output_dir="trainer_output")
        if args.label_smoothing_factor:
            _fail(
                "DistillationTrainer",
                "label_smoothing_factor must be 0, the objective decides about the loss; got "
                f"{args.label_smoothing_factor}",
            )
        if args.n_gpu > 1:
            _fail(
                "DistillationTrainer",
                f"one process must use one GPU, got {args.n_gpu}; start with "
                f"torchrun --nproc-per-node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0",
            )
        if data_collator is None:
            if processing_class is None:
                _fail(
                    "DistillationTrainer",
                    "needs processing_class (the student's tokenizer) or data_collator, got neither",
                )
            data_collator = DistillationCollator(processing_class)
        # What the student alone is evaluated on need not be in a teacher's cache.
        self._student_collator = data_collator
        data_collator = with_signals(distiller.teacher, data_collator)
        self.distiller = distiller
        self._part_sums: dict[str, Tensor] = {}
        self._part_steps: dict[str, set[int]] = {}
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            optimizer_cls_and_kwargs=None if optimizer is None else optimizer.resolve(args),
            **options,
        )
        self._check_processes()
        self.add_callback(StepSize(rows_per_step(self.args)))

    def _check_processes(self) -> None:
        """Refuse ways of being several processes that would hang, change the loss or silently be another way."""
        if self.args.world_size > 1 and not cast(Any, self.args.accelerator_config).even_batches:
            _fail(
                "DistillationTrainer",
                "accelerator_config: even_batches must be true, got false: processes without a last batch would be "
                "waited for. Leave it out: the rows that it repeats count nothing",
            )
        if self.args.fsdp and not (self.is_fsdp_enabled or self.is_fsdp_xla_enabled):
            _fail(
                "DistillationTrainer",
                f"fsdp: accelerate shards on GPUs and other accelerators alone, and this process uses "
                f"{self.args.device}; leave fsdp out",
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        inside = {signal for signal in self.distiller.objective.student_signals if signal.startswith(ATTENTION_KINDS)}
        by_layer = plugin.transformer_cls_names_to_wrap or plugin.min_num_params
        if inside and by_layer and plugin.reshard_after_forward:
            _fail(
                "DistillationTrainer",
                f"fsdp_config: reshard_after_forward must be false where layers are sharded one by one and the "
                f"objective reads what is inside of one ({', '.join(sorted(inside))}), got true",
            )

    # ---- training step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Collect the micro-batches of one step, and count what the K terms' means run over in all of them."""
        batches = [self._without_repeats(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        if not batches:
            return batches, None
        counts = [self.distiller.objective.count_items(batch) for batch in batches if not isinstance(batch, _Repeated)]
        # Nothing of its own: the others' counts are added below.
        counts = counts or [0 * self.distiller.objective.count_items(batches[0])]
        items = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            items = self.accelerator.reduce(items, reduction="sum")
        # A step without any valid item has loss 0, not 0 / 0.
        return batches, items.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch; its parts are added up for the logs, on the device."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        parts = outputs.get("parts")
        if isinstance(inputs, _Repeated):
            loss, parts = 0 * loss, {name: 0 * value for name, value in parts.items()}
        if parts is not None:
            self._add_parts(parts)
        return (loss, outputs) if return_outputs else loss

    def _without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Leave out of a pass's last batch the rows that accelerate repeats so that all processes have as many."""
        if batch.pop(REPEATED, False):
            return _Repeated(batch)
        state = self.accelerator.gradient_state
        if self.args.world_size <= 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return batch
        rows = find_batch_size(batch)
        distinct = _rows_of_last_batch(state.active_dataloader, rows * self.args.world_size)
        if distinct == 0:
            return batch
        own = distinct - rows * self.args.process_index
        cut = slice_tensors(batch, slice(0, max(1, own)))
        return cut if own > 0 else _Repeated(cut)

    def _add_parts(self, parts: Mapping[str, Tensor]) -> None:
        step = self.state.global_step
        for name, value in parts.items():
            if name in self._part_sums:
                self._part_sums[name] += value
            else:
                self._part_sums[name] = value.clone()
                self._part_steps[name] = set()
            self._part_steps[name].add(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to the training logs: means over the steps since the last time."""
        if "loss" in logs and self._part_sums:
            # The only transfer to the host in a logging window.
            sums = torch.stack([value.float() for value in self._part_sums.values()])
            if self.args.world_size > 1:
                # With common denominators the parts of the processes add up, without they are means.
                common = self.args.average_tokens_across_devices
                sums = self.accelerator.reduce(sums, reduction="sum" if common else "mean")
            # A part need not be there in every step: batches of several tasks have their own.
            means = [
                value / len(self._part_steps[name]) for name, value in zip(self._part_sums, sums.tolist(), strict=True)
            ]
            logs.update({f"loss_{name}": value for name, value in zip(self._part_sums, means, strict=True)})
            self._part_sums = {}
        super().log(logs, start_time)

    # ---- evaluation: the student alone

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """One evaluation step: of the student alone, or of the whole objective where it reads no logits."""
        distinct = self._without_repeats(inputs)
        if not self.distiller.reads_logits:
            with torch.no_grad(), self.compute_loss_context_manager():
                return model(**self._prepare_inputs(distinct)).loss.detach().mean(), None, None

        def step(batch: Mapping[str, Any], loss_only: bool) -> Any:
            student = {name: value for name, value in batch.items() if not name.startswith(TEACHER_PREFIX)}
            return super(DistillationTrainer, self).prediction_step(
                model, student | {"student_only": True}, loss_only, ignore_keys=ignore_keys
            )

        loss, logits, labels = step(inputs, prediction_loss_only)
        if distinct is not inputs and loss is not None:
            # Repeated predictions are left out of what is gathered; their part of a mean cannot be.
            loss, _, _ = step(distinct, True)
        return loss, logits, labels

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
        """An evaluated loss is the mean of a batch; with a number the base class takes it for the part of a sum."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without advancing the random stream: how often one looks does not change the training."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters with weight decay: without those of modules that say ``no_weight_decay = True``."""
        exempt = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if getattr(module, "no_weight_decay", False)
            for name, _ in module.named_parameters()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with groups of their own for modules that say ``learning_rate_scale = x``."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given:
            _scale_learning_rates(optimizer, self.distiller)
        return optimizer

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        # The base class reads them off the signature of `forward`, which takes any key.
        self._signature_columns = cast(Any, sorted(self.distiller.batch_keys))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _EpochLengthSampler(size, self._lengths(dataset), seed)

    def get_train_dataloader(self) -> Any:
        """The batches of training: those of the data set, where it says what its batches are."""
        batches = getattr(self.train_dataset, "batches", None)
        if batches is None:
            return super().get_train_dataloader()
        args = self.args
        sampler = batches(
            args.train_batch_size,
            args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            by_length=args.train_sampling_strategy == "group_by_length",
        )
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=sampler,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The rows that are evaluated; without a teacher's signals where the student is evaluated alone."""
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The same of rows that are predicted."""
        with self._collating_for_evaluation():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collating_for_evaluation(self) -> Iterator[None]:
        collator = self.data_collator
        if self.distiller.reads_logits:
            self.data_collator = self._student_collator
        try:
            yield
        finally:
            self.data_collator = collator

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # With group_by_length the base class shuffles here too, and predictions no longer follow the rows.
        if self.args.world_size <= 1 and hasattr(eval_dataset, "__len__"):
            return SequentialSampler(eval_dataset)
        return None

    def _lengths(self, dataset: Any) -> list[int]:
        """Tokens of each row: the column ``args.length_column_name`` if there is one, otherwise counted."""
        column = self.args.length_column_name
        # The base class has removed the column from `dataset`, which no model reads.
        sources: tuple[Any, ...] = (dataset, self.train_dataset)
        for source in sources:
            if column in getattr(source, "column_names", ()) and len(source) == len(dataset):
                return [int(length) for length in source[column]]
        return row_lengths(dataset)

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; True resumes from the last completely written checkpoint."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(str(self.args.output_dir))
            if found is None:
                _fail(
                    "DistillationTrainer",
                    f"resume_from_checkpoint: {self.args.output_dir} holds no complete checkpoint",
                )
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint and not self.args.ignore_data_skip:
            self._check_rows_per_step(Path(resume_from_checkpoint))
        self._part_sums = {}
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            # An evaluation before marks the model as prepared, and accelerate would not wrap it any more: every process
            # would train on its own.
            vars(self.distiller).pop("_is_accelerate_prepared", None)
        frozen = self._freeze_unreachable()
        # The base class seeds when it is made; whatever drew random numbers since then must not decide the
        # run.
        set_seed(self.args.seed)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for name in frozen:  # by name: sharding replaces parameters
                self.distiller.student.get_parameter(name).requires_grad_(True)

    def _check_rows_per_step(self, checkpoint: Path) -> None:
        """Refuse to skip other rows than were trained on, and to go on with another schedule."""
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        before = state.get("stateful_callbacks", {}).get(StepSize.__name__, {}).get("args", {}).get("rows")
        now = rows_per_step(self.args)
        if before not in (None, now):
            _fail(
                "DistillationTrainer",
                f"resume_from_checkpoint: a step of {checkpoint} had {before} rows, and has {now} now, "
                f"{self.args.world_size} (processes) x {self.args.per_device_train_batch_size} "
                f"(per_device_train_batch_size) x {self.args.gradient_accumulation_steps} "
                f"(gradient_accumulation_steps): make them {before}. Or set ignore_data_skip=True, which begins a new "
                "pass over the rows",
                UserError,
            )

    def _freeze_unreachable(self) -> list[str]:
        """Freeze before optimizer and data parallelism ask which parameters train, and before the run is seeded."""
        student = self.distiller.student
        if self.distiller.objective.student_signals <= {LOGITS} or self.train_dataset is None:
            return []
        # Not from the data loader: accelerate keeps track of every one that it has seen begin.
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        batch = collate([next(iter(self.train_dataset))])
        device = next(student.parameters()).device
        names = self.distiller.freeze_unreachable(
            {name: value.to(device) for name, value in batch.items() if name != "labels"}
        )
        if names:
            logger.warning(
                f"The objective cannot reach {len(names)} of the student's parameters, which are frozen while it "
                f"trains: {', '.join(names)}."
            )
        return names

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        student_state = None
        objective_state = self.distiller.objective.state_dict()
        if state_dict is not None:
            # Collected from a sharded model: the state of the whole distiller.
            student_state = _under(state_dict, STUDENT_PREFIX)
            objective_state = _under(state_dict, "objective.")
        self.distiller.student.save_pretrained(folder, state_dict=student_state)
        if objective_state:
            _save_tensors(objective_state, folder / OBJECTIVE_WEIGHTS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGUMENTS)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process writes its own, before the first one writes the file that makes a checkpoint complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_student(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        logger.info(f"Loading the best student from {best} (score: {self.state.best_metric}).")
        self._load_student(Path(str(best)))

    def _load_student(self, folder: Path) -> None:
        # Read as a user would read it, which undoes whatever renaming, sharding or tying save_pretrained
        # applied; the base class matches names loosely and would leave the student untouched without a word.
        student = self.distiller.student
        with torch.random.fork_rng(devices=[]):
            loaded = type(student).from_pretrained(folder, config=student.config, dtype=student.dtype)
        student.load_state_dict(loaded.state_dict())
        if self.distiller.objective.state_dict():
            from safetensors.torch import load_file

            self.distiller.objective.load_state_dict(load_file(folder / OBJECTIVE_WEIGHTS))


class StepSize(TrainerCallback, ExportableState):
    """Has a checkpoint say how many rows a step had, in all processes."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def state(self) -> dict[str, Any]:
        """What the trainer's state holds of it."""
        return {"args": {"rows": self.rows}, "attributes": {}}


def rows_per_step(arguments: TrainingArguments) -> int:
    """How many rows all processes read for one step."""
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_process * arguments.world_size


class _Repeated(dict[str, Any]):
    """A batch of rows that other batches of its step have: it takes part, as all must, and counts nothing."""


def _rows_of_last_batch(loader: Any, size: int) -> int:
    """How many rows the last batch of that size has, of all processes, without repeated ones; 0: it is full."""
    if isinstance(loader, DataLoaderDispatcher):
        return loader.remainder % size
    # accelerate wraps torch's sampler to share batches out and to skip them. Of other samplers, and of a stream, it
    # cannot be told.
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return len(sampler.sampler) % size if type(sampler) is BatchSampler and has_length(sampler.sampler) else 0


def _scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    scales: dict[int, float] = {}
    for module in model.modules():
        scale = getattr(module, "learning_rate_scale", 1.0)
        if scale != 1.0:
            scales |= {id(parameter): scale for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        for scale in sorted(set(scales.values())):
            scaled = [parameter for parameter in group["params"] if scales.get(id(parameter)) == scale]
            if scaled:
                group["params"] = [parameter for parameter in group["params"] if scales.get(id(parameter)) != scale]
                optimizer.add_param_group(group | {"params": scaled, "lr": group["lr"] * scale})


class _EpochLengthSampler(LengthGroupedSampler):
    """Length grouping whose order depends on seed and epoch alone, so that a resumed epoch is the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def row_lengths(dataset: Any) -> list[int]:
    """Tokens of each row: the sum over its ``input_ids`` and ``<prefix>_input_ids``, the teacher's excepted.

    Raises:
        ValueError: the rows have no token ids.
    """
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    columns = [name for name in columns if name.endswith("input_ids") and not name.startswith(TEACHER_PREFIX)]
    if not columns:
        _fail("DistillationTrainer", "grouping by length needs rows with input_ids; tokenize the data first")
    if hasattr(dataset, "with_format"):
        import pyarrow.compute as pc

        table = dataset.select_columns(columns).with_format("arrow")[:]
        counts = [pc.list_value_length(table.column(name)).to_numpy() for name in columns]
        return np.sum(counts, axis=0).tolist()
    return [sum(len(row[name]) for name in columns) for row in dataset]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last checkpoint under `folder` that was completely written, None if there is none.

    The trainer's state is the last file of a checkpoint, so a process that was killed while writing one
    leaves it missing or cut off.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and path.is_dir():
            found[int(step.group(1))] = path
    for _, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{path} was not completely written and is passed over.")
            continue
        return path
    return None


class DistillationCollator:
    """Rows of token ids -> padded tensors.

    Sequences come in groups of one length: ``input_ids`` with ``attention_mask`` and ``token_type_ids``, the
        same with the prefix ``pair_`` (the second sentence of a siamese student) and with ``teacher_`` (a
        teacher that has its own tokenizer). A missing attention mask is made. ``labels`` and ``teacher_logits
        [C]`` are stacked; every other column is left out.

    Args:
        tokenizer: the student's; gives padding value and side.
        teacher_tokenizer: None where no ``teacher_input_ids`` occur.
        pad_to_multiple_of: round the padded length up, for GPUs that like it.

    Raises:
        ValueError: rows that do not have the same columns, or a tokenizer without a padding token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for prefix in ("", "pair_", TEACHER_PREFIX):
            if f"{prefix}input_ids" in rows[0]:
                tokenizer = self.teacher_tokenizer if prefix == TEACHER_PREFIX else self.tokenizer
                if tokenizer is None:
                    _fail(
                        "DistillationCollator",
                        "the rows have teacher_input_ids; pass teacher_tokenizer to pad them",
                    )
                self._pad(rows, prefix, tokenizer, batch)
        if RECORDED_LOGITS in rows[0]:
            logits = np.stack(_column(rows, RECORDED_LOGITS))
            batch[RECORDED_LOGITS] = torch.from_numpy(logits.astype(np.float32))
        if "labels" in rows[0]:
            batch["labels"] = torch.from_numpy(np.stack(_column(rows, "labels")))
            if batch["labels"].is_floating_point():
                batch["labels"] = batch["labels"].float()
        return batch

    def _pad(
        self,
        rows: Sequence[Mapping[str, Any]],
        prefix: str,
        tokenizer: PreTrainedTokenizerBase,
        batch: dict[str, Tensor],
    ) -> None:
        if tokenizer.pad_token_id is None:
            _fail("DistillationCollator", "the tokenizer has no padding token; set tokenizer.pad_token first")
        sequences = _column(rows, f"{prefix}input_ids")
        lengths = [len(sequence) for sequence in sequences]
        multiple = self.pad_to_multiple_of
        width = -(-max(1, *lengths) // multiple) * multiple
        left = tokenizer.padding_side == "left"
        spans = [slice(width - n, width) if left else slice(0, n) for n in lengths]

        def padded(values: Sequence[Any], fill: int) -> Tensor:
            out = np.full((len(rows), width), fill, dtype=np.int64)
            for row, (span, value) in enumerate(zip(spans, values, strict=True)):
                out[row, span] = value
            return torch.from_numpy(out)

        batch[f"{prefix}input_ids"] = padded(sequences, int(tokenizer.pad_token_id))
        mask = f"{prefix}attention_mask"
        batch[mask] = padded(_column(rows, mask) if mask in rows[0] else [1] * len(rows), 0)
        types = f"{prefix}token_type_ids"
        if types in rows[0]:
            batch[types] = padded(_column(rows, types), int(getattr(tokenizer, "pad_token_type_id", 0)))


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[np.ndarray]:
    try:
        return [np.asarray(row[name]) for row in rows]
    except KeyError:
        _fail("DistillationCollator", f"some rows of the batch have {name!r} and others have not")


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    os.replace(temporary, path)


def _fail(where: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{where}: {message}")
