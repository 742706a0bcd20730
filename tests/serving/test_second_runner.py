"""The interface of vLLM's second model runner, called as that runner calls it: what takes several steps to come about.

The runner itself needs Triton; CONTRIBUTING.md says how the other tests of this folder run on it.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import ADAPTERS, HIDDEN, VOCABULARY, WITHOUT_VLLM

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from moe_bias.backbone import HeadTransform, OutputRows, adapted_logits
from moe_bias.layer import entropy_from_logits
from moe_bias.serving.embedding import ServedEmbedding, keep_embedding
from moe_bias.serving.plugin import _is_draft
from moe_bias.serving.processor import MoEBiasLogitsProcessor, processor_of
from moe_bias.serving.versions import AdapterFolder, read_version


@pytest.fixture
def config():
    model = SimpleNamespace(get_hidden_size=lambda: HIDDEN, get_vocab_size=lambda: VOCABULARY, dtype=torch.float32)
    return SimpleNamespace(model_config=model, use_v2_model_runner=True, speculative_config=None)


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
    return SamplingParams(extra_args={"moe_bias": name, "moe_bias_version": [[name, str(versions[name]), None]]})


def step(slots, rows=None):
    """What the runner says of a step with requests in these slots; `rows` has those of rows that are not one each."""
    requests = torch.tensor(slots, dtype=torch.int32)
    mapping = requests if rows is None else torch.tensor(rows, dtype=torch.int32)
    nothing = torch.zeros_like(mapping)
    return LogitsContext(mapping, requests, requests.numpy(), nothing, nothing, nothing, requests.numpy())


def begun(config, versions, **asked):
    """A processor before a step, with requests in slots: `s3="whole"`."""
    processor = MoEBiasLogitsProcessor(config, SimpleNamespace(device=torch.device("cpu")))
    for slot, name in asked.items():
        processor.add_request(int(slot[1:]), asking(name, versions) if name else SamplingParams())
    processor.apply_staged_writes()
    return processor


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_BD = torch.randn(count, HIDDEN, generator=generator)
    return hidden_BD, 3 * torch.randn(count, VOCABULARY, generator=generator)


def expected_row(versions, embedding, name, hidden_BD, base_BV, row):
    if name is None:
        return base_BV[row]
    layer, one = read_version(versions[name], HIDDEN, VOCABULARY, embedding.rows), slice(row, row + 1)
    entropy_B = entropy_from_logits(base_BV[one])
    return adapted_logits(layer, HeadTransform(), hidden_BD[one], entropy_B, base_BV[one])[0]


@pytest.mark.parametrize(("first", "second"), [("whole", "routed"), ("far", "linear")])
def test_rows_follow_slots(config, versions, embedding, first, second):
    assert issubclass(MoEBiasLogitsProcessor, LogitsProcessor)
    processor = MoEBiasLogitsProcessor(config, SimpleNamespace(device=torch.device("cpu")))
    assert processor_of(config) is processor
    assert processor.add_request(3, asking(second, versions))
    assert not processor.add_request(5, SamplingParams())
    assert processor.add_request(0, asking(first, versions))
    processor.apply_staged_writes()
    hidden_BD, base_BV = rows(4)
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
    processor = begun(config, versions, s1="static")
    processor.add_request(1, SamplingParams())
    hidden_BD, logits_BV = rows(1)
    processor.on_head(hidden_BD, logits_BV, HeadTransform())
    assert torch.equal(processor.apply(logits_BV.clone(), step([1])), logits_BV)


def test_rows_of_drafts_follow_their_request_and_not_the_order_of_requests(config, versions, embedding):
    processor = begun(config, versions, s3="whole", s1="static", s0=None)
    hidden_BD, base_BV = rows(6)
    processor.on_head(hidden_BD, base_BV, HeadTransform())
    moved_BV = processor.apply(base_BV.clone(), step([3, 0, 1], rows=[3, 3, 0, 0, 1, 1]))
    for row, name in enumerate(["whole", "whole", None, None, "static", "static"]):
        expected_V = expected_row(versions, embedding, name, hidden_BD, base_BV, row)
        torch.testing.assert_close(moved_BV[row], expected_V)
        assert name is None or not torch.equal(moved_BV[row], base_BV[row])


def test_parts_of_a_step_are_its_rows_in_their_order(config, versions, embedding):
    processor = begun(config, versions, s0="whole", s1=None, s2="routed")
    hidden_BD, base_BV = rows(5)
    processor.on_head(hidden_BD, base_BV, HeadTransform())
    parts = [(step([0], [0, 0]), slice(0, 2)), (step([1], [1]), slice(2, 3)), (step([2], [2, 2]), slice(3, 5))]
    moved_BV = torch.cat([processor.apply(base_BV[part].clone(), context) for context, part in parts])
    for row, name in enumerate(["whole", "whole", None, "routed", "routed"]):
        torch.testing.assert_close(moved_BV[row], expected_row(versions, embedding, name, hidden_BD, base_BV, row))


@pytest.mark.parametrize(("requests", "all_of_them"), [(1, False), (2**21, True)])
def test_no_part_is_left_out_where_there_can_be_several(config, versions, requests, all_of_them):
    """vLLM leaves parts out whose requests need no processing, and the next part's rows would be taken for theirs."""
    config.speculative_config = SimpleNamespace(num_speculative_tokens=4)
    config.scheduler_config = SimpleNamespace(max_num_seqs=requests)
    processor = begun(config, versions)
    assert processor.add_request(0, SamplingParams()) == all_of_them


def test_later_calls_of_the_head_in_a_step_are_of_others(config, versions, embedding):
    """Of a draft that shares it, or for log-probabilities of prompts."""
    processor = begun(config, versions, s0="whole")
    hidden_BD, base_BV = rows(1)
    processor.on_head(hidden_BD, base_BV, HeadTransform())
    processor.on_head(*rows(3, seed=1), HeadTransform())
    moved_BV = processor.apply(base_BV.clone(), step([0]))
    torch.testing.assert_close(moved_BV[0], expected_row(versions, embedding, "whole", hidden_BD, base_BV, 0))
    processor.apply_staged_writes()
    hidden_BD, base_BV = rows(1, seed=2)
    processor.on_head(hidden_BD, base_BV, HeadTransform())
    moved_BV = processor.apply(base_BV.clone(), step([0]))
    torch.testing.assert_close(moved_BV[0], expected_row(versions, embedding, "whole", hidden_BD, base_BV, 0))


def test_rows_that_the_head_did_not_give_are_no_ones(config, versions):
    processor = begun(config, versions, s0="static")
    processor.on_head(*rows(2), HeadTransform())
    with pytest.raises(AssertionError, match="not those that the model's head gave"):
        processor.apply(rows(3)[1], step([0], [0, 0, 0]))
    processor.apply_staged_writes()
    with pytest.raises(AssertionError, match="the model's head has not run"):
        processor.apply(rows(1)[1], step([0]))


@pytest.mark.parametrize("own_config", [False, True])
def test_the_head_of_a_model_that_drafts_is_not_followed(own_config):
    """EAGLE's is loaded under the config of its target, a draft model under one of its own."""
    target, draft = SimpleNamespace(), SimpleNamespace()
    speculation = SimpleNamespace(target_model_config=target, draft_model_config=draft)
    config = SimpleNamespace(model_config=draft if own_config else target, speculative_config=speculation)
    assert _is_draft(config, draft)
    assert not _is_draft(SimpleNamespace(model_config=target, speculative_config=speculation), target)
    assert not _is_draft(SimpleNamespace(model_config=target, speculative_config=None), target)
