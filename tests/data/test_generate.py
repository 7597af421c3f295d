import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

from analog_plugin import AnalogError
from analog_plugin.data import generate_dataset
from analog_plugin.paths import cache_directory

LENGTH = 12


@pytest.fixture
def model():
    return tiny(num_hidden_layers=1)


def cached(kind="*"):
    return sorted(cache_directory("data").glob(f"*/{kind}"))


def indifferent(model):
    """Every token is as likely as any other, whatever came before."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("tokens", "rows"), [(LENGTH, 1), (LENGTH + 1, 2), (5 * LENGTH, 5), (5 * LENGTH - 1, 5)]
)
def test_tokens_are_rounded_up_to_whole_rows_that_begin_at_the_beginning(tokens, rows, model):
    made = generate_dataset(model, tokens, LENGTH, batch_size=2, cache=False)
    assert made.dtype == torch.long and made.shape == (rows, LENGTH)
    assert (made[:, 0] == 1).all()
    assert int(made.min()) >= 0 and int(made.max()) < model.config.vocab_size


def test_the_first_token_can_be_chosen(model):
    assert (generate_dataset(model, 40, LENGTH, bos_token_id=7, cache=False)[:, 0] == 7).all()


def test_a_seed_gives_the_same_rows_and_another_does_not(model):
    def sample(seed):
        return generate_dataset(model, 60, LENGTH, seed=seed, cache=False)

    first = sample(3)
    assert torch.equal(first, sample(3))
    assert not torch.equal(first, sample(4))


def test_rows_differ_from_each_other(model):
    assert len(generate_dataset(model, 20 * LENGTH, LENGTH, cache=False).unique(dim=0)) == 20


def test_the_global_generator_and_the_mode_are_left_alone(model):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    model.train()
    generate_dataset(model, 60, LENGTH, cache=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_the_global_generator_does_not_matter(model):
    torch.manual_seed(1)
    first = generate_dataset(model, 60, LENGTH, cache=False)
    torch.manual_seed(2)
    assert torch.equal(generate_dataset(model, 60, LENGTH, cache=False), first)


def test_top_k_of_one_is_greedy(model):
    made = generate_dataset(model, 3 * LENGTH, LENGTH, top_k=1, cache=False)
    expected = [1]
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert made.tolist() == [expected] * 3


def test_top_k_keeps_to_the_most_likely_tokens(model):
    made = generate_dataset(model, 20 * LENGTH, LENGTH, top_k=5, cache=False)
    with torch.no_grad():
        likely = model(made).logits.topk(5, dim=-1).indices
    assert (likely[:, :-1] == made[:, 1:, None]).any(-1).all()


def test_a_low_temperature_makes_rows_more_likely(model):
    def likelihood(temperature):
        made = generate_dataset(model, 600, LENGTH, temperature=temperature, cache=False)
        with torch.no_grad():
            return -float(model(made, labels=made).loss)

    assert likelihood(0.5) > likelihood(1.0) > likelihood(2.0)


def test_at_temperature_one_tokens_follow_the_model(model):
    """Second tokens against their probabilities: a chi-squared test at 6 sigma."""
    made = generate_dataset(model, 8000, 2, batch_size=4000, cache=False)
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1).double() * made.shape[0]
    counts = torch.bincount(made[:, 1], minlength=expected.numel()).double()
    usual = expected >= 5
    seen = torch.cat([counts[usual], counts[~usual].sum()[None]])
    wanted = torch.cat([expected[usual], expected[~usual].sum()[None]]).clamp_min(1e-9)
    freedom = int(usual.sum())
    assert float(((seen - wanted) ** 2 / wanted).sum()) < freedom + 6 * (2 * freedom) ** 0.5


def test_an_ignored_end_of_sequence_is_sampled_on_from(model):
    made = generate_dataset(indifferent(model), 100 * LENGTH, LENGTH, cache=False)
    ends = made == 2
    # 1100 sampled tokens of 128 kinds: the chance that one kind never comes is 2e-4 per seed.
    assert ends.any()
    assert ends[:, 1:-1].any(), "an end of sequence in the middle of a row"


@pytest.mark.parametrize("eos", [2, [2, 9]], ids=["one", "several"])
def test_documents_that_end_are_packed(eos, model):
    indifferent(model).config.eos_token_id = eos
    made = generate_dataset(
        model, 400 * LENGTH, LENGTH, ignore_eos=False, batch_size=64, cache=False
    )
    assert made.shape == (400, LENGTH)
    stops = {eos} if isinstance(eos, int) else set(eos)
    stream = made.flatten().tolist()
    starts, length = [0], 1
    for i in range(1, len(stream)):
        if stream[i - 1] in stops or length == LENGTH:
            starts.append(i)
            length = 0
        length += 1
    assert [stream[i] for i in starts] == [1] * len(starts)
    assert len(starts) > 400  # some documents ended early
    assert set(stream) & stops == stops


def test_a_beginning_token_that_is_also_the_end_does_not_end_its_document(model):
    indifferent(model).config.eos_token_id = 1
    made = generate_dataset(model, 50 * LENGTH, LENGTH, ignore_eos=False, cache=False)
    assert made.shape == (50, LENGTH)
    assert not (made == made[0, 0]).all()


def test_a_second_call_reads_the_cache(model):
    first = generate_dataset(model, 60, LENGTH)
    files = cached()
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2
    second = generate_dataset(model, 60, LENGTH)
    assert torch.equal(first, second) and second.dtype == torch.long
    assert cached() == files and [path.stat().st_mtime_ns for path in files] == times


def test_the_cache_can_lie_elsewhere_or_be_left_out(model, tmp_path):
    kept = generate_dataset(model, 60, LENGTH, cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").glob("*/tokens.safetensors"))) == 1
    assert torch.equal(generate_dataset(model, 60, LENGTH, cache=False), kept)
    assert cached() == []


def overwrite(path):
    path.write_bytes(b"damaged")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def nest(path):
    path.write_bytes(b"[" * 100_000 + path.read_bytes())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [overwrite, truncate, flip_a_byte, nest, Path.unlink],
                         ids=["overwritten", "truncated", "flipped", "nested", "gone"])  # fmt: skip
@pytest.mark.parametrize("name", ["tokens.safetensors", "manifest.json"])
def test_a_damaged_cache_is_made_again(damage, name, model):
    first = generate_dataset(model, 60, LENGTH)
    (path,) = cached(name)
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(generate_dataset(model, 60, LENGTH), first)
    assert path.read_bytes() == whole


def test_a_cache_of_another_request_is_not_taken(model):
    first = generate_dataset(model, 60, LENGTH)
    (path,) = cached("manifest.json")
    manifest = json.loads(path.read_text())
    manifest["request"]["seed"] = 99
    path.write_text(json.dumps(manifest))
    assert torch.equal(generate_dataset(model, 60, LENGTH), first)
    assert json.loads(path.read_text())["request"]["seed"] == 0


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"temperature": 0.9}, {"top_k": 3}, {"tokens": 61}, {"sequence_length": 10},
     {"bos_token_id": 5}, {"batch_size": 3}, {"ignore_eos": False}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_argument_has_a_cache_entry_of_its_own(change, model):
    arguments = {"tokens": 60, "sequence_length": LENGTH}
    generate_dataset(model, **arguments)
    generate_dataset(model, **(arguments | change))
    assert len(cached("manifest.json")) == 2


def test_other_weights_have_a_cache_entry_of_their_own(model):
    generate_dataset(model, 60, LENGTH)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.001)
    generate_dataset(model, 60, LENGTH)
    assert len(cached("manifest.json")) == 2


def test_a_model_without_a_beginning_is_refused(model):
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(AnalogError, match="names no beginning-of-sequence token"):
        generate_dataset(model, 60, LENGTH)
    assert generate_dataset(model, 60, LENGTH, bos_token_id=1).shape == (5, LENGTH)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequences_longer_than_the_model_allows_are_refused(name):
    with pytest.raises(AnalogError, match=r"sequence_length is 65, but the model allows at most"):
        generate_dataset(tiny(name), 1000, 65)


def test_less_than_one_sequence_is_refused(model):
    with pytest.raises(AnalogError, match="tokens is 11, but must be at least one sequence of 12"):
        generate_dataset(model, LENGTH - 1, LENGTH)


@pytest.mark.parametrize("start", [-1, 128])
def test_a_first_token_that_the_model_does_not_have_is_refused(start, model):
    with pytest.raises(AnalogError, match=r"bos_token_id holds .* run from 0 to 127"):
        generate_dataset(model, 40, LENGTH, bos_token_id=start)


SETTINGS = {
    "num_return_sequences": 3, "num_beams": 2, "suppress_tokens": [5, 6], "max_time": 1e-6,
    "stop_strings": ["a"], "return_dict_in_generate": True, "min_p": 0.5, "do_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_settings_of_the_model_do_not_count(name, model):
    expected = generate_dataset(model, 60, LENGTH, cache=False)
    kept = model.generation_config
    setattr(kept, name, SETTINGS[name])
    assert torch.equal(generate_dataset(model, 60, LENGTH, cache=False), expected)
    assert model.generation_config is kept


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_sampled(
    model, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(AnalogError, match="file"):
        generate_dataset(model, 40, LENGTH, cache=tmp_path / "file" / "cache")
