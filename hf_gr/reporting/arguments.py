"""The arguments of a run that its record contains: those that differ from their defaults."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from .redaction import redact, without_folders

#: Recorded even at their defaults: the other arguments mean little without them.
ALWAYS_SHOWN = ("seed", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "weight_decay")
#: Where the run was stored, logged and published, not what it computed.
BOOKKEEPING = frozenset(
    """
    output_dir run_name project report_to disable_tqdm log_level log_level_replica log_on_each_node logging_strategy
    logging_steps logging_first_step eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps
    save_total_limit do_train do_eval do_predict resume_from_checkpoint push_to_hub label_names remove_unused_columns
    accelerator_config ddp_backend local_rank skip_memory_metrics trackio_space_id trackio_bucket_id
    trackio_static_space_id layer_statistics_steps gr_diagnostics_steps dataset_name model_name_or_path license use_cpu
    dataloader_pin_memory overwrite_output_dir
    """.split()  # noqa: SIM905
)
#: Prefixes of the flags of the Hub, and of those whose values in force are recorded as a group.
ELSEWHERE = ("hub_", "gr_", "ire_")


def changed_arguments(args: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, and `ALWAYS_SHOWN`. New flags need no entry."""
    values = args.to_dict() if isinstance(args, TrainingArguments) else dataclasses.asdict(args)
    changed = {}
    for argument in dataclasses.fields(args):
        name = argument.name
        if name not in values or name in BOOKKEEPING or name.startswith(ELSEWHERE):
            continue
        if name == "num_train_epochs" and values.get("max_steps", -1) > 0:
            continue  # max_steps ends the run
        default = default_of(argument)
        differs = values[name] != default and not (_is_unset(values[name]) and _is_unset(default))
        if differs or name in ALWAYS_SHOWN:
            value = values[name]
            changed[name] = without_folders(redact([value])[0]) if isinstance(value, str) else value
    return changed


def default_of(argument: dataclasses.Field) -> Any:
    default = argument.default if argument.default_factory is dataclasses.MISSING else argument.default_factory()
    return getattr(default, "value", default)  # of an enumeration, or of a flag that a preset may set


def _is_unset(value: Any) -> bool:
    """Whether it is None, False or empty; `TrainingArguments.__post_init__` turns one into another."""
    return value is None or value is False or value in ("", [], {})
