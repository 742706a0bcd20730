import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from moe_bias.config import (
    OWN_SUPPORT,
    ArmsSettings,
    DemoSettings,
    GenerateSettings,
    LayerConfig,
    LayerSettings,
    ParamsSettings,
    Settings,
    SweepSettings,
    TrainSFTSettings,
    UserError,
    check_support,
    describe_error,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder and no MOE_BIAS_ variables, so that only the test's own settings count."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("MOE_BIAS_")]:
        monkeypatch.delenv(name)
    return tmp_path


def told(settings: type, given: dict | None = None, **values) -> str:
    """The sentence that a user reads about these settings."""
    with pytest.raises(ValidationError) as caught:
        settings(**values, **(given or {}))
    return describe_error(caught.value, given)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 0}, "num_experts is 0: input should be greater than or equal to 1"),
        ({"top_k": 0}, "top_k is 0: input should be greater than or equal to 1"),
        ({"num_experts": 2, "top_k": 3}, "top_k = 3 is more than num_experts = 2"),
        ({"support": ()}, "support is empty; give at least one token id, or none at all for the whole vocabulary"),
        ({"support": (4, -1)}, "support id -1 is negative"),
        ({"support": (4, 5, 4)}, "support id 4 stands more than once"),
        ({"load_balance_weight": -0.1}, "load_balance_weight is -0.1: input should be greater than or equal to 0"),
        ({"load_balance_weight": float("inf")}, "load_balance_weight is inf: input should be a finite number"),
        ({"strength": float("nan")}, "strength is nan: input should be a finite number"),
        ({"expert": 4}, "expert is 4: extra inputs are not permitted"),
        ({"experts": "dense"}, "experts is 'dense': input should be 'free', 'directions' or 'linear'"),
        ({"expert_rank": 0}, "expert_rank is 0: input should be greater than or equal to 1"),
        (
            {"experts": "free", "reach": "vocabulary"},
            "reach = 'vocabulary' needs experts = 'directions' or 'linear': free entries are of the support alone",
        ),
    ],
)
def test_impossible_layers_are_refused_in_one_sentence(changes, sentence):
    assert told(LayerConfig, **changes) == sentence


def test_support_outside_the_vocabulary_is_refused():
    config = LayerConfig(experts="free", support=(0, 9))
    config.check_vocabulary(10)
    with pytest.raises(ValueError, match="support id 9 is outside the vocabulary of 9 tokens"):
        config.check_vocabulary(9)


def test_long_support_with_a_late_duplicate_is_refused_quickly():
    with pytest.raises(ValueError, match="support id 199999 stands more than once"):
        check_support([*range(200_000), 199_999])


def test_number_of_parameters():
    # E M + E D, and alpha and beta: 4 * 10 + 4 * 8 + 2 = 74; the whole vocabulary: 4 * 100 + 4 * 8 + 2 = 434.
    assert LayerConfig(experts="free", num_experts=4, support=tuple(range(10))).num_parameters(8, 100) == 74
    assert LayerConfig(experts="free", num_experts=4).num_parameters(8, 100) == 434
    assert LayerConfig(experts="free", num_experts=4, entropy_gate=False).num_parameters(8, 100) == 432


def test_layer_settings_describe_a_layer():
    config = LayerSettings(num_experts=3, top_k=1, entropy_gate=False).layer_config([7, 2])
    assert config == LayerConfig(num_experts=3, top_k=1, entropy_gate=False, support=(7, 2))


def test_later_sources_win(folder, monkeypatch):
    assert LayerSettings().num_experts == 4
    (folder / "moe-bias.toml").write_text("num_experts = 8\ntop_k = 3\nseed = 5\n")
    assert (LayerSettings().num_experts, LayerSettings().top_k) == (8, 3)
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "6")
    assert (LayerSettings().num_experts, LayerSettings().top_k) == (6, 3)
    assert LayerSettings(num_experts=5).num_experts == 5


def test_named_settings_file(folder, monkeypatch):
    (folder / "other.toml").write_text("num_experts = 4\n")
    (folder / "moe-bias.toml").write_text("num_experts = 8\n")
    monkeypatch.setenv("MOE_BIAS_CONFIG", "other.toml")
    assert LayerSettings().num_experts == 4


