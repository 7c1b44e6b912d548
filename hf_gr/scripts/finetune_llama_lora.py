"""Fine-tune a causal language model with LoRA on instructions, with gradient regularization or AdmIRE.

    accelerate launch scripts/finetune_llama_lora.py --model_name_or_path FOLDER_OR_HUB_NAME
    accelerate launch scripts/finetune_llama_lora.py --model_name_or_path ... --gr_lambda 0 --ire_preset llama

Where hf_gr is installed, `hf-gr lora` is the same command.

Only the adapters are trained: GR perturbs only them, and IRE amplifies only their steps. The loss is that of the
answers. A recipe (YAML or JSON) may come first; flags override it, along with whatever in it contradicts them. The
default recipe is lora_alpaca.yaml.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from torch.nn import Embedding, Linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..checks import COUNT, NOT_NEGATIVE, SHARE, check_ranges
from ..cli import script
from ..cli.script import ScriptConfig
from ..cli.shipped import RECIPES
from ..cli.trainers import CausalLMTrainer
from ..data.images import keep_first
from ..data.instructions import answer_metrics, prompt_and_answer, tokenize_instructions, without_bad_examples
from ..data.text import load_text_dataset, skipped_metrics, split_documents
from ..errors import explained, extra
from ..evaluation import generate_text

with extra("scripts"):
    from datasets import Dataset
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

DEFAULT_RECIPE = RECIPES / "lora_alpaca.yaml"


@dataclass
class ModelArguments(script.ModelArguments):
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model, on the Hub or in a folder. Required."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapters of this base model to continue training. Default: new ones."}
    )
    # Existing adapters have their own values of the next four.
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters. Default: 8."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Their output is scaled by lora_alpha / lora_r. Default: 16."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on the input of the adapters. Default: 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers with adapters. Default: all linear ones but the head."}
    )
    merge_and_save: bool = field(
        default=False, metadata={"help": "Also save the base model with the adapters merged into it, in merged/."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path=None: give the base model, a folder or a name on the Hub.")
        check_ranges(self, {"lora_r": COUNT, "lora_alpha": COUNT, "lora_dropout": SHARE})
        if self.lora_target_modules is not None and not self.lora_target_modules:
            raise ValueError("lora_target_modules=[]: name at least one layer, or leave it out for all linear ones.")
        if self.adapter_name_or_path is not None:
            flags = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            script.refuse(self, flags, f"adapter_name_or_path={self.adapter_name_or_path!r}, which has its own")


@dataclass
class DataArguments(script.DataArguments):
    dataset_name: str = field(
        default="tatsu-lab/alpaca", metadata={"help": "A parquet or JSON file, a folder, or a name on the Hub."}
    )
    eval_examples: int | None = field(
        default=None,
        metadata={
            "help": "Examples of train to evaluate on, if there is no validation or test split. Default: one in 100."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens per example. Default: the model's context."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many examples."})
    generate_samples: int = field(default=20, metadata={"help": "Number of answers to generate and compare."})
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum tokens of a generated answer."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Number of tokenizing processes."})

    def __post_init__(self):
        counts = ("eval_examples", "max_length", "max_train_samples", "max_eval_samples", "max_new_tokens")
        check_ranges(self, dict.fromkeys((*counts, "preprocessing_num_workers"), COUNT))
        check_ranges(self, {"generate_samples": NOT_NEGATIVE})


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, ScriptConfig]:
    return script.parse_args((ModelArguments, DataArguments, ScriptConfig), argv, DEFAULT_RECIPE)


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    remedy = "Give a folder that a causal language model and its tokenizer were saved to, or a name on the Hub."
    with explained(f"model_name_or_path={name!r} could not be loaded", remedy):
        has_adapters = find_adapter_config_file(name) is not None
    if has_adapters:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        raise ValueError(
            f"model_name_or_path={name!r} has adapters, which would be lost. To continue training them, give "
            f"--model_name_or_path {base} --adapter_name_or_path {name}; to train new ones on top of them, give the "
            "model that they are merged into (--merge_and_save True)."
        )
    with explained(f"model_name_or_path={name!r} could not be loaded", remedy):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(name)
    rows = cast(Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"model_name_or_path={name!r}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for "
            f"{rows}. They do not belong together."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked
    return model, tokenizer


def add_adapters(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    if args.adapter_name_or_path is None:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=8 if args.lora_r is None else args.lora_r,
            lora_alpha=16 if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=0.0 if args.lora_dropout is None else args.lora_dropout,
            target_modules="all-linear" if args.lora_target_modules is None else args.lora_target_modules,
        )
        names = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear)})
        with explained(f"lora_target_modules={args.lora_target_modules}", f"The linear layers are {', '.join(names)}."):
            return get_peft_model(model, config)
    try:
        return PeftModel.from_pretrained(model, args.adapter_name_or_path, is_trainable=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"adapter_name_or_path={args.adapter_name_or_path!r} does not fit {args.model_name_or_path!r}, or is not "
            f"there ({type(error).__name__}: {str(error)[:300]}). Give the base model that it was trained on."
        ) from error


def tokens_per_example(max_length: int | None, model: PreTrainedModel) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    if max_length is None:
        return 1024 if context is None else context
    if context is not None and max_length > context:
        raise ValueError(f"max_length={max_length}: the model has a context of {context} tokens. Give at most that.")
    return max_length


class Data(NamedTuple):
    train: Dataset
    evaluation: Dataset
    eval_split: str
    questions: Dataset  # of the evaluation, as text
    counts: dict[str, int]  # examples left out, as metrics


def load_data(args: DataArguments, seed: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Data:
    skipped: Counter[str] | None = Counter() if args.skip_bad_examples else None
    dataset = load_text_dataset(args.dataset_name, args.dataset_config_name)
    dataset = without_bad_examples(dataset, skipped)
    train, questions, eval_split = split_documents(dataset, args.eval_examples, seed, flag="eval_examples")
    train = keep_first(train, args.max_train_samples, seed, "max_train_samples")
    questions = keep_first(questions, args.max_eval_samples, seed, "max_eval_samples")
    train_tokens, eval_tokens = (
        tokenize_instructions(split, tokenizer, max_length, args.preprocessing_num_workers)
        for split in (train, questions)
    )
    counts = {
        **skipped_metrics(skipped, eval_split),
        "train_examples_without_answer": len(train) - len(train_tokens),
        "eval_examples_without_answer": len(questions) - len(eval_tokens),
    }
    return Data(train_tokens, eval_tokens, eval_split, questions, counts)


def create_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: ScriptConfig, data: Data
) -> CausalLMTrainer:
    args.include_num_input_tokens_seen = "all"
    return CausalLMTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )


def evaluate_answers(trainer: CausalLMTrainer, questions: Dataset, args: DataArguments) -> dict[str, float]:
    questions = questions.select(range(min(args.generate_samples, len(questions))))
    if not len(questions):
        return {}
    metrics = answer_metrics(trainer.model, trainer.processing_class, questions, args.max_new_tokens)
    return {f"eval_{name}": value for name, value in metrics.items()}


def train(trainer: CausalLMTrainer, data: Data, args: DataArguments) -> None:
    def evaluate() -> dict[str, float]:
        metrics, answers = trainer.evaluate(), evaluate_answers(trainer, data.questions, args)
        trainer.add_to_last_evaluation(answers)
        return {**metrics, **answers}

    before = {**trainer.evaluate(), **evaluate_answers(trainer, data.questions, args)}
    script.save_metrics(trainer, "before", before, combined=False)
    metrics = script.train(trainer, data.counts, evaluate)
    if trainer.is_world_process_zero():
        print(f"Loss of the answers {before['eval_loss']:.3f} -> {metrics['eval_loss']:.3f} per token.")


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"Merged   {folder}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        base, tokenizer = load_base(str(model_args.model_name_or_path))
        model = add_adapters(base, model_args)
        max_length = tokens_per_example(data_args.max_length, base)
        with args.main_process_first(desc="preparing the data"):
            data = load_data(data_args, args.seed, tokenizer, max_length)
        trainer = create_trainer(model, tokenizer, args, data)
        sizes = f"{len(data.train):,} training examples of at most {max_length:,} tokens"
        words = f"{data_args.dataset_name}, {sizes}; {len(data.evaluation):,} to evaluate on"
        script.begin(trainer, model_args, data_args, data=words)
        train(trainer, data, data_args)
        prompt, _ = prompt_and_answer(data.questions[0], tokenizer)
        folder = script.publish(
            trainer,
            data_args.dataset_name,
            kind="Adapters",
            tasks="text-generation",
            dataset_args=data.eval_split,
            started=(__file__, argv),
            sample=(prompt, generate_text(cast(PreTrainedModel, model), tokenizer, prompt, data_args.max_new_tokens)),
        )
        if model_args.merge_and_save and trainer.is_world_process_zero():
            save_merged(model, tokenizer, folder / "merged")


if __name__ == "__main__":
    script.run(main)
