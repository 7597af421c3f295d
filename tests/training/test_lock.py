"""One run at a time in a directory: what is locked, for how long, and against whom."""

import contextlib
import signal

import pytest
import runs
import torch
from tiny_models import tiny, token_ids

from analog_plugin import AnalogError, train_analog
from analog_plugin.training import lock
from analog_plugin.training.kept import AnotherRun
from analog_plugin.training.lock import LOCK, run_lock


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that locks ``tmp_path / "run"`` and holds it until it is killed."""
    ready = tmp_path / "ready"
    other = runs.Run(tmp_path / "log", hold, tmp_path / "run", ready)
    while not ready.exists():
        assert other.wait(0.05) is None, other.output
    yield other
    other.process.kill()
    other.wait(60)


def hold(directory, ready):
    with run_lock(directory):
        ready.touch()
        signal.pause()


def test_a_locked_directory_is_refused_by_who_has_it_and_free_when_that_is_killed(
    elsewhere, tmp_path
):
    said = rf"in use by another run \(process {elsewhere.process.pid} on .*give another output\.$"
    with pytest.raises(AnotherRun, match=said), run_lock(tmp_path / "run"):
        pass
    elsewhere.send(signal.SIGKILL)
    elsewhere.wait(60)
    assert (tmp_path / "run" / LOCK).exists()
    with run_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_would_overwrite_what_another_keeps_is_refused(elsewhere, tmp_path):
    kept = tmp_path / "run" / "start"
    kept.mkdir()
    model, before = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1).state_dict()
    recipe = {"training": {"max_steps": 1}, "evaluation": None}
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(AnalogError, match="in use by another run"):
            train_analog(model, recipe, dataset=token_ids(8, 16), keep=kept.parent, **options)
    assert kept.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_holds_a_directory_may_lock_it_again_and_leaves_nothing(tmp_path):
    place = tmp_path / "a" / "b.training"
    with run_lock(place):
        with run_lock(place):
            pass
        with pytest.raises(AnotherRun), other_context(place):
            pass
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def other_context(place):
    """As another thread of the process would."""
    token = lock._held.set(frozenset())
    try:
        with run_lock(place):
            yield
    finally:
        lock._held.reset(token)


def test_what_a_run_keeps_stays_when_it_is_unlocked(tmp_path):
    with pytest.raises(RuntimeError, match="the power went"), run_lock(tmp_path / "run"):
        (tmp_path / "run" / "start").mkdir()
        raise RuntimeError("the power went")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["start"]


@pytest.mark.parametrize("missing", ["system", "file system"])
def test_without_such_locks_nothing_is_locked_and_nothing_left(missing, monkeypatch, tmp_path):
    def unsupported(handle, kind):
        raise OSError(38, "Function not implemented")

    if missing == "system":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with run_lock(tmp_path / "run"), run_lock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
