"""A causal language modeling script with the structure of the transformers examples, training with a plain `Trainer`.

`test_swap.py` replaces the two class names and nothing else.
"""

import math
import os
import sys
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    config_name: str = field(metadata={"help": "Folder with the configuration of the model."})
    tokenizer_name: str = field(metadata={"help": "Folder with the tokenizer."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "Text to train on."})
    validation_file: str = field(metadata={"help": "Text to evaluate on."})
    block_size: int = field(default=16, metadata={"help": "Tokens per example."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    raw = load_dataset("text", data_files={"train": data_args.train_file, "validation": data_args.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_args.config_name))

    def group_texts(examples):
        tokens = list(chain(*tokenizer(examples["text"])["input_ids"]))
        length = len(tokens) // data_args.block_size * data_args.block_size
        blocks = [tokens[i : i + data_args.block_size] for i in range(0, length, data_args.block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    with training_args.main_process_first(desc="grouping texts together"):
        datasets = raw.map(group_texts, batched=True, remove_columns=["text"])

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"] if training_args.do_train else None,
        eval_dataset=datasets["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = train_result.metrics
        metrics["train_samples"] = len(datasets["train"])
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    kwargs = {"tasks": "text-generation", "dataset": "a test text"}
    if training_args.push_to_hub:
        trainer.push_to_hub(**kwargs)
    else:
        trainer.create_model_card(**kwargs)


if __name__ == "__main__":
    main()
