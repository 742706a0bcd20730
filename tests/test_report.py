"""`moe-bias report`: what it says against the records, its files, its page in a browser, and bad input."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.cli import main
from moe_bias.evaluation.statistics import Estimate
from moe_bias.mistakes import UserError
from moe_bias.records import RecordKind
from moe_bias.report.build import build
from moe_bias.report.content import Table, Topic, with_interval, without_empty_columns
from moe_bias.report.latex import escaped, latex
from moe_bias.report.markdown import markdown
from moe_bias.report.record import read_records
from test_cli import complaint
from test_inspector import ADAPTED, BASE, SCRIPT, inspection_of

RECORDS = Path(__file__).parent.parent / "records"
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
CHANGE = {"value": 0.125, "low": -0.1, "high": 0.3}
SETTINGS = {"settings": {"model": "bundled", "seed": 0}, "provenance": {"revision": "abc", "versions": {"torch": "2"}}}


def supervised() -> dict:
    return json.loads((RECORDS / "sft" / "gsm8k.json").read_text())


def policy() -> dict:
    accuracy = {"base": ESTIMATE, "start": ESTIMATE, "trained": {"value": 0.625, "low": 0.5, "high": 0.7}}
    position = {"step": 2, "sampled_tokens": 1234, "seconds": 5.0}
    return {"accuracy": accuracy, "change": CHANGE, "right": {"trained": [1.0, 0.0]}, "position": position, **SETTINGS}


def evaluation() -> dict:
    group = {"level": {"1": {"problems": 4, "accuracy": ESTIMATE}, "5": {"problems": 3, "accuracy": CHANGE}}}
    arm = {
        **{"name": "base", "parameters": None, "accuracy": ESTIMATE, "pass_at": {"2": ESTIMATE}, "majority": None},
        **{"tokens": ESTIMATE, "sampled_tokens": 77, "cut": 0.25, "failures": {"unparseable": 0.5}, "groups": group},
        "change": {},
    }
    adapted = {**arm, "name": "mine", "parameters": 74_754, "change": {"base": CHANGE}}
    problems = {"name": "amc23", "count": 7, "digest": "d"}
    protocol = {"samples": 2, "temperature": 0.6, "prompt_template": "{question}"}
    return {"problems": problems, "protocol": protocol, "arms": [arm, adapted], "seconds": 3.0, **SETTINGS}


def analysis() -> dict:
    means = dict.fromkeys(
        ("base_entropy", "adapted_entropy", "kl", "weight", "bias_mean", "flipped", "mended", "spoiled"), ESTIMATE
    )
    stratum = {"tokens": 80, "means": {**means, "log_prob_change": {"value": 0.1, "low": None, "high": None}}}
    stratum |= {"bias_max": 3.5, "expert_share": [0.75, 0.25], "expert_entropy": 0.56}
    moment = {"before": f"so {SCRIPT}\n", "token": {"id": 1, "text": SCRIPT}, "base_entropy": 2.5, "kl": 0.75}
    moment |= {"base_choice": {"id": 1, "text": " a"}, "adapted_choice": {"id": 2, "text": " b"}}
    flip = {**moment, "base_continuation": " a wrong way", "adapted_continuation": None}
    expert = {"high": 0.75, "low": 0.25, "from_high": 0.5, "contexts": [moment]}
    expert |= {"raised": [{"id": 1, "text": SCRIPT, "bias": 3.25}], "lowered": [{"id": 2, "text": " to", "bias": -8.5}]}
    moved = {"raised": [{"id": 9, "text": SCRIPT, "bias": 4.5, "acts": False}], "lowered": expert["lowered"]}
    leaning = {"toward": [{"id": 3, "text": " read <b>", "deviations": 5.25}], "away": []}
    linear = {**expert, "expert": 1, "norm": 2.0, "readings": [{"size": 1.25, **moved, **leaning}]}
    adapter = {
        **{"name": "mine", "num_experts": 2, "parameters": 10, "strata": {n: stratum for n in ("all", "high", "low")}},
        **{"histograms": {"base": [1, 5, 0], "adapted": [2, 4, 0]}, "overlap": ESTIMATE},
        "checkpoints": [{"step": step, "overlap": ESTIMATE, "kl": ESTIMATE} for step in (10, 20)],
        "mutual_information": {"stratum": {"nats": 0.02, "at_most": 0.5}},
        "expert_share_by_class": {"digit": [0.5, 0.5]},
        **{"experts": [{**expert, "expert": 0}, linear], "flips": [flip], "answers": None},
    }
    text = {"kind": "store", "name": "gsm8k", "tokens": 160, "rho": 0.2, "threshold": 1.75}
    edges = [0.0, 0.1, 1.0, 10.0]
    return {"format": "moe-bias analysis 2", "text": text, "entropy_edges": edges, "adapters": [adapter], **SETTINGS}


def write(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """A run of every kind, all of one model."""
    tmp_path = tmp_path_factory.mktemp("runs")
    rl = write(tmp_path / "rl" / "record.json", policy()).parent
    (rl / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "reward": 0.1 * step, "held_out_accuracy": 0.5}) + "\n" for step in range(4))
    )
    sample = {"question": SCRIPT, "completion": "8", "gold": "8", "outcome": "correct", "reward": 1.0}
    (rl / "samples.jsonl").write_text("".join(json.dumps({"step": step, **sample}) + "\n" for step in (1, 2, 2)))
    row = {"name": "lora", "parameters": 200, "seeds": 1, "sampled_tokens": 50, "seconds": 8.0, "peak_bytes": 2**30}
    row |= {"by_seed": [0.5], "gain": {"held out": CHANGE}}
    row |= {"accuracy": {"held out": ESTIMATE}, "change": {"base": CHANGE}}
    arms = [{**row, "name": "moe-bias", "parameters": 20, "seconds": 2.0}, row]
    compared = write(tmp_path / "compared" / "table.json", {"rows": arms}).parent
    part = {"arm": {"name": "lora", "curve": [[0, {"held out": 0.25}], [10, {"held out": 0.5}]]}, **SETTINGS}
    write(compared / "arms" / "lora-seed0.json", part)
    tokens = {"inspection": asdict(inspection_of(BASE, ADAPTED)), **SETTINGS}
    return [
        write(tmp_path / "sft" / "record.json", supervised()).parent,
        rl,
        compared,
        RECORDS / "defaults" / "gsm8k-arms.json",
        RECORDS / "demo" / "products.json",
        write(tmp_path / "measured" / "record.json", evaluation()).parent,
        write(tmp_path / "analysed" / "analysis.json", analysis()).parent,
        RECORDS / "analysis" / "products.json",
        write(tmp_path / "tokens.json", tokens),
    ]


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
    table = without_empty_columns(Table("t", "", ["a", "b"], [["1", ""], ["2", ""]]))
    assert (table.headings, table.rows) == (["a"], [["1"], ["2"]])
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
    assert latex(Table("t", "c", ["h"], [[text]])).count(r"\\") == 2


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
