"""No example is dropped unseen: all are evaluated on, and there is at least one batch to train on."""

from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length


class FullEvaluation:
    """In front of a trainer: `dataloader_drop_last`, which Trainer applies to evaluation, too, drops training examples
    only, and not all of them."""

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_train_dataloader(self) -> DataLoader:
        if has_length(self.train_dataset):
            self._require_full_batch(len(self.train_dataset))
        return super().get_train_dataloader()

    def _require_full_batch(self, examples: int) -> None:
        size, processes = self.args.train_batch_size, self.args.world_size
        if examples == 0:
            raise ValueError("There is no training example. Look at the dataset and at the flags that select from it.")
        if self.args.dataloader_drop_last and examples < size * processes:
            raise ValueError(
                f"dataloader_drop_last=True: the {examples} training examples do not fill one batch of "
                f"{size * processes} ({size} on each of {processes} processes) and would all be dropped. Lower "
                "per_device_train_batch_size, or set dataloader_drop_last=False."
            )
