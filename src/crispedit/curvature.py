"""The curvature of a model's capability loss: factors of every edited matrix, what they came from, and their file.

How factors are estimated, and all conventions, are in :mod:`crispedit.factors`.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import __version__, distributed, ranks
from .artifacts import read_json, write_json, write_tensors
from .description import ENERGY, Description, describe, leading_spectrum
from .errors import ArtifactError, ConfigError, ModelError, check_choice
from .factors import (
    Factors,
    Fisher,
    check_fisher,
    check_kind,
    choose_kind,
    estimate_factors,
    estimate_second_moments,
    merge_factors,
    sum_factors,
)
from .halves import factors_of_halves, pass_key, token_halves
from .memory import free_memory
from .models import EditMatrix, chat_template_hash, edit_matrices, fingerprint, tokenizer_hash
from .moments import Kind, Moment, Sketch, times
from .progress import Progress, log, no_progress
from .spectrum import Spectrum
from .subspace import Subspace
from .texts import CapabilityTexts, TokenBatch, row_batches, split_texts, text_batches
from .threshold import check_energy
from .updates import coordinates_cost_little

Constraint = Literal["staircase", "cross", "ekfac", "inputs"]
CPU = torch.device("cpu")
FORMAT = 2
MANIFEST, TENSORS = "curvature.json", "factors.safetensors"


@dataclass(kw_only=True)
class Curvature:
    """The curvature of one model's capability loss: factors, the held-out texts, and provenance.

    Args:
        factors: By name of the edited matrix.
        layers: The decoder blocks they belong to.
        fisher: What labels the gradients were taken with.
        model_name: The base model, as the user named it.
        model_revision: Its commit on the hub, where it came from there.
        model_fingerprint: Of its weights (:func:`crispedit.models.fingerprint`).
        dtype: In which the model ran.
        tokenizer: Hash of the tokenizer (:func:`crispedit.models.tokenizer_hash`).
        chat_template: Hash of its chat template, where it has one; recorded, no text passes through it.
        held_out: Texts that the factors have not seen, for drift.
        texts: Where the texts came from (:meth:`crispedit.texts.CapabilityTexts.manifest`).
        seed: Of sampled labels.
        path: The directory it was read from or written to.
        seconds: What estimating it took; 0 when it was read from disk.
        second_moments: By matrix name, where they were measured; see :func:`estimate_second_moments`.
        solved_on: By matrix name, devices on which eigenproblems are solved, if not where the factors are
            (:meth:`solve_near`).
        edited: The matrices that are about to be edited, where that is known; other spectra wait until they are asked
            for.
    """

    factors: Mapping[str, Factors]
    layers: tuple[int, ...]
    fisher: Fisher
    model_name: str
    model_revision: str | None
    model_fingerprint: str
    dtype: str
    tokenizer: str
    chat_template: str | None
    held_out: tuple[str, ...]
    texts: Mapping[str, Any]
    seed: int
    path: Path | None = None
    seconds: float = 0.0
    second_moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    solved_on: dict[str, torch.device] = field(default_factory=dict, repr=False)
    edited: frozenset[str] = frozenset()
    _spectra: dict[str, Spectrum] = field(default_factory=dict, repr=False)
    _tops: dict[str, Spectrum] = field(default_factory=dict, repr=False)
    _starts: dict[str, Spectrum] = field(default_factory=dict, repr=False)
    _described: dict[str, Description] = field(default_factory=dict, repr=False)
    _pass: Path | None = field(default=None, repr=False)
    _subspaces: dict[tuple[str, float, Constraint], Subspace] = field(default_factory=dict, repr=False)

    @classmethod
    def estimate(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Sequence[str] | CapabilityTexts,
        *,
        layers: Sequence[int] | None = None,
        fisher: Fisher = "mc",
        factors: Kind | Literal["auto"] = "auto",
        energy: float = ENERGY,
        seed: int = 0,
        model_name: str = "",
        resume: Path | None = None,
        progress: Progress = no_progress,
    ) -> "Curvature":
        """Estimates the factors of the chosen blocks' down-projections on capability texts.

        The two halves of the texts are passed over one after the other, compared, and merged.

        Args:
            model: A Hugging Face causal LM.
            tokenizer: Its tokenizer.
            texts: Strings, of which a seeded fifth is held out for drift; or texts already divided, in random order
                (every other one makes a half).
            layers: Decoder blocks; :func:`crispedit.models.default_layers` when omitted.
            fisher: ``mc`` or ``empirical``.
            factors: ``dense``, ``sketch``, or ``auto``: :func:`crispedit.factors.choose_kind`.
            energy: γ at which the curvature is described and its halves are compared; no factor depends on it.
            seed: Of the split and of sampled labels.
            model_name: Recorded in the file.
            resume: A directory for the states of passes under way: an interrupted pass goes on from there. A pass's
                own state is removed when the curvature is saved.
            progress: Called after every batch.

        Returns:
            The curvature; spectra are computed when first asked for.
        """
        check_fisher(fisher)
        check_kind(factors)
        check_energy(energy)
        started = time.monotonic()
        divided = texts if isinstance(texts, CapabilityTexts) else split_texts(texts, seed=seed)
        matrices = edit_matrices(model, layers)
        about: dict[str, Any] = {
            "layers": tuple(m.layer for m in matrices),
            "fisher": fisher,
            "model_fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_hash(tokenizer),
            "texts": divided.manifest(),
            "seed": seed,
        }
        if factors == "auto":
            affordable = affordable_kind(matrices)
            kind = distributed.from_main(partial(_kind_under_way, about, affordable, resume))
        else:
            kind = factors
        key = content_key(about, kind)
        halves = token_halves(model, tokenizer, divided.fit)
        # sums over parts of other batches, or of another model, would be of nothing
        distributed.check_equal(
            {
                "the model's weights": about["model_fingerprint"],
                "the tokenizers": about["tokenizer"],
                "the texts": divided.sha256,
                "the batches of texts": pass_key(key, halves),
            }
        )
        every = None if resume else math.inf
        with nullcontext(resume / key) if resume else tempfile.TemporaryDirectory() as directory:
            one_pass = partial(
                sum_factors, model, matrices, fisher=fisher, kind=kind, key=pass_key(key, halves), every=every
            )
            with ranks.sharing():
                options = (seed, energy, Path(directory), progress)
                found, description = factors_of_halves(one_pass, matrices, halves, *options)
        return cls(
            factors=found,
            model_name=model_name or str(getattr(model.config, "_name_or_path", "")),
            model_revision=getattr(model.config, "_commit_hash", None),
            chat_template=chat_template_hash(tokenizer),
            held_out=divided.held_out,
            _described=description,
            seconds=time.monotonic() - started,
            _pass=resume / key if resume else None,
            **about,
        )

    def subspace(self, name: str, energy: float, constraint: Constraint | Literal["auto"] = "auto") -> Subspace:
        """The low-curvature subspace of one matrix.

        Args:
            name: The matrix.
            energy: γ in [0, 1).
            constraint: What is left out: the pairs of largest curvature (``staircase``), a ``cross`` of the same
                energy, the pairs of largest measured curvature (``ekfac``), or directions of the inputs alone
                (``inputs``, G = I: Adam-NSCL). ``auto`` is ``staircase``; or ``cross`` of sketched factors, and of
                matrices so wide that coordinates in the whole eigenbasis would cost too much
                (:func:`crispedit.updates.coordinates_cost_little`).

        Returns:
            The subspace, in the cheapest exact form.

        Raises:
            ConfigError: There is no such constraint, ``energy`` is outside [0, 1), or there are no second moments.
        """
        check_choice("constraint", constraint, ("auto", *get_args(Constraint)))
        if constraint == "auto":
            factors = self.factors[name]
            kind: Kind = "sketch" if factors.dense is None else "dense"
            constraint = default_constraint(kind, (len(factors.G), len(factors.A)))
        key = (name, energy, constraint)
        if key not in self._subspaces:
            self._subspaces[key] = self._subspace(*key)
        return self._subspaces[key]

    def _subspace(self, name: str, energy: float, constraint: Constraint) -> Subspace:
        if constraint == "cross":
            return Subspace.of(self._top(name, energy), energy, "cross")
        spectrum = self.spectrum(name)
        if constraint == "ekfac":
            if name not in self.second_moments:
                raise ConfigError("constraint ekfac needs second moments: call Curvature.measure_second_moments first")
            return Subspace.of_table(spectrum, self.second_moments[name], energy)
        if constraint == "inputs":
            return Subspace.of(spectrum.of_inputs(), energy)
        return Subspace.of(spectrum, energy)

    def _top(self, name: str, energy: float) -> Spectrum:
        """As much of a spectrum as a cross takes; of a sum, found from that of its largest part."""
        known = self._tops.get(name)
        if known is None and ranks.count() > 1:  # all of them at once: the work can be shared
            unknown = [n for n in self._solved_together(name) if n not in self._tops]
            self._tops |= self._solved({n: partial(self._leading, n, energy) for n in unknown})
        elif known is None or (self.factors[name].dense and not known.known_cross(energy)):
            self._tops[name] = self._leading(name, energy)
        return self._tops[name]

    def _leading(self, name: str, energy: float) -> Spectrum:
        def solve(factors: Factors, device: torch.device) -> Spectrum:
            known, dense = self._tops.get(name), factors.dense
            if dense is None:
                return known or leading_spectrum(factors)
            if known is not None:
                return Spectrum.for_cross(*dense, energy, start=known.to(device))
            if name in self._starts:
                return self._starts[name].to(device).updated(*dense, energy)
            return Spectrum.for_cross(*dense, energy)

        return self._near(name, solve)

    def _near(self, name: str, solve: Callable[[Factors, torch.device], Spectrum]) -> Spectrum:
        """A spectrum, found where the matrix is; in main memory where a GPU has no room for that."""
        device, factors = self._device(name), self.factors[name]
        try:
            return solve(factors.to(device), device)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
            log.info("no room on %s to diagonalise the curvature of %s: it is done in main memory", device, name)
        return solve(factors.to(CPU), CPU).to(device)

    @property
    def description(self) -> Mapping[str, Description]:
        """By matrix name; of a sum, made when it is first asked for."""
        for name in self.factors.keys() - self._described.keys():
            self._described[name] = describe(self.factors[name])
        return self._described

    @property
    def kind(self) -> Kind:
        """``sketch`` if any factor is one."""
        return "dense" if all(f.dense for f in self.factors.values()) else "sketch"

    def spectrum(self, name: str) -> Spectrum:
        """All eigenpairs of one matrix's factors, diagonalised once.

        Raises:
            ConfigError: The factors are sketches.
        """
        if self.factors[name].dense is None:
            raise ConfigError("sketched factors know leading directions only: use constraint cross, or dense factors")
        if name not in self._spectra:
            # of several processes, which can share the work, all that are not known
            names = [name] if ranks.count() == 1 else [n for n in self._solved_together(name) if n not in self._spectra]
            dense = [n for n in names if self.factors[n].dense is not None]
            self._spectra |= self._solved({n: partial(self._whole, n) for n in dense})
        return self._spectra[name]

    def _whole(self, name: str) -> Spectrum:
        def solve(factors: Factors, _: torch.device) -> Spectrum:
            assert factors.dense is not None
            return Spectrum.of(*factors.dense)

        return self._near(name, solve)

    def _solved_together(self, name: str) -> list[str]:
        """What will be asked for beside a matrix: what is edited, if that is known."""
        return [n for n in self.factors if not self.edited or n == name or n in self.edited]

    def _solved(self, problems: Mapping[str, Callable[[], Spectrum]]) -> dict[str, Spectrum]:
        """The spectra of matrices: each found by one process, by the cubes of their widths, and given to all."""
        with ranks.sharing():
            return self._solved_by_all(problems)

    def _solved_by_all(self, problems: Mapping[str, Callable[[], Spectrum]]) -> dict[str, Spectrum]:
        sizes = {name: (len(self.factors[name].A), len(self.factors[name].G)) for name in problems}
        owners = distributed.owners([sum(size**3 for size in sizes[name]) for name in problems])
        who = dict(zip(problems, owners, strict=True))
        mine = {name: solve() for name, solve in problems.items() if who[name] == ranks.rank()}
        if ranks.size() == 1:
            return mine
        found = {}
        for name, owner in who.items():
            tensors = distributed.tensors_of(owner, mine[name].tensors() if name in mine else None)
            found[name] = Spectrum.of_tensors(tensors).to(self._device(name))
        return found

    def solve_near(self, matrices: Sequence[EditMatrix]) -> None:
        """Has eigenproblems solved where their matrices are, if that is a GPU: factors from a file are on the CPU.

        Args:
            matrices: Those of a model that is about to be edited.
        """
        devices = {matrix.name: matrix.parameter.device for matrix in matrices}
        self.edited = frozenset(devices)
        self.solved_on |= {name: device for name, device in devices.items() if device.type == "cuda"}

    def _device(self, name: str) -> torch.device:
        """Where the eigenproblems of a matrix are solved."""
        A = self.factors[name].A
        return self.solved_on.get(name) or (A if isinstance(A, Tensor) else A.product).device

    def measure_second_moments(
        self, model: Any, tokenizer: Any, texts: Sequence[str], *, progress: Progress = no_progress
    ) -> None:
        """Measures what ``constraint="ekfac"`` needs, in :attr:`second_moments`; they are not saved.

        Args:
            model: The model that the factors are of.
            tokenizer: Its tokenizer.
            texts: Those of the factors, or others.
            progress: Called after every batch.
        """
        matrices = edit_matrices(model, self.layers)
        self.check_model(model, matrices)
        batches = text_batches(model, tokenizer, texts)
        spectra = {m.name: self.spectrum(m.name) for m in matrices}
        self.second_moments = estimate_second_moments(
            model, matrices, batches, spectra, fisher=self.fisher, seed=self.seed, progress=progress
        )

    def predicted_drift(self, changes: Mapping[str, Tensor]) -> float:
        """½ Σ ⟨ΔW, G ΔW A⟩: capability drift to second order, as far as the factors know it.

        Tokens count as independent, matrices too, and of sketches only what they know is counted.

        Args:
            changes: ΔW by matrix name, (d_out, d_in) float32.

        Returns:
            Nats per token.
        """
        total = 0.0
        for name, change in changes.items():
            factors = self.factors[name]
            curved = times(factors.A, times(factors.G, change).T).T  # A is symmetric
            total += float((change * curved).sum(dtype=torch.float64))
        return total / 2

    @property
    def num_tokens(self) -> int:
        """How many tokens the factors were averaged over."""
        return next(iter(self.factors.values())).num_tokens

    def manifest(self, *, with_texts: bool = True) -> dict[str, Any]:
        """Everything but the numbers, as JSON: what ``curvature.json`` holds, with or without the held-out texts."""
        held_out = {"held_out": list(self.held_out)} if with_texts else {}
        return {
            "format": FORMAT,
            "crispedit": __version__,
            "model": self.model_name,
            "model_revision": self.model_revision,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "layers": list(self.layers),
            "matrices": {
                n: {"d_out": len(f.G), "d_in": len(f.A), **asdict(self.description[n])} for n, f in self.factors.items()
            },
            "fisher": self.fisher,
            "factors": self.kind,
            "num_tokens": self.num_tokens,
            "texts": dict(self.texts),
            "seed": self.seed,
            **held_out,
        }

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``factors.safetensors`` and ``curvature.json``, whole or not at all; of several processes one does.

        Args:
            directory: New or empty, unless ``overwrite``.
            overwrite: Whether a directory that is not empty is replaced.

        Returns:
            The directory.
        """
        distributed.write_directory(Path(directory), self._fill, overwrite=overwrite)
        self.path = Path(directory)
        if self._pass is not None:  # its result is safe now
            shutil.rmtree(self._pass, ignore_errors=True)
        return self.path

    def _fill(self, building: Path) -> None:
        write_tensors(building / TENSORS, self._tensors(), {}, "the curvature")
        seconds = {"seconds": round(self.seconds, 2)} if self.seconds else {}
        write_json(building / MANIFEST, {**self.manifest(), **seconds})

    def _tensors(self) -> dict[str, Tensor]:
        """The factors as tensors of a file."""
        tensors: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            for side, moment in (("A", factors.A), ("G", factors.G)):
                tensors |= _stored(f"{name}/{side}", moment)
        return tensors

    @classmethod
    def load(cls, directory: str | Path) -> "Curvature":
        """Reads what :meth:`save` wrote.

        Args:
            directory: The curvature directory.

        Returns:
            The curvature, on the CPU.

        Raises:
            ArtifactError: It is no curvature directory, or one of a format this version does not read.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        try:
            return cls._of(manifest, load_file(directory / TENSORS), directory)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise ArtifactError(f"the curvature directory '{directory}' is damaged: {error}") from error

    @classmethod
    def of_main(cls, found: "Curvature | None") -> "Curvature | None":
        """The curvature that the main of several processes has read, which others may not be able to read.

        Args:
            found: What it has read, if anything; not looked at elsewhere.

        Returns:
            The same everywhere.
        """
        with ranks.sharing():
            return cls._of_main(found)

    @classmethod
    def _of_main(cls, found: "Curvature | None") -> "Curvature | None":
        if ranks.size() == 1:
            return found

        def said() -> dict[str, Any]:
            return {"manifest": found.manifest(), "path": str(found.path)} if found is not None else {}

        about = distributed.from_main(said)
        if not about:
            return None
        tensors = distributed.tensors_of(0, found._tensors() if found is not None else None)
        return found if ranks.is_main() else cls._of(about["manifest"], tensors, Path(about["path"]))

    @classmethod
    def _of(cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> "Curvature":
        """What a manifest and tensors hold; raises what looking for what is not there raises."""
        count = manifest["num_tokens"]
        return cls(
            factors={
                n: Factors(A=_restored(tensors, f"{n}/A"), G=_restored(tensors, f"{n}/G"), num_tokens=count)
                for n in manifest["matrices"]
            },
            layers=tuple(manifest["layers"]),
            fisher=manifest["fisher"],
            model_name=manifest["model"],
            model_revision=manifest["model_revision"],
            model_fingerprint=manifest["model_fingerprint"],
            dtype=manifest["dtype"],
            tokenizer=manifest["tokenizer"],
            chat_template=manifest["chat_template"],
            held_out=tuple(manifest["held_out"]),
            texts=manifest["texts"],
            seed=manifest["seed"],
            _described={n: Description.from_json(of_matrix) for n, of_matrix in manifest["matrices"].items()},
            path=path,
        )

    def of_rows(self, model: Any, matrices: Sequence[EditMatrix], rows: Sequence[Sequence[int]], seed: int) -> Self:
        """The curvature at these rows of the same model, whose weights may have moved since: what a round adds.

        The loss is that of every next token, prompts included: where a model was just taught the targets, their
        gradients are next to nothing. (CrispEdit, arXiv 2602.15823, Algorithm 2 and Table 6.)

        Args:
            model: The causal LM, as edited so far.
            matrices: Those of this curvature.
            rows: Token ids of prompts with their targets, each of two tokens or more.
            seed: Of sampled labels.

        Returns:
            A curvature that :func:`merge` adds to this one; it has no held-out texts.
        """
        digest = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
        about = {"source": "edits", "sha256": digest, "seed": seed, "samples": len(rows)}
        return self._measured(model, matrices, row_batches(model, rows), seed, about)

    def of_texts(
        self, model: Any, tokenizer: Any, matrices: Sequence[EditMatrix], texts: CapabilityTexts, seed: int
    ) -> Self:
        """The curvature at capability texts of the same model, whose weights have moved since.

        Args:
            model: The causal LM, as edited so far.
            tokenizer: Its tokenizer.
            matrices: Those of this curvature.
            texts: Of which the held-out fifth is left out.
            seed: Of sampled labels.

        Returns:
            A curvature that takes the place of this one.
        """
        batches = text_batches(model, tokenizer, texts.fit)
        found = self._measured(model, matrices, batches, seed, texts.manifest())
        return replace(found, held_out=texts.held_out, _starts={**self._spectra, **self._tops})

    def _measured(
        self,
        model: Any,
        matrices: Sequence[EditMatrix],
        batches: Sequence[TokenBatch],
        seed: int,
        about: Mapping[str, Any],
    ) -> Self:
        """Factors like these, of other batches at the weights as they are."""
        with ranks.sharing():
            found = estimate_factors(model, matrices, batches, fisher=self.fisher, seed=seed, kind=self.kind)
        return self._with(found, about)

    def _with(
        self,
        factors: Mapping[str, Factors],
        texts: Mapping[str, Any],
        held_out: tuple[str, ...] = (),
        starts: Mapping[str, Spectrum] | None = None,
    ) -> Self:
        """Other factors of the same model; nothing that was computed of these is kept."""
        return replace(
            self,
            factors=factors,
            texts=texts,
            held_out=held_out,
            path=None,
            seconds=0.0,
            second_moments={},
            _described={},
            _spectra={},
            _tops={},
            _starts=dict(starts or {}),
            _subspaces={},
            _pass=None,
        )

    def check_model(self, model: Any, matrices: Sequence[EditMatrix], tokenizer: Any = None) -> None:
        """Refuses a curvature of another model or tokenizer, or without the matrices to be edited.

        Args:
            model: The model about to be edited.
            matrices: The matrices about to be edited.
            tokenizer: The tokenizer that goes with it, where it matters.

        Raises:
            ModelError: Weights or tokenizer differ from those the curvature was computed with.
            ConfigError: A matrix has no factors here.
        """
        if self.model_fingerprint != fingerprint(model):
            revision = getattr(model.config, "_commit_hash", None)
            named = [f"'{self.model_name}'", *([f"revision {self.model_revision[:12]}"] if self.model_revision else [])]
            mine = f", revision {revision[:12]}" if revision and revision != self.model_revision else ""
            raise ModelError(
                f"the curvature was computed for {', '.join(named)} with other weights (fingerprint "
                f"{self.model_fingerprint[:12]}, this model has {fingerprint(model)[:12]}{mine}); "
                "compute it for this model"
            )
        if tokenizer is not None and self.tokenizer != tokenizer_hash(tokenizer):
            raise ModelError(
                f"the curvature was computed with another tokenizer (sha256 {self.tokenizer[:12]}, this one has "
                f"{tokenizer_hash(tokenizer)[:12]}); compute it with this one"
            )
        check_matrices(self.factors, self.layers, matrices)


def default_constraint(kind: Kind, shape: tuple[int, int]) -> Constraint:
    """What ``auto`` leaves out of a matrix: the staircase where coordinates in the whole eigenbasis cost little.

    Args:
        kind: Of its factors; sketches know no whole eigenbasis.
        shape: (d_out, d_in).

    Returns:
        ``staircase`` or ``cross``.
    """
    return "staircase" if kind == "dense" and coordinates_cost_little(shape) else "cross"


def check_matrices(known: Collection[str], layers: Sequence[int], matrices: Sequence[EditMatrix]) -> None:
    """Refuses matrices of which a curvature knows nothing.

    Args:
        known: Names of those it has factors of.
        layers: Their layers.
        matrices: The matrices about to be edited.

    Raises:
        ConfigError: One of them has no factors.
    """
    if missing := [matrix for matrix in matrices if matrix.name not in known]:
        have = ", ".join(map(str, layers))
        raise ConfigError(f"the curvature has no factors for layer {missing[0].layer}; it has layers {have}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """What ``curvature.json`` says of a curvature: everything but the numbers.

    Args:
        directory: The curvature directory.

    Returns:
        Its fields, of this version's format.

    Raises:
        ArtifactError: It is no curvature directory, or one of a format this version does not read.
    """
    if not (directory / MANIFEST).is_file():
        raise ArtifactError(f"'{directory}' is not a curvature directory: it has no {MANIFEST}")
    manifest = read_json(directory / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"'{directory}' has curvature format {version}; this version reads {FORMAT}")
    return dict(manifest)


def content_key(about: Mapping[str, Any], kind: Kind) -> str:
    """What a curvature is called by its content: all that its factors depend on.

    Args:
        about: A manifest, or what of it is known before the pass.
        kind: Of the factors.

    Returns:
        24 hexadecimal digits.
    """
    names = ("model_fingerprint", "dtype", "tokenizer", "fisher", "seed")
    content = [FORMAT, kind, list(about["layers"]), about["texts"]["sha256"], *(about[name] for name in names)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def merge(
    curvatures: Sequence[Curvature], weights: Sequence[float] | None = None, *, start: Curvature | None = None
) -> Curvature:
    """One curvature over several corpora: capabilities and earlier edits, English and code and Chinese.

    Factors add by token count (CrispEdit, Algorithm 2).

    Args:
        curvatures: At least one, of the same model, tokenizer and matrices.
        weights: In place of the token counts, not negative: 1 and 1 give two corpora the same say, however long.
        start: Where its leading spectra are known, the search for those of the sum sets out from them; the one with
            most weight when omitted.

    Returns:
        The sum. Its held-out texts are those of all: of texts that were in several corpora, divided otherwise, some
        are among those that another was fitted on. It has no overlap of halves.

    Raises:
        ConfigError: There is none, there are other numbers of weights, or two do not go together.
    """
    if not curvatures:
        raise ConfigError("there is no curvature to merge; give at least one")
    if weights is not None and (len(weights) != len(curvatures) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        raise ConfigError(
            f"weights is {list(weights)}; it must be {len(curvatures)} numbers, not negative and not all zero"
        )
    first = curvatures[0]
    for name in ("model_fingerprint", "tokenizer", "dtype", "layers", "fisher"):
        if wrong := [c for c in curvatures if getattr(c, name) != getattr(first, name)]:
            ours, theirs = getattr(first, name), getattr(wrong[0], name)
            raise ConfigError(f"curvatures of different {name} do not add: {_short(ours)} and {_short(theirs)}")
    factors = {n: merge_factors([c.factors[n] for c in curvatures], weights) for n in first.factors}
    raw = [c.num_tokens for c in curvatures] if weights is None else weights
    known = start or curvatures[max(zip(raw, range(len(raw)), strict=True))[1]]
    parts = _parts(curvatures, raw)
    return first._with(
        factors,
        {"source": "merged", "sha256": _digest(parts), "seed": None, "samples": None, "parts": parts},
        held_out=tuple(dict.fromkeys(text for c in curvatures for text in c.held_out)),
        starts={**known._starts, **known._spectra, **known._tops},
    )


def _parts(curvatures: Sequence[Curvature], weights: Sequence[float]) -> list[dict[str, Any]]:
    """The corpora of a sum with their weights: those of sums among its terms, and all rounds of edits as one.

    A session adds to its curvature with every round: a list of lists, or of rounds, would grow with it.
    """
    flat: list[dict[str, Any]] = []
    for weight, curvature in zip(weights, curvatures, strict=True):
        own = curvature.texts.get("parts", [{"weight": weight, **curvature.texts}])
        total = sum(part["weight"] for part in own)
        flat += own if total == weight else [{**part, "weight": weight * part["weight"] / total} for part in own]
    parts: list[dict[str, Any]] = []
    for part in flat:
        before = next((n for n, one in enumerate(parts) if one["source"] == part["source"] == "edits"), None)
        if before is None:
            parts.append(part)
        else:
            parts[before] = _rounds_as_one(parts[before], part)
    return parts


def _rounds_as_one(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Two rounds of edits, or what was made of several, as one entry with a hash over their hashes."""
    both = earlier, later
    return {
        "weight": earlier["weight"] + later["weight"],
        "source": "edits",
        "sha256": _digest(both),
        "seed": None,
        "samples": earlier["samples"] + later["samples"],
        "rounds": sum(part.get("rounds", 1) for part in both),
    }