@pytest.mark.parametrize("text", ["0", "false", "no"])
def test_disabled_by_a_variable(text, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_ENABLED", text)
    assert LayerSettings().enabled is False


def test_lists_are_written_with_commas(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "1,16")
    monkeypatch.setenv("MOE_BIAS_EXPERTS", "linear,free")
    assert ParamsSettings().num_experts == [1, 16]
    assert ParamsSettings().experts == ["linear", "free"]


def test_one_number_of_the_settings_file_is_a_list_of_one(folder):
    (folder / "moe-bias.toml").write_text('num_experts = 16\nexperts = "linear"\n')
    assert ParamsSettings().num_experts == [16]
    assert ParamsSettings().experts == ["linear"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "NUM_EXPERTS",
            "0",
            "num_experts from MOE_BIAS_NUM_EXPERTS is '0': input should be greater than or equal to 1",
        ),
        ("TOP_K", "17", "top_k = 17 is more than num_experts = 4 (top_k comes from MOE_BIAS_TOP_K)"),
        (
            "LOAD_BALANCE_WEIGHT",
            "nan",
            "load_balance_weight from MOE_BIAS_LOAD_BALANCE_WEIGHT is 'nan': input should be a finite number",
        ),
        (
            "ENABLED",
            "perhaps",
            "enabled from MOE_BIAS_ENABLED is 'perhaps': input should be a valid boolean, unable to interpret input",
        ),
    ],
)
def test_error_names_the_variable(name, value, sentence, monkeypatch):
    monkeypatch.setenv(f"MOE_BIAS_{name}", value)
    assert told(LayerSettings) == sentence


def test_error_names_the_file(folder):
    (folder / "moe-bias.toml").write_text("top_k = 0\n")
    assert told(LayerSettings) == "top_k from moe-bias.toml is 0: input should be greater than or equal to 1"


def test_error_names_the_option(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_TOP_K", "3")
    assert told(LayerSettings, {"top_k": "0"}).startswith("top_k from --top-k is '0'")


def test_error_over_two_fields_names_where_each_came_from(folder, monkeypatch):
    (folder / "moe-bias.toml").write_text("num_experts = 4\n")
    monkeypatch.setenv("MOE_BIAS_TOP_K", "5")
    assert told(LayerSettings) == (
        "top_k = 5 is more than num_experts = 4 (top_k comes from MOE_BIAS_TOP_K, num_experts comes from moe-bias.toml)"
    )


def test_error_in_code_blames_no_variable(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_TOP_K", "2")
    assert told(LayerConfig, top_k=0) == "top_k is 0: input should be greater than or equal to 1"


def test_missing_option_is_named():
    assert told(SweepSettings, output="o", grid="g") == "one of --data and --store is required"
    assert told(TrainSFTSettings, data="d") == "--output is required"


def test_what_a_store_has_settled_is_refused_wherever_it_comes_from(folder):
    (folder / "moe-bias.toml").write_text("max_length = 64\n")
    assert told(TrainSFTSettings, store="a,b", output="o").endswith("with it (max_length comes from moe-bias.toml)")


@pytest.mark.parametrize("cls", [TrainSFTSettings, SweepSettings, ArmsSettings])
def test_a_support_that_is_not_given_is_the_stores_own(cls):
    given = {"output": "o", "grid": "g"} if cls is SweepSettings else {"output": "o"}
    assert cls(store="s", **given).support == OWN_SUPPORT
    assert cls(store="s", support="all", **given).support == "all"
    assert cls(data="d", **given).support == "auto:4096"


def test_features_are_kept_or_not():
    sentence = "--features f and --no-keep-features exclude each other; give one"
    assert told(TrainSFTSettings, data="d", output="o", features="f", keep_features=False) == sentence


def test_stores_are_listed_with_commas():
    assert TrainSFTSettings(store="part-1,part-2", output="o").store == ["part-1", "part-2"]
    assert TrainSFTSettings(data="d", output="o").store is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("num_expert = 4\n", r"unknown key 'num_expert' in moe-bias\.toml; known keys are .*num_experts"),
        ("top_k = = 2\n", r"moe-bias\.toml is not valid TOML: "),
    ],
)
def test_bad_settings_file_is_refused(text, sentence, folder):
    (folder / "moe-bias.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        LayerSettings()


def test_settings_file_that_is_not_text_is_refused(folder):
    (folder / "moe-bias.toml").write_bytes(b"top_k = \xff\n")
    with pytest.raises(UserError, match=r"the settings file 'moe-bias\.toml' cannot be read: 'utf-8' codec"):
        LayerSettings()


def test_missing_named_settings_file_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_CONFIG", "nowhere.toml")
    with pytest.raises(UserError, match=r"MOE_BIAS_CONFIG names 'nowhere\.toml', which is not a file"):
        LayerSettings()


@pytest.mark.parametrize("settings", [DemoSettings, TrainSFTSettings, GenerateSettings, ParamsSettings])
def test_every_option_is_described(settings: type[Settings]):
    assert [name for name, field in settings.model_fields.items() if not field.description] == []


def test_settings_import_no_torch():
    code = "import sys, moe_bias.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("given", [{"split": "test"}, {"train_on": "all-turns"}, {"max_length": 64}])
def test_what_makes_examples_of_data_may_stand_beside_a_store_with_its_texts(given):
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(ValidationError, match=f"--{name} .* does not apply to --store"):
        ArmsSettings(output="out", store=["store"], **given)
    settings = ArmsSettings(output="out", store=["store"], data="rows.jsonl", **given)
    assert settings.model_dump().items() >= given.items()
    with pytest.raises(ValidationError, match="--batch-size 4 does not apply to --store"):
        ArmsSettings(output="out", store=["store"], data="rows.jsonl", batch_size=4)
