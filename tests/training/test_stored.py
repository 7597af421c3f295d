"""A teacher on disk: the same training as with one in memory, and no other than it was made for."""

import copy
import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny, token_ids

from analog_plugin import AnalogError, AnalogTrainer
from analog_plugin.files import sha256_of
from analog_plugin.training.loss import distillation_loss
from analog_plugin.training.pipeline import train_analog
from analog_plugin.training.stored import MANIFEST, StoredTeacher, store_teacher, taken

ROWS = token_ids(8, 16)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def stored(tmp_path):
    def make(teacher=None, rows=ROWS, **options):
        teacher = tiny(num_hidden_layers=1) if teacher is None else teacher
        settings = {"top_k": VOCABULARY, "rows_per_file": 3} | options
        return store_teacher(teacher, rows, tmp_path / "teacher", **settings)

    return make


def test_what_is_stored_is_the_teachers_distribution(stored):
    teacher = tiny(num_hidden_layers=1)
    made = stored(teacher, top_k=5, temperature=1.7, batch_size=2)
    with torch.no_grad():
        log_p = (teacher(ROWS).logits.double() / 1.7).log_softmax(-1)
    assert len(made) == 8 and len(list(made.directory.glob("*.safetensors"))) == 3
    for index in (0, 2, 3, 7):
        tokens, top, rest = made.row(index).values()
        expected = log_p[index].topk(5)
        torch.testing.assert_close(top.double(), expected.values, rtol=1e-5, atol=1e-5)
        # Equally likely tokens may come in any order; their probabilities may not.
        found = log_p[index].gather(-1, tokens.long())
        torch.testing.assert_close(found, expected.values, rtol=1e-5, atol=1e-5)
        mass = expected.values.exp().sum(-1) + rest.double().exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_from_it_is_training_with_the_teacher(name, stored, make_trainer):
    model = tiny(name) if name == "gpt2" else tiny(num_hidden_layers=1)
    teacher = stored(copy.deepcopy(model))
    memory = make_trainer(name, model=copy.deepcopy(model))
    memory.train()

    class FromDisk(AnalogTrainer):
        def __init__(self, model, teacher=None, **kwargs):
            super().__init__(model, teacher=made, **kwargs)

    made = teacher
    disk = make_trainer(name, model=model, cls=FromDisk, examples=teacher.dataset(ROWS))
    disk.train()
    assert losses(disk) == pytest.approx(losses(memory), rel=1e-4)


def test_fewer_tokens_are_the_top_k_loss(stored):
    teacher, student = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1, seed=5)
    made = stored(teacher, top_k=4)
    with torch.no_grad():
        hidden, goal = student.model(ROWS)[0], teacher.model(ROWS)[0]
        heads = student.lm_head, teacher.lm_head
        expected = distillation_loss(hidden, goal, *heads, top_k=4)
        batch = torch.utils.data.default_collate([made.row(i) for i in range(8)])
        found = distillation_loss(hidden, taken(batch), student.lm_head, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def recipe():
    return {
        "scheme": {"tile_rows": 48, "prefix": 1, "clip_sigma": None},
        "data": {"sequence_length": 16, "tokens": 8 * 16},
        "evaluation": None,
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
                     "disable_tqdm": True},
    }  # fmt: skip


def with_prefix(model, tokens=1):
    from analog_plugin.layers.prefix import install_prefix, prefix_tokens

    install_prefix(model, prefix_tokens(model, tokens))
    return model


def test_the_pipeline_trains_from_it_without_a_second_model(stored, recipe, monkeypatch):
    model = tiny(num_hidden_layers=1)
    made = stored(with_prefix(copy.deepcopy(model)))
    usual = train_analog(copy.deepcopy(model), recipe, dataset=ROWS)

    alive = []
    copied = copy.deepcopy

    def remember(value, *args):
        result = copied(value, *args)
        if isinstance(value, type(model)):
            alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr("analog_plugin.training.stages.copy.deepcopy", remember)
    begin = AnalogTrainer.train

    def train(self, *args, **kwargs):
        gc.collect()
        assert [reference() for reference in alive] == [None]
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(AnalogTrainer, "train", train)
    from_disk = recipe | {"distillation": {"teacher": str(made.directory)}}
    result = train_analog(model, from_disk, dataset=ROWS)
    history = [[e["loss"] for e in r.training["loss_history"]] for r in (usual, result)]
    assert history[1] == pytest.approx(history[0], rel=1e-4)


