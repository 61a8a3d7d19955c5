"""Checkpoints with random weights, written block by block: the whole model is never in memory.

They exist for tests and cost studies. Their tokenizer needs no hub: one token per byte, and three special tokens,
whatever the size of the model's vocabulary. They know no language.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.models.cache import build_once, cache_key, cache_root, require_free_disk
from veiltune.models.checkpoint import quiet_transformers
from veiltune.models.families import find_family
from veiltune.models.presets import BOS_ID, EOS_ID, PAD_ID, random_config

_FORMAT = 2  # part of the cache key: raise it when the same spec gives other weights
_BLOCK = re.compile(r"\.(?:h|layers)\.(\d+)\.")
_SPECIALS = {PAD_ID: "<|pad|>", BOS_ID: "<|bos|>", EOS_ID: "<|eos|>"}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def random_checkpoint(spec: str, *, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None) -> Path:
    """The folder of a random model, generated on first use; equal ``spec`` and ``dtype`` give equal bytes.

    Args:
        spec: see :func:`veiltune.models.presets.random_config`.
        dtype: of the stored weights (drawn in float32, then rounded).
        cache_dir: root of the cache.

    Raises:
        ModelError: a malformed spec, or too little disk.
    """
    config = random_config(spec)
    config.dtype = dtype
    values = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    target = cache_root(cache_dir) / "random" / cache_key(_FORMAT, values)

    def build(scratch: Path) -> None:
        write_random_weights(config, scratch, dtype)
        byte_tokenizer().save_pretrained(scratch)

    return build_once(target, build)


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor a checkpoint of this configuration stores (tied ones once); allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def write_random_weights(config: Any, directory: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` and one shard per block (and one for the rest) with its index into ``directory``."""
    from safetensors.torch import save_file

    shapes = parameter_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    require_free_disk(directory, total, "the random model")
    weight_map: dict[str, str] = {}
    offset = find_family(config).gain_offset
    shards = _by_block(shapes)
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: draw_tensor(name, shapes[name], config.hidden_size, offset).to(dtype) for name in names}
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.architectures = [_architecture(config)]
    config.save_pretrained(directory)


def draw_tensor(name: str, shape: tuple[int, ...], hidden: int, gain_offset: float = 0.0) -> Tensor:
    """One float32 tensor, determined by its name and shape alone.

    Matrices: normal, standard deviation 0.02 as GPT-2's, but at least 0.5/√hidden, so that in narrow test models
    attention is not uniform and no part of the network is negligible. Gains: 1 ± 0.1, less the ``gain_offset`` that a
    norm adds itself. Biases: normal, 0.05, so that a forgotten one shows.
    """
    seed = hashlib.sha256(json.dumps([_FORMAT, name, list(shape)]).encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return noise.mul_(0.05)
    if len(shape) == 1:
        return noise.clamp_(-3, 3).mul_(0.1).add_(1.0 - gain_offset)
    return noise.mul_(max(0.02, 0.5 / math.sqrt(hidden)))


def byte_tokenizer() -> Any:
    """A fast tokenizer with one token per byte (its id is the byte), then pad, bos and eos; any text round-trips.

    It adds no special token by itself. Its chat template writes ``role: content`` lines and ends an assistant's turn
    with eos.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_SPECIALS[number] for number in sorted(_SPECIALS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIALS[PAD_ID],
        bos_token=_SPECIALS[BOS_ID],
        eos_token=_SPECIALS[EOS_ID],
        unk_token=_SPECIALS[EOS_ID],  # never used; some families' tokenizer classes would add one of their own
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """GPT-2's stand-in for each byte: itself if it is a visible Latin-1 character, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def _by_block(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        block = _BLOCK.search(name)
        groups.setdefault(block[1] if block else "rest", []).append(name)
    return list(groups.values())


def _architecture(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)
