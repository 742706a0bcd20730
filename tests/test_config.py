import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from helpers.complaints import told
from moe_bias.cli import settings_of
from moe_bias.commands import serve
from moe_bias.commands.learning_settings import LearnOptions
from moe_bias.commands.looking_settings import ChatSettings, GenerateSettings, ParamsSettings, ServeSettings
from moe_bias.commands.training_settings import ArmsSettings, DemoSettings, SweepSettings, TrainSFTSettings
from moe_bias.config import (
    OWN_SUPPORT,
    Config,
    EvalConfig,
    LayerConfig,
    LearnConfig,
    RLConfig,
    SFTConfig,
    check_support,
)
from moe_bias.mistakes import UserError
from moe_bias.variables import LayerVariables, from_variables


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder and no MOE_BIAS_ variables, so that only the test's own settings count."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("MOE_BIAS_")]:
        monkeypatch.delenv(name)
    return tmp_path


def read(words: str) -> Config:
    """The settings that a command of these words runs with."""
    return settings_of(words.split())[1]


def complaint(words: str) -> str:
    """The sentence that a user reads about a command."""
    with pytest.raises(UserError) as caught:
        read(words)
    return str(caught.value)


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
        ({"expert": 4}, "LayerConfig has no 'expert'; the nearest is 'experts'"),
        ({"zzz": 4}, f"LayerConfig has no 'zzz'; there are {', '.join(sorted(LayerConfig.model_fields))}"),
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
    config = LayerVariables(num_experts=3, top_k=1, entropy_gate=False).layer_config([7, 2])
    assert config == LayerConfig(num_experts=3, top_k=1, entropy_gate=False, support=(7, 2))


def test_a_config_in_python_reads_nothing_from_outside(folder, monkeypatch):
    (folder / "moe-bias.toml").write_text("[layer]\nnum_experts = 8\n[sft]\nepochs = 9\n")
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "6")
    assert (SFTConfig().num_experts, SFTConfig().epochs) == (4, 4)
    assert TrainSFTSettings(data="d", output="o").num_experts == 4


def test_a_config_is_frozen_and_refuses_names_that_it_lacks():
    with pytest.raises(ValidationError, match="frozen"):
        SFTConfig().epochs = 3
    assert told(SFTConfig, expert_rat=3.0) == "SFTConfig has no 'expert_rat'; the nearest is 'expert_rate'"
    assert told(RLConfig, temperature=0).startswith("temperature is 0: greedy answers are all alike")


def test_later_sources_win(folder, monkeypatch):
    command = "train sft --data d --output o"
    assert read(command).num_experts == 4
    (folder / "moe-bias.toml").write_text("[layer]\nnum_experts = 8\ntop_k = 3\nseed = 5\n")
    assert (read(command).num_experts, read(command).top_k) == (8, 3)
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "6")
    assert (read(command).num_experts, read(command).top_k) == (6, 3)
    assert read(f"{command} --num-experts 5").num_experts == 5


def test_a_name_means_what_its_section_says(folder):
    (folder / "moe-bias.toml").write_text("[sft]\nexpert_rate = 0.02\n[rl]\nexpert_rate = 1.0\n")
    assert read("train sft --data d --output o").expert_rate == 0.02
    assert read("sweep --data d --output o --grid epochs=1").expert_rate == 0.02
    assert read("train rl --output o").expert_rate == 1.0
    assert read("demo").expert_rate == 1.0


def test_a_commands_own_section_wins_over_those_of_its_parts(folder):
    (folder / "moe-bias.toml").write_text("[rl]\nsteps = 7\n[sampling]\ngroup = 8\n[compare]\nsteps = 3\n")
    assert (read("compare --output o").steps, read("compare --output o").group) == (3, 8)
    assert (read("train rl --output o").steps, read("train rl --output o").group) == (7, 8)


def test_options_of_learning_have_a_section_of_their_own(folder, monkeypatch):
    (folder / "moe-bias.toml").write_text(
        "[learn]\npasses = 7\nrho = 0.4\nanswers = 5\nanswers_minutes = 2\n[chat]\nlearn_rho = 0.5\n"
    )
    monkeypatch.setenv("MOE_BIAS_LEARN_STEP_KL", "0.3")
    found = read("chat --learn kept --learn-journal-size 1MiB")
    config = LearnConfig(passes=7, rho=0.5, step_kl=0.3, journal_size=2**20)
    assert (found.learn_config(), found.learn_answers, found.learn_answers_minutes) == (config, 5, 2)
    served = read("serve --engine transformers --adapters a --learn kept")
    assert (served.learn_passes, served.learn_rho) == (7, 0.4)
    assert serve.of_our_own(served).learn_config() == served.learn_config()
    assert complaint("chat") == (
        "--learn-passes 7 needs --learn, the folder that is learned in; give both "
        "(learn_passes comes from moe-bias.toml [learn])"
    )


