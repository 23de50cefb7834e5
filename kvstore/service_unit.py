"""kvstored as a systemd service: its unit for this host, put in place and taken away.

The text of the units lies in kvstore/systemd/; what they mean is told there and in the docs. Here
is what depends on the host: the path of kvstored, the configuration, who may do what. Every step
is reported through `say`, in a line for the operator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.resources
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstore import __version__, config
from kvstore.errors import InvalidConfig, KVStoreError, NotPermitted

UNIT = "kvstored.service"
USER = "kvstore"  # of the system's service, and its group
ETC = Path("/etc")
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # the sandbox shows empty ones
MADE = ("/run/kvstore", "/var/lib/kvstore", "/dev/shm/kvstore")  # by systemd, at each start or boot
CLOSE_S = 20  # closing movers and index after a drain
COMMAND_S = 60.0  # of systemctl and its like; starting and stopping take what the unit allows
EMPTY = """\
# The configuration of kvstored. All that is not set has its default: `kvstored --check-config`
# says which. After a change of paths, tenants or drain_timeout: `kvstore service install` again.
"""
_MARK = "# Checksum of what follows: "

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where things of the system's service, or of a user's, are."""

    user: bool

    @property
    def etc(self) -> Path:
        """The folder that holds systemd/ and the configuration."""
        own = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Path(own) if self.user else ETC

    @property
    def unit(self) -> Path:
        """The file of the unit."""
        return self.etc / "systemd" / ("user" if self.user else "system") / UNIT

    @property
    def config(self) -> Path:
        """The configuration, when nobody names another."""
        return self.etc / "kvstore" / "kvstored.toml" if self.user else ETC / "kvstore.toml"

    @property
    def runtime(self) -> Path:
        """The folder of sockets, RuntimeDirectory= of the unit."""
        return Path(os.environ.get("XDG_RUNTIME_DIR", "/run") if self.user else "/run") / "kvstore"

    @property
    def snippets(self) -> dict[Path, str]:
        """Files that make the service's user and its folder in /dev/shm, and their templates."""
        if self.user:
            return {}
        return {
            ETC / "sysusers.d" / "kvstore.conf": "sysusers.conf",
            ETC / "tmpfiles.d" / "kvstore.conf": "tmpfiles.conf",
        }

    def managed(self) -> bool:
        """Whether a service manager runs; none does where an image is prepared."""
        return self.user or Path("/run/systemd/system").is_dir()

    def systemctl(self, *arguments: str, timeout_s: float | None = COMMAND_S) -> str:
        """What systemctl printed. KVStoreError with its words when it fails."""
        scope = ["--user"] if self.user else []
        return _run("systemctl", *scope, *arguments, timeout_s=timeout_s)

    def succeeds(self, *arguments: str) -> bool:
        """Whether systemctl ends with status 0."""
        try:
            self.systemctl(*arguments)
        except KVStoreError:
            return False
        return True


# --- the text of the unit ------------------------------------------------------------------------


def render(place: Place, file: Path | None = None, *, gpu: bool = False) -> str:
    """The unit for this host. `file`: the configuration; not given and not there: the defaults."""
    file = (file or place.config).absolute()
    tree = config.load(file if file.exists() or file != place.config else None, {})
    stop_s = tree.daemon.drain_timeout + CLOSE_S
    text = _template("kvstored.user.service" if place.user else UNIT)
    text = text.replace("@EXEC@", _command_line(file)).replace("@STOP_S@", f"{stop_s:.0f}")
    if place.user:
        text = _user_gpu(text) if gpu else text
    else:
        text += _template("gpu.conf") if gpu else ""
        text += _of_configuration(tree, file)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return (
        f"# Written by `kvstore service install` of kvstore {__version__}, and replaced by the\n"
        f"# next one. Changes belong into a drop-in: `systemctl "
        f"{'--user ' if place.user else ''}edit kvstored`.\n{_MARK}{checksum}\n\n{text}"
    )


def _template(name: str) -> str:
    return (importlib.resources.files("kvstore") / "systemd" / name).read_text(encoding="utf-8")


def _user_gpu(text: str) -> str:
    """CUDA writes code at run time; a user's unit takes nothing else from it."""
    return text.replace("MemoryDenyWriteExecute=yes\n", "# No MemoryDenyWriteExecute=: CUDA.\n")


