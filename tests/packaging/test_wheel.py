"""The built wheel: namespace, weight of imports, direction of imports, strangers' plugins."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = {
    "analog_integrations",
    "aihwkit",
    "aihwkit_lightning",
    "llmcompressor",
    "lm_eval",
    "optimum",
    "vllm",
}


def build_wheel(source: Path, target: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", target, source],
        check=True,
        capture_output=True,
    )
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel and a stranger's package, installed side by side outside the environment."""
    target = tmp_path_factory.mktemp("site")
    third = build_wheel(Path(__file__).parent / "third_party", tmp_path_factory.mktemp("third"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            target,
            wheel,
            third,
        ],
        check=True,
        capture_output=True,
    )
    return target


def run(code: str, installed: Path | None) -> str:
    """Run ``code`` with the installed copy, if one is given, first on the path."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ({} if installed is None else {"PYTHONPATH": str(installed)}),
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_wheel_leaves_the_optimum_namespace_open(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimum/commands/register/register_analog.py" in names
    assert "optimum/analog/__init__.py" in names
    for folder in ("optimum", "optimum/commands", "optimum/commands/register"):
        assert f"{folder}/__init__.py" not in names


def test_wheel_holds_both_packages_and_their_type_markers(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"analog_plugin/py.typed", "analog_integrations/py.typed"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_optimum_and_its_analog_portion_import_together(installed):
    code = "import optimum.commands.base, optimum.analog; print(optimum.analog.__file__)"
    assert run(code, installed).startswith(str(installed))


def test_commands_register_without_importing_torch(installed):
    code = (
        "import sys\n"
        "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load\n"
        "names = [c[0].__name__ if isinstance(c, tuple) else c.__name__ for c in load()]\n"
        "heavy = {'torch', 'transformers', 'llmcompressor'} & set(sys.modules)\n"
        "print('AnalogExportCommand' in names, sorted(heavy))"
    )
    assert run(code, installed) == "True []"


@pytest.mark.parametrize("arguments", [["--help"], ["export", "analog", "--help"]], ids=" ".join)
def test_help_imports_no_torch(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['optimum-cli', *{arguments!r}]\n"
        "from optimum.commands.optimum_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'llmcompressor'} & set(sys.modules)))"
    )
    # In the environment itself: a second copy on the path would register the command twice.
    printed = run(code, None)
    assert printed.startswith("usage: optimum-cli")
    assert "--recipe" in printed or "analog" not in arguments
    assert printed.endswith("heavy: []")


@pytest.mark.parametrize("module", ["analog_plugin", "analog_plugin.plugins"])
def test_import_needs_no_torch(module, installed):
    assert run(f"import sys, {module}; print('torch' in sys.modules)", installed) == "False"


def test_every_public_name_resolves(installed):
    code = "import analog_plugin as a; print([n for n in a.__all__ if not hasattr(a, n)])"
    assert run(code, installed) == "[]"


def test_core_imports_no_host():
    found = []
    for path in (ROOT / "analog_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and node.args:
                names = [_name_imported_by(node)]
            found += [f"{path.name}: {n}" for n in names if n.partition(".")[0] in HOSTS]
    assert found == []


def _name_imported_by(call: ast.Call) -> str:
    """The module in ``import_module("...")`` or ``require("...", extra)``, else nothing."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    first = call.args[0]
    named = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return first.value if named and name in ("import_module", "require", "__import__") else ""


def test_strangers_plugin_adds_a_noise_model_and_a_preset(installed):
    code = (
        "import torch\n"
        "from analog_plugin.noise import resolve_noise\n"
        "from analog_plugin.presets import resolve_scheme\n"
        "noise = resolve_noise('uniform:0.2')\n"
        "w = torch.ones(3, 5)\n"
        "out = noise.program(w, torch.Generator().manual_seed(0))\n"
        "print(resolve_scheme('THIRD_PARTY').output_bits, (out - w).abs().max().item() <= 0.1, "
        "not torch.equal(out, w))"
    )
    assert run(code, installed) == "9 True True"
