"""What an adapter's model card says of each kind of experts."""

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from moe_bias import MoEBiasConfig
from moe_bias.adapter import save_layer
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig

SUPPORT = [3, 5, 8, 40, 96]
OWN = "a bias of its own for each token of the support"
DIRECTION = "a direction in the space of the output embedding"
DEPENDS = "which depends on the hidden state with rank 3"


def card_of(tmp_path, **choices) -> str:
    rows = find_head(tiny_model())[1].rows
    config = MoEBiasConfig(num_experts=4, expert_rank=3, **choices).for_model(HIDDEN, VOCABULARY, rows)
    config.save_pretrained(str(tmp_path / "adapter"))
    return (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("choices", "kind", "parameters"),
    [
        # E (D + M) + 2, E (D + D) + 2, E (D + D + 2 r D) + 2, and E M more with free entries.
        ({"experts": "free"}, OWN, 4 * (16 + 5) + 2),
        ({"experts": "directions"}, DIRECTION, 4 * (16 + 16) + 2),
        ({"experts": "linear"}, f"{DIRECTION}, {DEPENDS}", 4 * (16 + 16 + 96) + 2),
        ({"experts": "directions", "free_entries": True}, f"{DIRECTION}, and {OWN}", 4 * (16 + 16 + 5) + 2),
        ({"experts": "linear", "free_entries": True}, f"{DIRECTION}, {DEPENDS}, and {OWN}", 4 * (16 + 16 + 96 + 5) + 2),
    ],
)
def test_what_an_expert_is_and_costs(choices, kind, parameters, tmp_path):
    card = card_of(tmp_path, support=SUPPORT, **choices)
    assert f"| an expert is | {kind} |" in card
    assert f"| trainable parameters | {parameters} |" in card
    assert "| experts | 4, 2 per token |" in card
    assert ("quantised copy" in card) == (choices["experts"] != "free")
    assert parameters == LayerConfig(num_experts=4, expert_rank=3, support=SUPPORT, **choices).num_parameters(16, 97)


@pytest.mark.parametrize(
    ("choices", "tokens"),
    [
        ({"support": SUPPORT}, "5"),
        ({"support": None}, "the whole vocabulary"),
        ({"support": SUPPORT, "reach": "vocabulary"}, "the whole vocabulary; trained on a support of 5"),
    ],
)
def test_which_tokens_have_a_bias(choices, tokens, tmp_path):
    assert f"| tokens with a bias | {tokens} |" in card_of(tmp_path, **choices)


def test_coverage_is_the_supports(tmp_path):
    covered = card_of(tmp_path, support=SUPPORT, fork_coverage=0.85)
    assert "| probability mass at forks covered, held out | 85.0% |" in covered
    wider = card_of(tmp_path / "wider", support=SUPPORT, fork_coverage=0.75, reach="vocabulary")
    assert "at forks that the support it was trained on holds, held out | 75.0% |" in wider


def test_a_config_that_knows_no_model_has_a_card_without_a_count(tmp_path):
    MoEBiasConfig().save_pretrained(str(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "trainable parameters" not in card
    assert "rank 7" in card


def test_a_card_that_is_written_anew_keeps_the_tag(tmp_path):
    model = tiny_model()
    peft_model = get_peft_model(model, MoEBiasConfig())
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    peft_model.save_pretrained(tmp_path)
    Trainer(peft_model, arguments).create_model_card()
    assert "moe-bias" in ModelCard.load(tmp_path / "README.md").data.tags
    peft_model.create_or_update_model_card(str(tmp_path))
    assert "moe-bias" in ModelCard.load(tmp_path / "README.md").data.tags
    peft_model.unload()
    assert model.model_tags is None


def saved_beside(readme: bytes | None, folder, num_experts=2) -> bytes:
    """The README.md of a folder after an adapter was saved into it, as training does."""
    folder.mkdir(exist_ok=True)
    if readme is not None:
        (folder / "README.md").write_bytes(readme)
    model = tiny_model()
    save_layer(find_head(model)[1].layer(LayerConfig(num_experts=num_experts)), folder, model)
    assert (folder / "adapter_config.json").is_file()
    return (folder / "README.md").read_bytes()


@pytest.mark.parametrize(
    "readme", [b"# My notes\n", b"", b"---\nlicense: mit\n---\n\nMine.\n", b"\xff\xfe no UTF-8", b"---\n: [\n---\n"]
)
def test_a_readme_that_was_there_stays(readme, tmp_path):
    assert saved_beside(readme, tmp_path) == readme
    assert saved_beside(None, tmp_path, num_experts=3) == readme


def test_our_own_card_is_replaced_until_someone_adds_to_it(tmp_path):
    assert b"| experts | 2, 2 per token |" in saved_beside(None, tmp_path)
    own = saved_beside(None, tmp_path, num_experts=3)
    assert b"| experts | 3, 2 per token |" in own
    assert saved_beside(own + b"More.\n", tmp_path, num_experts=4) == own + b"More.\n"
