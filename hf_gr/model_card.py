"""The model card, written from what the run recorded: arguments, logs, optimizer, model. Nothing in it is typed in."""

import dataclasses
import platform
import re
from collections.abc import Iterable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from transformers import TrainingArguments

from .config import IREArguments
from .ire import IRE
from .layer_statistics import PICTURE as LAYER_PICTURE
from .optimizer_training import innermost
from .plots import plot_curves

if TYPE_CHECKING:
    from .trainer import GRMixin

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PICTURE = "curves.png"

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
PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
}
#: What the optimizers of hf_gr are from.
PAPERS = {
    "LARS": '"Large Batch Training of Convolutional Networks" (You, Gitman and Ginsburg, '
    "[arXiv:1708.03888](https://arxiv.org/abs/1708.03888))",
    "TVLARS": '"Revisiting LARS for Large Batch Training Generalization of Neural Networks" (Do et al., IEEE TAI, '
    "[arXiv:2309.14053](https://arxiv.org/abs/2309.14053))",
    "LAMB": '"Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes" (You et al., ICLR 2020, '
    "[arXiv:1904.00962](https://arxiv.org/abs/1904.00962))",
}
SPEED_METRICS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "jit_compilation_time",
    "model_preparation_time",
)


def write_model_card(
    trainer: "GRMixin",
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    script_args: Iterable[Any] = (),
    sample: tuple[str, str] | None = None,
) -> None:
    """Write `README.md` and `curves.png` into the output folder of `trainer`.

    The arguments are those of `Trainer.create_model_card` and two more; what is left out is taken from the run or not
    mentioned.

    Args:
        dataset: the data set's name for people; `dataset_tags`, its id on the Hub; `dataset_args`, its split.
        script_args: dataclasses with further arguments of the run, to be listed like those of the trainer.
        sample: a prompt, and what the model has written after it.
    """
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    if any("loss" in entry for entry in history):
        plot_curves(history, folder / PICTURE)
    model_name = model_name or folder.resolve().name
    task = _listed(tasks)[0] if tasks else _pipeline_tag(trainer.model)
    base_model = _hub_base_model(finetuned_from)
    dataset_ids, dataset_names = _listed(dataset_tags), _listed(dataset) or _listed(dataset_tags)
    split = ", ".join(_listed(dataset_args))
    results = _final_metrics(history)
    gr_is_on = trainer.gr_args.gr_degree != 0
    ire = trainer.ire_optimizer
    method_tags = ["gradient-regularization"] * gr_is_on + ["ire"] * (ire is not None)
    method_tags += [name.lower() for name in _own_optimizer(trainer)]

    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        pipeline_tag=task,
        tags=sorted({"hf_gr", "generated_from_trainer", *method_tags, *_listed(tags)}),
        datasets=dataset_ids or None,
        base_model=base_model,
        metrics=list(results) or None,
        model_name=model_name,
        eval_results=_eval_results(results, task, dataset_ids, dataset_names, split) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=model_name,
        summary=_summary(trainer, _origin(trainer.model, finetuned_from), " and ".join(dataset_names)),
        results=[(name, f"{value:.4g}") for name, value in results.items()],
        evaluated=_evaluated(trainer, dataset_names, split),
        picture=PICTURE if (folder / PICTURE).is_file() else None,
        layer_picture=LAYER_PICTURE if _has_layer_statistics(trainer) else None,
        gr_summary=_gr_summary(trainer),
        gr_table=_gr_table(trainer) if gr_is_on else None,
        ire_summary=_ire_summary(trainer, ire) if ire is not None else None,
        ire_table=_ire_table(trainer, ire) if ire is not None else None,
        sample=_quoted("".join(sample)) if sample is not None else None,
        usage=_usage(trainer, task, model_name, base_model),
        cost=_cost(trainer),
        optimizer=_optimizer(trainer),
        hyperparameters=_hyperparameters([*script_args, trainer.args]),
        versions=_versions(),
    )
    card.save(folder / "README.md")


def _has_layer_statistics(trainer: "GRMixin") -> bool:
    """Whether this run, and not an earlier one in the same folder, has drawn them."""
    return trainer.gr_args.layer_statistics_steps > 0 and (Path(trainer.args.output_dir) / LAYER_PICTURE).is_file()


