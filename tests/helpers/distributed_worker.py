"""What each process of `test_distributed.py` runs: training, once per case; the paths go to a file."""

import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from helpers import own_loop, streams, toys
from helpers.shards import full, shards
from helpers.training import Estimates
from hf_gr import GRConfig, GRTrainer
from hf_gr.cli.output_folder import claim_output_folder
from hf_gr.cli.trainers import ImageTrainer
from hf_gr.data.images import IS_WRONG
from hf_gr.models import BarlowTwinsForPretraining
from hf_gr.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_gr.reporting.record import read_record
from hf_gr.trainer.sharpness import SharpnessCallback, as_logs

PRECISIONS = ("float32", "scaled", "bf16")
CASES = [
    (scope, accumulation, degree, precision)
    for scope in ("global", "local", "micro")
    for accumulation in (1, 3)
    for precision in PRECISIONS
    for degree in ((0.5, 1.0) if precision == "float32" else (0.5,))
]
FSDP_CASES = [(accumulation, degree, precision)
              for accumulation in (1, 3) for degree in (0.5, 1.0) for precision in ("float32", "bf16")]  # fmt: skip
#: Barlow Twins has BatchNorm and a loss of the global batch: k processes with b images are one with k b images.
BARLOW_CASES = {
    name: {"optim": "sgd", "optim_args": "momentum=0.9", "gr_warmup": "none", **flags}
    for name, flags in {
        "plain": {"gr_lambda": 0},
        "gr": {"gr_lambda": 0.05, "gr_r": 0.1},
        "lars": {"gr_lambda": 0, "optim": "lars", "optim_args": ""},
        "sam_tvlars": {"optim": "tvlars", "optim_args": "", "gr_r": 0.1},
    }.items()
}
BARLOW_BATCH = 8  # over all processes
STEPS = 3
LEARNING_RATE = 0.1
EXAMPLES = 72
IRE_CASES = {
    (accumulation, degree): {
        "gr_lambda": degree,
        "gradient_accumulation_steps": accumulation,
        "ire_kappa": 2.0,
        "ire_interval": 2,
        "ire_start_step": 0,
        "seed": 5,
    }
    for accumulation in (1, 2)
    for degree in (0, 0.1)
}

ASCENT_CASES = {
    name: {"optim": "sgd", "optim_args": "momentum=0.9", "gradient_accumulation_steps": 2, "gr_r": 0.1, **flags}
    for name, flags in {
        "adaptive": {"gr_ascent": "adaptive", "gr_lambda": 0.05},
        "momentum": {"gr_ascent": "momentum"},
        "between": {"gr_interval": 2, "gr_momentum_r": 0.3},
        "reuse": {"gr_interval": 2, "gr_reuse": 0.7},
        "gradient": {"gr_radius_rule": "gradient"},
        "clip": {"gr_radius_rule": "gradient", "gr_clip": 0.5, "gr_lambda": 0.2},
        "loss": {"gr_radius_rule": "loss", "gr_r_max": 0.05},
        "functional": {"gr_second_pass_kind": "functional", "gr_lambda": 0.05},
        "functional, micro": {"gr_second_pass_kind": "functional", "gr_scope": "micro"},
    }.items()
}
#: FSDP refuses gr_reuse and the scopes that need a gradient of one process.
SHARDED_CASES = {name: flags for name, flags in ASCENT_CASES.items() if not {"gr_reuse", "gr_scope"} & set(flags)}
OPTIMIZER_CASES = {
    (optim, accumulation, degree): {
        "optim": optim,
        "gr_lambda": degree,
        "gradient_accumulation_steps": accumulation,
        # Some steps of a size that is seen, for the batch of 4 accumulated ones.
        "learning_rate": {"lamb": 0.5, "lars": 200.0, "tvlars": 200.0}[optim],
        "lr_scaling": "linear",
        "weight_decay": 0.1,
        "layer_statistics_steps": int(accumulation == 2 and degree > 0),  # drawing them takes a second
    }
    for optim in ("lamb", "lars", "tvlars")
    for accumulation in (1, 2)
    for degree in (0, 0.1)
}
SHARDED_IRE_CASES = [(1, 0), (2, 0.1)]
#: One of each optimizer.
SHARDED_OPTIMIZER_CASES = [("lamb", 1, 0.1), ("lars", 2, 0), ("tvlars", 1, 0.1)]


