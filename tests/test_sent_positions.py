"""Positions that are not sent: which they are, that the rest of a pass is as if they were, and that nothing of them crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import helpers
from cutting import cut_config, deep_model, plain, probed
from helpers import exported_adapter, relative_error, run, transcripts, tuned, write_examples
from test_cut import ONE_EACH, Joined, batch, four_layers, halves, logits, with_positions
from test_cut import plain as built
from test_split_designs import stop_at
from veiltune.data import load_tokenized
from veiltune.errors import ConfigError, UserError
from veiltune.models.bottom import Bottom
from veiltune.models.emulators.port import EmulatorPort
from veiltune.models.sent_positions import PositionChooser, Sent, choose_positions
from veiltune.models.sources import resolve_model
from veiltune.models.top import Top
from veiltune.models.trunk_stub import TrunkContext
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.messages import TrunkBackward, TrunkForward

TRAIN: dict[str, Any] = {"steps": 4, "optimizer": "adamw", "learning_rate": 3e-3, "batch_size": 4}
ALL = 10_000
"""More than any row has."""


# --- the choice ---------------------------------------------------------------------------------------------------------


@st.composite
def passes(draw: st.DrawFn) -> Tensor:
    """Padding masks of any form: on either side, in the middle, rows of padding alone."""
    rows, seq = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flat = draw(st.lists(st.booleans(), min_size=rows * seq, max_size=rows * seq))
    return torch.tensor(flat).view(rows, seq)


def chosen_slowly(row: list[bool], last: int, *, starts: bool) -> set[int]:
    """Tokens of one row that are sent, found one after another."""
    tokens = [place for place, there in enumerate(row) if there]
    return {place for number, place in enumerate(tokens) if (starts and number == 0) or number >= len(tokens) - last}


@given(passes(), st.integers(1, 10), st.booleans())
def test_the_first_and_the_last_tokens_are_sent_and_no_others(present: Tensor, last: int, starts: bool) -> None:
    found = choose_positions(present, last, starts=starts)
    wanted = [chosen_slowly(row, last, starts=starts) for row in present.tolist()]
    if found is None:
        assert wanted == [{place for place, there in enumerate(row) if there} for row in present.tolist()]
        return
    width = max(map(len, wanted))
    for row, there, places in zip(found.tolist(), present.tolist(), wanted, strict=True):
        sent = {place for place, goes in enumerate(row) if goes}
        assert {place for place in sent if there[place]} == places
        assert len(sent) == width <= last + starts, "equally many, and no more than were asked for"


@given(passes(), st.integers(1, 4), st.integers(0, 2**31))
def test_what_is_taken_comes_back_to_its_place(present: Tensor, last: int, seed: int) -> None:
    here = choose_positions(present, last, starts=True)
    if here is None:
        return
    sent, rng = Sent(here, here.new_zeros((len(here), 0))), torch.Generator().manual_seed(seed)
    whole = torch.randn(*present.shape, 3, generator=rng)
    part = sent.take(whole)
    assert torch.equal(sent.put(whole, part), whole)
    changed = sent.put(whole, part + 1)
    assert torch.equal(changed[~here], whole[~here])
    assert torch.equal(changed[here], whole[here] + 1)
    places = sent.positions(None).expand(len(here), -1)
    for row, goes, tokens in zip(places, here, present, strict=True):
        assert row.tolist() == torch.nonzero(goes).flatten().tolist()
        assert sent.present(present).shape == places.shape
        assert int(sent.present(present).sum()) == int((here & present).sum()) or tokens.any()


def test_a_number_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"online\.last_positions"):
        cut_config("online", tmp_path, online={"last_positions": -1})


# --- a pass -------------------------------------------------------------------------------------------------------------


def leaving_out(whole: Any, last: int, bottom: int = 1, top: int = 1) -> Joined:
    """A model cut and rejoined, whose stub sends the first and the last positions."""
    joined = halves(whole, bottom, top)
    joined.stub._chooser = PositionChooser(last)
    return joined


def inputs_of(padding: str) -> dict[str, Tensor]:
    return with_positions(batch(padding)) if padding == "left" else batch(padding)


def composed(whole: Any, ids: Tensor, sent: list[int]) -> Tensor:
    """Logits of one text by hand: bottom, the trunk on the sent positions alone, top."""
    joined = halves(whole, 1, 1)
    places = torch.tensor([sent])
    states = Bottom(whole, 1).states(ids).clone()
    mask = torch.ones_like(places)
    states[:, sent] = joined.trunk.forward(states[:, sent], mask, places, None, training=False)
    top = Top(whole, 1)
    return top.head(top.head_inputs(states))


@pytest.mark.parametrize("name", ONE_EACH)
@torch.no_grad()
def test_the_trunk_computes_on_what_is_sent_and_the_rest_goes_round_it(name: str) -> None:
    """In float64, against the three parts composed by hand, each row by itself; windows here are longer than what is sent."""
    whole, ids = built(four_layers(name)), batch("none")["input_ids"]
    joined = leaving_out(whole, 3)
    found = joined.owner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert [tuple(each.shape[:2]) for each in joined.port.sent] == [(2, 4)]
    for row, text in zip(found, ids, strict=True):
        assert relative_error(row, composed(whole, text[None], [0, 7, 8, 9])[0]) < 1e-12
    assert relative_error(found, whole(input_ids=ids, use_cache=False).logits) > 1e-3, "nothing was left out"


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama-tied-biased", "qwen3"])
@torch.no_grad()
def test_padding_changes_nothing(name: str, padding: str) -> None:
    """A row of 6 tokens beside one of 10, and a row that has fewer than are sent beside one that has more."""
    whole, inputs = built(four_layers(name)), inputs_of(padding)
    mask = inputs["attention_mask"].bool()
    for last in (2, 7):
        joined = leaving_out(whole, last)
        found = joined.owner(**inputs, use_cache=False).logits
        assert joined.port.sent[0].shape[1] == last + 1
        for row in range(2):
            text = inputs["input_ids"][row][mask[row]]
            alone = leaving_out(whole, last).owner(input_ids=text[None], use_cache=False).logits[0]
            assert relative_error(found[row][mask[row]], alone) < 1e-12, (last, row)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased"])
def test_with_no_fewer_than_there_are_it_is_off_bit_for_bit(name: str, padding: str) -> None:
    whole, inputs = built(four_layers(name)), inputs_of(padding)
    found: list[tuple[Tensor, list[Tensor], Any]] = []
    for last in (0, 9, ALL):  # and the first makes ten
        joined = leaving_out(whole, last)
        joined.owner.requires_grad_(requires_grad=True)
        out = logits(joined.owner, inputs)
        out.square().mean().backward()
        gradients = [each.grad for each in joined.owner.parameters() if each.grad is not None]
        found.append((out, gradients, joined.port.contexts[0]))
    off = found[0]
    for each in found[1:]:
        assert torch.equal(each[0], off[0])
        assert all(torch.equal(a, b) for a, b in zip(each[1], off[1], strict=True))
        assert (each[2].position_ids is None) == (off[2].position_ids is None)
    few = leaving_out(whole, 3)
    assert not torch.equal(logits(few.owner, inputs), off[0])


def test_gradients_go_round_the_trunk_where_states_did() -> None:
    """Against automatic differentiation of the same composition in one graph."""
    whole, ids = built(four_layers("llama-tied-biased")), batch("none")["input_ids"]
    joined = leaving_out(whole, 3)
    joined.owner.requires_grad_(requires_grad=True)
    joined.owner(input_ids=ids, use_cache=False).logits.square().mean().backward()
    assert joined.port.backwards == 1
    assert joined.port.sent[0].shape[1] == 4
    mine = {name: each.grad for name, each in joined.owner.named_parameters() if each.grad is not None}
    rows = [composed_graph(whole, text[None], [0, 7, 8, 9]) for text in ids]
    torch.cat(rows).square().mean().backward()
    theirs = {name: each.grad for name, each in whole.named_parameters() if each.grad is not None}
    below = [name for name in mine if ".layers.0." in name]
    assert below
    for name in below:
        assert relative_error(mine[name], theirs[name]) < 1e-10, name


def composed_graph(whole: Any, ids: Tensor, sent: list[int]) -> Tensor:
    """As `composed`, in one graph: the middle blocks see the sent positions alone, by a mask made by hand."""
    model = whole.model
    places = torch.arange(ids.shape[1])[None]
    rotary = model.rotary_emb(model.embed_tokens(ids), places)
    hidden = model.layers[0](model.embed_tokens(ids), position_embeddings=rotary)
    chosen = torch.tensor(sent)
    part, turned = hidden[:, chosen], tuple(each[:, chosen] for each in rotary)
    for block in model.layers[1:3]:
        part = block(part, position_embeddings=turned)
    hidden = hidden.index_copy(1, chosen, part)
    return whole.lm_head(model.norm(model.layers[3](hidden, position_embeddings=rotary)))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased", "qwen3"])
@torch.no_grad()
def test_a_generation_sends_every_new_token_after_the_prompts_first_and_last(name: str) -> None:
    """With a cache in the trunk that holds sent positions only; against one pass over the whole text."""
    from transformers import DynamicCache

    whole, ids = built(four_layers(name)), batch("none")["input_ids"][:1]
    joined, cache = leaving_out(whole, 2), DynamicCache()
    parts = [joined.owner(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).logits]
    for place in range(6, 10):
        mask = torch.ones(1, place + 1, dtype=torch.long)
        token = ids[:, place : place + 1]
        parts += [joined.owner(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits]
    assert [each.shape[1] for each in joined.port.sent] == [3, 1, 1, 1, 1]
    (theirs,) = joined.port.caches.values()
    assert theirs.get_seq_length() == 7
    expected = composed(whole, ids, [0, 4, 5, 6, 7, 8, 9])
    assert relative_error(torch.cat(parts, 1), expected) < 1e-12


@torch.no_grad()
def test_a_padded_batch_generates_what_each_prompt_does_alone() -> None:
    whole, inputs = built(four_layers("llama-tied-biased")), batch("left")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    together = leaving_out(whole, 2).owner.generate(**inputs, **settings)[:, 10:]
    for row, mask, tokens in zip(inputs["input_ids"], inputs["attention_mask"].bool(), together, strict=True):
        prompt = row[mask][None]
        alone = leaving_out(whole, 2).owner.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings
        )
        assert torch.equal(alone[0, prompt.shape[1] :], tokens)


def test_packed_sequences_are_refused_only_where_something_would_be_left_out() -> None:
    whole, ids = built(four_layers("llama-tied-biased")), batch("none")["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
    with pytest.raises(UserError, match="packed"):
        leaving_out(whole, 3).owner(**packed, use_cache=False)
    off = leaving_out(whole, 0).owner(**packed, use_cache=False).logits
    assert torch.equal(leaving_out(whole, ALL).owner(**packed, use_cache=False).logits, off)


def test_what_is_correlated_is_what_is_sent() -> None:
    joined = leaving_out(built(four_layers("llama-tied-biased")), 2)
    joined.stub.observe = True
    joined.owner(**batch("right"), use_cache=False)
    observed = joined.stub.take_observed()
    assert observed is not None
    assert observed[2] is not None
    assert [torch.nonzero(row).flatten().tolist() for row in observed[2]] == [[0, 8, 9], [0, 4, 5]]


# --- sessions -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"train": str(write_examples(tmp_path_factory.mktemp("text") / "train.jsonl", 12))}


def crossed(output: Path, kind: type) -> list[Any]:
    return [message for _, message in transcripts(output, "provider") if isinstance(message, kind)]


def widths(messages: list[Any], field: str) -> set[int]:
    codec = WireCodec.for_activations(WireOptions(activation_bits=32, gradient_bits=32))
    return {codec.decode(getattr(message, field)).shape[1] for message in messages}


@pytest.mark.parametrize("design", ["online", "gradfree", "offline"])
def test_a_large_number_is_off_and_a_small_one_sends_that_many(
    design: str, tmp_path: Path, text: dict[str, str]
) -> None:
    found: dict[int, tuple[list[float], dict[str, Tensor]]] = {}
    for last in (0, ALL, 3):
        output = tmp_path / str(last)
        more: dict[str, Any] = {design: {"last_positions": last}}
        config = cut_config(design, output, data=text, train=TRAIN, session={"record": ["provider"]}, **more)
        losses = tuned(config)["loss"]
        found[last] = losses, exported_adapter(output)
        forwards = crossed(output, TrunkForward)
        if design == "offline":
            assert not forwards, "tuning crosses nothing"
        elif last == 3:
            assert widths(forwards, "hidden") == {4}
            assert widths(crossed(output, TrunkBackward), "gradient") == ({4} if design == "online" else set())
        else:
            assert min(widths(forwards, "hidden")) > 4
    assert found[ALL][0] == found[0][0]
    assert all(torch.equal(value, found[0][1][name]) for name, value in found[ALL][1].items())
    assert found[3][0] != found[0][0]


def test_under_the_emulator_the_same_positions_are_left_out(tmp_path: Path, text: dict[str, str]) -> None:
    """An emulator that is the trunk itself: tuning on it is tuning across it, bit for bit, with positions left out as without."""

    def losses(design: str, last: int) -> list[float]:
        options: dict[str, Any] = {design: {"last_positions": last}}
        return tuned(cut_config(design, tmp_path / f"{design}{last}", data=text, train=TRAIN, **options))["loss"]

    for last in (0, 3):
        assert losses("online", last) == losses("offline", last), last


def test_an_emulator_keeps_no_cache_and_says_so() -> None:
    trunk = leaving_out(built(four_layers("llama-tied-biased")), 0).trunk
    port, states = EmulatorPort(trunk), torch.zeros(1, 2, 32, dtype=torch.float64)
    context = TrunkContext(None, None, cache_id=1, keep=False, input_gradient=False, training=False)
    with pytest.raises(UserError, match="no KV cache"):
        port.forward(states, context)


def test_generation_with_a_large_number_is_off_bit_for_bit(tmp_path: Path) -> None:
    model = deep_model()
    expected = probed(cut_config("online", tmp_path / "off", model), generate=8)
    actual = probed(cut_config("online", tmp_path / "all", model, online={"last_positions": ALL}), generate=8)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    few = probed(cut_config("online", tmp_path / "few", model, online={"last_positions": 2}), generate=8)
    assert not torch.equal(few["logits"], expected["logits"])


def test_fewer_bytes_cross_in_proportion(tmp_path: Path, text: dict[str, str]) -> None:
    """Of real bytes, whole frames: positions and headers are what keeps them from being fewer still."""
    sent: dict[int, int] = {}
    for last in (0, 3):
        config = cut_config("online", tmp_path / str(last), data=text, train=TRAIN, online={"last_positions": last})
        traffic = run(config, "tune").traffic["owner->provider"]
        sent[last] = sum(traffic[kind]["bytes"] for kind in ("TrunkForward", "TrunkBackward"))
    assert sent[3] < 0.35 * sent[0]


def test_gradfree_keeps_outputs_of_this_choice_and_resumes(tmp_path: Path, text: dict[str, str]) -> None:
    """Every example crosses once, with its first and last positions; the next process goes on from what was kept."""
    options = {"gradfree": {"last_positions": 3}}
    train = {**TRAIN, "steps": 6, "checkpoint_every": 3}
    whole = tuned(cut_config("gradfree", tmp_path / "whole", data=text, train=train, **options))["loss"]
    output = tmp_path / "parts"
    config = cut_config("gradfree", output, data=text, train=train, **options)
    stop_at(config, 3)
    outcome = run(config, "tune", resume=True)
    assert outcome.owner["history"]["loss"] == whole
    assert "TrunkForward" not in outcome.traffic["owner->provider"]


@torch.no_grad()
def test_the_top_sees_bottom_states_where_nothing_was_sent(tmp_path: Path, text: dict[str, str]) -> None:
    """What `gradfree` keeps: at the sent places the trunk's output, elsewhere what the bottom made."""
    output = tmp_path / "run"
    config = cut_config("gradfree", output, data=text, train={**TRAIN, "steps": 1}, gradfree={"last_positions": 3})
    helpers.run(config, "tune")
    kept = [
        load_file(path)["hidden"] for path in (output / "parties" / "owner" / "trunk-outputs").glob("*.safetensors")
    ]
    model = plain(deep_model())
    tokenizer = resolve_model(deep_model()).load_tokenizer()
    assert config.data.train is not None
    bottoms = [
        Bottom(model, 1).states(torch.tensor([list(example.input_ids)]))[0]
        for example in load_tokenized(config.data.train, config, tokenizer, split="train")
    ]
    assert kept
    for hidden in kept:
        alike = [each for each in bottoms if each.shape == hidden.shape and torch.equal(each[1:-3], hidden[1:-3])]
        assert alike, "alone and in a batch the bottom's states need not be equal to the last bit; here they are"
        own = alike[0]
        assert not any(torch.equal(own[place], hidden[place]) for place in (0, -3, -2, -1))
