"""The trainer of Barlow Twins: it makes the two views, and evaluates features by their nearest neighbors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from ..analysis.features import knn_predictions
from ..data.augmentation import Augmentation
from ..errors import extra
from ..models.barlow_twins import cross_correlation
from ..reporting.self_supervision import CORRELATION, VIEWS, plot_cross_correlation, plot_views
from .trainers import FullEvaluation

with extra("scripts"):
    from datasets import Dataset

#: Images in the picture of views.
SHOWN_IMAGES = 10


class Views(NamedTuple):
    """The two augmentations of Barlow Twins."""

    first: Augmentation
    second: Augmentation

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(images), self.second(images)


class BarlowTwinsTrainer(FullEvaluation):
    """`GRTrainer` for a `BarlowTwinsForPretraining`: a batch of images becomes two batches of views in `compute_loss`,
    so both passes of GR see the same views, and a resumed run those that it would have seen.

    Evaluation classifies the images by their nearest neighbors in `memory`, in evaluation mode and without
    augmentation, and logs `eval_knn_accuracy` and `eval_knn_error`. Only there are labels used.

    Args:
        views: make the two views.
        memory: examples with `pixel_values` and `labels`, usually the training data.
        classes: their number.
        k: neighbors; at most as many as `memory` has.
        temperature: of the neighbors' votes; see `knn_predictions`.

    Raises:
        ValueError: `gr_scope` divides the batch among processes, but the loss is one of the whole batch; or
            `label_smoothing_factor` is set, but the loss reads no labels.
    """

    def __init__(
        self, *args, views: Views, memory: Dataset, classes: int, k: int = 200, temperature: float = 0.1, **kwargs
    ):
        self.views, self.memory, self.classes = views, memory, classes
        self.k, self.temperature = min(k, len(memory)), temperature
        self._pictures: dict[str, str] = {}
        self._remembered: tuple[Tensor, Tensor] | None = None
        super().__init__(*args, compute_metrics=self._knn_metrics, **kwargs)
        if smoothing := self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={smoothing} has no effect: Barlow Twins reads no labels. Set it to 0."
            )
        flags = self.gr_args
        if flags.is_active and flags.gr_scope == "local" and self.args.world_size > 1:
            raise ValueError(
                f"gr_scope={flags.gr_scope!r}: the loss of Barlow Twins is one of the batch of all processes, which "
                "have none of their own. Set gr_scope=global."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of two views. Outside of training they are the same at each call: a measurement of sharpness
        compares losses."""
        if model.training:
            outputs = self._of_views(model, inputs)
        else:
            with self.same_draws():
                outputs = self._of_views(model, inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _of_views(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        first, second = self.views(inputs["pixel_values"])
        return model(pixel_values=first, second_pixel_values=second)

    def ire_sampled_losses(self, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The loss itself, once per image. It is no likelihood: there is no distribution to draw labels from, so the
        curvature is estimated by the squared gradient of the loss (an empirical Fisher), with the views that the step
        is about to see."""
        return self._of_views(model, inputs)["loss"].expand(len(inputs["pixel_values"]))

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Inside this context the views are drawn from the seed of the run, and the run's own draws wait."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            yield

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`, after the features of `memory` are computed."""
        with self.recorder.clock_stopped():
            self._remembered = self._features_of(self.memory)
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def _features_of(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Features and labels of all examples, on every process."""
        was_training, parts = self.model.training, []
        self.model.eval()
        for batch in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                features = self.model(pixel_values=inputs["pixel_values"]).features
            parts.append(self.accelerator.gather_for_metrics((features.float(), inputs["labels"])))
        self.model.train(was_training)
        features, labels = map(torch.cat, zip(*parts, strict=True))
        return features, labels

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        """The features of images, and their labels; no loss."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        loss, features, _ = super().prediction_step(model, inputs, *args, **kwargs)
        return loss, features, labels.to(self.args.device)

    def _knn_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self._remembered is not None
        features, labels = (torch.as_tensor(part) for part in (prediction.predictions, prediction.label_ids))
        bank, bank_labels = self._remembered
        predicted = knn_predictions(bank, bank_labels, features.to(bank.device), self.classes, self.k, self.temperature)
        accuracy = (predicted.cpu() == labels).double().mean().item()
        return {"knn_accuracy": accuracy, "knn_error": 1 - accuracy}

    # ---- The record ----

    @property
    def further_facts(self) -> dict[str, Any]:  # type: ignore[override]  # a mapping there
        """For the card."""
        weight = self.model.config.off_diagonal_weight
        how = {"off_diagonal_weight": weight, "k": self.k, "temperature": self.temperature}
        return {"barlow_twins": how, "pictures": self._pictures}

    @torch.no_grad()
    def draw(self, folder: Path) -> dict[str, float]:
        """Draw the first training images with their views, and the cross-correlation of a batch of them, in evaluation
        mode. Returns the mean of its diagonal, and the root mean square beside it."""
        count = min(len(self.memory), self.args.train_batch_size)
        images = torch.stack([torch.as_tensor(row["pixel_values"]) for row in self.memory.select(range(count))])
        images = images.to(self.args.device)
        self.model.eval()
        with self.same_draws():
            views = self.views(images)
        z1, z2 = (self.model.projector(self.model.backbone(view).logits) for view in views)
        c = cross_correlation(z1, z2)
        if self.is_world_process_zero():
            shown, first, second = (self._pixels(part[:SHOWN_IMAGES]) for part in (images, *views))
            plot_views(shown, first, second, folder / VIEWS)
            plot_cross_correlation(c.cpu().numpy(), folder / CORRELATION)
        diagonal = c.diagonal().mean().item()
        rest = c[~torch.eye(len(c), dtype=torch.bool, device=c.device)].square().mean().sqrt().item()
        self._pictures = {
            VIEWS: "Training images, and the two views of each",
            CORRELATION: f"Cross-correlation of the projector's outputs for two views of {count} training images, "
            f"after training and in evaluation mode: {diagonal:.3f} on the diagonal, {rest:.3f} beside it (root mean "
            "square)",
        }
        return {"correlation_diagonal": diagonal, "correlation_off_diagonal": rest}

    def _pixels(self, images: Tensor) -> np.ndarray:
        """Normalized images of (n, c, h, w) as (n, h, w, c), with values from 0 to 1."""
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.views.first.mean, self.views.first.std)
        )
        return (images * std + mean).permute(0, 2, 3, 1).cpu().numpy()
