"""The sizes of the presets, against spec and paper; what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification

from hf_gr.models.cait import CaitBlock, ClassAttention, TalkingHeadsAttention
from hf_gr.models.presets import (
    LLAMA_PRESETS,
    RESNET_STEMS,
    WEIGHT_INITS,
    create_cait,
    create_efficientnet,
    create_image_model,
    create_llama,
    create_resnet,
    create_swin,
    create_vit,
    create_wide_resnet,
    initialize_weights,
)
from hf_gr.models.wide_resnet import PreActivationBlock, WideResNetConfig

SIZES = {
    "vit-ti": 5_362_762, "vit-s": 21_342_346, "vit-b": 85_152_010, "swin-tiny": 27_507_028, "swin-small": 48_807_652,
    "swin-base": 86_703_746, "cait-xxs12": 6_258_154, "cait-xxs24": 11_601_610, "cait-xs12": 14_032_378,
    "cait-s12": 24_903_370,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "parameters"), SIZES.items())
def test_presets_have_the_size_of_the_paper(preset, parameters):
    with torch.device("meta"):
        model = create_image_model(preset, [str(i) for i in range(10)])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.image_size == 32


#: As timm (Swin, ViT) and torchvision (ResNet, EfficientNet) count them at 1,000 classes.
IMAGENET_SIZES = {
    "swin-tiny-224": 28_288_354, "vit-s-224": 22_050_664, "resnet-50": 25_557_032, "efficientnet-b0": 5_288_548,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "parameters"), IMAGENET_SIZES.items())
def test_models_for_imagenet_are_those_everybody_has(preset, parameters):
    with torch.device("meta"):
        model = create_image_model(preset, [str(i) for i in range(1000)])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert getattr(model.config, "image_size", 224) == 224


def test_dropout_is_that_of_the_released_code_unless_it_is_given():
    names = ["a", "b"]
    assert create_image_model("vit-micro", names).config.hidden_dropout_prob == 0.1
    with torch.device("meta"):
        swin, cait = create_image_model("swin-tiny", names).config, create_image_model("cait-xxs12", names).config
        assert (swin.attention_probs_dropout_prob, swin.hidden_dropout_prob, swin.drop_path_rate) == (0.1, 0.0, 0.0)
        assert cait.dropout == 0.0 and create_image_model("cait-xxs12", names, dropout=0.2).config.dropout == 0.2
        assert create_image_model("swin-tiny", names, 64, 0.3).config.attention_probs_dropout_prob == 0.3
    with pytest.raises(ValueError, match=r"model='vit-xl': choose one of vit-micro, .*swin-tiny, .*cait-s12, .*resnet"):
        create_image_model("vit-xl", names)
    with pytest.raises(ValueError, match="image_size=33: swin-tiny cuts images into patches of 2 pixels"):
        create_swin("swin-tiny", names, 33)


# ---- CaiT ----


def test_talking_heads_that_do_not_talk_are_plain_attention():
    torch.manual_seed(0)
    layer = TalkingHeadsAttention(create_cait("cait-xxs12", ["a", "b"]).config)
    x = torch.randn(2, 5, 192)
    for mix in (layer.mix_scores, layer.mix_weights):
        torch.nn.init.eye_(mix.weight)
        torch.nn.init.zeros_(mix.bias)
    reference = torch.nn.MultiheadAttention(192, 4, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = layer.qkv.weight.data, layer.qkv.bias.data
    reference.out_proj.weight.data, reference.out_proj.bias.data = layer.out.weight.data, layer.out.bias.data
    torch.testing.assert_close(layer(x), reference(x, x, x)[0])
    # Heads in another order, their mixing with them: the same.
    order = torch.tensor([2, 0, 3, 1])
    torch.nn.init.normal_(layer.mix_scores.weight)
    torch.nn.init.normal_(layer.mix_weights.weight)
    before = layer(x)
    rows = (order[:, None] * 48 + torch.arange(48)).flatten()
    layer.qkv.weight.data = layer.qkv.weight.data.view(3, 192, 192)[:, rows].reshape(576, 192)
    layer.qkv.bias.data = layer.qkv.bias.data.view(3, 192)[:, rows].reshape(576)
    layer.out.weight.data = layer.out.weight.data[:, rows]
    for mix in (layer.mix_scores, layer.mix_weights):
        mix.weight.data = mix.weight.data[order][:, order]
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_class_attention_reads_all_tokens_and_changes_the_first():
    torch.manual_seed(0)
    config = create_cait("cait-xxs12", ["a", "b"]).config
    layer, x = ClassAttention(config), torch.randn(2, 5, 192)
    reference = torch.nn.MultiheadAttention(192, 4, batch_first=True)
    reference.in_proj_weight.data = torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]).data
    reference.in_proj_bias.data = torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]).data
    reference.out_proj.weight.data, reference.out_proj.bias.data = layer.out.weight.data, layer.out.bias.data
    torch.testing.assert_close(layer(x), reference(x[:, :1], x, x)[0])


def test_cait_starts_as_the_paper_has_it_and_loads_without_hf_gr(tmp_path):
    torch.manual_seed(0)
    model = create_cait("cait-xxs12", ["a", "b", "c"]).eval()
    blocks = [module for module in model.modules() if isinstance(module, CaitBlock)]
    assert len(blocks) == 14 and all((block.gamma1 == 1e-5).all() and (block.gamma2 == 1e-5).all() for block in blocks)
    for weight in (model.positions, model.layers[3].mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.classifier.bias.any()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    loss = model(images, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(images).logits, labels))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "cait.py").exists()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(images).logits, model(images).logits) and loaded.config.id2label[2] == "c"


def test_paper_preset():
    model = create_vit("vit-micro", ["a", "b"])
    assert not model.classifier.weight.any() and not model.vit.embeddings.cls_token.any()
    weight = model.vit.layers[0].mlp.fc1.weight  # uniform on +-sqrt(6 / (fan in + fan out))
    assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.01)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
    assert model.config.id2label == {0: "a", 1: "b"}
    with pytest.raises(ValueError, match="image_size=9: vit-micro cuts images into patches of 2 pixels"):
        create_vit("vit-micro", ["a", "b"], image_size=9)
    with pytest.raises(ValueError, match="model='vit-xl': choose one of vit-micro"):
        create_vit("vit-xl", ["a", "b"])


@pytest.mark.parametrize(("preset", "parameters"), [("resnet-18", 11_181_642), ("resnet-34", 21_289_802)])
def test_resnets_have_the_size_of_the_paper(preset, parameters):
    names = [str(i) for i in range(10)]
    model = create_resnet(preset, names)
    assert sum(p.numel() for p in model.parameters()) == parameters
    small = create_resnet(preset, names, stem="cifar")
    assert sum(p.numel() for p in small.parameters()) == parameters - 3 * 64 * (49 - 9)  # 7 x 7 became 3 x 3


@pytest.mark.parametrize(
    ("preset", "parameters"), [("resnet-20", 269_722), ("resnet-32", 464_154), ("resnet-56", 853_018)]
)
def test_resnets_for_cifar_have_the_size_of_the_paper_but_for_their_shortcuts(preset, parameters):
    """0.27 M, 0.46 M and 0.85 M (Table 6), with two shortcuts of 1 x 1 convolution and BatchNorm here, none there."""
    model = create_image_model(preset, [str(i) for i in range(10)]).eval()
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in model.parameters()) == parameters + shortcuts
    with torch.no_grad():
        states = model.resnet(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    layers = sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules()) + 1
    assert preset == f"resnet-{layers}"  # with the classifier


def test_resnet_50_has_its_stride_where_torchvision_has_it():
    with torch.device("meta"):
        model = create_resnet("resnet-50", ["a", "b"])
    first = model.resnet.encoder.stages[1].layers[0]
    kernels = [layer.convolution for layer in first.layer]
    assert [(c.kernel_size[0], c.stride[0]) for c in kernels] == [(1, 1), (3, 2), (1, 1)]
    assert [c.out_channels for c in kernels] == [128, 128, 512] and first.shortcut.convolution.stride == (2, 2)


# ---- Wide ResNet ----


def parameters_of_a_wide_resnet(depth, k, classes):
    """Counted by hand from Table 1 of the paper, with BatchNorm before each convolution and before the classifier."""
    blocks, count, inputs = (depth - 4) // 6, 3 * 16 * 9, 16
    for outputs in (16 * k, 32 * k, 64 * k):
        for _ in range(blocks):
            count += 2 * inputs + inputs * outputs * 9 + 2 * outputs + outputs * outputs * 9
            count += inputs * outputs if inputs != outputs else 0
            inputs = outputs
    return count + 2 * inputs + inputs * classes + classes


@pytest.mark.parametrize(
    ("preset", "parameters"), [("wrn-28-10", 36_479_194), ("wrn-16-8", 10_961_370), ("wrn-10-1", 77_850)]
)
def test_wide_resnets_have_the_size_of_the_paper(preset, parameters):
    """36.5 M and 11.0 M (Table 4)."""
    with torch.device("meta"):
        model = create_image_model(preset, [str(i) for i in range(10)])
    depth, k = map(int, preset.split("-")[1:])
    assert sum(p.numel() for p in model.parameters()) == parameters == parameters_of_a_wide_resnet(depth, k, 10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) + 3 == depth  # with the three shortcuts, as in the paper
    assert all(c.bias is None for c in convolutions)


def test_a_pre_activation_block_is_the_one_of_the_paper():
    """BatchNorm, ReLU, convolution, twice, and a shortcut that keeps x, or convolves what the first ReLU returns."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    plain, wide = PreActivationBlock(4, 4, 1, 0.0), PreActivationBlock(4, 6, 2, 0.0)
    for block, stride in ((plain, 1), (wide, 2)):
        for norm in (block.norm1, block.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        active = F.relu(F.batch_norm(x, None, None, block.norm1.weight, block.norm1.bias, training=True))
        inner = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
        inner = F.relu(F.batch_norm(inner, None, None, block.norm2.weight, block.norm2.bias, training=True))
        shortcut = x if stride == 1 else F.conv2d(active, block.shortcut.weight, stride=2)
        torch.testing.assert_close(block(x), shortcut + F.conv2d(inner, block.conv2.weight, padding=1))
    assert plain.shortcut is None


def test_a_wide_resnet_starts_as_the_paper_has_it_and_loads_without_hf_gr(tmp_path):
    torch.manual_seed(0)
    model = create_wide_resnet("wrn-10-1", ["a", "b", "c"], dropout=0.3).eval()
    weight = model.wide_resnet.stages[2][0].conv2.weight  # N(0, 2 / fan out)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert not model.classifier.bias.any() and (model.wide_resnet.norm.weight == 1).all()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model.base_model(images).last_hidden_state.shape == (2, 64, 8, 8)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "wide_resnet.py").exists()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(images).logits, output.logits) and loaded.config.id2label[2] == "c"
    features = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()(images).pooler_output
    torch.testing.assert_close(model.classifier(features), output.logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)  # dropout
    with pytest.raises(ValueError, match="depth=12: must be 6 n"):
        WideResNetConfig(12)


# ---- EfficientNet ----


def test_efficientnet_starts_as_torchvision_has_it_and_learns():
    torch.manual_seed(0)
    model = create_efficientnet("efficientnet-micro", ["a", "b"])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.momentum, norm.eps) == (0.1, 1e-5) for norm in norms)
    weight = model.efficientnet.encoder.top_conv.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.02)
    assert model.config.dropout_rate == 0.2
    images, labels = torch.randn(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    before = model(images, labels=labels).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
    assert model(images, labels=labels).loss < before / 2
    with pytest.raises(ValueError, match="image_size=16: efficientnet-micro halves the resolution five times"):
        create_efficientnet("efficientnet-micro", ["a", "b"], 16)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_stems_keep_or_divide_the_resolution(stem, side, tmp_path):
    torch.manual_seed(0)
    model = create_resnet("resnet-18", ["a", "b"], stem).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.resnet(images).last_hidden_state.shape == (2, 512, side, side)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    assert (tmp_path / "cifar_resnet.py").exists() == (stem == "cifar")


def test_mistakes_in_resnets_are_named():
    with pytest.raises(ValueError, match="stem='tiny': choose one of imagenet, cifar"):
        create_resnet("resnet-18", ["a", "b"], "tiny")
    with pytest.raises(ValueError, match="model='resnet-19': choose one of resnet-18, resnet-34"):
        create_resnet("resnet-19", ["a", "b"])
    assert RESNET_STEMS == ("imagenet", "cifar")


@pytest.mark.parametrize("scheme", WEIGHT_INITS)
def test_weight_inits_draw_what_they_say(scheme):
    """The standard deviation, and the bound if there is one, of linear layers and convolutions; nothing else moves."""
    torch.manual_seed(0)
    model = create_resnet("resnet-18", [str(i) for i in range(100)])
    others = {name: p.clone() for name, p in model.named_parameters() if p.ndim < 2}
    initialize_weights(model, scheme)
    conv = model.resnet.encoder.stages[1].layers[1].layer[0].convolution.weight
    for weight in (model.classifier[1].weight, conv):
        field = weight[0, 0].numel()
        fan_out, fan_in = weight.shape[0] * field, weight.shape[1] * field
        variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 2 / fan_in
        assert weight.std().item() == pytest.approx(variance**0.5, rel=0.02)  # 51,200 draws: error 0.3 %
        if scheme.endswith("uniform"):
            assert weight.abs().max().item() == pytest.approx((3 * variance) ** 0.5, rel=1e-3)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if p.ndim < 2)
    with pytest.raises(ValueError, match="weight_init='zeros': choose one of xavier_uniform"):
        initialize_weights(model, "zeros")