def test_an_option_of_learning_is_of_no_use_without_it():
    for words in ("chat", "serve --adapters a", "serve --engine transformers --adapters a"):
        assert complaint(f"{words} --learn-replay 3").startswith("--learn-replay 3 needs --learn")
        assert complaint(f"{words} --learn-answers-memory 1GiB").startswith("--learn-answers-memory 1073741824 needs")
    assert complaint("chat --learn kept --learn-rho 2").startswith("learn_rho from --learn-rho is '2'")
    assert complaint("chat --learn kept --learn-answers 0").startswith("learn_answers from --learn-answers is '0'")


def test_a_server_that_learns_is_told_all_that_its_config_says():
    given = {name: field.default for name, field in LearnConfig.model_fields.items()}
    assert read("chat --learn kept").learn_config() == LearnConfig() == LearnConfig(**given)
    assert {f"learn_{name}" for name in LearnConfig.model_fields} < {*LearnOptions.model_fields}
    assert {*LearnOptions.model_fields} < {*ChatSettings.model_fields} & {*ServeSettings.model_fields}


def test_named_settings_file(folder, monkeypatch):
    (folder / "other.toml").write_text("[layer]\nnum_experts = 4\n")
    (folder / "moe-bias.toml").write_text("[layer]\nnum_experts = 8\n")
    monkeypatch.setenv("MOE_BIAS_CONFIG", "other.toml")
    assert read("demo").num_experts == 4


