"""The flags: parsing from every source, and the message for each mistake."""

import copy
import json
import pickle
import re
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from transformers import HfArgumentParser, SchedulerType, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_gr import IRE, GRArguments, GRConfig
from hf_gr.config import IRE_PRESETS
from hf_gr.optim.gr_warmup import GR_WARMUPS
from hf_gr.reporting.arguments import default_of


def test_contract_defaults():
    config = GRConfig(output_dir="x", use_cpu=True)
    flags = {name: getattr(config, name) for name in vars(GRArguments())}
    assert flags == {
        "gr_preset": None,
        "gr_r": 0.1,
        "gr_lambda": None,
        "gr_ascent": "gradient",
        "gr_radius_rule": "fixed",
        "gr_second_pass_kind": "full",
        "gr_r_max": 1.0,
        "gr_clip": 0.0,
        "gr_warmup": "zero",
        "gr_warmup_steps": None,
        "gr_scope": "global",
        "gr_interval": 1,
        "gr_reuse": 0.0,
        "gr_momentum_r": 0.0,
        "gr_diagnostics_steps": 0,
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


MOMENTUM = {"gr_ascent": "momentum"}
BETWEEN = {"gr_momentum_r": 1.5, "gr_interval": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"gr_r": 0},
            "gr_r=0: the radius must be > 0 and at most 1e+06; the paper has 0.05 and 0.1. To turn GR off",
        ),
        ({"gr_r": float("nan")}, "gr_r=nan: the radius must be > 0"),
        ({"gr_r": 1e30}, "gr_r=1e+30: the radius must be > 0 and at most 1e+06"),
        ({"gr_lambda": 1e30}, "gr_lambda=1e+30: the degree must be >= 0 (0 turns GR off) and at most 1e+06"),
        ({"gr_r": 1e-30, "gr_lambda": 0.1}, "gr_lambda=0.1: must be at most 1e+06 times gr_r=1e-30"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: give a number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be at least 0"),
        ({"learning_rate": -1}, "learning_rate=-1: must be at least 0"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3': give a number, not a str"),
        ({"weight_decay": float("inf")}, "weight_decay=inf: must be at least 0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0: must be at least 0 and below 1"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: give a number"),
        ({"gr_lambda": -1}, "gr_lambda=-1: the degree must be >= 0"),
        ({"gr_warmup": "foo"}, "gr_warmup='foo': choose one of none, r, lambda, zero"),
        ({"gr_scope": "world"}, "gr_scope='world': choose one of global, local, micro"),
        ({"gr_interval": 0}, "gr_interval=0: must be a whole number of steps, at least 1"),
        ({"gr_ascent": "sam"}, "gr_ascent='sam': choose one of gradient, adaptive, adaptive_weights, momentum"),
        ({"gr_radius_rule": "norm"}, "gr_radius_rule='norm': choose one of fixed, gradient, loss"),
        ({"gr_second_pass_kind": "half"}, "gr_second_pass_kind='half': choose one of full, functional"),
        ({"gr_preset": "foo"}, "gr_preset='foo': choose one of gr_paper, sam, late, asam, msam, lora_sam, looksam"),
        ({"gr_r_max": 0}, "gr_r_max=0: must be more than 0"),
        ({"gr_reuse": -0.1}, "gr_reuse=-0.1: must be at least 0"),
        ({"gr_clip": -1.0}, "gr_clip=-1.0: must be at least 0"),
        ({"gr_clip": 10.0, "gr_scope": "local"}, "gr_clip=10.0: it is the norm of the gradient of a whole step"),
        ({"gr_reuse": 0.7, "gr_interval": 2, "gr_scope": "micro"}, "gr_reuse=0.7: gr_scope='micro' has a gradient of"),
        ({**MOMENTUM, "gr_lambda": 0.05}, "gr_lambda=0.05: gr_ascent='momentum' takes one pass and has no g1 to mix"),
        ({**MOMENTUM, "gr_warmup": "lambda"}, "gr_warmup='lambda': gr_ascent='momentum' takes one pass"),
        ({**MOMENTUM, "gr_radius_rule": "loss"}, "gr_radius_rule='loss': gr_ascent='momentum' takes one pass"),
        ({**MOMENTUM, "gr_reuse": 0.5, "gr_interval": 2}, "gr_reuse=0.5: gr_ascent='momentum' takes one pass"),
        ({**MOMENTUM, "gr_half_precision_weights": True}, "gr_half_precision_weights=True: gr_ascent='momentum'"),
        ({**BETWEEN, "gr_momentum_r": -1.0}, "gr_momentum_r=-1.0: the radius must be >= 0 (0 is none) and at most"),
        ({**BETWEEN, **MOMENTUM}, "gr_momentum_r=1.5: gr_ascent='momentum' takes one pass already"),
        ({**BETWEEN, "gr_reuse": 0.5}, "gr_momentum_r=1.5: gr_reuse=0.5 is for the same steps"),
        ({**BETWEEN, "gr_half_precision_weights": True}, "gr_momentum_r=1.5: with gr_half_precision_weights its pass"),
        ({"gr_warmup_steps": -3}, "gr_warmup_steps=-3: give a whole number of steps, or a fraction"),
        ({"gr_warmup_steps": 1.5}, "gr_warmup_steps=1.5: give a whole number of steps, or a fraction"),
        ({"gr_lambda": True}, "gr_lambda=True: give a number, not a bool"),
        ({"gr_lambda": "0.1"}, "gr_lambda='0.1': give a number, not a str"),
        ({"ire_interval": 2.5}, "ire_interval=2.5: give a whole number, not a float"),
        ({"ire_amplify_weight_decay": "false"}, "ire_amplify_weight_decay='false': give true or false, not a str"),
        ({"ire_exclude": "embed"}, "ire_exclude='embed': give a list, not a str"),
        ({"gr_warmup": None}, "gr_warmup=None: choose one of none, r, lambda, zero"),
        ({"gr_r": None}, "gr_r=None: give a number, not a NoneType"),
        ({"warmup_steps": True}, "warmup_steps=True: give a number, not a bool"),
        ({"max_steps": False}, "max_steps=False: give a whole number, not a bool"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError) as error:
        GRConfig(output_dir="x", use_cpu=True, **flags)
    assert message in str(error.value)


NUMBERS = [
    f.name
    for f in fields(GRArguments)
    if isinstance(default_of(f), int | float) or f.name.endswith(("_step", "_steps"))
]


@pytest.mark.parametrize("value", [True, "1"])
@pytest.mark.parametrize("flag", [flag for flag in NUMBERS if not isinstance(getattr(GRArguments(), flag), bool)])
def test_neither_booleans_nor_strings_are_numbers(flag, value):
    with pytest.raises(ValueError, match=f"{flag}={value!r}: give a"):
        GRArguments(**{flag: value})


# ---- ire_preset ----

PRESET = {"output_dir": "x", "use_cpu": True, "ire_preset": "vit_imagenet"}  # kappa 2, gamma 0.8, from a third on
SETTINGS = ("ire_kappa", "ire_gamma", "ire_start_step")


def settings(config) -> tuple:
    return tuple(getattr(config, name) for name in SETTINGS)


def sources(values, folder):
    """The configuration of `values` from everywhere that one can come from."""
    (folder / "c.json").write_text(json.dumps(values))
    (folder / "c.yaml").write_text(json.dumps(values))
    parser = HfArgumentParser(GRConfig)
    yield parser.parse_json_file(str(folder / "c.json"))[0]
    yield parser.parse_yaml_file(str(folder / "c.yaml"))[0]
    yield parser.parse_dict(values)[0]
    yield GRConfig(**values)
    if None not in values.values():  # the command line has no word for it
        yield parser.parse_args_into_dataclasses([part for k, v in values.items() for part in (f"--{k}", str(v))])[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (2.0, 0.8, 1 / 3)),
        ({"ire_kappa": 0.0}, (0.0, 0.8, 1 / 3)),
        ({"ire_gamma": 0.6}, (2.0, 0.6, 1 / 3)),
        ({"ire_start_step": None}, (2.0, 0.8, None)),
        ({"ire_kappa": 5.0, "ire_start_step": 7}, (5.0, 0.8, 7)),
    ],
    ids=str,
)
def test_a_given_value_wins_over_the_preset_even_if_it_is_the_default(given, expected, tmp_path):
    for config in sources({**PRESET, **given}, tmp_path):
        assert settings(config) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.05, None, "gradient", "none", None, 5, 0.7)),
        ({"gr_r": 0.1, "gr_interval": 1}, (0.1, None, "gradient", "none", None, 1, 0.7)),
        ({"gr_warmup": "zero", "gr_reuse": 0.0}, (0.05, None, "gradient", "zero", None, 5, 0.0)),
        ({"gr_warmup_steps": 7, "gr_ascent": "adaptive"}, (0.05, None, "adaptive", "none", 7, 5, 0.7)),
    ],
    ids=str,
)
def test_a_given_flag_wins_over_the_preset_of_gr(given, expected, tmp_path):
    names = ("gr_r", "gr_lambda", "gr_ascent", "gr_warmup", "gr_warmup_steps", "gr_interval", "gr_reuse")
    for config in sources({"output_dir": "x", "use_cpu": True, "gr_preset": "looksam", **given}, tmp_path):
        assert tuple(getattr(config, name) for name in names) == expected


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ({"gr_reuse": 0.7}, ["gr_reuse=0.7 has no effect with gr_interval=1."]),
        ({"gr_momentum_r": 1.5}, ["gr_momentum_r=1.5 has no effect with gr_interval=1."]),
        ({"gr_r_max": 0.2}, ["gr_r_max=0.2 has no effect with gr_radius_rule='fixed'."]),
        ({"gr_r_max": 0.2, "gr_radius_rule": "loss"}, []),
        (
            {"gr_second_pass_kind": "functional", **MOMENTUM},
            ["gr_second_pass_kind=functional has no effect with gr_ascent='momentum'."],
        ),
        ({**MOMENTUM, "gr_clip": 10.0}, ["gr_clip=10.0 has no effect with gr_ascent='momentum'."]),
        ({**MOMENTUM, "gr_scope": "local"}, ["gr_scope=local has no effect with gr_ascent='momentum'."]),
        ({"gr_preset": "sam", "gr_warmup_steps": 3}, ["gr_warmup_steps=3 has no effect with gr_warmup='none'."]),
    ],
)
def test_a_flag_without_effect_is_named(flags, messages):
    assert GRArguments(**flags).flags_without_effect("gr_") == messages