@pytest.mark.parametrize(
    ("preset", "parameters"), [("llama-60m", 65_242_528), ("llama-119m", 133_900_032), ("llama-229m", 228_287_232)]
)
def test_presets_have_their_size(preset, parameters):
    with torch.device("meta"):
        model = create_llama(preset, 50_257)
    assert model.config.vocab_size == 50_304
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_a_later_token_changes_no_earlier_logit(preset):
    torch.manual_seed(0)
    model = create_llama(preset, 64).eval()
    ids = torch.randint(0, 64, (1, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for position in (5, 11):
            changed = ids.clone()
            changed[0, position] = (ids[0, position] + 1) % 64
            after = model(input_ids=changed).logits
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
            assert (after[:, position:] - before[:, position:]).abs().max() > 1e-4


def test_a_wrong_preset_is_named():
    with pytest.raises(ValueError, match="model='llama-7b': choose one of llama-tiny"):
        create_llama("llama-7b", 64)


@pytest.mark.parametrize("create", [create_vit, create_swin, create_cait])
def test_no_pixels_are_not_the_default(create):
    preset = {create_vit: "vit-micro", create_swin: "swin-micro", create_cait: "cait-micro"}[create]
    for size in (0, -8):
        with pytest.raises(ValueError, match=f"image_size={size}: "):
            create(preset, ["a", "b"], size)
    with pytest.raises(ValueError, match="context=0"):
        create_llama("llama-tiny", 300, 0)
