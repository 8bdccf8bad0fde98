"""The report as a reader meets it: in a browser, from a file, without a network."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import Heard, listen_to
from conftest import CLASS_NAMES, CLIPS, NASTY, Made

from pipeline import cli
from pipeline.commands.report import ReportConfig, run
from pipeline.scoring.report import EvaluationReport

Written = tuple[Path, EvaluationReport]


@pytest.fixture(scope="module")
def written(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("out") / "report.html"
    return out, run(ReportConfig(made.runs, data=made.data, store=made.store, out=str(out), workers=0))


@pytest.fixture
def page(browser: Any, written: Written) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.heard = listen_to(page)
    page.goto(written[0].as_uri())
    yield page
    page.close()


def column(page: Any, number: int) -> list[str]:
    return page.locator(f"#table tbody tr:visible > :nth-child({number})").all_inner_texts()


def test_it_asks_for_nothing_and_its_own_policy_refuses_nothing_of_it(page: Any, written: Written) -> None:
    heard: Heard = page.heard
    page.wait_for_timeout(200)
    assert heard.complaints == []
    assert heard.requests == [written[0].as_uri()]


def test_names_are_text_whatever_they_hold(page: Any) -> None:
    assert sorted(column(page, 1)) == sorted(CLASS_NAMES)
    assert page.locator("#wrong h3").first.inner_text().startswith(NASTY)
    assert NASTY in page.locator("#settings pre").first.text_content()
    assert page.locator("[onmouseover], [onerror], script:not([type]) ~ script").count() == 0
    assert page.evaluate("typeof hacked") == "undefined"


def test_a_script_that_got_in_would_not_run(page: Any) -> None:
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    page.evaluate("document.body.innerHTML += '<img src=data:, onerror=hacked=1>'")
    page.wait_for_timeout(100)
    assert page.evaluate("typeof hacked") == "undefined"
    assert any("Content Security Policy" in line for line in page.heard.complaints)


def test_the_table_has_the_scores_and_sorts_by_any_column(page: Any, written: Written) -> None:
    _, report = written
    for place, system in enumerate(report.systems):
        button = page.locator(f"[data-key=ap{place}]")
        button.click()
        falling = [f"{value:.3f}" for value in sorted(system.average_precision, reverse=True)]
        assert column(page, 3 + place) == falling
        assert page.locator(f"th:has([data-key=ap{place}])").get_attribute("aria-sort") == "descending"
        button.click()
        assert column(page, 3 + place) == falling[::-1]
    page.locator("[data-key=name]").click()
    assert column(page, 1) == sorted(CLASS_NAMES, key=str.lower)


def test_the_table_is_filtered_by_name_and_by_number_of_clips(page: Any) -> None:
    page.locator("#filter").fill("LAUT")
    assert column(page, 1) == [CLASS_NAMES[2]]
    assert "1 of 4 classes" in page.locator("#shown").inner_text()
    page.locator("#filter").fill("")
    page.locator("#least").fill("4")
    assert column(page, 1) == []
    page.locator("#least").fill("3")
    assert len(column(page, 1)) == 4


def test_gains_are_of_the_run_that_is_chosen_over_the_other(page: Any, written: Written) -> None:
    report = written[1]

    def gains() -> dict[str, float]:
        texts = [text.replace("−", "-") for text in column(page, 6)]
        return dict(zip(column(page, 1), map(float, texts), strict=True))

    def wanted(one: int, other: int) -> dict[str, float]:
        difference = report.systems[one].average_precision - report.systems[other].average_precision
        return dict(zip(report.class_names, difference, strict=True))

    assert gains() == pytest.approx(wanted(1, 2), abs=6e-4)
    page.locator("#against").select_option(index=0)
    assert gains() == pytest.approx(wanted(1, 0), abs=6e-4)
    page.locator("[data-key=gain]").click()
    assert list(gains().values()) == sorted(gains().values(), reverse=True)


def test_a_click_on_a_class_draws_its_curves_and_the_arrow_keys_move_on(page: Any, written: Written) -> None:
    report = written[1]
    page.locator("[data-key=name]").click()
    names = column(page, 1)
    page.get_by_role("button", name=names[1], exact=True).click()
    assert page.locator("#chosen").inner_text() == names[1]
    assert page.locator("#plot path.line").count() == 3
    page.keyboard.press("ArrowDown")
    assert page.locator("#chosen").inner_text() == names[2]
    index = report.class_names.index(names[2])
    shown = page.locator("#legend tbody td:nth-child(2)").all_inner_texts()
    assert shown == [f"{system.average_precision[index]:.3f}" for system in report.systems]
    # The steps' area is the average precision that stands beside them.
    path = page.locator("#plot path.line").first.get_attribute("d")
    points = np.array([float(one) for one in re.findall(r"[\d.]+", path)]).reshape(-1, 2)
    recall, precision = (points[:, 0] - 40) / 300, 1 - (points[:, 1] - 8) / 300
    assert np.trapezoid(precision, recall) == pytest.approx(report.systems[0].average_precision[index], abs=2e-3)


def test_all_of_it_can_be_reached_by_keyboard(page: Any) -> None:
    reached = set()
    for _ in range(120):  # players have several stops
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"A", "filter", "least", "run", "against", "BUTTON", "AUDIO", "SUMMARY"} <= reached


def test_the_clips_most_wrong_can_be_heard(page: Any) -> None:
    assert page.locator("audio").count() == CLIPS
    played = "new Promise((resolve) => one.addEventListener('ended', () => resolve(one.currentTime)))"
    script = f"async () => {{ const one = document.querySelector('audio'); one.play(); return {played} }}"
    assert page.evaluate(script) == pytest.approx(0.5, abs=0.1)
    assert page.evaluate("document.querySelector('.sound img').naturalWidth") > 10
    assert page.evaluate("parseFloat(document.querySelector('.head').style.left)") > 0
    losses = [float(text.split()[-2]) for text in page.locator("#wrong h3").all_inner_texts()]
    assert losses == sorted(losses, reverse=True)


def test_settings_and_hashes_are_there(page: Any, written: Written) -> None:
    assert page.locator("#settings tbody tr").all_inner_texts() == ["mixup.rate\t0.0\t1.0"]
    hashes = page.locator("#hashes").inner_text()
    assert all(system.sha256 in hashes for system in written[1].systems)
    assert written[1].clip_ids_sha256 in hashes
    assert "a" * 64 in hashes, "the teacher's"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_in_either_colour_scheme(browser: Any, written: Written, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 340, "height": 700}, color_scheme=scheme)
    page.goto(written[0].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate("document.querySelector('figure img').currentSrc.slice(0, 18)") == "data:image/svg+xml"
    page.close()


def test_equal_input_gives_equal_bytes_and_limits_are_kept(made: Made, written: Written, tmp_path: Path) -> None:
    settings = ["--store", made.store, "--data", made.data, "--workers", "0"]
    again, small = tmp_path / "again.html", tmp_path / "small.html"
    assert cli.run(["report", *made.runs, *settings, "--out", str(again)]) == 0
    assert again.read_bytes() == written[0].read_bytes()
    limits = ["--clips", "3", "--sound-megabytes", "0.005"]
    assert cli.run(["report", made.runs[0], *settings, *limits, "--out", str(small)]) == 0
    text = small.read_text()
    assert text.count('class="card"') == 3
    assert 0 < text.count("data:audio") < 3
    assert "larger than it was allowed to be" in text


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = cli.run(["report", *made.runs, "--data", made.data, "--workers", "0", "--out", str(tmp_path / "r.html")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "r.html" in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra_and_comparisons_go_on_without_the_page(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--data", made.data, "--workers", "0", "--out"]
    monkeypatch.setattr("pipeline.runtime.extras.find_spec", lambda name: None)
    assert cli.run(["report", *made.runs, *settings, str(tmp_path / "r.html")]) == 2
    assert "report needs jinja2: pip install 'audioset-distill[report]'" in capsys.readouterr().err
    assert cli.run(["compare", "--run", *made.runs, *settings, str(tmp_path / "out")]) == 0
    assert "which needs jinja2: pip install 'audioset-distill[report]'" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.png",
        "per_class.csv",
        "report.json",
    ]


def test_a_comparison_ends_by_writing_it(made: Made, tmp_path: Path, written: Written) -> None:
    settings = ["--store", made.store, "--data", made.data, "--workers", "0", "--out", str(tmp_path)]
    assert cli.run(["compare", "--run", *made.runs, *settings]) == 0
    assert (tmp_path / "report.html").read_bytes() == written[0].read_bytes()
