"""Adapters in a folder that is served, and the states that their files have been in.

A request keeps the state of its adapter that it began with, whatever happens to the files meanwhile.
So what a request is admitted with is a *version*: a copy of the files, in a folder that has the digest
of their bytes as its name and never changes. A copy is made, and checked, when a request first asks for
files that have changed; what cannot be read or does not fit the model is refused there, also what was made
on another model of the same sizes, where a sample of the engine's output embedding is known.
"""

from __future__ import annotations

import difflib
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from moe_bias.adapter import MoEBiasConfig, check_adapter_file, layer_tensors, read_adapter
from moe_bias.adapter.embedding import check_embedding
from moe_bias.layer import EmbeddingRows, MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.records import whole_folder

_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
_Stamp = tuple[tuple[int, int, int], ...]
_READINGS = 3
"""Times that files are read again which were replaced while they were read."""
_KEPT_SECONDS = 3600.0
"""A version that no request was admitted with for so long goes when another is made: no request still waits for it."""


class AdapterFolder:
    """The adapters of a folder, `NAME/adapter_config.json` and `NAME/adapter_model.safetensors` each.

    `hidden_size` and `vocab_size` are the model's, and `sample` gives that of its output embedding once
    it is known. Versions are kept under `versions`, a folder of this object's users alone. May be used
    from several threads.
    """

    def __init__(
        self,
        folder: Path,
        versions: Path,
        hidden_size: int,
        vocab_size: int,
        sample: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """Raises UserError where `folder` is none."""
        if not folder.is_dir():
            raise UserError(f"{str(folder)!r}, where adapters are to be served from, is not a folder")
        self._folder, self._versions = folder, versions
        self._hidden_size, self._vocab_size, self._sample = hidden_size, vocab_size, sample
        self._known: dict[str, tuple[_Stamp, Path | UserError]] = {}
        self._admitted: dict[Path, float] = {}
        self._lock = Lock()

    def names(self) -> list[str]:
        """See `adapter_names`."""
        return adapter_names(self._folder)

    def version(self, name: str) -> Path:
        """The folder of the version that the adapter's files are in now.

        Raises UserError on an unknown name, damaged files and an adapter of another model.
        """
        names = self.names()
        if name not in names:
            raise UserError(f"there is no adapter {name!r} on this server; {_offer(name, names)}")
        with self._lock:
            stamp = self._stamp(name)
            if name not in self._known or self._known[name][0] != stamp:
                self._known[name] = self._read(name)
                self._forget_old()
            found = self._known[name][1]
            if isinstance(found, UserError):
                raise found
            self._admitted[found] = time.monotonic()
        return found

    def _read(self, name: str) -> tuple[_Stamp, Path | UserError]:
        for _ in range(_READINGS):
            stamp = self._stamp(name)
            try:
                version = self._copy(name)
                read_version(version, self._hidden_size, self._vocab_size)
                check_made_on(version, self._sample())
            except (OSError, UserError) as error:
                found: Path | UserError = UserError(f"the adapter {name!r} cannot be served: {error}")
            else:
                found = version
            if stamp == self._stamp(name):
                break
        return stamp, found

    def _forget_old(self) -> None:
        current = {found for _, found in self._known.values()}
        now = time.monotonic()
        for version, admitted in list(self._admitted.items()):
            if version not in current and now - admitted > _KEPT_SECONDS:
                del self._admitted[version]
                shutil.rmtree(version)

    def _copy(self, name: str) -> Path:
        contents = {file: (self._folder / name / file).read_bytes() for file in _FILES}
        digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents.values()))
        version = self._versions / digest.hexdigest()
        if not version.is_dir():
            with whole_folder(version) as made:  # another process of this server may make the same copy
                for file, content in contents.items():
                    (made / file).write_bytes(content)
        return version

    def _stamp(self, name: str) -> _Stamp:
        """Changes whenever a file is replaced or written to; files that are missing have a stamp too."""
        stamps = []
        for file in _FILES:
            try:
                status = (self._folder / name / file).stat()
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(stamps)


def adapter_names(folder: Path) -> list[str]:
    """The adapters that are in a folder now, fit to be served or not."""
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{CONFIG_NAME}"))


def read_version(version: Path, hidden_size: int, vocab_size: int, rows: EmbeddingRows | None = None) -> MoEBiasLayer:
    """The frozen layer of an adapter's files, for a model of these sizes; `rows` are those of its output embedding.

    Raises UserError on damaged files and on an adapter of other sizes.
    """
    try:
        config, tensors = read_adapter(version)
        config = config.for_model(hidden_size, vocab_size)
        check_adapter_file(tensors, config)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(error)) from error
    layer = MoEBiasLayer(config.layer_config(), hidden_size, vocab_size, rows)
    layer.load_state_dict(layer_tensors(tensors))
    return layer.requires_grad_(False).eval()


def check_made_on(version: Path, sample: Tensor | None) -> None:
    """Raises UserError on an adapter of another output embedding than the sample's; warns where it may be quantised.

    Says nothing where the adapter or the engine has no sample.
    """
    config = PeftConfig.from_pretrained(str(version))
    assert isinstance(config, MoEBiasConfig)
    if sample is None or config.embedding_sample is None:
        return
    try:
        check_embedding(config.embedding_sample, sample, config.layer_config().through_embedding)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _offer(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3) or names[:10]
    return f"there is {', '.join(map(repr, near))}" if near else "its folder holds none"
