"""Other people's trainers behind `GRMixin`, and what they do that `Trainer` does not. TRL's: `test_trl.py`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from helpers import toys
from helpers.reference import train as reference_train
from helpers.training import with_gr
from hf_gr import LAMB, LARS, TVLARS, GRConfig, GRMixin, GRTrainer

# ---- A loss with weights of its own ----


class ZeroGradients(TrainerCallback):
    """Those of a loss, which `Trainer` does not know of."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


class HeadTrainer(Trainer):
    """The classifier belongs to the loss: the optimizer has it, `model.parameters()` has not."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        set_seed(1)
        self.head = nn.Linear(6, 3).double()
        self.add_callback(ZeroGradients())

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "optimizer_dict": [{"params": [*model.parameters(), *self.head.parameters()]}]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(self.head(model(inputs["x"])), inputs["labels"])


class GRHeadTrainer(GRMixin, HeadTrainer):
    pass


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(4, 6)

    def forward(self, x):
        return self.features(x).tanh()


def head_data(count=12):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(4, generator=generator, dtype=torch.float64), "labels": torch.tensor(i % 3)}
        for i in range(count)
    ]


def head_trainer(tmp_path, cls=GRHeadTrainer, config=GRConfig, **kwargs):
    set_seed(0)
    settings = {"max_steps": 3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1, **kwargs}
    args = config(**toys.arguments(tmp_path, remove_unused_columns=False, **settings))
    return cls(model=Body().double(), args=args, train_dataset=head_data())


def head_windows(accumulation, steps, batch=2):
    def loss(examples):
        parts = [examples[k : k + batch] for k in range(0, len(examples), batch)]
        stacked = [(torch.stack([e["x"] for e in p]), torch.stack([e["labels"] for e in p])) for p in parts]
        return lambda modules: sum(F.cross_entropy(modules[1](modules[0](x)), y) for x, y in stacked) / len(parts)

    size = batch * accumulation
    return [loss(head_data()[k * size : (k + 1) * size]) for k in range(steps)]


OPTIMIZERS = {
    "sgd": (None, lambda params: torch.optim.SGD(params, lr=0.1)),
    "lars": (None, lambda params: LARS(params, lr=0.1)),
    "lamb": (None, lambda params: LAMB(params, lr=0.1)),
    "tvlars": (
        "tv_lambda=0.5,delay_steps=2,gamma_min=0.01",
        lambda params: TVLARS(params, lr=0.1, tv_lambda=0.5, delay_steps=2, gamma_min=0.01),
    ),
}


@pytest.mark.parametrize(
    ("optim", "scope", "degree"),
    [
        ("sgd", "global", 0.5),
        ("sgd", "global", 1.0),
        ("sgd", "micro", 0.5),
        ("lars", "global", 0.5),
        ("lamb", "global", 0.5),
        ("tvlars", "global", 0.5),
    ],
)
def test_weights_of_the_loss_are_regularized_like_those_of_the_model(optim, scope, degree, tmp_path):
    optim_args, make_optimizer = OPTIMIZERS[optim]
    accumulation, steps = (2, 3) if scope == "global" else (1, 3)
    trainer = head_trainer(tmp_path, optim=optim, optim_args=optim_args, gr_warmup="none", gr_lambda=0.1 * degree,
                           gr_scope=scope, gradient_accumulation_steps=accumulation)  # fmt: skip
    modules = nn.ModuleList([copy.deepcopy(trainer.model), copy.deepcopy(trainer.head)])
    expected = reference_train(modules, head_windows(accumulation, steps), make_optimizer, strategy="none",
                               warmup_steps=1, r=0.1, lambda_=0.1 * degree, max_grad_norm=float("inf"))  # fmt: skip
    trainer.train()
    reached = toys.weights(nn.ModuleList([trainer.model, trainer.head]))
    assert (reached - expected[-1]).norm() / (expected[-1] - expected[0]).norm() < 1e-12


def test_gr_lambda_0_is_the_other_trainer_bit_for_bit(tmp_path):
    plain = head_trainer(tmp_path, HeadTrainer, TrainingArguments)
    off = head_trainer(tmp_path, gr_lambda=0)
    for trainer in (plain, off):
        trainer.train()
    assert all(
        torch.equal(toys.weights(getattr(plain, part)), toys.weights(getattr(off, part))) for part in ("model", "head")
    )


def test_a_gradient_of_the_loss_that_is_not_finite_skips_the_step(tmp_path):
    class Watched(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after.append((toys.weights(trainer.model), toys.weights(trainer.head)))

    after = []
    trainer = head_trainer(tmp_path, gr_lambda=0, ire_kappa=1.0, ire_mask="uniform", max_steps=2)
    trainer.add_callback(Watched())
    trainer.head.bias.register_hook(lambda grad: grad * (float("inf") if trainer.state.global_step == 0 else 1))
    before = toys.weights(trainer.model), toys.weights(trainer.head)
    trainer.train()
    assert trainer.nonfinite_guard.skipped_steps == 1
    assert all(map(torch.equal, after[0], before)) and not torch.equal(after[1][0], before[0])


def test_what_the_optimizer_does_not_train_is_not_perturbed_and_keeps_the_gradient_of_the_first_pass(tmp_path):
    model = toys.vit()
    trained = [p for name, p in model.named_parameters() if "classifier" in name]
    others = [p for name, p in model.named_parameters() if "classifier" not in name]
    trained[0].requires_grad_(False)
    start = toys.weights(model)
    seen, gradients = [], []

    class Watched(GRMixin, Trainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().compute_loss(model, *args, **kwargs)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.append([p.grad.clone() for p in others])

    args = GRConfig(**toys.arguments(tmp_path, max_steps=1, gr_warmup="none", max_grad_norm=0.0))
    trainer = Watched(model=model, args=args, train_dataset=toys.images(), callbacks=[Keep()],
                      optimizers=(torch.optim.SGD(trained, lr=0.1), None))  # fmt: skip
    trainer.train()
    moved = [p for p, a, b in zip(model.parameters(), *seen, strict=True) if not torch.equal(a, b)]
    assert len(moved) == 1 and moved[0] is trained[1]

    plain = toys.vit()
    nn.utils.vector_to_parameters(start, plain.parameters())
    batch = toys.images(2)
    logits = plain(pixel_values=torch.stack([e["pixel_values"] for e in batch])).logits
    F.cross_entropy(logits, torch.tensor([e["labels"] for e in batch])).backward()
    expected = [p.grad for name, p in plain.named_parameters() if "classifier" not in name]
    for grad, expected_grad in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


# ---- sentence-transformers ----


@pytest.fixture(scope="module")
def sentence_models(tmp_path_factory):
    """Folders of a BERT and of one that classifies, with a tokenizer, and pairs of sentences with a label."""
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("sentences")
    words = {"<unk>": 0, **{f"word{i}": i for i in range(1, 30)}}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", sep_token="word1")
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        num_labels=1)  # fmt: skip
    for cls in (BertModel, BertForSequenceClassification):
        set_seed(0)
        cls(config).save_pretrained(folder / cls.__name__)
        fast.save_pretrained(folder / cls.__name__)
    generator = torch.Generator().manual_seed(0)

    def sentence():
        return " ".join(f"word{int(i)}" for i in torch.randint(1, 30, (5,), generator=generator))

    return folder, Dataset.from_list([{"a": sentence(), "b": sentence(), "label": i % 2 / 1} for i in range(24)])


def sentence_trainer(kind, folder, data, output_dir, has_gr=True, has_head=True, **flags):
    import sentence_transformers as st
    from datasets import Value
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, SoftmaxLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if kind == "CrossEncoder":
        model = st.CrossEncoder(str(folder / "BertForSequenceClassification"), num_labels=1, device="cpu")
        loss = BinaryCrossEntropyLoss(model)
    else:
        body = Transformer(str(folder / "BertModel"))
        model = st.SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu")
        set_seed(1)
        loss = SoftmaxLoss(model, 8, 2) if has_head else CosineSimilarityLoss(model)
        data = data.cast_column("label", Value("int64")) if has_head else data
    trainer_class, config = getattr(st, f"{kind}Trainer"), getattr(st, f"{kind}TrainingArguments")
    if has_gr:
        trainer_class, config = with_gr(trainer_class, config)
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
                "max_steps": 4, **flags}  # fmt: skip
    return trainer_class(
        model=model, args=config(**toys.arguments(output_dir, **settings)), train_dataset=data, loss=loss
    )


KINDS = ["SentenceTransformer", "CrossEncoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_with_gr_is_a_loop_of_two_passes_bit_for_bit(kind, sentence_models, tmp_path):
    r = 0.05
    trainer = sentence_trainer(kind, *sentence_models, tmp_path, gr_warmup="none", gr_r=r)
    trainer.train()

    by_hand = sentence_trainer(kind, *sentence_models, tmp_path, has_gr=False)
    by_hand.model.train()
    loss, batches = by_hand.loss, iter(by_hand.get_train_dataloader())
    optimizer = by_hand.create_optimizer()
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(batch):
        loss(*by_hand.collect_features(dict(batch))).backward()

    for _ in range(4):
        batch = next(batches)
        backward(batch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        theta = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p.addcmul_(p.grad, r / (norm + 1e-12))
        optimizer.zero_grad()
        backward(batch)
        with torch.no_grad():
            for p, value in zip(params, theta, strict=True):
                p.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(toys.weights(trainer.loss), toys.weights(loss))


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_without_gr_and_resumed_are_bit_for_bit_the_same(kind, sentence_models, tmp_path):
    plain = sentence_trainer(kind, *sentence_models, tmp_path / "plain", has_gr=False)
    off = sentence_trainer(kind, *sentence_models, tmp_path / "off", gr_lambda=0)
    for trainer in (plain, off):
        trainer.train()
    assert torch.equal(toys.weights(plain.loss), toys.weights(off.loss))

    flags = {"save_strategy": "steps", "save_steps": 2, "optim": "lars", "gr_warmup_steps": 1}
    # Their checkpoints leave out the weights of a loss: one without.
    whole, resumed = (sentence_trainer(kind, *sentence_models, tmp_path, has_head=False, **flags) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
    assert not torch.equal(toys.weights(whole.model), toys.weights(plain.model))
    whole.create_model_card()
    assert "- hf_gr\n" in (tmp_path / "README.md").read_text()


# ---- A step of one's own ----


def test_attributes_can_be_kept_from_the_second_pass(tmp_path):
    class Counts(GRTrainer):
        gr_first_pass_only = (*GRTrainer.gr_first_pass_only, "seen")
        seen = None

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.passes = getattr(self, "passes", 0) + 1
            self.seen["labels"].append(inputs["labels"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = GRConfig(**toys.arguments(tmp_path, max_steps=3, gr_warmup="none"))
    trainer = Counts(model=toys.vit(), args=args, train_dataset=toys.images())
    trainer.seen = seen = {"labels": []}
    trainer.train()
    assert trainer.seen is seen and len(seen["labels"]) == 3 and trainer.passes == 6


class Augments(GRTrainer):
    """Adds noise to a batch as it prepares it: from a generator of its own, which no pass replays, and from torch's."""

    generator = torch.Generator().manual_seed(0)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.prepared = {False: [], True: []}, 0

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        self.prepared += 1
        pixels = prepared["pixel_values"]
        noise = torch.randn(pixels.shape, generator=self.generator) + torch.randn(pixels.shape)
        return {**prepared, "pixel_values": pixels + noise}

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, {**inputs, "pixel_values": inputs.pop("pixel_values")}, *args, **kwargs)
        self.losses[self.gr_second_pass].append(loss.item())
        return loss


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_inputs_are_prepared_once(scope, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, gr_warmup="none", gr_r=1e-6,
                                     gr_scope=scope))  # fmt: skip
    trainer = Augments(model=toys.vit(dropout=0.3), args=args, train_dataset=toys.images())
    trainer.train()
    assert trainer.prepared == 4
    assert trainer.losses[True] == pytest.approx(trainer.losses[False], abs=1e-5)  # the same noise, the same dropout
    assert len(set(trainer.losses[False])) == 4 and "_prepare_inputs" not in vars(trainer)


