"""Training of one model from a recipe: resumable, the same weights for the same recipe.

A training directory holds ``recipe.toml``, ``state.safetensors`` (everything needed to go on),
``best.safetensors`` (weights of the epoch that is kept), ``history.json``, ``validation.npz``
(answers of those weights), ``learning_curve.png`` and, where the recipe asks for them, weights of
further epochs (:mod:`.stages`).  Nothing is pickled.

What is learnt is a lesson (:mod:`.lessons`): it knows images, loss and figures; this loop knows
epochs, steps, the optimiser and the directory.  Random numbers are drawn from (recipe seed,
purpose, epoch, step), so that a resumed training takes the same steps as an uninterrupted one.
On a CUDA device the forward pass runs in bfloat16, on a CPU where the recipe says so; on the CPU a
recipe gives the same weights again on the same kind of machine.  Several processes may share the
work (:mod:`.team`).

Axes: N training images, B images of a batch.
"""
from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ConfigurationError, MissingDependency, OutputDamaged
from .lessons import Lesson, lesson_of
from .pretrained import start_from
from .recipes import Optimiser, Recipe, read_recipe
from .stages import forget_stages, keep_stage
from .team import Team, join_team

__all__ = ["STATE", "Trained", "learning_rate", "open_trained", "train"]

log = logging.getLogger(__name__)

STATE, BEST, HISTORY, SCORES = ("state.safetensors", "best.safetensors", "history.json",
                                "validation.npz")
RECIPE, CURVE = "recipe.toml", "learning_curve.png"
SAVE_EVERY_S, TELL_EVERY_S = 60.0, 20.0
ORDER, AUGMENT, DROPOUT = 1, 2, 3       # purposes of random numbers


