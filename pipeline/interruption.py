"""Ctrl-C from within: how a thread that finds the work to be in vain ends what the main thread waits for."""

import _thread
import signal
import threading


def interrupt_main() -> None:
    """Do to the main thread what Ctrl-C does, also where it waits in a system call that has no limit.

    A process that a script has started in the background is deaf to Ctrl-C: it is ended.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.raise_signal(signal.SIGTERM)
    elif hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows, where nothing ends such a wait
        _thread.interrupt_main()
