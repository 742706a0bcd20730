"""Where work is done that is spread over processes and machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from moe_bias.config.base import Config

AUTO = "auto"


def _count_or_auto(value: object) -> object:
    """One sentence on what is neither, where a union of types would have two."""
    if value == AUTO or (str(value).isdecimal() and int(str(value)) > 0):
        return value
    raise ValueError("give a number from 1 up, or auto")


class Cluster(Config):
    """The workers that share a piece of work. One without `ray` is the process itself, and Ray is not started.

    A worker computes with so many threads as it has cores, whatever the machine has besides: so the last bits of what
    it computes do not depend on how many workers there are.
    """

    workers: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        1, description="worker processes; 'auto': one for each GPU, or without GPUs for as many cores as one takes"
    )
    ray: str = Field(
        "",
        description="Ray cluster to work on: 'auto', host:port or ray://host:port; none: one on this machine alone, "
        "which starts and ends by itself",
    )
    worker_cores: int = Field(1, ge=1, description="cores of a worker, and threads that it computes with")

    @property
    def is_this_process(self) -> bool:
        """Whether nothing is spread."""
        return self.workers == 1 and not self.ray
