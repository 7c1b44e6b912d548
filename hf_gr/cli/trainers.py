"""The scripts' trainers, which evaluate on every example, augment images, and log perplexity or memorization; token
budgets; BatchNorm statistics."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from ..data.augmentation import Augmentation, Mixing
from ..data.images import IS_WRONG
from ..data.streams import PackedStream
from ..errors import extra
from ..trainer import GRTrainer
from .streaming import StreamPosition

with extra("scripts"):
    from datasets import Dataset


class FullEvaluation(GRTrainer):
    """`GRTrainer` whose `dataloader_drop_last` drops training examples only, and never all of them. Trainer applies it
    to evaluation, too."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in `Trainer`, which with persistent workers would answer for any dataset with the first one's."""
        is_other = eval_dataset is not None and not isinstance(eval_dataset, str)
        cached = vars(self).pop("_eval_dataloaders", None) if is_other else None
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last
            if cached is not None:
                self._eval_dataloaders = cached

    def get_train_dataloader(self) -> DataLoader:
        if has_length(self.train_dataset):
            self._require_full_batch(len(self.train_dataset))
        return super().get_train_dataloader()

    def _require_full_batch(self, examples: int) -> None:
        size, processes = self.args.train_batch_size, self.args.world_size
        if examples == 0:
            raise ValueError("There are no training examples. Check the dataset and the flags that select from it.")
        if self.args.dataloader_drop_last and examples < size * processes:
            raise ValueError(
                f"dataloader_drop_last=True: the {examples} training examples do not fill one batch of "
                f"{size * processes} ({size} on each of {processes} processes) and would all be dropped. Lower "
                "per_device_train_batch_size, or set dataloader_drop_last=False."
            )