def _of_configuration(tree: config.Config, file: Path) -> str:
    """What the system's unit must allow for this configuration to run."""
    mounts = {path for path in (*tree.nvme.paths, tree.dram.path) if not _made(path)}
    writes = {path for path in mounts | {tree.daemon.run_dir} if not _made(path)}
    groups = {tenant.group for tenant in tree.tenants.values()} - {"", USER}
    if tree.daemon.run_dir in writes and _below(tree.daemon.run_dir, "/run"):
        raise InvalidConfig(
            f"{file}: daemon.run_dir = {str(tree.daemon.run_dir)!r}: nobody makes this folder at "
            "boot: leave it out for /run/kvstore, which systemd makes"
        )
    lines = [
        *(("[Unit]",) if mounts else ()),
        *(f"RequiresMountsFor={_quoted(path)}" for path in sorted(mounts)),
        *(("[Service]",) if writes or groups else ()),
        *(f"ReadWritePaths={_quoted(path)}" for path in sorted(writes)),
        *(f"SupplementaryGroups={group}" for group in sorted(groups)),
    ]
    if not lines:
        return ""
    heading = f"# --- folders and tenants' groups of {file}: install again when they change\n\n"
    return "\n" + heading + "\n".join(lines) + "\n"


def _made(path: Path) -> bool:
    """Whether systemd makes the folder and lets the service write there."""
    return any(_below(path, folder) for folder in MADE)


def _below(path: Path, folder: str) -> bool:
    return path == Path(folder) or Path(folder) in path.parents


def _command_line(file: Path) -> str:
    """Runs the kvstored that belongs to this interpreter."""
    script = Path(sysconfig.get_path("scripts")) / "kvstored"
    command = [script] if script.exists() else [sys.executable, "-m", "kvstore.daemon"]
    return " ".join(_quoted(word, dollar="$$") for word in (*command, "--config", file))


