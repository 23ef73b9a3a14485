"""The configuration: everything that is wrong is said at once, with its line and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cli.configuration_docs import DESCRIPTIONS, render
from appliance.config import Config, ConfigError, decode_toml, find, load, resolve_runtime_dir, schema
from appliance.core.manifest import ModelManifest

ROOT = Path(__file__).parents[1]


def problems(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    file = tmp_path / "appliance.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides=overrides)
    return [str(problem) for problem in caught.value.problems]


def test_without_a_file_the_defaults_hold() -> None:
    assert load(None) == Config()


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    text = 'runtime_dirr = "x"\n\n[http]\nport = 70000\nhost = 7\n\n[zmq]\nenabled = "yes"\n[log]\nlevel = "loud"\n'
    found = problems(text, tmp_path)
    assert len(found) == 5
    assert found[0].startswith("appliance.toml:1: unknown key 'runtime_dirr' (did you mean 'runtime_dir'?)")
    assert "appliance.toml:4: 'http.port' is 70000" in found[1]
    assert "appliance.toml:5: 'http.host' is 7" in found[2]
    assert "appliance.toml:8:" in found[3]
    assert "appliance.toml:10:" in found[4]


def test_broken_toml_is_reported_with_its_line(tmp_path: Path) -> None:
    [found] = problems("[http]\nport = = 1\n", tmp_path)
    assert found.startswith("appliance.toml:2: not valid TOML")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('http = "on"\n', "must be a table"),
        ("[http]\nmax_json_bytes = 2000\nmax_body_bytes = 1000\n", "no such body arrives"),
        ('[zmq]\ntcp = "tcp://127.0.0.1:1"\nevents_tcp = "tcp://127.0.0.1:1"\n', "the same endpoint"),
        ('[repository]\nmodels = ["a"]\n', 'load = "listed"'),
        ("[http]\nenabled = false\n[zmq]\nenabled = false\n", "nobody could ask"),
        ("[workers]\nbackoff_initial_s = 9\nbackoff_max_s = 1\n", "larger than"),
    ],
)
def test_contradictions_are_found(text: str, words: str, tmp_path: Path) -> None:
    assert any(words in found for found in problems(text, tmp_path))


def test_single_keys_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[http]\nport = 1\n")
    config = load(file, overrides=["http.port=9000", "repository.path=/somewhere", 'log.level="debug"'])
    assert (config.http.port, config.repository.path, config.log.level) == (9000, "/somewhere", "debug")
    for bad in ("http.port", "http.port.x=1", "http.prot=1"):
        with pytest.raises(ConfigError):
            load(file, overrides=[bad])


def test_a_manifest_s_problems_are_reported_alike() -> None:
    with pytest.raises(
        ConfigError, match=r"model.toml:2: unknown key 'batching.max_batchsize' \(did you mean 'max_batch_size'"
    ):
        decode_toml("[batching]\nmax_batchsize = 4\n", ModelManifest, file="model.toml")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[verify]\nmean_absolute = inf", "verify.mean_absolute"),
        ("[verify.ranges]\nx = [nan, 1]", "verify.ranges"),
        ("[preprocessing]\nmean = [0.5, inf]", "preprocessing.mean"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_their_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode_toml(text, ModelManifest, file="model.toml")
    assert [problem.key for problem in error.value.problems] == [key]
    assert "expected finite numbers" in error.value.problems[0].message


def test_the_file_is_found_by_environment_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APPLIANCE_CONFIG", raising=False)
    (tmp_path / "appliance.toml").write_text("")
    assert find() == Path("appliance.toml")
    monkeypatch.setenv("APPLIANCE_CONFIG", "/elsewhere.toml")
    assert find() == Path("/elsewhere.toml")


def test_the_runtime_directory_is_the_configured_one_or_systemd_s_or_the_session_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/appliance:/run/other")
    assert resolve_runtime_dir(Config(runtime_dir="/x")) == Path("/x")
    assert resolve_runtime_dir(Config()) == Path("/run/appliance")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert resolve_runtime_dir(Config()) == Path("/run/user/7/appliance")


def test_the_page_about_the_configuration_is_up_to_date_and_describes_every_key() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == render()
    assert all(text.endswith((".", ")")) for text in DESCRIPTIONS.values())


def test_the_schema_knows_every_table() -> None:
    text = msgspec.json.encode(schema()).decode()
    for name in ("HttpConfig", "ZmqConfig", "RepositoryConfig", "WorkersConfig", "LogConfig"):
        assert name in text


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_a_list_of_problems(text: str) -> None:
    try:
        decode_toml(text, Config, file="a.toml")
    except ConfigError as error:
        assert error.problems
