"""The curvature of a model's capability loss: factors of every edited matrix, and what they came from.

How factors are estimated is in :mod:`crispedit.estimation`, all conventions in :mod:`crispedit.factors`; what is
computed of them in :mod:`crispedit.spectra`.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import __version__, distributed, ranks
from .artifacts import write_json, write_tensors
from .curvature_file import (
    FORMAT,
    MANIFEST,
    TENSORS,
    content_key,
    factors_of_tensors,
    read_manifest,
    tensors_of_factors,
)
from .description import ENERGY, Description, describe
from .errors import ArtifactError, ConfigError, ModelError
from .estimation import estimate_factors, estimate_second_moments, sum_factors
from .factors import Factors, check_kind, choose_kind
from .fisher import Fisher, check_fisher
from .halves import factors_of_halves, pass_key, token_halves
from .memory import free_memory
from .models import EditMatrix, chat_template_hash, edit_matrices, fingerprint, tokenizer_hash
from .moments import Kind, times
from .progress import Progress, log, no_progress
from .spectra import Constraint, Spectra
from .spectrum import Spectrum
from .subspace import Subspace
from .texts import CapabilityTexts, TokenBatch, row_batches, split_texts, text_batches
from .threshold import check_energy


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
        spectra: Of the factors, as far as they were asked for.
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
    spectra: Spectra = field(default=None, repr=False)  # type: ignore[assignment]  # __post_init__ makes them
    _described: dict[str, Description] = field(default_factory=dict, repr=False)
    _pass: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.spectra is None or self.spectra.factors is not self.factors:
            self.spectra = Spectra(self.factors)

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
                (:func:`crispedit.rule_choice.coordinates_cost_little`).

        Returns:
            The subspace, in the cheapest exact form.

        Raises:
            ConfigError: There is no such constraint, ``energy`` is outside [0, 1), or there are no second moments.
        """
        return self.spectra.subspace(name, energy, constraint)

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
        return self.spectra.whole(name)

    def measure_second_moments(
        self, model: Any, tokenizer: Any, texts: Sequence[str], *, progress: Progress = no_progress
    ) -> None:
        """Measures what ``constraint="ekfac"`` needs, in :attr:`spectra`; they are not saved.

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
        self.spectra.second_moments = estimate_second_moments(
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
        write_tensors(building / TENSORS, tensors_of_factors(self.factors), {}, "the curvature")
        seconds = {"seconds": round(self.seconds, 2)} if self.seconds else {}
        write_json(building / MANIFEST, {**self.manifest(), **seconds})

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
        tensors = distributed.tensors_of(0, tensors_of_factors(found.factors) if found is not None else None)
        return found if ranks.is_main() else cls._of(about["manifest"], tensors, Path(about["path"]))

    @classmethod
    def _of(cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> "Curvature":
        """What a manifest and tensors hold; raises what looking for what is not there raises."""
        return cls(
            factors=factors_of_tensors(manifest, tensors),
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
            A curvature that :func:`crispedit.merging.merge` adds to this one; it has no held-out texts.
        """
        digest = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
        about = {"source": "edits", "sha256": digest, "seed": seed, "samples": len(rows)}
        return self.with_factors(self._measured(model, matrices, row_batches(model, rows), seed), about)

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
        found = self._measured(model, matrices, batches, seed)
        return self.with_factors(found, texts.manifest(), held_out=texts.held_out, starts=self.spectra.known())

    def _measured(
        self, model: Any, matrices: Sequence[EditMatrix], batches: Sequence[TokenBatch], seed: int
    ) -> dict[str, Factors]:
        """Factors like these, of other batches at the weights as they are."""
        with ranks.sharing():
            return estimate_factors(model, matrices, batches, fisher=self.fisher, seed=seed, kind=self.kind)

    def with_factors(
        self,
        factors: Mapping[str, Factors],
        texts: Mapping[str, Any],
        held_out: tuple[str, ...] = (),
        starts: Mapping[str, Spectrum] | None = None,
    ) -> Self:
        """Other factors of the same model; nothing that was computed of these is kept.

        Args:
            factors: By name of the matrix.
            texts: Where they came from.
            held_out: Texts that they have not seen.
            starts: Spectra of factors that they resemble, by name.

        Returns:
            A curvature that was not saved anywhere yet.
        """
        return replace(
            self,
            factors=factors,
            texts=texts,
            held_out=held_out,
            path=None,
            seconds=0.0,
            spectra=self.spectra.for_factors(factors, starts),
            _described={},
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
