"""The record of a run (`hf_gr.reporting.record`), filled from the live trainer.

Events are counted as they happen; the settings are those in force once the optimizer and schedule are created and a
checkpoint is loaded. A run consists of segments, one per start: if it is resumed with other flags, its earlier steps
used the old ones.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..optim import TVLARS
from ..reporting.arguments import BOOKKEEPING, changed_arguments, default_of
from ..reporting.record import (
    Log,
    ModelFacts,
    OptimizerFacts,
    Publication,
    Record,
    Segment,
    SharpnessFacts,
    read_record,
    versions,
    write_record,
)
from ..reporting.redaction import redact
from .part import Host, innermost

# ---- Method, data and settings ----


def method_of(trainer: Host) -> dict[str, Any]:
    """`Record.method`; available before the optimizer is created."""
    flags = trainer.gr_args
    is_ire = flags.ire_kappa != 0 or trainer.ire_optimizer is not None
    return {"gr": flags.is_active, "ire": is_ire, "optimizer": _optimizer_name(trainer)}


def _optimizer_name(trainer: Host) -> str | None:
    optimizer = innermost(trainer.optimizer)
    if optimizer is not None:
        return type(optimizer).__name__
    cls_and_kwargs = getattr(trainer, "optimizer_cls_and_kwargs", None)
    kind, _ = cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    # The class that a factory (Muon) creates is known only from the optimizer itself.
    return kind.__name__ if isinstance(kind, type) and issubclass(kind, Optimizer) else None


def data_of(trainer: Host) -> dict[str, Any]:
    """`Record.data`; the name of the dataset is in `script_args`, if a script set them."""
    data: dict[str, Any] = {}
    for args in trainer.script_args:
        name = getattr(args, "dataset_name", None)
        if name is not None:
            is_local = Path(name).exists()
            data |= {"dataset_name": Path(name).resolve().name if is_local else name, "is_local": is_local}
            data["dataset_config_name"] = getattr(args, "dataset_config_name", None)
    return {**data, "train_examples": count_of(trainer.train_dataset)}


def count_of(dataset: Any) -> int | None:
    """The number of examples; None if the dataset has no length."""
    return len(dataset) if dataset is not None and has_length(dataset) else None


def settings_of(trainer: Host) -> dict[str, Any]:
    """`Segment.settings`, once the optimizer and schedule are created and a checkpoint is loaded."""
    settings: dict[str, Any] = {}
    for args in (*trainer.script_args, trainer.args):
        settings |= changed_arguments(args)
    return settings | _optimizer_settings(trainer) | _gr_settings(trainer) | _ire_settings(trainer)


def _optimizer_settings(trainer: Host) -> dict[str, Any]:
    """The optimizer's learning rate and weight decay, which a loaded checkpoint sets regardless of the flags."""
    optimizer = innermost(trainer.optimizer)
    if optimizer is None:
        return {}
    settings = {}
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group.get("lr"))
    if rate is not None:
        rate = float(rate) / trainer.layerwise.lr_factor
        flag_value = trainer.args.learning_rate
        settings["learning_rate"] = flag_value if abs(rate - flag_value) <= 1e-9 * abs(flag_value) else rate
    decays = [group["weight_decay"] for group in optimizer.param_groups if "weight_decay" in group]
    if decays:
        settings["weight_decay"] = max(decays)
    return settings


def _gr_settings(trainer: Host) -> dict[str, Any]:
    gr = trainer.gr_args
    if not gr.is_active:
        return {"gr_lambda": 0}
    settings = {"gr_r": gr.gr_r, "gr_lambda": gr.gr_degree, "gr_warmup": gr.gr_warmup}
    if gr.gr_warmup != "none":
        settings["gr_warmup_steps"] = trainer.gr.warmup_steps(trainer.state.max_steps)
    settings |= {"gr_scope": gr.gr_scope, "gr_interval": gr.gr_interval}
    return settings | _other_flags(gr, "gr_", settings)


