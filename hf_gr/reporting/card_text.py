"""The sentences, tables and code of the model card, each from what the run recorded. Nothing in them is typed in."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from peft import PeftModel

from ..config import GRArguments
from ..optim import IRE, OPTIMIZERS, TVLARS
from ..optim.ascents import ASCENTS
from ..optim.gr_warmup import GR_WARMUPS
from ..optim.gradient_regularization import CITATION
from ..trainer.layerwise import innermost
from ..trainer.recording import Record, Segment, changed_arguments, count_of, default_of

if TYPE_CHECKING:
    from ..trainer.trainer import GRMixin

#: Rows of a table: flag, symbol in the equations, value.
Rows = list[tuple[str, str, Any]]


def last_entry(history: list[dict[str, float]], start: str) -> int:
    """Index of the last log entry with a key that starts so, -1 if there is none."""
    return max((i for i, entry in enumerate(history) if any(key.startswith(start) for key in entry)), default=-1)


def hub_base_model(finetuned_from: str | None) -> str | None:
    """`finetuned_from`, if that is a name on the Hub and not a folder on somebody's disk."""
    is_name = finetuned_from and not Path(finetuned_from).exists() and finetuned_from.count("/") <= 1
    return finetuned_from if is_name else None


def own_optimizer(trainer: "GRMixin") -> torch.optim.Optimizer | None:
    """The optimizer that ran, if it is one of `OPTIMIZERS`, which have an equation on the card."""
    optimizer = innermost(trainer.optimizer)
    return optimizer if isinstance(optimizer, tuple(OPTIMIZERS.values())) else None


def methods_used(trainer: "GRMixin") -> dict[str, str]:
    """Tag -> name of the methods that the run used, in any of its steps."""
    methods = {}
    if with_method(trainer, "gr_lambda"):
        methods["gradient-regularization"] = "gradient regularization"
    if with_method(trainer, "ire_kappa"):
        methods["ire"] = "IRE"
    if (optimizer := own_optimizer(trainer)) is not None:
        name = type(optimizer).__name__
        methods[name.lower()] = name
    return methods


def recorded(trainer: "GRMixin") -> list[Segment]:
    """The segments of which something is known."""
    return [segment for segment in trainer.recorder.record.segments if segment.is_recorded]


def with_method(trainer: "GRMixin", degree: str) -> list[Segment]:
    """The segments in which a method was on: `gr_lambda` or `ire_kappa` was not 0."""
    return [segment for segment in recorded(trainer) if segment.settings.get(degree, 0) != 0]


def over_steps(segments: Iterable[Segment], value: Callable[[Segment], Any]) -> str:
    """A value, as text; where it was not always the same, with the steps in which it was what."""
    parts: list[tuple[str, int, int]] = []
    for segment in segments:
        text = str(value(segment))
        if parts and parts[-1][0] == text:
            parts[-1] = (text, parts[-1][1], segment.last_step)
        else:
            parts.append((text, segment.first_step, segment.last_step))
    if len(parts) == 1:
        return parts[0][0]
    return ", ".join(f"{text} in {_steps(first, last)}" for text, first, last in parts)


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def has_lora(model: torch.nn.Module) -> bool:
    return isinstance(model, PeftModel) and hasattr(model.active_peft_config, "lora_alpha")


# ---- What was trained, and on what ----


def summary(trainer: "GRMixin", finetuned_from: str | None, dataset: str) -> str:
    model = trainer.model
    count = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    size = f"{count:,} parameters" if trainable == count else f"{count:,} parameters, {trainable:,} of them trained"
    size += _adapter(model)
    data = f" on {escape(dataset)}" if dataset else ""
    examples = count_of(trainer.train_dataset)
    seen = f" ({examples:,} training examples)" if examples else ""
    methods = list(methods_used(trainer).values())
    how = f"with {' and '.join(methods)}" if methods else "without gradient regularization"
    return f"`{name}` with {size}, {_origin(model, finetuned_from)}{data}{seen} {how}, using the library `hf_gr`."