def flags_of(scope: str, accumulation: int, degree: float, precision: str) -> dict:
    return {
        "gr_scope": scope,
        "gr_lambda": degree * 0.1,
        "gradient_accumulation_steps": accumulation,
        "bf16": precision == "bf16",
    }


class RanksAgree(toys.PathRecorder):
    """Fails in the step after which two processes differ in any bit."""

    def _record(self, model):
        self.path.append(torch.cat([full(p.detach()).reshape(-1) for p in model.parameters()]).clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if dist.is_initialized():
            require_equal_ranks(self.path[-1], f"step {state.global_step}")


def require_equal_ranks(mine: torch.Tensor, when: str) -> None:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(other, mine) for other in everyone), f"ranks differ at {when}"


def trainer_of(output_dir: str, cls=GRTrainer, callbacks=(), **flags) -> GRTrainer:
    settings = {
        "ddp_backend": "gloo",
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gr_warmup": "none",
        **flags,
    }
    args = GRConfig(**toys.arguments(output_dir, **settings))
    return cls(model=toys.llama(), args=args, train_dataset=toys.text(EXAMPLES), callbacks=[*callbacks])


def reset_state() -> None:
    """Undo what a case has changed in the state that all accelerators share."""
    AcceleratorState._reset_state()
    if dist.is_initialized():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def run(output_dir: str, cls=GRTrainer, resume=None, **flags) -> list[torch.Tensor]:
    recorder = RanksAgree()
    trainer_of(output_dir, cls, [recorder], **flags).train(resume_from_checkpoint=resume)
    reset_state()
    return recorder.path


class Choices(Estimates):
    """Keeps, for each choice of coordinates, the weights, the estimate and the masks; ranks must agree in every bit."""

    def get_batch_samples(self, *args, **kwargs):
        known = len(self.estimates)
        result = super().get_batch_samples(*args, **kwargs)
        for estimate in self.estimates[known:]:
            parameters = list(self.model.parameters())
            masks = [full(self.ire_optimizer._masks[p]).clone() for p in parameters]
            estimate = [full(g) for g in estimate]
            for tensor in (*masks, *estimate):
                require_equal_ranks(tensor, "an estimate")
            weights = torch.cat([full(p.detach()).reshape(-1) for p in parameters]).clone()
            choice = {"step": self.state.global_step, "weights": weights, "fraction": self.ire_optimizer.flat_fraction}
            self.kept.append({**choice, "estimate": estimate, "masks": masks})
        return result


class OverflowOnOneRank(GRTrainer):
    """The loss of the last process is infinite in one pass of the second step; ranks must skip it together."""

    in_second_pass = False

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        is_last = dist.get_rank() == dist.get_world_size() - 1
        overflow = is_last and self.state.global_step == 1 and self.gr_second_pass == self.in_second_pass
        return loss * float("inf") if overflow else loss


class ScaledOverflow(OverflowOnOneRank, toys.ScaledTrainer):
    pass


def overflow_on_one_rank(folder: str) -> None:
    for second in (False, True):
        for scope in ("global", "local", "micro"):
            for degree in (0.5, 1.0):
                for base in (OverflowOnOneRank, ScaledOverflow):
                    cls = type("Overflow", (base,), {"in_second_pass": second})
                    recorder, flags = RanksAgree(), flags_of(scope, 2, degree, "float32")
                    trainer = trainer_of(folder, cls, [recorder], **flags)
                    trainer.train()
                    reset_state()
                    case = (second, scope, degree, base.__name__)
                    assert torch.equal(recorder.path[2], recorder.path[1]), case
                    assert not torch.equal(recorder.path[3], recorder.path[2]), case
                    if base is ScaledOverflow:
                        assert trainer.accelerator.scaler.get_scale() == toys.ScaledTrainer.SCALE / 2, case
                    else:
                        assert trainer.nonfinite_guard.skipped_steps == 1, case


