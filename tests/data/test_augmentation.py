"""Augmentation does what Pillow does, and draws what it says."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from hf_gr.data import augmentation
from hf_gr.data.augmentation import (
    Augmentation,
    Mixing,
    barlow_twins_views,
    crop_boxes,
    random_crop,
    random_flip,
    resized_crop,
)

GRAY, COLOR = 1, 3
SIZES = [(32, 32), (24, 45)]


def pictures(count=6, channels=COLOR, size=(24, 45), seed=0):
    """Smooth random images of 8 bits, and the same as Pillow's."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 6, generator=generator)
    levels = (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = levels.permute(0, 2, 3, 1).numpy()
    return levels / 255, [Image.fromarray(array.squeeze(-1) if channels == GRAY else array) for array in arrays]


def from_pillow(images):
    arrays = [np.asarray(image) for image in images]
    return torch.stack([torch.from_numpy(a.copy()).view(*a.shape[:2], -1).permute(2, 0, 1) for a in arrays]) / 255


def levels_apart(ours, pillows):
    """By how many of 255 levels the images differ at most, if ours are rounded."""
    return ((ours * 255).round() - from_pillow(pillows) * 255).abs().max().item()


FACTORS = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 1.9])
ENHANCED = {
    ImageEnhance.Brightness: augmentation.adjust_brightness,
    ImageEnhance.Contrast: augmentation.adjust_contrast,
    ImageEnhance.Color: augmentation.adjust_saturation,
    ImageEnhance.Sharpness: augmentation.adjust_sharpness,
}


@pytest.mark.parametrize("channels", [GRAY, COLOR])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pillow", ENHANCED)
def test_enhancements_are_pillows(pillow, size, channels):
    images, pillows = pictures(channels=channels, size=size)
    expected = [pillow(image).enhance(factor) for image, factor in zip(pillows, FACTORS.tolist(), strict=True)]
    # Pillow rounds twice: the gray or smoothed image, and the mix.
    assert levels_apart(ENHANCED[pillow](images, FACTORS), expected) <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [GRAY, COLOR])
def test_operations_on_levels_are_pillows(channels, size):
    images, pillows = pictures(channels=channels, size=size)
    thresholds, bits = [0, 1, 100, 128, 254, 255], [1, 2, 4, 6, 7, 8]
    solarized = augmentation.solarize(images, torch.tensor(thresholds))
    assert levels_apart(solarized, map(ImageOps.solarize, pillows, thresholds)) == 0
    posterized = augmentation.posterize(images, torch.tensor(bits))
    assert levels_apart(posterized, map(ImageOps.posterize, pillows, bits)) == 0
    assert levels_apart(augmentation.equalize(images), map(ImageOps.equalize, pillows)) == 0
    # Pillow cuts the stretched values off, and the luma, where the nearest would be above.
    assert levels_apart(augmentation.autocontrast(images), map(ImageOps.autocontrast, pillows)) <= 1
    gray = [image.convert("L").convert(image.mode) for image in pillows]
    assert levels_apart(augmentation.grayscale(images), gray) <= 1


def test_values_that_rounding_has_moved_are_of_the_same_level():
    images, _ = pictures()
    moved = images + 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    threshold, bits = torch.full((6,), 128), torch.full((6,), 3)
    for operation, *arguments in (
        (augmentation.solarize, threshold),
        (augmentation.posterize, bits),
        (augmentation.equalize,),
    ):
        torch.testing.assert_close(operation(moved, *arguments), operation(images, *arguments), atol=1e-5, rtol=0)


def test_an_image_of_one_color_stays():
    images = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1).repeat(2, 1, 6, 7)
    for operation in (augmentation.autocontrast, augmentation.equalize):
        torch.testing.assert_close(operation(images), (images * 255).round() / 255, atol=2e-3, rtol=0)
    torch.testing.assert_close(augmentation.gaussian_blur(images, torch.tensor([0.1, 2.0])), images)


