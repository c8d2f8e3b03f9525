"""Runs one Python program and tells whether it came to its end: the script of an interpreter that `code.run_program` starts.

It needs nothing but the standard library, for it is run by its path (`python -s -P sandbox.py …`), and closes doors before it
reads the program: limits of memory, CPU time, open files and file sizes; no capabilities; no files but Python's own and its
folder (Landlock, where the kernel has it); and a seccomp filter without sockets, new processes, other programs, signals to
others and raised limits. The filter holds for every thread, and no program can take it off.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Mapping

# Each system call's number on x86-64 and on 64-bit ARM; None where it has none. Source: the kernel's tables of system calls.
_DENIED: Mapping[str, tuple[int | None, int | None]] = {
    # the network; an io_uring opens sockets without asking for them
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    # other processes: made, run, grouped apart, looked into or signaled
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # what would outlive the process, or is the kernel's own business
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "setrlimit": (160, 164),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
_CAPSET, _PRCTL = (126, 91), (157, 167)
_LANDLOCK = (444, 445, 446)  # create a rule set, add a rule, restrict oneself: the same everywhere
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # where seccomp_data holds them; arguments are 8 bytes each
_ALLOW, _REFUSE, _NOT_THERE, _END = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS, kill
_X32, _CLONE_THREAD = 0x40000000, 0x00010000
_NO_NEW_PRIVILEGES, _SECCOMP, _DEATH_SIGNAL = 38, 22, 1  # options of prctl
_READ, _WRITE_FILE, _TRUNCATE = 0b1100, 1 << 1, 1 << 14
_CHANGE = (0x1FF0, 1 << 13, _TRUNCATE)  # rights to change folders: since the first ABI of Landlock, the second, the third
_FILES, _THREADS = 64, 1024
_READABLE = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/dev/urandom",
    "/dev/zero",
    "/sys/devices/system/cpu",
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def limit(memory: int, seconds: int, file_size: int) -> None:
    """Hard limits of this process: bytes of memory, seconds of CPU time, bytes of a file that is written."""
    bounds = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: _FILES,
        resource.RLIMIT_NPROC: _THREADS,  # of all that the user runs; the superuser is exempt
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in bounds.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def drop_privileges() -> None:
    """Gives up all capabilities, for good, and dies with the process that started this one."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    _prctl(_NO_NEW_PRIVILEGES, 1)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", _CAPSET[_machine()[1]], header, nothing)


def close_files(folder: str) -> bool:
    """Leaves only Python's own files readable, and only `folder` writable. False if the kernel has no Landlock."""
    create, add, restrict = _LANDLOCK
    try:
        version = _call("landlock", create, None, 0, 1)
    except OSError:
        return False
    changes = _WRITE_FILE | sum(right for abi, right in enumerate(_CHANGE, 1) if abi <= version)
    handled = struct.pack("Q", _READ | changes)
    rules = _call("landlock", create, handled, len(handled), 0)
    wanted = dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix, *_READABLE), _READ)
    wanted |= {"/dev/null": _READ | _WRITE_FILE, folder: _READ | changes}
    for path, rights in wanted.items():
        if os.path.exists(path):
            kind = rights if os.path.isdir(path) else rights & (0b110 | changes & _TRUNCATE)
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call("landlock", add, rules, 1, struct.pack("=Qi", kind, opened), 0)
            os.close(opened)
    _call("landlock", restrict, rules, 0)
    os.close(rules)
    return True


def close_calls() -> None:
    """Puts the seccomp filter on this process: what it refuses fails with EPERM."""
    code = b"".join(struct.pack("HBBI", *step) for step in _filter())
    program = ctypes.create_string_buffer(code)
    _prctl(_SECCOMP, 2, ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))))


def _filter() -> Iterator[tuple[int, int, int, int]]:
    """Steps (operation, jump if true, jump if false, constant) of the filter: classic BPF over a system call's seccomp_data."""
    architecture, column = _machine()
    yield from ((_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _END))
    yield from ((_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE))
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            yield from ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE))
    # The C library takes a missing clone3 for an old kernel's, and calls clone: whose flags, unlike clone3's, can be seen here.
    yield from ((_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _NOT_THERE))
    verdict = ((_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE))
    yield from ((_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 0, 1, _CLONE_THREAD), *verdict)
    for numbers in (_KILL, _TGKILL):
        yield from ((_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 0, 1, os.getpid()), *verdict)
    third = _ARGUMENTS + 16  # the new limits of prlimit64: none is a question
    yield from ((_EQUAL, 0, 6, _PRLIMIT[column]), (_LOAD, 0, 0, third), (_EQUAL, 0, 3, 0))
    yield from ((_LOAD, 0, 0, third + 4), (_EQUAL, 0, 1, 0), *verdict)
    yield (_RETURN, 0, 0, _ALLOW)


def _machine() -> tuple[int, int]:
    """The architecture as seccomp counts it, and its column in the tables above."""
    name = platform.machine()
    if sys.platform != "linux" or name not in _ARCHITECTURES:
        raise OSError(f"no filter of system calls is known for {sys.platform} on {name}")
    return _ARCHITECTURES[name]


def _prctl(option: int, *arguments: object) -> None:
    _call("prctl", _PRCTL[_machine()[1]], option, *arguments, *[0] * (4 - len(arguments)))


def _call(what: str, *arguments: object) -> int:
    result = int(_libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def main() -> None:
    """`sandbox.py MEMORY SECONDS FILE_SIZE DESCRIPTOR`, with a word and then the program on standard input.

    The word is written to DESCRIPTOR once, with what is closed, before the program runs, and once after its last line:
    a program that stops early, however it does that, cannot seem to have come to its end.
    """
    memory, seconds, file_size, descriptor = map(int, sys.argv[1:])
    word, source = sys.stdin.buffer.readline().strip(), sys.stdin.buffer.read()
    os.close(0)
    limit(memory, seconds, file_size)
    drop_privileges()
    files = close_files(os.getcwd())
    close_calls()
    os.write(descriptor, b"files\n" if files else b"open\n")
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.write(descriptor, word)
    os._exit(0)


if __name__ == "__main__":
    main()
