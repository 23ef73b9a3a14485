"""What NVIDIA's XID numbers mean for this box: whose fault it is, and what the operator does. A table, no code that acts.

Source: NVIDIA, "XID Errors" and the "Xid Catalog" (https://docs.nvidia.com/deploy/xid-errors/), for Ampere and newer; its buckets
are RESTART_APP, RESET_GPU, RESTART_BM (reboot) and hardware. Numbers that are not here are reported with a general advice.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from appliance.core.readings import Severity


class Remedy(StrEnum):
    """What an XID calls for. APPLICATION: the process that ran ends, the GPU stays good."""

    NONE = "none"
    APPLICATION = "application"
    RESET = "reset"
    REBOOT = "reboot"
    HARDWARE = "hardware"


ACTIONS = {
    Remedy.NONE: "Nothing to do; watch whether it grows.",
    Remedy.APPLICATION: "The worker is replaced by itself. If it comes back, suspect the model or the driver.",
    Remedy.RESET: "Stop the appliance, run `nvidia-smi --gpu-reset`, and start it again; if that is refused, reboot.",
    Remedy.REBOOT: "Reboot the box. If it comes back, check the card's seat, its power cables and the power supply.",
    Remedy.HARDWARE: "Reset the GPU or reboot; if it comes back, have the GPU checked and replaced.",
}

SEVERITIES = {
    Remedy.NONE: Severity.INFO,
    Remedy.APPLICATION: Severity.WARNING,
    Remedy.RESET: Severity.CRITICAL,
    Remedy.REBOOT: Severity.CRITICAL,
    Remedy.HARDWARE: Severity.CRITICAL,
}


class Xid(msgspec.Struct, frozen=True):
    """One row: the number, what it means, and what it calls for."""

    number: int
    meaning: str
    remedy: Remedy

    @property
    def action(self) -> str:
        """What the operator does."""
        return ACTIONS[self.remedy]


_ROWS = (
    (8, "the GPU stopped processing", Remedy.APPLICATION),
    (11, "damaged commands were sent to the GPU", Remedy.APPLICATION),
    (13, "a kernel failed: bad address or instruction", Remedy.APPLICATION),
    (31, "a kernel read or wrote memory that is not its own", Remedy.APPLICATION),
    (32, "damaged commands were sent to the GPU (PCIe or driver)", Remedy.APPLICATION),
    (38, "the driver's firmware failed", Remedy.RESET),
    (43, "a process' work on the GPU was ended after an error of its own", Remedy.APPLICATION),
    (45, "work on the GPU was removed because its process ended", Remedy.APPLICATION),
    (46, "the GPU stopped processing and needs a reset", Remedy.RESET),
    (48, "an uncorrectable memory error", Remedy.RESET),
    (61, "the GPU's internal controller stopped (breakpoint or warning)", Remedy.RESET),
    (62, "the GPU's internal controller halted", Remedy.RESET),
    (63, "a damaged memory row is set aside and is replaced at the next reset", Remedy.NONE),
    (64, "a damaged memory row could not be set aside", Remedy.HARDWARE),
    (68, "the video decoder failed", Remedy.APPLICATION),
    (69, "the graphics engine failed", Remedy.APPLICATION),
    (74, "an NVLink failed", Remedy.HARDWARE),
    (79, "the GPU has fallen off the bus", Remedy.REBOOT),
    (92, "many corrected memory errors", Remedy.NONE),
    (94, "an uncorrectable memory error, contained to one process", Remedy.APPLICATION),
    (95, "an uncorrectable memory error that was not contained", Remedy.RESET),
    (109, "switching between processes on the GPU took too long", Remedy.RESET),
    (110, "a security fault", Remedy.HARDWARE),
    (119, "the GPU's system processor (GSP) did not answer in time", Remedy.RESET),
    (120, "the GPU's system processor (GSP) failed", Remedy.RESET),
    (140, "uncorrected memory errors that the GPU cannot recover from", Remedy.RESET),
    (143, "the GPU could not be initialized", Remedy.RESET),
    (154, "the recovery that the driver asks for has changed", Remedy.NONE),
)
XIDS = {number: Xid(number, meaning, remedy) for number, meaning, remedy in _ROWS}


def xid(number: int) -> Xid:
    """The row of that number; an unknown one is taken for an application's fault, which costs one worker."""
    return XIDS.get(number) or Xid(number, "an error that is not in the table", Remedy.APPLICATION)
