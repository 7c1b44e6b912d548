"""The trainers of TRL behind `GRMixin`: two passes over one and the same data, whose text is generated once."""

import ast
import copy
import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, set_seed

from helpers import ROOT, forks, toys
from helpers.training import with_gr
from hf_gr import GRConfig, GRMixin
from hf_gr.trainer.compatibility import GENERATING_TRAINERS

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")
from datasets import Dataset
from peft import LoraConfig, get_peft_model

R = 0.5
#: Trainers of TRL that prepare their data in a step, and that the tests below show to be right.
SHOWN = {"GRPOTrainer", "RLOOTrainer"}
#: Lengths of the texts in a row of the data.
COLUMNS = {
    "SFT": {"prompt": 2, "completion": 3},
    "DPO": {"prompt": 2, "chosen": 3, "rejected": 2},
    "KTO": {"prompt": 2, "completion": 3},
    "Reward": {"chosen": 4, "rejected": 3},
    "GRPO": {"prompt": 2},
    "RLOO": {"prompt": 2},
}
GENERATING = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
#: Trainer and its flags; `adapter` is how LoRA is given.
CASES = {
    "SFT": ("SFT", {}),
    "SFT, packed": ("SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
    "SFT, padding-free": ("SFT", {"packing": True, "max_length": 8}),
    "DPO": ("DPO", {}),
    "DPO, precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "DPO, new adapter": ("DPO", {"adapter": "new"}),
    "DPO, trained adapter": ("DPO", {"adapter": "trained"}),
    "KTO": ("KTO", {}),
    "Reward": ("Reward", {}),
    "GRPO": ("GRPO", {}),
    "GRPO, iterations": ("GRPO", {"num_iterations": 2, "steps_per_generation": 4}),
    "GRPO, KL": ("GRPO", {"beta": 0.1}),
    "GRPO, new adapter": ("GRPO", {"beta": 0.1, "adapter": "new"}),
    "RLOO": ("RLOO", {"beta": 0.1}),
    "GMPO": ("GMPO", {}),  # a subclass of GRPO
}
GENERATE = ("GRPO", "RLOO", "GMPO")


#: One case of each trainer.
TRAINERS = ["SFT", "DPO", "KTO", "Reward", "GRPO, iterations", "RLOO"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the model that full fine-tuning starts at, where TRL loads the reference model from."""
    folder = tmp_path_factory.mktemp("llama")
    toys.llama().save_pretrained(folder)
    return folder


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"word{i}": i for i in range(1, toys.VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="word1")


def data_for(name):
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return "".join(f" word{int(i)}" for i in torch.randint(2, toys.VOCABULARY, (length,), generator=generator))

    lengths = COLUMNS.get(name, COLUMNS["GRPO"])
    rows = [{key: text(length) for key, length in lengths.items()} for _ in range(12)]
    return Dataset.from_list([row | ({"label": i % 3 != 0} if name == "KTO" else {}) for i, row in enumerate(rows)])


def model_for(name, folder, adapter):
    model = toys.llama(**({"attention_bias": True} if adapter == "biased" else {}))
    if name == "Reward":
        set_seed(0)
        model = LlamaForSequenceClassification(model.config.__class__(**{**model.config.to_dict(), "num_labels": 1,
                                                                         "pad_token_id": 0}))  # fmt: skip
    model.config._name_or_path = str(folder)
    return get_peft_model(model, lora()) if adapter == "trained" else model


def lora(bias="none"):
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, bias=bias)


def make(case, output_dir, folder, has_gr=True, cls_of=lambda cls: cls, **flags):
    """A trainer of a case; `cls_of` makes a subclass of its class."""
    name, own = CASES.get(case, (case, {}))
    source = trl if hasattr(trl, f"{name}Trainer") else importlib.import_module(f"trl.experimental.{name.lower()}")
    cls, config = getattr(source, f"{name}Trainer"), getattr(source, f"{name}Config")
    if has_gr:
        cls, config = with_gr(cls, config)
    generates = name in GENERATE
    settings = {"max_length": 16} if not generates else GENERATING
    settings = {**settings, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
                "gradient_accumulation_steps": 2, "max_steps": 2, "bf16": False, "gradient_checkpointing": False,
                "disable_dropout": True, **own, **flags}  # fmt: skip
    adapter = settings.pop("adapter", None)
    if not hasattr(config, "disable_dropout"):
        del settings["disable_dropout"]
    set_seed(0)
    rewards = {"reward_funcs": lambda completions, **kwargs: [float(len(c)) for c in completions]} if generates else {}
    biases = {"new": "none", "biased": "all"}
    lora_given = {"peft_config": lora(biases[adapter])} if adapter in biases else {}
    return cls_of(cls)(
        model=model_for(name, folder, adapter), args=config(**toys.arguments(output_dir, **settings)),
        train_dataset=data_for(name), processing_class=word_tokenizer(), **rewards, **lora_given,
    )  # fmt: skip


def with_gr_on(case, output_dir, folder, **flags):
    return make(case, output_dir, folder, **{"gr_r": R, "gr_lambda": R / 2, "gr_warmup": "none", **flags})


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def trained(trainer):
    return [p for p in trainer.model.parameters() if p.requires_grad]


class Seen(TrainerCallback):
    """Of each optimizer step: the weights before it, the prepared micro-batches, and the gradient that it uses. And how
    often text was generated, with which weights."""

    def __init__(self):
        self.steps, self.generated = [], []

    def watching(self, cls):
        """A subclass whose trainers report to this."""
        seen = self

        class Watched(cls):
            def compute_loss(self, model, inputs, *args, **kwargs):
                if not getattr(self, "gr_second_pass", False):
                    items = kwargs.get("num_items_in_batch")
                    seen.steps[-1][1].append((copy.copy(inputs), items))
                return super().compute_loss(model, inputs, *args, **kwargs)

            def _generate_and_score_completions(self, inputs):
                seen.generated.append(flat(trained(self)))
                return super()._generate_and_score_completions(inputs)

        Watched.__name__ = cls.__name__
        return Watched

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append([[p for p in model.parameters() if p.requires_grad], [], None])
        self.steps[-1][0] = flat(self.steps[-1][0])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps[-1][2] = flat(p.grad for p in model.parameters() if p.requires_grad)


def by_hand(plain, theta, batches, r, ratio, reduce=lambda g: g):
    """(1 - lambda/r) g1 + (lambda/r) g2 at `theta`, with TRL's own loss and nothing of hf_gr. `reduce` averages a
    gradient over the processes."""
    params = trained(plain)
    plain.current_gradient_accumulation_steps = len(batches)
    plain._prepare_inputs = lambda inputs: inputs

    def gradient(weights):
        torch.nn.utils.vector_to_parameters(weights, params)
        plain.model.zero_grad()
        for inputs, items in batches:
            plain.training_step(plain.model, copy.copy(inputs), items)
        return reduce(flat(p.grad for p in params))

    g1 = gradient(theta)
    g2 = gradient(theta + r * g1 / g1.norm())
    return g1, (1 - ratio) * g1 + ratio * g2


@pytest.mark.parametrize("case", CASES)
def test_g_is_that_of_two_passes_by_hand_and_text_is_generated_once(case, folder, tmp_path):
    seen = Seen()
    trainer = with_gr_on(case, tmp_path / "gr", folder, cls_of=seen.watching)
    trainer.add_callback(seen)
    trainer.train()
    plain = make(case, tmp_path / "plain", folder, has_gr=False)
    assert len(seen.steps) == 2
    for theta, batches, g in seen.steps:
        assert len(batches) == 2
        g1, expected = by_hand(plain, theta, batches, R, 0.5)
        assert (g - expected).norm() <= 1e-5 * expected.norm()
        assert (g1 - expected).norm() > 1e-3 * expected.norm()  # GR matters here
    if CASES[case][0] in GENERATE:
        starts = [theta for theta, *_ in seen.steps[: 1 if case == "GRPO, iterations" else 2]]
        assert len(seen.generated) == len(starts) and all(map(torch.equal, seen.generated, starts))


def comparable(log_history):
    """The logs, without what differs by the clock and what GR adds."""
    own = {"grad_norm", "train_seconds", "train_passes", "step_time", "train_runtime", "train_samples_per_second",
           "train_steps_per_second", "train_loss", "total_flos"}  # fmt: skip
    return [
        {k: v for k, v in e.items() if k not in own and not k.startswith("gr_")} for e in log_history if "loss" in e
    ]


@pytest.mark.parametrize("case", TRAINERS)
def test_metrics_are_those_of_the_first_pass(case, folder, tmp_path):
    """Where the weights stay, every step of both runs sees the same, so that all metrics must be equal."""
    logs, counters = {}, {}
    for degree in (0.0, R):
        trainer = make(case, tmp_path, folder, learning_rate=0.0, gr_lambda=degree, gr_r=R, gr_warmup="none",
                       logging_steps=2, max_steps=4)  # fmt: skip
        trainer.train()
        logs[degree] = comparable(trainer.state.log_history)
        counters[degree] = (
            getattr(trainer, "_step", None),
            trainer._total_train_tokens,
            trainer.state.num_input_tokens_seen,
        )
    assert logs[R] == logs[0.0] and len(logs[0.0]) == 2
    assert counters[R] == counters[0.0]
    expected = {
        "GRPO": "reward",
        "RLOO": "reward",
        "KTO": "rewards/margins",
        "Reward": "margin",
        "DPO": "rewards/margins",
    }
    assert {"num_tokens", expected.get(CASES[case][0], "entropy")} <= logs[0.0][0].keys()


@pytest.mark.parametrize("case", TRAINERS)
def test_without_gr_it_is_trl_bit_for_bit(case, folder, tmp_path):
    trainers = []
    for flags in ({"gr_lambda": 0}, {"has_gr": False}):
        trainers.append(make(case, tmp_path, folder, **flags))
        trainers[-1].train()  # at once: making the other one seeds the random numbers
    off, plain = trainers
    assert torch.equal(toys.weights(off.model), toys.weights(plain.model))
    assert comparable(off.state.log_history) == comparable(plain.state.log_history)


@pytest.mark.distributed
def test_grpo_on_two_processes(tmp_path):
    from helpers import trl_worker  # it imports this file

    toys.llama().save_pretrained(tmp_path)
    forks.run(trl_worker.main, tmp_path, processes=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert max(rank["errors"]) <= 1e-5 and rank["generated"] == 2
        assert rank["logs"][0] == rank["logs"][1]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert not all(map(torch.equal, *(rank["completions"] for rank in ranks)))


# ---- What is generated, and what it is compared with ----


@pytest.mark.parametrize("case", ["DPO", "DPO, new adapter", "DPO, trained adapter", "KTO"])
def test_the_reference_is_the_same_in_both_passes(case, folder, tmp_path):
    outputs = {False: [], True: []}
    trainer = with_gr_on(case, tmp_path, folder)

    def watch(module, args, output):
        if not torch.is_grad_enabled():
            outputs[trainer.gr_second_pass].append(output.log_probs.clone())

    (trainer.ref_model or trainer.model).register_forward_hook(watch)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert len(outputs[True]) >= 4 and all(map(torch.equal, outputs[True], outputs[False]))
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


def test_a_reference_that_follows_the_model_follows_the_unperturbed_one(folder, tmp_path):
    trainer = with_gr_on("GRPO, KL", tmp_path, folder, sync_ref_model=True, ref_model_sync_steps=1,
                         ref_model_mixup_alpha=1.0)  # fmt: skip
    before = toys.weights(trainer.ref_model)
    trainer.train()
    after = toys.weights(trainer.ref_model)
    assert torch.equal(after, toys.weights(trainer.model)) and not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")  # peft says it, too
def test_refuses_a_reference_that_shares_trained_weights(folder, tmp_path):
    with pytest.raises(ValueError, match=r"shares a trained weight \(.*bias\).* set precompute_ref_log_probs=True"):
        with_gr_on("DPO", tmp_path, folder, adapter="biased")
    for allowed in ({"precompute_ref_log_probs": True}, {"gr_lambda": 0}):
        with_gr_on("DPO", tmp_path, folder, adapter="biased", **allowed)


@pytest.mark.parametrize("case", ["GRPO", "RLOO"])
def test_along_the_momentum_text_is_of_the_unperturbed_weights(case, folder, tmp_path):
    seen, losses_at = Seen(), []

    def watching(cls):
        class Watched(seen.watching(cls)):
            def compute_loss(self, *args, **kwargs):
                losses_at.append(flat(trained(self)))
                return super().compute_loss(*args, **kwargs)

        return Watched

    trainer = with_gr_on(case, tmp_path, folder, cls_of=watching, gr_ascent="momentum", gr_lambda=None,
                         optim_args="momentum=0.9")  # fmt: skip
    trainer.add_callback(seen)
    trainer.train()
    starts = [theta for theta, *_ in seen.steps]
    assert len(seen.generated) == 2 and all(map(torch.equal, seen.generated, starts))
    moved = [(at - theta).norm().item() for at, theta in zip(losses_at[::2], starts, strict=True)]
    assert moved == [0, pytest.approx(R, rel=1e-4)]  # the first step has no momentum yet
    assert torch.equal(losses_at[2], losses_at[3])  # both micro-batches, though only the first one generates


class StandInForVLLM:
    """What TRL asks of vLLM. It keeps the weights that it is given."""

    synced: list[torch.Tensor]

    def __init__(self, model, **kwargs):
        self.model, StandInForVLLM.synced = model, []

    def sync_weights(self):
        self.synced.append(toys.weights(self.model))

    def generate(self, prompts, **kwargs):
        completions = [[2 + i % 7, 3 + i % 5, 1][i % 3 :] for i, _ in enumerate(prompts)]
        return prompts, completions, [[[-3.0] for _ in completion] for completion in completions], None


@pytest.mark.parametrize("case", ["GRPO", "RLOO"])
def test_vllm_is_given_the_unperturbed_weights(case, folder, tmp_path, monkeypatch):
    module = importlib.import_module(f"trl.trainer.{case.lower()}_trainer")
    monkeypatch.setattr(module, "VLLMGeneration", StandInForVLLM)
    seen = Seen()
    trainer = with_gr_on(case, tmp_path / "gr", folder, cls_of=seen.watching, use_vllm=True, vllm_mode="colocate")
    trainer.add_callback(seen)
    trainer.train()
    starts = [theta for theta, *_ in seen.steps]
    assert len(StandInForVLLM.synced) == 2 and all(map(torch.equal, StandInForVLLM.synced, starts))
    plain = make(case, tmp_path / "plain", folder, has_gr=False, use_vllm=True, vllm_mode="colocate")
    for theta, batches, g in seen.steps:
        g1, expected = by_hand(plain, theta, batches, R, 0.5)
        assert (g - expected).norm() <= 1e-5 * expected.norm() < 1e-2 * (g1 - expected).norm()


# ---- What is refused ----


def refused_and_allowed(make, message):
    """With GR and with IRE it is refused as it is made; without either it is not."""
    for flags in ({}, {"gr_lambda": 0, "ire_kappa": 1.0}):
        with pytest.raises(ValueError, match=message):
            make(**flags)
    return make(gr_lambda=0)


def test_refuses_trainers_that_generate_by_name(tmp_path):
    model = toys.vit()
    for name in GENERATING_TRAINERS:
        # Their own subclasses, too.
        other = type("Mine", (GRMixin, type("Theirs", (type(name, (Trainer,), {}),), {})), {})
        message = f"cannot be used with {name}: it generates the data of a step inside the step"
        refused_and_allowed(
            lambda other=other, **flags: other(model=model, args=GRConfig(**toys.arguments(tmp_path, **flags))), message
        )


def test_every_trainer_of_trl_that_makes_its_data_in_a_step_is_known():
    found, bases = set(), {}
    for file in Path(trl.__file__).parent.glob("**/*_trainer.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                bases[node.name] = {getattr(base, "id", "").lstrip("_") for base in node.bases} - {node.name}
                methods = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
                step = methods.get("training_step")
                # One with nothing but *args only wraps the context of the step around it.
                if "_prepare_inputs" in methods or (step is not None and len(step.args.args) > 1):
                    found.add(node.name)
    known = GENERATING_TRAINERS | SHOWN
    assert found >= SHOWN and found <= known | {name for name in bases if bases[name] & GENERATING_TRAINERS}


def test_refuses_an_entropy_bonus_that_changes_within_a_step(folder, tmp_path):
    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.1}
    with pytest.raises(ValueError, match="use_adaptive_entropy=True: it changes the loss before the second pass"):
        with_gr_on("GRPO", tmp_path, folder, **adaptive)
    make("GRPO", tmp_path, folder, gr_lambda=0, **adaptive)


# ---- The table of the guide ----

METHODS = {
    "GR": {},
    "`gr_ascent=adaptive`": {"gr_ascent": "adaptive"},
    "`gr_ascent=momentum`": {"gr_ascent": "momentum", "gr_lambda": None, "optim_args": "momentum=0.9"},
    "`gr_second_pass_kind=functional`": {"gr_second_pass_kind": "functional", "gr_lambda": None},
    "IRE": {"gr_lambda": 0, "ire_kappa": 1.0, "ire_start_step": 0},
    "IRE, `ire_mask=random`": {"gr_lambda": 0, "ire_kappa": 1.0, "ire_start_step": 0, "ire_mask": "random"},
    "`optim=tvlars`": {"optim": "tvlars", "gr_lambda": 0},
    "TVLARS and GR": {"optim": "tvlars"},
}


def table_of_the_guide():
    text = (ROOT / "docs/guides/preference_and_rl.md").read_text(encoding="utf-8")
    lines = re.search(r"<!-- trainers -->\n(.*?)<!-- /trainers -->", text, re.DOTALL).group(1).strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *body = rows
    return {(row[0].strip("`").removesuffix("Trainer"), method): cell for row in body
            for method, cell in zip(header[1:], row[1:], strict=True)}  # fmt: skip


def test_the_table_has_every_trainer_and_method():
    assert table_of_the_guide().keys() == {(name, method) for name in COLUMNS for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COLUMNS)
def test_the_table_is_true(name, method, folder, tmp_path):
    flags = {"max_steps": 2 if "momentum" in method else 1, "gradient_accumulation_steps": 1, **METHODS[method]}
    if table_of_the_guide()[name, method] == "refused":
        with pytest.raises(ValueError, match=f"{name}Trainer|functional"):
            with_gr_on(name, tmp_path, folder, **flags).train()
        return
    trainer = with_gr_on(name, tmp_path, folder, **flags)
    before = toys.weights(trainer.model)
    trainer.train()
    after = toys.weights(trainer.model)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert any(entry.get("gr_r", 0) > 0 or entry.get("ire_kappa", 0) > 0 or "tvlars_phi" in entry for entry in logs)
