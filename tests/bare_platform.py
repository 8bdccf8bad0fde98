"""Hides from the project's code what only Linux, or only POSIX, has: who loads this first runs as on a bare platform.

Put on the path as `sitecustomize.py`, so that the processes which are started from there load it, too. Libraries keep
what they need here: for macOS and Windows they have builds of their own. `HIDDEN_LIBRARIES` in the environment names
libraries to hide as well.
"""

import builtins
import fcntl
import multiprocessing
import multiprocessing.context
import os
import platform
import sys
import sysconfig
import types
import warnings

PROJECT = ("pipeline", "student", "teacher", "manifests")
MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix", "_posixshmem"}
OF_OS = """
    sched_getaffinity sched_setaffinity process_cpu_count fork forkpty pread pwrite preadv pwritev posix_fadvise
    posix_fallocate memfd_create sendfile splice copy_file_range eventfd pidfd_open fdatasync statvfs fstatvfs mkfifo
    mknod getuid geteuid getgid getegid setsid getpgid killpg sysconf nice getloadavg wait4 fchmod chown lchown WNOHANG
    O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_DIRECT O_TMPFILE O_NONBLOCK
"""
OF_SIGNAL = """
    SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGVTALRM SIGCHLD SIGPIPE SIGCONT SIGSTOP alarm setitimer pthread_kill
    pthread_sigmask sigwait
"""
OF_MMAP = "MADV_DONTNEED MADV_SEQUENTIAL MADV_RANDOM MADV_WILLNEED MAP_SHARED MAP_PRIVATE PROT_READ PROT_WRITE"
NAMES = {"os": OF_OS.split(), "signal": OF_SIGNAL.split(), "mmap": OF_MMAP.split(), "socket": ["AF_UNIX"]}
FOLDERS = ("/proc/", "/sys/", "/dev/")
LIBRARY = (sysconfig.get_path("stdlib"), "<frozen")


def refuse_folder(path, *arguments, **keywords):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)  # as Windows says it
    return os.open(path, *arguments, **keywords)


def flush_what_is_written(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")  # as Windows says it
    os.fsync(descriptor)


def bare(name: str) -> types.ModuleType:
    whole = real_import(name)
    module = types.ModuleType(name, whole.__doc__)
    module.__dict__.update({key: value for key, value in vars(whole).items() if key not in NAMES[name]})
    return module


def import_for_project(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    asks = (globals or {}).get("__name__", "").partition(".")[0]
    if asks not in PROJECT or level:
        return real_import(name, globals, locals, fromlist, level)
    if top in hidden:
        raise ModuleNotFoundError(f"No module named {name!r} on this platform", name=name)
    module = real_import(name, globals, locals, fromlist, level)
    return known.get(name, module)


def is_asked_by_project() -> bool:
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith(LIBRARY):  # such as pathlib
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PROJECT


def refuse(event: str, arguments: tuple) -> None:
    """Refuses what other systems have not, and what Windows forbids: to move or remove a file that is open."""
    names = [str(argument) for argument in arguments if isinstance(argument, str | bytes | os.PathLike)]
    if event == "open" and names and names[0].startswith(FOLDERS) and names[0] != os.devnull and is_asked_by_project():
        raise FileNotFoundError(2, "No such file or directory", names[0])
    if event in ("os.rename", "os.remove") and is_asked_by_project():
        for path in map(os.path.abspath, names):
            if is_open(path):
                raise PermissionError(13, "The process cannot access the file because it is being used", path)


def is_open(path: str) -> bool:
    descriptors = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    if path in [os.readlink(descriptor) for descriptor in descriptors if os.path.lexists(descriptor)]:
        return True
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return any(line.rstrip().endswith(f" {path}") for line in maps)


real_import = builtins.__import__
hidden = MODULES | set(os.environ.get("HIDDEN_LIBRARIES", "").split())
known = {name: bare(name) for name in NAMES}
vars(known["os"]).update(open=refuse_folder, fsync=flush_what_is_written)
builtins.__import__ = import_for_project
sys.addaudithook(refuse)
platform.libc_ver = lambda *_, **__: ("", "")
contexts = vars(multiprocessing.context)["_concrete_contexts"]
for method in set(contexts) - {"spawn"}:
    del contexts[method]
multiprocessing.set_start_method("spawn")
# Text without a named encoding is read in the code page of the country there.
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=rf"({'|'.join(PROJECT)})\b")
