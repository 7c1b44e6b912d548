"""What train_vit.py says to bad inputs: one line that names flag, value and what to do, and nothing is trained."""

import functools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from helpers import scripts, toys
from hf_gr.cli import image_data
from hf_gr.data.images import load_image_dataset

main = scripts.load_script("train_vit").main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Datasets that something is wrong with, recipes, and folders that are no models."""
    folder = tmp_path_factory.mktemp("files")
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    pixels = [np.full((8, 8), i, np.uint8) for i in range(20)]
    labels = [0, 1] * 10

    def write(name, columns, features=features):
        # `to_parquet` of datasets 4.7 divides by the number of rows, of which one of these files has none.
        pq.write_table(Dataset.from_dict(columns, features=features).data.table, folder / f"{name}.parquet")

    write("good", {"image": pixels, "label": labels})
    write("minus_one", {"image": pixels, "label": [*labels[:17], -1, 0, -1]})
    write("null", {"image": pixels, "label": [None, *labels[1:]]})
    write("unlabelled", {"image": pixels, "label": [-1] * 20})
    write("rare", {"image": pixels, "label": [0] * 19 + [1]})
    write("one_row", {"image": pixels[:1], "label": [0]})
    write("empty", {"image": [], "label": []})
    write("none", {"image": [None, *pixels[1:]], "label": labels})
    write("broken", {"image": [{"bytes": b"no image", "path": None}] * 20, "label": labels})
    write("deep", {"image": [i.astype(np.uint16) * 257 for i in pixels], "label": labels})
    write("float", {"image": [i.astype(np.float32) for i in pixels], "label": labels})
    one = Features({"image": Image(), "label": ClassLabel(names=["cat"])})
    write("single", {"image": pixels, "label": [0] * 20}, one)
    write("text", {"text": ["a", "b"]}, Features({"text": Value("string")}))
    write("strings", {"image": pixels[:2], "label": ["cat", "dog"]}, Features(features | {"label": Value("string")}))
    write("numbers", {"image": pixels[:2], "label": [0, 1]}, Features(features | {"label": Value("int64")}))
    write("no_label", {"image": pixels[:2]}, Features({"image": Image()}))
    two = Features({"image": Image(), "fine": features["label"], "coarse": features["label"]})
    write("two_labels", {"image": pixels[:2], "fine": [0, 1], "coarse": [0, 1]}, two)
    two = Features({"left": Image(), "right": Image(), "label": features["label"]})
    write("two_images", {"left": pixels[:2], "right": pixels[:2], "label": [0, 1]}, two)
    (folder / "no_parquet.parquet").write_text("nonsense")
    (folder / "nothing").mkdir()
    for name in ("cat", "dog"):
        (folder / "folder" / "train" / name).mkdir(parents=True)
        for i in range(3):
            PILImage.fromarray(pixels[i]).save(folder / "folder" / "train" / name / f"{i}.png")
    (folder / "folder" / "train" / "dog" / "2.png").write_bytes(b"no image")
    (folder / "only_test").mkdir()
    Dataset.from_dict({"image": pixels[:2], "label": [0, 1]}, features=features).to_parquet(
        folder / "only_test" / "test-0.parquet"
    )
    (folder / "not_a_model").mkdir()
    (folder / "not_a_model" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    toys.vit().save_pretrained(folder / "vit")  # without an image processor
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    recipes = {
        "unknown": "gr_radius: 0.1",
        "list": "- gr_r",
        "broken": "gr_r: [",
        "word": "gr_r: much",
        "boolean": "gr_lambda: true",
        "size": "image_size: 8.5",
        "choice": "model: vit-xl",
        "mean": "image_mean: 0.5",
        "empty_mean": "image_mean: []",
        "lengths": "max_steps: 5\nnum_train_epochs: 2",
    }
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(content + "\n")
    (folder / "broken.json").write_text('{"gr_r": 0.1')
    (folder / "file").write_text("")
    return folder


FLAGS = [
    # unknown, abbreviated, without a value
    ("--gr_lamda 0", "--gr_lamda", "Did you mean --gr_lambda?"),
    ("--gr-lamda 0", "--gr-lamda", "Did you mean --gr_lambda?"),
    ("--gr_lam 0", "--gr_lam", "Did you mean --gr_lambda?"),
    ("--lr 0.1", "--lr", "Did you mean"),
    ("--batch_size 8", "--batch_size", "there is no such flag"),
    ("--epochs 8", "--epochs", "--help"),
    ("--gr_r", "--gr_r", "Write the value after the flag"),
    ("--image_mean", "--image_mean", "Write the value after the flag"),
    ("--gr_r 0.1 0.2", "'0.2'", "--FLAG VALUE"),
    ("--seed 1 recipe.yaml", "'recipe.yaml'", "a recipe comes first"),
    # of another type
    ("--gr_r much", "--gr_r", "'much'", "Give a number"),
    ("--gr_lambda none", "--gr_lambda", "'none'", "Give a number"),
    ("--gr_interval 1.5", "--gr_interval", "'1.5'", "Give a whole number"),
    ("--gr_warmup_steps x", "--gr_warmup_steps", "'x'", "Give a number"),
    ("--ire_kappa x", "--ire_kappa", "'x'", "Give a number"),
    ("--ire_interval x", "--ire_interval", "'x'", "Give a whole number"),
    ("--image_size 8.5", "--image_size", "'8.5'", "Give a whole number"),
    ("--image_mean a b c", "--image_mean", "'a'", "Give a number"),
    ("--max_steps ten", "--max_steps", "'ten'", "Give a whole number"),
    ("--seed 1e3", "--seed", "'1e3'", "Give a whole number"),
    ("--random_flip maybe", "--random_flip", "maybe", "expected one of"),
    ("--skip_bad_examples 2", "--skip_bad_examples", "2", "expected one of"),
    ("--gr_half_precision_weights x", "--gr_half_precision_weights", "x", "expected one of"),
    # no choice
    ("--gr_warmup foo", "--gr_warmup", "'foo'", "choose from", "lambda"),
    ("--gr_scope world", "--gr_scope", "'world'", "choose from", "global"),
    ("--gr_on_nonfinite go", "--gr_on_nonfinite", "'go'", "choose from", "skip"),
    ("--ire_preset gpt", "--ire_preset", "'gpt'", "choose from", "llama"),
    ("--ire_mask none", "--ire_mask", "'none'", "choose from", "flat"),
    ("--ire_scope local", "--ire_scope", "'local'", "choose from", "per_tensor"),
    ("--ire_kappa_schedule x", "--ire_kappa_schedule", "'x'", "choose from", "constant"),
    ("--optim adamx", "--optim", "'adamx'", "choose from", "tvlars"),
    ("--lr_scheduler_type x", "--lr_scheduler_type", "'x'", "choose from", "cosine"),
    ("--lr_scaling cubic", "--lr_scaling", "'cubic'", "choose from", "sqrt"),
    ("--model vit-xl", "--model", "'vit-xl'", "choose from", "vit-ti"),
    ("--model resnet-18 --stem big", "--stem", "'big'", "choose from", "cifar"),
    ("--weight_init zeros", "--weight_init", "'zeros'", "choose from", "xavier_uniform"),
    # out of range: GR, IRE, optimizer
    ("--gr_r 0", "gr_r=0.0", "must be > 0"),
    ("--gr_r -0.1", "gr_r=-0.1", "must be > 0"),
    ("--gr_r nan", "gr_r=nan", "must be > 0"),
    ("--gr_r inf", "gr_r=inf", "must be > 0"),
    ("--gr_r 1e30", "gr_r=1e+30", "0.05"),
    ("--gr_lambda -1", "gr_lambda=-1.0", "must be >= 0"),
    ("--gr_lambda nan", "gr_lambda=nan", "must be >= 0"),
    ("--gr_lambda 1e30", "gr_lambda=1e+30", "0.05"),
    ("--gr_ascent sam", "--gr_ascent", "'sam'", "choose from", "gradient", "momentum"),
    ("--gr_radius_rule norm", "--gr_radius_rule", "'norm'", "choose from", "loss"),
    ("--gr_preset foo", "--gr_preset", "'foo'", "choose from", "looksam"),
    ("--gr_r_max 0", "gr_r_max=0.0", "more than 0"),
    ("--gr_reuse -1", "gr_reuse=-1.0", "at least 0"),
    ("--gr_ascent momentum --gr_lambda 0.1", "gr_lambda=0.1", "one pass", "Leave gr_lambda out"),
    ("--gr_interval 0", "gr_interval=0", "at least 1"),
    ("--gr_interval -2", "gr_interval=-2", "at least 1"),
    ("--gr_warmup_steps -1", "gr_warmup_steps=-1", "whole number of steps, or a fraction"),
    ("--gr_warmup_steps 2.5", "gr_warmup_steps=2.5", "whole number of steps, or a fraction"),
    ("--gr_warmup_steps nan", "gr_warmup_steps=nan", "whole number of steps, or a fraction"),
    ("--ire_kappa -1", "ire_kappa=-1", "must be"),
    ("--ire_kappa nan", "ire_kappa=nan", "must be"),
    ("--ire_kappa inf", "ire_kappa=inf", "must be"),
    ("--ire_kappa 2 --ire_gamma 0", "ire_gamma=0", "must be"),
    ("--ire_kappa 2 --ire_gamma 1.5", "ire_gamma=1.5", "must be"),
    ("--ire_kappa 2 --ire_interval 0", "ire_interval=0", "at least 1"),
    ("--ire_kappa 2 --ire_probe_fraction 0", "ire_probe_fraction=0.0", "must be in (0, 1]"),
    ("--ire_kappa 2 --ire_probe_fraction 2", "ire_probe_fraction=2.0", "must be in (0, 1]"),
    ("--ire_kappa 2 --ire_beta 1", "ire_beta=1", "must be"),
    ("--ire_kappa 2 --ire_guard 0.5", "ire_guard=0.5", "or 0 (off)"),
    ("--ire_kappa 2 --ire_start_step -1", "ire_start_step=-1", "whole number of steps, or a fraction"),
    ("--learning_rate nan", "learning_rate=nan", "must be at least 0"),
    ("--learning_rate -1", "learning_rate=-1.0", "must be at least 0"),
    ("--learning_rate inf", "learning_rate=inf", "must be at least 0"),
    ("--weight_decay nan", "weight_decay=nan", "must be at least 0"),
    ("--weight_decay -1", "weight_decay=-1.0", "must be at least 0"),
    ("--adam_beta1 1", "adam_beta1=1.0", "below 1"),
    ("--adam_beta2 -1", "adam_beta2=-1.0", "below 1"),
    ("--adam_epsilon -1", "adam_epsilon=-1.0", "must be at least 0"),
    ("--max_grad_norm -1", "max_grad_norm=-1.0", "must be at least 0"),
    ("--label_smoothing_factor 1", "label_smoothing_factor=1.0", "below 1"),
    ("--warmup_steps -1", "warmup_steps=-1", "must be at least 0"),
    ("--layer_statistics_steps -1", "layer_statistics_steps=-1", "or 0 (off)"),
    ("--optim lars --optim_args momentun=0.9", "optim_args", "momentun", "momentum"),
    ("--optim lars --optim_args momentum=2", "momentum=2", "must be"),
    ("--optim tvlars --optim_args tv_lambda=x", "tv_lambda", "x", "number"),
    ("--optim lars --optim_args momentum", "optim_args", "momentum", "key=value"),
    # out of range: length, batch, seed
    ("--num_train_epochs 0", "num_train_epochs=0.0", "must be more than 0"),
    ("--num_train_epochs nan", "num_train_epochs=nan", "must be more than 0"),
    ("--max_steps 0", "max_steps=0", "at least 1"),
    ("--max_steps -5", "max_steps=-5", "at least 1"),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size=0", "at least 1"),
    ("--per_device_eval_batch_size -1", "per_device_eval_batch_size=-1", "at least 1"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0", "at least 1"),
    ("--seed -1", "seed=-1", "must be at least 0"),
    ("--save_total_limit 0", "save_total_limit=0", "at least 1"),
    ("--logging_steps 0", "logging_steps=0", "must be more than 0"),
    ("--dataloader_num_workers -1", "dataloader_num_workers=-1", "must be at least 0"),
    # out of range: images and data
    ("--image_size 0", "image_size=0", "at least 1"),
    ("--image_size -8", "image_size=-8", "at least 1"),
    ("--image_size 9", "image_size=9", "choose a multiple"),
    ("--dropout 1", "dropout=1.0", "below 1"),
    ("--dropout -0.1", "dropout=-0.1", "at least 0"),
    ("--dropout nan", "dropout=nan", "at least 0"),
    ("--image_std 0 1 1", "image_std=[0.0, 1.0, 1.0]", "numbers above 0"),
    ("--image_std 1", "image_std=[1.0]", "give three numbers"),
    ("--image_mean 0.5 0.5", "image_mean=[0.5, 0.5]", "give three numbers"),
    ("--image_mean nan 0 0", "image_mean=[nan, 0.0, 0.0]", "give three numbers"),
    ("--image_max_value 0", "image_max_value=0.0", "more than 0"),
    ("--crop_padding -1", "crop_padding=-1", "at least 0"),
    ("--crop_padding 8", "crop_padding=8", "at most 7"),
    ("--crop_padding 8 --random_resized_crop 0.5 --crop_source_size 32", "crop_padding=8", "at most 7"),
    ("--random_resized_crop 0", "random_resized_crop=0.0", "more than 0"),
    ("--random_resized_crop 1.5", "random_resized_crop=1.5", "at most 1"),
    ("--random_resized_crop 0.5 --crop_source_size 0", "crop_source_size=0", "at least 1"),
    ("--crop_source_size 16", "crop_source_size=16", "no effect with random_resized_crop=None"),
    ("--crop_pct 0", "crop_pct=0.0", "more than 0"),
    ("--crop_pct nan", "crop_pct=nan", "at most 1"),
    ("--rand_augment 2", "rand_augment=[2]", "number of operations, at least 1"),
    ("--rand_augment 0 15", "rand_augment=[0, 15]", "at least 1"),
    ("--rand_augment 2 31", "rand_augment=[2, 31]", "from 0 to 30"),
    ("--rand_augment 2 x", "--rand_augment", "'x'", "Give a whole number"),
    ("--color_jitter 0.4", "color_jitter=[0.4]", "give four numbers"),
    ("--color_jitter 0.4 0.4 0.4 0.6", "color_jitter=[0.4, 0.4, 0.4, 0.6]", "at most 0.5"),
    ("--color_jitter 0.4 nan 0.4 0.1", "color_jitter=[0.4, nan, 0.4, 0.1]", "at least 0"),
    ("--grayscale 1.1", "grayscale=1.1", "at most 1"),
    ("--blur -0.1", "blur=-0.1", "at least 0"),
    ("--solarize nan", "solarize=nan", "at least 0"),
    ("--mixup -1", "mixup=-1.0", "at least 0"),
    ("--cutmix inf", "cutmix=inf", "at least 0"),
    ("--cutmix 1 --per_device_train_batch_size 1", "cutmix=1.0", "no effect with per_device_train_batch_size=1"),
    ("--max_train_samples 0", "max_train_samples=0", "at least 1"),
    ("--max_eval_samples -3", "max_eval_samples=-3", "at least 1"),
    ("--eval_fraction 0.2", "eval_fraction=0.2", "Leave it out"),
    ("--eval_fraction 0", "eval_fraction=0.0", "more than 0"),
    ("--validation_fraction 0", "validation_fraction=0.0", "more than 0"),
    ("--validation_fraction 1", "validation_fraction=1.0", "below 1"),
    ("--validation_fraction 0.999", "validation_fraction=0.999", "Give another validation_fraction"),
    # contradictions, and what has no effect
    ("--gr_warmup_steps 100 --max_steps 50", "gr_warmup_steps=100.0", "whole run"),
    ("--max_steps 5 --num_train_epochs 2", "max_steps=5", "num_train_epochs=2.0", "Leave one of them out"),
    ("--model vit-s --stem cifar", "stem=cifar", "Leave one of them out"),
    ("--model resnet-18 --dropout 0.1", "dropout=0.1", "Leave one of them out"),
    (
        "--optim tvlars --lr_scheduler_type time_varying",
        "lr_scheduler_type='time_varying'",
        "lr_scheduler_type=constant",
    ),
    ("--dataset_name digits --dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("--load_best_model_at_end --save_strategy steps", "load_best_model_at_end", "strategy"),
    ("--fp16 --bf16", "fp16", "bf16"),
    ("--dataloader_drop_last --per_device_train_batch_size 2000", "dataloader_drop_last=True", "1437", "Lower"),
    ("--resume_from_checkpoint /no/such", "resume_from_checkpoint=/no/such", "there is no"),
]

DATA = [
    ("/no/such/place", "dataset_name='/no/such/place' could not be loaded", "Give 'digits'"),
    ("no_parquet.parquet", "dataset_name=", "could not be loaded", "Give 'digits'"),
    ("nothing", "dataset_name=", "could not be loaded", "Give 'digits'"),
    ("empty.parquet", "dataset_name=", ""),
    ("text.parquet", "no image column", "text (string)", "--image_column_name"),
    ("strings.parquet", "no class label column", "label (string)", "--label_column_name"),
    ("strings.parquet --label_column_name label", "label_column_name='label'", "string", "class_encode_column"),
    ("numbers.parquet --label_column_name label", "label_column_name='label'", "int64", "class_encode_column"),
    ("no_label.parquet", "no class label column", "--label_column_name"),
    ("two_labels.parquet", "several class label columns: fine, coarse", "--label_column_name"),
    ("two_images.parquet", "several image columns: left, right", "--image_column_name"),
    ("good.parquet --image_column_name photo", "image_column_name='photo'", "image, label"),
    ("good.parquet --image_column_name label", "image_column_name='label'", "not images"),
    ("good.parquet --label_column_name kind", "label_column_name='kind'", "image, label"),
    ("good.parquet --dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("good.parquet --eval_fraction 1", "eval_fraction=1.0", "below 1"),
    ("good.parquet --eval_fraction 0.01", "eval_fraction=0.01", "Give another eval_fraction"),
    ("good.parquet --dataloader_drop_last", "dataloader_drop_last=True", "18 training examples", "Lower"),
    ("only_test", "no split 'train', only test", ""),
    ("minus_one.parquet", "split 'train', rows 17, 19", "label_column_name='label'", "--skip_bad_examples"),
    ("null.parquet", "split 'train', row 0", "label_column_name='label'", "--skip_bad_examples"),
    ("unlabelled.parquet", "rows 0, 1, 2, 3, 4 and 15 more", "--skip_bad_examples"),
    ("rare.parquet", "eval_fraction=0.1", "at least two examples"),
    ("one_row.parquet", "eval_fraction=0.1", "at least two examples"),
    ("single.parquet", "label_column_name='label' has 1 class (cat)", "Choose another"),
    (
        "broken.parquet",
        "split 'train', row",
        "the image cannot be used (cannot identify image file",
        "--skip_bad_examples",
    ),
    ("broken.parquet --skip_bad_examples", "no image can be used", ""),
    ("deep.parquet", "image_max_value=None", "mode I;16", "Set image_max_value", "from split 'train', row"),
    ("deep.parquet --skip_bad_examples", "image_max_value=None", "mode I;16", "Set image_max_value"),
    ("deep.parquet --image_max_value 100", "image_max_value=100", "mode I;16", "Give the value of white"),
    ("deep.parquet --image_max_value 100 --skip_bad_examples", "image_max_value=100", "Give the value of white"),
    ("float.parquet", "mode F", "Set image_max_value"),
]

OTHERS = [
    ("--model_name_or_path /no/such", "model_name_or_path='/no/such' could not be loaded", "Give a folder"),
    ("--model_name_or_path nothing", "model_name_or_path=", "could not be loaded", "Give a folder"),
    ("--model_name_or_path not_a_model", "model_name_or_path=", "nonsense", "Give a folder"),
    ("--model_name_or_path llama", "model_name_or_path=", "could not be loaded", "Give a folder"),
    ("--model_name_or_path x --model vit-ti", "model=vit-ti", "model_name_or_path='x'", "Leave one of them out"),
    ("--model_name_or_path x --dropout 0.2", "dropout=0.2", "model_name_or_path='x'", "Leave one of them out"),
    ("--model_name_or_path x --image_size 8", "image_size=8", "model_name_or_path='x'", "Leave one of them out"),
    ("--output_dir file/out", "output_dir=", "cannot be written to", "Choose another folder"),
    ("unknown.yaml", "unknown.yaml: unknown flag gr_radius", "--help"),
    ("list.yaml", "list.yaml: ", "FLAG: VALUE"),
    ("broken.yaml", "broken.yaml: ", "Give a YAML or JSON file"),
    ("broken.json", "broken.json: ", "Give a YAML or JSON file"),
    ("missing.yaml", "missing.yaml: ", "Give the path of one", "vit_digits.yaml"),
    ("word.yaml", "gr_r", "much", "number"),
    ("boolean.yaml", "gr_lambda=True", "give a number"),
    ("size.yaml", "image_size=8.5", "whole number"),
    ("choice.yaml", "model='vit-xl'", "choose one of"),
    ("mean.yaml", "image_mean=0.5", "give a list"),
    ("empty_mean.yaml", "image_mean=[]", "give three numbers"),
    ("lengths.yaml", "max_steps=5", "num_train_epochs=2", "Leave one of them out"),
]

ROBUSTNESS = [
    ("--dataset_name no_parquet.parquet", "dataset_name=", "could not be loaded", "Give 'digits'"),
    ("--dataset_name good.parquet", "vit' has 10 classes, dataset_name=", "good.parquet' 2", "Give the dataset"),
    ("--dataset_name two_images.parquet", "several image columns: left, right", "--image_column_name"),
    ("--dataset_name numbers.parquet --label_column_name label", "label_column_name='label'", "class_encode_column"),
    ("--dataset_config_name x", "dataset_config_name='x'", "Leave it out"),
    ("--text_column_name x", "text_column_name=x", "no effect with an image classifier", "Leave one of them out"),
    ("--block_size 8", "block_size=8", "no effect with an image classifier", "Leave one of them out"),
    ("--image_max_value 0", "image_max_value=0.0", "more than 0"),
    ("", "vit': its image processor could not be loaded", "Give a folder"),
]

#: Scans are drawn and split once for all cases.
cached = functools.lru_cache(load_image_dataset)


def check(argv, words, folder):
    """The case, in a folder of its own; names of files lead to `files`."""
    where = [] if "--output_dir" in argv else ["--output_dir", folder / "out"]
    load = mock.patch.object(image_data, "load_image_dataset", cached)
    scripts.check(main, [*argv, *where, "--use_cpu", "--report_to", "none"], *words, cheaper=(load,))


@pytest.mark.parametrize(("flags", "words"), [(case[0], case[1:]) for case in FLAGS], ids=[case[0] for case in FLAGS])
def test_flags(flags, words, tmp_path):
    check(flags.split(), words, tmp_path)


@pytest.mark.parametrize(("data", "words"), [(case[0], case[1:]) for case in DATA], ids=[case[0] for case in DATA])
def test_data(data, words, files, tmp_path):
    name, *flags = data.split()
    small = ["--model", "vit-micro", "--max_steps", "1", "--per_device_train_batch_size", "32"]
    check(["--dataset_name", str(files / name), *small, "--gr_warmup", "none", *flags], words, tmp_path)


@pytest.mark.parametrize(("argv", "words"), [(case[0], case[1:]) for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_models_and_recipes(argv, words, files, tmp_path):
    check([_found(word, files) for word in argv.split()], words, tmp_path)


@pytest.mark.parametrize(("flags", "words"), [(c[0], c[1:]) for c in ROBUSTNESS], ids=[c[0] for c in ROBUSTNESS])
def test_evaluating_robustness(flags, words, files):
    argv = [files / "vit", *(_found(word, files) for word in flags.split()), "--device", "cpu"]
    scripts.check(scripts.load_script("evaluate_robustness").main, argv, *words)


def _found(word: str, files: Path) -> str:
    is_ours = word.endswith((".yaml", ".json")) or (files / word.split("/")[0]).exists()
    return str(files / word) if is_ours and not word.startswith(("-", "/")) else word
