"""The scripts as users start them: as subprocesses, offline. Mistakes in this process, for their messages."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from helpers import SCRIPTS
from helpers.scripts import launch, load_script
from hf_gr import GRConfig
from hf_gr.cli import script
from hf_gr.cli.shipped import RECIPES

SCRIPT = SCRIPTS / "train_vit.py"


@pytest.fixture(scope="module")
def main():
    return load_script("train_vit").main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default job, cut to two epochs."""
    folder = tmp_path_factory.mktemp("vit") / "digits"
    printed = launch("--output_dir", folder, "--num_train_epochs", 2, "--save_strategy", "epoch",
                     "--license", "apache-2.0", has_launcher=True)  # fmt: skip
    return folder, printed


def test_output_folder(finished):
    folder, printed = finished
    written = {p.name for p in folder.iterdir()}
    assert written >= {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "trainer_state.json",
        "all_results.json",
        "curves.png",
        "README.md",
    }
    assert json.loads((folder / "config.json").read_text())["id2label"]["7"] == "7"
    results = json.loads((folder / "all_results.json").read_text())
    assert f"Test error {100 * results['eval_error']:.2f} % on 360 images." in printed
    for name in ("Model", "Card", "Picture"):
        assert Path(re.search(rf"{name}\s+(\S+)", printed).group(1)).exists()
    card = (folder / "README.md").read_text()
    assert "trained from scratch on scikit-learn digits (1,437 training examples)" in card
    assert "| `gr_warmup` |  | zero |" in card and "license: apache-2.0" in card and "`license`" not in card


def test_pipeline_without_torchvision(finished):
    folder, _ = finished
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    classify = pipeline("image-classification", model=str(folder))
    assert classify(PILImage.new("L", (20, 20)))[0]["label"] in set("0123456789")


def test_the_code_on_the_card_runs(finished, tmp_path, monkeypatch, capsys):
    folder, _ = finished
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    (tmp_path / folder.name).symlink_to(folder)
    PILImage.new("L", (20, 20)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert "'score':" in capsys.readouterr().out


def test_the_command_on_the_card_is_the_one_that_was_given(finished):
    folder, _ = finished
    (command,) = re.findall(r"```bash\n(.*?)\n```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert command.startswith("python scripts/train_vit.py --output_dir ") and command.endswith("--license apache-2.0")
    assert f"--output_dir path/to/{folder.name} " in command and str(folder) not in command


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--hub_token", "hf_secret", "--gr_r=0.1"], "python train.py --hub_token ... --gr_r=0.1"),
        (["--hub-tok=hf_secret"], "python train.py --hub-tok=..."),
        (["--hub_token", "one", "--hub_token", "hf_secret"], "python train.py --hub_token ... --hub_token ..."),
        (["--hub_model_id", "me/hf_secret"], "python train.py --hub_model_id me/..."),
        (["--hub_model_id", f"hf_{'a1' * 17}"], "python train.py --hub_model_id ..."),
        (["--dataset_name", "/home/me/data/"], "python train.py --dataset_name path/to/data"),
        (["r.yaml", "--dataset_name=../../data.parquet"], "python train.py r.yaml --dataset_name=path/to/data.parquet"),
        (["--dataset_name", "of/mine"], "python train.py --dataset_name ./of/mine"),
        (["--dataset_name", "of/others"], "python train.py --dataset_name of/others"),
        (["--sample_prompt", "It's a"], "python train.py --sample_prompt 'It'\"'\"'s a'"),
    ],
)
def test_a_published_command_gives_away_neither_tokens_nor_folders(argv, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of" / "mine").mkdir(parents=True)
    args = GRConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret")
    assert script.command_line(str(tmp_path / "train.py"), argv, args) == expected


def test_resume_is_bit_identical(finished, tmp_path):
    """From the last complete checkpoint: the one after it was being written when the run was killed."""
    folder, _ = finished
    for step in (23, 46):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-46" / "trainer_state.json").unlink()
    launch("--output_dir", tmp_path, "--num_train_epochs", 2, "--resume_from_checkpoint", "last")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("train_runtime" in entry for entry in log)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_ire_by_flags(tmp_path):
    launch("--output_dir", tmp_path, "--num_train_epochs", 2, "--gr_lambda", 0, "--ire_preset", "cnn",
           "--ire_interval", 5, "--warmup_steps", 10, "--ire_exclude", "norm", "bias",
           "--final_sharpness", "sam")  # fmt: skip
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in logs if "loss" in entry][-1]
    assert last["ire_kappa"] == 1.0
    assert last["ire_flat_fraction"] == pytest.approx(0.9, abs=1e-3)
    card = (tmp_path / "README.md").read_text()
    assert "| `ire_preset` |  | cnn |" in card and "`SGD`" not in card and "In 36 of 46 steps" in card
    assert json.loads((tmp_path / "all_results.json").read_text())["sharpness_sam"] > 0 and "Flatness" in card


