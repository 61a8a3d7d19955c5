"""Peak memory and time of `veiltune protect` on a sharded checkpoint of a 7B model's shape, against its largest tensor.

Random bfloat16 weights of Llama-2-7B's shape, written shard by shard; the command runs as a process of its own, so nothing of
them is in memory when it begins. `peak_rss` is its largest resident set, `largest_tensor_bytes` the largest tensor as stored, and
`bound_bytes` what the peak must stay below. The checkpoint and what is made of it are deleted afterwards; a machine whose disk
is too small gets fewer blocks, and the row says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import Row, run
from veiltune.models.checkpoint import open_checkpoint
from veiltune.models.random_weights import parameter_shapes, write_random_weights

WIDTH, WIDE, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 32
BOUND_BYTES = 3 << 30
SPARE_BYTES = 2 << 30
"""Of disk, left free."""


def _config(blocks: int, *, quick: bool) -> Any:
    from transformers import LlamaConfig

    scale = 8 if quick else 1
    return LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=WIDTH // scale,
        intermediate_size=WIDE // scale,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def _fitting(directory: Path, wanted: int, *, quick: bool) -> int:
    """As many blocks as the disk has room for twice: the source, and what is made of it."""
    free = shutil.disk_usage(directory).free - SPARE_BYTES
    sizes = [2 * sum(torch.Size(s).numel() for s in parameter_shapes(_config(n, quick=quick)).values()) for n in (1, 2)]
    block = sizes[1] - sizes[0]
    return max(2, min(wanted, (free - sizes[0]) // (2 * block)))


def _protect(directory: Path) -> dict[str, Any]:
    """The command, in a process of its own; digests of files are not remembered from earlier."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "veiltune",
            "protect",
            str(directory / "model"),
            "--to",
            str(directory / "host"),
            "--json",
        ],
        env=os.environ | {"VEILTUNE_CACHE": str(directory / "cache")},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def _row(wanted: int, *, quick: bool) -> Row:
    with tempfile.TemporaryDirectory(prefix="veiltune-benchmark-") as scratch:
        directory = Path(scratch)
        blocks = _fitting(directory, wanted, quick=quick)
        (directory / "model").mkdir()
        write_random_weights(_config(blocks, quick=quick), directory / "model", torch.bfloat16)
        checkpoint = open_checkpoint("model", directory / "model")
        start = time.perf_counter()
        made = _protect(directory)
        wall = time.perf_counter() - start
        return {
            "blocks": blocks,
            "wanted_blocks": wanted,
            "width": int(checkpoint.config.hidden_size),
            "dtype": "bfloat16",
            "source_bytes": checkpoint.num_bytes,
            "largest_tensor_bytes": max(info.num_bytes for info in checkpoint.index.values()),
            "protected_bytes": made["num_bytes"],
            "shards": made["shards"],
            "threads": torch.get_num_threads(),
            "wall_seconds": wall,
            "peak_rss": made["peak_rss"],
            "bound_bytes": BOUND_BYTES,
            "is_within": made["peak_rss"] <= BOUND_BYTES,
        }


def measure(quick: bool) -> list[Row]:
    """An eighth of the depth, then all of it: the peak is to be the same."""
    return [_row(blocks, quick=quick) for blocks in ((2, 4) if quick else (BLOCKS // 8, BLOCKS))]


if __name__ == "__main__":
    run("stream_protect", __doc__, measure)
