"""The sizes of the presets, against spec and paper; what they compute."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_gr.models.cait import CaitBlock, ClassAttention, TalkingHeadsAttention
from hf_gr.models.presets import (
    LLAMA_PRESETS,
    RESNET_STEMS,
    WEIGHT_INITS,
    create_cait,
    create_image_model,
    create_llama,
    create_resnet,
    create_swin,
    create_vit,
    initialize_weights,
)

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


def test_swin_for_imagenet_is_the_one_everybody_has():
    with torch.device("meta"):
        model = create_image_model("swin-tiny-224", [str(i) for i in range(1000)])
    assert sum(p.numel() for p in model.parameters()) == 28_288_354 and model.config.image_size == 224


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


@pytest.mark.parametrize(("preset", "parameters"), [("resnet-20", 269_722), ("resnet-32", 464_154)])
def test_resnets_for_cifar_have_the_size_of_the_paper_but_for_their_shortcuts(preset, parameters):
    """0.27 M and 0.46 M (Table 6), with two shortcuts that are 1 x 1 convolutions and BatchNorm here, nothing there."""
    model = create_image_model(preset, [str(i) for i in range(10)]).eval()
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in model.parameters()) == parameters + shortcuts
    with torch.no_grad():
        states = model.resnet(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    layers = sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules()) + 1
    assert preset == f"resnet-{layers}"  # with the classifier


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
