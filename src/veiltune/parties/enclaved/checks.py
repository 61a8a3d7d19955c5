"""Which of the host's answers the enclave checks, how many it has checked, and what that took.

*Bound.* A host that falsifies a share q of its answers, each noticed with probability 1 - m when it is checked, and a share p of
answers checked: after n answers it goes on unseen with probability (1 - p·q·(1 - m))ⁿ. See `answers_to_catch`. The draws come
from a secret of the enclave's, so nothing that the host sees tells a checked answer from another before it was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, final

import torch

from veiltune.config import Config
from veiltune.errors import ConfigError
from veiltune.secrets import MasterSecret, Secret


@final
class Sampler(Secret):
    """Draws what is checked, and counts.

    Args:
        share: of answers that are checked, 0 to 1.
        secret: the enclave's; a fresh one in each session, so that a failed session teaches nothing about the next.

    Attributes:
        generator: of the draws.
    """

    def __init__(self, share: float, secret: MasterSecret) -> None:
        self.share = share
        self.secret = secret
        self.made = 0
        self.seconds = 0.0
        self.generator = torch.Generator().manual_seed(int.from_bytes(secret.subkey("spot checks")[:8], "little") >> 1)

    @classmethod
    def of(cls, share: float, key_seed: int | None) -> Sampler | None:
        """For a design's options: none where nothing is checked."""
        if share == 0:
            return None
        return cls(share, MasterSecret.generate() if key_seed is None else MasterSecret.for_tests(key_seed))

    def chosen(self) -> bool:
        """Whether the next answer is checked."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64)) < self.share

    @contextmanager
    def check(self, made: int = 1) -> Generator[None, None, None]:
        """Counts ``made`` checks, and the seconds spent inside."""
        start = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self.made += made
            self.seconds += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Generator[None, None, None]:
        """Counts the seconds of what makes checks possible, and no check."""
        with self.check(0):
            yield

    def figures(self) -> dict[str, Any]:
        """For the session's figures."""
        return {"checks": self.made, "check_seconds": self.seconds}


def answers_to_catch(checked: float, tampered: float, confidence: float = 0.95, missed: float = 0.0) -> int:
    """n, the fewest answers after which a host that falsifies a share of them at random is caught with this probability.

    Args:
        checked: p, the share of answers that are checked.
        tampered: q, the share of them that are false.
        confidence: below 1.
        missed: m, the probability that the check of a false answer finds nothing.
    """
    hit = checked * tampered * (1 - missed)
    if not 0 < hit <= 1 or not 0 <= confidence < 1:
        raise ValueError(f"nothing is ever caught at {checked} of {tampered}, or not with probability {confidence}")
    return 1 if hit == 1 else math.ceil(math.log1p(-confidence) / math.log1p(-hit))


ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "activation_dropout")
"""Names under which models' configurations have what the host draws inside a block."""


def refuse_foreign_optimizer(checked: str, design: str, optimizer_at: str) -> None:
    """Refuse checks with factors that only the host knows.

    Raises:
        ConfigError: the optimiser is there.
    """
    if optimizer_at != "enclave":
        raise ConfigError(
            f"{checked} cannot check with factors that only the host knows",
            hint=f"set {design}.optimizer_at = 'enclave'",
        )


def refuse_bfloat16(checked: str, config: Config) -> None:
    """Refuse checks of what was rounded so coarsely that they would say little.

    Raises:
        ConfigError: it is.
    """
    if config.dtype == "bfloat16":
        raise ConfigError(
            f"{checked}: the rounding of dtype = 'bfloat16' hides changes of several percent, so a check would say little",
            hint="set dtype = 'float32' or 'float64'",
        )


def refuse_dropout(checked: str, config: Config, model_config: Any, names: Iterable[str]) -> None:
    """Refuse checks of what the host draws, of LoRA or under these names of the model's configuration.

    Raises:
        ConfigError: it draws something.
    """
    found = {"lora.dropout": config.lora.dropout}
    found |= {f"{name} of the model": float(getattr(model_config, name, None) or 0) for name in names}
    for what, probability in found.items():
        if 0 < probability < 1:
            raise ConfigError(
                f"{checked} cannot foretell what the host drops: {what} = {probability}", hint="set it to 0"
            )
