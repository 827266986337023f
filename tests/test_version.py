"""The version: one place, which a source tree, the installed package and its metadata all read."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import halfbyte

REPOSITORY = Path(__file__).resolve().parent.parent
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text()


def test_the_metadata_of_the_installed_package_agree() -> None:
    assert version("halfbyte") == halfbyte.__version__


def test_a_source_tree_knows_its_version_where_nothing_is_installed() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import halfbyte; print(halfbyte.__version__, halfbyte.__file__)"
    )
    source = REPOSITORY / "src"
    command = [sys.executable, "-I", "-S", "-c", code, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (declared,) = re.findall(r'^__version__ = "(.+)"$', (source / "halfbyte" / "__init__.py").read_text(), re.MULTILINE)
    assert done.stdout.split() == [declared, str(source / "halfbyte" / "__init__.py")]


def test_the_build_reads_the_version_from_the_package() -> None:
    project = PYPROJECT.partition("[project]")[2].partition("\n[")[0]
    assert re.search(r'^dynamic = \["version"\]$', project, re.MULTILINE)
    assert not re.search(r"^version\s*=", project, re.MULTILINE)
    assert 'input = "src/halfbyte/__init__.py"' in PYPROJECT.partition("[tool.scikit-build.metadata.version]")[2]
