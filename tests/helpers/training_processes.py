"""Training in real processes, which tests kill: each runs the same small job on random features.

A fork server imports everything once, so that a process starts in milliseconds.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.models import tiny_model
from helpers.training import features_of, head_of, layer_of
from moe_bias.adapter import save_layer
from moe_bias.cli import main
from moe_bias.commands.training_settings import TrainSFTSettings
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import train
from moe_bias.training.trainer import FitReport

_SERVED = multiprocessing.get_context("forkserver")
_SERVED.set_forkserver_preload(
    ["helpers.training_processes", "accelerate", "moe_bias.commands.train_sft", "transformers.models.llama"]
)
# The server of Python 3.11 looks for these modules on its own path alone, and goes on without them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
ADAPTER = "adapter_model.safetensors"


def settings_of(folder: Path, choices: dict[str, Any]) -> TrainSFTSettings:
    return TrainSFTSettings(data="none", output=folder, device="cpu", **choices)


def train_in(
    layer, source, held_out, head, settings: TrainSFTSettings, processes: Processes = ALONE, **others
) -> FitReport:
    """Trains in the folder that the settings name, as the command does."""
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    made_with = settings.model_dump(mode="json")
    return train(layer, source, held_out, head, settings, checkpoints, made_with, processes, **others)


def run_training(folder: Path, choices: dict[str, Any]) -> None:
    """Trains, or goes on, and saves the adapter."""
    torch.set_num_threads(1)
    settings, head = settings_of(folder, choices), head_of()
    features, layer = features_of(head), layer_of()
    processes = Processes.join("cpu")
    train_in(layer, features, features.at(slice(0, 20)), head, settings, processes)
    if processes.is_first:
        save_layer(layer, folder, tiny_model())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def start_training(folder: Path, choices: dict[str, Any]) -> Any:
    process = _SERVED.Process(target=run_training, args=(folder, choices))
    process.start()
    return process


def start_command(words: list[str], errors: Path) -> Any:
    """The command itself; its standard error goes into a file, its exit code is the process's."""
    process = _SERVED.Process(target=_command, args=(words, errors, os.environ.get("MOE_BIAS_CACHE")))
    process.start()
    return process


def _command(words: list[str], errors: Path, cache: str | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs without
    torch.set_num_threads(1)
    if cache is not None:  # the fork server has the variables of when it was started
        os.environ["MOE_BIAS_CACHE"] = cache
    descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os._exit(main(words))


def run_two(folder: Path, choices: dict[str, Any]) -> None:
    """The same job in two processes that talk by gloo."""
    assert _launch(_ranked_training, folder, choices) == [0, 0]


def run_two_of(target: Callable[..., None], *arguments: Any) -> None:
    """A function of a module in two processes of one launcher."""
    assert _launch(_ranked, target, arguments) == [0, 0]


def run_two_commands(words: list[str], errors: Path) -> list[int]:
    """The command in two processes, as a launcher starts it; their exit codes."""
    return _launch(_ranked_command, words, errors, os.environ.get("MOE_BIAS_CACHE"))


def _launch(target: Any, *arguments: Any) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [_SERVED.Process(target=target, args=(rank, port, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return [process.exitcode for process in both]


def _take_place(rank: int, port: int) -> None:
    """Sets what a launcher sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")


def _ranked_training(rank: int, port: int, folder: Path, choices: dict[str, Any]) -> None:
    _take_place(rank, port)
    run_training(folder, choices)
    torch.distributed.destroy_process_group()


def _ranked(rank: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _take_place(rank, port)
    torch.set_num_threads(1)
    target(*arguments)


def _ranked_command(rank: int, port: int, words: list[str], errors: Path, cache: str | None) -> None:
    _take_place(rank, port)
    _command(words, errors.with_suffix(f".{rank}"), cache)
