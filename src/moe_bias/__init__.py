"""MoE-Bias: adapt a frozen language model at its output with routed, entropy-gated logit biases.

The public names are resolved on first use, so that `import moe_bias` costs nothing until then. One
import has an effect of its own: PEFT must know the method before it loads an adapter, so importing
this package after PEFT, or PEFT after it, registers the method.
"""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_bias.adapter import MoEBiasConfig, MoEBiasHead, MoEBiasModel, find_adapter_head
    from moe_bias.adapter.card import push_to_hub
    from moe_bias.adapter.shift import HiddenShift, InsertedShift
    from moe_bias.api.adapters import generate, load_layer, save
    from moe_bias.api.analysis import Analysis, Flips, analyze
    from moe_bias.api.data import extract
    from moe_bias.api.drafts import train_draft
    from moe_bias.api.experiments import arms, compare, sweep
    from moe_bias.api.headroom import Headroom, headroom
    from moe_bias.api.labels import LabelsReport, labels
    from moe_bias.api.learning import LearnReport, learn
    from moe_bias.api.measuring import evaluate
    from moe_bias.api.own_answers import OwnAnswers, own_answers
    from moe_bias.api.reports import ArmsReport, CompareReport, DraftReport, Evaluation, RLReport, SFTReport
    from moe_bias.api.rewarded import Watch, train_rl
    from moe_bias.api.right_answers import RightAnswers, right_answers
    from moe_bias.api.static_bias import static_bias
    from moe_bias.api.supervised import train_sft
    from moe_bias.api.tasks import task
    from moe_bias.config import (
        ArmsConfig,
        Cluster,
        CompareConfig,
        DraftConfig,
        EvalConfig,
        LabelsConfig,
        LayerConfig,
        LearnConfig,
        RewardConfig,
        RLConfig,
        SFTConfig,
    )
    from moe_bias.frozen import Frozen, load
    from moe_bias.functional import (
        apply_moe_bias,
        get_load_balance_loss,
        get_moe_bias_layer,
        load_moe_bias_layer,
        save_moe_bias_layer,
        shift_hidden_states,
    )
    from moe_bias.layer import MoEBiasLayer
    from moe_bias.mistakes import UserError
    from moe_bias.tasks.task import Problem, Task
    from moe_bias.tasks.verdict import Verdict
    from moe_bias.training.data import Data
    from moe_bias.training.loop import Callback
    from moe_bias.training.objectives import DAPO, DPO, Distillation, Objective, Supervised, Terms

__all__ = [
    "DAPO",
    "DPO",
    "Analysis",
    "ArmsConfig",
    "ArmsReport",
    "Callback",
    "Cluster",
    "CompareConfig",
    "CompareReport",
    "Data",
    "Distillation",
    "DraftConfig",
    "DraftReport",
    "EvalConfig",
    "Evaluation",
    "Flips",
    "Frozen",
    "Headroom",
    "HiddenShift",
    "InsertedShift",
    "LabelsConfig",
    "LabelsReport",
    "LayerConfig",
    "LearnConfig",
    "LearnReport",
    "MoEBiasConfig",
    "MoEBiasHead",
    "MoEBiasLayer",
    "MoEBiasModel",
    "Objective",
    "OwnAnswers",
    "Problem",
    "RLConfig",
    "RLReport",
    "RewardConfig",
    "RightAnswers",
    "SFTConfig",
    "SFTReport",
    "Supervised",
    "Task",
    "Terms",
    "UserError",
    "Verdict",
    "Watch",
    "analyze",
    "apply_moe_bias",
    "arms",
    "compare",
    "evaluate",
    "extract",
    "find_adapter_head",
    "generate",
    "get_load_balance_loss",
    "get_moe_bias_layer",
    "headroom",
    "labels",
    "learn",
    "load",
    "load_layer",
    "load_moe_bias_layer",
    "own_answers",
    "push_to_hub",
    "right_answers",
    "save",
    "save_moe_bias_layer",
    "shift_hidden_states",
    "static_bias",
    "sweep",
    "task",
    "train_draft",
    "train_rl",
    "train_sft",
]

_HOMES = {
    "frozen": (
        "Frozen",
        "load",
    ),
    "api.data": ("extract",),
    "training.data": ("Data",),
    "api.supervised": ("train_sft",),
    "api.drafts": ("train_draft",),
    "api.own_answers": (
        "OwnAnswers",
        "own_answers",
    ),
    "api.tasks": ("task",),
    "api.rewarded": (
        "Watch",
        "train_rl",
    ),
    "api.headroom": (
        "Headroom",
        "headroom",
    ),
    "api.analysis": (
        "Analysis",
        "Flips",
        "analyze",
    ),
    "api.measuring": ("evaluate",),
    "api.experiments": (
        "arms",
        "compare",
        "sweep",
    ),
    "api.static_bias": ("static_bias",),
    "api.right_answers": (
        "RightAnswers",
        "right_answers",
    ),
    "api.labels": (
        "LabelsReport",
        "labels",
    ),
    "api.learning": (
        "LearnReport",
        "learn",
    ),
    "api.adapters": (
        "generate",
        "load_layer",
        "save",
    ),
    "api.reports": (
        "ArmsReport",
        "CompareReport",
        "DraftReport",
        "Evaluation",
        "RLReport",
        "SFTReport",
    ),
    "config": (
        "ArmsConfig",
        "Cluster",
        "CompareConfig",
        "DraftConfig",
        "EvalConfig",
        "LabelsConfig",
        "LayerConfig",
        "LearnConfig",
        "RLConfig",
        "RewardConfig",
        "SFTConfig",
    ),
    "training.objectives": (
        "DAPO",
        "DPO",
        "Distillation",
        "Objective",
        "Supervised",
        "Terms",
    ),
    "training.loop": ("Callback",),
    "tasks.task": (
        "Problem",
        "Task",
    ),
    "tasks.verdict": ("Verdict",),
    "mistakes": ("UserError",),
    "layer": ("MoEBiasLayer",),
    "functional": (
        "apply_moe_bias",
        "get_load_balance_loss",
        "get_moe_bias_layer",
        "load_moe_bias_layer",
        "save_moe_bias_layer",
        "shift_hidden_states",
    ),
    "adapter": (
        "MoEBiasConfig",
        "MoEBiasHead",
        "MoEBiasModel",
        "find_adapter_head",
    ),
    "adapter.shift": (
        "HiddenShift",
        "InsertedShift",
    ),
    "adapter.card": ("push_to_hub",),
}
"""Where each name is defined, in the order in which someone meets them."""
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        near = "".join(f"; the nearest is {one!r}" for one in get_close_matches(name, __all__, n=1))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _RegisterAfterPeft(MetaPathFinder):
    """Finds PEFT as Python itself would, and registers the method once PEFT's own code has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_peft = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_peft(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module("moe_bias.adapter")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("moe_bias.adapter")
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