def _origin(model: torch.nn.Module, finetuned_from: str | None) -> str:
    """What is known of the weights before training. The name in a configuration says nothing about them: a model may
    have been made from the configuration alone."""
    if base_model := hub_base_model(finetuned_from):
        return f"fine-tuned from [{escape(base_model)}](https://huggingface.co/{quote(base_model)})"
    if finetuned_from:
        return "trained from a local checkpoint"
    made_in_code = getattr(getattr(model, "config", None), "_name_or_path", None) == ""
    return "trained from scratch" if made_in_code and not isinstance(model, PeftModel) else "trained"


def _adapter(model: torch.nn.Module) -> str:
    """What the adapter is, for LoRA and its like."""
    if not isinstance(model, PeftModel):
        return ""
    config = model.active_peft_config
    if not has_lora(model):
        return f" ({config.peft_type.value})"
    layers = config.target_modules
    on = layers if isinstance(layers, str) else ", ".join(sorted(layers))
    return f" (LoRA of rank {config.r}, alpha {config.lora_alpha}, on {on})"


def evaluated_on(trainer: "GRMixin", dataset_names: list[str], split: str) -> str:
    """On what and when the last evaluation was: after a step of training, or of the best checkpoint, loaded again."""
    data = escape(" and ".join(dataset_names)) or "the evaluation set"
    where = data + (f", split `{_in_code(split)}`" if split else "") + _examples(trainer)
    history, best = trainer.state.log_history, trainer.state.best_model_checkpoint
    index = last_entry(history, "eval_")
    if trainer.args.load_best_model_at_end and best and index > last_entry(history, "train_runtime"):
        return f"{where}, with the weights of the best checkpoint ({Path(best).name})"
    return f"{where}, after step {history[index]['step']:,} of {trainer.state.max_steps:,}" if index >= 0 else where


def last_evaluation(trainer: "GRMixin") -> list[dict[str, float]]:
    """The log entries of the last evaluation; of several sets each has one of its own."""
    entries = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    data = trainer.eval_dataset if trainer.evaluated_dataset is None else trainer.evaluated_dataset
    return entries[-len(data) :] if isinstance(data, dict) else entries[-1:]


def _examples(trainer: "GRMixin") -> str:
    """How many were counted in the last evaluation; nothing where this process has seen none, or counted none."""
    data = trainer.evaluated_dataset
    counts = [entry.get("evaluated_examples") for entry in last_evaluation(trainer)]
    if data is None or None in counts:
        return ""
    names = list(data) if isinstance(data, dict) else [data if isinstance(data, str) else ""]
    shown = ", ".join(f"{escape(name)} {count:,}".strip() for name, count in zip(names, counts, strict=True))
    return f" ({shown} examples)"


# ---- The methods ----


def gr_summary(trainer: "GRMixin") -> str:
    record, segments = trainer.recorder.record, with_method(trainer, "gr_lambda")
    if not segments:
        every = "every step" if record.is_whole() else "every step that was recorded"
        return f"None: `gr_lambda` was 0, {every} used the plain gradient of the loss."
    sam = " With lambda = r this is SAM." if is_sam(trainer) else ""
    return (
        "The optimizer was given g, in which g1 is the gradient of the loss of a batch at the weights theta, and g2 "
        f"that of the same batch at theta + r g1/||g1||.{sam} So it was in {record.total('regularized_steps'):,} of "
        f"{record.total('steps'):,} steps; the others were plain, g = g1."
    )


def is_sam(trainer: "GRMixin") -> bool:
    segments = with_method(trainer, "gr_lambda")
    return bool(segments) and all(s.settings["gr_lambda"] == s.settings["gr_r"] for s in segments)


def gr_warmups(trainer: "GRMixin") -> list[str]:
    """The equations of the GR warmups that the run used."""
    names = dict.fromkeys(segment.settings["gr_warmup"] for segment in with_method(trainer, "gr_lambda"))
    return [GR_WARMUPS[name].latex for name in names]


def citations(trainer: "GRMixin") -> list[str]:
    """The BibTeX of the methods that the run used."""
    methods, optimizer = methods_used(trainer), own_optimizer(trainer)
    return [
        *([CITATION] if "gradient-regularization" in methods else []),
        *([ASCENTS["sam"].citation] if is_sam(trainer) else []),
        *([IRE.citation] if "ire" in methods else []),
        *([optimizer.citation] if optimizer is not None else []),
    ]


