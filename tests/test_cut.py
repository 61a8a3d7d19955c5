"""A model cut in three and rejoined is the plain model: logits, gradients, caches, masks, positions, dropout."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import MODELS, Variant, relative_error, token_ids
from veiltune.errors import ConfigError, ProtocolError, UserError
from veiltune.models.cut import Cut, Trunk, owner_model, trunk_model
from veiltune.models.families import find_family
from veiltune.models.presets import PAD_ID, random_config
from veiltune.models.random_weights import draw_tensor
from veiltune.models.skeleton import assign_parameter, require_complete
from veiltune.models.trunk_stub import TrunkContext, TrunkStub, install_trunk_stub

LAYERS = 4
CUTS = ((0, 0), (1, 1), (0, 1), (1, 0), (2, 1), (0, 3), (3, 0))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative to the largest logit: 4 blocks of some 10² roundings each, with a wide margin; a wrong mask gives more than 1e-2."""


def hybrid(*kinds: str) -> Variant:
    def change(config: Any) -> None:
        config.use_sliding_window, config.sliding_window = True, 6
        config.layer_types = [f"{kind}_attention" for kind in kinds]

    return change


VARIANTS: dict[str, tuple[str, Variant]] = MODELS | {
    "qwen2-hybrid": ("qwen2", hybrid("full", "full", "sliding", "sliding")),
    "qwen3-hybrid": ("qwen3", hybrid("sliding", "full", "sliding", "full")),
}
ONE_EACH = ("gpt2", "opt", "llama-tied-biased", "mistral-window", "qwen2", "qwen3", "qwen3-hybrid")
LEARNED = ("gpt2", "opt")
DROPOUTS = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "dropout": 0.3, "attention_dropout": 0.3}


# --- plain and cut models ---------------------------------------------------------------------------------------------


