"""Removes what must not be published: secrets from command lines, and local folders from paths."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence

HIDDEN = "..."
#: Shorter secrets are hidden only after their flag: elsewhere they could be part of any word.
SHORTEST = 8
_VARIABLE = r"[A-Z0-9_]*(?:TOKEN|API_KEY|SECRET|SECRET_KEY|ACCESS_KEY|PASSWORD)"
_TOKEN = re.compile(r"\b(?:hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}")
_ASSIGNMENT = re.compile(rf"\b({_VARIABLE})=(?:'[^']*'|\"[^\"]*\"|[^\s'\"]+)")


def flag_name(word: str) -> str | None:
    """`gr_r` of `--gr_r`, `--gr-r` and `--gr-r=0.1`, the same flag; None for a word that is not a flag."""
    return word[2:].split("=")[0].replace("-", "_") if word.startswith("--") and len(word) > 2 else None


def redact(words: Iterable[str], known: Iterable[str | None] = ()) -> list[str]:
    """`words`, with secrets replaced by `...`: values of `--hub_token` and similar flags, abbreviated or not, wherever
    they occur; values of environment variables such as HF_TOKEN; anything in the form of a Hub token; and `known`.
    """
    words = list(words)
    after_flags = dict(_secret_values(words))
    variables = (value for name, value in os.environ.items() if re.fullmatch(_VARIABLE, name))
    secrets = {s for s in (*known, *variables, *after_flags.values()) if s and len(s) >= SHORTEST}
    return [_redact(word, after_flags.get(i), secrets) for i, word in enumerate(words)]


def _redact(word: str, flag_value: str | None, secrets: set[str]) -> str:
    if flag_value:
        word = word[: len(word) - len(flag_value)] + HIDDEN
    for secret in sorted(secrets, key=len, reverse=True):  # one may contain another
        word = word.replace(secret, HIDDEN)
    return _ASSIGNMENT.sub(rf"\1={HIDDEN}", _TOKEN.sub(HIDDEN, word))


def without_folders(value: str) -> str:
    """A path without the folders outside the working folder, where a folder inside it cannot be mistaken for a name on
    the Hub. Anything else is returned unchanged."""
    if os.path.isabs(value) or value == ".." or value.startswith("../"):
        return f"path/to/{os.path.basename(os.path.abspath(value))}"
    is_folder = os.path.isdir(value) and not value.startswith(".")
    return f"./{value}" if is_folder else value


def take_hub_tokens(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """`words` without `--hub_token`, and its values, of which the last one applies."""
    kept, tokens = [], []
    rest = iter(words)
    for word in rest:
        if not _is_hub_token(word):
            kept.append(word)
            continue
        token = word.partition("=")[2] if "=" in word else next(rest, "")
        if not token or token.startswith("--"):
            raise ValueError("--hub_token has no value. Write the token after the flag, or set HF_TOKEN.")
        tokens.append(token)
    return kept, tokens


def _secret_values(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index of a word, its secret part)"""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if equals and _is_secret(flag):
            yield i, value
        elif i and "=" not in words[i - 1] and _is_secret(words[i - 1]) and not word.startswith("--"):
            yield i, word


def _is_secret(word: str) -> bool:
    name = flag_name(word) or ""
    return _is_hub_token(word) or name.endswith(("hub_token", "api_key", "password", "secret"))


def _is_hub_token(word: str) -> bool:
    name = flag_name(word) or ""
    return name.startswith("hub_t") and "hub_token".startswith(name)