#: Flag -> its symbol in the equations.
SYMBOLS = {"gr_r": "r", "gr_lambda": "lambda", "gr_warmup_steps": "T_w"} | {
    f"ire_{name}": symbol for name, symbol in IRE.symbols.items()
}


def method_table(trainer: "GRMixin", degree: str) -> Rows:
    """The settings of a method that was on; its degree is shown for all steps, the others for those that it was on in.

    Args:
        degree: the flag that turns it off at 0, `gr_lambda` or `ire_kappa`.
    """
    segments = with_method(trainer, degree)
    names = dict.fromkeys(name for s in segments for name in s.settings if name.startswith(degree.split("_")[0] + "_"))
    rows: Rows = []
    for name in names:
        of = recorded(trainer) if name == degree else [s for s in segments if name in s.settings or _has_default(name)]
        unit = " steps" if name in ("gr_warmup_steps", "ire_start_step") else ""
        default = GRArguments.__dataclass_fields__[name].default
        text = over_steps(of, lambda s, n=name, d=default, u=unit: _number(s.settings.get(n, d), u))
        rows.append((name, SYMBOLS.get(name, ""), escape(text)))
    return rows


def _has_default(name: str) -> bool:
    """Whether a setting that is left out has its default, and is not one without effect."""
    return name not in ("gr_warmup_steps", "ire_gamma")


def _number(value: Any, unit: str) -> str:
    return f"{value:,}{unit}" if unit else str(value)


def ire_summary(trainer: "GRMixin") -> str:
    record, segment = trainer.recorder.record, with_method(trainer, "ire_kappa")[-1]
    settings, ire = segment.settings, trainer.ire_optimizer
    steps, acted = record.total("steps"), record.total("ire_steps")
    if not acted:
        start = settings["ire_start_step"]
        return f"IRE was to start after step {start:,}, and the run has {steps:,}: every step was the base optimizer's."
    gamma = settings.get("ire_gamma", 1)
    which = {
        "flat": f"the flat coordinates: the fraction {gamma:g} of all in which the squared gradient of the loss, "
        "with labels drawn from the model itself, is smallest",
        "inverted": "the coordinates that are not flat, as a control",
        "random": f"coordinates chosen at random, each with probability {gamma:g}, as a control",
        "uniform": "all coordinates, as a control",
    }[settings.get("ire_mask", "flat")]
    text = (
        f"In {acted:,} of {steps:,} steps the optimizer took (1 + kappa) times its step along {which}. They were "
        f"chosen {record.total('ire_choices'):,} times."
    )
    if ire is not None and ire.kappa_scale != 1:
        text += f" The loss diverged on the way, and kappa was reduced to {ire.kappa * ire.kappa_scale:g}."
    if ire is not None and (fractions := trainer.ire.flat_fractions()):
        shares = ", ".join(f"{kind} {fraction:.2f}" for kind, fraction in fractions.items())
        text += f" Share of such coordinates at the last choice: {shares}."
    return text


def optimizer_summary(trainer: "GRMixin") -> str:
    """What the equation of an optimizer of hf_gr leaves open."""
    optimizer = own_optimizer(trainer)
    if optimizer is None:
        return ""
    group, steps = optimizer.param_groups[0], trainer.state.global_step
    if "exclude_1d" not in group:
        return ""
    times_phi = ", times phi" if group.get("phi_everywhere") else ""
    what = f"took the plain step{times_phi}" if group["exclude_1d"] else "were treated like layers"
    text = f"Norms and biases {what}."
    if isinstance(optimizer, TVLARS):
        first, last = optimizer.phi(group, 1), optimizer.phi(group, steps)
        text += f" phi was {first:.4g} in the first step and {last:.4g} in the last."
    return text


