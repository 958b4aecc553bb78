"""Confine a worker to one folder.

The steps, in this order: a detached clone of the workspace's mount (nosuid, nodev, noexec, noatime, with the
tenant's ids mapped), new mount, IPC, network and UTS namespaces with the clone as `/`, resource limits, the
mapped uid of the workspace's owner without any capabilities, no_new_privs, Landlock if the kernel has it, and
a seccomp filter that allows only what file operations need.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.rootfs import IdMap, kernel
from gateway.rootfs.kernel import AT_EMPTY_PATH, AT_FDCWD, checked, syscall

# Same numbers on every architecture (from 424 on).
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC, _ATTR_IDMAP = 0x1, 0x2, 0x4, 0x8, 0x100000
_ATTR_ATIMES, _ATTR_NOATIME = 0x70, 0x10  # all that says when access times are recorded, and "never"
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
_MNT_DETACH = 2
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_MACHINE = os.uname().machine
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SECCOMP = {"x86_64": 317, "aarch64": 277}

_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """How to confine a worker: `folder` becomes `/`, `namespace` is a user namespace to map its mount's ids.

    `uid` and `gid` are host ids. `memory` limits the address space, `file` the size of a written file, in
    bytes. `covered` are folders that are made inaccessible.
    """

    folder: int
    namespace: int | None
    uid: int
    gid: int
    memory: int
    file: int
    read_only: bool = False
    covered: tuple[str, ...] = ()


class Namespaces:
    """Open user namespaces without processes, one per distinct id map."""

    def __init__(self) -> None:
        self._kept: dict[tuple[IdMap, ...], int] = {}

    def get(self, idmap: tuple[IdMap, ...]) -> int:
        """Return a descriptor of a namespace with this map, whether or not a tenant is running."""
        if idmap not in self._kept:
            while len(self._kept) >= 256:
                os.close(self._kept.pop(next(iter(self._kept))))
            self._kept[idmap] = _user_namespace(idmap)
        return self._kept[idmap]


def _user_namespace(idmap: tuple[IdMap, ...]) -> int:
    """Create a user namespace through a child that waits until its maps are written, then exits."""
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        made = _libc.unshare(_NEWUSER) == 0
        os.write(ready_write, b"y" if made else b"n")
        os.close(done_write)
        os.read(done_read, 1)
        os._exit(0)
    try:
        if os.read(ready_read, 1) != b"y":
            raise OSError(errno.EPERM, "user namespaces are not available")
        for name, wanted in (("uid_map", "is_uid"), ("gid_map", "is_gid")):
            lines = "".join(f"{m.inside} {m.outside} {m.size}\n" for m in idmap if getattr(m, wanted))
            descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY)
            try:
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready_read, ready_write, done_read, done_write):
            os.close(descriptor)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends."""
    checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def confine(plan: Plan, *, keep: int) -> tuple[str, ...]:
    """Confine this process and close its descriptors except `keep`; return the names of the layers.

    Afterwards `/` is the workspace. Raises `OSError` if a required layer fails; then the caller must exit.
    """
    end_with_parent()
    tree = _clone(plan.folder, plan.namespace, read_only=plan.read_only)
    _enter(tree, plan.covered)
    _close_all({keep})
    _hold_standard()
    _limit(plan)
    _drop(plan.uid, plan.gid)
    layers = ["mount", "namespaces", "limits", "uid"]
    if _landlock(_FS_CHANGES if plan.read_only else _FS_ALL, 0 if plan.read_only else _FS_ALLOWED):
        layers.append("landlock")
    if _seccomp(WORKER):
        layers.append("seccomp")
    return tuple(layers)


def seal(memory: int, seconds: int) -> tuple[str, ...]:
    """Let this process only compute and use its standard streams; return the names of the layers.

    From here on it opens no file and runs no program. `memory` is bytes of address space, `seconds` are of
    CPU time.
    """
    end_with_parent()
    os.closerange(3, 1 << 16)
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))
    layers = ["limits"]
    if os.geteuid() == 0:
        _drop(_NOBODY, _NOBODY)
        layers.append("uid")
    else:
        checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if _landlock(_FS_ALL, 0):
        layers.append("landlock")
    if _seccomp(COMPUTING):
        layers.append("seccomp")
    return tuple(layers)


def _clone(folder: int, namespace: int | None, *, read_only: bool) -> int:
    """Return a detached mount of `folder` alone, without the mounts below it."""
    flags = _OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC
    tree = checked(syscall(_OPEN_TREE, folder, b"", flags), "open_tree")
    # An access time would be written for each file that is read after a change. On btrfs that waits for a
    # commit of the file system, for seconds where it has much to do.
    attributes = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC | _ATTR_NOATIME
    if namespace is not None:
        attributes |= _ATTR_IDMAP
    if read_only:
        attributes |= _ATTR_RDONLY
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    wanted = struct.pack("QQQQ", attributes, _ATTR_ATIMES, _MS_PRIVATE, namespace or 0)
    checked(syscall(_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, wanted, len(wanted)), "mount_setattr")
    return tree


