"""What a user could do instead, with figures that others published: never measured here, and marked so wherever shown.

Adding one: a line with its source. A figure without a source has no place here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """An alternative, and what its source says it costs.

    Attributes:
        option: what one would do.
        protects: from whom, in words.
        cost: the published figure, and of what.
        hardware: that it needs.
        source: who published it, and where.
    """

    option: str
    protects: str
    cost: str
    hardware: str
    source: str


ALTERNATIVES: tuple[Published, ...] = (
    Published(
        "the whole model in a confidential VM (TDX) or enclave (SGX)",
        "text and weights from the host, as far as the hardware keeps its promise; owner and provider trust one image",
        "inference of Llama 2, 7B to 70B: under 10% of throughput, under 20% of latency",
        "a TEE large enough for the model",
        "Chrapek and others 2025, arXiv 2509.18886",
    ),
    Published(
        "the whole model on a confidential GPU, inference",
        "the same",
        "below 7% for most queries to H100 and H200; 4 to 8% of throughput on H100 in the second source",
        "a confidential GPU and a confidential VM",
        "Zhu and others 2024, arXiv 2409.03992v4; Chrapek and others 2025, arXiv 2509.18886",
    ),
    Published(
        "the whole model on a confidential GPU, models swapped in and out",
        "the same",
        "throughput without protection 45 to 70% higher, H100",
        "a confidential GPU and a confidential VM",
        "Martínez Ibarra and others 2025, arXiv 2505.16501",
    ),
    Published(
        "training on confidential GPUs of the present generation",
        "the same",
        "18 to 32% of training throughput",
        "confidential GPUs and a confidential VM",
        "Tinfoil (a vendor) 2026, tinfoil.sh/blog/2026-06-23-confidential-computing-overhead",
    ),
    Published(
        "data-parallel training on four confidential GPUs",
        "the same",
        "8.68 times the time of an iteration on average; GPT-2 XL 41.6 times, 3.03 times after tuning",
        "four confidential GPUs",
        "Lee and others 2025, arXiv 2501.11771v3",
    ),
    Published(
        "inference under secure multi-party computation",
        "text and weights from every single party, by cryptography",
        "about 5 minutes a token, LLaMA-7B",
        "none, but parties that do not collude",
        "Dong and others 2023, arXiv 2307.12533 (PUMA)",
    ),
)
