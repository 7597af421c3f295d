"""The KL over a teacher's k most likely tokens and "any other token"."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analog_plugin import AnalogError, AnalogRecipe
from analog_plugin.training import TopTokens, distillation_loss

IDENTITY = nn.Identity()


def coarse(student, teacher, k, temperature=1.0):
    """The definition, by autograd, with one sum for each outcome."""
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], 1) for x in (p, q))
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum() * temperature**2 / len(p)


def loss_of(student, teacher, **options):
    return distillation_loss(student[None], teacher[None], IDENTITY, IDENTITY, **options)


def drawn(rows, vocabulary, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, rows, vocabulary, dtype=torch.float64, generator=generator
    )
    return student.requires_grad_(), teacher


LOGITS = {
    "rows": st.integers(1, 6),
    "vocabulary": st.integers(2, 30),
    "scale": st.sampled_from([0.1, 2.0, 15.0]),
    "temperature": st.sampled_from([0.5, 1.0, 3.0]),
    "seed": st.integers(0, 2**31),
}


@settings(deadline=None, max_examples=60)
@given(**LOGITS, share=st.floats(0, 1))
def test_loss_and_gradient_are_those_of_the_definition(
    rows, vocabulary, scale, temperature, seed, share
):
    k = 1 + int(share * (vocabulary - 1))
    student, teacher = drawn(rows, vocabulary, scale, seed)
    loss = loss_of(student, teacher, top_k=k, temperature=temperature, chunk=4)
    expected = coarse(student, teacher, k, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    (found,), (wanted,) = (torch.autograd.grad(x, student) for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(**LOGITS)
def test_more_tokens_never_lower_it_and_all_of_them_are_the_whole_kl(
    rows, vocabulary, scale, temperature, seed
):
    student, teacher = drawn(rows, vocabulary, scale, seed)
    options = {"temperature": temperature}
    losses = [loss_of(student, teacher, top_k=k, **options) for k in range(1, vocabulary + 1)]
    whole = loss_of(student, teacher, **options)
    rising = torch.stack([*losses, whole]).detach()
    assert bool((rising >= -1e-12).all())
    assert bool((rising.diff() >= -1e-9 * (1 + whole.detach())).all())
    torch.testing.assert_close(losses[-1], whole, rtol=1e-9, atol=1e-12)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (losses[-1], whole))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(**LOGITS, share=st.floats(0, 1))
def test_a_teacher_of_which_only_that_was_kept_teaches_the_same(
    rows, vocabulary, scale, temperature, seed, share
):
    k = 1 + int(share * (vocabulary - 1))
    student, teacher = drawn(rows, vocabulary, scale, seed)
    kept = TopTokens.of(teacher, k, temperature)
    batch = TopTokens(*(x[None] for x in (kept.tokens, kept.log_probabilities, kept.log_rest)))
    mask = torch.arange(rows)[None] != 1
    options = {"temperature": temperature, "mask": mask, "chunk": 2}
    loss = distillation_loss(student[None], batch, IDENTITY, None, **options)
    expected = loss_of(student, teacher, top_k=k, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_tokens_that_neither_model_can_say_do_not_count():
    student, teacher = drawn(4, 9, 2.0, 0)
    padding = torch.full((4, 3), float("-inf"), dtype=torch.float64)
    padded = [torch.cat([x, padding], 1) for x in (student, teacher)]
    for k in (3, 9, 11):  # fewer than there are, all, and impossible ones among them
        loss = loss_of(*padded, top_k=k)
        expected = loss_of(student, teacher, top_k=min(k, 9))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", [0, 1], ids=["student", "teacher"])
def test_one_logit_that_is_no_number_makes_the_loss_none(who, value):
    logits = torch.randn(2, 6, 20)
    logits[who, 3, 5] = value
    assert loss_of(*logits, top_k=4).isnan()


def test_a_rest_that_the_teacher_all_but_excludes_keeps_the_gradient_finite():
    teacher = torch.zeros(1, 6)
    teacher[0, 0] = 90.0  # in fp32 the others have a probability of e^-90 each
    student = torch.randn(1, 6, requires_grad=True)
    loss = loss_of(student, teacher, top_k=1)
    loss.backward()
    expected = -student.detach().double().log_softmax(-1)[0, 0]
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    assert student.grad.isfinite().all()


def test_more_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(AnalogError, match="top_k is 7, but the teacher's vocabulary has 6 tokens"):
        loss_of(torch.zeros(1, 6), torch.zeros(1, 6), top_k=7)
    with pytest.raises(AnalogError, match="top_k is 0"):
        AnalogRecipe.parse({"distillation": {"top_k": 0}})
