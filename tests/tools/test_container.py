"""The container recipe and the KServe manifest, as far as they can be held against something without an engine or a cluster.

Every instruction is one that the engines know, what is taken into the image is what `make deb` makes, and every argument is one
that this appliance accepts. The manifest has only fields of KServe's and Kubernetes' published types.
"""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from appliance import config
from appliance.cli.main import app
from appliance.transports.http import application
from tools.distribution.build_deb import ARCHITECTURE, PACKAGE, debian_version
from tools.distribution.build_wheel import ROOT
from tools.distribution.environment import TARGETS

FOLDER = ROOT / "tools/distribution/container"
INSTRUCTIONS = {
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN"),
    *("SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}

FIELDS: dict[str, dict[str, Any]] = {
    # KServe 0.21, Python package kserve, models/v1alpha1_serving_runtime*.py; those that are used, with what they hold
    "ServingRuntime": {"apiVersion": str, "kind": str, "metadata": "Metadata", "spec": "Spec"},
    "Spec": {
        "annotations": {str: str},
        "supportedModelFormats": ["Format"],
        "protocolVersions": [str],
        "multiModel": bool,
        "containers": ["Container"],
    },
    "Format": {"name": str, "version": str, "autoSelect": bool, "priority": int},
    # Kubernetes core/v1, the same way
    "Metadata": {"name": str},
    "Container": {
        "name": str,
        "image": str,
        "args": [str],
        "ports": ["Port"],
        "startupProbe": "Probe",
        "readinessProbe": "Probe",
        "livenessProbe": "Probe",
        "securityContext": "Security",
        "resources": "Resources",
    },
    "Port": {"name": str, "containerPort": int, "protocol": str},
    "Probe": {"httpGet": "Get", "periodSeconds": int, "failureThreshold": int},
    "Get": {"path": str, "port": int},
    "Security": {"runAsNonRoot": bool, "allowPrivilegeEscalation": bool, "capabilities": "Capabilities"},
    "Capabilities": {"drop": [str]},
    "Resources": {"requests": {str: str}, "limits": {str: str}},
}


@pytest.fixture(scope="module")
def recipe() -> list[tuple[str, str]]:
    """The recipe's instructions: name and the rest, with continued lines joined."""
    lines = [line for line in (FOLDER / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    found = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in found if line.strip()]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    lines = (FOLDER / "serving-runtime.yaml").read_text().splitlines()
    body: dict[str, Any] = json.loads("\n".join(line for line in lines if not line.startswith("#")))
    return body


def value(recipe: list[tuple[str, str]], name: str) -> str:
    (found,) = [rest for instruction, rest in recipe if instruction == name]
    return found


def accepted(arguments: list[str]) -> config.Config:
    """The configuration that `appliance serve` has with these arguments; it is parsed by the command itself."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]  # a group
    context = command.make_context("serve", list(arguments))
    return config.load(None, overrides=context.params["settings"])


def held(thing: Any, kind: Any, where: str) -> None:
    if isinstance(kind, str):
        unknown = set(thing) - set(FIELDS[kind])
        assert not unknown, f"{where} has {unknown}, which {kind} does not know"
        for name, inner in thing.items():
            held(inner, FIELDS[kind][name], f"{where}.{name}")
    elif isinstance(kind, list):
        for index, inner in enumerate(thing):
            held(inner, kind[0], f"{where}[{index}]")
    elif isinstance(kind, dict):
        assert all(type(key) is type(inner) is str for key, inner in thing.items()), where
    else:
        assert type(thing) is kind, where


def test_every_instruction_is_one_and_the_first_chooses_the_base(recipe: list[tuple[str, str]]) -> None:
    assert {name for name, _ in recipe} <= INSTRUCTIONS
    assert [name for name, _ in recipe][:2] == ["ARG", "FROM"]
    for name in ("ENTRYPOINT", "CMD"):
        assert json.loads(value(recipe, name)), "the exec form: signals reach the appliance, not a shell"


def test_it_takes_in_the_package_that_is_built(recipe: list[tuple[str, str]]) -> None:
    run = value(recipe, "RUN")
    (source,) = re.findall(r"--mount=type=bind,source=(\S+),target=/packages", run)
    assert source == "dist"
    (pattern,) = re.findall(r"/packages/(\S+)", run)
    assert fnmatch.fnmatch(f"{PACKAGE}_{debian_version('1.2.3', TARGETS['12'])}_{ARCHITECTURE}.deb", pattern)
    assert "debian:12" in recipe[0][1]


def test_it_runs_as_a_numbered_user_that_is_not_root(recipe: list[tuple[str, str]]) -> None:
    user = value(recipe, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.split(':')[0]} " in value(recipe, "RUN")


def test_the_appliance_accepts_its_arguments_and_listens_where_the_image_says(recipe: list[tuple[str, str]]) -> None:
    assert json.loads(value(recipe, "ENTRYPOINT")) == ["/usr/bin/appliance", "serve"]
    found = accepted(json.loads(value(recipe, "CMD")))
    ports = [str(found.http.port), found.zmq.tcp.rpartition(":")[2], found.zmq.events_tcp.rpartition(":")[2]]
    assert value(recipe, "EXPOSE").split() == ports
    assert found.http.host == "0.0.0.0"
    assert f"/{found.repository.path.strip('/')} " in value(recipe, "RUN")


def test_its_health_check_is_a_command_of_ours(recipe: list[tuple[str, str]]) -> None:
    words = json.loads(value(recipe, "HEALTHCHECK").partition("CMD ")[2])
    assert words[:2] == ["appliance", "status"]
    command = typer.main.get_command(app).commands["status"]  # type: ignore[attr-defined]  # a group
    assert command.make_context("status", words[2:]).params["url"].endswith(":8080")


def test_the_manifest_has_only_fields_that_exist(manifest: dict[str, Any]) -> None:
    held(manifest, "ServingRuntime", "")
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert [container["name"] for container in manifest["spec"]["containers"]] == ["kserve-container"]


def test_the_appliance_accepts_the_manifests_arguments_and_answers_its_probes(manifest: dict[str, Any]) -> None:
    (container,) = manifest["spec"]["containers"]
    found = accepted(container["args"])
    assert [port["containerPort"] for port in container["ports"]] == [found.http.port]
    assert found.repository.path == "/mnt/models", "where KServe's storage initializer puts what storageUri names"
    routes = Path(application.__file__).read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == found.http.port
        assert f'"{asked["path"]}": Route("GET"' in routes
    assert manifest["spec"]["annotations"]["prometheus.kserve.io/port"] == str(found.http.port)
