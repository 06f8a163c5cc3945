"""The page of a construction: its numbers against naive counts, its pictures, its bytes, and nothing from outside it."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic.reports.charts import Bar, histogram_chart
from mosaic.reports.figures import LINE_COLOURS, save_picture
from preprocess.construct.candidates import Candidate, picture_path, row_of
from preprocess.construct.page.cards import make_card, outlined
from preprocess.construct.page.counting import Outcome, Passage, measured_yields, outcome
from preprocess.construct.page.histograms import BINS, Histogram, Range
from preprocess.construct.page.looking import even, look
from preprocess.construct.page.samples import Samples
from preprocess.construct.page.scores import Limit, limits_of, measured
from preprocess.construct.page.writing import stage_reasons, write_page
from preprocess.construct.rows import Found
from tests.construct.handmade import EVIL, STAGES, Limits, Settings, candidate, many, write_dataset

COUNT = 120


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def everybody(work: Path) -> list[Candidate]:
    return list(many(COUNT, work)())


@pytest.fixture(scope="module")
def passing(everybody: list[Candidate]) -> list[Candidate]:
    return [one for one in everybody if outcome(one, STAGES, stage_reasons) == Outcome(5, [])]


def test_every_number_of_the_funnel_is_that_of_a_naive_count(everybody: list[Candidate]) -> None:
    found = look(STAGES, lambda: iter(everybody), stage_reasons, 3, 4)
    left = everybody
    for stage, passage in zip(STAGES, found.funnel.passages, strict=True):
        seen = [one for one in left if row_of(one, stage.name) is not None]
        reasons = {one.number: stage.reasons(one) for one in seen}
        dropped = [one for one in seen if reasons[one.number]]
        assert (passage.name, passage.came, passage.waiting) == (stage.name, len(left), len(left) - len(seen))
        assert passage.dropped == len(dropped)
        assert {name: cost.first for name, cost in passage.costs.items() if cost.first} == Counter(
            reasons[one.number][0] for one in dropped
        )
        assert {name: cost.all for name, cost in passage.costs.items()} == Counter(name for one in dropped for name in reasons[one.number])
        assert {name: cost.alone for name, cost in passage.costs.items() if cost.alone} == Counter(
            reasons[one.number][0] for one in dropped if len(reasons[one.number]) == 1
        )
        left = [one for one in seen if not reasons[one.number]]
        assert passage.passed == len(left)
        assert found.funnel.yields()[stage.name] == len(left) / len(seen)
    assert measured_yields(STAGES, everybody, stage_reasons) == found.funnel.yields()
    assert 3 < len(left) == found.funnel.passed
    assert all(passage.dropped > 0 for passage in found.funnel.passages)
    assert found.funnel.passages[1].costs["min_blur"].all > found.funnel.passages[1].costs["min_blur"].first > 0
    assert sum(found.kept.subjects.values()) == len(left)
    assert found.kept.kinds == Counter(subject.kind for one in left for subject in one.prompt.subjects)
    order = ("human", "animal", "object")
    pairs = [sorted((a.kind, b.kind), key=order.index) for one in left for a, b in combinations(one.prompt.subjects, 2)]
    assert found.kept.pairs == Counter(" + ".join(pair) for pair in pairs)
    assert sum(found.asked.subjects.values()) == found.funnel.passages[0].passed


def test_a_reason_given_twice_counts_once() -> None:
    passage = Passage("synthesis", came=3)
    for reasons in (["a", "a"], ["b", "a"], ["b", "c"]):
        passage.add(reasons)
    assert {name: (cost.first, cost.all, cost.alone) for name, cost in passage.costs.items()} == {
        "a": (1, 2, 1),
        "b": (2, 2, 0),
        "c": (0, 1, 0),
    }


def test_other_reasons_decide(everybody: list[Candidate]) -> None:
    found = look(STAGES, lambda: iter(everybody), lambda stage, one: ["odd"] * (stage is STAGES[0] and one.number % 2), 3, 4)
    assert found.funnel.passages[0].costs["odd"].all == COUNT // 2


def test_histograms_hold_each_value_once(everybody: list[Candidate]) -> None:
    found = look(STAGES, lambda: iter(everybody), stage_reasons, 3, 4)
    seen = [one for one in everybody if not one.prompt.problem]
    values = np.array([one.synthesis.scores["aesthetics"] for one in seen])
    one = found.histograms["synthesis"]["aesthetics"]
    naive, edges = np.histogram(values, BINS, (values.min(), values.max()))
    np.testing.assert_allclose(one.edges, edges)
    assert one.counts.sum(axis=0).tolist() == naive.tolist()
    assert one.counts[0].sum() == found.funnel.passages[1].passed
    assert (one.limit, one.below, one.above) == (Limit(0.3, None), int((values < 0.3).sum()), 0)
    assert f"{one.below} ({one.below / len(values):.1%}) under 0.3" in one.words()
    assert "still" not in found.histograms["synthesis"]  # one value, no limit
    blur = found.histograms["synthesis"]["blur"]
    assert blur.logarithmic
    assert blur.counts.sum() == len(seen)
    assert np.diff(np.log(blur.edges)) == pytest.approx(np.log(blur.edges[-1] / blur.edges[0]) / BINS)
    band = found.histograms["references"]["similarity"]
    came = [one for one in everybody if one.references and outcome(one, STAGES, stage_reasons).passed >= 3]
    assert band.total == sum(len(tries) for one in came for tries in one.references.subjects)
    assert band.limit == Limit(0.5, 0.95)
    assert band.below > 0 < band.above


def test_the_bins_of_a_histogram() -> None:
    one = Histogram(Range(0.0, 8.0), Limit(None, 10.0))  # the axis reaches to the limit
    for value in (0.0, 0.24, 0.25, 8.0, 8.0):
        one.add(value, value < 8)
    assert (one.edges[0], one.edges[-1]) == (0, 10)
    assert one.counts[0].nonzero()[0].tolist() == [0, 1]
    assert one.counts[0, :2].tolist() == [2, 1]
    assert one.counts[1, 32] == 2
    assert one.quantile(0.5) == pytest.approx(0.375)
    flat = Histogram(Range(3.0, 3.0), Limit(3.0, None))
    flat.add(3.0, True)
    assert (flat.total, flat.below) == (1, 0)


def test_limits_are_read_by_their_names() -> None:
    settings = Settings(limits=Limits(min_aesthetics=0.4, max_area=None))
    assert limits_of(settings) == {"aesthetics": Limit(0.4, None), "similarity": Limit(0.5, 0.95)}


def test_every_number_of_every_row_is_measured(everybody: list[Candidate]) -> None:
    one = next(one for one in everybody if len(one.prompt.subjects) == 3 and one.points and None not in one.segmentation.subjects)
    names = [Counter(name for name, _ in measured(row_of(one, stage.name))) for stage in STAGES]
    assert names[0] == {"attempts": 1}
    assert names[1] == {"aesthetics": 1, "blur": 1, "still": 1}
    assert names[2] == dict.fromkeys(set(Found.model_fields) - {"box"}, 3)
    assert names[3] == {"similarity": 6}
    assert names[4] == {"points": 3, "cyclic": 3}


def test_what_is_shown_lies_at_even_distances(everybody: list[Candidate], passing: list[Candidate]) -> None:
    assert even(100, 4) == [12, 37, 62, 87]
    assert even(3, 5) == [0, 1, 2]
    assert even(0, 5) == []
    found = look(STAGES, lambda: iter(everybody), stage_reasons, 3, 4, [7])
    assert [one.number for one in found.passing] == [passing[place].number for place in even(len(passing), 4)]
    blurred = [one for one in everybody if not one.prompt.problem and one.synthesis.scores["blur"] < 5]
    shown = found.dropped["synthesis"]["min_blur"]
    assert [one.number for one, _ in shown] == [blurred[place].number for place in even(len(blurred), 3)]
    assert all(reasons == STAGES[1].reasons(one) for one, reasons in shown)
    assert list(found.named) == [7]


def test_the_page(everybody: list[Candidate], passing: list[Candidate], tmp_path: Path) -> None:
    write_dataset(passing, tmp_path / "dataset")
    made_by = {"synthesis": {"model": "black-forest-labs/FLUX.1-dev", "revision": "abc"}, "references": {"models": ["mine <i>"]}}
    passes = Counter()

    def candidates() -> Iterator[Candidate]:
        passes["all"] += 1
        return iter(everybody)

    for name in ("one", "two"):
        write_page(
            tmp_path / f"{name}/index.html", STAGES, candidates, tmp_path / "dataset", provenance=made_by, num_samples=5, num_dropped=2
        )
    assert passes["all"] == 4
    text = (tmp_path / "one/index.html").read_text()
    assert (tmp_path / "two/index.html").read_bytes() == text.encode()
    assert not re.search("https?:", text)
    assert str(tmp_path) not in text
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', text)
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert f"{COUNT} candidates, {len(passing)} passed all stages" in text
    assert f"the data set has {len(passing)} samples" in text
    assert text.count('class="panel"') == 5
    assert "FLUX.1 [dev] Non-Commercial License" in text
    assert "mine &lt;i&gt;" in text
    assert text.count(">at least 0.3</text>") == 1  # in the chart of stage 2's score
    for reason in ("invalid", "min_aesthetics", "min_blur", "not_found", "max_area", "similarity", "min_points"):
        assert f"Dropped for {reason}: " in text


def test_what_decides_and_what_is_chosen_is_passed_on(everybody: list[Candidate], tmp_path: Path) -> None:
    write_page(
        tmp_path / "index.html",
        STAGES,
        lambda: iter(everybody),
        reasons=lambda stage, one: ["odd"] * (stage is STAGES[4] and one.number % 2),
        chosen=lambda one: [0 for _ in one.references.subjects],
        num_samples=2,
        num_dropped=1,
    )
    text = (tmp_path / "index.html").read_text()
    assert "Dropped for odd: " in text
    assert "Dropped for min_points: " not in text
    tries = re.findall(r'<figure( class="chosen")?>.*?similarity', text)
    assert tries == [' class="chosen"', ""] * (len(tries) // 2) != []
    assert text.count('<article class="card candidate">') == 3


def test_without_a_data_set_those_that_passed_are_shown(everybody: list[Candidate], tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", STAGES[:2], lambda: iter(everybody), num_samples=3, num_dropped=1)
    text = (tmp_path / "index.html").read_text()
    assert "Candidates that passed" in text
    assert 'class="panel"' not in text
    assert 'id="segmentation"' not in text


def test_words_are_escaped(work: Path, tmp_path: Path) -> None:
    one = replace(candidate(1000, work, EVIL))
    write_page(tmp_path / "index.html", STAGES, lambda: iter([one]), title=EVIL, provenance={EVIL: EVIL})
    text = (tmp_path / "index.html").read_text()
    assert "<script" not in text
    assert "<b>cat" not in text
    assert text.count("a &lt;b&gt;cat&lt;/b&gt; &amp; a &#34;dog&#34;") >= 4


def test_no_candidate_at_all(tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", STAGES, lambda: iter([]))
    assert "0 candidates, 0 passed all stages" in (tmp_path / "index.html").read_text()


def test_a_picture_that_is_gone_is_said_to_be(work: Path) -> None:
    one = next(one for one in (candidate(number, work) for number in range(1001, 1010)) if one.points and not one.prompt.problem)
    picture_path(one, "synthesis").unlink()
    picture_path(one, "references", "ref0_1").write_bytes(b"no picture")
    card = make_card(one, ["min_points"])
    assert card.picture is None
    assert "gone or damaged" in card.problem
    assert [one.picture is None for one in card.subjects[0].tries] == [False, True]
    assert [one.chosen for one in card.subjects[0].tries] == [False, True]


def test_outlines_surround_the_masks(work: Path) -> None:
    one = next(
        one
        for one in (candidate(number, work) for number in range(1010, 1040))
        if one.segmentation and len(one.segmentation.subjects) == 2 and None not in one.segmentation.subjects
    )
    save_picture(Image.new("RGB", (48, 32), (200, 200, 200)), picture_path(one, "synthesis"))
    shown = np.asarray(outlined(one, 192))  # 4 px for each, 32 px of white above and below
    for k in range(2):
        rows, columns = (shown == LINE_COLOURS[k]).all(axis=-1).nonzero()
        assert (rows.min(), rows.max()) == (32 + 4 * 4, 32 + 4 * 28 - 1)
        assert (columns.min(), columns.max()) == (4 * (12 * k + 1), 4 * (12 * k + 11) - 1)
    assert (shown[40, 100] == 200).all()


def test_panels_join_the_samples_own_points(passing: list[Candidate], tmp_path: Path) -> None:
    write_dataset(passing, tmp_path / "dataset")
    samples = Samples(tmp_path / "dataset")
    assert samples.splits == {"train": len(passing) - len(passing) // 4, "test": len(passing) // 4}
    assert samples.cast.subjects == Counter(len(one.prompt.subjects) for one in passing)
    rows = samples.chosen(3)
    assert list(rows) == [passing[place].number for place in even(len(passing), 3)]
    assert [samples.manifest.row(row).id for row in rows.values()] == [f"s{number}" for number in rows]
    one = next(number for number, row in enumerate(samples.manifest.num_references) if row == 2)
    assert samples.panel(one).size == (2 * 256 + 3 * 12, 2 * (256 + 12) + 12)


def test_a_chart_of_bars() -> None:
    chart = histogram_chart([Bar(0, 1, (2, 1)), Bar(1, 2, (4, 0))], "x < y", "values", ("in", "out"), [("at least 1", 1.0)])
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="#(?!fff)', chart)
    (x0, y0, w0, h0), (x1, y1, _, h1), (x2, y2, _, h2) = (tuple(map(float, bar)) for bar in bars[:3])
    assert (x0, x1) == (56, 56)
    assert x2 == pytest.approx(56 + (560 - 56 - 16) / 2)
    assert w0 == pytest.approx(x2 - x0 - 1)
    assert h0 == pytest.approx(2 * h1) == pytest.approx(h2 / 2)
    assert y0 + h0 == pytest.approx(320 - 44, abs=0.2) == pytest.approx(y2 + h2, abs=0.2)
    assert y1 + h1 == pytest.approx(y0, abs=0.2)
    assert f'<line x1="{x2:.1f}"' in chart
    assert "x &lt; y" in chart
