"""Bad inputs of the scripts for text: each ends in one line that names flag, value and what to do, before training."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig

from helpers import toys
from helpers.scripts import check, load_script
from hf_gr.data.text import train_tokenizer

NAN, WHOLE, NUMBER = "nan", "Give a whole number", "Give a number"


def flags(name: str, values: str, reason: str) -> list[tuple[str, ...]]:
    """Cases of one flag: each of `values` is named, and `reason` is what to do."""
    return [(f"--{name} {value}", f"{name}={'' if value == NAN else value[0]}", reason) for value in values.split()]


#: What every training script refuses.
SHARED = [
    *flags("per_device_train_batch_size", "0 -1", "at least 1"),
    *flags("per_device_eval_batch_size", "0", "at least 1"),
    *flags("gradient_accumulation_steps", "0 -2", "at least 1"),
    *flags("num_train_epochs", "0 -1 nan inf", "more than 0"),
    *flags("max_steps", "0 -5", "at least 1"),
    *flags("learning_rate", "-1 nan inf", "at least 0"),
    *flags("weight_decay", "-1 nan", "at least 0"),
    *flags("adam_beta1", "1 -0.1 nan", "below 1"),
    *flags("adam_beta2", "1.5", "below 1"),
    *flags("adam_epsilon", "-1 nan", "at least 0"),
    *flags("max_grad_norm", "-1 nan", "at least 0"),
    *flags("warmup_steps", "-3 nan inf", "at least 0"),
    *flags("label_smoothing_factor", "1 -0.1", "below 1"),
    *flags("logging_steps", "0 -1", "more than 0"),
    *flags("eval_steps", "0", "more than 0"),
    *flags("save_steps", "0", "more than 0"),
    *flags("save_total_limit", "0", "at least 1"),
    *flags("seed", "-1", "at least 0"),
    *flags("data_seed", "-1", "at least 0"),
    *flags("dataloader_num_workers", "-1", "at least 0"),
    *flags("neftune_noise_alpha", "-1", "at least 0"),
    *flags("gr_r", "0 -1 nan inf", "must be > 0"),
    *flags("gr_lambda", "-1 nan inf", "must be >= 0"),
    *flags("gr_warmup_steps", "-3 1.5 nan", "give a whole number of steps, or a fraction"),
    *flags("gr_interval", "0 -1", "at least 1"),
    *flags("ire_kappa", "-1 nan inf", "must be >= 0"),
    *flags("ire_gamma", "0 1.5 nan", "in (0, 1]"),
    *flags("ire_interval", "0", "at least 1"),
    *flags("ire_start_step", "-1 1.5 nan", "give a whole number of steps, or a fraction"),
    *flags("ire_probe_fraction", "0 2 nan", "in (0, 1]"),
    *flags("ire_beta", "1 -0.1 nan", "in [0, 1)"),
    *flags("ire_guard", "1 0.5 -1 nan inf", "more than 1"),
    *flags("layer_statistics_steps", "-1", "0 (off)"),
    ("--learning_rate abc", "--learning_rate", "'abc'", NUMBER),
    ("--gr_r 0,1", "--gr_r", "'0,1'", NUMBER),
    ("--gr_interval 1.5", "--gr_interval", "'1.5'", WHOLE),
    ("--seed 1.5", "--seed", "'1.5'", WHOLE),
    ("--gr_warmup foo", "--gr_warmup", "'foo'", "choose from"),
    ("--gr_scope world", "--gr_scope", "'world'", "choose from"),
    ("--gr_on_nonfinite ignore", "--gr_on_nonfinite", "'ignore'", "choose from"),
    ("--ire_preset gpt", "--ire_preset", "'gpt'", "choose from"),
    ("--ire_mask sharp", "--ire_mask", "'sharp'", "choose from"),
    ("--ire_scope layer", "--ire_scope", "'layer'", "choose from"),
    ("--ire_kappa_schedule cosine", "--ire_kappa_schedule", "'cosine'", "choose from"),
    ("--optim adam_w", "--optim", "'adam_w'", "choose from"),
    ("--lr_scheduler_type cos", "--lr_scheduler_type", "'cos'", "choose from"),
    ("--lr_scaling cubic", "--lr_scaling", "'cubic'", "choose from"),
    ("--lr_scheduler_kwargs {", "lr_scheduler_kwargs='{'", "give a JSON object"),
    ("--lr_scheduler_kwargs 5", "lr_scheduler_kwargs='5'", "give a JSON object"),
    ("--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr_rat\": 0.1}'",
     "lr_scheduler_kwargs={'min_lr_rat': 0.1}", "min_lr_rate", "leave it out"),
    ("--lr_scheduler_type linear --lr_scheduler_kwargs '{\"power\": 2}'",
     "lr_scheduler_kwargs={'power': 2}", "leave it out"),
    ("--eval_strategy sometimes", "--eval_strategy", "'sometimes'", "choose from"),
    ("--optim tvlars --lr_scheduler_type time_varying", "lr_scheduler_type='time_varying'", "Set"),
    ("--max_steps 3 --num_train_epochs 2", "max_steps=3", "num_train_epochs=2.0", "Leave one of them out"),
    ("--gr-lamda 0", "--gr-lamda", "Did you mean --gr_lambda?"),
    ("--max_step 3", "--max_step", "Did you mean --max_steps?"),
    ("--gr_r", "--gr_r", "Write the value after the flag"),
    ("stray", "'stray'", "Write --FLAG VALUE"),
    ("@none.yaml", "none.yaml", "there is no such file", "Give the path of one"),
    ("@list.yaml", "list.yaml", "FLAG: VALUE"),
    ("@word.yaml", "word.yaml", "FLAG: VALUE"),
    ("@malformed.yaml", "malformed.yaml", "Give a YAML or JSON file"),
    ("@malformed.json", "malformed.json", "Give a YAML or JSON file"),
    ("@binary.yaml", "binary.yaml", "Give a YAML or JSON file"),
    ("@twice.yaml", "twice.yaml", "gr_r", "twice"),
]  # fmt: skip

#: Flags of a recipe, which are not parsed as those of the command line are.
RECIPES = [
    ({"gr_radius": 0.1}, "gr_radius", "see --help"),
    ({1: 2}, "unknown flag 1", "see --help"),
    ({"gr_lambda": True}, "gr_lambda=True", "give a number"),
    ({"gr_r": [0.1]}, "gr_r=[0.1]", "give a number"),
    ({"gr_r": {"a": 1}}, "gr_r={'a': 1}", "give a number"),
    ({"gr_r": "big"}, "--gr_r", "'big'", NUMBER),
    ({"gr_r": None}, "gr_r=None", "give a number"),
    ({"gr_interval": 1.5}, "gr_interval=1.5", "give a whole number"),
    ({"gr_warmup": "slow"}, "gr_warmup='slow'", "choose one of none"),
    ({"gr_warmup": None}, "gr_warmup=None", "choose one of none"),
    ({"ire_exclude": "embed"}, "ire_exclude='embed'", "give a list"),
    ({"ire_amplify_weight_decay": 1}, "ire_amplify_weight_decay=1", "give true or false"),
    ({"ire_kappa": False}, "ire_kappa=False", "give a number"),
    ({"optim": "adam_w"}, "optim='adam_w'", "choose one of"),
    ({"warmup_steps": True}, "warmup_steps=True", "give a number"),
    ({"max_steps": True}, "max_steps=True", "give a whole number"),
    ({"max_steps": 2.5}, "max_steps=2.5", "give a whole number"),
    ({"learning_rate": None}, "learning_rate=None", "give a number"),
    ({"learning_rate": float("nan")}, "learning_rate=nan", "at least 0"),
    ({"save_strategy": False}, "save_strategy=False", 'write "no" in quotes'),
    ({"eval_strategy": "sometimes"}, "eval_strategy='sometimes'", "give"),
    ({"dataset_name": 2024}, "dataset_name=2024", "give a text"),
    ({"hub_model_id": True}, "hub_model_id=True", "give a text"),
    ({"max_steps": 3, "num_train_epochs": 2}, "max_steps=3", "num_train_epochs=2", "Leave one of them out"),
]

PRETRAIN = [
    *flags("vocab_size", "0 -1 256", "at least 257"),
    *flags("block_size", "0 1 -5 512", "give 2 to 256"),
    *flags("eval_documents", "0 -1", "at least 1"),
    *flags("preprocessing_num_workers", "0 -1", "at least 1"),
    *flags("max_train_tokens", "0 -5", "at least 1"),
    *flags("max_eval_blocks", "0 -1", "at least 1"),
    ("--model llama-7b", "--model", "'llama-7b'", "choose from"),
    ("--streaming maybe", "--streaming", "maybe"),
    ("--streaming True --dataset_name @good.txt", "streaming=True", "Set max_train_tokens or max_steps"),
    ("--streaming True --preprocessing_num_workers 2", "preprocessing_num_workers=2", "Leave one of them out"),
    ("--streaming True --max_steps 2 --dataset_name @null.parquet --eval_documents 1",
     "row 1", "'text'", "--skip_bad_examples"),
    ("--tokenizer_name gpt2 --vocab_size 300", "vocab_size=300", "Leave one of them out"),
    ("--tokenizer_name @none --dataset_name @good.txt", "tokenizer_name=", "/none'", "Give a folder"),
    ("--tokenizer_name @good.txt --dataset_name @good.txt", "tokenizer_name=", "good.txt'", "Give a folder"),
    ("--max_train_tokens 5 --max_steps 2", "max_train_tokens=5", "max_steps=2", "Leave one of them out"),
    ("--gr_r 0.1", "gr_r=0.1", "gr_lambda=0", "Give gr_lambda"),
    ("--gr_warmup r", "gr_warmup=r", "gr_lambda=0", "Give gr_lambda"),
    ("--dataset_name @none.txt", "dataset_name=", "none.txt'", "Give 'python'"),
    ("--dataset_name @none", "dataset_name=", "/none'", "Give 'python'"),
    ("--dataset_name @empty", "dataset_name=", "/empty'", "Give 'python'"),
    ("--dataset_name @empty.txt", "dataset_name=", "empty.txt'", "Give 'python'"),
    ("--dataset_name @blank.txt", "train", "ive "),
    ("--dataset_name @binary.txt", "dataset_name=", "binary.txt'", "Give 'python'"),
    ("--dataset_name @broken.parquet", "dataset_name=", "broken.parquet'", "Give 'python'"),
    ("--dataset_name @broken.json", "dataset_name=", "broken.json'", "Give 'python'"),
    ("--dataset_name @good.txt --dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("--dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("--dataset_name @test-only", "'train'", "test", "Name the files"),
    ("--dataset_name @good.txt --text_column_name body", "text_column_name='body'", "Name one of these"),
    ("--dataset_name @number.parquet", "text_column_name='text'", "int64", "Give other data"),
    ("--dataset_name @all-null.parquet", "text_column_name='text'", "null", "Give other data"),
    ("--dataset_name @number.parquet --text_column_name text", "text_column_name='text'", "Give other data"),
    ("--dataset_name @two.parquet", "no column 'text'", "title, body", "--text_column_name"),
    ("--dataset_name @year.parquet", "No column", "year", "Give other data"),
    ("--dataset_name @null.parquet", "split 'train', row 1", "'text'", "--skip_bad_examples"),
    ("--dataset_name @two.parquet --text_column_name body", "split 'train', row 0", "'body'", "--skip_bad_examples"),
    ("--dataset_name @one.parquet", "eval_documents=None", "1 documents", "Give more data"),
    ("--dataset_name @good.txt --eval_documents 999", "eval_documents=999", "Give more data"),
    ("--dataset_name @small.txt --tokenizer_name @base --block_size 250", "block_size=250", "smaller block_size"),
]  # fmt: skip

LORA = [
    *flags("lora_r", "0 -1", "at least 1"),
    *flags("lora_alpha", "0 -1", "at least 1"),
    *flags("lora_dropout", "1 -0.1 nan", "below 1"),
    *flags("max_length", "0 -1", "at least 1"),
    *flags("eval_examples", "0 -3", "at least 1"),
    *flags("max_train_samples", "0", "at least 1"),
    *flags("max_eval_samples", "-1", "at least 1"),
    *flags("generate_samples", "-1", "at least 0"),
    *flags("max_new_tokens", "0", "at least 1"),
    *flags("preprocessing_num_workers", "0", "at least 1"),
    ("--lora_r 1.5", "--lora_r", "'1.5'", WHOLE),
    ("--lora_target_modules nope", "lora_target_modules=['nope']", "The linear layers are"),
    ("--max_length 9999", "max_length=9999", "Give at most that"),
    ("--max_length 10", "max_length=10", "Raise it"),
    ("--model_name_or_path @none", "model_name_or_path=", "/none'", "Give a folder"),
    ("--model_name_or_path @empty", "model_name_or_path=", "/empty'", "Give a folder"),
    ("--model_name_or_path @without-tokenizer", "model_name_or_path=", "tokenizer'", "Give a folder"),
    ("--model_name_or_path @adapter", "model_name_or_path=", "adapter'", "--adapter_name_or_path"),
    ("--model_name_or_path @mismatch", "model_name_or_path=", "mismatch'", "do not belong together"),
    ("--adapter_name_or_path @none", "adapter_name_or_path=", "/none'", "Give the base model"),
    ("--adapter_name_or_path @adapter --lora_r 4", "lora_r=4", "Leave one of them out"),
    ("--dataset_name @good.txt", "columns text", "It needs 'instruction' and 'output'"),
    ("--dataset_name @none.parquet", "dataset_name=", "none.parquet'", "Give 'python'"),
    ("--dataset_name @null-instruction.json", "split 'train', row 2", "'instruction'", "--skip_bad_examples"),
    ("--dataset_name @null-output.json", "split 'train', row 2", "'output'", "--skip_bad_examples"),
    ("--dataset_name @number-output.json", "'output'", "int64", "Write its values as strings"),
    ("--dataset_name @all-null-output.json", "'output'", "null", "Write its values as strings"),
    ("--dataset_name @empty-outputs.json", "max_length=", "look at the data"),
    ("--dataset_name @good.json --eval_examples 999", "eval_examples=999", "Give more data"),
    ("--dataset_name @chat-null.json", "split 'train', row 2", "'messages'", "--skip_bad_examples"),
    ("--dataset_name @chat-content.json", "split 'train', row 2", "'content' in message 1", "--skip_bad_examples"),
    ("--dataset_name @chat-user.json", "split 'train', row 2", "ends with a message of the 'user'", "--skip_bad"),
    ("--dataset_name @chat-short.json", "split 'train', row 2", "has 1 messages", "--skip_bad_examples"),
    ("--dataset_name @chat-text.json", "split 'train', row 0", "not a list", "Fix or remove"),
    ("--dataset_name @chat.json", "no chat template", "Set tokenizer.chat_template"),
]

EVALUATE = [
    *flags("max_examples", "0 -1", "at least 1"),
    ("", "--dataset_name", "--lm_eval_tasks", "one of the two"),
    ("--dataset_name @questions.json --lm_eval_tasks arc", "--dataset_name", "--lm_eval_tasks", "one of the two"),
    ("--lm_eval_tasks arc_easy --dataset_name @none.json --split x", "--dataset_name", "one of the two"),
    ("--dataset_name @none.json", "dataset_name=", "none.json'", "Give 'python'"),
    ("--dataset_name @questions.json --split test", "split='test'", "Name one of these"),
    ("--dataset_name @questions.json --max_examples many", "--max_examples", "'many'", WHOLE),
    ("--dataset_name @questions.json --device warp", "device='warp'", "Give cpu"),
    ("--dataset_name @questions.json --choices_column options", "choices_column='options'", "Name one of these"),
    ("--dataset_name @questions.json --context_column q", "context_column='q'", "Name one of these"),
    ("--dataset_name @questions.json --label_column gold", "label_column='gold'", "Name one of these"),
    ("--dataset_name @null-context.json", "row 1", "the context is None", "Fix or remove it"),
    ("--dataset_name @text-choices.json", "row 0", "the choices are 'abc'", "Fix or remove it"),
    ("--dataset_name @no-choices.json", "row 1", "the choices are []", "Fix or remove it"),
    ("--dataset_name @null-choice.json", "row 1", "the choices are ['a', None]", "Fix or remove it"),
    ("--dataset_name @label.json", "row 1", "the label 2", "Fix or remove it"),
    ("--dataset_name @null-label.json", "row 1", "the label None", "Fix or remove it"),
    ("--dataset_name @half-label.json", "row 1", "the label 0.5", "Fix or remove it"),
    ("--dataset_name @letter-label.json", "row 0", "the label 'B'", "Fix or remove it"),
]

ROBUSTNESS = [
    *flags("bits", "1 0 -4 32", "at least 2 and at most 16"),
    *flags("noise", "0 -1 nan", "must be more than 0"),
    *flags("noise_samples", "0 -1", "at least 1"),
    *flags("max_examples", "0 -1", "at least 1"),
    *flags("batch_size", "0", "at least 1"),
    *flags("seed", "-1", "at least 0"),
    ("--bits 4.5", "--bits", "'4.5'", WHOLE),
    ("--noise much", "--noise", "'much'", NUMBER),
    ("--granularity row", "--granularity", "'row'", "channel", "tensor"),
    ("--quantizer round", "--quantizer", "'round'", "nearest", "torchao"),
    ("--quantizer torchao --bits 16", "bits=16", "torchao has 2 to 8"),
    ("--quantizer torchao --granularity tensor", "granularity=tensor", "no effect with quantizer=torchao"),
    ("--bits --quantizer nearest", "quantizer=nearest", "no effect with an empty --bits"),
    ("--bits --granularity tensor", "granularity=tensor", "no effect with an empty --bits", "Leave one of them out"),
    ("--noise --noise_samples 3", "noise_samples=3", "no effect with an empty --noise", "Leave one of them out"),
    ("--image_column_name x", "image_column_name=x", "no effect with a causal language model"),
    ("--image_max_value 255", "image_max_value=255", "no effect with a causal language model"),
    ("--block_size 1", "block_size=1", "context of 64 tokens", "give 2 to 64"),
    ("--block_size 65", "block_size=65", "context of 64 tokens", "give 2 to 64"),
    ("--dataset_name @none.txt", "dataset_name=", "none.txt'", "Give 'python'"),
    ("--dataset_name @small.txt --dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("--dataset_name @two.parquet --text_column_name x", "text_column_name='x'", "Name one of these"),
    ("--dataset_name @null.parquet", "split 'train', row 1", "'text' is null", "--skip_bad_examples"),
    ("--dataset_name @one.parquet", "train has 1 documents", "Give more data"),
    ("--dataset_name @test-only", "no split 'train', only test", "Name the files so"),
    ("--dataset_name @small.txt", "block_size=64", "fewer tokens", "give a smaller block_size"),
    ("--device warp", "device='warp'", "Give cpu"),
    ("--output_dir @good.txt/out", "output_dir=", "cannot be written to", "Choose another folder"),
    ("@base", "base' is given twice", "Give it once"),
    ("@none", "checkpoint=", "none' could not be loaded", "Give a folder"),
    ("@empty", "checkpoint=", "empty' could not be loaded", "Give a folder"),
    ("@adapter", "checkpoint=", "adapter' could not be loaded", "adapters: merged into theirs"),
    ("@bert", "bert' is BertForMaskedLM", "Give an image classifier or a causal language model"),
    ("@vit", "vit' is an image classifier", "is a causal language model", "Evaluate each kind by itself"),
    ("@mismatch", "mismatch'", "300 tokens, but the model embeddings for 50", "They do not belong together"),
    ("@without-tokenizer", "without-tokenizer': its tokenizer could not be loaded", "Give a folder"),
]


# ---- The files ----

ALPACA = {"instruction": "Count to {i}.", "input": "", "output": "{i}, done."}


def alpaca(**changed) -> list[dict]:
    """Five rows; of the third, or of all where it is a list, one column is another."""
    rows = [{key: text.format(i=i) for key, text in ALPACA.items()} for i in range(5)]
    for column, value in changed.items():
        for row in rows[2:3] if not isinstance(value, list) else rows:
            row[column] = value[0] if isinstance(value, list) else value
    return rows


def chats(bad) -> list[dict]:
    good = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    return [{"messages": bad if i == 2 else good} for i in range(5)]


def questions(**changed) -> list[dict]:
    good = {"context": "The fox", "choices": ["a", "b"], "label": 0}
    return [good, {**good, **changed}]


USER, ASSISTANT = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}
JSON_FILES = {
    "good": alpaca(),
    "null-instruction": alpaca(instruction=None),
    "null-output": alpaca(output=None),
    "number-output": alpaca(output=[7]),
    "all-null-output": alpaca(output=[None]),
    "empty-outputs": alpaca(output=[" "]),
    "chat": chats([USER, ASSISTANT]),
    "chat-null": chats(None),
    "chat-content": chats([USER, {"role": "assistant", "content": None}]),
    "chat-user": chats([USER, ASSISTANT, USER]),
    "chat-short": chats([ASSISTANT]),
    "chat-text": [{"messages": "Hello?"}] * 5,
    "questions": questions(),
    "null-context": questions(context=None),
    "text-choices": [{**questions()[0], "choices": "abc"}] * 2,
    "no-choices": questions(choices=[]),
    "null-choice": questions(choices=["a", None]),
    "label": questions(label=2),
    "null-label": questions(label=None),
    "half-label": questions(label=0.5),
    "letter-label": [{**questions()[0], "label": "B"}] * 2,
}
TABLES = {
    "null": {"text": ["a", None, "b", "c"]},
    "all-null": {"text": [None, None]},
    "number": {"text": [1, 2]},
    "two": {"title": ["a", "b"], "body": [None, "b"]},
    "year": {"year": [1, 2]},
    "one": {"text": ["a"]},
}
TEXTS = {
    "good.txt": "\n\n".join(f"line {i}: the quick brown fox" for i in range(40)),
    "small.txt": "a\n\nb\n\nc",
    "empty.txt": "",
    "blank.txt": "\n\n\n",
    "broken.json": '{"text": ',
    "broken.parquet": "PAR1 but not really",
    "list.yaml": "- gr_r\n- 0.1\n",
    "word.yaml": "gr_r\n",
    "malformed.yaml": "gr_r: [0.1\ngr_lambda: 2\n",
    "malformed.json": '{"gr_r": 0.1,,}',
    "twice.yaml": "gr_r: 0.1\nmax_steps: 3\ngr_r: 0.2\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    for name in ("binary.txt", "binary.yaml"):
        (folder / name).write_bytes(b"\xff\xfe\x00\x80 not UTF-8 \xc3\x28")
    for name, rows in JSON_FILES.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    for name, columns in TABLES.items():
        Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    (folder / "empty").mkdir()
    (folder / "test-only").mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(folder / "test-only" / "test.parquet")
    tokenizer = train_tokenizer(TEXTS["good.txt"].split("\n\n"), 300, 64)
    model = toys.llama()
    model.save_pretrained(folder / "without-tokenizer")
    shutil.copytree(folder / "without-tokenizer", folder / "mismatch")  # 300 tokens, 50 embeddings
    tokenizer.save_pretrained(folder / "mismatch")
    model.resize_token_embeddings(300)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    toys.vit().save_pretrained(folder / "vit")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder / "bert")
    return folder


def run(script: str, command: str, words: tuple[str, ...], folder: Path, *defaults: str) -> None:
    """`defaults` are `--flag value`s for what the command does not give."""
    for default in ("--output_dir @out --use_cpu --report_to none", *defaults):
        if default.split()[0] not in command.split():
            command += f" {default}"
    argv = [word.replace("@", f"{folder}/", 1) if word.startswith("@") else word for word in shlex.split(command)]
    check(load_script(script).main, argv, *words)


def table(cases):
    return pytest.mark.parametrize(("command", "words"), [(c[0], c[1:]) for c in cases], ids=[c[0] for c in cases])


@table(SHARED + PRETRAIN)
def test_pretraining(command, words, folder):
    run("pretrain_llama", command, words, folder)


@pytest.mark.parametrize(("recipe", "words"), [(c[0], c[1:]) for c in RECIPES], ids=[str(c[0]) for c in RECIPES])
def test_a_recipe(recipe, words, folder):
    lines = [f"{name}: {json.dumps(value).replace('NaN', '.nan')}" for name, value in recipe.items()]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    run("pretrain_llama", "@recipe.yaml", words, folder)


@table(LORA + [case for case in SHARED if case[0].startswith(("--gr", "--ire", "--max_steps"))])
def test_fine_tuning(command, words, folder):
    run("finetune_llama_lora", command, words, folder, "--model_name_or_path @base", "--dataset_name @good.json")


def test_fine_tuning_without_a_model(folder):
    check(load_script("finetune_llama_lora").main, ["--output_dir", folder / "out"], "model_name_or_path=None", "give")


@table(EVALUATE)
def test_evaluating(command, words, folder):
    argv = [word.replace("@", f"{folder}/", 1) for word in shlex.split(command)]
    argv = argv if "--device" in argv else [*argv, "--device", "cpu"]
    if "max_examples" in words[0]:
        argv += ["--dataset_name", folder / "questions.json"]
    check(load_script("evaluate_llama").main, [folder / "base", *argv], *words)


@table(ROBUSTNESS)
def test_evaluating_robustness(command, words, folder):
    """Of a good model, and of the one that the case names; some cases are about that one alone."""
    argv = [word.replace("@", f"{folder}/", 1) for word in shlex.split(command)]
    alone = command in ("@none", "@empty", "@adapter", "@bert", "@mismatch", "@without-tokenizer")
    argv = argv if alone else [folder / "base", *argv]
    for flag, value in (("--dataset_name", folder / "good.txt"), ("--device", "cpu")):
        argv = argv if flag in argv else [*argv, flag, value]
    check(load_script("evaluate_robustness").main, argv, *words)


def test_torchao_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    argv = [folder / "base", "--dataset_name", folder / "good.txt", "--quantizer", "torchao", "--bits", 8]
    words = ("torchao is not installed", "pip install 'hf_gr[quantization]'")
    check(load_script("evaluate_robustness").main, argv, *words)


@pytest.mark.parametrize("argv", [[], ["@none", "--dataset_name", "@questions.json"]], ids=str)
def test_evaluating_without_a_model(argv, folder):
    argv = [word.replace("@", f"{folder}/", 1) for word in argv]
    check(load_script("evaluate_llama").main, argv, "model")
