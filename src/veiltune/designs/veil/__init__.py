"""`veil`: the host runs the whole trunk, natively, in a rotated basis; the enclave is crossed twice a pass.

*Reference.* The invariance is that of SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456), which use it for compression.
The mathematics is in `models.rotated`: `rotation` (the stream), `inner` (Q, K, V and MLP), `folding`, `factors`.

*Reveals.* See ``VEIL.reveals``. Less than `obfuscatune` by Q, K, V and MLP states, with ``inner``; more by one thing: it is one
rotation for the whole trunk, so whoever learns it has all of it. In models with norms on branches' outputs (Gemma 3) the
host can learn it, up to signs and order: the matrix that stands for such a norm's gain has its rows for eigenvectors.

*Bound.* Equal to `local` up to c·κ·eps (`privacy.bounds`), κ = 1, with ``optimizer_at = "enclave"``. With the optimiser on
the host the forward pass and gradients are equal, the steps are not: folded gains and secret scales change what a step in
single entries is.
"""

from __future__ import annotations

from functools import partial

from pydantic import BaseModel

from veiltune.designs.base import Reveal, enclave_design
from veiltune.designs.veil.enclave import Enclave
from veiltune.designs.veil.host import Host
from veiltune.designs.veil.options import VeilOptions
from veiltune.parties.owner import join, own
from veiltune.parties.provider import provide

__all__ = ["VEIL", "VeilOptions"]

HOST_REVEALS = {
    "TrunkPlan": Reveal(
        "the architecture, which blocks are the trunk, the adapter's shape and the place of the optimiser", "public"
    ),
    "TrunkShard": Reveal(
        "the trunk's linears, each under the rotation of the stream on one side and secret maps of heads or hidden units "
        "on the other (with inner = false that side is plain); their singular values where the map is orthogonal; "
        "R⁻¹·diag(g)·R of norms on branches' outputs, whose eigenvectors are the rotation's rows; QK-norm gains times "
        "secret factors; the image of the all-ones vector in LayerNorm models",
        "masked",
    ),
    "Factors": Reveal("the trunk's LoRA factors, in the bases of the linears they belong to", "masked"),
    "VeiledForward": Reveal(
        "x·R of the states that enter the trunk, whose norms and inner products are those of the (centred) states; the "
        "padding, so the lengths of texts; with enclave_layers = 0 equal tokens at equal positions as equal rows, and with "
        "rotary positions wherever they stand",
        "masked",
    ),
    "VeiledBackward": Reveal("dx·R of the gradient at the trunk's output, with its norms and inner products", "masked"),
    "Forget": Reveal("the end of a generation", "control"),
}


def _exact(options: BaseModel) -> bool:
    return getattr(options, "optimizer_at", "") == "enclave"


VEIL = enclave_design(
    name="veil",
    summary="the host runs the trunk in a rotated basis; the enclave keeps embeddings, first blocks, final norm and head",
    options=VeilOptions,
    enclave=Enclave,
    host=Host,
    enclave_sees={
        "VeiledOutput": Reveal("the trunk's output, rotated", "masked"),
        "VeiledGradient": Reveal("the gradient of the trunk's input, rotated", "masked"),
        "StepDone": Reveal("the rotated gradients' norm, with optimizer_at = host", "control"),
    },
    host_sees=HOST_REVEALS,
    host_also_sees=(
        "rotated states of every block, with their norms and inner products",
        "attention scores and probabilities",
        (
            "V up to a rotation of each head; Q and K up to rotations (learned positions), or up to what commutes with "
            "rotary positions: phases and paired scales; with QK-norm up to signs and the order of heads"
        ),
        "MLP states up to their order, and scales where the activation allows them",
        "with inner = false: Q, K, V and MLP states as they are",
        "with norms on branches' outputs: the rotation itself, up to signs, order, and channels of equal gain",
        "which channels of a rotated basis dropouts drop",
        "times of computation",
    ),
    exactness=(
        "equal to local up to c·κ·eps with κ = 1, if the optimiser is in the enclave; dropouts of the trunk's states are "
        "refused, or act in the rotated basis"
    ),
    is_exact=_exact,
)
