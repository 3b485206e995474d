"""Limits that a process puts on itself before it touches what it does not trust.

Nothing here needs privileges. What a system does not have is left out, and the caller is told what
took hold. Linux on x86_64 and aarch64 has all of it.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Final

import bus

_LINUX: Final = sys.platform.startswith("linux")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h, linux/seccomp.h, linux/audit.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_ALLOW: Final = 0x7FFF0000
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000
_EPERM: Final = 1
_ENOSYS: Final = 38
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT: Final = 0x40000000

# linux/bpf_common.h
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_OR_EQUAL: Final = 0x35
_JUMP_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
# Where struct seccomp_data has them; the arguments are 64 bits wide, the low half first.
_NUMBER_AT: Final = 0
_ARCH_AT: Final = 4
_ARGUMENTS_AT: Final = 16

# linux/landlock.h; the numbers of its calls are the same everywhere.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_READ_FOLDER: Final = 1 << 3
# Libraries, and what they ask the system about itself. Not all of /proc: others' environments lie
# there.
_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm",
    "/sys/devices/system", "/sys/fs/cgroup",
)  # fmt: skip

_CLONE_THREAD: Final = 0x00010000
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Numbers of system calls on x86_64 and aarch64; None where there is no such call.
_NO_NETWORK: Final = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
}  # fmt: skip
_NO_CHANGES_TO_FILES: Final = {
    "creat": (85, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "mknod": (133, None), "mknodat": (259, 33),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "utimensat": (280, 88),
}  # fmt: skip
_NO_OTHER_PROCESSES: Final = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "setrlimit": (160, 164), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
# Ways round the rest, and what only root may, should the worker be root.
_NO_WAY_ROUND: Final = {
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "keyctl": (250, 219),
    "open_by_handle_at": (304, 265), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268), "unshare": (272, 97),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "sethostname": (170, 161),
}  # fmt: skip
# What glibc knows to do without: their arguments lie in memory, where a filter cannot look.
_SAID_TO_BE_MISSING: Final = {"clone3": (435, 435), "openat2": (437, 437)}
_OPEN: Final = (2, None)
_OPENAT: Final = (257, 56)
_CLONE: Final = (56, 220)
_TGKILL: Final = (234, 131)
_PRLIMIT: Final = (302, 261)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends.

    Args:
        parent: The parent's process id; if that is gone already, this process ends here.
    """
    if not _LINUX:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def confine(memory_bytes: int, cpu_s: int, file: Path) -> list[str]:
    """Limit this process from here on; return what it is kept from.

    No call for the network, no change to a file, no look into others than the interpreter's and
    the system's, no other process, no core dump, and memory and processor time up to a limit. What
    the process has open stays open. To be called while it has one thread.

    Args:
        memory_bytes: What it may take on top of what it has now.
        cpu_s: Processor time that it may use from its start, in seconds. At the limit comes
            SIGXCPU, and SIGKILL two seconds later.
        file: The one file beside them that it may read.

    Returns:
        Of `memory`, `cpu`, `files` (changing them), `network` and `reading` those that took hold.
    """
    if _LINUX:
        # The kernel's choice when memory runs out is then this process and not the worker.
        _write("/proc/self/oom_score_adj", "1000")
        # Core handlers on a pipe do not heed RLIMIT_CORE.
        _prctl(_PR_SET_DUMPABLE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 128)
    no_writing = _limit(resource.RLIMIT_FSIZE, 0)
    confined = []
    # The private, writable part of the address space: what is mapped of files does not count, nor
    # what threads reserve and never touch, of which RLIMIT_AS would make gigabytes.
    if _LINUX and _limit(resource.RLIMIT_DATA, _data_bytes() + memory_bytes):
        confined.append("memory")
    if _limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 2):
        confined.append("cpu")
    if _filter_calls():
        confined += ["files", "network"] if no_writing else ["network"]
    if _limit_reading([*_readable(), file]):
        confined.append("reading")
    return confined


def peak_bytes() -> int:
    """Return the most memory that this process has had in use since it began."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    # What the process had before it became this program counts in here, too.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes_of(pid: int) -> int | None:
    """Return the memory that a process has in use; None where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def _limit(kind: int, soft: int, hard: int | None = None) -> bool:
    """Lower a limit; return whether it holds. One that is lower already stays."""
    hard = soft if hard is None else hard
    present = resource.getrlimit(kind)[1]
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):
        return False
    return True


def _data_bytes() -> int:
    return _status("VmData") or 0


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{name}:")), None)
    return int(found[1]) * 1024 if found else None


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError:
        # A container may forbid it; then the kernel chooses by itself.
        return


def _prctl(option: int, value: int) -> bool:
    return int(_LIBC.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)) == 0


