"""The sentences, tables and code of the model card, each from what the run recorded. Nothing in them is typed in."""

import dataclasses
import platform
import subprocess
from collections.abc import Iterable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from .config import IREArguments
from .optimizer_training import innermost
from .optimizers import LAMB, LARS, TVLARS

if TYPE_CHECKING:
    from .ire import IRE
    from .trainer import GRMixin

#: Rows of a table: flag, symbol in the equations, value.
Rows = list[tuple[str, str, Any]]

#: Shown even at their default: without them nobody can read the rest.
ALWAYS_SHOWN = ("seed", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "weight_decay")
#: Where the run was kept, watched and published, not what it computed.
BOOKKEEPING = frozenset(
    """
    output_dir run_name project report_to disable_tqdm log_level log_level_replica log_on_each_node logging_strategy
    logging_steps logging_first_step eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps
    save_total_limit do_train do_eval do_predict resume_from_checkpoint push_to_hub label_names remove_unused_columns
    accelerator_config ddp_backend local_rank skip_memory_metrics trackio_space_id trackio_bucket_id
    trackio_static_space_id layer_statistics_steps dataset_name model_name_or_path license use_cpu dataloader_pin_memory
    """.split()  # noqa: SIM905
)
#: Flags of the Hub, and those that have a table of their own.
ELSEWHERE = ("hub_", "gr_", "ire_")
#: The optimizers of hf_gr, which have an equation on the card, and its symbols.
OWN_OPTIMIZERS = (LARS, TVLARS, LAMB)
OPTIMIZER_SYMBOLS = {
    "momentum": "m",
    "trust_coefficient": "eta",
    "tv_lambda": "lambda",
    "delay_steps": "d_e",
    "alpha": "alpha",
    "gamma_min": "gamma_min",
    "betas": "beta_1, beta_2",
    "eps": "epsilon",
}


def last_entry(history: list[dict[str, float]], start: str) -> int:
    """Index of the last log entry with a key that starts so, -1 if there is none."""
    return max((i for i, entry in enumerate(history) if any(key.startswith(start) for key in entry)), default=-1)


def hub_base_model(finetuned_from: str | None) -> str | None:
    """`finetuned_from`, if that is a name on the Hub and not a folder on somebody's disk."""
    is_name = finetuned_from and not Path(finetuned_from).exists() and finetuned_from.count("/") <= 1
    return finetuned_from if is_name else None


def own_optimizer(trainer: "GRMixin") -> torch.optim.Optimizer | None:
    """The optimizer that ran, if it is one of `OWN_OPTIMIZERS`."""
    optimizer = innermost(trainer.optimizer)
    return optimizer if isinstance(optimizer, OWN_OPTIMIZERS) else None


def methods_used(trainer: "GRMixin") -> dict[str, str]:
    """Tag -> name of the methods that the run used."""
    methods = {}
    if trainer.gr_args.gr_degree != 0:
        methods["gradient-regularization"] = "gradient regularization"
    if trainer.ire_optimizer is not None:
        methods["ire"] = "IRE"
    if (optimizer := own_optimizer(trainer)) is not None:
        name = type(optimizer).__name__
        methods[name.lower()] = name
    return methods


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
    data = f" on {dataset}" if dataset else ""
    examples = _length(trainer.train_dataset)
    seen = f" ({examples:,} training examples)" if examples else ""
    methods = list(methods_used(trainer).values())
    how = f"with {' and '.join(methods)}" if methods else "without gradient regularization"
    return f"`{name}` with {size}, {_origin(model, finetuned_from)}{data}{seen} {how}, using the library `hf_gr`."


def _origin(model: torch.nn.Module, finetuned_from: str | None) -> str:
    """What is known of the weights before training. The name in a configuration says nothing about them: a model may
    have been made from the configuration alone."""
    if base_model := hub_base_model(finetuned_from):
        return f"fine-tuned from [{base_model}](https://huggingface.co/{base_model})"
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
    data = " and ".join(dataset_names) or "the evaluation set"
    where = data + (f", split `{split}`" if split else "") + _examples(trainer)
    history, best = trainer.state.log_history, trainer.state.best_model_checkpoint
    index = last_entry(history, "eval_")
    if trainer.args.load_best_model_at_end and best and index > last_entry(history, "train_runtime"):
        return f"{where}, with the weights of the best checkpoint ({Path(best).name})"
    return f"{where}, after step {history[index]['step']:,} of {trainer.state.max_steps:,}" if index >= 0 else where


