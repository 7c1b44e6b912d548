"""The card and the picture say what the run did, and nothing else."""

import dataclasses
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
    set_seed,
)

from helpers import ROOT, toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.cli import command, script
from hf_gr.data.text import train_tokenizer
from hf_gr.reporting.card import ENVIRONMENT, PIPELINE_TAGS
from hf_gr.reporting.plots import plot_curves


def metrics(prediction):
    accuracy = float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
    return {"accuracy": accuracy, "error": 1 - accuracy}


def trained(folder, **kwargs):
    trainer = toys.trainer(folder, eval_dataset=toys.images(10), compute_metrics=metrics, **kwargs)
    trainer.train()
    trainer.evaluate()
    return trainer


CARD = {
    "tasks": "image-classification",
    "dataset": "random pixels",
    "dataset_tags": "somebody/pixels",
    "dataset_args": "test",
    "license": "apache-2.0",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = trained(folder, gr_r=0.07, gr_lambda=0.05, gr_warmup_steps=2, weight_decay=0.013, optim="rmsprop")
    trainer.create_model_card(**CARD)
    return trainer, ModelCard.load(folder / "README.md"), folder


def test_metadata(run):
    trainer, card, _ = run
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "apache-2.0"
    assert {"hf_gr", "gradient-regularization"} <= set(card.data.tags)
    (evaluation,) = [e for e in trainer.state.log_history if "eval_loss" in e]
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values == {name: evaluation[f"eval_{name}"] for name in ("loss", "accuracy", "error")}
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == ("random pixels", "somebody/pixels")
    assert result.dataset_split == "test"


def test_text_follows_the_run(run):
    _, card, folder = run
    assert "with gradient regularization" in card.text
    assert "So it was in 4 of 6 steps" in card.text
    assert "SAM" not in card.text  # lambda is not r
    assert "`RMSprop` (" in card.text and "AdamW" not in card.text
    for row in (
        "| `gr_r` | r | 0.07 |",
        "| `gr_lambda` | lambda | 0.05 |",
        "| `gr_warmup_steps` | T_w | 2 steps |",
        "| `weight_decay` | 0.013 |",
        "| `optim` | rmsprop |",
        "| `max_steps` | 6 |",
    ):
        assert row in card.text
    assert "6 optimizer steps, 10 forward and backward passes over a batch of 2 examples" in card.text
    assert "`adam_beta1`" not in card.text  # a default
    assert str(folder) not in card.content  # nobody's disk
    assert "Evaluated on random pixels, split `test` (10 examples), after step 6 of 6:" in card.text


# ---- Every number, for every kind of card ----

KINDS = {
    "gr": {"gr_r": 0.07, "gr_lambda": 0.05, "gr_warmup_steps": 2, "weight_decay": 0.013, "optim": "rmsprop"},
    "r-warmup": {"gr_warmup": "r", "gr_warmup_steps": 3, "gr_interval": 2, "gr_scope": "global"},
    "ire": {"gr_lambda": 0, "ire_kappa": 3.0, "ire_gamma": 0.7, "ire_interval": 2, "ire_probe_fraction": 0.5},
    "tvlars": {"gr_lambda": 0, "optim": "tvlars", "optim_args": "tv_lambda=0.9,delay_steps=4", "lr_scaling": "linear",
               "lr_scheduler_type": "constant"},
    "lamb and all": {"optim": "lamb", "ire_kappa": 2.0, "gr_warmup": "none", "gr_r": 0.03},
    "lars": {"optim": "lars", "gr_lambda": 0, "weight_decay": 0.017},
    "lora": {"gr_r": 0.06, "gr_warmup": "lambda", "gr_warmup_steps": 4, "ire_kappa": 1.5, "warmup_steps": 2},
    "nothing": {"gr_lambda": 0},
}  # fmt: skip


def run_of(kind: str, folder) -> tuple[GRTrainer, dict[str, int]]:
    """A finished run, and how many passes with a gradient it took, counted by the model itself."""
    from peft import LoraConfig, get_peft_model

    passes = {"train": 0, "estimate": 0}
    model = toys.vit()
    data, evaluation = toys.images(), {"near": toys.images(6), "far": toys.images(10)}
    if kind == "lora":
        model = get_peft_model(toys.llama(), LoraConfig(r=3, lora_alpha=11, target_modules=["q_proj", "v_proj"]))
        data, evaluation = toys.text(), {"near": toys.text(6), "far": toys.text(10)}

    def count(module, inputs, output):
        if torch.is_grad_enabled():
            passes["train" if module.training else "estimate"] += 1

    model.register_forward_hook(count)
    trainer = toys.trainer(folder, model, data, eval_dataset=evaluation, **KINDS[kind])
    trainer.train()
    trainer.evaluate()
    return trainer, passes


def numbers(text: str) -> set[float]:
    found = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)", text)
    return {float(number.strip(",").replace(",", "")) for number in found}


