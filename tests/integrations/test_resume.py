"""``optimum-cli export analog --resume`` after the process was killed, wherever that was."""

import os
import random
import signal
import time

import pytest
import runs

from analog_plugin.training import kept, stages


@pytest.fixture
def arguments(model_directory, fields, write_recipe):
    fields["scheme"]["clip_schedule"] = "anneal"
    fields["data"]["tokens"] = 512
    fields["training"] |= {"max_steps": 6, "save_steps": 2, "logging_steps": 1}
    recipe = write_recipe(fields)
    return "--model", model_directory, "--recipe", recipe, "--device", "cpu"


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_the_manifest():
    """In the middle of the second training checkpoint, its files written."""
    usual, seen = kept.write_manifest, []

    def write_manifest(directory):
        if "checkpoint-4" in directory.name:
            die()
        seen.append(directory)
        usual(directory)

    kept.write_manifest = write_manifest


def die_before_training():
    stages.run_training = die


def die_after_training():
    stages.plan_export = die


def test_a_killed_command_goes_on_to_the_same_bits(arguments, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    log = tmp_path / "log"
    assert runs.Run(log, runs.export, *arguments, whole).wait() == 0
    left = []
    for before in (die_before_training, die_before_the_manifest, die_after_training):
        run = runs.Run(log, runs.broken_export, before, *arguments, "--resume", out)
        assert run.wait() == -signal.SIGKILL, run.output
        assert not out.exists()
        left.append([p.name for p in sorted((tmp_path / "out.training").iterdir())])
    assert left[0] == ["lock", "start"]
    assert [name.partition(".partial-")[0] for name in left[1]] == [
        ".checkpoint-4", "checkpoint-2", "lock", "start",
    ]  # fmt: skip
    assert left[2] == ["checkpoint-2", "checkpoint-4", "lock", "start", "trained"]
    run = runs.Run(log, runs.export, *arguments, "--resume", out)
    assert run.wait() == 0, run.output
    assert "trained holds." in run.output
    assert runs.different(whole, out) == []
    assert not (tmp_path / "out.training").exists()


def wait_before_training():
    stages.run_training = lambda *args: signal.pause()


def test_a_second_command_on_one_run_is_refused_until_the_first_is_killed(arguments, tmp_path):
    out, start = tmp_path / "out", tmp_path / "out.training" / "start"
    first = runs.Run(
        tmp_path / "first", runs.broken_export, wait_before_training, *arguments, "--resume", out
    )
    while not start.exists():
        assert first.wait(0.05) is None, first.output
    for options in ([], ["--resume"], ["--overwrite"], ["--no-train"]):
        second = runs.Run(tmp_path / "second", runs.export, *arguments, *options, out)
        assert second.wait() == 1
        assert f"in use by another run (process {first.process.pid} on" in second.output
        assert "Go on with" not in second.output
    assert start.exists() and not out.exists()
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = runs.Run(tmp_path / "third", runs.export, *arguments, "--resume", out)
    assert third.wait() == 0, third.output
    assert "start holds." in third.output
    assert not start.parent.exists()


@pytest.mark.slow
def test_a_command_killed_at_twenty_random_moments_ends_with_the_same_bits(
    arguments, fields, corpus, write_recipe, tmp_path
):
    fields["training"] |= {"max_steps": 60, "save_steps": 4}
    fields["evaluation"] = {"corpus": str(corpus), "blocks": 4, "length": 16, "seeds": 3}
    write_recipe(fields)
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    begin = time.monotonic()
    assert runs.Run(log, runs.export, *arguments, whole).wait() == 0
    seconds = time.monotonic() - begin
    moments, kills = random.Random(0), 0
    while kills < 20:
        run = runs.Run(log, runs.export, *arguments, "--resume", "--overwrite", out)
        status = run.wait(moments.uniform(0, seconds))
        if status is None:
            run.send(signal.SIGKILL)
            status = run.wait()
        assert status in (0, -signal.SIGKILL), run.output
        if status == 0:  # it was done before: begin anew
            assert runs.different(whole, out) == []
        else:
            kills += 1
    run = runs.Run(log, runs.export, *arguments, "--resume", "--overwrite", out)
    assert run.wait() == 0, run.output
    assert runs.different(whole, out) == []