def test_hue_is_turned_in_hsv():
    images, _ = pictures(channels=COLOR)
    shifts = torch.tensor([-0.5, -0.1, 0.0, 0.05, 1 / 3, 0.5])
    turned = augmentation.adjust_hue(images, shifts)
    for image, result, shift in zip(images, turned, shifts.tolist(), strict=True):
        for pixel, new in zip(image.flatten(1).T[::37].tolist(), result.flatten(1).T[::37], strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
            torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[4], images[4].roll(1, 0), atol=1e-5, rtol=0)  # a third: red becomes green
    gray = images.mean(1, keepdim=True)
    assert torch.equal(augmentation.adjust_hue(gray, shifts), gray)
    torch.testing.assert_close(augmentation.adjust_hue(gray.expand(-1, 3, -1, -1), shifts), gray.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("channels", [GRAY, COLOR])
def test_blur_is_gaussian_and_close_to_pillows(channels):
    images, pillows = pictures(channels=channels, size=(40, 45))
    sigmas = [0.1, 0.5, 1.0, 1.5, 2.0, 0.8]
    blurred = augmentation.gaussian_blur(images, torch.tensor(sigmas))
    inside = slice(8, -8)  # at the border, weights of 4 standard deviations are missing
    for image, result, sigma in zip(images, blurred, sigmas, strict=True):
        expected = gaussian_filter(image.numpy(), (0, sigma, sigma), truncate=4)
        # Both cut off at about 4 standard deviations, but not at the same pixel.
        np.testing.assert_allclose(result.numpy()[:, inside, inside], expected[:, inside, inside], atol=3e-4)
    # Pillow approximates the Gaussian by three boxes.
    near = [image.filter(ImageFilter.GaussianBlur(sigma)) for image, sigma in zip(pillows, sigmas, strict=True)]
    assert levels_apart(blurred, near) <= 3


def share_of_other_pixels(ours, pillows):
    return ((ours * 255).round() != (from_pillow(pillows) * 255).round()).float().mean().item()


def transformed(image, matrix):
    fill = 128 if image.mode == "L" else (128,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


@pytest.mark.parametrize("channels", [GRAY, COLOR])
@pytest.mark.parametrize("size", SIZES)
def test_shears_translations_and_rotations_are_pillows(size, channels):
    images, pillows = pictures(channels=channels, size=size)
    amounts = [-0.297, -0.153, 0.0, 0.101, 0.203, 0.299]
    shears, pixels, degrees = torch.tensor(amounts), [-9, -2, 0, 1, 5, 40], [-30, -15, 0, 7, 30, 89]
    for ours, theirs in (
        (augmentation.shear(images, x=shears), [(1, a, 0, 0, 1, 0) for a in amounts]),
        (augmentation.shear(images, y=shears), [(1, 0, 0, a, 1, 0) for a in amounts]),
        (augmentation.translate(images, x=torch.tensor(pixels)), [(1, 0, p, 0, 1, 0) for p in pixels]),
        (augmentation.translate(images, y=torch.tensor(pixels)), [(1, 0, 0, 0, 1, p) for p in pixels]),
    ):
        # Where the place is half way between two pixels, rounding decides.
        assert share_of_other_pixels(ours, map(transformed, pillows, theirs)) < 0.01
    fill = 128 if channels == GRAY else (128,) * 3
    rotated = [image.rotate(angle, fillcolor=fill) for image, angle in zip(pillows, degrees, strict=True)]
    assert share_of_other_pixels(augmentation.rotate(images, torch.tensor(degrees).float()), rotated) < 0.01


@pytest.mark.parametrize("target", [(24, 45), (16, 16), (60, 50)])
def test_resized_crops_are_pillows(target):
    images, pillows = pictures(count=40, size=(24, 45))
    torch.manual_seed(0)
    boxes = crop_boxes(40, (24, 45), (0.08, 1.0))
    expected = [
        image.crop((x, y, x + w, y + h)).resize(target[::-1], Image.Resampling.BICUBIC)
        for image, (y, x, h, w) in zip(pillows, boxes.tolist(), strict=True)
    ]
    # Pillow rounds to 8 bits after each of the two axes.
    assert levels_apart(resized_crop(images, boxes, target), expected) <= 2


def test_crops_are_drawn_as_documented():
    torch.manual_seed(0)
    top, left, height, width = crop_boxes(4000, (100, 150), (0.2, 0.6)).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 150).all()
    share, ratio = height * width / 15_000, width / height
    assert 0.19 < share.min() < 0.21 and 0.59 < share.max() < 0.61
    # Of crops in a wide image, all ratios fit: uniform shares, 0.4 / sqrt(12) / sqrt(4000) = 0.002.
    assert share.mean().item() == pytest.approx(0.4, abs=0.01)
    assert ratio.min() > 0.73 and ratio.max() < 1.36 and ratio.log().mean().abs() < 0.01
    assert len({*map(tuple, torch.stack([top, left]).T.tolist())}) > 2000


@pytest.mark.parametrize(
    ("size", "box"), [((2, 200), [0, 98, 2, 3]), ((200, 2), [98, 0, 3, 2]), ((9, 10), [0, 0, 9, 10])]
)
def test_where_no_crop_fits_it_is_the_largest_in_the_center(size, box):
    if size == (9, 10):  # the whole image, if no drawn box of the whole area fits
        boxes = crop_boxes(50, size, (1.0, 1.0))
        assert box in boxes.tolist()
    else:
        assert crop_boxes(3, size, (0.9, 1.0)).tolist() == [box] * 3


def test_random_crop_takes_a_window_of_the_reflected_image():
    torch.manual_seed(0)
    images = torch.randn(200, 2, 5, 6)
    padded = F.pad(images, (2,) * 4, mode="reflect")
    offsets = []
    for image, crop in zip(padded, random_crop(images, 2), strict=True):
        matches = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 5, x : x + 6], crop)]
        assert len(matches) == 1
        offsets += matches
    assert len(set(offsets)) == 25  # every shift occurs


