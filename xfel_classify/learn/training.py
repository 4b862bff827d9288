"""Training of one model from a recipe: resumable, the same weights for the same recipe.

A training directory holds ``recipe.toml``, ``state.safetensors`` (everything needed to go on),
``best.safetensors`` (weights of the best epoch), ``history.json``, ``validation.npz`` (scores of
the best weights) and ``learning_curve.png``.  Nothing is pickled.

Random numbers are drawn from (recipe seed, purpose, epoch, step), so that a resumed training
takes the same steps as an uninterrupted one.
"""
from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import ConfigurationError, MissingDependency, OutputDamaged
from .datasets import ImageSet, augment, open_runs
from .networks import build_network
from .recipes import Optimiser, Recipe, read_recipe, runs_of

__all__ = ["STATE", "Trained", "learning_rate", "open_trained", "train"]

log = logging.getLogger(__name__)

STATE, BEST, HISTORY, SCORES = ("state.safetensors", "best.safetensors", "history.json",
                                "validation.npz")
RECIPE, CURVE = "recipe.toml", "learning_curve.png"
SAVE_EVERY_S = 60.0
ORDER, AUGMENT, DROPOUT = 1, 2, 3       # purposes of random numbers


@dataclass
class Progress:
    """Where a training is: ``epoch`` and ``step`` are the next to be done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A finished training: the network with its best weights and its validation scores.

    ``scores_N``, ``labels_N`` and ``runs_N`` are aligned: score of the positive class, truth,
    and number of the run in the recipe's validation runs.
    """

    recipe: Recipe
    directory: Path
    network: nn.Module
    history: list[dict[str, float]]
    scores_N: np.ndarray
    labels_N: np.ndarray
    runs_N: np.ndarray


def train(recipe_path: str | Path, out_dir: str | Path, resume: bool = True, threads: int = 1,
          processes: int = 1, report: Callable[[str], None] = log.info) -> Trained:
    """Train the model of ``recipe_path``; results and state go to ``out_dir``.

    With ``resume`` an interrupted training of the same recipe goes on where it was last saved
    (at least once a minute); a finished one returns at once.  Without, it starts again and what
    ``out_dir`` holds of a training is removed.  ``threads`` are torch's; ``processes`` simulate
    images that are not cached yet.  Progress lines go to ``report``.
    """
    recipe, out = read_recipe(recipe_path), Path(out_dir)
    _claim(out, Path(recipe_path), resume)
    torch.set_num_threads(threads)
    _keep_memory()
    window = recipe.window
    begun = time.monotonic()
    training_runs = open_runs(runs_of(recipe, "training"), processes)
    validation_runs = open_runs(runs_of(recipe, "validation"), processes)
    report(f"{sum(map(len, training_runs))} training and {sum(map(len, validation_runs))} "
           f"validation images ready after {time.monotonic() - begun:.0f} s")
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.architecture, **recipe.network)
    optimiser = _optimiser(network, recipe.optimiser)
    progress = _load_state(out / STATE, network, optimiser) or Progress()
    with _open(ImageSet(training_runs, window)) as training, \
            _open(ImageSet(validation_runs, window)) as validation:
        while progress.epoch < recipe.optimiser.epochs:
            _epoch(recipe, network, optimiser, training, progress, out, report)
            scores_N = _scores(network, validation, recipe)
            _end_epoch(recipe, network, optimiser, progress, out,
                       _summary(scores_N, validation.labels_N), report)
        if not (out / SCORES).exists():
            network.load_state_dict(_load_tensors(out / BEST))
            scores_N = _scores(network, validation, recipe)
            runs_N = np.repeat(np.arange(len(validation_runs)), [len(r) for r in validation_runs])
            _replace(out / SCORES,
                     lambda path: _save_scores(path, scores_N, validation.labels_N, runs_N))
    draw_learning_curve(progress.history, out / CURVE)
    return open_trained(out)