def prose(card: ModelCard) -> str:
    """The card without code, equations, citations and versions, and without the numbers that are parts of words."""
    text = card.text.split("## Versions")[0]
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    return re.sub(r"\b[gn] ?1\b|\bg2\b|\(1 \+ kappa\)|1 at those coordinates and 0 at the others|\*\*|`\w+`", "", text)


def numbers_of(value) -> set[float]:
    """All numbers in a value of any kind, as they are and as a card rounds them."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(numbers_of, value))
    if isinstance(value, str):
        return numbers(value.replace("=", " "))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {float(value), float(f"{value:.6g}"), float(f"{value:.4g}"), float(f"{value:.2f}")}


def recorded(trainer: GRTrainer, passes: dict[str, int]) -> set[float]:
    """Every number that the run has: nothing here is taken from the code that writes cards."""
    args, model = trainer.args, trainer.model
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name.startswith(("gr_", "ire_"))}
    first_losses = next(entry for entry in trainer.state.log_history if "loss" in entry)
    last_losses = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    evaluations = [e for e in trainer.state.log_history if any(k.startswith("eval_") for k in e)][-2:]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups]
    phis = [entry["tvlars_phi"] for entry in trainer.state.log_history if "tvlars_phi" in entry]
    everything = [
        {k: v for k, v in args.to_dict().items() if k != "output_dir"}, flags, last_losses, evaluations, groups[0],
        phis[:1] + phis[-1:], sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad), len(trainer.train_dataset),
        passes["train"], passes["estimate"], trainer.state.global_step, passes["train"] - trainer.state.global_step,
        args.per_device_train_batch_size, args.per_device_train_batch_size / 256, round(trainer.recorder.seconds),
        first_losses["learning_rate"], trainer.recorder.record.total("ire_steps"),
        [len(data) for data in trainer.eval_dataset.values()],
    ]  # fmt: skip
    if hasattr(model, "active_peft_config"):
        everything += [model.active_peft_config.r, model.active_peft_config.lora_alpha]
    return numbers_of(everything) | {256.0}


@pytest.fixture(scope="module", params=KINDS)
def any_run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    trainer, passes = run_of(request.param, folder)
    trainer.create_model_card(dataset_tags="somebody/data", dataset_args="test", dataset_config="plain", license="mit")
    return request.param, trainer, passes, ModelCard.load(folder / "README.md"), folder


def test_every_number_of_the_card_is_in_the_run(any_run):
    _, trainer, passes, card, _ = any_run
    memory = float(re.search(r"with ([\d.]+) GiB of memory at the peak", card.text).group(1))
    assert 0.1 < memory <= trainer.costs()["peak_memory_bytes"] / 2**30 + 0.005  # which may have grown since
    known, found = recorded(trainer, passes) | {memory}, numbers(prose(card))
    assert found <= known, found - known
    assert trainer.state.global_step in found and len(found) > 12
    # and a number that is not of the run is found out
    loss = trainer.state.log_history[-1]["eval_far_loss"]
    forged = card.text.replace(f"| {loss:.4g} |", "| 0.1234 |")
    assert numbers(prose(ModelCard(f"---\n---\n{forged}"))) - known == {0.1234}


def test_the_methods_of_the_card_are_those_of_the_run(any_run):
    kind, trainer, _, card, _ = any_run
    gr, ire = trainer.gr_args.is_active, trainer.gr_args.ire_kappa != 0
    own = trainer.args.optim if trainer.args.optim in ("lars", "tvlars", "lamb") else None
    tags = {tag for tag, used in (("gradient-regularization", gr), ("ire", ire), (own, own)) if used}
    assert set(card.data.tags) == tags | {"hf_gr", "generated_from_trainer"}
    equations = {"gr": r"\lambda_t}{r_t}", "ire": r"(1 + \kappa", "lars": r"\mu \leftarrow", "phi": r"\phi_t",
                 "lamb": r"\sqrt{\hat v}"}  # fmt: skip
    shown = {name for name, part in equations.items() if part in card.text}
    used = {name for name, on in (("gr", gr), ("ire", ire)) if on}
    assert shown == used | {"lars": {"lars"}, "tvlars": {"lars", "phi"}, "lamb": {"lamb"}, None: set()}[own]
    papers = {"2406.09723": gr, "2405.20763": ire, "2010.01412": gr and trainer.gr_args.gr_lambda is None,
              "1708.03888": own in ("lars", "tvlars"), "2309.14053": own == "tvlars", "1904.00962": own == "lamb",
              "2106.09685": kind == "lora"}  # fmt: skip
    assert {paper for paper in papers if f"arxiv.org/abs/{paper}" in card.text} == {p for p, on in papers.items() if on}
    assert ("## Citation" in card.text) == any(papers.values())


def test_the_hub_reads_the_metadata(any_run):
    """What huggingface_hub checks and reads back, and the tasks that the Hub knows."""
    from evaluate.config import HF_HUB_ALLOWED_TASKS
    from huggingface_hub import metadata_load
    from huggingface_hub.repocard_data import model_index_to_eval_results
    from huggingface_hub.utils import validate_repo_id

    kind, trainer, _, _, folder = any_run
    metadata = metadata_load(folder / "README.md")
    assert metadata["pipeline_tag"] in HF_HUB_ALLOWED_TASKS
    assert metadata["library_name"] == ("peft" if kind == "lora" else "transformers")
    for name in metadata["datasets"]:
        validate_repo_id(name)
    _, results = model_index_to_eval_results(metadata["model-index"])
    evaluations = {k: v for e in trainer.state.log_history[-2:] for k, v in e.items() if k.endswith("_loss")}
    assert {f"eval_{r.metric_type}": r.metric_value for r in results} == evaluations and len(results) == 2
    for result in results:
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("somebody/data", "plain", "test")
    assert not (folder / ".eval_results").exists()  # of two sets neither is the one


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({"dataset_tags": "somebody/data", "dataset_config": "plain"}, ("somebody/data", "plain", "accuracy")),
        (
            {"dataset_tags": "somebody/data", "dataset_args": "test"},
            ("somebody/data", "default", "accuracy, split test"),
        ),
        ({"dataset": "a folder"}, None),
    ],
)
def test_the_file_of_results_that_leaderboards_read(card, expected, run):
    from huggingface_hub._eval_results import parse_eval_result_entries

    trainer, _, folder = run
    trainer.create_model_card(**card)
    path = folder / ".eval_results" / "hf_gr.yaml"
    assert path.exists() == (expected is not None)
    if expected is not None:
        (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        assert (entry.dataset_id, entry.task_id, entry.notes) == expected
        assert entry.value == trainer.state.log_history[-1]["eval_accuracy"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(["Some text with the answer. A question? One answer, Another one"], 300, 64)
    made.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def tiny(kind: type[PreTrainedModel]) -> PreTrainedModel:
    set_seed(0)
    config = kind.config_class(
        vocab_size=310, hidden_size=16, d_model=16, d_kv=8, d_ff=16, intermediate_size=16, num_layers=1,
        num_hidden_layers=1, num_heads=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return kind(config)


USED = {
    "image-classification": lambda: (toys.vit(), ViTImageProcessorPil(size={"height": 8, "width": 8})),
    "text-generation": lambda: (tiny(LlamaForCausalLM), tokenizer()),
    "text-classification": lambda: (tiny(BertForSequenceClassification), tokenizer()),
    "token-classification": lambda: (tiny(BertForTokenClassification), tokenizer()),
    "fill-mask": lambda: (tiny(BertForMaskedLM), tokenizer()),
    "question-answering": lambda: (tiny(BertForQuestionAnswering), tokenizer()),
    "multiple-choice": lambda: (tiny(BertForMultipleChoice), tokenizer()),
    "summarization": lambda: (tiny(T5ForConditionalGeneration), tokenizer()),
    "translation": lambda: (tiny(T5ForConditionalGeneration), tokenizer()),
}


USAGE = ENVIRONMENT.get_template("card_usage.md").module


@pytest.mark.parametrize("task", sorted({*PIPELINE_TAGS.values(), *USAGE.PIPELINES, *USAGE.MODELS}))
def test_the_code_of_a_card_runs(task, tmp_path, monkeypatch, capsys):
    """For every task that a card names by itself, and every one that there is code for."""
    model, processor = USED[task]()
    folder = tmp_path / "mine"
    trainer = GRTrainer(model=model, args=GRConfig(**toys.arguments(folder)), processing_class=processor)
    trainer.save_model()
    trainer.create_model_card(tasks=None if task in PIPELINE_TAGS.values() else task)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == task
    PILImage.new("RGB", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)
    capsys.readouterr()
    exec(code, {})
    assert task == "question-answering" or capsys.readouterr().out.strip()  # whose answer may be empty


@pytest.mark.parametrize(("task", "processor"), [("depth-estimation", tokenizer), (None, lambda: None)])
def test_no_code_where_none_is_known_to_run(task, processor, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path))
    GRTrainer(model=tiny(LlamaForCausalLM), args=args, processing_class=processor()).create_model_card(tasks=task)
    assert "How to use" not in ModelCard.load(tmp_path / "README.md").text


def test_an_earlier_runs_pictures_are_not_shown(tmp_path):
    trained(tmp_path, layer_statistics_steps=1, max_steps=1).create_model_card()
    assert ModelCard.load(tmp_path / "README.md").text.count(".png)") == 2
    toys.trainer(tmp_path, layer_statistics_steps=1).create_model_card()
    assert (tmp_path / "curves.png").exists() and (tmp_path / "layer_statistics.png").exists()
    assert ".png)" not in ModelCard.load(tmp_path / "README.md").text


def test_a_local_folder_is_no_name_on_the_hub(run, tmp_path, capsys):
    trainer, _, folder = run
    (tmp_path / "cifar10").mkdir()
    script.publish(trainer, str(tmp_path / "cifar10"), tasks="image-classification")
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {"Model": str(folder), "Card": f"{folder}/README.md", "Picture": f"{folder}/curves.png"}
    card = ModelCard.load(folder / "README.md")
    assert "trained from scratch on the local folder cifar10 (24 training examples)" in card.text
    assert "Evaluated on the local folder cifar10 (10 examples)" in card.text
    assert card.data.eval_results is None and card.data.datasets is None and "type: " not in card.content
    script.publish(trainer, "somebody/cifar10", tasks="image-classification")
    assert {r.dataset_type for r in ModelCard.load(folder / "README.md").data.eval_results} == {"somebody/cifar10"}


def test_no_picture_is_announced_where_there_is_none(tmp_path, capsys):
    trainer = toys.trainer(tmp_path)
    script.publish(trainer, "digits", {"digits": "scans of digits"}, kind="Adapters")
    assert capsys.readouterr().out == f"Adapters {tmp_path}\nCard     {tmp_path}/README.md\n"
    assert "on scans of digits (24" in ModelCard.load(tmp_path / "README.md").text


def test_names_are_shown_as_they_are(run):
    """Also those that Markdown would make something else of."""
    trainer, _, folder = run
    trainer.state.log_history[-1]["eval_a|b*c*"] = 0.5
    trainer.create_model_card(model_name="*a* | `b`", dataset="[x](y) <b> __z__\n# q, snake_case", dataset_args="a`b")
    del trainer.state.log_history[-1]["eval_a|b*c*"]
    text = ModelCard.load(folder / "README.md").text
    assert r"# \*a\* \| \`b\`" in text
    assert r"| a\|b\*c\* | 0.5 |" in text
    assert r" on [x\](y) \<b> \_\_z\_\_ \# q, snake_case (24 training" in text and "split `a'b`" in text


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_evaluated_examples_are_those_that_were_counted(drop_last, tmp_path):
    """Ten, in batches of four."""
    seen = []

    class OwnLoader(GRTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            loader = DataLoader(toys.images(10), batch_size=4, drop_last=drop_last, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    trainer = OwnLoader(
        model=toys.vit(),
        args=GRConfig(**toys.arguments(tmp_path, max_steps=1, per_device_eval_batch_size=4)),
        train_dataset=toys.images(),
        eval_dataset=toys.images(10),
        compute_metrics=lambda prediction: {"seen": seen.append(len(prediction.label_ids)) or 0},
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert seen == [8 if drop_last else 10]
    assert f"the evaluation set ({seen[0]} examples), after step 1" in ModelCard.load(tmp_path / "README.md").text


def test_the_command_is_on_the_card(run, tmp_path):
    trainer, _, folder = run
    trainer.create_model_card(**CARD, command="python scripts/train_vit.py --gr_r 0.07")
    assert "```bash\npython scripts/train_vit.py --gr_r 0.07\n```" in ModelCard.load(folder / "README.md").text


def test_without_gradient_regularization(tmp_path):
    trained(tmp_path, gr_lambda=0).create_model_card(**CARD)
    card = ModelCard.load(tmp_path / "README.md")
    assert "every step used the plain gradient" in card.text and "T_w" not in card.text
    assert "gradient-regularization" not in card.data.tags
    assert "`AdamW` (" in card.text and "6 forward and backward passes" in card.text


def test_sam_is_named_and_the_untrained_is_not_evaluated(tmp_path):
    trainer = toys.trainer(tmp_path, gr_warmup="none")
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "With lambda = r this is SAM" in card.text and "The run was not evaluated" in card.text
    assert card.data.eval_results is None


def test_card_of_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    trainer = toys.trainer(
        tmp_path,
        get_peft_model(toys.llama(), LoraConfig(r=2, target_modules=["q_proj"])),
        toys.text(),
        processing_class=tokenizer(),
        gr_warmup="none",
        max_steps=1,
    )
    trainer.train()
    trainer.create_model_card(model_name="adapter")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert "`LlamaForCausalLM` with" in card.text
    assert "256 of them trained (LoRA of rank 2, alpha 8, on q_proj), trained" in card.text
    assert "How to use" not in card.text  # nobody else has the base
    trainer.create_model_card(model_name="adapter", finetuned_from="somebody/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert 'AutoPeftModelForCausalLM.from_pretrained("adapter")' in card.text
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_time_to_prepare_is_no_result(tmp_path):
    trainer = toys.trainer(tmp_path, eval_dataset=toys.images(4), gr_warmup="none", max_steps=1)
    trainer.evaluate()  # before the training, when Trainer reports that time
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(**CARD)
    card = ModelCard.load(tmp_path / "README.md")
    assert "preparation" not in card.content and [r.metric_type for r in card.data.eval_results] == ["loss"]


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda f: f.name)
def test_the_cards_that_are_shown_are_whole(folder):
    """With the pictures that they have; of a commit without changes of its own, on nobody's disk."""
    card = ModelCard.load(folder / "README.md")
    assert "hf_gr" in card.data.tags and card.data.eval_results and card.data.model_name == folder.name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        with PILImage.open(folder / picture) as image:
            assert image.size[0] > 1000
    assert re.search(r"hf_gr \S+ \(commit [0-9a-f]{7,}\)", card.text)
    assert not re.search(r"(?<![\w.])/(home|tmp|work|root|Users)\b|\.\./", card.text)


