"""Warns where a page of the site would fetch anything from another host; with --strict that ends the build."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.plugins import get_plugin_logger

_FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"' >]+)""")
_LOG = get_plugin_logger("own_host")


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Called by mkdocs with each page's HTML."""
    for address in _FETCHED.findall(output):
        _LOG.warning(f"{page.file.src_uri} fetches {address}")
