"""With `dataloader_drop_last` nothing but the rest of the training data is dropped."""

import pytest

import toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.full_evaluation import FullEvaluation
from hf_gr.language_modeling import CausalLMTrainer


class Whole(FullEvaluation, GRTrainer):
    pass


def trainer(cls, folder, count, **kwargs):
    args = GRConfig(**toys.arguments(folder, dataloader_drop_last=True, per_device_eval_batch_size=8, **kwargs))
    return cls(toys.vit(), args, train_dataset=toys.images(count), eval_dataset=toys.images(11))


def test_evaluation_sees_the_last_batch(tmp_path):
    whole = trainer(Whole, tmp_path, 10)
    assert whole.evaluate()["eval_loss"] > 0
    assert whole.evaluation_loop(whole.get_eval_dataloader(), "").num_samples == 11
    assert whole.args.dataloader_drop_last and len(whole.get_train_dataloader()) == 5
    assert issubclass(CausalLMTrainer, FullEvaluation)


@pytest.mark.parametrize(
    ("count", "message"),
    [(3, r"the 3 training examples do not fill one batch of 4 \(4 on each of 1"), (0, "There is no training example")],
)
def test_training_data_without_a_batch_is_refused(count, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(Whole, tmp_path, count, per_device_train_batch_size=4).train()
