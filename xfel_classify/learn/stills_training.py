"""Training of the lattice and resolution networks; resumable like every training here.

L1 on 1/d for a regression, binary cross entropy on "more than one lattice" for classes [CICH23].
On a CUDA device the forward pass runs in bfloat16; on the CPU a recipe gives the same weights
again.  The training directory has the files of :mod:`.training`, with ``validation.npz`` holding
``answers`` (probability, or 1/d), the labels and the geometry.

Axes: N images, B images of a batch, 4 = geometry.
"""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ConfigurationError, OutputDamaged
from . import training
from .networks import build_network
from .recipes import Recipe, read_recipe
from .stills import StillSet, open_stills, shards_of
from .stills_scores import score_answers
from .training import BEST, DROPOUT, HISTORY, ORDER, RECIPE, SCORES, STATE, Progress

__all__ = ["StillsTrained", "open_stills_training", "train_stills"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StillsTrained:
    """A finished training: the network with its best weights and its validation answers.

    ``answers_N`` is the probability of several lattices, or 1/d in 1/angstrom.
    """

    recipe: Recipe
    directory: Path
    network: nn.Module
    history: list[dict[str, float]]
    answers_N: np.ndarray
    labels: dict[str, np.ndarray]


def train_stills(recipe_path: str | Path, out_dir: str | Path, resume: bool = True,
                 threads: int = 1, processes: int = 1, device: str | None = None,
                 report: Callable[[str], None] = log.info) -> StillsTrained:
    """Train the model of ``recipe_path``; results and state go to ``out_dir``.

    As :func:`.training.train`: resumable after a kill, saved at least once a minute.  ``device``
    is torch's word ("cuda:0"); None takes a CUDA device where there is one.
    """
    recipe, out = read_recipe(recipe_path), Path(out_dir)
    training._claim(out, Path(recipe_path), resume)
    torch.set_num_threads(threads)
    training._keep_memory()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begun = time.monotonic()
    pupils = open_stills(shards_of(recipe, "training"), processes)
    examiners = open_stills(shards_of(recipe, "validation"), processes)
    report(f"{len(pupils)} training and {len(examiners)} validation images ready after "
           f"{time.monotonic() - begun:.0f} s; training on {where}")
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.architecture, **recipe.network)
    if list(network.outputs) != [recipe.task.output]:
        raise ConfigurationError(f"recipe {recipe.name} has the task output "
                                 f"{recipe.task.output!r}, the network gives "
                                 f"{', '.join(network.outputs)}; training on stills needs one "
                                 "head, the task's")
    optimiser = training._optimiser(network, recipe.optimiser)
    progress = training._load_state(out / STATE, network, optimiser) or Progress()
    _move(network, optimiser, where)
    while progress.epoch < recipe.optimiser.epochs:
        _epoch(recipe, network, optimiser, pupils, progress, out, report)
        answers_N = answers_of_network(network, examiners, recipe)
        scores = score_answers(recipe.task, answers_N, examiners.labels)
        how = scores.summary()
        row = {"epoch": progress.epoch + 1,
               "loss": progress.loss_sum / max(1, progress.step), **how}
        progress.history.append(row)
        report(f"epoch {progress.epoch + 1}/{recipe.optimiser.epochs}: "
               + ", ".join(f"{name} {value:.4f}" for name, value in row.items()
                           if name != "epoch"))
        if scores.figure_of_merit > progress.best:
            progress.best = scores.figure_of_merit
            training._save_tensors(out / BEST, _on_cpu(network))
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        training._save_state(out / STATE, network, optimiser, progress)
        training._replace(out / HISTORY, lambda path: path.write_text(
            json.dumps(progress.history, indent=1), encoding="utf-8"))
    if not (out / SCORES).exists():
        network.load_state_dict(training._load_tensors(out / BEST))
        answers_N = answers_of_network(network, examiners, recipe)
        training._replace(out / SCORES,
                          lambda path: _save_answers(path, answers_N, examiners))
    pupils.close()
    examiners.close()
    draw_curve(progress.history, out / training.CURVE)
    return open_stills_training(out)


