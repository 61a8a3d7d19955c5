"""A trunk in a rotated basis: folding plain weights into it, running it, and LoRA between the two bases."""

from veiltune.models.rotated.factors import rotate_factors, unrotate_factors, unrotate_gradients
from veiltune.models.rotated.folding import Folding
from veiltune.models.rotated.norms import compute_norms_in_float64
from veiltune.models.rotated.rotation import Stream
from veiltune.models.rotated.stub import VeilPort, VeilStub, install_veil_stub
from veiltune.models.rotated.trunk import RotatedTrunk, rotated_model

__all__ = [
    "Folding",
    "RotatedTrunk",
    "Stream",
    "VeilPort",
    "VeilStub",
    "compute_norms_in_float64",
    "install_veil_stub",
    "rotate_factors",
    "rotated_model",
    "unrotate_factors",
    "unrotate_gradients",
]
