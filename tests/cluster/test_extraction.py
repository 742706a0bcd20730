"""Extraction by workers on several nodes: the same bytes whoever made them and whatever died, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")

from helpers.clusters import Machines, counted_bytes, kill_one, pids_of
from helpers.complaints import complaint, told
from helpers.saved import save_model
from helpers.stores import contents, corpus_of
from moe_bias.cli import main
from moe_bias.cluster.extraction import ShardsByWorkers
from moe_bias.cluster.model import named_model
from moe_bias.config import Cluster
from moe_bias.features.build import Choices, extract, make_plan
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.writer import StoreFolder
from moe_bias.frozen import Frozen, load
from moe_bias.mistakes import UserError

KIND = "ShardWorker"
WHOLE = {"support": 30, "keep_top": 0.7, "shard_tokens": 9, "batch_size": 4}


@pytest.fixture(scope="module")
def machines():
    found = Machines()
    found.add(2)
    found.add(2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Frozen:
    return load(save_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def plan(base):
    facts = model_facts(base.model, base.head, base.tokenizer)
    return make_plan(corpus_of(40), "rows.jsonl", facts, Choices(**WHOLE))


@pytest.fixture(scope="module")
def by_one(base, plan, tmp_path_factory):
    """The store's bytes, made by this process alone."""
    folder = tmp_path_factory.mktemp("one") / "store"
    extract(base.model, base.head, plan, folder)
    return contents(folder)


def make(base, plan, folder: Path, machines: Machines, workers: int) -> None:
    by = ShardsByWorkers(Cluster(workers=workers, ray=machines.address), named_model(base))
    extract(base.model, base.head, plan, folder, by)


def at_shards(monkeypatch, acts) -> None:
    """Acts once so many shards are listed."""
    enter, listed = StoreFolder.enter, []

    def entering(self, shard):
        enter(self, shard)
        listed.append(shard)
        acts.get(len(listed), lambda: None)()

    monkeypatch.setattr(StoreFolder, "enter", entering)


def test_the_bytes_are_those_of_one_process_and_no_hidden_state_travels(
    base, plan, by_one, tmp_path, machines, monkeypatch
):
    """However many workers make them; of a store with a damaged shard that one alone is made again."""
    folder = tmp_path / "store"
    with counted_bytes(monkeypatch) as carried:
        make(base, plan, folder, machines, 2)
    assert contents(folder) == by_one
    assert len(by_one) > 10
    hidden = plan.tokens * base.head.hidden_size * 4
    assert carried.received < hidden / 2 + 1000 * len(plan.shards), carried
    assert carried.most_sent < 20_000  # the model's facts, a support and the ids of a shard
    assert not pids_of(KIND)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    (folder / "shard-00003.safetensors").write_bytes(b"damaged")
    make(base, plan, folder, machines, 1)
    assert contents(folder) == by_one
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert {name for name in before if before[name] != after[name]} == {"shard-00003.safetensors"}


def test_shards_of_a_worker_and_of_a_node_that_died_are_made_again(base, plan, by_one, tmp_path, machines, monkeypatch):
    third = machines.add(1)
    at_shards(monkeypatch, {2: lambda: kill_one(KIND), 5: lambda: machines.kill(third)})
    make(base, plan, tmp_path / "store", machines, 5)
    assert contents(tmp_path / "store") == by_one


@pytest.mark.slow
def test_a_shard_over_which_workers_die_is_named(base, plan, tmp_path, machines, monkeypatch):
    monkeypatch.setattr("moe_bias.cluster.extraction._ids", lambda texts: {"rows": _Deadly()})
    monkeypatch.setattr("moe_bias.cluster.pool.MOST_LOSSES", 1)
    with pytest.raises(UserError, match=r"^shard \d+ ended 1 workers one after the other .*: lower `batch_size`"):
        make(base, plan, tmp_path / "store", machines, 1)


