from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Verb(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERB_UNSPECIFIED: _ClassVar[Verb]
    ATTACH: _ClassVar[Verb]
    OPEN: _ClassVar[Verb]
    LOOKUP: _ClassVar[Verb]
    RESERVE: _ClassVar[Verb]
    COMMIT: _ClassVar[Verb]
    ABORT: _ClassVar[Verb]
    ACQUIRE: _ClassVar[Verb]
    RELEASE: _ClassVar[Verb]
    PREFETCH: _ClassVar[Verb]
    RETAIN: _ClassVar[Verb]
    FORGET: _ClassVar[Verb]
    STATS: _ClassVar[Verb]
    CLEAR: _ClassVar[Verb]
    VERIFY: _ClassVar[Verb]
    SETTLE: _ClassVar[Verb]
    DRAIN: _ClassVar[Verb]
    TRACE: _ClassVar[Verb]
    WAKE: _ClassVar[Verb]
    USED: _ClassVar[Verb]
VERB_UNSPECIFIED: Verb
ATTACH: Verb
OPEN: Verb
LOOKUP: Verb
RESERVE: Verb
COMMIT: Verb
ABORT: Verb
ACQUIRE: Verb
RELEASE: Verb
PREFETCH: Verb
RETAIN: Verb
FORGET: Verb
STATS: Verb
CLEAR: Verb
VERIFY: Verb
SETTLE: Verb
DRAIN: Verb
TRACE: Verb
WAKE: Verb
USED: Verb

class ErrorReply(_message.Message):
    __slots__ = ("error", "message")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("protocol", "client", "pid", "join", "token")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    pid: int
    join: int
    token: bytes
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., pid: _Optional[int] = ..., join: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("protocol", "version", "tenant", "generation", "token", "arena_path", "arena_bytes", "arena_inode", "keys_max", "leases_max", "session", "gpus", "nvme", "epochs_path", "epochs_inode")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_INODE_FIELD_NUMBER: _ClassVar[int]
    KEYS_MAX_FIELD_NUMBER: _ClassVar[int]
    LEASES_MAX_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    NVME_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_PATH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_INODE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    tenant: str
    generation: int
    token: bytes
    arena_path: str
    arena_bytes: int
    arena_inode: int
    keys_max: int
    leases_max: int
    session: int
    gpus: _containers.RepeatedCompositeFieldContainer[GpuArena]
    nvme: NvmeFiles
    epochs_path: str
    epochs_inode: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., tenant: _Optional[str] = ..., generation: _Optional[int] = ..., token: _Optional[bytes] = ..., arena_path: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., arena_inode: _Optional[int] = ..., keys_max: _Optional[int] = ..., leases_max: _Optional[int] = ..., session: _Optional[int] = ..., gpus: _Optional[_Iterable[_Union[GpuArena, _Mapping]]] = ..., nvme: _Optional[_Union[NvmeFiles, _Mapping]] = ..., epochs_path: _Optional[str] = ..., epochs_inode: _Optional[int] = ...) -> None: ...

class NvmeFiles(_message.Message):
    __slots__ = ("paths", "slab_bytes", "header_bytes", "engine", "sums")
    PATHS_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    paths: _containers.RepeatedScalarFieldContainer[str]
    slab_bytes: int
    header_bytes: int
    engine: str
    sums: str
    def __init__(self, paths: _Optional[_Iterable[str]] = ..., slab_bytes: _Optional[int] = ..., header_bytes: _Optional[int] = ..., engine: _Optional[str] = ..., sums: _Optional[str] = ...) -> None: ...

class GpuArena(_message.Message):
    __slots__ = ("bus", "bytes", "handle")
    BUS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    bus: str
    bytes: int
    handle: bytes
    def __init__(self, bus: _Optional[str] = ..., bytes: _Optional[int] = ..., handle: _Optional[bytes] = ...) -> None: ...

