"""Disks: room where we write, traffic, and wear. A file system that does not answer hangs: a sampler of its own in a `lane.Lane`.

Wear of an NVMe drive is asked of the drive itself (SMART log page), which takes permission on /dev/nvme*; eMMC says it in sysfs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from appliance.core import quantities as q
from appliance.core.readings import Finding, Part, Reading, Severity, measured, missing
from appliance.sensors.base import Every, UnreadableError, names_in, read_text, why

_DRIVE = re.compile(r"^(nvme\d+n\d+|sd[a-z]+|mmcblk\d+|vd[a-z]+)$")
_ADMIN_COMMAND = 0xC0484E41  # NVME_IOCTL_ADMIN_CMD, linux/nvme_ioctl.h
_LOG_BYTES = 512
_WORN = 90.0


class _Passthru(ctypes.Structure):
    """`struct nvme_passthru_cmd` of linux/nvme_ioctl.h."""

    _fields_ = (
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12_15", ctypes.c_uint32 * 4),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    )


def smart_log(device: Path) -> bytes:
    """The SMART / health page of an NVMe drive: 512 bytes (NVM Express base specification, log page 02h). OSError."""
    page = ctypes.create_string_buffer(_LOG_BYTES)
    command = _Passthru(opcode=0x02, nsid=0xFFFFFFFF, addr=ctypes.addressof(page), data_len=_LOG_BYTES)
    command.cdw10 = (_LOG_BYTES // 4 - 1) << 16 | 0x02
    command.timeout_ms = 1000
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = fcntl.ioctl(descriptor, _ADMIN_COMMAND, command)
    finally:
        os.close(descriptor)
    if status:
        raise OSError(5, f"the drive answered with status {status:#x}")
    return page.raw


class StorageSampler:
    """`folders`: name -> a folder that we write in."""

    name = "storage"

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        root: Path = Path("/"),
        read_smart: Callable[[Path], bytes] = smart_log,
        period_s: float = 10.0,
        wear_period_s: float = 3600.0,
    ) -> None:
        self._folders = dict(folders)
        self._root = root
        self._read_smart = read_smart
        self.period_s = period_s
        self._period, self._wear_period = Every(period_s), Every(wear_period_s)
        self._readings: dict[str, Reading] = {}
        self._findings: tuple[Finding, ...] = ()
        self._asked: list[str] = []

    def sample(self, now_s: float) -> Part:
        """Room and traffic every few seconds, wear every hour, and when a drive comes or goes."""
        if self._period.due(now_s):
            for name, folder in self._folders.items():
                self._room(name, folder, now_s)
            self._traffic(now_s)
            if self._wear_period.due(now_s) or self._drives() != self._asked:
                self._wear(now_s)
        return Part(dict(self._readings), findings=self._findings)

    def close(self) -> None:
        """Nothing is held."""

    def _room(self, name: str, folder: Path, now_s: float) -> None:
        free, total = q.DISK_FREE.name(name), q.DISK_TOTAL.name(name)
        try:
            found = os.statvfs(folder)
        except OSError as error:
            self._readings[free] = missing(q.DISK_FREE, why(error), now_s)
            self._readings[total] = missing(q.DISK_TOTAL, why(error), now_s)
            return
        self._readings[free] = measured(q.DISK_FREE, found.f_bavail * found.f_frsize, now_s)
        self._readings[total] = measured(q.DISK_TOTAL, found.f_blocks * found.f_frsize, now_s)

    def _traffic(self, now_s: float) -> None:
        try:
            lines = read_text(self._root / "proc/diskstats").splitlines()
        except UnreadableError:
            lines = []
        self._forget(q.DISK_READ, q.DISK_WRITTEN)
        for line in lines:
            words = line.split()
            if len(words) < 10 or not _DRIVE.match(words[2]) or not (words[5] + words[9]).isdecimal():
                continue
            for quantity, sectors in ((q.DISK_READ, words[5]), (q.DISK_WRITTEN, words[9])):
                self._readings[quantity.name(words[2])] = measured(quantity, int(sectors) * 512, now_s)

    def _wear(self, now_s: float) -> None:
        worn = []
        self._forget(q.DISK_WEAR)
        self._asked = self._drives()
        for drive in self._asked:
            reading = self._wear_of(drive, now_s)
            self._readings[q.DISK_WEAR.name(drive)] = reading
            if reading.value is not None and reading.value >= _WORN:
                message = f"{drive} has used {reading.value:.0f} % of its rated life"
                action = "Replace the drive at the next chance."
                worn.append(Finding("drive-worn", Severity.WARNING, f"drive.{drive}", message, action))
        self._findings = tuple(worn)

    def _drives(self) -> list[str]:
        return [name for name in names_in(self._root / "sys/block") if _DRIVE.match(name)]

    def _forget(self, *quantities: q.Quantity) -> None:
        """A drive may have been taken out: what is read anew is all that there is."""
        for name in [name for name in self._readings if (found := q.quantity_of(name)) and found[0] in quantities]:
            del self._readings[name]

    def _wear_of(self, drive: str, now_s: float) -> Reading:
        if drive.startswith("nvme"):
            device = self._root / "dev" / drive.rpartition("n")[0]
            try:
                return measured(q.DISK_WEAR, self._read_smart(device)[5], now_s)
            except OSError as error:
                return missing(q.DISK_WEAR, f"{why(error)} (reading /dev/{device.name} takes CAP_SYS_ADMIN)", now_s)
            except IndexError:
                return missing(q.DISK_WEAR, "the drive's health page is too short", now_s)
        if drive.startswith("mmcblk"):
            return self._emmc(drive, now_s)
        return missing(q.DISK_WEAR, "this kind of drive says it to its own tools only", now_s)

    def _emmc(self, drive: str, now_s: float) -> Reading:
        """The worse of two estimates in tenths: 0x01 is 0 to 10 %, 0x0b is beyond (JEDEC eMMC 5.0)."""
        try:
            tenths = [int(word, 16) for word in read_text(self._root / f"sys/block/{drive}/device/life_time").split()]
        except (UnreadableError, ValueError) as error:
            return missing(q.DISK_WEAR, str(error), now_s)
        if not tenths or not 1 <= max(tenths) <= 11:
            return missing(q.DISK_WEAR, "the drive does not say", now_s)
        return measured(q.DISK_WEAR, max(tenths) * 10, now_s)
