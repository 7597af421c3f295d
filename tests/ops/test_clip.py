"""Weight clipping, the α that clips nothing, and the schedule between them."""

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analog_plugin import AnalogScheme
from analog_plugin.ops.clip import clip_all, clip_to_sigma, peak_to_sigma
from analog_plugin.training.callback import clip_alpha


def rows(seed, outputs=9, inputs=70, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02 + mean
    weight[0, 0] = 1.0  # an outlier
    return weight


@pytest.mark.parametrize("mean", [0.0, 0.1], ids=["centred", "shifted"])
@pytest.mark.parametrize("alpha", [1.0, 2.5, 6.0])
def test_weights_are_clamped_to_multiples_of_their_rows_deviation(alpha, mean):
    weight = rows(0, mean=mean)
    bound = alpha * weight.double().std(1, keepdim=True)
    expected = weight.double().clamp(-bound, bound)
    clip_to_sigma(weight, alpha)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_the_peak_is_the_smallest_alpha_that_clips_nothing(seed):
    weight = rows(seed)
    alpha, clipped = peak_to_sigma(weight), weight.clone()
    clip_to_sigma(clipped, alpha * (1 + 1e-6))
    assert torch.equal(clipped, weight)
    clip_to_sigma(clipped, alpha * 0.999)
    assert not torch.equal(clipped, weight)


def test_rows_of_zeros_stay_zero_and_set_no_peak():
    weight = rows(0)
    peak = peak_to_sigma(weight)
    weight[4] = 0
    assert peak_to_sigma(weight) == peak
    clip_to_sigma(weight, 2.5)
    assert torch.equal(weight[4], torch.zeros(70))
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rows_are_clipped_with_an_fp32_deviation(dtype):
    weight = rows(0, inputs=3000).to(dtype)
    bound = 2.5 * weight.double().std(1, keepdim=True)
    clip_to_sigma(weight, 2.5)
    largest = weight.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(largest, bound, rtol=float(torch.finfo(dtype).eps), atol=0)


def test_a_layer_with_one_input_keeps_its_weights():
    # One weight has no deviation; zero would erase the layer.
    weight = torch.tensor([[0.5], [-0.25]])
    clip_to_sigma(weight, 2.5)
    assert torch.equal(weight, torch.tensor([[0.5], [-0.25]]))


def test_rows_without_deviation_keep_their_weights_and_set_no_peak():
    weight = torch.full((2, 8), 0.5)  # whose mean and norm are exact
    assert peak_to_sigma(weight) == 0.0
    clip_to_sigma(weight, 2.5)
    assert torch.equal(weight, torch.full((2, 8), 0.5))


def test_a_transposed_view_is_clipped_in_place():
    stored = rows(0).t().contiguous()  # as GPT-2's Conv1D keeps it
    expected = rows(0)
    clip_to_sigma(expected, 2.0)
    clip_to_sigma(stored.t(), 2.0)
    torch.testing.assert_close(stored, expected.t())


def test_many_weights_are_clipped_as_each_alone():
    def weights():
        stored = rows(4).t().contiguous()
        made = [rows(0), rows(1, outputs=3), rows(2, inputs=12), rows(3).bfloat16(), stored.t()]
        return [*made, torch.tensor([[0.5], [-0.25]]), torch.zeros(0, 70), torch.zeros(2, 70)]

    together, alone = weights(), weights()
    clip_all(together, 1.5)
    for weight, expected in zip(together, alone, strict=True):
        clip_to_sigma(expected, 1.5)
        assert torch.equal(weight, expected)
    clip_all([], 1.5)


def test_a_constant_schedule_is_the_target_throughout():
    scheme = AnalogScheme(clip_sigma=2.5)
    assert [clip_alpha(scheme, None, done) for done in (0.0, 0.5, 1.0)] == [2.5] * 3


def test_without_clipping_there_is_no_alpha():
    for schedule in ("constant", "anneal"):
        scheme = AnalogScheme(clip_sigma=None, clip_schedule=schedule)
        assert clip_alpha(scheme, 9.0, 0.5) is None


@settings(max_examples=100)
@given(st.floats(2.6, 100), st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1))
def test_annealing_falls_from_its_start_to_the_target(start, share, one, other):
    scheme = AnalogScheme(clip_sigma=2.5, clip_schedule="anneal", clip_anneal_share=share)
    assert clip_alpha(scheme, start, 0.0) == pytest.approx(start)
    assert clip_alpha(scheme, start, share) == pytest.approx(2.5)
    assert clip_alpha(scheme, start, 1.0) == pytest.approx(2.5)
    early, late = sorted((one, other))
    assert clip_alpha(scheme, start, early) >= clip_alpha(scheme, start, late) * (1 - 1e-12)


def test_annealing_from_below_the_target_stays_at_it():
    scheme = AnalogScheme(clip_sigma=2.5, clip_schedule="anneal")
    assert clip_alpha(scheme, 2.0, 0.1) == 2.5


def test_weights_in_parts_are_clipped_like_whole_ones(tmp_path):
    shapes = [(8, 6), (5, 7), (1, 9), (9, 1), (3, 2)]  # even, uneven and empty parts
    for run in runs.launch(2, tmp_path / "log", runs.clip_in_parts, shapes, 1.0):
        assert run.wait(60) == 0, run.output
        assert "compared 5" in run.output