class Sharded(GRTrainer):
    """FSDP2 on CPUs, which accelerate does not select by itself."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        if self.args.bf16:
            state.fsdp_plugin.set_mixed_precision("bf16")
        self.is_fsdp_enabled = True
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the plugin, for good

    def training_step(self, model, *args, **kwargs):
        assert self.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in model.parameters())
        return super().training_step(model, *args, **kwargs)


class ShardedChoices(Choices, Sharded):
    pass


class ShardedOverflow(Sharded, OverflowOnOneRank):
    pass


def overflow_seen_late(folder: str) -> None:
    """The processes skip a step together where the host does not look, as on GPUs."""
    for base in (OverflowOnOneRank, ShardedOverflow):
        for second in (False, True):
            recorder, cls = RanksAgree(), type("Overflow", (base,), {"in_second_pass": second})
            trainer = trainer_of(folder, cls, [recorder], optim="adamw_torch_fused")
            trainer.nonfinite_guard.looks_at_once = False
            trainer.train()
            reset_state()
            assert torch.equal(recorder.path[2], recorder.path[1]), (base, second)
            assert not torch.equal(recorder.path[3], recorder.path[2]), (base, second)
            assert trainer.nonfinite_guard.skipped_steps == 1, (base, second)


#: What is resumed under FSDP2 in the middle of a run, between two choices of IRE.
SHARDED_RUNS = {
    name: {"max_steps": 5, "learning_rate": 1e-2, "save_steps": 3, "ire_kappa": 2.0, "ire_start_step": 1, **flags}
    for name, flags in {
        "AdmIRE": {"optim": "adamw_torch", "gr_lambda": 0, "ire_interval": 3, "ire_beta": 0.5, "ire_guard": 3.0},
        "IRE, random, TVLARS": {"optim": "tvlars", "optim_args": "tv_lambda=0.5,delay_steps=3,momentum=0",
                                "learning_rate": 100.0, "gr_lambda": 0, "ire_interval": 3, "ire_mask": "random",
                                "ire_exclude": ["embed"]},
        "LAMB": {"optim": "lamb", "gr_lambda": 0.1, "ire_kappa": 0.0, "ire_start_step": None},
    }.items()
}  # fmt: skip


def sharded(folder: str) -> dict:
    """The optimizers and IRE under FSDP2."""
    results: dict = {"optimizers": {}, "ire": {}, "whole": {}, "resumed": {}, "refused": {}}
    for case in SHARDED_OPTIMIZER_CASES:
        flags = {**OPTIMIZER_CASES[case], "layer_statistics_steps": 0}
        results["optimizers"][case] = run(f"{folder}/optimizers", Sharded, **flags)
    for case in SHARDED_IRE_CASES:
        results["ire"][case] = Choices.kept = []
        run(folder, ShardedChoices, **IRE_CASES[case])
    for name, flags in SHARDED_RUNS.items():
        where = f"{folder}/{name}"
        results["whole"][name] = run(where, Sharded, **flags, save_strategy="steps")
        results["resumed"][name] = run(where, Sharded, f"{where}/checkpoint-3", **flags)
    lost = f"{folder}/AdmIRE/checkpoint-3"
    dist.barrier()
    shutil.rmtree(f"{lost}/ire", ignore_errors=True)
    dist.barrier()
    for name, flags, checkpoint in (
        ("muon", {"optim": "muon"}, None),
        ("layers", {"layer_statistics_steps": 1}, None),
        ("lost masks", SHARDED_RUNS["AdmIRE"], lost),
    ):
        try:
            trainer_of(folder, Sharded, **flags).train(resume_from_checkpoint=checkpoint)
        except ValueError as error:
            results["refused"][name] = str(error)
        reset_state()
    return results


def loop(folder: str) -> list[dict]:
    """What the loop of the docs makes in each process, in order."""
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as a file of `accelerate config` says it
    mine = own_loop.run_block(seed=int(os.environ["RANK"]))
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    reset_state()
    return found


def fsdp(folder: str) -> dict:
    results = {case: run(folder, Sharded, **flags_of("global", *case)) for case in FSDP_CASES}
    results["ascents"] = {c: run(folder, Sharded, **flags) for c, flags in SHARDED_CASES.items()}
    try:
        run(folder, Sharded, **ASCENT_CASES["reuse"])
    except ValueError as error:
        results["refused"] = str(error)
    reset_state()
    results["diagnostics"] = diagnostics_of(folder, Sharded)
    results["sharpness"] = sharpness_of(folder, Sharded, batches=2)  # a product is slow there
    settings = {"max_steps": 4, "gr_warmup": "zero", "warmup_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2,
                "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    recorder = RanksAgree()
    trainer = trainer_of(folder, Sharded, [recorder], **settings)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    reset_state()
    results["whole"] = recorder.path
    results["resumed"] = run(folder, Sharded, f"{folder}/checkpoint-2", **{**settings, "save_strategy": "no"})
    return results


def memorization_of(output_dir: str, **flags) -> list[dict[str, float]]:
    """The logged shares of right and wrong labels that are predicted, of weights that do not change."""
    images = [{**image, IS_WRONG: i % 3 == 0} for i, image in enumerate(toys.images(24))]
    settings = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0, "remove_unused_columns": False, **flags}
    args = GRConfig(**toys.arguments(output_dir, gr_warmup="none", **settings))
    trainer = ImageTrainer(toys.vit(), args, train_dataset=images)
    trainer.train()
    reset_state()
    keys = ("train_accuracy_right_labels", "train_accuracy_wrong_labels")
    return [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]


def barlow_of(output_dir: str, **flags) -> dict[str, Any]:
    """The logs, and the weights and running statistics after training in float64."""
    torch.manual_seed(0)
    config = CifarResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    model = BarlowTwinsForPretraining.of(CifarResNetForImageClassification(config), projector_sizes=[8, 6]).double()
    names, views = ("pixel_values", "second_pixel_values"), torch.randn(32, 2, 3, 8, 8, dtype=torch.float64)
    settings = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", **flags}
    args = GRConfig(**toys.arguments(output_dir, **settings))
    data = [dict(zip(names, pair, strict=True)) for pair in views]
    trainer = GRTrainer(model, args, train_dataset=data)
    trainer.train()
    reset_state()
    keys = ("loss", "grad_norm", "gr_grad_norm", "gr_perturbed_grad_norm")
    logs = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history if "loss" in entry]
    return {"logs": logs, "state": model.state_dict()}


def barlow(folder: str) -> dict[str, dict[str, Any]]:
    shared = {"ddp_backend": "gloo", "per_device_train_batch_size": BARLOW_BATCH // int(os.environ["WORLD_SIZE"])}
    return {name: barlow_of(f"{folder}/barlow", **shared, **flags) for name, flags in BARLOW_CASES.items()}


def diagnostics_of(output_dir: str, cls=GRTrainer, **flags) -> list[dict[str, float]]:
    """What `gr_diagnostics_steps` logs; one process accumulates two batches, two processes have one each."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "gr_diagnostics_steps": 1, **flags}
    trainer = trainer_of(output_dir, cls, **settings)
    trainer.train()
    reset_state()
    keys = ("adaptive_lr_spread", "adaptive_lr_change", "gr_cosine", "grad_norm_epoch_mean")
    entries = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history]
    return [entry for entry in entries if entry]


