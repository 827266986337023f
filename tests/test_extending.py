"""docs/extending.md: its files are as short as it says, its commands run, and packages extend halfbyte the same way."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w.]+)\n")
FILES = {m.group(1): code for _, code in BLOCK.findall(PAGE) if (m := NAMED.match(code))}
COMMANDS = [line for kind, code in BLOCK.findall(PAGE) if kind == "bash" for line in code.splitlines()]
IN_PYTHON = [code for kind, code in BLOCK.findall(PAGE) if kind == "python" and not NAMED.match(code)]
PLUGINS = [name for name in FILES if name.endswith(".py")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, the demo model as ``model``, and a model of the page's family."""
    folder = tmp_path_factory.mktemp("desk")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    shutil.copytree(str(resources.files("halfbyte") / "demo_model"), folder / "model")
    renamed = {re.sub(r"self_attn\.(\w)_proj", r"attn.w\1", name): t for name, t in dense_tensors().items()}
    config = {**DENSE_CONFIG, "model_type": "acme", "architectures": ["AcmeForCausalLM"]}
    write_checkpoint(folder / "acme-model", renamed, config)
    return folder


def program(desk: Path, *argv: str, target: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder, with a folder of installed packages in front where there is one."""
    paths = [str(target)] if target else []
    path = os.pathsep.join([*paths, *(entry for entry in sys.path if entry)])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *argv], cwd=desk, env=env, capture_output=True, text=True, check=False)


def halfbyte(desk: Path, *argv: str, target: Path | None = None) -> subprocess.CompletedProcess[str]:
    return program(desk, "-m", "halfbyte", *argv, target=target)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_is_one_file_of_at_most_60_lines(name: str) -> None:
    assert len(FILES[name].splitlines()) <= 60


def test_the_page_has_one_of_each_kind() -> None:
    registered = {word for name in PLUGINS for word in re.findall(r"^(register\w*)\(", FILES[name], re.MULTILINE)}
    kinds = {"", "_search", "_dialect", "_family", "_recipe", "_command"}
    assert registered >= {f"register{kind}" for kind in kinds}


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_page_run(desk: Path) -> None:
    for line in COMMANDS:
        word, *argv = shlex.split(line)
        assert word == "halfbyte"
        done = halfbyte(desk, *argv)
        assert (done.returncode, done.stderr) == (0, ""), f"{line}\n{done.stdout}\n{done.stderr}"
    for code in IN_PYTHON:
        done = program(desk, "-W", "error::UserWarning", "-c", code)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_outputs_of_plugins_are_loaded(desk: Path) -> None:
    pytest.importorskip("torch")
    code = (
        "import halfbyte, sys\n"
        "for plugin in sys.argv[3:]: halfbyte.load_plugin(plugin)\n"
        "halfbyte.quantize('model', sys.argv[1], sys.argv[2], dialect='toy-engine' if sys.argv[3:] else None)\n"
        "model = halfbyte.load(sys.argv[1], dtype='float32')\n"
        "print(sum(p.numel() for p in model.parameters()) > 0)\n"
    )
    for out, recipe, *plugins in (("load-toy", "nvfp4", "toy_engine.py"), ("load-squares", "squares.yaml")):
        extra = [] if plugins else ["import halfbyte; halfbyte.load_plugin('squares.py')\n"]
        done = program(desk, "-c", "".join(extra) + code, out, recipe, *plugins)
        assert done.stdout.strip().endswith("True"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no plugin file broken.py"),
        ("x = 1\nnot_defined\n", "the plugin broken.py cannot be loaded: NameError: name 'not_defined' is not defined"),
        ("x = (\n", "the plugin broken.py cannot be loaded: SyntaxError"),
        (
            "from halfbyte.recipes import register_recipe\n"
            "register_recipe('name: nvfp4\\nrules: [{match: linear, format: nvfp4}]')\n",
            "the plugin broken.py cannot be loaded: there is a recipe 'nvfp4' already; give the new one another name",
        ),
        (
            "from halfbyte.models import register_family\nregister_family('name: mine\\nmodel_types: [llama]')\n",
            "llama belongs to the family llama already; leave it out of mine",
        ),
        (
            "from halfbyte.models import register_family\nregister_family('name: llama\\nextends: base')\n",
            "there is a family 'llama' already",
        ),
        (
            "from halfbyte.search import Search, register_search\nregister_search(Search('sweep', 'mine'))\n",
            "there is a search 'sweep' already",
        ),
        (
            "from dataclasses import replace\nfrom halfbyte.formats import get_format, register\n"
            "register(replace(get_format('nvfp4'), global_top=1.0))\n",
            "belongs to the format nvfp4 already",
        ),
        (
            "from halfbyte.dialects import get_dialect, register_dialect\n"
            "register_dialect(type('Other', (type(get_dialect('fp8')),), {})())\n",
            "there is a dialect 'fp8' already",
        ),
        (
            "from halfbyte.cli import register_command\nregister_command('plan', None)\n",
            "there is already a command 'plan'",
        ),
    ],
)
def test_a_broken_plugin_is_one_sentence_and_exit_code_2(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "broken.py").write_text(content)
    done = halfbyte(tmp_path, "formats", "--plugin", "broken.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("halfbyte: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_plugin_option_without_a_file_is_one_sentence(tmp_path: Path) -> None:
    done = halfbyte(tmp_path, "formats", "--plugin")
    assert done.returncode == 2 and "--plugin" in done.stderr and done.stderr.count("\n") == 1


def install(folder: Path, modules: dict[str, str], points: dict[str, dict[str, str]]) -> Path:
    """Build a package and install it by pip into a folder of its own."""
    source, target = folder / "source", folder / "target"
    (source / "acme_halfbyte").mkdir(parents=True)
    (source / "acme_halfbyte" / "__init__.py").write_text("")
    for name, code in modules.items():
        (source / "acme_halfbyte" / name).write_text(code)
    groups = "".join(
        f'[project.entry-points."halfbyte.{group}"]\n' + "".join(f'{n} = "{v}"\n' for n, v in entries.items())
        for group, entries in points.items()
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "acme-halfbyte"\nversion = "1.0"\n'
        f'[tool.setuptools]\npackages = ["acme_halfbyte"]\n{groups}'
    )
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run([sys.executable, *pip], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files as an installed package."""
    points = {
        "formats": {"squares": "acme_halfbyte.squares"},
        "searches": {"shrinking": "acme_halfbyte.shrinking"},
        "dialects": {"toy-engine": "acme_halfbyte.toy_engine"},
        "families": {"acme": "acme_halfbyte.acme"},
        "recipes": {"careful": "acme_halfbyte.careful"},
        "commands": {"count": "acme_halfbyte.count"},
    }
    return install(tmp_path_factory.mktemp("package"), {name: FILES[name] for name in PLUGINS}, points)


@pytest.mark.slow
def test_an_installed_package_needs_no_option(desk: Path, package: Path) -> None:
    done = halfbyte(desk, "count", "model", "--json", target=package)
    assert json.loads(done.stdout)["roles"]["experts.down"] == 524288, done.stderr
    command = ("--recipe", "careful", "--dialect", "halfbyte", "--verify", "--json")
    done = halfbyte(desk, "quantize", "model", "out-installed", *command, target=package)
    assert json.loads(done.stdout)["verification"]["ok"] and done.stderr == ""
    code = (
        "import halfbyte\n"
        "assert 'squares_g16' in halfbyte.list_formats() and 'careful' in halfbyte.list_recipes()\n"
        "halfbyte.quantize('model', 'out-api', 'squares.yaml')\n"
        "assert halfbyte.verify('out-api', 'model').ok\n"
    )
    done = program(desk, "-W", "error", "-c", code, target=package)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_broken_installed_plugin_is_left_out_with_a_warning(desk: Path, tmp_path: Path) -> None:
    modules = {"bad.py": "raise ImportError('needs another library')\n", "squares.py": FILES["squares.py"]}
    points = {"recipes": {"bad": "acme_halfbyte.bad"}, "formats": {"squares": "acme_halfbyte.squares"}}
    target = install(tmp_path, modules, points)
    done = halfbyte(desk, "formats", "--json", target=target)
    sentence = "the plugin bad of the package acme-halfbyte is left out: ImportError: needs another library"
    assert (done.returncode, done.stderr) == (0, f"halfbyte: {sentence}\n")
    assert "squares_g16" in {fmt["name"] for fmt in json.loads(done.stdout)["formats"]}
    done = program(desk, "-c", "import halfbyte; halfbyte.list_formats(); halfbyte.list_recipes()", target=target)
    assert done.returncode == 0 and done.stderr.count(f"UserWarning: {sentence}") == 1


def test_a_search_of_a_plugin_changes_the_scales(desk: Path) -> None:
    code = (
        "import halfbyte, numpy as np\n"
        "halfbyte.load_plugin('shrinking.py')\n"
        "x = np.random.default_rng(0).standard_t(4, (64, 256)).astype(np.float32)\n"
        "error = {s: float(((halfbyte.encode(x, 'nvfp4', search=s).decode() - x) ** 2).sum())\n"
        "         for s in ('absmax', 'near', 'shrinking')}\n"
        "assert error['near'] < error['absmax'] and error['shrinking'] < error['absmax'], error\n"
    )
    done = program(desk, "-c", code)
    assert done.returncode == 0, done.stderr
