"""Fine-tune a causal language model with LoRA on instructions, with AdmIRE, gradient regularization or neither.

    accelerate launch scripts/finetune_llama_lora.py --model_name_or_path FOLDER_OR_HUB_NAME
    accelerate launch scripts/finetune_llama_lora.py --model_name_or_path ... --gr_lambda 0 --ire_preset llama

Only the adapters are trained: GR perturbs them alone, and IRE amplifies their steps alone. The loss is that of the
answers. A recipe (YAML or JSON) may come first; flags overrule it, and whatever in it contradicts them. Without one the
recipe is scripts/recipes/lora_alpaca.yaml.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import find_adapter_config_file

from hf_gr.checks import COUNT, NOT_NEGATIVE, SHARE, check_ranges
from hf_gr.cli import script
from hf_gr.cli.script import ScriptConfig
from hf_gr.cli.trainers import CausalLMTrainer
from hf_gr.data.images import keep_first
from hf_gr.data.instructions import answer_metrics, prompt_and_answer, tokenize_instructions, without_bad_examples
from hf_gr.data.text import load_text_dataset, skipped_metrics, split_documents
from hf_gr.errors import explained
from hf_gr.evaluation import generate_text

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "lora_alpaca.yaml"


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model, on the Hub or in a folder. There is no default."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapters to go on from, of this base model. Default: new ones."}
    )
    # Adapters that are there bring their own values of the next four.
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters. Default: 8."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Their output is scaled by lora_alpha / lora_r. Default: 16."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on the input of the adapters. Default: 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters. Default: all linear ones but the head."}
    )
    merge_and_save: bool = field(
        default=False, metadata={"help": "Save the base model with the adapters merged into it, too, in merged/."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, as the Hub writes it: apache-2.0."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path=None: give the base model, a folder or a name on the Hub.")
        check_ranges(self, {"lora_r": COUNT, "lora_alpha": COUNT, "lora_dropout": SHARE})
        if self.lora_target_modules is not None and not self.lora_target_modules:
            raise ValueError("lora_target_modules=[]: name at least one layer, or leave it out for all linear ones.")
        if self.adapter_name_or_path is None:
            return
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} has no effect with adapter_name_or_path={self.adapter_name_or_path!r}, which has "
                    "its own. Leave one of them out."
                )


@dataclass
class DataArguments:
    dataset_name: str = field(
        default="tatsu-lab/alpaca", metadata={"help": "A parquet or JSON file, a folder, or a name on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    eval_examples: int | None = field(
        default=None,
        metadata={
            "help": "Examples of train to evaluate on, if there is no validation or test split. Default: one in 100."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens per example. Default: the model's context."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many examples only."})
    generate_samples: int = field(default=20, metadata={"help": "Write and compare the answers of so many of them."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of an answer that is written."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    skip_bad_examples: bool = field(
        default=False, metadata={"help": "Leave out, and count, examples whose text is missing (null)."}
    )

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
            f"model_name_or_path={name!r} has adapters, which would be lost. To go on training them, give "
            f"--model_name_or_path {base} --adapter_name_or_path {name}; to train new ones on top of them, give the "
            "model that they are merged into (--merge_and_save True)."
        )
    with explained(f"model_name_or_path={name!r} could not be loaded", remedy):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(name)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"model_name_or_path={name!r}: its tokenizer has {len(tokenizer)} tokens, and the model embeddings for "
            f"{rows}. They do not belong together."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
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


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        train_and_publish(model_args, data_args, args, argv)


def train_and_publish(
    model_args: ModelArguments, data_args: DataArguments, args: ScriptConfig, argv: list[str]
) -> None:
    args.include_num_input_tokens_seen = "all"
    set_seed(args.seed)
    script.print_method(args)

    base, tokenizer = load_base(model_args.model_name_or_path)
    model = add_adapters(base, model_args)
    context = getattr(base.config, "max_position_embeddings", None)
    max_length = data_args.max_length
    if max_length is None:
        max_length = 1024 if context is None else context
    if context is not None and max_length > context:
        raise ValueError(f"max_length={max_length}: the model has a context of {context} tokens. Give at most that.")

    skipped = Counter() if data_args.skip_bad_examples else None
    with args.main_process_first(desc="preparing the data"):
        dataset = load_text_dataset(data_args.dataset_name, data_args.dataset_config_name)
        dataset = without_bad_examples(dataset, skipped)
        train, evaluation, eval_split = split_documents(
            dataset, data_args.eval_examples, args.seed, flag="eval_examples"
        )
        train = keep_first(train, data_args.max_train_samples, args.seed, "max_train_samples")
        evaluation = keep_first(evaluation, data_args.max_eval_samples, args.seed, "max_eval_samples")
        train_tokens, eval_tokens = (
            tokenize_instructions(split, tokenizer, max_length, data_args.preprocessing_num_workers)
            for split in (train, evaluation)
        )
    counts = {
        **skipped_metrics(skipped, eval_split),
        "train_examples_without_answer": len(train) - len(train_tokens),
        "eval_examples_without_answer": len(evaluation) - len(eval_tokens),
    }
    trainer = CausalLMTrainer(
        model=model,
        args=args,
        train_dataset=train_tokens,
        eval_dataset=eval_tokens,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    script.begin(trainer, model_args, data_args)

    asked = evaluation.select(range(min(data_args.generate_samples, len(evaluation))))

    def written() -> dict[str, float]:
        if not len(asked):
            return {}
        return {f"eval_{k}": v for k, v in answer_metrics(model, tokenizer, asked, data_args.max_new_tokens).items()}

    before = {**trainer.evaluate(), **written()}
    script.save_metrics(trainer, "before", before, combined=False)
    result = trainer.train(resume_from_checkpoint=script.checkpoint_to_resume(args))
    script.save_model(trainer)
    script.save_metrics(trainer, "train", {**result.metrics, **trainer.costs(), **counts})
    metrics, answers = trainer.evaluate(), written()
    trainer.add_to_last_evaluation(answers)
    script.save_metrics(trainer, "eval", {**metrics, **answers})
    trainer.save_state()

    prompt, _ = prompt_and_answer(evaluation[0], tokenizer)
    if trainer.is_world_process_zero():
        print(f"Loss of the answers {before['eval_loss']:.3f} -> {metrics['eval_loss']:.3f} per token.")
    folder = script.publish(
        trainer,
        data_args.dataset_name,
        kind="Adapters",
        tasks="text-generation",
        dataset_args=eval_split,
        dataset_config=data_args.dataset_config_name,
        finetuned_from=model_args.model_name_or_path,
        script_args=(model_args, data_args),
        license=model_args.license,
        command=script.command_line(__file__, argv, args),
        sample=(prompt, generate_text(model, tokenizer, prompt, data_args.max_new_tokens)),
    )
    if model_args.merge_and_save and trainer.is_world_process_zero():
        model.merge_and_unload().save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
        print(f"Merged   {folder / 'merged'}")


if __name__ == "__main__":
    script.run(main)
