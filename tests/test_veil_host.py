"""`veil`'s host as an ordinary accelerator job: shared by ranks, compiled, checkpointed, in bfloat16; equal to one plain rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import close_sequences, make_config, relative_error, run, run_probe, tuned, worst
from test_protect import protected
from test_rotated import LORA, SECRET, SEQ, WIDTH, config_of, factors_of, plain_tensors, states
from test_veil import tune_config
from veiltune.designs.veil import ranks as ranks_module
from veiltune.errors import ConfigError
from veiltune.models.cut import Cut, trunk_model
from veiltune.models.families import find_family
from veiltune.models.rotated import Folding, RotatedTrunk, native, parallel, rotate_factors
from veiltune.models.rotated.native import Native
from veiltune.models.rotated.parallel import ParallelTrunk, Ranks, Share
from veiltune.models.skeleton import assign_parameter
from veiltune.parties.party import Job
from veiltune.privacy.orthogonal import make_key
from veiltune.session import PartyFailure
from veiltune.transport.messages import VeiledBackward, VeiledForward

FAMILIES = ("gpt2", "opt", "llama-tied-biased", "mistral-window", "qwen2", "qwen3", "gemma3")
CPU = torch.device("cpu")

# --- ranks as threads -------------------------------------------------------------------------------------------------


class Meeting:
    """Where threads that play ranks exchange what they have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size


class ThreadRank:
    """Implements `Ranks`: the obvious sum."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, len(meeting.slots)

    def _all(self, value: Any) -> list[Any]:
        self.meeting.slots[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return found

    def total(self, x: Tensor) -> Tensor:
        return torch.stack([each.detach() for each in self._all(x)]).sum(0)

    def agree(self, value: int) -> int:
        return self._all(value)[0]


def together(size: int, act: Callable[[int], Any]) -> list[Any]:
    """What every rank's ``act`` gives, run at the same time."""
    found: list[Any] = [None] * size
    failures: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            found[rank] = act(rank)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


