"""The KL divergence by its kernel: the numbers of float64, and of torch's operators."""

import pytest
import torch
from torch import nn

from analog_plugin.training.divergence import Divergence
from analog_plugin.training.loss import distillation_loss

ROWS, VOCABULARY = 5, 4999  # more than a block, and no whole block
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF = float("inf")


def logits(device, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    student = 3 * torch.randn(ROWS, VOCABULARY)
    teacher = student + 0.2 * torch.randn(ROWS, VOCABULARY)
    return student.to(device, dtype), teacher.to(device, dtype)


def reference(student, teacher, temperature=1.0):
    """Sum of t² KL and its gradient, in float64 by autograd."""
    student = student.double().requires_grad_()
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    loss = temperature**2 * torch.where(p == 0, 0.0, p * (log_p - log_q)).sum()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_it_is_that_of_float64(dtype, temperature, device):
    student, teacher = logits(device, dtype)
    gradient = torch.full_like(student, 7.0)
    loss = Divergence(temperature)(student, teacher, None, gradient)
    expected, slope = reference(student, teacher, temperature)
    assert loss.dtype == torch.float32
    # Each row's sums of exponentials round by a part in 2**23 or so.
    assert float((loss.double() - expected).abs()) < ROWS * temperature**2 * 5e-7
    # What holds it rounds to nearest; Triton's interpreter cuts off in bfloat16.
    step = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    step *= 2 if device.type == "cpu" and dtype == torch.bfloat16 else 1
    error = (gradient.double() - slope).abs()
    assert bool((error <= step * slope.abs() + 2e-7 * temperature).all())


def test_a_kl_far_below_the_rounding_of_log_probabilities_is_found(device):
    student, _ = logits(device)
    teacher = student + 1e-3 * torch.randn(student.shape).to(student)
    expected, _ = reference(student, teacher)
    loss = Divergence()(student, teacher, None, None)
    assert float(expected) / ROWS < 1e-6
    assert float(loss) == pytest.approx(float(expected), abs=ROWS * 5e-7)


def test_without_a_gradient_it_is_the_same_and_nothing_is_written(device):
    student, teacher = logits(device)
    before = student.clone()
    loss = Divergence()(student, teacher, None, None)
    assert torch.equal(loss, Divergence()(student, teacher, None, torch.empty_like(student)))
    assert torch.equal(student, before)


def test_rows_need_not_lie_one_after_the_other(device):
    student, teacher = logits(device)
    wide = torch.zeros(ROWS, VOCABULARY + 3).to(student)
    wide[:, :-3] = student
    expected = Divergence()(student, teacher, None, None)
    assert torch.equal(Divergence()(wide[:, :-3], teacher, None, None), expected)


@pytest.mark.parametrize(
    ("side", "value", "finite"),
    [("student", INF, False), ("teacher", INF, False), ("student", torch.nan, False),
     ("teacher", torch.nan, False), ("teacher", -INF, True)],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, VOCABULARY - 1])
def test_what_is_not_finite_is_as_by_torchs_operators(side, value, finite, place, device, plainly):
    student, teacher = logits(device)
    (student if side == "student" else teacher)[1, place] = value

    def run():
        gradient = torch.empty_like(student)
        return Divergence()(student, teacher, None, gradient), gradient

    (loss, gradient), (expected, slope) = run(), plainly(run)
    assert bool(loss.isfinite()) == bool(expected.isfinite()) == finite
    assert torch.equal(gradient.isnan(), slope.isnan())
    assert torch.allclose(gradient.nan_to_num(), slope.nan_to_num(), rtol=1e-5, atol=1e-7)
    if finite:
        assert torch.allclose(loss, expected, rtol=1e-5)


def test_tokens_that_neither_knows_count_for_nothing(device):
    student, teacher = logits(device)
    expected = Divergence()(student[:, 4500:], teacher[:, 4500:], None, None)
    student[:, :4500] = teacher[:, :4500] = -INF  # a whole block and more
    gradient = torch.empty_like(student)
    loss = Divergence()(student, teacher, None, gradient)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert bool((gradient[:, :4500] == 0).all())


def test_a_token_that_only_the_teacher_knows_makes_it_infinite(device, plainly):
    student, teacher = logits(device)
    student[0, 3] = -INF
    loss = Divergence()(student, teacher, None, None)
    assert loss == plainly(lambda: Divergence()(student, teacher, None, None)) == INF


def test_no_rows_are_nothing(device):
    student, teacher = logits(device)
    assert Divergence()(student[:0], teacher[:0], None, torch.empty_like(student[:0])) == 0


def test_vocabularies_must_be_equal(device):
    student, teacher = logits(device)
    with pytest.raises(RuntimeError, match="size"):
        Divergence()(student, teacher[:, :-1].contiguous(), None, None)


def test_under_autocast_a_heads_gradient_is_that_of_float64_but_for_half_precision(device):
    torch.manual_seed(3)
    head = nn.Linear(64, 300, bias=False, device=device)
    hidden = torch.randn(1, 12, 64).to(device).requires_grad_()
    goal = torch.randn(12, 300).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        # The teacher's states stand for the rows of its logits.
        rows = torch.arange(12.0)[None, :, None]
        loss = distillation_loss(
            hidden, rows, head, lambda states: goal[states[:, 0].long()], chunk=5, count=1
        )
    found = torch.autograd.grad(loss, [hidden, head.weight])
    states, weight = hidden.detach()[0].double().requires_grad_(), head.weight.detach().double()
    weight.requires_grad_()
    loss, slope = reference((states @ weight.t()).detach(), goal)
    expected = torch.autograd.grad(states @ weight.t(), [states, weight], slope)
    assert found[1].dtype == torch.float32
    for value, exact in zip((found[0][0], found[1]), expected, strict=True):
        assert float((value.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_loss_and_its_gradients_are_those_of_torchs_operators(chunk, device, plainly):
    torch.manual_seed(3)
    head, other = (nn.Linear(16, 300, bias=False, device=device) for _ in range(2))
    hidden = torch.randn(2, 6, 16).to(device).requires_grad_()
    teacher = torch.randn(2, 6, 16).to(device)

    def run():
        loss = distillation_loss(hidden, teacher, head, other, chunk=chunk, temperature=1.5)
        return loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])

    for found, expected in zip(run(), plainly(run), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
