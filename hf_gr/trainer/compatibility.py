"""What gradient regularization and IRE refuse to run with, and what to use instead.

A combination is refused if the update would silently differ from the paper's, or if nobody has tested that it does not.
"""

from collections.abc import Collection

from accelerate.utils import DistributedType
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.utils import is_sagemaker_mp_enabled

from ..optim import OPTIMIZERS
from ..optim._layerwise import LayerwiseOptimizer
from ..optim.gradient_regularization import HALF_PRECISION
from .part import Host

#: Trainers that generate the data of a step inside the step, in a way that is not tested with a second pass. Matched by
#: class name, as TRL need not be installed.
GENERATING_TRAINERS = frozenset(
    {
        "A2POTrainer",
        "AsyncDistillationTrainer",
        "AsyncGRPOTrainer",
        "DistillationTrainer",
        "GKDTrainer",
        "GOLDTrainer",
        "IWOPDTrainer",
        "MiniLLMTrainer",
        "NashMDTrainer",
        "OnlineDPOTrainer",
        "PPOTrainer",
        "SDFTTrainer",
        "SDPOTrainer",
        "XPOTrainer",
    }
)
#: Trainers whose batches have no labels for which others could be sampled.
UNLABELED_TRAINERS = frozenset(
    {
        "BCOTrainer",
        "CPOTrainer",
        "DPOTrainer",
        "GRPOTrainer",
        "KTOTrainer",
        "ORPOTrainer",
        "RLOOTrainer",
        "RewardTrainer",
        "TPOTrainer",
    }
)
METHODS = {
    "gr_lambda": "Gradient regularization",
    "ire_kappa": "IRE",
}


def refuse_unsupported(trainer: Host, flag: str) -> None:
    """Raise `ValueError` if the method of `flag` does not support the configuration of `trainer`.

    Setting `flag` to 0 turns the method off.
    """
    reasons = (
        _data(trainer, flag),
        _parallelism(trainer),
        _sharding(trainer, flag),
        _optimizer(trainer, flag),
        _weights(trainer, flag),
    )
    for reason in reasons:
        if reason is not None:
            method = METHODS[flag]
            raise ValueError(f"{method} cannot be used with {reason}, or set {flag}=0 to train without {method}.")


def refuse_unsupported_optimizer(trainer: Host) -> None:
    """Raise `ValueError` if the trainer's optimizer does not support the way the model is sharded."""
    name, reason = trainer.args.optim, None
    if name not in OPTIMIZERS:
        return
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed: it works on whole layers, and each process holds only a part of them. Use DDP or FSDP2"
    elif trainer.accelerator.distributed_type == DistributedType.FSDP:
        if issubclass(OPTIMIZERS[name], LayerwiseOptimizer):
            reason = _fsdp(trainer)
        else:
            reason = "FSDP: each process holds only a part of a parameter, and it is not made for that. Use DDP"
    if reason is not None:
        raise ValueError(f"optim={name} cannot be used with {reason}, or use another optimizer.")


def refuse_layer_statistics(trainer: Host) -> None:
    """Raise `ValueError` where the main process, which keeps them, has no whole layers."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"layer_statistics_steps={trainer.gr_args.layer_statistics_steps} cannot be used with FSDP or DeepSpeed: "
            "each process holds only a part of a layer. Use DDP, or set layer_statistics_steps=0."
        )


def refuse_separate_processes(trainer: Host) -> None:
    """Raise `ValueError` if the processes of this run would each train a model of their own.

    With a process group on CPUs but without `use_cpu`, accelerate does not synchronize gradients, and Trainer
    multiplies each process's loss by their number. A plain `Trainer` does this silently.
    """
    args = trainer.args
    if args.world_size > 1 and trainer.accelerator.distributed_type == DistributedType.NO:
        raise ValueError(
            f"use_cpu={args.use_cpu}: without an accelerator, the {args.world_size} processes would each train alone, "
            "with a loss that is too large. Set use_cpu=True (--use_cpu)."
        )


def class_among(trainer: Host, names: Collection[str]) -> str | None:
    """The first of the trainer's classes that has one of these names."""
    return next((cls.__name__ for cls in type(trainer).__mro__ if cls.__name__ in names), None)


