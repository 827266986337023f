"""With --json, stdout carries the document and nothing else, whatever a library prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli.json_stdout import only_documents, write_document
from halfbyte.cli.output import print_json

# the command `formats`, during which (or after which) a library prints
PROGRAM = """\
import atexit, ctypes, os, subprocess, sys
import halfbyte.cli as cli

command = cli.COMMANDS["formats"]
quiet, old = command.run, sys.stdout
c = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)

def run(args):
    code = quiet(args)
    {noise}
    return code

command.run = run
sys.argv = ["halfbyte", "formats", "--json"]
sys.exit(cli.main())
"""
NOISE = {
    "print": "print('noise')",
    "a stream that a library kept": "old.write('noise\\n')",
    "a system call": "os.write(1, b'noise\\n')",
    "C, buffered": "c.printf(b'noise\\n')",
    "a child process": "subprocess.run([sys.executable, '-c', 'print(\"noise\")'], check=True)",
    "Python at exit": "atexit.register(old.write, 'noise\\n')",
    "C at exit": "atexit.register(c.printf, b'noise\\n')",
}


def run_program(noise: str, **more: object) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(noise=noise)
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("source", NOISE)
def test_what_a_library_prints_goes_to_stderr(source: str) -> None:
    done = run_program(NOISE[source], stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert "formats" in json.loads(done.stdout)
    assert done.stderr == "noise\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed by a shell here")
@pytest.mark.parametrize("closed", [(2,), (0, 2)], ids=str)
def test_noise_is_dropped_where_stderr_is_closed(closed: tuple[int, ...]) -> None:
    done = run_program(NOISE["a system call"], preexec_fn=lambda: [os.close(descriptor) for descriptor in closed])
    assert done.returncode == 0
    assert "formats" in json.loads(done.stdout)


def test_a_command_that_fails_prints_no_document() -> None:
    done = run_program("raise cli.HalfbyteError('it broke')", stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "halfbyte: it broke\n")


def test_a_full_disk_is_one_sentence() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", "formats", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "halfbyte: No space left on device\n")


def test_stdout_is_as_before_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    stream = sys.stdout
    with only_documents():
        print_json({"a": 1})
        os.write(1, b"noise\n")
    assert sys.stdout is stream
    os.write(1, b"later, in C\n")
    print("later")
    sys.stdout.flush()
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == sorted(["{", '  "a": 1', "}", "later", "later, in C"])
    assert captured.err == "noise\n"


def test_a_document_outside_of_a_command_is_written_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_document("{}\n")
    assert capsys.readouterr().out == "{}\n"