class Given:
    """A trunk's tensors and factors in the rotated basis, and inputs for it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.config = config_of(name)
        self.cut = Cut.of(self.config, 0, 1)
        family = find_family(self.config)
        plain = {n: v for n, v in plain_tensors(name).items() if self.cut.holds(family, n) == "trunk"}
        model = trunk_model(self.config, self.cut)
        for parameter, value in plain.items():
            assign_parameter(model, parameter, value)
        folding = Folding(self.config, self.cut, make_key("orthogonal", WIDTH, SECRET, "stream"), SECRET, inner=True)
        self.tensors = {n: v.to(dtype) for n, v in folding.fold(plain).items()}
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        factors = factors_of(name, self.config, self.cut, model)
        self.factors = {n: v.to(kept) for n, v in rotate_factors(factors, folding).items()}
        self.hidden = folding.stream.enter(states()).to(dtype)
        self.gradient = torch.randn(self.hidden.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
        self.mask = torch.ones(2, SEQ, dtype=torch.bool)
        self.mask[1, :3] = False

    def trunk(self, *, ranks: Ranks | None = None, run_as: Native | None = None) -> RotatedTrunk:
        if ranks is None:
            trunk = RotatedTrunk(self.config, self.cut, LORA, CPU, rounded=False, native=run_as)
        else:
            trunk = ParallelTrunk(self.config, self.cut, LORA, CPU, ranks, run_as)
        trunk.load(self.tensors)
        trunk.load_factors(self.factors)
        trunk.ready()
        return trunk

    def ranks(self, size: int = 2) -> list[RotatedTrunk]:
        meeting = Meeting(size)
        return [self.trunk(ranks=ThreadRank(meeting, rank)) for rank in range(size)]

    def forward(self, trunk: RotatedTrunk, *, keep: bool = True, training: bool = True) -> Tensor:
        return trunk.forward(VeiledForward(1, 0, keep, keep, training, self.mask, None, self.hidden.clone()))

    def step(self, trunk: RotatedTrunk) -> dict[str, Tensor]:
        """Output, the input's gradient, and the factors' gradients, whole."""
        found = {"output": self.forward(trunk)}
        entering = trunk.backward(VeiledBackward(1, self.gradient.clone()))
        assert entering is not None
        found["input"] = entering
        if isinstance(trunk, ParallelTrunk):
            return found | trunk.take_gradients()
        return found | {n: p.grad for n, p in trunk.parameters.items() if p.grad is not None}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_give_the_states_and_gradients_of_one(name: str, dtype: torch.dtype, limit: float) -> None:
    case = Given(name, dtype)
    whole = case.trunk()
    expected = case.step(whole)
    shares = case.ranks()
    first, second = together(2, lambda rank: case.step(shares[rank]))
    assert largest_error(first, expected) < limit
    assert all(torch.equal(first[n], second[n]) for n in first), "ranks drift apart"
    assert all(float(value.abs().max()) > 0 for value in expected.values())
    divided = [sum(p.numel() for n, p in t.model.named_parameters() if "proj" in n or ".c_" in n) for t in shares]
    full = sum(p.numel() for n, p in whole.model.named_parameters() if "proj" in n or ".c_" in n)
    assert 0.5 * full <= divided[0] == divided[1] < 0.65 * full  # A of inputs, B of outputs, and their biases are whole


@pytest.mark.parametrize("operator", ["_Enter", "_Leave"])
def test_without_one_of_the_two_sums_ranks_give_something_else(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        @staticmethod
        def apply(x: Tensor, _: Ranks) -> Tensor:
            return x

    case = Given("llama-tied-biased")
    expected = case.step(case.trunk())
    monkeypatch.setattr(parallel, operator, Nothing)
    shares = case.ranks()
    found = together(2, lambda rank: case.step(shares[rank]))[0]
    wrong = {name for name in expected if relative_error(found[name], expected[name]) > 1e-3}
    assert "input" in wrong
    assert ("output" in wrong) == (operator == "_Leave")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral-window"])
def test_a_padded_batch_continues_from_a_cache_that_ranks_share(name: str) -> None:
    case = Given(name)
    mask = case.mask

    def generate(trunk: RotatedTrunk) -> Tensor:
        parts = [(0, SEQ - 2), (SEQ - 2, SEQ - 1), (SEQ - 1, SEQ)]
        with torch.no_grad():
            outputs = [
                trunk.forward(VeiledForward(1, 5, False, False, False, mask[:, :end], None, case.hidden[:, start:end]))
                for start, end in parts
            ]
        assert trunk._caches[5].get_seq_length() == SEQ
        trunk.forget(5)
        assert not trunk._caches
        return torch.cat(outputs, 1)

    shares = case.ranks()
    found = together(2, lambda rank: generate(shares[rank]))
    assert relative_error(found[0][mask], generate(case.trunk())[mask]) < 1e-10
    assert relative_error(found[0][mask], case.forward(case.trunk(), keep=False, training=False)[mask]) < 1e-10


@given(
    size=st.integers(1, 4),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    other=st.integers(1, 3),
    dim=st.integers(0, 1),
)
def test_the_parts_of_a_tensor_placed_and_summed_are_the_tensor(
    size: int, groups: int, width: int, other: int, dim: int
) -> None:
    length = size * groups * width
    value = torch.arange(1.0, length * other + 1).view((length, other) if dim == 0 else (other, length))
    share = Share(dim, groups)
    parts = [share.of(value, rank, size) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {groups * width}
    placed = [share.placed(part, rank, size) for rank, part in enumerate(parts)]
    assert torch.equal(torch.stack(placed).sum(0), value)
    # the slow twin: position p of a group of n·w is rank p // w's
    owner = torch.tensor([position % (size * width) // width for position in range(length)])
    for rank, part in enumerate(parts):
        assert torch.equal(part, value.index_select(dim, torch.nonzero(owner == rank)[:, 0]))


def test_dropouts_of_the_stream_draw_by_what_ranks_agree_on() -> None:
    class Alone:
        rank, size = 0, 1
        seeds: tuple[int, ...] = (3, 3, 4)

        def total(self, x: Tensor) -> Tensor:
            return x.detach().clone()

        def agree(self, value: int) -> int:
            seed, *rest = self.seeds
            self.seeds = tuple(rest)
            return seed

    case = Given("gpt2")
    case.config.resid_pdrop = 0.5
    trunk = case.trunk(ranks=Alone())
    first, again, other = (case.forward(trunk) for _ in range(3))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 0.1


def test_a_model_that_cannot_be_shared_evenly_is_refused() -> None:
    case = Given("qwen2")
    with pytest.raises(ConfigError, match=r"veil.ranks = 3: the model's 4 attention heads") as caught:
        case.trunk(ranks=ThreadRank(Meeting(3), 0))
    assert str(caught.value.hint).endswith(": 1, 2")
    case.config.num_key_value_heads = 1
    with pytest.raises(ConfigError, match=r"the model's 1 key-value heads"):
        case.trunk(ranks=ThreadRank(Meeting(2), 0))


# --- checkpointing, SDPA, bfloat16, compilation -----------------------------------------------------------------------


def kept_bytes(act: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of what ``act`` computes, each piece of memory once, parameters and inputs included."""
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        act()
    return sum(seen.values())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased", "gemma3"])
