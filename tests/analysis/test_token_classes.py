"""The class of a token, from its text."""

import pytest
import torch
from transformers import AutoTokenizer

from moe_bias.analysis.token_classes import CLASSES, token_class, vocabulary_classes
from moe_bias.frozen import resolve_model

CASES = {
    "digit": ["7", " 42", "0"],
    "operator": ["+", " =", "*", " <=", "×", "-"],
    "connective": [" so", "Therefore", "because", " THEN"],
    "format": ["\n", "", " ", ".", "\n\n", "(", ' "', "####", "<|im_end|>"],
    "name": [" Janet", " Weng"],
    "other": [" the", " The", "ing", "Janet", "x2", "½", " McDonald"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("bundled"))


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in CASES.items() for text in texts])
def test_classes(kind, text, tokenizer):
    vocabulary = {" the", " a"}
    if text.startswith("<|"):  # told by being special, not by its text
        token = tokenizer.convert_tokens_to_ids(text)
        assert CLASSES[vocabulary_classes(tokenizer, token + 1)[token]] == kind
    else:
        assert token_class(text, vocabulary) == kind


def test_every_id_of_a_vocabulary_has_a_class(tokenizer):
    size = len(tokenizer) + 5
    kinds = vocabulary_classes(tokenizer, size)
    assert kinds.shape == (size,)
    assert (kinds[-5:] == CLASSES.index("other")).all()
    assert len(kinds.unique()) == len(CLASSES)

    def of(text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return [CLASSES[kind] for kind in kinds[ids]]

    assert of("12+5=") == ["digit", "digit", "operator", "digit", "operator"]
    assert of(" because") == ["connective"]
    assert of(" The") == ["other"]
    assert torch.equal(vocabulary_classes(tokenizer, 100), kinds[:100])