def _examples(trainer: "GRMixin") -> str:
    """How many the last evaluation was of; nothing where this process has seen none, or they cannot be counted."""
    data = trainer.evaluated_dataset
    if isinstance(data, str):
        data = {data: trainer.eval_dataset[data]}
    counts = {name: _length(part) for name, part in (data if isinstance(data, dict) else {"": data}).items()}
    if None in counts.values():
        return ""
    return f" ({', '.join(f'{name} {count:,}'.strip() for name, count in counts.items())} examples)"


def _length(dataset: Any) -> int | None:
    return getattr(dataset, "__len__", lambda: None)()


# ---- The methods ----


def gr_summary(trainer: "GRMixin") -> str:
    gr = trainer.gr_args
    if gr.gr_degree == 0:
        return "None: `gr_lambda` was 0, every step used the plain gradient of the loss."
    regularized = trainer.gr_regularized_steps(trainer.state.global_step)
    sam = " With lambda = r this is SAM." if gr.gr_degree == gr.gr_r else ""
    return (
        "The optimizer was given g, in which g1 is the gradient of the loss of a batch at the weights theta, and g2 "
        f"that of the same batch at theta + r g1/||g1||.{sam} So it was in {regularized:,} of "
        f"{trainer.state.global_step:,} steps; the others were plain, g = g1."
    )


def gr_table(trainer: "GRMixin") -> Rows:
    gr = trainer.gr_args
    rows: Rows = [("gr_r", "r", gr.gr_r), ("gr_lambda", "lambda", gr.gr_degree), ("gr_warmup", "", gr.gr_warmup)]
    if gr.gr_warmup != "none":
        rows.append(("gr_warmup_steps", "T_w", f"{trainer.gr_warmup_steps(trainer.state.max_steps):,} steps"))
    return [*rows, ("gr_scope", "", gr.gr_scope), ("gr_interval", "", gr.gr_interval)]


def ire_summary(trainer: "GRMixin", ire: "IRE") -> str:
    steps = trainer.state.global_step
    start = trainer.ire_start_step(trainer.state.max_steps)
    which = {
        "flat": f"the flat coordinates: the fraction {ire.gamma:g} of all in which the squared gradient of the loss, "
        "with labels drawn from the model itself, is smallest",
        "inverted": "the coordinates that are not flat, as a control",
        "random": f"coordinates chosen at random, each with probability {ire.gamma:g}, as a control",
        "uniform": "all coordinates, as a control",
    }[ire.mask]
    if steps <= start:
        return f"IRE was to start after step {start:,}, and the run has {steps:,}: every step was the base optimizer's."
    text = (
        f"From step {start + 1:,} to {steps:,} the optimizer took (1 + kappa) times its step along {which}. They were "
        f"chosen {ire.updates:,} times."
    )
    if ire.kappa_scale != 1:
        text += f" The loss diverged on the way, and kappa was reduced to {ire.kappa * ire.kappa_scale:g}."
    if fractions := trainer.ire_flat_fractions():
        shares = ", ".join(f"{kind} {fraction:.2f}" for kind, fraction in fractions.items())
        text += f" Share of such coordinates at the last choice: {shares}."
    return text


def ire_table(trainer: "GRMixin", ire: "IRE") -> Rows:
    flags = trainer.gr_args
    rows: Rows = [("ire_kappa", "kappa", ire.kappa)]
    if ire.mask != "uniform":
        rows.append(("ire_gamma", "gamma", ire.gamma))
    rows.append(("ire_interval", "K", flags.ire_interval))
    rows.append(("ire_start_step", "", f"{trainer.ire_start_step(trainer.state.max_steps):,} steps"))
    shown = {"ire_kappa", "ire_gamma", "ire_interval", "ire_start_step"}
    others = ((field, getattr(flags, field.name)) for field in dataclasses.fields(IREArguments))
    return rows + [(f.name, "", value) for f, value in others if f.name not in shown and value != f.default]


