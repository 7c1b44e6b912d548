"""Evaluation on every example, memorization, augmentation, and BatchNorm's statistics."""

import functools
import gc
import math

import pytest
import torch
from torch.nn import functional as F

from helpers import toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.cli.trainers import (
    BatchNormReestimation,
    CausalLMTrainer,
    FullEvaluation,
    ImageTrainer,
    perplexity,
    steps_for_tokens,
)
from hf_gr.data.augmentation import Augmentation, Mixing, random_crop
from hf_gr.data.images import IS_WRONG
from hf_gr.models.presets import create_resnet


class Whole(FullEvaluation, GRTrainer):
    pass


def trainer(cls, folder, count, callbacks=None, **kwargs):
    args = GRConfig(**toys.arguments(folder, dataloader_drop_last=True, per_device_eval_batch_size=8, **kwargs))
    return cls(toys.vit(), args, train_dataset=toys.images(count), eval_dataset=toys.images(11), callbacks=callbacks)


def test_evaluation_sees_the_last_batch(tmp_path):
    whole = trainer(Whole, tmp_path, 10)
    assert whole.evaluate()["eval_loss"] > 0
    assert whole.evaluation_loop(whole.get_eval_dataloader(), "").num_samples == 11
    assert whole.args.dataloader_drop_last and len(whole.get_train_dataloader()) == 5
    assert issubclass(CausalLMTrainer, FullEvaluation)


def test_persistent_workers_evaluate_the_dataset_that_is_given(tmp_path, monkeypatch):
    whole = trainer(Whole, tmp_path, 10, dataloader_num_workers=1, dataloader_persistent_workers=True)
    for data in (None, toys.images(5), None, toys.images(3)):
        metrics = whole.evaluate(data, metric_key_prefix="test")
        entry = whole.state.log_history[-1]
        expected = whole.eval_dataset if data is None else data
        assert "test_loss" in metrics and entry["evaluated_examples"] == len(expected)
    # torch would wait five seconds for each of the workers, in whatever test collects garbage next.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    del whole
    gc.collect()