def test_random_flip_mirrors_about_half():
    torch.manual_seed(0)
    images = torch.randn(400, 1, 3, 3)
    flipped = random_flip(images)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert 160 < sum(mirrored) < 240
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, images, strict=True))


# ---- RandAugment ----


def test_magnitudes_are_those_of_the_paper_on_a_scale_of_30():
    images, pillows = pictures(size=(32, 64))
    full, none = torch.ones(6), torch.zeros(6)
    operations = augmentation.RAND_AUGMENT
    assert len(operations) == 14
    for name, expected in {
        "shear_x": augmentation.shear(images, x=0.3 * full),
        "shear_y": augmentation.shear(images, y=0.3 * full),
        "translate_x": augmentation.translate(images, x=29 * full),  # 150 of 331 pixels: 29.003 of 64
        "translate_y": augmentation.translate(images, y=14 * full),  # 14.5 of 32
        "rotate": augmentation.rotate(images, 30 * full),
        "brightness": augmentation.adjust_brightness(images, 1.9 * full),
        "color": augmentation.adjust_saturation(images, 1.9 * full),
        "contrast": augmentation.adjust_contrast(images, 1.9 * full),
        "sharpness": augmentation.adjust_sharpness(images, 1.9 * full),
        "posterize": augmentation.posterize(images, 4 * full),
        "solarize": 1 - images,
    }.items():
        torch.testing.assert_close(operations[name](images, full), expected)
        unsigned = name in ("posterize", "solarize")
        assert torch.equal(operations[name](images, -full), operations[name](images, full)) == unsigned
        if name != "solarize":  # at zero it inverts white
            torch.testing.assert_close(operations[name](images, none), images, atol=1e-6, rtol=0)
    assert levels_apart(operations["equalize"](images, full), map(ImageOps.equalize, pillows)) == 0
    assert torch.equal(operations["identity"](images, full), images)


def test_rand_augment_draws_each_operation_alike_and_for_each_image(monkeypatch):
    counts = dict.fromkeys(augmentation.RAND_AUGMENT, 0)
    signs = []

    def counting(name):
        def operation(images, magnitude):
            counts[name] += len(images)
            signs.extend(magnitude.tolist())
            return images

        return operation

    monkeypatch.setattr(augmentation, "RAND_AUGMENT", {name: counting(name) for name in counts})
    torch.manual_seed(0)
    augmentation.rand_augment(torch.zeros(1400, 1, 2, 2), 2, 15)
    assert sum(counts.values()) == 2800
    # 200 of each, and five standard deviations are 68.
    assert all(132 < count < 268 for count in counts.values())
    assert {*signs} == {0.5, -0.5} and abs(sum(signs)) < 0.5 * 5 * 2800**0.5


# ---- All together ----

