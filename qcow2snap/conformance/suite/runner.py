"""Runs a reader over cases, and gives one result for each thing that it was asked. What of it is told is the report's.

A check is one disk read, or one map. The reader gets an image of its own for each case, which it must leave as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from qcow2snap.conformance.suite.command import ReaderCommand
from qcow2snap.conformance.suite.judge import judge_content, judge_map
from qcow2snap.conformance.suite.process import End, Ended, Limits, run_limited
from qcow2snap.conformance.suite.values import Built, Case, Disk, Section

_MAP_LIMIT = 64 << 20  # bytes of a map
_OUTPUT_SLACK = 1 << 20  # bytes that an output may be too long, to be told from one without end
_HEAR_EVERY = 0.2  # seconds


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_SUPPORTED = "not supported"


class Failure(Enum):
    """In what way a reader failed. The worst is WRONG: bytes that the disk does not have, and exit code 0."""

    WRONG = "wrong content"
    ACCEPTED = "read what has to be refused"
    REFUSED = "refused"
    MAP = "wrong map"
    CRASH = "crashed"
    TIMEOUT = "took too long"
    MEMORY = "took too much memory"
    OUTPUT = "wrote without end"
    MODIFIED = "changed the image"


class Check(NamedTuple):
    """One thing that a reader was asked, and what came of it."""

    case: str
    sections: tuple[Section, ...]
    what: str  # "read" or "map"
    snapshot: str | None  # None: the active disk
    outcome: Outcome
    failure: Failure | None = None
    detail: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        of = "" if self.snapshot is None else f"@{self.snapshot}"
        return f"{self.case}{of}" if self.what == "read" else f"{self.case}{of} map"


_FAILURES = {
    End.CRASH: Failure.CRASH,
    End.TIMEOUT: Failure.TIMEOUT,
    End.MEMORY: Failure.MEMORY,
    End.OUTPUT: Failure.OUTPUT,
}


class Runner:
    """A reader, and how it is to be run.

    reader, map_reader  commands; at least one
    timeout, memory     of each check: seconds; bytes, 0 for no limit
    keep                a directory for the files of each case, and for what the reader wrote and said. None: nothing
                        is kept
    """

    def __init__(
        self,
        reader: ReaderCommand | None,
        map_reader: ReaderCommand | None = None,
        *,
        timeout: float,
        memory: int,
        jobs: int = 1,
        keep: Path | None = None,
    ) -> None:
        self._readers = [("read", reader)] if reader else []
        self._readers += [("map", map_reader)] if map_reader else []
        self._stopped = False
        self._limits = Limits(timeout, memory, lambda: self._stopped)
        self._jobs = jobs
        self._keep = keep

    def run(self, cases: Sequence[Case], on_progress: Callable[[int], None] = lambda _: None) -> list[Check]:
        """All checks, in the order of the cases whatever ends first. `on_progress` is told of each case, by a 1.

        Whatever interrupts it ends the readers that are running.
        """
        checks: list[Check] = []
        pool = ThreadPoolExecutor(self._jobs)
        try:
            for future in [pool.submit(self._run_case, case) for case in cases]:
                # With a limit: a signal that comes just before a wait without one is not heard before that ends.
                while wait([future], timeout=_HEAR_EVERY).not_done:
                    pass
                checks += future.result()
                on_progress(1)
        except BaseException:
            self.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return checks

    def stop(self) -> None:
        """End the readers that are running, and `run` with them: nothing of what it returns says anything then.

        Takes no lock, so that a signal handler may call it.
        """
        self._stopped = True

    def _run_case(self, case: Case) -> list[Check]:
        if self._stopped:
            return []
        built = case.build()
        with self._directory(case) as directory:
            image = built.write(directory)
            return [
                self._check(case, built, disk, what, command, image)
                for disk in built.disks
                for what, command in self._readers
                if what == "read" or disk.map is not None
                if not self._stopped
            ]

    @contextmanager
    def _directory(self, case: Case) -> Iterator[Path]:
        if self._keep is not None:
            directory = self._keep / case.name
            directory.mkdir(parents=True)
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix="qcow2snap-conformance-") as temporary:
            yield Path(temporary)

    def _check(self, case: Case, built: Built, disk: Disk, what: str, command: ReaderCommand, image: Path) -> Check:
        snapshot = None if disk.snapshot is None else str(disk.snapshot)
        check = Check(case.name, case.sections, what, snapshot, Outcome.PASSED)
        lacking = command.why_not(disk.snapshot)
        if lacking is not None:
            return check._replace(outcome=Outcome.NOT_SUPPORTED, detail=lacking)
        number = built.disks.index(disk)
        output = image.with_name(f"{what}-{number}.out")
        log = image.with_name(f"{what}-{number}.log")
        limit = disk.size + _OUTPUT_SLACK if what == "read" else _MAP_LIMIT
        words = command.words(str(image), str(output), disk.snapshot)
        ended = run_limited(
            words, self._limits, log=log, output=output, output_limit=limit, to_stdout=command.to_stdout
        )
        judged = self._judge(check._replace(seconds=ended.seconds), disk, ended, output)
        if self._keep is None:
            _remove(output)
            _remove(log)
        return self._check_unmodified(judged, built, image)

    def _judge(self, check: Check, disk: Disk, ended: Ended, output: Path) -> Check:
        if ended.end is not End.EXIT:
            signal = f" by signal {ended.code}" if ended.end is End.CRASH else ""
            return _failed(check, _FAILURES[ended.end], f"{_FAILURES[ended.end].value}{signal}{_said(ended)}")
        if ended.code != 0:
            if disk.must_refuse:
                return check
            if disk.may_refuse is not None:
                return check._replace(outcome=Outcome.NOT_SUPPORTED, detail=f"{disk.may_refuse}{_said(ended)}")
            return _failed(check, Failure.REFUSED, f"refused with exit code {ended.code}{_said(ended)}")
        if disk.must_refuse:
            return _failed(check, Failure.ACCEPTED, f"not refused, although {disk.reason}")
        if not output.is_file():
            return _failed(check, Failure.WRONG, "exit code 0, but the output is not there, or is no file")
        if check.what == "map":
            wrong = judge_map(disk, output.read_text(errors="replace"))
            return check if wrong is None else _failed(check, Failure.MAP, wrong)
        wrong = judge_content(disk, output)
        return check if wrong is None else _failed(check, Failure.WRONG, wrong)

    def _check_unmodified(self, check: Check, built: Built, image: Path) -> Check:
        """A reader that writes to what it reads has failed, whatever else it did; others get the image as it was."""
        for (name, file), path in zip(built.files.items(), built.paths(image), strict=True):
            if not file.is_at(path):
                _remove(path)
                file.write(path, sparse=built.sparse)
                return _failed(check, Failure.MODIFIED, f"{name} is not what it was before")
        return check


def _remove(path: Path) -> None:
    """Whatever a reader made of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _failed(check: Check, failure: Failure, detail: str) -> Check:
    return check._replace(outcome=Outcome.FAILED, failure=failure, detail=detail)


def _said(ended: Ended) -> str:
    """The last line of what a reader said."""
    lines = ended.message.splitlines()
    return f": {lines[-1][:300]}" if lines else ""
