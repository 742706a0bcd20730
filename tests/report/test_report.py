"""`moe-bias report`: what it says against the records, its files, its page in a browser, and bad input."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.complaints import complaint
from helpers.inspections import SCRIPT
from helpers.reports import RECORDS, analysis, evaluation, policy, supervised, write
from moe_bias.cli import main
from moe_bias.evaluation.statistics import Estimate, with_interval
from moe_bias.mistakes import UserError
from moe_bias.records import RecordKind
from moe_bias.report.build import build
from moe_bias.report.content import Topic
from moe_bias.report.latex import escaped, latex
from moe_bias.report.markdown import markdown
from moe_bias.report.record import read_records
from moe_bias.report.table import Table


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory) -> Path:
    """The folder of the report of all of them."""
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", *map(str, runs), "--title", "All of <it>", "--output", str(folder)]) == 0
    return folder


class Reader(HTMLParser):
    """The page's text, what it would load, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.ids, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
        self.ids += [v for k, v in attributes if k == "id"]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_record_says_its_kind(tmp_path):
    said = write(tmp_path / "record.json", {"kind": "train rl", **supervised(), "right": {"trained": [1.0]}})
    assert [record.kind for record in read_records([said])] == [RecordKind.POLICY]
    for kind in ("train dpo", 5, ["train rl"], None):
        write(said, {"kind": kind, **supervised()})
        with pytest.raises(UserError, match="is no record that a report can be made of; those are"):
            read_records([said])


def test_what_was_called_a_fork_before_is_read_as_a_flip(tmp_path):
    now = analysis()
    now["adapters"][0]["answers"] = {"flips": [{"kl": 1.0}], "flips_high": 0.5, "unchanged": 3}
    text = json.dumps(now).replace('"flips', '"forks').replace("analysis 2", "analysis 1")
    (found,) = read_records([write(tmp_path / "analysis.json", json.loads(text))])
    assert found.content == {**now, "format": "moe-bias analysis 1"}
    (old,) = read_records([RECORDS / "analysis" / "products.json"])
    assert old.content["adapters"][0]["answers"]["flips"]


def test_kinds_of_records_that_do_not_say_it_are_told_by_what_is_in_them(runs):
    kinds = [record.kind for record in read_records(runs)]
    assert kinds == [
        *(RecordKind.SUPERVISED, RecordKind.POLICY, RecordKind.ARMS, RecordKind.CELLS),
        *(RecordKind.DEMO, RecordKind.EVALUATION, RecordKind.ANALYSIS, RecordKind.ANALYSIS, RecordKind.INSPECTION),
    ]


def test_page_is_one_small_file_that_loads_nothing(made):
    text = (made / "report.html").read_text()
    reader = Reader(text)
    assert len(text.encode()) < 5 * 2**20
    assert reader.loads == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(reader.ids) == len(set(reader.ids)), "an id stands once"
    assert "All of <it>" in reader.texts


def test_page_and_markdown_say_the_same_numbers(made):
    page, plain = "".join(Reader((made / "report.html").read_text()).texts), (made / "report.md").read_text()
    for number in (
        *("-0.391 [-0.409, -0.372]", "+12.5 [-10.0, +30.0]", "1,234", "64.0 [54.2, 72.7]", "0.964 [0.923, 1.009]"),
        *("74,754", "10.0%", "25.0%", "0.0200"),
    ):
        assert number in page, number
        assert number in plain.replace("\\[", "[").replace("\\]", "]"), number


