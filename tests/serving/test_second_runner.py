"""The interface of vLLM's second model runner, which cannot run without Triton: called here as that runner calls it.

Only the runner's own tensors are stood in for; the processor and its base class are the real ones.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import ADAPTERS, HIDDEN, VOCABULARY, WITHOUT_VLLM

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from moe_bias.backbone import HeadTransform, OutputRows, adapted_logits
from moe_bias.layer import entropy_from_logits
from moe_bias.serving.embedding import ServedEmbedding, keep_embedding
from moe_bias.serving.processor import MoEBiasLogitsProcessor, processor_of
from moe_bias.serving.versions import AdapterFolder, read_version


@pytest.fixture
def config():
    model = SimpleNamespace(get_hidden_size=lambda: HIDDEN, get_vocab_size=lambda: VOCABULARY, dtype=torch.float32)
    return SimpleNamespace(model_config=model, use_v2_model_runner=True)


@pytest.fixture
def versions(served, tmp_path):
    folder = AdapterFolder(served[1], tmp_path, HIDDEN, VOCABULARY)
    return {name: folder.version(name) for name in ADAPTERS}


@pytest.fixture
def embedding(config, served):
    """What the plugin keeps when the model has been loaded."""
    model = AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32)
    embedding = ServedEmbedding(OutputRows(model.lm_head), None)
    keep_embedding(config, embedding)
    return embedding


def asking(name, versions):
    return SamplingParams(extra_args={"moe_bias": name, "moe_bias_version": [[str(versions[name]), None]]})


def step(slots):
    """What the runner says of a step whose rows are the requests in these slots."""
    return SimpleNamespace(idx_mapping_np=np.array(slots, dtype=np.int32))


@pytest.mark.parametrize(("first", "second"), [("whole", "routed"), ("far", "linear")])
def test_rows_follow_slots(config, versions, embedding, first, second):
    assert issubclass(MoEBiasLogitsProcessor, LogitsProcessor)
    processor = MoEBiasLogitsProcessor(config, SimpleNamespace(device=torch.device("cpu")))
    assert processor_of(config) is processor
    assert processor.add_request(3, asking(second, versions))
    assert not processor.add_request(5, SamplingParams())
    assert processor.add_request(0, asking(first, versions))
    generator = torch.Generator().manual_seed(0)
    hidden_BD = torch.randn(4, HIDDEN, generator=generator)
    base_BV = 3 * torch.randn(4, VOCABULARY, generator=generator)
    processor.on_head(hidden_BD, base_BV, HeadTransform())
    masked_BV = base_BV.clone()
    masked_BV[:, ::3] = -torch.inf
    moved_BV = processor.apply(masked_BV.clone(), step([5, 0, 3, 9]))
    for row, name in ((1, first), (2, second)):
        layer, one = read_version(versions[name], HIDDEN, VOCABULARY, embedding.rows), slice(row, row + 1)
        entropy_B = entropy_from_logits(base_BV[one])
        expected = adapted_logits(layer, HeadTransform(), hidden_BD[one], entropy_B, masked_BV[one])
        torch.testing.assert_close(moved_BV[one], expected)
        assert not torch.equal(moved_BV[one], masked_BV[one])
    for row in (0, 3):
        assert torch.equal(moved_BV[row], masked_BV[row])


def test_a_slot_that_is_used_again_forgets_its_adapter(config, versions):
    processor = MoEBiasLogitsProcessor(config, SimpleNamespace(device=torch.device("cpu")))
    processor.add_request(1, asking("static", versions))
    processor.add_request(1, SamplingParams())
    logits_BV = torch.randn(1, VOCABULARY)
    processor.on_head(torch.randn(1, HIDDEN), logits_BV, HeadTransform())
    assert torch.equal(processor.apply(logits_BV.clone(), step([1])), logits_BV)


def test_rows_that_are_not_one_a_request_are_refused(config, versions):
    """As with speculative decoding, which gives a request one row per draft token."""
    processor = MoEBiasLogitsProcessor(config, SimpleNamespace(device=torch.device("cpu")))
    processor.add_request(0, asking("static", versions))
    processor.on_head(torch.randn(3, HIDDEN), torch.randn(3, VOCABULARY), HeadTransform())
    with pytest.raises(AssertionError, match="rows of logits"):
        processor.apply(torch.randn(3, VOCABULARY), step([0]))
