"""How well an approximation's removed directions are those of the exact Gauss–Newton Hessian.

All is computed in the Kronecker eigenbasis (u_i, v_j) of the approximation, where its removed directions are pairs:

- *captured*: the share of the GNH's trace on the removed directions, Σ E[(u_iᵀ G_n u_i) (v_jᵀ a_n)²] over these pairs.
  The exact eigenvectors hold γ with the fewest directions; an approximation takes more of them, or holds less.
- *captured at equal size*: the same of as many leading directions as the exact GNH removes at that γ.
- *overlap*: the mean cos² of the principal angles between the exact GNH's removed directions and as many leading ones
  of the approximation: 1 for the same space, and by chance the share of directions removed.
- *angles*: the median and the largest of these angles.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .constraints import DenseCut, Known, KroneckerCut

WIDEST = 1500
"""Principal angles are taken of no more directions than this: an SVD of that size takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one approximation at one γ; see the module.

    Args:
        energy: γ.
        removed: Directions that the approximation removes.
        exact_removed: Directions that the exact GNH removes.
        captured: Share of the GNH's trace on the removed directions, 0 to 1.
        captured_equal: The same of ``exact_removed`` leading directions.
        exact_captured: What the exact ones hold.
        overlap: Mean cos² of the principal angles at equal size; ``None`` of more than :data:`WIDEST` directions.
        median_angle: In degrees.
        largest_angle: In degrees.
    """

    energy: float
    removed: int
    exact_removed: int
    captured: float
    captured_equal: float
    exact_captured: float
    overlap: float | None
    median_angle: float | None
    largest_angle: float | None

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def qualities(known: Known, cut: KroneckerCut, exact: DenseCut, energies: Sequence[float]) -> list[Quality]:
    """The quality of an approximation at several energies.

    Args:
        known: What the GNH is made of.
        cut: The approximation's, a hard one, in one basis for all energies.
        exact: The exact GNH's, at the same energies.
        energies: γ.

    Returns:
        One for every γ.
    """
    bases = cut.output_basis[0], cut.input_basis[0]
    true = known.layer.moments(known.roots, *bases)
    true /= true.sum()
    ranks = cut.curvatures.flatten().argsort(descending=True)
    found = []
    for k, energy in enumerate(energies):
        count = exact.removed[k]
        angles = None if count > WIDEST or not count else _angles(exact.vectors[:, :count], *bases, ranks[:count])
        found.append(
            Quality(
                energy=energy,
                removed=cut.removed[k],
                exact_removed=count,
                captured=float(true[cut.weights[k] == 0].sum()),
                captured_equal=float(true.flatten()[ranks[:count]].sum()),
                exact_captured=exact.captured[k],
                overlap=None if angles is None else float(angles.cos().square().mean()),
                median_angle=None if angles is None else math.degrees(float(angles.median())),
                largest_angle=None if angles is None else math.degrees(float(angles.max())),
            )
        )
    return found


def _angles(vectors: Tensor, U_G: Tensor, U_A: Tensor, pairs: Tensor) -> Tensor:
    """Principal angles, in radians, between orthonormal columns (n, k) and k pairs of a Kronecker eigenbasis."""
    X = vectors.T.reshape(-1, len(U_G), len(U_A))
    inside = (U_G.T @ X @ U_A).flatten(1)[:, pairs]
    angles: Tensor = torch.linalg.svdvals(inside.double()).clamp(max=1).acos()
    return angles
