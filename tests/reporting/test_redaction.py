"""What of a command line others may read."""

import pytest

from hf_gr.reporting.redaction import flag_name, redact, take_hub_tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # A short one may be a part of any word.
        (["--hub_token", "ab", "--run_name", "ab"], ["--hub_token", "...", "--run_name", "ab"]),
        (["--hub_token", "long-enough", "--run_name=a-long-enough-b"], ["--hub_token", "...", "--run_name=a-...-b"]),
        (["--hub-token=one", "--hub_toke", "two"], ["--hub-token=...", "--hub_toke", "..."]),
        (["--push_to_hub_token", "one", "--wandb_api_key=two"], ["--push_to_hub_token", "...", "--wandb_api_key=..."]),
        (["--launcher", "env HF_TOKEN=one WANDB_API_KEY='two' python"],
         ["--launcher", "env HF_TOKEN=... WANDB_API_KEY=... python"]),
        ([f"me/hf_{'1a' * 17}/x"], ["me/.../x"]),
        (["--run_name", "in-the-environment"], ["--run_name", "..."]),
        (["--hub_token", "--push_to_hub"], ["--hub_token", "--push_to_hub"]),
        # No secrets.
        (["--max_train_tokens", "25000000"], ["--max_train_tokens", "25000000"]),
        (["--eos_token", "</s>"], ["--eos_token", "</s>"]),
        (["--hub_model_id", "hf_gr/hf_model", "--gr_r=0.1"], ["--hub_model_id", "hf_gr/hf_model", "--gr_r=0.1"]),
        ([], []),
    ],
)  # fmt: skip
def test_secrets_are_hidden(words, expected, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "in-the-environment")
    monkeypatch.setenv("HF_TOKEN", "")
    assert redact(words) == expected


def test_tokens_are_taken_out():
    words = ["r.yaml", "--hub_token", "one", "--gr_r", "1", "--hub-tok=two"]
    assert take_hub_tokens(words) == (["r.yaml", "--gr_r", "1"], ["one", "two"])
    assert take_hub_tokens([]) == ([], [])
    for words in (["--hub_token"], ["--hub_token="], ["--hub_token", "--bf16"]):
        with pytest.raises(ValueError, match="--hub_token has no value"):
            take_hub_tokens(words)


def test_a_flag_by_any_spelling():
    assert {flag_name(word) for word in ("--gr_r", "--gr-r", "--gr-r=0.1", "--gr_r=--x")} == {"gr_r"}
    assert [flag_name(word) for word in ("-x", "--", "gr_r", "-1")] == [None] * 4
