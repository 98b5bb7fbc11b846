"""Intervals of paired differences: against exact formulas, against scipy, and their coverage by simulation."""

import math

import pytest
import torch

from crispedit.statistics import Difference, Measure, Stratum, differences, percentile_interval, replicates

EXACT = 1e-9


def percent(*hits, span=100):
    return Measure((Stratum.of([100 * hit for hit in hits]),), span=span)


def binary(count, right):
    return [1.0] * right + [0.0] * (count - right)


def compared(mine, its, **options) -> Difference:
    return differences([its, mine], 0, **options)[1]


def test_a_measure_is_a_mean_of_ratios():
    texts = Stratum.of([3.0, 5.0], [10, 30])  # nats over tokens: 8/40
    task = Stratum.of([1.0, 0.0, 1.0])
    assert Measure((texts,)).value == pytest.approx(0.2, abs=EXACT)
    assert Measure((texts, task)).value == pytest.approx((0.2 + 2 / 3) / 2, abs=EXACT)
    both = Stratum.of([1.0, 0.0]).beside(Stratum.of([1.0, 0.0], [1, 0]))  # the second item says nothing of one column
    assert Measure((both,)).value == pytest.approx((0.5 + 1) / 2, abs=EXACT)


def test_the_standard_error_of_a_mean_is_the_formulas():
    """s/√n, with n − 1 in s: what the jackknife is for a mean, exactly."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 50, dtype=torch.float64)
    found = compared(Measure((Stratum.of(a.tolist()),)), Measure((Stratum.of(b.tolist()),)))
    assert found.value == pytest.approx(float((a - b).mean()), abs=EXACT)
    assert found.error == pytest.approx(float((a - b).std() / 50**0.5), rel=EXACT)


def test_the_standard_error_of_a_mean_over_strata_is_the_formulas():
    torch.manual_seed(0)
    parts = [torch.randn(n, dtype=torch.float64) for n in (20, 70, 40)]
    zero = Measure(tuple(Stratum.of([0.0] * len(part)) for part in parts))
    found = compared(Measure(tuple(Stratum.of(part.tolist()) for part in parts)), zero)
    assert found.error == pytest.approx(math.sqrt(sum(float(p.var()) / len(p) for p in parts)) / 3, rel=EXACT)


def test_resampled_shares_are_binomial():
    """Of n binary items with m right, resampled sums are Binomial(n, m/n); 4 standard errors of 20,000 resamples."""
    drawn = (replicates([percent(*binary(25, 10))], resamples=20_000)[:, 0] / 4).round()
    for value in range(4, 17):
        exact = math.comb(25, value) * 0.4**value * 0.6 ** (25 - value)
        assert float((drawn == value).double().mean()) == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))


def test_pairs_are_resampled_together():
    """What both models have in common cancels: a constant difference has no spread, however much the items differ."""
    torch.manual_seed(0)
    base = (10 * torch.randn(30, dtype=torch.float64)).tolist()
    found = compared(Measure((Stratum.of([x + 1 for x in base]),)), Measure((Stratum.of(base),)))
    assert found.low == pytest.approx(1, abs=EXACT)
    assert found.high == pytest.approx(1, abs=EXACT)


def test_the_same_seed_gives_the_same_interval():
    mine, its = (Measure((Stratum.of([float(power * i) for i in range(40)]),)) for power in (2, 3))
    assert compared(mine, its, seed=3) == compared(mine, its, seed=3)
    assert compared(mine, its, seed=3) != compared(mine, its, seed=4)


def test_chunks_are_whole_resamples(monkeypatch):
    """Drawn in chunks, they are still resamples of all strata: mean and spread are those of the formulas."""
    monkeypatch.setattr("crispedit.statistics.CHUNK", 500)
    drawn = replicates([Measure((Stratum.of(binary(40, 10)), Stratum.of(binary(60, 30))))], resamples=5000)
    assert drawn.shape == (5000, 1)
    spread = math.sqrt(0.25 * 0.75 / 40 + 0.5 * 0.5 / 60) / 2
    assert float(drawn.mean()) == pytest.approx(0.375, abs=4 * spread / math.sqrt(5000))
    assert float(drawn.std()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("method", ["skewed", "ratio"])
def test_intervals_are_scipys(method):
    """The same method on the same data with other random numbers; 10,000 resamples: ends agree to 4 % of the width."""
    stats = pytest.importorskip("scipy.stats")
    import numpy

    generator = numpy.random.default_rng(0)
    if method == "skewed":  # one sample, far from normal
        samples = (generator.exponential(size=40),)
        mine = Measure((Stratum.of(samples[0].tolist()),))
        zero = Measure((Stratum.of([0.0] * 40),))
        expected = stats.bootstrap(samples, numpy.mean, n_resamples=10_000, method="percentile", rng=generator)
    else:  # nats over tokens
        tokens = generator.integers(5, 60, size=50)
        nats = tokens * generator.exponential(size=50)
        mine = Measure((Stratum.of(nats.tolist(), tokens.tolist()),))
        zero = Measure((Stratum.of([0.0] * 50, tokens.tolist()),))
        expected = stats.bootstrap(
            (nats, tokens),
            lambda s, c, axis: s.sum(axis) / c.sum(axis),
            paired=True,
            n_resamples=10_000,
            method="percentile",
            rng=generator,
        )
    found = compared(mine, zero)
    low, high = expected.confidence_interval
    assert found.low == pytest.approx(low, abs=0.04 * (high - low))
    assert found.high == pytest.approx(high, abs=0.04 * (high - low))


def test_strata_are_scipys_samples():
    """scipy's bootstrap of several samples draws each by itself, as strata are."""
    stats = pytest.importorskip("scipy.stats")
    import numpy

    generator = numpy.random.default_rng(1)
    a, b = generator.exponential(size=30), 3 * generator.exponential(size=80) ** 2
    expected = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x.mean(axis) + y.mean(axis)) / 2,
        n_resamples=10_000,
        method="percentile",
        rng=generator,
    )
    zero = Measure((Stratum.of([0.0] * 30), Stratum.of([0.0] * 80)))
    found = compared(Measure((Stratum.of(a.tolist()), Stratum.of(b.tolist()))), zero)
    low, high = expected.confidence_interval
    assert found.low == pytest.approx(low, abs=0.04 * (high - low))
    assert found.high == pytest.approx(high, abs=0.04 * (high - low))


