"""The eviction policies that there are, by the names that people give them."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.eviction.arc import ARC
from kvstore.eviction.base import Family, Independent
from kvstore.eviction.fifo import FIFO
from kvstore.eviction.lfu import LFU
from kvstore.eviction.lru import LRU
from kvstore.eviction.mq import MQ
from kvstore.eviction.relevance import Relevance
from kvstore.eviction.s3fifo import S3FIFO
from kvstore.eviction.wtinylfu import WTinyLFU

FAMILIES: dict[str, Callable[[], Family]] = {
    "relevance": Relevance,
    "relevance-prefill": lambda: Relevance(prefill=True),
    "lru": lambda: Independent(LRU),
    "arc": lambda: Independent(ARC),
    "fifo": lambda: Independent(FIFO),
    "lfu": lambda: Independent(LFU),
    "mq": lambda: Independent(MQ),
    "s3fifo": lambda: Independent(S3FIFO),
    "wtinylfu": lambda: Independent(WTinyLFU),
}
