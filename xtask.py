# SPDX-License-Identifier: MIT-0
"""xtask: the Task of the xpander.ai agent platform, in one file of the standard library.

Load a task, watch it live, change it, stop it, read what it did:

    from xtask import Task                    # XPANDER_API_KEY, XPANDER_ORGANIZATION_ID

    task = Task.create("agent-id", "What is 2+2?", events_streaming=True)
    for event in task.events():               # live; the last one is task_finished
        print(event.type, event.data)
    print(task.reload().result)

Each method has an async twin with the prefix `a`: `await Task.aload(...)`, `async for event in
task.aevents()`. Failures are `ModuleException`; wrong arguments are `ValueError`.

Copy this file into your project; MIT-0 asks for no notice. `__version__` says which version it is;
to update, replace the file. What stands below the cutting line (a local platform for tests and
the terminal program) may be deleted. Python 3.9 or newer, no other package.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import http.client
import itertools
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import weakref
from collections import deque
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Callable,
    Coroutine,
    Deque,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
    cast,
)

if TYPE_CHECKING:
    from typing import ParamSpec  # new in Python 3.10: only type checkers read it here

    _P = ParamSpec("_P")

__version__ = "2.0.0"

__all__ = [
    "AgentActivityThread",
    "AgentActivityThreadAuth",
    "AgentActivityThreadMessage",
    "AgentActivityThreadMessageContent",
    "AgentActivityThreadOtherEntry",
    "AgentActivityThreadReasoning",
    "AgentActivityThreadReasoningType",
    "AgentActivityThreadSubAgentTrigger",
    "AgentActivityThreadToolCall",
    "AgentExecutionInput",
    "AgentExecutionStatus",
    "Configuration",
    "ModuleException",
    "OutputFormat",
    "ServerSentEvent",
    "Task",
    "TaskUpdateEvent",
    "TaskUpdateEventType",
    "TasksListItem",
    "ToolCallRequest",
    "ToolCallRequestReasoning",
    "ToolCallResult",
    "User",
    "iter_sse",
]

# ---- Limits --------------------------------------------------------------------------------------

_MAX_EVENT = 16 * 2**20  # bytes between two blank lines of a stream
_MAX_RESPONSE = 64 * 2**20  # bytes of a JSON response
_MAX_FILE = 10 * 2**20  # bytes of one input file
_MAX_FILES = 32 * 2**20  # bytes of all input files of one call
_FILE_THREADS = 8
_MAX_REDIRECTS = 5
_CONNECT_TIMEOUT = 10.0  # seconds
_MAX_RETRY_AFTER = 60.0  # seconds; a server that asks for more gets no second request
_MAX_IDLE_SECONDS = 20.0  # an idle connection is closed before any load balancer closes it
_MAX_IDLE_CONNECTIONS = 32
_REPLAY_WINDOW = 10_000  # events remembered, to skip what is sent again after a reconnect
_PUMP_SLOTS = 4  # batches of a stream (64 KiB or one event) that may wait for an async consumer
_FINAL_SILENCE = 5.0  # seconds of silence after which the stream of a finished task is over
_REFUSAL_SECONDS = 2.0  # for the body of a refused stream, whose status alone is enough

# ---- Errors and warnings -------------------------------------------------------------------------


class ModuleException(Exception):
    """The platform gave no answer, or an answer that reports an error.

    `status_code` is the HTTP status, 500 where there is none; `description` says what happened;
    `details` is the parsed body of the response or None; `answered` is False where no server said
    it (no connection, a timeout, a missing setting). The cause is chained.
    """

    _sent = True  # False where connecting failed, so that the server saw nothing of the request
    _retry_after: Optional[float] = None  # seconds, as the server asked

    def __init__(
        self, status_code: int, description: str, details: Any = None, answered: bool = True
    ) -> None:
        super().__init__(status_code, description, details, answered)
        self.status_code = status_code
        self.description = description
        self.details = details
        self.answered = answered

    def __str__(self) -> str:
        return f"[{self.status_code}] {self.description}"

    def __repr__(self) -> str:  # without the details, which may hold anything
        return f"{type(self).__name__}({self.status_code}, {self.description!r})"


class _URLRejected(OSError, ValueError):
    """A URL that must not be opened: not http(s), or untrusted with a non-public address."""


def _warn(message: str, *arguments: Any) -> None:
    import logging  # 19 ms of import that most runs never need

    logging.getLogger(__name__).warning(message, *arguments)


_SECRETS = ("access_token", "user_tokens", "user_oidc_token", "api_key", "x-api-key")
_URL_WITH_QUERY = re.compile(r"(?is)(\s*[a-z][a-z\d+.-]*://[^?]*\?).+")


def _redact(value: Any, depth: int = 100) -> Any:
    """The value without secrets and the queries of URLs, for everything a person may see."""
    if isinstance(value, (dict, list, tuple)) and not depth:
        return "..."
    if isinstance(value, dict):
        return {
            _redact(key): "***" if key in _SECRETS and item else _redact(item, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(item, depth - 1) for item in value]
    url = _URL_WITH_QUERY.fullmatch(value) if isinstance(value, str) else None
    return url[1] + "***" if url else value


def _repr(owner: Any, values: Mapping[str, Any]) -> str:
    shown = [f"{name}={_redact(value)!r}" for name, value in values.items()]
    return f"{type(owner).__name__}({', '.join(shown)})"


# ---- Enums ---------------------------------------------------------------------------------------


class _OpenEnum(str, Enum):
    """A `str` enum that accepts newer values: they become members that are not registered."""

    __str__ = str.__str__  # an f-string prints the value on every Python, not `Name.member`

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member


class AgentExecutionStatus(_OpenEnum):
    """The status of a task."""

    Pending = "pending"
    Executing = "executing"
    InProgress = "executing"
    Paused = "paused"
    Error = "error"
    Failed = "failed"
    Completed = "completed"
    Stopped = "stopped"

    @property
    def is_final(self) -> bool:
        """Whether a task with this status is over."""
        return self.value in ("error", "failed", "completed", "stopped")


class OutputFormat(_OpenEnum):
    """The format of a task's result."""

    Text = "text"
    Markdown = "markdown"
    Json = "json"
    Html = "html"
    Voice = "voice"


class AgentActivityThreadReasoningType(_OpenEnum):
    """The two kinds of reasoning in an activity log."""

    Think = "think"
    Analyze = "analyze"


class TaskUpdateEventType(_OpenEnum):
    """The type of an event."""

    Connected = "connected"
    TaskCreated = "task_created"
    TaskUpdated = "task_updated"
    TaskFinished = "task_finished"
    Chunk = "chunk"
    ToolCallRequest = "tool_call_request"
    ToolCallResult = "tool_call_result"
    Think = "think"
    Analyze = "analyze"
    SubAgentTrigger = "sub_agent_trigger"
    AuthEvent = "auth_event"
    PlanUpdated = "plan_updated"
    TaskCompactization = "task_compactization"
    ContextStatus = "context_status"


# ---- Records: JSON objects as dataclasses, without loss ------------------------------------------

_R = TypeVar("_R", bound="_Record")
_T = TypeVar("_T")
_Time = Union[datetime, str, None]
_OLD_DATETIME = sys.version_info < (3, 11)


def _parse_time(value: Any) -> Any:
    """An aware datetime (no zone means UTC); what does not parse stays as it came."""
    if not isinstance(value, str) or not value.isascii():
        return value
    text = value.upper()  # fromisoformat() knows no "z"
    if _OLD_DATETIME:  # it takes fractions of 3 or 6 digits alone, and no "Z"
        text = text.replace("Z", "+00:00")
        text = re.sub(r"\.\d+", lambda fraction: f"{fraction[0]:0<7}"[:7], text)
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, IndexError):  # IndexError: PyPy, for less than a date
        return value
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _json_default(value: Any) -> Any:
    if isinstance(value, _Record):
        return value._items()
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


_encode = json.JSONEncoder(default=_json_default).encode
_canonical = json.JSONEncoder(sort_keys=True).encode


def _to_json(value: Any) -> Any:
    """The value as JSON has it: new containers, records as objects, enums and times as strings."""
    return json.loads(_encode(value))


