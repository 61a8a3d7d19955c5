"""The cut of each family, against what `transformers` builds: every linear once, every parameter in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from helpers import FAMILY_NAMES, MODELS, model_directory
from veiltune.config import LoraConfig
from veiltune.errors import ModelError
from veiltune.models.families import FAMILIES, find_family
from veiltune.models.family import Family, Linear
from veiltune.models.presets import PRESETS, random_config
from veiltune.models.remote import TrunkClient, install_stubs
from veiltune.models.skeleton import config_from_json, empty_model
from veiltune.models.trunk import HostTrunk
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret
from veiltune.transport.channel import memory_pair

LAYERS = 3
PLACEMENTS = ("compact", "paper")


def made(name: str) -> Any:
    """A family's configuration and its empty model."""
    config = random_config(f"random:{name}:{LAYERS},32,4,259")
    return config, empty_model(config)


def linear_paths(model: nn.Module, blocks: str) -> set[str]:
    """Every linear of the blocks, whatever our description says."""
    found = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {path for path in found if path.startswith(f"{blocks}.")}


def size(module: Any, family: Family) -> tuple[int, int]:
    """(in, out) of a linear."""
    rows, columns = module.weight.shape
    return (rows, columns) if family.weights_in_out else (columns, rows)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_linear_of_the_blocks_is_described_once(name: str) -> None:
    config, model = made(name)
    family = find_family(config)
    described = [linear.path for linear in family.linears(LAYERS)]
    assert len(described) == len(set(described))
    assert set(described) == linear_paths(model, family.blocks)
    assert family.weights_in_out == isinstance(model.get_submodule(described[0]), Conv1D)
    assert len(model.get_submodule(family.blocks)) == LAYERS


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_input_sides_read_and_output_sides_write_the_residual_stream(name: str) -> None:
    """Shapes, and then which side meets a norm: the input of an input-side linear is a norm's output, and of no other."""
    config, model = made(name)
    family = find_family(config)
    for linear in family.linears(LAYERS):
        fan_in, fan_out = size(model.get_submodule(linear.path), family)
        assert (fan_in if linear.side == "input" else fan_out) == config.hidden_size, linear.path
    plain = type(model)(config).eval()
    normed, fed = [], {}
    for path, module in plain.named_modules():
        if "Norm" in type(module).__name__ and path.rpartition(".")[2] not in {"q_norm", "k_norm"}:
            module.register_forward_hook(lambda _m, _i, output: normed.append(output))
        elif isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_hook(lambda _m, inputs, _o, path=path: fed.__setitem__(path, inputs[0]))
    with torch.no_grad():
        plain(torch.tensor([[1, 2, 3]]))
    for linear in family.linears(LAYERS):
        reads_norm = any(fed[linear.path].data_ptr() == norm.data_ptr() for norm in normed)
        assert reads_norm == (linear.side == "input"), linear.path


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_keys_are_one_per_side_of_a_segment(name: str) -> None:
    family = find_family(made(name)[0])
    sides: dict[str, set[str]] = {}
    for linear in family.linears(LAYERS):
        sides.setdefault(linear.key, set()).add(linear.side)
    assert len(sides) == 4 * LAYERS
    assert all(len(side) == 1 for side in sides.values())
    assert {
        linear.key for linear in family.linears(LAYERS) if linear.path.endswith(("q_proj", "k_proj", "v_proj"))
    } <= {f"block{block}.attention.in" for block in range(LAYERS)}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_operations_cover_every_linear_once_in_order(name: str, placement: Any) -> None:
    family = find_family(made(name)[0])
    operations = family.operations(LAYERS, placement)
    assert [operation.index for operation in operations] == list(range(len(operations)))
    assert len(operations) == LAYERS * (2 if placement == "compact" else 4)
    covered: list[tuple[str, str | None]] = []
    for operation in operations:
        prefix = f"{family.blocks}.{operation.block}"
        if operation.part in {"whole", "inputs"}:
            covered += [(f"{prefix}.{path}", operation.key_in) for path in operation.segment.inputs]
        if operation.part in {"whole", "output"}:
            covered.append((f"{prefix}.{operation.segment.output}", operation.key_out))
        assert (operation.key_in is None) == (operation.part == "output")
        assert (operation.key_out is None) == (operation.part == "inputs")
    assert covered == [(linear.path, linear.key) for linear in family.linears(LAYERS)]


