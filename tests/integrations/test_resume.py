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
    assert left[0] == ["start"]
    assert [name.partition(".partial-")[0] for name in left[1]] == [
        ".checkpoint-4", "checkpoint-2", "start",
    ]  # fmt: skip
    assert left[2] == ["checkpoint-2", "checkpoint-4", "start", "trained"]
    run = runs.Run(log, runs.export, *arguments, "--resume", out)
    assert run.wait() == 0, run.output
    assert "trained holds." in run.output
    assert runs.different(whole, out) == []
    assert not (tmp_path / "out.training").exists()


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
