"""What all commands share: help, usage errors, exit codes, pipes, quick start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import halfbyte.api
from halfbyte.cli import COMMANDS, main

HALFBYTE = [sys.executable, "-m", "halfbyte"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_options_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: halfbyte {name}")
    assert "--json" in text
    assert "examples:" in text and f"halfbyte {name}" in text.split("examples:")[1]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


def test_no_command_is_a_usage_error(refusal: Callable[..., str]) -> None:
    assert "COMMAND" in refusal()


def test_unknown_command_is_named(refusal: Callable[..., str]) -> None:
    assert "'quantise'" in refusal("quantise")


def test_options_are_not_abbreviated(refusal: Callable[..., str], demo_model: str) -> None:
    assert "see `halfbyte plan --help`" in refusal("plan", demo_model, "--rec", "nvfp4")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"halfbyte {halfbyte.__version__}\n"


def test_missing_source_is_one_sentence_without_a_traceback() -> None:
    done = subprocess.run([*HALFBYTE, "inspect", "no/such/place"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("halfbyte: 'no/such/place' does not exist")
    assert "Traceback" not in done.stderr


def test_an_os_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], demo_model: str, tmp_path: Path
) -> None:
    def no_space(*_: object, **more: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(sys.modules["halfbyte.convert.conversion"], "convert", no_space)
    message = refusal("quantize", demo_model, str(tmp_path / "out"), "--recipe", "mxfp4")
    assert message == "halfbyte: somewhere: No space left on device\n"


def test_reader_that_goes_away_is_no_error() -> None:
    child = subprocess.Popen([*HALFBYTE, "formats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*HALFBYTE, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "halfbyte: No space left on device\n"


def test_names_from_files_cannot_steer_the_terminal(tmp_path: Path, run_text: Callable[..., str]) -> None:
    path = tmp_path / "inventory.json"
    path.write_text(r'{"tensors": {"a": ["BF16", [4]]}, "config": {"architectures": ["\u001b[31mred"]}}')
    text = run_text("inspect", "--inventory", str(path))
    assert "\x1b" not in text
    assert r"\x1b[31mred" in text


def test_unusual_characters_survive_an_ascii_pipe(tmp_path: Path) -> None:
    path = tmp_path / "inventory.json"
    path.write_text(r'{"tensors": {"a": ["BF16", [4]]}, "config": {"architectures": ["\u6a21\u578b"]}}')
    done = subprocess.run(
        [*HALFBYTE, "inspect", "--inventory", str(path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0
    assert rb"\u6a21\u578b" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from halfbyte.cli import main; main(['--help']); "
        "print(sorted({'numpy', 'pydantic', 'rich', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_core_commands_import_neither_torch_nor_transformers(demo_model: str, tmp_path: Path) -> None:
    code = (
        "import sys; from halfbyte.cli import main; model, out = sys.argv[1:]; "
        "codes = [main(['quantize', model, out, '--recipe', 'mxfp4', '--json']), "
        "main(['verify', out, '--against', model, '--json']), main(['inspect', out, '--json'])]; "
        "print(codes, sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, demo_model, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[0, 0, 0] []\n"
