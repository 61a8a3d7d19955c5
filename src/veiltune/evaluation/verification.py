"""The proof, on this machine, that a design computes the plain model's function.

The same probe runs twice from the same first adapter: once under `local`, which is the plain computation, and once under
the design. Compared are the logits, the loss and the adapter's gradients at every step's end, the adapter after the
steps, and greedy tokens. Steps are plain gradient descent: AdamW divides by a gradient's own size, so where a gradient
is rounding noise it turns noise into a full step and would hide what is compared here. The model's dropout is off.

*Bound.* Each error is checked against the smaller of two limits. The first, c·κ·eps from `privacy.bounds`, follows from
the key's condition number κ and the precision; it holds for any sensible network and is therefore wide. The second is a
fixed ceiling that the project holds itself to with κ = 1 (`CEILINGS`), times κ.

*Which κ.* A design is checked against its own: 1 for orthogonal keys, the prescribed number for conditioned ones, whose
purpose is to show that the error grows as κ does. A Gaussian key is the exception. Its κ is a multiple of the width and
has no bound, so a check against it could hardly fail and would say nothing; and the naive baseline claims what every
design claims, to compute the plain model. It is checked against κ = 1, and is meant to fail. ``against="orthogonal"``
asks the same of conditioned keys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from veiltune.config import Config, load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.errors import ConfigError, ExactnessError
from veiltune.evaluation.record import RESULT, result_of
from veiltune.models.families import find_family
from veiltune.models.sources import resolve_config, resolve_model
from veiltune.parties.party import Job
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.results import Exactness, RunResult, write_result
from veiltune.session import Outcome, run_session
from veiltune.session.party_main import design_options

Quantity = Literal["logits", "loss", "gradients", "adapter"]
Against = Literal["own", "orthogonal"]
OnEvent = Callable[[str, dict[str, Any]], None]

QUANTITIES: tuple[Quantity, ...] = ("logits", "loss", "gradients", "adapter")
CEILINGS: Mapping[str, Mapping[Quantity, float]] = {
    "float32": {"logits": 1e-5, "loss": 1e-6, "gradients": 1e-4, "adapter": 1e-4},
    "float64": {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10, "adapter": 1e-10},
}
"""What the project allows with κ = 1 and few blocks, by precision. bfloat16 has the derived bound alone."""
FEW_BLOCKS = 4
DEEP_LOGITS = 3e-5
"""The float32 ceiling for logits of models of more than `FEW_BLOCKS` blocks: errors of products add in quadrature."""

PRECISE_NORMS = frozenset({"veil"})
"""Designs that compute the RMSNorms of a float64 model in float64. Their plain twin does too: `transformers` rounds them to
float32, which would hide errors below 1e-7. With other dtypes both compute as `transformers` does."""

ROTATED_NORMS = frozenset({"veil"})
"""Designs in which a matrix takes the place of the gain of a norm on a branch's output (`models.rotated`)."""

_EPS = {name: float(torch.finfo(getattr(torch, name)).eps) for name in ("float32", "float64", "bfloat16")}
_LEARNING_RATE = 0.01
_GREEDY_TOKENS = 12
_ROWS, _LENGTH = 4, 32
_TEXT = (
    "The ferry leaves the harbour at seven and crosses the sound in forty minutes. On clear mornings the passengers stand "
    "outside with their coffee, although the wind is cold until May, and watch for seals on the rocks below the lighthouse. "
    "Dr. Almeida, who runs the island's only clinic, has taken it every week for eleven years: 1,100 crossings, she says, "
    "and seasick on three of them. Her patients are fishermen, two teachers, and a retired organist who plays for nobody "
    "but himself. When the fog comes down, the boat does not sail; then the telephone rings, and she tells whoever calls "
    "what to do until she can get there. Most of the time that is enough. What matters, she has learned, is to listen first."
)


