"""What only some uses need is named, with the extra that brings it, where it is missing."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from moe_bias.commands.looking_settings import ChatSettings, ReportSettings
from moe_bias.config import Cluster
from moe_bias.extras import EXTRA_OF, need
from moe_bias.mistakes import UserError

SRC = Path(__file__).parent.parent / "src" / "moe_bias"
PROJECT = tomllib.loads((SRC.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}


def of_data() -> None:
    from moe_bias.tasks.rows import read_rows

    read_rows("openai/gsm8k", "train")


def of_benchmarks() -> None:
    from moe_bias.tasks.mathematics import data_task

    data_task("problems.jsonl")


def of_procedural() -> None:
    from moe_bias.tasks.catalogue import make_task

    make_task("products", {}).problems(2, 0)


def of_report() -> None:
    from moe_bias.commands import report

    report.run(ReportSettings(runs=["run"], output="out"))


def of_endpoint() -> None:
    from moe_bias.rollout.endpoint import openai_client

    openai_client("http://localhost", 1, 1)


def of_comparison() -> None:
    from moe_bias.experiments.grpo_trainer import check_trl

    check_trl()


def of_harness() -> None:
    from moe_bias.commands import harness

    harness.run(["ls", "tasks"])


def of_serving() -> None:
    from moe_bias.rollout.engines import refuse_without_vllm

    refuse_without_vllm()


def of_chat() -> None:
    from moe_bias.commands import chat

    chat.run(ChatSettings())


def of_labels() -> None:
    from moe_bias.experiments.label_arms import chosen_penalty

    chosen_penalty(None, 2)


def of_cluster() -> None:
    from moe_bias.cluster.connection import refuse_unusable

    refuse_unusable(Cluster(workers=2))


USES = {
    "datasets": of_data,
    "math_verify": of_benchmarks,
    "reasoning_gym": of_procedural,
    "matplotlib": of_report,
    "openai": of_endpoint,
    "ray": of_cluster,
    "trl": of_comparison,
    "sklearn": of_labels,
    "lm_eval": of_harness,
    "uvicorn": of_chat,
    "vllm": of_serving,
}


@pytest.mark.parametrize("module", USES)
def test_what_is_missing_is_named_with_its_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package, extra = module.replace("_", "-"), re.escape(f"pip install 'moe-bias[{EXTRA_OF[module]}]'")
    with pytest.raises(UserError, match=f"^[^.]* needs {package}, which is not installed: {extra}"):
        USES[module]()


def test_a_folder_of_the_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "absent_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRA_OF, "absent_package", "some")
    with pytest.raises(UserError, match="reading needs absent-package, which is not installed"):
        need("absent_package", "reading")


def test_every_extra_brings_what_it_is_named_for():
    extras = PROJECT["optional-dependencies"]
    brought = names([requirement for extra in EXTRA_OF.values() for requirement in extras[extra]])
    assert EXTRA_OF.keys() - {"pandas", "sklearn"} <= brought  # pandas comes with datasets
    assert "scikit_learn" in brought  # which is imported as sklearn
    assert not names(PROJECT["dependencies"]) & EXTRA_OF.keys()
    assert set(re.findall(r"[\w-]+", extras["all"][0])) == {"moe-bias", *extras.keys()} - {"all", "vllm"}


def test_nothing_that_an_extra_brings_is_imported_with_a_file_of_ours():
    """Within functions alone, but in the rooms of the two servers and of TRL, the grader's scorers and the figures."""
    first = re.compile(rf"^(?:from|import) ({'|'.join(EXTRA_OF)})\b", re.MULTILINE)
    found = {str(path.relative_to(SRC)) for path in SRC.rglob("*.py") if first.search(path.read_text(encoding="utf-8"))}
    elsewhere = {path for path in found if not path.startswith(("serving/", "server/", "trl/"))}
    assert elsewhere == {"tasks/equality.py", "report/content.py", "report/figures.py"}
