"""Where curvatures are cut: the pairs that hold a share γ of all curvature. Pure tensors.

The curvature of the pair (i, j) is λ_ij = β_i α_j, with the eigenvalues α of A and β of G in descending order
(CrispEdit, arXiv 2602.15823, section 3.3). What is cut off is a *staircase* of pairs: row i has its first
``counts[i]`` pairs high, with counts that do not increase. Two staircases meet the same energy criterion:

- the pairs with the largest λ, fewest in number (the paper's choice); whether a pair is one of them is
  decided by bisection, without a d_out × d_in table;
- a *cross*, the first r rows and the first c columns. What it leaves unprotected is the product of what
  r and c leave of the two traces, so the top of both spectra is all that need be known.

Curvatures that were measured pair by pair (EK-FAC) are no staircase, and are sorted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a spectrum is cut.

    Args:
        tau: The k-th largest curvature λ; pairs with λ ≥ tau are high. ``inf`` when k is 0; ``None`` for a cross.
        num_high: How many pairs are high: k, and all pairs tied with the k-th; or those of the cross.
        captured: Share of the total energy tr(A)·tr(G) that the high pairs hold.
        counts: (d_out,) int64; row i has ``counts[i]`` high pairs: its first ones, unless there is a table.
        cross: (r, c) if the staircase is a cross.
        table: (d_out, d_in), the curvatures themselves, where they are not products of eigenvalues.
    """

    tau: float | None
    num_high: int
    captured: float
    counts: Tensor
    cross: tuple[int, int] | None = None
    table: Tensor | None = None


def energy_threshold(alpha: Tensor, beta: Tensor, energy: float) -> Threshold:
    """Cuts a Kronecker spectrum at an energy, by bisection over the staircase.

    k is the smallest number of largest λ_ij = β_i α_j whose sum is at least ``energy`` of the total;
    τ is the k-th (design of CrispEdit, section 3.1, definition of k). The d_out × d_in products are
    never formed: each of about 60 bisection steps costs O(d_out log d_in).

    Args:
        alpha: (d_in,) float64, descending, not negative.
        beta: (d_out,) float64, descending, not negative.
        energy: γ in [0, 1). 0 makes no pair high: plain fine-tuning.

    Returns:
        The threshold. With equal λ at the cut, all of them are high.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    total = float(alpha.sum() * beta.sum())
    goal = energy * total
    if goal == 0:
        return Threshold(tau=float("inf"), num_high=0, captured=0.0, counts=torch.zeros_like(beta, dtype=torch.int64))

    ascending = alpha.flip(0).contiguous()
    prefix = torch.cat([alpha.new_zeros(1), alpha.cumsum(0)])

    def above(tau: float) -> tuple[Tensor, float]:
        """Counts per row of the pairs with λ ≥ tau, and their energy."""
        smallest = torch.where(beta > 0, tau / beta, torch.full_like(beta, float("inf")))
        counts = len(alpha) - torch.searchsorted(ascending, smallest, side="left")
        return counts, float((beta * prefix[counts]).sum())

    # the energy above tau falls as tau grows: low always reaches the goal, high never does
    low, high = 0.0, float(alpha[0] * beta[0]) * (1 + 1e-12)
    while True:
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        if not low < middle < high:
            break
        if above(middle)[1] >= goal:
            low = middle
        else:
            high = middle
        if (low > 0 and high / low < 1 + 1e-13) or high < 1e-300:
            break
    counts, captured = above(low)
    # low lies within rounding of the k-th product: name that product itself, the least of the staircase's corners
    rows = counts > 0
    tau = float((beta[rows] * alpha[counts[rows] - 1]).min())
    return Threshold(tau=tau, num_high=int(counts.sum()), captured=captured / total, counts=counts)


def cross_threshold(alpha: Tensor, beta: Tensor, energy: float) -> Threshold:
    """The cross of fewest pairs that holds an energy: the first r rows and the first c columns.

    It leaves unprotected exactly (1 − E_G(r)) (1 − E_A(c)), with E the cumulative shares of the two traces.

    Args:
        alpha: (d_in,) float64, descending, not negative.
        beta: (d_out,) float64, descending, not negative.
        energy: γ in [0, 1). 0 makes no pair high.

    Returns:
        The threshold, its counts d_in in the first r rows and c in the others. r = 0 protects directions of A
        alone (Adam-NSCL, arXiv 2103.15526), c = 0 directions of G alone.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    d_in, d_out = len(alpha), len(beta)
    if energy * float(alpha.sum() * beta.sum()) == 0:
        counts = torch.zeros_like(beta, dtype=torch.int64)
        return Threshold(tau=None, num_high=0, captured=0.0, counts=counts, cross=(0, 0))
    left_of_A, left_of_G = _left(alpha), _left(beta)
    # for every r the fewest columns that leave no more than is allowed; the negated shares ascend
    allowed = torch.where(left_of_G > 0, (1 - energy) / left_of_G, torch.full_like(left_of_G, float("inf")))
    columns = torch.searchsorted(-left_of_A, -allowed, side="left")
    rows = torch.arange(d_out + 1, device=columns.device)
    r = int((rows * d_in + columns * (d_out - rows)).argmin())
    c = int(columns[r])
    counts = torch.full((d_out,), c, device=columns.device)
    counts[:r] = d_in
    captured = 1 - float(left_of_G[r] * left_of_A[c])
    return Threshold(tau=None, num_high=int(counts.sum()), captured=captured, counts=counts, cross=(r, c))


def table_threshold(curvatures: Tensor, energy: float) -> Threshold:
    """Cuts curvatures that are no products at an energy, by sorting: those measured by EK-FAC, say.

    Args:
        curvatures: (d_out, d_in), not negative.
        energy: γ in [0, 1). 0 makes no pair high.

    Returns:
        The threshold, with a table. With equal curvatures at the cut, all of them are high.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    ordered = curvatures.double().flatten().sort(descending=True).values
    sums = ordered.cumsum(0)
    tau, captured = float("inf"), 0.0
    if energy * float(sums[-1]) > 0:
        k = min(int(torch.searchsorted(sums, energy * sums[-1])), len(sums) - 1)
        tau = float(ordered[k])
    counts = (curvatures >= tau).sum(1)
    num_high = int(counts.sum())
    if num_high:
        captured = float(sums[num_high - 1] / sums[-1])
    return Threshold(tau=tau, num_high=num_high, captured=captured, counts=counts, table=curvatures)


def _left(values: Tensor) -> Tensor:
    """(n + 1,): the share of the sum that the first 0, 1, … n values leave; exactly 1 and 0 at the ends."""
    rest = (values / values.sum()).flip(0).cumsum(0).flip(0)  # summed from the small end, where it matters
    return torch.cat([values.new_ones(1), rest[1:], values.new_zeros(1)])


def check_energy(energy: float) -> None:
    """Raises :class:`ConfigError` unless ``energy`` is in [0, 1)."""
    if not 0 <= energy < 1:
        raise ConfigError(f"energy is {energy}; it must be at least 0 (plain fine-tuning) and less than 1")
