"""Rows of vLLM's output embedding: padded, packed, and spread over ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.served import WITHOUT_VLLM

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from moe_bias.adapter.embedding import embedding_sample
from moe_bias.backbone import OutputRows
from moe_bias.serving import embedding
from moe_bias.serving.embedding import read_embedding
from moe_bias.serving.notes import note_sample, noted_sample, share_notes
from moe_bias.variables import NOTES

VOCABULARY, PADDED, HIDDEN = 97, 128, 70
"""Two ranks have 64 rows each; more hidden dimensions than unit vectors that are multiplied at once."""


class Packed:
    """A quantisation to whole numbers of a step."""

    def apply(self, layer, hidden, bias=None):
        assert bias is None
        return hidden @ (layer.weight.to(hidden.dtype) * layer.step.to(hidden.dtype)).T


def lm_head(weight_SD, packed, ranks):
    head = nn.Module()
    method = Packed() if packed else UnquantizedEmbeddingMethod()
    head.weight = nn.Parameter(weight_SD.to(torch.int8) if packed else 0.25 * weight_SD, requires_grad=False)
    head.step = nn.Parameter(torch.tensor(0.25, dtype=torch.float8_e4m3fn if packed else torch.float32), False)
    head.quant_method, head.tp_size, head.num_embeddings_per_partition = method, ranks, len(weight_SD)
    head.bias = nn.Parameter(torch.full((len(weight_SD),), 7.0), False)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_those_of_the_models_tokens(monkeypatch, dtype, packed, ranks):
    weight_SD = torch.randint(-100, 100, (PADDED, HIDDEN), generator=torch.Generator().manual_seed(0)).float()
    expected = 0.25 * weight_SD[:VOCABULARY]
    config = SimpleNamespace(get_hidden_size=lambda: HIDDEN, get_vocab_size=lambda: VOCABULARY, dtype=dtype)
    first, *others = (lm_head(part, packed, ranks) for part in weight_SD.chunk(ranks))

    def gather(part_SD, dim):
        """What the other ranks would send."""
        assert dim == 0
        assert part_SD.dtype == dtype
        sent = [(other.weight.float() * 0.25 if packed else other.weight).to(dtype) for other in others]
        return torch.cat([part_SD, *sent])

    monkeypatch.setattr(embedding, "tensor_model_parallel_all_gather", gather)
    found = read_embedding(first, config)
    assert torch.equal(found.rows(None), expected)
    assert found.rows(None).dtype == torch.float32
    token_M = torch.tensor([96, 0, 64, 63])
    assert torch.equal(found.rows(token_M), expected[token_M])
    assert found.rows.state() == found.rows.state()
    linear = nn.Linear(HIDDEN, VOCABULARY)
    linear.weight.data = expected
    assert torch.equal(found.sample, embedding_sample(OutputRows(linear), HIDDEN, VOCABULARY))


@pytest.mark.parametrize("named", [None, "gone"])
def test_what_an_engine_notes_is_known_for_its_model_alone(monkeypatch, tmp_path, named):
    """Also where the process that named the folder has ended, and its folder with it."""
    monkeypatch.setenv(NOTES, "" if named is None else str(tmp_path / named))
    one, other = (SimpleNamespace(model=name, revision=None, quantization=None, dtype="auto") for name in "ab")
    note_sample(one, torch.tensor([1.0]))
    assert noted_sample(one) is None
    share_notes()
    note_sample(one, torch.tensor([0.1, -2.0]))
    note_sample(one, torch.tensor([0.1, -3.0]))
    assert noted_sample(one).tolist() == torch.tensor([0.1, -3.0]).tolist()
    assert noted_sample(other) is None
