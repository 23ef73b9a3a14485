"""`bundle`: releases, models and configuration by stick: make, check, carry, install, and go back."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from appliance.cli.options import JSON, command
from appliance.cli.output import CommandError, Exit, note, print_json

if TYPE_CHECKING:
    from appliance.release.box import Box
    from appliance.release.installing import Installer
    from appliance.release.manifest import Manifest
    from appliance.release.signing import TrustedKeys

READY_TIMEOUT_S = 120.0
ASK_TIMEOUT_S = 5.0
"""At most, for one question. A release that breaks on start lets questions wait in its listening sockets, which stay open."""

Keys = Annotated[
    Path | None, typer.Option("--keys", help="Folder of trusted *.pub keys; else ROOT/etc/appliance/keys.")
]
Root = Annotated[Path, typer.Option("--root", help="Where the box's filesystem begins.")]
File = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The .bundle file, or the .parts index beside its parts.")]
Restart = Annotated[
    str,
    typer.Option(
        "--restart", help="Program that starts the service anew; empty: systemctl. It is given restart or start."
    ),
]
Timeout = Annotated[float, typer.Option("--ready-timeout", min=0, help="Seconds until the release has to be ready.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    bundle = typer.Typer(no_args_is_help=True, help="Releases, models and configuration without a network.")
    for name, function in (
        ("keygen", keygen),
        ("create", create),
        ("verify", verify),
        ("copy", copy),
        ("install", install),
        ("rollback", rollback),
        ("status", status),
    ):
        bundle.command(name)(function)
    app.add_typer(bundle, name="bundle")


class CommandService:
    """The service as its commands see it: systemctl (or another program) restarts it, its own command line says how it is."""

    def __init__(self, box: Box, restart: str, ready_timeout_s: float) -> None:
        self._program = box.program / "bin" / "appliance"
        self._restart = restart
        self._failed: list[str] = []
        self._start_timeout_s = max(1.0, ready_timeout_s)
        self._ask_timeout_s = max(1.0, min(ASK_TIMEOUT_S, ready_timeout_s))

    def restart(self) -> None:
        """Start anew; whether it worked is for `ready` to see."""
        self._call("restart")

    def enable(self) -> None:
        """Start, now and with every boot; another program than systemctl is told to start."""
        if self._restart:
            self._call("start")
        else:
            self._call("enable", "--now")

    def ready(self, version: str) -> bool:
        """Whether the installed release's own `status` says that this release is ready."""
        try:
            asked = subprocess.run(  # noqa: S603  the installed release
                [str(self._program), "status", "--json"],
                capture_output=True,
                timeout=self._ask_timeout_s,
                check=False,
            )
            document = json.loads(asked.stdout)
            answered = document["status"]
            failed = [model for model in document["models"] if model["state"] == "FAILED"]
            self._failed = [f"{model['name']}: {model['reason']}" for model in failed]
        except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
            return False
        return asked.returncode == 0 and bool(answered["ready"]) and answered["version"] == version

    def trouble(self) -> str:
        """The models that had failed when it was last asked, with their reasons."""
        return f" ({'; '.join(self._failed)})" if self._failed else ""

    def _call(self, *verb: str) -> None:
        from appliance.release import running

        call = [self._restart, *verb] if self._restart else ["systemctl", *verb, "appliance.service"]
        try:
            ended = running.run(call, timeout_s=self._start_timeout_s)
        except OSError as error:
            note(f"{' '.join(call)} failed: {error.strerror}")
            return
        except subprocess.TimeoutExpired:
            # a release whose start hangs, and says all the time that it is at it: systemctl would wait for ever
            note(f"{' '.join(call)} did not end within {self._start_timeout_s:g} s")
            return
        if ended.returncode != 0:
            note(f"{' '.join(call)} failed: {ended.stderr.strip()[-300:]}")