def _data(trainer: Host, flag: str) -> str | None:
    if name := class_among(trainer, GENERATING_TRAINERS):
        return (
            f"{name}: it generates the data of a step inside the step, and is not tested. Use GRPOTrainer, "
            "RLOOTrainer, or one on a fixed dataset, such as SFTTrainer or DPOTrainer"
        )
    if flag == "gr_lambda" and getattr(trainer, "use_adaptive_entropy", False):
        return (
            "use_adaptive_entropy=True: it changes the loss before the second pass. Set use_adaptive_entropy=False, "
            "with a fixed entropy_coef"
        )
    if flag == "gr_lambda" and (name := _shared_with_reference(trainer)):
        return (
            f"a reference model that shares a trained weight ({name}): the second pass would move the reference along. "
            "Train the adapter alone, set precompute_ref_log_probs=True, or give a ref_model"
        )
    return None


def _shared_with_reference(trainer: Host) -> str | None:
    """A trained weight that DPO and KTO also use in the reference, which is the model without its adapter."""
    adapters = getattr(trainer.model, "peft_config", None)
    if (
        adapters is None
        or class_among(trainer, ("DPOTrainer", "KTOTrainer")) is None
        or getattr(trainer, "ref_model", None) is not None
        or getattr(trainer, "precompute_ref_logps", False)
    ):
        return None
    trained = (name for name, p in trainer.model.named_parameters() if p.requires_grad)
    return next((name for name in trained if not adapters.keys() & set(name.split("."))), None)


def _parallelism(trainer: Host) -> str | None:
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return (
            "DeepSpeed, at any ZeRO stage: accelerate steps inside the backward pass, before a second pass could run "
            "or perturbed weights be restored, and from stage 1 on it steps flat shards instead of parameters. Use "
            "DDP, or FSDP2 (fsdp_version: 2) for a model that does not fit"
        )
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


def _sharding(trainer: Host, flag: str) -> str | None:
    # Older supported versions of transformers lack the attribute.
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "a model that was sharded when it was loaded: not tested. Use DDP or FSDP2"
    accelerator = trainer.accelerator
    if accelerator.distributed_type != DistributedType.FSDP:
        if trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return (
                "FSDP here: accelerate shards on accelerators alone, and would silently train without sharding "
                f"({accelerator.distributed_type}). Leave FSDP out"
            )
        return None
    if (reason := _fsdp(trainer)) is not None or flag == "ire_kappa":
        return reason
    scope = trainer.gr_args.gr_scope
    if scope != "global":
        return f"gr_scope={scope!r} and FSDP: a process has no gradient of its own to follow. Set gr_scope=global"
    if trainer.gr_args.gr_reuse != 0:
        return "gr_reuse and FSDP: each process holds only a part of what is reused, not tested. Set gr_reuse=0"
    return None


def _fsdp(trainer: Host) -> str | None:
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return "FSDP version 1: not tested. Set fsdp_version: 2"
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "FSDP's CPU offload: not tested. Leave it out"
    return None


def _optimizer(trainer: Host, flag: str) -> str | None:
    optim = trainer.args.optim
    name = getattr(optim, "value", optim)
    if flag == "ire_kappa" and name.startswith("schedule_free"):
        return f"optim={name}: it keeps an average of the weights that IRE does not update. Use another optimizer"
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        return f"optim={name}: it updates the weights during the backward pass. Use another optimizer"
    return None


def _weights(trainer: Host, flag: str) -> str | None:
    model, args = trainer.model, trainer.args
    in_half = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.dtype in HALF_PRECISION]
    if in_half:
        name, p = in_half[0]
        weights = f"trainable weights in {str(p.dtype).removeprefix('torch.')} ({name})"
        remedy = "Load the model with dtype=torch.float32 and use --bf16 or --fp16, which keep the weights in float32"
        if flag != "gr_lambda" or not trainer.gr_args.gr_half_precision_weights:
            override = ", or set gr_half_precision_weights" if flag == "gr_lambda" else ""
            return f"{weights}: steps this small are lost to rounding. {remedy}{override}"
        if args.bf16 or args.fp16 or args.world_size > 1 or trainer.is_fsdp_enabled:
            return (
                f"{weights} under gr_half_precision_weights with --bf16, --fp16 or several processes: the second pass "
                f"could not run in float32. {remedy}"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            return f"sparse gradients ({name}). Build the embedding with sparse=False"
    return None