def optimizer_summary(trainer: "GRMixin") -> str:
    """What the equation of an optimizer of hf_gr leaves open."""
    optimizer = own_optimizer(trainer)
    if optimizer is None:
        return ""
    group, steps = optimizer.param_groups[0], trainer.state.global_step
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
    return [(k, OPTIMIZER_SYMBOLS.get(k, ""), v) for k, v in shown.items()]


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Those of the first parameter group but what schedules change, which is among the hyperparameters."""
    hidden = {"params", "lr", "initial_lr", "weight_decay", "step"}
    return {k: v for k, v in optimizer.param_groups[0].items() if k not in hidden and v is not None}


# ---- The training ----


def cost(trainer: "GRMixin") -> str:
    """Steps, passes, seconds, memory. The clock of a resumed run knows of the steps before what their log says."""
    steps = trainer.state.global_step
    passes = steps + trainer.gr_regularized_steps(steps)
    text = (
        f"{steps:,} optimizer steps, {passes:,} forward and backward passes over a batch of "
        f"{trainer.get_total_train_batch_size(trainer.args):,} examples"
    )
    ire = trainer.ire_optimizer
    if ire is not None and ire.needs_estimate:
        share = trainer.gr_args.ire_probe_fraction
        text += f" and {ire.updates:,} over {'it' if share == 1 else f'{share:g} of it'} for IRE"
    since = trainer.untimed_steps
    which = f"steps {since + 1:,} to {steps:,} in" if since else "in"
    text += f", {which} {trainer.train_seconds:,.0f} seconds, evaluations not counted"
    device = trainer.args.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = f"{trainer.args.world_size} processes, each on " if trainer.args.world_size > 1 else ""
    memory = f"{trainer.costs()['peak_memory_bytes'] / 2**30:.2f} GiB of memory at the peak"
    return f"{text}, on {processes}{hardware}, with {memory}."


def optimizer_line(trainer: "GRMixin") -> str:
    if trainer.optimizer is None:
        return "not created"
    optimizer = innermost(trainer.optimizer)
    settings = ", ".join(f"{k}={v}" for k, v in _settings(optimizer).items())
    settings = "see above" if own_optimizer(trainer) is not None else settings
    text = f"`{type(optimizer).__name__}` ({settings})"
    if trainer.gr_args.lr_scaling != "none":
        text += f", with `learning_rate` times {trainer.describe_lr_scaling()}"
    return text


def hyperparameters(arguments: Iterable[Any]) -> list[tuple[str, Any]]:
    """What differs from its default in some dataclasses, and `ALWAYS_SHOWN`. New flags appear by themselves."""
    rows = []
    for args in arguments:
        values = args.to_dict() if isinstance(args, TrainingArguments) else dataclasses.asdict(args)
        for field in dataclasses.fields(args):
            name = field.name
            if name not in values or name in BOOKKEEPING or name.startswith(ELSEWHERE):
                continue
            if name == "num_train_epochs" and values.get("max_steps", -1) > 0:
                continue  # it was not what ended the run
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = default.value if isinstance(default, Enum) else default
            differs = values[name] != default and not (_is_unset(values[name]) and _is_unset(default))
            if differs or name in ALWAYS_SHOWN:
                rows.append((name, values[name]))
    return rows


def _is_unset(value: Any) -> bool:
    """None, False and empty: `TrainingArguments.__post_init__` turns one into another."""
    return value is None or value is False or value in ("", [], {})


def versions() -> str:
    from . import __version__  # not yet there when this module is imported

    commit = _commit()
    own = f"hf_gr {__version__}" + (f" (commit {commit})" if commit else "")
    packages = ("transformers", "torch", "accelerate", "datasets", "peft")
    return f"{own}, Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages) + "."


def _commit() -> str | None:
    """Of the checkout that this package runs from, marked if its files differ from it; None where there is none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---- How to use it ----


def usage(trainer: "GRMixin", task: str | None, model_name: str, base_model: str | None) -> str | None:
    """Code that loads the model and runs it; None where nobody else could, or nobody knows how."""
    if isinstance(trainer.model, PeftModel):
        return adapter_usage(trainer.hub_model_id, task, model_name) if base_model else None
    if task is None:
        return None
    example = {"image-classification": '"image.png"'}.get(task, '"Some text"')
    where = trainer.hub_model_id or model_name
    # A model that transformers does not have is saved with its code.
    own_code = ", trust_remote_code=True" if getattr(trainer.model.config, "auto_map", None) else ""
    return (
        f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="{where}"{own_code})\n'
        f"print(model({example}))"
    )


def adapter_usage(hub_model_id: str | None, task: str | None, model_name: str) -> str | None:
    """The base model is found by the name that the adapter's configuration has."""
    if task != "text-generation":
        return None
    where = hub_model_id or model_name
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, pipeline\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        'print(pipeline("text-generation", model=model, tokenizer=tokenizer)("Some text"))'
    )


def quoted(text: str) -> str:
    """Text that ends no code block around it."""
    return text.replace("```", "` ` `")
