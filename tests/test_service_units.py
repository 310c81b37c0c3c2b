"""The systemd units in docs/: systemd itself reads them, and their command line is ours."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

from click.testing import CliRunner

from qcow2snap.cli.serve import command
from tests.support.tools import REPOSITORY

UNITS = REPOSITORY / "docs" / "systemd"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    assert len(list(UNITS.iterdir())) == 2
    program = tmp_path / "qcow2snap"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS.iterdir():
        text = unit.read_text()
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment]
        parser.read_string(text)
        (tmp_path / unit.name).write_text(text.replace("/usr/bin/qcow2snap", str(program)))
    if shutil.which("systemd-analyze"):
        names = [str(tmp_path / unit.name.replace("@", "@var-lib-disk.qcow2")) for unit in UNITS.iterdir()]
        done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "tmp" not in done.stderr, done.stderr  # it ends with 0 also where it passes over a line


def test_the_command_of_the_service_is_one_that_serve_has() -> None:
    [line] = [line for line in (UNITS / "qcow2snap@.service").read_text().splitlines() if line.startswith("ExecStart=")]
    program, name, *words = shlex.split(line.removeprefix("ExecStart="))
    assert (program, name) == ("/usr/bin/qcow2snap", "serve")
    result = CliRunner().invoke(command, [word.replace("%f", "/missing") for word in words])
    assert "/missing" in str(result.exception)
