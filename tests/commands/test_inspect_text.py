"""`moe-bias inspect-text` on a tiny model: the page's numbers against the model run the plain way."""

import pytest
import torch

from helpers.complaints import complaint
from helpers.models import VOCABULARY
from helpers.saved import save_adapter, save_model
from moe_bias.analysis.inspection import read_inspection, shared_length
from moe_bias.analysis.readings import read_tokens
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.commands.inspect_text import coloured, harmless
from moe_bias.config import ModelConfig
from moe_bias.frozen import load_model
from moe_bias.tasks.conversations import ask, encode_prompt
from moe_bias.training.problems import saved_layer

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def saved(folder):
    model = save_model(folder / "model")
    return model, save_adapter(folder / "adapter", model)


def inspected(saved, *options):
    model, adapter = saved
    arguments = ["inspect-text", "--model", model, "--adapter", adapter, "--prompt", "w11 w6", "--device", "cpu"]
    assert main([*arguments, "--max-new-tokens", "12", *options]) == 0


def test_page_and_record_hold_both_answers(saved, folder, capsys):
    inspected(saved, "--output", "pages/tokens.html", "--top", "3")
    found = read_inspection(folder / "pages" / "tokens.json")
    base, adapted = found.answers
    assert (base.name, adapted.name) == ("base", "adapted")
    alike = shared_length([base.tokens, adapted.tokens])
    assert base.tokens[:alike] == adapted.tokens[:alike]
    for answer, side in ((base, "base"), (adapted, "adapted")):
        for token in answer.tokens:
            likeliest = getattr(token, side)
            assert len(likeliest) == 3
            assert likeliest[0][0] == token.text, "the answer is greedy"
            assert token.flip == (token.base[0][0] != token.adapted[0][0])
            assert sum(share for _, share in token.experts) == pytest.approx(1)
    every = [token.entropy for answer in found.answers for token in answer.tokens]
    assert sum(entropy >= found.threshold for entropy in every) >= 0.2 * len(every)
    assert "w11 w6" in (folder / "pages" / "tokens.html").read_text()
    printed = capsys.readouterr().out
    assert "largest KL" in printed
    assert "pages/tokens.html" in printed


def test_numbers_are_those_of_the_readings(saved, folder):
    inspected(saved)
    found = read_inspection(folder / "tokens.json").answers[1]
    model, tokenizer = load_model(ModelConfig(model=saved[0], device="cpu"))
    head, prompt = find_head(model)[1], encode_prompt(ask("w11 w6"), tokenizer)
    written = torch.tensor([token.id for token in found.tokens])
    with torch.no_grad():
        states = model(torch.cat([torch.tensor(prompt), written])[None], output_hidden_states=True).hidden_states[-1][0]
    readings = read_tokens(saved_layer(saved[1], head).layer, head, states[len(prompt) - 1 : -1], written)
    for name, values in (("entropy", readings.base_entropy), ("kl", readings.kl), ("weight", readings.weight)):
        ours = torch.tensor([getattr(token, name) for token in found.tokens], dtype=torch.float64)
        torch.testing.assert_close(ours, values.double(), rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_vocabulary_has_are_all_of_it(saved, folder):
    inspected(saved, "--top", "1000", "--max-new-tokens", "1")
    assert len(read_inspection(folder / "tokens.json").answers[0].tokens[0].base) == VOCABULARY


def test_mistakes_are_told_in_a_sentence(saved, folder, capsys):
    model, adapter = saved
    asked = ["inspect-text", "--model", model, "--prompt", "w3"]
    assert complaint(capsys, *asked) == "--adapter is required"
    assert complaint(capsys, *asked, "--adapter", model) == (
        f"{model!r} has no adapter_config.json: it is not a saved adapter"
    )
    assert "a page's name ends in .html" in complaint(capsys, *asked, "--adapter", adapter, "--output", "page.txt")
    plain = save_model(folder / "plain", chat_template=None)
    assert "pass --no-chat" in complaint(
        capsys, "inspect-text", "--model", plain, "--prompt", "w3", "--adapter", adapter, "--device", "cpu"
    )


def test_a_terminal_is_told_nothing_that_it_would_obey():
    assert harmless("\x1b[2J 7 × 8\n\u202e") == "\\x1b[2J 7 × 8\n\\u202e"
    assert coloured([], 1.0, 0.0).plain == ""
