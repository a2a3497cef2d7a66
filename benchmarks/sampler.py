"""Where the main thread's time goes: its stack, looked at every millisecond of CPU time, and the CPU of all other threads.

Each look counts as much CPU time as the main thread used since the last one, so what the others do is not put down to
whatever the main thread happened to be at. Calls into C are put down to the Python line that makes them. Costs about a
hundredth, where a tracing profiler would double the cost of small functions.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

_INTERVAL_SECONDS = 0.001
_ROOT = Path(__file__).parent.parent
Line = tuple[str, str, int]


class Sampler:
    """Samples from `start` to `stop`, both called in the main thread."""

    def __init__(self) -> None:
        self._own: Counter[Line] = Counter()
        self._last = 0.0
        self._began: dict[str, float] = {}
        self._main_began = 0.0

    def start(self) -> None:
        """Begin."""
        self._began = thread_seconds()
        self._main_began = self._last = time.thread_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_SECONDS, _INTERVAL_SECONDS)

    def stop(self) -> dict[str, object]:
        """End; return CPU seconds by line of the main thread, and by kind of thread."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        ended = thread_seconds()
        lines = [[_short(file), function, line, seconds] for (file, function, line), seconds in self._own.most_common()]
        threads = {name: seconds - self._began.get(name, 0.0) for name, seconds in ended.items()}
        return {"lines": lines, "threads": threads, "main_seconds": time.thread_time() - self._main_began}

    def _look(self, _number: int, frame: FrameType | None) -> None:
        now = time.thread_time()
        spent, self._last = now - self._last, now
        if frame is not None:
            code = frame.f_code
            self._own[(code.co_filename, code.co_qualname, frame.f_lineno or code.co_firstlineno)] += spent  # type: ignore[assignment]  # Counter of seconds


def thread_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process by kind of thread; nothing where /proc does not say."""
    ticks = os.sysconf("SC_CLK_TCK")
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: Counter[str] = Counter()
    for folder in Path("/proc/self/task").glob("*"):
        try:
            name, _, rest = (folder / "stat").read_text("ascii", "replace").partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        user, system = rest.split()[11:13]
        found[_kind(names.get(int(folder.name), name))] += (int(user) + int(system)) / ticks  # type: ignore[assignment]  # as above
    return dict(found)


def _short(file: str) -> str:
    """Return where a file is, without where this machine keeps it."""
    path = Path(file)
    if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
        return path.relative_to(_ROOT).as_posix()
    _, found, rest = path.as_posix().rpartition("/site-packages/")
    return rest if found else path.name


def _kind(name: str) -> str:
    match name.partition("_")[0].partition(" ")[0]:
        case "MainThread":
            return "event loop: fetch, decide, produce"
        case "read" | "follow":
            return "readers' poll loops"
        case "kafka":
            return "pool: commits"
        case kind if kind.startswith("rdk:"):
            return "librdkafka: network and queues"
        case _:
            return "others: the group's consumer"