def test_the_metadata_of_a_flag_without_its_limit():
    metadata = GRArguments.__dataclass_fields__["gr_r"].metadata
    assert metadata.copy().keys() == dict(metadata).keys() == {"help"} and metadata["limit"].allows(0.1)


def test_passes_of_a_step():
    assert "; 1 pass per step" in GRArguments(**MOMENTUM).describe_method()
    assert "gr_ascent=momentum" in GRArguments(**MOMENTUM).describe_method()
    assert "; up to 1.2 passes per step" in GRArguments(gr_preset="looksam").describe_method()
    assert "gr_momentum_r=1.5, no IRE; up to 1.5 passes per step" in GRArguments(**BETWEEN).describe_method()


@pytest.mark.parametrize("preset", IRE_PRESETS)
def test_presets_are_valid(preset):
    flags = GRArguments(ire_preset=preset)
    optimizer = IRE(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 1.0), **flags.ire_settings() | {"exclude": ()})
    assert optimizer.kappa == IRE_PRESETS[preset]["ire_kappa"]


@pytest.mark.parametrize("flags", [{}, {"ire_preset": None}, {"ire_preset": "cnn"}], ids=str)
def test_what_comes_out_of_a_configuration_is_plain(flags, tmp_path):
    config = GRConfig(**{**PRESET, **flags})
    assert settings(config)[0] in (0.0, 1.0, 2.0)
    copies = (
        config,
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        replace(config, learning_rate=1.0),
        GRConfig(**{name: value for name, value in config.to_dict().items() if name in PRESET or name in SETTINGS}),
    )
    for other in copies:
        assert settings(other) == settings(config)
        assert {type(value) for value in settings(other)} <= {float, type(None)}
    assert {type(value) for name, value in config.to_dict().items() if name in SETTINGS} <= {float, type(None)}
    defaults = {f.name: f.default for f in fields(GRConfig) if f.name in SETTINGS}
    assert defaults == {"ire_kappa": 0.0, "ire_gamma": 0.6, "ire_start_step": None}


