"""The judge of every byte: what was committed under which name, by whom, and what was forgotten.

Every shard that a client writes is filled with one line that names layout, key, shard and version;
so bytes tell where they come from, and a mixture of two is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from kvstore.types import Layout

Name = tuple[int, bytes]  # number of the layout, as the clients count them; hash
LINE_BYTES = 64
NEVER = 1 << 60


@dataclasses.dataclass(slots=True)
class Version:
    """What one client wrote under one name, as a whole or one shard of it."""

    number: int
    shard: int | None
    born: int  # when its slot was granted
    died: int = NEVER  # when it was forgotten


class WrongBytes(AssertionError):
    """Somebody was given bytes that nobody committed under that name."""


def content(name: Name, shard: int, version: int, length: int) -> bytes:
    """The bytes of one shard."""
    line = b"%d/%s/%d/%d" % (name[0], name[1], shard, version)
    return line.ljust(LINE_BYTES, b".") * (length // LINE_BYTES)


def origin(data: bytes) -> tuple[Name, int, int] | None:
    """Name, shard and version of bytes; None when they are no whole shard of anybody."""
    line = data[:LINE_BYTES]
    if line * (len(data) // LINE_BYTES) != data:
        return None
    try:
        layout, key, shard, version = line.rstrip(b".").split(b"/")
        return (int(layout), key), int(shard), int(version)
    except ValueError:
        return None


class Ledger:
    """All that was ever committed. Moments are numbers that rise with every step."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = layouts
        self.versions = 0
        self.last_forgotten: tuple[int, list[Name]] = (0, [])
        self._known: dict[Name, dict[int, Version]] = {}

    def new_version(self) -> int:
        """A number that no other writer has."""
        self.versions += 1
        return self.versions

    def committed(self, name: Name, version: Version) -> None:
        """A client said that its bytes are complete; the daemon has read it."""
        self._known.setdefault(name, {})[version.number] = version

    def forgotten(self, names: Iterable[Name], moment: int) -> None:
        """The daemon has dropped what there is under these names."""
        self.last_forgotten = moment, list(names)
        for name in self.last_forgotten[1]:
            for version in self._known.get(name, {}).values():
                version.died = min(version.died, moment)

    def living(self) -> list[Version]:
        """All that was committed and not forgotten."""
        known = (version for versions in self._known.values() for version in versions.values())
        return [version for version in known if version.died == NEVER]

    def cleared(self, versions: Sequence[Version], moment: int) -> None:
        """The daemon has dropped these by now, one after the other since it was asked to."""
        self.last_forgotten = moment, list(self._known)
        for version in versions:
            version.died = min(version.died, moment)

    def revived(self, names: Iterable[Name]) -> None:
        """A restart may have brought back what had been forgotten."""
        for name in names:
            for version in self._known.get(name, {}).values():
                version.died = NEVER

    def judge(self, name: Name, data: bytes, asked: int, what: str) -> None:
        """Raises WrongBytes unless all shards of a block were committed under the name, and not
        forgotten before it was asked for."""
        layout = self.layouts[name[0]]
        whole: set[int | None] = set()
        for shard in range(layout.shards):
            part = data[shard * layout.shard_bytes : (shard + 1) * layout.shard_bytes]
            self._judge_shard(name, shard, part, asked, what, whole)
        if len(whole) > 1:
            raise WrongBytes(f"{what}: {show(name)} is a mixture of versions {whole}")

    def _judge_shard(
        self, name: Name, shard: int, part: bytes, asked: int, what: str, whole: set[int | None]
    ) -> None:
        found = origin(part)
        if found is None:
            raise WrongBytes(f"{what}: shard {shard} of {show(name)} holds {_sample(part)}")
        owner, of, number = found
        if owner != name or of != shard:
            raise WrongBytes(
                f"{what}: shard {shard} of {show(name)} holds shard {of} of {show(owner)}"
            )
        version = self._known.get(name, {}).get(number)
        if version is None:
            raise WrongBytes(f"{what}: version {number} of {show(name)} was never committed")
        if version.shard is not None and version.shard != shard:
            raise WrongBytes(f"{what}: version {number} of {show(name)} wrote another shard")
        if version.died < asked:
            raise WrongBytes(f"{what}: version {number} of {show(name)} was forgotten before")
        whole.add(number if version.shard is None else None)

    def is_right(self, name: Name, data: bytes) -> bool:
        """Whether these bytes were ever committed under the name."""
        try:
            self.judge(name, data, 0, "")
        except WrongBytes:
            return False
        return True


def show(name: Name) -> str:
    return f"{name[0]}/{name[1].decode()}"


def _sample(part: bytes) -> str:
    lines = dict.fromkeys(
        part[at : at + LINE_BYTES].rstrip(b".\0") for at in range(0, len(part), LINE_BYTES)
    )
    return " + ".join(repr(line) for line in list(lines)[:3])
