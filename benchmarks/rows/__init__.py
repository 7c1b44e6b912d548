"""The rows of the costs table, one file per group. A new group is a file here and an entry in `GROUPS`."""

from . import augmentation, curvature, gr, ire, optimizers, startup

#: By the names that `--only` takes. Augmentation is late: torchvision, once imported, changes what transformers does.
GROUPS = {
    "step": gr.STEP,
    "bookkeeping": gr.BOOKKEEPING,
    "optimizers": optimizers.GROUP,
    "ire": ire.OPTIMIZER,
    "admire": ire.STEP,
    "curvature": curvature.GROUP,
    "startup": startup.GROUP,
    "augmentation": augmentation.GROUP,
}