@dataclass
class Progress:
    """Where a training is: ``epoch`` and ``step`` are the next to be done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)      # of merit, one for each epoch


@dataclass(frozen=True)
class Trained:
    """A finished training: the network with the weights that are kept.

    ``examined`` are its answers to the validation images with their labels, as the lesson names
    them.
    """

    recipe: Recipe
    directory: Path
    network: Any
    history: list[dict[str, float]]
    examined: dict[str, np.ndarray]


def train(recipe_path: str | Path, out_dir: str | Path, resume: bool = True, threads: int = 1,
          processes: int = 1, device: str | None = None,
          report: Callable[[str], None] = log.info) -> Trained:
    """Train the model of ``recipe_path``; results and state go to ``out_dir``.

    With ``resume`` an interrupted training of the same recipe goes on where it was last saved
    (at least once a minute); a finished one returns at once.  Without, it starts again and what
    ``out_dir`` holds of a training is removed.  ``threads`` are torch's; ``processes`` simulate
    images that are not cached yet.  ``device`` is torch's word ("cuda:0"); None takes a CUDA
    device where there is one.  Progress lines go to ``report``.
    """
    recipe, out = read_recipe(recipe_path), Path(out_dir)
    lesson = lesson_of(recipe)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(threads)
    _keep_memory()
    begun = time.monotonic()
    with closing(lesson), join_team(where) as team:
        where = team.device(where)
        team.check(recipe.optimiser.batch)
        if team.leads:
            _claim(out, Path(recipe_path), resume)
            pupils, examiners = lesson.open(processes)
        team.wait()
        if not team.leads:              # what the first process simulated
            report = log.debug
            pupils, examiners = lesson.open(processes)
        report(f"{pupils} training and {examiners} validation images ready after "
               f"{time.monotonic() - begun:.0f} s; training on {where}"
               + (f" in {team.size} processes" if team.size > 1 else ""))
        torch.manual_seed(recipe.seed)
        network = lesson.network()
        if recipe.pretrained:
            report(start_from(network, Path(recipe_path).parent / recipe.pretrained))
        optimiser = _optimiser(network, recipe.optimiser)
        progress = _load_state(out / STATE, network, optimiser) or Progress()
        _move(network, optimiser, where)
        if _in_bfloat16(recipe.optimiser, where):
            network.to(memory_format=torch.channels_last)
        shared = team.wrap(network, where)
        while progress.epoch < recipe.optimiser.epochs:
            _epoch(lesson, recipe, pupils, network, shared, optimiser, progress, out, report, team)
            if team.leads:
                figure, summary = lesson.mark(_examine(lesson, network))
                _end_epoch(recipe, network, progress, out, figure, summary, report)
            progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
            if team.leads:
                _save_state(out / STATE, network, optimiser, progress)
                _replace(out / HISTORY, lambda path: path.write_text(
                    json.dumps(progress.history, indent=1), encoding="utf-8"))
            team.wait()
        if team.leads:
            if not (out / SCORES).exists():
                network.load_state_dict(_load_tensors(out / BEST))
                examined = _examine(lesson, network)
                _replace(out / SCORES, lambda path: _save_arrays(path, examined))
            draw_learning_curve(progress.history, out / CURVE)
        team.wait()
    return open_trained(out)


def open_trained(out_dir: str | Path) -> Trained:
    """A finished training directory; ``OutputDamaged`` when it is not finished."""
    out = Path(out_dir)
    missing = [name for name in (RECIPE, BEST, HISTORY, SCORES) if not (out / name).exists()]
    if missing:
        raise OutputDamaged(f"training in {out} is not finished: {', '.join(missing)} missing; "
                            "run xfel-classify train again, it goes on where it stopped")
    recipe = read_recipe(out / RECIPE)
    network = lesson_of(recipe).network()
    network.load_state_dict(_load_tensors(out / BEST))
    network.eval()
    with np.load(out / SCORES, allow_pickle=False) as stored:
        examined = {name: stored[name] for name in stored.files}
    history = json.loads((out / HISTORY).read_text(encoding="utf-8"))
    return Trained(recipe, out, network, history, examined)


def _in_bfloat16(how: Optimiser, where: torch.device) -> bool:
    """Whether training runs in bfloat16 with channels last; judging never does."""
    return how.precision == "bfloat16" or (how.precision == "auto" and where.type == "cuda")


def _examine(lesson: Lesson, network: nn.Module) -> dict[str, np.ndarray]:
    network.eval()
    with torch.inference_mode():
        return lesson.examine(network)


# --- one epoch ---------------------------------------------------------------------------------

def learning_rate(how: Optimiser, step: int, steps: int) -> float:
    """Of minibatch ``step`` (from 0) of ``steps`` in the whole training."""
    if step < how.warmup:
        return how.learning_rate * (step + 1) / how.warmup
    if how.schedule == "cosine":
        first, last = how.warmup, steps
        peak = how.learning_rate
        for epochs in how.cycles[:-1]:
            end = (0 if first == how.warmup else first) + steps * epochs // how.epochs
            if step < end:
                last = end
                break
            first, peak = end, how.restart * how.learning_rate
        share = (step - first) / max(1, last - first)
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    return how.learning_rate / (1 + how.decay * step)


def _epoch(lesson: Lesson, recipe: Recipe, pupils: int, network: Any, shared: Any,
           optimiser: torch.optim.Optimizer, progress: Progress, out: Path,
           report: Callable[[str], None], team: Team) -> None:
    """The rest of epoch ``progress.epoch``: every image once, the last short batch left out, or
    as many steps as the recipe says.

    ``shared`` is ``network`` as a team calls it.
    """
    how, epoch = recipe.optimiser, progress.epoch
    where = next(network.parameters()).device
    bfloat16 = _in_bfloat16(how, where)
    shuffle = np.random.default_rng([recipe.seed, ORDER, epoch if how.reshuffle else 0])
    steps = how.steps or max(1, pupils // how.batch)
    order_N = np.concatenate([shuffle.permutation(pupils)
                              for _ in range(max(1, -(-steps * how.batch // pupils)))])
    network.train()
    if hasattr(network, "begin_epoch"):
        network.begin_epoch(epoch)
    first, begun = progress.step, time.monotonic()
    saved = told = begun
    while progress.step < steps:
        step = progress.step
        chosen_B = team.share(np.sort(order_N[step * how.batch:(step + 1) * how.batch]))
        rng = np.random.default_rng([recipe.seed, AUGMENT, epoch, step,
                                     *([team.rank] if team.rank else [])])
        inputs = [_on_device(values, where, bfloat16) for values in lesson.inputs(chosen_B, rng)]
        torch.manual_seed((recipe.seed * 1_000_003 + DROPOUT) * 1_000_003 + epoch * steps + step
                          + (team.rank << 48))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(how, epoch * steps + step, steps * how.epochs)
        with torch.autocast(where.type, torch.bfloat16, enabled=bfloat16):
            outputs = shared(*inputs)
        loss = lesson.loss({name: values.float() for name, values in outputs.items()}, chosen_B)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        progress.loss_sum += team.mean(loss.detach())
        progress.step += 1
        now = time.monotonic()
        if now - told > TELL_EVERY_S:
            told = now
            left = (steps - progress.step) * (now - begun) / (progress.step - first)
            report(f"epoch {epoch + 1}/{how.epochs} step {progress.step}/{steps} loss "
                   f"{progress.loss_sum / progress.step:.4f}, {left:.0f} s left in the epoch")
        if team.leads and now - saved > SAVE_EVERY_S:
            _save_state(out / STATE, network, optimiser, progress)
            saved = now


def _end_epoch(recipe: Recipe, network: nn.Module, progress: Progress, out: Path, figure: float,
               summary: dict[str, float], report: Callable[[str], None]) -> None:
    row = {"epoch": progress.epoch + 1, "loss": progress.loss_sum / max(1, progress.step),
           **summary}
    progress.history.append(row)
    progress.figures.append(figure)
    report(f"epoch {row['epoch']}/{recipe.optimiser.epochs}: " + ", ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name != "epoch"))
    if figure > progress.best or recipe.optimiser.keep == "last":
        progress.best = figure
        _save_tensors(out / BEST, _tensors(network))
    if recipe.optimiser.stages:
        keep_stage(out, progress.figures, recipe.optimiser.stages,
                   lambda path: _save_tensors(path, _tensors(network)))


def _on_device(values: Tensor, where: torch.device, bfloat16: bool) -> Tensor:
    values = values.to(where)
    if bfloat16 and values.dim() == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    return values


def _move(network: nn.Module, optimiser: torch.optim.Optimizer, where: torch.device) -> None:
    """To the device, with the optimiser's moments of a resumed training."""
    network.to(where)
    for state in optimiser.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = value.to(where)


