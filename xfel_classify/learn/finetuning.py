"""Fine-tuning: a model adapted to labelled frames of a user's own run.

The network is the ONNX file itself: its operators run as torch functions, its weights move at a low
learning rate, and they are written back into the same graph.  So nothing of the model's training is
needed, every runtime that takes the base takes the result, and no pickle is read.

The frames are divided in blocks of neighbouring events (:mod:`.labelled_frames`): weights learn
from the training part, the epoch is chosen on the choice part, the threshold on both, and what was
gained is told from the part that was held back.  Where nothing was gained there, the base's
weights and threshold are kept.

Axes: N frames, B images of a batch, H row, W column, K class.
"""
from __future__ import annotations

import datetime
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tomli_w
import torch
from torch import Tensor

from ..core import ConfigurationError, MissingDependency, ModelInvalid, OutputExists
from ..engines import Card, Model, Task, find_model
from ..engines.cards import CARD, CHECK, ONNX, read_check, sha256_of
from ..engines.torch import TorchGraph
from .datasets import augment
from .evaluation import RunScore, choose_threshold, score_run
from .export import publish
from .labelled_frames import (
    CHOICE,
    HELD_BACK,
    PART_NAMES,
    TRAINING,
    LabelledFrames,
    divide,
)
from .labels import HIT, Labels
from .prototypes import prototype_layer
from .recipes import Augment

__all__ = ["Finetuned", "Settings", "finetune"]

log = logging.getLogger(__name__)

RECIPE = "recipe.toml"
BATCH, SCORED_AT_ONCE = 10, 8       # small batches stay in memory that is used again
WARMUP = 10                         # minibatches
CHECK_TOLERANCE = 1e-4              # of the graph in torch against the model's check values


@dataclass(frozen=True)
class Settings:
    """How a model is adapted.  ``patience`` is in epochs without a better choice part; with
    ``prototypes`` only the last layer changes, in closed form (:mod:`.prototypes`)."""

    epochs: int = 16
    learning_rate: float = 1e-3
    patience: int = 5
    seed: int = 0
    threads: int = 1
    prototypes: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.learning_rate < 1 or self.threads < 1:
            raise ConfigurationError(
                f"{self.epochs} epochs at a learning rate of {self.learning_rate:g} on "
                f"{self.threads} threads were asked for; give at least 1 epoch and thread, and a "
                "rate between 0 and 1 (0.001 is usual)")


@dataclass(frozen=True)
class Finetuned:
    """What became of it: the model that was written, and the held-back frames before and after.

    ``after`` is what the new weights did, also where they were not kept.  ``corrected`` and
    ``spoiled`` count held-back frames that became right and wrong.
    """

    model: Model
    base: Model
    before: RunScore
    after: RunScore
    corrected: int
    spoiled: int
    best_epoch: int                     # 0 = the base's weights
    gained: bool

    @property
    def by_luck(self) -> float:
        """Chance that as many or more of the changed answers turn out right by luck (sign test)."""
        changed = self.corrected + self.spoiled
        return sum(math.comb(changed, k) for k in range(self.corrected, changed + 1)) / 2**changed

    def __str__(self) -> str:
        lines = [f"held back: {self.before.events} frames, "
                 f"{self.before.true_positive + self.before.false_negative} hits", "",
                 "| | Sen | Spe | Acc | TP | FN | FP | TN |", "|---|---|---|---|---|---|---|---|"]
        for one in (self.before, self.after):
            lines.append(f"| {one.name} | {one.sensitivity:.4f} | {one.specificity:.4f} | "
                         f"{one.accuracy:.4f} | {one.true_positive} | {one.false_negative} | "
                         f"{one.false_positive} | {one.true_negative} |")
        lines.append("")
        if self.best_epoch:
            lines.append(f"{self.corrected} answers became right, {self.spoiled} wrong (chance of "
                         f"that by luck: {self.by_luck:.2g})")
        if self.gained:
            before, after = self.before.balanced_accuracy, self.after.balanced_accuracy
            lines.append(f"GAINED: balanced accuracy {before:.4f} -> {after:.4f}"
                         + ("; by the number of right answers that may be luck: label more "
                            "frames to know" if self.by_luck > 0.05 else ""))
        else:
            why = "no epoch did better on the choice part" if not self.best_epoch else \
                "the new weights do not do better on the held-back part"
            lines.append(f"NOTHING GAINED: {why}. {self.model.name} has the weights and the "
                         f"threshold of {self.base.name} {self.base.version}.")
        return "\n".join(lines)