@pytest.mark.parametrize(
    ("count", "message"),
    [(3, r"the 3 training examples do not fill one batch of 4 \(4 on each of 1"), (0, "are no training examples")],
)
def test_training_data_without_a_batch_is_refused(count, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(Whole, tmp_path, count, per_device_train_batch_size=4).train()


def noisy_images(count):
    return [{**image, IS_WRONG: i % 3 == 0} for i, image in enumerate(toys.images(count))]


def shares(predictions, images):
    """The share of the right and of the wrong labels that is predicted."""
    agrees = {False: [], True: []}
    for predicted, image in zip(predictions, images, strict=True):
        agrees[image[IS_WRONG]].append(predicted == image["labels"])
    return [sum(part) / len(part) for part in agrees.values()]


@pytest.mark.parametrize("flags", [{}, {"gr_lambda": 0.0}, {"ire_kappa": 1.0}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_memorization_is_counted_once_per_example(flags, accumulation, tmp_path):
    model, images = toys.vit(), noisy_images(12)
    args = GRConfig(**toys.arguments(tmp_path, max_steps=12 // (2 * accumulation), learning_rate=0.0,
                                     gradient_accumulation_steps=accumulation, logging_steps=12 // (2 * accumulation),
                                     gr_warmup="none", remove_unused_columns=False, **flags))  # fmt: skip
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([image["pixel_values"] for image in images])).logits
    # The counts are of the same logits; another batch size may round them differently, but no two are that close.
    right, wrong = shares(logits.argmax(-1).tolist(), images)
    assert right + wrong > 0
    trainer = ImageTrainer(model, args, train_dataset=images)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["train_accuracy_right_labels"] == pytest.approx(right)
    assert entry["train_accuracy_wrong_labels"] == pytest.approx(wrong)


def test_counting_memorization_changes_no_weight(tmp_path):
    ends = []
    for images in (toys.images(12), noisy_images(12)):
        model = toys.vit(dropout=0.1)
        args = GRConfig(**toys.arguments(tmp_path, gr_warmup="none", remove_unused_columns=False))
        ImageTrainer(model, args, train_dataset=images).train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_without_wrong_labels_nothing_is_logged(tmp_path):
    trainer = ImageTrainer(toys.vit(), GRConfig(**toys.arguments(tmp_path)), train_dataset=toys.images(12))
    trainer.train()
    assert not any(key.endswith("_labels") for entry in trainer.state.log_history for key in entry)


# ---- Augmentation ----

EVERYTHING = Augmentation(
    [0.5] * 3,
    [0.5] * 3,
    size=8,
    crop_scale=(0.3, 1.0),
    flip=0.5,
    crop_padding=2,
    rand_augment=(2, 15),
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
)
MIXING = Mixing(mixup=0.2, cutmix=1.0)


def batch(count, size=8):
    images = toys.images(count, size)
    labels = torch.tensor([image["labels"] for image in images])
    return {"pixel_values": torch.stack([image["pixel_values"] for image in images]), "labels": labels}


def image_trainer(folder, data=None, augmentation=None, mixing=None, **kwargs):
    cls = functools.partial(ImageTrainer, augmentation=augmentation, mixing=mixing)
    return toys.trainer(folder, cls=cls, data=data, **{"gr_warmup": "none", **kwargs})


def seen_images(model):
    """The images that each call of `model` gets."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_both_passes_see_the_same_images_and_each_step_others(scope, tmp_path):
    augmented = image_trainer(
        tmp_path, toys.images(12, 16), gr_scope=scope, gradient_accumulation_steps=2, max_steps=3,
        augmentation=EVERYTHING, mixing=MIXING,
    )  # fmt: skip
    seen = seen_images(augmented.model)
    augmented.train()
    # global: both micro-batches, then both again; micro: each one twice.
    pairs = [(0, 2), (1, 3)] if scope == "global" else [(0, 1), (2, 3)]
    windows = [seen[i : i + 4] for i in range(0, 12, 4)]
    assert len(seen) == 12 and all(images.shape == (2, 3, 8, 8) for images in seen)
    assert all(torch.equal(window[i], window[j]) for window in windows for i, j in pairs)
    firsts = [window[i] for window in windows for i, _ in pairs]
    assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


@pytest.mark.parametrize("flags", [{"gr_lambda": 0.0}, {"gr_scope": "micro", "ire_kappa": 1.0, "ire_interval": 2}])
def test_a_resumed_run_sees_the_images_it_would_have_seen(flags, tmp_path):
    def untrained(folder, **kwargs):
        options = {"augmentation": EVERYTHING, "mixing": MIXING, "gradient_accumulation_steps": 2, **flags, **kwargs}
        return image_trainer(folder, toys.images(16, 16), max_steps=6, **options)

    whole = untrained(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = untrained(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(toys.weights(whole.model), toys.weights(resumed.model))


def test_flip_and_crop_are_drawn_as_before_and_in_training_only(tmp_path):
    augmentation = Augmentation([0.5] * 3, [0.5] * 3, flip=0.5, crop_padding=2)
    augmented = image_trainer(tmp_path, augmentation=augmentation)
    seen, inputs = seen_images(augmented.model), batch(6)
    for mode in (True, False):
        torch.manual_seed(1)
        augmented.compute_loss(augmented.model.train(mode), dict(inputs))
    torch.manual_seed(1)
    flip = torch.rand(6, 1, 1, 1) < 0.5
    images = torch.where(flip, inputs["pixel_values"].flip(-1), inputs["pixel_values"])
    assert torch.equal(seen[0], random_crop(images, 2))
    assert torch.equal(seen[1], inputs["pixel_values"])


def test_what_is_not_trained_on_sees_whole_images_at_the_size_of_crops(tmp_path):
    larger = toys.images(8, 16)
    augmented = image_trainer(tmp_path, larger, ire_kappa=1.0, gr_lambda=0.0, max_steps=1, ire_start_step=0,
                              augmentation=EVERYTHING)  # fmt: skip
    seen = seen_images(augmented.model)
    augmented.train()
    estimate, step = seen
    whole = torch.stack([image["pixel_values"] for image in larger[:2]])
    torch.testing.assert_close(estimate, F.interpolate(whole, (8, 8), mode="bicubic", antialias=True))
    assert step.shape == estimate.shape and not torch.equal(step, estimate)
    assert math.isfinite(augmented.sharpness(batches=2, quantities=("sam",))["sam"].value)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0)])
def test_the_loss_of_mixed_labels_is_torchs(mixing, smoothing, tmp_path):
    mixed = image_trainer(tmp_path, mixing=mixing, label_smoothing_factor=smoothing)
    inputs, model = batch(6), mixed.model.train()
    torch.manual_seed(0)
    loss, outputs = mixed.compute_loss(model, dict(inputs), return_outputs=True)
    torch.manual_seed(0)
    images, targets = mixing(inputs["pixel_values"], F.one_hot(inputs["labels"], 10).float())
    logits = model(pixel_values=images).logits
    assert ((targets > 0) & (targets < 1)).any()
    assert torch.equal(outputs["logits"], logits)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=smoothing))
    # In evaluation nothing is mixed, and labels are smoothed as Trainer does.
    plain = image_trainer(tmp_path, label_smoothing_factor=smoothing, model=mixed.model)
    losses = [each.compute_loss(model.eval(), dict(inputs)) for each in (mixed, plain)]
    torch.testing.assert_close(*losses)


def test_accumulated_micro_batches_of_mixed_images_add_up_to_a_mean(tmp_path):
    losses = []

    class Recording(ImageTrainer):
        def compute_loss(self, *args, **kwargs):
            losses.append((super().compute_loss(*args, **kwargs), kwargs["num_items_in_batch"]))
            return losses[-1][0]

    toys.trainer(
        tmp_path, cls=functools.partial(Recording, mixing=MIXING), gr_lambda=0.0, max_steps=1, learning_rate=0.0,
        gradient_accumulation_steps=3, per_device_train_batch_size=4,
    ).train()  # fmt: skip
    assert [count for _, count in losses] == [12, 12, 12]
    # An untrained model of 10 classes: each part is about a third of ln 10.
    assert sum(loss.item() for loss, _ in losses) == pytest.approx(math.log(10), rel=0.1)


def test_mixed_images_count_nothing_as_memorized(tmp_path):
    mixed = image_trainer(tmp_path, noisy_images(12), mixing=MIXING, remove_unused_columns=False)
    mixed.train()
    assert not any(key.endswith("_labels") for entry in mixed.state.log_history for key in entry)


def test_mixing_without_effect_or_with_another_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mixup=0.2, cutmix=1.0: no effect with per_device_train_batch_size=1"):
        image_trainer(tmp_path, mixing=MIXING, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="has a loss of its own"):
        image_trainer(tmp_path, mixing=MIXING, compute_loss_func=lambda *_, **__: None)


class Images(list):
    def iter(self, batch_size):
        return ({"pixel_values": torch.stack(self[i : i + batch_size])} for i in range(0, len(self), batch_size))


def test_batch_norm_is_reestimated_without_augmentation(tmp_path):
    torch.manual_seed(0)
    model = create_resnet("resnet-18", [str(i) for i in range(10)], "cifar")
    images = Images(example["pixel_values"] for example in toys.images(6))
    args = GRConfig(**toys.arguments(tmp_path, max_steps=1, gr_lambda=0))
    augmentation = Augmentation([0.5] * 3, [0.5] * 3, flip=0.5, crop_padding=2)
    callbacks = [BatchNormReestimation(images, 2)]
    ImageTrainer(model, args, train_dataset=toys.images(4), callbacks=callbacks, augmentation=augmentation).train()
    first = model.resnet.embedder.embedder
    with torch.no_grad():
        means = [first.convolution(torch.stack(images[i : i + 2])).mean((0, 2, 3)) for i in (0, 2, 4)]
    torch.testing.assert_close(first.normalization.running_mean, torch.stack(means).mean(0))
    assert first.normalization.momentum == 0.1 and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="reestimate_batch_norm=6: the model has no BatchNorm"):
        trainer(GRTrainer, tmp_path, 8, callbacks=[BatchNormReestimation(images)]).train()


def test_perplexity_does_not_overflow():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_steps_for_tokens(tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, max_steps=-1, gradient_accumulation_steps=3))
    assert steps_for_tokens(601, args, block_size=100) == 2  # 2 x 3 x 100 in a step
    assert steps_for_tokens(600, args, block_size=100) == 1
    with pytest.raises(ValueError, match="max_train_tokens=0: give at least 1"):
        steps_for_tokens(0, args, 100)
    args.max_steps = 5
    with pytest.raises(ValueError, match="max_train_tokens=9 and max_steps=5 both set the length of training"):
        steps_for_tokens(9, args, 100)
