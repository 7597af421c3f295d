"""``optimum-cli analog teacher``: computed once, trained from afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analog_integrations.optimum import main_export, main_teacher
from analog_plugin import AnalogError
from analog_plugin.training import StoredTeacher

CLI = Path(sys.executable).with_name("optimum-cli")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANALOG_PLUGIN_CACHE", str(tmp_path / "cache"))


def history(result):
    return [entry["loss"] for entry in result.training["loss_history"]]


def test_the_command_stores_what_the_export_then_trains_from(
    model_directory, fields, write_recipe, tmp_path
):
    fields["scheme"] |= {"prefix": 1}
    fields["training"] |= {"logging_steps": 1}
    recipe = write_recipe(fields)
    result = subprocess.run(
        [str(CLI), "analog", "teacher", "--model", str(model_directory), "--recipe", str(recipe),
         "--top-k", "128", "--device", "cpu", "--output", "teacher"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the 128 most likely tokens at 128 positions" in result.stdout
    assert "distillation: {teacher: teacher}" in result.stdout
    usual = main_export(str(model_directory), tmp_path / "usual", recipe, device="cpu")
    from_disk = fields | {"distillation": {"teacher": str(tmp_path / "teacher")}}
    stored = main_export(str(model_directory), tmp_path / "stored", from_disk, device="cpu")
    assert history(stored) == pytest.approx(history(usual), rel=1e-3)
    with pytest.raises(AnalogError, match="for another model"):
        main_export(
            str(model_directory), tmp_path / "half", from_disk, device="cpu", dtype="bfloat16"
        )
    assert not (tmp_path / "half").exists()


def test_what_was_stored_is_kept_unless_it_is_to_be_replaced(model_directory, fields, tmp_path):
    fields["distillation"] = {"top_k": 5, "temperature": 2.0}
    made = main_teacher(str(model_directory), tmp_path / "out", fields, device="cpu")
    assert (made.top_k, made.temperature) == (5, 2.0)
    with pytest.raises(AnalogError, match="not empty"):
        main_teacher(str(model_directory), tmp_path / "out", fields, device="cpu", top_k=3)
    assert StoredTeacher(tmp_path / "out").top_k == 5
    options = {"device": "cpu", "overwrite": True}
    assert main_teacher(str(model_directory), tmp_path / "out", fields, top_k=3, **options)
    assert StoredTeacher(tmp_path / "out").top_k == 3
    for wrong in ({"top_k": 0}, {"batch_size": 0}, {"top_k": 999}):
        with pytest.raises(
            AnalogError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"
        ):
            main_teacher(str(model_directory), tmp_path / "other", fields, device="cpu", **wrong)
    assert not (tmp_path / "other").exists()


def test_help_explains_the_command_without_loading_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        [str(CLI), "analog", "teacher", "--help"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--top-k" in result.stdout and "distillation: {teacher: teacher}" in result.stdout