def finetune(base: Model | str | Path, frames: LabelledFrames, labels: Labels, target: str | Path,
             *, name: str = "", settings: Settings | None = None, overwrite: bool = False,
             command: str = "", report: Callable[[str], None] = log.info) -> Finetuned:
    """Adapt ``base`` to labelled frames and write the model directory ``target``.

    ``name`` is the new model's (default: base, experiment and run).  Lines on how it goes are
    handed to ``report``.  The directory appears whole or not at all.  Raises
    :class:`ConfigurationError` for models and names that cannot be, :class:`OutputExists`.
    """
    settings, base, target = settings or Settings(), find_model(base), Path(target)
    name = new_name(base, name, frames)
    require_free(target, overwrite)
    torch.set_num_threads(settings.threads)
    graph, task = Graph(base), base.card.tasks[0]
    part_N, blocks = divide(frames.label_N, settings.seed)
    for number, part in enumerate(PART_NAMES):
        chosen = frames.label_N[part_N == number]
        report(f"{part}: {len(chosen)} frames, {int((chosen == HIT).sum())} hits")
    report(f"parts are dealt in {blocks} blocks of neighbouring events, seed {settings.seed}")
    weights, before_N = graph.snapshot(), graph.scores(frames.images_NHW)
    known = part_N != HELD_BACK
    if settings.prototypes:
        best_epoch, history, told_N = _take_prototypes(graph, frames, known, report)
    else:
        best_epoch, history = _learn(graph, frames, part_N, settings, before_N, report)
    after_N = graph.scores(frames.images_NHW) if best_epoch else before_N
    threshold = task.threshold
    if best_epoch:
        threshold, _ = choose_threshold(told_N if settings.prototypes else after_N[known],
                                        frames.label_N[known], np.zeros(known.sum()),
                                        pseudo_events=0.0)
    kept = part_N == HELD_BACK
    truth_N = frames.label_N[kept]
    before = score_run(f"before: {base.name} {base.version}, threshold {task.threshold:g}",
                       before_N[kept], truth_N, task.threshold)
    after = score_run(f"after: {name}, threshold {threshold:g}", after_N[kept], truth_N, threshold)
    right = [(scores_N[kept] >= cut) == (truth_N == HIT)
             for scores_N, cut in ((before_N, task.threshold), (after_N, threshold))]
    gained = best_epoch > 0 and after.balanced_accuracy > before.balanced_accuracy
    outcome = Finetuned(base, base, before, after, int((right[1] & ~right[0]).sum()),
                        int((right[0] & ~right[1]).sum()), best_epoch, gained)
    card = _card(base, name, outcome, frames, labels, part_N, blocks, settings, threshold,
                 history, command)
    if not gained:
        graph.restore(weights)
    elif settings.prototypes:       # what was held back has told what it had to tell
        _take_prototypes(graph, frames, np.ones(len(frames), bool), report)
    model = _write(graph, gained, card, target)
    return Finetuned(model, base, before, after, outcome.corrected, outcome.spoiled, best_epoch,
                     gained)


def new_name(base: Model, name: str, frames: LabelledFrames) -> str:
    """The name of the new model, checked."""
    name = name or f"{base.name}-{frames.exp}-r{frames.run:04d}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name == base.name:
        raise ConfigurationError(f"{name!r} was to name the new model; the base is {base.name!r}; "
                                 "give another name of letters, digits, '_', '-', '+' and '.' "
                                 "with --name")
    return name


def require_free(target: Path, overwrite: bool) -> None:
    """Raise :class:`OutputExists` when a model is there already."""
    if (target / CARD).exists() and not overwrite:
        raise OutputExists(f"a model was to be written to {target}, which already holds one; give "
                           "another directory with -o, or replace it with --overwrite")


# --- the network ----------------------------------------------------------------------------------

