"""Tokens a second of greedy generation under protection, as a ratio to `transformers` alone, alternating in one run.

SmolLM2-135M-Instruct, float32, KV cache, batch 1: a prompt of 64 tokens, then 64 more. Every design's session stays open; they
take turns with the plain model in this process. ``ratio`` is seconds over the plain generation's seconds in the same round. The
tokens are compared too: a design that does not give the plain model's tokens is not fast but wrong.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import Row, alternate, ratios, run, summary
from benchmarks._runs import SMOLLM2
from benchmarks._steps import CASES, answer, greedy, opened, plain_model, random_ids

PROMPT, NEW, ROUNDS = 64, 64, 6
SETTINGS = ("local", "compact", "paper", "veil", "veil, one enclave layer, optimiser on the host")


def _plain(model: Any, ids: Tensor) -> list[int]:
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy(NEW))
    return made[0, ids.shape[1] :].tolist()


def measure(quick: bool) -> list[Row]:
    """One row a setting."""
    model, name, rounds = (
        ("random:llama:4,64,4,500", "random Llama, tiny", 2) if quick else (SMOLLM2, "SmolLM2-135M-Instruct", ROUNDS)
    )
    ids = random_ids(model, 1, PROMPT)
    plain = plain_model(model).eval()
    expected = _plain(plain, ids)
    with opened(SETTINGS, model) as owners:
        tasks: dict[str, Any] = {"plain": partial(_plain, plain, ids)}
        tasks |= {setting: partial(answer, owner, ids, NEW) for setting, owner in owners.items()}
        tokens = {setting: tasks[setting]() for setting in SETTINGS}
        times = alternate(tasks, rounds)
    to_plain, to_compact = ratios(times, "plain"), ratios(times, "compact")
    return [
        {
            "design": CASES[setting][0],
            "setting": setting,
            "model": name,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "ratio": to_plain[setting],
            "ratio_to_compact": to_compact.get(setting),
            "tokens_per_second": summary([NEW / seconds for seconds in times[setting]]),
            "plain_tokens_per_second": summary([NEW / seconds for seconds in times["plain"]]),
            "is_equal": tokens[setting] == expected,
        }
        for setting in SETTINGS
    ]


if __name__ == "__main__":
    run("generation", __doc__, measure)
