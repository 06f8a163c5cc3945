"""Published rows: the averages of Table 2 follow from its columns."""

import pytest

from mosaic.evaluation.published import average, overall, published_for

OVERALL = {"MS-Diffusion": 51.49, "UNO": 64.03, "DreamO": 69.25, "OmniGen2": 66.55, "XVerse": 73.40, "MOSAIC": 76.04}


@pytest.mark.parametrize("benchmark", ["xversebench", "xversebench_multi"])
def test_averages_follow_from_the_columns(benchmark: str) -> None:
    rows = published_for(benchmark)
    assert len(rows) == 7
    for row in rows:
        assert average(row.values) == pytest.approx(row.values["avg"], abs=0.0051), row.method


def test_overall_is_the_mean_of_both() -> None:
    single, multi = ({row.method: row.values for row in published_for(name)} for name in ("xversebench", "xversebench_multi"))
    found = {method: overall(single[method], multi[method]) for method in OVERALL}
    assert found == pytest.approx(OVERALL, abs=0.0151)  # printed from rounded averages


def test_dreambench() -> None:
    assert {row.method: row.values["dino"] for row in published_for("dreambench_multi")}["MOSAIC"] == 56.83
    assert len(published_for("dreambench")) == 8