def _enter(tree: int, covered: tuple[str, ...]) -> None:
    """Make `tree` the root of new namespaces, in which nothing else of the host is left."""
    checked(_libc.unshare(_NEWNS | _NEWIPC | _NEWNET | _NEWUTS), "unshare")
    # First, or the mounts below would show on the host.
    checked(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount private")
    # Any folder that is there on every Linux will do: only this namespace sees what is put over it.
    over = b"/run"
    moved = syscall(_MOVE_MOUNT, tree, b"", AT_FDCWD, over, _MOVE_MOUNT_F_EMPTY_PATH)
    checked(moved, "move_mount")
    for path in covered:
        _cover(tree, path)
    os.chdir(over)
    # pivot_root(".", ".") stacks the old root on the new one, so it needs no folder: pivot_root(2).
    checked(syscall(_PIVOT_ROOT[_MACHINE], b".", b"."), "pivot_root")
    checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    os.umask(0o022)


def _cover(tree: int, path: str) -> None:
    """Mount something empty over a folder, so that its contents on this disk cannot be opened.

    The container has another disk mounted there, so these contents would be read and written by mistake.
    """
    flags, real = kernel.O_PATH | os.O_DIRECTORY, kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
    try:
        folder = kernel.openat2(tree, os.fsencode(path), flags, real)
    except (FileNotFoundError, NotADirectoryError):
        return  # no disk is mounted there yet: Incus creates the folder for it
    try:
        over = f"/proc/self/fd/{folder}".encode()
        options = ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        checked(_libc.mount(b"none", over, b"tmpfs", options, b"size=4k,nr_inodes=1,mode=000"), "mount over")
    finally:
        os.close(folder)


def _close_all(keep: set[int]) -> None:
    first = 0
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 16)


def _hold_standard() -> None:
    """Occupy the standard descriptors with folders, which can be neither read nor written.

    Otherwise a library's output to stderr would go to whichever file got that number.
    """
    while (descriptor := os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)


def _limit(plan: Plan) -> None:
    for what, value in (
        (resource.RLIMIT_AS, plan.memory),
        (resource.RLIMIT_FSIZE, plan.file + (1 << 20)),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(what, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond RLIMIT_FSIZE fails with EFBIG


def _drop(uid: int, gid: int) -> None:
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL above the kernel's last one
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # leaving uid 0 drops the permitted and effective capabilities
    if uid == 0:
        raise OSError(errno.EPERM, "a worker must not be root")
    checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # A process with this uid in the container must not trace this one or read its memory.
    checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")
    end_with_parent()  # setresuid has cleared it (prctl(2))


# LANDLOCK_ACCESS_FS_*: everything in ABI 3 is handled; executing and creating devices are not allowed.
_FS_EXECUTE, _FS_READ_FILE, _FS_READ_DIR, _FS_MAKE_CHAR, _FS_MAKE_BLOCK, _FS_TRUNCATE = (
    1 << bit for bit in (0, 2, 3, 6, 11, 14)
)
_FS_ALL = (1 << 15) - 1
_FS_ALLOWED = _FS_ALL & ~(_FS_EXECUTE | _FS_MAKE_CHAR | _FS_MAKE_BLOCK)
# For read-only workers. Reading is left to the mounts: checked at each open, it would cost a search of all
# files a third of its time. Truncating requires an open for writing.
_FS_CHANGES = _FS_ALL & ~(_FS_READ_FILE | _FS_READ_DIR | _FS_TRUNCATE)


def _landlock(handled: int, allowed: int) -> bool:
    """Allow only `allowed` of the `handled` kinds of file access, below `/`. False without Landlock.

    Also forbids TCP and signals if the kernel supports it.
    """
    abi = syscall(_LANDLOCK_CREATE, None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    if abi < 3:
        return False
    # struct landlock_ruleset_attr has grown: fs (ABI 1), net (4), scope (6)
    attributes = struct.pack("QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = checked(syscall(_LANDLOCK_CREATE, attributes, size, 0), "landlock")
    root = os.open("/", (kernel.O_PATH or 0) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if allowed:
            # LANDLOCK_RULE_PATH_BENEATH with struct landlock_path_beneath_attr, which is packed
            may = struct.pack("=Qi", allowed, root)
            checked(syscall(_LANDLOCK_ADD, rules, 1, may, 0), "landlock")
        checked(syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock")
    finally:
        os.close(root)
        os.close(rules)
    return True


_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ, |JGE, BPF_RET
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def _seccomp(allowed: Mapping[str, tuple[int | None, int | None]]) -> bool:
    """Allow these system calls and fail all others with EPERM. False on unknown architectures."""
    if _MACHINE not in _SECCOMP:
        return False
    column = 0 if _MACHINE == "x86_64" else 1
    numbers = sorted(number for row in allowed.values() if (number := row[column]) is not None)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH[_MACHINE]), (_RETURN, 0, 0, _KILL_PROCESS)]
    program.append((_LOAD, 0, 0, 0))
    if column == 0:  # the x32 numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL_PROCESS)]
    for number in numbers:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: length, pointer
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    checked(syscall(_SECCOMP[_MACHINE], 1, 0, filter_), "seccomp")  # SECCOMP_SET_MODE_FILTER
    return True


# System calls of a worker by architecture: x86_64, aarch64 (None if it uses another one instead).
# From arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
WORKER: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "exit": (60, 93),
    "fcntl": (72, 25),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fchdir": (81, 50),
    "fchmod": (91, 52),
    "gettimeofday": (96, 169),
    "sysinfo": (99, 179),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "inotify_add_watch": (254, 27),
    "inotify_rm_watch": (255, 28),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "readlinkat": (267, 78),
    "fchmodat": (268, 53),
    "ppoll": (271, 73),
    "utimensat": (280, 88),
    "inotify_init1": (294, 26),
    "syncfs": (306, 267),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "preadv2": (327, 286),
    "statx": (332, 291),
    "rseq": (334, 293),
    "openat2": (437, 437),
}
_COMPUTES = """
brk clock_gettime close exit exit_group fstat futex getrandom lseek madvise mmap mprotect mremap munmap
newfstatat read rt_sigaction rt_sigprocmask rt_sigreturn write
"""
# for a process that only computes and answers on an open stream
COMPUTING = {name: WORKER[name] for name in _COMPUTES.split()}
