"""The chat page in Chromium, on the real server with a tiny model; learning is a stand-in that tells what came."""

import json
import re
import time
from pathlib import Path

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

import moe_bias as mb
from helpers.chatting import listening, served_folder
from helpers.lessons import InlineWorker
from moe_bias.config import LearnConfig
from moe_bias.learning import service
from moe_bias.learning.service import Learning
from moe_bias.server import engine as engines
from moe_bias.server.app import make_app
from moe_bias.server.engine import Engine
from moe_bias.server.keys import Keys
from moe_bias.server.metrics import Counters
from moe_bias.server.teaching import Teaching

pytestmark = pytest.mark.browser
SAID = "w5 w6 w7"
LEARNED = {
    "feedback": 1,
    "adapter": "one",
    "applied": True,
    "published": True,
    "reason": "",
    "milliseconds": 38.4,
    "kl_step": 0.0123,
    "kl_base": 0.25,
    "version": 7,
}
REFUSED = {**LEARNED, "applied": False, "published": False, "reason": "the answer is 0.9 nats from the base"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Its words look like HTML, and the browser's own quotes."""
    folder = tmp_path_factory.mktemp("served")
    adapters = served_folder(folder)[1]
    written = folder / "model" / "tokenizer.json"
    text = json.loads(written.read_text())
    text["model"]["vocab"] = {_tagged(word, number): number for word, number in text["model"]["vocab"].items()}
    written.write_text(json.dumps(text))
    return mb.load(str(folder / "model"), device="cpu"), adapters


def _tagged(word: str, number: int) -> str:
    return f"<img/src=x/onerror=document.title='{word}'>" if number > 20 else word


@pytest.fixture(scope="module")
def address(served):
    with listening(make_app(Engine(*served), name="tiny", limit=20)) as found:
        yield found


@pytest.fixture
def opened(chromium):
    """Opens pages, and holds at the end that no script failed and nothing was refused by the page's policy."""
    pages, complaints = [], []

    def open_page(address, width=1300, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"{address}/chat")
        page.wait_for_selector(".mix, .mixer .none", state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [each for each in complaints if "404" not in each and "400" not in each] == []


def say(page, text=SAID, limit=12, seed=3, temperature=0.8):
    page.evaluate("document.querySelector('.settings').open = true")
    for name, value in (("limit", limit), ("seed", seed), ("temperature", temperature)):
        page.fill(f".{name}", str(value))
    page.fill("#message", text)
    page.press("#message", "Enter")


def answered(page, text=SAID, **choices):
    say(page, text, **choices)
    page.wait_for_selector(".again")


def texts(page):
    """What stands in the columns, and not the marks at the ends of lines."""
    return [answer.text_content() for answer in page.query_selector_all(".answer .tokens")]


def library(served, adapter=None, strength=None, **choices):
    base = mb.load(served[0].model.name_or_path, device="cpu")
    layer = None if adapter is None else mb.load_layer(served[1] / adapter, base)
    if strength is not None:
        layer.strength = strength
    return mb.generate(base, SAID, layer, **{"temperature": 0.8, "max_new_tokens": 12, "seed": 3, **choices})


def test_both_models_answer_side_by_side_as_the_library_does(served, address, opened):
    page = opened(address)
    answered(page)
    assert [heading.text_content() for heading in page.query_selector_all(".answer h3")] == ["base", "one"]
    assert texts(page) == [library(served), library(served, "one")]
    boxes = [answer.bounding_box() for answer in page.query_selector_all(".answer")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert page.locator(".first-difference").count() == 2
    feet = [foot.text_content() for foot in page.query_selector_all(".foot")]
    assert all(
        re.match(r"\d+ tokens? in \d+\.\d s; \d+ of \d+ prompt tokens were there already", foot) for foot in feet
    )
    page.click("text=Ask again")
    page.wait_for_selector(".again")
    assert texts(page) == [library(served), library(served, "one")]


def test_the_conversation_goes_on_in_each_column_from_its_own_answer(address, opened):
    page, asked = opened(address), []
    page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
    answered(page)
    first = texts(page)
    page.fill("#message", "w9")
    page.press("#message", "Enter")
    page.wait_for_selector(".turn:nth-of-type(2) .again")
    by_adapter = {"moe_bias" in body: body["messages"] for body in asked[2:]}
    for is_adapted, text in ((False, first[0]), (True, first[1])):
        assert [turn["role"] for turn in by_adapter[is_adapted]] == ["user", "assistant", "user"]
        assert by_adapter[is_adapted][1]["content"] == text
    page.click("text=New chat")
    assert page.locator(".turn").count() == 0


def test_a_model_writes_no_html(served, address, opened):
    page = opened(address)
    answered(page, limit=30)
    assert any("<img/src" in text for text in texts(page))
    assert page.locator(".talk img").count() == 0
    assert page.title() == "Chat with tiny"


def test_a_script_without_the_pages_nonce_does_not_run(address, chromium):
    page = chromium.new_page()
    page.goto(f"{address}/chat")
    refused = page.evaluate("""() => new Promise((heard) => {
        document.addEventListener("securitypolicyviolation", (event) => heard(event.effectiveDirective));
        document.body.append(Object.assign(document.createElement("script"), { textContent: "window.ran = true" }));
    })""")
    assert refused == "script-src-elem"
    assert page.evaluate("window.ran ?? null") is None
    page.close()


def test_everything_of_a_token_is_reached_by_the_keyboard(address, opened):
    page = opened(address)
    answered(page)
    page.focus(".answer.adapted .token >> nth=0")
    panel = page.locator(".panel")
    for words in ("base entropy", "largest move", "KL to the base", "strength", "gate w", "Routed to", "token 1, id"):
        assert words in panel.text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 3, id" in panel.text_content()
    page.keyboard.press("Enter")
    page.hover(".answer.base .token >> nth=0")
    assert "token 3, id" in panel.text_content()
    page.keyboard.press("End")
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    page.hover(".answer.base .token >> nth=1")
    assert "Routed to" not in panel.text_content()
    assert "base entropy" in panel.text_content()
    stops = page.eval_on_selector_all(".token", "spans => spans.filter((span) => span.tabIndex === 0).length")
    assert stops == 2


def test_tokens_are_coloured_by_what_was_chosen(address, opened):
    page = opened(address)
    answered(page)
    for label, says in (
        ("entropy", "entropy of the plain model"),
        ("move", "largest change of a logit"),
        ("expert", "%"),
        ("flips", "another token is the likeliest"),
    ):
        page.click(f".colours >> text={label}")
        assert says in page.locator(".legend").text_content()
    page.click(".colours >> text=move")
    levels = page.eval_on_selector_all(
        ".token", "all => all.map((one) => Number(one.style.getPropertyValue('--level')))"
    )
    assert max(levels) == 1
    assert 0 < len([level for level in levels if level == 0]) < len(levels)
    page.click(".colours >> text=expert")
    assert page.locator(".answer.base .token:not(.of-none)").count() == 0
    assert page.locator(".answer.adapted .token.of-none").count() == 0
    page.click(".colours >> text=none")
    assert page.locator(".legend").text_content() == ""


def test_adapters_are_mixed_and_columns_chosen(served, address, opened):
    page, asked = opened(address), []
    page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
    page.click(".show >> text=adapted")
    answered(page)
    assert texts(page) == [library(served, "one")]
    page.check(".mix:has-text('two') input[type=checkbox]")
    page.click(".again")
    page.wait_for_selector(".again")
    assert asked[-1]["moe_bias"] == "one+two"
    assert page.locator(".answer h3").text_content() == "one + two"
    page.locator(".mix:has-text('two') input[type=range]").fill("0.4")
    page.uncheck(".mix:has-text('one') input[type=checkbox]")
    page.click(".again")
    page.wait_for_selector(".again")
    assert asked[-1]["moe_bias"] == {"two": 0.4}
    assert texts(page) == [library(served, "two", 0.4)]
    page.uncheck(".mix:has-text('two') input[type=checkbox]")
    page.click(".again")
    page.wait_for_selector(".again")
    assert "moe_bias" not in asked[-1]
    assert texts(page) == [library(served)]


@pytest.fixture
def slowly(monkeypatch):
    """An engine that takes its time, so that a reader can act between two tokens."""
    choose = engines.choose
    monkeypatch.setattr(engines, "choose", lambda *given: time.sleep(0.05) or choose(*given))


def test_a_slider_acts_on_the_next_token_and_stop_stops(served, slowly, opened):
    engine = Engine(*served)
    engine._stop_ids = frozenset()
    with listening(make_app(engine, name="tiny")) as address:
        page = opened(address)
        page.click(".show >> text=adapted")
        say(page, limit=100)
        page.wait_for_selector(".token >> nth=2")
        page.locator(".mix:has-text('one') input[type=range]").fill("0.5")
        page.wait_for_timeout(1000)
        page.click("text=Stop")
        page.wait_for_selector(".again")
        strengths = page.evaluate("chat.allTokens().map(({ token }) => token.adapters[0].strength)")
        assert strengths[:2] == [1, 1]
        assert strengths[-1] == 0.5
        assert strengths == sorted(strengths, reverse=True)
        assert "stopped" in page.locator(".foot").text_content()
        written = len(strengths)
        page.wait_for_timeout(300)
        assert page.locator(".token").count() <= written
        assert written < 100


def test_what_the_server_refuses_is_said(address, opened):
    page = opened(address)
    page.click(".show >> text=base")
    answered(page, temperature=5)
    assert page.locator(".failed .foot").text_content() == (
        "temperature: input should be less than or equal to 2, not 5"
    )
    assert page.locator(".send").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1600])
def test_nothing_is_wider_than_the_window(address, opened, width, scheme):
    page = opened(address, width, scheme)
    answered(page, limit=40)
    for place in (1, -1):
        token = page.locator(f".answer.adapted .token >> nth={place}")
        token.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        panel, at = page.locator(".panel").bounding_box(), token.bounding_box()
        is_beside = panel["x"] >= at["x"] + at["width"]
        assert is_beside or panel["y"] >= at["y"] + at["height"], "the panel covers the token that it tells of"
    box = page.locator(".composer").bounding_box()
    assert box["y"] + box["height"] <= 850 + 1
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", colour))) < 60) == (scheme == "dark")


def learning(asked, answers):
    """Routes of a server that learns: they say what they were asked, and answer as they are told."""

    async def adapters(request):
        return JSONResponse({"learning": True, "adapters": [{"name": "one"}, {"name": "two", "learns": False}]})

    async def feedback(request):
        asked.append(await request.json())
        return JSONResponse(answers.pop(0))

    async def undo(request):
        asked.append(request.url.path)
        return JSONResponse({"version": 6, "published": True, "reason": ""})

    async def history(request):
        events = [
            {"kind": "edit", "kl_step": 0.0123456, "version": 7, "text": "<b>bold</b>", "skipped": None, "reason": ""}
        ]
        return JSONResponse({"adapter": request.path_params["name"], "events": events})

    return [
        Route("/v1/adapters", adapters),
        Route("/v1/feedback", feedback, methods=["POST"]),
        Route("/v1/adapters/{name}/undo", undo, methods=["POST"]),
        Route("/v1/adapters/{name}/history", history),
    ]


def test_answers_are_judged_edited_and_undone(served, opened):
    unpublished = {**LEARNED, "published": False, "reason": "held-out answers got worse", "kl_base": None}
    asked, answers = [], [LEARNED, REFUSED, LEARNED, unpublished]
    with listening(make_app(Engine(*served), learning(asked, answers), name="tiny")) as address:
        page = opened(address)
        answered(page)
        assert page.locator(".answer.base .actions button").count() == 0
        news = page.locator(".adapted .news")
        page.click("text=Good")
        page.wait_for_selector(".adapted .news:text-matches('^Learned')")
        assert news.text_content() == (
            "Learned in 38 ms; moved 0.012 nats; now 0.250 nats from the base; published as version 7."
        )
        page.click("text=Bad")
        page.wait_for_selector(".adapted .news:text-matches('^Not')")
        assert news.text_content() == "Not learned: the answer is 0.9 nats from the base."
        written = texts(page)[-1]
        page.click("text=Edit")
        assert page.input_value(".edited") == written
        page.keyboard.press("Escape")
        assert page.locator(".edited").count() == 0
        page.click("text=Edit")
        page.fill(".edited", "w9 <b>w10</b>")
        page.click("text=Learn from this")
        page.wait_for_selector(".adapted .news:text-matches('^Learned')")
        page.click("text=Undo")
        page.wait_for_selector(".adapted .news:text-matches('^Undone')")
        assert "version 6" in news.text_content()
        page.click("text=History")
        page.wait_for_selector(".history[open]")
        shown = page.locator(".history .events").text_content()
        assert "What one learned" in shown
        assert "kl step 0.01235" in shown
        assert "<b>bold</b>" in shown
        assert "skipped" not in shown
        assert "reason" not in shown
        page.keyboard.press("Escape")
        page.click(".again")
        page.wait_for_selector("text=Better than before")
        page.click("text=Better than before")
        page.wait_for_selector(".adapted .news:text-matches('^Learned')")
        assert news.text_content() == ("Learned in 38 ms; moved 0.012 nats; not published: held-out answers got worse.")
        page.check(".mix:has-text('two') input[type=checkbox]")
        page.uncheck(".mix:has-text('one') input[type=checkbox]")
        page.click(".again")
        page.wait_for_selector(".again")
        assert page.locator(".actions button").count() == 0
    answer = asked[0]["id"]
    assert asked == [
        {"id": answer, "reward": 1},
        {"id": answer, "reward": -1},
        {"id": answer, "edit": "w9 <b>w10</b>"},
        "/v1/adapters/one/undo",
        {"id": answer, "prefer": asked[-1]["prefer"]},
    ]
    assert asked[-1]["prefer"] not in ("", answer)


def test_with_a_key_an_answer_is_taught_for_good(served, opened, tmp_path, monkeypatch):
    """The page on the server that learns, with nothing stood in for but the process."""
    monkeypatch.setattr(service, "Worker", InlineWorker)
    base, adapters = served
    learned = Learning(tmp_path / "learned", adapters, base.head, LearnConfig())
    engine, keys = Engine(base, learned.adapters, learned.spool.keep), Keys({"a-key-of-sixteen": ("one",)})
    routes = Teaching.of_engine(engine, learned, keys, Counters().learning).routes
    with listening(make_app(engine, routes, name="tiny", closing=learned.close)) as address:
        page = opened(address)
        answered(page)
        assert page.locator(".actions button").count() == 0
        page.fill(".key", "a-key-of-sixteen")
        page.press(".key", "Tab")
        page.click(".again")
        page.click("text=Edit")
        page.fill(".edited", "w5 w9")
        page.click("text=Learn from this")
        page.wait_for_selector(".adapted .news:text-matches('published as version 1.$')")
        page.click("text=Undo")
        page.wait_for_selector(".adapted .news:text-is('Undone: version 2 is as it was before.')")
        page.click("text=Undo")
        page.wait_for_selector(".adapted .news:text-is('Not undone: there is no version to go back to.')")
        page.click("text=History")
        page.wait_for_selector(".history[open] li >> nth=2")


def test_where_nothing_is_learned_there_is_nothing_to_judge(address, opened):
    page = opened(address)
    answered(page)
    assert page.locator(".actions button").count() == 0


def test_a_server_without_adapters_answers_with_the_plain_model(served, opened):
    with listening(make_app(Engine(served[0]), name="tiny")) as address:
        page = opened(address)
        page.evaluate("window.dispatchEvent(new Event('focus'))")
        answered(page)
        assert page.locator(".mixer .none").count() == 1
        assert texts(page) == [library(served)]


def test_the_page_has_all_in_itself():
    folder = Path(mb.__file__).parent / "report" / "pages"
    for name in ("chat.html", "chat.css", "chat.js", "chat_answer.js", "chat_server.js", "tokens.js"):
        text = (folder / name).read_text()
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\b| on[a-z]+=\"", text), (
            name
        )
