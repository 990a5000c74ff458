"""Takes from this process what decoding a picture does not need: time, memory, files, the network, other processes."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from live_avatar.errors import ConfigError

MIB: Final = 2**20
NICENESS: Final = 10

# linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/filter.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RETURN_ALLOW, RETURN_KILL, RETURN_EPERM = 0x7FFF0000, 0x80000000, 0x00050001
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4

SYSTEM_CALLS: Final[dict[str, tuple[int, dict[str, int]]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "close": 3,
            "fstat": 5,
            "lseek": 8,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigaction": 13,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "sched_yield": 24,
            "mremap": 25,
            "madvise": 28,
            "getpid": 39,
            "exit": 60,
            "gettimeofday": 96,
            "gettid": 186,
            "time": 201,
            "futex": 202,
            "clock_gettime": 228,
            "exit_group": 231,
            "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "close": 57,
            "lseek": 62,
            "read": 63,
            "write": 64,
            "fstat": 80,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "clock_gettime": 113,
            "sched_yield": 124,
            "rt_sigaction": 134,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "gettimeofday": 169,
            "getpid": 172,
            "gettid": 178,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
            "getrandom": 278,
        },
    ),
}
"""By machine: its audit number, and the system calls that stay: memory, open descriptors, time and exit."""


@dataclass(frozen=True)
class Limits:
    """cpu_s: CPU time. memory_mib: address space beyond what the process has. wall_s: for those who wait for it."""

    cpu_s: int = 5
    memory_mib: int = 1536
    wall_s: float = 10.0

    def times(self, files: int) -> Limits:
        """The time for so many files, which are decoded one after another."""
        return replace(self, cpu_s=files * self.cpu_s, wall_s=files * self.wall_s)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def enter(limits: Limits) -> None:
    """Limits this process for the rest of its life. Raises `OSError` or `ConfigError` if it cannot."""
    os.nice(NICENESS)
    space = _address_space() + limits.memory_mib * MIB
    for kind, most in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),  # those that are open stay
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    _keep_system_calls(platform.machine())


def _address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _keep_system_calls(machine: str) -> None:
    """All system calls but those of `SYSTEM_CALLS` fail with EPERM from now on."""
    if machine not in SYSTEM_CALLS:
        raise ConfigError(
            f"this machine is {machine}; pictures are decoded on {' or '.join(SYSTEM_CALLS)}: serve on one of these."
        )
    code = filter_code(*SYSTEM_CALLS[machine])
    program = _Program(len(code) // 8, code)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def filter_code(architecture: int, calls: dict[str, int]) -> bytes:
    """A BPF program, instruction by instruction (struct sock_filter)."""
    numbers = list(calls.values())
    instructions = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, RETURN_KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        *((JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (RETURN, 0, 0, RETURN_EPERM),
        (RETURN, 0, 0, RETURN_ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _prctl(option: int, *arguments: object) -> None:
    padded = [argument if not isinstance(argument, int) else ctypes.c_ulong(argument) for argument in arguments]
    padded += [ctypes.c_ulong(0)] * (4 - len(padded))
    if ctypes.CDLL(None, use_errno=True).prctl(option, *padded):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")