class LayoutMessage(_message.Message):
    __slots__ = ("model", "engine", "dtype", "block_tokens", "shards", "shard_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    dtype: str
    block_tokens: int
    shards: int
    shard_bytes: int
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., shards: _Optional[int] = ..., shard_bytes: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: LayoutMessage
    def __init__(self, layout: _Optional[_Union[LayoutMessage, _Mapping]] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("layout", "slot_bytes")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    layout: int
    slot_bytes: int
    def __init__(self, layout: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class Keys(_message.Message):
    __slots__ = ("layout", "hash_bytes", "hashes")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HASH_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    layout: int
    hash_bytes: int
    hashes: bytes
    def __init__(self, layout: _Optional[int] = ..., hash_bytes: _Optional[int] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class Hints(_message.Message):
    __slots__ = ("reuse", "finish_reason", "tag")
    class Reuse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Hints.Reuse]
        CONTINUE: _ClassVar[Hints.Reuse]
        DONE: _ClassVar[Hints.Reuse]
    UNKNOWN: Hints.Reuse
    CONTINUE: Hints.Reuse
    DONE: Hints.Reuse
    REUSE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    reuse: Hints.Reuse
    finish_reason: str
    tag: str
    def __init__(self, reuse: _Optional[_Union[Hints.Reuse, str]] = ..., finish_reason: _Optional[str] = ..., tag: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("length", "tiers")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    length: int
    tiers: bytes
    def __init__(self, length: _Optional[int] = ..., tiers: _Optional[bytes] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("keys", "shard", "parent", "hints", "deadline_s", "again", "skip", "lend", "lent")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    shard: int
    parent: bytes
    hints: Hints
    deadline_s: float
    again: bool
    skip: int
    lend: bool
    lent: int
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., shard: _Optional[int] = ..., parent: _Optional[bytes] = ..., hints: _Optional[_Union[Hints, _Mapping]] = ..., deadline_s: _Optional[float] = ..., again: bool = ..., skip: _Optional[int] = ..., lend: bool = ..., lent: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("lease", "status", "offsets")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    status: bytes
    offsets: bytes
    def __init__(self, lease: _Optional[int] = ..., status: _Optional[bytes] = ..., offsets: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("held", "stored", "lent", "lent_offset")
    HELD_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    LENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    held: bool
    stored: int
    lent: int
    lent_offset: int
    def __init__(self, held: bool = ..., stored: _Optional[int] = ..., lent: _Optional[int] = ..., lent_offset: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: bool = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("keys", "deadline_s", "prefill_tokens_per_s", "enough", "skip", "gpus", "poll", "direct")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ENOUGH_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    POLL_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    deadline_s: float
    prefill_tokens_per_s: float
    enough: int
    skip: int
    gpus: _containers.RepeatedScalarFieldContainer[int]
    poll: bool
    direct: bool
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., deadline_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., enough: _Optional[int] = ..., skip: _Optional[int] = ..., gpus: _Optional[_Iterable[int]] = ..., poll: bool = ..., direct: bool = ...) -> None: ...

class AcquireReply(_message.Message):
    __slots__ = ("lease", "length", "tiers", "offsets", "stop", "estimate_s", "copies", "beside")
    class Stop(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        END: _ClassVar[AcquireReply.Stop]
        ABSENT: _ClassVar[AcquireReply.Stop]
        PENDING: _ClassVar[AcquireReply.Stop]
        LATE: _ClassVar[AcquireReply.Stop]
        NO_ROOM: _ClassVar[AcquireReply.Stop]
        TOO_SLOW: _ClassVar[AcquireReply.Stop]
        FAILED: _ClassVar[AcquireReply.Stop]
    END: AcquireReply.Stop
    ABSENT: AcquireReply.Stop
    PENDING: AcquireReply.Stop
    LATE: AcquireReply.Stop
    NO_ROOM: AcquireReply.Stop
    TOO_SLOW: AcquireReply.Stop
    FAILED: AcquireReply.Stop
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_S_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    length: int
    tiers: bytes
    offsets: bytes
    stop: AcquireReply.Stop
    estimate_s: float
    copies: bytes
    beside: bytes
    def __init__(self, lease: _Optional[int] = ..., length: _Optional[int] = ..., tiers: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., stop: _Optional[_Union[AcquireReply.Stop, str]] = ..., estimate_s: _Optional[float] = ..., copies: _Optional[bytes] = ..., beside: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: bool = ...) -> None: ...

class UsedRequest(_message.Message):
    __slots__ = ("keys", "prefill_tokens_per_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    prefill_tokens_per_s: float
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ...) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ("ordered",)
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    ordered: int
    def __init__(self, ordered: _Optional[int] = ...) -> None: ...

class RetainRequest(_message.Message):
    __slots__ = ("keys", "priority", "ttl_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    priority: int
    ttl_s: float
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., priority: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class RetainReply(_message.Message):
    __slots__ = ("retained",)
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    retained: int
    def __init__(self, retained: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ("forgotten",)
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    forgotten: int
    def __init__(self, forgotten: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearReply(_message.Message):
    __slots__ = ("forgotten",)
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    forgotten: int
    def __init__(self, forgotten: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("checked", "damaged", "skipped")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    checked: int
    damaged: int
    skipped: int
    def __init__(self, checked: _Optional[int] = ..., damaged: _Optional[int] = ..., skipped: _Optional[int] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sessions: _Optional[_Iterable[int]] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ("settled",)
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    settled: int
    def __init__(self, settled: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    def __init__(self, session: _Optional[int] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("found", "written")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    found: bool
    written: int
    def __init__(self, found: bool = ..., written: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("action", "path", "max_bytes")
    class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SHOW: _ClassVar[TraceRequest.Action]
        START: _ClassVar[TraceRequest.Action]
        STOP: _ClassVar[TraceRequest.Action]
    SHOW: TraceRequest.Action
    START: TraceRequest.Action
    STOP: TraceRequest.Action
    ACTION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    action: TraceRequest.Action
    path: str
    max_bytes: int
    def __init__(self, action: _Optional[_Union[TraceRequest.Action, str]] = ..., path: _Optional[str] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class TraceReply(_message.Message):
    __slots__ = ("recording", "path", "requests", "dropped", "bytes", "files")
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    recording: bool
    path: str
    requests: int
    dropped: int
    bytes: int
    files: int
    def __init__(self, recording: bool = ..., path: _Optional[str] = ..., requests: _Optional[int] = ..., dropped: _Optional[int] = ..., bytes: _Optional[int] = ..., files: _Optional[int] = ...) -> None: ...
