"""Runs that are broken off and resumed: what is kept, how it is damaged, and what is refused."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import tiny, token_ids

from analog_plugin import AnalogCallback, AnalogError, train_analog
from analog_plugin.training import stages
from analog_plugin.training.signals import TrainingStopped

ROWS = token_ids(24, 16)
SCHEMES = {
    "prepared start": {"preset": "AFM_PLUS", "tile_rows": 32, "range_init_batches": 2,
                       "digital_share": 0.2},
    "ranges found in training": {"tile_rows": 48, "range_init_in_training": True,
                                 "range_init_batches": 5},
    "annealed clip": {"tile_rows": 48, "clip_sigma": 2.0, "clip_schedule": "anneal"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of eight steps over two epochs, a checkpoint every second step."""

    def make(keep="run", scheme="annealed clip", dataset=ROWS, model=None, seed=0, **changes):
        options = {k: changes.pop(k) for k in ("resume", "overwrite") if k in changes}
        training = {
            "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
            "save_steps": 2, "logging_steps": 1, "disable_tqdm": True,
        } | changes  # fmt: skip
        recipe = {
            "scheme": SCHEMES[scheme], "training": training, "evaluation": None, "seed": seed,
        }  # fmt: skip
        model = tiny(num_hidden_layers=1) if model is None else model
        keep = None if keep is None else tmp_path / keep
        return train_analog(model, recipe, dataset=dataset, keep=keep, **options)

    return make


@pytest.fixture(scope="module")
def unbroken():
    """The result of the same run without an interruption, made once for each scheme."""
    made = {}

    def result(run, scheme="annealed clip"):
        if scheme not in made:
            made[scheme] = run(keep=None, scheme=scheme)
        return made[scheme]

    return result


@pytest.fixture
def at_step(monkeypatch):
    """Do something when a step begins, once."""
    usual = AnalogCallback.on_step_begin

    def arrange(step, action):
        pending = [action]

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step and pending:
                pending.pop()()
            return usual(self, args, state, control, **kwargs)

        monkeypatch.setattr(AnalogCallback, "on_step_begin", on_step_begin)

    return arrange


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("the power went")


