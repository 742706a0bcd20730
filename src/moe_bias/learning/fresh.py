"""An adapter that has learned nothing yet, for a model of which nobody has any texts: made of what it says.

Its support are the tokens that the model's own answers to a few requests have and waver between, and the normalisation
is that of their hidden states.
"""

from __future__ import annotations

import torch

from moe_bias.config import LayerConfig
from moe_bias.features.extract import measure_fork_mass, support_for
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.conversations import Conversation, answer_ends, encode_prompt

FRESH = "fresh"
"""The folder of such an adapter, in that of what is learned."""
SUPPORT = 2048
_REQUESTS = (
    "Write an e-mail to a customer whose order is late.",
    "Explain photosynthesis to a child.",
    "What is the capital of Australia, and how many people live there?",
    "Write a Python function that sorts a list of names.",
    "A shirt costs 20 dollars and is sold at 15% off. What is its price now?",
    "List five ideas for a birthday present.",
    "Is this review positive or negative? 'The room was cold and the staff were rude.'",
    "Tell a short story about a dragon and a lighthouse.",
    "Summarise: the meeting on Monday moved to Tuesday at nine, because two of us are away.",
    "Translate into French: Good morning, how are you?",
    "Write a JSON object with the name, age and city of a person.",
    "Give me a recipe for pancakes, step by step.",
)
_SAMPLES, _TOKENS = 4, 48


def fresh_layer(base: Frozen, size: int = SUPPORT, seed: int = 0) -> MoEBiasLayer:
    """A layer of the default kind on `size` tokens, which changes nothing yet; it takes a minute on a CPU."""
    ends = answer_ends(base.model, base.tokenizer)
    is_chat = bool(base.tokenizer.chat_template)
    prompts = [
        encode_prompt(Conversation(({"role": "user", "content": request},), "", is_chat=is_chat), base.tokenizer)
        for request in _REQUESTS
    ]
    size = min(size, base.head.vocab_size)
    torch.manual_seed(seed)
    still = base.head.layer(LayerConfig(num_experts=1, top_k=1, support=tuple(ends))).requires_grad_(False)
    choices = SamplingChoices(1.0, _TOKENS, _SAMPLES, len(prompts), ends)
    sampler = TransformersSampler(base.model, base.head)
    features = sampler.sample(prompts, still, choices, seed, "the model's own answers").features
    forks = measure_fork_mass(base.head, features.hidden.float())
    torch.manual_seed(seed)
    layer = base.head.layer(LayerConfig(support=tuple(support_for(forks, features.token, size, ends))))
    layer.calibrate(features.hidden)
    return layer.to(base.device)
