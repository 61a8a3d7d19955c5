"""What a model is trained on, and how it becomes token ids and labels.

Three kinds of example: a prompt with its completion, a conversation, and plain text. Labels follow `transformers`:
``labels[i]`` is ``input_ids[i]`` where the loss counts and -100 elsewhere; the model shifts them by one, so the first
token never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veiltune.errors import DataError

IGNORED = -100
"""Label of a token without loss."""

TooLong = Literal["error", "truncate"]


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and what should follow it. The loss is on the completion and the end token after it.

    The two are joined as they are: whatever space belongs between them must be in one of them (best at the completion's
    beginning, where most tokenizers keep it with the first word).
    """

    prompt: str = field(repr=False)
    completion: str = field(repr=False)
    origin: str = "example"


@dataclass(frozen=True)
class Conversation:
    """Turns of (role, content). The loss is on the assistant's turns, up to the chat template's end token."""

    messages: tuple[tuple[str, str], ...] = field(repr=False)
    origin: str = "example"


@dataclass(frozen=True)
class PlainText:
    """Text with the loss on all of it and on the end token after it."""

    text: str = field(repr=False)
    origin: str = "example"


Example = PromptCompletion | Conversation | PlainText
"""``origin`` says where it comes from (``notes.jsonl:17``), for error messages; texts stay out of ``repr`` and logs."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids and labels of one example, of equal length."""

    input_ids: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)

    @property
    def num_target_tokens(self) -> int:
        """Tokens that bear loss: labelled, and not the first."""
        return sum(label != IGNORED for label in self.labels[1:])


def tokenize(example: Example, tokenizer: Any, max_length: int, *, too_long: TooLong = "error") -> TokenizedExample:
    """Token ids and labels of an example, at most ``max_length`` tokens.

    With ``too_long="truncate"`` a prompt loses its beginning (so that the completion stays, as lm-evaluation-harness
    does) and then, if need be, the completion its end; conversations and texts lose their end.

    Raises:
        DataError: the example is too long, bears no loss, or does not suit the tokenizer's chat template.
    """
    if isinstance(example, PromptCompletion):
        prompt = encode_prompt(tokenizer, example.prompt)
        answer = [*encode_continuation(tokenizer, example.prompt, example.completion), tokenizer.eos_token_id]
        prompt, answer = _fit_pair(prompt, answer, tokenizer.bos_token_id, max_length, too_long, example.origin)
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
    elif isinstance(example, PlainText):
        ids = [*encode_prompt(tokenizer, example.text), tokenizer.eos_token_id]
        ids = _fit_end(ids, max_length, too_long, example.origin)
        labels = ids
    else:
        ids, labels = _encode_conversation(example, tokenizer)
        ids = _fit_end(ids, max_length, too_long, example.origin)
        labels = labels[: len(ids)]
    result = TokenizedExample(tuple(ids), tuple(labels))
    if result.num_target_tokens == 0:
        raise DataError(
            f"{example.origin}: no token bears loss ({len(ids)} tokens kept of at most {max_length})",
            hint="give a longer completion or text, or raise data.max_length",
        )
    return result


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The ids generation starts from: special tokens in front as the tokenizer puts them, no end token behind."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if ids and ids[-1] == end and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids


def encode_continuation(tokenizer: Any, prompt: str, continuation: str) -> list[int]:
    """The ids of ``continuation`` after ``prompt``: the prompt's ids and these are what generation would produce.

    The tail of the joint encoding where that begins with the prompt's own ids (so a tokenizer that marks the
    beginning of a text does not mark the continuation's); else, where a token straddles the seam, the continuation
    encoded alone.
    """
    head = encode_prompt(tokenizer, prompt)
    joint = encode_prompt(tokenizer, prompt + continuation)
    if joint[: len(head)] == head and len(joint) > len(head):
        return joint[len(head) :]
    return _encode_bare(tokenizer, continuation)


def _encode_bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fit_pair(
    prompt: list[int], answer: list[int], bos: int | None, max_length: int, too_long: TooLong, origin: str
) -> tuple[list[int], list[int]]:
    length = len(prompt) + len(answer)
    if length <= max_length:
        return prompt, answer
    _refuse_if(too_long == "error", length, max_length, origin)
    room = max(min(len(prompt), 1), max_length - len(answer))  # at least one token to predict from
    lead = prompt[:1] if room > 1 and prompt[0] == bos else []
    prompt = lead + prompt[len(prompt) - (room - len(lead)) :]
    return prompt, answer[: max_length - len(prompt)]


def _fit_end(ids: list[int], max_length: int, too_long: TooLong, origin: str) -> list[int]:
    _refuse_if(len(ids) > max_length and too_long == "error", len(ids), max_length, origin)
    return ids[:max_length]


def _refuse_if(refused: bool, length: int, max_length: int, origin: str) -> None:
    if refused:
        raise DataError(
            f"{origin}: {length} tokens, data.max_length is {max_length}",
            hint='raise data.max_length, or set data.too_long = "truncate"',
        )


def _encode_conversation(example: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels up to the last assistant turn. A turn's span is what the template adds to the text before it."""
    turns = [{"role": role, "content": content} for role, content in example.messages]
    spans: list[tuple[int, int]] = []
    text = ""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:number], example.origin, generation=True)
        after = _render(tokenizer, turns[: number + 1], example.origin, generation=False)
        if not after.startswith(before) or not before.startswith(text):
            raise DataError(
                f"{example.origin}: the chat template rewrites earlier turns, so its tokens cannot be told apart",
                hint="give prompt and completion columns, one assistant turn each, instead of messages",
            )
        spans.append((len(before), len(after)))
        text = after
    if not spans:
        raise DataError(
            f"{example.origin}: no message has the role 'assistant'", hint="nothing to learn from; remove it"
        )
    return _encode_spans(tokenizer, text, spans)


def _encode_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Encode ``text`` piece by piece: each span begins with a token of its own, as it does when it is generated."""
    ids: list[int] = []
    labels: list[int] = []
    position = 0
    for begin, end in spans:
        for stop, counts in ((begin, False), (end, True)):
            joint = _encode_bare(tokenizer, text[:stop])
            piece = joint[len(ids) :] if joint[: len(ids)] == ids else _encode_bare(tokenizer, text[position:stop])
            ids += piece
            labels += _until_end(piece, tokenizer.eos_token_id) if counts else [IGNORED] * len(piece)
            position = stop
    return ids, labels


def _until_end(piece: list[int], end: int) -> list[int]:
    """Labels of an assistant's turn: what the template writes after the end token (a line break) is never generated."""
    if end not in piece:
        return piece
    last = len(piece) - 1 - piece[::-1].index(end)
    return piece[: last + 1] + [IGNORED] * (len(piece) - last - 1)


def _render(tokenizer: Any, turns: list[dict[str, str]], origin: str, *, generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except (TemplateError, ValueError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{origin}: the model's chat template does not take these messages: {first}",
            hint="check the order of roles, or take a model that has a chat template",
        ) from None