def sharpness_of(output_dir: str, cls=GRTrainer, batches=4, **flags) -> list[dict[str, float]]:
    """Logged in a training that does not change the weights, and measured after it; the ranks agree."""
    settings = {"max_steps": 2, "learning_rate": 0.0, "per_device_eval_batch_size": 6, **flags}
    trainer = trainer_of(output_dir, cls, **settings)
    options = {"batches": batches, "average": {"num_samples": 3}, "trace": {"num_samples": 3}}
    trainer.add_callback(SharpnessCallback(trainer, every=2, **options))
    trainer.train()
    found = as_logs(trainer.sharpness(**options))
    if dist.is_initialized():
        require_equal_ranks(torch.tensor([*found.values()]), "sharpness")
    if trainer.is_world_process_zero():
        kept = read_record(output_dir).sharpness
        assert (kept.batches, kept.results["sam"]["value"]) == (batches, found["sharpness_sam"])
    reset_state()
    return [
        *({key: entry[key] for key in found} for entry in trainer.state.log_history if "sharpness_sam" in entry),
        found,
    ]


def ire(folder: str) -> dict:
    estimates = {}
    for case, flags in IRE_CASES.items():
        estimates[case] = Choices.kept = []
        run(folder, Choices, **flags)
    return estimates


#: The same examples in each step, whether one process accumulates two batches or two processes have one each.
RESUME = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}