def four_layers(name: str, **values: Any) -> Any:
    """A fresh configuration of a variant, four blocks deep."""
    family, change = VARIANTS[name]
    config = random_config(f"random:{family}:{LAYERS},32,4,259")
    change(config)
    for key, value in values.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def plain(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """What `transformers` builds, with drawn weights; nothing of the cut."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(draw_tensor(name, tuple(value.shape), config.hidden_size))
    return model.eval()


@dataclass
class LocalPort:
    """The trunk across a table: what `TrunkPort` asks for, with a record of what crossed."""

    trunk: Trunk
    contexts: list[TrunkContext] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)
    backwards: int = 0
    caches: dict[int, Any] = field(default_factory=dict)
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def forward(self, hidden: Tensor, context: TrunkContext) -> tuple[int, Tensor]:
        assert not hidden.requires_grad
        self.contexts.append(context)
        self.sent.append(hidden)
        cache = None
        if context.cache_id:
            cache = self.caches.setdefault(context.cache_id, self.trunk.new_cache())
        entry = hidden.clone().requires_grad_(context.input_gradient)
        mask, positions = context.attention_mask, context.position_ids
        with torch.set_grad_enabled(context.keep):
            output = self.trunk.forward(entry, mask, positions, cache, training=context.training)
        ticket = len(self.contexts)
        if context.keep:
            self.kept[ticket] = (entry, output)
        return ticket, output.detach()

    def backward(self, ticket: int, gradient: Tensor) -> Tensor | None:
        self.backwards += 1
        entry, output = self.kept.pop(ticket)
        output.backward(gradient)
        return entry.grad


@dataclass
class Forgetful(LocalPort):
    """A control: loses a part of the context on the way."""

    lost: str = "position_ids"

    def forward(self, hidden: Tensor, context: TrunkContext) -> tuple[int, Tensor]:
        lost: dict[str, Any] = {self.lost: None}
        return super().forward(hidden, replace(context, **lost))


def fill(half: Any, state: dict[str, Tensor]) -> None:
    for name, _ in list(half.named_parameters()):
        assign_parameter(half, name, state[name].detach().clone())


@dataclass
class Joined:
    """Both halves of one plain model."""

    owner: Any
    trunk: Trunk
    port: LocalPort
    stub: TrunkStub


def halves(whole: Any, bottom: int, top: int, port: type[LocalPort] = LocalPort, **more: Any) -> Joined:
    """Cut a plain model and rejoin it."""
    config, state = whole.config, whole.state_dict()
    cut, family = Cut.of(config, bottom, top), find_family(config)
    owner: Any = owner_model(config, cut)
    fill(owner, state)
    owner.tie_weights()
    require_complete(owner)
    far = trunk_model(config, cut)
    fill(far, state)
    require_complete(far)
    trunk = Trunk(far, config, cut)
    link = port(trunk, **more)
    return Joined(owner, trunk, link, install_trunk_stub(owner, family, cut, link))


PADDINGS: dict[str, list[list[int]]] = {
    "none": [[1] * 10, [1] * 10],
    "right": [[1] * 10, [1] * 6 + [0] * 4],
    "left": [[0] * 4 + [1] * 6, [1] * 10],
}


def batch(padding: str) -> dict[str, Tensor]:
    mask = torch.tensor(PADDINGS[padding])
    ids = torch.tensor(token_ids(2, 10, seed=1)).masked_fill(mask == 0, PAD_ID)
    return {"input_ids": ids, "attention_mask": mask}


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions that count the tokens that are not padding, as `generate` makes them."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs | {"position_ids": positions}


def logits(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Logits of the positions that are not padding: what stands at a padded one means nothing."""
    output = model(**inputs, use_cache=False, **more).logits
    mask = inputs.get("attention_mask")
    return output if mask is None else output[mask.bool()]


# --- a pass -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_are_the_plain_models_at_every_cut(name: str, padding: str) -> None:
    whole = plain(four_layers(name))
    inputs = with_positions(batch(padding)) if padding == "left" else batch(padding)
    expected = logits(whole, inputs)
    for bottom, top in CUTS:
        joined = halves(whole, bottom, top)
        assert relative_error(logits(joined.owner, inputs), expected) <= TOLERANCE[torch.float64], (bottom, top)
        assert len(joined.port.sent) == 1


@pytest.mark.parametrize("name", ONE_EACH)
@torch.no_grad()
def test_float32_too(name: str) -> None:
    whole = plain(four_layers(name), torch.float32)
    inputs = with_positions(batch("left"))
    assert relative_error(logits(halves(whole, 1, 1).owner, inputs), logits(whole, inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_only_what_the_trunk_cannot_know_is_sent(name: str) -> None:
    joined = halves(plain(four_layers(name)), 1, 1)
    for padding in PADDINGS:
        inputs = with_positions(batch(padding))
        joined.owner(**inputs, use_cache=False)
        context = joined.port.contexts[-1]
        if padding == "none":
            assert context.attention_mask is None
        else:
            assert context.attention_mask is not None
            assert context.attention_mask.dtype == torch.bool
            assert context.attention_mask.tolist() == inputs["attention_mask"].bool().tolist()
        if padding == "none" or name.startswith(LEARNED):
            assert context.position_ids is None
        else:
            assert context.position_ids is not None
            assert torch.equal(context.position_ids, inputs["position_ids"])
        assert context.cache_id == 0
        assert not context.keep
    assert {tuple(hidden.shape) for hidden in joined.port.sent} == {(2, 10, 32)}


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gpt2"])
@torch.no_grad()
def test_a_context_that_is_lost_shows(name: str, lost: str) -> None:
    """The control of the tests above: they would notice a wrong mask or wrong positions right after the cut."""
    whole = plain(four_layers(name))
    inputs = batch("left")
    if lost == "position_ids":  # doubled, since to rotary attention a shift of a whole row is nothing
        inputs["position_ids"] = 2 * with_positions(inputs)["position_ids"]
    joined = halves(whole, 1, 1, Forgetful, lost=lost)
    error = relative_error(logits(joined.owner, inputs), logits(whole, inputs))
    if lost == "position_ids" and name in LEARNED:
        assert error <= TOLERANCE[torch.float64]  # its blocks need none
    else:
        assert error > 1e-2
    assert relative_error(logits(halves(whole, 1, 1).owner, inputs), logits(whole, inputs)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral-window"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_packed_sequences_mean_what_they_mean_to_transformers(name: str, masked: bool) -> None:
    """Without a mask, positions that start anew part the row into sequences; with one, even of ones, they do not."""
    whole = plain(four_layers(name))
    inputs = {
        "input_ids": torch.tensor(token_ids(1, 10)),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]),
    }
    other = inputs | {"attention_mask": torch.ones(1, 10, dtype=torch.long)}
    chosen, unchosen = (other, inputs) if masked else (inputs, other)
    expected = logits(whole, chosen).view(10, -1)
    assert relative_error(logits(halves(whole, 1, 1).owner, chosen).view(10, -1), expected) <= TOLERANCE[torch.float64]
    if name != "opt":  # which makes masks without looking at positions
        assert relative_error(logits(whole, unchosen).view(10, -1), expected) > 1e-2


# --- training ---------------------------------------------------------------------------------------------------------


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels, use_cache=False).loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("cut", [(0, 0), (1, 1), (0, 1), (2, 0)])
@pytest.mark.parametrize("name", ONE_EACH)
def test_gradients_of_the_owners_parameters_are_the_plain_models(name: str, cut: tuple[int, int]) -> None:
    whole = plain(four_layers(name))
    joined = halves(whole, *cut)
    joined.owner.requires_grad_(True)
    inputs = batch("right")
    expected, actual = loss_of(whole, inputs), loss_of(joined.owner, inputs)
    expected.backward()
    assert joined.stub.crosses_backward
    assert joined.port.backwards == 0
    actual.backward()
    assert joined.port.backwards == 1
    assert not joined.port.kept
    want, have = gradients(whole), gradients(joined.owner)
    assert set(have) == {path for path, _ in joined.owner.named_parameters()} > set()
    for path, value in have.items():
        assert relative_error(value, want[path]) <= 1e-11, path
    assert not gradients(joined.trunk.model)


def test_without_anything_to_train_below_the_cut_nothing_crosses_backward() -> None:
    whole = plain(four_layers("llama"))
    joined = halves(whole, 1, 1)
    top = joined.owner.get_submodule("model.layers.3").requires_grad_(True)
    inputs = batch("right")
    loss_of(joined.owner, inputs).backward()
    loss_of(whole, inputs).backward()
    assert joined.port.backwards == 0
    assert not joined.stub.crosses_backward
    assert not joined.port.contexts[0].keep
    assert not joined.port.contexts[0].input_gradient
    want = gradients(whole)
    assert gradients(joined.owner)
    for path, value in top.named_parameters():
        assert value.grad is not None
        assert relative_error(value.grad, want[f"model.layers.3.{path}"]) <= 1e-11


def test_under_no_grad_nothing_is_kept() -> None:
    joined = halves(plain(four_layers("gpt2")), 1, 1)
    joined.owner.requires_grad_(True)
    with torch.no_grad():
        joined.owner(**batch("none"), use_cache=False)
    assert not joined.stub.crosses_backward
    assert not joined.port.kept


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_dropout_acts_on_both_sides_as_in_the_plain_model(name: str) -> None:
    """In one process the draws come in the plain model's order, so even they are equal."""
    whole = plain(four_layers(name, **DROPOUTS)).train()
    joined = halves(whole, 1, 1)
    joined.owner.train()
    inputs = batch("none")
    found = []
    for model in (whole, joined.owner):
        torch.manual_seed(5)
        found.append(loss_of(model, inputs).item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert joined.port.contexts[0].training
    joined.owner.eval()
    still = loss_of(joined.owner, inputs).item()
    assert still == pytest.approx(loss_of(whole.eval(), inputs).item(), rel=1e-12)
    assert abs(still - found[1]) > 1e-6


def test_layer_drop_drops_no_slot() -> None:
    whole = plain(four_layers("opt", layerdrop=1.0)).train()
    assert whole.model.decoder.layerdrop == 1.0
    joined = halves(whole, 1, 1)
    joined.owner.train()
    inputs = batch("none")
    trained = loss_of(joined.owner, inputs)
    assert len(joined.port.sent) == 1
    assert trained.item() == pytest.approx(loss_of(whole.eval(), inputs).item(), rel=1e-12)
    assert trained.item() != pytest.approx(loss_of(whole.train(), inputs).item(), rel=1e-3)


# --- generation -------------------------------------------------------------------------------------------------------


def greedy(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=14,
        min_new_tokens=14,
        do_sample=False,
        pad_token_id=PAD_ID,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_generation_with_caches_is_the_plain_models(name: str) -> None:
    """Left-padded prompts, 10 + 14 positions: far beyond the window of six of the models that have one."""
    whole = plain(four_layers(name))
    inputs = batch("left")
    expected = greedy(whole, inputs)
    for bottom, top in ((0, 0), (1, 1), (0, 2), (2, 0)):
        joined = halves(whole, bottom, top)
        actual = greedy(joined.owner, inputs)
        assert torch.equal(actual.sequences, expected.sequences)
        for mine, theirs in zip(actual.logits, expected.logits, strict=True):
            assert relative_error(mine, theirs) <= TOLERANCE[torch.float64]
        assert [hidden.shape[1] for hidden in joined.port.sent] == [10, *[1] * 13]
        assert [context.starts for context in joined.port.contexts] == [True, *[False] * 13]
        (cache,) = joined.port.caches.values()
        assert cache.get_seq_length() == 23


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
@torch.no_grad()
def test_a_prompt_in_pieces_beyond_the_window(name: str) -> None:
    from transformers import DynamicCache

    whole = plain(four_layers(name))
    owner = halves(whole, 1, 1).owner
    ids = torch.tensor(token_ids(2, 20))
    expected = whole(ids, use_cache=False).logits
    cache = DynamicCache(config=owner.config)
    pieces = ids.split([5, 4, 1, 7, 3], dim=1)
    outputs = [owner(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert relative_error(torch.cat(outputs, 1), expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["gpt2", "qwen3-hybrid"])
@torch.no_grad()
def test_two_generations_interleaved(name: str) -> None:
    from transformers import DynamicCache

    whole = plain(four_layers(name))
    joined = halves(whole, 1, 1)
    prompts = [torch.tensor(token_ids(1, length, seed=length)) for length in (5, 9)]
    caches = [DynamicCache(config=joined.owner.config) for _ in prompts]
    answers: list[list[int]] = [[], []]
    fed = list(prompts)
    for _ in range(12):
        for turn, cache in enumerate(caches):
            output = joined.owner(fed[turn], past_key_values=cache, use_cache=True)
            fed[turn] = output.logits[:, -1:].argmax(-1)
            answers[turn].append(int(fed[turn]))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = whole.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=PAD_ID)
        assert answer == expected[0, prompt.shape[1] :].tolist()
    assert {context.cache_id for context in joined.port.contexts} == {1, 2}


@torch.no_grad()
def test_numbers_of_caches_that_are_gone_are_told_once() -> None:
    from transformers import DynamicCache

    joined = halves(plain(four_layers("llama")), 1, 1)
    ids, caches = torch.tensor([[1, 2, 3]]), [DynamicCache() for _ in range(3)]
    for cache in caches:
        joined.owner(ids, past_key_values=cache, use_cache=True)
    assert joined.stub.caches.finished() == []
    del cache, caches[1]
    gc.collect()
    assert joined.stub.caches.finished() == [2]
    assert joined.stub.caches.finished() == []
    assert joined.stub.caches.forget() == [1, 3]
    assert joined.stub.caches.forget() == []
    with pytest.raises(UserError, match="does not match the trunk's half"):
        joined.owner(ids, past_key_values=caches[0], use_cache=True)
    joined.owner(ids, past_key_values=DynamicCache(), use_cache=True)
    assert joined.port.contexts[-1].cache_id == 4


@torch.no_grad()
def test_a_cache_changed_between_passes_is_refused() -> None:
    from transformers import DynamicCache

    joined = halves(plain(four_layers("llama")), 1, 1)
    ids = torch.tensor(token_ids(2, 4))

    def filled() -> Any:
        cache = DynamicCache()
        joined.owner(ids, past_key_values=cache, use_cache=True)
        return cache

    for change in (lambda cache: cache.crop(-1), lambda cache: cache.reorder_cache(torch.tensor([1, 0]))):
        cache = filled()
        change(cache)
        with pytest.raises(UserError, match="KV cache") as caught:
            joined.owner(ids[:, :1], past_key_values=cache, use_cache=True)
        assert "greedy" in str(caught.value.hint)
    same = filled()
    same.reorder_cache(torch.tensor([0, 1]))
    joined.owner(ids[:, :1], past_key_values=same, use_cache=True)
    with pytest.raises(UserError, match="KV cache"):
        greedy(joined.owner, batch("none"), num_beams=3)


# --- who holds what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_in_one_half_and_only_there(name: str) -> None:
    config = four_layers(name)
    whole, family = plain(config), find_family(config)
    stored = {path for path, _ in whole.named_parameters()}  # a tied head is no second parameter
    for bottom, top in CUTS:
        cut = Cut.of(config, bottom, top)
        owner: Any = owner_model(config, cut)
        mine = {path for path, _ in owner.named_parameters()}
        theirs = {path for path, _ in trunk_model(config, cut).named_parameters(remove_duplicate=False)}
        assert mine | theirs == stored
        assert not mine & theirs
        assert {path for path in stored if cut.holds(family, path) == "trunk"} == theirs
        assert all(
            any(path.startswith(f"{family.blocks}.{index}.") for index in range(bottom, LAYERS - top))
            for path in theirs
        )


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "qwen2"])
def test_the_owner_holds_one_copy_of_tied_embeddings(name: str) -> None:
    whole = plain(four_layers(name))
    owner = halves(whole, 1, 1).owner
    embedding, head = owner.get_input_embeddings().weight, owner.get_output_embeddings().weight
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert (embedding is head) == tied == whole.config.tie_word_embeddings


def test_names_tell_whose_a_parameter_is() -> None:
    cut, family = Cut(1, 1, 12), find_family(random_config("gpt2:12,32,4,259"))
    assert cut.trunk == range(1, 11)
    assert (cut.bottom, cut.top, cut.owner_layers) == ((0,), (11,), (0, 11))
    trunk = ("transformer.h.1.attn.c_attn.weight", "transformer.h.10", "transformer.h.2.mlp.c_fc.lora_A.default.weight")
    owner = (
        "transformer.h.0.ln_1.weight", "transformer.h.11.ln_1.weight", "transformer.wte.weight", "lm_head.weight",
        "transformer.ln_f.bias", "transformer.h", "other.h.1.weight",
    )  # fmt: skip
    assert {cut.holds(family, name) for name in trunk} == {"trunk"}
    assert {cut.holds(family, name) for name in owner} == {"owner"}


@pytest.mark.parametrize(
    ("bottom", "top", "named"),
    [
        (-1, 0, "cut.bottom_layers = -1"),
        (0, -2, "cut.top_layers = -2"),
        (4, 0, "cut.bottom_layers = 4"),
        (0, 4, "cut.top_layers = 4"),
        (2, 2, "cut.bottom_layers = 2 and cut.top_layers = 2"),
        (3, 1, "cut.bottom_layers = 3 and cut.top_layers = 1"),
    ],
)
def test_a_cut_without_a_trunk_is_refused(bottom: int, top: int, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cut.of(four_layers("llama"), bottom, top)
    assert named in caught.value.message
    assert "4 blocks" in caught.value.message
    assert "3" in str(caught.value.hint)


def test_a_cut_of_another_model_is_refused() -> None:
    cut = Cut.of(random_config("llama:6,32,4,259"), 1, 1)
    for half in (owner_model, trunk_model):
        with pytest.raises(ConfigError, match="6 blocks, this one has 4"):
            half(four_layers("llama"), cut)


# --- what the trunk refuses -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trunk_refuses_what_does_not_fit() -> None:
    trunk = halves(plain(four_layers("llama"), torch.float32), 1, 1).trunk
    hidden = torch.randn(2, 5, 32)
    cases: list[tuple[Tensor, Tensor | None, Tensor | None]] = [
        (torch.randn(2, 5, 31), None, None),
        (torch.randn(0, 5, 32), None, None),
        (hidden.double(), None, None),
        (hidden, torch.ones(2, 4, dtype=torch.bool), None),
        (hidden, torch.ones(1, 5, dtype=torch.bool), None),
        (hidden, None, torch.arange(4)[None]),
        (hidden, None, torch.arange(15).view(3, 5)),
    ]
    for states, mask, positions in cases:
        with pytest.raises(ProtocolError):
            trunk.forward(states, mask, positions, None, training=False)
    cache = trunk.new_cache()
    assert trunk.forward(hidden, None, None, cache, training=False).shape == hidden.shape
    with pytest.raises(ProtocolError, match="3 rows cannot continue a cache of 2"):
        trunk.forward(torch.randn(3, 1, 32), None, None, cache, training=False)
    with pytest.raises(ProtocolError, match="padding mask"):  # it covers the past too
        trunk.forward(hidden, torch.ones(2, 5, dtype=torch.bool), None, cache, training=False)
    trunk.forward(hidden, torch.ones(2, 10, dtype=torch.bool), None, cache, training=False)


@torch.no_grad()
def test_an_answer_of_another_shape_is_refused() -> None:
    class Short(LocalPort):
        def forward(self, hidden: Tensor, context: TrunkContext) -> tuple[int, Tensor]:
            return 1, hidden[:, 1:]

    with pytest.raises(ProtocolError, match="answered"):
        halves(plain(four_layers("gpt2")), 1, 1, Short).owner(**batch("none"), use_cache=False)


@torch.no_grad()
def test_a_mask_already_prepared_is_refused() -> None:
    owner = halves(plain(four_layers("gpt2")), 1, 1).owner
    with pytest.raises(UserError, match="padding masks"):
        owner(torch.tensor([[1, 2]]), attention_mask=torch.zeros(1, 1, 2, 2, dtype=torch.float64), use_cache=False)


# --- observation and replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_what_is_observed_is_the_first_blocks_input_and_what_was_sent(name: str) -> None:
    whole = plain(four_layers(name))
    joined = halves(whole, 2, 1)
    joined.owner.requires_grad_(True)
    inputs = batch("right")
    loss_of(joined.owner, inputs)
    assert joined.stub.take_observed() is None
    joined.stub.observe = True
    loss_of(joined.owner, inputs)
    observed = joined.stub.take_observed()
    assert observed is not None
    assert joined.stub.take_observed() is None
    assert joined.stub.embeddings is None
    assert joined.stub.smashed is None
    embeddings, smashed, mask = observed
    states = whole(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert relative_error(embeddings.detach(), states[0].detach()) <= TOLERANCE[torch.float64]
    assert torch.equal(smashed, joined.port.sent[-1])
    assert mask is not None
    assert mask.tolist() == inputs["attention_mask"].bool().tolist()
    (
        embeddings.square().sum() + smashed.square().sum()
    ).backward()  # a penalty on them reaches the owner's parameters alone
    assert joined.port.backwards == 0
    reached = set(gradients(joined.owner))
    assert {path for path in reached if not path.startswith(find_family(whole.config).blocks)}
    assert any(".1." in path for path in reached)
    assert not any(".3." in path for path in reached)


def test_without_bottom_blocks_the_smashed_activations_are_the_embeddings() -> None:
    joined = halves(plain(four_layers("llama")), 0, 1)
    joined.stub.observe = True
    joined.owner(**batch("none"), use_cache=False)
    observed = joined.stub.take_observed()
    assert observed is not None
    assert torch.equal(observed[0], observed[1])
    assert observed[2] is None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_replayed_trunk_output_trains_the_top_without_bottom_and_crossing(name: str) -> None:
    whole = plain(four_layers(name))
    joined = halves(whole, 1, 1)
    blocks = joined.owner.get_submodule(find_family(whole.config).blocks)
    blocks[3].requires_grad_(True)
    ran: list[nn.Module] = []
    next(blocks[0].children()).register_forward_hook(lambda module, _i, _o: ran.append(module))
    kept: list[Tensor] = []
    blocks[3].register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    inputs = batch("right")
    loss_of(joined.owner, inputs).backward()
    first = {path: value.clone() for path, value in gradients(joined.owner).items()}
    joined.owner.zero_grad()
    joined.stub.observe = True
    joined.stub.replay = kept[0]
    loss_of(joined.owner, inputs).backward()
    assert len(ran) == len(joined.port.sent) == 1
    assert joined.stub.embeddings is None
    assert joined.stub.take_observed() is None
    assert all(torch.equal(value, first[path]) for path, value in gradients(joined.owner).items())
    with pytest.raises(UserError, match="replayed"):
        loss_of(joined.owner, {key: value[:1] for key, value in inputs.items()})
    with pytest.raises(UserError, match="KV cache"):
        joined.owner(**inputs, use_cache=True)
    joined.stub.replay = None
    loss_of(joined.owner, inputs)
    assert len(ran) == len(joined.port.sent) == 2
