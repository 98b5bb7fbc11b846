"""AlphaEdit: MEMIT's values, brought about in the null space of what the model has used so far, round by round.

    C_l = E[a aᵀ] = U diag(α) Uᵀ,   P_l = I − U_c U_cᵀ,  U_c the leading eigenvectors
    ΔW_l = R_l K_lᵀ P_l (K_p K_pᵀ P_l + K_l K_lᵀ P_l + L2 · I)⁻¹

so that ΔW_l (I − P_l) = 0. K_l, R_l, the value vectors behind them, and K_p, the keys of earlier rounds:
:mod:`crispedit.editors._locate`. C_l is the factor A of the curvature. ("AlphaEdit: Null-Space Constrained Knowledge
Editing for Language Models", Fang et al., arXiv 2410.02355.)

Published are absolute settings: eigenvectors of less than 2e-2 are null, L2 is 10. Both depend on the scale of
activations, which differs between models; by default the leading eigenvectors are those that hold a share of the trace
(``energy``), and L2 is in parts of the mean ‖P k‖² of a round's keys, of which an edit alone then comes to
‖P k‖² / (L2 + ‖P k‖²) of what it wants from a layer.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..curvature import Curvature
from ..description import leading_spectrum
from ..errors import ConfigError
from ..models import EditMatrix
from ..spectrum import Spectrum
from ..subspace import Subspace
from ..threshold import Threshold
from ._locate import LocateConfig, edit_rounds
from .base import EditProblem, Presets, Round

RIDGE = 1.0
"""L2 of ``auto``, in parts of the mean ‖P k‖²."""
_PAPER = {"lr": 0.1, "clamp": 0.75, "weight_decay": 0.5, "threshold": 2e-2, "round_size": 100, "eos": False}


class Config(LocateConfig):
    """Settings of AlphaEdit: those of value vectors and rounds, what is null, and the ridge.

    Args:
        energy: The share of C's trace whose directions are left out.
        threshold: In place of it: eigenvectors of C whose eigenvalue is not less than this are left out.
        l2: L2; ``auto`` goes by the length of keys.
        round_size: Edits per round, taken in their order; all in one when none is given.
    """

    presets: ClassVar[Presets] = {
        "published": {**_PAPER, "l2": 10},
        "easyedit": {**_PAPER, "l2": 1},
        "easyedit-qwen": {**_PAPER, "lr": 0.5, "clamp": 4, "weight_decay": 1e-3, "l2": 1},
    }

    energy: Annotated[float, Field(gt=0, lt=1)] = 0.99
    threshold: Annotated[float, Field(gt=0)] | None = None
    l2: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    round_size: Annotated[int, Field(ge=1)] | None = 100

    def subspace(self, curvature: Curvature, name: str) -> Subspace:
        """Changes that the leading inputs do not meet.

        Raises:
            ConfigError: Nothing is left, or a sketch does not know as many eigenvectors.
        """
        factors = curvature.factors[name]
        spectrum = leading_spectrum(factors) if factors.dense is None else curvature.spectrum(name)
        return _null_space(spectrum.of_inputs(), self.energy, self.threshold)


def _null_space(spectrum: Spectrum, energy: float, threshold: float | None) -> Subspace:
    """The subspace off the leading eigenvectors of A."""
    d_out, d_in = spectrum.shape[0], len(spectrum.input_basis)
    held = spectrum.alpha.cumsum(0) / spectrum.traces[0]
    count = int((held < energy).sum()) + 1 if threshold is None else int((spectrum.alpha >= threshold).sum())
    if count > len(held) or (count == len(held) < d_in and threshold is not None):
        raise ConfigError(
            f"{len(held)} directions of the inputs are known, by a sketch, and more are to be left out; lower energy, "
            "raise threshold, or use dense factors"
        )
    if count == d_in:
        raise ConfigError("every direction of the inputs is left out; lower energy or raise threshold")
    share = float(held[count - 1]) if count else 0.0
    counts = torch.full((d_out,), count, dtype=torch.int64)
    cut = Threshold(tau=None, num_high=count * d_out, captured=share, counts=counts, cross=(0, count))
    return Subspace(spectrum=spectrum, threshold=cut, form="cross")


class NullSpace:
    """S = P.

    Args:
        subspace: Of changes W P.
        l2: μ, or ``auto``.
        device: Where keys are.
    """

    def __init__(self, subspace: Subspace, l2: float | Literal["auto"], device: torch.device) -> None:
        _, count = subspace.threshold.cross or (0, 0)
        self.left_out = subspace.spectrum.input_basis[:, :count].to(device).double()
        self.share, self.l2 = subspace.threshold.captured, l2

    def times(self, keys: Tensor) -> Tensor:
        """P K."""
        return keys - self.left_out @ (self.left_out.T @ keys)

    def ridge(self, keys: Tensor) -> float:
        """L2."""
        if self.l2 != "auto":
            return self.l2
        return RIDGE * float(self.times(keys).square().sum(0).mean())

    def details(self) -> dict[str, Any]:
        """How large the null space is, and what of the trace it leaves out."""
        d_in, count = self.left_out.shape
        return {"null_dimension": d_in - count, "left_out": self.share}


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """

    def freedom_of(curvature: Curvature, matrix: EditMatrix) -> NullSpace:
        return NullSpace(config.subspace(curvature, matrix.name), config.l2, matrix.parameter.device)

    yield from edit_rounds(problem, config, freedom_of, memory=True)
