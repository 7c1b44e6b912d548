"""The model card and what the Hub reads of it, written from what the run recorded."""

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from peft import PeftModel

from ..optim import IRE
from ..optim.ascents import ASCENTS
from ..trainer.layer_statistics import PICTURE as LAYER_PICTURE
from ..trainer.layer_statistics import LayerStatisticsCallback
from . import card_text as text
from .card_usage import usage
from .plots import plot_curves

if TYPE_CHECKING:
    from ..trainer.trainer import GRMixin

TEMPLATE = Path(__file__).with_name("card_template.md")
PICTURE = "curves.png"
#: Where the Hub looks for results that go on the leaderboard of a data set.
EVAL_RESULTS = Path(".eval_results") / "hf_gr.yaml"
#: What a leaderboard is of: the first of these that was measured.
HEADLINE_METRICS = ("accuracy", "perplexity", "loss")

PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
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
    dataset_config: str | None = None,
    script_args: Iterable[Any] = (),
    sample: tuple[str, str] | None = None,
    command: str | None = None,
) -> None:
    """Write `README.md` and `curves.png` into the output folder of `trainer`, and, where the data is on the Hub,
    `.eval_results/hf_gr.yaml`.

    The arguments are those of `Trainer.create_model_card` and four more; what is left out is taken from the run or not
    mentioned.

    Args:
        dataset: the data set's name for people; `dataset_tags`, its id on the Hub; `dataset_config`, its
            configuration; `dataset_args`, its split.
        script_args: dataclasses with further arguments of the run, to be listed like those of the trainer.
        sample: a prompt, and what the model has written after it.
        command: what the run was started with.
    """
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    if has_curves(trainer):
        plot_curves(history, folder / PICTURE)
    model_name = model_name or (trainer.hub_model_id or str(folder.resolve())).rsplit("/", 1)[-1]
    task = _listed(tasks)[0] if tasks else _pipeline_tag(trainer.model)
    base_model = text.hub_base_model(finetuned_from)
    dataset_ids, dataset_names = _listed(dataset_tags), _listed(dataset) or _listed(dataset_tags)
    split = ", ".join(_listed(dataset_args))
    results = _final_metrics(trainer)
    _write_eval_results(folder, results, dataset_ids, dataset_config, split)
    methods = text.methods_used(trainer)

    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        pipeline_tag=task,
        tags=sorted({"hf_gr", "generated_from_trainer", *methods, *_listed(tags)}),
        datasets=dataset_ids or None,
        base_model=base_model,
        metrics=list(results) or None,
        model_name=model_name,
        eval_results=_eval_results(results, task, dataset_ids, dataset_names, dataset_config, split) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=text.escape(model_name),
        summary=text.summary(trainer, finetuned_from, " and ".join(dataset_names)),
        results=[(text.escape(name), f"{value:.4g}") for name, value in results.items()],
        evaluated=text.evaluated_on(trainer, dataset_names, split),
        picture=PICTURE if has_curves(trainer) else None,
        layer_picture=LAYER_PICTURE if _has_layer_statistics(trainer) else None,
        methods=list(methods),
        gr_summary=text.gr_summary(trainer),
        gr_warmups=text.gr_warmups(trainer),
        gr_table=text.method_table(trainer, "gr_lambda"),
        ascent=ASCENTS["sam"].latex,
        ire_latex=IRE.latex,
        optimizer_latex=getattr(text.own_optimizer(trainer), "latex", ""),
        citations=text.citations(trainer),
        ire_summary=text.ire_summary(trainer) if "ire" in methods else None,
        ire_table=text.method_table(trainer, "ire_kappa"),
        optimizer_summary=text.optimizer_summary(trainer),
        optimizer_table=text.optimizer_table(trainer),
        is_lora=text.has_lora(trainer.model),
        sample=text.quoted("".join(sample)) if sample is not None else None,
        usage=usage(trainer, task, model_name, base_model),
        cost=text.cost(trainer),
        command=text.quoted(command) if command else None,
        optimizer=text.optimizer_line(trainer),
        hyperparameters=text.hyperparameters(trainer, script_args),
        seed=text.over_steps(text.recorded(trainer), lambda segment: segment.settings["seed"]),
        versions=text.versions(trainer),
    )
    card.save(folder / "README.md")


def has_curves(trainer: "GRMixin") -> bool:
    """Whether there is something to draw: a picture that is there may be an earlier run's."""
    return any("loss" in entry for entry in trainer.state.log_history)


def _has_layer_statistics(trainer: "GRMixin") -> bool:
    """Whether this run, and not an earlier one in the same folder, has drawn them."""
    callbacks = trainer.callback_handler.callbacks
    return any(isinstance(callback, LayerStatisticsCallback) and callback.has_drawn for callback in callbacks)


def _listed(value: str | Iterable[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _pipeline_tag(model: torch.nn.Module) -> str | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return next((tag for suffix, tag in PIPELINE_TAGS.items() if type(inner).__name__.endswith(suffix)), None)


def _final_metrics(trainer: "GRMixin") -> dict[str, float]:
    """The last evaluation in the log: name without `eval_` -> value."""
    return {
        key.removeprefix("eval_"): value
        for entry in text.last_evaluation(trainer)
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(SPEED_METRICS)
    }


def _eval_results(
    results: dict[str, float],
    task: str | None,
    dataset_ids: list[str],
    dataset_names: list[str],
    config: str | None,
    split: str,
) -> list[EvalResult]:
    """The results as the Hub indexes them; it wants to know of which task on which of its data sets they are."""
    if not (task and dataset_ids):
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_ids[0],
            dataset_name=dataset_names[0],
            dataset_config=config,
            dataset_split=split or None,
            metric_type=name,
            metric_value=value,
        )
        for name, value in results.items()
    ]


def _write_eval_results(
    folder: Path, results: dict[str, float], dataset_ids: list[str], config: str | None, split: str
) -> None:
    """The newer form, one file with one number for one data set on the Hub; an earlier run's goes."""
    path = folder / EVAL_RESULTS
    metric = next((name for name in HEADLINE_METRICS if name in results), None)
    if metric is None or len(dataset_ids) != 1:
        path.unlink(missing_ok=True)
        return
    entry = EvalResultEntry(
        dataset_id=dataset_ids[0],
        task_id=config or "default",
        value=results[metric],
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=metric + (f", split {split}" if split else ""),
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
