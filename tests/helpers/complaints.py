"""What a user is told of a mistake, at the terminal and in Python."""

import pytest

from moe_bias.cli import main
from moe_bias.config import Config
from moe_bias.mistakes import UserError


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that exits with 2 writes on standard error: one line that begins with the program's name."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("moe-bias: ")]
    assert code == 2, printed
    assert len(lines) == 1
    return lines[0].removeprefix("moe-bias: ")


def told(config: type[Config], **values) -> str:
    """The sentence that a user of Python reads about a config of these values."""
    with pytest.raises(UserError) as caught:
        config(**values)
    return str(caught.value)
