"""Tasks of lm-evaluation-harness on a model that is loaded already, with whatever hooks it has.

The harness is the extra `moetools[lm-eval]`; it brings its own tasks and fetches their data.
"""

import difflib
import importlib.util
import io
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from moetools import console
from moetools.errors import DataError, RequestError

STANDARD_ERRORS = 1.959964
SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics between 0 and 1."""


def check_installed() -> None:
    """Whether the harness is there.

    Raises:
        RequestError: It is not.
    """
    missing = [name for name in ("lm_eval", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            "--lm-eval needs lm-evaluation-harness, which is not installed: pip install "
            "'moetools[lm-eval]'"
        )


def run(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Run some tasks; what the harness itself returns, with its samples.

    Args:
        model: Of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: Names that the harness knows, or YAML files of tasks.
        batch_size: Rows of a batch.
        seed: Of what the harness draws.

    Raises:
        RequestError: No such task.
        DataError: A task cannot be loaded, such as one whose data is not here while offline.
    """
    console.note(f"Running {', '.join(tasks)} through lm-evaluation-harness ...")
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        wanted = [_task(name, manager) for name in tasks]
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found: dict[str, Any] | None = simple_evaluate(
                model=wrapped,
                tasks=wanted,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"--lm-eval {','.join(tasks)}: {reason}") from error
    assert found is not None
    return found


def metrics(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of what the harness returns.

    Returns:
        One row per task and metric: `metric`, `scope` (`group`), `group` (the task), `value`,
        `low`, `high` (1.96 standard errors of the harness), `num_items`.
    """
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            low, high = (0.0, 1.0) if metric in SHARES else (-math.inf, math.inf)
            half = STANDARD_ERRORS * error if isinstance(error, float) else math.nan
            rows.append(
                {
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "scope": "group",
                    "group": task,
                    "value": float(value),
                    "low": max(float(value) - half, low),
                    "high": min(float(value) + half, high),
                    "num_items": found.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def _task(name: str, manager: Any) -> Any:
    """A task's name, or its configuration where it is a YAML file."""
    if not name.endswith((".yaml", ".yml")):
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else " `lm-eval ls tasks` lists them."
            raise RequestError(f"--lm-eval {name}: the harness has no such task.{hint}")
        return name
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name).expanduser()
    if not path.is_file():
        raise RequestError(f"--lm-eval {name}: no such file.")
    try:
        return load_yaml(path.absolute(), resolve_func=True)
    except (OSError, ValueError) as error:
        raise DataError(f"--lm-eval {name}: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the harness; its bars on a terminal alone."""
    import datasets

    datasets.disable_progress_bars()
    names = ("lm_eval", "lm-eval", "evaluate")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = sys.stderr.isatty() and not console.settings.quiet
    try:
        with nullcontext() if bars else redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
