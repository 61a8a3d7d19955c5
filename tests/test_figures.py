"""README and docs quote no figure that a committed benchmark result does not hold."""

from __future__ import annotations

from benchmarks import tables


def test_pages_show_the_committed_results() -> None:
    assert tables.stale() == [], "run: python -m benchmarks.tables"


def test_a_changed_figure_is_found() -> None:
    page = "before\n<!-- figures: enclave_shares -->\n| made up |\n<!-- /figures -->\nafter\n"
    made = tables.rendered(page)
    assert "made up" not in made
    assert "GPT-2" in made or "gpt2" in made
    assert tables.rendered(made) == made
