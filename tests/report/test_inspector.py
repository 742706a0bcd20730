"""The token inspector: its data, and the page in a real browser."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.inspections import ADAPTED, BASE, NASTY, SCRIPT, SHARED, inspection_of
from moe_bias.analysis.inspection import read_inspection
from moe_bias.records import write_json
from moe_bias.report import inspector
from moe_bias.report.inspector import page_data, write_page
from moe_bias.report.template import json_in_html


@pytest.fixture
def page(tmp_path, chromium):
    """The page of two answers, open, with what it said on the console."""
    write_page(tmp_path / "tokens.html", inspection_of(BASE, ADAPTED))
    opened = chromium.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    opened.said = []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.said.append(request.url) if request.url[:4] == "http" else None)
    opened.goto((tmp_path / "tokens.html").as_uri())
    yield opened
    assert opened.said == []
    opened.close()


def facts(page) -> dict[str, str]:
    """What the panel tells, by name."""
    names, values = (page.locator(f".panel {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def colour(page, number: int) -> str:
    return page.locator(f"[data-token='{number}']").evaluate("span => getComputedStyle(span).backgroundColor")


def test_answers_are_aligned_at_the_first_difference():
    data = page_data(inspection_of(BASE, ADAPTED))
    shapes = [(part["name"], part["start"], len(part["tokens"])) for part in data["parts"]]
    assert shapes == [("both", 0, 2), ("base", 2, 31), ("adapted", 2, 2)]
    assert data["parts"][2]["title"] == "adapted: 2 tokens, from token 3 on"
    assert [shown["fork"] for shown in data["parts"][0]["tokens"]] == [False, True]


@pytest.mark.parametrize(
    ("answers", "titles"),
    [
        ([SHARED, SHARED], ["Both answers begin alike: 2 tokens", "base: ends here", "adapted: ends here"]),
        ([SHARED, ADAPTED[2:]], ["base: 2 tokens", "adapted: 2 tokens"]),
        ([SHARED], ["base: 2 tokens"]),
    ],
)
def test_titles_say_where_answers_part(answers, titles):
    assert [part["title"] for part in page_data(inspection_of(*answers))["parts"]] == titles


def test_a_page_says_how_many_of_a_long_answer_it_shows(monkeypatch):
    monkeypatch.setattr(inspector, "SHOWN", 3)
    (part,) = page_data(inspection_of(BASE))["parts"]
    assert part["title"] == "base: 33 tokens; the first 3 are shown"
    assert len(part["tokens"]) == 3


@given(st.text() | st.sampled_from([SCRIPT, NASTY, "\ud800", "<!--"]))
def test_json_in_a_page_holds_nothing_that_html_reads(text):
    written = json_in_html({"text": text})
    assert json.loads(written) == {"text": text}
    assert not set(written) & set("<>&\u2028\u2029")
    assert written.isascii()


@pytest.mark.browser
def test_hover_tells_the_numbers_of_a_token(page):
    page.locator("[data-token='1']").hover()
    assert facts(page) == {
        "base entropy": "2.500",
        "adapted entropy": "0.250",
        "gate w": "0.625",
        "largest |bias|": "1.500",
        "KL to the base": "0.710",
        "flip": "yes",
    }
    assert page.locator(".panel h3").inner_text() == "·solve"
    rows = page.locator(".panel .lists > div").all_inner_texts()
    assert [row.split("\n") for row in rows] == [
        ["Base model", "·solve", "75.0%", "</script><img·src=x·onerror=alert(1)>\u2028&amp;", "12.5%"],
        ["With the adapter", "·9", "50.0%", "·solve", "37.5%"],
        ["Routed to", "expert 8", "87.5%", "expert 3", "12.5%"],
    ]


@pytest.mark.browser
def test_switches_colour_by_what_they_say(page):
    assert page.locator(".inspector").get_attribute("data-mode") == "entropy"
    hot, cool = colour(page, 33), colour(page, 0)
    assert hot != cool
    page.get_by_label("|bias|").check(force=True)
    assert colour(page, 33) != hot
    assert colour(page, 0) == colour(page, 1), "both have the same bias"
    page.get_by_label("expert").check(force=True)
    assert "7: 2.9%" in page.locator(".legend").inner_text()
    assert colour(page, 0) != colour(page, 1)
    page.get_by_label("flips").check(force=True)
    assert "1 of 35 tokens" in page.locator(".legend").inner_text()
    assert colour(page, 1) != colour(page, 0) == "rgba(0, 0, 0, 0)"


@pytest.mark.browser
def test_keys_move_and_hold(page):
    page.locator("[data-token='0']").focus()
    page.keyboard.press("ArrowRight")
    assert facts(page)["base entropy"] == "2.500"
    page.keyboard.press("Enter")
    page.locator("[data-token='0']").hover()
    assert facts(page)["base entropy"] == "2.500", "held against the mouse"
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.token") == "34"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.token") != "34"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.token") == "2", "the first token of the answer below"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "one stop for all tokens"


@pytest.mark.browser
def test_what_a_model_wrote_shows_as_text(page):
    assert page.title() == "Token inspector"
    assert page.locator("img").count() == 0
    assert page.locator("[data-token='33']").inner_text() == SCRIPT
    assert SCRIPT in page.locator(".prompt").inner_text()
    page.locator("summary").click()
    assert SCRIPT.replace(" ", "·") in page.locator("table").inner_text()
    assert page.locator("tbody tr").count() == 35


@pytest.mark.browser
def test_the_theme_follows_the_system_until_it_is_chosen(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert page.evaluate(paper) != light
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(paper) == light
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not page.locator(".panel").is_visible()


@pytest.mark.browser
def test_a_narrow_page_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".panel").is_visible()


def test_a_record_is_read_back(tmp_path):
    found = inspection_of(BASE, ADAPTED)
    write_json(tmp_path / "tokens.json", {"inspection": asdict(found)})
    assert page_data(read_inspection(tmp_path / "tokens.json")) == page_data(found)
    assert page_data(replace(found, threshold=9.0)) != page_data(found)