def test_every_figure_and_table_has_its_files(made, runs):
    report = build(read_records(runs), "")
    topics = [topic for topic, _ in report.sections()]
    assert topics == list(Topic), "every topic has something to show"
    plots = re.findall(r"\(figures/([\w-]+)\.svg\)", (made / "report.md").read_text())
    assert len(plots) == len(set(plots)) > 15
    for name in plots:
        root = ET.parse(made / "figures" / f"{name}.svg").getroot()
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title")
        assert root[0].text
        assert (made / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    tables = [part for block in report.blocks for part in block.parts if isinstance(part, Table)]
    for table in tables:
        written = (made / "tables" / f"{table.name}.tex").read_text()
        assert written.count(r"\\") == len(table.rows) + 1


def test_text_of_a_model_is_text_everywhere(made):
    page = (made / "report.html").read_text()
    assert SCRIPT not in page
    assert SCRIPT in "".join(Reader(page).texts)
    assert SCRIPT not in (made / "report.md").read_text()


def test_cards_say_what_linear_experts_read(made):
    page, plain = Reader((made / "report.html").read_text()).texts, (made / "report.md").read_text()
    assert "reads, size 1.25" in page
    assert f"({SCRIPT!r})" in page
    assert "' read <b>'" in page
    assert "Tokens in brackets are off the support" in "".join(page)
    assert "size 1.25: leaning to ' read \\<b\\>', away from -, raises (" in plain


def test_the_same_records_give_the_same_files(runs, tmp_path):
    for folder in ("one", "two"):
        assert main(["report", str(runs[5]), "--output", str(tmp_path / folder)]) == 0
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 6


def test_what_a_record_lacks_is_not_told(tmp_path):
    bare = supervised()
    del bare["settings"], bare["provenance"]
    (record,) = read_records([write(tmp_path / "bare" / "record.json", bare)])
    text = markdown(build([record], ""))
    assert "Model: not recorded" in text
    assert "says neither settings nor provenance" in text
    assert "## Training" not in text
    table = Table.of_texts("t", "", ["a", "b"], [["1", ""], ["2", ""]]).without_empty_columns()
    assert (table.headings, table.cells) == (["a"], [["1"], ["2"]])
    assert with_interval(Estimate(0.5, float("nan"), float("nan")), "{:.1f}") == "0.5"


def test_the_cost_of_supervised_training_is_summed_over_its_steps(tmp_path):
    # 512 tokens at 256 tokens/s and 128 at 64: 640 tokens in 2 + 2 seconds; an evaluation before them costs none.
    path = write(tmp_path / "sft" / "record.json", supervised())
    lines = [{"step": 0, "held_out_nll": 1.3}, {"step": 1, "tokens": 512, "tokens_per_second": 256.0}]
    lines.append({"step": 2, "tokens": 128, "tokens_per_second": 64.0, "held_out_nll": 1.2})
    (path.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| sft | adapter | 640 | 4.0 |" in markdown(build(read_records([path.parent]), ""))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({**policy(), "right": {"trained": []}}, "is the record of a run without samples; there is nothing to report"),
        ({"rows": []}, "is the record of a run without samples; there is nothing to report"),
        ({**evaluation(), "arms": []}, "is the record of a run without samples; there is nothing to report"),
        ({"weight_map": {}}, "is no record that a report can be made of"),
        ([1], "is no record of a run: it holds no JSON object"),
    ],
)
def test_records_that_tell_nothing_are_refused(tmp_path, capsys, content, sentence):
    assert sentence in complaint(capsys, "report", str(write(tmp_path / "bad" / "record.json", content)))


def test_what_is_no_run_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no record of a run" in complaint(capsys, "report", str(empty))
    assert "is neither a folder nor a file" in complaint(capsys, "report", str(tmp_path / "nowhere"))
    write(empty / "run.json", {})
    assert "holds a run that is not finished" in complaint(capsys, "report", str(empty))
    (empty / "record.json").write_text('{"base_nll": ')
    assert "is damaged" in complaint(capsys, "report", str(empty))
    assert "arguments are required" in complaint(capsys, "report") or "runs" in complaint(capsys, "report")
    assert not Path("report").exists()


def test_records_of_different_models_are_refused(tmp_path, capsys):
    other = copy.deepcopy(supervised())
    other["settings"]["model"] = "Qwen/Qwen3-8B"
    paths = [write(tmp_path / name / "record.json", found) for name, found in (("one", supervised()), ("two", other))]
    sentence = complaint(capsys, "report", *map(str, paths))
    assert "'Qwen/Qwen3-8B'" in sentence
    assert "'bundled'" in sentence
    assert sentence.endswith("make a report of each model")


@given(st.text(alphabet="\\{}&%$#_~^<>|[]ab \n"))
def test_latex_leaves_no_special_letter(text):
    written = re.sub(r"\\(text\w+\{\}|[{}&%$#_])", "", escaped(text))
    assert not set(written) & set("\\{}&%$#_~^<>|\n")
    assert latex(Table.of_texts("t", "c", ["h"], [[text]])).count(r"\\") == 2


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(made, chromium, width, scheme):
    said = []
    page = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((made / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("[data-token='1']").hover()
    assert "2.500" in page.locator(".panel").inner_text()
    for summary in page.locator("details.table > summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("img").count() == 0
    ink = page.locator("figure svg text").first.evaluate("text => getComputedStyle(text).fill")
    assert (ink == "rgb(93, 102, 112)") == (scheme == "light"), "neutral colours follow the theme"
    assert said == []
    page.close()