def _drop_none(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values that are not None, as JSON."""
    return {name: value for name, value in _to_json(values).items() if value is not None}


def _converted(convert: Callable[[Any], Any], source: type = str, default: Any = None) -> Any:
    """A field whose JSON value is converted, if it has the type `source`."""
    return field(default=default, metadata={"convert": (source, convert)})


class _Schema(NamedTuple):
    """The fields of a record, but for `extra` and `raw`."""

    defaults: Dict[str, Any]
    factories: List[Tuple[str, Callable[[], Any]]]
    converters: List[Tuple[str, type, Callable[[Any], Any]]]


class _Record:
    """What the dataclasses that come from the server share. `extra` holds what has no name here."""

    extra: Dict[str, Any]
    _source: Mapping[str, Any] = {}  # the object as it came: which keys, and how times were written
    _configuration: Optional[Configuration] = None  # of records that can make further calls

    @classmethod
    @functools.cache
    def _schema(cls: type) -> _Schema:
        own = [f for f in fields(cls) if f.name not in ("extra", "raw")]
        pairs: List[Any] = [(f.name, f.default_factory) for f in own]
        factories = [(name, factory) for name, factory in pairs if callable(factory)]
        return _Schema(
            {
                **{f.name: getattr(cls, f.name, None) for f in own},
                **{name: factory() for name, factory in factories},
            },
            factories,
            [(f.name, *f.metadata["convert"]) for f in own if "convert" in f.metadata],
        )

    @classmethod
    def from_dict(cls: Type[_R], data: Mapping[str, Any]) -> _R:
        """The record of a JSON object. Nothing is refused and nothing is lost."""
        defaults, factories, converters = cls._schema()
        self = cls.__new__(cls)
        self.__dict__ = state = {**defaults, **data}
        for name, factory in factories:
            if name not in data:
                state[name] = factory()
        unknown = len(state) > len(defaults)
        extra = {name: state.pop(name) for name in data if name not in defaults} if unknown else {}
        state["extra"], state["_source"] = extra, data
        for name, source, convert in converters:
            value = state[name]
            if isinstance(value, source):
                state[name] = convert(value)
        return self

    def to_dict(self) -> Dict[str, Any]:
        """The JSON object: every key that came, and every field that is set."""
        return _to_json(self)  # type: ignore[no-any-return]

    def _items(self) -> Dict[str, Any]:
        source, items = self._source, {}
        for name, default in self._schema().defaults.items():
            value = getattr(self, name)
            if name in source or value != default:
                unchanged = isinstance(value, datetime) and value == _parse_time(source.get(name))
                items[name] = source[name] if unchanged else value  # times as the server wrote them
        return {**items, **self.extra}

    def _values(self) -> Dict[str, Any]:
        return {name: getattr(self, name) for name in self._schema().defaults}

    def __eq__(self, other: object) -> bool:  # one for all: generating them takes a fifth of import
        if not isinstance(other, _Record) or type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values() and self.extra == other.extra

    def __repr__(self) -> str:
        return _repr(self, self._values())


@dataclass(repr=False, eq=False)
class User(_Record):
    """The user whom a task is run for. The platform requires `email`."""

    email: Optional[str] = None
    id: Optional[str] = None
    first_name: Optional[str] = None
    last_name: Optional[str] = None
    additional_attributes: Optional[Dict[str, Any]] = None
    timezone: Optional[str] = None
    display_name: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class AgentExecutionInput(_Record):
    """The input of a task: a text, URLs of files, and the user who asks."""

    text: Optional[str] = None
    files: Optional[List[str]] = None
    user: Optional[User] = _converted(User.from_dict, dict)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class ToolCallRequestReasoning(_Record):
    """Why a tool is called."""

    title: Optional[str] = None
    description: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class ToolCallRequest(_Record):
    """A tool call of the agent; also the data of `think` and `analyze` (`payload["input"]`)."""

    request_id: str
    operation_id: str
    tool_call_id: Optional[str] = None
    graph_node_id: Optional[str] = None
    tool_name: Optional[str] = None
    payload: Any = None
    reasoning: Optional[ToolCallRequestReasoning] = _converted(
        ToolCallRequestReasoning.from_dict, dict
    )
    plan_task_id: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class ToolCallResult(ToolCallRequest):
    """The result of a tool call."""

    result: Any = None
    is_error: Optional[bool] = None


# ---- Activity log --------------------------------------------------------------------------------


@dataclass(repr=False, eq=False)
class AgentActivityThreadMessageContent(_Record):
    """The text of a message and the URLs of its files."""

    text: Optional[str] = None
    files: Optional[List[str]] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class _Entry(_Record):
    """What all entries of an activity log have."""

    id: str
    created_at: _Time = _converted(_parse_time)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class AgentActivityThreadMessage(_Entry):
    """A message of the user (`role` "user") or the agent (`role` "agent")."""

    role: str = ""
    content: AgentActivityThreadMessageContent = _converted(
        AgentActivityThreadMessageContent.from_dict, dict
    )


@dataclass(repr=False, eq=False)
class AgentActivityThreadToolCall(_Entry):
    """A tool call with its result."""

    tool_name: str = ""
    payload: Any = None
    is_error: Optional[bool] = None
    reasoning: Optional[ToolCallRequestReasoning] = _converted(
        ToolCallRequestReasoning.from_dict, dict
    )
    result: Any = None


@dataclass(repr=False, eq=False)
class AgentActivityThreadReasoning(_Entry):
    """A thought of the agent."""

    type: AgentActivityThreadReasoningType = _converted(AgentActivityThreadReasoningType)
    title: Optional[str] = None
    confidence: Optional[float] = None
    thought: Optional[str] = None
    action: Optional[str] = None
    result: Optional[str] = None
    analysis: Optional[str] = None


@dataclass(repr=False, eq=False)
class AgentActivityThreadSubAgentTrigger(_Entry):
    """A request to another agent."""

    agent_id: Optional[str] = None
    query: str = ""
    files: Optional[List[str]] = None
    reasoning: Optional[ToolCallRequestReasoning] = _converted(
        ToolCallRequestReasoning.from_dict, dict
    )


@dataclass(repr=False, eq=False)
class AgentActivityThreadAuth(_Entry):
    """A login: `type` is not_supported, login_required, token_issue or token_ready."""

    type: str = ""
    data: Any = None


class AgentActivityThreadOtherEntry(_Entry):
    """An entry of any other kind: all of it but `id` and `created_at` is in `extra`."""


_AUTH_TYPES = ("not_supported", "login_required", "token_issue", "token_ready")


def _parse_entry(entry: Any) -> Any:
    """The entry as the first kind, in this order, that its keys name: it carries no tag."""
    if not isinstance(entry, dict):
        return entry
    kind = entry.get("type")
    cls: Type[_Entry] = AgentActivityThreadAuth
    if "role" in entry and "content" in entry:
        cls = AgentActivityThreadMessage
        fits = entry["role"] in ("user", "agent") and isinstance(entry["content"], dict)
    elif "tool_name" in entry:
        cls, fits = AgentActivityThreadToolCall, isinstance(entry["tool_name"], str)
    elif kind in ("think", "analyze"):
        texts = map(entry.get, ("title", "thought", "action", "result", "analysis"))
        cls, fits = AgentActivityThreadReasoning, {*map(type, texts)} <= {str, type(None)}
    elif "query" in entry:
        cls, fits = AgentActivityThreadSubAgentTrigger, isinstance(entry["query"], str)
    else:
        fits = "data" in entry and kind in _AUTH_TYPES
    return (cls if fits else AgentActivityThreadOtherEntry).from_dict(entry)


def _parse_entries(entries: List[Any]) -> List[Any]:
    return [_parse_entry(entry) for entry in entries]


@dataclass(repr=False, eq=False)
class AgentActivityThread(_Entry):
    """What a task did: its `messages`, oldest first. Route: GET /activity/{agent_id}/{task_id}."""

    messages: List[_Entry] = field(
        default_factory=list, metadata={"convert": (list, _parse_entries)}
    )
    user: Optional[User] = _converted(User.from_dict, dict)


# ---- Configuration -------------------------------------------------------------------------------


def _from_env(value: Optional[str], variable: str) -> Optional[str]:
    return (value or "").strip() or os.environ.get(variable, "").strip() or None


@dataclass(frozen=True, init=False)
class Configuration:
    """Where the platform is and who asks. Immutable; shared by any number of tasks and threads.

    Unset values come from XPANDER_API_KEY, XPANDER_ORGANIZATION_ID and XPANDER_BASE_URL, when the
    object is made. `timeout`: the longest single wait for the network, in seconds. `max_retries`:
    how often a failed request is sent again. `idle_timeout`: seconds of silence after which a
    stream is opened anew. `ssl_context`: instead of `ssl.create_default_context()`.
    `trusted_file_hosts`: hosts to fetch files from although their address is not public. A pickle
    carries the key. ValueError: a value that cannot be used.
    """

    api_key: Optional[str] = field(repr=False)
    organization_id: Optional[str]
    base_url: str
    timeout: float
    max_retries: int
    idle_timeout: float
    ssl_context: Optional[ssl.SSLContext]
    trusted_file_hosts: Tuple[str, ...]

    def __init__(
        self,
        api_key: Optional[str] = None,
        organization_id: Optional[str] = None,
        base_url: Optional[str] = None,
        *,
        timeout: float = 60.0,
        max_retries: int = 2,
        idle_timeout: float = 90.0,
        ssl_context: Optional[ssl.SSLContext] = None,
        trusted_file_hosts: Iterable[str] = (),
    ) -> None:
        api_key = _from_env(api_key, "XPANDER_API_KEY")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII: look for stray characters around it")
        for seconds in (timeout, idle_timeout):
            if not (isinstance(seconds, (int, float)) and 0 < seconds < 2**21):
                raise ValueError("timeout and idle_timeout are seconds: above 0, below 2**21")
        if not isinstance(max_retries, int):
            raise ValueError("max_retries must be a whole number")
        staging = os.environ.get("IS_STG", "").strip().lower() == "true"
        default_url = f"https://inbound.{'stg.' if staging else ''}xpander.ai"
        root = (_from_env(base_url, "XPANDER_BASE_URL") or default_url).partition("?")[0]
        root = root if "://" in root else f"https://{root}"
        hosts = trusted_file_hosts
        self.__dict__.update(  # frozen: setting an attribute would raise
            api_key=api_key,
            organization_id=_from_env(organization_id, "XPANDER_ORGANIZATION_ID"),
            base_url=str(_parse_url(root, "base_url")).rstrip("/"),
            timeout=timeout,
            max_retries=max_retries,
            idle_timeout=idle_timeout,
            ssl_context=ssl_context,
            trusted_file_hosts=tuple(
                map(_normal_host, [hosts] if isinstance(hosts, str) else hosts)
            ),
        )

    def close(self) -> None:
        """Close the idle connections. The configuration stays usable."""
        _close_all(self._transport.idle)

    def __enter__(self) -> Configuration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: Any) -> Configuration:
        return self  # immutable, and its connections are there to be shared

    def __getstate__(self) -> Dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def _transport(self) -> _Transport:
        # setdefault is atomic: of two threads that come here at once, both get the same one
        state = self.__dict__
        return state.get("_transport") or state.setdefault("_transport", _Transport(self))  # type: ignore[no-any-return]

    def _api_url(self, route: str, ids: Mapping[str, Any]) -> str:
        """A route under the API root, which names the organization on an agent controller."""
        url = _parse_url(self.base_url)
        is_controller = "agent-controller" in url.host or url.port == 9016
        if is_controller or url.target.split("/")[1] == "agent-controller":
            route, ids = (
                "/{organization_id}" + route,
                {"organization_id": self.organization_id, **ids},
            )
        return self.base_url + _path(route, ids)

    def _events_url(self, task: Task) -> str:
        """The route of a task's events: another host for the cloud, another port for local work."""
        url, base = _parse_url(self.base_url), self.base_url
        if url.host in ("inbound.xpander.ai", "inbound.stg.xpander.ai"):
            base = "https://" + url.host.replace("inbound", "agent-controller", 1)
        elif url.port == 8085 and url.host in ("localhost", "127.0.0.1", "::1"):
            base = "http://localhost:9016"
        organization_id = self.organization_id or task.organization_id
        ids = {"organization_id": organization_id, "task_id": task.id}
        return base + _path("/{organization_id}/agent-execution/{task_id}/events", ids)


def _path(route: str, ids: Mapping[str, Any]) -> str:
    """A route with its ids filled in, each a whole segment (RFC 3986, section 3.3)."""
    for name, value in ids.items():
        if name == "organization_id" and not value:
            reason = "No organization: set XPANDER_ORGANIZATION_ID or organization_id"
            raise ModuleException(400, reason, answered=False)
        if not isinstance(value, str) or value.strip() in ("", ".", ".."):
            raise ValueError(f"{name} must be a string that is not empty")
    quoted = {name: urllib.parse.quote(value, safe="") for name, value in ids.items()}
    return route.format(**quoted)


_shared: Dict[Tuple[Optional[str], ...], Configuration] = {}


def _default_configuration() -> Configuration:
    """The one configuration of this environment, so that calls in a loop share a connection."""
    names = ("XPANDER_API_KEY", "XPANDER_ORGANIZATION_ID", "XPANDER_BASE_URL", "IS_STG")
    key = tuple(map(os.environ.get, names))
    if len(_shared) >= 16 and key not in _shared:
        _shared.clear()  # an environment that keeps changing must not fill the memory
    # setdefault is atomic: all threads get the same one
    return _shared.get(key) or _shared.setdefault(key, Configuration())


# ---- Task ----------------------------------------------------------------------------------------


def _async_twin(method: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The async twin of a method: runs it in a thread, which ends when the twin is cancelled."""
    function: Any = getattr(method, "__func__", method)  # of a class method
    owner, _, name = function.__qualname__.rpartition(".")

    @functools.wraps(function)
    async def twin(*arguments: Any, **options: Any) -> _T:
        import asyncio  # 60 ms of import that sync programs never need

        def run() -> Any:
            _current_scope.set(scope)  # in the thread's own copy of the context
            return getattr(arguments[0], name)(*arguments[1:], **options)

        scope = _CancelScope()
        try:
            return await asyncio.to_thread(run)
        finally:
            scope.cancel()

    twin.__name__, twin.__qualname__ = f"a{name}", f"{owner}.a{name}"
    twin.__doc__ = f"`{name}`, async."
    return twin


@dataclass(repr=False, eq=False)
class TasksListItem(_Record):
    """A task as `Task.list` gives it; `load()` gives the whole one."""

    id: str
    agent_id: Optional[str] = None
    organization_id: Optional[str] = None
    status: Optional[AgentExecutionStatus] = _converted(AgentExecutionStatus)
    user_id: Optional[str] = None
    parent_task_id: Optional[str] = None
    triggering_agent_id: Optional[str] = None
    created_at: _Time = _converted(_parse_time)
    updated_at: _Time = _converted(_parse_time)
    source_node_type: Optional[str] = None
    result: Optional[str] = None
    title: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    def load(self) -> Task:
        """The whole task, with the configuration of the list."""
        return Task.load(self.id, self._configuration)

    aload = _async_twin(load)


_STATUS_ROUTE = "/agent-execution/{task_id}/status"


@dataclass(repr=False, eq=False)
class Task(_Record):
    """A task of the platform: the fields of its OpenAPI schema `AgentExecution`.

    Change fields, then `save()`. What has no field here is in `extra`, and is kept. All calls raise
    `ModuleException` and `ValueError`. One thread or coroutine may use a task at a time.
    """

    id: str
    agent_id: str
    organization_id: str
    input: AgentExecutionInput = _converted(AgentExecutionInput.from_dict, dict)
    created_at: _Time = _converted(_parse_time)
    updated_at: _Time = _converted(_parse_time)
    started_at: _Time = _converted(_parse_time)
    paused_at: _Time = _converted(_parse_time)
    finished_at: _Time = _converted(_parse_time)
    status: Optional[AgentExecutionStatus] = _converted(AgentExecutionStatus)
    internal_status: Optional[str] = None
    result: Optional[str] = None
    title: Optional[str] = None
    source: Optional[str] = None
    additional_context: Optional[str] = None
    expected_output: Optional[str] = None
    last_executed_node_id: Optional[str] = None
    agent_version: Optional[str] = None
    parent_execution: Optional[str] = None
    triggering_agent_id: Optional[str] = None
    worker_id: Optional[str] = None
    sub_executions: Optional[List[str]] = field(default_factory=list)
    finished_sub_executions: Optional[List[str]] = field(default_factory=list)
    is_manually_stopped: Optional[bool] = False
    events_streaming: Optional[bool] = False
    used_mutating_tools: Optional[bool] = False
    is_continuous: Optional[bool] = False
    disable_attachment_injection: Optional[bool] = False
    payload_extension: Optional[Dict[str, Any]] = None
    output_schema: Optional[Dict[str, Any]] = None
    output_format: Optional[OutputFormat] = _converted(OutputFormat)
    think_mode: Optional[str] = None
    mcp_servers: Optional[List[Dict[str, Any]]] = field(default_factory=list)
    hitl_request: Optional[Dict[str, Any]] = None
    pending_eca_request: Optional[Dict[str, Any]] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    _baseline = "{}"  # what the server said last, as JSON text: it is parsed for a save alone

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], configuration: Optional[Configuration] = None
    ) -> Task:
        """The task of a JSON object, as the server said it last: `save()` compares with this."""
        text = _encode(dict(data))
        return cls._from_response(json.loads(text), text, configuration)  # shares nothing with data

    @classmethod
    def _from_response(cls, data: Mapping[str, Any], text: Any, configuration: Any) -> Task:
        task = super().from_dict(data)
        task._baseline, task._configuration = text, configuration
        return task

    def __repr__(self) -> str:
        status, title = _to_json(self.status), _redact(self.title)
        return f"Task(id={self.id!r}, status={status!r}, title={title!r:.60})"

    @property
    def configuration(self) -> Configuration:
        """What the calls of this task use: the one it was made with, else the environment's."""
        return self._configuration or _default_configuration()

    @configuration.setter
    def configuration(self, configuration: Optional[Configuration]) -> None:
        self._configuration = configuration

    @property
    def is_finished(self) -> bool:
        """Whether the status is final; for an unknown one, whether `finished_at` is set."""
        known = self.status in list(AgentExecutionStatus)
        return AgentExecutionStatus(self.status).is_final if known else self.finished_at is not None

    @classmethod
    def load(cls, task_id: str, configuration: Optional[Configuration] = None) -> Task:
        """The task with this id. Route: GET /agent-execution/{task_id}/status.

        It is a class method: to load a task again into the same object, use `reload`.
        """
        ids = {"task_id": task_id}
        return cls._request_task(configuration or _default_configuration(), _STATUS_ROUTE, ids)

    @classmethod
    def create(
        cls,
        /,
        agent_id: str,
        prompt: str = "",
        file_urls: Optional[List[str]] = None,
        *,
        configuration: Optional[Configuration] = None,
        **options: Any,
    ) -> Task:
        """A new task for an agent. Route: POST /agent-execution/{agent_id}.

        Options are the platform's create keys (`events_streaming`, `output_format`, `title`, ...);
        those that are None are left out. `id=` continues a task, `user=` is a `User` or its dict,
        `agent_version=` picks a version. Neither prompt nor files nor id: ValueError.
        """
        if not (prompt or file_urls or options.get("id")):
            raise ValueError("a task needs a prompt, file_urls or the id of a task to continue")
        version = str(options.pop("agent_version", None) or "")
        if not (version.isascii() and version.isprintable()):
            raise ValueError("agent_version must be printable ASCII")
        asked = {"text": prompt, "files": file_urls or None, "user": options.pop("user", None)}
        return cls._request_task(
            configuration or _default_configuration(),
            "/agent-execution/{agent_id}",
            {"agent_id": agent_id},
            "POST",
            _drop_none({"input": _drop_none(asked), **options}),
            {"x-agent-version": version} if version else {},
        )

    @classmethod
    def list(
        cls, /, agent_id: str, *, configuration: Optional[Configuration] = None, **filters: Any
    ) -> List[TasksListItem]:
        """An agent's tasks. Route: GET /agent-execution/executions/history/{agent_id}.

        Filters: `user_id`, `parent_task_id`, `triggering_agent_id`, `status`, `internal_status`.
        """
        configuration = configuration or _default_configuration()
        route = "/agent-execution/executions/history/{agent_id}"
        url = configuration._api_url(route, {"agent_id": agent_id})
        if query := urllib.parse.urlencode(_drop_none(filters)):
            url += f"?{query}"
        reply = configuration._transport.call("GET", url)
        items = reply.value
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise reply.unexpected("a list of objects")
        records = [TasksListItem.from_dict(item) for item in items]
        for record in records:
            record._configuration = configuration
        return records

    def save(self) -> Task:
        """Send the fields that differ from what the server said last, and take its response.

        Deep changes count, None is sent as null. A failed save loses nothing: the next one sends
        the changes. Nothing to send: it reloads. Route: PATCH /agent-execution/{task_id}/update.
        """
        if isinstance(self.internal_status, str) and len(self.internal_status) > 255:
            raise ValueError("internal_status has more than the 255 characters the platform takes")
        before = self.to_dict()
        changed = _changed(json.loads(self._baseline), before)
        body = {name: value for name, value in before.items() if name in changed}
        if not body:
            return self._update(self._request_status(), before)
        route, ids = "/agent-execution/{task_id}/update", {"task_id": self.id}
        return self._update(
            self._request_task(self.configuration, route, ids, "PATCH", body), before
        )

    def set_status(
        self, status: Union[AgentExecutionStatus, str], result: Optional[str] = None
    ) -> Task:
        """Send the status, the result if there is one, and all other unsaved changes."""
        if status not in list(AgentExecutionStatus):
            names = ", ".join(AgentExecutionStatus)
            raise ValueError(f"{str(status)!r} is not a status: use one of {names}")
        values = {"status": AgentExecutionStatus(status), "result": result}
        changes = {name: value for name, value in values.items() if value is not None}
        known = json.loads(self._baseline)
        self.__dict__.update(changes)
        # what the server is not known to have is sent, also by the next save if this one fails
        self._baseline = _encode({name: known[name] for name in known if name not in changes})
        return self.save()

    def stop(self) -> Task:
        """Stop it; unsaved changes stay. Route: DELETE /agent-execution/{task_id}."""
        before = {**json.loads(self._baseline), "status": _to_json(self.status)}
        route, ids = "/agent-execution/{task_id}", {"task_id": self.id}
        stopped = self._request_task(self.configuration, route, ids, "DELETE")
        return self._update(stopped, before)

    def reload(self) -> Task:
        """The server's state, into this object. Unsaved changes are dropped."""
        return self._update(self._request_status())

    def wait_finished(self, timeout: Optional[float] = None) -> Task:
        """Reload until the status is final, with pauses that grow from 0.5 to 5 s.

        `TimeoutError` after `timeout` seconds, which are looked at after each reload.
        """
        for pause in self._pauses(timeout):
            _wait(pause)
            self.reload()
        return self

    async def await_finished(self, timeout: Optional[float] = None) -> Task:
        """`wait_finished`, async. No thread waits, so cancelling is immediate."""
        import asyncio

        for pause in self._pauses(timeout):
            await asyncio.sleep(pause)
            await self.areload()
        return self

    def events(self) -> _Events:
        """The task's events, each when it arrives; the last one is its `task_finished`.

        Broken and silent connections are replaced, and each event comes once; any other end than
        the task's is a `ModuleException`. ValueError at the call without `events_streaming`.
        `close()` or `with` leaves the stream at once. Route, under the events root:
        GET /{organization_id}/agent-execution/{task_id}/events.
        """
        return _Events(_Stream(self))

    def aevents(self) -> _AsyncEvents:
        """`events`, async; each stream is read by a daemon thread of its own."""
        return _AsyncEvents(_Stream(self))

    def get_activity_log(self) -> AgentActivityThread:
        """What the task did; `ModuleException` 404 if there is no log yet.

        Route: GET /activity/{agent_id}/{task_id}.
        """
        ids = {"agent_id": self.agent_id, "task_id": self.id}
        url = self.configuration._api_url("/activity/{agent_id}/{task_id}", ids)
        reply = self.configuration._transport.call("GET", url)
        if reply.value in (None, {}):
            raise ModuleException(404, "No activity log yet")
        if not isinstance(reply.value, dict):
            raise reply.unexpected("an activity log")
        return AgentActivityThread.from_dict(reply.value)

    def get_files(self) -> List[Any]:
        """The PDFs: `agno.media.File` with their bytes where agno is installed, else URLs."""
        urls = self._file_urls([".pdf"])
        try:
            from agno.media import File  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        fetched = _fetch_files(self.configuration, urls)
        found = [_agno_pdf(self.configuration, File, *pair) for pair in zip(urls, fetched)]
        return [file for file in found if file is not None]

    def get_images(self) -> List[Any]:
        """The images: `agno.media.Image` with their URL where agno is installed, else URLs."""
        urls = self._file_urls(_IMAGES)
        try:
            from agno.media import Image  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        # agno fetches what it is given, so the same rules hold
        return [Image(url=url) for url in urls if _is_allowed(self.configuration, url)]

    def get_human_readable_files(self) -> List[Dict[str, str]]:
        """`{"url", "content"}` of each readable file, in order; 8 are fetched at a time.

        At most 10 MiB each, 32 MiB and the configuration's `timeout` seconds for the call; one
        that fails has the content "Error: ...". With `disable_attachment_injection`: URLs alone.
        """
        urls = self._file_urls(_READABLE)
        if self.disable_attachment_injection:
            return [{"url": url} for url in urls]
        contents = map(_decode_file, _fetch_files(self.configuration, urls))
        return [{"url": url, "content": content} for url, content in zip(urls, contents)]

    def to_message(self) -> str:
        """The input as one text for a model: the text, the URLs, the readable files' contents."""
        urls, readable = self._file_urls(), self.get_human_readable_files()
        lines = [getattr(self.input, "text", None), "Files: " + ", ".join(urls) if urls else None]
        lines += ["Files contents:", *map(json.dumps, readable)] if readable else []
        return "\n".join(map(str, filter(None, lines)))

    # The async twins; `aevents` and `await_finished` are beside theirs.
    aload = classmethod(_async_twin(load))
    acreate = classmethod(_async_twin(create))
    alist = classmethod(_async_twin(list))
    asave = _async_twin(save)
    aset_status = _async_twin(set_status)
    astop = _async_twin(stop)
    areload = _async_twin(reload)
    aget_activity_log = _async_twin(get_activity_log)
    aget_files = _async_twin(get_files)
    aget_images = _async_twin(get_images)
    aget_human_readable_files = _async_twin(get_human_readable_files)
    ato_message = _async_twin(to_message)

    @classmethod
    def _request_task(
        cls,
        configuration: Configuration,
        route: str,
        ids: Dict[str, str],
        method: str = "GET",
        body: Optional[Dict[str, Any]] = None,
        headers: Mapping[str, str] = {},
    ) -> Task:
        """The task in the response of a route; its status where a change has an empty response."""
        url = configuration._api_url(route, ids)
        reply = configuration._transport.call(method, url, body, headers)
        if reply.value is None and method in ("PATCH", "DELETE"):
            return cls._request_task(configuration, _STATUS_ROUTE, ids)
        if isinstance(reply.value, dict) and isinstance(reply.value.get("id"), str):
            return cls._from_response(reply.value, reply.text, configuration)
        raise reply.unexpected("a task")

    def _request_status(self) -> Task:
        return self._request_task(self.configuration, _STATUS_ROUTE, {"task_id": self.id})

    def _update(self, newer: Task, before: Optional[Dict[str, Any]] = None) -> Task:
        """Take the state of `newer`, but for what the caller changed since the state `before`."""
        for name in _changed(before, self.to_dict()) if before is not None else ():
            if name in self._schema().defaults:
                newer.__dict__[name] = self.__dict__[name]
            elif name in self.extra:
                newer.extra[name] = self.extra[name]
        newer._configuration = self._configuration
        self.__dict__.update(newer.__dict__)
        return self

    def _pauses(self, timeout: Optional[float]) -> Iterator[float]:
        """The pauses between two looks at the status, until it is final."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        pause = 0.0
        while not self.is_finished:
            remaining = deadline - time.monotonic()
            if pause and remaining <= 0:
                raise TimeoutError(f"task {self.id} is still {self.status} after {timeout} s")
            yield max(0.0, min(pause, remaining))
            pause = min(max(0.5, pause * 1.5), 5.0)

    def _file_urls(self, extensions: Optional[List[str]] = None) -> List[str]:
        """The URLs of the input, or those whose path has one of the extensions."""
        files = getattr(self.input, "files", None)
        urls = [url for url in files if isinstance(url, str)] if isinstance(files, list) else []
        return [url for url in urls if extensions is None or _extension(url) in extensions]


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Set[str]:
    """The names of what is in one alone or differs as JSON: True is not 1, key order is nothing."""
    both = [name for name in old.keys() & new.keys() if old[name] is not new[name]]
    differing = {name for name in both if _canonical(old[name]) != _canonical(new[name])}
    return (old.keys() ^ new.keys()) | differing


# ---- URLs ----------------------------------------------------------------------------------------

_DEFAULT_PORTS = {"http": 80, "https": 443}
# neither "@" (a user name), nor what parsers of URLs read in two ways
_HOST = re.compile(r"[^\s\0-\x20\x7f@%\\/?#\[\]]+")


class _URL(NamedTuple):
    """A URL that can be requested, in its one normal form."""

    scheme: str
    host: str  # lower case, IDNA, neither brackets nor a final dot
    port: int
    target: str  # path and query, percent-encoded
    dns_name: str  # the host as the name service gets it: a final dot makes a name absolute

    @property
    def netloc(self) -> str:
        return self._netloc(self.host)

    def _netloc(self, host: str) -> str:
        host = f"[{host}]" if ":" in host else host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self._netloc(self.dns_name)}{self.target}"


def _normal_host(host: str) -> str:
    """A host name as it is connected to, compared and trusted; ValueError: not a name."""
    host = host.strip("[]") if host.isascii() else host.encode("idna").decode()
    return host.lower().rstrip(".")


def _parse_url(url: str, name: str = "a file's URL") -> _URL:
    """The normal form of an http or https URL without a user name."""
    if len(url) > 2048 and not url.isascii():  # normalizing takes time by the square of the length
        raise _URLRejected(f"{name} has more than 2048 characters, some of them not ASCII")
    try:
        parts = urllib.parse.urlsplit(url.strip())
        given, port = parts.hostname or "", parts.port
        host = _normal_host(given)
        if parts.scheme not in _DEFAULT_PORTS or "@" in parts.netloc or not _HOST.fullmatch(host):
            raise ValueError
    except ValueError:
        raise _URLRejected(
            f"{name} must be an http or https URL with a host and without a user name"
        ) from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = urllib.parse.quote(target, safe="/%!$&'()*+,;=:@~?")  # a path has no "?" of its own
    port = _DEFAULT_PORTS[parts.scheme] if port is None else port
    dns_name = host + "." if given.endswith(".") else host
    return _URL(parts.scheme, host, port, target, dns_name)


class _Proxy(NamedTuple):
    host: str
    port: int
    authorization: str  # "" without a user name


def _find_proxies() -> Dict[str, str]:
    """The proxies by urllib's rules, whose import (7 ms) is for those alone who may have one."""
    names = {name.lower() for name in os.environ}
    if sys.platform not in ("win32", "darwin") and not names & {"http_proxy", "https_proxy"}:
        return {}
    from urllib.request import getproxies

    return getproxies()


def _parse_proxy(url: str) -> _Proxy:
    """A proxy's URL; any but http is refused, before its password goes anywhere."""
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host = None
    if not host or parts.scheme != "http":
        raise _URLRejected("the proxy must have a URL that starts with http://, see HTTPS_PROXY")
    if parts.username is None:
        return _Proxy(host, port, "")
    import base64

    user, password = map(urllib.parse.unquote, (parts.username, parts.password or ""))
    return _Proxy(host, port, "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())


# ---- Transport -----------------------------------------------------------------------------------

_CONNECTION_ERRORS = (
    ConnectionError,
    http.client.IncompleteRead,
    http.client.BadStatusLine,  # one that was cut off, too
    ssl.SSLEOFError,
)
_TIMEOUTS = (socket.timeout, TimeoutError)  # two classes before Python 3.10
# What a request may raise; ValueError: an invalid host or port, also in a redirect
_REQUEST_ERRORS = (OSError, http.client.HTTPException, ValueError)
_CHUNK_HEAD = re.compile(rb"[\r\n]*0*([0-9A-Fa-f]{1,15})(?:[; \t][^\n]*)?\r?\n")
_jitter = random.SystemRandom().uniform  # not the generator that a program seeds


class _CancelScope:
    """Lets one thread end what another does on the network."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.sock: Optional[socket.socket] = None

    def attach(self, sock: socket.socket) -> None:
        self.sock = sock
        if self.cancelled.is_set():
            raise ConnectionAbortedError("the call was cancelled")

    def cancel(self) -> None:
        self.cancelled.set()
        if sock := self.sock:
            # close() would not wake a blocked read, and SSLSocket's own shutdown() takes the TLS
            # layer away under the thread that reads
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


# The scope of what this thread does: of an async twin, a stream or a file; none for a plain call
_current_scope: contextvars.ContextVar[Optional[_CancelScope]] = contextvars.ContextVar(
    "xtask_scope", default=None
)


def _attach(sock: socket.socket) -> None:
    if scope := _current_scope.get():
        scope.attach(sock)


def _is_cancelled() -> bool:
    scope = _current_scope.get()
    return scope is not None and scope.cancelled.is_set()


def _wait(seconds: float) -> None:
    """Every pause between two requests; it ends early when its scope is cancelled."""
    (_current_scope.get() or _CancelScope()).cancelled.wait(seconds)


class _RetryPolicy(NamedTuple):
    """After which failures a request is sent again; always where it was not sent at all."""

    statuses: Tuple[int, ...]
    errors: Tuple[Type[Exception], ...]

    def allows(self, error: ModuleException) -> bool:
        if error.answered:
            return error.status_code in self.statuses
        return not error._sent or isinstance(error.__cause__, self.errors)


_RETRY = _RetryPolicy((429, 502, 503, 504), _CONNECTION_ERRORS)
_RETRY_POST = _RetryPolicy((429,), ())  # what it did before the connection broke is not known
_RETRY_STREAM = _RetryPolicy((429, *range(500, 600)), _CONNECTION_ERRORS + _TIMEOUTS)


class _Request:
    """One request, and how it may be carried out."""

    sent = False  # whether the server may have seen any of it
    resent = False  # whether it was sent before, over an idle connection that was broken

    def __init__(
        self,
        method: str,
        url: _URL,
        headers: Mapping[str, str],
        timeout: float,
        body: Optional[bytes] = None,
        *,
        reuse: bool = False,
        public_only: bool = False,
    ) -> None:
        self.method, self.url, self.headers, self.body = method, url, headers, body
        self.timeout = timeout  # seconds, of a single wait
        self.reuse = reuse  # over an idle connection, which is idle again afterwards
        self.public_only = public_only  # the URL is a stranger's


def _decode_chunks(data: bytes, remaining: int) -> Tuple[bytes, bytes, int, bool]:
    """The content in `data`, of whose current chunk `remaining` bytes are due (RFC 9112, 7.1).

    Also what follows it, the bytes still due of the last chunk, and whether the end came.
    """
    offset, parts, ended = remaining, [data[:remaining]], False
    while not ended and (head := _CHUNK_HEAD.match(data, offset)):
        offset = head.end() + int(head[1], 16)  # which may be beyond what arrived
        parts.append(data[head.end() : offset])
        ended = offset == head.end()
    rest = data[offset:]
    if not ended and (len(rest) > 4096 or b"\n" in rest.lstrip(b"\r\n")):
        raise http.client.HTTPException("a chunk has no size")
    return b"".join(parts), rest, max(0, offset - len(data)), ended


class _Response(http.client.HTTPResponse):
    """A response whose body is read as it arrives, however it is framed (RFC 9112, section 6.3)."""

    connection: Optional[_Connection] = None
    buffer = b""  # what arrived behind the content: a chunk's head, or more than the body
    remaining = 0  # bytes still due of the current chunk
    ended = False  # whether the last chunk came

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.sock = sock

    def begin(self) -> None:
        super().begin()
        for _ in range(10):  # http.client skips 100 alone of the interim responses
            if self.status == 101 or self.status >= 200:  # 101 is final: another protocol follows
                return
            self.headers = None  # type: ignore[assignment]  # or begin() does nothing
            super().begin()
        raise http.client.HTTPException("too many interim responses")

    def read_some(self) -> bytes:
        """What has arrived of the body, b"" at its end; IncompleteRead if it was cut off."""
        if self.length == 0:  # also a 204 that claims to have chunks
            return b""
        if self.chunked:
            return self._read_chunks()
        part: bytes = self.fp.read1(65536)
        if self.length is not None:
            if not part:
                raise http.client.IncompleteRead(part)
            part, self.buffer = part[: self.length], part[self.length :]
            self.length -= len(part)
        return part

    def _read_chunks(self) -> bytes:
        """The content of all chunks that arrived: one at a time doubles the CPU of a burst."""
        data = b""
        while not data and not self.ended:
            arrived = self.fp.read1(65536)
            if not arrived:
                raise http.client.IncompleteRead(arrived)
            data, self.buffer, self.remaining, self.ended = _decode_chunks(
                self.buffer + arrived, self.remaining
            )
        return data

    def read_all(self, limit: int, seconds: float = float("inf")) -> bytes:
        """The body, to its end or just over a limit. What came counts where the status is an error:
        it says enough, even if the rest is cut off."""
        body, deadline = bytearray(), time.monotonic() + seconds
        try:
            while len(body) <= limit and time.monotonic() < deadline:
                part = self.read_some()
                if not part:
                    break
                body += part
        except (OSError, http.client.HTTPException):
            if self.status < 400:
                raise
        return bytes(body)

    @property
    def reusable(self) -> bool:
        """Whether the body ended where the head said, so that another response may follow."""
        if self.ended:
            return self.buffer == b"\r\n" and "Content-Length" not in self.headers
        declared = self.chunked or self.headers.get("Content-Length", "0") != "0"
        ended = self.length == 0 and not self.buffer and self.status >= 200
        return ended and not (self.status == 204 and declared)

    def close(self) -> None:
        """Close it and its connection, if that was not released."""
        super().close()
        if self.connection:
            self.connection.close()


def _open_socket(host: str, port: int, public_only: bool, seconds: float) -> socket.socket:
    """A socket connected to the first address of the host that accepts."""
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if public_only:
        _require_public(host, addresses)
    deadline = time.monotonic() + seconds
    while addresses:
        family, kind, protocol, _, address = addresses.pop(0)
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)  # fails on a host without this family
            _attach(sock)
            sock.settimeout(max(0.1, (deadline - time.monotonic()) / (len(addresses) + 1)))
            sock.connect(address)
            _attach(sock)  # being cancelled while connecting looks like success
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            if not addresses or not isinstance(error, OSError) or _is_cancelled():
                raise
    raise OSError(f"{host} has no address")


class _Connection(http.client.HTTPConnection):
    """A connection to a checked address, through a proxy and under TLS where that is needed."""

    response_class = _Response
    released_at = 0.0  # wall clock: the monotonic one stands still while a host is frozen

    def __init__(
        self, request: _Request, proxy: Optional[_Proxy], context: Optional[ssl.SSLContext]
    ) -> None:
        super().__init__(request.url.host, request.url.port, timeout=request.timeout)
        self.default_port = _DEFAULT_PORTS[request.url.scheme]
        self.url, self.proxy, self.context = request.url, proxy, context
        self.public_only = request.public_only and not proxy
        self.process = os.getpid()

    def connect(self) -> None:
        host, port = (self.proxy or (self.url.dns_name, self.port))[:2]
        seconds = min(_CONNECT_TIMEOUT, self.timeout or _CONNECT_TIMEOUT)
        self.sock = _open_socket(host, port, self.public_only, seconds)
        self.sock.settimeout(seconds)
        if self.context:
            if self.proxy:
                self._open_tunnel(self.proxy.authorization)
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            _attach(self.sock)
            self.sock.do_handshake()
        self.sock.settimeout(self.timeout)

    def _open_tunnel(self, authorization: str) -> None:
        """CONNECT through a proxy (RFC 9110, section 9.3.6)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = f"CONNECT {host}:{self.port} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
        head += f"Proxy-Authorization: {authorization}\r\n" if authorization else ""
        self.sock.sendall(f"{head}\r\n".encode("latin-1"))
        # the response cannot read ahead into the tunnel: in TLS the client speaks first
        with _Response(self.sock, method="CONNECT") as response:
            response.begin()
            reason = http.client.responses.get(response.status, "")  # its own may repeat a password
            text = f"the proxy refused the tunnel: {response.status} {reason}"
            if response.status in (502, 503, 504):
                raise ConnectionError(text)
            if not 200 <= response.status < 300:
                raise http.client.HTTPException(text)

    def is_usable(self) -> bool:
        """Whether it is fresh, of this process and silent: an idle one only says that it ends."""
        fresh = 0 <= time.time() - self.released_at < _MAX_IDLE_SECONDS
        if fresh and self.process == os.getpid():
            try:
                self.sock.setblocking(False)
                self.sock.recv(1)
            except (BlockingIOError, ssl.SSLWantReadError):
                self.sock.settimeout(self.timeout)
                return True
            except OSError:
                pass  # closed meanwhile
        return False


def _close_all(connections: List[_Connection]) -> None:
    with contextlib.suppress(IndexError):  # until there is none, whoever took it
        while True:
            connections.pop().close()


class _Reply(NamedTuple):
    """What the platform said: a JSON value (None for an empty body), its text, and which host."""

    value: Any
    text: bytes
    host: str

    def unexpected(self, expected: str) -> ModuleException:
        got = f"{self.host} sent {type(self.value).__name__}"
        return ModuleException(500, f"{got} where {expected} was expected", self.value)


class _Transport:
    """What a configuration keeps: its idle connections, its TLS contexts, its proxies."""

    def __init__(self, configuration: Configuration) -> None:
        self.timeout, self.max_retries = configuration.timeout, configuration.max_retries
        self.api_key, self.context = configuration.api_key, configuration.ssl_context
        self.trusted_hosts = configuration.trusted_file_hosts
        self.strangers_context: Optional[ssl.SSLContext] = None
        proxies = configuration.__dict__.get("_proxies")
        self.proxies: Dict[str, str] = _find_proxies() if proxies is None else proxies
        # No lock: a list's append and remove are atomic, and a lock that another thread holds at
        # a fork stays locked for ever.
        self.idle: List[_Connection] = []
        weakref.finalize(self, _close_all, self.idle)

    def request(
        self, method: str, url: str, headers: Mapping[str, str], **options: Any
    ) -> _Request:
        """A request with the key: for the API and the events, never for files."""
        if not self.api_key:
            raise ModuleException(401, "No API key: set XPANDER_API_KEY or api_key", answered=False)
        headers = {"x-api-key": self.api_key, **headers}
        return _Request(method, _parse_url(url, "the URL"), headers, **options)

    def call(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] = {}
    ) -> _Reply:
        """The JSON in the response to a request, which is sent again where that is safe."""
        headers = {"Accept": "application/json", **headers}
        content = None
        if body is not None:
            content = json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"

        def attempt(failures: int) -> _Reply:
            request = self.request(
                method, url, headers, timeout=self.timeout, body=content, reuse=method != "POST"
            )
            try:
                with self.open(request) as response:
                    text = response.read_all(_MAX_RESPONSE)
                    self._release(request, response)
                if not text and method == "GET" and response.will_close and response.status == 200:
                    raise http.client.IncompleteRead(text)  # its head may have been cut off
            except _REQUEST_ERRORS as error:
                raise self.connection_error(request, error) from error
            if method == "DELETE" and response.status == 404 and (failures or request.resent):
                return _Reply(None, b"", request.url.netloc)  # the first one may have done it
            value = self.parse_response(request, response, text)
            return _Reply(value, text, request.url.netloc)

        return self.retry(attempt, _RETRY_POST if method == "POST" else _RETRY)

    def retry(self, attempt: Callable[[int], _T], policy: _RetryPolicy, pause: float = 0.25) -> _T:
        """What `attempt` returns, called with the number of failures so far, all in a row.

        The pauses grow from `pause` seconds to 30, jittered, unless the server asks for another.
        """
        failures = 0
        while True:
            try:
                return attempt(failures)
            except ModuleException as error:
                seconds = error._retry_after
                if seconds is None:
                    seconds = min(30.0, pause * 2.0 ** min(failures, 4) * _jitter(1, 2))
                exhausted = failures >= self.max_retries or seconds > _MAX_RETRY_AFTER
                if exhausted or _is_cancelled() or not policy.allows(error):
                    raise
            _wait(seconds)  # here, so that a Ctrl-C has one plain traceback
            failures += 1

    def open(self, request: _Request) -> _Response:
        """The response to a request, or to the one that its redirects lead to."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._exchange(request)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            request = self._follow(request, response)
        text = f"redirected more than {_MAX_REDIRECTS} times"
        raise ModuleException(response.status, text)

    def _follow(self, request: _Request, response: _Response) -> _Request:
        """The request that a redirect asks for: a GET, to the same origin or for files to any."""
        location = response.headers.get("Location", "").encode("latin-1").decode("utf-8", "replace")
        location = urllib.parse.quote(location, safe="/%!$&'()*+,;=:@~?#[]")
        url = _parse_url(urllib.parse.urljoin(str(request.url), location), "a redirect")
        if not request.public_only and (request.method != "GET" or request.url[:3] != url[:3]):
            text = f"{request.url.netloc} redirects {request.method}: check XPANDER_BASE_URL"
            raise ModuleException(response.status, text)
        return _Request(
            "GET",
            url,
            request.headers,
            request.timeout,
            reuse=request.reuse,
            public_only=request.public_only,
        )

    def _exchange(self, request: _Request) -> _Response:
        """Send a request over an idle or a new connection; the response's head."""
        proxy = self._proxy_for(request.url)
        trusted = not request.public_only or request.url.host in self.trusted_hosts
        if proxy and not trusted:  # names are the proxy's to resolve; literals can be checked
            _check_host(request.url, socket.AI_NUMERICHOST)
        if idle := self._checkout(request, proxy):
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # closed while it was idle
                return self._send(idle, request)
            request.resent = True
        connection = _Connection(request, proxy, self._tls_context(request.url, trusted))
        connection.public_only = not (proxy or trusted)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        request.sent = True
        return self._send(connection, request)

    def _proxy_for(self, url: _URL) -> Optional[_Proxy]:
        proxy = self.proxies.get(url.scheme)
        if not proxy:
            return None
        from urllib.request import proxy_bypass

        return None if proxy_bypass(url.netloc) else _parse_proxy(proxy)

    def _tls_context(self, url: _URL, trusted: bool) -> Optional[ssl.SSLContext]:
        """The configuration's context, or for strangers one without its client certificate."""
        if url.scheme == "http":
            return None
        if trusted and self.context:
            return self.context
        if self.strangers_context is None:
            self.strangers_context = ssl.create_default_context()  # 20 ms: once, for https alone
            self.strangers_context.set_alpn_protocols(["http/1.1"])
        return self.strangers_context

    def _checkout(self, request: _Request, proxy: Optional[_Proxy]) -> Optional[_Connection]:
        """An idle connection for the request; those that cannot be used any more are closed."""
        for connection in self.idle[::-1] if request.reuse else ():
            if connection.url[:3] == request.url[:3] and connection.proxy == proxy:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self.idle.remove(connection)
                    if connection.is_usable():
                        return connection
                    connection.close()
        return None

    def _send(self, connection: _Connection, request: _Request) -> _Response:
        url, headers, proxy = request.url, {**request.headers}, connection.proxy
        headers["User-Agent"] = f"xtask/{__version__}"
        if not request.reuse:
            headers["Connection"] = "close"
        if proxy and not connection.context:
            headers.update(
                {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
            )
        target = str(url) if proxy and not connection.context else url.target
        try:
            _attach(connection.sock)
            try:
                connection.request(request.method, target, request.body, headers)
            except ConnectionError:
                # the server may have sent its response before it had the whole body
                with contextlib.suppress(OSError, http.client.HTTPException):
                    response = cast(_Response, connection.getresponse())
                    response.connection = connection
                    return response
                raise
            response = cast(_Response, connection.getresponse())
        except BaseException:
            connection.close()
            raise
        response.connection = connection
        return response

    def _release(self, request: _Request, response: _Response) -> None:
        """Make the connection of a response that was read to its end idle."""
        connection = response.connection
        # one that is to be closed has no socket any more
        reusable = request.reuse and response.reusable and connection and connection.sock
        if connection and reusable and len(self.idle) < _MAX_IDLE_CONNECTIONS:
            if scope := _current_scope.get():
                scope.sock = None  # or cancelling ends the call that has the connection next
            response.connection = None
            response.close()
            connection.released_at = time.time()
            self.idle.append(connection)

    def parse_response(self, request: _Request, response: _Response, body: bytes) -> Any:
        """The JSON value of a response (None for an empty one), or a ModuleException."""
        status, host = response.status, request.url.netloc
        invalid: Optional[Exception] = None
        try:
            if len(body) > _MAX_RESPONSE:
                raise ModuleException(500, f"{host} sent more than {_MAX_RESPONSE // 2**20} MiB")
            value = json.loads(body) if body.strip() else None
        except (ValueError, RecursionError) as error:
            value, invalid = None, error
        is_html = (
            "html" in response.headers.get("Content-Type", "").lower() or body.lstrip()[:1] == b"<"
        )
        if not 200 <= status < 300:
            text = body[:2000].decode("utf-8", "replace") if invalid and not is_html else ""
            raise self._status_error(response, value, text)
        if invalid:
            what = "HTML" if is_html else "something"
            raise ModuleException(500, f"{host} sent {what} that is not JSON") from invalid
        return value

    def _status_error(self, response: _Response, value: Any, text: str) -> ModuleException:
        """The error that a response's status is, in the words of its body."""
        text = " ".join(self.redact_key(text).split())[:200]
        description = self.redact_key(_redact(_describe(response.status, value, text)))
        error = ModuleException(response.status, description, value)
        error._retry_after = _parse_retry_after(response.headers.get("Retry-After", ""))
        return error

    def connection_error(self, request: _Request, error: Exception) -> ModuleException:
        """The failure of a request that has no response, or none to its end."""
        error.args = tuple(map(self.redact_key, error.args))  # a traceback shows it as the cause
        error.__context__ = None  # which it shows, too
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = (
                f"its certificate is not trusted ({error.verify_message}): name the authority in "
                "SSL_CERT_FILE or in Configuration(ssl_context=...)"
            )
        elif isinstance(error, _TIMEOUTS):
            reason = "no response in time; see Configuration(timeout=...)"
        elif isinstance(error, http.client.IncompleteRead):
            reason = "the response was cut off"
        elif isinstance(error, (ValueError, http.client.InvalidURL)) and not isinstance(
            error, _URLRejected
        ):
            reason = "the URL is not valid"
            error.args = (reason,)
        reason = " ".join(reason.split())[:300]
        text = f"No response from {request.url.netloc}: {reason}"
        failure = ModuleException(500, text, answered=False)
        final = (ssl.SSLCertVerificationError, _URLRejected)
        connecting = isinstance(error, OSError) and not isinstance(error, final)
        failure._sent = request.sent or not connecting
        return failure

    def redact_key(self, text: Any) -> Any:
        """The text without the key, which a server may have put there."""
        known = self.api_key and len(self.api_key) >= 4 and isinstance(text, str)
        return text.replace(self.api_key, "***") if known else text


def _describe(status: int, value: Any, plain: str) -> str:
    """What an error says in the forms of the platform and of proxies: JSON, plain text, nothing."""
    said = value if isinstance(value, dict) else {"detail": value}
    for text in map(said.get, ("detail", "message", "error")):
        if isinstance(text, str) and text.strip():
            return text.strip()
        if isinstance(text, list) and text and all(isinstance(item, dict) for item in text):
            return "; ".join(map(_describe_invalid, text))
    return plain or http.client.responses.get(status, "Unknown status")


def _describe_invalid(item: Dict[str, Any]) -> str:
    """An item of a 422's list."""
    path = item.get("loc")
    path = ".".join(map(str, path)) if isinstance(path, list) else path
    return f"{path}: {item.get('msg', 'invalid')}"


def _parse_retry_after(value: str) -> Optional[float]:
    """The seconds of a Retry-After, which may be a date (RFC 9110, section 10.2.3)."""
    if re.fullmatch("[0-9]+", value.strip()):
        return float(value)  # infinity for hundreds of digits
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # not a date
        moment = parsedate_to_datetime(value)
        moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc)
        return max(0.0, moment.timestamp() - time.time())
    return None


# ---- Server-sent events --------------------------------------------------------------------------


class ServerSentEvent(NamedTuple):
    """An event of a stream; `id` and `retry` (milliseconds) are the last seen so far."""

    event: str
    data: str
    id: str
    retry: Optional[int]

    def __repr__(self) -> str:
        return _repr(self, self._asdict())


def iter_sse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """The events of a `text/event-stream` in chunks cut anywhere; ValueError for one over 16 MiB.

    WHATWG HTML, section 9.2.6, "Interpreting an event stream". Does no I/O.
    """
    return itertools.chain.from_iterable(map(_Parser().feed, chunks))


class _Parser:
    """The state of a stream between two chunks."""

    def __init__(self, last_id: str = "", retry: Optional[int] = None) -> None:
        self.last_id, self.retry = last_id, retry
        self._bom = b"\xef\xbb\xbf"  # with which only the first event may start
        self._pending, self._size = bytearray(), 0  # of an incomplete event: linear in any chunks
        self._ended_with_cr = False  # an LF that follows belongs to it

    def feed(self, chunk: bytes) -> Iterable[ServerSentEvent]:
        """The events that this chunk completes."""
        complete, arrived = b"", len(chunk)
        if self._ended_with_cr or b"\n" in chunk or b"\r" in chunk:  # others complete nothing
            if self._ended_with_cr and chunk[:1] == b"\n":  # a CRLF over two chunks counts once
                chunk, self._ended_with_cr = chunk[1:], False
            if chunk:
                self._ended_with_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            blank = chunk[:1] == b"\n" == self._pending[-1:]
            if blank or b"\n\n" in chunk:
                complete, _, chunk = b"".join([self._pending, chunk]).rpartition(b"\n\n")
                complete = complete.removeprefix(self._bom)
                self._pending, self._size, self._bom = bytearray(), 0, b""
                arrived = len(chunk)
        self._pending += chunk
        self._size += arrived
        return self._events(complete) if complete or self._size > _MAX_EVENT else ()

    def _events(self, complete: bytes) -> Iterator[ServerSentEvent]:
        sizes = map(len, complete.split(b"\n\n") if len(complete) > _MAX_EVENT else ())
        fitting = next((number for number, size in enumerate(sizes) if size > _MAX_EVENT), None)
        for block in complete.decode("utf-8", "replace").split("\n\n")[:fitting]:
            if block.startswith("data: ") and "\n" not in block:  # nearly all: half the time
                yield ServerSentEvent("message", block[6:], self.last_id, self.retry)
            elif event := self._event(block):
                yield event
        if fitting is not None or self._size > _MAX_EVENT:
            raise ValueError(f"an event of over {_MAX_EVENT // 2**20} MiB")

    def _event(self, block: str) -> Optional[ServerSentEvent]:
        kind, data = "message", []
        for line in block.split("\n"):  # not splitlines(), which splits at U+2028 too
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value or "message"
            elif name == "id" and "\0" not in value:
                self.last_id = value
            elif name == "retry" and re.fullmatch("[0-9]{1,4000}", value):
                self.retry = int(value)
        return ServerSentEvent(kind, "\n".join(data), self.last_id, self.retry) if data else None


# ---- Events --------------------------------------------------------------------------------------

_EVENT_RECORDS: Dict[str, Type[_Record]] = {
    "task_created": Task,
    "task_updated": Task,
    "task_finished": Task,
    "think": ToolCallRequest,
    "analyze": ToolCallRequest,
    "tool_call_request": ToolCallRequest,
    "tool_call_result": ToolCallResult,
}
_EVENT_TYPES = {kind.value: kind for kind in TaskUpdateEventType}  # calling the enum is far slower
_ENVELOPE = {"type", "task_id", "organization_id", "time", "data"}
_REQUIRED = ("id", "agent_id", "organization_id", "input", "created_at")
_decode_json = json.JSONDecoder().raw_decode  # json.loads takes a third longer


@dataclass(repr=False, eq=False)
class TaskUpdateEvent(_Record):
    """One event. `data` is a `Task`, a `ToolCallRequest`, a `ToolCallResult`, or the JSON that came.

    `raw` is the envelope as it came, with the same objects as `data` but for tasks; `task_id` may
    be that of a sub-agent's task.
    """

    type: TaskUpdateEventType
    task_id: Optional[str] = None
    organization_id: Optional[str] = None
    time: _Time = None
    data: Any = None
    raw: Dict[str, Any] = field(default_factory=dict)
    extra: Dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        required: Mapping[str, Any] = {},
        configuration: Optional[Configuration] = None,
    ) -> TaskUpdateEvent:
        """The event of an envelope; `required` completes tasks that leave out required fields."""
        kind, body = data["type"], data.get("data")
        task_id, record = data.get("task_id") or required.get("id"), _EVENT_RECORDS.get(kind)
        if record and isinstance(body, dict):
            if record is Task:
                whole = {**required, **({"id": task_id} if task_id else {}), **body}
                body = Task.from_dict(whole, configuration)  # a copy: `raw` stays as it came
            elif isinstance(body.get("request_id"), str) and isinstance(
                body.get("operation_id"), str
            ):
                body = record.from_dict(body)
        known = data.keys() <= _ENVELOPE
        extra = {} if known else {key: data[key] for key in data if key not in _ENVELOPE}
        event = cls(
            _EVENT_TYPES.get(kind) or TaskUpdateEventType(kind),
            task_id,
            data.get("organization_id"),
            _parse_time(data.get("time")),
            body,
            data if isinstance(data, dict) else dict(data),
            extra,
        )
        event._source = data
        return event


class _Stream:
    """One reader of a task's events: what it knows over all its connections."""

    def __init__(self, task: Task) -> None:
        if not task.events_streaming:
            raise ValueError(
                "no events: create the task with events_streaming=True, or wait_finished()"
            )
        self.task, self.configuration = task, task.configuration
        self.transport = self.configuration._transport
        self.scope, self.parser = _CancelScope(), _Parser()
        self.seen: Deque[int] = deque(maxlen=_REPLAY_WINDOW)  # hashes of data
        self.connected_seen = self.finished = False

    def batches(self) -> Generator[List[TaskUpdateEvent], None, None]:
        """The events, as many at a time as came together, until the task or the scope ends."""
        try:
            self.task_id, self.url = self.task.id, self.configuration._events_url(self.task)
            items = self.task._items()
            self.required = _to_json({name: items[name] for name in _REQUIRED if name in items})
            self.silence_limit = _FINAL_SILENCE if self.task.is_finished else float("inf")
            while not self.finished:
                yield from self._connection()
        except Exception:
            if not self.scope.cancelled.is_set():
                raise

    def _connection(self) -> Iterator[List[TaskUpdateEvent]]:
        """The events of one connection; the last event, if the status says that the task is over."""
        response = self.transport.retry(self._connect, _RETRY_STREAM, self._pause())
        if response:
            with response:
                yield from self._read(response)
        if self.finished:
            return
        # The end of a connection proves nothing, however clean it looks: the status does.
        task = Task._request_task(self.configuration, _STATUS_ROUTE, {"task_id": self.task_id})
        if task.is_finished:
            self.finished = True
            yield [self._last_event(task)]
        elif response and response.status == 204:
            raise ModuleException(204, f"The server has no events, but the task is {task.status}")
        else:
            _wait(self._pause())

    def _pause(self) -> float:
        """Seconds from a connection to the next one."""
        return min(max(500 if self.parser.retry is None else self.parser.retry, 100), 30_000) / 1000

    def _connect(self, failures: int) -> Optional[_Response]:
        """A 2xx response; None where the server got the request and said nothing, or hung up."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        last_id = self.parser.last_id.encode()  # UTF-8, as the standard has it
        if re.fullmatch(rb"[^\0-\x1f\x7f]{1,1024}", last_id):
            headers["Last-Event-ID"] = last_id.decode("latin-1")  # which is what http.client sends
        timeout = min(self.configuration.idle_timeout, self.silence_limit)
        request = self.transport.request("GET", self.url, headers, timeout=timeout)
        try:
            response = self.transport.open(request)
        except _REQUEST_ERRORS as error:
            if request.sent and isinstance(error, _TIMEOUTS + _CONNECTION_ERRORS):
                return None
            raise self.transport.connection_error(request, error) from error
        if not 200 <= response.status < 300:
            with response:
                response.sock.settimeout(_REFUSAL_SECONDS)
                body = response.read_all(65536, _REFUSAL_SECONDS)
            self.transport.parse_response(request, response, body)  # which raises
        return response

    def _read(self, response: _Response) -> Iterator[List[TaskUpdateEvent]]:
        """The events of one connection, until it ends in whatever way."""
        if response.status == 200 and "Content-Type" not in response.headers:
            return  # the head was cut off
        kind, status = response.headers.get_content_type(), response.status
        if status != 204 and (status, kind) != (200, "text/event-stream"):
            text = f"The stream's response is {status} {kind}, not 200 text/event-stream"
            raise ModuleException(500, self.transport.redact_key(text))
        self.parser = _Parser(self.parser.last_id, self.parser.retry)
        self.replayed = set(self.seen)  # while what comes may be a repetition
        last_event_at = time.monotonic()
        try:
            for chunk in iter(response.read_some, b""):
                batch: List[TaskUpdateEvent] = []
                for event in filter(None, map(self._deduplicate, self.parser.feed(chunk))):
                    batch.append(event)
                    if isinstance(event.data, Task):  # each has a copy of the input, maybe large
                        yield batch
                        batch, last_event_at = [], time.monotonic()
                if batch:
                    yield batch
                    last_event_at = time.monotonic()  # the consumer's own time is no silence
                if self.finished or time.monotonic() - last_event_at > self.silence_limit:
                    return  # the second: nothing but comments
        except (OSError, http.client.HTTPException):
            pass  # cut off, or silent
        except ValueError as error:
            raise ModuleException(500, f"The stream sent {error}") from error

    def _deduplicate(self, message: ServerSentEvent) -> Optional[TaskUpdateEvent]:
        """The event of a message, if it is one and did not come on an earlier connection."""
        digest = hash(message.data)
        if digest in self.replayed or self.finished:
            return None
        event = self._parse(message.data)
        if event is None or (event.type == "connected" and self.connected_seen):
            return None  # each connection starts with a `connected`
        if event.type == "connected":
            self.connected_seen = True
        else:
            self.replayed.clear()
            self.seen.append(digest)
        self.finished = event.type == "task_finished" and event.task_id == self.task_id
        return event

    def _parse(self, data: str) -> Optional[TaskUpdateEvent]:
        try:
            data = data.strip(" \t\n\r")
            envelope, end = _decode_json(data)
            is_event = isinstance(envelope, dict) and isinstance(envelope.get("type"), str)
            if is_event and end == len(data):
                return TaskUpdateEvent.from_dict(envelope, self.required, self.configuration)
        except (ValueError, RecursionError):
            pass
        _warn("skipped what is not an event: %d characters that are no envelope", len(data))
        return None

    def _last_event(self, task: Task) -> TaskUpdateEvent:
        """The last event, made from the task, where the stream did not bring it."""
        source = json.loads(task._baseline)
        data = {**self.required, **source}
        now = datetime.now(timezone.utc).isoformat()
        ids = {"task_id": self.task_id, "organization_id": data.get("organization_id")}
        ended = data.get("finished_at") or data.get("updated_at") or now
        event = TaskUpdateEvent.from_dict({"type": "task_finished", **ids, "time": ended})
        # nearly always the task itself: a copy costs 200 streams 6 % more CPU
        same = data.keys() == source.keys()
        event.data = task if same else Task.from_dict(data, self.configuration)
        event.raw["data"] = data
        return event

    def pump(self, loop: Any, put: Callable[[Any], None], slots: threading.Semaphore) -> None:
        """Hand the batches to an event loop, from a thread; None or an error is the last item."""
        last: Optional[BaseException] = None
        _current_scope.set(self.scope)
        try:
            with contextlib.closing(self.batches()) as batches:
                for batch in batches:
                    loop.call_soon_threadsafe(put, batch)
                    slots.acquire()
                    if self.scope.cancelled.is_set():
                        break
        except BaseException as error:  # raised again where the consumer is
            last = error
        with contextlib.suppress(RuntimeError):  # the loop was closed under the stream
            loop.call_soon_threadsafe(put, last)
        last = None  # its traceback refers to this frame


class _Events(Iterator[TaskUpdateEvent]):
    """The events of a task. `close()`, from any thread, ends the iteration and the connection."""

    def __init__(self, stream: _Stream) -> None:
        self._scope, self._batches = stream.scope, stream.batches()
        self._events = itertools.chain.from_iterable(self._batches)
        self._context = contextvars.copy_context()
        self._context.run(_current_scope.set, stream.scope)

    def __next__(self) -> TaskUpdateEvent:
        return self._context.run(next, self._events)

    def close(self) -> None:
        """Leave the stream; more than once is fine."""
        self._scope.cancel()
        self._events = itertools.chain()
        with contextlib.suppress(ValueError):  # another thread waits in it, and is woken up
            self._batches.close()

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AsyncEvents(AsyncIterator[TaskUpdateEvent]):
    """The events of a task, async. `aclose()`, from any task, ends iteration and connection."""

    def __init__(self, stream: _Stream) -> None:
        self._stream, self._scope = stream, stream.scope
        self._batch: Iterator[TaskUpdateEvent] = iter(())
        self._slots = threading.Semaphore(_PUMP_SLOTS - 1)
        self._queue: Any = None  # of the event loop that asks for the first event
        self._thread: Optional[threading.Thread] = None

    async def __anext__(self) -> TaskUpdateEvent:
        for event in self._batch:
            return event
        if self._scope.cancelled.is_set():
            raise StopAsyncIteration
        if self._thread is None:
            self._start()
        try:
            batch = await self._queue.get()
            self._slots.release()
            if isinstance(batch, list):
                self._batch = iter(batch)
                return next(self._batch)
            raise batch or StopAsyncIteration
        except BaseException:
            self._cancel()
            raise
        finally:
            batch = None  # an error, whose traceback refers to this frame

    def _start(self) -> None:
        import asyncio

        self._queue, loop = asyncio.Queue(), asyncio.get_running_loop()
        arguments = loop, self._queue.put_nowait, self._slots
        self._thread = threading.Thread(target=self._stream.pump, args=arguments, daemon=True)
        self._thread.start()

    def _cancel(self) -> None:
        self._scope.cancel()
        self._batch = iter(())
        self._slots.release()
        if self._thread:
            self._thread.join(0.005)  # nearly always enough; not for one that looks up a name

    async def aclose(self) -> None:
        """Leave the stream; more than once is fine."""
        self._cancel()
        if self._queue:
            self._queue.put_nowait(None)  # for a task that waits in it

    async def __aenter__(self) -> _AsyncEvents:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._cancel()


# ---- Files: URLs that come from strangers --------------------------------------------------------

_IMAGES = ".jpg .jpeg .png .gif .bmp .tiff .webp .svg".split()
_READABLE = (
    ".txt .csv .json .xml .html .htm .md .rst .yaml .yml "
    ".py .js .ts .java .c .cpp .h .cs .go .rb .php .sh"
).split()
# the text encodings among Python's codecs, which has others: zip, rot13, unicode_escape
_CHARSET = re.compile(
    r"(?i)utf.*|u8|(us-)?ascii|(iso[-_]?)?8859.*|iso-ir.*|latin[-_]?\d|windows.*|cp\d+|koi8.*"
    r"|gb.*|hz.*|big5.*|shift.*|s?jis.*|euc.*|iso[-_]?2022.*|ks_c.*|tis.?620"
)
_Fetched = Union[Tuple[bytes, Optional[str]], Exception]  # a content and its charset, or an error


def _extension(url: str) -> str:
    """The extension of the URL's path, lower-cased; "" where there is none."""
    start, scheme, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    return os.path.splitext(rest.partition("/")[2] if scheme else start)[1].lower()


def _require_public(host: str, addresses: Iterable[Tuple[Any, ...]]) -> None:
    """Refuse a host of which any address, as getaddrinfo gives them, is not public."""
    import ipaddress

    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            # the IPv4 address in it: RFC 4291, 2.5.5.2; RFC 3056, 2; RFC 6052, 2.1
            nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
            embedded = ipaddress.IPv4Address(ip.packed[12:]) if nat64 else None
            ip = ip.ipv4_mapped or ip.sixtofour or embedded or ip
        site_local = getattr(ip, "is_site_local", False)
        if ip.is_multicast or ip.is_reserved or site_local or not ip.is_global:
            raise _URLRejected(
                f"the address of {host} is not public; see Configuration.trusted_file_hosts"
            )


def _check_host(url: _URL, flags: int = 0) -> None:
    """Refuse a URL whose host has an address that is not public."""
    is_local = f".{url.host}".endswith(".localhost")  # RFC 6761, section 6.3
    name = "127.0.0.1" if is_local else url.dns_name
    with contextlib.suppress(socket.gaierror):  # no address to refuse
        _require_public(url.host, socket.getaddrinfo(name, None, flags=flags))


def _is_allowed(configuration: Configuration, url: str) -> bool:
    """Whether somebody else may fetch the URL by our rules; a warning says why not."""
    try:
        parsed = _parse_url(url)
        if parsed.host not in configuration.trusted_file_hosts:
            _check_host(parsed)
        return True
    except ValueError as error:
        reason = error if isinstance(error, _URLRejected) else "its URL is not valid"
        _warn("a file was left out: %s", reason)
        return False


def _fetch_files(configuration: Configuration, urls: List[str]) -> List[_Fetched]:
    """The content of each URL, or why there is none, in order and in time."""
    downloads = _Downloads(configuration, urls)
    scopes = [_CancelScope() for _ in urls[:_FILE_THREADS]]
    threads = [
        threading.Thread(target=downloads.run, args=(scope,), daemon=True) for scope in scopes
    ]
    deadline = time.monotonic() + configuration.timeout
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not _is_cancelled() and time.monotonic() < deadline:
                thread.join(min(0.1, max(0.0, deadline - time.monotonic())))
    finally:
        downloads.queue.clear()
        for scope in scopes:
            scope.cancel()
    for thread in threads:
        thread.join(0.1)  # one that looks up a name ends with it
    return list(downloads.results)


class _Downloads:
    """The files of one call, as its threads share them."""

    def __init__(self, configuration: Configuration, urls: List[str]) -> None:
        self.transport, self.lock = configuration._transport, threading.Lock()
        self.queue, self.sizes = deque(enumerate(urls)), [0] * len(urls)  # bytes of each file
        self.results: List[_Fetched] = [TimeoutError("not fetched in time") for _ in urls]

    def run(self, scope: _CancelScope) -> None:
        _current_scope.set(scope)
        with contextlib.suppress(IndexError):  # nothing is left to do
            while True:
                number, url = self.queue.popleft()
                try:
                    self.results[number] = self.fetch(number, url)
                except Exception as error:  # whatever a stranger's file causes concerns it alone
                    self.results[number], self.sizes[number] = error, 0
                    if isinstance(error, _URLRejected):
                        _warn("a file was left out: %s", error)

    def fetch(self, number: int, url: str) -> Tuple[bytes, Optional[str]]:
        """The content and its charset."""
        content, timeout = bytearray(), self.transport.timeout
        request = _Request("GET", _parse_url(url), {"Accept": "*/*"}, timeout, public_only=True)
        with self.transport.open(request) as response:
            if response.status != 200:
                raise ModuleException(response.status, "the server has no such file")
            for part in iter(response.read_some, b""):
                content += part
                self.count(number, len(content))
            if _is_cancelled():  # which looks like the end of a file without a length
                raise http.client.IncompleteRead(b"")
            kind = response.headers.get("Content-Type", "")
            charset = re.search(r'(?i);\s*charset\s*=[\s"]*([^\s;"]{1,40})', kind)
            return bytes(content), charset and charset[1]

    def count(self, number: int, size: int) -> None:
        """Note the size of a file; an error if it, or all together, are too large."""
        with self.lock:  # so that of several files the one that is too much fails alone
            self.sizes[number] = size
            if size > _MAX_FILE or sum(self.sizes) > _MAX_FILES:
                self.sizes[number] = 0
                raise ModuleException(413, "the file is too large")


def _decode_file(fetched: _Fetched) -> str:
    """A file's text, or an error that tells whoever gave the URL nothing about this network."""
    if isinstance(fetched, ModuleException) and fetched.answered:
        return f"Error: {fetched.description}"
    if isinstance(fetched, Exception):
        return "Error: the file could not be fetched"
    content, charset = fetched
    with contextlib.suppress(LookupError, ValueError):  # ValueError: a NUL in the name
        if charset and _CHARSET.fullmatch(charset):
            return content.decode(charset, "replace")
    return content.decode("utf-8", "replace")


def _agno_pdf(configuration: Configuration, file_class: Any, url: str, fetched: _Fetched) -> Any:
    """agno's File: with the bytes, or with the URL where there are none and agno may fetch it."""
    if isinstance(fetched, Exception) or not fetched[0]:
        refused = isinstance(fetched, _URLRejected)  # which was warned of
        return file_class(url=url) if not refused and _is_allowed(configuration, url) else None
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w. ()+,-]", "_", name)[-255:]
    return file_class(content=fetched[0], filename=name, mime_type="application/pdf")


