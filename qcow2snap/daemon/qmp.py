"""QMP as a server (QEMU docs/interop/qmp-spec.rst): takes and gives bytes. What a command does is its handler's.

Knows no socket, no clock but for the time of events, and no thread.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from qcow2snap import __version__
from qcow2snap.block.node import InvalidOption, Qcow2SnapError
from qcow2snap.daemon.json_stream import JSONStream

logger = logging.getLogger(__name__)

# Whose names, options and meanings these are.
VERSION = {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": f"qcow2snap {__version__}"}
_MEMBERS = ("execute", "arguments", "id")


class ErrorClass(Enum):
    """QEMU's QapiErrorClass, as far as there is use for it."""

    GENERIC_ERROR = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"


class CommandFailed(Qcow2SnapError):
    """A failure of another class than GenericError."""

    def __init__(self, error_class: ErrorClass, text: str) -> None:
        super().__init__(text)
        self.error_class = error_class


# Carries out a command with its arguments, and gives what it returns. Raises Qcow2SnapError.
Execute = Callable[[str, Mapping[str, Any]], Any]


class QMPSession:
    """One client. Feed `receive` what it says; answers and events go out through `send`.

    threads  one
    errors   none: they are answers
    """

    def __init__(self, execute: Execute, send: Callable[[bytes], None], *, pretty: bool = False) -> None:
        self._execute = execute
        self._send_bytes = send
        self._indent = 4 if pretty else None
        self._stream = JSONStream()
        self._is_negotiated = False
        self._has_oob = False  # a command may be asked for out of band; there is none that can be
        self._send({"QMP": {"version": VERSION, "capabilities": ["oob"]}})

    def receive(self, data: bytes) -> None:
        for value in self._stream.feed(data):
            self._send(self._answer(value))

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell of something that happened; not before the client is ready to hear it."""
        if self._is_negotiated:
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            timestamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
            self._send({"timestamp": timestamp, "event": name, **({"data": dict(data)} if data else {})})

    def _answer(self, request: Any) -> dict[str, Any]:
        answer: dict[str, Any]
        try:
            if isinstance(request, Qcow2SnapError):
                raise request
            answer = {"return": self._dispatch(request)}
        except CommandFailed as error:
            answer = {"error": {"class": error.error_class.value, "desc": str(error)}}
        except Qcow2SnapError as error:
            answer = {"error": {"class": ErrorClass.GENERIC_ERROR.value, "desc": str(error)}}
        except Exception as error:
            logger.exception("a command failed by a fault of this daemon")
            answer = {"error": {"class": ErrorClass.GENERIC_ERROR.value, "desc": f"a fault of this daemon: {error!r}"}}
        if isinstance(request, dict) and "id" in request:
            answer["id"] = request["id"]
        return answer

    def _dispatch(self, request: Any) -> Any:
        if not isinstance(request, dict):
            raise InvalidOption("QMP input must be a JSON object")
        if self._has_oob and "exec-oob" in request:
            raise InvalidOption(f"The command {str(request['exec-oob'])[:200]} does not support OOB")
        for member in request:
            if member not in _MEMBERS:
                raise InvalidOption(f"QMP input member '{member[:200]}' is unexpected")
        command, arguments = request.get("execute"), request.get("arguments", {})
        if "execute" not in request:
            raise InvalidOption("QMP input lacks member 'execute'")
        if not isinstance(command, str):
            raise InvalidOption("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise InvalidOption("QMP input member 'arguments' must be an object")
        if command == "qmp_capabilities":
            return self._capabilities(arguments)
        if not self._is_negotiated:
            raise CommandFailed(
                ErrorClass.COMMAND_NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'"
            )
        return self._execute(command, arguments)

    def _capabilities(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if self._is_negotiated:
            raise CommandFailed(
                ErrorClass.COMMAND_NOT_FOUND, "Capabilities negotiation is already complete, command ignored"
            )
        for name in arguments:
            if name != "enable":
                raise InvalidOption(f"Parameter '{name[:200]}' is unexpected")
        enable = arguments.get("enable", [])
        if not isinstance(enable, list):
            raise InvalidOption("Invalid parameter type for 'enable', expected: array")
        for capability in enable:
            if capability != "oob":
                raise InvalidOption(f"Parameter 'enable' does not accept value '{str(capability)[:200]}'")
            self._has_oob = True
        self._is_negotiated = True
        return {}

    def _send(self, message: Mapping[str, Any]) -> None:
        self._send_bytes(json.dumps(message, indent=self._indent).encode() + b"\r\n")
