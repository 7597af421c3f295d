"""The distillation loss behind every kind of head, and what it costs in memory."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.training import distillation_loss

HIDDEN, VOCABULARY = 12, 37


def naive(student, teacher, temperature=1.0, share=0.0, labels=None):
    """The loss of logits [T, V] by autograd."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum() * temperature**2
    total = (1 - share) * kl
    if share > 0:
        total = total + share * F.cross_entropy(student, labels, reduction="sum")
    return total / student.shape[0]


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    scale=st.sampled_from([0.1, 5.0, 60.0]),
    impossible=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_logits_in_float64_get_the_loss_and_gradient_of_autograd(
    rows, vocabulary, chunk, temperature, share, scale, impossible, seed
):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(2, rows, vocabulary, dtype=torch.float64, generator=generator)
    ).unbind()
    if impossible and vocabulary > 1:
        teacher[:, 0] = float("-inf")
        if share == 0:  # a padded vocabulary
            student[:, 0] = float("-inf")
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > 0.7] = -100
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    loss = distillation_loss(
        student[None], teacher[None], nn.Identity(), nn.Identity(), chunk=chunk,
        temperature=temperature, cross_entropy=share, labels=labels[None],
    )  # fmt: skip
    expected = naive(student, teacher, temperature, share, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    (found,), (wanted,) = gradients(loss, student), gradients(expected, student)
    # Where neither model can say a token, autograd's gradient is 0 times -inf.
    torch.testing.assert_close(found, wanted.nan_to_num(0.0), rtol=1e-8, atol=1e-12)
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])


def analog():
    head = AnalogLinear.from_linear(
        nn.Linear(HIDDEN, VOCABULARY), AnalogScheme(weight_noise=0.0, out_bound=50.0)
    )
    head.set_input_range(torch.tensor([2.0]))
    return head


def hooked():
    head = nn.Linear(HIDDEN, VOCABULARY)
    head.register_forward_hook(lambda module, args, output: 3 * output)
    return head


def replaced():
    head = nn.Linear(HIDDEN, VOCABULARY)
    plain = head.forward
    head.forward = lambda x: 3 * plain(x)
    return head


def half_frozen():
    head = nn.Linear(HIDDEN, VOCABULARY)
    head.weight.requires_grad_(False)
    return head


HEADS = {
    "linear": lambda: nn.Linear(HIDDEN, VOCABULARY),
    "only its bias trains": half_frozen,
    "a hook behind": hooked,
    "another forward": replaced,
    "keeps its outputs": lambda: nn.Sequential(nn.Linear(HIDDEN, VOCABULARY), nn.Tanh()),
    "low rank": lambda: nn.Sequential(nn.Linear(HIDDEN, 3), nn.Linear(3, VOCABULARY)),
    "analog": analog,
}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [4, None])
def test_any_head_gets_the_gradients_of_autograd(make, chunk):
    torch.manual_seed(0)
    head = make().train()
    student, teacher = torch.randn(2, 1, 11, HIDDEN)
    student.requires_grad_()
    goal = nn.Linear(HIDDEN, VOCABULARY)
    trained = [p for p in head.parameters() if p.requires_grad]
    loss = distillation_loss(student, teacher, head, goal, temperature=2.0, chunk=chunk)
    expected = naive(head(student[0]).double(), goal(teacher[0]).detach().double(), 2.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    found = gradients(2 * loss, student, *trained)
    wanted = gradients(2 * expected, student, *trained)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_does_not_matter_gets_no_gradient():
    head = nn.Linear(HIDDEN, VOCABULARY)
    head.spare = nn.Parameter(torch.ones(3))
    hidden = torch.randn(1, 5, HIDDEN, requires_grad=True)
    distillation_loss(hidden, torch.randn(1, 5, HIDDEN), head, head).backward()
    assert head.spare.grad is None or not head.spare.grad.any()
    assert head.weight.grad.abs().max() > 0


def test_under_autocast_gradients_have_the_type_of_what_they_belong_to():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 1, 9, HIDDEN)
    student.requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(student, teacher, head, head, chunk=4)
        logits, goal = head(student[0]), head(teacher[0]).detach()
    loss.backward()
    assert loss.dtype == student.grad.dtype == head.weight.grad.dtype == torch.float32
    expected = naive(logits.double(), goal.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_a_heads_gradient_is_that_of_autograd(held):
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 1, 9, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY).to(held)
    by_autograd = nn.Sequential(head)  # one more module around it, so that nothing is known of it
    found = []
    for apply in (head, by_autograd):
        hidden = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = distillation_loss(hidden, teacher, apply, head, chunk=4)
        found.append(gradients(loss, hidden, head.weight, head.bias))
        assert [g.dtype for g in found[-1]] == [torch.float32, held, held]
    # A sum over chunks in the type of the product is rounded once a chunk, by autograd twice.
    rounded = torch.finfo(held).eps if held == torch.bfloat16 else 1e-6
    for one, other in zip(*found, strict=True):
        atol = rounded * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", [0, 1], ids=["student", "teacher"])
def test_one_logit_that_is_no_number_makes_the_loss_none(who, value):
    logits = torch.randn(2, 1, 6, VOCABULARY)
    logits[who, 0, 3, 5] = value
    head = nn.Identity()
    assert distillation_loss(logits[0], logits[1], head, head, chunk=2).isnan()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self.seen:
                continue
            self.seen[storage._cdata] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata, size)
        return out

    def _gone(self, key, size):
        self.seen.pop(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_it_needs_less_than_an_eighth_of_the_memory_of_whole_logits(dtype, trainable):
    length, hidden, vocabulary = 2048, 8, 4096
    head = nn.Linear(hidden, vocabulary, dtype=dtype).requires_grad_(trainable)
    goal = copy.deepcopy(head).requires_grad_(False)
    teacher = torch.randn(1, length, hidden, dtype=dtype)

    def peak(function):
        student = torch.randn(1, length, hidden, dtype=dtype, requires_grad=True)
        with LiveBytes() as counted:
            function(student).backward()
        tensors = [student.grad, *(p.grad for p in head.parameters() if trainable)]
        head.zero_grad()
        return counted.peak - sum(t.nbytes for t in tensors)

    def whole(student):
        log_q, log_p = (
            F.log_softmax(h(x).float(), -1) for h, x in ((head, student), (goal, teacher))
        )
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    lean = peak(lambda student: distillation_loss(student, teacher, head, goal))
    assert lean < 0.12 * peak(whole)


def test_under_autocast_no_chunk_has_a_gradient_of_the_heads_type():
    length, hidden, vocabulary, chunk = 64, 512, 2048, 16
    head = nn.Linear(hidden, vocabulary, bias=False)
    teacher = torch.randn(1, length, hidden)
    student = torch.randn(1, length, hidden, requires_grad=True)
    with LiveBytes() as counted, torch.autocast("cpu", dtype=torch.bfloat16):
        distillation_loss(student, teacher, head, head, chunk=chunk).backward()
    # The gradient itself, autocast's copy of the weight, and what one chunk adds.
    weight, logits = head.weight.nbytes, 4 * chunk * vocabulary
    assert counted.peak < weight + weight // 2 + weight // 2 + 8 * logits
