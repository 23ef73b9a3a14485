"""What an archive for support may hold: secrets in every place of a configuration and of a log."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cli.redaction import redact, redact_problem, redact_text, redact_toml
from appliance.config import Config, Problem, check

SECRETS = st.text(alphabet="bcdfgxz0189", min_size=10, max_size=24)


def test_the_text_of_a_configuration_keeps_what_the_schema_knows_and_nothing_else() -> None:
    text = '''# for kim, password hush0
runtime_dir = "/run/a"   # hush0
[http]
port = 8000  # ours
host.hush0 = 1
admin_token = "hush1"
tokens = [
  "hush2",
  "hush3"]
name = "box"
password = \'\'\'
hush4
port = 1
\'\'\'
prot = 5570
pwd = "hush5"
"X-Auth-Key: hush6" = true
[recorder]
path = "https://kim:hush/7@host/"
[repository]
models = [ # hush8
  "digits",
  "other"]
[sensors.hush9]
root = "hush9"
[[hush9]]
[zmq]
ipc = """\\
  none"""
zmq.hush9 = { enabled = true }
'''
    shown = redact_toml(text)
    assert "hush" not in shown
    assert "kim" not in shown
    lines = text.split("\n")
    told = {index: line for index, line in enumerate(shown.split("\n")) if line and not line.startswith('"(removed)"')}
    assert {lines[index].split("=")[0].strip(): line for index, line in told.items()} == {
        "runtime_dir": 'runtime_dir = "/run/a"',
        "[http]": "[http]",
        "port": "port = 8000",
        "host.hush0": 'host = "(removed)"',
        "prot": 'prot = "(removed)"',
        "[recorder]": "[recorder]",
        "path": 'path = "https://(removed)@host/"',
        "[repository]": "[repository]",
        "models": 'models = ["digits", "other"]',
        "[sensors.hush9]": "[sensors.(removed)]",
        "[[hush9]]": "[(removed)]",
        "[zmq]": "[zmq]",
        "ipc": 'ipc = "none"',
    }, "every line keeps its number"


def test_every_setting_is_told_as_it_is() -> None:
    def lines(table: dict[str, Any], prefix: str = "") -> list[str]:
        found = [f"[{prefix[:-1]}]"] if prefix else []
        later = []
        for key, value in table.items():
            if isinstance(value, dict):
                later += lines(value, f"{prefix}{key}.")
            elif isinstance(value, list | tuple):
                found.append(f'{key} = ["a", "b"]')
            elif isinstance(value, bool):
                found.append(f"{key} = {str(value).lower()}")
            else:
                found.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}")
        return found + later

    text = "\n".join(lines(msgspec.to_builtins(Config()))) + "\n"
    assert redact_toml(text) == text
    assert redact_toml(text.replace("\n", "\r\n")) == text
    inline = 'http = { port = 1, host = "x", token = "hush" }\nzmq.tcp = "none"\nlog = "hush"\n'
    assert redact_toml(inline) == (
        'http = {port = 1, host = "x", "(removed)" = "(removed)"}\nzmq.tcp = "none"\nlog = "(removed)"\n'
    )


PLACES = (
    "# the password is {s}",
    'name = "{s}" # {s}',
    'port = 8000 # "{s}"',
    "{s} = 1",
    '"{s}" = 1',
    '"token {s}" = "{s}"',
    "[http.{s}]",
    "[{s}]",
    "[[{s}]]",
    'api_token = """\nport = {n}\nhost = "{s}"\n[zmq]\nipc = "{s}"\n"""',
    "note = '''\n[http]\nhost = \"{s}\"\n'''",
    'people = [\n  "{s}",\n  {{ host = "{s}" }},\n]',
    'http = {{ {s} = "{s}", host = {{ port = "{s}" }} }}',
    'auth = "Basic {s}"',
    'host = {{ a = "{s}" }}',
    'zmq.{s}.ipc = "{s}"',
    '# line separators\u2028host = "{s}"\x85host = "{s}"\x0chost = "{s}"',
    "[http] # {s}",
    'models = [{{ x = "{s}" }}]',
)
PLAIN = (
    "[http]",
    "[zmq]",
    "port = 8000",
    'host = "127.0.0.1"',
    "",
    "[repository]",
    'ipc = "none"',
    'models = ["digits"]',
)
BREAKS = ("port = ", "[http", 'x = "abc', "= = 5", '"""', "y = [", "z = {{", "note = '''", "host = 'a", "]")


