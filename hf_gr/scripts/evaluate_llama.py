"""Evaluate a causal language model, or its adapters, zero-shot.

    python scripts/evaluate_llama.py FOLDER --dataset_name questions.parquet --context_column question
    python scripts/evaluate_llama.py FOLDER --lm_eval_tasks hellaswag arc_easy      # needs `pip install lm_eval`

Where hf_gr is installed, `hf-gr evaluate` is the same command.

The first is multiple choice by log-likelihood, on any dataset with a text, a list of choices and the index of the
correct one. Results are printed and written to FOLDER/evaluation.json.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checks import COUNT, check_ranges
from ..cli import script
from ..data.images import keep_first
from ..data.text import load_text_dataset
from ..errors import explained
from ..evaluation import evaluate_multiple_choice
from ..reporting.record import read_mapping


def multiple_choice(options: argparse.Namespace) -> dict[str, float]:
    dataset = load_text_dataset(options.dataset_name, options.dataset_config_name)
    if options.split not in dataset:
        raise ValueError(f"split={options.split!r}: the dataset has {', '.join(dataset)}. Name one of these.")
    questions = keep_first(dataset[options.split], options.max_examples, 0, "max_examples")
    with explained(f"model={options.model!r} could not be loaded", "Give a folder with a model, or a name on the Hub."):
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    with explained(f"device={options.device!r} cannot be used", "Give cpu, or cuda where there is a GPU."):
        model.to(options.device)
    columns = (options.context_column, options.choices_column, options.label_column)
    return evaluate_multiple_choice(model, tokenizer, questions, *columns)


def harness(options: argparse.Namespace) -> dict:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval_tasks: the lm-evaluation-harness is not installed. Run `pip install lm_eval`.")
    import lm_eval

    adapters = Path(options.model) / "adapter_config.json"
    source = f"pretrained={options.model}"
    if adapters.is_file():
        if not (base := read_mapping(adapters).get("base_model_name_or_path")):
            raise ValueError(f"{adapters} has no base_model_name_or_path. Write the name of the base model into it.")
        source = f"pretrained={base},peft={options.model}"
    output = lm_eval.simple_evaluate(
        model="hf", model_args=source, tasks=options.lm_eval_tasks, device=options.device, limit=options.max_examples
    )
    return output["results"]


def refuse_flags_of_datasets(parser: script.ArgumentParser, options: argparse.Namespace) -> None:
    for flag in ("dataset_config_name", "split", "context_column", "choices_column", "label_column"):
        value = getattr(options, flag)
        if value != parser.get_default(flag):
            raise ValueError(f"{flag}={value!r}: no effect with --lm_eval_tasks, which have data. Leave it out.")


def main(argv: list[str] | None = None) -> None:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--dataset_name", help="a parquet or JSON file, a folder, or a name on the Hub")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="train", help="a single file is the split train")
    parser.add_argument("--context_column", default="context")
    parser.add_argument("--choices_column", default="choices")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--lm_eval_tasks", nargs="+", help="tasks of the lm-evaluation-harness")
    parser.add_argument("--max_examples", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if (options.dataset_name is None) == (options.lm_eval_tasks is None):
        raise ValueError("Give either --dataset_name or --lm_eval_tasks, one of the two.")
    if options.lm_eval_tasks is not None:
        refuse_flags_of_datasets(parser, options)
    check_ranges(options, {"max_examples": COUNT})
    results = harness(options) if options.dataset_name is None else multiple_choice(options)
    text = json.dumps(results, indent=2, default=str)
    print(text)
    if Path(options.model).is_dir():
        (Path(options.model) / "evaluation.json").write_text(text + "\n")


if __name__ == "__main__":
    script.run(main)
