"""A mistake is one line and exit code 2, whatever raised it; what is no mistake keeps its traceback."""

import pytest
import torch

from helpers.scripts import SCRIPTS, check, error_line, load_script
from hf_gr import errors
from hf_gr.cli import script

ALL_SCRIPTS = [
    "train_vit",
    "pretrain_llama",
    "finetune_llama_lora",
    "pretrain_barlow_twins",
    "evaluate_llama",
    "evaluate_robustness",
    "evaluate_sharpness",
    "evaluate_features",
    "evaluate_forgetting",
    "compare",
]


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_every_script_ends_with_one_line(name):
    assert (SCRIPTS / f"{name}.py").read_text().endswith('if __name__ == "__main__":\n    run(main)\n')
    check(load_script(name).main, ["--no_such_flag", "1"], "--")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("gr_r=0: no.\n  Give\n  more."), "error: gr_r=0: no. Give more."),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: [Errno 2] No such file or directory: 'x'"),
        (ImportError("Install hf_gr[report]."), "error: Install hf_gr[report]."),
        (ValueError(), "error: ValueError"),
    ],
)
def test_mistakes_are_folded_into_one_line(error, line):
    assert error_line(raising(error), []) == line


@pytest.mark.parametrize("error", [FloatingPointError("steps 1 to 3"), errors.Failure("The upload failed.")])
def test_what_is_not_the_users_mistake_ends_with_another_code(error, capsys):
    with pytest.raises(SystemExit) as end:
        script.run(raising(error), [])
    assert end.value.code == 1 and capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [KeyError("momentum"), AssertionError(), RuntimeError("CUDA"), TypeError("None")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        script.run(raising(error), [])


def test_an_error_of_a_library_says_where_it_comes_from():
    line = error_line(lambda argv: int("many"), ["--traceback_of_none"])
    assert line.startswith("error: invalid literal for int()")
    line = error_line(lambda argv: __import__("json").loads("{"), [])
    assert line.endswith(" (JSONDecodeError in json/decoder.py; --traceback shows all)")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("row 0: the image cannot be used")


def test_the_message_of_a_data_loaders_process_arrives_without_its_traceback():
    line = error_line(lambda argv: list(torch.utils.data.DataLoader(Rows(), num_workers=1)), [])
    assert line == "error: row 0: the image cannot be used"


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_traceback_is_there_for_the_asking(by, monkeypatch, capsys):
    if by == "variable":
        monkeypatch.setenv("HF_GR_TRACEBACK", "1")
    seen = []

    def main(argv):
        seen.append(argv)
        raise ValueError("gr_r=0")

    with pytest.raises(SystemExit) as end:
        script.run(main, ["a", "--traceback"] if by == "flag" else ["a"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("Traceback") and printed.endswith("ValueError: gr_r=0\n")
    assert seen == [["a"]]


def test_of_several_processes_the_main_one_speaks(monkeypatch, capsys):
    """The others are gone before their time has come; if they are not, they have something of their own to say."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank, expected in (("0", "error: gr_r=0\n"), ("1", "error: process 1: gr_r=0\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            script.run(raising(ValueError("gr_r=0")), [])
        assert capsys.readouterr().err == expected
    assert waited == [errors.HEAD_START]


def test_errors_of_a_library_are_explained():
    with (
        pytest.raises(ValueError, match=r"^model='x' could not be loaded \(KeyError: 'weight'\)\. Give a folder\.$"),
        errors.explained("model='x' could not be loaded", "Give a folder."),
    ):
        {}["weight"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gr_lamda", "0"], ["--gr_lamda: there is no such flag. Did you mean --gr_lambda?"]),
        (["--gr-lamda=0"], ["--gr-lamda: there is no such flag. Did you mean --gr_lambda?"]),
        (["--gr_lam", "0"], ["--gr_lam: there is no such flag. Did you mean --gr_lambda?"]),
        (["--xyzzy"], ["--xyzzy: there is no such flag. See --help"]),
        (["--gr_r", "0.1", "0.2"], ["'0.2' belongs to no flag"]),
        (["--gr_r", "abc"], ["--gr_r: invalid float value: 'abc'. Give a number."]),
        (["--seed", "1.5"], ["--seed: invalid int value: '1.5'. Give a whole number."]),
        (["--gr_r"], ["--gr_r: expected one argument. Write the value"]),
        (["--gr_warmup", "foo"], ["--gr_warmup: invalid choice: 'foo' (choose from ", "lambda"]),
        (["--fp16", "maybe"], ["--fp16: Truthy value expected: got maybe but expected one of yes/no"]),
        # A misspelled flag comes first: the value of the other one may be wrong because of it.
        (["--gr_r", "0", "--gr_lamda", "0"], ["Did you mean --gr_lambda?"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    check(load_script("train_vit").main, argv, *words)


def test_a_model_that_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    argv = ["--model_name_or_path", tmp_path, "--dataset_name", "digits", "--output_dir", tmp_path / "out", "--use_cpu"]
    check(load_script("train_vit").main, argv, f"model_name_or_path='{tmp_path}' could not be loaded", "Give a folder")