class ImageTrainer(FullEvaluation):
    """`GRTrainer` that augments the images it trains on and shows memorization.

    Augmentation and mixing are part of `compute_loss`, in training mode: both passes of GR see the same images, and a
    resumed run those that it would have seen. In the data loader neither would hold. Elsewhere, as in IRE's estimate
    and in `sharpness`, the images are only resized to the size of the crops.

    Memorization is shown if the training data has the column `IS_WRONG` of `add_label_noise` and
    `remove_unused_columns=False` keeps it: `train_accuracy_wrong_labels` and `train_accuracy_right_labels` are the
    shares of the two parts for which the model predicts the label it is given: since the last log, in training mode, in
    the first pass of each step. Not with `mixing`, as a mixed image has no single label.

    Args:
        augmentation: of `pixel_values`.
        mixing: of the augmented images and their labels. The loss is then the cross-entropy with the mixed labels,
            which `label_smoothing_factor` smooths like others.
    """

    def __init__(self, *args, augmentation: Augmentation | None = None, mixing: Mixing | None = None, **kwargs):
        self._augmentation, self._mixing = augmentation, mixing
        self._is_wrong: Tensor | None = None
        # Rows: right labels, wrong labels. Columns: predicted as labeled, all.
        self._counts: Tensor | None = None
        super().__init__(*args, **kwargs)
        if mixing is not None:
            if self.compute_loss_func is not None:
                raise ValueError(f"mixing={mixing} has a loss of its own. Leave mixing or compute_loss_func out.")
            if self.args.train_batch_size == 1:
                raise ValueError(
                    f"mixup={mixing.mixup}, cutmix={mixing.cutmix}: no effect with per_device_train_batch_size=1. "
                    "Raise it, or leave them out."
                )
            self.compute_loss_func = self._cross_entropy

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        self._is_wrong = inputs.pop(IS_WRONG, None)  # no input of a model
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`, of the augmented images; counts what was predicted as labeled."""
        labels = inputs.get("labels")  # label smoothing takes them out
        loss, outputs = super().compute_loss(model, self._seen(model, inputs), True, num_items_in_batch)
        if self._is_wrong is not None and self._mixing is None and not self.gr_second_pass:
            self._count(outputs["logits"].detach(), labels, self._is_wrong)
        return (loss, outputs) if return_outputs else loss

    def ire_sampled_losses(self, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator) -> Tensor:
        return super().ire_sampled_losses(model, self._seen(model, inputs), generator)

    def _seen(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `model` sees of `inputs` in its mode, training or evaluation."""
        seen = dict(inputs)
        if self._augmentation is not None:
            augment = self._augmentation if model.training else self._augmentation.resized
            seen["pixel_values"] = augment(inputs["pixel_values"])
        if self._mixing is not None and model.training:
            targets = F.one_hot(inputs["labels"], self.model.config.num_labels).float()
            seen["pixel_values"], seen["labels"] = self._mixing(seen["pixel_values"], targets)
        return seen

    def _cross_entropy(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For mixed labels and, in evaluation, classes."""
        smoothing, count = self.args.label_smoothing_factor, num_items_in_batch
        total = F.cross_entropy(outputs["logits"], labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if count is None else count)

    def _count(self, logits: Tensor, labels: Any, is_wrong: Tensor) -> None:
        agrees = logits.argmax(-1) == labels
        parts = (~is_wrong, is_wrong)
        counts = torch.stack([torch.stack([(agrees & part).sum(), part.sum()]) for part in parts])
        self._counts = counts if self._counts is None else self._counts + counts

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the two shares beside the training loss."""
        if "loss" in logs and self._counts is not None:
            counts = self.accelerator.reduce(self._counts, "sum")
            self._counts = None
            for name, (agreeing, total) in zip(("right", "wrong"), counts.tolist(), strict=True):
                if total:
                    logs[f"train_accuracy_{name}_labels"] = agreeing / total
        super().log(logs, *args, **kwargs)


class CausalLMTrainer(FullEvaluation):
    """`GRTrainer` that logs `eval_perplexity` with `eval_loss`, over every evaluation example.

    It also trains on a `PackedStream`. Each process then reads its own share of it, and a resumed run continues with
    the next token without reading the documents before.
    """

    processing_class: PreTrainedTokenizerBase

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stream = StreamPosition(self)
        self.parts = (*self.parts, self._stream)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, PackedStream):
            return self._stream.loader(self.train_dataset)
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], *args, **kwargs) -> tuple:
        return super().get_batch_samples(map(self._stream.see, epoch_iterator), *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)

    def add_to_last_evaluation(self, metrics: dict[str, float]) -> None:
        """Add `metrics` to the last evaluation in the log, where the model card finds them."""
        index = max(i for i, entry in enumerate(self.state.log_history) if "eval_loss" in entry)
        self.state.log_history[index].update(metrics)


class BatchNormReestimation(TrainerCallback):
    """Recomputes BatchNorm's running statistics at the end of training, as means over batches of `images`.

    After few steps they still reflect earlier weights, and so does an accuracy measured with them.

    Args:
        images: rows with `pixel_values`, which are not augmented.
        batch_size: images per batch.
    """

    def __init__(self, images: Dataset, batch_size: int = 512):
        self.images, self.batch_size = images, batch_size

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, _BatchNorm) for module in kwargs["model"].modules()):
            raise ValueError(f"reestimate_batch_norm={len(self.images)}: the model has no BatchNorm. Leave it out.")

    def on_train_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        batches = (batch["pixel_values"] for batch in self.images.iter(self.batch_size))
        update_bn(batches, kwargs["model"].base_model, args.device)


def perplexity(loss: float) -> float:
    """exp(loss), or infinity on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def steps_for_tokens(max_train_tokens: int, args: TrainingArguments, block_size: int) -> int:
    """The number of optimizer steps that train on at least `max_train_tokens` tokens."""
    if max_train_tokens < 1:
        raise ValueError(f"max_train_tokens={max_train_tokens}: give at least 1, or leave it out.")
    if args.max_steps > 0:
        raise ValueError(
            f"max_train_tokens={max_train_tokens} and max_steps={args.max_steps} both set the length of training. "
            "Leave one of them out."
        )
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    return math.ceil(max_train_tokens / per_step)
