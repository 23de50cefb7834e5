"""What an operator sets for the SGLang storage: our part of its extra configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvstore.client.cache import DEADLINE_S
from kvstore.client.guard import TIMEOUT_S
from kvstore.errors import InvalidRequest

FACTORY_KEYS = {"backend_name", "module_path", "class_name"}  # read by SGLang itself
WAIT_S_MAX = 3_600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Our part of `--hicache-storage-backend-extra-config`.

    socket          the tenant's socket; None: the default place
    tenant          whose socket, when none is given
    timeout_s       the longest that a call may take, and that it waits for room
    load_deadline_s  how long a get waits for pages that come up from NVMe
    model_id        identity of the model's weights; empty: taken from their files
    interface_v1    SGLang calls the zero-copy methods
    """

    socket: str | None = None
    tenant: str = "default"
    timeout_s: float = TIMEOUT_S
    load_deadline_s: float = DEADLINE_S
    model_id: str = ""
    interface_v1: bool = False

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Settings:
        """Raises InvalidRequest for what cannot be meant: the engine has not started yet."""
        values = {name: value for name, value in extra.items() if name not in FACTORY_KEYS}
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise InvalidRequest(f"extra config: unknown key {unknown[0]!r}: there are {names}")
        for name in ("timeout_s", "load_deadline_s"):
            value = values.get(name, 1.0)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= WAIT_S_MAX:
                raise InvalidRequest(f"extra config: {name} is {value!r}: give 0 to 3600 seconds")
        for name in ("socket", "tenant", "model_id"):
            if not isinstance(values.get(name, ""), str):
                raise InvalidRequest(f"extra config: {name} is {values[name]!r}: give a text")
        values["interface_v1"] = bool(values.get("interface_v1"))
        return cls(**values)
