"""The adapters that a worker holds, within a budget of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from moe_bias.layer import MoEBiasLayer


class AdapterPool:
    """Layers by the folder of their version; beyond `budget` bytes those go that were not asked for the longest.

    A layer that goes while a request uses it stays in memory until that request has ended. One
    layer is held even where it alone exceeds the budget.
    """

    def __init__(self, load: Callable[[Path], MoEBiasLayer], budget: int) -> None:
        self._load, self._budget = load, budget
        self._layers: OrderedDict[Path, MoEBiasLayer] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of all layers that are held."""
        return sum(layer_bytes(layer) for layer in self._layers.values())

    def get(self, version: Path) -> MoEBiasLayer:
        """The version's layer, loaded where it is not held."""
        if version in self._layers:
            self._layers.move_to_end(version)
        else:
            self._layers[version] = self._load(version)
            while len(self._layers) > 1 and self.held_bytes > self._budget:
                self._layers.popitem(last=False)
        return self._layers[version]


def layer_bytes(layer: MoEBiasLayer) -> int:
    """Bytes of all that a layer holds: parameters, buffers, its support among them, and a table that was made."""
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers(), *layer.derived))