def _quoted(word: str | Path, dollar: str = "$") -> str:
    """A word as unit files spell it: % and $ stand for themselves."""
    text = str(word)
    if not text.isprintable():
        raise InvalidConfig(f"path {text!r} cannot stand in a unit: choose a printable one")
    text = text.replace("%", "%%").replace("$", dollar)
    if re.fullmatch(r"[\w/.,:@%+=$-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- install -------------------------------------------------------------------------------------


def install(
    place: Place,
    file: Path | None,
    say: Say,
    *,
    gpu: bool = False,
    start: bool = True,
    force: bool = False,
) -> None:
    """Put the unit in place, enable and start it. KVStoreError says what is in the way; done again,
    it goes on where it stopped."""
    _check_manager(place, needed=start or place.user)
    text = render(place, file, gpu=gpu)
    changed = _check_unit(place.unit, text, force)
    file = (file or place.config).absolute()
    _check_seen(place, file)
    if not file.exists():
        _write(file, EMPTY)
        say(f"wrote {file}: the defaults are in effect, set what you want there")
    if not place.user:
        _prepare_system(place, file, say)
    if changed:
        _write(place.unit, text)
        say(f"wrote {place.unit}")
    if place.managed():
        place.systemctl("daemon-reload")
    place.systemctl("enable", UNIT)
    say(f"enabled: it starts {'when you log in' if place.user else 'at boot'}")
    if start:
        _start(place, "restart" if changed else "start")
        say(f"running: {_status_command(place)} tells how it is")
    if place.user and not _lingers():
        say(
            "it ends when you log out, and its memory is freed: "
            f"`loginctl enable-linger {_user_name()}` keeps both"
        )


def _start(place: Place, verb: str) -> None:
    try:
        place.systemctl(verb, UNIT, timeout_s=None)
    except KVStoreError:
        scope = "--user " if place.user else ""
        raise KVStoreError(
            f"{UNIT} was installed but does not start: see `journalctl {scope}--unit kvstored`, "
            "mend that, and install again"
        ) from None


def _check_manager(place: Place, *, needed: bool) -> None:
    """Raises where this process cannot do it, before anything was changed."""
    if shutil.which("systemctl") is None:
        raise KVStoreError(
            "systemctl is not to be found: install systemd, or run kvstored --config FILE under "
            "another service manager"
        )
    if not place.user and os.geteuid() != 0:
        raise NotPermitted(
            "the system's service is root's to change: use sudo, or give --user for your own"
        )
    if not needed:
        return
    if place.user:
        if not place.succeeds("show-environment"):
            raise KVStoreError(
                "no service manager of this user answers: log in as the user rather than by su or "
                "sudo, and see that XDG_RUNTIME_DIR is set"
            )
    elif not place.managed():
        raise KVStoreError(
            "systemd does not run this host: use another service manager, or --no-start to "
            "prepare an image"
        )


def _check_unit(unit: Path, text: str, force: bool) -> bool:
    """Whether the unit is to be written. Raises when that would lose what a person wrote."""
    try:
        there = unit.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    if there == text:
        return False
    if not force and not ours(there):
        raise KVStoreError(
            f"{unit} was written or changed by hand: move the changes to a drop-in (systemctl edit "
            "kvstored), and give --force to replace the file"
        )
    return True


def ours(text: str) -> bool:
    """Whether a unit is as `render` wrote it, of any version and for any configuration."""
    _, mark, rest = text.partition(_MARK)
    checksum, _, body = rest.partition("\n\n")
    return bool(mark) and hashlib.sha256(body.encode()).hexdigest() == checksum


def _check_seen(place: Place, file: Path) -> None:
    """Raises when the system's service could not see its program or configuration."""
    if place.user:
        return
    package = Path(__file__).parent
    for path in (Path(sys.prefix), Path(sys.executable).resolve(), package.resolve(), file):
        for folder in HIDDEN:
            if _below(path, folder):
                raise KVStoreError(
                    f"{path} is below {folder}, which the service does not see: install kvstore in "
                    "a virtual environment such as /opt/kvstore, or give --user"
                )


def _prepare_system(place: Place, file: Path, say: Say) -> None:
    """User, group and folders, and what the service would stumble over."""
    for path, name in place.snippets.items():
        _write(path, _template(name))
    sysusers, tmpfiles = place.snippets
    _run("systemd-sysusers", str(sysusers))
    _run("systemd-tmpfiles", "--create", str(tmpfiles))
    tree = config.load(file, {})
    for path in (*tree.nvme.paths, tree.dram.path, tree.daemon.run_dir):
        if not path.exists() and not _made(path):
            path.mkdir(mode=0o711, parents=True)
            shutil.chown(path, USER, USER)
            say(f"made {path} for user {USER}")
    tiers, uid = (tree.dram.path, *tree.nvme.paths), pwd.getpwnam(USER).pw_uid
    for folder in (path / tenant for path in tiers for tenant in tree.tenants):
        if folder.exists() and (owner := folder.stat().st_uid) != uid:
            raise KVStoreError(
                f"{folder} belongs to user {owner}, not to {USER}, as of a daemon run by hand: "
                f"stop that, and remove the folder or `chown --recursive {USER}: {folder}`"
            )
    _prove(file)


def _prove(file: Path) -> None:
    """Raises when the service's user cannot run kvstored with this configuration."""
    command = [sys.executable, "-m", "kvstore.daemon", "--check-config", "--config", str(file)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            env={"PATH": os.defpath},
        )
    except OSError as error:
        raise _unrunnable(error) from None
    if done.returncode:
        raise _unrunnable(done.stderr.strip().rpartition("\n")[2])


def _unrunnable(problem: object) -> KVStoreError:
    return KVStoreError(
        f"user {USER} cannot run kvstored as configured: {problem}: let that user read the program "
        "and the configuration"
    )


def _write(path: Path, text: str) -> None:
    """Replace a file in one step; 0644, for units and configurations are no secrets."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


# --- uninstall -----------------------------------------------------------------------------------


def uninstall(place: Place, say: Say) -> None:
    """Stop and disable the service, and remove its unit; blocks and configuration stay."""
    _check_manager(place, needed=place.user)
    if not place.unit.exists():
        say(f"there is no {place.unit}: nothing to remove")
        return
    left = list(_left(place))
    if place.managed():
        place.systemctl("stop", UNIT, timeout_s=None)
        shutil.rmtree(place.runtime, ignore_errors=True)  # sockets that nobody listens at
    place.systemctl("disable", UNIT)
    for path in (place.unit, *place.snippets):
        path.unlink(missing_ok=True)
    if place.managed():
        place.systemctl("daemon-reload")
        place.succeeds("reset-failed", UNIT)
    say(f"stopped and removed {place.unit}")
    for line in left:
        say(line)


def _left(place: Place) -> Iterator[str]:
    """What an uninstall leaves, as far as the unit and its configuration tell."""
    found = re.search(r"^ExecStart=.* --config (.+)$", place.unit.read_text(), re.MULTILINE)
    file = Path(found[1].strip('"').replace("%%", "%").replace("$$", "$")) if found else None
    with contextlib.suppress(KVStoreError):
        tree = config.load(file if file is not None and file.exists() else None, {})
        yield f"left in memory, until you remove it or the host restarts: {tree.dram.path}"
        if disks := [str(path) for path in tree.nvme.paths if path.exists()]:
            yield f"left on disk: {', '.join(disks)}"
    drop_ins = place.unit.with_name(f"{UNIT}.d")
    files = [path for path in (file, drop_ins) if path is not None and path.exists()]
    if files:
        yield f"left: {', '.join(map(str, files))}"
    if not place.user:
        yield f"left: user and group {USER}, who own these folders"


# --- the host ------------------------------------------------------------------------------------


def _status_command(place: Place) -> str:
    return f"`systemctl {'--user ' if place.user else ''}status kvstored`"


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _lingers() -> bool:
    """Whether the user's service manager stays when the user has logged out."""
    return Path("/var/lib/systemd/linger", _user_name()).exists()


def _run(*command: str, timeout_s: float | None = COMMAND_S) -> str:
    """What a command printed. KVStoreError with the last line of its errors when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KVStoreError(f"{_words(command)}: {error}: look into it, and start again") from None
    if done.returncode:
        problem = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise KVStoreError(f"{_words(command)}: {problem}: look into it, and start again")
    return done.stdout


def _words(command: Sequence[str]) -> str:
    return " ".join(command)
