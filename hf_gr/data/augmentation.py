"""Random augmentation of batches of images, and of their labels.

Everything runs on the batch's device. Each image gets its own draw from torch's global generators: whoever restores
their states, as GR's second pass and a resumed run do, gets the same images again. `random_flip` and `random_crop` draw
on the batch's device, all others on the CPU: nothing waits for an accelerator, and a seed gives the same images on
every device.

The operations are those of Pillow, on values in [0, 1] that are not rounded to 8 bits in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import NOT_NEGATIVE, PROBABILITY, check_ranges

#: The range of RandAugment's magnitude, as in torchvision; the paper leaves it open.
MAX_MAGNITUDE = 30
#: RandomResizedCrop: the range of width / height, and how often it draws until a crop fits into the image.
CROP_RATIO, CROP_ATTEMPTS = (3 / 4, 4 / 3), 10
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Augments normalized images of (n, c, h, w), each with its own draw. What is on is done in the order below.

    Args:
        mean: what normalization subtracted from each channel, of values in [0, 1]; one or three numbers.
        std: what it then divided by.
        size: the side of a random resized crop, or its height and width. Default: those of the input.
        crop_scale: random resized crop (bicubic, antialiased): the range of its share of the image's area. Its ratio of
            width to height is between 3/4 and 4/3. Default: off.
        flip: probability of mirroring left to right.
        crop_padding: shift by up to this many pixels along both axes, reflecting the border.
        rand_augment: N and M of RandAugment (arXiv 1909.13719): N of 14 operations, drawn with replacement for each
            image, with magnitude M of 30; see `RAND_AUGMENT`.
        color_jitter: brightness, contrast, saturation, hue: b, c, s multiply by a factor drawn from [1 - b, 1 + b], and
            h, at most 0.5, turns the hue by up to this share of the circle. In random order.
        color_jitter_probability: the share of images that it changes.
        grayscale: probability of removing the color.
        blur: probability of a Gaussian blur.
        blur_sigma: the range of its standard deviation, in pixels.
        solarize: probability of inverting the values from 1/2 on.

    Raises:
        ValueError: a value is out of its range; or the images have other channels than `mean` and `std`.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int | tuple[int, int] | None = None
    crop_scale: tuple[float, float] | None = None
    flip: float = 0.0
    crop_padding: int = 0
    rand_augment: Sequence[float] | None = None
    color_jitter: Sequence[float] | None = None
    color_jitter_probability: float = 1.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self):
        probabilities = ("flip", "color_jitter_probability", "grayscale", "blur", "solarize")
        check_ranges(self, dict.fromkeys(probabilities, PROBABILITY) | {"crop_padding": NOT_NEGATIVE})
        if self.size is not None and self.crop_scale is None:
            raise ValueError(f"size={self.size}: no effect without crop_scale. Give that, too, or leave it out.")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}: give a range of shares between 0 and 1.")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma={self.blur_sigma}: give a range above 0.")
        if self.rand_augment is not None and not _is_rand_augment(self.rand_augment):
            raise ValueError(
                f"rand_augment={self.rand_augment}: give the number of operations, at least 1, and their magnitude, "
                f"from 0 to {MAX_MAGNITUDE}; or leave it out."
            )
        if self.color_jitter is not None and not _is_color_jitter(self.color_jitter):
            raise ValueError(
                f"color_jitter={self.color_jitter}: give four numbers of at least 0, for brightness, contrast, "
                "saturation and hue, the last one at most 0.5; or leave it out."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if not self.changes_values:
            return self._moved(images)
        if len(self.mean) != images.shape[1]:
            raise ValueError(f"The images have {images.shape[1]} channels, but mean={self.mean} has {len(self.mean)}.")
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        with torch.autocast(images.device.type, enabled=False):
            augmented = self._changed(self._moved(torch.addcmul(mean, images, std)))
        return augmented.sub_(mean).div_(std).to(images.dtype)

    def resized(self, images: Tensor) -> Tensor:
        """Whole images at the size that crops have: what a model sees of training images that are not augmented."""
        size = self._size_of(images)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bicubic", antialias=True)

    def _size_of(self, images: Tensor) -> tuple[int, int]:
        if self.size is None:
            return images.shape[-2], images.shape[-1]
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def changes_values(self) -> bool:
        """Whether it does more than move pixels, so that it must know their values."""
        options = (self.crop_scale, self.rand_augment, self.color_jitter)
        return any(option is not None for option in options) or max(self.grayscale, self.blur, self.solarize) > 0

    def _moved(self, images: Tensor) -> Tensor:
        if self.crop_scale is not None:
            boxes = crop_boxes(len(images), images.shape[-2:], self.crop_scale)
            images = resized_crop(images, boxes, self._size_of(images))
        if self.flip > 0:
            images = random_flip(images, self.flip)
        return random_crop(images, self.crop_padding) if self.crop_padding > 0 else images

    def _changed(self, images: Tensor) -> Tensor:
        n = len(images)
        if self.rand_augment is not None:
            count, magnitude = self.rand_augment
            images = rand_augment(images, int(count), magnitude)
        if self.color_jitter is not None:
            images = _at_random(images, self.color_jitter_probability, color_jitter, *_jitter(n, self.color_jitter))
        if self.grayscale > 0:
            images = _at_random(images, self.grayscale, grayscale)
        if self.blur > 0:
            images = _at_random(images, self.blur, gaussian_blur, _uniform(n, *self.blur_sigma))
        if self.solarize > 0:
            images = _at_random(images, self.solarize, solarize, torch.full((n,), 128.0))
        return images


def barlow_twins_views(
    size: int | tuple[int, int] | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[Augmentation, Augmentation]:
    """The two augmentations of Barlow Twins (arXiv 2103.03230, appendix A), which are those of BYOL."""
    first = Augmentation(
        mean,
        std,
        size,
        crop_scale=(0.08, 1.0),
        flip=0.5,
        color_jitter=(0.4, 0.4, 0.2, 0.1),
        color_jitter_probability=0.8,
        grayscale=0.2,
        blur=1.0,
    )
    return first, replace(first, blur=0.1, solarize=0.2)


def _is_rand_augment(values: Sequence[float]) -> bool:
    return len(values) == 2 and values[0] >= 1 and 0 <= values[1] <= MAX_MAGNITUDE


def _is_color_jitter(values: Sequence[float]) -> bool:
    return len(values) == 4 and all(map(NOT_NEGATIVE.allows, values)) and values[3] <= 0.5


# ---- Draws ----


def _uniform(n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n)


def _at_random(images: Tensor, probability: float, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`operation` on each image with `probability`. Overwrites `images`."""
    if probability < 1:
        return _on(images, torch.rand(len(images)) < probability, operation, *parameters)
    return operation(images, *(parameter.to(images.device) for parameter in parameters))


