"""The arms of `eval`: the model, and each adapter on it; which adapter that was, and answers under it.

MoE-Bias adapters leave the backbone alone, so the model and all of them, at whatever strengths, answer in one
batch. An adapter of another PEFT method changes the backbone: it is put on the model, answers alone, and is
taken off again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import safe_open
from torch import nn

from moe_bias.adapter.saved import MOE_BIAS, WEIGHTS_FILE, adapter_of_any_method, read_saved
from moe_bias.backbone import Head, output_embedding
from moe_bias.evaluation.samples import BASE, INSTRUCTED
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError, as_kind, read_json, reading, reason_of
from moe_bias.records import write_json
from moe_bias.rollout.policy import Policy
from moe_bias.training.problems import policy_of, saved_layer

FILE = "arms.json"


@dataclass(frozen=True)
class EvalArm:
    """An arm by its name in samples and records: the adapter as it was given, its method, parameters and digest.

    Of the model itself, and of a server's models, only the name is known. `strength` None is the adapter's own.
    `instruction` stands below each prompt of this arm.
    """

    name: str
    adapter: str | None = None
    method: str | None = None
    parameters: int | None = None
    digest: str | None = None
    strength: float | None = None
    instruction: str = ""

    @property
    def is_layer(self) -> bool:
        """Whether the frozen backbone serves this arm: the model itself, or a MoE-Bias adapter."""
        return self.method in (None, MOE_BIAS)


def arms_of(
    adapters: Sequence[str], with_base: bool, strengths: Sequence[float] = (), instruction: str = ""
) -> list[EvalArm]:
    """The model first, if asked for, then with an instruction, if there is one, then the adapters, called after their
    folders where these differ.

    With strengths each adapter is an arm at each of them, such as `my-adapter x0.5`. Raises UserError where an
    adapter is missing, damaged, puts tokens of its own before the prompt, or has no strength to be set.
    """
    short = [Path(adapter).name for adapter in adapters]
    names = short if len({BASE, INSTRUCTED, *short}) == len(short) + 2 else adapters
    found = [_arm(name, adapter) for name, adapter in zip(names, adapters, strict=True)]
    if strengths:
        found = [at for arm in found for at in _at_strengths(arm, strengths)]
    plain = [EvalArm(BASE)] if with_base else []
    return [*plain, *instructed_arm(instruction), *found]


def instructed_arm(instruction: str) -> list[EvalArm]:
    """The model without an adapter that is told more, where there is something to tell."""
    return [EvalArm(INSTRUCTED, instruction=instruction)] if instruction else []


def refuse_changed_arms(folder: Path, arms: Sequence[EvalArm]) -> None:
    """Writes down which adapters the folder's samples are of.

    Raises UserError where an adapter of the same name was another when its samples were drawn.
    """
    path = folder / FILE
    before = as_kind(dict[str, EvalArm], read_json(path, "file"), f"file {str(path)!r}") if path.is_file() else {}
    for arm in arms:
        if arm.name in before and before[arm.name].digest != arm.digest:
            raise UserError(
                f"adapter {arm.adapter!r} is not the one that {str(folder)!r} has samples of; give another --output"
            )
        if arm.name in before and before[arm.name].instruction != arm.instruction:
            raise UserError(
                f"{str(folder)!r} has samples of --instruction {before[arm.name].instruction!r}, not of "
                f"{arm.instruction!r}; give another --output"
            )
    write_json(path, {name: asdict(arm) for name, arm in (before | {arm.name: arm for arm in arms}).items()})


def layer_policies(arms: Sequence[EvalArm], head: Head) -> list[Policy]:
    """The policy of each arm on the frozen model. Raises UserError on an adapter that does not fit it."""
    return [policy_of(layer, head) for layer in arm_layers(arms, head)]


def arm_layers(arms: Sequence[EvalArm], head: Head) -> list[MoEBiasLayer | None]:
    """The layer of each arm at its strength, None of the model itself. Raises UserError as `layer_policies` does."""
    layers = {name: saved_layer(name, head).layer for name in dict.fromkeys(arm.adapter for arm in arms) if name}
    return [None if arm.adapter is None else _with_strength(layers[arm.adapter], arm.strength) for arm in arms]


@contextmanager
def adapted(model: Any, head: Head, arm: EvalArm) -> Iterator[tuple[nn.Module, Head]]:
    """The model with another method's adapter on it while the block runs, and its output embedding.

    Raises UserError where the adapter does not fit the model.
    """
    folder = adapter_of_any_method(str(arm.adapter))[0]
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # other methods' loaders raise anything over what they were not made for
        raise UserError(f"adapter {arm.adapter!r} does not fit the model ({reason_of(error)})") from error
    try:
        inner = wrapped.get_base_model()
        yield inner, Head(output_embedding(inner), head.transform)
    finally:
        wrapped.unload()


def _with_strength(layer: MoEBiasLayer, strength: float | None) -> MoEBiasLayer:
    """The layer at a strength of its own; it shares its parameters and what is derived from them."""
    other = copy.copy(layer)
    other.strength = layer.strength if strength is None else strength
    return other


def _at_strengths(arm: EvalArm, strengths: Sequence[float]) -> list[EvalArm]:
    if not arm.is_layer:
        listed = ",".join(f"{strength:g}" for strength in strengths)
        raise UserError(
            f"--strength {listed} does not apply to adapter {arm.adapter!r} of type {arm.method}: only {MOE_BIAS} "
            "adapters have one; measure it by a command of its own without --strength, into the same --output"
        )
    return [replace(arm, name=f"{arm.name} x{strength:g}", strength=strength) for strength in strengths]


def _arm(name: str, adapter: str) -> EvalArm:
    folder, method = adapter_of_any_method(adapter)
    weights = folder / WEIGHTS_FILE
    if method == MOE_BIAS:
        config, _ = read_saved(adapter)
        assert config.hidden_size is not None
        assert config.vocab_size is not None
        parameters = config.layer_config().num_parameters(config.hidden_size, config.vocab_size)
    else:
        parameters = _trained_entries(weights, _config_of_other_method(folder, method, adapter))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return EvalArm(name, adapter, method, parameters, digest)


def _config_of_other_method(folder: Path, method: str, adapter: str) -> Any:
    if method not in PEFT_TYPE_TO_PREFIX_MAPPING:
        raise UserError(f"adapter {adapter!r} is of type {method!r}, which the installed PEFT does not know")
    with reading(f"adapter {adapter!r}"):
        config: Any = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise UserError(
            f"adapter {adapter!r} is of type {method}, which puts tokens of its own before the prompt; "
            "serve it, and measure it with --endpoint"
        )
    return config


def _trained_entries(weights: Path, config: Any) -> int:
    """The adapter's own, and whole modules that were trained; PEFT saves an embedding with adapters at it, too."""
    own = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    with reading(f"adapter file {str(weights)!r}"), safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if own in name or getattr(config, "modules_to_save", None)]  # noqa: SIM118
        return sum(prod(file.get_slice(name).get_shape()) for name in names)
