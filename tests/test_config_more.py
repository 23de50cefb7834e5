"""The configuration: folders that nobody can make, and GPUs that variables name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore import config, paths
from kvstore.errors import InvalidConfig
from kvstore.types import GIB
from tests.config_tree import config_tree


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return config_tree(tmp_path)


@pytest.mark.parametrize("key", ["daemon.run_dir", "dram.path"])
def test_a_folder_below_a_file(base: dict[str, Any], tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    section, name = key.split(".")
    path = str(tmp_path / "file" / "below")
    base[section][name] = path
    with pytest.raises(InvalidConfig, match=rf"{key} = '{path}': .*/file is no folder: name "):
        config.parse(base, {}, "f.toml")


def test_a_device_that_is_not_there_is_a_warning(base: dict[str, Any], tmp_path: Path) -> None:
    """The daemon runs without it, and uses it once it comes."""
    (tmp_path / "file").touch()
    base["nvme"]["paths"] = [str(tmp_path / "file")]
    (said,) = config.parse(base, {}, "f.toml").warnings()
    assert "/file is no folder: without it there is no NVMe tier" in said


@pytest.mark.parametrize(
    ("file", "variables", "expected"),
    [
        ([], {"SIZE": "1 GiB"}, [(0, GIB)]),
        ([], {"SIZE": "1 GiB", "DEVICE": "2"}, [(2, GIB)]),
        ([{"device": 1, "size": "2 GiB"}], {"SIZE": "1 GiB"}, [(1, GIB)]),
        ([{"device": 1}, {"device": 3}], {"3_SIZE": "1 GiB", "4_SIZE": "2 GiB"},
         [(1, 0), (3, GIB), (4, 2 * GIB)]),
    ],
)  # fmt: skip
def test_parts_of_gpus_from_the_environment(
    base: dict[str, Any],
    file: list[dict[str, Any]],
    variables: dict[str, str],
    expected: list[tuple[int, int]],
) -> None:
    environ = {f"KVSTORE_HBM_{name}": text for name, text in variables.items()}
    found = config.parse(base | {"hbm": file}, environ, "f.toml")
    assert [(one.device, one.size) for one in found.hbm] == expected


@pytest.mark.parametrize(
    ("count", "names"),
    [(2, ["SIZE"]), (0, ["SIZE", "3_SIZE"]), (0, ["0_SIZE", "DEVICE"]), (0, ["0_DEVICE"])],
)
def test_variables_that_do_not_say_of_which_gpu(
    base: dict[str, Any], count: int, names: list[str]
) -> None:
    environ = {f"KVSTORE_HBM_{name}": "1" for name in names}
    tables = [{"device": at} for at in range(count)]
    with pytest.raises(InvalidConfig, match="cannot be told of which table: use KVSTORE_HBM_<DEV"):
        config.parse(base | {"hbm": tables}, environ, "f.toml")


def test_clients_follow_the_variable_that_moves_the_daemon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVSTORE_DAEMON_RUN_DIR", str(tmp_path))
    assert paths.socket_path("team-a") == tmp_path / "team-a" / "kvstore.sock"
    monkeypatch.setenv("KVSTORE_DAEMON_RUN_DIR", "")
    assert paths.run_dir() != tmp_path
