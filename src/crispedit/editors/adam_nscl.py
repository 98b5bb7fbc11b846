"""Adam-NSCL: Adam's step, projected off the inputs that carry the capability activations.

    A = E[a aᵀ] = U diag(α) Uᵀ, α descending;   k the fewest leading directions that hold γ of the trace
    ΔW = Adam(∇W) P,   P = U_{>k} U_{>k}ᵀ

("Training networks in null space of feature covariance for continual learning", Wang et al., arXiv 2103.07113, where P
is cut at a multiple of the smallest eigenvalue; the share γ is that of the CrispEdit paper, arXiv 2602.15823.) It is
CrispEdit with G = I, and without Adam in the eigenbasis.

The comparison of the CrispEdit paper ran another thing under this name, available as preset ``published``: the
gradient, not the step, is projected, from the side of the outputs, and what is left out are the smallest directions of
the gradient covariance G, as many as the largest that hold γ. It leaves out next to nothing.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..curvature import Curvature
from ..errors import ConfigError
from ..ownership import owned
from ..rule_choice import update_rule
from ..spectrum import Spectrum
from ..subspace import Subspace
from ..updates import Elsewhere, Unconstrained, UpdateRule
from ._gradient import PUBLISHED, RuledConfig, train_rules
from .base import EditProblem, Presets, Round


class Config(RuledConfig):
    """Settings of Adam-NSCL: those of the loop, and what is left out.

    Args:
        energy: γ, the share of the capability activations' second moment that is left out.
        variant: ``inputs``, or ``published`` (see above).
    """

    presets: ClassVar[Presets] = {"published": {**PUBLISHED, "energy": 0.5, "stop_loss": 0.05, "variant": "published"}}

    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9
    variant: Literal["inputs", "published"] = "inputs"

    def needs_curvature(self) -> bool:
        """Its A."""
        return True

    def subspace(self, curvature: Curvature, name: str) -> Subspace | None:
        """Changes that the leading inputs do not meet; the published variant keeps to nothing."""
        return curvature.subspace(name, self.energy, "inputs") if self.variant == "inputs" else None


class _SmallestOutputsLeftOut(Unconstrained):
    """The published variant's rule: Adam on W, with the gradient off the smallest directions of G."""

    def __init__(self, spectrum: Spectrum, energy: float, device: torch.device) -> None:
        if not spectrum.complete:
            raise ConfigError("adam-nscl:published needs all eigenvectors of G, and this curvature is sketched")
        held = spectrum.beta.cumsum(0) / spectrum.beta.sum()
        count = int((held < energy).sum()) + 1  # of the largest
        self.left_out = spectrum.output_basis[:, len(held) - count :].to(device)
        super().__init__((len(held), len(spectrum.input_basis)), device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """(I − U Uᵀ) ∇W, U the smallest directions."""
        return weight_gradient - self.left_out @ (self.left_out.T @ weight_gradient)


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.

    Raises:
        ConfigError: The published variant is given a sketched curvature.
    """
    assert problem.curvature is not None
    rules: list[UpdateRule] = []
    for matrix, own in zip(problem.matrices, owned(problem.matrices), strict=True):
        device = matrix.parameter.device
        # asked for by all processes, which solve them together
        spectrum = problem.curvature.spectrum(matrix.name)
        if not own:
            rules.append(Elsewhere(matrix))
        elif config.variant == "published":
            rules.append(_SmallestOutputsLeftOut(spectrum, config.energy, device))
        else:
            subspace = problem.curvature.subspace(matrix.name, config.energy, "inputs")
            rules.append(update_rule("update-projected", subspace.to(device)))
    every = range(len(problem.edits))
    yield Round(num_edits=len(every), trace=train_rules(problem, config, rules, every))
