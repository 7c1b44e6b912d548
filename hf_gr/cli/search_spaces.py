"""Search spaces for `Trainer.hyperparameter_search` with optuna, around the published settings.

    best = trainer.hyperparameter_search(hp_space=search_spaces.gr, backend="optuna", n_trials=20)

Spaces can be combined with each other and with more flags: `lambda trial: {**gr(trial), "learning_rate": ...}`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def gr(trial: "optuna.Trial") -> dict[str, Any]:
    """r from 0.01 to 0.2 on a log scale; lambda / r from 0.25 to 1.5, where 1 is SAM; zero-warmup over T_w steps, up to
    0.4 of the run. Published: r of 0.05 and 0.1, lambda = r, T_w of 0.13."""
    r = trial.suggest_float("gr_r", 0.01, 0.2, log=True)
    return {
        "gr_r": r,
        "gr_lambda": r * trial.suggest_float("lambda_over_r", 0.25, 1.5),
        "gr_warmup": "zero",
        "gr_warmup_steps": trial.suggest_float("gr_warmup_steps", 0.0, 0.4),
    }


def ire(trial: "optuna.Trial") -> dict[str, Any]:
    """kappa from 0.5 to 8 on a log scale, gamma from 0.5 to 0.9. Published: kappa of 1 to 20, gamma of 0.6
    to 0.9."""
    return {
        "ire_kappa": trial.suggest_float("ire_kappa", 0.5, 8.0, log=True),
        "ire_gamma": trial.suggest_float("ire_gamma", 0.5, 0.9),
    }
