"""How much memory and disk a run may use, by default what the machine has less some head-room."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from billhook.orchestrator.paths import user_path

RAM_SHARE = 0.85
"""Share of the machine's memory, or of its cgroup's limit, that a run may use where it is told nothing."""

VRAM_SHARE = 0.9

DISK_RESERVE_BYTES = 256 << 20
"""Left free on the output's disk."""


@dataclass(frozen=True)
class Budgets:
    """Limits in bytes that hold for all of a run; ``ram`` and ``disk`` per node, ``vram`` per worker."""

    vram: int | None
    """None on a CPU where none was asked for: the device's memory is RAM, and only ``ram`` limits it."""
    ram: int
    disk: int | None
    """None where there is no output yet whose disk could be asked."""
    output_disk: int | None = None
    """Of it, for the output alone; None where scratch files are on the same disk."""
    scratch_disk: int | None = None
    """The same for scratch files."""


def resolve_budgets(
    vram: int | None, ram: int | None, disk: int | None, device: str, output: Path | None, scratch: str | None = None
) -> Budgets:
    """Fill in what was not given from the machine: its GPU, its memory, the disks of ``output`` and ``scratch``.

    No more of a disk is planned with than is free on it, whatever was given.
    """
    if vram is None and device == "cuda":
        vram = int(VRAM_SHARE * torch.cuda.get_device_properties(0).total_memory)
    ram = int(RAM_SHARE * machine_ram_bytes()) if ram is None else ram
    if output is None:
        return Budgets(vram, ram, disk)
    room = max(0, free_disk_bytes(output) + _size_of(output) - DISK_RESERVE_BYTES)
    if scratch is None or _disk_of(user_path(scratch)) == _disk_of(output):
        return Budgets(vram, ram, room if disk is None else min(disk, room))
    apart = max(0, free_disk_bytes(user_path(scratch)) - DISK_RESERVE_BYTES)
    return Budgets(vram, ram, room + apart if disk is None else min(disk, room + apart), room, apart)


def machine_ram_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process's machine or container has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """Return the memory limits of this process's control groups and of those above them, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may name a group that only the host sees; the container's own is the base.
        for folder in [group, *(each for each in group.parents if each.is_relative_to(base))]:
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return limits


def free_disk_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder that may not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def _disk_of(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size_of(folder: Path) -> int:
    """Return what a folder's files take on the disk."""
    if not folder.is_dir():
        return 0
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