def test_checkpointing_computes_blocks_again_keeps_less_and_changes_nothing(name: str) -> None:
    case = Given(name)
    family = find_family(case.config)
    found: dict[bool, tuple[dict[str, Tensor], int, int]] = {}
    for checkpointing in (False, True):
        trunk = case.trunk(run_as=Native(checkpointing=checkpointing))
        norms = [block.get_submodule(family.attention.norm) for block in trunk.held_blocks()]
        passes: list[nn.Module] = []
        for norm in norms:
            norm.register_forward_pre_hook(lambda module, _, passes=passes: passes.append(module))
        kept = kept_bytes(lambda trunk=trunk: case.forward(trunk))
        trunk.forget(0)
        passes.clear()
        found[checkpointing] = case.step(trunk), len(passes) // len(norms), kept
    assert largest_error(found[True][0], found[False][0]) < 1e-12
    assert (found[False][1], found[True][1]) == (1, 2)
    assert found[True][2] < 0.5 * found[False][2]


def test_attention_is_fused_and_equals_what_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import functional

    case = Given("qwen3")
    case.mask[:] = True  # written out, a row that may attend to nothing is not a number
    calls: list[int] = []
    fused = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), fused(*a, **k))[1]
    )
    trunk = case.trunk()
    found = case.step(trunk)
    assert len(calls) == len(trunk.held_blocks())
    slow = case.trunk()
    slow.model.set_attn_implementation("eager")  # pyrefly: ignore[not-callable]
    calls.clear()
    assert largest_error(case.step(slow), found) < 1e-5  # written out, `transformers` takes the softmax in float32
    assert not calls


def test_in_bfloat16_a_step_errs_by_some_of_its_eps_and_not_less() -> None:
    exact, half = Given("llama-tied-biased"), Given("llama-tied-biased", torch.bfloat16)
    expected = exact.step(exact.trunk())
    trunk = half.trunk()
    assert {p.dtype for n, p in trunk.model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    found = half.step(trunk)
    assert found["output"].dtype == torch.bfloat16
    # 2 blocks round some 10 times in a row each, and backward as often: a walk of 40 steps of eps; the largest entry's 4 sigmas.
    bound = 4 * (2 * 2 * 10) ** 0.5 * 2**-8
    assert 2**-10 < largest_error(found, expected) < bound


def compiled_and_not(compiler: native.Backend) -> dict[str, Any]:
    """Errors of compiled blocks against plain ones, and (graphs, breaks) before and after a pass with a cache."""
    from torch._dynamo.utils import counters

    case = Given("llama-tied-biased")
    expected = case.step(case.trunk())
    trunk = case.trunk(run_as=Native(compiler=compiler, checkpointing=compiler == "inductor"))
    errors = [largest_error(case.step(trunk), expected)]
    graphs = [(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))]
    with torch.no_grad():
        cached = trunk.forward(VeiledForward(2, 1, False, False, False, case.mask, None, case.hidden))
    errors.append(relative_error(cached[case.mask], case.forward(case.trunk(), keep=False, training=False)[case.mask]))
    graphs.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return {"errors": errors, "graphs": graphs}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_blocks_are_one_graph_and_give_the_same(compiler: native.Backend) -> None:
    """In a process of its own: here every annotation is checked at run time, and no compiler sees through that."""
    try:
        native.require_compiler(compiler, CPU)
    except ConfigError as error:
        pytest.skip(error.message)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, __file__, compiler], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    assert max(found["errors"]) < 1e-12
    assert found["graphs"][0] == [1, 0], "blocks share one graph, which is whole"
    assert found["graphs"][1] == [1, 0], "with a cache they run as they are"


