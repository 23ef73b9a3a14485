"""The life of the package on a machine: installed, upgraded under load, downgraded, removed, installed again, purged."""

from __future__ import annotations

import pytest

from tests.packaging.installed import InstalledBox

pytestmark = pytest.mark.slow


def test_it_is_installed_and_one_command_starts_it(installed: InstalledBox) -> None:
    assert installed.show("ActiveState") == "inactive"
    assert installed.show("UnitFileState") == "disabled"
    installed.run("systemctl", "enable", "--now", "appliance")
    assert installed.show("ActiveState") == "active"
    assert installed.show("StatusText").startswith("1 model ready")