EVERYTHING = {
    "crop_scale": (0.08, 1.0),
    "flip": 0.5,
    "crop_padding": 2,
    "rand_augment": (2, 15),
    "color_jitter": (0.4, 0.4, 0.2, 0.1),
    "color_jitter_probability": 0.8,
    "grayscale": 0.2,
    "blur": 0.5,
    "solarize": 0.2,
}
NORMALIZATION = {GRAY: ([0.45], [0.25]), COLOR: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def normalized(images):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in NORMALIZATION[images.shape[1]])
    return (images - mean) / std


def unnormalized(images):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in NORMALIZATION[images.shape[1]])
    return images * std + mean


@pytest.mark.parametrize("channels", [GRAY, COLOR])
@pytest.mark.parametrize(
    ("size", "target"), [((8, 8), None), ((64, 64), 32), ((24, 45), None), ((24, 45), (16, 20)), ((3, 3), None)]
)
def test_every_augmentation_takes_images_of_any_size_and_channels(size, target, channels):
    images, _ = pictures(12, channels, size)
    inputs, before = normalized(images), normalized(images)
    augment = Augmentation(*NORMALIZATION[channels], target, **EVERYTHING)
    torch.manual_seed(0)
    augmented = augment(inputs)
    height, width = size if target is None else (target, target) if isinstance(target, int) else target
    assert augmented.shape == (12, channels, height, width) and augmented.dtype == torch.float32
    assert unnormalized(augmented).min() > -1e-5 and unnormalized(augmented).max() < 1 + 1e-5
    assert torch.equal(inputs, before)
    torch.manual_seed(0)
    assert torch.equal(augment(inputs), augmented)
    assert not torch.equal(augment(inputs), augmented)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(inputs), augmented)


@pytest.mark.parametrize("name", sorted(EVERYTHING.keys() - {"color_jitter_probability"}))
def test_each_image_gets_its_own_draw(name):
    images, _ = pictures(1, size=(16, 16))
    one = normalized(images).repeat(64, 1, 1, 1)
    torch.manual_seed(0)
    augmented = Augmentation(*NORMALIZATION[COLOR], **{name: EVERYTHING[name]})(one)
    different = {tuple(image.flatten().mul(1000).round().tolist()) for image in augmented}
    # Those that only happen or not give two images, the others many.
    least = 2 if name in ("flip", "grayscale", "solarize") else 12
    assert len(different) >= least


@pytest.mark.parametrize("name", ["flip", "grayscale", "blur", "solarize", "color_jitter"])
def test_probabilities_are_kept(name):
    images, _ = pictures(400, size=(6, 6))
    options = {name: 0.3}
    if name == "color_jitter":
        options = {"color_jitter": (0.4, 0.4, 0.2, 0.1), "color_jitter_probability": 0.3}
    torch.manual_seed(0)
    augmented = Augmentation(*NORMALIZATION[COLOR], blur_sigma=(1.0, 2.0), **options)(normalized(images))
    changed = ((augmented - normalized(images)).abs().amax((1, 2, 3)) > 1e-4).sum().item()
    assert 74 < changed < 166  # 120, and five standard deviations are 46


def test_certain_operations_follow_each_other():
    images, _ = pictures(4)
    augment = Augmentation([0.5] * 3, [0.5] * 3, grayscale=1.0, blur=0.5, solarize=1.0)
    augmented = augment(images * 2 - 1)
    torch.testing.assert_close(augmented[:, :1].expand_as(augmented), augmented)


def test_color_jitter_is_in_random_order():
    images, _ = pictures(1)
    strengths = torch.tensor([[1.8, 0.2, 1.0, 0.0]]).repeat(24, 1)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    results = augmentation.color_jitter(images.repeat(24, 1, 1, 1), strengths, orders)
    first = augmentation.adjust_contrast(augmentation.adjust_brightness(images, strengths[:1, 0]), strengths[:1, 1])
    then = augmentation.adjust_brightness(augmentation.adjust_contrast(images, strengths[:1, 1]), strengths[:1, 0])
    for order, result in zip(orders.tolist(), results, strict=True):
        expected = first if order.index(0) < order.index(1) else then
        torch.testing.assert_close(result, expected[0], atol=1e-5, rtol=0)
    assert not torch.allclose(first, then, atol=0.05)