def test_without_a_compiler_compiling_is_refused_and_tracing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler") as caught:
        native.require_compiler("inductor", CPU)
    assert "aot_eager" in str(caught.value.hint)
    native.require_compiler("aot_eager", CPU)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs triton"):
        native.require_compiler("inductor", torch.device("cuda", 0))


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"ranks": 3}, "float32", "4 attention heads cannot be shared out evenly"),
        ({"ranks": 2}, "bfloat16", r"veil.ranks does not go with a CPU's imitation of bfloat16"),
        ({"compile": True}, "bfloat16", r"veil.compile does not go with a CPU's imitation of bfloat16"),
        ({"ranks": 2, "rendezvous": "nowhere"}, "float32", "'nowhere' is not HOST:PORT"),
        ({"rendezvous": "127.0.0.1:1"}, "float32", "nobody is to come"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_do_is_refused_with_its_reason(
    options: dict[str, Any], dtype: str, message: str, tmp_path: Path
) -> None:
    config = make_config("veil", "llama", tmp_path / "run", dtype=dtype, veil=options)
    with pytest.raises(PartyFailure, match=message) as caught:
        run(config, Job(verb="provision"))
    assert caught.value.hint
    assert not torch.distributed.is_initialized()


def test_a_session_trains_checkpointed_as_it_does_plainly(tmp_path: Path) -> None:
    expected = run_probe("veil", "llama", tmp_path / "plain", generate=4)
    found = run_probe("veil", "llama", tmp_path / "run", generate=4, veil={"checkpointing": True})
    assert relative_error(found["logits_tuned"], expected["logits_tuned"]) < 1e-5
    assert worst(found, expected, "gradient:") < 1e-4
    assert found["tokens"].tolist() == expected["tokens"].tolist()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("model", "options"),
    [("gpt2", {}), ("qwen3", {"checkpointing": True}), ("llama", {"compile": True, "compile_backend": "aot_eager"})],
    ids=["gpt2", "qwen3-checkpointed", "llama-compiled"],
)
def test_two_processes_serve_a_session_as_one_does(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = run_probe("veil", model, tmp_path / "one", generate=8)
    apart = {"processes": "compile" in options}  # from the checks of annotations here
    found = run_probe("veil", model, tmp_path / "two", generate=8, veil={"ranks": 2, **options}, session=apart)
    assert max(relative_error(found[name], expected[name]) for name in ("logits", "logits_tuned")) < 1e-5
    assert worst(found, expected, "gradient:") < 1e-4
    assert worst(found, expected, "adapter:") < 1e-4
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.ci
def test_with_the_optimiser_on_a_host_of_two_ranks_training_and_resuming_are_those_of_one(tmp_path: Path) -> None:
    options = {"optimizer_at": "host", "key_seed": 5}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = tuned(tune_config("veil", "gpt2", tmp_path / "one", 6, veil=options))
    config = tune_config("veil", "gpt2", tmp_path / "two", 6, veil={**options, "ranks": 2})
    two = tuned(config)
    assert close_sequences(two["loss"], one["loss"]) < 1e-4
    assert two["loss"][-1] < two["loss"][0]
    prompt = Job(verb="generate", prompt="Hi", settings={"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6})
    resumed = run(config, prompt, resume=True).owner["generated"]["tokens"]
    alone = tune_config("veil", "gpt2", tmp_path / "one", 6, veil=options)
    assert resumed == run(alone, prompt, resume=True).owner["generated"]["tokens"]


@pytest.mark.slow
@pytest.mark.ci
def test_every_rank_takes_its_share_of_a_protected_checkpoint_from_the_disk(tmp_path: Path) -> None:
    protected(tmp_path, "gpt2")
    options = {"protected": str(tmp_path / "host")}
    expected = run_probe("veil", "gpt2", tmp_path / "one", veil=options)
    found = run_probe("veil", "gpt2", tmp_path / "two", veil={"ranks": 2, **options})
    assert relative_error(found["logits_tuned"], expected["logits_tuned"]) < 1e-5
    assert worst(found, expected, "gradient:") < 1e-4


@pytest.mark.slow
@pytest.mark.ci
def test_a_rank_that_dies_ends_the_session_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ranks_module.RankProcesses] = []
    original = ranks_module.RankProcesses.start

    def start(self: ranks_module.RankProcesses, group: Any) -> None:
        original(self, group)
        started.append(self)

    monkeypatch.setattr(ranks_module.RankProcesses, "start", start)
    passes = ParallelTrunk.backward

    def backward(self: ParallelTrunk, request: VeiledBackward) -> Tensor | None:
        os.kill(started[0].processes[1].pid, signal.SIGKILL)
        return passes(self, request)

    monkeypatch.setattr(ParallelTrunk, "backward", backward)
    config = make_config("veil", "llama", tmp_path / "run", veil={"ranks": 2})
    with pytest.raises(PartyFailure, match="rank 1 of the host was killed by signal 9"):
        run(config, Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 2}))
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.ci
def test_ranks_that_are_started_elsewhere_meet_at_the_rendezvous(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", variables["GLOO_SOCKET_IFNAME"])
        process = subprocess.Popen(
            [sys.executable, "-m", "veiltune.designs.veil.rank_main"], env={**os.environ, **variables}
        )
        try:
            options = {"ranks": 2, "rendezvous": f"127.0.0.1:{port}"}
            found = run_probe("veil", "llama", tmp_path / "two", veil=options)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
    assert relative_error(found["logits"], run_probe("veil", "llama", tmp_path / "one")["logits"]) < 1e-5


if __name__ == "__main__":
    print(json.dumps(compiled_and_not(sys.argv[1])))  # pyrefly: ignore[bad-argument-type]