def _on(images: Tensor, mask: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`operation` on the images of `mask`, which is on the CPU like the parameters. Overwrites `images`."""
    chosen = mask.nonzero().flatten()
    if len(chosen):
        own = (parameter[chosen].to(images.device) for parameter in parameters)
        chosen = chosen.to(images.device)
        images[chosen] = operation(images[chosen], *own)
    return images


def _column(parameter: Tensor) -> Tensor:
    """One number per image, to multiply (n, c, h, w) by."""
    return parameter.view(-1, 1, 1, 1)


# ---- Where the pixels are ----


def random_flip(images: Tensor, probability: float = 0.5) -> Tensor:
    """Mirror each image of (n, c, h, w) left to right with `probability`."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(flip, images.flip(-1), images)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image of (n, c, h, w) by up to `padding` pixels along both axes, filling the border by reflection."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    image = torch.arange(n, device=images.device)
    # Advanced indices around a slice put their own axes first: (n, h, w, c).
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_boxes(n: int, size: Sequence[int], scale: tuple[float, float]) -> Tensor:
    """The boxes of `n` random resized crops of images of `size`, as rows of top, left, height and width.

    The share of the area is uniform in `scale`, and the logarithm of width / height is uniform in that of `CROP_RATIO`.
    The first of `CROP_ATTEMPTS` boxes that fits is taken; if none does, the largest central one of an allowed ratio.
    """
    (height, width), (low, high) = size, CROP_RATIO
    area = height * width * _uniform(CROP_ATTEMPTS * n, *scale)
    ratio = _uniform(CROP_ATTEMPTS * n, *torch.tensor(CROP_RATIO).log().tolist()).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round().long().view(2, CROP_ATTEMPTS, n)
    image = torch.tensor([[height], [width]])
    fits = ((sides >= 1) & (sides <= image[:, None])).all(0)
    # The first of equal values is found.
    sides = sides[:, fits.long().argmax(0), torch.arange(n)]
    largest = torch.tensor([[min(height, round(width / low))], [min(width, round(height * high))]])
    offsets = ((image - sides + 1) * torch.rand(2, n)).long()
    found = fits.any(0)
    sides, offsets = torch.where(found, sides, largest), torch.where(found, offsets, (image - largest) // 2)
    return torch.cat([offsets, sides]).T


def resized_crop(images: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Crop each image to its row of `boxes` and resize it to `size`, bicubic and antialiased as in Pillow.

    One image at a time: `grid_sample` could crop all of them at once, but it aliases where a crop is made smaller.
    """
    crops = (
        F.interpolate(image[None, :, y : y + h, x : x + w], size, mode="bicubic", antialias=True)
        for image, (y, x, h, w) in zip(images, boxes.tolist(), strict=True)
    )
    return torch.cat(list(crops)).clamp_(0, 1)  # bicubic interpolation overshoots


def _affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Pixel (x, y), measured from the upper left corner, becomes what was at A (x, y, 1); gray comes in from outside.

    Args:
        matrices: A of each image, (n, 2, 3), in pixels. The nearest pixel is taken, as in the paper's RandAugment.
    """
    height, width = images.shape[-2:]
    # affine_grid measures from -1 to 1.
    to_pixels = images.new_tensor([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    from_pixels = images.new_tensor([[2 / width, 0], [0, 2 / height]])
    theta = from_pixels @ matrices @ to_pixels
    theta[:, :, 2] -= 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    gray = 128 / 255
    return F.grid_sample(images - gray, grid, "nearest", "zeros", align_corners=False) + gray


def _matrices(images: Tensor) -> Tensor:
    return torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)


def shear(images: Tensor, x: Tensor | float = 0.0, y: Tensor | float = 0.0) -> Tensor:
    """Row j takes its pixels from j * x further right, and column i from i * y further down."""
    matrices = _matrices(images)
    matrices[:, 0, 1], matrices[:, 1, 0] = x, y
    return _affine(images, matrices)


def translate(images: Tensor, x: Tensor | float = 0.0, y: Tensor | float = 0.0) -> Tensor:
    """Each pixel is taken from `x` pixels further right and `y` pixels further down."""
    matrices = _matrices(images)
    matrices[:, 0, 2], matrices[:, 1, 2] = x, y
    return _affine(images, matrices)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image counterclockwise about its center."""
    height, width = images.shape[-2:]
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    center = images.new_tensor([width / 2, height / 2])
    turns = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    return _affine(images, torch.cat([turns, (center - turns @ center).unsqueeze(-1)], -1))


# ---- Their values ----


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, _column(factor)).clamp_(0, 1)


def _gray(images: Tensor) -> Tensor:
    """The luma, one channel."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)


def grayscale(images: Tensor) -> Tensor:
    """All channels equal to the luma."""
    return _gray(images).expand_as(images).contiguous()


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Mix with black: 0 is black, 1 changes nothing."""
    return (images * _column(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Mix with the mean of the luma."""
    return _blend(_gray(images).mean((2, 3), keepdim=True), images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Mix with the gray image."""
    return _blend(_gray(images), images, factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Mix with a smoothed image: the mean of 3 x 3 pixels with weight 5 on the center. The border stays."""
    if min(images.shape[-2:]) < 3:
        return images
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] *= 4
    smooth[..., 1:-1, 1:-1] += rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth[..., 1:-1, 1:-1] /= 13
    return _blend(smooth, images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by a share `shift` of the circle; lightness and saturation (of HSV) stay. Gray has no hue."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    is_red, is_green = red == value, green == value
    # In sixths of the circle, from red.
    hue = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green)) / chroma.clamp_min(1e-12)
    hue += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    hue = (hue + 6 * shift.view(-1, 1, 1)) % 6
    shares = torch.stack([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], 1).clamp_(0, 1)
    return shares.mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def _jitter(n: int, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """For `color_jitter`: what is drawn for each of `n` images."""
    *factors, hue = strengths
    drawn = [_uniform(n, max(0.0, 1 - factor), 1 + factor) for factor in factors]
    return torch.stack([*drawn, _uniform(n, -hue, hue)], -1), torch.rand(n, 4).argsort(-1)


def color_jitter(images: Tensor, strengths: Tensor, order: Tensor) -> Tensor:
    """Adjust brightness, contrast, saturation and hue by the columns of `strengths`, (n, 4), in `order`, (n, 4)."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for column in order.unbind(1):
        for i, operation in enumerate(operations):
            images = _on(images, column == i, operation, strengths[:, i])
    return images


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a standard deviation of `sigma` pixels. At the border, only what is inside the image counts."""
    for _ in range(2):  # along the last axis, then along the other
        weights = _gaussian_weights(images.shape[-1], sigma)
        images = (images.flatten(1, 2) @ weights.mT).view_as(images).mT
    return images


def _gaussian_weights(side: int, sigma: Tensor) -> Tensor:
    """(n, side, side): what each pixel takes from each other one along an axis."""
    place = torch.arange(side, device=sigma.device)
    distance = (place[:, None] - place) / sigma.view(-1, 1, 1)
    # Beyond four standard deviations are denormal numbers, with which CPUs are slow.
    return torch.where(distance.abs() < 4, -0.5 * distance**2, -torch.inf).softmax(-1)


def _levels(images: Tensor) -> Tensor:
    """Values from 0 to 255."""
    return (images * 255).round()


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from `threshold`, of 255, on."""
    return torch.where(_levels(images) < _column(threshold), images, 1 - images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest of 8 bits."""
    step = 2 ** (8 - _column(bits))
    return (_levels(images) / step).floor() * step / 255


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the range from 0 to 1; one of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor) -> Tensor:
    """Map the 256 levels of each channel so that all are about equally frequent, as `ImageOps.equalize` does."""
    levels = _levels(images).long().flatten(2).flatten(0, 1)  # (n c, h w)
    counts = levels.new_zeros(len(levels), 256).scatter_add_(1, levels, torch.ones_like(levels))
    last = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - last) // 255
    table = ((counts.cumsum(1) - counts + step // 2) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step > 0, table.gather(1, levels), levels).view_as(images) / 255


# ---- RandAugment ----

#: The operations of RandAugment (arXiv 1909.13719) with the ranges of AutoAugment (arXiv 1805.09501), as in
#: torchvision: functions of the images and of the magnitude, one number per image, from -1 to 1. Its sign is random.
RAND_AUGMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda images, m: images,
    "shear_x": lambda images, m: shear(images, x=0.3 * m),
    "shear_y": lambda images, m: shear(images, y=0.3 * m),
    "translate_x": lambda images, m: translate(images, x=(150 / 331 * images.shape[-1] * m).trunc()),
    "translate_y": lambda images, m: translate(images, y=(150 / 331 * images.shape[-2] * m).trunc()),
    "rotate": lambda images, m: rotate(images, 30 * m),
    "brightness": lambda images, m: adjust_brightness(images, 1 + 0.9 * m),
    "color": lambda images, m: adjust_saturation(images, 1 + 0.9 * m),
    "contrast": lambda images, m: adjust_contrast(images, 1 + 0.9 * m),
    "sharpness": lambda images, m: adjust_sharpness(images, 1 + 0.9 * m),
    "posterize": lambda images, m: posterize(images, 8 - (4 * m.abs()).round()),
    "solarize": lambda images, m: solarize(images, 255 * (1 - m.abs())),
    "autocontrast": lambda images, m: autocontrast(images),
    "equalize": lambda images, m: equalize(images),
}


def rand_augment(images: Tensor, count: int, magnitude: float) -> Tensor:
    """`count` random operations of `RAND_AUGMENT` on each image, with `magnitude` of `MAX_MAGNITUDE`. Overwrites
    `images`."""
    for _ in range(count):
        choices = torch.randint(len(RAND_AUGMENT), (len(images),))
        signed = (2 * torch.randint(2, (len(images),)) - 1) * (magnitude / MAX_MAGNITUDE)
        for i, operation in enumerate(RAND_AUGMENT.values()):
            images = _on(images, choices == i, operation, signed)
    return images


# ---- Mixing ----


@dataclass(frozen=True)
class Mixing:
    """Mixes each image, and its label, with the one at its place in the reversed batch, by one weight per batch.

    - MixUp (arXiv 1710.09412): w x_i + (1 - w) x_j, with w from Beta(alpha, alpha). As j's partner is i, w and 1 - w
      give the same images in another order; the larger is taken, so that an image stays nearer to its own label.
    - CutMix (arXiv 1905.04899): a box of x_j, the same for all images, pasted into x_i. Its share of the area is 1 - w
      unless it is clipped at the border; labels are mixed by the share that it has.

    If both are on, each batch gets one of them, with probability 1/2.

    Args:
        mixup: alpha of MixUp; 0 is off.
        cutmix: alpha of CutMix.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        check_ranges(self, dict.fromkeys(("mixup", "cutmix"), NOT_NEGATIVE))
        if self.mixup == self.cutmix == 0:
            raise ValueError("mixup=0.0, cutmix=0.0: nothing would be mixed. Raise one of them.")

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed images of (n, c, h, w) and targets of (n, classes), the probabilities of the classes."""
        is_mixup = self.cutmix == 0 or (self.mixup > 0 and torch.rand(()).item() < 0.5)
        alpha = self.mixup if is_mixup else self.cutmix
        weight = torch.distributions.Beta(alpha, alpha).sample().item()
        if is_mixup:
            weight = max(weight, 1 - weight)
            images = torch.lerp(images.flip(0), images, weight)
        else:
            images, weight = _pasted(images, 1 - weight)
        return images, torch.lerp(targets.flip(0), targets, weight)


def _pasted(images: Tensor, share: float) -> tuple[Tensor, float]:
    """`images` with a box of `share` of the area from the reversed batch, and the share that stays."""
    height, width = images.shape[-2:]
    y, x = (int(side * torch.rand(()).item()) for side in (height, width))
    half_height, half_width = (int(side * share**0.5 / 2) for side in (height, width))
    rows = slice(max(0, y - half_height), min(height, y + half_height))
    columns = slice(max(0, x - half_width), min(width, x + half_width))
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
