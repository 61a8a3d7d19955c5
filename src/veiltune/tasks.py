"""Accuracy measured by lm-evaluation-harness through whatever computes the log-probabilities: a protected model, say.

The harness builds the prompts and the metrics; the scores come from a callable. Nothing here touches the network: the
harness's own tasks are left out, tasks are local files, and hub access is switched off while it runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from veiltune.choices import TASKS, ChoiceItem, TaskData, find_task, held_out_items, load_task, training_examples
from veiltune.errors import ConfigError, DataError, nearest
from veiltune.examples import encode_continuation, encode_prompt
from veiltune.models.cache import build_once, cache_key, cache_root

__all__ = [
    "TASKS",
    "ChoiceItem",
    "TaskData",
    "Utility",
    "evaluate",
    "held_out_items",
    "load_task",
    "protected_lm",
    "training_examples",
    "wilson_interval",
]

Pair = tuple[list[int], list[int]]
"""Ids of a context (at least one) and of its continuation."""
Score = Callable[[list[Pair]], Sequence[tuple[float, bool]]]
"""For each pair: summed log-probability (nats) of the continuation, and whether greedy decoding gives it."""
Generate = Callable[[str, dict[str, Any]], str]
"""Continues a text; the settings are the harness's (``until``, ``max_gen_toks``, ``temperature`` …)."""