def simulated(count, lost, gained, trials, seed=0, resamples=1000):
    """Intervals and differences of samples in which items are lost and gained with these probabilities."""
    generator = torch.Generator().manual_seed(seed)
    base = percent(*binary(count, count // 2))
    for _ in range(trials):
        u = torch.rand(count, generator=generator)
        change = (u > 1 - gained).double() - (u < lost).double()
        mine = Measure((Stratum(base.strata[0].sums + 100 * change[:, None], base.strata[0].counts),), span=100)
        yield compared(mine, base, resamples=resamples, seed=int(torch.randint(2**31, (1,), generator=generator)))


@pytest.mark.parametrize(("lost", "gained"), [(0.10, 0.08), (0.05, 0.0), (0.01, 0.01), (0.02, 0.005)])
def test_intervals_cover_what_is_true(lost, gained):
    """Of 400 intervals of 200 items, 95 % ± 3 % hold the truth: 2.8 standard errors of such a share (1.1 %).

    The last two cases have four and five items that differ on average; exactly, coverage is 95.9 % and 96.1 % there.
    """
    true = 100 * (gained - lost)
    hits = [found.low <= true <= found.high for found in simulated(200, lost, gained, 400)]
    assert sum(hits) / len(hits) == pytest.approx(0.95, abs=0.03)


def test_what_was_never_seen_is_bounded_exactly():
    """No item of n differs: (1 − p)^n = α/2 at the bound p, where a bootstrap's interval would be empty."""
    base = percent(*binary(400, 300))
    found = compared(base, base)
    assert (found.value, found.error) == (0, 0)
    assert (1 - found.high / 100) ** 400 == pytest.approx(0.025, rel=1e-6)
    assert found.low == -found.high


def test_an_interval_ends_where_the_measure_does():
    """All of four items gained: the bound on what was not seen is 60 points, and 100 per cent is all there is."""
    found = compared(percent(*binary(4, 4)), percent(*binary(4, 0)))
    assert found.low == pytest.approx(100 * 0.025**0.25, rel=1e-6)
    assert found.high == 100
    assert compared(percent(*binary(4, 0)), percent(*binary(4, 0))).low == 0


def test_the_detectable_difference_is_the_formulas_where_nothing_bounds_it():
    """(z_0.975 + z_0.8) standard errors: 2.8016 of them."""
    torch.manual_seed(0)
    a = torch.randn(60, dtype=torch.float64).tolist()
    found = compared(Measure((Stratum.of(a),)), Measure((Stratum.of([0.0] * 60),)))
    assert found.detectable == pytest.approx(2.80159 * found.error, rel=1e-5)


@pytest.mark.parametrize("churn", [0.0, 0.01, 0.05])
def test_a_difference_of_the_detectable_size_is_found_as_often_as_said(churn):
    """With items turning both ways at a rate of ``churn``, a loss of the stated size is told from 0 in 80 % of samples.

    Within 7 %: 2.5 standard errors of 200 trials, and what normal approximation and discreteness leave. Without any
    churn four lost items are told from none, and the formula's 7.85 give more power than was asked for (95 %).
    """
    count = 400
    base = percent(*binary(count, 200))
    turned = round(churn * count)
    change = torch.tensor([100.0] * turned + [-100.0] * turned + [0.0] * (count - 2 * turned), dtype=torch.float64)
    mine = Measure((Stratum(base.strata[0].sums + change[:, None], base.strata[0].counts),), span=100)
    size = compared(mine, base, resamples=100).detectable / 100
    found = list(simulated(count, churn + size, churn, 200, seed=1))
    power = sum(f.high < 0 for f in found) / len(found)
    assert 0.73 <= power <= (1 if churn == 0 else 0.87)


def test_the_reference_does_not_differ_from_itself():
    found = differences([percent(1, 0), percent(1, 1)], 1)
    assert found[1] == Difference(value=0.0, low=0.0, high=0.0, error=0.0, detectable=0.0)
    assert found[0].value == -50


def test_measures_of_other_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        differences([percent(1, 0), percent(1, 1, 0)], 0)


def test_replicates_without_a_value_are_left_out():
    """An item alone counts: resamples without it have no value."""
    drawn = replicates([Measure((Stratum.of([5.0, 0.0], [1, 0]),))], resamples=200)[:, 0]
    assert torch.isnan(drawn).any()
    assert percentile_interval(drawn) == (5, 5)
