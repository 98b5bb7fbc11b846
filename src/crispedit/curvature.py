"""Curvature of the capability loss: the K-FAC factors of every edited matrix, and their file.

Conventions, fixed here for the whole package. A linear map is y = W a. W is (d_out, d_in), a the
input of a token, g = ∂(loss of the sequence, summed over its tokens)/∂y at that token, and

    A = E[a aᵀ]  (d_in, d_in)        G = E[g gᵀ]  (d_out, d_out)

with both expectations over the tokens that have a next token to predict. Row-major curvature is
G ⊗ A; applied to a matrix X of W's shape it is X ↦ G X A. A mask has W's shape. ``Conv1D`` is
transposed in :mod:`crispedit.models` only. (CrispEdit, arXiv 2602.15823, section 3.3 and appendix A;
Martens & Grosse 2015.)

For softmax cross-entropy the Gauss–Newton Hessian is the Fisher information: the expectation over
labels *sampled from the model* (``fisher="mc"``). With the texts' own next tokens it is the empirical
Fisher (``fisher="empirical"``), a different matrix, and the one that the published code computes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import __version__
from .artifacts import read_json, write_directory, write_json
from .errors import ArtifactError, ConfigError, ModelError, NumericsError, did_you_mean
from .models import EditMatrix, edit_matrices, fingerprint, frozen
from .subspace import Spectrum, Subspace
from .texts import CapabilityTexts, TokenBatch, next_tokens, split_texts, text_batches

Fisher = Literal["mc", "empirical"]
Constraint = Literal["staircase", "cross", "ekfac", "inputs"]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""
FORMAT = 1
MANIFEST, TENSORS = "curvature.json", "factors.safetensors"


def check_fisher(fisher: str) -> None:
    """Raises :class:`ConfigError` unless ``fisher`` is ``mc`` or ``empirical``."""
    known = get_args(Fisher)
    if fisher not in known:
        raise ConfigError(f"fisher is '{fisher}'; it must be {' or '.join(known)}{did_you_mean(fisher, known)}")


def no_progress(what: str, done: int, total: int) -> None:
    """The default progress callback: says nothing."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both Kronecker factors of one matrix, as means over ``num_tokens`` tokens.

    Args:
        A: Input second moment, (d_in, d_in) float32.
        G: Output-gradient second moment, (d_out, d_out) float32.
        num_tokens: How many tokens were averaged.
    """

    A: Tensor
    G: Tensor
    num_tokens: int


class FactorSums:
    """Sums of a aᵀ and g gᵀ over tokens, streamed; divided only at the end. Pure tensors.

    Args:
        shape: (d_out, d_in) of the matrix.
        device: Where the float32 sums live.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        d_out, d_in = shape
        self.A = torch.zeros(d_in, d_in, device=device)
        self.G = torch.zeros(d_out, d_out, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds tokens: ``inputs`` (tokens, d_in) and ``gradients`` (tokens, d_out)."""
        inputs, gradients = inputs.float(), gradients.float()
        self.A.addmm_(inputs.T, inputs)
        self.G.addmm_(gradients.T, gradients)
        self.num_tokens += len(inputs)

    def mean(self) -> Factors:
        """The factors."""
        return Factors(A=self.A / self.num_tokens, G=self.G / self.num_tokens, num_tokens=self.num_tokens)


@contextmanager
def _recorded(matrices: Sequence[EditMatrix]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, every forward pass leaves input and output of each matrix's module, by name."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # below the first edited matrix nothing is differentiated
                output = output.detach().requires_grad_()
            records[name] = (arguments[0].detach(), output)
            return output.clone()  # a later in-place addition must not reach what was recorded

        return hook

    handles = [matrix.module.register_forward_hook(hook_for(matrix.name)) for matrix in matrices]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _passes(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    fisher: Fisher,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """A forward and a backward pass per batch, down to the matrices' outputs.

    Yields:
        Which positions predict a token, (rows, length) bool; and per matrix name the inputs (rows, length, d_in) and
        the gradients at the outputs (rows, length, d_out) of the loss, summed over a sequence's tokens.

    Raises:
        NumericsError: The loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    with frozen(model), _recorded(matrices) as records, torch.enable_grad():
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
            labels = next_tokens(batch).to(logits.device)
            predicted = labels != -100
            if fisher == "mc":
                labels[predicted] = _sample(logits.detach()[predicted], generator)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, [records[m.name][1] for m in matrices])
            found = {m.name: (records[m.name][0], g) for m, g in zip(matrices, gradients, strict=True)}
            records.clear()
            if not torch.isfinite(loss):
                layers = ", ".join(str(m.layer) for m in matrices)
                raise NumericsError(f"the capability loss of batch {number + 1} is not finite (layers {layers})")
            yield predicted, found


