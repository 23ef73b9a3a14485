"""A box with a GPU whose device nodes come late, or never: it waits, it says so, and it does not quietly use the processor.

The GPU is a folder that looks like its entry in /sys; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.box import Box
from tests.systemd.test_life import ask

pytestmark = [pytest.mark.slow]

GPU = """
[Service]
Environment=APPLIANCE_SYS=/run/fake/sys APPLIANCE_DEV=/run/fake/dev
"""
PLUG_IN = """
mkdir -p /run/fake/sys/bus/pci/devices/0000:01:00.0 /run/fake/dev
echo 0x10de > /run/fake/sys/bus/pci/devices/0000:01:00.0/vendor
echo 0x030000 > /run/fake/sys/bus/pci/devices/0000:01:00.0/class
"""
NODES = "touch /run/fake/dev/nvidiactl /run/fake/dev/nvidia0 /run/fake/dev/nvidia-uvm"
LIMIT_1_S = "ExecStart=\nExecStart=/usr/lib/appliance/libexec/wait-for-gpu 1\n"
UNIT = "appliance-gpu.service"


@pytest.fixture
def gpu(box: Box) -> Box:
    """A box with such a GPU and no nodes, and a model that wants it."""
    box.run("sh", "-c", PLUG_IN)
    box.dropin(GPU, UNIT)
    box.run("sh", "-c", "cp -r /mnt/models/digits /var/lib/appliance/models/")
    box.run("sh", "-c", "cd /var/lib/appliance/models/digits && sed -i '1i device = \"cuda\"' model.toml")
    box.run("chmod", "-R", "a+rX", "/var/lib/appliance/models/digits")
    box.run("systemctl", "stop", UNIT)
    return box


@pytest.fixture(autouse=True)
def unplugged(machine: Box) -> Iterator[None]:
    """Afterwards there is no GPU any more."""
    yield
    machine.run("sh", "-c", f"rm -rf /run/fake /etc/systemd/system/{UNIT}.d")
    machine.run("systemctl", "stop", UNIT)


def test_it_starts_when_the_nodes_are_there_and_not_before(gpu: Box) -> None:
    gpu.run("systemctl", "start", "--no-block", "appliance.service")
    gpu.wait_until("ActiveState", "activating", UNIT)
    assert gpu.show("ActiveState") == "inactive"
    assert gpu.show("MainPID") == "0"
    gpu.run("sh", "-c", NODES)
    gpu.wait_until("ActiveState", "active", UNIT)
    gpu.wait_until("ActiveState", "active")


def test_without_nodes_it_serves_the_others_and_the_models_that_want_the_gpu_fail_aloud(gpu: Box) -> None:
    gpu.dropin(GPU + LIMIT_1_S, UNIT)
    gpu.run("systemctl", "start", "appliance.service")
    assert gpu.show("Result", UNIT) == "exit-code"
    said = gpu.run("journalctl", "-o", "cat", "--no-pager", "-u", UNIT).stdout
    assert "an NVIDIA GPU is in this box, but after 1 s there is no /dev" in said.replace("/run/fake/dev", "/dev")
    assert ask(gpu).startswith("200")
    assert "1 failed" in gpu.show("StatusText")
    failed = gpu.journal("MODEL=digits", "STATE=FAILED", f"_PID={gpu.show('MainPID')}")
    assert "CUDA" in failed[-1]["REASON"]
    assert gpu.cli("check", check=False).returncode != 0


def test_where_every_model_needs_it_nothing_starts_without_it(gpu: Box) -> None:
    gpu.dropin(GPU + LIMIT_1_S, UNIT)
    folder = "/etc/systemd/system/appliance.service.d"
    gpu.run("sh", "-c", f"mkdir -p {folder} && cp /mnt/systemd/dropins/require-gpu.conf {folder}/")
    gpu.run("systemctl", "daemon-reload")
    assert gpu.run("systemctl", "start", "appliance.service", check=False).returncode != 0
    assert gpu.show("ActiveState") == "inactive"
    assert gpu.show("ActiveState", UNIT) == "failed"


def test_a_box_without_a_gpu_does_not_wait(box: Box) -> None:
    box.dropin("[Service]\nEnvironment=APPLIANCE_SYS=/run/none APPLIANCE_DEV=/run/none\n", UNIT)
    box.run("systemctl", "restart", UNIT)
    assert box.show("ActiveState", UNIT) == "active"
    assert box.show("Result", UNIT) == "success"
