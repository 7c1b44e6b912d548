"""Pretrain a Llama with AdmIRE, AdamW or any other optimizer, with or without gradient regularization.

    accelerate launch scripts/pretrain_llama.py                                 # a small one, on Python's own library
    accelerate launch scripts/pretrain_llama.py --ire_kappa 0                   # the same with AdamW alone
    accelerate launch scripts/pretrain_llama.py scripts/recipes/llama_60m_wikitext103.yaml
    accelerate launch scripts/pretrain_llama.py --dataset_name FILE_FOLDER_OR_HUB_NAME --model llama-60m

A recipe (YAML or JSON) may come first; flags overrule it, and whatever in it contradicts them. Without one the recipe
is scripts/recipes/llama_tiny_python.yaml. With --dataset_name only its method (gr_*, ire_*, optim*) is used, and so it
is with a recipe that does not mention the method: the data never changes the method.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator, set_seed

from hf_gr.checks import COUNT, Limit, check_ranges
from hf_gr.cli import script
from hf_gr.cli.script import ScriptConfig
from hf_gr.cli.trainers import CausalLMTrainer, steps_for_tokens
from hf_gr.data.images import keep_first
from hf_gr.data.text import (
    features_of,
    find_text_column,
    load_text_dataset,
    pack,
    skipped_metrics,
    split_documents,
    train_tokenizer,
    without_null_documents,
)
from hf_gr.errors import explained
from hf_gr.evaluation import generate_text
from hf_gr.models.presets import LLAMA_PRESETS, create_llama

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "llama_tiny_python.yaml"


@dataclass
class ModelArguments:
    model: str = field(
        default="llama-tiny", metadata={"help": "Architecture to train from scratch.", "choices": list(LLAMA_PRESETS)}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of a checkpoint, on the Hub or in a folder. Default: one trained on the data."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the byte-level BPE that is trained on the data. Default: 4096."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per example. Default: the context of the architecture."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, as the Hub writes it: apache-2.0."}
    )

    def __post_init__(self):
        check_ranges(self, {"vocab_size": Limit(257)})
        if self.tokenizer_name is not None and self.vocab_size is not None:
            raise ValueError(
                f"vocab_size={self.vocab_size} has no effect with tokenizer_name={self.tokenizer_name!r}, which has "
                "its own. Leave one of them out."
            )
        context = LLAMA_PRESETS[self.model].context
        if self.block_size is not None and not 1 < self.block_size <= context:
            raise ValueError(
                f"block_size={self.block_size}: {self.model} has a context of {context} tokens; give 2 to {context}."
            )


@dataclass
class DataArguments:
    dataset_name: str = field(
        default="python",
        metadata={"help": "'python' (embedded), a text, parquet or JSON file, a folder, or a name on the Hub."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "Default: 'text', or the only one of strings."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as it is needed, without storing it."})
    eval_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents of train to evaluate on, if there is no validation or test split. Default: one in 100."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    skip_bad_examples: bool = field(
        default=False, metadata={"help": "Leave out, and count, examples whose text is missing (null)."}
    )
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Train on so many tokens, in place of epochs or steps."}
    )
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on this many blocks only."})
    sample_prompt: str = field(default="", metadata={"help": "What the sample of generated text begins with."})

    def __post_init__(self):
        counts = ("eval_documents", "preprocessing_num_workers", "max_train_tokens", "max_eval_blocks")
        check_ranges(self, dict.fromkeys(counts, COUNT))
        if self.streaming and self.preprocessing_num_workers is not None:
            raise ValueError(
                f"preprocessing_num_workers={self.preprocessing_num_workers} has no effect with streaming=True: a "
                "stream is tokenized as it is read. Leave one of them out."
            )


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, ScriptConfig]:
    kinds = (ModelArguments, DataArguments, ScriptConfig)
    return script.parse_args(kinds, argv, DEFAULT_RECIPE, without_it=("dataset_name",))


def create_tokenizer(args: ModelArguments, documents, text_column: str, context: int) -> PreTrainedTokenizerBase:
    if args.tokenizer_name is not None:
        remedy = "Give a folder that a tokenizer was saved to, or a name on the Hub."
        with explained(f"tokenizer_name={args.tokenizer_name!r} could not be loaded", remedy):
            return AutoTokenizer.from_pretrained(args.tokenizer_name)
    if isinstance(documents, IterableDataset):
        documents = documents.take(10_000)
    texts = (row[text_column] for row in documents.select_columns([text_column]))
    return train_tokenizer(texts, 4096 if args.vocab_size is None else args.vocab_size, context)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        train_and_publish(model_args, data_args, args, argv)


def train_and_publish(
    model_args: ModelArguments, data_args: DataArguments, args: ScriptConfig, argv: list[str]
) -> None:
    args.include_num_input_tokens_seen = "all"  # for the tokens, and tokens per second, in the log
    set_seed(args.seed)
    script.print_method(args)
    context = LLAMA_PRESETS[model_args.model].context
    block_size = context if model_args.block_size is None else model_args.block_size
    if data_args.max_train_tokens is not None:
        args.max_steps = steps_for_tokens(data_args.max_train_tokens, args, block_size)
    elif data_args.streaming and args.max_steps <= 0:
        raise ValueError("streaming=True: the length of a stream is not known. Set max_train_tokens or max_steps.")

    skipped = Counter() if data_args.skip_bad_examples else None
    with args.main_process_first(desc="preparing the data"):
        dataset = load_text_dataset(data_args.dataset_name, data_args.dataset_config_name, data_args.streaming)
        text_column = find_text_column(features_of(dataset), data_args.text_column_name)
        dataset = without_null_documents(dataset, text_column, skipped)
        train, evaluation, eval_split = split_documents(dataset, data_args.eval_documents, args.seed)
        tokenizer = create_tokenizer(model_args, train, text_column, context)
        train, evaluation = (
            pack(documents, tokenizer, text_column, block_size, data_args.preprocessing_num_workers)
            for documents in (train, evaluation)
        )
    if data_args.streaming:
        train = train.shuffle(seed=args.seed, buffer_size=1000)
        evaluation = evaluation.take(1000 if data_args.max_eval_blocks is None else data_args.max_eval_blocks)
    else:
        evaluation = keep_first(evaluation, data_args.max_eval_blocks, args.seed, "max_eval_blocks")

    trainer = CausalLMTrainer(
        model=create_llama(model_args.model, len(tokenizer), context, tokenizer.eos_token_id),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # blocks of one length need no padding
    )
    script.begin(trainer, model_args, data_args)
    result = trainer.train(resume_from_checkpoint=script.checkpoint_to_resume(args))
    script.save_model(trainer)
    counts = {} if data_args.streaming else skipped_metrics(skipped, eval_split)  # a stream has them in the log
    script.save_metrics(trainer, "train", {**result.metrics, **trainer.costs(), **counts})
    metrics = trainer.evaluate()
    script.save_metrics(trainer, "eval", metrics)
    trainer.save_state()
    sample = generate_text(trainer.model, tokenizer, data_args.sample_prompt, seed=args.seed, temperature=0.8)
    if trainer.is_world_process_zero():
        print(f"\n{data_args.sample_prompt}{sample}\n")
        print(f"Perplexity {metrics['eval_perplexity']:.2f} (loss {metrics['eval_loss']:.3f} per token).")
    script.publish(
        trainer,
        data_args.dataset_name,
        embedded={"python": "the source of Python's standard library"},
        tasks="text-generation",
        dataset_args=eval_split,
        dataset_config=data_args.dataset_config_name,
        script_args=(model_args, data_args),
        license=model_args.license,
        command=script.command_line(__file__, argv, args),
        sample=(data_args.sample_prompt, sample),
    )


if __name__ == "__main__":
    script.run(main)