def test_views_of_barlow_twins():
    first, second = barlow_twins_views(16, *NORMALIZATION[COLOR])
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    for view in (first, second):
        assert view.color_jitter == (0.4, 0.4, 0.2, 0.1) and view.color_jitter_probability == 0.8
        assert (view.grayscale, view.flip, view.crop_scale) == (0.2, 0.5, (0.08, 1.0))
        assert view(normalized(pictures(4, size=(20, 24))[0])).shape == (4, 3, 16, 16)


def test_whole_images_at_the_size_of_crops():
    images = normalized(pictures()[0])
    assert Augmentation([0.5] * 3, [0.5] * 3, flip=0.5).resized(images) is images
    resized = Augmentation([0.5] * 3, [0.5] * 3, 12, (0.1, 1.0)).resized(images)
    assert torch.equal(resized, F.interpolate(images, (12, 12), mode="bicubic", antialias=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip=1.5"),
        ({"blur": float("nan")}, "blur=nan"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"size": 8}, "size=8: no effect without crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale=\(0.0, 1.0\)"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale=\(0.5, 1.5\)"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"rand_augment": (0, 15)}, r"rand_augment=\(0, 15\)"),
        ({"rand_augment": (2, 31)}, "from 0 to 30"),
        ({"rand_augment": (2,)}, "rand_augment"),
        ({"color_jitter": (0.4, 0.4, 0.4)}, "give four numbers"),
        ({"color_jitter": (0.4, 0.4, -0.4, 0.1)}, "at least 0"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "at most 0.5"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation([0.5] * 3, [0.5] * 3, **options)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"The images have 1 channels, but mean=\[0.5, 0.5, 0.5\] has 3"):
        Augmentation([0.5] * 3, [0.5] * 3, blur=1.0)(torch.zeros(2, 1, 4, 4))


# ---- Mixing ----

CLASSES = 200


def labeled_images(count):
    """Image i is of value i; label i."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 10, 12).clone()
    return images, F.one_hot(torch.arange(count), CLASSES).float()


@pytest.mark.parametrize("count", [6, 7])
def test_mixup_mixes_images_and_labels_alike_with_the_reversed_batch(count):
    images, targets = labeled_images(count)
    torch.manual_seed(0)
    weights = []
    for _ in range(200):
        mixed, labels = Mixing(mixup=0.5)(images, targets)
        weights.append(labels[0, 0].item())
        torch.testing.assert_close(mixed, images * weights[-1] + images.flip(0) * (1 - weights[-1]))
        torch.testing.assert_close(labels, targets * weights[-1] + targets.flip(0) * (1 - weights[-1]))
    assert min(weights) >= 0.5
    # max(w, 1 - w) of Beta(1/2, 1/2) has the mean 1/2 + 1/pi, and five standard errors are 0.054.
    assert sum(weights) / 200 == pytest.approx(0.5 + 1 / math.pi, abs=0.054)


def test_cutmix_pastes_a_box_and_weighs_labels_by_its_area():
    images, targets = labeled_images(6)
    torch.manual_seed(0)
    shares = []
    for _ in range(100):
        mixed, labels = Mixing(cutmix=1.0)(images, targets)
        pasted = mixed[0, 0] == 5
        shares.append(pasted.float().mean().item())
        assert labels[0, 5].item() == pytest.approx(shares[-1], abs=1e-6)
        assert torch.equal(mixed, torch.where(pasted, images.flip(0), images))
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == rows * columns  # a box
        torch.testing.assert_close(labels.sum(-1), torch.ones(6))
    assert min(shares) < 0.1 and max(shares) > 0.5
    assert torch.equal(images[0], torch.zeros(3, 10, 12))


def test_with_both_each_batch_gets_one_of_them():
    images, targets = labeled_images(4)
    torch.manual_seed(0)
    is_cut = [bool((Mixing(mixup=1.0, cutmix=1.0)(images, targets)[0] % 1 == 0).all()) for _ in range(100)]
    assert 25 < sum(is_cut) < 75


def test_mixing_nothing_is_refused():
    for options in ({}, {"mixup": -1.0}, {"cutmix": float("inf")}):
        with pytest.raises(ValueError, match=r"(mixup|cutmix)="):
            Mixing(**options)
