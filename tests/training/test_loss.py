"""The distillation loss against a naive one in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analog_plugin import AnalogError
from analog_plugin.training import TopTokens, distillation_loss, kl_divergence

T, HIDDEN, VOCABULARY = 23, 16, 50


def naive(student, teacher, head, teacher_head, *, mask, labels, temperature, share):
    s, t = head(student), teacher_head(teacher).detach()
    log_s, log_t = (F.log_softmax(x / temperature, -1) for x in (s, t))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1) * temperature**2
    ce = F.cross_entropy(s, labels, ignore_index=-100, reduction="none")
    return ((1 - share) * kl + share * ce)[mask].sum() / mask.sum()


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (2.0, 0.0), (1.5, 0.3), (1.0, 1.0)])
def test_loss_and_gradients_equal_the_naive_ones(chunk, temperature, share):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, T, HIDDEN), torch.randn(1, T, HIDDEN)
    head, teacher_head = (nn.Linear(HIDDEN, VOCABULARY, bias=False) for _ in range(2))
    mask = torch.rand(1, T) > 0.3
    labels = torch.randint(0, VOCABULARY, (1, T))
    labels[0, 3] = -100
    student.requires_grad_()
    loss = distillation_loss(
        student, teacher, head, teacher_head, mask=mask, labels=labels,
        temperature=temperature, cross_entropy=share, chunk=chunk,
    )  # fmt: skip
    (3.0 * loss).backward()
    exact = student.detach().double().requires_grad_()
    head64, teacher64 = copy.deepcopy(head).double(), copy.deepcopy(teacher_head).double()
    expected = naive(exact[0], teacher[0].double(), head64, teacher64, mask=mask[0],
                     labels=labels[0], temperature=temperature, share=share)  # fmt: skip
    head64.weight.grad = None
    (3.0 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.weight.grad.double(), head64.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_probability_of_zero_contributes_zero():
    teacher = torch.tensor([[0.0, float("-inf"), 1e4], [0.0, -1e4, 0.0]])
    student = torch.randn(2, 3, requires_grad=True)
    kl = kl_divergence(student, teacher)
    kl.sum().backward()
    assert kl.isfinite().all() and student.grad.isfinite().all()


def test_equal_logits_have_no_divergence():
    logits = torch.randn(4, 9) * 20
    assert float(kl_divergence(logits, logits).abs().max()) == 0.0


def test_an_empty_mask_gives_zero():
    hidden = torch.randn(1, 4, HIDDEN, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY)
    loss = distillation_loss(hidden, hidden.detach(), head, head, mask=torch.zeros(1, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and float(hidden.grad.abs().max()) == 0.0


def test_parts_of_a_batch_are_divided_by_the_count_of_the_whole():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, T, HIDDEN)
    head, mask = nn.Linear(HIDDEN, VOCABULARY), torch.rand(2, T) > 0.3
    whole = distillation_loss(student, teacher, head, head, mask=mask)
    parts = [
        distillation_loss(student[i], teacher[i], head, head, mask=mask[i], count=mask.sum())
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(x.shape[0])
            return super().forward(x)

    head = Counting(HIDDEN, VOCABULARY)
    hidden = torch.randn(2, T, HIDDEN, requires_grad=True)
    distillation_loss(hidden, hidden.detach(), head, head, chunk=10).backward()
    assert max(seen) == 10 and sum(seen) == 2 * 2 * T  # student and teacher, once each


def test_kl_divergence_of_rows_equals_the_one_in_float64():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, T, VOCABULARY, dtype=torch.float64) * 5
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = (log_t.exp() * (log_t - log_s)).sum(-1)
    found = kl_divergence(student.float(), teacher.float())
    assert found.shape == (T,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_neither_model_can_say_do_not_count():
    """Vocabularies are padded with logits of -inf."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 6, VOCABULARY)
    student.requires_grad_()
    padding = torch.full((6, 4), float("-inf"))
    plain = kl_divergence(student, teacher)
    padded = kl_divergence(torch.cat([student, padding], 1), torch.cat([teacher, padding], 1))
    torch.testing.assert_close(padded, plain)
    padded.sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_not_passed_over(who, value):
    student, teacher = torch.randn(2, 3, 9)
    (student if who == "student" else teacher)[1, 4] = value
    finite = kl_divergence(student, teacher).isfinite()
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("far", [1e4, float("inf")])
def test_impossible_tokens_leave_loss_and_gradients_finite(far):
    torch.manual_seed(2)
    hidden = torch.randn(1, T, HIDDEN, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY)

    def certain(hidden):
        logits = torch.full((hidden.shape[0], VOCABULARY), -far)
        logits[:, 3] = 0.0
        return logits

    loss = distillation_loss(hidden, hidden.detach(), head, certain, chunk=5)
    loss.backward()
    expected = -head(hidden.detach()[0]).double().log_softmax(-1)[:, 3].mean()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=0)
    assert hidden.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_masked_positions_may_hold_anything():
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 1, 6, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY)
    expected = distillation_loss(student[:, :4], teacher[:, :4], head, head)
    student[:, 4:] = float("nan")
    teacher[:, 4:] = float("inf")
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    loss = distillation_loss(student, teacher, head, head, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert student.grad.isfinite().all() and head.weight.grad.isfinite().all()
    assert float(student.grad[:, 4:].abs().max()) == 0.0


def test_a_position_without_a_label_has_no_cross_entropy_but_is_counted():
    torch.manual_seed(4)
    hidden = torch.randn(1, 6, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY)
    labels = torch.tensor([[5, -100, 7, 8, -100, -100]])
    loss = distillation_loss(hidden, hidden, head, head, labels=labels, cross_entropy=1.0, chunk=2)
    expected = F.cross_entropy(head(hidden[0]).double(), labels[0], reduction="sum") / 6
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_a_tied_head_collects_gradients_from_both_of_its_uses():
    torch.manual_seed(5)
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight = embedding.weight
    tokens, teacher = torch.randint(0, VOCABULARY, (1, 7)), torch.randn(1, 7, HIDDEN)
    goal = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    distillation_loss(embedding(tokens), teacher, head, goal, chunk=3).backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    weight = embedding.weight.detach().double().requires_grad_()
    log_s = F.log_softmax(weight[tokens[0]] @ weight.T, -1)
    log_t = F.log_softmax(teacher[0].double() @ goal.weight.detach().double().T, -1)
    (log_t.exp() * (log_t - log_s)).sum(-1).mean().backward()
    torch.testing.assert_close(found.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    torch.manual_seed(6)
    hidden = torch.randn(1, 4, HIDDEN, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
    distillation_loss(hidden, torch.randn(1, 4, HIDDEN), head, head).backward()
    assert head.weight.grad is None and float(hidden.grad.abs().max()) > 0


def test_the_teacher_gets_no_gradient():
    torch.manual_seed(7)
    student, teacher = torch.randn(2, 1, 4, HIDDEN).requires_grad_().unbind()
    teacher.retain_grad()
    head, goal = nn.Linear(HIDDEN, VOCABULARY), nn.Linear(HIDDEN, VOCABULARY)
    distillation_loss(student, teacher, head, goal).backward()
    assert teacher.grad is None and goal.weight.grad is None


def test_without_gradients_the_loss_is_the_same():
    torch.manual_seed(8)
    student, teacher = torch.randn(2, 1, T, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.no_grad():
        quiet = distillation_loss(student, teacher, head, head, chunk=4)
    assert not quiet.requires_grad
    assert torch.equal(quiet, distillation_loss(student, teacher, head, head, chunk=4).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_fp32(dtype):
    torch.manual_seed(9)
    hidden = torch.randn(1, T, HIDDEN, dtype=dtype, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
    goal = torch.randn(1, T, HIDDEN, dtype=dtype)
    loss = distillation_loss(hidden, goal, head, head, chunk=8)
    loss.backward()
    expected = kl_divergence(head(hidden[0]).double(), head(goal[0]).double()).mean()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_what_does_not_count_cannot_spoil_the_loss():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    student, teacher = nn.Linear(4, 6), nn.Linear(4, 6)
    with torch.no_grad():
        student.bias[2] = float("-inf")  # an infinite KL where the teacher has probability
    labels = torch.tensor([[0, 1, 3]])
    loss = distillation_loss(
        hidden, torch.randn(1, 3, 4), student, teacher, labels=labels, cross_entropy=1.0
    )
    expected = nn.functional.cross_entropy(student(hidden)[0], labels[0])
    torch.testing.assert_close(loss, expected)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="needs a second forward"):
        loss.backward()


def test_another_number_of_tokens_than_is_kept_is_refused():
    kept = TopTokens.of(torch.randn(3, 6), 4)
    kept = TopTokens(*(t[None] for t in (kept.tokens, kept.log_probabilities, kept.log_rest)))
    with pytest.raises(AnalogError, match="top_k is 2, but 4 tokens of the teacher are kept"):
        distillation_loss(torch.randn(1, 3, 4), kept, nn.Linear(4, 6), None, top_k=2)