def _optimiser(network: nn.Module, how: Optimiser) -> torch.optim.Optimizer:
    if how.kind == "sgd":
        return torch.optim.SGD(network.parameters(), lr=how.learning_rate, momentum=how.momentum,
                               weight_decay=how.weight_decay)
    return torch.optim.Adam(network.parameters(), lr=how.learning_rate,
                            betas=(how.momentum, 0.999), weight_decay=how.weight_decay)


# --- state on disk ------------------------------------------------------------------------------

def _claim(out: Path, recipe_path: Path, resume: bool) -> None:
    """Make ``out`` this recipe's training directory, or say why it cannot be."""
    content = recipe_path.read_bytes()
    kept = out / RECIPE
    if not resume:
        for name in (STATE, BEST, HISTORY, SCORES, CURVE, RECIPE):
            (out / name).unlink(missing_ok=True)
        forget_stages(out)
    elif kept.exists() and kept.read_bytes() != content:
        raise ConfigurationError(f"{out} holds a training of another recipe than {recipe_path}; "
                                 "give another directory, start again without resuming, or give "
                                 f"the recipe {kept} to go on with that training")
    out.mkdir(parents=True, exist_ok=True)
    _replace(kept, lambda path: path.write_bytes(content))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependency(f"training keeps its state with safetensors ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    return safetensors


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous()
            for name, value in network.state_dict().items()}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """``write`` to a neighbour that then takes the name ``path``: whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _save_tensors(path: Path, tensors: dict[str, Tensor],
                  metadata: dict[str, str] | None = None) -> None:
    safetensors = _safetensors()
    _replace(path, lambda target: safetensors.torch.save_file(tensors, str(target), metadata))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(str(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise OutputDamaged(f"{path} cannot be read ({error}); remove it to train again from the "
                            "start") from error


def _save_state(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer,
                progress: Progress) -> None:
    tensors = {f"network.{name}": value for name, value in _tensors(network).items()}
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{name}"] = value.contiguous()
    _save_tensors(path, tensors, {"progress": json.dumps(vars(progress))})


def _load_state(path: Path, network: nn.Module,
                optimiser: torch.optim.Optimizer) -> Progress | None:
    if not path.exists():
        return None
    tensors = _load_tensors(path)
    with _safetensors().safe_open(str(path), "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    network.load_state_dict({name.removeprefix("network."): value
                             for name, value in tensors.items() if name.startswith("network.")})
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            optimiser.state[parameters[int(index)]][key] = value
    return progress


def _keep_memory() -> None:
    """Let glibc keep freed blocks: activations of 200 MB are otherwise mapped and cleared anew in
    every operation, which takes as long as the arithmetic (measured: 35 -> 19 ms per image)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return                      # not glibc: slower, nothing else
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def draw_learning_curve(history: list[dict[str, float]], path: Path) -> None:
    """Loss, and what is measured on the validation images, against the epoch as a PNG; skipped
    without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no learning curve: matplotlib is not installed")
        return
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, dashes in (("loss", "-"), ("validation_loss", "--")):
        left.semilogy(epochs, [row[name] for row in history], dashes,
                      label=name.replace("_", " "))
    others = [name for name in history[0] if name not in ("epoch", "loss", "validation_loss")]
    for name, dashes in zip(others, ("-", "--", ":", "-."), strict=False):
        right.plot(epochs, [row[name] for row in history], dashes, label=name.replace("_", " "))
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="validation", ylim=(None, 1.0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    _replace(path, lambda target: figure.savefig(target, dpi=120, format="png"))
