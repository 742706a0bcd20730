"""Who may teach which adapter: a file of keys, each with the names of its adapters.

    {"a-long-secret": "alice", "another": ["bob", "team"], "the-operator's": "*"}

A key is sent as OpenAI's clients send theirs, `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from moe_bias.mistakes import UserError, read_json, shown

ALL = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What a machine calls itself: only its own users reach a server there."""
_SHORTEST = 16


class Keys:
    """Keys and their adapters; without any, whoever reaches the server may teach every adapter."""

    def __init__(self, adapters: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._adapters = adapters

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Raises UserError where the file is none of keys and names; it never shows a key."""
        found = read_json(path, "file of keys")
        if not isinstance(found, dict) or not found:
            raise UserError(f'{str(path)!r} holds no keys; it is to be a JSON object, {{"KEY": "ADAPTER"}}')
        adapters = {}
        for place, (key, names) in enumerate(found.items(), 1):
            listed = [names] if isinstance(names, str) else names
            if not isinstance(listed, list) or not listed or not all(isinstance(name, str) and name for name in listed):
                raise UserError(
                    f"key {place} of {str(path)!r} is for {shown(names)}; give an adapter's name, a list, or '*'"
                )
            if len(key) < _SHORTEST:
                raise UserError(
                    f"key {place} of {str(path)!r} has {len(key)} characters; whoever guesses it teaches the adapter: "
                    f"give {_SHORTEST} or more"
                )
            adapters[key] = tuple(listed)
        return cls(adapters)

    @property
    def names(self) -> list[str]:
        """The adapters that are named, each once."""
        given = self._adapters or {}
        return list(dict.fromkeys(name for names in given.values() for name in names if name != ALL))

    @property
    def are_needed(self) -> bool:
        """Whether nothing is taught without one."""
        return self._adapters is not None

    def allow(self, authorization: str | None, adapter: str) -> bool:
        """Whether a request with this header may touch the adapter. Takes as long whatever the key is."""
        if self._adapters is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        allowed = False
        for key, names in self._adapters.items():
            if hmac.compare_digest(key.encode(), given.strip().encode()):
                allowed = adapter in names or ALL in names
        return allowed and scheme.lower() == "bearer"
