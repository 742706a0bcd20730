"""The model card that is written beside an adapter's files, and how both reach the Hub together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

KINDS = {
    "free": "a bias of its own for each of these tokens",
    "directions": "a direction in the space of the output embedding",
    "linear": "a direction in the space of the output embedding, which depends on the hidden state with rank {rank}",
}
"""What an expert is, by the name of its kind."""
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


def push_to_hub(model: Any, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a PEFT model's adapters with their model card; returns the address.

    The `push_to_hub` that PEFT inherits from transformers uploads the same files, but puts a card of
    its own, of a transformers model, over the adapter's.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as beside:
        folder = Path(beside) / repo_id.rpartition("/")[2]
        model.save_pretrained(folder)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload MoE-Bias adapter"))


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
    everywhere = support is None or config["reach"] == "vocabulary"
    facts = [
        ("experts", f"{config['num_experts']}, {config['top_k']} per token"),
        ("an expert is", KINDS[config["experts"]].format(rank=config["expert_rank"])),
        ("tokens with a bias", "the whole vocabulary" if everywhere else f"{len(support):,}"),
        ("entropy gate", "on" if config["entropy_gate"] else "off"),
        ("strength", f"{config['strength']:g}"),
    ]
    if config["fork_coverage"] is not None:
        facts.append(("probability mass at forks covered, held out", f"{config['fork_coverage']:.1%}"))
    return facts