def _digest(parts: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([[part["weight"], part["sha256"]] for part in parts]).encode()).hexdigest()


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def affordable_kind(matrices: Sequence[EditMatrix]) -> Kind:
    """The kind that the memory rule gives where the matrices lie; says so when it is a sketch."""
    devices = {m.parameter.device for m in matrices}
    on = {device: [m.shape for m in matrices if m.parameter.device == device] for device in devices}
    kinds: list[Kind] = [choose_kind(shapes, free_memory(device)) for device, shapes in on.items()]
    if "sketch" in kinds:
        log.info("dense factors would take more than half of the free memory: factors are sketched")
        return "sketch"
    return "dense"


def _kind_under_way(about: Mapping[str, Any], affordable: Kind, resume: Path | None) -> Kind:
    """The kind of a pass that was begun, perhaps when more or less memory was free; else the one that is affordable."""
    kinds: list[Kind] = [affordable, "sketch" if affordable == "dense" else "dense"]
    begun = [kind for kind in kinds if resume and (resume / content_key(about, kind)).exists()]
    return begun[0] if begun else affordable


def _stored(key: str, moment: Moment) -> dict[str, Tensor]:
    """A moment as tensors of a file."""
    if isinstance(moment, Tensor):
        return {key: moment.cpu().contiguous()}
    trace_of = torch.tensor(moment.trace, dtype=torch.float64)
    return {f"{key}.product": moment.product.cpu().contiguous(), f"{key}.trace": trace_of}


def _restored(tensors: Mapping[str, Tensor], key: str) -> Moment:
    """What :func:`_stored` made tensors of."""
    if f"{key}.product" in tensors:
        return Sketch(tensors[f"{key}.product"], float(tensors[f"{key}.trace"]))
    return tensors[key]
