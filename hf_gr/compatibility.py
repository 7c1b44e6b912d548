"""What gradient regularization and IRE refuse to run with, and what to use instead.

A combination is refused where the update would silently be another one than the paper's, or where nobody has tested
that it is the same.
"""

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

METHODS = {
    "gr_lambda": "Gradient regularization",
    "ire_kappa": "IRE",
}


def refuse_unsupported(trainer: Trainer, flag: str) -> None:
    """Raise `ValueError` if `trainer` is set up in a way under which a method is not known to be right.

    `flag` names the method: it is the one that turns it off at 0.
    """
    for reason in (_parallelism(trainer), _optimizer(trainer, flag), _weights(trainer.model)):
        if reason is not None:
            method = METHODS[flag]
            raise ValueError(f"{method} cannot be used with {reason}, or set {flag}=0 to train without {method}.")


def _parallelism(trainer: Trainer) -> str | None:
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed: its engine keeps the gradients out of `.grad`, where they are read. Use DDP"
    # The last attribute is younger than the oldest transformers that we support.
    if trainer.is_fsdp_enabled or getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "sharded parameters (FSDP): not tested yet. Use DDP"
    if accelerator.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        return f"{accelerator.distributed_type}: not tested. Use DDP"
    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism: it runs forward and backward itself. Use DDP"
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        return "tensor, context or sequence parallelism: the inputs of a step cannot be replayed. Use DDP"
    if trainer.args.n_gpu > 1:
        return (
            f"nn.DataParallel over {trainer.args.n_gpu} GPUs: not tested. Start the script with `accelerate launch` "
            "(one process per GPU), or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    return None


def _optimizer(trainer: Trainer, flag: str) -> str | None:
    optim = trainer.args.optim
    name = getattr(optim, "value", optim)
    if flag == "ire_kappa" and name.startswith("schedule_free"):
        return f"optim={name}: it keeps an average of the weights that IRE does not know of. Use another optimizer"
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        return f"optim={name}: it updates the weights during the backward pass. Use another optimizer"
    return None


def _weights(model: nn.Module) -> str | None:
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            return (
                f"trainable weights in {str(p.dtype).removeprefix('torch.')} ({name}): steps this small are "
                "lost in their rounding. Load the model with dtype=torch.float32 and use --bf16 or --fp16, which keep "
                "the weights in float32"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            return f"sparse gradients ({name}). Build the embedding with sparse=False"
    return None
