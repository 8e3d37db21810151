"""Every difference between operating systems, behind plain functions.

Nothing else in the package asks which system it runs on. macOS branches follow the documented
behaviour of `fcntl(F_NOCACHE)` and `sysctl`; they are exercised by the test-suite where it runs.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

PAGE_BYTES = mmap.PAGESIZE
"""Size of a virtual-memory page: 4 KiB on most Linux machines, 16 KiB on Apple silicon."""

_MAX_BUFFERS_PER_READ = 512  # IOV_MAX is 1024 on Linux and macOS
_F_NOCACHE = 48  # <sys/fcntl.h> on macOS
_OPEN_MAX = 10_240  # <sys/syslimits.h> on macOS
_NUMBERING_ANEW = {"9p", "afs", "cifs", "smb3", "virtiofs"}  # and all of FUSE
METAL_SHARE = 0.95
"""Above this share of the recommended working set MLX gives up its freed buffers each time."""
_LEAST_FOR_SYSTEM, _MOST_FOR_SYSTEM = 2 << 30, 8 << 30  # left to macOS beside a GPU's memory


def open_direct(path: Path) -> tuple[int, int]:
    """Open `path` so that reads bypass the page cache.

    Returns:
        The file descriptor, and the alignment in bytes that offset, length and memory address
        must have. macOS takes any, and copies what is unaligned through its page cache, without
        reading ahead: there it is a page.

    Raises:
        OSError: the system or the file system has no way to bypass the page cache.
    """
    if sys.platform == "darwin":
        import fcntl

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


def try_lock(path: Path, create: bool = True) -> int | None:
    """Take the lock that `path` stands for; the system drops it when its process ends or is killed.

    Args:
        path: a file, of which only the lock matters.
        create: make it where there is none; else it is not written to either.

    Returns:
        A descriptor that holds the lock until it is closed; None where somebody else holds it,
        another descriptor of this process included.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_buffered(path: Path) -> int:
    """Open `path` for scattered reads through the page cache; returns the descriptor.

    Linux would read ahead of each: 8 MB of it on one machine doubled the bytes read.
    """
    fd = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def read_into(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """One scatter read at `offset`; returns the bytes read, which may be fewer than asked for."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers[:_MAX_BUFFERS_PER_READ], offset)
    data = os.pread(fd, len(buffers[0]), offset)  # macOS before 11
    buffers[0][: len(data)] = data
    return len(data)


def address_space_left() -> int | None:
    """Bytes that this process may still map (`ulimit -v`); None where nothing limits that."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    except OSError:  # macOS has the limit and does not heed it
        return None


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    try:
        return len(os.listdir("/dev/fd")) - 1  # one lists them
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise


def allow_descriptors(wanted: int) -> int:
    """Raise the number of descriptors that this process may have open, as far as that is needed.

    macOS starts with 256, and refuses limits above its OPEN_MAX.

    Returns:
        The number in force: at least `wanted`, unless the system does not allow as many.
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
    """What tells a file from another one that is put in its place: numbers, for `same_file`.

    Raises:
        OSError: there is none.
    """
    found = os.stat(file)
    number = int(content_sample(file), 16)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, number


def same_file(mark: tuple[int, ...], fd: int, path: Path) -> bool:
    """Is the file that was opened the one that was marked?

    Its size and time of change must be the same, which those of a copy may be too. So must be its
    number on the device; where that may have changed, samples of its content instead.

    Args:
        mark: of `file_mark`.
        fd: the open file.
        path: its path.

    Raises:
        OSError: it cannot be read.
    """
    device, number, *rest, sample = mark
    found = os.fstat(fd)
    if [found.st_size, found.st_mtime_ns] != rest:
        return False
    if found.st_dev == device and not _numbers_anew(device):
        return found.st_ino == number
    with path.open("rb") as again:  # `fd` may read aligned blocks only
        if not os.path.samestat(os.fstat(again.fileno()), found):
            return False
    return int(content_sample(path), 16) == sample


def content_sample(file: Path) -> str:
    """A digest of a file's first 64 KiB (a shard's header, or most of it), middle and end.

    Two fine-tunes of one model have the same sizes and headers. Their weights differ everywhere.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        for offset, nbytes in ((0, 64 << 10), (size // 2, 4096), (max(0, size - 4096), 4096)):
            digest.update(os.pread(f.fileno(), nbytes, offset))
    return digest.hexdigest()[:16]


def _numbers_anew(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """May the file system of `device` give a file another number while it is mounted?"""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            kind = after.split()[0]
            return kind.startswith("fuse") or kind in _NUMBERING_ANEW
    return False


def drop_page_cache(path: Path) -> bool:
    """Ask the system to forget `path`'s cached pages (for cold measurements). False if it can't."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return True


def total_memory_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine, or of the container that limits this process, in bytes.

    Args:
        root: where `/proc` and `/sys` are.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's own control group and of those around it, in bytes."""
    limits = []
    for group, names in _cgroups(root):
        for name in names:
            try:
                limits.append(int((group / name).read_text()))
            except (OSError, ValueError):  # a group without this limit, or "max"
                continue
    return limits


def _cgroups(root: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Each memory control group that this process is in, and the names of its limits' files."""
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
        # Above memory.high the system takes memory back as fast as it is used.
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
    """What operations hold that a GPU was given but has not finished, at most, in bytes.

    MLX hands operations over in groups, whose memory is kept until the whole group has ended. A
    group is full when its inputs have so many Mi items (backend/cuda/device.cpp and
    backend/metal/device.cpp, by architecture; `MLX_MAX_MB_PER_BUFFER` overrides). On an H200 a
    prompt's pass was seen to take 2.4 GB more than its operations need one after the other.

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
    return int(1.25 * (items << 20) * item_bytes)  # a group ends after the operation that fills it


def on_metal() -> bool:
    """Is MLX's default device a GPU of Apple's?"""
    return mx.default_device() == mx.gpu and mx.metal.is_available()


def working_set_bytes() -> int:
    """What Metal recommends to keep resident, in bytes; 0 on other devices."""
    return int(mx.device_info().get("max_recommended_working_set_size", 0))


@dataclass(frozen=True)
class DeviceLimit:
    """The most memory that a device can hold, and what can be done where that is too little.

    Attributes:
        nbytes: the limit.
        why: what sets it; one sentence without an end.
        command: raises it so far that the wanted memory fits; None where nothing does.
    """

    nbytes: int
    why: str
    command: str | None = None


def device_limit(wanted: int = 0) -> DeviceLimit:
    """The most memory that MLX's default device can hold.

    On Metal a share of the recommended working set, on CUDA the device's own memory, on the CPU the
    machine's or that of the container that limits this process.

    Args:
        wanted: bytes that `DeviceLimit.command` is to make room for.
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
        info: what `mx.device_info()` says: `max_recommended_working_set_size` and `memory_size`.
        wanted: bytes that `DeviceLimit.command` is to make room for.
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
    """`device_limit` of a Mac that is known by its memory alone: estimated.

    Args:
        memory: all of the machine's, in bytes.
        wanted: bytes that `DeviceLimit.command` is to make room for.
    """
    size = apple_working_set(memory)
    return metal_limit({"max_recommended_working_set_size": size, "memory_size": memory}, wanted)


def apple_working_set(memory: int) -> int:
    """What macOS recommends for the GPU of a Mac with `memory` bytes: a formula.

    Two thirds below 36 GB, three quarters from there on. Values reported up to macOS 14 agree
    (10.67 GiB of 16, 72 of 96, 96 of 128); macOS 26 recommends more (107.5 GiB of 128).
    """
    return memory * 2 // 3 if memory < 36 * 10**9 else memory * 3 // 4


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, in bytes (an estimate of the system's).

    On macOS free pages, pages of files, and what programs allow it to purge; "inactive" pages are
    no measure, for anonymous ones among them have to be compressed or swapped.
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


def device_memory_bytes(held: int = 0) -> int:
    """Memory that MLX's default device can use, in bytes.

    On Metal the recommended working set (`iogpu.wired_limit_mb` raises it), on other GPUs the
    device's own memory, on the CPU what the system has available.

    Args:
        held: what this process has taken of it already; it counts where the system no longer
            has it available.
    """
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            value = info.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return min(available_memory_bytes() + held, total_memory_bytes())


def processor_name() -> str:
    """What the processor calls itself; empty where the system does not say."""
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
    """This process's resident memory (RSS), in bytes; macOS leaves out what only the GPU maps."""
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
    """What a program of the system prints; empty where it fails.

    With a full path and descriptors left alone Python spawns it: a fork would copy the page tables
    of a process that holds a model.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, close_fds=False
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _import_mlx_lm() -> None:
    """Import mlx-lm, which meanwhile sets the limit of open files to 2048, and the most to 4096.

    That fails where less is allowed, and takes from a process what it may have above it.
    """
    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.utils  # noqa: F401
    finally:
        resource.setrlimit = original
    allow_descriptors(2048)


_import_mlx_lm()