def test_resnet_with_tvlars_by_flags(tmp_path):
    """The flags of a comparison at large batches; the folder is loaded by a process that has never heard of hf_gr."""
    launch("--output_dir", tmp_path, "--model", "resnet-18", "--stem", "cifar", "--weight_init", "kaiming_uniform",
           "--max_train_samples", 64, "--max_eval_samples", 20, "--num_train_epochs", 2, "--optim", "tvlars",
           "--per_device_train_batch_size", 16, "--lr_scheduler_type", "constant", "--learning_rate", 1.0,
           "--lr_scaling", "linear", "--gr_lambda", 0, "--layer_statistics_steps", 2)  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert "Optimizer: `TVLARS` (see above)" in card
    assert "| `tv_lambda` | lambda | 1.25 |" in card and "| `delay_steps` | d_e | 4 |" in card
    assert "with `learning_rate` times 0.0625 (the total batch of 16 / 256)" in card
    assert "| `stem` | cifar |" in card and "| `weight_init` | kaiming_uniform |" in card
    assert "trust ratio of each layer](layer_statistics.png)" in card
    assert "trust_remote_code=True)" in card
    for name in ("layer_statistics.parquet", "layer_statistics.png", "cifar_resnet.py"):
        assert (tmp_path / name).exists()
    code = (
        "import sys; from transformers import pipeline; from PIL import Image;"
        f"print(pipeline('image-classification', {str(tmp_path)!r}, trust_remote_code=True)(Image.new('L', (9, 9))));"
        "assert 'hf_gr' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_label_noise_by_flags(tmp_path):
    folder = tmp_path / "noisy"
    printed = launch("--output_dir", folder, "--max_steps", 4, "--logging_steps", 2, "--label_noise", 0.4,
                     "--label_noise_type", "pairflip", "--max_eval_samples", 50)  # fmt: skip
    assert "Test error" in printed
    results = json.loads((folder / "all_results.json").read_text())
    assert results["train_wrong_labels"] == 575  # round(0.4 * 1437)
    assert 0 <= results["eval_ece"] <= 1
    assert results["eval_nll"] == pytest.approx(results["eval_loss"], rel=1e-5)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert all(
        f"train_accuracy_{part}_labels" in entry for entry in log if "loss" in entry for part in ("right", "wrong")
    )
    card = (folder / "README.md").read_text()
    assert "label_noise" in card and "pairflip" in card


def test_a_validation_part_and_the_test_set_once(tmp_path):
    printed = launch("--output_dir", tmp_path, "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2,
                     "--label_noise", 0.4, "--max_eval_samples", 50, "--validation_fraction", 0.2)  # fmt: skip
    assert "on 50 images" in printed
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert f"Test error {100 * results['test_error']:.2f} %" in printed
    assert results["train_wrong_labels"] < 575  # those among the examples that were trained on
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["evaluated_examples"] for entry in log if "eval_error" in entry] == [288, 288, 288]
    (tested,) = [entry for entry in log if "test_error" in entry]
    assert tested["evaluated_examples"] == 50
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["train_examples"] == 1149
    card = (tmp_path / "README.md").read_text()
    assert "split `test` (50 examples)" in card and f"| error | {results['test_error']:.4g} |" in card
    assert "| `validation_fraction` | 0.2 |" in card