# cut here: all above is the library, all below the local platform and the terminal program ==================

__all__ += ["LocalPlatform", "main"]

# ---- Local platform ----------------------------------------------------------------------------------------

_Play = Generator[Tuple[str, Any], None, Any]  # what an agent yields, and returns as the result


def _within(value: Any, *names: str) -> Dict[str, Any]:
    """The object at this path of names; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _local_agent(task: Dict[str, Any]) -> _Play:
    """The built-in agent: thinks, calls a tool and answers in chunks, in about a second."""
    about = str(task["input"]["text"])[:60]
    thought = {"input": {"title": "Plan", "thought": "one search will do"}}
    yield "think", {"request_id": "r1", "operation_id": "think", "payload": thought}
    call = {
        "request_id": "r2",
        "operation_id": "find",
        "tool_name": "search",
        "payload": {"query": about},
    }
    yield "tool_call_request", call
    yield "tool_call_result", {**call, "result": {"hits": 3}, "is_error": False}
    answer = f"A played answer to: {about}\nIt found three hits, and nothing left this machine."
    for word in re.findall(r"\s*\S+", answer):
        time.sleep(0.05)
        yield "chunk", word
    return answer


def _local_time() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


class _LocalTask(Dict[str, Any]):
    """A task as JSON, and beside it its activity log, its events and the state of its run."""

    def __init__(self, agent_id: str, given: Dict[str, Any], lock: Any) -> None:
        import uuid

        now, asked = (
            _local_time(),
            {"text": None, "files": None, "user": None, **(given.get("input") or {})},
        )
        super().__init__({"id": str(uuid.uuid4()), "result": None, **given, "input": asked})
        self.update(
            agent_id=agent_id, organization_id="local-org", status="pending", created_at=now
        )
        self.update(updated_at=now, parent_execution=self.pop("parent_execution_id", None))
        # what a list tells of it, and is asked for
        self.update(
            parent_task_id=self["parent_execution"], user_id=(asked["user"] or {}).get("id")
        )
        self.log = {"id": self["id"], "created_at": now, "messages": [], "user": asked["user"]}
        self.events: List[bytes] = []  # as they go over the wire
        self.over, self.changed = (
            False,
            threading.Condition(lock),
        )  # its own, to wake its own readers only

    def __reduce__(self) -> Tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is the JSON alone

    def emit(self, kind: str, data: Any, entry: Optional[Dict[str, Any]] = None) -> bool:
        """Add an event and its entry in the log; or nothing, and return False, when the run is over."""
        if kind in ("think", "analyze"):
            entry = {"type": kind, **_within(data, "payload", "input")}
        elif kind in ("tool_call_result", "sub_agent_trigger", "auth_event"):
            entry = _within(data)
        with self.changed:
            if not self.over:
                now, ids = _local_time(), {"task_id": self["id"], "organization_id": "local-org"}
                text = json.dumps({"type": kind, **ids, "time": now, "data": data})
                self.events.append(f"id: {len(self.events) + 1}\ndata: {text}\n\n".encode())
                if entry:
                    number = len(self.log["messages"]) + 1
                    self.log["messages"].append({**entry, "id": f"a{number}", "created_at": now})
                self.changed.notify_all()
            return not self.over

    def change(self, changes: Dict[str, Any], late: bool = False) -> _LocalTask:
        """Change the task, once its run is over only if `late`. The first final status ends the run."""
        with self.changed:
            if late or not self.over:
                self.update(changes, updated_at=_local_time())
            if not self.over and AgentExecutionStatus(str(self["status"])).is_final:
                self["finished_at"] = self["updated_at"]
                said = {"role": "agent", "content": {"text": self["result"], "files": None}}
                self.emit("task_finished", self, said if self["status"] == "completed" else None)
                self.over = True
            return self

    def play(self, agent: Callable[[Dict[str, Any]], _Play]) -> None:
        """Run the agent to its end, or to its first event after the end of the run."""
        self.emit("task_updated", self.change({"status": "executing", "started_at": _local_time()}))
        try:
            events = agent(_to_json(self))
            try:
                kind, data = next(events)
                while self.emit(kind, data):
                    kind, data = next(events)
            except StopIteration as end:
                result = (
                    end.value if isinstance(end.value, (str, type(None))) else json.dumps(end.value)
                )
                self.change({"status": "completed", "result": result})
        except BaseException as error:  # SystemExit, too, is this agent's end alone
            self.change({"status": "failed", "result": str(error) or repr(error)})

    def stream(self, seen: int) -> Iterator[bytes]:
        """The events but for the first ones that were seen, as they come, to the end of the run."""
        fresh = [b"retry: 100\n\n"]
        while fresh:
            yield b"".join(fresh)
            with self.changed:
                while not self.over and len(self.events) <= seen:
                    self.changed.wait()
                fresh = self.events[seen:]
            seen += len(fresh)


class LocalPlatform:
    """The platform on a free port of 127.0.0.1, in this process: for trying things out and for tests.

    It serves while its `with` block lasts. `configuration` and `environ` lead to it, `tasks` maps ids to
    tasks as JSON, `requests` holds what arrived: (method, path with query, headers with names in lower
    case, parsed body or None). `agent(task)` is a generator that yields (event type, data) and returns
    the result, text or JSON; if it raises, the task has failed, with the error as its result.
    """

    def __init__(self, agent: Optional[Callable[[Dict[str, Any]], _Play]] = None) -> None:
        self.tasks: Dict[str, _LocalTask] = {}
        self.requests: List[Tuple[str, str, Dict[str, str], Any]] = []
        self._agent, self._lock = agent or _local_agent, threading.RLock()

    def __enter__(self) -> LocalPlatform:
        from http.server import BaseHTTPRequestHandler
        from socketserver import (
            ThreadingTCPServer,
        )  # HTTPServer asks the name service for the host's name

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
            do_GET = do_POST = do_PATCH = do_DELETE = lambda handler: self._serve(handler)
            log_message: Any = lambda *_: None

        class Server(ThreadingTCPServer):
            daemon_threads, request_queue_size = True, 512
            handle_error: Any = lambda *_: None  # a client that left

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]
        self.configuration = Configuration("local-key", "local-org", self.url)
        # A proxy in the environment must not come between; __dict__, because it is frozen.
        self.configuration.__dict__["_proxies"] = {}
        self.configuration.__dict__["_transport"] = _Transport(self.configuration)
        self.environ = {"XPANDER_API_KEY": "local-key", "XPANDER_ORGANIZATION_ID": "local-org"}
        self.environ.update(XPANDER_BASE_URL=self.url, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for task in list(self.tasks.values()):
            task.change({"status": "stopped"})  # which ends its streams
        self.configuration.close()

    def _serve(self, handler: Any) -> None:
        """Answer one request, with JSON or a stream."""
        text = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            try:
                body = json.loads(text or "null")
                self.requests.append((handler.command, handler.path, headers, body))
                status, answer = self._answer(f"{handler.command} {handler.path}", headers, body)
            except KeyError:
                status, answer = 404, {"detail": "Task not found"}
            except (ValueError, TypeError, AttributeError) as error:
                status, answer = 400, {"detail": f"not the JSON that is expected: {error}"}
            streamed = isinstance(answer, Iterator)
            pieces = answer if streamed else [json.dumps(answer).encode()]  # now, under the lock
        handler.send_response(status)
        handler.send_header("Content-Type", "text/event-stream" if streamed else "application/json")
        handler.send_header("Connection", "close")  # whose end is the end of a stream
        if not streamed:
            handler.send_header("Content-Length", str(len(pieces[0])))
        handler.end_headers()
        handler.wfile.writelines(pieces)  # each as it comes

    def _answer(self, request: str, headers: Dict[str, str], body: Any) -> Tuple[int, Any]:
        if headers.get("x-api-key") != "local-key":
            return 401, {"detail": "Invalid API key"}
        place, _, query = request.partition("?")
        stopped = {"status": "stopped", "is_manually_stopped": True}
        seen = int(headers.get("last-event-id", 0))
        routes: Dict[str, Callable[[str], Any]] = {
            "POST /agent-execution/([^/]+)": lambda name: self._create(name, body),
            "GET /agent-execution/executions/history/([^/]+)": lambda name: self._list(name, query),
            "GET /agent-execution/([^/]+)/status": lambda name: self.tasks[name],
            "PATCH /agent-execution/([^/]+)/update": lambda name: self.tasks[name].change(
                body, late=True
            ),
            "DELETE /agent-execution/([^/]+)": lambda name: self.tasks[name].change(stopped),
            "GET /activity/[^/]+/([^/]+)": lambda name: self.tasks[name].log,
            "GET /[^/]+/agent-execution/([^/]+)/events": lambda name: self.tasks[name].stream(seen),
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, place):
                return 200, answer(urllib.parse.unquote(found[1]))
        return 404, {"detail": "Not Found"}

    def _create(self, agent_id: str, given: Dict[str, Any]) -> _LocalTask:
        task = _LocalTask(agent_id, given, self._lock)
        if earlier := self.tasks.get(task["id"]):  # an id continues a task
            task.log = earlier.change({"status": "stopped"}).log
        self.tasks[task["id"]] = task
        task.emit("connected", {})
        said = {name: task["input"][name] for name in ("text", "files")}
        task.emit("task_created", task, {"role": "user", "content": said})
        threading.Thread(target=task.play, args=(self._agent,), daemon=True).start()
        return task

    def _list(self, agent_id: str, query: str) -> List[Dict[str, Any]]:
        wanted = {"agent_id": agent_id, **dict(urllib.parse.parse_qsl(query))}
        found = [task for task in self.tasks.values() if wanted.items() <= task.items()]
        return [
            {name: task.get(name) for name in TasksListItem._schema().defaults} for task in found
        ]


# ---- Terminal ----------------------------------------------------------------------------------------------

_HELP = """\
usage: xtask COMMAND ... [--json]          (or: python3 xtask.py COMMAND ...)

  xtask demo                              a run here: no account, no network
  xtask run AGENT_ID "Sum up" --file URL  create a task and watch it
  xtask watch TASK_ID                     what it does, live, then its result
  xtask show TASK_ID                      a task as it is now
  xtask log TASK_ID                       what it did: its activity log
  xtask stop TASK_ID                      stop it
  xtask list AGENT_ID                     the tasks of an agent
  xtask --version                         its version, and this file's SHA-256

