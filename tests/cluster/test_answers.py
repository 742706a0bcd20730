"""Answers by workers: those of one process, whoever dies; and what cannot be spread.

Workers are in this process here, as in `test_policy`.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

import moe_bias as mb
from helpers.complaints import complaint
from helpers.saved import save_adapter
from helpers.workers import LettersTask, WorkersHere
from moe_bias.cli import main
from moe_bias.cluster import answers
from moe_bias.config import Cluster
from moe_bias.mistakes import UserError

QUESTIONS = "--model model --data questions.jsonl --gold-column gold --device cpu --batch-size 9 --max-new-tokens 6"


@pytest.fixture
def ground(prepared_folder):
    save_adapter(prepared_folder / "adapter", str(prepared_folder / "model"))
    rows = [{"problem": f"w{5 + n} w6" + " w7" * (n % 5), "gold": str(n)} for n in range(11)]
    (prepared_folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return prepared_folder


@pytest.fixture
def here(monkeypatch):
    """Workers in this process; what may be set of them, and the last pool."""

    class Here:
        deadly, pool = (), None

        @contextmanager
        def opened(self, cluster, kind, given, device, folder=None, console=None):
            self.pool = WorkersHere(lambda: kind(*given), cluster.workers, self.deadly)
            yield self.pool

    found = Here()
    monkeypatch.setattr(answers, "opened", found.opened)
    return found


def samples(folder: str) -> list[str]:
    return sorted((Path(folder) / "samples.jsonl").read_text().splitlines())


def words(output: str, *more: str) -> list[str]:
    given = ["--adapter", "adapter", "--strength", "0.5,1", "--samples", "3", "--temperature", "0.8"]
    return ["eval", *QUESTIONS.split(), *given, "--output", output, *more]


@pytest.mark.usefixtures("ground", "grader")
def test_answers_are_those_of_one_process_whoever_dies(here, capsys):
    assert main(words("one")) == 0
    here.deadly = {3, 5}
    assert main(words("two", "--workers", "3")) == 0
    assert samples("one") == samples("two")
    assert len(samples("one")) == 11 * 3 * 3
    assert len({number for number, _ in here.pool.calls}) > 3
    tables = [json.loads((Path(name) / "record.json").read_text())["arms"] for name in ("one", "two")]
    assert tables[0] == tables[1]


@pytest.mark.usefixtures("ground", "grader")
def test_what_a_killed_run_kept_is_not_asked_again(here, monkeypatch, capsys):
    keep, kept = answers.Asker.keep, []

    def killed(self, names, batch, found, left):
        if len(kept) == 4:
            raise KeyboardInterrupt
        kept.append(batch)
        keep(self, names, batch, found, left)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Asker, "keep", killed)
        assert main(words("cut", "--workers", "2")) == 130
    assert "are kept in cut/samples.jsonl; the same command answers the others" in capsys.readouterr().err
    before = len(here.pool.calls)
    assert main(words("cut", "--workers", "2")) == 0
    assert len(here.pool.calls) == 11 - 4 < before + 11
    assert main(words("one")) == 0
    assert samples("cut") == samples("one")


def test_python_gets_the_same(ground, here):
    base = mb.load("model", device="cpu")
    layer = mb.load_layer("adapter", base)
    layer.strength = 0.7
    config = mb.EvalConfig(limit=7, max_new_tokens=6, batch_size=4, instruction="w9")
    given = ({"base": None, "mine": layer}, LettersTask(), config)
    alone = mb.evaluate(base, *given)
    spread = mb.evaluate(base, *given, cluster=mb.Cluster(workers=2))
    assert spread.scores == alone.scores
    assert sorted(map(str, spread.samples)) == sorted(map(str, alone.samples))
    assert here.pool.traffic.received < 7 * 3 * 400


def test_what_cannot_be_spread_is_refused_at_once(ground, capsys):
    from peft import LoraConfig, get_peft_model

    from helpers.models import tiny_model

    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
    said = complaint(capsys, *words("out", "--workers", "2", "--strength", "")[:-2], "--adapter", "lora")
    assert "changes the backbone" in said or "does not apply" in said
    spread = ["--endpoint", "http://127.0.0.1:9", "--endpoint-model", "a", "--workers", "2"]
    assert "--endpoint http://127.0.0.1:9 has a server answer; leave out --workers 2" in complaint(
        capsys, "eval", "--data", "questions.jsonl", "--output", "out", *spread
    )
    nameless = mb.Frozen(*_in_memory("model"))
    with pytest.raises(UserError, match="a model in memory without a name, which workers cannot load"):
        mb.evaluate(nameless, {"base": None}, LettersTask(), mb.EvalConfig(limit=2), cluster=Cluster(workers=2))


def _in_memory(folder):
    base = mb.load(folder, device="cpu")
    base.model.name_or_path = ""
    return base.model, base.tokenizer
