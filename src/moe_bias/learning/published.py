"""Versions of learned adapters, as folders that servers read, and the folder of names that points at the served ones.

A version is written whole beside its place, and a link with the adapter's name is moved onto it in one step: a request
finds the version before or the new one, and never half of either. Adapters that have learned nothing yet are links to
the folders that they were given in, which are never written to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save
from torch import Tensor

from moe_bias.adapter.files import LAYERS
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import unfinished, whole_folder

_KEPT_VERSIONS = 2
"""A server may be reading the one before the served one."""


class Published:
    """Adapters by name under `root`: `adapters/NAME` is a link, `versions/NAME/VERSION` what it points at."""

    def __init__(self, root: Path) -> None:
        self.names = root / "adapters"
        self._versions = root / "versions"
        self.names.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, start: Path) -> None:
        """Serves the adapter as it was given, unless a version of it is served already."""
        if not (self.names / name).exists():
            self._point(name, start.resolve())

    def publish(self, name: str, version: int, start: Path, layer: MoEBiasLayer) -> None:
        """Serves a version, in files like those of its start."""
        if version == 0:
            self._point(name, start.resolve())
            return
        folder = self._versions / name / f"{version:08d}"
        if not folder.is_dir():
            with whole_folder(folder) as made:
                (made / CONFIG_NAME).write_text(_config(start / CONFIG_NAME, layer), encoding="utf-8")
                weights = _weights(start / SAFETENSORS_WEIGHTS_NAME, layer.state_dict())
                (made / SAFETENSORS_WEIGHTS_NAME).write_bytes(weights)
        self._point(name, folder.resolve())
        for old in sorted(folder.parent.iterdir())[:-_KEPT_VERSIONS]:
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _point(self, name: str, folder: Path) -> None:
        link = self.names / name
        if link.is_symlink() and Path(os.readlink(link)) == folder:
            return
        with unfinished(link) as beside:
            beside.symlink_to(folder, target_is_directory=True)
            beside.replace(link)


def _config(start: Path, layer: MoEBiasLayer) -> str:
    """An adapter's config with the layer's support, which may have grown."""
    config = json.loads(start.read_bytes())
    support = layer.config.support
    return json.dumps({**config, "support": None if support is None else list(support)}, indent=2, sort_keys=True)


def _weights(start: Path, layer: Mapping[str, Tensor]) -> bytes:
    """An adapter file with other values in the tensors that are the layer's."""
    tensors = load_file(start)
    for key in tensors:
        name = key.rpartition(f"{LAYERS}.")[2]
        if name in layer:
            tensors[key] = layer[name].detach().float().contiguous()
    return save(tensors, metadata={"format": "pt"})
