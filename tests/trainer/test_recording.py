"""`run.json`: what is counted as it happens, kept in the checkpoints, and summed over the starts of a run."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import toys
from hf_gr import GRConfig, GRTrainer, SharpnessCallback
from hf_gr.reporting.record import Record, Segment, differences, read_record, write_record

FLAGS = {"gr_warmup": "none", "max_steps": 4}


def make(folder, cls=GRTrainer, dataset=None, **flags) -> GRTrainer:
    args = GRConfig(**toys.arguments(folder, **{**FLAGS, **flags}))
    return cls(toys.vit(), args, train_dataset=toys.images() if dataset is None else dataset,
               eval_dataset=toys.images(5))  # fmt: skip


def counts(segment: Segment) -> dict[str, float]:
    names = ("steps", "regularized_steps", "skipped_steps", "passes", "ire_steps", "ire_choices", "ire_estimates")
    return {name: getattr(segment, name) for name in names if getattr(segment, name)}


def test_a_run_is_recorded_in_its_folder_and_in_every_checkpoint(tmp_path):
    @dataclass
    class DataArguments:
        dataset_name: str = str(tmp_path)
        dataset_config_name: str | None = "plain"
        crop_padding: int = 4

    trainer = make(tmp_path, save_strategy="steps", save_steps=2, gr_lambda=0.05, ire_kappa=2.0, ire_interval=3,
                   ire_probe_fraction=0.5, weight_decay=0.01)  # fmt: skip
    trainer.script_args = (DataArguments(crop_padding=0),)
    trainer.train()
    middle, end = read_record(tmp_path / "checkpoint-2"), read_record(tmp_path)
    assert end.method == {"gr": True, "ire": True, "optimizer": "AdamW"}
    assert end.data == {"dataset_name": tmp_path.name, "is_local": True, "dataset_config_name": "plain",
                        "train_examples": 24}  # fmt: skip
    (segment,) = end.segments
    assert (segment.first_step, segment.last_step, segment.world_size, segment.batch_size) == (1, 4, 1, 2)
    assert counts(segment) == {"steps": 4, "regularized_steps": 4, "passes": 4 + 4 + 2 * 0.5, "ire_steps": 4,
                               "ire_choices": 2, "ire_estimates": 2}  # fmt: skip
    assert counts(middle.segments[0]) == {"steps": 2, "regularized_steps": 2, "passes": 2 + 2 + 0.5, "ire_steps": 2,
                                          "ire_choices": 1, "ire_estimates": 1}  # fmt: skip
    assert 0 < middle.segments[0].seconds < segment.seconds == trainer.costs()["train_seconds"]
    assert segment.learning_rates == [0.01, 0.0025]
    settings = {"gr_r": 0.1, "gr_lambda": 0.05, "gr_warmup": "none", "gr_scope": "global", "gr_interval": 1,
                "ire_kappa": 2.0, "ire_gamma": 0.6, "ire_interval": 3, "ire_start_step": 0, "ire_probe_fraction": 0.5,
                "learning_rate": 0.01, "weight_decay": 0.01, "max_steps": 4, "seed": 42, "crop_padding": 0,
                "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}  # fmt: skip
    assert segment.settings == settings
    assert segment.versions["torch"] == torch.__version__
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()


def test_accumulation_scopes_and_overflows_are_counted_in_batches(tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=3, gr_scope="micro")
    trainer.train()
    assert counts(trainer.recorder.segment) == {"steps": 4, "regularized_steps": 4, "passes": pytest.approx(8)}
    assert trainer.costs()["train_passes"] == 8

    class Overflowing(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (torch.nan if self.state.global_step == 1 else 1)

    trainer = make(tmp_path, Overflowing)
    trainer.train()
    # The gradient of the second step has no direction, which the host learns only after its second pass.
    assert counts(trainer.recorder.segment) == {"steps": 4, "regularized_steps": 3, "skipped_steps": 1, "passes": 8}


def test_a_resumed_run_adds_to_what_its_checkpoint_has(tmp_path):
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-2")
    record = read_record(tmp_path / "resumed")
    assert [(s.first_step, s.last_step, counts(s)) for s in record.segments] == [
        (1, 2, {"steps": 2, "regularized_steps": 2, "passes": 4}),
        (3, 4, {"steps": 2, "regularized_steps": 2, "passes": 4}),
    ]
    assert record.total("passes") == read_record(tmp_path / "whole").total("passes") == 8
    assert resumed.costs()["train_seconds"] > record.segments[0].seconds > 0
    resumed.train()  # a new run
    assert [(s.first_step, counts(s)) for s in read_record(tmp_path / "resumed").segments] == [
        (1, {"steps": 4, "regularized_steps": 4, "passes": 8})
    ]


def sam(trainer) -> dict[str, float]:
    return dataclasses.asdict(trainer.sharpness(batches=1, quantities=("sam",))["sam"])


def step_and_value(folder) -> tuple[int, dict[str, float]]:
    found = read_record(folder).sharpness
    return found.step, found.results["sam"]


def test_the_last_measurement_of_sharpness_is_kept(tmp_path):
    """In the checkpoints too, from which a resumed run has it."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(SharpnessCallback(trainer, every=2, batches=1, quantities=("sam",)))
    before = sam(trainer)
    trainer.train()
    middle, end = ((e["step"], e["sharpness_sam"]) for e in trainer.state.log_history if "sharpness_sam" in e)
    assert (middle[0], end[0]) == (2, 4) and len({before["value"], middle[1], end[1]}) == 3
    for folder, (step, value) in ((tmp_path / "checkpoint-2", middle), (tmp_path, end)):
        assert step_and_value(folder) == (step, {"value": value, "standard_error": 0})
    assert step_and_value(tmp_path) == (4, sam(trainer))  # at the same weights
    resumed = make(tmp_path / "resumed")
    sam(resumed)  # not of this run: the checkpoint replaces the weights
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert step_and_value(tmp_path / "resumed")[0] == 2
    assert step_and_value(tmp_path / "resumed") == step_and_value(tmp_path / "checkpoint-2")
    resumed.train()  # a new run
    assert read_record(tmp_path / "resumed").sharpness is None