--json is for programs: one JSON object, or one a line for run, watch, demo and
list, as the platform sent it, with the secrets that are in it.
Settings: XPANDER_API_KEY, XPANDER_ORGANIZATION_ID, XPANDER_BASE_URL.
Exit codes: 0 done, 1 the task ended otherwise or a call failed, 2 wrong usage
or no key, 130 Ctrl-C."""
_WORDS = {"demo": 0, "run": 2, "watch": 1, "show": 1, "log": 1, "stop": 1, "list": 1}
# Events and entries of the log: a label, what the task does after it, and the facts to tell.
_TIMELINE: Dict[Any, Tuple[str, str, Tuple[str, ...]]] = {
    "task_created": ("created", "waiting to start", ("title",)),
    "task_updated": ("updated", "working", ("status", "internal_status", "title")),
    "task_finished": ("finished", "working", ("id", "status", "title")),
    "tool_call_request": ("call", "calling a tool", ("tool_name", "payload")),
    "tool_call_result": ("result", "working", ("tool_name", "result")),
    "think": ("think", "thinking", ("title", "thought", "action")),
    "analyze": ("analyze", "thinking", ("title", "analysis", "result")),
    "sub_agent_trigger": ("sub-agent", "waiting for a sub-agent", ("agent_id", "query")),
    "auth_event": ("login", "waiting for a login", ("type", "server_name", "message")),
    "user": ("user", "", ("text", "files")),
    "agent": ("agent", "", ()),
}
_LEFT_BY: Dict[
    type, str
] = {  # entries of a log that are the data of an event, and are told as it is
    AgentActivityThreadToolCall: "tool_call_result",
    AgentActivityThreadAuth: "auth_event",
    AgentActivityThreadSubAgentTrigger: "sub_agent_trigger",
}


def _text(value: Any) -> str:
    """A value as text that neither steers a terminal nor fails to be encoded for standard output."""
    text = value if isinstance(value, str) else json.dumps(_redact(value), ensure_ascii=False)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _one_line(value: Any) -> str:
    """A value for people, on one line and without secrets."""
    return " ".join(_text(_redact(value)).split())


def _cut(text: str) -> str:
    """As much of a line as fits into the terminal, where a sign may take two cells."""
    import shutil
    import unicodedata

    room = max(8, shutil.get_terminal_size().columns - 1)  # a full row makes some terminals wrap
    for at, sign in enumerate(text):
        room -= 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        if room < 0:
            return text[: at - 3] + "..."
    return text


def _clock(when: Any, form: str = "%H:%M:%S") -> str:
    try:
        return str(when.astimezone().strftime(form))
    except (AttributeError, OverflowError, OSError, ValueError):
        return "--:--:--"  # no date-time, or one that the local clock cannot show


def _span(task: Task, end: Any) -> str:
    """Minutes and seconds from the start of a task to its end."""
    start = task.started_at or task.created_at
    known = isinstance(start, datetime) and isinstance(end, datetime)
    return "%d:%02d" % divmod(max(0, (end - start).total_seconds()), 60) if known else "-:--"


def _tell(when: Any, kind: str, data: Any) -> str:
    """A row for an event or an entry of the log; an answer and the URL of a login follow it uncut."""
    label, _, names = _TIMELINE.get(kind, (_one_line(kind), "", ()))
    inner = _within(data, "payload", "input") or _within(data, "data") or _within(data, "content")
    known = {**inner, **_within(data)}
    facts = [known.get(name) for name in names] if known and kind in _TIMELINE else [data]
    told = ": ".join(_one_line(fact) for fact in facts if fact not in (None, "", [], {}))
    label = "failed" if known.get("is_error") is True else label
    uncut = (
        known.get("text") if kind == "agent" else known.get("url") if kind == "auth_event" else None
    )
    return _cut(f"{_clock(when)}  {label:<10} {told}".rstrip()) + (
        f"\n{_text(uncut)}\n" if uncut else "\n"
    )


class _Screen:
    """Standard output: JSON for programs; for people text, and on a terminal a live line below it."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.live = not as_json and bool(sys.stdout) and sys.stdout.isatty()
        self.task: Optional[Task] = None  # whose events are shown
        self.answer: List[str] = []  # its chunks
        self.doing, self.drawn, self.in_line = "working", "", False
        self.lock, self.left = threading.Lock(), threading.Event()

    def write(self, text: str) -> None:
        """Text for people. The live line moves down, and is away while the text stands within a line."""
        with self.lock:
            self.in_line = not text.endswith("\n") if text else self.in_line
            wipe, self.drawn = "\r" + " " * len(self.drawn) + "\r" if self.drawn else "", ""
            if self.task and self.live and not (self.in_line or self.left.is_set()):
                self.drawn = _cut(f"{_span(self.task, datetime.now(timezone.utc))}  {self.doing}")
            if not self.as_json:
                print(wipe + text + self.drawn, end="", flush=True)

    def show(self, told: Union[Task, TasksListItem, AgentActivityThread, TaskUpdateEvent]) -> None:
        """A log in rows, an item of a list in one, a task with its result, which is not cut, or an event."""
        if self.as_json:  # ASCII alone, so that it can be encoded and steers no terminal
            print(
                json.dumps(told.raw if isinstance(told, TaskUpdateEvent) else told.to_dict()),
                flush=True,
            )
        elif isinstance(told, AgentActivityThread):
            for entry in told.messages if isinstance(told.messages, list) else []:
                kind = _LEFT_BY.get(type(entry)) or getattr(
                    entry, "role", getattr(entry, "type", "other")
                )
                self.write(_tell(getattr(entry, "created_at", None), str(kind), _to_json(entry)))
        elif isinstance(told, TasksListItem):
            facts = (
                _clock(told.created_at, "%Y-%m-%d %H:%M"),
                told.status or "",
                told.id,
                told.title or "",
            )
            self.write(
                _cut("{:<16}  {:<10}  {}  {}".format(*map(_one_line, facts)).rstrip()) + "\n"
            )
        elif isinstance(told, Task):
            for name, value in _redact(told.to_dict()).items():
                if name != "result" and value not in (None, False, "", [], {}):
                    self.write(_cut(f"{_one_line(name):<22} {_one_line(value)}") + "\n")
            self.write("" if told.result is None else _text(told.result) + "\n")
        elif self.task and told.task_id == self.task.id and told.type in ("chunk", "task_finished"):
            if told.type == "chunk" and told.data is not None:
                self.doing = "answering"
                self.answer.append(_text(told.data))
                self.write(self.answer[-1])
        elif told.type != "connected":
            self.doing = _TIMELINE.get(told.type, ("", "working"))[1]
            self.write("\n" * self.in_line + _tell(told.time, told.type, told.raw.get("data")))

    def follow(self, task: Task) -> None:
        """Show a task's events to its end, which alone is shown of a task without a stream."""
        self.task, self.doing = task, "waiting" if task.events_streaming else "working"
        threading.Thread(target=self.tick, daemon=True).start()
        try:
            self.write(
                f"{_clock(task.created_at)}  task       {_one_line(task.id)}\n"
            )  # to watch it again
            events = task.events() if task.events_streaming else ()
            for event in events:
                self.show(event)
            # the last event may hold a trimmed task, and a server may tell the status a little later
            task.wait_finished(10 if events else None)
            if not events:
                end = {"type": "task_finished", "task_id": task.id, "data": task.to_dict()}
                self.show(TaskUpdateEvent.from_dict(end))
        finally:
            self.left.set()
            self.write("\n" * self.in_line)
        self.write(
            _tell(task.finished_at, str(task.status), "after " + _span(task, task.finished_at))
        )
        result = "" if task.result is None else _text(task.result)
        if result.strip() not in ("", "".join(self.answer).strip()):  # not shown yet
            self.write(f"\n{result}\n")
        if task.status != "completed":
            raise RuntimeError(f"the task ended as {task.status}")

    def tick(self) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # the output is closed: the main thread will see
            while not self.left.wait(1):
                self.write("")