def test_recipe_in_json_flags_overrule_it_and_two_processes(tmp_path):
    recipe = {
        "output_dir": str(tmp_path / "out"),
        "dataset_name": "digits",
        "model": "vit-micro",
        "max_train_samples": 64,
        "max_eval_samples": 41,
        "max_steps": 100,
        "per_device_train_batch_size": 8,
        "gr_warmup": "lambda",
        "gr_warmup_steps": 2,
        "crop_padding": 1,
        "logging_steps": 1,
        "report_to": "none",
        "ddp_backend": "gloo",
        "use_cpu": True,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    printed = launch(tmp_path / "recipe.json", "--max_steps", 3, processes=2, has_launcher=True)
    # 41 images over two processes: one of them is padded, and must not be counted twice.
    assert "on 41 images" in printed
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    degrees = [e["gr_lambda"] for e in state["log_history"] if "gr_lambda" in e]
    assert degrees == pytest.approx([0.05, 0.1, 0.1])
    assert "2 processes, each on CPU" in (tmp_path / "out" / "README.md").read_text()
    accuracy = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"]
    assert round(accuracy * 41, 6) == round(accuracy * 41)


def test_fine_tuning_a_checkpoint_with_another_number_of_classes(finished, main, tmp_path):
    folder, _ = finished
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    names = ["odd", "even", "zero"]
    data = Dataset.from_dict(
        {"picture": list(pixels), "parity": [i % 3 for i in range(12)]},
        features=Features({"picture": Image(), "parity": ClassLabel(names=names)}),
    )
    data.to_parquet(tmp_path / "data.parquet")
    main(
        f"--dataset_name {tmp_path}/data.parquet --model_name_or_path {folder} --output_dir {tmp_path}/out "
        "--max_steps 2 --random_flip False --crop_padding 0 --eval_fraction 0.25 --report_to none --use_cpu "
        "--gr_warmup none".split()
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == names and model.classifier.weight.shape[0] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained from a local checkpoint on the local file data.parquet (9 training examples)" in card


def test_what_cannot_be_used_is_counted_and_nothing_else_is_lost(main, tmp_path, monkeypatch, capsys):
    """Bad examples are left out by order; evaluation sees all others, whatever training drops; the home directory may
    be read-only."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", "/proc/no/such/folder")
    gray = np.random.default_rng(0).integers(0, 65535, (20, 8, 8), dtype=np.uint16)
    features = Features({"image": Image(), "label": ClassLabel(names=["odd", "even"])})
    train = Dataset.from_dict({"image": list(gray), "label": [0, 1] * 9 + [-1, -1]}, features=features)
    files = train.cast_column("image", Image(decode=False))["image"][:]
    files[3] = {"bytes": b"no image", "path": None}
    test = Dataset.from_dict({"image": files[:6], "label": [0, 1] * 3}, features=features)
    (tmp_path / "data").mkdir()
    train.to_parquet(tmp_path / "data" / "train.parquet")
    test.to_parquet(tmp_path / "data" / "test.parquet")
    main(
        f"--dataset_name {tmp_path}/data --output_dir {tmp_path}/out --model vit-micro --skip_bad_examples --use_cpu "
        "--image_max_value 65535 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_steps 2 "
        "--dataloader_drop_last --report_to none --gr_warmup none --crop_padding 0".split()
    )
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["train_skipped_examples"], results["eval_skipped_examples"]) == (2, 1)
    assert results["epoch"] == 1.0  # two batches of 8 from 18
    assert round(results["eval_accuracy"] * 5, 6) == round(results["eval_accuracy"] * 5)
    assert "on 5 images" in capsys.readouterr().out


def test_every_augmentation_on_images_of_another_kind(tmp_path):
    """200 classes, images that are not square and some of them gray, a size of their own, and label noise."""
    generator = np.random.default_rng(0)
    shapes = [(30, 41), (41, 30, 3)]
    images = [generator.integers(0, 255, shapes[i % 2], dtype=np.uint8) for i in range(400)]
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {i}" for i in range(200)])})
    data = Dataset.from_dict({"image": images, "label": [i // 2 for i in range(400)]}, features=features)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    data.select(range(0, 400, 9)).to_parquet(tmp_path / "data" / "test.parquet")
    out = tmp_path / "out"
    printed = launch(
        "--dataset_name", tmp_path / "data", "--output_dir", out, "--model", "resnet-18", "--image_size", 16,
        "--crop_pct", 0.8, "--random_resized_crop", 0.08, "--crop_source_size", 28, "--crop_padding", 2,
        "--rand_augment", 2, 15, "--color_jitter", 0.4, 0.4, 0.2, 0.1, "--grayscale", 0.2, "--blur", 0.5,
        "--solarize", 0.2, "--mixup", 0.2, "--cutmix", 1, "--label_smoothing_factor", 0.1, "--label_noise", 0.2,
        "--max_steps", 6, "--logging_steps", 1, "--gr_warmup", "none", "--warmup_steps", 0, "--report_to", "none",
        "--reestimate_batch_norm", 20,
    )  # fmt: skip
    assert "on 45 images" in printed
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["loss"] < 20 for entry in log if "loss" in entry)
    assert not any(key.startswith("train_accuracy") for entry in log for key in entry)
    card = (out / "README.md").read_text()
    for row in ("`random_resized_crop` | 0.08", "`rand_augment` | [2, 15]", "`color_jitter` | [0.4, 0.4, 0.2, 0.1]",
                "`crop_source_size` | 28", "`mixup` | 0.2", "`cutmix` | 1.0", "`crop_pct` | 0.8"):  # fmt: skip
        assert f"| {row} |" in card
    # Evaluation and inference: the shortest side to 20 pixels, then 16 from the center.
    processor = AutoImageProcessor.from_pretrained(out)
    picture = PILImage.fromarray(images[1])
    resized = np.asarray(picture.resize((20, int(20 * 41 / 30)), PILImage.Resampling.BILINEAR))
    center = torch.from_numpy(resized[5:21, 2:18] / 127.5 - 1).permute(2, 0, 1).float()
    pixels = processor([picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, center[None], atol=1e-5, rtol=0)
    assert len(pipeline("image-classification", str(out))(picture, top_k=200)) == 200


def parquet(folder, features, columns):
    dataset = Dataset.from_dict(columns, features=Features(features))
    DatasetDict(train=dataset, test=dataset)["train"].to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def no_image(folder):
    return ["--dataset_name", parquet(folder, {"text": Value("string")}, {"text": ["a", "b"]})]


def string_labels(folder):
    pixels = [np.zeros((8, 8), np.uint8)] * 2
    features = {"image": Image(), "label": Value("string")}
    return ["--dataset_name", parquet(folder, features, {"image": pixels, "label": ["cat", "dog"]})]


def unwritable(folder):
    (folder / "file").write_text("")
    return ["--output_dir", str(folder / "file" / "out")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gr_r", "0"], "gr_r=0.0: the radius must be > 0"),
        (["--gr_lambda", "-1"], "gr_lambda=-1.0: the degree must be >= 0"),
        (
            ["--gr_warmup_steps", "100", "--max_steps", "50"],
            "gr_warmup_steps=100.0 is 100 steps, as long as the whole run",
        ),
        (["--dataset_name", "/no/such/data"], "dataset_name='/no/such/data' could not be loaded"),
        (no_image, "The dataset has no image column; its columns are text (string)"),
        (string_labels, "The dataset has no class label column; its columns are image (Image), label (string)"),
        (
            lambda f: [*string_labels(f), "--label_column_name", "label"],
            "label_column_name='label' holds string, not cla",
        ),
        (unwritable, "cannot be written to"),
        (
            ["--resume_from_checkpoint", "/no/such/checkpoint"],
            "resume_from_checkpoint=/no/such/checkpoint: there is no s",
        ),
        (["--model_name_or_path", "x", "--dropout", "0.2"], "dropout=0.2 has no effect with model_name_or_path='x'"),
        (
            ["--model", "resnet-18", "--dropout", "0.2"],
            "dropout=0.2 has no effect with model='resnet-18'",
        ),
        (["--model", "vit-s", "--stem", "cifar"], "stem=cifar has no effect with model='vit-s', whose first"),
        (
            ["--model", "wrn-10-1", "--stem", "cifar"],
            "stem=cifar has no effect with model='wrn-10-1', whose first layers are fixed",
        ),
        (["--model_name_or_path", "x", "--weight_init", "xavier_normal"], "weight_init=xavier_normal has no effect"),
        (["--final_sharpness", "flat"], "final_sharpness='flat': choose from sam, average, trace, top"),
        (["--optim", "lars", "--optim_args", "momentun=0.9"], "optim_args: momentun is unknown to optim=lars, which"),
        (lambda f: [recipe_with_a_typo(f)], "unknown flag gr_radius; see --help"),
    ],
)
def test_mistakes_are_named(arguments, message, main, tmp_path):
    arguments = arguments(tmp_path) if callable(arguments) else arguments
    if "--output_dir" not in arguments and not arguments[0].endswith(".yaml"):
        arguments = [*arguments, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError) as error:
        main([*arguments, "--use_cpu"])
    assert message in str(error.value)


def recipe_with_a_typo(folder):
    (folder / "recipe.yaml").write_text("gr_radius: 0.1\n")
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gr_warmup", "foo"], "--gr_warmup: invalid choice: 'foo' (choose from"),
        (["--optim", "nosuch"], "--optim: invalid choice: 'nosuch' (choose from"),
        (["--model", "vit-xl"], "--model: invalid choice: 'vit-xl' (choose from"),
    ],
)
def test_wrong_choices_are_named(arguments, message, main):
    with pytest.raises(ValueError) as error:
        main(arguments)
    assert message in str(error.value)


def test_recipes_parse(main):
    module = load_script("train_vit")
    for recipe in RECIPES.glob("vit_*.yaml"):
        model, data, args = module.parse_args([str(recipe), "--use_cpu", "--report_to", "none"])
        assert args.gr_warmup == "zero" and model.model.startswith("vit-") and data.dataset_name
    model, _, args = module.parse_args(["resnet18_cifar10_tvlars.yaml", "--use_cpu", "--report_to", "none"])
    assert (model.model, args.optim, args.lr_scaling) == ("resnet-18", "tvlars", "linear")
    assert torch.get_default_dtype() == torch.float32


def test_push_to_hub_uploads_the_finished_card(main, monkeypatch, tmp_path):
    """The client is replaced; what it is asked to upload is real."""
    uploads = []

    def upload_folder(self, repo_id, folder_path, **kwargs):
        folder = Path(folder_path)
        uploads.append((repo_id, {p.name for p in folder.iterdir()}, (folder / "README.md").read_text()))

    repository = type("Url", (), {"repo_id": "somebody/digits"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **kwargs: repository)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    main(
        f"--output_dir {tmp_path}/vit --push_to_hub --hub_model_id digits --num_train_epochs 0.1 --use_cpu "
        "--max_train_samples 128 --eval_strategy no".split()
    )
    repository, files, card = uploads[-1]
    assert repository == "somebody/digits"
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "curves.png", "README.md"} <= files
    assert 'model="somebody/digits"' in card and "| accuracy |" in card and "name: digits" in card
    assert "type: " not in card  # the digits have no name on the Hub


def test_a_token_is_not_written_into_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    argv = ["--output_dir", str(tmp_path), "--hub_token", "hf_secret", "--use_cpu"]
    (args,) = script.parse_args((GRConfig,), argv, None, without_it=("output_dir",))
    assert args.hub_token is None and os.environ["HF_TOKEN"] == "hf_secret"
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert script.command_line(str(SCRIPT), argv, args).endswith("--hub_token ... --use_cpu")


@pytest.mark.parametrize("path", sorted((SCRIPTS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configurations_say_only_what_accelerate_knows(path):
    """And start what they say. The two for a CPU are those that `launch` uses."""
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(known)
    assert config.distributed_type.value == {"cpu": "NO", "fsdp2": "FSDP"}.get(path.stem, "MULTI_GPU")
    assert config.use_cpu == path.stem.startswith("cpu")
    if path.stem == "fsdp2":
        args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        args, *_ = _validate_launch_command(args)
        assert args.use_fsdp and str(args.fsdp_version) == "2" and args.mixed_precision == "bf16"


def test_fsdp_on_a_cpu_is_refused(main, tmp_path, monkeypatch):
    """accelerate would start two processes and train them under DDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP here: accelerate shards on accelerators alone"):
        main(["--use_cpu", "--output_dir", str(tmp_path), "--report_to", "none"])