def open_stills_training(out_dir: str | Path) -> StillsTrained:
    """A finished training directory; ``OutputDamaged`` when it is not finished."""
    out = Path(out_dir)
    missing = [name for name in (RECIPE, BEST, HISTORY, SCORES) if not (out / name).exists()]
    if missing:
        raise OutputDamaged(f"training in {out} is not finished: {', '.join(missing)} missing; "
                            "run xfel-classify train again, it goes on where it stopped")
    recipe = read_recipe(out / RECIPE)
    network = build_network(recipe.architecture, **recipe.network)
    network.load_state_dict(training._load_tensors(out / BEST))
    network.eval()
    with np.load(out / SCORES, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    history = json.loads((out / HISTORY).read_text(encoding="utf-8"))
    return StillsTrained(recipe, out, network, history, arrays.pop("answers"), arrays)


def answers_of_network(network: nn.Module, stills: StillSet, recipe: Recipe) -> np.ndarray:
    """float32 (N,): probability of several lattices, or 1/d."""
    network.eval()
    where = next(network.parameters()).device
    found = []
    with torch.inference_mode():
        for chosen in stills.batches(64 if where.type == "cuda" else 8):
            values_B = _forward(network, stills, chosen, recipe, where)
            if recipe.task.kind == "classes":
                values_B = values_B.sigmoid()
            found.append(values_B.float().cpu().numpy())
    return np.concatenate(found)


# --- one epoch ---------------------------------------------------------------------------------

def _forward(network: nn.Module, stills: StillSet, chosen_B: np.ndarray, recipe: Recipe,
             where: torch.device, turned_B: np.ndarray | None = None) -> Tensor:
    """The network's number for each image (B,), float32."""
    images_BHW = stills.images(chosen_B)
    if turned_B is not None:
        images_BHW[turned_B] = images_BHW[turned_B].transpose(0, 2, 1)
    images = torch.from_numpy(images_BHW)[:, None].to(where)
    geometry = torch.from_numpy(stills.geometry_N4[chosen_B]).to(where)
    inputs = (images, geometry) if network.uses_geometry else (images,)
    return network(*inputs)[recipe.task.output].float()[:, 0]


def _epoch(recipe: Recipe, network: Any, optimiser: torch.optim.Optimizer, stills: StillSet,
           progress: Progress, out: Path, report: Callable[[str], None]) -> None:
    """The rest of epoch ``progress.epoch``; every image once, the last short batch left out."""
    how, epoch = recipe.optimiser, progress.epoch
    where = next(network.parameters()).device
    order_N = np.random.default_rng([recipe.seed, ORDER, epoch]).permutation(len(stills))
    steps = max(1, len(stills) // how.batch)
    truth_N = torch.from_numpy(_targets(recipe, stills)).to(where)
    loss_of: nn.Module = nn.L1Loss() if recipe.task.kind == "regression" \
        else nn.BCEWithLogitsLoss()
    network.train()
    if hasattr(network, "begin_epoch"):
        network.begin_epoch(epoch)
    first, begun = progress.step, time.monotonic()
    saved = told = begun
    while progress.step < steps:
        step = progress.step
        chosen_B = np.sort(order_N[step * how.batch:(step + 1) * how.batch])
        rng = np.random.default_rng([recipe.seed, training.AUGMENT, epoch, step])
        # the beam stays at (0, 0): the diagonal is the only mirror of a quadrant
        turned_B = rng.random(len(chosen_B)) < (0.5 if recipe.augment.flips else 0.0)
        torch.manual_seed((recipe.seed * 1_000_003 + DROPOUT) * 1_000_003 + epoch * steps + step)
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate(how, epoch * steps + step, steps * how.epochs)
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            values_B = _forward(network, stills, chosen_B, recipe, where, turned_B)
        loss = loss_of(values_B, truth_N[torch.from_numpy(chosen_B).to(where)])
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
        if now - saved > training.SAVE_EVERY_S:
            training._save_state(out / STATE, network, optimiser, progress)
            saved = now


def _targets(recipe: Recipe, stills: StillSet) -> np.ndarray:
    if recipe.task.kind == "regression":
        return stills.labels["inverse_d_A"].astype(np.float32)
    return (stills.labels["n_lattices"] > 1).astype(np.float32)


def _move(network: nn.Module, optimiser: torch.optim.Optimizer, where: torch.device) -> None:
    """To the device, with the optimiser's moments of a resumed training."""
    network.to(where)
    for state in optimiser.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = value.to(where)


def _on_cpu(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous()
            for name, value in network.state_dict().items()}


def _save_answers(path: Path, answers_N: np.ndarray, stills: StillSet) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, answers=answers_N, geometry=stills.geometry_N4,
                 **stills.labels)


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    """Loss, and what is measured on the validation images, against the epoch as a PNG."""
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
    training._replace(path, lambda target: figure.savefig(target, dpi=120, format="png"))
