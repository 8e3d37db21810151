"""Every difference between operating systems, behind plain functions.

No other module asks which system it runs on. The macOS branches follow the documented behaviour of
`fcntl(F_NOCACHE)`, `sysctl` and `vm_stat`; on other systems the tests run them with stand-ins.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import math
import mmap
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

PAGE_BYTES = mmap.PAGESIZE
"""Size of a virtual-memory page: 4 KiB on most Linux machines, 16 KiB on Apple silicon."""

_MAX_BUFFERS_PER_READ = 512  # IOV_MAX is 1024 on Linux and macOS
_F_RDADVISE, _F_NOCACHE = 44, 48  # <sys/fcntl.h> on macOS
_F_FULLFSYNC, _F_PUNCHHOLE = 51, 99  # the same
_KEEP_SIZE_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, <linux/falloc.h>
_OPEN_MAX = 10_240  # <sys/syslimits.h> on macOS
_UNSTABLE_INODES = {"9p", "afs", "cifs", "smb3", "virtiofs"}  # and all of FUSE
METAL_SHARE = 0.95
"""Above this share of the recommended working set MLX frees its unused buffers all the time."""
_STALLED_PERCENT = 10.0  # of ten seconds, in which some program stood still for memory
_QOS_USER_INITIATED = 0x19  # <sys/qos.h> on macOS
_LEAST_FOR_SYSTEM, _MOST_FOR_SYSTEM = 2 << 30, 8 << 30  # left to macOS beside a GPU's memory


def open_direct(path: Path) -> tuple[int, int]:
    """Open `path` so that reads bypass the page cache.

    Returns:
        The file descriptor, and the alignment in bytes that offset, length and memory address
        must have. macOS accepts any, but copies unaligned reads through its page cache without
        read-ahead, so a page is required there.

    Raises:
        OSError: the system or the file system cannot bypass the page cache.
    """
    if sys.platform == "darwin":
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.fcntl(fd, _F_NOCACHE, 1)
        except OSError:
            os.close(fd)
            raise
        return fd, PAGE_BYTES
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        raise OSError(errno.ENOTSUP, "this system has no O_DIRECT", str(path))
    # 4096 satisfies every block device in use; 512 would fail on 4K-native drives.
    return os.open(path, os.O_RDONLY | flag), 4096


def open_buffered(path: Path) -> int:
    """Open `path` for scattered reads through the page cache; returns the descriptor.

    Linux must not read ahead of each: a read-ahead of 8 MB on one machine doubled the bytes read.
    """
    fd = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def announce_read(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to read into its page cache; returns at once. Only advice: no errors."""
    with suppress(OSError):
        if sys.platform == "darwin":  # struct radvisory, <sys/fcntl.h>; fcntl(2)
            fcntl.fcntl(fd, _F_RDADVISE, struct.pack("@qi4x", offset, min(nbytes, 2**31 - 1)))
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def read_into(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """One scatter read at `offset`; returns the bytes read, which may be fewer than asked for."""
    return os.preadv(fd, buffers[:_MAX_BUFFERS_PER_READ], offset)


def address_space_left() -> int | None:
    """Bytes that this process may still map (`ulimit -v`); None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    except OSError:  # macOS has the limit and ignores it
        return None


def open_descriptors() -> int:
    """Number of descriptors that this process has open."""
    try:
        return len(os.listdir("/dev/fd")) - 1  # listing them takes one
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise


def allow_descriptors(wanted: int) -> int:
    """Raise the number of descriptors that this process may have open to `wanted`, if it is lower.

    macOS starts with 256, and refuses limits above its OPEN_MAX.

    Returns:
        The number in force: at least `wanted`, unless the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft >= wanted:
        return soft
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if sys.platform == "darwin":
        most = min(most, _OPEN_MAX)
    if most > soft:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft


def file_mark(file: Path) -> tuple[int, ...]:
    """Numbers that tell a file from another one that is put in its place, for `same_file`.

    Raises:
        OSError: there is no such file.
    """
    found = os.stat(file)
    sample = int(content_sample(file), 16)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, sample


def same_file(mark: tuple[int, ...], fd: int, path: Path) -> bool:
    """Is an open file the one that was marked?

    Size and time of change must be the same, but a copy can have the same ones. The inode must be
    the same too, or samples of the content on a file system whose inodes change.

    Args:
        mark: from `file_mark`.
        fd: the open file.
        path: its path.

    Raises:
        OSError: it cannot be read.
    """
    device, inode, *rest, sample = mark
    found = os.fstat(fd)
    if [found.st_size, found.st_mtime_ns] != rest:
        return False
    if found.st_dev == device and not _has_unstable_inodes(device):
        return found.st_ino == inode
    with path.open("rb") as again:  # `fd` may only read aligned blocks
        if not os.path.samestat(os.fstat(again.fileno()), found):
            return False
    return int(content_sample(path), 16) == sample


def content_sample(file: Path) -> str:
    """A digest of a file's first 64 KiB (a shard's header, or most of it), middle and end.

    Two fine-tunes of one model have the same sizes and headers, but all their weights differ.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        for begin, end in sampled(size):
            digest.update(os.pread(f.fileno(), end - begin, begin))
    return digest.hexdigest()[:SAMPLE_DIGITS]


SAMPLE_DIGITS = 16


def sampled(size: int) -> list[tuple[int, int]]:
    """The parts, from byte to byte, of a file of `size` bytes that `content_sample` digests."""
    parts = ((0, 64 << 10), (size // 2, 4096), (max(0, size - 4096), 4096))
    return [(begin, min(size, begin + nbytes)) for begin, nbytes in parts]


def _has_unstable_inodes(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """May the file system of `device` change a file's inode number while it is mounted?"""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            kind = after.split()[0]
            return kind.startswith("fuse") or kind in _UNSTABLE_INODES
    return False


def drop_page_cache(path: Path) -> bool:
    """Ask the system to drop `path`'s cached pages, for cold measurements; False if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return True


def on_one_drive(a: Path, b: Path) -> bool:
    """Are two folders in one file system, so that what one frees the other may take?"""
    return a.stat().st_dev == b.stat().st_dev


def sync_to_drive(fd: int) -> None:
    """Wait until what was written to a file would survive a power failure.

    macOS's `fsync` leaves it in the drive's own cache.
    """
    if sys.platform == "darwin":
        with suppress(OSError):  # network drives do not have it
            fcntl.fcntl(fd, _F_FULLFSYNC, 0)
            return
    os.fsync(fd)


def punch_hole(fd: int, offset: int, nbytes: int) -> int:
    """Give back the disk space of whole blocks within a part of a file, which then reads as zeros.

    The file keeps its size, and bytes outside of the part never change.

    Args:
        fd: the file, open for writing.
        offset, nbytes: the part; blocks that reach out of it stay.

    Returns:
        The bytes of those blocks.

    Raises:
        OSError: the file system has no holes.
    """
    block = os.fstatvfs(fd).f_frsize
    begin, end = -(-offset // block) * block, (offset + nbytes) // block * block
    if end <= begin:
        return 0
    if sys.platform == "darwin":
        fcntl.fcntl(fd, _F_PUNCHHOLE, struct.pack("=IIqq", 0, 0, begin, end - begin))
        return end - begin
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if fallocate is None:
        raise OSError(errno.ENOTSUP, "this system cannot free parts of files")
    size = ctypes.c_int64
    if fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, size(begin), size(end - begin)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return end - begin


def holes_work(folder: Path) -> bool:
    """Does `punch_hole` free the bytes that it should, and no others? Tried on a file in `folder`.

    Raises:
        OSError: no file can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as f:
        block = os.fstatvfs(f.fileno()).f_frsize
        content = os.urandom(64 * block)
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
        before = os.fstat(f.fileno()).st_blocks
        begin, end = 8 * block + 100, 56 * block - 100
        try:
            freed = punch_hole(f.fileno(), begin, end - begin)
            os.fsync(f.fileno())
        except OSError:
            return False
        inner = slice(9 * block, 55 * block)
        expected = bytearray(content)
        expected[inner] = bytes(freed)
        smaller = before - os.fstat(f.fileno()).st_blocks >= freed // 512 // 2
        return smaller and os.pread(f.fileno(), len(content) + 1, 0) == expected


def total_memory_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine, or of the container that limits this process, in bytes.

    Args:
        root: where `/proc` and `/sys` are.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's control group and of the groups around it, in bytes."""
    limits = []
    for group, names in _cgroups(root):
        for name in names:
            try:
                limits.append(int((group / name).read_text()))
            except (OSError, ValueError):  # a group without this limit, or "max"
                continue
    return limits


def _cgroups(root: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Each memory control group that this process is in, with the names of its limit files."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    groups: list[tuple[Path, tuple[str, ...]]] = []
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        second = not controllers  # the line of version 2 names no controllers
        if not second and "memory" not in controllers.split(","):
            continue
        # Above memory.high the system reclaims memory as fast as it is used.
        names = ("memory.max", "memory.high") if second else ("memory.limit_in_bytes",)
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            _, _, _, shown, at, *_ = before.split()
            kind, _, options = after.split(" ", 2)
            if kind != ("cgroup2" if second else "cgroup"):
                continue
            if not second and "memory" not in options.split(","):
                continue
            top = root / at.lstrip("/")
            # A container sees a part of the tree: its own group is the top of what is mounted.
            inside = path == shown or path.startswith(shown.rstrip("/") + "/")
            inside = inside and ".." not in path.split("/")
            own = top / path.removeprefix(shown).lstrip("/") if inside else top
            while True:
                groups.append((own, names))
                if own == top or top not in own.parents:
                    break
                own = own.parent
    return groups


def unfinished_bytes(item_bytes: int) -> int:
    """Upper bound of the memory that operations hold which a GPU has not finished, in bytes.

    MLX submits operations in groups and keeps a group's memory until the whole group has ended. A
    group is full when its inputs have so many Mi items (backend/cuda/device.cpp and
    backend/metal/device.cpp, by architecture; `MLX_MAX_MB_PER_BUFFER` overrides). On an H200 a
    prompt's pass took 2.4 GB more than its operations need one after the other.

    Args:
        item_bytes: bytes of one item of most inputs.
    """
    if mx.default_device() != mx.gpu:
        return 0
    if on_metal():
        items = 50
    else:
        capability = int(mx.device_info().get("compute_capability_major", 0))
        items = {8: 400, 9: 1000, 10: 1000, 12: 1000}.get(capability, 100)
    with suppress(ValueError):
        items = int(os.environ.get("MLX_MAX_MB_PER_BUFFER", items))
    return int(1.25 * (items << 20) * item_bytes)  # the operation that fills a group is part of it


def on_metal() -> bool:
    """Is MLX's default device an Apple GPU?"""
    return mx.default_device() == mx.gpu and mx.metal.is_available()


def working_set_bytes() -> int:
    """Size of the working set that Metal recommends, in bytes; 0 on other devices."""
    return int(mx.device_info().get("max_recommended_working_set_size", 0))


@dataclass(frozen=True)
class DeviceLimit:
    """The most memory that a device can hold, and how to raise that.

    Attributes:
        nbytes: the limit.
        why: what sets it, as a sentence without a full stop.
        command: a command that raises it so that the wanted memory fits; None if there is none.
    """

    nbytes: int
    why: str
    command: str | None = None


def device_limit(wanted: int = 0) -> DeviceLimit:
    """The most memory that MLX's default device can hold.

    This is a share of the recommended working set on Metal, the device's own memory on CUDA, and
    the memory of the machine or of the container around this process on the CPU.

    Args:
        wanted: bytes that `DeviceLimit.command` must make room for.
    """
    total = total_memory_bytes()
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        if "max_recommended_working_set_size" in info:
            return metal_limit(info, wanted)
        memory = info.get("total_memory", 0)
        if isinstance(memory, int) and memory > 0:
            return DeviceLimit(memory, f"{info.get('device_name', 'the device')} has that much")
    return DeviceLimit(total, "this machine, or the container that this process is in, has no more")


def metal_limit(info: Mapping[str, str | int], wanted: int = 0) -> DeviceLimit:
    """`device_limit` of a device that MLX's Metal backend describes.

    Args:
        info: `mx.device_info()`, with `max_recommended_working_set_size` and `memory_size`.
        wanted: bytes that `DeviceLimit.command` must make room for.
    """
    recommended = int(info["max_recommended_working_set_size"])
    total = int(info.get("memory_size", 0))
    most = total - min(_MOST_FOR_SYSTEM, max(_LEAST_FOR_SYSTEM, total // 16))
    limit = int(METAL_SHARE * recommended)
    megabytes = -(-math.ceil(wanted / METAL_SHARE) >> 20)  # of 2^20 bytes, rounded up
    helps = wanted > limit and megabytes << 20 <= most
    return DeviceLimit(
        limit,
        f"that is {METAL_SHARE:.0%} of the {recommended / 1e9:.4g} GB that macOS recommends for "
        "the GPU's working set, above which MLX allocates slowly and then fails",
        f"sudo sysctl iogpu.wired_limit_mb={megabytes}" if helps else None,
    )


def apple_limit(memory: int, wanted: int = 0) -> DeviceLimit:
    """An estimate of `device_limit` for a Mac of which only the memory is known.

    Args:
        memory: the machine's memory in bytes.
        wanted: bytes that `DeviceLimit.command` must make room for.
    """
    size = apple_working_set(memory)
    return metal_limit({"max_recommended_working_set_size": size, "memory_size": memory}, wanted)


def apple_budget(memory: int) -> int:
    """The largest budget, in whole GB, that a Mac with `memory` bytes can hold."""
    return apple_limit(memory).nbytes // 10**9 * 10**9


def apple_working_set(memory: int) -> int:
    """Estimate the working set that macOS recommends for a Mac with `memory` bytes.

    It is two thirds below 36 GB and three quarters from there on. Values reported up to macOS 14
    agree (10.67 GiB of 16, 72 of 96, 96 of 128); macOS 26 recommends more (107.5 GiB of 128).
    """
    return memory * 2 // 3 if memory < 36 * 10**9 else memory * 3 // 4


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, in bytes, as the system estimates it.

    On macOS this counts free pages, pages of files, and pages that programs allow it to purge. It
    does not count "inactive" pages (`psutil` does): the anonymous ones among them would have to be
    compressed or swapped.
    """
    if sys.platform == "darwin":
        pages = _vm_stat()
        free = sum(pages.get(k, 0) for k in ("Pages free", "File-backed pages", "Pages purgeable"))
        return min(free * PAGE_BYTES or total_memory_bytes() // 2, total_memory_bytes())
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, total_memory_bytes())
    except OSError:
        pass
    return total_memory_bytes() // 2


def memory_reserve() -> int:
    """Memory that should stay available for other programs, in bytes: a twentieth, 4 GB at most."""
    return min(4 << 30, total_memory_bytes() // 20)


def memory_pressure(root: Path = Path("/")) -> int:
    """How short of memory the system is: 0 not at all, 1 short, 2 critically.

    macOS says so itself (kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical).
    On Linux memory is short while less than `memory_reserve` is available or programs stood still
    for memory a tenth of the last ten seconds (PSI), critically if less than half of that is left.

    Args:
        root: where `/proc` is.
    """
    if sys.platform == "darwin":
        return {2: 1, 4: 2}.get(_sysctl_number(b"kern.memorystatus_vm_pressure_level"), 0)
    available, reserve = available_memory_bytes(), memory_reserve()
    if available < reserve:
        return 2 if available < reserve // 2 else 1
    with suppress(OSError, ValueError):  # a kernel without PSI, or with it switched off
        some = (root / "proc/pressure/memory").read_text().split(maxsplit=2)[1]
        return int(float(some.removeprefix("avg10=")) >= _STALLED_PERCENT)
    return 0


def _sysctl_number(name: bytes) -> int:
    """A 32-bit number of macOS's `sysctlbyname`; 0 if it does not have it."""
    value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value


def device_memory_bytes(held: int = 0) -> int:
    """Memory that MLX's default device can use, in bytes.

    This is the recommended working set on Metal (`iogpu.wired_limit_mb` raises it), the device's
    own memory on other GPUs, and the system's available memory on the CPU.

    Args:
        held: bytes that this process holds already; they are added to what the system has
            available.
    """
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            value = info.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return min(available_memory_bytes() + held, total_memory_bytes())


def processor_name() -> str:
    """The processor's name; empty if the system does not tell it."""
    if sys.platform == "darwin":
        return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string").strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def free_disk_bytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def resident_bytes() -> int:
    """This process's resident memory (RSS) in bytes; macOS omits memory that only the GPU maps."""
    if sys.platform == "darwin":
        return int(_output("/bin/ps", "-o", "rss=", "-p", str(os.getpid())) or 0) * 1024
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _vm_stat() -> dict[str, int]:
    """Page counts by kind from macOS's `vm_stat`."""
    pages = {}
    for line in _output("/usr/bin/vm_stat").splitlines():
        name, _, count = line.partition(":")
        if count.strip().rstrip(".").isdigit():
            pages[name] = int(count.strip().rstrip("."))
    return pages


def _output(*command: str) -> str:
    """Output of a system program; empty if it fails.

    With a full path and `close_fds=False` Python spawns it. A fork would copy the page tables of a
    process that holds a model.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, close_fds=False
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def raise_thread_priority() -> bool:
    """Let the calling thread work at the pace of work that a user waits for; False if it cannot.

    macOS runs threads of a background job on its slow cores and throttles their reads. Elsewhere
    threads inherit what their process was given, and nothing is changed.
    """
    if sys.platform != "darwin":
        return False
    with suppress(AttributeError, OSError):
        return bool(ctypes.CDLL(None).pthread_set_qos_class_self_np(_QOS_USER_INITIATED, 0) == 0)
    return False


def power_is_scarce() -> bool:
    """Does a Mac run on its battery, or hold its clocks down because of heat? False elsewhere."""
    if sys.platform != "darwin":
        return False
    if "'Battery Power'" in _output("/usr/bin/pmset", "-g", "batt").partition("\n")[0]:
        return True
    with suppress(AttributeError, OSError):
        return _own_thermal_pressure()() > 0
    return False


def thermal_pressure(system: Any) -> Callable[[], int]:
    """A reader of macOS's thermal pressure; needs no rights (OSThermalNotification.h).

    Args:
        system: the C library.

    Returns:
        A function that returns 0 while clocks are not held down, and 1 to 4 as it gets hotter.

    Raises:
        OSError: macOS does not say; the function raises it too.
    """
    token, level = ctypes.c_int(), ctypes.c_uint64()

    def read() -> int:
        if system.notify_get_state(token, ctypes.byref(level)):
            raise OSError("macOS does not say")
        return level.value

    name = b"com.apple.system.thermalpressurelevel"
    if system.notify_register_check(name, ctypes.byref(token)):
        raise OSError("macOS does not say")
    read()
    return read


@functools.cache
def _own_thermal_pressure() -> Callable[[], int]:
    return thermal_pressure(ctypes.CDLL(None))


def usable_cores() -> int:
    """Number of processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
