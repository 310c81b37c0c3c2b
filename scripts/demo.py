"""`make demo`: list a shipped image, serve it, read one snapshot back over NBD, and compare it with the manifest.

Each step is printed as the command that a user would type. Needs this package only; uses nbdcopy where it is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "fixtures/images/demo.qcow2"
SNAPSHOT = "before-upgrade"
TIME_LIMIT = 60  # seconds, for all of it


def main() -> None:
    os.chdir(ROOT)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, _stopped)  # as an exception, so that the server is stopped too
    signal.alarm(TIME_LIMIT)

    with TemporaryDirectory(prefix="qcow2snap-demo-") as folder:
        run("qcow2snap", "list", IMAGE)

        socket, copy = f"{folder}/demo.sock", f"{folder}/{SNAPSHOT}.raw"
        show("qcow2snap", "serve", IMAGE, "-k", socket, background=True)
        server = subprocess.Popen(["qcow2snap", "serve", IMAGE, "-k", socket], stdout=subprocess.PIPE)
        try:
            uri = find_uri(server)
            if shutil.which("nbdcopy"):
                run("nbdcopy", uri, copy)
            else:
                run("python", "-m", "qcow2snap.nbd.client", uri, copy)
        finally:
            stop(server)

        sha256 = run("sha256sum", copy).split()[0]
        compare(os.path.getsize(copy), sha256)


def show(*command: str, background: bool = False) -> None:
    print(f"$ {shlex.join(command)}{' &' if background else ''}", flush=True)


def run(*command: str) -> str:
    """Run one step, and show what the user would see."""
    show(*command)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        sys.exit(f"FAILED: {command[0]} ended with exit status {done.returncode}")
    return done.stdout


def find_uri(server: subprocess.Popen[bytes]) -> str:
    """The snapshot's URI, among those that the server prints when it is ready."""
    assert server.stdout is not None
    text = ""
    while True:
        for line in text.splitlines(keepends=True):
            if line.startswith(f"nbd+unix:///{SNAPSHOT}?") and line.endswith("\n"):
                print(text, flush=True)
                return line.rstrip()
        piece = os.read(server.stdout.fileno(), 1 << 16)
        if not piece:
            sys.exit(f"FAILED: qcow2snap serve ended without a URI of {SNAPSHOT}")
        text += piece.decode()


def stop(server: subprocess.Popen[bytes]) -> None:
    show("kill", "%1")
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def compare(size: int, sha256: str) -> None:
    manifest = json.loads(Path("fixtures/manifest.json").read_text())
    image = next(image for image in manifest["images"] if image["file"] == Path(IMAGE).name)
    expected = next(snapshot for snapshot in image["snapshots"] if snapshot["name"] == SNAPSHOT)
    if (size, sha256) != (expected["size"], expected["sha256"]):
        sys.exit(f"FAILED: fixtures/manifest.json says {expected['size']} bytes, SHA-256 {expected['sha256']}")
    print(f"OK: {SNAPSHOT} came back as fixtures/manifest.json says: {size} bytes, and this SHA-256")


def _stopped(number: int, frame: object) -> None:
    sys.exit(f"FAILED: stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