def test_command_line_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(GRConfig).parse_args_into_dataclasses(["--gr_warmup", "foo"])
    names = re.search("invalid choice: 'foo' \\(choose from (.*)\\)", capsys.readouterr().err).group(1)
    assert names.replace("'", "").split(", ") == list(GR_WARMUPS)  # in quotes or not, as Python has it


def test_warmup_steps():
    assert GRArguments().get_gr_warmup_steps(7, 100) == 7
    assert GRArguments(gr_warmup_steps=0.125).get_gr_warmup_steps(7, 100) == 13
    assert GRArguments(gr_warmup_steps=12).get_gr_warmup_steps(7, 100) == 12


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"gr_lambda": 0}, "optim=adamw_torch_fused, no GR, no IRE; 1 pass per step"),
        ({}, "optim=adamw_torch_fused, GR with r=0.1, lambda=0.1, gr_warmup=zero, no IRE; up to 2 passes per step"),
        (
            {"optim": "lars", "gr_interval": 4, "ire_kappa": 2.0, "ire_probe_fraction": 0.5},
            "optim=lars, GR with r=0.1, lambda=0.1, gr_warmup=zero, IRE with kappa=2, gamma=0.6; "
            "up to 1.3 passes per step",
        ),
        ({"gr_lambda": 0, "ire_kappa": 1.0, "ire_mask": "random"}, "gamma=0.6; 1 pass per step"),
    ],
    ids=str,
)
def test_the_method_in_a_line(flags, expected):
    assert GRConfig(output_dir="x", use_cpu=True, **flags).describe_method().endswith(expected)


