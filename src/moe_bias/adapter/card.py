"""The model card that is written beside an adapter's files, and how both reach the Hub together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft.utils import CONFIG_NAME

from moe_bias.config import LayerConfig
from moe_bias.records import temporary_folder

TAG = "moe-bias"
CARD = "README.md"
_COVERED = {
    "support": "probability mass at forks covered, held out",
    "vocabulary": "probability mass at forks that the support it was trained on holds, held out",
}
"""What `fork_coverage` is, by where the experts act."""
_PLACEHOLDER = "[More Information Needed]"


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes README.md for the adapter that `config` describes, unless someone wrote one by hand.

    The metadata of an earlier card are kept; the text that PEFT generates, which is all
    placeholders, is replaced.
    """
    path = folder / CARD
    earlier = ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else None
    if earlier is not None and _PLACEHOLDER not in earlier.text:
        return
    _card(folder, config, earlier.data if earlier is not None else ModelCardData()).save(path)


def has_other_card(folder: Path) -> bool:
    """Whether there is a README.md that is not word for word the one that was written for the folder's adapter."""
    try:
        written = (folder / CARD).read_text(encoding="utf-8")
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        return bool(written != str(_card(folder, config, ModelCardData())))
    except (OSError, ValueError, LookupError, TypeError):  # no such file, or not what we write
        return (folder / CARD).exists()


def _card(folder: Path, config: Mapping[str, Any], data: ModelCardData) -> ModelCard:
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), TAG})
    data.base_model = data.base_model or config["base_model_name_or_path"] or None
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder.resolve().name, config)}")


def tag_model(model: Any) -> None:
    """Cards that PEFT or a trainer writes anew have no tags but their own and the model's: ours is among those."""
    model.model_tags = [*(getattr(model, "model_tags", None) or []), TAG]


def untag_model(model: Any) -> None:
    """Takes away what `tag_model` did."""
    tags = [tag for tag in getattr(model, "model_tags", None) or [] if tag != TAG]
    if tags:
        model.model_tags = tags
    else:
        vars(model).pop("model_tags", None)


def push_to_hub(model: Any, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a PEFT model's adapters with their model card; returns the address.

    The `push_to_hub` that PEFT inherits from transformers uploads the same files, but puts a card of
    its own, of a transformers model, over the adapter's.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with temporary_folder("upload") as beside:
        folder = beside / repo_id.rpartition("/")[2]
        model.save_pretrained(folder)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload MoE-Bias adapter"))


def _text(name: str, config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"] or "the base model"
    facts = "\n".join(f"| {label} | {value} |" for label, value in _facts(config))
    return f"""# {name}

A MoE-Bias adapter for `{base}`: the model's weights stay as they are, and a small layer at the output
embedding adds routed logit biases to its logits. With the adapter disabled the model is itself again, bit for bit.
{_made_through(config)}
| | |
|---|---|
{facts}

```python
import moe_bias
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```
"""


def _made_through(config: Mapping[str, Any]) -> str:
    """What a user has to know of experts that are others on another output embedding."""
    if config["experts"] == "free":
        return ""
    return """Its experts are made through the model's own output embedding, which the adapter does not hold: on a
quantised copy of the model they differ as that embedding does.
"""


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("experts", f"{config['num_experts']}, {config['top_k']} per token"),
        ("an expert is", _expert(config)),
        ("tokens with a bias", _reached(config)),
        ("entropy gate", "on" if config["entropy_gate"] else "off"),
        ("strength", f"{config['strength']:g}"),
    ]
    if config["hidden_size"] is not None and config["vocab_size"] is not None:
        facts.append(("trainable parameters", f"{_parameters(config):,}"))
    if config["fork_coverage"] is not None:
        facts.append((_COVERED[config["reach"]], f"{config['fork_coverage']:.1%}"))
    return facts


def _expert(config: Mapping[str, Any]) -> str:
    kind, entries = config["experts"], "a bias of its own for each token of the support"
    if kind == "free":
        return entries
    depends = f", which depends on the hidden state with rank {config['expert_rank']}" if kind == "linear" else ""
    besides = f", and {entries}" if config["free_entries"] else ""
    return f"a direction in the space of the output embedding{depends}{besides}"


def _reached(config: Mapping[str, Any]) -> str:
    support = config["support"]
    if support is None:
        return "the whole vocabulary"
    if config["reach"] == "vocabulary":
        return f"the whole vocabulary; trained on a support of {len(support):,}"
    return f"{len(support):,}"


def _parameters(config: Mapping[str, Any]) -> int:
    layer = LayerConfig(**{name: config[name] for name in LayerConfig.model_fields})
    return layer.num_parameters(config["hidden_size"], config["vocab_size"])
