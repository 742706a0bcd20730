"""A layer made by hand: one bias on each of some tokens, whatever the text, as servers know it by `logit_bias`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import torch

from moe_bias.api.arguments import named, refuse_other_base
from moe_bias.config import LayerConfig
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import LARGEST_NUMBER
from moe_bias.mistakes import UserError


def static_bias(base: Frozen, biases: Mapping[str | int, float]) -> MoEBiasLayer:
    """A layer that moves the final logits of some tokens by a constant: one expert, no router, no gate, no training.

    `biases` has them in logits, by a word or a token id: `{"Wait": -4.0, "However": -2.0}`. A word stands for its
    token and for that of the word after a space, where there are such. The layer is one like any other: it is
    saved, measured at several strengths, served, and trained on. Nothing else about the model changes: what else to
    say, and when, is not told by it.

    Raises UserError on a word that is no token of its own, an id outside the vocabulary, a token that is named twice,
    and a bias that is no finite number.
    """
    refuse_other_base(base)
    if not isinstance(biases, Mapping) or not biases:
        raise UserError(f"`biases` is {named(biases)}; give words and their biases, such as {{'Wait': -4.0}}")
    found: dict[int, float] = {}
    given: Iterable[tuple[object, object]] = biases.items()
    for name, value in given:
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= LARGEST_NUMBER:
            raise UserError(f"the bias of {name!r} is {value!r}; give a finite number of logits, such as -2.0")
        for token in _tokens_of(base, name):
            if token in found:
                text = base.tokenizer.decode([token])
                raise UserError(f"`biases` names token {token} ({text!r}) twice, by {name!r} too")
            found[token] = float(value)
    support = sorted(found)
    config = LayerConfig(experts="free", num_experts=1, top_k=1, entropy_gate=False, support=tuple(support))
    layer = base.head.layer(config)
    assert layer.experts is not None
    with torch.no_grad():
        layer.experts.copy_(torch.tensor([[found[token] for token in support]]))
    return layer.to(base.device)


def _tokens_of(base: Frozen, name: object) -> list[int]:
    """The ids of a word, alone and after a space, or the one that was given."""
    if isinstance(name, Integral):
        if not 0 <= int(name) < base.head.vocab_size:
            last = base.head.vocab_size - 1
            raise UserError(f"`biases` has token id {name}; the vocabulary has those from 0 to {last}")
        return [int(name)]
    if not isinstance(name, str) or not name:
        raise UserError(f"`biases` has {named(name)}; give words or token ids")
    forms = [name, f" {name}"] if name[0].isalnum() else [name]
    split = [base.tokenizer(form, add_special_tokens=False).input_ids for form in forms]
    single = [ids[0] for ids in split if len(ids) == 1 and base.tokenizer.decode(ids).strip() == name.strip()]
    if not single:
        pieces = ", ".join(repr(base.tokenizer.decode([token])) for token in split[0])
        raise UserError(
            f"{name!r} is no token of its own: the tokenizer makes {pieces} of it; give one of these, or an id"
        )
    return list(dict.fromkeys(single))
