"""The loss against an independent reference; the model around every kind of backbone, saved, loaded and taken apart."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, EfficientNetConfig, EfficientNetForImageClassification

from helpers import toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.models import BarlowTwinsConfig, BarlowTwinsForPretraining, barlow_twins_loss
from hf_gr.models.barlow_twins import SynchronizedBatchNorm2d, cross_correlation, remove_head
from hf_gr.models.presets import create_image_model

BACKBONES = ("resnet-18", "resnet-20", "vit-micro", "swin-micro", "cait-micro")
NAMES = [str(i) for i in range(10)]


def model_of(preset: str) -> BarlowTwinsForPretraining:
    torch.manual_seed(0)
    return BarlowTwinsForPretraining.of(create_image_model(preset, NAMES), projector_sizes=[24, 24, 16])


def views(count: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 3, size, size, generator=generator))


def reference(z1: torch.Tensor, z2: torch.Tensor, weight: float) -> torch.Tensor:
    """Entry by entry, from the sums that define them."""
    n, d = z1.shape
    total = z1.new_zeros(())
    for i in range(d):
        for j in range(d):
            a, b = z1[:, i], z2[:, j]
            covariance = (a * b).sum() / n - a.sum() / n * b.sum() / n
            variances = [(x * x).sum() / n - (x.sum() / n) ** 2 for x in (a, b)]
            c = covariance / ((variances[0] + 1e-5) * (variances[1] + 1e-5)) ** 0.5
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


@pytest.mark.parametrize("weight", [0.0, 0.0051, 1.0])
def test_loss_and_gradient_equal_the_reference(weight):
    torch.manual_seed(0)
    z1 = (torch.randn(17, 5) + 3).double().requires_grad_()
    z2 = (z1.detach() + 0.1 * torch.randn(17, 5)).requires_grad_()
    losses = barlow_twins_loss(z1, z2, weight), reference(z1, z2, weight)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for mine, expected in zip(*(torch.autograd.grad(loss, (z1, z2)) for loss in losses), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, weight), (z1, z2))


def test_default_weight_is_that_of_the_paper():
    z1, z2 = torch.randn(2, 9, 4, dtype=torch.float64)
    assert barlow_twins_loss(z1, z2) == barlow_twins_loss(z1, z2, 0.0051)
    assert BarlowTwinsConfig().projector_sizes == [4096] * 3 and BarlowTwinsConfig().off_diagonal_weight == 0.0051


def test_a_small_part_off_the_diagonal_is_not_lost_in_float32():
    """Here it is a millionth of the diagonal's sum, which a difference of the two sums would lose."""
    z = torch.linalg.qr(torch.randn(512, 256, dtype=torch.float64))[0] * 100
    z = z - z.mean(0)
    c = cross_correlation(z, z)
    expected = (c.square().sum() - c.diagonal().square().sum()).item()
    found = cross_correlation(z.float(), z.float()).square().fill_diagonal_(0).sum().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_half_precision_is_correlated_in_float32():
    z1, z2 = torch.randn(2, 64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(barlow_twins_loss(z1, z2), barlow_twins_loss(z1.clone(), z2))
    assert barlow_twins_loss(z1.bfloat16(), z2.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3, 1), (4, 3, 1)), ((1, 3), (1, 3))])
def test_what_cannot_be_correlated_is_refused(shapes):
    with pytest.raises(ValueError, match=r"give two of the same shape|Raise the batch size"):
        barlow_twins_loss(*map(torch.zeros, shapes))


@pytest.mark.parametrize("preset", BACKBONES)
def test_every_backbone_trains_and_comes_back_from_disk(preset, tmp_path):
    model, (x, y) = model_of(preset), views()
    widths = [layer.in_features for layer in model.projector if isinstance(layer, nn.Linear)]
    model.train()(x, y).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    features = model(x).features
    assert features.shape == (6, widths[0]) and model(x).loss is None
    model.save_pretrained(tmp_path)
    loaded = BarlowTwinsForPretraining.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).features, features)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(x, y).loss, model(x, y).loss, rtol=0, atol=0)


@pytest.mark.parametrize("preset", BACKBONES)
def test_backbone_is_an_ordinary_image_classifier(preset, tmp_path):
    model, (x, _) = model_of(preset).eval(), views()
    classifier = model.image_classifier(["cat", "dog", "mouse"])
    classifier.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded(x).logits.shape == (6, 3) and loaded.config.id2label[1] == "dog"
    assert type(loaded) is type(create_image_model(preset, NAMES))
    remove_head(loaded)
    assert torch.equal(loaded(x).logits, model(x).features)
    assert model.image_classifier()(x).logits.shape == (6, 10)


def test_backbone_of_transformers_alone():
    config = EfficientNetConfig(image_size=64, width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256)
    model = BarlowTwinsForPretraining.of(EfficientNetForImageClassification(config), projector_sizes=[8])
    x, y = views(size=64)
    assert model(x, y).loss.requires_grad and model(x).features.shape == (6, 256)


def test_pretrained_weights_stay():
    classifier = create_image_model("resnet-20", NAMES)
    for p in classifier.parameters():
        nn.init.normal_(p)
    before = {name: p.clone() for name, p in classifier.named_parameters()}
    model = BarlowTwinsForPretraining.of(classifier, projector_sizes=[8])
    assert all(torch.equal(before[name], p) for name, p in model.backbone.named_parameters())


def test_synchronized_batch_norm_is_batch_norm_in_one_process():
    model, plain = model_of("resnet-20"), create_image_model("resnet-20", NAMES)
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    remove_head(plain)
    assert any(type(module) is SynchronizedBatchNorm2d for module in model.modules())
    x, _ = views()
    assert torch.equal(model.backbone.train()(x).logits, plain.train()(x).logits)
    assert torch.equal(model.backbone.eval()(x).logits, plain.eval()(x).logits)


def test_bad_configurations():
    with pytest.raises(ValueError, match=r"projector_sizes=\[8, 0\]"):
        BarlowTwinsForPretraining.of(create_image_model("vit-micro", NAMES), projector_sizes=[8, 0])
    with pytest.raises(ValueError, match="backbone_config=None"):
        BarlowTwinsForPretraining(BarlowTwinsConfig())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer called classifier"):
        remove_head(toys.llama())


def pairs(count: int = 16) -> list[dict]:
    x, y = views(count)
    return [{"pixel_values": a, "second_pixel_values": b} for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize(
    "flags",
    [
        {"gr_warmup": "none", "gr_r": 0.05},
        {"gr_lambda": 0, "optim": "lars"},
        {"gr_lambda": 0, "optim": "lamb"},
        {"gr_warmup": "none", "optim": "tvlars", "lr_scheduler_type": "constant"},
        {"gr_lambda": 0, "ire_kappa": 1.0, "ire_mask": "random", "ire_start_step": 0},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_trainer_trains_it_unchanged(flags, tmp_path):
    flags = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, **flags}
    model = model_of("resnet-20")
    before = toys.weights(model)
    trainer = GRTrainer(model, GRConfig(**toys.arguments(tmp_path, **flags)), train_dataset=pairs())
    losses = [entry["loss"] for entry in (trainer.train(), trainer.state.log_history)[1] if "loss" in entry]
    assert len(losses) == 3 and not torch.equal(toys.weights(model), before)