class Graph:
    """A model's ONNX graph in torch, with weights that can be moved.

    Raises :class:`ConfigurationError` for models that are no yes/no question answered by a
    softmax over an image alone, :class:`ModelInvalid` when torch does not reproduce the model's
    check values.
    """

    def __init__(self, model: Model) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingDependency(f"fine-tuning reads weights from the ONNX file ({error}); "
                                    "pip install 'xfel-classify[learn]'") from error
        self.model = model
        self.task = require_hit_model(model)
        self.original = model.onnx_path.read_bytes()
        self.stored = onnx.load_from_string(self.original)
        self._graph = TorchGraph(self.stored.graph, torch.device("cpu"))
        last = [node for node in self.stored.graph.node if node.output[0] == self.task.output]
        if not last or last[0].op_type != "Softmax":
            raise ConfigurationError(
                f"model {model.name} was to be fine-tuned; its output {self.task.output!r} is "
                f"made by {last[0].op_type if last else 'nothing'}, not by a softmax over "
                "classes; train it anew with a recipe")
        self._logits = last[0].input[0]
        self.names = [tensor.name for tensor in self.stored.graph.initializer
                      if tensor.name.endswith((".weight", ".bias"))]
        if not self.names:
            raise ConfigurationError(f"model {model.name} was to be fine-tuned; its ONNX file "
                                     "names no weight (*.weight, *.bias); export it again")
        self.check_images_BHW, _, expected = read_check(model)
        found = self.scores(self.check_images_BHW)
        wanted = expected[self.task.output][:, self.task.positive_index]
        if not np.abs(found - wanted).max(initial=0.0) < CHECK_TOLERANCE:
            raise ModelInvalid(f"model {model.name} read into torch was to give its check values "
                               f"within {CHECK_TOLERANCE:g}; it is off by "
                               f"{np.abs(found - wanted).max():.2g}; export the model again")

    def parameters(self) -> list[Tensor]:
        """The weights as tensors that gradients reach."""
        return [self._graph.weights[name].requires_grad_() for name in self.names]

    def logits(self, images_B1HW: Tensor) -> Tensor:
        """(B, K) before the softmax."""
        values: dict[str, Any] = {**self._graph.weights, self.model.card.input: images_B1HW}
        self._graph.evaluate(values, until=self._logits)
        return values[self._logits]

    def scores(self, images_NHW: np.ndarray) -> np.ndarray:
        """float32 (N,): probability of the positive class."""
        found = [np.zeros(0, np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images_NHW), SCORED_AT_ONCE):
                images = torch.from_numpy(
                    images_NHW[start:start + SCORED_AT_ONCE].astype(np.float32))
                probability_BK = self.logits(images[:, None]).softmax(1)
                found.append(probability_BK[:, self.task.positive_index].numpy())
        return np.concatenate(found)

    def embedding(self, images_NHW: np.ndarray) -> np.ndarray:
        """float32 (N, F): what the last layer reads."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(images_NHW), SCORED_AT_ONCE):
                images = torch.from_numpy(
                    images_NHW[start:start + SCORED_AT_ONCE].astype(np.float32))
                values: dict[str, Any] = {**self._graph.weights,
                                          self.model.card.input: images[:, None]}
                self._graph.evaluate(values, until=self._last_layer().input[0])
                found.append(values[self._last_layer().input[0]].numpy())
        return np.concatenate(found)

    def set_last_layer(self, weight_KF: np.ndarray, bias_K: np.ndarray) -> None:
        """Logits are then these, whatever the model's temperature was."""
        _, weight, bias = self._last_layer().input
        scale = 1.0
        if self._last_layer().output[0] != self._logits:       # a temperature divides them
            divisor = next(node for node in self.stored.graph.node
                           if node.output[0] == self._logits).input[1]
            scale = float(self._graph.weights[divisor])
        with torch.no_grad():
            self._graph.weights[weight].copy_(torch.from_numpy(scale * weight_KF))
            self._graph.weights[bias].copy_(torch.from_numpy(scale * bias_K))

    def _last_layer(self) -> Any:
        """The node of the linear layer that gives the logits."""
        made = {node.output[0]: node for node in self.stored.graph.node}
        node = made[self._logits]
        if node.op_type == "Div":
            node = made[node.input[0]]
        if node.op_type != "Gemm" or not set(node.input[1:]) <= set(self.names):
            raise ConfigurationError(
                f"prototypes were asked of model {self.model.name}; its answer comes from "
                f"{node.op_type}, not from a linear layer with a bias; fine-tune it without "
                "--prototypes")
        return node

    def expected(self) -> np.ndarray:
        """(B, K) probabilities of the check images, computed in float64."""
        before = dict(self._graph.weights)
        with torch.inference_mode():
            for name, value in before.items():
                if value.dtype == torch.float32:
                    self._graph.weights[name] = value.double()
            try:
                images = torch.from_numpy(self.check_images_BHW.astype(np.float64))[:, None]
                return self.logits(images).softmax(1).numpy()
            finally:
                self._graph.weights.update(before)

    def snapshot(self) -> list[Tensor]:
        return [self._graph.weights[name].detach().clone() for name in self.names]

    def restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for name, value in zip(self.names, values, strict=True):
                self._graph.weights[name].copy_(value)

    def file(self) -> bytes:
        """The base's ONNX file with the weights as they are now."""
        from onnx import numpy_helper

        for tensor in self.stored.graph.initializer:
            if tensor.name in self.names:
                value = self._graph.weights[tensor.name].detach().numpy()
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
        return self.stored.SerializeToString(deterministic=True)


