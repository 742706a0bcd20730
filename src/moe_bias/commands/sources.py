"""Where a command's settings come from: defaults, the settings file, variables, the command line; later ones win.

The settings file is TOML, `moe-bias.toml` in the current folder or the one that MOE_BIAS_CONFIG names. It has sections:
one for each part that commands share (`[layer]`, `[sft]`, `[sampling]`), which all commands with that part read, and
one for each command (`[compare]`), which may set any of its options and wins over the parts. A name means one thing in
one section: `expert_rate` in `[sft]` is not that of `[rl]`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import new_class
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_bias.commands.learning_settings import BEGINNING, LearnOptions
from moe_bias.commands.option_types import option
from moe_bias.commands.training_settings import DataSettings, TextSettings
from moe_bias.config import (
    Cluster,
    Config,
    EvalConfig,
    LayerOptions,
    ModelConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SFTConfig,
    StartOptions,
    TaskConfig,
    nearest,
)
from moe_bias.mistakes import (
    AS_PAIRS,
    SAME_CALL,
    UserError,
    first_mistake,
    read_text,
    reading,
    reason_of,
    shown,
)
from moe_bias.variables import CONFIG, PREFIX, ServingVariables, refuse_unknown, variable

Settings = TypeVar("Settings", bound=Config)
PARTS: dict[type[Config], str] = {
    ModelConfig: "model",
    Cluster: "cluster",
    LayerOptions: "layer",
    StartOptions: "layer",
    SFTConfig: "sft",
    RLConfig: "rl",
    SamplingConfig: "sampling",
    TextSettings: "data",
    DataSettings: "data",
    TaskConfig: "task",
    RewardConfig: "reward",
    EvalConfig: "eval",
    ServingVariables: "serve",
    LearnOptions: "learn",
}
"""The section of each part. What a part takes from one without a section is its own, as the rates of an optimiser."""


_SAID_OTHERWISE = {SAME_CALL: "the same command", AS_PAIRS: "--objective dpo to `moe-bias train sft`"}


class Sections:
    """Which options each section of the settings file may hold, of all the commands that there are."""

    def __init__(self, commands: Mapping[str, type[Config]]) -> None:
        """`commands` are their settings by the section of their own."""
        self._commands = commands
        self.fields = {field for settings in commands.values() for field in settings.model_fields}
        self.keys: dict[str, set[str]] = {name: set(settings.model_fields) for name, settings in commands.items()}
        for settings in commands.values():
            for field in settings.model_fields:
                if (part := part_of(settings, field)) is not None:
                    self.keys.setdefault(part, set()).add(key_of(field, part))

    def values_of(self, settings: type[Config], content: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
        """By field of a command's settings, what the file says and the section that says it."""
        own = next(name for name, known in self._commands.items() if known is settings)
        found: dict[str, tuple[Any, str]] = {}
        for field in settings.model_fields:
            for section in (own, part_of(settings, field)):
                if section is not None and (key := key_of(field, section)) in content.get(section, {}):
                    found[field] = (content[section][key], section)
                    break
        return found

    def check(self, path: Path, content: Mapping[str, Any]) -> None:
        """Raises UserError on a key outside the sections, and on a section or key that no command knows."""
        for name, values in content.items():
            if name not in self.keys:
                homes = sorted(section for section, keys in self.keys.items() if name in keys)
                if homes:
                    raise UserError(f"{path} has {name!r} outside a section; write it below [{'] or ['.join(homes)}]")
                raise UserError(f"{path} has the unknown section {name!r}{nearest(name, self.keys)}")
            if not isinstance(values, dict):
                raise UserError(f"{path} has {name} = {shown(values)}, where [{name}] is a section of options")
            for key in values:
                if key not in self.keys[name]:
                    raise UserError(f"{path} has the unknown key {key!r} in [{name}]{nearest(key, self.keys[name])}")


def part_of(settings: type[Config], field: str) -> str | None:
    """The section that a field of a command's settings is of, as far as it is of a part that commands share."""
    for cls in reversed(settings.__mro__):
        if field in getattr(cls, "model_fields", {}) and cls in PARTS:
            return PARTS[cls]
    return None


