"""A directory is written whole or not at all, whatever happens in between."""

import json
import multiprocessing
import random
import shutil
import time

import pytest

from analog_plugin import AnalogError
from analog_plugin.checkpoint.layout import verify_manifest, write_manifest
from analog_plugin.paths import atomic_directory, check_output


def fill(directory, text):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sub").mkdir(exist_ok=True)
    (directory / "file").write_text(text)
    (directory / "sub" / "file").write_text(text)


def read(directory):
    texts = {path.read_text() for path in directory.rglob("file")}
    assert len(texts) == 1, f"{directory} is mixed of {texts}"
    assert len(list(directory.rglob("file"))) == 2
    return texts.pop()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write(target, text, overwrite=True):
    with atomic_directory(target, overwrite) as new:
        fill(new, text)


def test_a_new_directory_appears_at_the_end_only(tmp_path):
    target = tmp_path / "a" / "out"
    with atomic_directory(target) as new:
        fill(new, "new")
        assert not target.exists()
        assert new.parent == target.parent  # the same file system: a rename suffices
    assert read(target) == "new" and names(target.parent) == ["out"]


def test_the_old_directory_stays_until_the_new_one_is_whole(tmp_path):
    fill(tmp_path / "out", "old")
    with atomic_directory(tmp_path / "out", True) as new:
        fill(new, "new")
        assert read(tmp_path / "out") == "old"
    assert read(tmp_path / "out") == "new" and names(tmp_path) == ["out"]


def test_nothing_of_the_old_directory_is_left_in_the_new_one(tmp_path):
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("x")
    write(tmp_path / "out", "new")
    assert names(tmp_path / "out") == ["file", "sub"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_whatever_is_raised_leaves_the_old_directory_and_no_litter(old, error, tmp_path):
    if old:
        fill(tmp_path / "out", "old")
    with pytest.raises(error), atomic_directory(tmp_path / "out", True) as new:
        fill(new, "half")
        raise error
    assert names(tmp_path) == (["out"] if old else [])
    assert not old or read(tmp_path / "out") == "old"


def test_an_empty_directory_is_filled_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new", overwrite=False)
    assert read(tmp_path / "out") == "new" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(overwrite, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(AnalogError, match="is a file"):
        write(tmp_path / "out", "new", overwrite)
    assert (tmp_path / "out").read_text() == "x" and names(tmp_path) == ["out"]


def test_a_full_directory_is_refused_before_anything_is_written(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(AnalogError, match="not empty"):
        write(tmp_path / "out", "new", overwrite=False)
    assert read(tmp_path / "out") == "old" and names(tmp_path) == ["out"]


def test_a_hidden_file_counts_as_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".precious").write_text("x")
    with pytest.raises(AnalogError, match="not empty"):
        check_output(tmp_path / "out", overwrite=False)


def test_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnalogError):
        check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.parametrize("path", [".", "", "sub/.."])
def test_a_path_without_a_name_is_resolved_or_refused(path, tmp_path, monkeypatch):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AnalogError):
        check_output(path, overwrite=False)


@pytest.mark.parametrize("path", [".", "..", "../here", "../../{}"])
def test_the_current_directory_and_those_around_it_are_never_replaced(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AnalogError, match="current directory"):
        write(path.format(tmp_path.name), "new")
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == []


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(AnalogError, match="out"):
        check_output(tmp_path / "out", overwrite=True)


def test_a_linked_directory_can_be_overwritten_again_and_again(tmp_path):
    fill(tmp_path / "disk", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for text in ("first", "second", "third"):
        write(tmp_path / "out", text)
        assert read(tmp_path / "out") == text
        assert names(tmp_path) == ["disk", "out"]


# What a crash can leave behind, step by step.


def crash_before_the_renames(tmp_path):
    fill(tmp_path / "out", "old")
    fill(tmp_path / ".out.partial-12345678", "half")
    return "old"


def crash_between_the_renames(tmp_path):
    fill(tmp_path / ".out.replaced", "old")
    fill(tmp_path / ".out.partial-12345678", "new")
    return "old"


def crash_before_the_old_is_deleted(tmp_path):
    fill(tmp_path / "out", "new")
    fill(tmp_path / ".out.replaced", "old")
    return "new"


def crash_while_the_old_is_deleted(tmp_path):
    fill(tmp_path / "out", "new")
    fill(tmp_path / ".out.replaced", "old")
    (tmp_path / ".out.replaced" / "file").unlink()
    return "new"


CRASHES = pytest.mark.parametrize(
    "crash",
    [crash_before_the_renames, crash_between_the_renames, crash_before_the_old_is_deleted,
     crash_while_the_old_is_deleted],
)  # fmt: skip


@CRASHES
def test_checking_the_output_mends_what_a_crash_left(crash, tmp_path):
    expected = crash(tmp_path)
    check_output(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == expected
    assert ".out.replaced" not in names(tmp_path)


@CRASHES
def test_a_crash_does_not_make_overwrite_unnecessary(crash, tmp_path):
    expected = crash(tmp_path)
    with pytest.raises(AnalogError, match="not empty"):
        write(tmp_path / "out", "later", overwrite=False)
    assert read(tmp_path / "out") == expected


@CRASHES
def test_the_next_write_succeeds_after_a_crash(crash, tmp_path):
    crash(tmp_path)
    write(tmp_path / "out", "later")
    assert read(tmp_path / "out") == "later"
    assert ".out.replaced" not in names(tmp_path)


@CRASHES
def test_a_failure_after_a_crash_keeps_the_directory(crash, tmp_path):
    expected = crash(tmp_path)
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", True):
        raise ZeroDivisionError
    assert read(tmp_path / "out") == expected


def test_neighbours_are_left_alone(tmp_path):
    fill(tmp_path / ".other.replaced", "x")
    fill(tmp_path / "out2", "x")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == [".other.replaced", "out", "out2"]


def write_for_ever(target):
    for count in range(1_000_000):
        with atomic_directory(target, overwrite=True) as new:
            for index in range(20):
                (new / f"file{index}.txt").write_text(json.dumps(count) * 1000)
            write_manifest(new)


def whole(directory):
    """All files are of one generation, and the manifest lists all of them."""
    verify_manifest(directory)
    texts = {path.read_text() for path in directory.glob("file*.txt")}
    return len(texts) == 1 and len(list(directory.glob("file*.txt"))) == 20


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_kill_9_at_any_moment_leaves_a_whole_directory(tmp_path):
    target, aside = tmp_path / "out", tmp_path / ".out.replaced"
    moments = random.Random(0)
    for _ in range(40):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(target,))
        process.start()
        start = time.monotonic()
        while not target.exists() and time.monotonic() - start < 30:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9
        # Before anything is mended: under its name or aside, one of them is whole.
        assert whole(target if target.exists() else aside)
        check_output(target, overwrite=True)
        assert whole(target) and not aside.exists()
        for litter in tmp_path.glob(".out.partial-*"):
            shutil.rmtree(litter)