@command
def keygen(
    private: Annotated[Path, typer.Argument(help="Where the private key goes; it stays with whoever makes bundles.")],
    public: Annotated[
        Path | None, typer.Argument(help="Where the public key goes; else beside it, with .pub for a suffix.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Make a pair of keys: the private one signs bundles, the public one goes into /etc/appliance/keys of every box."""
    from appliance.release import signing

    public = public or private.with_suffix(".pub")
    with _words():
        name = signing.generate(private, public)
    if as_json:
        print_json({"id": name, "private": str(private), "public": str(public)})
    else:
        note(f"key {name}: keep {private} secret, put {public} into /etc/appliance/keys of the boxes")


@command
def create(
    output: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The file to write, NAME.bundle.")],
    key: Annotated[Path, typer.Option("--key", help="The private key to sign with.")],
    version: Annotated[str, typer.Option("--version", help="The release, or the number of a bundle of models.")],
    release: Annotated[
        list[Path] | None, typer.Option("--release", help="The .deb, or the folder of wheels with pip's among them.")
    ] = None,
    models: Annotated[list[Path] | None, typer.Option("--models", help="A folder of model folders.")] = None,
    engines: Annotated[list[Path] | None, typer.Option("--engines", help="A folder of built engines.")] = None,
    configuration: Annotated[Path | None, typer.Option("--configuration", help="An appliance.toml.")] = None,
    system: Annotated[str, typer.Option(help="For boxes with this ID-VERSION of os-release, e.g. debian-12.")] = "any",
    machine: Annotated[str, typer.Option(help="For boxes with this machine.")] = "x86_64",
    python: Annotated[str, typer.Option(help="For boxes with this Python.")] = "3.11",
    part_size: Annotated[str, typer.Option(help="Cut into parts, too: 512K, 64M, 2G.")] = "",
    with_installer: Annotated[
        bool,
        typer.Option(
            "--with-installer", help="Lay install_appliance.py beside it, for boxes that have no appliance yet."
        ),
    ] = False,
    as_json: JSON = False,
) -> None:
    """Put a release, models, engines and configuration into one signed file."""
    import shutil

    from appliance.release import bundle, first_install, parts, signing
    from appliance.release.manifest import Target

    rooms = {"release": release or [], "models": models or [], "engines": engines or []}
    with _words():
        sign = signing.signer(key)
        files = bundle.collect(rooms)
        _check_release(files, version)
        if configuration is not None:
            files["configuration/appliance.toml"] = configuration
        if not files:
            raise CommandError(
                Exit.USAGE,
                "USAGE",
                "the bundle would be empty",
                "say --release, --models, --engines or --configuration",
            )
        made = bundle.create(
            output,
            files,
            version=version,
            created=_now(),
            kind=_kind(files),
            boxes=Target(system, machine, python),
            sign=sign,
        )
        index = parts.split(output, _bytes(part_size), sign) if part_size else None
        if with_installer:
            shutil.copyfile(first_install.__file__, output.with_name("install_appliance.py"))
    _tell(made, {"bundle": str(output), "index": str(index) if index else None}, as_json)


@command
def verify(bundle: File, keys: Keys = None, root: Root = Path("/"), as_json: JSON = False) -> None:
    """Read a whole bundle and say what is in it, or what is wrong with it. Changes nothing."""
    from appliance.release import bundle as bundles

    with _words():
        manifest, signed_by = bundles.verify_all(bundle, _trusted(root, keys).verify)
    _tell(manifest, {"bundle": str(bundle), "signed_by": signed_by}, as_json)


@command
def copy(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The .parts index.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where index and parts go.")],
    keys: Keys = None,
    root: Root = Path("/"),
    as_json: JSON = False,
) -> None:
    """Copy a bundle's parts, checking each; what is there and right is not copied again, so just begin again after a break."""
    from appliance.release import parts

    with _words():
        copied = parts.copy(index, target, _trusted(root, keys).verify, note)
    if as_json:
        print_json({"index": str(copied)})
    else:
        note(f"complete: {copied}")


@command
def install(
    bundle: File,
    keys: Keys = None,
    allow_older: Annotated[
        bool, typer.Option("--allow-older", help="Also a release older than one that ran here.")
    ] = False,
    ready_timeout: Timeout = READY_TIMEOUT_S,
    restart: Restart = "",
    root: Root = Path("/"),
    as_json: JSON = False,
) -> None:
    """Install a bundle; if its release is not ready in time, go back to the one before and exit with 4."""
    from appliance.release import bundle as bundles

    with _words(), bundles.open_bundle(bundle, _trusted(root, keys).verify) as reader:
        kind = reader.manifest.kind
        done = _installer(root, kind, restart, ready_timeout).install(reader, allow_older=allow_older)
    if as_json:
        print_json({"version": done.version, "previous": done.previous, "added": [added.path for added in done.added]})
    else:
        note(f"{done.version} is installed and ready" + (f", {done.previous} is kept" if done.previous else ""))


@command
def rollback(
    ready_timeout: Timeout = READY_TIMEOUT_S,
    restart: Restart = "",
    root: Root = Path("/"),
    as_json: JSON = False,
) -> None:
    """Go back to the release before, or end an installation that was cut off."""
    with _words():
        version = _installer(root, "", restart, ready_timeout).roll_back()
    if as_json:
        print_json({"version": version})
    else:
        note(f"release {version} is in place again and ready")


@command
def status(root: Root = Path("/"), as_json: JSON = False) -> None:
    """Which release is in place, which is kept, and whether an installation was cut off."""
    import msgspec

    from appliance.release.box import Box, read_state

    with _words():
        box = Box(root)
        state = read_state(box)
        release = _release(box)
    if as_json:
        print_json({"release": release, **msgspec.to_builtins(state)})
        return
    typer.echo(f"release {release}" if release else "no release is installed below this root")
    last = state.current
    if last is None:
        typer.echo("no bundle was installed")
    else:
        if last.version != release:
            # one of models only, or somebody has used dpkg since
            typer.echo(f"last bundle: {last.version}")
        kept = next((done.previous for done in (last, *reversed(state.before)) if done.version == release), "")
        if kept not in ("", release) and _holds(box, kept):
            typer.echo(f"kept: {kept}")
    if state.floor:
        typer.echo(f"nothing older than {state.floor} is installed unasked")
    if state.pending:
        typer.echo(f"cut off: the installation of {state.pending.version}; `appliance bundle rollback` takes it back")


def _release(box: Box) -> str:
    """What is installed, by whichever way; empty if nothing is."""
    from appliance.release.debian import Packages
    from appliance.release.slots import Slots

    by_slot = Slots(box).current()
    if by_slot or box.root != Path("/") or not shutil.which("dpkg-query"):
        return by_slot
    return Packages(box).current()


def _holds(box: Box, version: str) -> bool:
    """Whether that release could be gone back to."""
    from appliance.release.debian import Packages
    from appliance.release.slots import Slots

    slots = Slots(box)
    return slots.holds(version) if slots.current() else Packages(box).holds(version)


def _installer(root: Path, kind: str, restart: str, ready_timeout_s: float) -> Installer:
    from appliance.release.box import Box
    from appliance.release.debian import Packages
    from appliance.release.installing import Installer
    from appliance.release.slots import Slots

    box = Box(root)
    slots = Slots(box)
    # a box stays with the way its release came; dpkg knows nothing of other roots
    by_dpkg = kind == "deb" or (kind != "wheels" and not slots.current())
    if by_dpkg and root != Path("/"):
        raise CommandError(Exit.USAGE, "USAGE", f"a package is installed on the box itself, not below {root}")
    if kind == "wheels" and (box.root / "var/lib/dpkg/info/appliance.list").exists():
        raise CommandError(
            Exit.FAILED, "BUNDLE", "the appliance came as a Debian package here", "get the bundle with the .deb"
        )
    return Installer(
        box,
        Packages(box) if by_dpkg else slots,
        CommandService(box, restart, ready_timeout_s),
        ready_timeout_s=ready_timeout_s,
        note=note,
    )


def _trusted(root: Path, keys: Path | None) -> TrustedKeys:
    from appliance.release.box import Box
    from appliance.release.signing import TrustedKeys

    return TrustedKeys(keys or Box(root).keys)


def _kind(files: dict[str, Path]) -> Literal["deb", "wheels", "models"]:
    names = [name for name in files if name.startswith("release/")]
    if not names:
        return "models"
    return "deb" if any(name.endswith(".deb") for name in names) else "wheels"


def _check_release(files: dict[str, Path], version: str) -> None:
    """A release of another version than the bundle's would be refused by every box: say so where it is made."""
    from appliance.release.debian import version_of
    from appliance.release.errors import BundleError

    for name, path in files.items():
        if name.startswith("release/") and name.endswith(".deb"):
            found = version_of(path)
        elif name.startswith("release/appliance-") and name.endswith(".whl"):
            found = path.name.split("-")[1]
        else:
            continue
        if found not in ("", version):
            raise BundleError(f"--version says {version}, and {path.name} is release {found}", "say that version")


def _tell(manifest: Manifest, more: dict[str, str | None], as_json: bool) -> None:
    import msgspec

    if as_json:
        print_json({**more, "manifest": msgspec.to_builtins(manifest)})
        return
    size = sum(file.size for file in manifest.files)
    box = manifest.target
    note(f"{more['bundle']}: good")
    typer.echo(f"{manifest.kind} {manifest.version} for {box.system}, {box.machine}, Python {box.python}")
    typer.echo(f"{len(manifest.files)} files, {size / 2**20:.1f} MiB, made {manifest.created}")


def _now() -> str:
    given = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.datetime.fromtimestamp(int(given), datetime.UTC) if given else datetime.datetime.now(datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})([KMG])", text)
    if match is None:
        raise CommandError(Exit.USAGE, "USAGE", f"{text!r} is no size", "sizes are like 512K, 64M, 2G")
    return int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]


@contextmanager
def _words() -> Iterator[None]:
    """A bundle's errors as a command's."""
    from appliance.release.errors import BundleError
    from appliance.release.installing import RolledBackError

    try:
        yield
    except RolledBackError as error:
        raise CommandError(Exit.NOT_READY, "ROLLED_BACK", error.message, error.hint) from error
    except BundleError as error:
        raise CommandError(Exit.FAILED, "BUNDLE", error.message, error.hint) from error
    except PermissionError as error:
        raise CommandError(Exit.FAILED, "BUNDLE", f"not allowed: {error.filename}", "run it as root") from error
    except OSError as error:
        raise CommandError(Exit.FAILED, "BUNDLE", str(error), "mend that, then give the command again") from error
