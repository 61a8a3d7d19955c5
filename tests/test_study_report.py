from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chromium import browser, find_chromium
from study_cells import MODEL, TASKS, attack_cell, comparison, run_cell
from veiltune.errors import UserError
from veiltune.report import write_study_report
from veiltune.report.studies import notes, pareto, sweeps, tables
from veiltune.report.studies.grid import Grid, shown
from veiltune.report.studies.published import ALTERNATIVES
from veiltune.results import Cost, Measurement, Spread
from veiltune.study_records import AttackCell, NothingCrossed, RunCell, append_record, read_study
from veiltune.study_summary import (
    Absent,
    Attacker,
    AttackRow,
    CostSummary,
    Estimate,
    Exposure,
    Row,
    Uncrossed,
    Worst,
    summarise,
)
from veiltune.study_terms import Knows, Phase, within
from veiltune.study_values import difference, pooled

TASK = TASKS[0]


def one(records: list, setting: str = "", design: str = "online", task: str = TASK) -> Row:
    return next(row for row in summarise(records) if (row.design, row.setting, row.task) == (design, setting, task))


def text_of(grid: Grid, name: str) -> str:
    """The row of that name, as one text."""
    return " | ".join(shown(cell).text for cell in next(row for row in grid.rows if shown(row[0]).text == name))


# --- aggregation ------------------------------------------------------------------------------------------------------


def test_seeds_give_their_mean_and_an_interval_that_holds_all_of_theirs() -> None:
    records = [run_cell("online", value=value, half=0.05, seed=seed) for seed, value in enumerate((0.4, 0.5, 0.36))]
    utility = one(records).utility
    assert isinstance(utility, Estimate)
    assert utility.value == pytest.approx(0.42)
    assert (utility.low, utility.high) == pytest.approx((0.31, 0.55))
    assert (utility.n, utility.seeds) == (200, 3)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.3), st.booleans()), min_size=1, max_size=5))
def test_a_pooled_interval_holds_every_value_and_every_interval(seeds: list[tuple[float, float, bool]]) -> None:
    figures = [
        Measurement(value=value, n=10, ci95=(value - half, value + half) if has else None) for value, half, has in seeds
    ]
    found = pooled(figures)
    low, high = found.bounds
    assert low - 1e-12 <= found.value <= high + 1e-12
    if found.low is not None:
        assert all(low <= figure.value <= high for figure in figures)
        assert all(low <= figure.ci95[0] and figure.ci95[1] <= high for figure in figures if figure.ci95)
    assert (found.low is None) == (not any(has for *_, has in seeds))


