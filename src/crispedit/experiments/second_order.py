"""The comparison: networks, then every constraint and seed, piece by piece, in a directory that survives a kill.

A *piece* is one constraint at one seed, with all its energies γ; a seed is a pretrained network, a subset of its
training images for the curvature, and an order of the new images, the same for all constraints. What is done is a file,
written whole or not at all; the same command goes on after it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..artifacts import check_writable, read_json, write_json, write_tensors
from ..errors import ArtifactError, ConfigError, Interrupted, check_choice
from ..progress import Progress, log, no_progress
from ..threshold import check_energy
from .constraints import Constraint, DenseCut, Known, KroneckerCut, chosen_constraints
from .images import Tasks, digits, downloaded, from_directory
from .layer import LayerCurvature
from .lenet import ACTIVATIONS, MATRICES, Division, Pretraining, accuracy, lenet, pretrained
from .projected import Above, Descent, Inputs, descend, moved, scores
from .quality import qualities

FORMAT = 1
SETTINGS = "settings.json"
LOWEST, HIGHEST = -7.0, -0.1
"""γ = 1 − 10^v with v evenly spaced from here to there, as in the published experiment."""
EXACT_MOST = 0.998
"""The largest γ of the exact constraints. A tenth of all eigenvectors hold it, and take half a minute; all, minutes."""


def parse_energies(text: str) -> list[float]:
    """The values of γ that a text asks for.

    Args:
        text: How many, for γ = 1 − 10^v with so many values of v (from 1 − 10⁻⁷ to 0.2057); or γ, γ, …

    Returns:
        γ, falling.

    Raises:
        ConfigError: It is neither, or a γ is outside [0, 1).
    """
    if text.strip().isdigit() and int(text) > 0:
        v = torch.linspace(LOWEST, HIGHEST, int(text), dtype=torch.float64)
        return [float(energy) for energy in 1 - 10**v]
    try:
        found = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        found = []
    if not found or "." not in text:
        raise ConfigError(f"energies is '{text}'; it must be a number of values, or values such as 0.5,0.9,0.99")
    for energy in found:
        check_energy(energy)
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a piece is.

    Args:
        data: ``digits``, ``directory`` or ``download``.
        matrix: ``fc1`` or ``fc2``.
        activation: ``relu`` or ``tanh``.
        share: Of the pretraining images, for the curvature.
        energies: γ, falling.
        pretraining: Of the networks.
        descent: Of the fine-tuning.
    """

    data: str
    matrix: str
    activation: str
    share: float
    energies: list[float]
    pretraining: Pretraining
    descent: Descent

    @classmethod
    def of(
        cls, data: str, *, matrix: str, activation: str, energies: str, lr: float | None, epochs: int | None
    ) -> "Settings":
        """The defaults for a source of data, a few of them chosen.

        Raises:
            ConfigError: A value cannot be used.
        """
        check_choice("matrix", matrix, MATRICES)
        check_choice("activation", activation, ACTIVATIONS)
        small = (
            data == "digits"
        )  # a hundredth of the images: more passes, smaller batches, all of them for the curvature
        descent = Descent(epochs=60, batch_size=32) if small else Descent()
        descent = replace(
            descent, lr=descent.lr if lr is None else lr, epochs=descent.epochs if epochs is None else epochs
        )
        for name, value in (("epochs", descent.epochs), ("lr", descent.lr)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}; it must be more than 0")
        return cls(
            data=data,
            matrix=matrix,
            activation=activation,
            share=1.0 if small else 0.15,
            energies=parse_energies(energies),
            pretraining=Pretraining(epochs=30, batch_size=32, lr=0.05) if small else Pretraining(epochs=12, lr=0.05),
            descent=descent,
        )

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one constraint did at one seed, per γ.

    Args:
        energies: γ.
        removed: Directions removed.
        edit: Accuracy on the test images of what was learned, 0 to 1.
        capability: Accuracy on the test images of what must stay.
        drift: Mean KL(base ‖ edited) on these, nats an image.
        moved: ‖ΔW‖ / ‖W‖.
        renewed: How often the cut was computed anew.
        seconds: Of the cut and of the descent.
        notes: What the constraint found beside its cut.
    """

    energies: list[float]
    removed: list[int]
    edit: list[float]
    capability: list[float]
    drift: list[float]
    moved: list[float]
    renewed: list[int]
    seconds: dict[str, float]
    notes: dict[str, Any]


class Seed:
    """One pretrained network, with what all constraints share: inputs of the matrix, images for the curvature.

    Args:
        network: Pretrained.
        tasks: The data.
        settings: Of the experiment.
        number: The seed.
    """

    def __init__(self, network: nn.Sequential, tasks: Tasks, settings: Settings, number: int) -> None:
        self.tasks, self.settings, self.number = tasks, settings, number
        self.division = Division.of(network, settings.matrix)
        self.double = Division.of(lenet(tasks.classes, settings.activation), settings.matrix).above
        self.double.load_state_dict(self.division.above.state_dict())
        self.double = self.double.double().eval()

    @property
    def above(self) -> Above:
        """What follows the matrix."""
        return Above(self.division.bias, self.division.above)

    @cached_property
    def learned(self) -> Inputs:
        """Of the images that are fine-tuned on."""
        train = self.tasks.edit.train
        return Inputs(self.division.inputs(train.images), train.labels)

    @cached_property
    def tests(self) -> tuple[Inputs, Inputs]:
        """Of the edit and the capability task."""
        edit, capability = (task.test for task in (self.tasks.edit, self.tasks.capability))
        return (
            Inputs(self.division.inputs(edit.images), edit.labels),
            Inputs(self.division.inputs(capability.images), capability.labels),
        )

    @cached_property
    def capability(self) -> Inputs:
        """Of the random share of the pretraining images that the curvature is computed on."""
        train = self.tasks.capability.train
        count = max(1, round(self.settings.share * len(train)))
        chosen = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(self.number))[:count])
        return Inputs(self.division.inputs(chosen.images), chosen.labels)

    @cached_property
    def known(self) -> Known:
        """The curvature at the pretrained weights."""
        return self.known_at(self.division.weight)

    def known_at(self, weight: Tensor) -> Known:
        """The curvature at other weights of the matrix."""
        return Known(
            LayerCurvature(
                weight=weight.double(),
                bias=self.division.bias.double(),
                inputs=self.capability.inputs.double(),
                labels=self.capability.labels,
                above=self.double,
            )
        )

    def piece(self, constraint: Constraint, energies: Sequence[float], progress: Progress = no_progress) -> Piece:
        """Fine-tunes under one constraint, at all energies."""
        began = time.perf_counter()
        cut = constraint.function(self.known, energies)
        cut_at = time.perf_counter()

        def renewed(k: int, weight: Tensor) -> KroneckerCut:
            other = constraint.function(self.known_at(weight), [energies[k]])
            assert isinstance(other, KroneckerCut)
            return other

        start = self.division.weight
        W, times = descend(
            start,
            self.above,
            self.learned,
            cut,
            self.settings.descent,
            seed=self.number,
            renew=renewed if constraint.refresh else None,
            tick=lambda done, total: progress(f"{constraint.name} {self.number}", done, total),
        )
        edit, capability = self.tests
        accuracies, drift = scores(W, self.above, capability, start)
        seconds = {"cut": cut_at - began, "descent": time.perf_counter() - cut_at}
        notes = cut.notes | self._qualities(constraint, cut, energies) if isinstance(cut, DenseCut) else {}
        return Piece(
            energies=list(energies),
            removed=cut.removed,
            edit=scores(W, self.above, edit)[0],
            capability=accuracies,
            drift=drift,
            moved=moved(W, start),
            renewed=times,
            seconds=seconds,
            notes=notes,
        )

    def _qualities(self, constraint: Constraint, cut: DenseCut, energies: Sequence[float]) -> dict[str, Any]:
        """Beside the exact GNH, while its eigenvectors are at hand: what every hard Kronecker constraint is worth."""
        if constraint.name != "gnh":
            return {}
        found = {}
        for other in chosen_constraints(None, dense=False):
            theirs = other.function(self.known, energies)
            if not other.refresh and isinstance(theirs, KroneckerCut) and any(theirs.removed):
                found[other.name] = [quality.record() for quality in qualities(self.known, theirs, cut, energies)]
        return {"quality": found}


@dataclass(frozen=True, kw_only=True)
class LenetJob:
    """The experiment, as the command line asks for it.

    Args:
        out: Directory of the pieces.
        settings: What a piece is.
        constraints: Which.
        seeds: How many: 0, 1, …
        data: Directory of the data, where ``settings.data`` is ``directory``.
    """

    out: Path
    settings: Settings
    constraints: Sequence[Constraint]
    seeds: int
    data: Path | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be run, before any work.

        Raises:
            ConfigError: No seed, or an exact constraint of a matrix that is too large for it.
            ArtifactError: The directory cannot be written to, or was begun with other settings.
        """
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be at least 1")
        if self.settings.matrix == "fc1" and (exact := [c.name for c in self.constraints if c.dense]):
            raise ConfigError(
                f"fc1 has 30,720 weights, too many for exact curvature: leave out {' and '.join(exact)}, or edit fc2"
            )
        check_writable(self.out, overwrite=True)
        if self.out.is_dir() and any(self.out.iterdir()):
            begun = self.out / SETTINGS
            if not begun.is_file():
                raise ArtifactError(f"the directory '{self.out}' is not empty; name another one by --out")
            if read_json(begun) != json.loads(json.dumps(self.settings.record())):
                raise ArtifactError(f"'{self.out}' was begun with other settings; give these, or another --out")

    def tasks(self) -> Tasks:
        """Reads the data."""
        if self.settings.data == "directory":
            assert self.data is not None
            return from_directory(self.data)
        return downloaded() if self.settings.data == "download" else digits()

    def energies(self, constraint: Constraint) -> list[float]:
        """γ of a constraint."""
        every = self.settings.energies
        return [energy for energy in every if energy <= EXACT_MOST] if constraint.dense else every

    def run(self, progress: Progress = no_progress) -> dict[str, Any]:
        """Makes what is not there yet, and reads all of it.

        Args:
            progress: Told of networks, pieces, and epochs within.

        Returns:
            ``{"settings", "networks", "pieces"}``: of every seed ``{"test", "validation", "edit_before"}``, accuracies
            from 0 to 1; and per constraint the pieces of every seed.

        Raises:
            ConfigError: The data cannot be used.
            ArtifactError: A file cannot be written, or is broken.
            Interrupted: By Ctrl-C; what is done is kept.
        """
        tasks = self.tasks()
        write_json(self.out / SETTINGS, self.settings.record())
        networks: list[dict[str, float]] = []
        pieces: dict[str, list[dict[str, Any]]] = {constraint.name: [] for constraint in self.constraints}
        try:
            for number in range(self.seeds):
                network, about = self._network(tasks, number, progress)
                networks.append(about)
                self._pieces(Seed(network, tasks, self.settings, number), pieces, progress)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is done is in '{self.out}': the same command goes on") from None
        return {"settings": self.settings.record(), "networks": networks, "pieces": pieces}

    def _pieces(self, seed: Seed, pieces: Mapping[str, list[dict[str, Any]]], progress: Progress) -> None:
        """Adds the pieces of one seed, of every constraint: read, or made and kept."""
        total = self.seeds * len(self.constraints)
        for position, constraint in enumerate(self.constraints):
            progress("constraints × seeds", seed.number * len(self.constraints) + position, total)
            file = self.out / f"{constraint.name}-{seed.number}.json"
            if not file.is_file():
                piece = seed.piece(constraint, self.energies(constraint), progress)
                write_json(file, asdict(piece))
                log.info("%s, seed %d: %.0f s", constraint.title, seed.number, sum(piece.seconds.values()))
            pieces[constraint.name].append(_read_piece(file))
        progress("constraints × seeds", (seed.number + 1) * len(self.constraints), total)

    def _network(self, tasks: Tasks, number: int, progress: Progress) -> tuple[nn.Sequential, dict[str, float]]:
        """The pretrained network of a seed: read, or trained and kept."""
        file = self.out / f"network-{number}.safetensors"
        if not file.is_file():
            network, validation = pretrained(
                tasks.capability.train,
                tasks.classes,
                activation=self.settings.activation,
                settings=self.settings.pretraining,
                seed=number,
                progress=progress,
            )
            scored = {
                "test": accuracy(network, tasks.capability.test),
                "validation": validation,
                "edit_before": accuracy(network, tasks.edit.test),
            }
            write_tensors(file, network.state_dict(), {"scores": json.dumps(scored)}, "a pretrained network")
        return _read_network(file, lenet(tasks.classes, self.settings.activation))


def _read_network(file: Path, network: nn.Sequential) -> tuple[nn.Sequential, dict[str, float]]:
    try:
        with safe_open(file, "pt") as stored:
            scored: dict[str, float] = json.loads(stored.metadata()["scores"])
            network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{file}' is no network of this experiment: delete it, and it is made again") from error
    return network.requires_grad_(False), scored


def _read_piece(file: Path) -> dict[str, Any]:
    found = read_json(file)
    try:
        return asdict(Piece(**found))
    except TypeError as error:
        raise ArtifactError(f"'{file}' is no piece of this experiment: delete it, and it is made again") from error
