"""The page's files and its live stream: what is sent, under which policy, and to whom not."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import re
from pathlib import Path

import plotly

import appliance
from tests.transports.http.conftest import Client, House, until

WEB = Path(appliance.__file__).parent / "web"
SOURCES = sorted(path for path in WEB.rglob("*") if path.is_file())


async def test_the_page_stands_at_the_root_under_a_policy_that_trusts_nobody_else(house: House) -> None:
    reply = await house.ask("GET", "/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.body == (WEB / "index.html").read_bytes()
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_browser_without_scripts_is_told_in_every_language() -> None:
    told = (WEB / "index.html").read_text().partition("<noscript>")[2].partition("</noscript>")[0]
    for table in (WEB / "text").glob("*.json"):
        assert json.loads(table.read_text())["no.script"] in told, table.name


async def test_every_file_of_the_page_is_served_as_it_is(house: House) -> None:
    for source in SOURCES:
        path = f"/page/{source.relative_to(WEB).as_posix()}"
        if path == "/page/index.html":
            continue
        reply = await house.ask("GET", path)
        assert reply.status == 200, path
        assert reply.body == source.read_bytes()


async def test_the_chart_library_comes_from_its_package(house: House) -> None:
    reply = await house.ask("GET", "/page/plotly.js", Accept_Encoding="gzip")
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    assert reply.headers["content-encoding"] == "gzip"
    assert hashlib.sha256(gzip.decompress(reply.body)).digest() == hashlib.sha256(script.read_bytes()).digest()


async def test_a_browser_that_has_a_file_is_told_so(house: House) -> None:
    first = await house.ask("GET", "/page/style.css")
    again = await house.ask("GET", "/page/style.css", If_None_Match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    other = await house.ask("GET", "/page/style.css", If_None_Match='"another"')
    assert other.status == 200


async def test_no_address_leads_out_of_the_page_folder(house: House) -> None:
    for path in ("/page/../service.py", "/page/%2e%2e/service.py", "/page//etc/passwd", "/page/", "/page/index.html"):
        assert (await house.ask("GET", path)).status == 404, path


def test_the_page_asks_nobody_outside_and_writes_no_markup() -> None:
    for source in SOURCES:
        text = source.read_text()
        outside = set(re.findall(r"https?://[^\s\"'`<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, f"{source.name} names {outside}"
        for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert dangerous not in text, f"{source.name} uses {dangerous}"
        assert "style=" not in text, f"{source.name} writes styles, which the policy forbids"


def test_both_languages_say_the_same_things() -> None:
    english, chinese = (json.loads((WEB / "text" / f"{name}.json").read_text()) for name in ("en", "zh"))
    singular = {key for key in english if key.endswith(".one")}
    assert set(english) - singular == set(chinese)
    for key, text in chinese.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", english[key])), key


def test_every_text_that_the_code_names_exists() -> None:
    english = json.loads((WEB / "text" / "en.json").read_text())
    named = {
        name
        for source in SOURCES
        if source.suffix == ".js"
        for name in re.findall(r"\bt\(\"([^\"]+)\"", source.read_text())
    }
    assert len(named) > 50
    assert {name for name in named if name not in english and f"{name}.other" not in english} == set()


async def follow(house: House) -> Client:
    client = await house.connect()
    client.request("GET", "/v2/appliance/stream")
    reply = await client.reply()
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    return client


async def message(client: Client) -> tuple[str, dict[str, object]]:
    async with asyncio.timeout(5):
        text = (await client.reader.readuntil(b"\n\n")).decode()
    kind, data = text.strip().split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_the_stream_begins_with_a_snapshot_and_goes_on_with_events(house: House) -> None:
    client = await follow(house)
    kind, document = await message(client)
    assert (kind, document["boot"]) == ("snapshot", "boot-1")
    house.service.publish("model.state", {"model": "echo"})
    kind, event = await message(client)
    assert (kind, event["topic"]) == ("event", "model.state")
    kind, _ = await message(client)
    assert kind == "snapshot"


async def test_a_page_that_is_closed_is_forgotten(house: House) -> None:
    client = await follow(house)
    await message(client)
    client.close()
    await until(lambda: not house.service.listeners)


async def test_head_opens_no_stream(house: House) -> None:
    assert (await house.ask("HEAD", "/v2/appliance/stream")).status == 200
    assert house.service.listeners == []
