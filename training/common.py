"""Data-parallel training on CPU cores: workers, optimiser, schedule, checkpoints, log, command line.

Worker processes with one thread each beat one process with several threads on a shared machine, where every OpenMP
barrier waits for the slowest core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Group:
    """This worker's place among the others."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, start: int, count: int) -> range:
        """This worker's part of the sample indices start ... start + count - 1; together the workers cover all."""
        if count % self.size:
            raise ValueError(f"a batch of {count} cannot be shared by {self.size} workers")
        return range(start + self.rank, start + count, self.size)


def launch(work: Callable[..., None], size: int, *arguments: Any) -> None:
    """Run `work(group, *arguments)` in `size` processes that can all-reduce."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (size, f"file://{folder}/rendezvous", work, arguments), nprocs=size)


def _enter(rank: int, size: int, rendezvous: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # The death of the parent arrives as SIGINT, which jobs in the background of a shell ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Linux shares the cores among sessions first, so workers in one session would share the time of one process.
    os.setsid()
    os.nice(5)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    work(Group(rank, size), *arguments)
    torch.distributed.destroy_process_group()


class FlatGradients:
    """All gradients in one buffer, so that averaging them over the workers is one call."""

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group) -> None:
        self.group = group
        parameters = list(parameters)
        self.buffer = torch.zeros(sum(p.numel() for p in parameters))
        start = 0
        for parameter in parameters:
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            torch.distributed.broadcast(parameter.data, 0)

    def zero(self) -> None:
        self.buffer.zero_()

    def average(self, clip: float = 1.0) -> float:
        """Average over the workers, clip to a norm of `clip`, return the norm before clipping."""
        torch.distributed.all_reduce(self.buffer)
        self.buffer /= self.group.size
        norm = self.buffer.norm().item()
        self.buffer *= min(1.0, clip / (norm + 1e-12))
        return norm


class MuonAdamW:
    """Muon for the matrices of transformer blocks and projectors, AdamW for embeddings, heads, norms and biases."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], muon: float, adamw: float, scale: float = 1.0):
        matrices, others, vectors = [], [], []
        for name, parameter in named:
            if parameter.ndim == 2 and ("layers." in name or "projector" in name):
                matrices.append(parameter)
            else:
                (vectors if parameter.ndim < 2 else others).append(parameter)
        self.rates = (muon * scale, adamw * scale)
        self.optimizers = [
            torch.optim.Muon(matrices, lr=muon, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(
                [{"params": others, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
                lr=adamw,
                betas=(0.9, 0.98),
            ),
        ]

    def step(self, factor: float) -> None:
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Linear warm-up times a cosine from 1 down to `floor`."""
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption leaves the previous one intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def checkpoint(step: int, optimizers: Sequence[MuonAdamW], **modules: nn.Module) -> dict[str, Any]:
    """All that `restore` needs to go on after `step` steps."""
    states = {name: module.state_dict() for name, module in modules.items()}
    return {"step": step, **states, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def restore(path: Path, optimizers: Sequence[MuonAdamW], **modules: nn.Module) -> int:
    """Load a checkpoint into the modules and as many optimisers as there are; the number of steps it has behind it."""
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(saved)
    return state["step"]


class Log:
    """One JSON object per line, appended; silent on all workers but the first."""

    def __init__(self, path: Path, group: Group) -> None:
        self.path = path if group.first else None
        self.start = time.perf_counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **record: Any) -> None:
        if self.path:
            record["seconds"] = round(time.perf_counter() - self.start, 1)
            rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(rounded) + "\n")


class Trainer:
    """Model and heads of one worker, and the loop over the steps of a stage. A subclass says what a step is."""

    report_every = 25  # steps

    def __init__(self, group: Group, folder: Path, log: Log, model: nn.Module, heads: nn.Module) -> None:
        self.group, self.folder, self.log, self.model, self.heads = group, folder, log, model, heads

    def optimizers(self, stage: Any) -> tuple[list[MuonAdamW], list[nn.Parameter]]:
        """The optimisers of a stage, and all that they train."""
        raise NotImplementedError

    def learn(self, stage: Any, step: int) -> dict[str, float]:
        """Back-propagate this worker's part of a step; its losses and accuracies, for the log."""
        raise NotImplementedError

    def report(self, stage: Any, done: int) -> dict[str, Any]:
        """What else the log says after so many steps."""
        raise NotImplementedError

    def run(self, stage: Any) -> None:
        """Train one stage, or what is left of it. Stages have a name, their steps, and what `schedule` needs."""
        optimizers, parameters = self.optimizers(stage)
        modules = {"model": self.model, "heads": self.heads}
        path = self.folder / f"{stage.name}.pt"
        begin = restore(path, optimizers, **modules) if path.exists() else 0
        gradients = FlatGradients(parameters, self.group)
        sums: dict[str, float] = {}
        for step in range(begin, stage.steps):
            gradients.zero()
            found = self.learn(stage, step)
            found["norm"] = gradients.average()
            factor = schedule(step, stage.steps, stage.warmup, stage.floor)
            for optimizer in optimizers:
                optimizer.step(factor)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value / self.report_every
            done = step + 1
            if done % self.report_every == 0:
                if self.group.first:
                    self.log.write(stage=stage.name, step=done, factor=factor, **sums, **self.report(stage, done))
                sums = {}
            if self.group.first and (done % SAVE_EVERY == 0 or done == stage.steps):
                save(path, checkpoint(done, optimizers, **modules))


def command(description: str, name: str, trainer: Callable[..., Any], stages: Sequence[Any], workers: int = 1) -> None:
    """The command line of a training script: `trainer(group, folder, log)` runs the stages, each from its checkpoint.

    Args:
        description: the script's docstring.
        name: of the model, for its folder of checkpoints and its log.
        trainer: a class of the script, so that worker processes can import it.
        stages: in order.
        workers: by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=workers, help="processes with one thread each; share each batch")
    parser.add_argument("--folder", type=Path, default=Path("runs", name), help="checkpoints")
    parser.add_argument("--log", type=Path, default=Path(f"training/logs/{name}.jsonl"))
    parser.add_argument("--last", type=int, default=len(stages) - 1, help="number of the last stage to run")
    arguments = parser.parse_args()
    launch(_train, arguments.workers, trainer, stages[: arguments.last + 1], arguments.folder, arguments.log)


def _train(group: Group, trainer: Callable[..., Any], stages: Sequence[Any], folder: Path, log: Path) -> None:
    training = trainer(group, folder, Log(log, group))
    for stage in stages:
        training.run(stage)
