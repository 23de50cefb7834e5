"""What becomes of a tenant's devices, told in the log once for each change; damage, each time."""

from __future__ import annotations

import structlog

from kvstore.orders import Move, MoveKind
from kvstore.placement import Placement
from kvstore.types import SLOT_ALIGNMENT

log = structlog.get_logger()


class Tidings:
    """Remembers what was told last."""

    def __init__(self, tenant: str, placement: Placement) -> None:
        self._tenant = tenant
        self._placement = placement
        self._nvme_ok = placement.health.ok
        self._gpus_lost = 0
        self._problem = ""

    def failed(self, move: Move, problem: str) -> None:
        """A device did not do this move."""
        what = "copy to a GPU failed" if move.kind is MoveKind.CLIMB else "NVMe operation failed"
        log.error(what, tenant=self._tenant, problem=problem)
        self._problem = problem

    def damaged(self, move: Move) -> None:
        """Bytes were not what was stored."""
        log.warning(
            "damaged block dropped",
            tenant=self._tenant,
            hash=move.key.hex(),
            offset=move.nvme * SLOT_ALIGNMENT,
        )

    def unopened(self, problem: str) -> None:
        """The NVMe tier is fenced from the start."""
        log.error(
            "NVMe tier cannot be opened: DRAM only until it can",
            tenant=self._tenant,
            problem=problem,
        )
        self._nvme_ok = False

    def tell(self) -> None:
        """What has changed since the last time."""
        ok = self._placement.health.ok
        if self._nvme_ok and not ok:
            log.error(
                "NVMe tier is fenced: DRAM only until a probe works",
                tenant=self._tenant,
                problem=self._problem or "it hangs: nothing has ended for nvme.hang_timeout",
            )
        elif ok and not self._nvme_ok:
            log.warning("NVMe tier works again", tenant=self._tenant)
        self._nvme_ok = ok
        lost = self._placement.mirror.fenced
        if len(lost) > self._gpus_lost:
            log.error(
                "GPU is fenced: its blocks are served from DRAM until kvstored is restarted",
                tenant=self._tenant,
                gpus=lost,
                problem=self._problem,
            )
        self._gpus_lost = len(lost)
        self._problem = ""