def all_processes_refuse_a_folder_that_is_taken(args: GRConfig) -> None:
    """The main process alone looks; the others must not wait for it."""
    with claim_output_folder(args):
        try:
            claim_output_folder(args).__enter__()
        except ValueError:
            return
    raise AssertionError("a second run was let into the folder")


def resume(folder: str) -> dict:
    """What one process has written goes on in two; what two write is for one to go on with."""
    all_processes_refuse_a_folder_that_is_taken(GRConfig(**toys.arguments(f"{folder}/taken", ddp_backend="gloo")))
    return {
        "from_one": run(f"{folder}/resumed", resume=f"{folder}/one/checkpoint-2", **RESUME),
        "two": run(f"{folder}/two", **RESUME),
    }


def stream(folder: str) -> dict:
    """The documents of each step, of each process, of a run and of one resumed in its middle."""
    flags = {"ddp_backend": "gloo", "gr_warmup": "none"}
    results = {}
    for name, checkpoint in (("whole", None), ("rest", f"{folder}/stream/whole/checkpoint-3")):
        trainer = streams.train(f"{folder}/stream/{name}", checkpoint, **flags)
        require_equal_ranks(toys.weights(trainer.model), name)
        documents = [None] * dist.get_world_size()
        dist.all_gather_object(documents, trainer.documents)
        results[name] = {"documents": documents, "weights": toys.weights(trainer.model)}
        reset_state()
    return results


SUITES = {
    "scopes": lambda folder: {
        case: run(folder, toys.ScaledTrainer if case[3] == "scaled" else GRTrainer, **flags_of(*case)) for case in CASES
    },
    "float32": lambda folder: {case: run(folder, **flags_of(*case)) for case in CASES if case[2:] == (0.5, "float32")},
    "ire": ire,
    "optimizers": lambda folder: {
        case: run(f"{folder}/optimizers", **flags) for case, flags in OPTIMIZER_CASES.items()
    },
    "ascents": lambda folder: {case: run(folder, **flags) for case, flags in ASCENT_CASES.items()},
    "barlow": barlow,
    "overflow": overflow_on_one_rank,
    "overflow seen late": overflow_seen_late,
    "resume": resume,
    "fsdp": fsdp,
    "sharded": sharded,
    "shards": shards,
    "loop": loop,
    "diagnostics": diagnostics_of,
    "sharpness": lambda folder: sharpness_of(folder),
    "stream": stream,
    "memorization": lambda folder: memorization_of(folder, ddp_backend="gloo"),
}


def main(folder: str, *suites: str) -> None:
    results = {suite: SUITES[suite](folder) for suite in suites}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, f"{folder}/results.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
