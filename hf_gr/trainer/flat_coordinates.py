"""IRE inside `Trainer`: the optimizer is wrapped as it is made, and the flat coordinates are chosen before a step.

The estimate runs as soon as the micro-batches of a step are there, before the first of them is trained on: the weights
are not perturbed then, there are no gradients yet, and the loop has not yet suspended the synchronization of the
processes, without which each would choose coordinates of its own.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import find_batch_size
from torch import Tensor, nn

from ..config import GRArguments
from ..optim.fisher import (
    IGNORED,
    causal_lm_losses,
    classification_losses,
    distribution_of,
    first_rows,
    layer_kinds,
    without_randomness,
)
from ..optim.gradient_regularization import gradients_set_aside, scale_gradients_
from ..optim.ire import ESTIMATED_MASKS, IRE
from .compatibility import PREFERENCE_TRAINERS, class_among, refuse_unsupported
from .divergence import DivergenceGuard
from .layerwise import trainable_parameters
from .replay import RNGState

logger = get_logger(__name__)

LOSSES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "classification": classification_losses,
    "causal_lm": causal_lm_losses,
}


class IREMixin:
    """IRE for any `Trainer`, around whatever optimizer it makes or is given. Part of `GRMixin`.

    Logged with the training loss, as they were at that step: `ire_kappa` (0 before the start), `ire_flat_fraction`, the
    same per kind of layer (`ire_flat_fraction_embedding`, `_attention`, `_mlp`, `_norm`, `_bias`, ...), and
    `ire_mask_overlap`, the Jaccard index of the last two masks.
    """

    gr_args: GRArguments

    def __init__(self, *args, **kwargs):
        self._ire: IRE | None = None
        self._ire_divergence: DivergenceGuard | None = None
        self._ire_is_given = False
        self._ire_kinds: dict[Tensor, str] = {}
        self._ire_probe_ran = False
        self._ire_losses: list[Tensor] = []
        self._ire_kappa = 0.0
        super().__init__(*args, **kwargs)
        if self.gr_args.ire_kappa != 0:
            self._ire_require_support(needs_estimate=self.gr_args.ire_mask in ESTIMATED_MASKS)

    def _ire_require_support(self, needs_estimate: bool) -> None:
        refuse_unsupported(self, "ire_kappa")
        has_own_losses = type(self).ire_sampled_losses is not IREMixin.ire_sampled_losses
        if needs_estimate and not has_own_losses and (name := class_among(self, PREFERENCE_TRAINERS)):
            raise ValueError(
                f"ire_kappa={self.gr_args.ire_kappa}: IRE draws labels for the step's batch, and a batch of {name} has "
                "none. Override ire_sampled_losses of the trainer, or set ire_kappa=0."
            )
        if needs_estimate and not has_own_losses and distribution_of(self.model) is None:
            raise ValueError(
                f"ire_kappa={self.gr_args.ire_kappa}: IRE draws labels from the distribution that the model predicts, "
                f"and that of {type(self.model).__name__} is not known here; known are causal language models, and "
                "classifiers of images and sequences with one label. Override ire_sampled_losses of the trainer, or "
                "set ire_kappa=0."
            )

    @property
    def ire_optimizer(self) -> IRE | None:
        """The optimizer, if it is `IRE`; None before it is made."""
        return self._ire

    # ---- Schedule ----

    def ire_start_step(self, num_training_steps: int) -> int:
        """How many steps of a run of `num_training_steps` precede the first one of IRE."""
        return self.gr_args.get_ire_start_step(self.args.get_warmup_steps(num_training_steps), num_training_steps)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`, wrapped in `IRE`; an `IRE` that was given to the trainer is used as it is."""
        optimizer = super().create_optimizer(*args, **kwargs)
        flags = self.gr_args
        flags.check_ire_arguments()
        # A second call of train() finds the first one's.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        if isinstance(inner, IRE):
            self._ire_is_given = self._ire_is_given or inner is not self._ire
            if flags.ire_kappa != inner.kappa and not (self._ire_is_given and flags.ire_kappa == 0):
                raise ValueError(
                    f"ire_kappa={flags.ire_kappa}, but the optimizer of this trainer is already IRE with "
                    f"kappa={inner.kappa}. Leave one of them out."
                )
            if inner is not self._ire and (idle := flags.ire_flags_of_the_optimizer()):
                logger.warning(f"{', '.join(idle)}: no effect, the IRE that was given to the trainer has its own.")
            self._ire = inner
        else:
            if idle := flags.ire_flags_without_effect():
                mask = f" and ire_mask={flags.ire_mask!r}" if flags.ire_kappa != 0 else ""
                logger.warning(f"{', '.join(idle)}: no effect with ire_kappa={flags.ire_kappa}{mask}.")
            self._ire = self._wrap_optimizer(inner) if flags.ire_kappa != 0 else None
            if self._ire is not None:
                self.optimizer = optimizer = self._ire
        if self._ire is not None:
            if self._ire_divergence is None or self._ire_divergence.ire is not self._ire:
                self._ire_divergence = DivergenceGuard(self._ire)
            self._ire_require_support(self._ire.needs_estimate)
            self._ire_kinds = layer_kinds(self.model)
        return optimizer

    def _wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> IRE:
        flags = self.gr_args
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        excluded = []
        for word in flags.ire_exclude or ():
            found = [p for name, p in named if word in name]
            if not found:
                raise ValueError(f"ire_exclude: no trainable parameter has {word!r} in its name, e.g. {named[0][0]!r}.")
            excluded += found
        if len(set(excluded)) == len(named):
            raise ValueError(f"ire_exclude={flags.ire_exclude}: nothing is left to amplify. Exclude less.")
        return IRE(
            optimizer,
            kappa=flags.ire_kappa,
            gamma=flags.ire_gamma,
            scope=flags.ire_scope,
            exclude=excluded,
            amplify_weight_decay=flags.ire_amplify_weight_decay,
            beta=flags.ire_beta,
            mask=flags.ire_mask,
            kappa_schedule=flags.ire_kappa_schedule,
            seed=self.args.seed,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in `Trainer`; the start of IRE is checked here, where the number of steps is first known."""
        if self._ire is not None:
            flags, start = self.gr_args, self.ire_start_step(num_training_steps)
            if start >= num_training_steps:
                message = f"starts after {start} steps, at or after the end of the run of {num_training_steps}"
                if flags.ire_start_step is not None:
                    raise ValueError(f"ire_start_step={flags.ire_start_step}: IRE {message}. Start it earlier.")
                logger.warning(
                    f"IRE {message}, and never acts: it waits for the learning-rate warmup. Set ire_start_step."
                )
            self._ire_name_idle_settings()
            logger.info(
                f"  IRE: kappa = {self._ire.kappa}, gamma = {self._ire.gamma}, mask '{self._ire.mask}' every "
                f"{flags.ire_interval} steps from step {start} of {num_training_steps}"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _ire_name_idle_settings(self) -> None:
        """Warn of settings of the optimizer that, as the run is, change nothing."""
        if not self._ire.amplify_weight_decay and not any(g.get("weight_decay") for g in self._ire.param_groups):
            logger.warning("ire_amplify_weight_decay=False has no effect with weight_decay=0.")
        schedule = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        if self._ire.kappa_schedule == "lr" and self.lr_scheduler is None and schedule == "constant":
            logger.warning(
                "ire_kappa_schedule='lr' has no effect with lr_scheduler_type='constant': kappa follows the learning "
                "rate, which does not change."
            )

    # ---- Before a step: the mask ----

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | int | None]:
        """As in `Trainer`. With the micro-batches of the next step at hand, IRE chooses coordinates if it is due."""
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._ire_probe_ran = False
        self._ire_losses.clear()
        if self._ire is not None and batch_samples:
            since_start = self.state.global_step - self.ire_start_step(self.state.max_steps)
            self._ire.active = since_start >= 0
            # A mask that is missing, after an overflow or in a run that had no IRE so far, is not waited for.
            if self._ire.active and (since_start % self.gr_args.ire_interval == 0 or not self._ire.has_mask):
                self._ire_update_mask(batch_samples)
        return batch_samples, num_items_in_batch

    def _ire_update_mask(self, batch_samples: list[dict[str, Any]]) -> None:
        if not self._ire.needs_estimate:
            self._ire.update_mask()
            self.recorder.segment.ire_choices += 1
            return
        # There are gradients only where a data set of unknown length has left an incomplete step behind.
        with gradients_set_aside([*self.model.parameters(), *trainable_parameters(self._ire)]):
            if not self._ire_probe(batch_samples):
                return
            if self._ire.update_mask():
                self.recorder.segment.ire_choices += 1
            else:
                logger.warning(
                    f"Step {self.state.global_step}: the gradient of the sampled labels is not finite. IRE keeps "
                    f"{'its last choice of' if self._ire.has_mask else 'waiting for its first choice of'} coordinates."
                )

    def _ire_probe(self, batch_samples: list[dict[str, Any]]) -> bool:
        """Leave in `.grad` the gradient of sampled labels, averaged over the micro-batches and processes.

        False if there is no label to sample.
        """
        model, accelerator = self.model_wrapped, self.accelerator
        parts = self._ire_select(batch_samples)
        # Any scale would give the same order. This one, the same for all parts and processes, makes it a mean, as the
        # loss in training is: a gradient scaler is tuned to that.
        count = sum(_label_count(part) for part in parts)
        total = accelerator.reduce(torch.tensor(float(count), device=self.args.device), "sum").item()
        if total == 0:
            return False
        scale = accelerator.num_processes / total
        seed = np.random.SeedSequence([self.args.seed, self.state.global_step, accelerator.process_index])
        # A Python int, as NumPy 1 shifts no uint64 by one.
        generator = torch.Generator(self.args.device).manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
        rng_state = RNGState.capture(self.args.device)
        try:
            with without_randomness(model):
                for part in parts:
                    inputs = self._prepare_inputs(part)
                    with nullcontext() if part is parts[-1] else accelerator.no_sync(model):
                        with self.compute_loss_context_manager():
                            losses = self.ire_sampled_losses(model, inputs, generator)
                        accelerator.backward(losses.sum() * scale)
        finally:
            rng_state.restore()
        if accelerator.scaler is not None:
            scale_gradients_(trainable_parameters(self._ire), 1 / accelerator.scaler.get_scale())
        self._ire_probe_ran = True
        segment, share = self.recorder.segment, _row_count(parts) / _row_count(batch_samples)
        segment.ire_estimates += 1
        segment.ire_passes += share
        segment.passes += share
        return True

    def _ire_select(self, batch_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first `ire_probe_fraction` of the step's examples, rounded up, in as few micro-batches as hold them."""
        if self.gr_args.ire_probe_fraction == 1:
            return batch_samples
        sizes = [find_batch_size(inputs) or 1 for inputs in batch_samples]
        wanted = math.ceil(self.gr_args.ire_probe_fraction * sum(sizes))
        parts = []
        for inputs, size in zip(batch_samples, sizes, strict=True):
            rows = min(size, wanted)
            if rows > 0:
                parts.append(first_rows(inputs, rows, size))
                wanted -= rows
        return parts

    def ire_sampled_losses(self, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator) -> Tensor:
        """-log p(y | x), differentiable, for labels y drawn from what `model` predicts; one entry per label.

        Override it for a model with another kind of output, and draw with `generator` alone:

        ```python
        def ire_sampled_losses(self, model, inputs, generator):  # a regression with Gaussian noise of unit variance
            mean = model(inputs["x"])
            y = mean.detach() + torch.randn(mean.shape, generator=generator, device=mean.device)
            return 0.5 * (y - mean).square()
        ```
        """
        labels = inputs.get("labels")
        if labels is None or labels.is_floating_point():
            kind = "no labels" if labels is None else f"labels of {labels.dtype}"
            raise ValueError(
                f"ire_kappa={self._ire.kappa}: the batch has {kind}, and IRE must know which positions count, "
                "each with one class. Override ire_sampled_losses of the trainer, or set ire_kappa=0."
            )
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return LOSSES[distribution_of(self.model)](logits, labels, generator)

    # ---- After a step: the guard ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """As in `Trainer`; the loss of each whole step is watched."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._ire is not None and not getattr(self, "gr_second_pass", False):
            self._ire_losses.append(loss.detach())
            if self.accelerator.sync_gradients:
                if self.gr_args.ire_guard != 0:
                    self._ire_watch(torch.stack(self._ire_losses).sum())
                self._ire_kappa = self._ire.kappa_in_force
                self.recorder.segment.ire_steps += self._ire_kappa != 0
        return loss

    def _ire_watch(self, loss: Tensor) -> None:
        # The same number on all processes, so that they all do the same.
        loss = self.accelerator.reduce(loss.float(), "mean").item()
        if self._ire_divergence.observe(loss, self.gr_args.ire_guard, cooldown=self.gr_args.ire_interval):
            logger.warning(
                f"Step {self.state.global_step}: the loss, {loss:.4g}, has diverged since IRE started. kappa is halved "
                f"to {self._ire.kappa * self._ire.kappa_scale:g}. Set ire_guard=0 to leave it alone."
            )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the values of IRE beside the training loss."""
        if "loss" in logs and self._ire is not None:
            logs.update(self._ire_logs())
        super().log(logs, *args, **kwargs)

    def _ire_logs(self) -> dict[str, float]:
        logs = {"ire_kappa": self._ire_kappa, "ire_flat_fraction": self._ire.flat_fraction}
        logs.update({f"ire_flat_fraction_{kind}": fraction for kind, fraction in self.ire_flat_fractions().items()})
        if self._ire.mask_overlap is not None:
            logs["ire_mask_overlap"] = self._ire.mask_overlap
        return logs

    def ire_flat_fractions(self) -> dict[str, float]:
        """The share of amplified coordinates per kind of layer; empty before the first choice."""
        flat: dict[str, int] = {}
        size: dict[str, int] = {}
        for p, count in self._ire.flat_counts.items():
            kind = self._ire_kinds.get(p, "other")
            flat[kind] = flat.get(kind, 0) + count
            size[kind] = size.get(kind, 0) + p.numel()
        return {kind: flat[kind] / size[kind] for kind in flat}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, with the estimate counted."""
        flops = super().floating_point_ops(inputs)
        return flops + int(flops * self.gr_args.ire_probe_fraction) if self._ire_probe_ran else flops


def _row_count(parts: list[dict[str, Any]]) -> int:
    return sum(find_batch_size(inputs) or 1 for inputs in parts)


def _label_count(inputs: dict[str, Any]) -> int:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return find_batch_size(inputs) or 1
    return int(((labels[:, 1:] if labels.dim() > 1 else labels) != IGNORED).sum())  # nothing predicts a first token
