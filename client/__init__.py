"""The client that is embedded in an engine: connect, open a cache for a layout, put and get blocks.

Needs protobuf and numpy alone. Nothing of the daemon is imported.
"""

from kvstore.client.cache import Cache
from kvstore.client.client import Client, connect
from kvstore.client.grant import Grant
from kvstore.client.places import Extent
from kvstore.client.reservation import Reservation
from kvstore.client.results import GetResult, Match, PutResult
from kvstore.types import Layout, Stats

__all__ = [
    "Cache",
    "Client",
    "Extent",
    "GetResult",
    "Grant",
    "Layout",
    "Match",
    "PutResult",
    "Reservation",
    "Stats",
    "connect",
]