def key_of(field: str, section: str) -> str:
    """A field as a section of the settings file has it."""
    return field.removeprefix(BEGINNING) if section == PARTS[LearnOptions] else field


class _Reading(BaseSettings):
    """What pydantic-settings is told. The file's values are given; variables win over them, options over both."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is read, the first winning; pydantic-settings puts the command line before them."""
        return env_settings, init_settings


@cache
def reader_of(settings: type[Config]) -> type[BaseSettings]:
    """The class that reads a command's settings, whose own class reads nothing."""
    body = {"__doc__": settings.__doc__, "__module__": __name__}
    made = new_class(settings.__name__, (_Reading, settings), exec_body=lambda names: names.update(body))
    assert issubclass(made, BaseSettings)
    return made


def options_on(parser: Any, settings: type[Config]) -> CliSettingsSource[Any]:
    """Gives a parser a command's options; `read` takes what is returned."""
    return CliSettingsSource(reader_of(settings), root_parser=parser, cli_parse_args=False)


def read(
    settings: type[Settings], sections: Sections, options: CliSettingsSource[Any], given: Mapping[str, Any]
) -> Settings:
    """The settings of a run whose command line gave these fields.

    Raises UserError saying where a bad value is from, and on a variable or a key of the settings file that no command
    reads.
    """
    refuse_unknown(sections.fields)
    path = settings_file()
    content = _content(path)
    sections.check(path, content)
    in_file = sections.values_of(settings, content)
    origins = {name: f"{path} [{section}]" for name, (_, section) in in_file.items()}
    set_variables = {name.upper() for name in os.environ}
    origins |= {name: variable(name) for name in settings.model_fields if variable(name) in set_variables}
    origins |= {name: option(name) for name in given}
    try:
        with reading("the command line", SettingsError):
            typed = options(parsed_args=dict(given))
        values = {name: value for name, (value, _) in in_file.items()}
        found = reader_of(settings)(_cli_settings_source=typed, **values)
    except SettingsError as error:
        raise UserError(_unreadable(error)) from error
    except UserError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise UserError(described(error.__cause__, origins)) from error
    return settings(**{name: getattr(found, name) for name in found.model_fields_set})


def settings_file() -> Path:
    """The TOML file of settings: the one MOE_BIAS_CONFIG names, else `moe-bias.toml` here.

    Raises UserError where MOE_BIAS_CONFIG names no file.
    """
    named = os.environ.get(CONFIG)
    if named and not Path(named).is_file():
        raise UserError(f"MOE_BIAS_CONFIG names {named!r}, which is not a file")
    return Path(named or "moe-bias.toml")


def described(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One sentence on the first thing wrong, naming the option, variable or key of the file that it came from."""
    first = first_mistake(error)
    if not first.place:
        sources = [f"{name} comes from {origins[name]}" for name in first.among if name in origins]
        return f"{first.reason} ({', '.join(sources)})" if sources else first.reason
    key = first.place[0]
    if first.kind == "missing":
        return f"{option(key)} is required"
    return first.of(f"{key} from {origins[key]}" if key in origins else key)


def as_typed(sentence: str, fields: Iterable[str]) -> str:
    """A sentence of the library's in words of the command line: fields, which stand in backquotes, are options."""
    known = set(fields)
    for said, typed in _SAID_OTHERWISE.items():
        sentence = sentence.replace(said, typed)
    return re.sub(r"`(\w+)`", lambda found: option(found[1]) if found[1] in known else found[0], sentence)


def _unreadable(error: SettingsError) -> str:
    """One sentence on an option or variable of several values that cannot be taken apart."""
    reason = str(error)
    field = re.search(r'value for field "(\w+)"', reason)
    if field is None:
        return reason[0].lower() + reason[1:]
    return f'{field[1]} from {variable(field[1])} must be written as JSON, such as {{"max_terms": 3}}'


def _content(path: Path) -> dict[str, Any]:
    """What a settings file holds, nothing where there is no file. Raises UserError where it is damaged."""
    if not path.is_file() or path.stat().st_size == 0:
        return {}
    text = read_text(path, "the settings file")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {reason_of(error)}") from error
