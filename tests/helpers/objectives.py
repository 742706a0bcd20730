"""A random layer and what was sampled, for objectives in float64."""

from types import SimpleNamespace

import torch

from helpers.models import HIDDEN, VOCABULARY, randomise, tiny_model
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.features.extract import Features, support_columns
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.support import full_log_prob, rest_scalars
from moe_bias.training.objectives import Sampled

SUPPORT = tuple(range(2, 60))


def problem(name="llama", tokens=61, temperature=0.7, **choices):
    """A random layer in float64, features at a temperature, what was sampled, u_S and the full logits."""
    head = find_head(tiny_model(name).double())[1]
    layer = MoEBiasLayer(
        LayerConfig(experts="free", num_experts=4, support=SUPPORT, **choices), HIDDEN, VOCABULARY
    ).double()
    randomise(layer)
    generator = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    token_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    final_TV, support_M = head.logits(hidden_TD), torch.tensor(SUPPORT)
    logits_TV = final_TV / temperature
    features = Features(
        hidden=hidden_TD,
        token=token_T,
        example=torch.zeros_like(token_T),
        position=torch.arange(tokens),
        logit=logits_TV.gather(-1, token_T[:, None]).squeeze(-1),
        entropy=entropy_from_logits(final_TV),
        log_partition=logits_TV.logsumexp(-1),
        rest=rest_scalars(logits_TV, support_M),
        column=support_columns(support_M, VOCABULARY)[token_T],
        support=support_M,
    )
    old_T = full_log_prob(logits_TV, torch.zeros(tokens, 58), support_M, token_T)
    old_T += 0.5 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    sampled = Sampled(old_T, torch.randn(tokens, generator=generator, dtype=torch.float64))
    return SimpleNamespace(head=head, layer=layer, features=features, sampled=sampled, logits=logits_TV)


def rows_of(logits_TM):
    """What makes the base's logits of some rows, as training asks for them: each time a tensor of its own."""
    return lambda rows: logits_TM[rows].clone()


def gradients_of(layer):
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
