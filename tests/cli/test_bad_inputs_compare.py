"""What compare.py and the command hf-gr refuse: one line that names it, exit code 2."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from helpers.scripts import check, load_script
from hf_gr.cli import command
from hf_gr.reporting.record import Record, Segment, write_record

ARMS = {"off": {"gr_lambda": 0}, "on": {"gr_lambda": 0.1}}
HISTORY = [{"step": s, "loss": 3 - s / 10, "eval_loss": 3.0 - s / 10} for s in range(1, 6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders of runs, and what is wrong with them."""
    folder = tmp_path_factory.mktemp("places")
    nan = [{**entry, "loss": float("nan"), "grad_norm": float("nan")} for entry in HISTORY]
    states = {
        "run": {"log_history": HISTORY},
        "nan": {"log_history": nan},
        "null": {"log_history": [{**entry, "loss": None, "grad_norm": None} for entry in HISTORY]},
        "silent": {"log_history": []},
        "other": {"best_metric": None},
        "list": [1, 2],
        "stepless": {"log_history": [{"loss": 1.0}]},
    }
    for name, state in states.items():
        (folder / name).mkdir()
        (folder / name / "trainer_state.json").write_text(json.dumps(state))
    for name in ("empty", "cut", "checkpoints/checkpoint-3", "checkpoints/checkpoint-best"):
        (folder / name).mkdir(parents=True)
    for name in ("cut", "checkpoints/checkpoint-3"):
        (folder / name / "trainer_state.json").write_text(json.dumps(states["run"])[:50])
    (folder / "file").write_text("x")
    write_record(Record(segments=[Segment()]), folder / "recorded")
    write_record(Record(segments=[Segment()]), folder / "unreadable")
    (folder / "unreadable" / "run.json").write_text("{")
    (folder / "grid.yaml").write_text(yaml.safe_dump({"script": "train_vit.py", "arms": ARMS, "baseline": "off"}))
    return folder


def fill(argv: list[str], place: Path) -> list[str]:
    return [word.replace("{}", str(place)) for word in argv]


# ---- compare.py ----