DEFAULT_MAX_LENGTH = 2048
_PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
_NO_SCORE = -1e9  # stands for a log-probability that is not a number: finite, so that ratios of it are too
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Utility:
    """One task's result.

    ``ci95`` is Wilson's interval where every item scores 0 or 1, the normal approximation where items score
    otherwise, and ``None`` where the metric is no mean over items. ``others`` holds the task's further metrics over
    the same ``n`` items.
    """

    metric: str
    value: float
    n: int
    ci95: tuple[float, float] | None
    others: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The form it takes in a result record."""
        return {"metric": self.metric, "value": self.value, "n": self.n, "ci95": self.ci95, "others": dict(self.others)}


def wilson_interval(value: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion ``value`` seen over ``n`` items.

    Reference: E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927). Unlike the
        normal
    approximation it stays within [0, 1] and has a width at 0 and at 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}")
    spread = _Z95 * _Z95 / n
    centre = (value + spread / 2) / (1 + spread)
    half = math.sqrt(value * (1 - value) * spread + spread * spread / 4) / (1 + spread)
    # at 0 and 1 the bound is exact, and rounding must not push it past the value
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


def evaluate(  # noqa: PLR0913 - keyword-only
    tasks: Sequence[str],
    score: Score,
    tokenizer: Any,
    *,
    limit: int | None = None,
    max_length: int = DEFAULT_MAX_LENGTH,
    batch_size: int = 16,
    generate: Generate | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Utility]:
    """Run tasks through lm-evaluation-harness.

    Multiple choice: the option with the largest log-probability is the answer (``acc``), or the one with the largest
    log-probability divided by its length in characters (``acc_norm``, the harness's length normalisation).

    Args:
        tasks: names from :data:`TASKS`, or paths of the harness's own YAML task files. A YAML file may name Python
            functions beside it (``!function``), which the harness imports: give only files you trust.
        score: computes log-probabilities.
        tokenizer: the model's.
        limit: items per task, from the beginning (for tasks of :data:`TASKS`, of a fixed pseudo-random order of
            held-out items).
        max_length: tokens the model takes; longer contexts lose their beginning.
        batch_size: pairs per call of ``score``.
        generate: for tasks that generate text.
        progress: called with (requests done, requests in all).
        cache_dir: root of Veiltune's cache.

    Returns:
        Task name (as in the YAML file, for paths) to its result.

    Raises:
        DataError: an unknown task, one whose data is not there, or a task file that cannot be used.
        ConfigError: a task generates text and no ``generate`` was given.
    """
    if not tasks:
        raise DataError("no tasks were given", hint=nearest("", TASKS))
    root = cache_root(cache_dir)
    files = {name: _task_file(name, limit, root, cache_dir) for name in tasks}
    model = protected_lm(
        score, tokenizer, max_length=max_length, batch_size=batch_size, generate=generate, progress=progress
    )
    with _offline_and_quiet(root):
        loaded = {name: _load_harness_tasks(name, path) for name, path in files.items()}
        result = _run_harness(model, [task for group in loaded.values() for task in group], limit)
    names = {task.task_name.removeprefix("veiltune_"): task.task_name for group in loaded.values() for task in group}
    return {name: _utility(result, key) for name, key in names.items()}


def protected_lm(
    score: Score,
    tokenizer: Any,
    *,
    max_length: int = DEFAULT_MAX_LENGTH,
    batch_size: int = 16,
    generate: Generate | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """An ``lm_eval.api.model.LM`` whose every number comes from ``score``; arguments as in :func:`evaluate`."""
    from lm_eval.api.model import LM

    class ProtectedLM(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [encode_pair(tokenizer, *request.args, max_length=max_length) for request in requests]
            return _score_by_length(pairs, score, batch_size, progress)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            windows = [_windows(tokenizer, request.args[0], max_length) for request in requests]
            scores = iter(_score_by_length([pair for group in windows for pair in group], score, batch_size, progress))
            return [sum(next(scores)[0] for _ in group) for group in windows]

        def generate_until(self, requests: list[Any]) -> list[str]:
            if generate is None:
                raise ConfigError(
                    "this task generates text, and only scoring was set up",
                    hint="take a multiple-choice task, or give generate=",
                )
            return [generate(text, settings) for text, settings in (request.args for request in requests)]

    return ProtectedLM()


def encode_pair(tokenizer: Any, context: str, continuation: str, *, max_length: int) -> Pair:
    """Ids as :func:`veiltune.examples.tokenize` would give them, so that what is scored is what was trained.

    Spaces at the context's end go to the continuation (as in the harness). An empty context becomes the beginning
    token, or the end token for tokenizers that have none. A context that is too long loses its beginning.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    head = encode_prompt(tokenizer, stripped) if stripped else []
    tail = encode_continuation(tokenizer, stripped, continuation)
    head = head or [_first_token(tokenizer)]
    keep = max(1, max_length - len(tail))
    return head[-keep:], tail[: max_length - 1]


def _first_token(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def _windows(tokenizer: Any, text: str, max_length: int) -> list[Pair]:
    """The text cut so that each token is predicted once, each window but the first with one token of context."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = get_rolling_token_windows(
        ids, prefix_token=_first_token(tokenizer), max_seq_len=max_length - 1, context_len=1
    )
    return [(list(head), list(tail)) for head, tail in map(make_disjoint_window, windows)]


def _score_by_length(
    pairs: list[Pair], score: Score, batch_size: int, progress: Callable[[int, int], None] | None
) -> list[tuple[float, bool]]:
    """Scores in the order of ``pairs``; pairs of like length share a batch, the longest first."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    answers: list[tuple[float, bool]] = [(_NO_SCORE, False)] * len(pairs)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        for i, (log_prob, greedy) in zip(chosen, score([pairs[i] for i in chosen]), strict=True):
            answers[i] = (float(log_prob) if math.isfinite(log_prob) else _NO_SCORE, greedy)
        if progress:
            progress(min(begin + batch_size, len(order)), len(order))
    return answers


def _task_file(name: str, limit: int | None, root: Path, cache_dir: Path | None) -> Path:
    """The YAML file of a task: the user's own, or one written from the table (JSON is YAML)."""
    if Path(name).suffix in {".yaml", ".yml"}:
        if not Path(name).is_file():
            raise DataError(f"there is no task file {name!r}", hint="check the path")
        return Path(name).resolve()
    find_task(name)
    items = held_out_items(name, limit, cache_dir=cache_dir)
    if not items:
        raise DataError(f"task {name!r} has no held-out items", hint="check the distribution's version")
    lines = [json.dumps({"prompt": item.prompt, "options": item.options, "gold": item.gold}) + "\n" for item in items]
    folder = root / "tasks" / f"{name}-{cache_key(name, lines)}"

    def build(scratch: Path) -> None:
        (scratch / "test.jsonl").write_text("".join(lines), encoding="utf-8")
        config = {
            "task": f"veiltune_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
            "target_delimiter": " ",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1},
        }
        (scratch / "task.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")

    return build_once(folder, build) / "task.yaml"


def _load_harness_tasks(name: str, path: Path) -> list[Any]:
    from lm_eval.tasks import TaskManager

    try:
        return list(
            TaskManager(include_path=str(path.parent), include_defaults=False).load([str(path)])["tasks"].values()
        )
    except (KeyError, ValueError, TypeError, OSError, AttributeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"task file {name!r} cannot be used: {first}", hint="its data must be local files") from None


def _run_harness(model: Any, tasks: list[Any], limit: int | None) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # The harness would seed the process's generators: a training run's dropout must not change because it is evaluated.
    # Left to itself it would also read its thirteen thousand own task files.
    result = simple_evaluate(
        model=model, tasks=tasks, task_manager=TaskManager(include_defaults=False), limit=limit, bootstrap_iters=0,
        log_samples=True,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    if result is None:  # only a launcher's other ranks get nothing
        raise DataError(
            "lm-evaluation-harness gave no result", hint="run in one process, without a distributed launcher"
        )
    return result


def _utility(result: Mapping[str, Any], task: str) -> Utility:
    found = {
        key.partition(",")[0]: value
        for key, value in result["results"][task].items()
        if "," in key and "_stderr" not in key
    }
    metrics = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    if not metrics:
        raise DataError(f"task {task!r} yields no number", hint="give it a metric_list")
    metric = next((name for name in _PREFERRED_METRICS if name in metrics), min(metrics))
    values = [sample[metric] for sample in result["samples"][task] if metric in sample]
    value = metrics.pop(metric)
    return Utility(metric, value, len(result["samples"][task]), _interval(value, values), metrics)


def _interval(value: float, values: Sequence[Any]) -> tuple[float, float] | None:
    if not values or not all(isinstance(one, int | float) for one in values):
        return None
    mean = sum(values) / len(values)
    if abs(mean - value) > 1e-9 * max(1.0, abs(value)):  # the metric is aggregated some other way
        return None
    if all(one in {0, 1} for one in values):
        return wilson_interval(mean, len(values))
    deviation = math.sqrt(sum((one - mean) ** 2 for one in values) / max(1, len(values) - 1))
    half = _Z95 * deviation / math.sqrt(len(values))
    return mean - half, mean + half


@contextmanager
def _offline_and_quiet(root: Path) -> Generator[None, None, None]:
    """No hub, the harness's data sets in our cache, and neither its log nor its bars nor its survey of the machine."""
    import datasets
    import huggingface_hub.constants
    import lm_eval.api.task
    import lm_eval.evaluator

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for place, name, value in (
                (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
                (datasets.config, "HF_HUB_OFFLINE", True),
                (datasets.config, "HF_DATASETS_CACHE", root / "tasks" / "datasets"),
                (lm_eval.api.task, "tqdm", _no_bar),
                (lm_eval.evaluator, "add_env_info", _no_survey),
                (lm_eval.evaluator, "get_git_commit_hash", lambda: None),  # git complains outside of a repository
            ):
                stack.enter_context(mock.patch.object(place, name, value))
            stack.enter_context(mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}))
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _no_bar(iterable: Any, **_: Any) -> Any:
    return iterable


def _no_survey(storage: dict[str, Any]) -> None:
    """Instead of the harness's ``add_env_info``, which runs half a dozen programs."""
