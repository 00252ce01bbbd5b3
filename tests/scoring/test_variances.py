"""Rows told apart from probes that move all of them at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.distributions import MultivariateNormal

from rowscope.scoring.variances import RIDGE, random_signs, reliability, row_variances, without_jumps


def probed(probes: int, rows: int, readings: int, seed: int = 0):
    """Known variances over three orders of magnitude, random signs, and what they make to be read."""
    generator = torch.Generator().manual_seed(seed)
    variances = 10 ** (3 * torch.rand(rows, generator=generator) - 2)
    effects = torch.randn(rows, readings, generator=generator) * variances.sqrt().unsqueeze(1)
    patterns = random_signs((probes, rows), generator)
    return variances, effects, patterns, patterns @ effects


def log_likelihood(variances, patterns, readings) -> float:
    """Of the readings under the model, by torch.distributions, per reading."""
    variances, patterns, readings = variances.double(), patterns.double(), readings.double()
    ridge = RIDGE * readings.square().mean() * torch.eye(len(patterns))
    covariance = (patterns * variances) @ patterns.T + ridge
    model = MultivariateNormal(torch.zeros(len(patterns), dtype=torch.float64), covariance)
    return float(model.log_prob(readings.T).mean())


def test_more_probes_than_rows():
    """Guards near exactness where the rows' effects can be solved for."""
    _, effects, patterns, readings = probed(probes=120, rows=60, readings=4000)
    exact = effects.square().mean(1)
    found = row_variances(patterns, readings)
    # the smallest are a thousandth of the largest, about as large as the ridge spread over the probes
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.01 * float(exact.mean()))
    assert spearmanr(found, exact).statistic > 0.99


def test_fewer_probes_than_rows():
    """Guards what it is for: with a quarter of the probes it still finds what a matched filter does not."""
    variances, _, patterns, readings = probed(probes=50, rows=200, readings=4000)
    matched = (patterns.T @ readings).square().sum(1)
    found = spearmanr(row_variances(patterns, readings), variances).statistic
    plain = spearmanr(matched, variances).statistic
    assert found > 0.6
    assert found > plain + 0.1


@given(seed=st.integers(0, 10**6), probes=st.integers(4, 40), rows=st.integers(2, 60))
def test_likelihood_rises(seed, probes, rows):
    """Guards the fixed point: what it returns is likelier than equal variances, by an independent likelihood."""
    _, _, patterns, readings = probed(probes, rows, 200, seed)
    alike = torch.full((rows,), float(readings.square().mean()) / rows)
    found = row_variances(patterns, readings)
    assert found.shape == (rows,)
    assert bool((found >= 0).all())
    assert log_likelihood(found, patterns, readings) >= log_likelihood(alike, patterns, readings) - 1e-4 * probes


def test_steps_follow_the_gradient():
    """Guards the update's formula: each variance moves as the likelihood's gradient by autograd says, row by row."""
    _, _, patterns, readings = probed(probes=30, rows=45, readings=500)
    patterns, readings = patterns.double(), readings.double()
    start = torch.full((45,), float(readings.square().mean()) / 45, dtype=torch.float64, requires_grad=True)
    covariance = (patterns * start) @ patterns.T + RIDGE * readings.square().mean() * torch.eye(30)
    model = MultivariateNormal(torch.zeros(30, dtype=torch.float64), covariance)
    (gradient,) = torch.autograd.grad(model.log_prob(readings.T).mean(), start)
    step = row_variances(patterns.float(), readings.float(), iterations=1) - start.detach()
    assert bool((step.sign() == gradient.sign()).all())


def test_more_iterations_are_likelier():
    """Guards convergence: the likelihood rises with the iterations."""
    _, _, patterns, readings = probed(probes=40, rows=80, readings=1000)
    values = [log_likelihood(row_variances(patterns, readings, n), patterns, readings) for n in (0, 1, 2, 4, 8, 16)]
    assert values == sorted(values)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_scale(scale):
    """Guards units: readings of any size give variances in their square."""
    _, _, patterns, readings = probed(probes=20, rows=30, readings=100)
    expected = row_variances(patterns, readings)
    torch.testing.assert_close(row_variances(patterns, readings * scale) / scale**2, expected, rtol=1e-3, atol=1e-6)


def test_nothing_read():
    """Guards layers that nothing comes through: zeros, not NaN."""
    patterns = random_signs((8, 5), torch.Generator().manual_seed(0))
    assert torch.equal(row_variances(patterns, torch.zeros(8, 7)), torch.zeros(5))


@pytest.mark.parametrize("size", [100, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_a_few_enormous_readings(seed, size):
    """Guards the factorisation: readings of sizes that float32 cannot hold together give variances all the same."""
    _, _, patterns, readings = probed(probes=265, rows=192, readings=500, seed=seed)
    readings[::9, :10] += size * readings.std()
    found = row_variances(patterns, readings)
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())


def test_jumps_are_cut_off():
    """Guards routers that send a token elsewhere: its reading no longer drowns the rows, which are found again."""
    variances, _, patterns, readings = probed(probes=120, rows=60, readings=4000)
    jumping = readings.view(120, 400, 10).clone()
    places = torch.rand(120, 400, generator=torch.Generator().manual_seed(1)) < 0.001
    jumping[places] += 100 * readings.std()
    jumping = jumping.view(120, 4000)
    calm = without_jumps(jumping.clone(), 400)
    found, drowned = (spearmanr(row_variances(patterns, r), variances).statistic for r in (calm, jumping))
    assert found > 0.9
    assert found > drowned + 0.1
    assert calm.abs().max() < jumping.abs().max() / 5


@given(seed=st.integers(0, 10**6), positions=st.integers(1, 30), sums=st.integers(1, 4))
def test_without_jumps_nothing_is_cut_off(seed, positions, sums):
    """Guards ordinary models: where nothing jumps, the readings are the same bit for bit, and zeros stay zeros."""
    _, _, _, readings = probed(20, 30, positions * sums, seed)
    readings[:, :sums] = 0
    assert torch.equal(without_jumps(readings.clone(), positions), readings)


@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_reliability(seed, noise):
    """Guards Spearman-Brown: the share of the whole's variance that is signal, known here by construction."""
    generator = torch.Generator().manual_seed(seed)
    signal, first, second = torch.randn(3, 20000, generator=generator)
    share = 1 / (1 + noise**2 / 2)  # the whole is the mean of the halves: half of a half's noise
    assert reliability(signal + noise * first, signal + noise * second) == pytest.approx(share, abs=0.03)


def test_reliability_at_its_ends():
    """Guards 0 for opposite and for constant halves, and 1 for equal ones."""
    values = torch.tensor([1.0, -2.0, 1.0])
    assert reliability(values, -values) == 0.0
    assert reliability(values, torch.zeros(3)) == 0.0
    assert reliability(values, values) == pytest.approx(1.0)


def test_signs():
    """Guards ±1 in equal parts, and that fewer of a seed are the first of more."""
    signs = random_signs((100, 100), torch.Generator().manual_seed(0))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05
    assert torch.equal(random_signs((70,), torch.Generator().manual_seed(0)), signs.flatten()[:70])