GRID = ["--preset", "{}/grid.yaml", "--output_dir", "{}/out"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--preset"]),
        (["--preset", "none"], ["preset=none", "or one of these: cost-frontier.yaml, forgetting.yaml"]),
        (["--preset", "{}/none.yaml"], ["preset=", "none.yaml", "Give the path of one"]),
        (["--preset", "{}/empty"], ["preset=", "Give the path of one"]),
        (["--preset", "gr-table2", "--scale", "huge"], ["scale='huge'", "choose one of smoke, cpu, paper"]),
        ([*GRID, "--scale", "cpu"], ["grid.yaml", "scale='cpu'", "it has no scales"]),
        ([*GRID, "--seeds", "1", "1"], ["seeds=[1, 1]", "list each value once"]),
        ([*GRID, "--seeds", "1", "--seeds", "2", "1"], ["seeds=[1, 2, 1]", "list each value once"]),
        ([*GRID, "--seeds", "-1"], ["seeds=[-1]", "0 or more"]),
        ([*GRID, "--seeds", "one"], ["--seeds", "'one'", "Give a whole number"]),
        ([*GRID, "--seeds"], ["--seeds", "expected at least one argument"]),
        ([*GRID, "--workers", "0"], ["workers=0", "Give 1 or more"]),
        ([*GRID, "--workers", "two"], ["--workers", "'two'", "Give a whole number"]),
        ([*GRID, "--launcher", ""], ["launcher=''", "Give one"]),
        ([*GRID, "--launcher", "a 'b"], ["launcher=", "a 'b", "Close the quotation"]),
        ([*GRID, "--launcher", "no-such-program -x"], ["launcher='no-such-program -x'", "no such program", "Give one"]),
        ([*GRID, "--axis", "gr_r"], ["--axis gr_r", "Write FLAG=VALUE,VALUE"]),
        ([*GRID, "--axis", "gr_r="], ["--axis gr_r=", "Write FLAG=VALUE,VALUE"]),
        ([*GRID, "--axis", "gr_r=1,,2"], ["--axis gr_r=1,,2", "Write FLAG=VALUE,VALUE"]),
        ([*GRID, "--axis", "=1"], ["--axis =1", "Write FLAG=VALUE,VALUE"]),
        ([*GRID, "--axis", "gr_r=1,1.0"], ["gr_r=['1', '1.0']", "list each value once"]),
        ([*GRID, "--axis", "dataset_name=/a/b,/a/b/"], ["dataset_name=", "list each value once"]),
        ([*GRID, "--axis", "gr_r=1", "--axis", "gr-r=2"], ["--axis gr-r=2", "in one --axis"]),
        ([*GRID, "--axis", "gr-lambda=1,2"], ["gr_lambda", "an axis has no effect", "Leave one of them out"]),
        ([*GRID, "--axis", "seed=1,2"], ["seed", "--seeds"]),
        ([*GRID, "--axis", "output_dir=a,b"], ["output_dir", "Give --output_dir to compare.py"]),
        ([*GRID, "--axis", "hub-token=a,b"], ["hub_token", "set HF_TOKEN"]),
        ([*GRID, "--axis", f"hub_model_id=hf_{'1a' * 17}"], ["hub_model_id", "a token"]),
        ([*GRID, "--axis", "arm=a,b"], ["arm", "Write arms"]),
        ([*GRID, "--axis", "gr_rr=1"], ["--gr_rr", "Did you mean --gr_r?"]),
        ([*GRID, "--axis", "gr_r=abc"], ["--gr_r", "'abc'", "Give a number"]),
        ([*GRID, "--axis", "gr_warmup=zero,foo"], ["--gr_warmup", "'foo'", "choose from"]),
        ([*GRID, "--gr_lambda", "0"], ["--gr_lambda: no effect", "Use an axis"]),
        ([*GRID, "--gr-lambda", "0"], ["--gr_lambda: no effect", "Use an axis"]),
        ([*GRID, "--gr-lambda=0"], ["--gr_lambda: no effect", "Use an axis"]),
        ([*GRID, "--gr_lam", "0"], ["--gr_lam", "Did you mean --gr_lambda?"]),
        ([*GRID, "--axis", "bf16=True,False", "--no_bf16"], ["--bf16: no effect", "Use an axis"]),
        ([*GRID, "--seed", "3"], ["--seed: no effect", "Use an axis"]),
        ([*GRID, "--gr_r", "1", "--gr-r=2"], ["--gr_r: given twice", "Leave"]),
        ([*GRID, "--gr_rr", "1"], ["--gr_rr", "Did you mean --gr_r?"]),
        ([*GRID, "--image_size", "big"], ["--image_size", "'big'", "Give a whole number"]),
        ([*GRID, "--gr_r"], ["--gr_r", "Write the value"]),
        ([*GRID, "stray"], ["'stray'", "belongs to no flag"]),
        ([*GRID, "--storage", "sqlite:///x.db"], ["--storage", "there is no such flag"]),
        ([*GRID, "--work", "2"], ["--work", "there is no such flag"]),
        ([*GRID, "--hub_token"], ["--hub_token", "Write the token"]),
        ([*GRID, "--hub_token", "--gr_r=1"], ["--hub_token", "Write the token"]),
        (["--preset", "{}/grid.yaml", "--output-dir", "{}/file"], ["output_dir=", "file", "Choose another folder"]),
    ],
)  # fmt: skip
def test_command_lines_of_compare(argv, words, place):
    check(load_script("compare").main, fill(argv, place), *words)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": {}}, ["unknown key arm", "Known keys are script, arms"]),
        ({"script": None}, ["script=None", "must be text"]),
        ({"script": ...}, ["missing key script", "Add it"]),
        ({"script": "train_vit"}, ["script='train_vit'", "there is no file"]),
        ({"script": "evaluate_llama.py"}, ["script='evaluate_llama.py'", "Choose one of train_vit.py"]),
        ({"arms": ["off", "on"]}, ["arms=['off', 'on']", "must be names with values"]),
        ({"arms": None}, ["arms=None", "must be names with values"]),
        ({"arms": {}}, ["arms={}", "at least one arm"]),
        ({"arms": {"off": None, "on": {}}}, ["arms.off=None", "must be names with values"]),
        ({"arms": {"off": ["gr_lambda"]}}, ["arms.off=['gr_lambda']", "must be names with values"]),
        ({"arms": {"off": {"gr_lambda": None}}}, ["arms.off.gr_lambda=None", "must be text, a number"]),
        ({"arms": {"off": {"image_mean": [0, 1]}}}, ["arms.off.image_mean=[0, 1]", "must be text, a number"]),
        ({"arms": {"off": {"gr_lamda": 0}}}, ["--gr_lamda", "Did you mean --gr_lambda?"]),
        ({"arms": {"off": {"gr-lambda": 0}}}, ["gr-lambda", "write gr_lambda"]),
        ({"arms": {"off": {"seed": 0}}}, ["seed", "--seeds"]),
        ({"arms": {False: {}, "on": {}}, "baseline": "on"}, ["arms, a name=False", "in quotes"]),
        ({"baseline": ...}, ["missing key baseline", "Add it"]),
        ({"baseline": "none"}, ["baseline='none'", "choose one of the arms, off, on"]),
        ({"baseline": False}, ["baseline=False", "in quotes"]),
        ({"metric": ["eval_loss"]}, ["metric=['eval_loss']", "must be text"]),
        ({"metric": "eval_accuracy"}, ["metric='eval_accuracy'", "Choose one of eval_error, eval_loss"]),
        ({"metric": "eval_eror"}, ["metric='eval_eror'", "Choose one of eval_error, eval_loss"]),
        ({"also": "eval_ece"}, ["also='eval_ece'", "must be a list"]),
        ({"also": ["eval_nll", "eval_nll"]}, ["also=", "eval_nll is shown already", "List it once"]),
        ({"also": ["eval_loss"]}, ["also=['eval_loss']", "is shown already"]),
        ({"percent": "yes"}, ["percent='yes'", "must be true or false"]),
        ({"recipe": "none.yaml"}, ["recipe=none.yaml", "there is no such file", "vit_digits"]),
        ({"recipe": 3}, ["recipe=3", "must be text"]),
        ({"flags": ["--bf16"]}, ["flags=['--bf16']", "must be names with values"]),
        ({"flags": {"gr_r": {"a": 1}}}, ["flags.gr_r={'a': 1}", "must be text, a number"]),
        ({"flags": {"output_dir": "x"}}, ["output_dir", "Give --output_dir to compare.py"]),
        ({"flags": {"hub_token": "x"}}, ["hub_token", "set HF_TOKEN"]),
        ({"flags": {"--gr_r": 1}}, ["--gr_r", "write gr_r"]),
        ({"flags": {"fp16": "maybe"}}, ["--fp16", "maybe"]),
        ({"axes": ["gr_r"]}, ["axes=['gr_r']", "must be names with values"]),
        ({"axes": {"gr_r": 0.1}}, ["axes.gr_r=0.1", "must be a list"]),
        ({"axes": {"gr_r": [None]}}, ["axes.gr_r=None", "must be text, a number"]),
        ({"axes": {"gr_r": []}}, ["gr_r=[]", "at least one"]),
        ({"axes": {"gr_r": [0.1, "0.10"]}}, ["gr_r=[0.1, '0.10']", "list each value once"]),
        ({"axes": {"gr_lambda": [0.1]}}, ["gr_lambda", "Leave one of them out"]),
        ({"ignores": ["off"]}, ["ignores=['off']", "must be names with values"]),
        ({"ignores": {"off": "gr_r"}}, ["ignores.off='gr_r'", "must be a list"]),
        ({"ignores": {"of": ["gr_r"]}}, ["ignores: of is none of the arms, off, on"]),
        ({"ignores": {"off": ["gr_rr"]}}, ["--gr_rr", "Did you mean --gr_r?"]),
        ({"ignores": {"off": ["gr_r"], "on": ["gr_r"]}, "axes": {"gr_r": [1, 2]}}, ["gr_r", "the arms set or ignore"]),
        ({"seeds": 3}, ["seeds=3", "must be a list"]),
        ({"seeds": ["a"]}, ["seeds='a'", "must be a whole number"]),
        ({"seeds": [1.5]}, ["seeds=1.5", "must be a whole number"]),
        ({"seeds": [True]}, ["seeds=True", "must be a whole number"]),
        ({"seeds": []}, ["seeds=[]", "at least one"]),
        ({"picture": ["frontier"]}, ["picture=['frontier']", "must be text"]),
        ({"picture": "pie"}, ["picture='pie'", "choose one of sensitivity (the metric against the axis)"]),
        ({"picture": "sensitivity"}, ["picture='sensitivity'", "the 0 axes of the grid", "Choose another"]),
        ({"published": ["a.csv"]}, ["published=['a.csv']", "must be names with values"]),
        ({"published": {"file": "a.csv"}}, ["published has file", "give file, arms, names"]),
        ({"published": {"file": "a", "arms": ["x"], "names": {}}}, ["published.arms=['x']", "names with values"]),
        ({"published": {"file": "a", "arms": {"x": "y"}, "names": {}}}, ["published.arms: x is none of the arms"]),
        ({"published": {"file": "a.csv", "arms": {}, "names": {}}}, ["published.file=", "a.csv", "Give a CSV"]),
        ({"published_like": {"model": "x"}}, ["published_like", "no effect without published"]),
        ({"scales": ["cpu"]}, ["scales=['cpu']", "must be names with values"]),
        ("", ["the file=None", "must be names with values"]),
        ("- a", ["the file=['a']", "must be names with values"]),
        ("a: [", ["cannot be read as YAML", "Correct it"]),
        ("script: a\nscript: b", ["script is given twice", "Correct it"]),
        (b"\xff\xfe\x00", ["cannot be read as YAML", "Correct it"]),
    ],
)  # fmt: skip
def test_grids(changes, words, tmp_path):
    path, content = tmp_path / "grid.yaml", changes
    if isinstance(changes, dict):
        content = {"script": "train_vit.py", "arms": ARMS, "baseline": "off", **changes}
        content = yaml.safe_dump({key: value for key, value in content.items() if value is not ...})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["--preset", path, "--output_dir", tmp_path / "out"]
    check(load_script("compare").main, argv, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [{"flags": ["a"]}, {"axes": {"gr_r": 1}}, {"seeds": None}, {"speed": 1}, ["cpu"]])
