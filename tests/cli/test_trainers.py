"""With `dataloader_drop_last` nothing but the rest of the training data is dropped."""

import math

import pytest
import torch

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
from hf_gr.data.images import IS_WRONG, add_augmentation
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


def test_persistent_workers_evaluate_the_dataset_that_is_given(tmp_path):
    whole = trainer(Whole, tmp_path, 10, dataloader_num_workers=1, dataloader_persistent_workers=True)
    for data in (None, toys.images(5), None, toys.images(3)):
        metrics = whole.evaluate(data, metric_key_prefix="test")
        entry = whole.state.log_history[-1]
        expected = whole.eval_dataset if data is None else data
        assert "test_loss" in metrics and entry["evaluated_examples"] == len(expected)


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


class Images(list):
    def iter(self, batch_size):
        return ({"pixel_values": torch.stack(self[i : i + batch_size])} for i in range(0, len(self), batch_size))


def test_batch_norm_is_reestimated_without_augmentation(tmp_path):
    torch.manual_seed(0)
    model = create_resnet("resnet-18", [str(i) for i in range(10)], "cifar")
    add_augmentation(model, flip=True, crop_padding=2)
    images = Images(example["pixel_values"] for example in toys.images(6))
    args = GRConfig(**toys.arguments(tmp_path, max_steps=1, gr_lambda=0))
    GRTrainer(model, args, train_dataset=toys.images(4), callbacks=[BatchNormReestimation(images, 2)]).train()
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
