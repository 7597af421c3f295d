"""Streaming range criteria against brute force on all the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analog_plugin.ops.histogram import MagnitudeHistogram

DISTRIBUTIONS = {
    "normal": lambda g: torch.randn(40000, 6, generator=g),
    "heavy tails": lambda g: torch.randn(40000, 6, generator=g) ** 3,
    "laplace": lambda g: (
        torch.empty(40000, 6).exponential_(generator=g) * torch.randn(40000, 6, generator=g).sign()
    ),
    "one outlier channel": lambda g: (
        torch.randn(40000, 6, generator=g) * torch.tensor([1, 1, 40, 1, 1, 40.0])
    ),
    "uniform": lambda g: torch.rand(40000, 6, generator=g) - 0.5,
    "shifted": lambda g: torch.randn(40000, 6, generator=g) * 0.1 + 2.0,
}


@pytest.fixture(params=DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def data(request):
    return request.param(torch.Generator().manual_seed(0))


def histogram(*batches, tiles=(3, 3)):
    made = MagnitudeHistogram(list(tiles))
    for batch in batches:
        made.update(batch)
    return made


def blocks(data):
    return data.double().split(3, dim=1)


def squared_error(block, value, levels):
    scale = value / levels
    quantized = (block.clamp(-value, value) / scale).round() * scale
    return float((block - quantized).square().mean())


def test_max_is_the_largest_magnitude_exactly(data):
    expected = torch.stack([block.abs().max() for block in blocks(data)]).float()
    assert torch.equal(histogram(data).range_max(), expected)


@pytest.mark.parametrize("kappa", [1.0, 18.0])
def test_std_is_a_multiple_of_the_deviation(data, kappa):
    expected = torch.stack([kappa * block.std() for block in blocks(data)]).float()
    torch.testing.assert_close(histogram(data).range_std(kappa), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_exact_to_one_bin(data, percent):
    found = histogram(data).range_percentile(percent)
    for value, block in zip(found, blocks(data), strict=True):
        ordered = block.abs().flatten().sort().values
        needed = -(-len(ordered) * percent // 100)  # as many as must lie inside
        exact = float(ordered[int(needed) - 1])
        assert exact * (1 - 1e-6) <= float(value) <= exact * (1 + 1 / 32)


@pytest.mark.parametrize("levels", [7, 31, 127], ids=["4 bits", "6 bits", "8 bits"])
@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "shifted"])
def test_mse_comes_within_one_percent_of_the_least_error(name, levels):
    # "shifted" lies within one quantization step, where the error depends on the step's phase.
    data = DISTRIBUTIONS[name](torch.Generator().manual_seed(0))
    found = histogram(data).range_mse(levels)
    for value, block in zip(found, blocks(data), strict=True):
        peak = float(block.abs().max())
        candidates = peak * torch.logspace(-1, 0, 120, base=10.0, dtype=torch.float64)
        least = min(squared_error(block, float(c), levels) for c in candidates)
        assert squared_error(block, float(value), levels) <= 1.01 * least
        assert 0 < float(value) <= peak * (1 + 1e-6)


CRITERIA = {
    "std": lambda h: h.range_std(3.0),
    "max": lambda h: h.range_max(),
    "percentile": lambda h: h.range_percentile(99.9),
    "mse": lambda h: h.range_mse(127),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_batches_one_by_one_give_what_all_at_once_gives(data, criterion):
    together = criterion(histogram(data))
    apart = criterion(histogram(*data.split([1, 9999, 20000, 10000])))
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@settings(deadline=None, max_examples=30)
@given(exponent=st.integers(-12, 10), seed=st.integers(0, 1000))
def test_ranges_follow_the_scale_of_the_data(criterion, exponent, seed):
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(seed))
    scaled = criterion(histogram(data * 2.0**exponent))
    torch.testing.assert_close(scaled, criterion(histogram(data)) * 2.0**exponent)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_the_order_and_sign_of_the_data_do_not_matter(data, criterion):
    shuffled = -data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(
        criterion(histogram(shuffled)), criterion(histogram(data)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_masked_rows_do_not_count(data, criterion):
    mask = torch.arange(len(data)) % 3 > 0
    polluted = data.clone()
    polluted[~mask] = 1e4
    made = MagnitudeHistogram([3, 3])
    made.update(polluted, mask)
    assert torch.equal(criterion(made), criterion(histogram(data[mask])))


def test_only_masked_rows_leave_the_statistics_empty(data):
    made = MagnitudeHistogram([3, 3])
    made.update(data, torch.zeros(len(data), dtype=torch.bool))
    assert float(made.moments.abs().sum()) == 0 and float(made.counts.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_seen_in_fp32(data, dtype):
    rounded = data.to(dtype)
    for criterion in CRITERIA.values():
        assert torch.equal(criterion(histogram(rounded)), criterion(histogram(rounded.float())))


@pytest.mark.parametrize("tiles", [(6,), (3, 3)], ids=["one tile", "2 tiles"])
def test_the_memory_order_of_the_data_does_not_matter(tiles):
    data = DISTRIBUTIONS["normal"](torch.Generator().manual_seed(0))
    transposed = data.t().contiguous().t()
    plain, other = histogram(data, tiles=tiles), histogram(transposed, tiles=tiles)
    assert torch.equal(plain.counts, other.counts)


def test_leading_dimensions_are_rows(data):
    a, b = histogram(data), histogram(data.view(400, 100, 6))
    assert torch.equal(a.counts, b.counts)


def test_zeros_and_extremes_fall_into_the_outer_bins():
    made = histogram(torch.tensor([[0.0, 1e-38, 1e-20], [1e7, 1e30, 1.0]]), tiles=(3,))
    assert float(made.counts.sum()) == 6
    assert float(made.counts[0, 0]) == 3 and float(made.counts[0, -1]) == 2
    assert float(made.range_max()) == pytest.approx(1e30)
