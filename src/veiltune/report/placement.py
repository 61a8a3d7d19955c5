"""How a model would be cut, as a terminal table: which kind of tensor lives where, and the shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from veiltune.errors import UserError
from veiltune.models.accounting import Shares, TensorPlace
from veiltune.models.cut_accounting import CutShares
from veiltune.report.comparison import NOTHING, percent


def inspect_table(
    model: str,
    places: Mapping[str, Sequence[TensorPlace]],
    counts: Mapping[str, Shares | CutShares],
    sees: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> Table:
    """How a model would be cut: which kind of tensor lives where under each design, the shares, and who sees what.

    Args:
        model: as the user named it.
        places: from `accounting.tensor_placement`, by the design's label (say "obfuscatune compact").
        counts: from `accounting.shares` or `cut_accounting.cut_shares`, by the same labels.
        sees: what each observer sees, by label and observer.

    Raises:
        UserError: there is no design to show, or ``counts`` has other labels than ``places``.
    """
    if not places or set(places) != set(counts):
        raise UserError(
            f"cannot show placements of {sorted(places)} with counts of {sorted(counts)}",
            hint="give both for each design",
        )
    first = next(iter(counts.values()))
    table = Table(title=Text(f"{model}: {first.num_parameters:,} parameters"), title_style="bold", show_lines=False)
    table.add_column("")
    table.add_column("parameters", justify="right")
    for label in places:
        table.add_column(Text(label))
    for kind, number in _by_kind(next(iter(places.values()))).items():
        table.add_row(kind, f"{number:,}", *(Text(_whereabouts(held, kind)) for held in places.values()))
    table.add_section()
    for name, cell in _count_rows(first).items():
        table.add_row(name, "", *(cell(counts[label]) for label in places))
    table.add_section()
    for observer in dict.fromkeys(who for label in places for who in (sees or {}).get(label, {})):
        cells = ["\n".join((sees or {}).get(label, {}).get(observer, ())) or NOTHING for label in places]
        table.add_row(Text(f"the {observer} sees"), "", *(Text(cell) for cell in cells))
    return table


def _by_kind(places: Sequence[TensorPlace]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for place in places:
        numbers[place.kind] = numbers.get(place.kind, 0) + place.num_parameters
    return numbers


def _whereabouts(places: Sequence[TensorPlace], kind: str) -> str:
    """Who holds the tensors of a kind, and in what form, if it is the host."""
    found = [
        place.holder if place.holder != "host" else f"{place.holder}, {'masked' if place.is_masked else 'in the clear'}"
        for place in places
        if place.kind == kind
    ]
    return "; ".join(dict.fromkeys(found)) or NOTHING


def _count_rows(first: Shares | CutShares) -> dict[str, Callable[[Shares | CutShares], str]]:
    """The lower half of `inspect_table`: names and how to write each."""
    batch = f"{first.batch}x{first.length}"

    def enclaved(write: Callable[[Shares], str | None]) -> Callable[[Shares | CutShares], str]:
        return lambda s: write(s) or NOTHING if isinstance(s, Shares) else NOTHING

    def cut(write: Callable[[CutShares], str | None]) -> Callable[[Shares | CutShares], str]:
        return lambda s: write(s) or NOTHING if isinstance(s, CutShares) else NOTHING

    return {
        "parameters in the enclave": enclaved(lambda s: percent(s.param_share)),
        "parameters the host has in the clear": enclaved(lambda s: percent(s.revealed_param_share)),
        "parameters the owner has in the clear": cut(lambda s: percent(s.owner_share)),
        f"forward FLOPs in the enclave, {batch}": enclaved(lambda s: percent(s.flop_share)),
        "  of these by maskings, dense keys": enclaved(lambda s: percent(s.mask_flops / s.flops)),
        f"forward FLOPs at the owner, {batch}": cut(lambda s: percent(s.flop_share)),
        "numbers in the enclave's keys": enclaved(lambda s: f"{s.key_elements:,}"),
        "crossings of a forward pass": lambda s: f"{s.crossings:,}",
        "LoRA numbers, per rank": lambda s: f"{s.lora_parameters_per_rank:,}",
    }