@pytest.mark.parametrize("own", ["model", "model_init"])
def test_sharpness_before_training_is_that_of_step_0(own, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, **{**FLAGS, "max_steps": 1}))
    models = {"model": toys.vit(), "model_init": lambda: toys.vit()}
    trainer = GRTrainer(args=args, train_dataset=toys.images(), **{own: models[own]})
    before = sam(trainer)
    trainer.train()
    if own == "model":
        assert step_and_value(tmp_path) == (0, before)
    else:  # which makes the model anew
        assert read_record(tmp_path).sharpness is None


def test_the_step_of_the_best_weights_is_that_of_their_checkpoint(tmp_path):
    class Rising(GRTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": self.state.global_step}

    trainer = make(tmp_path, Rising, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
                   eval_steps=2, save_steps=2)  # fmt: skip
    trainer.train()
    best = sam(trainer)
    assert trainer.state.global_step == 4 and step_and_value(tmp_path) == (2, best)


def test_other_measurements_are_not_taken_for_it(tmp_path):
    """Diagnostics measure on the batch of a step."""
    trainer = make(tmp_path, gr_diagnostics_steps=1, optim="adamw_torch", max_steps=11)
    trainer.train()
    assert any("preconditioned_sharpness" in entry for entry in trainer.state.log_history)
    assert read_record(tmp_path).sharpness is None


def test_a_second_training_does_not_count_the_estimates_of_the_first(tmp_path):
    trainer = make(tmp_path, gr_lambda=0, ire_kappa=1.0, ire_interval=2)
    trainer.train()
    trainer.train()
    assert trainer.costs()["train_passes"] == 4 + 2
    trainer.create_model_card()
    assert "They were chosen 2 times" in (tmp_path / "README.md").read_text()


def test_a_start_that_ran_out_of_memory_is_not_counted(tmp_path):
    class OutOfMemory(GRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 1 and self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(tmp_path, OutOfMemory, auto_find_batch_size=True)
    trainer.train()
    (segment,) = read_record(tmp_path).segments
    assert counts(segment) == {"steps": 4, "regularized_steps": 4, "passes": 8} and segment.batch_size == 1


def test_an_interrupted_run_has_its_record(tmp_path):
    class Interrupted(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Interrupted).train()
    assert read_record(tmp_path).total("steps") == 3


def test_each_trial_of_a_search_has_its_record(tmp_path):
    pytest.importorskip("optuna")
    args = GRConfig(**toys.arguments(tmp_path, gr_warmup="none", max_steps=2))
    trainer = GRTrainer(model_init=lambda trial: toys.vit(), args=args, train_dataset=toys.images(),
                        eval_dataset=toys.images(4))  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"gr_r": trial.suggest_float("gr_r", 0.01, 0.1)}, n_trials=2, backend="optuna"
    )
    records = [read_record(tmp_path / f"run-{i}") for i in range(2)]
    assert [record.total("passes") for record in records] == [4, 4]
    assert len({record.segments[0].settings["gr_r"] for record in records}) == 2