def test_other_training_arguments_can_have_the_flags():
    from dataclasses import dataclass

    @dataclass
    class Config(GRArguments, Seq2SeqTrainingArguments):
        pass

    assert Config(output_dir="x", use_cpu=True, predict_with_generate=True, gr_r=0.2).gr_r == 0.2
    with pytest.raises(ValueError, match="gr_r=-1"):
        Config(output_dir="x", use_cpu=True, gr_r=-1)


@dataclass
class OwnDefaults(TrainingArguments):
    optim: OptimizerNames | str = field(default="sgd")
    lr_scheduler_type: SchedulerType | str = field(default=SchedulerType.COSINE)


@dataclass
class Behind(OwnDefaults):
    pass


@dataclass
class InFront(GRArguments, Behind):
    pass


@dataclass
class Redeclared(GRArguments, Behind):
    lr_scheduler_type: str = "constant"


@dataclass
class BelowThat(Redeclared):
    pass


def test_defaults_of_the_configuration_behind_are_kept(tmp_path):
    """Made in code, and parsed: a flag that is given wins, one of ours too."""

    def values(config, *flags):
        (args,) = HfArgumentParser(config).parse_args_into_dataclasses([f"--output_dir={tmp_path}", *flags])
        return args.optim, args.lr_scheduler_type

    for args in (InFront(output_dir=str(tmp_path)), OwnDefaults(output_dir=str(tmp_path))):
        assert (args.optim, args.lr_scheduler_type) == ("sgd", "cosine")
    assert values(InFront) == values(OwnDefaults) == ("sgd", "cosine")
    assert values(InFront, "--optim=tvlars", "--lr_scheduler_type=constant") == ("tvlars", "constant")
    assert values(Redeclared) == values(BelowThat) == ("sgd", "constant")
    assert values(GRConfig) == values(TrainingArguments)
