"""`moe-bias verify`: are the shards of a feature store what was written?"""

from __future__ import annotations

from moe_bias.commands.looking_settings import VerifySettings
from moe_bias.features.store import FeatureStore
from moe_bias.limits import in_bytes
from moe_bias.progress import text_console


def run(settings: VerifySettings) -> None:
    """Raises UserError naming the damaged shards."""
    store = FeatureStore.open(settings.store, anew=True)
    manifest = store.manifest
    text_console().print(
        f"{len(manifest.shards)} shards, {len(store):,} tokens, {in_bytes(manifest.bytes)}: every checksum fits.",
        highlight=False,
        soft_wrap=True,
    )
