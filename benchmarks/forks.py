"""Work in children of this process."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

LONGEST_S = 300.0
"""A child that takes longer hangs. Its work takes seconds, or minutes niced beside engines."""
THREAD_S = 10.0
"""A thread whose work is done ends within this time."""


def forked(work: Callable[[], None], log: Path) -> int:
    """The process id of a child that does some work; what it prints goes into a file.

    Raises:
        AssertionError: another thread goes on. The child may wait for ever for what it holds.
    """
    _await_threads()
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        faulthandler.register(signal.SIGALRM, chain=True)  # where it hangs, in its log
        signal.alarm(int(LONGEST_S))
        # tqdm's own is shared by all children: one that was killed in a bar would keep it.
        tqdm.set_lock(threading.RLock())
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _await_threads() -> None:
    """Let the other threads end, such as one that hashed a file that has been read since."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(THREAD_S)
    assert threading.active_count() == 1, threading.enumerate()


def status_of(child: int) -> int:
    """The status of a child once it has ended: minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
