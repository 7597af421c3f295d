"""A digital prefix is exact, is never repeated, and nobody who calls the model notices it."""

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny, token_ids

from analog_plugin import AnalogError
from analog_plugin.layers.prefix import (
    Prefix,
    install_prefix,
    installed_prefix,
    prefix_tokens,
    remove_prefix,
    repeated_positions,
)

PREFIXES = {"one token": (1,), "three tokens": (1, 9, 4)}


def behind(tokens, ids):
    """``ids`` [B, S] behind the prefix tokens, as ordinary input."""
    return torch.cat([torch.tensor(tokens).expand(len(ids), -1), ids], dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=PREFIXES.values(), ids=PREFIXES.keys())
def tokens(request):
    return request.param


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_behind_the_prefix_tokens(name, tokens):
    model, ids = tiny(name), token_ids()
    wanted = model(behind(tokens, ids)).logits[:, len(tokens) :]
    install_prefix(model, tokens)
    close(model(ids).logits, wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sequence_that_begins_with_the_prefix_does_not_repeat_it(name, tokens):
    model, ids = tiny(name), behind(tokens, token_ids())
    wanted = model(ids).logits
    install_prefix(model, tokens)
    close(model(ids).logits, wanted)


def test_rows_with_and_without_the_prefix_can_stand_in_one_batch(tokens):
    model = tiny()
    without = token_ids(1, 9)
    with_it = behind(tokens, token_ids(1, 9 - len(tokens), seed=3))
    install_prefix(model, tokens)
    both = model(torch.cat([without, with_it])).logits
    close(both[:1], model(without).logits)
    close(both[1:], model(with_it).logits)


def left_padded(rows):
    length = max(map(len, rows))
    ids = torch.stack(
        [torch.cat([torch.zeros(length - len(r), dtype=torch.long), r]) for r in rows]
    )
    return ids, torch.stack([torch.arange(length) >= length - len(r) for r in rows]).long()


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_a_left_padded_batch_generates_as_one_by_one(tokens, beams):
    model = tiny()
    install_prefix(model, tokens)
    own = torch.tensor(tokens)
    rows = [token_ids(1, 4)[0], torch.cat([own, token_ids(1, 7)[0]]), token_ids(1, 9)[0], own]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, made in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)[0]
        assert made[ids.shape[1] - len(row) :][: len(alone)].tolist() == alone.tolist()


def test_generation_is_that_behind_the_prefix_tokens(tokens):
    model, ids = tiny(), token_ids(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(behind(tokens, ids), **options)[0, len(tokens) :]
    install_prefix(model, tokens)
    assert model.generate(ids, **options)[0].tolist() == wanted.tolist()


def test_left_padding_without_position_ids_is_exact(tokens):
    model = tiny()
    install_prefix(model, tokens)
    rows = [token_ids(1, 4)[0], behind(tokens, token_ids(1, 6))[0]]
    ids, mask = left_padded(rows)
    logits = model(ids, attention_mask=mask).logits
    for row, made in zip(rows, logits, strict=True):
        close(made[-1], model(row[None]).logits[0, -1])


def test_a_cache_goes_on_where_it_was(tokens):
    model, ids = (
        tiny(),
        torch.cat([behind(tokens, token_ids(1, 8)), behind((5,) * len(tokens), token_ids(1, 8))]),
    )
    install_prefix(model, tokens)
    wanted = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    close(torch.cat([first.logits, rest], dim=1), wanted)


def test_gradients_are_the_same_under_checkpointing(tokens):
    ids, grads = token_ids(), []
    for checkpointing in (False, True):
        model = tiny()
        install_prefix(model, tokens)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, use_cache=False).logits.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


def test_tensors_bring_the_prefix_to_another_model(tokens):
    model, ids = tiny(), token_ids()
    other = copy.deepcopy(model)
    made = install_prefix(model, tokens)
    read = Prefix.from_tensors(made.to_tensors())
    install_prefix(other, read)
    assert read.tokens == tokens and installed_prefix(other) is read
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert Prefix.from_tensors({"a.input_range": torch.ones(1)}) is None


def test_removing_it_gives_the_model_back(tokens):
    model, ids = tiny(), token_ids()
    wanted, state = model(ids).logits, set(model.state_dict())
    install_prefix(model, tokens)
    assert set(model.state_dict()) == state
    assert not torch.equal(model(ids).logits, wanted)
    remove_prefix(model)
    remove_prefix(model)
    assert installed_prefix(model) is None
    assert torch.equal(model(ids).logits, wanted)


def test_installing_again_replaces_it():
    model, ids = tiny(), token_ids()
    install_prefix(model, (1,))
    wanted = model(ids).logits
    install_prefix(model, (9, 4))
    install_prefix(model, (1,))
    assert torch.equal(model(ids).logits, wanted)


def test_a_copy_has_its_own(tokens):
    model, ids = tiny(), behind(tokens, token_ids())
    install_prefix(model, tokens)
    copied = copy.deepcopy(model)
    wanted = copied(ids).logits
    model(token_ids())
    remove_prefix(model)
    assert torch.equal(copied(ids).logits, wanted)


def test_repeated_positions_are_found_behind_padding():
    model = tiny()
    ids = torch.tensor([[1, 5, 6], [0, 1, 7], [4, 1, 2], [0, 0, 1]])
    assert repeated_positions(model, ids) is None
    install_prefix(model, (1,))
    found = repeated_positions(model, ids, (ids != 0).long())
    assert found.nonzero().tolist() == [[0, 0], [1, 1], [3, 2]]
    assert repeated_positions(model, torch.tensor([[5, 1]])) is None


def test_the_prefix_follows_a_cast(tokens):
    model, ids = tiny(), token_ids()
    install_prefix(model, tokens)
    wanted = model(ids).logits
    made = model.to(torch.bfloat16)(ids).logits
    assert (made.float() - wanted).norm() < 0.05 * wanted.norm()


def test_absolute_positions_are_refused_and_the_model_stays_as_it_was():
    model, ids = tiny("gpt2"), token_ids()
    wanted = model(ids).logits
    with pytest.raises(AnalogError, match="rotary"):
        install_prefix(model, (1,))
    assert torch.equal(model(ids).logits, wanted)


def test_a_prefix_of_another_model_is_refused():
    made = install_prefix(tiny(), (1,))
    with pytest.raises(AnalogError, match="other attention layers"):
        install_prefix(tiny(num_hidden_layers=3), made)


def test_tokens_that_a_scheme_names():
    model = tiny()
    assert prefix_tokens(model, 1) == (1,)
    assert prefix_tokens(model, [5, 6]) == (5, 6)
    with pytest.raises(AnalogError, match="from 0 to 127"):
        prefix_tokens(model, [128])
    model.config.bos_token_id = None
    with pytest.raises(AnalogError, match=r"prefix: \[N\]"):
        prefix_tokens(model, 1)


def test_outputs_may_be_a_tuple(tokens):
    model, ids = tiny(), behind(tokens, token_ids())
    install_prefix(model, tokens)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    base = model.base_model
    assert torch.equal(base(ids, return_dict=False)[0], base(ids).last_hidden_state)
