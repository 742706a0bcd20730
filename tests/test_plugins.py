"""What users bring: by object, as module:name, by entry points of real packages, and by name."""

import sys

import pytest

from moe_bias.mistakes import UserError
from moe_bias.plugins import Kind, installed, is_brought, label, resolve

THING = object()
SPELLS = Kind("spell", {"fireball": THING})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of spells; nothing of it is left in the interpreter."""
    (tmp_path / "own_spells.py").write_text("class Frost:\n    ray = 'a ray'\n\n\ndef storm(): ...\n")
    (tmp_path / "broken_spells.py").write_text("1 / 0\n")
    (tmp_path / "leaving_spells.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_spells", "broken_spells", "leaving_spells"):
        sys.modules.pop(name, None)


@pytest.fixture
def install(folder):
    """Installs a package whose metadata has these entry points of spells."""

    def write(package: str, *points: str) -> None:
        metadata = folder / "site" / f"{package}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("\n".join(["[moe_bias.spells]", *points]) + "\n")
        if str(metadata.parent) not in sys.path:
            sys.path.insert(0, str(metadata.parent))
        sys.path.insert(0, str(folder))

    return write


def test_an_object_is_itself(folder):
    assert resolve(SPELLS, THING) is THING


def test_a_name_that_is_built_in():
    assert resolve(SPELLS, "fireball") is THING


def test_a_name_of_a_file_in_the_current_folder(folder):
    assert resolve(SPELLS, "own_spells:Frost").__name__ == "Frost"
    assert resolve(SPELLS, "own_spells:Frost.ray") == "a ray"


def test_a_module_written_after_the_folder_was_looked_through(folder):
    resolve(SPELLS, "own_spells:storm")
    (folder / "later_spells.py").write_text("LATER = 1\n")
    assert resolve(SPELLS, "later_spells:LATER") == 1
    sys.modules.pop("later_spells")


def test_a_name_that_a_package_has(install):
    install("grimoire", "frost = own_spells:Frost")
    assert resolve(SPELLS, "frost").__name__ == "Frost"
    assert list(installed(SPELLS)) == ["frost"]
    assert is_brought(SPELLS, "frost")
    assert not is_brought(SPELLS, "fireball")


def test_what_is_built_in_comes_before_what_a_package_has(install):
    install("grimoire", "fireball = own_spells:Frost")
    assert resolve(SPELLS, "fireball") is THING


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "firebal",
            "there is no spell 'firebal', looked for among 4 of installed packages (entry points 'moe_bias.spells') "
            "and the built-in fireball; did you mean 'fireball'? one of your own is given as module:name",
        ),
        ("forst", "there is no spell 'forst', looked for among 4 of installed packages (entry points 'moe_bias"),
        ("own_spells:", "'own_spells:' does not name a spell; write it as module:name"),
        (":Frost", "':Frost' does not name a spell; write it as module:name"),
        ("own_spells:frost", "'own_spells:frost': own_spells has no frost; did you mean 'Frost'?"),
        ("own_spells:Frost.way", "'own_spells:Frost.way': own_spells has no Frost.way; did you mean 'ray'?"),
        (
            "own_spell:Frost",
            "'own_spell:Frost' cannot be imported: ModuleNotFoundError: No module named 'own_spell'; did you mean "
            "'own_spells'?",
        ),
        ("broken_spells:f", "'broken_spells:f' cannot be imported: ZeroDivisionError: division by zero"),
        ("leaving_spells:f", "'leaving_spells:f' cannot be imported: SystemExit: 3"),
        ("a b:f", "'a b:f' cannot be imported: ModuleNotFoundError: No module named 'a b'"),
        ("..:f", "'..:f' cannot be imported: TypeError: "),
        ("hail", "spell 'hail' of grimoire (broken_spells:hail) cannot be had: ZeroDivisionError: division by zero"),
        ("rain", "spell 'rain' of grimoire (no_such_package.rain:rain) cannot be had: ModuleNotFoundError: No module"),
        ("gale", "spell 'gale' of grimoire (own_spells:gale) cannot be had: AttributeError: "),
        ("frost", "several installed packages have a spell 'frost'; give the one you mean, of 'own_spells:"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(install, given, sentence):
    install("grimoire", *(f"{name} = {value}" for name, value in POINTS.items()))
    install("almanac", "frost = own_spells:storm")
    with pytest.raises(UserError) as refused:
        resolve(SPELLS, given)
    assert str(refused.value).startswith(sentence)


POINTS = {
    "frost": "own_spells:Frost",
    "hail": "broken_spells:hail",
    "rain": "no_such_package.rain:rain",
    "gale": "own_spells:gale",
}


def test_labels():
    assert label("a:b") == "a:b"
    assert label(test_labels) == f"{__name__}:test_labels"
    assert label(SPELLS) == "moe_bias.plugins:Kind"