def test_scales_of_a_grid(scale, tmp_path):
    content = {"script": "train_vit.py", "arms": ARMS, "baseline": "off", "scales": {"cpu": scale}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    key = next(iter(scale)) if isinstance(scale, dict) else "scales.cpu"
    argv = ["--preset", tmp_path / "grid.yaml", "--scale", "cpu", "--output_dir", tmp_path / "out"]
    check(load_script("compare").main, argv, "grid.yaml", key)


# ---- hf-gr speedup ----


def runs(*argv: str, baseline: str = "run", candidate: str = "run") -> list[str]:
    return ["--baseline", f"{{}}/{baseline}", "--candidate", f"{{}}/{candidate}", *argv]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--baseline", "--candidate"]),
        (["--baseline", "{}/run"], ["--candidate"]),
        (runs(baseline="none"), ["none", "no trainer_state.json", "Give the output folder"]),
        (runs(candidate="empty"), ["empty", "no trainer_state.json", "Give the output folder"]),
        (runs(candidate="file"), ["file", "no trainer_state.json", "Give the output folder"]),
        (runs(candidate="cut"), ["cut/trainer_state.json", "not valid JSON", "run again"]),
        (runs(candidate="other"), ["other/trainer_state.json", "log_history", "Give the output folder"]),
        (runs(candidate="list"), ["list/trainer_state.json", "list where names and values belong"]),
        (runs(candidate="stepless"), ["stepless/trainer_state.json", "log_history", "Give the output folder"]),
        (runs(candidate="silent"), ["candidate", "silent", "metric='loss'", "it has no log"]),
        (runs(candidate="nan"), ["candidate", "nan", "no finite value", "Leave the run out"]),
        (runs(baseline="null"), ["baseline", "null", "no finite value", "Leave the run out"]),
        (runs("--metric", "eval_los"), ["metric='eval_los'", "Choose one of eval_loss, loss"]),
        (runs("--metric", "eval_error"), ["metric='eval_error'", "Choose one of eval_loss, loss"]),
        (runs("--window", "0"), ["window=0", "Give 1 or more"]),
        (runs("--window", "-2"), ["window=-2", "Give 1 or more"]),
        (runs("--window", "6"), ["window=6", "5 times", "Give that or less"]),
        (runs("--window", "x"), ["--window", "'x'", "Give a whole number"]),
        (runs("--target", "nan"), ["target=nan", "leave it out for 2.5"]),
        (runs("--target", "inf"), ["target=inf", "leave it out for 2.5"]),
        (runs("--target", "low"), ["--target", "'low'", "Give a number"]),
        (runs("--target", "1"), ["target=1", "neither group reaches it", "2.5"]),
        (runs("--picture", "{}/curves"), ["picture=", "curves", "Use .png"]),
        (runs("--picture", "{}/curves.doc"), ["picture=", "curves.doc", "Use .png"]),
        (runs("--picture", "{}/none/curves.png"), ["picture=", "none/curves.png", "Choose a file"]),
        (runs("--names", "a"), ["--names", "expected 2 arguments"]),
        (runs("--names", "a", "a"), ["names=a a", "Give two names"]),
        (["--baseline", "{}/run", "{}/run/", "--candidate", "{}/run"], ["baseline", "run", "twice", "Give it once"]),
        (runs("--colour", "red"), ["--colour", "there is no such flag"]),
        (runs("--candidate", "{}/run"), ["candidate", "twice", "Give it once"]),
    ],
)  # fmt: skip
def test_comparisons(argv, words, place):
    check(command.main, ["speedup", *fill(argv, place)], *words)


