"""fio as a client that writes, and a reader beside it. Who measures says what is written, and to which server."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.benchmarks import pairs, servers


def job(command: list[str]) -> dict[str, Any]:
    """What fio, run to its end, reports in JSON of its one job."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise pairs.BenchmarkError(f"fio: {done.stderr.strip() or done.stdout.strip()}")
    [report] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    if report["error"]:
        raise pairs.BenchmarkError(f"fio: {done.stderr.strip()}, error {report['error']}")
    result: dict[str, Any] = report
    return result


def read_beside(command: list[str], uri: str, written: servers.Server) -> pairs.Run:
    """How long it takes to read an export while fio, which is given more than enough to do, writes to a server."""
    writer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        seconds = pairs.run(["nbdcopy", "--connections=1", uri, "null:"]).figure
        if writer.poll() is not None:
            raise pairs.BenchmarkError("fio ended before the snapshot was read")
        return pairs.Run(seconds, written.pss())
    finally:
        writer.kill()
        writer.wait()