def _ire_settings(trainer: Host) -> dict[str, Any]:
    ire, flags = trainer.ire_optimizer, trainer.gr_args
    if ire is None:
        return {"ire_kappa": 0}
    settings = {"ire_kappa": ire.kappa}
    if ire.mask != "uniform":
        settings["ire_gamma"] = ire.gamma
    settings |= {
        "ire_interval": flags.ire_interval,
        "ire_start_step": trainer.ire.start_step(trainer.state.max_steps),
    }
    return settings | _other_flags(flags, "ire_", settings)


def _other_flags(flags: Any, prefix: str, recorded: Iterable[str]) -> dict[str, Any]:
    """The flags of a method that are neither `recorded` yet nor at their defaults."""
    skipped = {*BOOKKEEPING, *recorded, "ire_gamma", "gr_warmup_steps"}  # the two have no effect unless recorded
    fields = [f for f in dataclasses.fields(flags) if f.name.startswith(prefix) and f.name not in skipped]
    return {f.name: getattr(flags, f.name) for f in fields if getattr(flags, f.name) != f.default}


# ---- Facts ----


def facts_of(trainer: Host) -> dict[str, Any]:
    """The fields of `Record` that describe the current state of the trainer."""
    device, ire, callbacks = trainer.args.device, trainer.ire_optimizer, trainer.callback_handler.callbacks
    return {
        "model": model_facts(trainer.model, has_processor=trainer.processing_class is not None),
        "optimizer": optimizer_facts(trainer),
        "ire_flat_fractions": {} if ire is None else trainer.ire.flat_fractions(),
        "ire_reduced_kappa": ire.kappa * float(ire.kappa_scale) if ire is not None and ire.kappa_scale != 1 else None,
        # A picture in the folder may be from an earlier run.
        "layer_picture": next((c.picture for c in callbacks if getattr(c, "has_drawn", False)), None),
        "further": dict(trainer.further_facts),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "peak_memory_bytes": trainer.costs()["peak_memory_bytes"],
    }


def model_facts(model: nn.Module, has_processor: bool) -> ModelFacts:
    adapter = getattr(model, "active_peft_config", None)
    inner: Any = model if adapter is None else cast(Any, model).get_base_model()
    config = getattr(model, "config", None)
    return ModelFacts(
        class_name=type(inner).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=None if adapter is None else _adapter_facts(adapter),
        is_new=adapter is None and getattr(config, "_name_or_path", None) == "",
        has_code=bool(getattr(config, "auto_map", None)),
        has_processor=has_processor,
    )


def _adapter_facts(config: Any) -> dict[str, Any]:
    facts = {"type": config.peft_type.value}
    if hasattr(config, "lora_alpha"):
        modules = config.target_modules
        modules = modules if isinstance(modules, str) else sorted(modules or ())
        facts |= {"rank": config.r, "alpha": config.lora_alpha, "modules": modules}
    return facts


def optimizer_facts(trainer: Host) -> OptimizerFacts | None:
    """None before the optimizer is created."""
    optimizer = innermost(trainer.optimizer)
    if optimizer is None:
        return None
    group = optimizer.param_groups[0]
    excluded = {"params", "lr", "initial_lr", "weight_decay", "step"}
    settings = {key: value for key, value in group.items() if key not in excluded and value is not None}
    is_tvlars = isinstance(optimizer, TVLARS)
    return OptimizerFacts(
        # Values that JSON does not support must not stop a run, which writes this with every checkpoint.
        settings=json.loads(json.dumps(settings, default=str, skipkeys=True)),
        phi=[optimizer.phi(group, step) for step in (1, trainer.state.global_step)] if is_tvlars else None,
        lr_factor=None if trainer.gr_args.lr_scaling == "none" else trainer.layerwise.lr_factor,
    )


def _names_of(data: Any) -> list[str]:
    """The names of the evaluated datasets, given as a dict, as the name of one, or as a dataset without a name."""
    return list(data) if isinstance(data, dict) else [data if isinstance(data, str) else ""]