# --- who holds what ---------------------------------------------------------------------------------------------------


def halves(name: str, placement: Any) -> tuple[set[str], set[str], Any]:
    """Names of the parameters in the enclave's half and in the host's, built by the code that builds them in a run; the whole."""
    config = AutoConfig.from_pretrained(model_directory(name))
    family, layers, secret = find_family(config), config.num_hidden_layers, MasterSecret.for_tests(0)
    labels = {linear.key for linear in family.linears(layers)}
    keys = {label: make_key("orthogonal", config.hidden_size, secret, label) for label in labels}
    inside = empty_model(config)
    client = TrunkClient(memory_pair("enclave", "host")[0])
    install_stubs(inside, family, layers, placement, client, keys, rounded=False)
    host = HostTrunk(config, placement, LoraConfig(rank=1), torch.device("cpu"), rounded=False)
    held = {name.replace(".base_layer", "") for name, _ in host.model.named_parameters() if "lora_" not in name}
    return {name for name, _ in inside.named_parameters(remove_duplicate=False)}, held, empty_model(config)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_half_and_only_there(name: str, placement: str) -> None:
    enclave, host, whole = halves(name, placement)
    expected = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    linears = list(find_family(whole.config).linears(2))
    # a stub has room for its output side's bias, which comes with the weights
    output_biases = {f"{linear.path}.bias" for linear in linears if linear.side == "output"} & expected
    assert not enclave & host
    assert not output_biases & host
    assert enclave | host | output_biases == expected
    exposed = {name for name in expected if "q_norm" in name or "k_norm" in name} if placement == "compact" else set()
    inputs = {f"{linear.path}.bias" for linear in linears if linear.side == "input"} & expected
    assert host == {f"{linear.path}.weight" for linear in linears} | inputs | exposed


# --- what is refused --------------------------------------------------------------------------------------------------


def config_of(model_type: str, **values: Any) -> Any:
    return config_from_json({"model_type": model_type, **values})


@pytest.mark.parametrize("model_type", ["bert", "gpt_neox", "t5", "mixtral", "qwen2_moe", "llama4"])
def test_an_unsupported_architecture_names_what_was_found_and_what_is_supported(model_type: str) -> None:
    config = config_of(model_type)
    with pytest.raises(ModelError, match=f"unsupported architecture '{config.model_type}'") as caught:
        find_family(config)
    for family in FAMILIES:
        for known in family.model_types:
            assert known in str(caught.value.hint)


def test_a_near_miss_is_guessed() -> None:
    with pytest.raises(ModelError, match="unsupported") as caught:
        find_family(config_of("qwen3_moe"))
    assert "did you mean 'qwen3'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "opt", "do_layer_norm_before": False}, "post-norm"),  # OPT-350m
        ({"model_type": "opt", "word_embed_proj_dim": 512, "hidden_size": 1024}, "projected from 512 to 1024"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "cross-attention"),
    ],
)
def test_a_variant_that_the_cut_does_not_fit_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        find_family(config_from_json(values))
    assert values["model_type"] in caught.value.message
    with pytest.raises(ModelError, match=reason):
        empty_model(config_from_json(values))


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(ModelError, match="'no_such_model'"):
        config_from_json({"model_type": "no_such_model"})
    with pytest.raises(ModelError):
        config_from_json({})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_published_shape_has_a_family(preset: str) -> None:
    config = random_config(preset)
    assert config.model_type in find_family(config).model_types


def test_families_do_not_overlap() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert all(isinstance(linear, Linear) for family in FAMILIES for linear in family.linears(1))
