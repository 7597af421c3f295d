"""Padding, labels and accumulation: which positions are scored, and how they are weighed."""

import pytest
import torch
from tiny_models import VOCABULARY, token_ids

from analog_plugin.training import kl_divergence

EXACT = {"weight_noise": 0.0, "input_bits": None, "output_bits": None}  # a digital layer's sums


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def row_loss(trainer, row, start=0):
    """Sum of the naive KL over one unpadded row's positions from ``start``."""
    with torch.no_grad():
        student, teacher = (
            model(row[None]).logits[0, start:] for model in (trainer.model, trainer.teacher)
        )
        return kl_divergence(student.double(), teacher.double()).double().sum()


def pad(rows, side, length, with_labels=False):
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        fill = [0] * (length - len(row))
        values = {"input_ids": (row.tolist(), fill), "attention_mask": ([1] * len(row), fill),
                  "labels": (row.tolist(), [-100] * len(fill))}  # fmt: skip
        for name, (inner, outer) in values.items():
            batch[name].append(inner + outer if side == "right" else outer + inner)
    if not with_labels:
        del batch["labels"]
    return {name: torch.tensor(value) for name, value in batch.items()}


@pytest.fixture
def rows():
    return [token_ids(1, length, seed=length)[0] for length in (5, 11, 8)]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_has_the_loss_of_its_rows(name, side, rows, make_trainer):
    trainer = make_trainer(name, scheme={"weight_noise": 0.0})
    expected = sum(row_loss(trainer, row) for row in rows) / sum(len(row) for row in rows)
    loss = trainer.compute_loss(trainer.model, pad(rows, side, 12))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_of_padding_are_not_scored(side, rows, make_trainer):
    """With labels, a row's last position, which predicts nothing, is not scored either."""
    trainer = make_trainer(scheme={"weight_noise": 0.0})
    expected = sum(row_loss(trainer, row) - row_loss(trainer, row, len(row) - 1) for row in rows)
    expected = expected / sum(len(row) - 1 for row in rows)
    loss = trainer.compute_loss(trainer.model, pad(rows, side, 12, with_labels=True))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_does_not_matter(side, rows, make_trainer):
    trainer = make_trainer(scheme={"weight_noise": 0.0}, own={"cross_entropy": 0.5})
    batch = pad(rows, side, 12)
    other = dict(batch, input_ids=batch["input_ids"].where(batch["attention_mask"] == 1, 77))
    results = []
    for inputs in (batch, other):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()
                 if p.grad is not None}  # fmt: skip
        results.append((loss.detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-5, atol=1e-8, msg=name)


def test_cross_entropy_is_with_the_next_token(make_trainer):
    trainer = make_trainer(scheme={"weight_noise": 0.0}, own={"cross_entropy": 1.0})
    tokens = token_ids(3, 9)
    labels = tokens.clone()
    labels[:, :4] = -100
    loss = trainer.compute_loss(trainer.model, {"input_ids": tokens, "labels": labels})
    with torch.no_grad():
        expected = trainer.model(tokens, labels=labels).loss  # transformers shifts by itself
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_chunk_does_not_change_the_loss(chunk, make_trainer):
    trainer = make_trainer(scheme={"weight_noise": 0.0}, own={"chunk": chunk, "temperature": 2.0})
    tokens = token_ids(2, 9)
    with torch.no_grad():
        student, teacher = (
            model(tokens).logits.reshape(-1, VOCABULARY).double() / 2
            for model in (trainer.model, trainer.teacher)
        )
    expected = 4 * kl_divergence(student, teacher).mean()
    loss = trainer.compute_loss(trainer.model, {"input_ids": tokens})
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_accumulation_is_a_larger_batch(make_trainer, weights):
    """Without converters nothing amplifies rounding: fp32 sums in another order remain."""

    def train(size, accumulation):
        trainer = make_trainer(
            scheme=EXACT, per_device_train_batch_size=size, max_steps=2, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=0.1,
        )  # fmt: skip
        with torch.no_grad():  # without converters the student would begin at a loss of 0
            trainer.teacher.lm_head.weight.mul_(1.5)
        start = weights(trainer.model)
        trainer.train()
        return start, losses(trainer), weights(trainer.model)

    (start, loss, large), (_, other_loss, accumulated) = train(4, 1), train(2, 2)
    assert other_loss == pytest.approx(loss, rel=1e-6, abs=5e-7)
    for name in large:
        # The update is compared, not the weight: 2 steps of at most 4·16 fp32 terms.
        torch.testing.assert_close(
            accumulated[name] - start[name], large[name] - start[name], rtol=1e-4, atol=2e-7
        )


def test_accumulation_weighs_tokens_alike_whatever_their_micro_batch(make_trainer, weights):
    lengths = (3, 14, 14, 14)
    batch = pad([token_ids(1, n, seed=n + i)[0] for i, n in enumerate(lengths)], "right", 14)
    examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]  # fmt: skip  # noqa: E501

    def train(size, accumulation):
        trainer = make_trainer(
            scheme=EXACT, examples=examples, per_device_train_batch_size=size, max_steps=1,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        with torch.no_grad():
            trainer.teacher.lm_head.weight.mul_(1.5)
        trainer.train()
        return losses(trainer), weights(trainer.model)["lm_head.weight"]

    (loss, large), (other_loss, accumulated) = train(4, 1), train(1, 4)
    assert other_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(accumulated, large, rtol=1e-4, atol=1e-6)