def test_picture(run, tmp_path):
    trainer, _, folder = run
    with PILImage.open(folder / "curves.png") as picture:
        assert picture.size[0] > 1000
    plain = [{k: v for k, v in e.items() if not k.startswith(("gr_", "eval"))} for e in trainer.state.log_history]
    plot_curves(plain, tmp_path / "plain.png")
    with PILImage.open(tmp_path / "plain.png") as picture:
        assert picture.size[0] > 1000


def test_the_picture_is_drawn_from_the_state_alone(run, tmp_path):
    trainer, _, folder = run
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    command.main(["plots", str(tmp_path)])
    with PILImage.open(tmp_path / "curves.png") as again, PILImage.open(folder / "curves.png") as first:
        assert again.tobytes() == first.tobytes()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "trainer_state.json").rename(tmp_path / "checkpoint-12" / "trainer_state.json")
    command.main(["plots", str(tmp_path), "--picture", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    with pytest.raises(ValueError, match=r"there is no trainer_state\.json"):
        command.main(["plots", str(tmp_path / "checkpoint-1")])


def test_an_evaluation_in_the_middle_is_not_passed_off_as_the_last(tmp_path):
    trainer = toys.trainer(
        tmp_path, eval_dataset=toys.images(10), eval_strategy="steps", eval_steps=4, gr_warmup="none"
    )
    trainer.train()
    trainer.state.log_history = [e for e in trainer.state.log_history if not ("eval_loss" in e and e["step"] > 4)]
    trainer.create_model_card()
    assert "(10 examples), after step 4 of 6:" in ModelCard.load(tmp_path / "README.md").text


def test_best_checkpoint_is_named_only_where_it_was_evaluated(tmp_path):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = trained(tmp_path, load_best_model_at_end=True, gr_warmup="none", **settings)
    trainer.create_model_card()
    best = trainer.state.best_model_checkpoint.split("/")[-1]
    text = ModelCard.load(tmp_path / "README.md").text
    assert f"with the weights of the best checkpoint ({best})" in text


def test_arguments_of_the_script_are_listed(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class DataArguments:
        crop_padding: int = 4
        random_flip: bool = True
        dataset_name: str = "x"
        dropout: float | None = None
        image_size: int | None = None

    trainer = trained(tmp_path, gr_lambda=0, max_steps=1)
    trainer.create_model_card(script_args=[DataArguments(random_flip=False, dataset_name="/some/folder", dropout=0.0)])
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| `random_flip` | False |" in text and "| `dropout` | 0.0 |" in text
    assert "crop_padding" not in text and "image_size" not in text and "/some/folder" not in text


def resumed(folder, checkpoint: str, **flags) -> GRTrainer:
    trainer = toys.trainer(folder, **flags)
    trainer.train(resume_from_checkpoint=f"{folder}/{checkpoint}")
    trainer.create_model_card()
    return trainer


def test_a_checkpoint_without_a_record_is_named(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=4, gr_warmup="none")
    (tmp_path / "checkpoint-4" / "run.json").unlink()
    resumed(tmp_path, "checkpoint-4", gr_warmup="none")
    text = ModelCard.load(tmp_path / "README.md").text
    assert "in 2 of 2 steps" in text
    assert re.search(r"2 optimizer steps, 4 forward and backward passes .* in \d+ seconds, evaluations not", text)
    assert "What was done in steps 1 to 4 was not recorded: neither the settings nor the costs are known." in text
    assert "The run was resumed after step 4." in text


def test_a_run_resumed_with_other_flags_is_described_as_it_was(tmp_path):
    """Four steps of zero-warmup, then two with GR and a learning rate that the checkpoint's optimizer overrules."""
    flags = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 5e-5}
    trained(tmp_path, **flags, gr_warmup="zero", gr_warmup_steps=4)
    trainer = resumed(tmp_path, "checkpoint-4", **{**flags, "learning_rate": 5.0}, gr_warmup="none", gr_r=0.07)
    text = ModelCard.load(tmp_path / "README.md").text
    for sentence in (
        "with gradient regularization, using",
        "So it was in 2 of 6 steps",
        "| `gr_r` | r | 0.1 in steps 1 to 4, 0.07 in steps 5 to 6 |",
        "| `gr_lambda` | lambda | 0.1 in steps 1 to 4, 0.07 in steps 5 to 6 |",
        "6 optimizer steps, 8 forward and backward passes over a batch of 2 examples",
        "| `learning_rate` | 5e-05 |",
        "at a learning rate of 5e-05 in the first step and 8.333e-06 in the last",
        "The run was resumed after step 4.",
    ):
        assert sentence in text
    assert "| 5.0" not in text
    assert trainer.costs()["train_passes"] == 8
    assert [e["train_passes"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize(
    ("finetuned_from", "in_config", "origin"),
    [
        (None, "", "trained from scratch on"),
        (None, "gpt2", "trained on"),  # of the model, perhaps nothing but the configuration
        ("google/vit-base", "", "fine-tuned from [google/vit-base](https://huggingface.co/google/vit-base) on"),
        (".", "", "trained from a local checkpoint on"),
    ],
)
def test_origin_is_what_is_known(finetuned_from, in_config, origin, run, tmp_path):
    trainer, _, folder = run
    trainer.model.config._name_or_path = in_config
    trainer.create_model_card(dataset="pixels", finetuned_from=finetuned_from)
    card = ModelCard.load(folder / "README.md")
    assert f"parameters, {origin} pixels" in card.text
    assert card.data.base_model == (finetuned_from if finetuned_from == "google/vit-base" else None)


def test_what_was_evaluated_is_counted(tmp_path):
    trainer = toys.trainer(
        tmp_path, eval_dataset={"near": toys.images(4), "far": toys.images(6)}, gr_warmup="none", max_steps=1
    )
    trainer.train()

    def text() -> str:
        trainer.create_model_card()
        return ModelCard.load(tmp_path / "README.md").text

    assert "The run was not evaluated" in text()
    trainer.evaluate()
    assert "| near_loss |" in text() and "| far_loss |" in text()
    assert "Evaluated on the evaluation set (near 4, far 6 examples), after step 1 of 1" in text()
    trainer.evaluate("far")
    assert "the evaluation set (far 6 examples), after step" in text()
    trainer.evaluate(toys.images(5))
    assert "the evaluation set (5 examples), after step" in text()
    assert "| loss |" in text() and "near_loss" not in text()
    trainer.evaluated_dataset = None  # a process that only writes the card
    assert "the evaluation set, after step" in text()


def test_ire_is_described_as_it_ran(tmp_path):
    flags = {"gr_lambda": 0, "ire_kappa": 3.0, "ire_gamma": 0.7, "ire_interval": 2, "ire_probe_fraction": 0.5}
    trainer = trained(tmp_path, ire_exclude=["bias"], warmup_steps=1, **flags)
    trainer.create_model_card(**CARD)
    card = ModelCard.load(tmp_path / "README.md")
    assert "ire" in card.data.tags and "gradient-regularization" not in card.data.tags
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    for text in (
        "with IRE, using the library",
        "In 5 of 6 steps the optimizer took (1 + kappa) times its step along the flat coordinates: the fraction 0.7",
        "They were chosen 3 times.",
        f"attention {last['ire_flat_fraction_attention']:.2f}",
        "| `ire_kappa` | kappa | 3.0 |",
        "| `ire_gamma` | gamma | 0.7 |",
        "| `ire_start_step` |  | 1 steps |",
        "| `ire_exclude` |  | ['bias'] |",
        "6 forward and backward passes over a batch of 2 examples and 3 over 0.5 of it for IRE",
        "Optimizer: `AdamW` (",
    ):
        assert text in card.text
    assert "`ire_beta`" not in card.text and "diverged" not in card.text
    assert card.text.count("ire_kappa") == 1  # not again among the hyperparameters


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ("inverted", "along the coordinates that are not flat, as a control"),
        ("random", "along coordinates chosen at random, each with probability 0.6, as a control"),
        ("uniform", "along all coordinates, as a control"),
    ],
)
def test_a_control_is_not_passed_off_as_ire(mask, text, tmp_path):
    trainer = trained(tmp_path, gr_warmup="none", ire_kappa=2.0, ire_mask=mask)
    trainer.ire_optimizer.kappa_scale = 0.5
    trainer.create_model_card(**CARD)
    card = ModelCard.load(tmp_path / "README.md").text
    assert text in card
    assert f"| `ire_mask` |  | {mask} |" in card
    assert "with gradient regularization and IRE" in card
    assert "The loss diverged on the way, and kappa was reduced to 1." in card
    assert ("passes over a batch of 2 examples and" in card) == (mask == "inverted")


def test_an_ire_that_never_acted_is_not_claimed(tmp_path):
    trainer = trained(tmp_path, gr_lambda=0, ire_kappa=2.0, warmup_steps=6)
    trainer.create_model_card(**CARD)
    assert "IRE was to start after step 6, and the run has 6" in ModelCard.load(tmp_path / "README.md").text
