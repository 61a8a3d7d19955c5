"""`obfuscatune`: the enclave keeps the residual stream, the host multiplies masked states by masked weights.

*Reference.* ObfuscaTune (arXiv 2407.02960). ``placement = "paper"`` is its division; ``"compact"`` lets the host also run softmax
and activation, whose inputs it sees anyway: the same exposure, half the crossings.

*Reveals.* See ``OBFUSCATUNE.reveals``. In the clear to the host by the paper's own algebra: Q, K, V, the attention's output, the
MLP's pre-activations, the gradients of all these, and one factor of each LoRA pair.

*Bound.* Equal to `local` up to c·κ·eps (`privacy.orthogonal.error_bound`) with ``optimizer_at = "enclave"``, or with SGD.
"""

from __future__ import annotations

from functools import partial

from pydantic import BaseModel

from veiltune.designs.base import Reveal, enclave_design
from veiltune.designs.obfuscatune.enclave import Enclave
from veiltune.designs.obfuscatune.host import Host
from veiltune.designs.obfuscatune.options import ObfuscaTuneOptions
from veiltune.parties.owner import join, own
from veiltune.parties.provider import provide

__all__ = ["OBFUSCATUNE", "ObfuscaTuneOptions"]

HOST_REVEALS = {
    "TrunkPlan": Reveal("the architecture, the adapter's shape, placement and optimiser", "public"),
    "TrunkShard": Reveal(
        "R⁻¹·W of input-side and W·R of output-side linears; in the clear: input-side biases, and QK-norm gains when compact",
        "masked",
    ),
    "Factors": Reveal("A* = R⁻¹·A or B* = B·R of each LoRA pair; in the clear: the other factor of the pair", "masked"),
    "PassContext": Reveal("the padding mask, so the lengths of texts, and rotary tables, so positions", "clear"),
    "SegmentForward": Reveal(
        "X·R of the normed states, whose norms and inner products are those of X; with placement = paper also, in the clear, "
        "the attention's output and the MLP's activations",
        "masked",
    ),
    "SegmentBackward": Reveal(
        "dO·R⁻ᵀ of the segments' outputs; with placement = paper also, in the clear, gradients of Q, K, V and pre-activations",
        "masked",
    ),
    "Forget": Reveal("the end of a pass", "control"),
}


def _exact(options: BaseModel) -> bool:
    return getattr(options, "matrix", "") != "gaussian"


OBFUSCATUNE = enclave_design(
    name="obfuscatune",
    summary="a small enclave keeps embeddings, norms and head; the host computes on masked states and weights",
    options=ObfuscaTuneOptions,
    enclave=Enclave,
    host=Host,
    enclave_sees={
        "SegmentOutput": Reveal("the host's products", "masked"),
        "SegmentGradient": Reveal("the host's gradients", "masked"),
        "StepDone": Reveal("the gradient's norm, with optimizer_at = host", "control"),
    },
    host_sees=HOST_REVEALS,
    host_also_sees=(
        "Q, K and V of every token and head, in the clear: the key cancels in X*·W*",
        "the attention's output and the MLP's pre-activations and activations, in the clear",
        "the gradients of all these, in the clear",
        "of each LoRA pair the factor that meets no key, and its gradient, in the clear",
    ),
    exactness="equal to local up to c·κ·eps with optimizer_at = enclave or SGD; AdamW on the host is equal in distribution",
    is_exact=_exact,
)
