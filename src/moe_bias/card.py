"""The model card that is written beside an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_PLACEHOLDER = "[More Information Needed]"


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes README.md for the adapter that `config` describes, unless someone wrote one by hand.

    The metadata of an earlier card are kept; the text that PEFT generates, which is all
    placeholders, is replaced.
    """
    path = folder / "README.md"
    earlier = ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else None
    if earlier is not None and _PLACEHOLDER not in earlier.text:
        return
    data = earlier.data if earlier is not None else ModelCardData()
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), "moe-bias"})
    data.base_model = data.base_model or config["base_model_name_or_path"] or None
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder.resolve().name, config)}").save(path)


def _text(name: str, config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"] or "the base model"
    facts = "\n".join(f"| {label} | {value} |" for label, value in _facts(config))
    return f"""# {name}

A MoE-Bias adapter for `{base}`: the model's weights stay as they are, and a small layer at the output
embedding adds routed logit biases to its logits. With the adapter disabled the model is itself again, bit for bit.

| | |
|---|---|
{facts}

```python
import moe_bias
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```
"""


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    support = config["support"]
    facts = [
        ("experts", f"{config['num_experts']}, {config['top_k']} per token"),
        ("tokens with a bias", "the whole vocabulary" if support is None else f"{len(support):,}"),
        ("entropy gate", "on" if config["entropy_gate"] else "off"),
        ("strength", f"{config['strength']:g}"),
    ]
    if config["fork_coverage"] is not None:
        facts.append(("probability mass at forks covered, held out", f"{config['fork_coverage']:.1%}"))
    return facts