def optimizer_table(trainer: "GRMixin") -> Rows:
    optimizer = own_optimizer(trainer)
    if optimizer is None:
        return []
    shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in _settings(optimizer).items()}
    return [(k, optimizer.symbols.get(k, ""), v) for k, v in shown.items()]


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Those of the first parameter group but what schedules change, which is among the hyperparameters."""
    hidden = {"params", "lr", "initial_lr", "weight_decay", "step"}
    return {k: v for k, v in optimizer.param_groups[0].items() if k not in hidden and v is not None}


# ---- The training ----


def cost(trainer: "GRMixin") -> str:
    """Steps, passes, seconds, memory, as they were counted."""
    record, segments = trainer.recorder.record, recorded(trainer)
    passes = record.total("passes") - record.total("ire_passes")
    text = (
        f"{record.total('steps'):,} optimizer steps, {passes:,.6g} forward and backward passes over a batch of "
        f"{over_steps(segments, lambda s: f'{s.batch_size:,} examples')}"
    )
    if estimates := record.total("ire_estimates"):
        share = record.total("ire_passes") / estimates
        text += f" and {estimates:,} over {'it' if share == 1 else f'{share:.4g} of it'} for IRE"
    text += f", in {trainer.recorder.seconds:,.0f} seconds, evaluations not counted"
    device = trainer.args.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = over_steps(segments, lambda s: f"{s.world_size} process{'es' if s.world_size > 1 else ''}")
    processes = "" if processes == "1 process" else f"{processes}, each on "
    memory = f"{trainer.costs()['peak_memory_bytes'] / 2**30:.2f} GiB of memory at the peak"
    return f"{text}, on {processes}{hardware}, with {memory}.{_exceptions(record)}"


def _exceptions(record: Record) -> str:
    """What did not go as in one undisturbed run."""
    text = ""
    if skipped := record.total("skipped_steps"):
        text += f" {skipped:,} steps changed nothing, because their gradient was not finite."
    if resumed := [f"{segment.first_step - 1:,}" for segment in record.segments[1:]]:
        text += f" The run was resumed after step {', '.join(resumed)}."
    for segment in record.segments:
        if not segment.is_recorded:
            steps = _steps(segment.first_step, segment.last_step)
            text += f" What was done in {steps} was not recorded: neither the settings nor the costs are known."
    return text


def optimizer_line(trainer: "GRMixin") -> str:
    if trainer.optimizer is None:
        return "not created"
    optimizer = innermost(trainer.optimizer)
    settings = ", ".join(f"{k}={v}" for k, v in _settings(optimizer).items())
    settings = "see above" if own_optimizer(trainer) is not None else settings
    text = f"`{type(optimizer).__name__}` ({settings})"
    rates = [rate for segment in recorded(trainer) for rate in segment.learning_rates if rate is not None]
    if rates:
        text += f", at a learning rate of {rates[0]:.4g} in the first step and {rates[-1]:.4g} in the last"
    if trainer.gr_args.lr_scaling != "none":
        text += f", with `learning_rate` times {trainer.layerwise.describe_lr_scaling()}"
    return text


def hyperparameters(trainer: "GRMixin", script_args: Iterable[Any]) -> list[tuple[str, str]]:
    """What was not at its default, in any of the steps. Arguments of a script that the trainer was not told of before
    it trained are those of now."""
    segments, told = recorded(trainer), trainer.script_args
    of_methods = ("gr_", "ire_")  # these have tables of their own
    names = [name for s in reversed(segments) for name in s.settings if not name.startswith(of_methods)]
    known = [f for args in (*script_args, *told, trainer.args) for f in args.__dataclass_fields__.values()]
    defaults = {argument.name: default_of(argument) for argument in known}
    late = [changed_arguments(args) for args in script_args if not any(args is other for other in told)]
    rows = {name: str(value) for arguments in late for name, value in arguments.items()}
    for name in dict.fromkeys(names):
        rows[name] = over_steps(segments, lambda s, n=name: s.settings.get(n, defaults.get(n, "its default")))
    return [(name, escape(value)) for name, value in rows.items()]


def versions(trainer: "GRMixin") -> str:
    return over_steps(recorded(trainer), lambda s: ", ".join(f"{name} {v}" for name, v in s.versions.items())) + "."


# ---- Text as it is ----


def quoted(text: str) -> str:
    """Text that ends no code block around it."""
    return text.replace("```", "` ` `")


def _in_code(text: str) -> str:
    """Text between single backticks."""
    return " ".join(text.replace("`", "'").split())


#: What Markdown would take for its own. An underscore within a word is none, nor are brackets without an address.
_MARKDOWN = re.compile(r"[\\`*|#$~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=\()|<(?=[A-Za-z/!?])")


def escape(text: Any) -> str:
    """Text that is shown as it is, in a sentence, a heading or the cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(text).split()))