def _readable() -> list[Path]:
    """Return what the interpreter, its packages and the system's libraries lie in."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    own = [sys.prefix, sys.base_prefix, *sys.path, *libraries]
    # Installed to be edited, they lie in no place that the interpreter searches.
    ours = [Path(__file__).parents[1], Path(bus.__file__).parent]
    return [*ours, *(Path(place) for place in (*_SYSTEM, *own) if place)]


def _limit_reading(places: list[Path]) -> bool:
    """Let this process read what lies in some places, and nothing else; return whether it holds.

    By Landlock, which the kernel has had since 5.13, if it is switched on.
    """
    if not _LINUX:
        return False
    handled = ctypes.create_string_buffer(struct.pack("<Q", _READ_FILE | _READ_FOLDER), 8)
    rules = _call(_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), 8, 0)
    if rules < 0:
        return False
    try:
        for place in places:
            try:
                at = os.open(place, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                allowed = _READ_FILE | (_READ_FOLDER if place.is_dir() else 0)
                rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, at), 12)
                _call(_LANDLOCK_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(rule), 0)
            finally:
                os.close(at)
        return _prctl(_PR_SET_NO_NEW_PRIVS, 1) and _call(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


def _call(number: int, *arguments: object) -> int:
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_LIBC.syscall(ctypes.c_long(number), *plain))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _filter_calls() -> bool:
    """Have the kernel refuse system calls, in every thread; return whether it does."""
    arch = _AUDIT_ARCH.get(platform.machine())
    if not _LINUX or arch is None or struct.calcsize("P") != 8:
        return False
    code = b"".join(_filter(arch, os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    if not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    by_call = 317 if arch == _AUDIT_ARCH["x86_64"] else 277
    for_all_threads = _SECCOMP_FILTER_FLAG_TSYNC
    return _call(by_call, _SECCOMP_SET_MODE_FILTER, for_all_threads, ctypes.byref(program)) == 0


def _filter(arch: int, pid: int) -> list[bytes]:
    """Return the filter as instructions of classic BPF, the first match first."""
    own = 0 if arch == _AUDIT_ARCH["x86_64"] else 1
    code = [
        _step(_LOAD, _ARCH_AT),
        _step(_JUMP_EQUAL, arch, 1, 0),
        _step(_RETURN, _KILL_PROCESS),
        _step(_LOAD, _NUMBER_AT),
    ]
    if own == 0:
        code += [_step(_JUMP_GREATER_OR_EQUAL, _X32_BIT, 0, 1), _refuse(_EPERM)]
    refused = {**_NO_NETWORK, **_NO_CHANGES_TO_FILES, **_NO_OTHER_PROCESSES, **_NO_WAY_ROUND}
    for numbers, said in [
        *((numbers, _EPERM) for numbers in refused.values()),
        *((numbers, _ENOSYS) for numbers in _SAID_TO_BE_MISSING.values()),
    ]:
        if (number := numbers[own]) is not None:
            code += [_step(_JUMP_EQUAL, number, 0, 1), _refuse(said)]
    allow, refuse = _step(_RETURN, _ALLOW), _refuse(_EPERM)
    for numbers, place in ((_OPEN, 1), (_OPENAT, 2)):
        if (number := numbers[own]) is not None:
            code += _where(number, [*_low(place), _step(_JUMP_ANY_BIT, _WRITING, 0, 1), refuse])
    # Threads, but no processes.
    thread = [*_low(0), _step(_JUMP_ANY_BIT, _CLONE_THREAD, 1, 0), refuse]
    code += _where(_number(_CLONE, own), thread)
    # abort() sends its signal this way; to this process, and to no other.
    code += _where(_number(_TGKILL, own), [*_low(0), _step(_JUMP_EQUAL, pid, 1, 0), refuse])
    # Limits may be read, which goes without a new one, and not be raised, which root could do.
    code += _where(
        _number(_PRLIMIT, own),
        [
            *_low(2), _step(_JUMP_EQUAL, 0, 1, 0), refuse,
            *_high(2), _step(_JUMP_EQUAL, 0, 1, 0), refuse,
        ],
    )  # fmt: skip
    return [*code, allow]


def _number(numbers: tuple[int, int], own: int) -> int:
    return numbers[own]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _refuse(errno: int) -> bytes:
    return _step(_RETURN, _ERRNO | errno)


def _low(place: int) -> list[bytes]:
    return [_step(_LOAD, _ARGUMENTS_AT + 8 * place)]


def _high(place: int) -> list[bytes]:
    return [_step(_LOAD, _ARGUMENTS_AT + 8 * place + 4)]


def _where(number: int, steps: list[bytes]) -> list[bytes]:
    """Return steps that are gone through for one system call, which they allow at their end."""
    return [
        _step(_JUMP_EQUAL, number, 0, len(steps) + 1),
        *steps,
        _step(_RETURN, _ALLOW),
    ]