@pytest.mark.parametrize("text", ["0", "false", "no"])
def test_disabled_by_a_variable(text, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_ENABLED", text)
    assert from_variables(LayerVariables).enabled is False


def test_lists_are_written_with_commas(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "1,16")
    monkeypatch.setenv("MOE_BIAS_EXPERTS", "linear,free")
    assert read("params").num_experts == [1, 16]
    assert read("params").experts == ["linear", "free"]


def test_one_value_of_the_settings_file_is_a_list_of_one(folder):
    (folder / "moe-bias.toml").write_text('[params]\nnum_experts = 16\nexperts = "linear"\n')
    assert read("params").num_experts == [16]
    assert read("params").experts == ["linear"]


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
            "EASY",
            "perhaps",
            "easy from MOE_BIAS_EASY is 'perhaps': input should be a valid boolean, unable to interpret input",
        ),
    ],
)
def test_error_names_the_variable(name, value, sentence, monkeypatch):
    monkeypatch.setenv(f"MOE_BIAS_{name}", value)
    assert complaint("demo") == sentence


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ENABLED", "perhaps", "MOE_BIAS_ENABLED is 'perhaps': input should be a valid boolean"),
        ("TOP_K", "17", "top_k = 17 is more than num_experts = 4"),
    ],
)
def test_error_names_the_variable_of_the_four_line_use(name, value, sentence, monkeypatch):
    monkeypatch.setenv(f"MOE_BIAS_{name}", value)
    with pytest.raises(UserError, match=sentence):
        from_variables(LayerVariables)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MOE_BIAS_MODLE", "the nearest is MOE_BIAS_MODEL"),
        ("moe_bias_top_kk", "the nearest is MOE_BIAS_TOP_K"),
        ("MOE_BIAS_CACH", "the nearest is MOE_BIAS_CACHE"),
        ("MOE_BIAS_ENABLE", "the nearest is MOE_BIAS_ENABLED"),
        ("MOE_BIAS_", "unset it"),
        ("MOE_BIAS_ZZZZZZ", "unset it"),
    ],
)
def test_a_variable_that_no_command_reads_is_refused(name, sentence, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert complaint("params") == f"the variable {name} is none that moe-bias reads; {sentence}"


@pytest.mark.parametrize(
    "name", ["CONFIG", "CACHE", "NOTES", "ENABLED", "STRENGTH", "ADAPTERS", "ADAPTER_MEMORY", "SPOOL", "EPOCHS", "Seed"]
)
def test_variables_of_other_commands_and_of_code_without_a_command_are_known(name, folder, monkeypatch):
    (folder / "settings.toml").touch()
    monkeypatch.setenv(f"MOE_BIAS_{name}", str(folder / "settings.toml"))
    assert isinstance(read("params"), ParamsSettings)


def test_error_names_the_file_and_its_section(folder):
    (folder / "moe-bias.toml").write_text("[layer]\ntop_k = 0\n")
    assert complaint("demo") == "top_k from moe-bias.toml [layer] is 0: input should be greater than or equal to 1"


def test_error_names_the_option(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_TOP_K", "3")
    assert complaint("demo --top-k 0").startswith("top_k from --top-k is '0'")


def test_error_over_two_fields_names_where_each_came_from(folder, monkeypatch):
    (folder / "moe-bias.toml").write_text("[layer]\nnum_experts = 4\n")
    monkeypatch.setenv("MOE_BIAS_TOP_K", "5")
    assert complaint("demo") == (
        "top_k = 5 is more than num_experts = 4 "
        "(top_k comes from MOE_BIAS_TOP_K, num_experts comes from moe-bias.toml [layer])"
    )


def test_error_in_code_blames_no_variable(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_TOP_K", "2")
    assert told(LayerConfig, top_k=0) == "top_k is 0: input should be greater than or equal to 1"


def test_missing_option_is_named():
    assert complaint("sweep --output o --grid g") == "one of --data and --store is required"
    assert complaint("train sft --data d") == "--output is required"
    assert told(TrainSFTSettings, data="d") == "output is required"


def test_what_the_library_says_of_a_field_is_said_of_the_option_at_a_terminal():
    assert complaint("eval --output o") == "one of --benchmark, --data and --task is required"
    sentence = "--benchmark gsm8k and --task products exclude each other; give one"
    found = complaint("eval --output o --benchmark gsm8k --task products")
    assert found == f"{sentence} (benchmark comes from --benchmark, task comes from --task)"
    in_python = sentence.replace("--benchmark", "`benchmark`").replace("--task", "`task`")
    assert told(EvalConfig, benchmark="gsm8k", task="products") == in_python


def test_what_a_store_has_settled_is_refused_wherever_it_comes_from(folder):
    (folder / "moe-bias.toml").write_text("[data]\nmax_length = 64\n")
    found = complaint("train sft --store a,b --output o")
    assert found.endswith("with it (max_length comes from moe-bias.toml [data])")


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
        ("[layer]\nnum_expert = 4\n", "moe-bias.toml has the unknown key 'num_expert' in [layer]; the nearest is"),
        ("[rl]\nnum_experts = 4\ntop_k = 2\nepoch = 2", "moe-bias.toml has the unknown key 'epoch' in [rl]; the near"),
        ("[data]\nsteps = 4\n", "moe-bias.toml has the unknown key 'steps' in [data]; "),
        ("[layers]\ntop_k = 4\n", "moe-bias.toml has the unknown section 'layers'; the nearest is 'layer'"),
        ("gate_beta = 4\n", "moe-bias.toml has 'gate_beta' outside a section; write it below [arms] or [compare] or"),
        ("layer = 4\n", "moe-bias.toml has layer = 4, where [layer] is a section of options"),
        ("top_k = = 2\n", "moe-bias.toml is not valid TOML: "),
    ],
)
def test_bad_settings_file_is_refused(text, sentence, folder):
    (folder / "moe-bias.toml").write_text(text)
    assert complaint("demo").startswith(sentence)


def test_settings_file_that_is_not_text_is_refused(folder):
    (folder / "moe-bias.toml").write_bytes(b"top_k = \xff\n")
    assert complaint("demo").startswith("the settings file 'moe-bias.toml' cannot be read: 'utf-8' codec")


def test_missing_named_settings_file_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_CONFIG", "nowhere.toml")
    assert complaint("demo") == "MOE_BIAS_CONFIG names 'nowhere.toml', which is not a file"


@pytest.mark.parametrize("settings", [DemoSettings, TrainSFTSettings, GenerateSettings, ParamsSettings])
def test_every_option_is_described(settings: type[Config]):
    assert [name for name, field in settings.model_fields.items() if not field.description] == []


def test_settings_import_no_torch():
    code = "import sys, moe_bias.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("given", [{"split": "test"}, {"train_on": "all-turns"}, {"max_length": 64}])
def test_what_makes_examples_of_data_may_stand_beside_a_store_with_its_texts(given):
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} .* does not apply to --store"):
        ArmsSettings(output="out", store=["store"], **given)
    settings = ArmsSettings(output="out", store=["store"], data="rows.jsonl", **given)
    assert settings.model_dump().items() >= given.items()
    with pytest.raises(UserError, match="--batch-size 4 does not apply to --store"):
        ArmsSettings(output="out", store=["store"], data="rows.jsonl", batch_size=4)