def require_hit_model(model: Model) -> Task:
    """The task that is fine-tuned; :class:`ConfigurationError` for models it does not work for."""
    task = model.card.tasks[0]
    if len(model.card.tasks) == 1 and task.kind == "classes" and task.positive \
            and not model.card.geometry:
        return task
    what = ", ".join(f"{one.name} ({one.kind})" for one in model.card.tasks)
    raise ConfigurationError(
        f"model {model.name} was to be fine-tuned; it answers {what}"
        + (" and looks at the geometry" if model.card.geometry else "")
        + "; hit and miss labels adapt models with one yes/no question about an image, such as "
          "sfx-hit")


# --- learning -------------------------------------------------------------------------------------

def _learn(graph: Graph, frames: LabelledFrames, part_N: np.ndarray, settings: Settings,
           before_N: np.ndarray, report: Callable[[str], None]) -> tuple[int, list[float]]:
    """(best epoch, loss on the choice part by epoch); the graph has the best epoch's weights."""
    parameters = graph.parameters()
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    pupils = np.flatnonzero(part_N == TRAINING)
    choice = np.flatnonzero(part_N == CHOICE)
    hit_N = frames.label_N == HIT
    # both classes count the same, however rare hits are
    weight_K = torch.tensor([0.5 / (~hit_N[pupils]).mean(), 0.5 / hit_N[pupils].mean()],
                            dtype=torch.float32)
    if graph.task.positive_index == 0:
        weight_K = weight_K.flip(0)
    class_N = np.where(hit_N, graph.task.positive_index, 1 - graph.task.positive_index)
    steps = max(1, math.ceil(len(pupils) / BATCH))
    best, history = graph.snapshot(), [_balanced_loss(before_N[choice], hit_N[choice])]
    best_epoch = 0
    for epoch in range(settings.epochs):
        rng = np.random.default_rng([settings.seed, 42, epoch])
        for step, batch in enumerate(np.array_split(rng.permutation(pupils), steps)):
            done = epoch * steps + step
            rate = 0.5 * (1 + math.cos(math.pi * done / (steps * settings.epochs)))
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * rate * min(1.0, (done + 1) / WARMUP)
            images = augment(frames.images_NHW[batch].astype(np.float32), Augment(), rng)
            logits_BK = graph.logits(torch.from_numpy(images)[:, None])
            loss = torch.nn.functional.cross_entropy(
                logits_BK, torch.from_numpy(class_N[batch]), weight_K)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in parameters:        # a blank image has no slope
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
            optimiser.step()
        scores_N = graph.scores(frames.images_NHW[choice])
        history.append(_balanced_loss(scores_N, hit_N[choice]))
        report(f"epoch {epoch + 1}/{settings.epochs}: loss on the choice part {history[-1]:.4f} "
               f"(base {history[0]:.4f})")
        if history[-1] < min(history[:-1]):
            best, best_epoch = graph.snapshot(), epoch + 1
        elif epoch + 1 - best_epoch >= settings.patience:
            break
    graph.restore(best)
    return best_epoch, history


def _take_prototypes(graph: Graph, frames: LabelledFrames, chosen_N: np.ndarray,
                     report: Callable[[str], None]) -> tuple[int, list[float], np.ndarray]:
    """Put prototypes of the chosen frames at the end of the graph.

    Returns (1, losses of the base and of left-out frames, scores of the left-out frames).
    """
    positive = graph.task.positive_index
    images_NHW, hit_N = frames.images_NHW[chosen_N], frames.label_N[chosen_N] == HIT
    class_N = np.where(hit_N, positive, 1 - positive)
    before = _balanced_loss(graph.scores(images_NHW), hit_N)
    layer = prototype_layer(graph.embedding(images_NHW), class_N, 2)
    graph.set_last_layer(layer.weight_KF, layer.bias_K)
    scores_N = torch.from_numpy(layer.left_out_NK).softmax(1).numpy()[:, positive].astype(
        np.float32)
    loss = _balanced_loss(scores_N, hit_N)
    report(f"prototypes of {int(hit_N.sum())} hits and {int((~hit_N).sum())} misses, shrinkage "
           f"{layer.shrinkage:g}: loss on frames left out {loss:.4f} (base {before:.4f})")
    return 1, [before, loss], scores_N


def _balanced_loss(scores_N: np.ndarray, hit_N: np.ndarray) -> float:
    """Cross entropy in which hits and misses count the same."""
    truth_N = np.clip(np.where(hit_N, scores_N, 1 - scores_N).astype(np.float64), 1e-7, 1)
    loss_N = -np.log(truth_N)
    return float((loss_N[hit_N].mean() + loss_N[~hit_N].mean()) / 2)


