"""What `moe-bias headroom` is told."""

from __future__ import annotations

from pathlib import Path

from pydantic import ByteSize, Field

from moe_bias.commands.training_settings import SupervisedSettings


class HeadroomSettings(SupervisedSettings):
    """Say how much of the held-out loss a layer at the output could remove, before any is trained, and with what data.

    Options of the layer and its training are those of train sft: they tell which layer is measured.
    """

    output: Path | None = Field(None, description="folder of the record; none: the findings are only printed")
    train_tokens: int = Field(50_000, ge=1, description="train probes on so many tokens, of examples drawn by the seed")
    logits_budget: ByteSize = Field(
        ByteSize(2**31), description="memory to keep base logits in, such as 1GiB; what does not fit is recomputed"
    )
    top: int = Field(20, ge=2, description="tokens that one probe chooses among, the base's likeliest")
    time_limit: float = Field(300.0, gt=0, description="seconds after which no probe is begun")
