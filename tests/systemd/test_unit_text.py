"""The units as systemd reads them: no mistake in them, and how far they shut the service in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import service_unit
from kvstore.errors import InvalidConfig, KVStoreError
from kvstore.service_unit import Place
from tests.systemd.manager import need

SYSTEM, OWN = Place(user=False), Place(user=True)
VARIANTS = {
    "system": (SYSTEM, False),
    "system-gpu": (SYSTEM, True),
    "user": (OWN, False),
    "user-gpu": (OWN, True),
}
EXPOSURE_MAX = {"system": "15", "system-gpu": "20"}  # in tenths


def configuration(folder: Path, text: str = "") -> Path:
    path = folder / "kvstored.toml"
    path.write_text(text)
    return path


def written(folder: Path, variant: str) -> Path:
    place, gpu = VARIANTS[variant]
    path = folder / "kvstored.service"
    path.write_text(service_unit.render(place, configuration(folder), gpu=gpu))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    need("systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(Path(arguments[-1]).parent)},
    )


@pytest.mark.parametrize("variant", EXPOSURE_MAX)
def test_exposure_is_within_its_bound(variant: str, tmp_path: Path) -> None:
    bound = f"--threshold={EXPOSURE_MAX[variant]}"
    unit = str(written(tmp_path, variant))
    done = analyze("security", "--offline=yes", "--no-pager", bound, unit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_systemd_finds_no_mistake(variant: str, tmp_path: Path) -> None:
    scope = "--user" if variant.startswith("user") else "--system"
    unit = str(written(tmp_path, variant))
    done = analyze("verify", scope, "--man=no", "--recursive-errors=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_left_to_fill_in(variant: str, tmp_path: Path) -> None:
    text = written(tmp_path, variant).read_text()
    assert not re.search(r"@[A-Z_]+@", text)
    (command,) = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert Path(command).parent == Path(sys.executable).parent
    assert service_unit.ours(text)
    assert not service_unit.ours(text.replace("LimitNOFILE=65536", "LimitNOFILE=4096"))


def test_the_unit_follows_the_configuration(tmp_path: Path) -> None:
    file = configuration(
        tmp_path,
        '[daemon]\ndrain_timeout = "2 min"\n'
        '[nvme]\npaths = ["/var/lib/kvstore", "/mnt/a drive/50%"]\n'
        '[tenants.team]\ngroup = "daemon"\n',
    )
    lines = service_unit.render(SYSTEM, file).splitlines()
    drive = '"/mnt/a drive/50%%"'
    assert {f"ReadWritePaths={drive}", f"RequiresMountsFor={drive}"} <= set(lines)
    assert "ReadWritePaths=/var/lib/kvstore" not in lines
    assert "SupplementaryGroups=daemon" in lines
    assert "TimeoutStopSec=140s" in lines
    own = service_unit.render(OWN, file)
    assert "ReadWritePaths=" not in own
    assert "SupplementaryGroups=" not in own


def test_sockets_that_nobody_would_make_a_folder_for_are_refused(tmp_path: Path) -> None:
    file = configuration(tmp_path, '[daemon]\nrun_dir = "/run/elsewhere"\n')
    with pytest.raises(InvalidConfig, match="/run/elsewhere"):
        service_unit.render(SYSTEM, file)


def test_a_program_that_the_service_cannot_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(service_unit, "ETC", tmp_path / "etc")
    monkeypatch.setattr(sys, "executable", "/home/somebody/venv/bin/python")
    need("systemctl")
    said: list[str] = []
    with pytest.raises(KVStoreError, match="does not see"):
        service_unit.install(SYSTEM, configuration(tmp_path), said.append, start=False)
    assert said == []
    assert not (tmp_path / "etc").exists()


def test_a_host_without_systemd_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KVStoreError, match="install systemd"):
        service_unit.install(OWN, configuration(tmp_path), print)


def test_only_root_installs_for_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("systemctl")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KVStoreError, match="sudo"):
        service_unit.install(SYSTEM, configuration(tmp_path), print)
    with pytest.raises(KVStoreError, match="sudo"):
        service_unit.uninstall(SYSTEM, print)
