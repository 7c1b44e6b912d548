"""Evaluation on every example."""

from torch.utils.data import DataLoader


class FullEvaluation:
    """In front of a trainer: `dataloader_drop_last` drops training examples only. Trainer applies it to both."""

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