@dataclass(frozen=True)
class Check:
    """One quantity's largest relative error: of logits and loss by entries, of gradients and adapter by norm, see `compare`.

    Attributes:
        quantity: what was compared.
        error: the largest, over all tensors of that kind.
        derived: the bound c·κ·eps.
        ceiling: the project's own, times κ; ``None`` where there is none.
    """

    quantity: Quantity
    error: float
    derived: float
    ceiling: float | None

    @property
    def limit(self) -> float:
        """The smaller of the two."""
        return self.derived if self.ceiling is None else min(self.derived, self.ceiling)

    @property
    def is_within(self) -> bool:
        """Whether the error keeps to the limit (one that is not a number does not)."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """What was compared, and what came of it.

    Attributes:
        condition_number: the κ that was checked against.
        own_condition_number: the keys' own; ``None`` for Gaussian keys, which have no bound on it.
        steps: of gradient descent.
        shape: rows and tokens of what was put in.
        checks: one for each quantity.
        greedy_tokens: how many were generated.
        greedy_equal: whether they are the plain model's.
        result: the record, with the errors and their limits in ``exactness``.
    """

    condition_number: float
    own_condition_number: float | None
    steps: int
    shape: tuple[int, int]
    checks: tuple[Check, ...]
    greedy_tokens: int
    greedy_equal: bool
    result: RunResult

    @property
    def failures(self) -> list[str]:
        """What exceeds its limit, in words. Greedy tokens count where rounding cannot explain a difference."""
        found = [f"{c.quantity} {c.error:.1e} > {c.limit:.1e}" for c in self.checks if not c.is_within]
        if not self.greedy_equal and self.result.config["dtype"] != "bfloat16" and self.condition_number == 1:
            found.append("greedy tokens differ")
        return found

    def require(self) -> None:
        """Raise ExactnessError if anything exceeds its limit."""
        if self.failures:
            name = f"{self.result.design} on {self.result.model} in {self.result.config['dtype']}"
            raise ExactnessError(
                f"{name} is not the plain model within its bound: {'; '.join(self.failures)}",
                hint=_why(self.result),
            )


def _why(result: RunResult) -> str:
    design = DESIGNS[result.design]
    if not design.enclaves and not design.is_exact(design_options(design, result.config["design_options"])):
        return f"with these options {design.name} does not claim to be: {design.exactness}"
    return "a Gaussian key is meant to fail; any other failure is a bug or a machine that computes wrongly"


def verify(  # noqa: PLR0913 - keyword-only
    model: str,
    design: str = "obfuscatune",
    *,
    overrides: Sequence[str] = (),
    dtype: str = "float32",
    steps: int = 3,
    processes: bool = False,
    output: Path | None = None,
    against: Against = "own",
    on_event: OnEvent = lambda _name, _fields: None,
) -> Verification:
    """Run the probe under `local` and under ``design``, and compare. Whether it held is `Verification.require`'s to say.

    Args:
        model: a model source.
        design: name of a design.
        overrides: ``key=value`` strings, as `load_config` takes them.
        dtype: ``float32``, ``float64`` or ``bfloat16``.
        steps: of gradient descent, at least 1. At the first the gradient of half the factors is exactly zero.
        processes: a process a party; else threads of this one, with the same messages.
        output: an empty or new directory to keep both runs and ``result.json`` in; else nothing is kept.
        against: ``own`` or ``orthogonal``: which κ the limits come from (see the module).
        on_event: told of the parties' progress.

    Raises:
        ConfigError: an unknown design or option, or an output directory that is not empty.
        ModelError: the model cannot be used.
    """
    if steps < 1:
        raise ConfigError(f"cannot verify {steps} steps", hint="give at least 1")
    if output is None:
        with tempfile.TemporaryDirectory(prefix="veiltune-verify-") as scratch:
            return _verify(
                _configure(model, design, overrides, dtype, steps, processes=processes, output=Path(scratch)),
                against,
                on_event,
            )
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"the output directory {str(output)!r} is not empty", hint="choose another --output")
    config = _configure(model, design, overrides, dtype, steps, processes=processes, output=output)
    verification = _verify(config, against, on_event)
    write_result(output / RESULT, verification.result)
    return verification


def _configure(
    model: str, design: str, overrides: Sequence[str], dtype: str, steps: int, *, processes: bool, output: Path
) -> Config:
    raw = {
        "design": design,
        "model": model,
        "output": str(output),
        "dtype": dtype,
        "data": {"max_length": _LENGTH},
        "lora": {"rank": 8, "init_seed": 1},
        "train": {
            "steps": steps,
            "batch_size": _ROWS,
            "optimizer": "sgd",
            "learning_rate": _LEARNING_RATE,
            "schedule": "constant",
            "max_grad_norm": 0.0,
        },
        "enclave": {"allow_simulated": True},
        "session": {"processes": processes},
    }
    return load_config(raw, overrides=overrides, options=option_tables())


def _verify(config: Config, against: Against, on_event: OnEvent) -> Verification:
    rows = token_rows(config.model)
    plain, _ = _probe(baseline_of(config), "plain", rows, on_event)
    protected, outcome = _probe(config, "protected", rows, on_event)
    errors = compare(plain, protected)
    own = own_condition_number(config)
    kappa = 1.0 if own is None or against == "orthogonal" else own
    checks = limits(config, kappa, errors, plain)
    measured = {check.quantity: check.error for check in checks}
    exactness = Exactness(**measured, bounds={check.quantity: check.limit for check in checks})
    result = result_of(config, outcome, exactness=exactness, length=_LENGTH)
    return Verification(
        condition_number=kappa,
        own_condition_number=own,
        steps=len(plain["losses"]),
        shape=(len(rows), len(rows[0])),
        checks=checks,
        greedy_tokens=len(plain["tokens"]),
        greedy_equal=torch.equal(plain["tokens"], protected["tokens"]),
        result=result.model_copy(update={"loss": protected["losses"].tolist()}),
    )


def baseline_of(config: Config) -> Config:
    """The same run under `local`, training the layers that the design trains."""
    plain = dict(DESIGNS[config.design].baseline)
    if config.design in PRECISE_NORMS:
        plain["norms"] = "precise"
    options = {**config.design_options, "local": plain}
    session = config.session.model_copy(update={"connect": {}})  # the services are the design's
    return config.model_copy(update={"design": "local", "design_options": options, "session": session})


def _probe(config: Config, name: str, rows: list[list[int]], on_event: OnEvent) -> tuple[dict[str, Tensor], Outcome]:
    from safetensors.torch import load_file

    output = Path(config.output) / name
    config = config.model_copy(update={"output": output})
    on_event("verifying", {"design": config.design})
    job = Job(verb="probe", probe={"input_ids": rows, "steps": config.train.steps, "generate": _GREEDY_TOKENS})
    outcome = run_session(config, job, on_event=on_event)
    return load_file(output / "parties" / "owner" / "probe.safetensors"), outcome


def token_rows(model: str) -> list[list[int]]:
    """What is put in, as (rows, tokens): text where the model knows a language, else random ids of its vocabulary."""
    if model.startswith("random:"):
        vocabulary = int(resolve_config(model).vocab_size)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (_ROWS, _LENGTH), generator=generator).tolist()
    ids: list[int] = resolve_model(model).load_tokenizer()(_TEXT, add_special_tokens=False)["input_ids"]
    while len(ids) < _ROWS * _LENGTH:
        ids = ids + ids
    return [ids[start : start + _LENGTH] for start in range(0, _ROWS * _LENGTH, _LENGTH)]


def relative_error(plain: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``plain``; 0 where both are zero."""
    a, b = plain.double(), other.double()
    if a.shape != b.shape:
        return float("inf")
    difference, scale = float((a - b).abs().max()), float(a.abs().max())
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def norm_error(plain: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the norm of ``plain``; 0 where both are zero."""
    a, b = plain.double(), other.double()
    if a.shape != b.shape:
        return float("inf")
    difference, scale = float((a - b).norm()), float(a.norm())
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def compare(plain: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[Quantity, float]:
    """Largest relative error of each quantity over two probes' tensors. A tensor that one of them lacks is an error of ∞.

    Logits and losses are compared entry by entry. Factors and their gradients are compared tensor by tensor in norm: a single
    entry of one of hundreds of tensors, where the plain computation's own rounding is amplified, says nothing of training.
    """
    kinds: dict[str, Quantity] = {"logits": "logits", "logits_tuned": "logits"}
    errors: dict[Quantity, float] = dict.fromkeys(QUANTITIES, 0.0)
    for name in {*plain, *other} - {"tokens", "losses"}:
        kind = kinds.get(name) or ("gradients" if name.startswith("gradient:") else "adapter")
        measure = relative_error if kind == "logits" else norm_error
        error = measure(plain[name], other[name]) if name in plain and name in other else float("inf")
        errors[kind] = _larger(errors[kind], error)
    for before, after in zip(plain["losses"], other["losses"], strict=True):
        errors["loss"] = _larger(errors["loss"], relative_error(before, after))
    return errors


def _larger(a: float, b: float) -> float:
    """The larger, where a value that is not a number is the largest of all."""
    return a if a != a or a > b else b  # noqa: PLR0124 - not a number


def own_condition_number(config: Config) -> float | None:
    """κ of the keys: 1 where they are orthogonal (or there are none), the prescribed one, or ``None`` if unbounded."""
    options: Any = design_options(DESIGNS[config.design], config.design_options)
    if not DESIGNS[config.design].is_exact(options):
        return None
    return float(getattr(options, "condition_number", None) or 1.0)


def limits(
    config: Config, kappa: float, errors: Mapping[Quantity, float], plain: Mapping[str, Tensor]
) -> tuple[Check, ...]:
    """Each error beside its limits. The adapter has the gradients' bound: it is their sum times the learning rate."""
    model = resolve_config(config.model)
    product = product_bound(int(model.hidden_size), kappa, _EPS[config.dtype])
    largest = max(float(plain[name].abs().max()) for name in ("logits", "logits_tuned"))
    loss = float(plain["losses"].min())
    family = find_family(model)
    matrices = sum(bool(segment.post_norm) for segment in family.segments) if config.design in ROTATED_NORMS else 0
    products = (4 + 2 * matrices) * model.num_hidden_layers
    ceilings = CEILINGS.get(config.dtype, {})
    if config.dtype == "float32" and model.num_hidden_layers > FEW_BLOCKS:
        ceilings = {**ceilings, "logits": DEEP_LOGITS}
    checks: list[Check] = []
    for quantity in QUANTITIES:
        name = "gradients" if quantity == "adapter" else quantity
        derived = error_bound(name, product, products=products, largest_logit=largest, loss=loss)
        ceiling = kappa * ceilings[quantity] if quantity in ceilings else None
        checks.append(Check(quantity, errors[quantity], derived, ceiling))
    return tuple(checks)
