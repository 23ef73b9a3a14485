"""The wheel and the source archive, each in an environment of its own that has nothing else: it serves, and has what it needs.

Offline, from the pinned wheels; neither the checkout nor this environment can be seen from there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.e2e.house import House
from tests.packaging.conftest import need_its_python
from tools.distribution import environment
from tools.distribution.build_wheel import ROOT, build

pytestmark = pytest.mark.slow

ASK = """
import sys
assert not any("{checkout}" in path for path in sys.path), sys.path
import numpy as np
from appliance.client import Client
print(Client(sys.argv[1]).infer("digits", {"image": np.zeros((1, 28, 28, 1), np.float32)}).outputs["scores"].shape)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both archives, by kind."""
    need_its_python()
    archives = build(tmp_path_factory.mktemp("dist"))
    return {"sdist" if path.name.endswith(".tar.gz") else "wheel": path for path in archives}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_handed_out_serves_from_an_empty_environment(
    kind: str, made: dict[str, Path], wheelhouse: Path, tmp_path: Path
) -> None:
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", str(place)], check=True)
    python, pip = place / "bin/python", environment.pip_wheel(wheelhouse)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    options = ["--no-index", "--find-links", str(wheelhouse), "--no-cache-dir", "--no-compile", "--quiet"]
    install = [str(python), f"{pip}/pip", "install", "--disable-pip-version-check", *options, f"{made[kind]}[cpu]"]
    done = subprocess.run(install, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    share = place / "share/appliance"
    for folder in ("models", "systemd"):
        wanted = {
            path.relative_to(ROOT / folder)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and not {".engines", ".recorder", "__pycache__"} & set(path.parts)
        }
        assert {path.relative_to(share / folder) for path in (share / folder).rglob("*") if path.is_file()} == wanted
    assert (share / "appliance.toml").is_file()

    house = House(tmp_path / "house")
    house.command, house.cwd = [str(place / "bin/appliance")], tmp_path
    house.settings["repository"]["path"] = str(share / "models")
    house.start()
    try:
        sample = share / "models/digits/samples/3.png"
        told = [*house.command, "infer", "digits", str(sample), "--json", "--url", house.http]
        answer = subprocess.run(told, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout
        assert ':3:3"' in answer
        code = ASK.replace("{checkout}", str(ROOT))
        asked = subprocess.run(
            [str(python), "-c", code, house.ipc], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
        )
        assert asked.stdout.strip() == "(1, 10)"
        for address, contains in (("/", b"<html"), ("/page/app.js", b"import"), ("/page/text/zh.json", b"{")):
            with urllib.request.urlopen(house.http + address) as page:
                assert contains in page.read(), address
        with urllib.request.urlopen(house.http + "/page/plotly.js") as page:
            assert len(page.read()) > 1 << 20
    finally:
        house.finish()


def test_the_archives_have_no_more_than_they_should(made: dict[str, Path]) -> None:
    with zipfile.ZipFile(made["wheel"]) as wheel:
        names = wheel.namelist()
    with tarfile.open(made["sdist"]) as sdist:
        names += [name.partition("/")[2] for name in sdist.getnames()]
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name or name.startswith("tests")]