# --- the new model --------------------------------------------------------------------------------

def _card(base: Model, name: str, outcome: Finetuned, frames: LabelledFrames, labels: Labels,
          part_N: np.ndarray, blocks: int, settings: Settings, threshold: float,
          history: Sequence[float], command: str) -> Card:
    task = base.card.tasks[0]
    if outcome.gained:
        task = msgspec.structs.replace(
            task, threshold=threshold, threshold_chosen="on the training and choice parts of the "
            f"labelled frames of {frames.exp} run {frames.run}")
    counts = {PART_NAMES[part].replace(" ", "_"): {
        "frames": int((part_N == part).sum()),
        "hits": int((frames.label_N[part_N == part] == HIT).sum())} for part in range(3)}
    energies = [*base.card.photon_energy_eV, *frames.energy_eV]
    return msgspec.structs.replace(
        base.card, name=name, version="1", tasks=[task],
        summary=f"{base.name} {base.version} fine-tuned on {frames.exp} run {frames.run}"
        if outcome.gained else f"{base.name} {base.version}, which fine-tuning on {frames.exp} run "
        f"{frames.run} did not improve",
        detectors=sorted({*base.card.detectors, frames.detector_kind})
        if base.card.detectors else [],
        photon_energy_eV=[round(min(energies), 1), round(max(energies), 1)]
        if base.card.photon_energy_eV else [],
        provenance={
            "base": base.name, "base_version": base.version, "base_sha256": base.sha256,
            "gained": outcome.gained, "date": datetime.date.today().isoformat(),
            "command": command, "exp": frames.exp, "run": frames.run,
            "frames": len(frames), "hits": frames.hits, "parts": counts,
            "split": f"{blocks} blocks of neighbouring events, dealt at random (seed "
                     f"{settings.seed}); held-back frames decide only whether the new weights "
                     "are kept",
            "held_back_events": _ranges(frames.index_N[part_N == HELD_BACK]),
            "labels": labels.name, "labels_kind": labels.kind, "labels_rule": labels.rule,
            "labels_from": {key: str(value) for key, value in labels.provenance.items()},
            "optimiser": "prototypes: the last layer tells the nearest class mean"
            if settings.prototypes else
            f"adam, learning rate {settings.learning_rate:g}, cosine, batch {BATCH}, "
            f"classes weighted equally; epoch {outcome.best_epoch} of {settings.epochs}",
            "choice_loss": [round(value, 4) for value in history],
            "torch": torch.__version__.split("+")[0]},
        metrics={"held_back": {
            "corrected": outcome.corrected, "spoiled": outcome.spoiled,
            **{when: {"sensitivity": round(one.sensitivity, 4),
                      "specificity": round(one.specificity, 4),
                      "accuracy": round(one.accuracy, 4), "events": one.events,
                      "true_positive": one.true_positive, "false_negative": one.false_negative,
                      "false_positive": one.false_positive, "true_negative": one.true_negative}
               for when, one in (("before", outcome.before), ("after", outcome.after))}}})


def _ranges(index_N: np.ndarray) -> list[str]:
    """"first-last" of each run of neighbours among the labelled events' positions, shortened."""
    index_N = np.sort(index_N)
    cuts = np.flatnonzero(np.diff(index_N) > max(2.0, 4 * float(np.median(np.diff(index_N))))) + 1
    return [f"{part[0]}-{part[-1]}" for part in np.split(index_N, cuts) if len(part)]


def _write(graph: Graph, gained: bool, card: Card, target: Path) -> Model:
    """The model directory; without a gain its network is the base's file, bit for bit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".finetune") as place:
        directory = Path(place) / "model"
        directory.mkdir()
        (directory / ONNX).write_bytes(graph.file() if gained else graph.original)
        np.savez_compressed(directory / CHECK, allow_pickle=False, images=graph.check_images_BHW,
                            **{graph.task.output: graph.expected()})
        recipe = graph.model.directory / RECIPE     # the base's: evaluate tells what was forgotten
        if recipe.exists():
            shutil.copyfile(recipe, directory / RECIPE)
        card = msgspec.structs.replace(card, onnx_sha256=sha256_of(directory / ONNX))
        fields = {key: value for key, value in msgspec.to_builtins(card).items()
                  if value not in ("", [], {})}
        (directory / CARD).write_text(
            "# What this model means.  Written by xfel-classify finetune.\n"
            + tomli_w.dumps(fields), encoding="utf-8")
        return publish(directory, target, "try a lower --learning-rate")
