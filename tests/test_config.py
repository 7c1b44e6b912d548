"""The flags: parsing from every source, and the message for each mistake."""

import json

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_gr import GRArguments, GRConfig


def test_contract_defaults():
    config = GRConfig(output_dir="x", use_cpu=True)
    flags = {name: getattr(config, name) for name in vars(GRArguments())}
    assert flags == {
        "gr_r": 0.1,
        "gr_lambda": None,
        "gr_warmup": "zero",
        "gr_warmup_steps": None,
        "gr_scope": "global",
        "gr_interval": 1,
        "gr_on_nonfinite": "stop",
        "gr_half_precision_weights": False,
        "ire_kappa": 0.0,
        "ire_gamma": 0.6,
        "ire_interval": 10,
        "ire_start_step": None,
        "ire_probe_fraction": 1.0,
        "ire_preset": None,
        "ire_mask": "flat",
        "ire_kappa_schedule": "constant",
        "ire_scope": "global",
        "ire_exclude": None,
        "ire_beta": 0.0,
        "ire_amplify_weight_decay": True,
        "ire_guard": 3.0,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear",
        "lr_scaling": "none",
        "decay_norms_and_biases": False,
        "layer_statistics_steps": 0,
    }
    stock = TrainingArguments(output_dir="x", use_cpu=True).to_dict()
    ours = set(flags) - set(stock)
    assert {k: v for k, v in config.to_dict().items() if k not in ours} == stock


@pytest.mark.parametrize("optim", ["tvlars", "lars", "lamb", "sgd"])
def test_names_of_optimizers_parse_from_every_source(optim, tmp_path):
    """And come out again as they went in: `to_dict` is what is saved with a checkpoint and sent to trackers."""
    schedule = "cosine" if optim in ("tvlars", "sgd") else "time_varying"
    values = {"output_dir": "x", "use_cpu": True, "optim": optim, "lr_scheduler_type": schedule}
    (tmp_path / "c.yaml").write_text("\n".join(f"{k}: {v}" for k, v in values.items()))
    parser = HfArgumentParser(GRConfig)
    flags = [part for k, v in values.items() for part in (f"--{k}", str(v))]
    for config in (
        parser.parse_args_into_dataclasses(flags)[0],
        parser.parse_yaml_file(str(tmp_path / "c.yaml"))[0],
        parser.parse_dict(values)[0],
    ):
        assert (config.to_dict()["optim"], config.to_dict()["lr_scheduler_type"]) == (optim, schedule)
        assert json.loads(config.to_json_string())["optim"] == optim


def test_parses_from_command_line_json_yaml_and_dict(tmp_path):
    values = {"output_dir": "x", "use_cpu": True, "gr_r": 0.05, "gr_lambda": 0.04, "gr_warmup": "lambda"}
    (tmp_path / "c.json").write_text(json.dumps(values))
    (tmp_path / "c.yaml").write_text("\n".join(f"{k}: {v}" for k, v in values.items()))
    parser = HfArgumentParser(GRConfig)
    flags = [part for k, v in values.items() for part in (f"--{k}", str(v))]
    for config in (
        parser.parse_args_into_dataclasses(flags)[0],
        parser.parse_json_file(str(tmp_path / "c.json"))[0],
        parser.parse_yaml_file(str(tmp_path / "c.yaml"))[0],
        parser.parse_dict(values)[0],
    ):
        assert (config.gr_r, config.gr_lambda, config.gr_warmup) == (0.05, 0.04, "lambda")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gr_r": 0}, "gr_r=0: the radius must be > 0. To turn GR off, set gr_lambda=0"),
        ({"gr_r": float("nan")}, "gr_r=nan: the radius must be > 0"),
        ({"gr_lambda": -1}, "gr_lambda=-1: the degree must be >= 0"),
        ({"gr_warmup": "foo"}, "gr_warmup='foo': choose one of none, r, lambda, zero"),
        ({"gr_scope": "world"}, "gr_scope='world': choose one of global, local, micro"),
        ({"gr_interval": 0}, "gr_interval=0: must be a whole number of steps, at least 1"),
        ({"gr_warmup_steps": -3}, "gr_warmup_steps=-3: give a whole number of steps, or a fraction"),
        ({"gr_warmup_steps": 1.5}, "gr_warmup_steps=1.5: give a whole number of steps, or a fraction"),
        ({"gr_warmup": "none", "gr_warmup_steps": 10}, "gr_warmup_steps=10 has no effect with gr_warmup='none'"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError) as error:
        GRConfig(output_dir="x", use_cpu=True, **flags)
    assert message in str(error.value)


def test_command_line_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(GRConfig).parse_args_into_dataclasses(["--gr_warmup", "foo"])
    assert "invalid choice: 'foo' (choose from 'none', 'r', 'lambda', 'zero')" in capsys.readouterr().err.replace(
        "choose from none, r, lambda, zero", "choose from 'none', 'r', 'lambda', 'zero'"
    )


def test_warmup_steps():
    assert GRArguments().get_gr_warmup_steps(7, 100) == 7
    assert GRArguments(gr_warmup_steps=0.125).get_gr_warmup_steps(7, 100) == 13
    assert GRArguments(gr_warmup_steps=12).get_gr_warmup_steps(7, 100) == 12


def test_other_training_arguments_can_have_the_flags():
    from dataclasses import dataclass

    @dataclass
    class Config(GRArguments, Seq2SeqTrainingArguments):
        pass

    assert Config(output_dir="x", use_cpu=True, predict_with_generate=True, gr_r=0.2).gr_r == 0.2
    with pytest.raises(ValueError, match="gr_r=-1"):
        Config(output_dir="x", use_cpu=True, gr_r=-1)