def _obey(command: str, words: List[str], files: List[str], as_json: bool) -> None:
    screen = _Screen(as_json)
    if command == "demo":
        with LocalPlatform() as platform:
            prompt, configuration = "What can this file do?", platform.configuration
            task = Task.create(
                "demo-agent", prompt, configuration=configuration, events_streaming=True
            )
            screen.follow(task)
            if not as_json:
                screen.write("\nActivity log\n")
                screen.show(task.get_activity_log())
    elif command == "run":
        screen.follow(Task.create(words[0], words[1], files, events_streaming=True))
    elif command == "watch":
        screen.follow(Task.load(words[0]))
    else:
        found: List[Any] = Task.list(words[0]) if command == "list" else [Task.load(words[0])]
        for told in found:
            if command == "stop":
                told.stop()
            screen.show(told.get_activity_log() if command == "log" else told)


def _command(argv: List[str]) -> None:
    import getopt
    import hashlib
    import importlib.machinery

    try:
        found, words = getopt.gnu_getopt(argv, "h", ["help", "version", "json", "file="])
    except getopt.GetoptError as error:
        raise ValueError(f"{error}; see xtask --help") from None
    options, files = (
        [name for name, _ in found],
        [value for name, value in found if name == "--file"],
    )
    if "--version" in options:
        # what imported it reads it, also out of a zip file
        loader: Any = (
            __spec__.loader if __spec__ else importlib.machinery.SourceFileLoader("xtask", __file__)
        )
        source = loader.get_data(__file__)
        print(f"xtask {__version__}\nsha256 {hashlib.sha256(source).hexdigest()}", flush=True)
    elif "-h" in options or "--help" in options:
        print(_HELP, flush=True)
    elif not words or len(words) != 1 + _WORDS.get(words[0], -1) or (files and words[0] != "run"):
        raise ValueError(f"wrong usage: {' '.join(words) or 'no command'}; see xtask --help")
    else:
        _obey(words[0], words[1:], files, "--json" in options)


def main(argv: Optional[List[str]] = None) -> int:
    """The terminal program, with the process's own arguments unless others are given: its exit code."""
    code = 0
    try:
        _command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        pass  # the reader has all it wanted
    except (ModuleException, ValueError, OSError, RuntimeError) as error:
        unset = (
            isinstance(error, ModuleException) and not error.answered and error.status_code < 500
        )
        code = 2 if unset or isinstance(error, ValueError) else 1
        with contextlib.suppress(OSError):  # nobody is there to read it
            if sys.stderr:
                print("xtask:", _one_line(str(error) or repr(error)), file=sys.stderr, flush=True)
    try:
        print(end="", flush=True)
    except (OSError, ValueError):  # the interpreter, too, would flush what is left, and complain
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
