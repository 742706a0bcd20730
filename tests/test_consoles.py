"""Consoles that are not UTF-8: what they cannot show is written as escapes, and nothing ends in a traceback."""

import io
import sys

import pytest
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.models import VOCABULARY, tiny_model
from helpers.saved import SUPPORT, save_adapter
from moe_bias import cli
from moe_bias.commands import params
from moe_bias.commands.demo_report import report_console
from moe_bias.progress import meter, say, text_console
from moe_bias.tasks.grader import Grader

pytestmark = pytest.mark.usefixtures("folder")
ENCODINGS = ["ascii", "cp1252", "cp437", "latin-1", "cp932", "utf-8"]
TEXTS = "ĠŤ 日本 ✓ \u2212 \U0001f600 é \udce9 ─"


@pytest.fixture
def words(folder):
    """A model whose tokens are letters of many scripts, with an adapter on it."""
    letters = {f"{chr(0x3042 + token)}é✓": token for token in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(letters, unk_token=min(letters)))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=[*letters][2], pad_token=min(letters))
    tokenizer.save_pretrained(folder / "model")
    tiny_model("llama").save_pretrained(folder / "model")
    save_adapter(folder / "adapter", str(folder / "model"))
    return [*letters]


def told(monkeypatch, encoding: str, *arguments: str) -> tuple[int, str]:
    """The exit code of a command on a console of this encoding, and what that showed, errors last."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = cli.main(arguments)
    monkeypatch.undo()
    return code, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "command",
    [
        "inspect adapter",
        "generate あé✓ --model model --adapter adapter --no-chat --max-new-tokens 3 --compare --device cpu",
        "inspect-text --adapter adapter --model model --prompt あé✓ --no-chat --max-new-tokens 3 --device cpu",
        "params --model model",
    ],
)
def test_tables_and_tokens_are_shown_on_any_console(command, encoding, words, monkeypatch):
    code, shown = told(monkeypatch, encoding, *command.split())
    assert code == 0
    assert "Traceback" not in shown
    first = words[SUPPORT[0]][0]
    assert command.startswith("params") or "✓".encode(encoding, "backslashreplace").decode(encoding) in shown
    if command == "inspect adapter":
        assert first.encode(encoding, "backslashreplace").decode(encoding)[:3] in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sentences_tables_and_bars_are_shown_on_any_console(encoding, monkeypatch):
    def show(settings):
        table = Table("column", title=TEXTS)
        table.add_row(Text(TEXTS))
        report_console().print(table)
        say(text_console(), TEXTS)
        with meter(TEXTS, 3, "tokens") as bar:
            bar.note(TEXTS)
            bar.say(TEXTS)
            bar.advance(3)

    monkeypatch.setattr(params, "run", show)
    code, shown = told(monkeypatch, encoding, "params")
    assert code == 0
    assert shown.count(TEXTS.encode(encoding, "backslashreplace").decode(encoding)) >= 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mistake_is_a_sentence_on_any_console(encoding, folder, monkeypatch):
    code, shown = told(monkeypatch, encoding, "inspect", "日本✓")
    assert code == 2
    name = "日本✓".encode(encoding, "backslashreplace").decode(encoding)
    assert shown.startswith(f"moe-bias: '{name}' is neither a folder nor an adapter")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_graders_process_is_given_whole_texts_whatever_the_locale(encoding, monkeypatch):
    for name, value in {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    grader = Grader(limit=10.0, workers=1)
    cases = [{"gold": "12", "completion": f"é 日本 ✓. The answer is {said}."} for said in (12, 13)]
    try:
        verdicts = grader.grade("mathematics", cases)
    finally:
        grader.close()
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]
