"""`moe-bias labels`: ways to choose among labels beside each other."""

from __future__ import annotations

from moe_bias.api.labels import labels
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.label_settings import LabelsSettings
from moe_bias.config import LabelsConfig
from moe_bias.frozen import frozen


def run(settings: LabelsSettings) -> None:
    """Runs the ways that are not done yet, and prints all of them. Raises as `moe_bias.labels` does."""
    config = LabelsConfig(**{name: getattr(settings, name) for name in LabelsConfig.model_fields})
    report = labels(frozen(settings), settings.data, config, output=settings.output)
    console = report_console()
    console.print(str(report), highlight=False)
    console.print(f"The record and MoE-Bias's adapters are in {settings.output}.", highlight=False)