def test_evaluations_of_a_subclass_of_its_own_do_not_count_as_training(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr("hf_gr.trainer.recording.time.perf_counter", lambda: now[0])

    class OwnEvaluation(GRTrainer):
        def training_step(self, *args, **kwargs):
            now[0] += 1
            return super().training_step(*args, **kwargs)

        def evaluate(self, *args, **kwargs):
            now[0] += 100
            metrics = {"eval_loss": 1.0}
            self.log(metrics)
            return metrics

    trainer = make(tmp_path, OwnEvaluation, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert trainer.costs()["train_seconds"] == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Expecting"), ('{"format": 99}', "its format is 99"), ('{"format": 1}', "segments"), ("[]", "list")],
)
def test_a_record_that_cannot_be_read_is_named(content, reason, tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run\.json cannot be read \(.*{reason}"):
        read_record(tmp_path)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record({"gr": True}, {"train_examples": 3}, [Segment(1, 4, {"seed": 1}, learning_rates=[0.1, 0.2])])
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record and json.loads((tmp_path / "run.json").read_text())["format"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == {"b": (2, "default"), "c": ("default", 3)}


@pytest.mark.parametrize("metrics", [None, lambda prediction: {"error": 0.375}], ids=["loss alone", "a metric"])
def test_a_search_optimizes_the_metric_and_no_costs(metrics, tmp_path):
    """What the study, the pruner and `on_evaluate` get is what they get from `Trainer`."""
    optuna = pytest.importorskip("optuna")
    seen = []

    class Watching(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(set(metrics))

    class Watched(optuna.pruners.NopPruner):
        def prune(self, study, trial):
            seen.append(trial.intermediate_values[trial.last_step])
            return False

    def search(cls, config, folder):
        seen.clear()
        trainer = cls(
            model_init=lambda trial: toys.vit(),
            args=config(**toys.arguments(folder, max_steps=2, eval_strategy="steps", eval_steps=2)),
            train_dataset=toys.images(),
            eval_dataset=toys.images(5),
            compute_metrics=metrics,
            callbacks=[Watching()],
        )
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {}, n_trials=1, direction="minimize", backend="optuna", pruner=Watched()
        )
        return best.objective, *seen, trainer

    *plain, _ = search(Trainer, TrainingArguments, tmp_path / "plain")
    *ours, trainer = search(GRTrainer, partial(GRConfig, gr_lambda=0), tmp_path / "ours")
    assert ours == plain
    (entry,) = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert ours[0] == (entry["eval_loss"] if metrics is None else 0.375)
    assert (entry["train_passes"], entry["evaluated_examples"]) == (2, 5) and entry["train_seconds"] > 0
