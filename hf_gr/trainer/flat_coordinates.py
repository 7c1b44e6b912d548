"""IRE inside `Trainer`: the optimizer is wrapped when it is created, and flat coordinates are chosen before a step.

The estimate runs once the micro-batches of a step are loaded, before the first one is trained on: the weights are not
perturbed then, there are no gradients yet, and the loop has not yet suspended gradient synchronization, without which
each process would choose different coordinates.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from torch.distributed import checkpoint

from ..optim.fisher import HEADS, IGNORED, Head, first_rows, head_of, layer_kinds, without_randomness
from ..optim.gradient_regularization import gradients_set_aside, scale_gradients_
from ..optim.ire import ESTIMATED_MASKS, IRE
from ..optim.pass_state import RNGState
from ..reporting.record import read_record
from .compatibility import UNLABELED_TRAINERS, class_among, refuse_unsupported
from .guards import DivergenceGuard, Unread
from .layerwise import trainable_parameters
from .part import Host, Part
from .recording import Recorder

logger = get_logger(__name__)

#: Inputs of a decoder; if a batch has one of them, the model does not make it from the labels.
DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
#: The folder in a checkpoint of FSDP2 with the masks and averages, each process's part, and everything else.
IRE_STATE = "ire"
#: What is sharded in it, and its type; None is that of the parameters.
SHARDED_STATE = {"masks": torch.uint8, "averages": None}


class FlatCoordinates(Part):
    """IRE around the optimizer that a trainer creates or is given.

    Attributes:
        optimizer: the `IRE`; None before it is created, or without IRE.
    """

    def __init__(self, trainer: Host, recorder: Recorder):
        super().__init__(trainer)
        self._recorder = recorder
        self.optimizer: IRE | None = None
        self._is_given = False
        self._divergence: DivergenceGuard | None = None
        self._kinds: dict[Tensor, str] = {}
        self._has_probed = False
        self._losses: list[Tensor] = []
        self._unread = Unread()  # the losses of steps, and whether kappa was halved
        self._choices = Unread()  # whether they could be made, and the numbers of labels
        self._kappa: Tensor | float = 0.0

    def check(self) -> None:
        if self._flags.ire_kappa != 0:
            self._require_support(needs_estimate=self._flags.ire_mask in ESTIMATED_MASKS)

    def _require_support(self, needs_estimate: bool) -> None:
        trainer, kappa = self._trainer, self._flags.ire_kappa
        refuse_unsupported(trainer, "ire_kappa")
        if not needs_estimate or type(trainer).ire_sampled_losses is not sampled_losses:
            return
        if name := class_among(trainer, UNLABELED_TRAINERS):
            raise ValueError(
                f"ire_kappa={kappa}: IRE draws labels for the step's batch, and a batch of {name} has none. Override "
                "the trainer's ire_sampled_losses, or set ire_kappa=0."
            )
        _head(trainer)

    # ---- Schedule ----

    def start_step(self, num_training_steps: int) -> int:
        """The number of steps before IRE starts, in a run of `num_training_steps`."""
        return self._flags.get_ire_start_step(
            self._trainer.args.get_warmup_steps(num_training_steps), num_training_steps
        )

    def wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """`optimizer` wrapped in `IRE`, if IRE is on; an `IRE` that was given to the trainer is used as it is."""
        self._flags.check_ire_arguments()
        # A second call of train() finds the optimizer of the first.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        if isinstance(inner, IRE):
            self._use_given(inner)
        else:
            self.warn_of_unused_flags("ire_")
            self.optimizer = None
            if self._flags.ire_kappa != 0:
                self.optimizer = optimizer = self._wrapped(inner)
        if self.optimizer is not None:
            if self._divergence is None or self._divergence.ire is not self.optimizer:
                self._divergence = DivergenceGuard(self.optimizer)
            self._require_support(self.optimizer.needs_estimate)
            self.optimizer.active = False  # until `choose`; FSDP2 makes the optimizer's state by a step
        return optimizer

    def _use_given(self, ire: IRE) -> None:
        flags = self._flags
        self._is_given = self._is_given or ire is not self.optimizer
        if flags.ire_kappa != ire.kappa and not (self._is_given and flags.ire_kappa == 0):
            raise ValueError(
                f"ire_kappa={flags.ire_kappa}, but the optimizer of this trainer is already IRE with "
                f"kappa={ire.kappa}. Leave one of them out."
            )
        if ire is not self.optimizer and (unused := flags.ire_flags_of_the_optimizer()):
            logger.warning(f"{', '.join(unused)}: no effect, the IRE given to the trainer has its own settings.")
        self.optimizer = ire

    def _wrapped(self, optimizer: torch.optim.Optimizer) -> IRE:
        flags = self._flags
        named = [(name, p) for name, p in self._trainer.model.named_parameters() if p.requires_grad]
        excluded = []
        for word in flags.ire_exclude or ():
            found = [p for name, p in named if word in name]
            if not found:
                raise ValueError(f"ire_exclude: no trainable parameter has {word!r} in its name, e.g. {named[0][0]!r}.")
            excluded += found
        if len(set(excluded)) == len(named):
            raise ValueError(f"ire_exclude={flags.ire_exclude}: nothing is left to amplify. Exclude fewer parameters.")
        return IRE(optimizer, **flags.ire_settings() | {"exclude": excluded}, seed=self._trainer.args.seed)

    def plan(self, num_training_steps: int) -> None:
        self._unread.clear()
        self._choices.clear()
        ire = self.optimizer
        if ire is None:
            return
        flags, start = self._flags, self.start_step(num_training_steps)
        if start >= num_training_steps:
            message = f"starts after {start} steps, at or after the end of the run of {num_training_steps}"
            if flags.ire_start_step is not None:
                raise ValueError(f"ire_start_step={flags.ire_start_step}: IRE {message}. Start it earlier.")
            logger.warning(f"IRE {message}, and never acts: it waits for the learning-rate warmup. Set ire_start_step.")
        self._warn_of_unused_settings(ire)
        logger.info(
            f"  IRE: kappa = {ire.kappa}, gamma = {ire.gamma}, mask '{ire.mask}' "
            f"every {flags.ire_interval} steps from step {start} of {num_training_steps}"
        )

    def _warn_of_unused_settings(self, ire: IRE) -> None:
        """Warn of optimizer settings that have no effect in this run."""
        if not ire.amplify_weight_decay and not any(g.get("weight_decay") for g in ire.param_groups):
            logger.warning("ire_amplify_weight_decay=False has no effect with weight_decay=0.")
        schedule = getattr(self._trainer.args.lr_scheduler_type, "value", self._trainer.args.lr_scheduler_type)
        if ire.kappa_schedule == "lr" and self._trainer.lr_scheduler is None and schedule == "constant":
            logger.warning(
                "ire_kappa_schedule='lr' has no effect with lr_scheduler_type='constant': kappa follows the learning "
                "rate, which does not change."
            )

    # ---- Before a step: the mask ----

    def choose(self, batch_samples: list[dict[str, Any]]) -> None:
        """Given the micro-batches of the next step, choose the coordinates to amplify, if a choice is due."""
        self._has_probed = False
        self._losses.clear()
        ire = self.optimizer
        if ire is None or not batch_samples:
            return
        step = self._trainer.state.global_step
        ire.active = self._since_start(step) >= 0
        # A resumed run that had no IRE has no mask yet, and gets one at once.
        if ire.active and (self._is_due(step) or not ire.has_mask):
            self._update_mask(ire, batch_samples)

    def _since_start(self, step: int) -> int:
        return step - self.start_step(self._trainer.state.max_steps)

    def _is_due(self, step: int) -> bool:
        """Whether a choice precedes the step that follows `step` completed ones."""
        since_start = self._since_start(step)
        return since_start >= 0 and since_start % self._flags.ire_interval == 0

    def passes(self, step: int) -> float:
        """Passes of the estimate before that step, as a share of its batch."""
        ire, args = self.optimizer, self._trainer.args
        if ire is None or not ire.needs_estimate or not self._is_due(step):
            return 0.0
        rows = args.train_batch_size * args.gradient_accumulation_steps
        return self._wanted(rows) / rows

    def _wanted(self, rows: int) -> int:
        """The number of examples for the estimate, of the `rows` of a step."""
        return math.ceil(self._flags.ire_probe_fraction * rows)

    def _update_mask(self, ire: IRE, batch_samples: list[dict[str, Any]]) -> None:
        if not ire.needs_estimate:
            ire.update_mask()
            self._recorder.segment.ire_choices += 1
            return
        # There are gradients only if a dataset of unknown length left an incomplete step behind.
        with gradients_set_aside([*self._trainer.model.parameters(), *trainable_parameters(ire)]):
            label_count = self._probe(ire, batch_samples)
            is_chosen = ire.update_mask(only_if=label_count > 0)
        self._recorder.count("ire_choices", is_chosen)
        self._choices.add(self._trainer.state.global_step, is_chosen, label_count.to(is_chosen.device))
        if self._trainer.nonfinite_guard.looks_at_once or self._choices.is_full:
            self.tell()

    def _probe(self, ire: IRE, batch_samples: list[dict[str, Any]]) -> Tensor:
        """Leave in `.grad` the gradient of sampled labels, averaged over the micro-batches and processes. Returns
        the number of labels; without one, the gradient means nothing."""
        trainer, model, accelerator = self._trainer, self._trainer.model_wrapped, self._trainer.accelerator
        parts = self._select(batch_samples)
        # Any scale common to all parts and processes gives the same order. This one makes the loss a mean, like the
        # training loss, to which a gradient scaler is tuned.
        head = head_of(trainer.model)
        counts = [_label_count(part, head).to(trainer.args.device, non_blocking=True) for part in parts]
        total = accelerator.reduce(torch.stack(counts).sum(), "sum")
        scale = accelerator.num_processes / total
        seed = np.random.SeedSequence([trainer.args.seed, trainer.state.global_step, accelerator.process_index])
        # A Python int, as NumPy 1 cannot shift a uint64 by one.
        generator = torch.Generator(trainer.args.device).manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
        rng_state = RNGState.capture(trainer.args.device)
        try:
            with without_randomness(model):
                for part in parts:
                    inputs = trainer._prepare_inputs(part)
                    with nullcontext() if part is parts[-1] else accelerator.no_sync(model):
                        with trainer.compute_loss_context_manager():
                            losses = trainer.ire_sampled_losses(model, inputs, generator)
                        accelerator.backward(losses.sum() * scale)
        finally:
            rng_state.restore()
        if accelerator.scaler is not None:
            factor = accelerator.scaler.scale(torch.ones((), device=trainer.args.device))
            scale_gradients_(trainable_parameters(ire), 1 / factor)
        self._has_probed = True
        segment, share = self._recorder.segment, _row_count(parts) / _row_count(batch_samples)
        segment.ire_estimates += 1
        segment.ire_passes += share
        segment.passes += share
        return total

    def _select(self, batch_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first `ire_probe_fraction` of the step's examples, rounded up, in as few micro-batches as possible."""
        if self._flags.ire_probe_fraction == 1:
            return batch_samples
        sizes = [find_batch_size(inputs) or 1 for inputs in batch_samples]
        wanted = self._wanted(sum(sizes))
        parts = []
        for inputs, size in zip(batch_samples, sizes, strict=True):
            rows = min(size, wanted)
            if rows > 0:
                parts.append(first_rows(inputs, rows, size))
                wanted -= rows
        return parts

    # ---- After a step: the guard ----

    def observe(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch; after the last one of a step, check the step's loss for divergence."""
        ire = self.optimizer
        if ire is None:
            return
        self._losses.append(loss.detach())
        if self._trainer.accelerator.sync_gradients:
            if self._flags.ire_guard != 0:
                self._watch(ire, torch.stack(self._losses).sum())
            self._kappa = ire.kappa_now
            self._recorder.count("ire_steps", self._kappa != 0)

    def _watch(self, ire: IRE, loss: Tensor) -> None:
        # Averaged, so that all processes decide alike.
        mean = self._trainer.accelerator.reduce(loss.float(), "mean")
        assert self._divergence is not None
        is_halved = self._divergence.observe(mean, self._flags.ire_guard, cooldown=self._flags.ire_interval)
        self._unread.add(self._trainer.state.global_step + 1, mean, is_halved)
        if self._trainer.nonfinite_guard.looks_at_once or self._unread.is_full:
            self.tell()

    def tell(self) -> None:
        """Warn of the steps since the last call at which no choice could be made, or kappa was halved."""
        if self.optimizer is not None:
            self._tell_of_choices(self.optimizer)
            self._tell_of_halvings(self.optimizer)

    def _tell_of_choices(self, ire: IRE) -> None:
        for step, (is_chosen, label_count) in self._choices.read():
            if not is_chosen:
                reason = "the gradient of the sampled labels is not finite" if label_count else "its batch has no label"
                reaction = "keeps its last choice of" if ire.updates else "keeps waiting for its first choice of"
                logger.warning(f"Step {step}: {reason}. IRE {reaction} coordinates.")

    def _tell_of_halvings(self, ire: IRE) -> None:
        halvings = [(step, loss) for step, (loss, is_halved) in self._unread.read() if is_halved]
        for later, (step, loss) in reversed(list(enumerate(reversed(halvings)))):
            kappa = ire.kappa * float(ire.kappa_scale) * 2**later
            logger.warning(
                f"Step {step}: the loss, {loss:.4g}, has diverged since IRE started. kappa is halved to {kappa:g}. Set "
                "ire_guard=0 to prevent this."
            )

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        ire = self.optimizer
        if ire is None:
            return {}
        self.tell()
        values = {"ire_kappa": float(self._kappa), "ire_flat_fraction": ire.flat_fraction}
        values |= {f"ire_flat_fraction_{kind}": fraction for kind, fraction in self.flat_fractions().items()}
        return values if ire.mask_overlap is None else values | {"ire_mask_overlap": ire.mask_overlap}

    def flat_fractions(self) -> dict[str, float]:
        """The share of amplified coordinates per kind of layer; empty before the first choice."""
        flat: dict[str, int] = {}
        size: dict[str, int] = {}
        counts = {} if self.optimizer is None else self.optimizer.flat_counts
        if not counts.keys() <= self._kinds.keys():  # FSDP2 has replaced the parameters
            self._kinds = layer_kinds(self._trainer.model)
        for p, count in counts.items():
            kind = self._kinds.get(p, "other")
            flat[kind] = flat.get(kind, 0) + count
            size[kind] = size.get(kind, 0) + p.numel()
        return {kind: flat[kind] / size[kind] for kind in flat}

    # ---- Checkpoints ----

    def save(self, folder: str) -> None:
        """Under FSDP2, whose checkpoints keep of an optimizer the state of each parameter alone, write IRE's own."""
        if self.optimizer is not None and self._is_sharded and not self._trainer.args.save_only_model:
            numbers = self.optimizer.state_dict()["ire"]
            tensors = {f"{kind}.{i}": t for kind in SHARDED_STATE for i, t in numbers.pop(kind).items()}
            checkpoint.save({**tensors, "numbers": json.dumps(numbers)}, checkpoint_id=Path(folder, IRE_STATE))

    def load(self, folder: str) -> None:
        """Restore it. Without a record of the run that wrote the checkpoint, that may have been one without IRE: the
        first choice is then made at once."""
        ire, path = self.optimizer, Path(folder, IRE_STATE)
        if ire is None or not self._is_sharded:
            return
        if not path.is_dir():
            if read_record(folder) is None:
                return
            raise ValueError(
                f"resume_from_checkpoint={folder}: the coordinates that IRE had chosen, in the folder {IRE_STATE}, are "
                "missing. Resume from another checkpoint, or start without it."
            )
        params = [p for group in ire.param_groups for p in group["params"]]
        saved: dict[str, Any] = {"numbers": ""}
        for key in checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata.keys() - saved.keys():
            kind, _, i = key.partition(".")
            saved[key] = torch.zeros_like(params[int(i)], dtype=SHARDED_STATE[kind])
        checkpoint.load(saved, checkpoint_id=path)
        state = json.loads(saved.pop("numbers"))
        state["flat_counts"] = {int(i): count for i, count in state["flat_counts"].items()}
        for kind in SHARDED_STATE:
            state[kind] = {int(key.partition(".")[2]): t for key, t in saved.items() if key.startswith(f"{kind}.")}
        ire.load_state_dict({**ire.base_optimizer.state_dict(), "ire": state})

    @property
    def _is_sharded(self) -> bool:
        return self._trainer.accelerator.is_fsdp2

    @property
    def probed_fraction(self) -> float:
        """The share of the step's examples that its estimate was computed from; 0 without an estimate."""
        return self._flags.ire_probe_fraction if self._has_probed else 0.0


def sampled_losses(trainer: Host, model: nn.Module, inputs: dict[str, Any], generator: torch.Generator) -> Tensor:
    """-log p(y | x), differentiable, for labels y drawn from the prediction of `model`; 0 without a label.

    Override this for a model with another kind of output, and draw only from `generator`:

    ```python
    def ire_sampled_losses(self, model, inputs, generator):  # a regression with Gaussian noise of unit variance
        mean = model(inputs["x"])
        y = mean.detach() + torch.randn(mean.shape, generator=generator, device=mean.device)
        return 0.5 * (y - mean).square()
    ```
    """
    head, labels = _head(trainer), inputs.get("labels")
    if labels is None or (labels.is_floating_point() and not head.allows_fractions):
        kind = "no labels" if labels is None else f"labels of {labels.dtype}"
        raise ValueError(
            f"ire_kappa={trainer.ire.optimizer.kappa}: the batch has {kind}, and IRE must know which positions count, "
            "each with one class. Override the trainer's ire_sampled_losses, set the model's config.problem_type if it "
            "has several labels per example, or set ire_kappa=0."
        )
    if not head.feeds_decoder or DECODER_INPUTS & inputs.keys():
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    outputs = model(**inputs)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs["labels" in inputs]  # a loss comes first
    return head.losses(logits, labels, generator)


def _head(trainer: Host) -> Head:
    head = head_of(trainer.model)
    if head is None:
        known = ", ".join(head.help for head in HEADS.values())
        raise ValueError(
            f"ire_kappa={trainer.gr_args.ire_kappa}: IRE draws labels from the distribution that the model predicts, "
            f"and supports {known}, not {type(trainer.model).__name__}. Override the trainer's ire_sampled_losses, or "
            "set ire_kappa=0."
        )
    return head


def _row_count(parts: list[dict[str, Any]]) -> int:
    return sum(find_batch_size(inputs) or 1 for inputs in parts)


def _label_count(inputs: dict[str, Any], head: Head | None) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return torch.tensor(find_batch_size(inputs) or 1)
    return ((labels if head is None else head.predicted(labels)) != IGNORED).sum()
