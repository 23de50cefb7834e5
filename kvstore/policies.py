"""The eviction policies that there are, by the names that people give them."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.eviction.base import Family, Independent
from kvstore.eviction.lru import LRU
from kvstore.eviction.relevance import Relevance

FAMILIES: dict[str, Callable[[], Family]] = {
    "lru": lambda: Independent(LRU),
    "relevance": Relevance,
}
