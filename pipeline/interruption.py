"""Ctrl-C from within: how a thread that finds the work to be in vain ends what the main thread waits for."""

import _thread
import signal
import threading


def interrupt_main() -> None:
    """Do to the main thread what Ctrl-C does, also where it waits in a system call that has no limit."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows, where nothing ends such a wait
        _thread.interrupt_main()
