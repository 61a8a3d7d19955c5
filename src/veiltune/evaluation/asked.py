"""What was asked of a recorded run and what it answered: the truth of an attack on generations.

A transcript holds states, and states do not say what they are of. So whoever records a generation keeps its prompt and its
answer's tokens beside the transcripts (`keep_asked`). That file is the text itself: as secret as the transcript, and read by the
scorer alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veiltune.errors import DataError

ASKED = "asked.jsonl"
"""Among a run's transcripts: a JSON object a generation, ``{"prompt": TEXT, "tokens": [ID, …]}``, in the order they were made."""


@dataclass(frozen=True)
class Asked:
    """One generation: the prompt as it was given, and the answer's token ids."""

    prompt: str = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """The prompt's token ids, as the owner makes them: through the chat template, if there is one."""
        if not tokenizer.chat_template:
            return list(tokenizer(self.prompt)["input_ids"])
        messages = [{"role": "user", "content": self.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def keep_asked(run: Path, generated: Mapping[str, Any]) -> None:
    """Keep a generation of a run of which transcripts are kept; nothing where none are.

    Args:
        run: its output directory.
        generated: the owner's figure of that name: ``prompt`` and ``tokens``.
    """
    directory = run / "transcript"
    if not any(directory.glob("*.vtt")):
        return
    line = json.dumps({"prompt": generated["prompt"], "tokens": list(generated["tokens"])})
    with (directory / ASKED).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_asked(run: Path) -> list[Asked]:
    """The generations of a run, in order; none if none were kept.

    Raises:
        DataError: the file cannot be read, or was altered.
    """
    path = run / "transcript" / ASKED
    if not path.exists():
        return []
    found: list[Asked] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            found.append(Asked(str(values["prompt"]), tuple(int(token) for token in values["tokens"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(path)!r} cannot be read, line {len(found) + 1}: {type(error).__name__}",
            hint="generate anew, recorded",
        ) from None
    return found