class _Deadly:
    """Ends whoever reads it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_full_disk_of_a_worker_is_told_with_what_is_whole(base, plan, tmp_path, machines):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(folder)], check=False).returncode:
        pytest.skip("no small file system can be mounted")
    try:
        with pytest.raises(UserError, match=r"the disk of '.*small' is full: \d+ of \d+ shards are whole"):
            make(base, plan, folder, machines, 1)
        listed = (folder / "unfinished.json").read_text()
        assert "shard-0000" in listed
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_node_with_another_version_is_refused_by_name(base, plan, tmp_path, machines):
    other = tmp_path / "moe_bias-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-bias\nVersion: 9.9\n")
    node = machines.add(1, PYTHONPATH=str(tmp_path))
    try:
        with pytest.raises(UserError, match=r"^node .* has 9\.9 moe-bias, here it is .*; install the same on all"):
            make(base, plan, tmp_path / "store", machines, 2)
        assert not list((tmp_path / "store").glob("shard-*"))
    finally:
        machines.kill(node)


def test_a_folder_that_a_node_does_not_see_is_named(base, plan, tmp_path, machines):
    """The node has the folder of another machine in its place."""
    with elsewhere(machines, tmp_path):
        sentence = r"^node .* does not see '.*store': what was written there from here is not there; give a folder"
        with pytest.raises(UserError, match=sentence):
            make(base, plan, tmp_path / "store", machines, 1)


@pytest.mark.slow
def test_a_model_that_workers_cannot_load_is_named_with_the_machine(base, plan, tmp_path, machines):
    by = ShardsByWorkers(Cluster(workers=1, ray=machines.address), replace(named_model(base), name="/absent"))
    sentence = r"^a worker on .* cannot begin: model '/absent' cannot be loaded"
    with pytest.raises(UserError, match=sentence):
        extract(base.model, base.head, plan, tmp_path / "store", by)


def test_a_model_of_this_name_with_other_weights_is_refused(base, tmp_path):
    """As a worker finds it where its machine has another one."""
    other = replace(named_model(base), name=save_model(tmp_path, architecture="llama-tied"))
    with pytest.raises(UserError, match=r"^model '.*' is another one here: its \w+ is "):
        other.loaded(on_gpu=False)


class elsewhere:  # noqa: N801 - reads as a block
    """A node of one core before whose eyes another, empty folder is."""

    def __init__(self, machines: Machines, hidden: Path) -> None:
        ray = Path(sys.executable).with_name("ray")
        start = f"{ray} start --address={machines.address} --num-cpus=1 --block --object-store-memory=80000000"
        self._words = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {hidden} && exec {start}"]
        self._address = machines.address

    def __enter__(self) -> None:
        if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
            pytest.skip("no mount namespace can be had")
        import ray

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        ray.init(self._address, log_to_driver=False, logging_level="CRITICAL")
        before, end = _alive(ray), time.monotonic() + 240
        self._process = subprocess.Popen(self._words, start_new_session=True, **quiet)
        while _alive(ray) <= before and time.monotonic() < end:
            time.sleep(0.2)
        came = _alive(ray) > before
        ray.shutdown()
        assert came, "the node has not joined"

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _alive(ray) -> int:
    return sum(node["Alive"] for node in ray.nodes())


def test_what_cannot_be_is_one_sentence(base, plan, tmp_path, machines):
    with pytest.raises(
        UserError, match=r"^`workers` 90 of 1 cores each are more than the \d nodes of the cluster have"
    ):
        make(base, plan, tmp_path / "store", machines, 90)
    with pytest.raises(UserError, match=r"no Ray cluster answers at `ray` '127\.0\.0\.1:9' \(Connection refused\)"):
        extract(
            base.model,
            base.head,
            plan,
            tmp_path / "store",
            ShardsByWorkers(Cluster(ray="127.0.0.1:9"), named_model(base)),
        )
    assert told(Cluster, workers=0) == told(Cluster, workers="0").replace("'0'", "0")
    assert "give a number from 1 up, or auto" in told(Cluster, workers="many")


def test_a_model_in_memory_has_no_name_to_load_it_by(base):
    nameless = Frozen(base.model, base.tokenizer)
    before, base.model.name_or_path = base.model.name_or_path, ""
    try:
        with pytest.raises(UserError, match="is a model in memory without a name, which workers cannot load"):
            named_model(nameless)
    finally:
        base.model.name_or_path = before


@pytest.mark.slow
@pytest.mark.usefixtures("prepared_folder")
def test_the_command_goes_on_where_a_killed_one_stopped(capsys):
    """On a cluster that starts by itself, whose processes end with the command."""
    words = [
        "extract",
        "--model",
        "model",
        "--data",
        "rows.jsonl",
        "--device",
        "cpu",
        "--support",
        "all",
        "--shard-tokens",
        "8",
    ]
    assert main([*words, "--output", "one"]) == 0
    command = [str(Path(sys.executable).with_name("moe-bias")), *words, "--output", "two", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(Path("two").glob("shard-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    workers = pids_of(KIND)
    process.kill()
    process.wait()
    assert workers
    assert not Path("two/manifest.json").exists()
    end = time.monotonic() + 60
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(Path("one")) == contents(Path("two"))
    assert "Ray" not in done.stdout + done.stderr
    assert "ray" not in done.stdout + done.stderr


def test_the_command_says_what_is_wrong_with_a_cluster_before_it_loads_a_model(prepared_folder, capsys):
    words = ["extract", "--model", "absent", "--data", "rows.jsonl", "--output", "out", "--ray", "nowhere"]
    assert complaint(capsys, *words).startswith("no Ray cluster answers at --ray 'nowhere' (an address is auto,")