# ---- hf-gr plots, hf-gr card, and what is neither ----


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["folder"]),
        (["{}/none"], ["none", "no trainer_state.json", "Give the output folder"]),
        (["{}/empty"], ["empty", "no trainer_state.json", "Give the output folder"]),
        (["{}/file"], ["file", "no trainer_state.json", "Give the output folder"]),
        (["{}/cut"], ["cut/trainer_state.json", "not valid JSON", "run again"]),
        (["{}/checkpoints"], ["checkpoint-3/trainer_state.json", "not valid JSON", "run again"]),
        (["{}/other"], ["other/trainer_state.json", "log_history", "Give the output folder"]),
        (["{}/stepless"], ["stepless/trainer_state.json", "log_history", "Give the output folder"]),
        (["{}/silent"], ["folder=", "silent", "nothing to plot", "Give another"]),
        (["{}/run", "--picture", "{}/x.txt1"], ["picture=", "x.txt1", "Use .png"]),
        (["{}/run", "--picture", "{}/run"], ["picture=", "run", "Use .png"]),
        (["{}/run", "--picture", "{}/none/x.png"], ["picture=", "none/x.png", "Choose a file"]),
        (["{}/run", "{}/nan"], ["2 folders", "--layers and --picture"]),
        (["{}/run", "{}/run", "--layers", "--picture", "{}/x.png"], ["folder=", "is given twice"]),
        (["{}/run", "--layers"], ["run", "no layer_statistics.parquet", "--layer_statistics_steps"]),
        (["{}/run", "--dpi", "9"], ["--dpi", "there is no such flag"]),
    ],
)
def test_plots(argv, words, place):
    check(command.main, ["plots", *fill(argv, place)], *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["card"], ["folder"]),
        (["card", "{}/none"], ["none", "there is no run.json", "Give the output folder"]),
        (["card", "{}/run"], ["run", "there is no run.json", "Give the output folder"]),
        (["card", "{}/recorded"], ["recorded", "no trainer_state.json", "Give the output folder"]),
        (["card", "{}/unreadable"], ["run.json", "cannot be read", "Delete it"]),
        (["card", "{}/run", "{}/nan"], ["nan", "belongs to no flag"]),
        (["card", "{}/run", "--license", "mit"], ["--license", "there is no such flag"]),
        (["cards", "{}/run"], ["'cards'", "no such command", "vit, llama", "speedup, diagnose, card, plots"]),
        (["--picture", "{}/x.png"], ["'--picture'", "no such command", "vit, llama", "speedup, diagnose, card, plots"]),
    ],
)
def test_cards_and_commands(argv, words, place):
    check(command.main, fill(argv, place), *words)


@pytest.mark.parametrize("name", ["nan", "null"])
def test_a_diverged_run_is_drawn(name, place, tmp_path):
    command.main(["plots", str(place / name), "--picture", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()


# ---- evaluate_llama.py --lm_eval_tasks; the rest is in test_bad_inputs_text.py ----


@pytest.mark.parametrize("flag", ["dataset_config_name", "split", "context_column", "choices_column", "label_column"])
def test_flags_of_datasets_beside_tasks_of_the_harness(flag, place):
    argv = [place / "run", "--lm_eval_tasks", "arc_easy", f"--{flag}", "x"]
    check(load_script("evaluate_llama").main, argv, f"{flag}='x'", "no effect with --lm_eval_tasks", "Leave it out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not valid JSON", "run again"]),
        ("{}", ["no base_model_name_or_path", "Write"]),
        ("[]", ["names and values"]),
    ],
)
def test_adapters_for_the_harness(content, words, tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    argv = [tmp_path, "--lm_eval_tasks", "arc_easy", "--device", "cpu"]
    check(load_script("evaluate_llama").main, argv, "adapter_config.json", *words)
    sys.modules.pop("lm_eval", None)