def open_trained(out_dir: str | Path) -> Trained:
    """A finished training directory; ``OutputDamaged`` when it is not finished."""
    out = Path(out_dir)
    missing = [name for name in (RECIPE, BEST, HISTORY, SCORES) if not (out / name).exists()]
    if missing:
        raise OutputDamaged(f"training in {out} is not finished: {', '.join(missing)} missing; "
                            "run xfel-classify train again, it goes on where it stopped")
    recipe = read_recipe(out / RECIPE)
    network = build_network(recipe.architecture, **recipe.network)
    network.load_state_dict(_load_tensors(out / BEST))
    network.eval()
    with np.load(out / SCORES, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    history = json.loads((out / HISTORY).read_text(encoding="utf-8"))
    return Trained(recipe, out, network, history, arrays["scores"], arrays["labels"],
                   arrays["runs"])


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


def _epoch(recipe: Recipe, network: nn.Module, optimiser: torch.optim.Optimizer,
           images: ImageSet, progress: Progress, out: Path,
           report: Callable[[str], None]) -> None:
    """The rest of epoch ``progress.epoch``; every image once, the last short batch left out."""
    how, epoch = recipe.optimiser, progress.epoch
    order_N = np.random.default_rng([recipe.seed, ORDER, epoch]).permutation(len(images))
    steps = max(1, len(images) // how.batch)
    network.train()
    loss_of = nn.CrossEntropyLoss()
    first, begun = progress.step, time.monotonic()
    saved = told = begun
    while progress.step < steps:
        step = progress.step
        chosen_B = order_N[step * how.batch:(step + 1) * how.batch]
        rng = np.random.default_rng([recipe.seed, AUGMENT, epoch, step])
        images_BHW = augment(images.images(np.sort(chosen_B)), recipe.augment, rng)
        labels_B = torch.from_numpy(images.labels_N[np.sort(chosen_B)])
        torch.manual_seed((recipe.seed * 1_000_003 + DROPOUT) * 1_000_003 + epoch * steps + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(how, epoch * steps + step, steps * how.epochs)
        loss = loss_of(network(torch.from_numpy(images_BHW)[:, None])[recipe.task.output],
                       labels_B)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        progress.loss_sum += float(loss.detach())
        progress.step += 1
        now = time.monotonic()
        if now - told > 20:
            told = now
            left = (steps - progress.step) * (now - begun) / (progress.step - first)
            report(f"epoch {epoch + 1}/{how.epochs} step {progress.step}/{steps} loss "
                   f"{progress.loss_sum / progress.step:.4f}, {left:.0f} s left in the epoch")
        if now - saved > SAVE_EVERY_S:
            _save_state(out / STATE, network, optimiser, progress)
            saved = now


def _end_epoch(recipe: Recipe, network: nn.Module, optimiser: torch.optim.Optimizer,
               progress: Progress, out: Path, summary: dict[str, float],
               report: Callable[[str], None]) -> None:
    row = {"epoch": progress.epoch + 1, "loss": progress.loss_sum / max(1, progress.step),
           **summary}
    progress.history.append(row)
    report(f"epoch {row['epoch']}/{recipe.optimiser.epochs}: loss {row['loss']:.4f}, validation "
           f"loss {row['validation_loss']:.4f}, balanced accuracy {row['balanced_accuracy']:.4f}")
    if row["balanced_accuracy"] > progress.best:
        progress.best = row["balanced_accuracy"]
        _save_tensors(out / BEST, _tensors(network))
    progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
    _save_state(out / STATE, network, optimiser, progress)
    _replace(out / HISTORY, lambda path: path.write_text(
        json.dumps(progress.history, indent=1), encoding="utf-8"))


def _scores(network: nn.Module, images: ImageSet, recipe: Recipe) -> np.ndarray:
    """Probability of the positive class, float32 (N,)."""
    network.eval()
    scores_N = np.empty(len(images), np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), 16):
            chosen = np.arange(start, min(start + 16, len(images)))
            logits_BK = network(torch.from_numpy(images.images(chosen))[:, None])
            scores_BK = logits_BK[recipe.task.output].softmax(1)
            scores_N[chosen] = scores_BK[:, recipe.task.positive_index].numpy()
    return scores_N


def _summary(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    positive_N = labels_N == 1
    truth_N = np.clip(np.where(positive_N, scores_N, 1 - scores_N).astype(np.float64), 1e-7, 1)
    sensitivity = float((scores_N[positive_N] >= 0.5).mean()) if positive_N.any() else 0.0
    specificity = float((scores_N[~positive_N] < 0.5).mean()) if (~positive_N).any() else 0.0
    return {"validation_loss": float(-np.log(truth_N).mean()), "sensitivity": sensitivity,
            "specificity": specificity, "balanced_accuracy": (sensitivity + specificity) / 2}


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


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous() for name, value in network.state_dict().items()}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """``write`` to a neighbour that then takes the name ``path``: whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def _save_scores(path: Path, scores_N: np.ndarray, labels_N: np.ndarray,
                 runs_N: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, scores=scores_N, labels=labels_N, runs=runs_N)


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor],
                  metadata: dict[str, str] | None = None) -> None:
    safetensors = _safetensors()
    _replace(path, lambda target: safetensors.torch.save_file(tensors, str(target), metadata))


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
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
            if isinstance(value, torch.Tensor):
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


@contextmanager
def _open(images: ImageSet) -> Iterator[ImageSet]:
    try:
        yield images
    finally:
        images.close()


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
    """Loss and validation accuracy against the epoch as a PNG; skipped without matplotlib."""
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
    left.semilogy(epochs, [row["loss"] for row in history], label="training")
    left.semilogy(epochs, [row["validation_loss"] for row in history], label="validation")
    left.set(xlabel="epoch", ylabel="cross entropy")
    for name in ("sensitivity", "specificity", "balanced_accuracy"):
        right.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
    right.set(xlabel="epoch", ylabel="validation, threshold 0.5", ylim=(None, 1.0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    _replace(path, lambda target: figure.savefig(target, dpi=120, format="png"))