def test_a_difference_of_wilson_intervals_is_newcombes() -> None:
    # Newcombe 1998, table II, row (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    def wilson(k: int, n: int) -> Estimate:
        p, z = k / n, 1.959963984540054
        centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return Estimate(p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n), n)

    found = difference(wilson(56, 70), wilson(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_the_baseline_trains_the_same_layers_and_is_of_the_same_task() -> None:
    records = [
        *(
            run_cell("local", name, TASK, value=v, options={"layers": name})
            for name, v in (("all", 0.5), ("owner", 0.4))
        ),
        run_cell("local", "owner", TASKS[1], value=0.9, options={"layers": "owner"}),
        run_cell("online", value=0.39),
        run_cell("obfuscatune", value=0.49),
        run_cell("gradfree", value=0.35),
    ]
    found = {row.design: row for row in summarise(records) if row.task == TASK and row.design != "local"}
    assert found["online"].baseline == "owner"
    assert isinstance(found["online"].difference, Estimate)
    assert found["online"].difference.value == pytest.approx(-0.01)
    assert found["obfuscatune"].baseline == "all"
    assert found["gradfree"].baseline == "all"  # the top layers alone were not measured: any, and it is named
    assert one(records, "all", "local").difference is None


def test_a_model_without_its_trunk_is_held_against_the_baseline_and_is_none() -> None:
    alone = run_cell("local", "alone", value=0.2, options={"layers": "alone"})
    records = [
        alone,
        run_cell("local", "owner", value=0.4, options={"layers": "owner"}),
        run_cell("gradfree", value=0.35),
    ]
    found = one(records, "alone", "local")
    assert found.baseline == "owner"
    assert isinstance(found.difference, Estimate)
    assert found.difference.value == pytest.approx(-0.2)
    assert one(records, "", "gradfree").baseline == "owner"
    assert isinstance(one([alone, run_cell("gradfree", value=0.35)], "", "gradfree").difference, Absent)


def test_without_an_unprotected_run_there_is_no_difference() -> None:
    found = one([run_cell("online")]).difference
    assert isinstance(found, Absent)
    assert found.status == "missing"


def test_of_attacks_the_strongest_counts_whatever_it_is_told_in() -> None:
    run = run_cell("online")
    records = [
        run,
        attack_cell(run, "activation_inversion", value=0.2),
        attack_cell(run, "vocabulary_matching", value=0.9, metrics=("token_recovery",), moment="last"),
        attack_cell(run, "gradient_labels", value=0.99, metrics=("state_cosine",)),
    ]
    worst = one(records).worst[Attacker("provider", "tuning", "nothing")]
    assert isinstance(worst, Worst)
    assert (worst.by.attack, worst.metric, worst.figure.estimate.value) == (
        "vocabulary_matching",
        "token_recovery",
        0.9,
    )
    assert worst.by.label == "vocabulary_matching, last texts"


def test_states_stand_in_where_no_attack_reads_text_and_weights_are_told_apart() -> None:
    run = run_cell("obfuscatune")
    states = attack_cell(run, "known_plaintext", value=0.7, metrics=("state_cosine",), observer="host")
    weights = attack_cell(run, "procrustes", value=0.99, metrics=("weight_cosine",), observer="host")
    row = one([run, states, weights], design="obfuscatune")
    worst = row.worst[Attacker("host", "tuning", "known_plaintext")]
    assert isinstance(worst, Worst)
    assert worst.metric == "state_cosine"
    assert row.worst_weights[Attacker("host", "tuning", "public_ancestor")].figure.estimate.value == 0.99
    assert [*map(type, one([run, weights], design="obfuscatune").worst.values())] == [Absent]


# --- who attacks, and what ---------------------------------------------------------------------------------------------


def test_attackers_who_know_different_things_are_never_put_together() -> None:
    run = run_cell("online")
    learned = attack_cell(run, "ridge_inverter", value=0.6)
    row = one([run, learned, attack_cell(run, "vocabulary_matching", value=0.9)])
    values = {who.knows: each.figure.estimate.value for who, each in row.worst.items() if isinstance(each, Worst)}
    assert values == {"nothing": 0.9, "public_text": 0.6}
    grid = tables.privacy(MODEL, [row])
    lines = [" | ".join(shown(cell).text for cell in line) for line in grid.rows]
    assert len(lines) == 2
    assert "tuning | nothing | vocabulary_matching | rougeL | 0.900" in lines[0]
    assert "tuning | public text | ridge_inverter | rougeL | 0.600" in lines[1]
    weaker = one([run, learned, attack_cell(run, "vocabulary_matching", value=0.3)])
    panels = {each.knows: each for each in pareto.panels_of(TASK, [weaker])}
    privacy = {knows: pareto.points_of(panel)[0][0].privacy.value for knows, panel in panels.items()}
    assert privacy == pytest.approx({"nothing": 0.7, "public_text": 0.4}), (
        "who has public text can do what needs nothing"
    )
    stronger = pareto.points_of(pareto.panels_of(TASK, [row])[1])[0][0].privacy.value
    assert stronger == pytest.approx(0.1), "so more knowledge never gets less"


@pytest.mark.parametrize(
    ("knows", "allowed", "can"),
    [
        ("nothing", (), True),
        ("public_text", (), False),
        ("public_text", ("public_text",), True),
        ("public_text", ("public_ancestor",), True),
        ("public_ancestor", ("known_plaintext",), False),
        ("known_plaintext", ("public_ancestor",), False),
        ("known_plaintext", ("public_ancestor", "known_plaintext"), True),
        ("known_plaintext", None, True),
        (None, (), True),
    ],
)
def test_knowledge_is_held_against_an_assumption(
    knows: Knows | None, allowed: tuple[Knows, ...] | None, can: bool
) -> None:
    assert within(knows, allowed) is can


@pytest.mark.parametrize(
    ("design", "attack", "knows", "phase"),
    [
        ("online", "vocabulary_matching", "nothing", "tuning"),
        ("gradfree", "ridge_inverter", "public_text", "tuning"),
        ("offline", "vocabulary_matching", "nothing", "questions"),
        ("veil", "procrustes", "public_ancestor", "tuning"),
        ("offline", "emulator_misuse", "public_text", None),
        ("online", "of tomorrow", None, "tuning"),
    ],
)
def test_records_of_an_earlier_version_say_by_their_names_who_attacked(
    design: str, attack: str, knows: Knows | None, phase: Phase | None, tmp_path: Path
) -> None:
    run = run_cell(design)
    cell = attack_cell(run, attack)
    assert (cell.knows, cell.phase) == (None, None)
    line = {
        k: v
        for k, v in json.loads(cell.model_dump_json(by_alias=True)).items()
        if k not in {"knows", "phase", "nothing"}
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    append_record(tmp_path / "results.jsonl", run)
    (row,) = summarise(read_study(tmp_path / "results.jsonl"))
    assert (row.attacks[0].knows, row.attacks[0].phase) == (knows, phase)


def counted(run: RunCell, **counts: int) -> AttackCell:
    nothing = NothingCrossed(**{"passes": 0, "others": 12, **counts})
    return attack_cell(run, "vocabulary_matching", metrics=()).model_copy(
        update={"cell": "counted", "phase": "tuning", "knows": "nothing", "nothing": nothing}
    )


def test_of_texts_that_never_crossed_the_count_is_shown_and_questions_stand_apart() -> None:
    run = run_cell("offline")
    asked = attack_cell(run, "vocabulary_matching", value=0.9).model_copy(update={"phase": "questions"})
    row = one([run, counted(run), asked], design="offline")
    assert isinstance(row.worst[Attacker("provider", "tuning", "nothing")], Uncrossed)
    tuning, questions = row.exposure_to(phases=("tuning",)), row.exposure_to(phases=("questions",))
    assert isinstance(tuning, Exposure)
    assert isinstance(questions, Exposure)
    assert (tuning.estimate.value, tuning.by_design) == (0.0, False)
    assert (questions.estimate.value, row.exposure) == (0.9, questions)
    lines = [" | ".join(shown(cell).text for cell in line) for line in tables.privacy(MODEL, [row]).rows]
    assert "tuning | nothing | none: nothing crossed | recorded passes | 0.000: 0 of 12" in lines[0]
    assert "questions | nothing | vocabulary_matching | rougeL | 0.900" in lines[1]
    assert "counted" in shown(tables.attack_tables(MODEL, [row])["vocabulary_matching"].rows[0][-1]).text


def test_returned_layers_are_no_nothing() -> None:
    """They were tuned on the text: until an attack on them is measured, nobody knows what they say of it."""
    run = run_cell("offline")
    row = one([run, counted(run, returned=1)], design="offline")
    worst = row.worst[Attacker("provider", "tuning", "nothing")]
    assert isinstance(worst, Absent)
    assert "1 message(s) with layers tuned on the text" in str(worst)
    assert isinstance(row.exposure_to(phases=("tuning",)), Absent)


@pytest.mark.parametrize("sent", [False, True])
def test_who_was_sent_what_was_tuned_is_told_by_the_run_and_not_by_the_table(sent: bool) -> None:
    kinds = {"AdapterTensors": 1} if sent else {"Goodbye": 1}
    row = one([run_cell("veil", cost=Cost(messages={"enclave->provider": kinds}))], design="veil")
    assert ("provider" in {who.observer for who in row.worst}) is sent
    assert ("layers tuned on the text" in str([*row.worst.values()])) is sent


def test_where_tuning_was_not_counted_it_is_missing_and_no_zero() -> None:
    run = run_cell("offline")
    row = one([run, attack_cell(run, "vocabulary_matching", value=0.9)], design="offline")
    assert "was not counted here" in str(row.worst[Attacker("provider", "tuning", "nothing")])
    assert isinstance(row.exposure_to(phases=("tuning",)), Absent)
    assert row.exposure_to(phases=("questions",)) == row.exposure_to(None, ("questions",), "provider")


def test_of_controls_over_seeds_the_weaker_ones_are_told() -> None:
    cells = []
    for seed, leaky, shuffled in ((0, 0.99, 0.02), (1, 0.9, 0.11)):
        run = run_cell("online", seed=seed)
        attack = attack_cell(run)
        figure = attack.figures["rougeL"].model_copy(update={"leaky_control": leaky, "shuffled_control": shuffled})
        cells += [run, attack.model_copy(update={"figures": {"rougeL": figure}})]
    found = one(cells).attacks[0].figures["rougeL"]
    assert (found.leaky, found.shuffled, found.estimate.seeds) == (0.9, 0.11, 2)


def test_absent_cells_say_which_way_they_are_absent() -> None:
    records = comparison()
    failed = one(records, "20 of 26 layers", "offline")
    assert str(failed.utility) == "failed: the loss at step 12 is not finite: nan"
    assert str(failed.exposure).startswith("failed: ")
    assert str(one(records, "20 of 26 layers", "offsite", TASKS[1]).utility) == "missing"
    withheld = one(records, "int8", "gradfree")
    assert isinstance(withheld.utility, Estimate)
    assert str(withheld.exposure).startswith("withheld: the leaky control")
    assert str(one(records, "20 of 26 layers", "offsite").exposure) == "missing: no attack"


def test_an_attack_that_was_tried_elsewhere_on_the_design_is_missing_here() -> None:
    first, second = run_cell("online", "a"), run_cell("online", "b")
    row = one([first, second, attack_cell(first)], "b")
    assert [(each.attack, str(each.absent)) for each in row.attacks] == [("ridge_inverter", "missing")]


def test_one_failed_seed_beside_a_good_one_is_told() -> None:
    records = [run_cell("online", seed=0), run_cell("online", seed=1, status="failed", error="out of memory")]
    row = one(records)
    assert row.absent is None
    assert row.seeds == (0,)
    assert row.notes == ("seed 1 failed: out of memory",)
    assert "seed 1 failed: out of memory" in text_of(tables.utilities(MODEL, [row]), "online")


def test_the_last_record_of_a_cell_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for record in (run_cell("online", status="failed", error="killed"), run_cell("online", value=0.44)):
        append_record(path, record)
    utility = one(read_study(path)).utility
    assert isinstance(utility, Estimate)
    assert utility.value == 0.44


def test_what_the_host_reads_in_the_clear_needs_no_attack() -> None:
    exposure = one([run_cell("local")], design="local").exposure
    assert isinstance(exposure, Exposure)
    assert exposure.by_design
    assert (exposure.observer, exposure.estimate.value) == ("host", 1.0)


def test_peaks_of_one_process_are_not_added() -> None:
    peaks = Cost(peak_rss={"owner": 900, "provider": 1000})
    apart = one([run_cell("online", cost=peaks)]).cost
    together = one([run_cell("online", cost=peaks, processes=False)]).cost
    assert isinstance(apart, CostSummary)
    assert isinstance(together, CostSummary)
    assert (apart.owner_peak, apart.whole_peak) == (900, 1900)
    assert (together.owner_peak, together.whole_peak) == (None, 1000)


def test_seconds_over_seeds_keep_the_outer_percentiles() -> None:
    spreads = (Spread(median=1, p10=0.9, p90=1.5, n=5), Spread(median=2, p10=1.8, p90=2.5, n=7))
    records = [run_cell("online", seed=seed, cost=Cost(seconds_per_step=each)) for seed, each in enumerate(spreads)]
    cost = one(records).cost
    assert isinstance(cost, CostSummary)
    assert cost.seconds_per_step == Spread(median=1.5, p10=0.9, p90=2.5, n=12)
    assert cost.bytes_per_step is None


# --- front and sweeps -------------------------------------------------------------------------------------------------


def points(values: list[tuple[float, float]]) -> list[pareto.Point]:
    return [
        pareto.Point(str(at), "online", Estimate(p, None, None, 1), Estimate(u, None, None, 1), None, False)
        for at, (p, u) in enumerate(values)
    ]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_other_point_beats(values: list[tuple[int, int]]) -> None:
    drawn = points([(float(p), float(u)) for p, u in values])
    slow = {
        a.label
        for a in drawn
        if not any(
            b.privacy.value >= a.privacy.value
            and b.utility.value >= a.utility.value
            and (b.privacy.value > a.privacy.value or b.utility.value > a.utility.value)
            for b in drawn
        )
    }
    assert {point.label for point in pareto.front(drawn)} == slow


def test_privacy_is_one_less_reconstruction_with_its_interval_turned() -> None:
    run = run_cell("online")
    rows = summarise([run, attack_cell(run, value=0.3, half=0.1), run_cell("split")])
    (panel,) = pareto.panels_of(TASK, rows)
    assert panel.title == f"{TASK}: tuning texts, by whoever knows at most public text"
    drawn, left_out = pareto.points_of(panel)
    assert (drawn[0].privacy.value, *drawn[0].privacy.bounds) == pytest.approx((0.7, 0.6, 0.8))
    assert left_out == ["split (missing: no attack)"]


@pytest.mark.parametrize(
    ("settings", "width", "numbered"),
    [(3, 6.4, False), (24, 6.4, True), (24, 5.2, True)],
    ids=["few", "many", "many and narrow"],
)
def test_labels_cover_neither_one_another_nor_a_marker(settings: int, width: float, numbered: bool) -> None:
    records = []
    for at in range(settings):
        run = run_cell("online", f"a rather long name of setting {at}, 12 + 12 blocks", value=0.4 + 0.004 * (at % 5))
        records += [run, attack_cell(run, value=0.3 + 0.025 * at)]
    (panel,) = pareto.panels_of(TASK, summarise(records))
    picture = pareto.draw([panel], width=width)
    renderer = picture.canvas.get_renderer()
    texts = [each for each in picture.axes[0].texts if each.get_text()]
    assert len(texts) == settings
    assert all(each.get_text().isdigit() for each in texts) is numbered
    boxes = [each.get_window_extent(renderer).shrunk(0.98, 0.98) for each in texts]
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
    drawn, _ = pareto.points_of(panel)
    centres = [picture.axes[0].transData.transform((each.privacy.value, each.utility.value)) for each in drawn]
    assert not any(box.contains(x, y) for box in boxes for x, y in centres)
    if numbered:
        names = [each.get_text() for each in picture.axes[0].get_legend().get_texts()]
        assert sum("a rather long name" in name for name in names) == settings
        key = picture.axes[0].get_legend().get_window_extent(renderer)
        assert picture.bbox.contains(key.x0, key.y0)
        assert picture.bbox.contains(key.x1, key.y1)


def test_a_larger_marker_moves_more_bytes() -> None:
    everyone = [1e4, 1e5, 1e6, None]
    areas = [pareto.marker_area(each, everyone) for each in everyone]
    assert areas[0] < areas[1] < areas[2]
    assert areas[3] == areas[0]
    assert (areas[0], areas[2]) == (pareto.SMALLEST, pareto.LARGEST)


def test_sweeps_are_settings_that_differ_in_one_option() -> None:
    found = {sweep.knob: sweep for sweep in sweeps.find_sweeps(summarise(comparison()))}
    assert set(found) == {"decorrelation.alpha", "wire.activation_bits"}
    alpha = found["decorrelation.alpha"]
    assert [line.values for line in alpha.lines] == [(0.0, 1.0, 4.0, 16.0)] * 4  # two bit widths, two tasks
    assert {line.name for line in alpha.lines} >= {f"{TASK}, activation_bits 8", f"{TASK}, activation_bits 4"}
    values = [row.exposure.estimate.value for row in alpha.lines[0].rows if isinstance(row.exposure, Exposure)]
    assert values == sorted(values, reverse=True)


def test_an_option_left_out_of_a_sweep_has_the_designs_default() -> None:
    records = [run_cell("online", "default"), run_cell("online", "α = 4", options={"decorrelation.alpha": 4})]
    (sweep,) = sweeps.find_sweeps(summarise(records))
    assert sweep.lines[0].values == (1.0, 4.0)


def test_settings_that_differ_in_two_options_are_no_sweep() -> None:
    options = {"decorrelation.alpha": 4, "wire.activation_bits": 4}
    records = [run_cell("online", "default"), run_cell("online", "both", options=options)]
    assert sweeps.find_sweeps(summarise(records)) == []


def test_values_that_are_no_numbers_stand_beside_one_another() -> None:
    kinds = ("orthogonal", "gaussian")
    records = [run_cell("obfuscatune", kind, options={"matrix": kind}) for kind in kinds]
    (sweep,) = sweeps.find_sweeps(summarise(records))
    assert (sweep.knob, sweep.is_numeric) == ("matrix", False)
    ticks = [each.get_text() for each in sweeps.draw(sweep).axes[1].get_xticklabels()]
    assert sorted(ticks) == sorted(kinds)


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    written = write_study_report(comparison(), directory, title="A <made-up> $comparison")
    assert sorted(written) == sorted(directory.iterdir())
    return directory


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[dict[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append({"caption": False, "col": False, "row": False})
        if tag == "caption":
            self.tables[-1]["caption"] = True
        if tag == "th":
            self.tables[-1][str(dict(attrs).get("scope"))] = True


def read(report: Path) -> tuple[str, Reader]:
    text = (report / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_the_page_needs_nothing_from_outside(report: Path) -> None:
    text, reader = read(report)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in reader.tags}
    addresses = [str(a[k]) for _, a in reader.tags for k in ("src", "href", "xlink:href") if a.get(k)]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_the_page_can_be_read_without_seeing_it(report: Path) -> None:
    _, reader = read(report)
    assert reader.tables
    assert all(all(parts.values()) for parts in reader.tables)
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg"]
    kinds = {"nothing", "public text", "known plaintext"}  # that attacks of the comparison know
    assert len(pictures) == len(TASKS) * len(kinds) + 2
    assert all(len(each["aria-label"] or "") > 60 and each["role"] == "img" for each in pictures)
    identifiers = [str(attributes["id"]) for _, attributes in reader.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_the_page_shows_what_is_absent_and_what_is_simulated(report: Path) -> None:
    text, _ = read(report)
    assert "A &lt;made-up&gt; $comparison" in text
    assert "failed: the loss at step 12 is not finite: nan" in text
    assert "withheld: the leaky control" in text
    assert 'class="absent">' in text
    assert "SIMULATED: protects nothing" in text
    assert "obfuscatune: compact, veil: 1 enclave layer: SIMULATED enclave" in text


def test_an_absent_cell_is_never_a_zero() -> None:
    rows = summarise(
        [run_cell("offline", status="failed", error="why"), run_cell("online", "other"), run_cell("online")]
    )
    for grid in (tables.glance(MODEL, rows), tables.utilities(MODEL, rows), tables.costs(MODEL, rows)):
        line = text_of(grid, "offline")
        assert "failed" in line
        assert not re.search(r"\b0(\.0+)?\b", line)


def test_texts_are_escaped_and_stay_out_of_the_tables(report: Path) -> None:
    text, _ = read(report)
    assert "Where would &lt;b&gt;Anna&lt;/b&gt; keep 12 tulips?" in text
    assert "Secret material" in text
    assert "tulips" not in (report / "tables.md").read_text(encoding="utf-8")


def test_page_and_markdown_hold_the_same_figures(report: Path) -> None:
    markdown = (report / "tables.md").read_text(encoding="utf-8")
    text, _ = read(report)
    row = one(comparison(), "int4, α = 16")
    assert isinstance(row.worst[Attacker("provider", "tuning", "public_text")], Worst)
    for figure in ("0.240", "0.336", "340.0 kB", "0.910 to 1.000"):
        assert figure in markdown
        assert figure in text
    columns = [line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("|")]
    assert min(columns) > 2


def test_published_figures_are_marked_and_have_a_source() -> None:
    grid = notes.alternatives(summarise(comparison()))
    published = [row for row in grid.rows if shown(row[4]).text.startswith("published: ")]
    assert len(published) == len(ALTERNATIVES)
    assert all(re.search(r"arXiv \d{4}\.\d{5}|tinfoil\.sh", each.source) for each in ALTERNATIVES)
    assert sum(shown(row[4]).text == "measured in this comparison" for row in grid.rows) == 4
    without = notes.alternatives(summarise([run_cell("online")]))
    assert "missing" in shown(without.rows[0][4]).text


def test_pictures_are_written_for_the_front_and_every_sweep(report: Path) -> None:
    names = {path.name for path in report.glob("*.png")}
    assert names == {"pareto.png", "sweep-online-decorrelation.alpha.png", "sweep-online-wire.activation_bits.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))


def test_a_comparison_that_has_only_failed_has_a_report(tmp_path: Path) -> None:
    written = write_study_report([run_cell("online", status="failed", error="why")], tmp_path, title="nothing")
    assert "failed: why" in written[0].read_text(encoding="utf-8")


def test_unknown_designs_and_diverged_runs_are_shown(tmp_path: Path) -> None:
    run = run_cell("of tomorrow")
    assert run.result is not None
    nan = Measurement(value=float("nan"), n=1, ci95=None)
    diverged = run.model_copy(update={"result": run.result.model_copy(update={"utility": {f"{TASK}/acc": nan}})})
    text = write_study_report([diverged, attack_cell(run)], tmp_path, title="t")[0].read_text(encoding="utf-8")
    assert "not a number (diverged)" in text
    assert "not known to this version" in text


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        write_study_report([], tmp_path, title="t")


def test_rows_keep_samples_out_of_their_repr() -> None:
    row = one(comparison(), "32 bits", "split")
    assert "tulips" not in repr(row)
    assert any(attack.samples for attack in row.attacks)
    assert "tulips" in repr(replace(row.attacks[0]).samples)
    assert isinstance(row.attacks[0], AttackRow)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine: nobody can look at the page")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1600, True)], ids=["narrow", "wide-dark"])
def test_chromium_opens_the_page_without_an_error_and_without_overflow(
    report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    with browser(str(find_chromium()), tmp_path / "profile") as tab:
        tab.open(report / "report.html", width, dark=dark)
        assert tab.errors == []
        assert {address.partition("#")[0] for address in tab.requests} == {(report / "report.html").as_uri()}
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.evaluate("document.documentElement.clientWidth") in {width, width - 15}  # less a scroll bar
        assert tab.evaluate("document.querySelectorAll('table').length") > 6
        shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (shade == "rgb(255, 255, 255)") is not dark