def test_along_the_momentum_a_step_has_to_prepare_its_inputs(tmp_path):
    class Unprepared(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    class GRUnprepared(GRMixin, Unprepared):
        pass

    args = GRConfig(**toys.arguments(tmp_path, max_steps=2, gr_warmup="none", gr_ascent="momentum"))
    trainer = GRUnprepared(model=toys.vit(), args=args, train_dataset=toys.images())
    with pytest.raises(ValueError, match="gr_ascent='momentum': GRUnprepared has a training_step that does not call"):
        trainer.train()


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_training_step_outside_of_train_is_the_first_step(has_optimizer, tmp_path):
    data = toys.images(2)
    args = GRConfig(**toys.arguments(tmp_path, max_steps=1, gr_lambda=0.05, gr_warmup="none", max_grad_norm=0.0))
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append([p.grad.clone() for p in model.parameters()])

    GRTrainer(model=toys.vit(), args=args, train_dataset=data, callbacks=[Keep()]).train()
    alone = GRTrainer(model=toys.vit(), args=args, train_dataset=data)
    if has_optimizer:
        alone.create_optimizer()
    alone.training_step(alone.model, next(iter(alone.get_train_dataloader())))
    for p, expected in zip(alone.model.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(p.grad, expected)  # the norm is summed in the order of the optimizer's groups
