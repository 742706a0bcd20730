"""The chat page: one file with its styles and scripts, which asks this server and nobody else."""

from __future__ import annotations

import secrets

from starlette.responses import HTMLResponse

from moe_bias.report.template import Markup, json_in_html, rendered


def page(name: str) -> HTMLResponse:
    """The page for a model of this name. Only what bears its nonce is run, and whatever a model writes does not."""
    nonce = secrets.token_urlsafe(16)
    text = rendered("chat.html", model=name, settings=Markup(json_in_html({"model": name})), nonce=nonce)
    return HTMLResponse(text, headers=_headers(nonce))


def _headers(nonce: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