def defaults_of(trainer: Host, segments: list[Segment]) -> dict[str, Any]:
    """The defaults of the settings that some segments contain and others omit."""
    recorded = [segment for segment in segments if segment.is_recorded]
    counts = Counter(name for segment in recorded for name in segment.settings)
    arguments = (*trainer.script_args, trainer.gr_args, trainer.args)
    defaults = {argument.name: default_of(argument) for args in arguments for argument in dataclasses.fields(args)}
    return {name: defaults[name] for name, count in counts.items() if count < len(recorded) and name in defaults}


# ---- Publication ----


def publication_of(
    trainer: Host,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    dataset_config: str | None = None,
    script_args: Iterable[Any] = (),
    sample: tuple[str, str] | None = None,
    command: str | None = None,
) -> Publication:
    """The arguments of `create_model_card`: those of `Trainer`'s and four more. Omitted ones are taken from the run, or
    left off the card.

    Args:
        dataset: the dataset's display name; `dataset_tags`, its id on the Hub; `dataset_config`, its
            configuration; `dataset_args`, its split.
        script_args: dataclasses with further arguments of the run, listed on the card like the trainer's.
        sample: a prompt, and the text that the model generated from it.
        command: the command line that started the run.
    """
    base_model = _hub_name(finetuned_from)
    unrecorded = [args for args in script_args if not any(args is other for other in trainer.script_args)]
    return Publication(
        model_name=model_name or (trainer.hub_model_id or str(Path(trainer.args.output_dir).resolve())).split("/")[-1],
        hub_model_id=trainer.hub_model_id,
        language=language,
        license=license,
        tags=_listed(tags),
        task=_listed(tasks)[0] if tasks else None,
        base_model=base_model,
        has_local_base=base_model is None and bool(finetuned_from),
        dataset_names=_listed(dataset) or _listed(dataset_tags),
        dataset_ids=_listed(dataset_tags),
        dataset_config=dataset_config,
        split=", ".join(_listed(dataset_args)),
        arguments={name: value for args in unrecorded for name, value in changed_arguments(args).items()},
        sample=None if sample is None else "".join(sample),
        command=redact([command])[0] if command else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _hub_name(finetuned_from: str | None) -> str | None:
    """`finetuned_from`, if it is a name on the Hub and not a local folder."""
    is_name = finetuned_from and not Path(finetuned_from).exists() and finetuned_from.count("/") <= 1
    return finetuned_from if is_name else None


def _listed(value: str | Iterable[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


# ---- During the run ----


class Recorder(TrainerCallback):
    """Keeps the record of a trainer. Other parts of the trainer count their own events in `segment`; what only the
    device knows, with `count`.

    Attributes:
        segment: the current one.
        resumed_from: the checkpoint that the next start resumes from.
        best_step: that of the best checkpoint, once its weights are loaded.
    """

    def __init__(self, trainer: Host):
        self._trainer = trainer
        self._running_since: float | None = None
        self._has_ended = False
        self.resumed_from: str | None = None
        self.best_step: int | None = None
        self.segment = Segment()
        self._on_device: dict[str, Tensor] = {}
        self._record = Record(segments=[self.segment])

    @property
    def record(self) -> Record:
        """The record of the run so far; before training, of the run to come."""
        if not self.segment.settings:
            self._begin(0)
        self._settle()
        return self._record

    def count(self, name: str, happened: Tensor | bool) -> None:
        """Add one to a count of `segment` if `happened`. A tensor is read only when the record is."""
        if isinstance(happened, Tensor):
            self._on_device[name] = happened.int() + self._on_device.get(name, 0)
        else:
            setattr(self.segment, name, getattr(self.segment, name) + happened)

    def _settle(self) -> None:
        for name, count in self._on_device.items():
            setattr(self.segment, name, getattr(self.segment, name) + int(count))
        self._on_device.clear()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """A second `train()` is a new run, as is a restart with a smaller batch after running out of memory."""
        self._begin(state.global_step)
        self._running_since = time.perf_counter()

    def _begin(self, done: int) -> None:
        """Begin a new segment after `done` steps."""
        self._settle()
        trainer = self._trainer
        earlier = read_record(self.resumed_from) if self.resumed_from else None
        sharpness = earlier.sharpness if earlier else self._sharpness_before_training(done)
        segments = [s for s in earlier.segments if s.steps or not s.is_recorded] if earlier else []
        last_step = segments[-1].last_step if segments else 0
        if last_step < done:
            segments.append(Segment(last_step + 1, done, is_recorded=False))
        self.segment = Segment(
            first_step=done + 1,
            last_step=done,
            settings=settings_of(trainer),
            versions=versions(),
            world_size=trainer.args.world_size,
            batch_size=trainer.get_total_train_batch_size(trainer.args),
        )
        segments.append(self.segment)
        self._record = Record(
            method_of(trainer),
            data_of(trainer),
            segments,
            defaults=defaults_of(trainer, segments),
            evaluated=earlier.evaluated if earlier else None,
            sharpness=sharpness,
        )
        self._has_ended, self.best_step = False, None

    def _sharpness_before_training(self, done: int) -> SharpnessFacts | None:
        """What was measured before the first run, if it starts from those weights and not from others."""
        is_first = done == 0 and not self._record.total("steps") and self._trainer.model_init is None
        return self._record.sharpness if is_first else None

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        trainer, segment = self._trainer, self.segment
        if trainer.accelerator.optimizer_step_was_skipped:  # by the gradient scaler
            segment.skipped_steps += 1
        rate = trainer.optimizer.param_groups[0].get("lr")
        if isinstance(rate, Tensor):  # schedulers change it in place; `write` converts it to a float
            rate = rate.detach().clone()
        segment.learning_rates = [*segment.learning_rates[:1], rate]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.segment.steps += 1
        self.segment.last_step = state.global_step

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Stop the clock, and write the record if there were any steps."""
        self._settle()
        if self._stop_clock() and self.segment.steps:
            self.write(self._folder())
            self._has_ended = True

    def _folder(self) -> str:
        return self._trainer._get_output_dir(getattr(self._trainer, "_trial", None))

    def write(self, *folders: str | Path, **published: Any) -> None:
        """Write the record, with `published` as further fields, into each folder, on the main process only."""
        if not self._trainer.args.should_save:
            return
        if self._stop_clock():
            self._running_since = time.perf_counter()
        self.segment.learning_rates = [None if rate is None else float(rate) for rate in self.segment.learning_rates]
        evaluated = self._trainer.evaluated_dataset
        names = self.record.evaluated if evaluated is None else _names_of(evaluated)
        record = replace(self.record, evaluated=names, **facts_of(self._trainer), **published)
        for folder in folders:
            write_record(record, folder)

    def keep_sharpness(self, **facts: Any) -> None:
        """Record a measurement at the current weights, the fields of `SharpnessFacts`. After training, also on disk."""
        step = self._trainer.state.global_step if self.best_step is None else self.best_step
        self.record.sharpness = SharpnessFacts(step, **facts)
        if self._has_ended and self._trainer.args.should_save and (written := read_record(self._folder())):
            write_record(replace(written, sharpness=self.record.sharpness), self._folder())

    def publish(self, *args: Any, **kwargs: Any) -> None:
        """Write the record into the output folder, with the log and the arguments of `create_model_card`."""
        trainer, state = self._trainer, self._trainer.state
        best = state.best_model_checkpoint
        log = Log(state.log_history, state.max_steps, best and Path(best).name)
        self.write(trainer.args.output_dir, publication=publication_of(trainer, *args, **kwargs), log=log)

    # ---- The clock ----

    def _stop_clock(self) -> bool:
        """Stop the clock; returns whether it was running."""
        if self._running_since is None:
            return False
        self.segment.seconds += time.perf_counter() - self._running_since
        self._running_since = None
        return True

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Within the context, time does not count as training."""
        was_running = self._stop_clock()
        try:
            yield
        finally:
            if was_running:
                self._running_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, in all segments."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return sum(segment.seconds for segment in self._record.segments) + running

    @property
    def passes(self) -> float:
        """Passes over the batch of a step so far, in all segments."""
        return self._record.total("passes")
