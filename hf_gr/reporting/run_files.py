"""Reading what a run has left in its folder."""

import json
from pathlib import Path
from typing import Any

History = list[dict[str, float]]


def read_json(path: Path) -> Any:
    """The content of a file.

    Raises:
        ValueError: it is not there, or was cut off.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}). Give the output folder of a finished run."
        ) from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(
            f"{path} is not valid JSON ({error}): it was probably cut off. Restore it, or delete its folder and "
            "run again."
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The same, for a file with names and values."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} has {type(content).__name__} where names and values belong. Delete it and run again.")
    return content


def read_history(folder: Path) -> History:
    """`log_history` of the run in `folder`.

    Raises:
        ValueError: there is none, or it is not what Trainer writes.
    """
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no trainer_state.json. Give the output folder of a finished run.")
    history = read_mapping(path).get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        raise ValueError(f"{path}: log_history is not the list that Trainer writes. Give the output folder of a run.")
    return history