def estimate_factors(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Factors]:
    """One pass over token batches: forward, backward to the matrices' outputs, two outer products each.

    Padding under the mask and every row's last token, which predicts nothing, are left out, so the
    factors do not depend on how rows were put together. Only the outputs of the matrices are
    differentiated; no parameter gets a gradient.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        fisher: Labels sampled from the model (``mc``) or the texts' own (``empirical``).
        seed: Of the sampled labels.
        progress: Called after every batch.

    Returns:
        Factors by matrix name, on the matrices' devices.

    Raises:
        NumericsError: An activation or a gradient is not finite.
    """
    sums = {m.name: FactorSums(m.shape, m.parameter.device) for m in matrices}
    generator = torch.Generator().manual_seed(seed)
    for number, (predicted, found) in enumerate(_passes(model, matrices, batches, fisher, generator)):
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            sums[name].add(inputs[counted], gradients[counted])
        progress("curvature", number + 1, len(batches))
    factors = {name: total.mean() for name, total in sums.items()}
    for name, of_matrix in factors.items():
        if not (torch.isfinite(of_matrix.A).all() and torch.isfinite(of_matrix.G).all()):
            raise NumericsError(f"the curvature factors of {name} are not finite; load the model with --dtype float32")
    return factors


def estimate_second_moments(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    spectra: Mapping[str, Spectrum],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information in the Kronecker eigenbasis, measured: EK-FAC (George et al. 2018).

    ∇W is the gradient of one sequence's loss, summed over its tokens, so that what tokens of a sequence have in
    common counts, which K-FAC leaves out.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        spectra: By matrix name; complete.
        fisher: See :func:`estimate_factors`, like the next two.
        seed: See there.
        progress: See there.

    Returns:
        By matrix name, (d_out, d_in) float32: E[(U_Gᵀ ∇W U_A)²_ij], divided by tokens as the factors are.
    """
    bases = {m.name: spectra[m.name].to(m.parameter.device) for m in matrices}
    sums = {m.name: torch.zeros(m.shape, device=m.parameter.device) for m in matrices}
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 0
    for number, (predicted, found) in enumerate(_passes(model, matrices, batches, fisher, generator)):
        num_tokens += int(predicted.sum())
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            for row, of_row in enumerate(counted):
                a = inputs[row][of_row].float() @ bases[name].input_basis
                g = gradients[row][of_row].float() @ bases[name].output_basis
                sums[name] += (g.T @ a).square()
        progress("second moments", number + 1, len(batches))
    return {name: total / num_tokens for name, total in sums.items()}


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per position from softmax(logits), by the Gumbel trick; drawn on the CPU, the same on every device."""
    uniform = torch.rand(logits.shape, generator=generator).to(logits.device)
    return (logits - (-uniform.clamp(1e-20).log()).clamp(1e-20).log()).argmax(-1)


def merge(factors: Sequence[Factors]) -> Factors:
    """Factors over several corpora, weighted by their token counts (CrispEdit, Algorithm 2).

    Args:
        factors: At least one, of equal shapes.

    Returns:
        A = Σ n_k A_k / Σ n_k, and G likewise.
    """
    total = sum(f.num_tokens for f in factors)
    return Factors(
        A=torch.stack([f.A * (f.num_tokens / total) for f in factors]).sum(0),
        G=torch.stack([f.G * (f.num_tokens / total) for f in factors]).sum(0),
        num_tokens=total,
    )


@dataclass(kw_only=True)
class Curvature:
    """The curvature of one model's capability loss: factors, the held-out texts, and provenance.

    Args:
        factors: By name of the edited matrix.
        layers: The decoder blocks they belong to.
        fisher: What labels the gradients were taken with.
        model_name: The base model, as the user named it.
        model_fingerprint: Of its weights (:func:`crispedit.models.fingerprint`).
        held_out: Texts that the factors have not seen, for drift.
        texts: Where the texts came from (:meth:`crispedit.texts.CapabilityTexts.manifest`).
        seed: Of sampled labels.
        path: The directory it was read from or written to.
        seconds: What estimating it took; 0 when it was read from disk.
        second_moments: By matrix name, where they were measured; see :func:`estimate_second_moments`.
    """

    factors: Mapping[str, Factors]
    layers: tuple[int, ...]
    fisher: Fisher
    model_name: str
    model_fingerprint: str
    held_out: tuple[str, ...]
    texts: Mapping[str, Any]
    seed: int
    path: Path | None = None
    seconds: float = 0.0
    second_moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _spectra: dict[str, Spectrum] = field(default_factory=dict, repr=False)
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
        seed: int = 0,
        model_name: str = "",
        progress: Progress = no_progress,
    ) -> "Curvature":
        """Estimates the factors of the chosen blocks' down-projections on capability texts.

        Args:
            model: A Hugging Face causal LM.
            tokenizer: Its tokenizer.
            texts: Strings, of which a seeded fifth is held out for drift; or texts already divided.
            layers: Decoder blocks; :func:`crispedit.models.default_layers` when omitted.
            fisher: ``mc`` or ``empirical``.
            seed: Of the split and of sampled labels.
            model_name: Recorded in the file.
            progress: Called after every batch.

        Returns:
            The curvature; spectra are computed when first asked for.
        """
        check_fisher(fisher)
        started = time.monotonic()
        divided = texts if isinstance(texts, CapabilityTexts) else split_texts(texts, seed=seed)
        matrices = edit_matrices(model, layers)
        batches = text_batches(model, tokenizer, divided.fit)
        factors = estimate_factors(model, matrices, batches, fisher=fisher, seed=seed, progress=progress)
        return cls(
            factors=factors,
            layers=tuple(m.layer for m in matrices),
            fisher=fisher,
            model_name=model_name or str(getattr(model.config, "_name_or_path", "")),
            model_fingerprint=fingerprint(model),
            held_out=divided.held_out,
            texts=divided.manifest(),
            seed=seed,
            seconds=time.monotonic() - started,
        )

    def subspace(self, name: str, energy: float, constraint: Constraint = "staircase") -> Subspace:
        """The low-curvature subspace of one matrix.

        Args:
            name: The matrix.
            energy: γ in [0, 1).
            constraint: What is left out: the pairs of largest curvature (``staircase``), a ``cross`` of the same
                energy, the pairs of largest measured curvature (``ekfac``), or directions of the inputs alone
                (``inputs``, G = I: Adam-NSCL).

        Returns:
            The subspace, in the cheapest exact form.

        Raises:
            ConfigError: There is no such constraint, ``energy`` is outside [0, 1), or there are no second moments.
        """
        key = (name, energy, constraint)
        if key not in self._subspaces:
            self._subspaces[key] = self._subspace(*key)
        return self._subspaces[key]

    def _subspace(self, name: str, energy: float, constraint: Constraint) -> Subspace:
        spectrum = self.spectrum(name)
        if constraint == "ekfac":
            if name not in self.second_moments:
                raise ConfigError("constraint ekfac needs second moments: call Curvature.measure_second_moments first")
            return Subspace.of_table(spectrum, self.second_moments[name], energy)
        if constraint == "inputs":
            return Subspace.of(spectrum.of_inputs(), energy)
        return Subspace.of(spectrum, energy, "cross" if constraint == "cross" else "auto")

    def spectrum(self, name: str) -> Spectrum:
        """The spectrum of one matrix's factors, diagonalised once."""
        if name not in self._spectra:
            factors = self.factors[name]
            self._spectra[name] = Spectrum.of(factors.A, factors.G)
        return self._spectra[name]

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
            "model_fingerprint": self.model_fingerprint,
            "layers": list(self.layers),
            "matrices": {n: {"d_out": len(f.G), "d_in": len(f.A)} for n, f in self.factors.items()},
            "fisher": self.fisher,
            "num_tokens": self.num_tokens,
            "texts": dict(self.texts),
            "seed": self.seed,
            **held_out,
        }

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``factors.safetensors`` and ``curvature.json``, whole or not at all.

        Args:
            directory: New or empty, unless ``overwrite``.
            overwrite: Whether a directory that is not empty is replaced.

        Returns:
            The directory.
        """
        tensors = {f"{n}/{key}": getattr(f, key).cpu().contiguous() for n, f in self.factors.items() for key in "AG"}
        with write_directory(Path(directory), overwrite=overwrite) as building:
            save_file(tensors, building / TENSORS)
            write_json(building / MANIFEST, self.manifest())
        self.path = Path(directory)
        return self.path

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
        if not (directory / MANIFEST).is_file():
            raise ArtifactError(f"'{directory}' is not a curvature directory: it has no {MANIFEST}")
        manifest = read_json(directory / MANIFEST)
        version = manifest.get("format") if isinstance(manifest, dict) else None
        if version != FORMAT:
            raise ArtifactError(f"'{directory}' has curvature format {version}; this version reads {FORMAT}")
        try:
            tensors = load_file(directory / TENSORS)
            factors = {
                n: Factors(A=tensors[f"{n}/A"], G=tensors[f"{n}/G"], num_tokens=manifest["num_tokens"])
                for n in manifest["matrices"]
            }
            return cls(
                factors=factors,
                layers=tuple(manifest["layers"]),
                fisher=manifest["fisher"],
                model_name=manifest["model"],
                model_fingerprint=manifest["model_fingerprint"],
                held_out=tuple(manifest["held_out"]),
                texts=manifest["texts"],
                seed=manifest["seed"],
                path=directory,
            )
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"the curvature directory '{directory}' is damaged: {error}") from error

    def check_model(self, model: Any, matrices: Sequence[EditMatrix]) -> None:
        """Refuses a curvature of another model, or without the matrices to be edited.

        Args:
            model: The model about to be edited.
            matrices: The matrices about to be edited.

        Raises:
            ModelError: The weights differ from those the curvature was computed at.
            ConfigError: A matrix has no factors here.
        """
        if self.model_fingerprint != fingerprint(model):
            raise ModelError(
                f"the curvature was computed for '{self.model_name}' with other weights (fingerprint "
                f"{self.model_fingerprint[:12]}, this model has {fingerprint(model)[:12]}); compute it for this model"
            )
        if missing := [m for m in matrices if m.name not in self.factors]:
            have = ", ".join(map(str, self.layers))
            raise ConfigError(f"the curvature has no factors for layer {missing[0].layer}; it has layers {have}")