def different(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def kept(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_stopped_by_sigterm_goes_on_to_the_same_bits(
    scheme, run, unbroken, at_step, tmp_path
):
    whole = unbroken(run, scheme)
    at_step(4, terminate)
    with pytest.raises(TrainingStopped, match=r"stopped by SIGTERM after step 5.*--resume"):
        run(scheme=scheme)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert kept(tmp_path / "run") == ["checkpoint-4", "checkpoint-5", "start"]
    resumed = run(scheme=scheme, resume=True)
    assert different(whole.model, resumed.model) == []
    times = ("train_runtime", "train_tokens_per_second")
    first, second = (
        [{k: v for k, v in entry.items() if k not in times} for entry in r.training["loss_history"]]
        for r in (whole, resumed)
    )
    assert first == second
    assert json.dumps(resumed.training["start"]) == json.dumps(whole.training["start"])
    assert resumed.training["tokens"] == whole.training["tokens"]


def test_a_run_that_broke_before_its_first_checkpoint_goes_on_from_the_prepared_model(
    run, unbroken, at_step, monkeypatch, tmp_path
):
    whole = unbroken(run, "prepared start")
    at_step(1, fail)
    with pytest.raises(RuntimeError, match="the power went"):
        run(scheme="prepared start")
    assert kept(tmp_path / "run") == ["start"]
    monkeypatch.setattr(stages, "prepare_start", fail)  # it is not found anew
    resumed = run(scheme="prepared start", resume=True)
    assert different(whole.model, resumed.model) == []


def test_an_error_after_training_does_not_lose_the_trained_weights(
    run, unbroken, at_step, monkeypatch, tmp_path
):
    whole = unbroken(run)
    usual = stages.plan_export

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(stages, "plan_export", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert "trained" in kept(tmp_path / "run")
    monkeypatch.setattr(stages, "plan_export", usual)
    at_step(0, fail)  # it does not train again
    resumed = run(resume=True)
    assert different(whole.model, resumed.model) == []
    assert resumed.training["steps"] == 8 and len(resumed.training["loss_history"]) == 8


def truncate(checkpoint):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-9])


def alter(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def lose_manifest(checkpoint):
    shutil.rmtree(checkpoint / "analog")


DAMAGE = {truncate: "truncated", alter: "SHA-256", lose_manifest: "not written whole"}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(
    damage, run, unbroken, at_step, capfd, tmp_path
):
    whole = unbroken(run)
    at_step(7, fail)
    with pytest.raises(RuntimeError):
        run()
    damage(tmp_path / "run" / "checkpoint-6")
    capfd.readouterr()
    resumed = run(resume=True)
    said = " ".join(capfd.readouterr())
    assert "checkpoint-6 is damaged and left out" in said and DAMAGE[damage] in said
    assert "goes on from" in said and "checkpoint-4." in said
    assert different(whole.model, resumed.model) == []


def test_where_the_prepared_model_is_damaged_the_run_begins_anew(
    run, unbroken, at_step, capfd, tmp_path
):
    whole = unbroken(run)
    at_step(5, fail)
    with pytest.raises(RuntimeError):
        run()
    alter_state = tmp_path / "run" / "start" / "state.safetensors"
    alter_state.write_bytes(b"nothing")
    resumed = run(resume=True)
    assert "start is damaged and left out" in " ".join(capfd.readouterr())
    assert different(whole.model, resumed.model) == []


def test_clocks_may_jump(run, at_step, tmp_path):
    at_step(7, fail)
    with pytest.raises(RuntimeError):
        run()
    for step, when in ((4, 2_000_000_000), (6, 1)):
        os.utime(tmp_path / "run" / f"checkpoint-{step}", (when, when))
    at_step(6, fail)  # the next step after the latest checkpoint
    with pytest.raises(RuntimeError):
        run(resume=True)


def test_only_so_many_checkpoints_are_kept(run, at_step, tmp_path):
    at_step(7, fail)
    with pytest.raises(RuntimeError):
        run(save_total_limit=1)
    assert kept(tmp_path / "run") == ["checkpoint-6", "start"]


def test_a_full_disk_leaves_the_checkpoint_before_whole(run, unbroken, at_step, tmp_path):
    whole = unbroken(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    at_step(3, fill)
    try:
        with pytest.raises(AnalogError) as caught:
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = str(caught.value)
    assert said.startswith("The training checkpoint of step 4 could not be written: ")
    assert "make room" in said and "--resume" in said and "up to step 2" in said
    assert kept(tmp_path / "run") == ["checkpoint-2", "start"]
    assert different(whole.model, run(resume=True).model) == []


def test_what_a_crash_left_half_written_is_cleared_away(run, at_step, tmp_path):
    at_step(5, fail)
    with pytest.raises(RuntimeError):
        run()
    directory = tmp_path / "run"
    (directory / ".checkpoint-6.partial-0123abcd").mkdir()
    (directory / "checkpoint-4").rename(directory / ".checkpoint-4.replaced")
    at_step(4, fail)  # it went on from step 4
    with pytest.raises(RuntimeError):
        run(resume=True)
    assert kept(directory) == ["checkpoint-2", "checkpoint-4", "start"]


CHANGES = {
    "learning rate": ({"learning_rate": 2e-3}, "training.learning_rate was 0.001, and is 0.002"),
    "seed": ({"seed": 1}, "seed was 0, and is 1"),
    "scheme": ({"scheme": "ranges found in training"}, "scheme.clip_sigma was 2.0, and is None"),
    "model": ({"model": tiny(seed=1, num_hidden_layers=1)}, "it began with another model"),
    "tokens": ({"dataset": ROWS.flip(0)}, "it began with other training tokens"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_run_is_refused_by_what_differs(case, run, at_step, tmp_path):
    at_step(3, fail)
    with pytest.raises(RuntimeError):
        run()
    before = kept(tmp_path / "run")
    changes, words = CHANGES[case]
    with pytest.raises(AnalogError, match="is another run: " + words):
        run(resume=True, **changes)
    assert kept(tmp_path / "run") == before


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_unasked(run, at_step, tmp_path):
    at_step(3, fail)
    with pytest.raises(RuntimeError):
        run()
    with pytest.raises(AnalogError, match="holds a run that was broken off; go on with --resume"):
        run()
    (tmp_path / "run" / "notes.txt").write_text("not of the run")
    at_step(0, fail)
    with pytest.raises(RuntimeError):
        run(overwrite=True)
    assert kept(tmp_path / "run") == ["notes.txt", "start"]


def test_nothing_is_kept_where_the_recipe_says_so(run, tmp_path):
    run(save_strategy="no")
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_an_optimizer_are_refused(run, tmp_path):
    with pytest.raises(AnalogError, match="save_only_model keeps no optimizer"):
        run(save_only_model=True)
    assert not (tmp_path / "run").exists()


def test_nothing_kept_is_read_by_pickle_alone(run, at_step, tmp_path):
    """A checkpoint whose optimizer is a hostile pickle, its manifest made to fit, runs nothing."""
    from analog_plugin.checkpoint.layout import write_manifest

    at_step(3, fail)
    with pytest.raises(RuntimeError):
        run()
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (ran,)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Hostile(), tmp_path / "run" / "checkpoint-2" / name)
    write_manifest(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        run(resume=True)
    assert not ran.exists()