def _listed(value: str | Iterable[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _hub_base_model(finetuned_from: str | None) -> str | None:
    """`finetuned_from`, if that is a name on the Hub and not a folder on somebody's disk."""
    is_name = finetuned_from and not Path(finetuned_from).exists() and finetuned_from.count("/") <= 1
    return finetuned_from if is_name else None


def _origin(model: torch.nn.Module, finetuned_from: str | None) -> str:
    """What is known of the weights before training. The name in a configuration says nothing about them: a model may
    have been made from the configuration alone."""
    if base_model := _hub_base_model(finetuned_from):
        return f"fine-tuned from [{base_model}](https://huggingface.co/{base_model})"
    if finetuned_from:
        return "trained from a local checkpoint"
    made_in_code = getattr(getattr(model, "config", None), "_name_or_path", None) == ""
    return "trained from scratch" if made_in_code and not isinstance(model, PeftModel) else "trained"


def _pipeline_tag(model: torch.nn.Module) -> str | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return next((tag for suffix, tag in PIPELINE_TAGS.items() if type(inner).__name__.endswith(suffix)), None)


def _last(history: list[dict[str, float]], start: str) -> int:
    """Index of the last log entry with a key that starts so, -1 if there is none."""
    return max((i for i, entry in enumerate(history) if any(key.startswith(start) for key in entry)), default=-1)


def _final_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The last evaluation in the log: name without `eval_` -> value."""
    index = _last(history, "eval_")
    if index < 0:
        return {}
    return {
        key.removeprefix("eval_"): value
        for key, value in history[index].items()
        if key.startswith("eval_") and not key.endswith(SPEED_METRICS)
    }


def _eval_results(
    results: dict[str, float], task: str | None, dataset_ids: list[str], dataset_names: list[str], split: str
) -> list[EvalResult]:
    """The results as the Hub indexes them; it wants to know of which task on which data they are."""
    if not (task and dataset_names):
        return []
    return [
        EvalResult(
            task_type=task,
            # An id is wanted here, also of data that is not on the Hub.
            dataset_type=dataset_ids[0] if dataset_ids else re.sub(r"\W+", "-", dataset_names[0].lower()),
            dataset_name=dataset_names[0],
            dataset_split=split or None,
            metric_type=name,
            metric_value=value,
        )
        for name, value in results.items()
    ]


def _summary(trainer: "GRMixin", origin: str, dataset: str) -> str:
    model = trainer.model
    count = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    size = f"{count:,} parameters" if trainable == count else f"{count:,} parameters, {trainable:,} of them trained"
    size += _adapter(model)
    data = f" on {dataset}" if dataset else ""
    examples = getattr(trainer.train_dataset, "__len__", lambda: None)()
    seen = f" ({examples:,} training examples)" if examples else ""
    methods = ["gradient regularization"] * (trainer.gr_args.gr_degree != 0)
    methods += ["IRE"] * (trainer.ire_optimizer is not None)
    methods += _own_optimizer(trainer)
    how = f"with {' and '.join(methods)}" if methods else "without gradient regularization"
    return f"`{name}` with {size}, {origin}{data}{seen} {how}, using the library `hf_gr`."


def _adapter(model: torch.nn.Module) -> str:
    """What the adapter is, for LoRA and its like."""
    if not isinstance(model, PeftModel):
        return ""
    config = model.active_peft_config
    if not hasattr(config, "lora_alpha"):
        return f" ({config.peft_type.value})"
    layers = config.target_modules
    on = layers if isinstance(layers, str) else ", ".join(sorted(layers))
    return f" (LoRA of rank {config.r}, alpha {config.lora_alpha}, on {on})"


def _evaluated(trainer: "GRMixin", dataset_names: list[str], split: str) -> str:
    """On what and when the last evaluation was: after a step of training, or of the best checkpoint, loaded again."""
    data = " and ".join(dataset_names) or "the evaluation set"
    several = isinstance(trainer.eval_dataset, dict)
    examples = None if several else getattr(trainer.eval_dataset, "__len__", lambda: None)()
    where = data + (f", split `{split}`" if split else "") + (f" ({examples:,} examples)" if examples else "")
    history, best = trainer.state.log_history, trainer.state.best_model_checkpoint
    index = _last(history, "eval_")
    if trainer.args.load_best_model_at_end and best and index > _last(history, "train_runtime"):
        return f"{where}, with the weights of the best checkpoint ({Path(best).name})"
    return f"{where}, after step {history[index]['step']:,} of {trainer.state.max_steps:,}" if index >= 0 else where


def _gr_summary(trainer: "GRMixin") -> str:
    gr = trainer.gr_args
    if gr.gr_degree == 0:
        return "None: `gr_lambda` was 0, every step used the plain gradient of the loss."
    regularized = trainer.gr_regularized_steps(trainer.state.global_step)
    sam = " With lambda = r this is SAM." if gr.gr_degree == gr.gr_r else ""
    return (
        "The optimizer was given (1 - lambda/r) g1 + (lambda/r) g2, where g1 is the gradient at the weights theta and "
        f"g2 the gradient of the same batch at theta + r g1/||g1||.{sam} It did so in {regularized:,} of "
        f"{trainer.state.global_step:,} steps; the others were plain."
    )


def _gr_table(trainer: "GRMixin") -> list[tuple[str, str, Any]]:
    gr = trainer.gr_args
    rows = [("gr_r", "r", gr.gr_r), ("gr_lambda", "lambda", gr.gr_degree), ("gr_warmup", "", gr.gr_warmup)]
    if gr.gr_warmup != "none":
        rows.append(("gr_warmup_steps", "T_w", f"{trainer.gr_warmup_steps(trainer.state.max_steps):,} steps"))
    return [*rows, ("gr_scope", "", gr.gr_scope), ("gr_interval", "", gr.gr_interval)]


def _ire_summary(trainer: "GRMixin", ire: IRE) -> str:
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


def _ire_table(trainer: "GRMixin", ire: IRE) -> list[tuple[str, str, Any]]:
    flags = trainer.gr_args
    rows = [("ire_kappa", "kappa", ire.kappa)]
    if ire.mask != "uniform":
        rows.append(("ire_gamma", "gamma", ire.gamma))
    rows.append(("ire_interval", "K", flags.ire_interval))
    rows.append(("ire_start_step", "", f"{trainer.ire_start_step(trainer.state.max_steps):,} steps"))
    shown = {"ire_kappa", "ire_gamma", "ire_interval", "ire_start_step"}
    others = ((field, getattr(flags, field.name)) for field in dataclasses.fields(IREArguments))
    return rows + [(f.name, "", value) for f, value in others if f.name not in shown and value != f.default]


def _quoted(text: str) -> str:
    """Text that ends no code block around it."""
    return text.replace("```", "` ` `")


def _usage(trainer: "GRMixin", task: str | None, model_name: str, base_model: str | None) -> str | None:
    if isinstance(trainer.model, PeftModel):
        return _adapter_usage(trainer, task, model_name) if base_model else None
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


def _adapter_usage(trainer: "GRMixin", task: str | None, model_name: str) -> str | None:
    """The base model is found by the name that the adapter's configuration has."""
    if task != "text-generation":
        return None
    where = trainer.hub_model_id or model_name
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, pipeline\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        'print(pipeline("text-generation", model=model, tokenizer=tokenizer)("Some text"))'
    )


def _cost(trainer: "GRMixin") -> str:
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


def _own_optimizer(trainer: "GRMixin") -> list[str]:
    """The class of the optimizer that ran, if it is one of `PAPERS`."""
    name = type(innermost(trainer.optimizer)).__name__
    return [name] if name in PAPERS else []


def _optimizer(trainer: "GRMixin") -> str:
    """The optimizer that ran, with the settings of its first parameter group; those that schedules change are left to
    the table of hyperparameters, and IRE has a section of its own."""
    if trainer.optimizer is None:
        return "not created"
    optimizer = innermost(trainer.optimizer)
    hidden = {"params", "lr", "initial_lr", "weight_decay", "step"}
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in hidden and v is not None}
    text = f"`{type(optimizer).__name__}` ({', '.join(f'{k}={v}' for k, v in settings.items())})"
    if trainer.gr_args.lr_scaling != "none":
        text += f", with `learning_rate` times {trainer.describe_lr_scaling()}"
    return text + "".join(f", from {PAPERS[name]}" for name in _own_optimizer(trainer))


def _hyperparameters(arguments: Iterable[Any]) -> list[tuple[str, Any]]:
    """What differs from its default in some dataclasses, and `ALWAYS_SHOWN`. New flags appear by themselves."""
    rows = []
    for args in arguments:
        values = args.to_dict() if isinstance(args, TrainingArguments) else dataclasses.asdict(args)
        for field in dataclasses.fields(args):
            name = field.name
            if name not in values or name in BOOKKEEPING or name.startswith(ELSEWHERE):
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = default.value if isinstance(default, Enum) else default
            differs = values[name] != default and not (_is_unset(values[name]) and _is_unset(default))
            if differs or name in ALWAYS_SHOWN:
                rows.append((name, values[name]))
    return rows


def _is_unset(value: Any) -> bool:
    """None, False and empty: `TrainingArguments.__post_init__` turns one into another."""
    return value is None or value is False or value in ("", [], {})


def _versions() -> str:
    from . import __version__  # not yet there when this module is imported

    packages = ("transformers", "torch", "accelerate", "datasets", "peft")
    return (
        f"hf_gr {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + "."
    )