@given(
    SECRETS,
    st.lists(st.sampled_from(PLACES + PLAIN), min_size=1, max_size=10),
    st.lists(st.tuples(st.integers(0, 10), st.sampled_from(BREAKS)), max_size=2),
)
def test_a_secret_is_told_only_as_the_value_of_a_setting(
    secret: str, parts: list[str], breaks: list[tuple[int, str]]
) -> None:
    for index, text in breaks:
        parts.insert(index, text)
    text = "\n".join(parts).replace("{s}", secret).replace("{n}", "1").replace("{{", "{").replace("}}", "}")
    assert secret not in redact_toml(text)


@given(SECRETS, st.sampled_from(PLACES))
def test_nor_do_complaints_about_the_file_tell_it(secret: str, place: str) -> None:
    text = place.replace("{s}", secret).replace("{n}", "1").replace("{{", "{").replace("}}", "}")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    for problem in check(data, Config, file="appliance.toml", lines={}):
        assert secret not in redact_problem(problem)


def test_complaints_keep_what_support_needs() -> None:
    [known] = check({"http": {"port": "x"}}, Config, file="a.toml", lines={"http.port": 7})
    assert redact_problem(known) == "a.toml:7: 'http.port' is 'x': expected `int`, got `str`"
    [mistyped] = check({"http": {"prot": 1}}, Config, file="a.toml", lines={})
    assert "did you mean 'port'?" in redact_problem(mistyped)
    [unknown] = check({"http": {"hush": 1}}, Config, file="a.toml", lines={"http.hush": 3})
    assert redact_problem(unknown) == "a.toml:3: unknown key (removed)"
    [kind] = check({"http": {"host": {"hush": 1}}}, Config, file="a.toml", lines={})
    assert redact_problem(kind) == "a.toml: 'http.host' is of another kind"
    broken = Problem("a.toml", 2, "", "not valid TOML: Cannot declare ('hush',) twice (at line 2, column 5)")
    assert redact_problem(broken) == "a.toml:2: not valid TOML"


def test_a_file_without_an_end_is_read_in_a_moment() -> None:
    shown = redact_toml("[http]\nport = 1\nx = [\n" + 'host = "hush"\n' * 20_000)
    assert shown.splitlines()[:2] == ["[http]", "port = 1"]
    assert "hush" not in shown
    assert len(redact_text("a" * 200_000 + " token=x")) > 200_000


KEY = "-----BEGIN PRIVATE KEY-----\n{s}\n{s}\n"


@given(SECRETS)
@pytest.mark.parametrize(
    "text",
    [
        "api_key={s}",
        "api-key: {s}",
        '"token": "{s}"',
        'token = "a\\"{s}"',
        'token = "unclosed {s}',
        "pwd={s}",
        "psk: {s}",
        "passphrase = 'x {s}'",
        'auth = "Digest {s}"',
        "X-Auth-Key: {s}",
        "password=a,b{s}",
        "Authorization: Bearer {s}",
        "Authorization: Negotiate {s} {s}",
        "sent Bearer {s}",
        "sent basic {s}==",
        "ghp_{s}",
        "got ghp_{s}.",
        "http://u:{s}@h/",
        "http://u:a/{s}@h/",
        "https://{s}@h/",
        "appliance --admin-token a{s} --x",
        "eyJhbGciOi.{s}.{s}",
        KEY,
        KEY + "-----END PRIVATE KEY-----",
    ],
)
def test_what_is_or_is_named_a_secret_is_removed_from_a_log(text: str, secret: str) -> None:
    shown = redact_text(f"before\n{text.replace('{s}', secret)}\n")
    assert secret not in shown
    assert shown.startswith("before\n")
    assert secret not in str(redact({"a": [text.replace("{s}", secret)]}))


def test_what_is_no_secret_stays() -> None:
    for text in (
        "appliance --port 1 --host x",
        "tcp://127.0.0.1:5570",
        "worker.lost author=kim authored passed=3",
        "model.state model=digits state=READY reason='the basis of it'",
        "http://box:8000/v2/models/digits/infer",
    ):
        assert redact_text(text) == text
    document = {"a": [{"db_password": "x"}], "n": 1, "psk": "y", "token": "", "bearer": 2, "authors": ["kim"]}
    assert redact(document) == {
        "a": [{"db_password": "(removed)"}],
        "n": 1,
        "psk": "(removed)",
        "token": "",
        "bearer": "(removed)",
        "authors": ["kim"],
    }


def test_after_a_key_the_log_goes_on() -> None:
    shown = redact_text(f"{KEY.replace('{s}', 'hush')}-----END PRIVATE KEY-----\nafter")
    assert shown == "(removed)\nafter"
