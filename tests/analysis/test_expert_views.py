"""What experts are said to do: hand-worked cases, and nothing that depends on how a product is factorised."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from helpers.models import Rows
from moe_bias.analysis import TokenBias, TokenLean, any_off_support, expert_views, strongest, view_of_record
from moe_bias.analysis.experts import product_parts
from moe_bias.commands.expert_table import leaning, moved, readings_table
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer

RECORDS = Path(__file__).parents[2] / "records" / "analysis"
WEIGHT_VD = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -2], [2, 1]], dtype=torch.float64)
SUPPORT = (0, 2, 3)


def decode(token_ids):
    return f"t{token_ids[0]}"


def layer_of(weight_VD=WEIGHT_VD, num_experts=1, **choices) -> MoEBiasLayer:
    config = LayerConfig(num_experts=num_experts, top_k=1, **choices)
    layer = MoEBiasLayer(config, weight_VD.shape[1], len(weight_VD), Rows(weight_VD)).double()
    return layer.requires_grad_(False)


def pairs(tokens):
    return [(token.id, pytest.approx(token.bias)) for token in tokens]


def test_free_experts_speak_of_their_support():
    layer = layer_of(torch.zeros(50, 2), 2, experts="free", support=(10, 20, 30, 40))
    layer.experts.copy_(torch.tensor([[0.5, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, -1.0]]))
    first, second = expert_views(layer, 2, decode)
    assert first.raised == [TokenBias(30, "t30", 3.0), TokenBias(10, "t10", 0.5)]
    assert first.lowered == [TokenBias(20, "t20", -2.0)]
    assert first.norm == pytest.approx(13.25**0.5)
    assert second.raised == second.readings == []
    assert second.lowered == [TokenBias(40, "t40", -1.0)]


def test_free_experts_on_every_token_need_no_embedding():
    layer = layer_of(torch.zeros(3, 2), experts="free")
    layer.embedding = None
    layer.experts.copy_(torch.tensor([[0.5, -2.0, 3.0]]))
    assert expert_views(layer, 1, decode)[0].raised == [TokenBias(2, "t2", 3.0)]


def test_a_direction_speaks_of_the_whole_vocabulary():
    # W c = 1, 1/4, -1, -1/2, 9/4, of which tokens 0, 2 and 3 are on the support: 1 + 1 + 1/4 = 1.5 squared.
    layer = layer_of(experts="directions", support=SUPPORT)
    layer.directions.copy_(torch.tensor([[1.0, 0.25]]))
    (view,) = expert_views(layer, 2, decode)
    assert view.raised == [TokenBias(4, "t4", 2.25, acts=False), TokenBias(0, "t0", 1.0)]
    assert view.lowered == [TokenBias(2, "t2", -1.0), TokenBias(3, "t3", -0.5)]
    assert view.norm == pytest.approx(1.5)
    assert view.readings == []
    layer.reach = "vocabulary"
    (view,) = expert_views(layer, 2, decode)
    assert view.raised[0] == TokenBias(4, "t4", 2.25, acts=True)
    assert view.norm == pytest.approx(7.375**0.5)


@pytest.mark.parametrize("reach", ["support", "vocabulary"])
def test_free_entries_are_added_on_the_support(reach):
    # 1, 1/4, -1, -1/2, 9/4 with 2, 0, and -1 on tokens 3, 0 and 2.
    layer = layer_of(experts="directions", free_entries=True, support=(3, 0, 2), reach=reach)
    layer.directions.copy_(torch.tensor([[1.0, 0.25]]))
    layer.experts.copy_(torch.tensor([[2.0, 0.0, -1.0]]))
    (view,) = expert_views(layer, 9, decode)
    assert pairs(view.raised) == [(4, 2.25), (3, 1.5), (0, 1.0), (1, 0.25)]
    assert pairs(view.lowered) == [(2, -2.0)]
    assert [token.acts for token in view.raised] == [reach == "vocabulary", True, True, reach == "vocabulary"]


def test_what_acts_is_what_the_layer_adds():
    layer = layer_of(experts="directions", free_entries=True, support=SUPPORT, num_experts=2, entropy_gate=False)
    for parameter in layer.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(3))
    for view, bias_M in zip(expert_views(layer, 9, decode), layer.table(), strict=True):
        told = {token.id: token.bias for token in (*view.raised, *view.lowered) if token.acts}
        assert told == pytest.approx(dict(zip(SUPPORT, bias_M.tolist(), strict=True)))
        assert view.norm == pytest.approx(float(bias_M.norm()))


def test_a_reading_by_hand():
    # U V is 2 e_2 times 3 e_1: of size 6. W e_2 6 = 0, 6, 0, -12, 6: token 3 is moved most, so it is the one raised, by
    # reading -e_1.
    layer = layer_of(experts="linear", expert_rank=1, support=SUPPORT)
    layer.writes.copy_(torch.tensor([[[0.0, 2.0]]]))
    layer.reads.copy_(torch.tensor([[[3.0, 0.0]]]))
    (reading,) = expert_views(layer, 2, decode)[0].readings
    assert reading.size == pytest.approx(6)
    assert pairs(reading.raised) == [(3, 12)]
    assert pairs(reading.lowered) == [(1, -6)]  # and 4, but one of them is half of 2, and neither is on the support
    assert [token.acts for token in (*reading.raised, *reading.lowered)] == [True, False]
    assert reading.toward == reading.away == []  # of five tokens none stands out


def test_tokens_that_a_reading_leans_to_by_hand():
    # Of 17 tokens two have an entry where the reading reads, e_1 over a scale of 4: 1 and -1, of mean 0 and variance
    # 2 / 17, so 2.915 standard deviations; chance gives sqrt(2 ln 17) = 2.38. Token 5 is raised, so +e_1 is read.
    weight_VD = torch.zeros(17, 2, dtype=torch.float64)
    weight_VD[2, 0], weight_VD[9, 0], weight_VD[5, 1] = 1, -1, 1
    layer = layer_of(weight_VD, experts="linear", expert_rank=1)
    layer.writes.copy_(torch.tensor([[[0.0, -2.0]]]))
    layer.reads.copy_(torch.tensor([[[-3.0, 0.0]]]))
    layer.hidden_scale.copy_(torch.tensor([4.0, 1.0]))
    layer.hidden_mean.fill_(7)
    (reading,) = expert_views(layer, 2, decode)[0].readings
    assert pairs(reading.raised) == [(5, 6)]
    assert reading.toward == [TokenLean(2, "t2", pytest.approx(8.5**0.5))]
    assert reading.away == [TokenLean(9, "t9", pytest.approx(-(8.5**0.5)))]


def test_the_scale_is_part_of_what_a_reading_leans_to():
    weight_VD = torch.zeros(17, 2, dtype=torch.float64)
    weight_VD[2, 0], weight_VD[9, 1] = 1, 1
    layer = layer_of(weight_VD, experts="linear", expert_rank=1)
    layer.writes.copy_(torch.tensor([[[1.0, 0.5]]]))
    layer.reads.copy_(torch.tensor([[[1.0, 1.0]]]))
    for scale, token in (((1.0, 9.0), 2), ((9.0, 1.0), 9)):
        layer.hidden_scale.copy_(torch.tensor(scale))
        assert [lean.id for lean in expert_views(layer, 2, decode)[0].readings[0].toward] == [token]


def test_tokens_off_the_support_do_not_crowd_out_those_that_are_moved():
    # Biases 9, 8, ..., 1, of which only 3, 2 and 1 are on the support.
    layer = layer_of(torch.arange(9.0, 0, -1, dtype=torch.float64)[:, None], experts="directions", support=(6, 7, 8))
    layer.directions.fill_(1)
    (view,) = expert_views(layer, 2, decode)
    assert [(token.id, token.acts) for token in view.raised] == [(0, False), (6, True), (7, True)]
    (view,) = expert_views(layer, 4, decode)
    assert [token.id for token in view.raised] == [0, 1, 6, 7, 8]
    assert [token.id for token in strongest(view.raised, 2)] == [0, 6, 7]
    assert [token.id for token in strongest(view.raised, 1)] == [6]
    assert strongest([], 3) == []


def test_a_fresh_linear_expert_says_nothing():
    (view,) = expert_views(layer_of(experts="linear"), 3, decode)
    assert view.raised == view.lowered == view.readings == []
    assert view.norm == 0


@dataclass
class Case:
    weight_VD: torch.Tensor
    writes_RD: torch.Tensor
    reads_RD: torch.Tensor


@st.composite
def cases(draw) -> Case:
    vocabulary, hidden, rank = draw(st.integers(2, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes = (vocabulary, hidden), (rank, hidden), (rank, hidden)
    return Case(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes))


def views_of(case: Case, writes_RD, reads_RD):
    layer = layer_of(case.weight_VD, experts="linear", expert_rank=len(writes_RD))
    layer.writes.copy_(writes_RD[None])
    layer.reads.copy_(reads_RD[None])
    layer.hidden_scale.copy_(torch.linspace(0.5, 2, len(layer.hidden_scale)))
    return expert_views(layer, 3, decode, readings=9)


def flat(view):
    """Its numbers, in order, and the tokens."""
    numbers, tokens = [], []
    for reading in view.readings:
        numbers.append(reading.size)
        for side in (reading.raised, reading.lowered, reading.toward, reading.away):
            tokens += [token.id for token in side]
            numbers += [token.bias if isinstance(token, TokenBias) else token.deviations for token in side]
    return numbers, tokens


@given(case=cases(), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_what_is_shown_does_not_depend_on_the_factorisation(case, seed):
    rank = len(case.writes_RD)
    generator = torch.Generator().manual_seed(seed)
    mixing_RR = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 3 * torch.eye(rank)
    (ours,) = views_of(case, case.writes_RD, case.reads_RD)
    (theirs,) = views_of(case, mixing_RR.T @ case.writes_RD, torch.linalg.inv(mixing_RR) @ case.reads_RD)
    numbers, tokens = flat(ours)
    assert len(ours.readings) == min(rank, case.weight_VD.shape[1])
    assert flat(theirs)[0] == pytest.approx(numbers, rel=1e-5, abs=1e-7)
    assert flat(theirs)[1] == tokens


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_all_parts_together_are_the_product(case):
    left_ND, size_N, right_ND = product_parts(case.writes_RD, case.reads_RD)
    assert torch.allclose(left_ND.T @ (size_N[:, None] * right_ND), case.writes_RD.T @ case.reads_RD)
    assert torch.equal(size_N, size_N.sort(descending=True).values)


def test_parts_that_are_rounding_are_left_out():
    row_D = torch.tensor([1.0, 2.0, 2.0])
    left_ND, size_N, right_ND = product_parts(torch.stack([row_D, row_D]), torch.stack([row_D, -row_D / 3]))
    assert left_ND.shape == right_ND.shape == (1, 3)
    assert size_N.tolist() == pytest.approx([6.0])  # 3 times 3, less 3 times 1


def test_the_product_is_never_made():
    rows_RD = torch.ones(2, 400_000)  # the product would be 1.28 TB
    assert product_parts(rows_RD, rows_RD)[1].tolist() == pytest.approx([800_000])


def test_a_record_gives_the_same_view_back():
    layer = layer_of(experts="linear", expert_rank=2, support=SUPPORT)
    for parameter in layer.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    (view,) = expert_views(layer, 2, decode)
    assert view_of_record(json.loads(json.dumps({"expert": 0, "contexts": [], **asdict(view)}))) == view


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_records_of_before_there_were_readings(path):
    for card in json.loads(path.read_text())["adapters"][0]["experts"]:
        view = view_of_record(card)
        assert [asdict(token) for token in view.raised] == [{**token, "acts": True} for token in card["raised"]]
        assert view.norm is None
        assert view.readings == []
        assert not any_off_support([view])


def printed(renderable) -> str:
    file = io.StringIO()
    Console(file=file, width=100).print(renderable)
    return file.getvalue()


def test_what_a_model_wrote_is_text_in_a_terminal():
    tokens = [TokenBias(1, "[bold]x[/]", 1.0), TokenBias(2, "\x1b[2J", 0.5, acts=False), TokenBias(3, "", 0.25)]
    assert printed(moved(tokens)) == "'[bold]x[/]' +1.00, ('\\x1b[2J') +0.50, 3 +0.25\n"
    assert printed(leaning([TokenLean(1, "[red]", -2.0)])) == "'[red]' 2.0\n"


def test_readings_fit_a_hundred_columns_and_are_left_out_where_there_are_none():
    layer = layer_of(experts="linear", expert_rank=2, support=SUPPORT)
    for parameter in layer.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    views = expert_views(layer, 5, lambda token_ids: f" [bold]{token_ids[0]}")
    shown = printed(readings_table(list(enumerate(views)), 5))
    assert max(map(len, shown.splitlines())) <= 100
    assert "' [bold]4'" in shown.replace("\n", "")
    assert readings_table(list(enumerate(expert_views(layer, 5, decode, readings=0))), 5) is None
