"""What a full disk looks like, and what to say about it: a server that dies of one gives a bare exit code."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MIB: Final = 2**20
# less than this free: whoever died there could not write, and perhaps not even say so in its log
EXHAUSTED_BYTES: Final = 2 * MIB
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# as the C library, Java, SQLite and H2 say it
_NO_SPACE: Final = ("No space left on device", "Disk quota exceeded", "database or disk is full", "not enough space")
_TOO_LARGE: Final = "File too large"
ADVICE: Final = "Free some space there, or use another folder; what was acknowledged is kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that holds `folder`. `free_bytes`: what others than root may use. `free_files` None: no limit on them."""

    folder: Path
    mount_point: Path
    free_bytes: int
    total_bytes: int
    free_files: int | None

    def __str__(self) -> str:
        """Return how full it is, for people."""
        files = ", and no file can be added to it" if self.free_files == 0 else ""
        return f"the disk mounted at {self.mount_point} has {human(self.free_bytes)} of {human(self.total_bytes)} free{files}"

    @property
    def is_exhausted(self) -> bool:
        """Whether next to nothing can be written."""
        return self.free_bytes < EXHAUSTED_BYTES or self.free_files == 0


def disk_of(folder: Path) -> Disk:
    """Return the disk that holds `folder`, or will hold it once it is made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    device = place.stat().st_dev
    mount = place.resolve()
    while mount.parent != mount and mount.parent.stat().st_dev == device:
        mount = mount.parent
    found = os.statvfs(place)
    return Disk(
        folder=folder,
        mount_point=mount,
        free_bytes=found.f_bavail * found.f_frsize,
        total_bytes=found.f_blocks * found.f_frsize,
        free_files=found.f_favail if found.f_files else None,
    )


def shortage(needs: dict[Path, int], what: str) -> str | None:
    """Return a sentence when the folders' disks have less free than `needs`, in bytes by folder, adds up to on one of them."""
    by_mount: dict[Path, tuple[Disk, int]] = {}
    for folder, needed in needs.items():
        disk = disk_of(folder)
        _, before = by_mount.get(disk.mount_point, (disk, 0))
        by_mount[disk.mount_point] = (disk, before + needed)
    for disk, needed in by_mount.values():
        if disk.free_bytes < needed or disk.free_files == 0:
            return f"{what} needs {human(needed)} in {disk.folder}, but {disk}. {ADVICE}."
    return None


def explain(name: str, folder: Path, log: str) -> str | None:
    """Return why the server `name` ended, when its `log` or the disk of its `folder` says it was for want of space; else None."""
    disk = disk_of(folder)
    if any(phrase in log for phrase in _NO_SPACE):
        return f"{name} ended because it could not write in {folder}: {disk}. {ADVICE}."
    if disk.is_exhausted:  # its log is on the same disk
        return f"{name} ended, and nothing can be written in {folder}: {disk}. {ADVICE}."
    if _TOO_LARGE in log:
        return (
            f"{name} ended because it could not write in {folder}: a file reached the size that this system allows it (ulimit -f), "
            f"although {disk}. Raise the limit, or use another folder; what was acknowledged is kept."
        )
    return None


def human(count: int) -> str:
    """Return a number of bytes for people: `812 KiB`, `1.5 MiB`, `79 GiB`."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}" if value < 10 and unit != "bytes" else f"{value:.0f} {unit}"
