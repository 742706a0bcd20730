"""`moe-bias headroom`: what a layer at the output could gain on some data, before it is trained."""

from __future__ import annotations

from moe_bias.api.headroom import RECORD_FILE, measured, refuse_other_record
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.headroom_settings import HeadroomSettings
from moe_bias.commands.material import opened
from moe_bias.experiments.headroom import Options
from moe_bias.mistakes import Interrupted
from moe_bias.progress import say


def run(settings: HeadroomSettings) -> None:
    """Prints the findings, one sentence first, and leaves their record where `settings.output` says.

    Raises UserError on data or settings that cannot be used, and where the folder holds another run's record;
    Interrupted on Ctrl-C, which leaves hidden states that were extracted.
    """
    refuse_other_record(settings.output)
    console = report_console()
    with opened(settings, console) as data:
        say(
            console,
            f"Probes on up to {settings.train_tokens:,} tokens; none is begun after {settings.time_limit:g} seconds",
        )
        try:
            made_with = settings.model_dump(mode="json")
            found = measured(data, settings, Options(settings.top, settings.time_limit), made_with, settings.output)
        except KeyboardInterrupt as interrupt:
            raise Interrupted("no record is left; hidden states that are kept are found by the next run") from interrupt
    console.print(str(found), highlight=False, soft_wrap=True)
    for name in found.findings.left_out:
        say(console, f"Left out, as the time was over: {name}")
    if settings.output is not None:
        say(console, f"{RECORD_FILE} is in {settings.output}.")
