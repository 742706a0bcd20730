"""Adapters in a served folder: versions, replacement, damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.models import HIDDEN, VOCABULARY, randomise, tiny_model
from moe_bias.adapter.embedding import embedding_sample
from moe_bias.adapter.files import save_layer
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.serving import versions
from moe_bias.serving.versions import AdapterFolder, read_version


def write(folder, seed=1, hidden=HIDDEN, **choices):
    layer = MoEBiasLayer(LayerConfig(**{"experts": "free", "num_experts": 3, **choices}), hidden, VOCABULARY)
    randomise(layer, seed=seed)
    save_layer(layer, folder, tiny_model())
    return layer


@pytest.fixture
def served(tmp_path):
    """A folder with two adapters, as a server sees it."""
    write(tmp_path / "adapters" / "one")
    write(tmp_path / "adapters" / "two", seed=2)
    return AdapterFolder(tmp_path / "adapters", tmp_path / "versions", HIDDEN, VOCABULARY)


def test_names_are_the_folders_that_hold_a_config(served, tmp_path):
    (tmp_path / "adapters" / "empty").mkdir()
    (tmp_path / "adapters" / ".hidden").mkdir()
    shutil.copy(tmp_path / "adapters" / "one" / "adapter_config.json", tmp_path / "adapters" / ".hidden")
    assert served.names() == ["one", "two"]


def test_a_version_is_the_layer_that_was_saved(served, tmp_path):
    layer = write(tmp_path / "adapters" / "one", seed=5, support=(3, 9, 40), strength=0.5)
    read = read_version(served.version("one"), HIDDEN, VOCABULARY)
    assert read.config == layer.config
    for name, tensor in layer.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_a_version_outlives_its_files(served, tmp_path):
    before = served.version("one")
    kept = {file.name: file.read_bytes() for file in before.iterdir()}
    write(tmp_path / "adapters" / "one", seed=7)
    after = served.version("one")
    shutil.rmtree(tmp_path / "adapters" / "one")
    assert after != before
    assert {file.name: file.read_bytes() for file in before.iterdir()} == kept


def test_the_same_files_are_the_same_version_under_any_name(served, tmp_path):
    shutil.copytree(tmp_path / "adapters" / "one", tmp_path / "adapters" / "three")
    assert served.version("one") == served.version("three") == served.version("one")
    assert served.version("one") != served.version("two")


def test_files_are_read_once_until_they_change(served, monkeypatch):
    first = served.version("one")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
    assert served.version("one") == first


def test_versions_that_nobody_asks_for_any_more_go(served, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(versions.time, "monotonic", lambda: now[0])
    made = []
    for seed in range(3):
        write(tmp_path / "adapters" / "one", seed=seed)
        made.append(served.version("one"))
        served.version("two")
        now[0] += 2000
    assert [version.is_dir() for version in made] == [False, True, True]
    assert served.version("two").is_dir()


@pytest.mark.parametrize("name", ["three", "../adapters/one", "one/", ".", "", "/etc"])
def test_unknown_names_are_refused_with_those_there_are(served, name):
    with pytest.raises(UserError, match=r"there is no adapter .* on this server; there is 'one'"):
        served.version(name)


def test_an_adapter_of_another_model_is_refused(served, tmp_path):
    write(tmp_path / "adapters" / "wide", hidden=HIDDEN + 1)
    with pytest.raises(
        UserError, match=rf"'wide' cannot be served: .*hidden_size {HIDDEN + 1}, the model has {HIDDEN}"
    ):
        served.version("wide")


def sample_of(model):
    return embedding_sample(find_head(model)[1].rows, HIDDEN, VOCABULARY)


def test_an_adapter_of_another_embedding_of_the_same_sizes_is_refused_where_the_engines_is_known(tmp_path):
    write(tmp_path / "adapters" / "one", experts="linear")
    other = tiny_model()
    torch.nn.init.normal_(other.lm_head.weight)
    for known, fits in ((None, True), (sample_of(tiny_model()), True), (sample_of(other), False)):
        served = AdapterFolder(
            tmp_path / "adapters", tmp_path / "versions", HIDDEN, VOCABULARY, lambda known=known: known
        )
        if fits:
            assert served.version("one").is_dir()
        else:
            with pytest.raises(UserError, match="'one' cannot be served: this adapter was made on another output"):
                served.version("one")


def test_an_adapter_on_a_quantised_copy_is_served_with_a_warning(tmp_path):
    write(tmp_path / "adapters" / "one", experts="linear")
    sample = sample_of(tiny_model())
    step = sample.abs().max() / 7
    near = (sample / step).round() * step
    served = AdapterFolder(tmp_path / "adapters", tmp_path / "versions", HIDDEN, VOCABULARY, lambda: near)
    with pytest.warns(UserWarning, match="may be a quantised copy"):
        assert served.version("one").is_dir()


def test_a_version_read_for_a_model_has_the_models_rows(served, tmp_path):
    head = find_head(tiny_model())[1]
    made = write(tmp_path / "adapters" / "one", experts="linear", free_entries=True, support=(3, 9, 40))
    made.embedding = head.rows
    read = read_version(served.version("one"), HIDDEN, VOCABULARY, head.rows)
    with torch.no_grad():
        torch.testing.assert_close(read.table(), made.table())


def damage_sample(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "embedding_sample": "none"}))


def damage_weights(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def damage_config(folder):
    (folder / "adapter_config.json").write_text("{")


def name_another_method(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NONE_SUCH"}))


def empty_config(folder):
    (folder / "adapter_config.json").write_text("[]")


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage", [damage_weights, damage_config, damage_sample, name_another_method, empty_config, remove_weights]
)
def test_damage_is_refused_until_it_is_mended(tmp_path, damage):
    for seed, name in ((1, "one"), (2, "two")):
        write(tmp_path / "adapters" / name, seed=seed)
    sample = sample_of(tiny_model())
    served = AdapterFolder(tmp_path / "adapters", tmp_path / "versions", HIDDEN, VOCABULARY, lambda: sample)
    good = served.version("one")
    backup = shutil.copytree(tmp_path / "adapters" / "one", tmp_path / "backup")
    damage(tmp_path / "adapters" / "one")
    for _ in range(2):
        with pytest.raises(UserError, match="'one' cannot be served"):
            served.version("one")
    assert served.version("two").is_dir()
    shutil.copytree(backup, tmp_path / "adapters" / "one", dirs_exist_ok=True)
    assert served.version("one") == good


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'.*absent', where adapters are to be served from, is not a folder"):
        AdapterFolder(tmp_path / "absent", tmp_path / "versions", HIDDEN, VOCABULARY)
