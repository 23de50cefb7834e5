"""Every error the product raises, drawn as a tree, each with the gRPC status that carries it.

    KVStoreError
    +-- InvalidRequest            the caller's input; nothing was changed
    |   +-- InvalidLayout         a layout that no slot can hold, or that contradicts itself
    |   +-- InvalidKeys           hashes of a wrong length, of mixed lengths, or twice in one list
    |   +-- InvalidBlock          a buffer of the wrong size, kind or contiguity
    |   +-- TooLarge              more keys or bytes in one call than the daemon takes
    +-- InvalidConfig             the configuration names something impossible
    +-- LimitExceeded             a bound of this session or of the host is reached
    +-- Unavailable               no daemon answers there
    |   +-- DeadlineExceeded      it did not answer in time
    |   +-- ArenaGone             the memory it names is no longer there
    +-- ProtocolMismatch          client and daemon speak different versions
    +-- NotPermitted              the operating system refused
    +-- AlreadyRunning            another daemon owns that directory
    +-- SessionLost               the session ended; what it held is void
    +-- InternalError             a defect of ours

A miss is not an error. Every message says what happened, to which thing, and what to do now.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of every error that kvstore raises."""


class InvalidRequest(KVStoreError):
    """The caller's input is wrong; nothing was changed."""


class InvalidLayout(InvalidRequest):
    """The layout cannot be stored here."""


class InvalidKeys(InvalidRequest):
    """The list of hashes is malformed."""


class InvalidBlock(InvalidRequest):
    """A buffer does not have the size or the memory order of a block."""


class TooLarge(InvalidRequest):
    """One call asks for more than the daemon takes in one call."""


class InvalidConfig(KVStoreError):
    """The configuration cannot be run."""


class LimitExceeded(KVStoreError):
    """A bound of this session or of the host is reached."""


class Unavailable(KVStoreError):
    """No daemon answers."""


class DeadlineExceeded(Unavailable):
    """The daemon did not answer within the deadline."""


class ArenaGone(Unavailable):
    """The arena that the daemon named is no longer there."""


class ProtocolMismatch(KVStoreError):
    """Client and daemon speak different protocol versions."""


class NotPermitted(KVStoreError):
    """The operating system refused access."""


class AlreadyRunning(KVStoreError):
    """Another daemon owns the directory."""


class SessionLost(KVStoreError):
    """The session has ended; what it held is void."""


class InternalError(KVStoreError):
    """A defect in kvstore."""


# The name of the gRPC status that carries each error through the front door.
GRPC_STATUS: dict[type[KVStoreError], str] = {
    KVStoreError: "UNKNOWN",
    InvalidRequest: "INVALID_ARGUMENT",
    InvalidLayout: "INVALID_ARGUMENT",
    InvalidKeys: "INVALID_ARGUMENT",
    InvalidBlock: "INVALID_ARGUMENT",
    TooLarge: "INVALID_ARGUMENT",
    InvalidConfig: "FAILED_PRECONDITION",
    LimitExceeded: "RESOURCE_EXHAUSTED",
    Unavailable: "UNAVAILABLE",
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    ArenaGone: "UNAVAILABLE",
    ProtocolMismatch: "FAILED_PRECONDITION",
    NotPermitted: "PERMISSION_DENIED",
    AlreadyRunning: "ALREADY_EXISTS",
    SessionLost: "ABORTED",
    InternalError: "INTERNAL",
}

BY_NAME: dict[str, type[KVStoreError]] = {error.__name__: error for error in GRPC_STATUS}
