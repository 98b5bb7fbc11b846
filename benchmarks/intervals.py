"""Which bootstrap interval a comparison should use: exact coverage of percentile, BCa and normal intervals.

n binary items, of which a model loses each with one probability and gains it with another: the numbers lost and gained
are trinomial, so that coverage is a sum over them, with the interval of every pair resampled once. Also the share of
samples in which a loss is claimed: where nothing is lost on balance, it should be at most 2.5 %.

    python benchmarks/intervals.py
"""

import math
from functools import cache

import torch
from torch import Tensor

from crispedit.statistics import percentile_interval

RESAMPLES, NEGLIGIBLE = 4000, 1e-4
CASES = (
    (0.0025, 0.0025),
    (0.005, 0.005),
    (0.02, 0.02),
    (0.05, 0.05),
    (0.01, 0.0),
    (0.02, 0.0),
    (0.05, 0.0),
    (0.05, 0.01),
)
Interval = tuple[float, float]


def probability(count: int, lost: int, gained: int, rates: tuple[float, float]) -> float:
    """Of so many lost and gained items, under rates of losing and gaining."""
    if any(rate == 0 and number for rate, number in zip(rates, (lost, gained), strict=True)):
        return 0.0
    rest = count - lost - gained
    log = math.lgamma(count + 1) - sum(math.lgamma(number + 1) for number in (lost, gained, rest))
    for number, rate in ((lost, rates[0]), (gained, rates[1]), (rest, 1 - sum(rates))):
        log += number * math.log(rate) if number else 0.0
    return math.exp(log)


def bca_interval(drawn: Tensor, estimate: float, differences: Tensor) -> Interval:
    """The bias-corrected and accelerated interval of a mean (Efron 1987), ties counted half."""
    below = (drawn < estimate - 1e-9).double().mean() + 0.5 * ((drawn - estimate).abs() <= 1e-9).double().mean()
    bias = torch.special.ndtri(below.clamp(0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    centred = differences - differences.mean()
    acceleration = float(centred.pow(3).sum() / (6 * centred.square().sum() ** 1.5))
    shifted = bias + torch.special.ndtri(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = torch.quantile(drawn, torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))).tolist()
    return low, high


@cache
def intervals(count: int, lost: int, gained: int) -> dict[str, Interval]:
    """95 % intervals of the mean difference, as a share, by method."""
    estimate = (gained - lost) / count
    if lost == gained == 0:
        unseen = 1 - 0.025 ** (1 / count)
        return dict.fromkeys(("percentile", "BCa", "normal"), (-unseen, unseen))
    shares = torch.tensor([lost, gained, count - lost - gained], dtype=torch.float64) / count
    numbers = torch.distributions.Multinomial(count, shares).sample((RESAMPLES,))
    drawn = (numbers[:, 1] - numbers[:, 0]) / count
    differences = torch.tensor([-1.0] * lost + [1.0] * gained + [0.0] * (count - lost - gained), dtype=torch.float64)
    error = float((differences - estimate).square().sum()) ** 0.5 / count
    return {
        "percentile": percentile_interval(drawn),
        "BCa": bca_interval(drawn, estimate, differences),
        "normal": (estimate - 1.96 * error, estimate + 1.96 * error),
    }


def main() -> None:
    """Prints a table."""
    torch.manual_seed(0)
    print(
        "| n | lost, % | gained, % | coverage, %: percentile | BCa | normal "
        "| loss claimed, %: percentile | BCa | normal |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in (200, 400):
        for rates in CASES:
            total = 0.0
            covered = dict.fromkeys(("percentile", "BCa", "normal"), 0.0)
            claimed = dict(covered)
            for lost in range(int(2.5 * count * rates[0]) + 14):
                for gained in range(int(2.5 * count * rates[1]) + 14):
                    weight = probability(count, lost, gained, rates)
                    if weight < NEGLIGIBLE:
                        continue
                    total += weight
                    for name, (low, high) in intervals(count, lost, gained).items():
                        covered[name] += weight * (low - 1e-9 <= rates[1] - rates[0] <= high + 1e-9)
                        claimed[name] += weight * (high < -1e-9)
            shown = [f"{100 * share / total:.1f}" for share in (*covered.values(), *claimed.values())]
            print(f"| {count} | {100 * rates[0]:g} | {100 * rates[1]:g} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