def test_another_teacher_tokens_or_settings_are_refused(stored, recipe, make_trainer):
    model = with_prefix(tiny(num_hidden_layers=1))
    made = stored(model, top_k=8, temperature=2.0)
    made.check(model)
    made.check_loss(2.0)
    made.check_loss(2.0, 8)
    for wrong, what in {
        with_prefix(tiny(num_hidden_layers=1, seed=5)): "for another model",
        tiny(num_hidden_layers=1): r"for another digital prefix \(it was stored with",
    }.items():
        with pytest.raises(AnalogError, match=what):
            made.check(wrong)
    for settings, what in (
        ((1.0,), "has temperature 2.0, not 1.0"),
        ((2.0, 9), "has top_k 8, not 9"),
        ((2.0, 8, "bfloat16"), "has a type of its own, not bfloat16"),
    ):
        with pytest.raises(AnalogError, match=what):
            made.check_loss(*settings)
    for rows in (ROWS.flip(0), ROWS[:7], torch.cat([ROWS, ROWS[:1]])):
        with pytest.raises(AnalogError, match="for another set of training tokens"):
            made.dataset(rows)
    for index in (8, -1):
        with pytest.raises(IndexError, match="of 8"):
            made.row(index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "has temperature 2.0, not 1.0"),
        ({"teacher_dtype": "bfloat16"}, "type of its own"),
        ({"teacher": "nowhere"}, "nowhere holds no stored teacher"),
    ],
)
def test_a_recipe_that_does_not_fit_leaves_the_model_as_it_was(changes, message, stored, recipe):
    made = stored(with_prefix(tiny(num_hidden_layers=1)), temperature=2.0)
    digital = tiny(num_hidden_layers=1)
    before = {n: p.clone() for n, p in digital.named_parameters()}
    loss = {"teacher": str(made.directory), "temperature": 2.0} | changes
    with pytest.raises(AnalogError, match=message):
        train_analog(digital, recipe | {"distillation": loss}, dataset=ROWS)
    assert all(torch.equal(p, before[n]) for n, p in digital.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"rows": ROWS[0]}, r"have the shape \(16,\)"),
        ({"rows": ROWS[:0]}, r"have the shape \(0, 16\)"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_work(options, message, stored, tmp_path):
    with pytest.raises(AnalogError, match=message):
        stored(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_without_probabilities_is_not_stored(stored, tmp_path):
    broken = tiny(num_hidden_layers=1)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(AnalogError, match="hold NaN or infinity"):
        stored(broken, top_k=4)
    assert list(tmp_path.iterdir()) == []


def test_batches_without_it_are_refused(stored, make_trainer):
    made = stored()

    class FromDisk(AnalogTrainer):
        def __init__(self, model, teacher=None, **kwargs):
            super().__init__(model, teacher=made, **kwargs)

    with pytest.raises(AnalogError, match=r"give its dataset\(rows\) as train_dataset"):
        make_trainer(cls=FromDisk).train()


def _rewrite(directory, change, keep_digest=False):
    path = directory / "rows-000000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if not keep_digest:
        manifest = json.loads((directory / MANIFEST).read_text())
        manifest["files"][0]["sha256"] = sha256_of(path)
        (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["teacher_log_probabilities"].fill_(float("nan")),
        lambda t: t["teacher_log_probabilities"].fill_(1.0),
        lambda t: t["teacher_log_rest"].fill_(float("nan")),
        lambda t: t["teacher_tokens"].fill_(VOCABULARY),
        lambda t: t["teacher_tokens"].fill_(-1),
        lambda t: t.update(teacher_tokens=t["teacher_tokens"].long()),
        lambda t: t.update(teacher_log_rest=t["teacher_log_rest"][:, :3].contiguous()),
        lambda t: t.pop("teacher_log_rest"),
    ],
)
def test_values_that_are_none_of_a_teacher_are_refused(change, stored):
    made = stored(top_k=4)
    _rewrite(made.directory, change)
    with pytest.raises(AnalogError, match=r"cannot be used: rows-000000.safetensors: .*anew with"):
        StoredTeacher(made.directory).row(0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: _rewrite(d, lambda t: t["teacher_log_rest"].fill_(-1.0), keep_digest=True),
        lambda d: (d / "rows-000001.safetensors").write_bytes(b""),
        lambda d: (d / "rows-000001.safetensors").unlink(),
        lambda d: (d / MANIFEST).unlink(),
        lambda d: (d / MANIFEST).write_text("{"),
        lambda d: (d / MANIFEST).write_text("[]"),
        lambda d: (d / MANIFEST).write_text(
            json.dumps({"9" * 50_000: 1} | json.loads((d / MANIFEST).read_text()))
        ),
        lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace("rows-0", "../-0")),
        lambda d: (d / MANIFEST).write_text(
            (d / MANIFEST).read_text().replace('"top_k": 4', '"top_k": 0')
        ),
        *(
            lambda d, old=old, new=new: (d / MANIFEST).write_text(
                (d / MANIFEST).read_text().replace(old, new, 1)
            )
            for old, new in {
                '"format": 1': '"format": 2',
                '"vocabulary": 128': '"vocabulary": 1' + "0" * 30,
                '"rows": 3': '"rows": 2',
                '"rows": 2': '"rows": 1' + "0" * 30,
                '"temperature": 1.0': '"temperature": Infinity',
                '"length": 16': '"length": 17',
            }.items()
        ),
    ],
)
def test_damage_is_one_sentence(damage, stored):
    made = stored(top_k=4)
    damage(made.directory)
    with pytest.raises(
        AnalogError, match=r"write (it anew|one) with optimum-cli analog teacher"
    ) as caught:
        StoredTeacher(made.directory).row(0)
    assert len(str(caught.value)) < 1000


def test_more_tokens_than_there_are_leave_nothing_behind(stored, tmp_path):
    with pytest.raises(AnalogError, match="top_k is 999"):
        stored(top_k=999)
    assert list(tmp_path.iterdir()) == []
