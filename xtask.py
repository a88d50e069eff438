# SPDX-License-Identifier: MIT-0
"""xtask: a client for the tasks of the xpander.ai agent platform, in one file without dependencies.

Load a task, stream its events, change it, stop it, read its activity log:

    from xtask import Task                    # XPANDER_API_KEY, XPANDER_ORGANIZATION_ID

    task = Task.create("agent-id", "What is 2+2?", events_streaming=True)
    for event in task.events():               # live; the last one is task_finished
        print(event.type, event.data)
    print(task.reload().result)

Each method has an async twin with the prefix `a`: `await Task.aload(...)`, `async for event in
task.aevents()`. A failed request raises `ModuleException`, a wrong argument `ValueError`.

Copy this file into your project; its licence (MIT-0) does not ask for attribution. `__version__`
says which version it is; to update, replace the file. Everything below the line "cut here" (a
local platform for tests, and the terminal program) may be deleted. It needs Python 3.9 or newer.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import http.client
import io
import itertools
import json
import os
import random
import re
import socket
import ssl
import struct
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
    Generator,
    Iterable,
    Iterator,
    List,  # in the class Task, whose method `list` hides the built-in
    Mapping,
    NamedTuple,
    Optional,
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

_MAX_EVENT = 16 * 2**20  # bytes of one event
_MAX_RESPONSE = 64 * 2**20  # bytes of a JSON response
_MAX_HEAD = 2**15  # bytes of the heads of a response and the interim ones before it
_MAX_URL = 65536  # characters
_MAX_FILE = 10 * 2**20  # bytes of one input file
_MAX_FILES = 32 * 2**20  # bytes of all input files of one call
_FILE_THREADS = 8  # concurrent downloads of one call
_MAX_REDIRECTS = 5
_CONNECT_TIMEOUT = 10.0  # seconds, over all addresses of a host
_MAX_RETRY_AFTER = 60.0  # seconds; where a server asks for more, the error is raised at once
_MAX_IDLE_SECONDS = 20.0  # a connection that is idle for longer is not reused
_MAX_IDLE_CONNECTIONS = 32
_REPLAY_WINDOW = 10_000  # events remembered, to skip those that are sent again after a reconnect
_PUMP_SLOTS = 4  # lists of events that may be queued for an async consumer
_STATUS_LOADS = 4  # streams that load their task at the same time; others wait a second at most
_FINAL_SILENCE = 5.0  # seconds without an event after which a finished task's stream is over
_ERROR_BODY_SECONDS = 2.0  # to read the body of a stream's error response

# ---- Errors and warnings -------------------------------------------------------------------------


class ModuleException(Exception):
    """The platform did not respond, or its response reports an error or cannot be used.

    `status_code` is the HTTP status, 500 if there is none; `description` says what happened;
    `details` is the parsed body of the response or None; `answered` is False if no server
    responded (no connection, a timeout, a missing setting); `headers` are those of the response,
    with names in lower case, or None. The cause is chained.
    """

    _retriable = False  # whether it failed before anything was sent: even a POST is sent again

    def __init__(
        self,
        status_code: int,
        description: str,
        details: Any = None,
        answered: bool = True,
        headers: Optional[dict[str, str]] = None,
    ) -> None:
        super().__init__(status_code, description, details, answered, headers)
        self.status_code, self.description, self.details = status_code, description, details
        self.answered, self.headers = answered, headers

    def __str__(self) -> str:
        return f"[{self.status_code}] {self.description}"

    def __repr__(self) -> str:  # without the details, which may hold anything
        return f"{type(self).__name__}({self.status_code}, {self.description!r})"


class _URLRejected(OSError, ValueError):
    """A URL that must not be opened: not http(s), or untrusted with a non-public address."""


def _warn(message: str, *arguments: Any) -> None:
    import logging  # 19 ms of import that most runs never need

    logging.getLogger(__name__).warning(message, *arguments)


_SECRETS = [
    "access_token",
    "api_key",
    "authorization",
    "user_oidc_token",
    "user_tokens",
    "x-api-key",
]
_URL_USER = re.compile(r"(?i)^(\s*[a-z][a-z\d+.-]*://)[^/?#]*@")
_URL_QUERY = re.compile(r"(?is)^(\s*[a-z][a-z\d+.-]*://[^?#]*[?#]).*")


def _redact(value: Any, depth: int = 100) -> Any:
    """A copy for display: without secrets, and without the passwords and queries of URLs."""
    if isinstance(value, str):
        return _URL_QUERY.sub(r"\1***", _URL_USER.sub(r"\1***@", value))
    if isinstance(value, (dict, list, tuple)) and not depth:
        return "..."
    if isinstance(value, dict):
        shown = {}
        for key, item in value.items():
            is_secret = item and str(key).lower() in _SECRETS
            key = _redact(key) if isinstance(key, str) else key
            shown[key] = "***" if is_secret else _redact(item, depth - 1)
        return shown
    if isinstance(value, (list, tuple)):
        return [_redact(item, depth - 1) for item in value]
    return value


def _repr(owner: Any, values: Mapping[str, Any]) -> str:
    shown = [f"{name}={_redact(value)!r}" for name, value in values.items()]
    return f"{type(owner).__name__}({', '.join(shown)})"


# ---- Enums ---------------------------------------------------------------------------------------


class _OpenEnum(str, Enum):
    """A `str` enum in which an unknown value becomes a member that is not listed."""

    __str__ = str.__str__  # str() and f-strings give the value on every Python, not `Class.member`

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
    AgentGatewayDecision = "agent_gateway_decision"
    ProcessStateChanged = "process_state_changed"
    ProcessUpdate = "process_update"
    GatewaySteerApplied = "gateway_steer_applied"
    AskUserQuestions = "ask_user_questions"
    SubTaskCreated = "sub_task_created"
    SubTaskUpdated = "sub_task_updated"
    SubTaskFinished = "sub_task_finished"
    InviteMember = "invite_member"
    MemberInvited = "member_invited"
    AskForSecret = "ask_for_secret"
    SecretSaved = "secret_saved"
    LiveSurfaceCreated = "live_surface_created"
    InlineCard = "inline_card"


# ---- Records: JSON objects as dataclasses, without loss ------------------------------------------

_R = TypeVar("_R", bound="_Record")
_T = TypeVar("_T")
_Str = Optional[str]
_StrList = Optional[list[str]]
_Bool = Optional[bool]
_Object = dict[str, Any]  # a JSON object
_Time = Union[datetime, str, None]
_OLD_DATETIME = sys.version_info < (3, 11)


def _parse_time(value: Any) -> Any:
    """An aware datetime (no zone means UTC); a value that does not parse is returned unchanged."""
    if not isinstance(value, str) or not value.isascii():
        return value
    text = value.upper()  # fromisoformat() rejects a lower-case "z"
    if _OLD_DATETIME:  # it accepts no "Z", and only fractions of 3 or 6 digits
        text = text.replace("Z", "+00:00")
        text = re.sub(r"\.\d+", lambda fraction: f"{fraction[0]:0<7}"[:7], text)
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, IndexError):  # PyPy raises IndexError for a truncated date
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
    """The value as plain JSON types in new containers; records become objects, times strings."""
    return json.loads(_encode(value))


def _drop_none(values: Mapping[str, Any]) -> _Object:
    """The values that are not None, as JSON."""
    return {name: value for name, value in _to_json(values).items() if value is not None}


def _converted(convert: Callable[[Any], Any], json_type: type = str) -> Any:
    """A field of which values of the JSON type are converted; any other value is kept."""
    return field(default=None, metadata={"convert": (json_type, convert)})


class _Schema(NamedTuple):
    """The fields of a record, except `extra` and `raw`."""

    defaults: _Object  # None for a required field
    factories: dict[str, Callable[[], Any]]
    converters: list[tuple[str, type, Callable[[Any], Any]]]  # name, JSON type, function


class _Record:
    """The base of everything parsed from a JSON object. `extra` holds the keys without a field."""

    extra: _Object
    _source: Mapping[str, Any] = {}  # the object that was parsed: its keys, its spelling of times
    _configuration: Optional[Configuration] = None  # of records that can make further calls

    @classmethod
    @functools.cache
    def _schema(cls: type) -> _Schema:
        own = [f for f in fields(cls) if f.name not in ("extra", "raw")]
        factories = {f.name: f.default_factory for f in own if callable(f.default_factory)}
        defaults = {f.name: getattr(cls, f.name, None) for f in own}
        defaults.update({name: factory() for name, factory in factories.items()})
        converters = [(f.name, *f.metadata["convert"]) for f in own if "convert" in f.metadata]
        return _Schema(defaults, factories, converters)

    @classmethod
    def from_dict(cls: type[_R], data: Mapping[str, Any]) -> _R:
        """The record of any JSON object, which it keeps; keys without a field are in `extra`."""
        defaults, factories, converters = cls._schema()
        self = cls.__new__(cls)
        self.__dict__ = state = {**defaults, **data}
        for name, factory in factories.items():
            if name not in data:
                state[name] = factory()
        has_extra = len(state) > len(defaults)
        extra = {key: state.pop(key) for key in data if key not in defaults} if has_extra else {}
        state["extra"], state["_source"] = extra, data
        for name, json_type, convert in converters:
            value = state[name]
            if isinstance(value, json_type):
                state[name] = convert(value)
        return self

    def to_dict(self) -> _Object:
        """The JSON object: every key that was received, and every field that is set."""
        return _to_json(self)  # type: ignore[no-any-return]

    def _items(self) -> _Object:
        source, items = self._source, {}
        for name, default in self._schema().defaults.items():
            value = getattr(self, name)
            if name in source or value != default:
                unchanged = isinstance(value, datetime) and value == _parse_time(source.get(name))
                items[name] = source[name] if unchanged else value  # in the server's spelling
        return {**items, **self.extra}

    def _values(self) -> _Object:
        return {name: getattr(self, name) for name in self._schema().defaults}

    def __eq__(self, other: object) -> bool:  # dataclass's own would cost a fifth of the import
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values() and self.extra == other.extra

    def __repr__(self) -> str:
        return _repr(self, self._values())

    if not TYPE_CHECKING:  # type checkers see only the fields

        def __getattr__(self, name: str) -> Any:
            extra = self.__dict__.get("extra") or {}
            if name in extra and not name.startswith("_"):
                return extra[name]
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class _SentRecord(_Record):
    """A record that a save sends: setting a misspelt field is an error, not a silent loss."""

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            cls = type(self)
            if name == "extra" or name in cls._schema().defaults or hasattr(cls, name):
                super().__setattr__(name, value)
            elif name in self.extra and not name.startswith("_"):
                self.extra[name] = value
            else:
                raise AttributeError(
                    f"{cls.__name__} has no field {name!r}; to send a key that this "
                    f"version does not know: .extra[{name!r}] = ..."
                )


@dataclass(repr=False, eq=False)
class User(_SentRecord):
    """The user that a task runs for. The platform requires `email`."""

    email: _Str = None
    id: _Str = None
    first_name: _Str = None
    last_name: _Str = None
    additional_attributes: Optional[_Object] = None
    timezone: _Str = None
    display_name: _Str = None
    extra: _Object = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class AgentExecutionInput(_SentRecord):
    """The input of a task: its text, URLs of files, attachments (dicts with a `url`), the user."""

    text: _Str = None
    files: _StrList = None
    user: Optional[User] = _converted(User.from_dict, dict)
    attachments: Optional[list[dict[str, Any]]] = None
    principal: Optional[_Object] = None
    extra: _Object = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class ToolCallRequestReasoning(_Record):
    """Why a tool is called."""

    title: _Str = None
    description: _Str = None
    extra: _Object = field(default_factory=dict)


def _reasoning() -> Any:
    return _converted(ToolCallRequestReasoning.from_dict, dict)


@dataclass(repr=False, eq=False)
class ToolCallRequest(_Record):
    """A tool call of the agent; also the data of `think` and `analyze` (`payload["input"]`)."""

    request_id: str
    operation_id: str
    tool_call_id: _Str = None
    graph_node_id: _Str = None
    tool_name: _Str = None
    payload: Any = None
    reasoning: Optional[ToolCallRequestReasoning] = _reasoning()
    plan_task_id: _Str = None
    extra: _Object = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class ToolCallResult(ToolCallRequest):
    """The result of a tool call."""

    result: Any = None
    is_error: _Bool = None


# ---- Activity log --------------------------------------------------------------------------------


@dataclass(repr=False, eq=False)
class AgentActivityThreadMessageContent(_Record):
    """The text of a message and the URLs of its files."""

    text: _Str = None
    files: _StrList = None
    extra: _Object = field(default_factory=dict)


@dataclass(repr=False, eq=False)
class _Entry(_Record):
    """The fields that an activity log and all its entries have."""

    id: str
    created_at: _Time = _converted(_parse_time)
    extra: _Object = field(default_factory=dict)


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
    is_error: _Bool = None
    reasoning: Optional[ToolCallRequestReasoning] = _reasoning()
    result: Any = None


@dataclass(repr=False, eq=False)
class AgentActivityThreadReasoning(_Entry):
    """A thought of the agent."""

    type: AgentActivityThreadReasoningType = _converted(AgentActivityThreadReasoningType)
    title: _Str = None
    confidence: Optional[float] = None
    thought: _Str = None
    action: _Str = None
    result: _Str = None
    analysis: _Str = None


@dataclass(repr=False, eq=False)
class AgentActivityThreadSubAgentTrigger(_Entry):
    """A request to another agent."""

    agent_id: _Str = None
    query: _Str = None
    files: _StrList = None
    reasoning: Optional[ToolCallRequestReasoning] = _reasoning()


@dataclass(repr=False, eq=False)
class AgentActivityThreadAuth(_Entry):
    """A login: `type` is not_supported, login_required, token_issue or token_ready."""

    type: str = ""
    data: Any = None


class AgentActivityThreadOtherEntry(_Entry):
    """An entry of any other kind: everything except `id` and `created_at` is in `extra`."""


_AUTH_TYPES = ("not_supported", "login_required", "token_issue", "token_ready")
_GATEWAY_ACTIONS = [
    "create_execution",
    "ask_execution",
    "stop_execution",
    "continue_execution",
    "get_executions_result",
]


def _parse_entry(entry: Any) -> Any:
    """The record of an entry. Its keys decide its class: the first rule that matches wins."""
    if not isinstance(entry, dict):
        return entry
    kind = entry.get("type")
    cls: type[_Entry]
    if entry.get("action") in _GATEWAY_ACTIONS:
        cls, fits = AgentActivityThreadOtherEntry, True
    elif "role" in entry and "content" in entry:
        cls = AgentActivityThreadMessage
        fits = entry["role"] in ("user", "agent") and isinstance(entry["content"], dict)
    elif "tool_name" in entry:
        cls, fits = AgentActivityThreadToolCall, isinstance(entry["tool_name"], str)
    elif kind in ("think", "analyze"):
        texts = map(entry.get, ("title", "thought", "action", "result", "analysis"))
        cls = AgentActivityThreadReasoning
        fits = all(isinstance(text, (str, type(None))) for text in texts)
    elif "query" in entry:
        cls = AgentActivityThreadSubAgentTrigger
        fits = isinstance(entry["query"], (str, type(None)))
    else:
        cls, fits = AgentActivityThreadAuth, "data" in entry and kind in _AUTH_TYPES
    return (cls if fits else AgentActivityThreadOtherEntry).from_dict(entry)


def _parse_entries(entries: list[Any]) -> list[Any]:
    return [_parse_entry(entry) for entry in entries]


@dataclass(repr=False, eq=False)
class AgentActivityThread(_Entry):
    """The activity log of a task: its `messages`, oldest first."""

    messages: list[_Entry] = field(
        default_factory=list, metadata={"convert": (list, _parse_entries)}
    )
    user: Optional[User] = _converted(User.from_dict, dict)


# ---- Configuration -------------------------------------------------------------------------------


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _is_header_value(value: Any) -> bool:
    """Whether it is printable ASCII; it may be empty."""
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _from_env(value: Optional[str], variable: str) -> Optional[str]:
    """The value, else that of the environment variable, without spaces around it; None if empty."""
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"the value for {variable} must be a string")
    return (value or "").strip() or os.environ.get(variable, "").strip() or None


@dataclass(frozen=True, init=False)
class Configuration:
    """The platform's address and the credentials. Any number of tasks and threads may share one.

    Unset values come from XPANDER_API_KEY, XPANDER_ORGANIZATION_ID and XPANDER_BASE_URL, when the
    object is made. `timeout`: the longest single wait for the network in seconds (the look-up of a
    name has its own limit). `max_retries`: how often a failed request is sent again.
    `idle_timeout`: seconds of silence after which a stream reconnects. `ssl_context`: used instead
    of `ssl.create_default_context()`. `headers`: additional headers for the API and the events, as
    gateways require them; never sent for files. `trusted_file_hosts`: names or addresses of hosts
    from which files may be fetched although their address is not public. A pickle contains the key
    and the headers. An invalid value is a ValueError.
    """

    api_key: _Str = field(repr=False)
    organization_id: Optional[str]
    base_url: str
    timeout: float
    max_retries: int
    idle_timeout: float
    ssl_context: Optional[ssl.SSLContext]
    headers: Mapping[str, str] = field(repr=False, hash=False)
    trusted_file_hosts: tuple[str, ...]

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
        headers: Optional[Mapping[str, str]] = None,
        trusted_file_hosts: Iterable[str] = (),
    ) -> None:
        api_key = _from_env(api_key, "XPANDER_API_KEY")
        if not _is_header_value(api_key or ""):
            raise ValueError("api_key must be printable ASCII: look for stray characters around it")
        headers = dict(headers or {})
        for name, value in headers.items():
            if not (isinstance(name, str) and _HEADER_NAME.fullmatch(name)):
                raise ValueError("the names of headers must be tokens (RFC 9110, section 5.6.2)")
            if not _is_header_value(value):
                raise ValueError(f"the value of the header {name} must be printable ASCII")
        for seconds in (timeout, idle_timeout):
            if not (isinstance(seconds, (int, float)) and 0 < seconds < 2**21):
                raise ValueError("timeout and idle_timeout are seconds: above 0, below 2**21")
        if not (isinstance(max_retries, int) and max_retries >= 0):
            raise ValueError("max_retries must be a whole number, 0 or more")
        staging = os.environ.get("IS_STG", "").strip().lower() == "true"
        default_url = f"https://inbound.{'stg.' if staging else ''}xpander.ai"
        root = _from_env(base_url, "XPANDER_BASE_URL") or default_url
        root = root if "://" in root else f"https://{root}"
        if "?" in root:
            raise ValueError("base_url must not have a query")
        if isinstance(trusted_file_hosts, str):
            trusted_file_hosts = [trusted_file_hosts]
        hosts = tuple(map(_normal_host, trusted_file_hosts))
        for host in hosts:
            if not _HOST.fullmatch(host) or host.count(":") == 1:
                raise ValueError("trusted_file_hosts must be names or addresses, without a port")
        self.__dict__.update(  # frozen: setting an attribute would raise
            api_key=api_key,
            organization_id=_from_env(organization_id, "XPANDER_ORGANIZATION_ID"),
            base_url=str(_parse_url(root, "base_url")).rstrip("/"),
            timeout=timeout,
            max_retries=max_retries,
            idle_timeout=idle_timeout,
            ssl_context=ssl_context,
            headers=headers,
            trusted_file_hosts=hosts,
        )

    def close(self) -> None:
        """Close the idle connections. The configuration stays usable."""
        _close_all(self._transport.idle)

    def __enter__(self) -> Configuration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: Any) -> Configuration:
        return self  # immutable; a copy would not share its connections

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def _transport(self) -> _Transport:
        # made at first use; setdefault is atomic, so that two threads get the same one
        state = self.__dict__
        return state.get("_transport") or state.setdefault("_transport", _Transport(self))  # type: ignore[no-any-return]

    def _api_url(self, route: str, *ids: Any) -> str:
        """The URL of a route. On an agent controller it starts with the organization."""
        if self._transport.is_controller:
            route, ids = "/{organization_id}" + route, (self.organization_id, *ids)
        return self.base_url + _path(route, *ids)

    def _events_url(self, task: Task) -> str:
        """The URL of a task's events: on another host in the cloud, on another port locally."""
        url, base = _parse_url(self.base_url), self.base_url
        if url.host in ("inbound.xpander.ai", "inbound.stg.xpander.ai"):
            base = "https://" + url.host.replace("inbound", "agent-controller", 1)
        elif url.port == 8085 and url.host in ("localhost", "127.0.0.1", "::1"):
            base = "http://localhost:9016"
        route = "/{organization_id}/agent-execution/{task_id}/events"
        return base + _path(route, self.organization_id or task.organization_id, task.id)


def _path(route: str, *ids: Any) -> str:
    """A route with its ids filled in, each as one segment (RFC 3986, section 3.3)."""
    names = re.findall(r"{(\w+)}", route)
    for name, value in zip(names, ids):
        if name == "organization_id" and not value:
            reason = "No organization: set XPANDER_ORGANIZATION_ID or organization_id"
            raise ModuleException(400, reason, answered=False)
        if not isinstance(value, str) or value.strip() in ("", ".", ".."):
            raise ValueError(f"{name} must be a string other than '', '.' and '..'")
    quoted = [urllib.parse.quote(value, safe="") for value in ids]
    return route.format(**dict(zip(names, quoted)))


@functools.lru_cache(maxsize=16)
def _shared_configuration(*environment: Optional[str]) -> Configuration:
    return Configuration()  # reads the environment itself: the arguments are the key of the cache


def _default_configuration() -> Configuration:
    """The configuration of the current environment values, shared by all calls without one."""
    names = ("XPANDER_API_KEY", "XPANDER_ORGANIZATION_ID", "XPANDER_BASE_URL", "IS_STG")
    return _shared_configuration(*map(os.environ.get, names))


# ---- Task ----------------------------------------------------------------------------------------


def _async_twin(method: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The async twin of a method: runs it in a thread, and cancelling the twin ends its request."""
    function: Any = getattr(method, "__func__", method)  # the function of a class method
    owner, _, name = function.__qualname__.rpartition(".")

    @functools.wraps(function)
    async def twin(*arguments: Any, **options: Any) -> _T:
        import asyncio  # 60 ms of import that sync programs never need

        scope = _CancelScope()

        def run() -> Any:
            _current_scope.set(scope)  # asyncio.to_thread runs this in a copy of the context
            # by name, so that a subclass's override of the sync method is used
            return getattr(arguments[0], name)(*arguments[1:], **options)

        try:
            return await asyncio.to_thread(run)
        finally:
            scope.cancel()

    twin.__name__, twin.__qualname__ = f"a{name}", f"{owner}.a{name}"
    twin.__doc__ = f"`{name}`, async."
    return twin


@dataclass(repr=False, eq=False)
class TasksListItem(_Record):
    """An item of `Task.list`; `load()` gives the whole task."""

    id: str
    agent_id: _Str = None
    organization_id: _Str = None
    status: Optional[AgentExecutionStatus] = _converted(AgentExecutionStatus)
    user_id: _Str = None
    parent_task_id: _Str = None
    triggering_agent_id: _Str = None
    created_at: _Time = _converted(_parse_time)
    updated_at: _Time = _converted(_parse_time)
    source_node_type: _Str = None
    result: _Str = None
    title: _Str = None
    extra: _Object = field(default_factory=dict)

    def load(self) -> Task:
        """The whole task, with the configuration of the list."""
        return Task.load(self.id, self._configuration)

    aload = _async_twin(load)


_OTHER_NAMES = {  # of the platform and of the official SDK
    "existing_task_id": "id",
    "input": "prompt, file_urls, user, attachments and principal",
    "user_details": "user",
    "tool_call_payload_extension": "payload_extension",
}


_STATUS_ROUTE = "/agent-execution/{task_id}/status"


@dataclass(repr=False, eq=False)
class Task(_SentRecord):
    """A task of the platform, with the fields of its OpenAPI schema `AgentExecution`.

    Change fields, then `save()`. Keys without a field are in `extra`, and are kept. Any call may
    raise `ModuleException` or `ValueError`. One thread or coroutine at a time may use a task.
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
    internal_status: _Str = None
    result: _Str = None
    title: _Str = None
    source: _Str = None
    additional_context: _Str = None
    expected_output: _Str = None
    last_executed_node_id: _Str = None
    agent_version: _Str = None
    parent_execution: _Str = None
    triggering_agent_id: _Str = None
    worker_id: _Str = None
    sub_executions: _StrList = field(default_factory=list)
    finished_sub_executions: _StrList = field(default_factory=list)
    is_manually_stopped: _Bool = False
    events_streaming: _Bool = False
    used_mutating_tools: _Bool = False
    is_continuous: _Bool = False
    disable_attachment_injection: _Bool = False
    payload_extension: Optional[_Object] = None
    output_schema: Optional[_Object] = None
    output_format: Optional[OutputFormat] = _converted(OutputFormat)
    think_mode: _Str = None
    mcp_servers: Optional[List[dict[str, Any]]] = field(default_factory=list)
    hitl_request: Optional[_Object] = None
    pending_eca_request: Optional[_Object] = None
    llm_model_provider: _Str = None
    llm_model_name: _Str = None
    llm_reasoning_effort: _Str = None
    conversation_id: _Str = None
    instructions_override: _Str = None
    duration: Optional[float] = None
    used_tools: _StrList = None
    tokens: Optional[_Object] = None
    deep_planning: Optional[_Object] = None
    extra: _Object = field(default_factory=dict)

    _baseline = "{}"  # the server's last state, as JSON text: parsed only when it is compared

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], configuration: Optional[Configuration] = None
    ) -> Task:
        """The task of a JSON object, taken as the server's state: `save()` compares with it."""
        text = _encode(dict(data))
        copy = json.loads(text)
        return cls._from_response(copy, text, configuration)

    @classmethod
    def _from_response(
        cls, data: _Object, text: Union[str, bytes], configuration: Optional[Configuration]
    ) -> Task:
        task = super().from_dict(data)
        task.__dict__.update(_baseline=text, _configuration=configuration)
        return task

    def __repr__(self) -> str:
        status, title = _redact(getattr(self.status, "value", self.status)), _redact(self.title)
        return f"Task(id={self.id!r:.60}, status={status!r:.60}, title={title!r:.60})"

    @property
    def configuration(self) -> Configuration:
        """The configuration that this task was made with, else that of the environment."""
        return self._configuration or _default_configuration()

    @configuration.setter
    def configuration(self, configuration: Optional[Configuration]) -> None:
        self._configuration = configuration

    @property
    def is_finished(self) -> bool:
        """Whether the status is final; for an unknown one, whether `finished_at` is set."""
        known = self.status in list(AgentExecutionStatus)  # a plain string may be, too
        return AgentExecutionStatus(self.status).is_final if known else self.finished_at is not None

    @classmethod
    def load(cls, task_id: str, configuration: Optional[Configuration] = None) -> Task:
        """The task with this id. Route: GET /agent-execution/{task_id}/status.

        It is a class method: to load a task again into the same object, use `reload`.
        """
        return cls._request_task(configuration, "GET", _STATUS_ROUTE, task_id)

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
        those that are None are left out. `user=` (a `User` or its dict), `attachments=` and
        `principal=` go into the input, `id=` continues a task, `agent_version=` selects a version.
        ValueError without a prompt, files, attachments and an id.
        """
        for name in _OTHER_NAMES.keys() & options.keys():
            raise ValueError(f"{name} is called {_OTHER_NAMES[name]} here")
        if not (prompt or file_urls or options.get("attachments") or options.get("id")):
            raise ValueError("a task needs a prompt, file_urls, attachments or an id to continue")
        version = str(options.pop("agent_version", None) or "")
        if not _is_header_value(version):
            raise ValueError("agent_version must be printable ASCII")
        task_input = {"text": prompt, "files": file_urls or None}
        for name in ("user", "attachments", "principal"):
            task_input[name] = options.pop(name, None)
        return cls._request_task(
            configuration,
            "POST",
            "/agent-execution/{agent_id}",
            agent_id,
            _drop_none({"input": _drop_none(task_input), **options}),
            {"x-agent-version": version} if version else {},
        )

    @classmethod
    def list(
        cls, /, agent_id: str, *, configuration: Optional[Configuration] = None, **filters: Any
    ) -> List[TasksListItem]:
        """An agent's tasks. Route: GET /agent-execution/executions/history/{agent_id}.

        Filters: `user_id`, `parent_task_id`, `triggering_agent_id`, `status`, `internal_status`; a
        list of values is sent as a repeated key.
        """
        if "filters" in filters:
            raise ValueError('give the filters by name: Task.list(agent_id, status="completed")')
        configuration = configuration or _default_configuration()
        url = configuration._api_url("/agent-execution/executions/history/{agent_id}", agent_id)
        if query := _encode_query(filters):
            url += f"?{query}"
        response = configuration._transport.call("GET", url)
        items = response.value
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise response.unexpected("a list of objects")
        records = [TasksListItem.from_dict(item) for item in items]
        for record in records:
            record._configuration = configuration
        return records

    def save(self) -> Task:
        """Send the fields that differ from the server's last state, and take its response.

        Nested changes count; None is sent as null. A failed save loses nothing: the next one sends
        the changes. If there are none, it reloads. Objects in fields (`input`, lists) are replaced
        by new ones. Route: PATCH /agent-execution/{task_id}/update.
        """
        if isinstance(self.internal_status, str) and len(self.internal_status) > 255:
            raise ValueError("internal_status has more than the 255 characters the platform takes")
        before = _encode(self)
        values = json.loads(before)
        changed = _changed(json.loads(self._baseline), values)
        body = {name: value for name, value in values.items() if name in changed}
        if not body:
            return self._update(self.load(self.id, self.configuration), before)
        route = "/agent-execution/{task_id}/update"
        newer = self._request_task(self.configuration, "PATCH", route, self.id, body)
        return self._update(newer, before)

    def set_status(
        self, status: Union[AgentExecutionStatus, str], result: Optional[str] = None
    ) -> Task:
        """Send the status, the result if one is given, and all other unsaved changes."""
        if status not in list(AgentExecutionStatus):
            names = ", ".join(AgentExecutionStatus)
            raise ValueError(f"{str(status)!r} is not a status: use one of {names}")
        # not in the baseline, they are sent even if unchanged, and again if this save fails
        baseline = json.loads(self._baseline)
        self.status = AgentExecutionStatus(status)
        baseline.pop("status", None)
        if result is not None:
            self.result = result
            baseline.pop("result", None)
        self._baseline = _encode(baseline)
        return self.save()

    def stop(self) -> Task:
        """Stop it; unsaved changes stay unsaved. Route: DELETE /agent-execution/{task_id}."""
        before, route = self._baseline, "/agent-execution/{task_id}"
        stopped = self._request_task(self.configuration, "DELETE", route, self.id)
        self.status = stopped.status  # instead of an unsaved change of the status
        return self._update(stopped, before)

    def reload(self) -> Task:
        """Load the server's state into this object. Unsaved changes are dropped."""
        return self._update(self.load(self.id, self.configuration))

    def wait_finished(self, timeout: Optional[float] = None, *, or_paused: bool = False) -> Task:
        """Reload until the status is final, with pauses that grow from 0.5 to 5 s.

        If it is final already, there is no request. `or_paused`: also until it is `paused`, which
        means that the task waits for a person. `TimeoutError` after `timeout` seconds, which are
        checked after each reload.
        """
        for pause in self._pauses(timeout, or_paused):
            _wait(pause)
            self.reload()
        return self

    async def await_finished(
        self, timeout: Optional[float] = None, *, or_paused: bool = False
    ) -> Task:
        """`wait_finished`, async. It sleeps in the event loop, not in a thread."""
        import asyncio

        for pause in self._pauses(timeout, or_paused):
            await asyncio.sleep(pause)
            await self.areload()
        return self

    def events(self) -> _Events:
        """The task's events, each as it arrives; the last one is its `task_finished`.

        If the connection breaks or is silent, it reconnects, and skips repeated events; if that
        fails, it raises `ModuleException`. ValueError at the call if the task has no
        `events_streaming`. `close()` or `with` leaves the stream at once. Route, under the events
        root: GET /{organization_id}/agent-execution/{task_id}/events.
        """
        return _Events(_Stream(self))

    def aevents(self) -> _AsyncEvents:
        """`events`, async; a daemon thread reads the stream. Cancelling a wait for it closes it."""
        return _AsyncEvents(_Stream(self))

    def get_activity_log(self) -> AgentActivityThread:
        """What the task did; `ModuleException` 404 if there is no log yet.

        Route: GET /activity/{agent_id}/{task_id}.
        """
        url = self.configuration._api_url("/activity/{agent_id}/{task_id}", self.agent_id, self.id)
        response = self.configuration._transport.call("GET", url)
        if not response.value:
            raise response.error(404, "No activity log yet")
        if not isinstance(response.value, dict):
            raise response.unexpected("an activity log")
        return AgentActivityThread.from_dict(response.value)

    def get_files(self) -> List[Any]:
        """The PDFs: URLs, or where agno is installed `agno.media.File` with their bytes.

        A file that cannot be fetched has its URL instead; one whose URL is refused is left out.
        """
        urls = self._file_urls("pdf")
        try:
            from agno.media import File  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        fetched = _fetch_files(self.configuration, urls)
        deadline = time.monotonic() + self.configuration.timeout
        files = [
            _agno_pdf(self.configuration, File, *pair, deadline) for pair in zip(urls, fetched)
        ]
        return [file for file in files if file is not None]

    def get_images(self) -> List[Any]:
        """The images: URLs, or where agno is installed `agno.media.Image`, except refused ones."""
        urls = self._file_urls("image")
        try:
            from agno.media import Image  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        # agno fetches these URLs itself, so the same rules hold
        deadline = time.monotonic() + self.configuration.timeout
        return [Image(url=url) for url in urls if _is_allowed(self.configuration, url, deadline)]

    def get_human_readable_files(self) -> List[dict[str, str]]:
        """`{"url": ..., "content": ...}` of each readable file, in order; 8 are fetched at a time.

        Limits: 10 MiB a file; 32 MiB and the configuration's `timeout` seconds for the whole call.
        A file that fails has the content "Error: ...". With `disable_attachment_injection` there
        are only the URLs.
        """
        urls = self._file_urls("text")
        if self.disable_attachment_injection:
            return [{"url": url} for url in urls]
        contents = map(_decode_file, _fetch_files(self.configuration, urls))
        return [{"url": url, "content": content} for url, content in zip(urls, contents)]

    def to_message(self) -> str:
        """The input as one text for a model: its text, the URLs, the contents of readable files."""
        urls, readable = self._file_urls(), self.get_human_readable_files()
        text = getattr(self.input, "text", None)
        lines = [str(text)] if text else []
        if urls:
            lines.append("Files: " + ", ".join(urls))
        if readable:
            lines += ["Files contents:", *map(json.dumps, readable)]
        return "\n".join(lines)

    # The async twins; `aevents` and `await_finished` are next to their sync versions.
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
        configuration: Optional[Configuration],
        method: str,
        route: str,
        id: str,
        body: Optional[_Object] = None,
        headers: Mapping[str, str] = {},
        policy: Optional[_RetryPolicy] = None,
    ) -> Task:
        """The task in a response; if that of a PATCH or DELETE is empty, the task is loaded."""
        configuration = configuration or _default_configuration()
        url = configuration._api_url(route, id)
        response = configuration._transport.call(method, url, body, headers, policy)
        value = response.value
        if value is None and method in ("PATCH", "DELETE"):
            return cls.load(id, configuration)
        if isinstance(value, dict) and isinstance(value.get("id"), str):
            return cls._from_response(value, response.body, configuration)
        raise response.unexpected("a task")

    def _update(self, newer: Task, before: Union[str, bytes] = "") -> Task:
        """Take the state of `newer`, except what the caller changed since `before`, a JSON text."""
        # What changed before this is found by comparing JSON, nested changes too; what another
        # thread sets while this compares (`asave` runs in one), by the identity of the values.
        seen = dict(self.__dict__)
        now = _encode(self) if before else ""
        for name in _changed(json.loads(before), json.loads(now)) if now != before else ():
            if name in self._schema().defaults:
                newer.__dict__[name] = self.__dict__[name]
            elif name in self.extra:
                newer.extra[name] = self.extra[name]
        newer._configuration = self._configuration
        items = list(self.__dict__.items())
        set_meanwhile = {name: value for name, value in items if value is not seen.get(name)}
        self.__dict__.update({**newer.__dict__, **set_meanwhile})
        return self

    def _pauses(self, timeout: Optional[float], or_paused: bool) -> Iterator[float]:
        """The pauses before each reload, until the status is final; TimeoutError."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        pause = 0.0
        while not (self.is_finished or (pause and or_paused and self.status == "paused")):
            remaining = deadline - time.monotonic()
            if pause and remaining <= 0:
                raise TimeoutError(f"task {self.id} is still {self.status} after {timeout} s")
            yield max(0.0, min(pause, remaining))
            pause = min(max(0.5, pause * 1.5), 5.0)

    def _file_urls(self, kind: Optional[str] = None) -> List[str]:
        """The URLs of the attachments, then those of further files; only those of one kind."""
        kinds: dict[str, str] = {}  # by URL, of which the first one counts
        for name in ("attachments", "files"):
            items = getattr(self.input, name, None)
            for item in items if isinstance(items, list) else ():
                item = {"url": item} if name == "files" else item
                if isinstance(item, dict) and isinstance(item.get("url"), str):
                    kinds.setdefault(item["url"], _file_kind(item))
        return [url for url in kinds if kind is None or kinds[url] == kind]


def _encode_query(values: Mapping[str, Any]) -> str:
    """A query string: True as `true`, a list as a repeated key, None left out."""
    pairs = []
    for name, value in _drop_none(values).items():
        for item in value if isinstance(value, list) else [value]:
            pairs.append((name, item if isinstance(item, str) else json.dumps(item)))
    return urllib.parse.urlencode(pairs)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """The names whose values differ as JSON: True is not 1, and the order of keys is irrelevant."""
    both = [name for name in old.keys() & new.keys() if old[name] is not new[name]]
    differing = {name for name in both if not _equal_json(old[name], new[name])}
    return (old.keys() ^ new.keys()) | differing


def _equal_json(one: Any, other: Any) -> bool:
    # Python's equality where it is enough: it is not for NaN, nor for True and 1 in a container
    simple = type(one) is type(other) and not (one and isinstance(one, (dict, list)))
    return bool(simple and one == other) or _canonical(one) == _canonical(other)


# ---- URLs ----------------------------------------------------------------------------------------

_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL_CHARACTERS = "/%!$&'()*+,;=:@~?"  # which are not percent-encoded in a path with a query
# no "@" (a user name), and none of the characters on which URL parsers disagree
_HOST = re.compile(r"[^\s\0-\x20\x7f@%\\/?#\[\]]+")


class _URL(NamedTuple):
    """An http or https URL, normalized."""

    scheme: str
    host: str  # lower case, IDNA, neither brackets nor a final dot
    port: int
    target: str  # path and query, percent-encoded
    dns_name: str  # the host for the look-up, with its final dot if it has one

    @property
    def netloc(self) -> str:
        host = _bracketed(self.host)
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self._replace(host=self.dns_name).netloc}{self.target}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host  # an IPv6 address: RFC 3986, section 3.2.2


def _normal_host(host: str) -> str:
    """The normal form of a host name, to connect to, compare and trust; ValueError: invalid."""
    host = host.strip("[]") if host.isascii() else host.encode("idna").decode()
    return host.lower().rstrip(".")


def _parse_url(url: str, what: str = "a file's URL", base: str = "") -> _URL:
    """The normal form of an http or https URL without a user name; any other is rejected."""
    # IDNA takes time by the square of the length, and urlsplit() keeps what it has parsed
    if len(url) > (_MAX_URL if url.isascii() else 2048):
        raise _URLRejected(f"{what} is too long: over {_MAX_URL} characters, or 2048 if not ASCII")
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, url.strip()))
        given, port = parts.hostname or "", parts.port
        host = _normal_host(given)
        if parts.scheme not in _DEFAULT_PORTS or "@" in parts.netloc or not _HOST.fullmatch(host):
            raise ValueError
    except ValueError:
        raise _URLRejected(
            f"{what} must be an http or https URL with a host and without a user name"
        ) from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = urllib.parse.quote(target, safe=_URL_CHARACTERS)
    port = _DEFAULT_PORTS[parts.scheme] if port is None else port
    dns_name = host + "." if given.endswith(".") else host
    return _URL(parts.scheme, host, port, target, dns_name)


class _Proxy(NamedTuple):
    host: str
    port: int
    authorization: str  # "" without a user name


def _find_proxies() -> dict[str, str]:
    """The proxies by urllib's rules; it is imported (7 ms) only where a proxy may be set."""
    names = {name.lower() for name in os.environ}
    if sys.platform not in ("win32", "darwin") and not names & {"http_proxy", "https_proxy"}:
        return {}
    from urllib.request import getproxies

    return getproxies()


def _parse_proxy(url: str) -> _Proxy:
    """A proxy by its URL; any scheme but http is rejected before its password is sent anywhere."""
    scheme, _, remainder = url.strip().rpartition("://")
    credentials, _, netloc = remainder.rstrip("/").rpartition("@")
    if scheme.lower() not in ("", "http") or "/" in credentials:
        raise _URLRejected(
            "the URL of a proxy must be http://host:port or http://user:password@host:port, "
            "percent-encoded; see HTTPS_PROXY"
        )
    proxy, authorization = _parse_url(f"http://{netloc}", "the URL of a proxy"), ""
    if credentials:
        import base64

        secret = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        authorization = f"Basic {secret}"
    return _Proxy(proxy.dns_name, proxy.port, authorization)


# ---- Transport -----------------------------------------------------------------------------------

_CONNECTION_ERRORS = (
    ConnectionError,
    http.client.IncompleteRead,
    http.client.BadStatusLine,
    ssl.SSLEOFError,
)
_TIMEOUTS = (socket.timeout, TimeoutError)  # two classes before Python 3.10
# What a request may raise. ValueError: an invalid host or port, also in a redirect; TypeError and
# RecursionError: http.client parses headers with the email package, which may fail on them
_REQUEST_ERRORS = (OSError, http.client.HTTPException, ValueError, TypeError, RecursionError)
_USER_AGENT = f"xtask/{__version__}"
_NO_CODING = ("", "identity", "aws-chunked")  # S3 keeps the last one as metadata
_OWN_HEADERS = {  # which Configuration.headers cannot replace
    "accept",
    "cache-control",
    "connection",
    "content-length",
    "content-type",
    "host",
    "last-event-id",
    "proxy-authorization",
    "transfer-encoding",
    "user-agent",
    "x-agent-version",
    "x-api-key",
}
_RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # struct linger
# the line end of the chunk before, the size, extensions
_CHUNK_HEAD = re.compile(rb"[\r\n]*([0-9A-Fa-f]{1,15})(?:[; \t][^\n]*)?\r?\n")
_jitter = random.SystemRandom().uniform  # unaffected by random.seed()


class _CancelScope:
    """Lets one thread end the network operation of another."""

    def __init__(self) -> None:
        self.cancelled, self.process = threading.Event(), os.getpid()
        self.sock: Optional[socket.socket] = None

    def attach(self, sock: socket.socket) -> None:
        self.sock = sock
        if self.cancelled.is_set():
            raise ConnectionAbortedError("the call was cancelled")

    def cancel(self) -> None:
        self.cancelled.set()
        if (sock := self.sock) and self.process == os.getpid():  # after a fork, it is the parent's
            # close() would not wake a blocked read, and SSLSocket.shutdown() would drop the TLS
            # object that the other thread reads from
            with contextlib.suppress(OSError):
                # the later close() sends a reset: without it, a server that is blocked in send()
                # may wait for a minute on Linux
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


# The scope of this thread's work: of an async twin, a stream or a file. All plain calls share one
# that nobody cancels
_PLAIN = _CancelScope()
_current_scope = contextvars.ContextVar("xtask_scope", default=_PLAIN)


def _attach(sock: socket.socket) -> None:
    _current_scope.get().attach(sock)


def _is_cancelled() -> bool:
    return _current_scope.get().cancelled.is_set()


def _wait(seconds: float) -> None:
    """Pause between two requests; it ends early when the current scope is cancelled."""
    _current_scope.get().cancelled.wait(seconds)


class _RetryPolicy(NamedTuple):
    """Which failures are retried. A request that was not sent is always retried."""

    statuses: tuple[int, ...]
    errors: tuple[type[Exception], ...]

    def allows(self, error: ModuleException) -> bool:
        if error.answered:
            return error.status_code in self.statuses
        return error._retriable or isinstance(error.__cause__, self.errors)


_RETRY = _RetryPolicy((429, 502, 503, 504), _CONNECTION_ERRORS)
_RETRY_POST = _RetryPolicy((429,), ())  # a POST may have taken effect before the connection broke
_RETRY_STREAM = _RetryPolicy((429, *range(500, 600)), _CONNECTION_ERRORS + _TIMEOUTS)


@dataclass(repr=False, eq=False)
class _Request:
    """One request, and how it may be carried out."""

    method: str
    url: _URL
    headers: Mapping[str, str]
    timeout: float  # seconds, of a single wait
    body: Optional[bytes] = None
    reuse: bool = False  # take an idle connection, and keep the connection afterwards
    untrusted: bool = False  # a file's URL: any origin, but public addresses only
    sent: bool = False  # whether the server may have received any of it
    resent: bool = False  # whether it was sent before, over an idle connection that was broken
    response: Optional[_Response] = None


def _decode_chunks(data: bytes, remaining: int) -> tuple[bytes, bytes, int, bool]:
    """The content of the chunks in `data` (RFC 9112, section 7.1).

    `remaining`: how many bytes at the start still belong to the previous chunk. Returns the
    content, an incomplete chunk head at the end of `data`, how many bytes the last chunk still
    lacks, and whether the final chunk came.
    """
    offset, parts, ended = remaining, [data[:remaining]], False
    while not ended and (head := _CHUNK_HEAD.match(data, offset)):
        offset = head.end() + int(head[1], 16)  # may be beyond the end of `data`
        parts.append(data[head.end() : offset])
        ended = offset == head.end()
    buffer = data[offset:]
    if not ended and (len(buffer) > 4096 or b"\n" in buffer.lstrip(b"\r\n")):
        raise http.client.HTTPException("a chunk without a valid size")
    return b"".join(parts), buffer, max(0, offset - len(data)), ended


class _Reader(io.BufferedReader):
    """Reads heads. http.client would take one that is cut off as complete, and never give up.

    Large ones take the email package, which parses them, time by the square of their size.
    """

    size = 0

    def readline(self, size: Optional[int] = -1) -> bytes:
        try:
            line = super().readline(size)
        except ConnectionError:
            if not self.size:
                raise
            line = b""
        is_complete = line.endswith(b"\n") or len(line) == size  # of that size: a line too long
        is_empty_head = not (line or self.size)  # http.client raises RemoteDisconnected
        if not (is_complete or is_empty_head):
            raise http.client.IncompleteRead(line)
        self.size += len(line)
        if self.size > _MAX_HEAD:
            raise http.client.HTTPException("the head of the response is too large")
        return line


class _Response(http.client.HTTPResponse):
    """A response whose content is read as it arrives, with any framing (RFC 9112, section 6.3).

    gzip and deflate are decoded, asked for or not (RFC 9110, section 8.4).
    """

    connection: Optional[_Connection] = None  # until it is released
    host = ""
    redact_key: Callable[[Any], Any] = str
    body = b""  # of the response to a call
    value: Any = None  # its JSON value; None if the body is empty
    coding = ""  # of the content: gzip, deflate, or one that is not supported
    decoder: Any = None  # of zlib; None before each of the members that may follow each other
    encoded = b""  # read, but not yet taken by the decoder
    buffer = b""  # read, but not used: part of a chunk's head, or bytes after the body
    remaining = 0  # bytes that the current chunk still lacks
    ended = False  # whether the last chunk came
    deadline = float("inf")  # on the monotonic clock, for reading more

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.sock, self.fp = sock, _Reader(self.fp.detach())

    def begin(self) -> None:
        super().begin()
        while self.status < 200 and self.status != 101:  # http.client skips only 100 of these;
            self.headers = None  # type: ignore[assignment]  # 101 is final: another protocol
            super().begin()  # which does nothing if there are headers
        codings = self.headers.get_all("Content-Encoding", [])
        if self.ends_with_connection:
            codings += self.headers.get_all("Transfer-Encoding", [])
        names = [name.strip() for name in ",".join(codings).lower().split(",")]
        self.coding = ", ".join(name for name in names if name not in _NO_CODING)

    def error(self, status: int, description: str, details: Any = None) -> ModuleException:
        """An error with the headers of this response; the key is hidden in the description."""
        return ModuleException(
            status, self.redact_key(description), details, True, self.header_values()
        )

    def header_values(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def unexpected(self, expected: str) -> ModuleException:
        kind = type(self.value).__name__
        return self.error(500, f"{self.host} sent {kind} instead of {expected}", self.value)

    def read_some(self) -> bytes:
        """The content that has arrived, b"" at its end; IncompleteRead if it was cut off."""
        return self._decode() if self.coding else self._read_body()

    def _decode(self) -> bytes:
        """Some of the decoded content, at most 64 KiB at a time, however much it expands."""
        import zlib

        if self.coding not in ("gzip", "x-gzip", "deflate"):
            raise self._coding_error("is not supported")
        empty = 0  # bytes that gave no content
        while True:
            if self.decoder:
                try:
                    content: bytes = self.decoder.decompress(self.encoded, 65536)
                except zlib.error as error:
                    raise self._coding_error("is broken") from error
                self.encoded = self.decoder.unconsumed_tail or self.decoder.unused_data
                if self.decoder.eof:
                    self.decoder = None
                if content:
                    return content
                if empty > 2**17:
                    raise self._coding_error("has no content")
            if not self.encoded:
                self.encoded = self._read_body()
                empty += len(self.encoded)
                if not self.encoded:
                    if not self.decoder:
                        return b""
                    if self.ends_with_connection:
                        raise http.client.IncompleteRead(b"")
                    raise self._coding_error("is cut off")
            self.decoder = self.decoder or zlib.decompressobj(31 if "gzip" in self.coding else 15)

    def _coding_error(self, problem: str) -> ModuleException:
        status = self.status if self.status >= 400 else 500
        coding = self.redact_key(self.coding)[:60]
        return self.error(status, f"the Content-Encoding {coding} {problem}")

    def _read_body(self) -> bytes:
        """The part of the body that has arrived."""
        if self.length == 0:  # also for a 204 that declares chunks
            return b""
        if self.chunked:
            return self._read_chunks()
        part = self._receive()
        if self.length is not None:
            if not part:
                raise http.client.IncompleteRead(part)
            part, self.buffer = part[: self.length], part[self.length :]
            self.length -= len(part)
        return part

    def _read_chunks(self) -> bytes:
        """The content of all chunks that arrived: one at a time would double the CPU of a burst."""
        data = b""
        while not data and not self.ended:
            arrived = self._receive()
            if not arrived:
                raise http.client.IncompleteRead(arrived)
            data, self.buffer, self.remaining, self.ended = _decode_chunks(
                self.buffer + arrived, self.remaining
            )
        return data

    def _receive(self) -> bytes:
        if time.monotonic() > self.deadline:
            raise TimeoutError("there was no time left")
        return self.fp.read1(65536)

    def read_all(self, limit: int) -> bytes:
        """The body, at most one part longer than the limit; that of an error may be incomplete."""
        body = bytearray()
        try:
            while len(body) <= limit:
                part = self.read_some()
                if not part:
                    break
                body += part
        except (OSError, http.client.HTTPException):
            if self.status < 400:
                raise
        return bytes(body)

    @property
    def ends_with_connection(self) -> bool:
        """Whether the body has no declared end, so that a cut looks like its end."""
        return self.length is None and not self.chunked

    @property
    def reusable(self) -> bool:
        """Whether the body ended where its head declared, so that another response may follow.

        Not if bytes follow it, or if others on the way may see another end: with two framings, or
        where a response without a body declares one.
        """
        names = map(str.lower, self.headers)
        framings = [name for name in names if name in ("content-length", "transfer-encoding")]
        if len(framings) > 1 or (framings and self.status in (204, 304)):
            return False
        if self.ended:
            return self.buffer == b"\r\n"
        return self.length == 0 and not self.buffer and self.status >= 200

    def close(self) -> None:
        """Close it, and its connection unless that was released."""
        super().close()
        if self.connection:
            self.connection.close()


def _open_socket(host: str, port: int, public_only: bool, deadline: float) -> socket.socket:
    """A socket connected to the first address of the host that accepts the connection."""
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if public_only:
        _require_public(host, addresses)
    while addresses:
        family, kind, protocol, _, address = addresses.pop(0)
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)  # fails on a host without this family
            _attach(sock)
            sock.settimeout(max(0.1, (deadline - time.monotonic()) / (len(addresses) + 1)))
            sock.connect(address)
            _attach(sock)  # a connect that was cancelled meanwhile looks like success
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            is_late = time.monotonic() > deadline
            if not addresses or is_late or not isinstance(error, OSError) or _is_cancelled():
                raise
    raise OSError(f"{host} has no address")


class _Connection(http.client.HTTPConnection):
    """A connection to a checked address, through a proxy and with TLS where needed."""

    response_class = _Response
    released_at = 0.0  # wall clock: the monotonic clock stops while a machine is suspended

    def __init__(
        self,
        request: _Request,
        proxy: Optional[_Proxy],
        context: Optional[ssl.SSLContext],
        public_only: bool,
    ) -> None:
        super().__init__(request.url.host, request.url.port, timeout=request.timeout)
        self.default_port = _DEFAULT_PORTS[request.url.scheme]
        self.url, self.proxy, self.context = request.url, proxy, context
        self.public_only, self.process = public_only, os.getpid()

    def connect(self) -> None:
        host, port = (self.proxy or (self.url.dns_name, self.port))[:2]
        deadline = time.monotonic() + min(_CONNECT_TIMEOUT, self.timeout or _CONNECT_TIMEOUT)
        self.sock = _open_socket(host, port, self.public_only, deadline)
        if self.context:
            if self.proxy:
                self.sock.settimeout(max(0.1, deadline - time.monotonic()))
                self._open_tunnel(self.proxy.authorization)
            self.sock.settimeout(max(0.1, deadline - time.monotonic()))
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            _attach(self.sock)
            self.sock.do_handshake()
        self.sock.settimeout(self.timeout)

    def _open_tunnel(self, authorization: str) -> None:
        """CONNECT through a proxy (RFC 9110, section 9.3.6)."""
        host = _bracketed(self.host)
        head = f"CONNECT {host}:{self.port} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
        head += f"Proxy-Authorization: {authorization}\r\n" if authorization else ""
        self.sock.sendall(f"{head}\r\n".encode("latin-1"))
        # its buffer takes nothing of the server behind the proxy: in TLS the client speaks first
        with _Response(self.sock, method="CONNECT") as response:
            response.begin()
            # the standard reason: the proxy's own may repeat the password
            reason = http.client.responses.get(response.status, "")
            text = f"the proxy refused the tunnel: {response.status} {reason}"
            if response.status in (502, 503, 504):
                raise ConnectionError(text)
            if not 200 <= response.status < 300:
                raise http.client.HTTPException(text)

    def is_usable(self) -> bool:
        """Whether it is recent, of this process, and still open: a closed one is readable."""
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


def _close_all(connections: list[_Connection]) -> None:
    with contextlib.suppress(IndexError):  # another thread may take the last one
        while True:
            connections.pop().close()


class _Transport:
    """The requests of a configuration, with its idle connections, TLS contexts and proxies."""

    def __init__(self, configuration: Configuration) -> None:
        self.timeout, self.max_retries = configuration.timeout, configuration.max_retries
        self.api_key, self.context = configuration.api_key, configuration.ssl_context
        self.headers = {
            name: value
            for name, value in configuration.headers.items()
            if name.lower() not in _OWN_HEADERS
        }
        self.redact_key = functools.partial(_redact_key, self.api_key)
        self.trusted_hosts = configuration.trusted_file_hosts
        url = _parse_url(configuration.base_url)
        is_host = "agent-controller" in url.host or url.port == 9016
        self.is_controller = is_host or url.target.split("/")[1] == "agent-controller"
        self.default_context: Optional[ssl.SSLContext] = None
        self.proxies = _find_proxies()
        # No lock: a list's append and pop are atomic, and a lock that another thread holds at
        # a fork stays locked in the child forever; a wait for the turns ends after a second.
        self.idle: list[_Connection] = []
        self.status_turns = threading.Semaphore(_STATUS_LOADS)
        weakref.finalize(self, _close_all, self.idle)

    def request(
        self, method: str, url: str, headers: Mapping[str, str], **options: Any
    ) -> _Request:
        """A request with the key: for the API and the events, never for files."""
        if not self.api_key:
            raise ModuleException(401, "No API key: set XPANDER_API_KEY or api_key", answered=False)
        headers = {**self.headers, "x-api-key": self.api_key, "User-Agent": _USER_AGENT, **headers}
        return _Request(method, _parse_url(url, "the URL"), headers, **options)

    def call(
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Mapping[str, str] = {},
        policy: Optional[_RetryPolicy] = None,
    ) -> _Response:
        """The response to a request, with its JSON value; it is sent again where that is safe."""
        headers = {"Accept": "application/json", **headers}
        content = None
        if body is not None:
            content = json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"

        def attempt(failures: int) -> _Response:
            request = self.request(
                method, url, headers, timeout=self.timeout, body=content, reuse=method != "POST"
            )
            try:
                with self.open(request) as response:
                    response.body = response.read_all(_MAX_RESPONSE)
                    self._release(request, response)
                # an empty 200 without a length is a connection that broke after the head
                is_empty = response.status == 200 and not response.body
                if is_empty and response.ends_with_connection and method in ("GET", "POST"):
                    raise http.client.IncompleteRead(b"")
            except _REQUEST_ERRORS as error:
                raise self.connection_error(request, error) from error
            repeated = method == "DELETE" and (failures or request.resent)
            if not (repeated and response.status == 404):  # the first one may have succeeded
                response.value = self.parse_response(response)
            return response

        return self.retry(attempt, policy or (_RETRY_POST if method == "POST" else _RETRY))

    def retry(self, attempt: Callable[[int], _T], policy: _RetryPolicy, pause: float = 0.25) -> _T:
        """The result of `attempt`, which is called with the number of failures so far.

        The pause is `pause` seconds, doubled for each of the first 4 failures, times a jitter of 1
        to 2, at most 30 s; or what the server asks for.
        """
        failures = 0
        while True:
            try:
                return attempt(failures)
            except ModuleException as error:
                seconds = _parse_retry_after((error.headers or {}).get("retry-after", ""))
                if seconds is None:
                    seconds = min(30.0, pause * 2.0 ** min(failures, 4) * _jitter(1, 2))
                exhausted = failures >= self.max_retries or seconds > _MAX_RETRY_AFTER
                if exhausted or _is_cancelled() or not policy.allows(error):
                    raise
            _wait(seconds)  # here, so that a Ctrl-C has one plain traceback
            failures += 1

    def open(self, request: _Request) -> _Response:
        """The response to a request, after its redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            started = time.monotonic()
            try:
                response = request.response = self._exchange(request)
            except Exception as error:
                self._log(request, type(error).__name__, started)
                raise
            self._log(request, response.status, started)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            request.url = self._redirect_url(request, response)
        raise response.error(response.status, f"redirected more than {_MAX_REDIRECTS} times")

    def _log(self, request: _Request, outcome: object, started: float) -> None:
        """Log a request and its outcome, if DEBUG is enabled."""
        if "logging" in sys.modules:  # else nobody can have enabled DEBUG
            import logging  # blocks while another thread is importing it

            logger, seconds = logging.getLogger(__name__), time.monotonic() - started
            if logger.isEnabledFor(logging.DEBUG):
                url = self.redact_key(str(request.url).partition("?")[0])
                logger.debug("%s %s: %s, %.0f ms", request.method, url, outcome, seconds * 1000)

    def _redirect_url(self, request: _Request, response: _Response) -> _URL:
        """The target of a redirect. Only a GET is redirected, and only a file to another origin."""
        raw = response.headers.get("Location", "").encode("latin-1")
        location = urllib.parse.quote(raw, safe=f"{_URL_CHARACTERS}#[]")
        url = _parse_url(location, "a redirect", str(request.url))
        if not request.untrusted and (request.method != "GET" or request.url[:3] != url[:3]):
            text = f"{request.method} was redirected to {url.netloc}: check XPANDER_BASE_URL"
            raise response.error(response.status, text)
        return url

    def _exchange(self, request: _Request) -> _Response:
        """Send a request over an idle or a new connection, and read the head of the response."""
        if connection := self._checkout(request):
            try:
                return self._send(connection, request)
            except (ConnectionError, ssl.SSLEOFError):  # it was closed while it was idle
                request.sent, request.resent = False, True
        if _is_cancelled():
            raise ConnectionAbortedError("the call was cancelled")
        proxy = self._proxy_for(request.url)
        trusted = not request.untrusted or request.url.host in self.trusted_hosts
        if proxy and not trusted:  # the proxy resolves names; literal addresses can be checked
            _check_host(request.url, socket.AI_NUMERICHOST)
        context = self._tls_context(request.url, trusted)
        connection = _Connection(request, proxy, context, not (proxy or trusted))
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return self._send(connection, request)

    def _proxy_for(self, url: _URL) -> Optional[_Proxy]:
        proxy = self.proxies.get(url.scheme)
        if not proxy:
            return None
        from urllib.request import proxy_bypass

        return None if proxy_bypass(url.netloc) else _parse_proxy(proxy)

    def _tls_context(self, url: _URL, trusted: bool) -> Optional[ssl.SSLContext]:
        """The configuration's context; for untrusted hosts one without its client certificate."""
        if url.scheme == "http":
            return None
        if trusted and self.context:
            return self.context
        if self.default_context is None:
            context = ssl.create_default_context()  # takes 20 ms: once, and only for https
            context.set_alpn_protocols(["http/1.1"])
            self.default_context = context
        return self.default_context

    def _checkout(self, request: _Request) -> Optional[_Connection]:
        """An idle connection; all of them lead to the API's origin. Unusable ones are closed."""
        with contextlib.suppress(IndexError):  # there are no more
            while request.reuse:
                connection = self.idle.pop()
                if connection.is_usable():
                    return connection
                connection.close()
        return None

    def _send(self, connection: _Connection, request: _Request) -> _Response:
        headers, target, proxy = {**request.headers}, request.url.target, connection.proxy
        if not request.reuse:
            headers["Connection"] = "close"
        if proxy and not connection.context:  # without a tunnel, the proxy forwards the request
            target = f"http://{request.url.netloc}{target}"
            if proxy.authorization:
                headers["Proxy-Authorization"] = proxy.authorization
        try:
            _attach(connection.sock)
            request.sent = True
            try:
                connection.request(request.method, target, request.body, headers)
            except OSError:
                # a response that the server sent before it had the whole body may be waiting
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return self._response(connection, request)
                raise
            return self._response(connection, request)
        except BaseException:
            connection.close()
            raise

    def _response(self, connection: _Connection, request: _Request) -> _Response:
        response = cast(_Response, connection.getresponse())
        response.connection, response.host = connection, request.url.netloc
        response.redact_key = self.redact_key
        return response

    def _release(self, request: _Request, response: _Response) -> None:
        """Return the connection of a response to the idle ones, if its body was read to its end."""
        connection = response.connection
        if not (connection and connection.sock and request.reuse and response.reusable):
            return  # without a socket if the server closes it
        if len(self.idle) < _MAX_IDLE_CONNECTIONS:
            # or a late cancel() would end the next call that takes it
            _current_scope.get().sock = None
            response.connection = None
            response.close()
            connection.released_at = time.time()
            self.idle.append(connection)

    def parse_response(self, response: _Response) -> Any:
        """The JSON value of a response (None for an empty one), or a ModuleException."""
        status, host, body = response.status, response.host, response.body
        if len(body) > _MAX_RESPONSE:
            raise response.error(500, f"{host} sent more than {_MAX_RESPONSE // 2**20} MiB")
        invalid: Optional[Exception] = None
        try:
            value = json.loads(body) if body.strip() else None
        except (ValueError, RecursionError) as error:
            value, invalid = None, error
        kind = response.headers.get("Content-Type", "").lower() if invalid else ""
        is_html = "html" in kind or bool(invalid and body.lstrip()[:1] == b"<")
        if not 200 <= status < 300:
            plain = body[:65536].decode("utf-8", "replace") if invalid and not is_html else ""
            text = _describe(value) or " ".join(self.redact_key(plain).split())[:200]
            text = text or http.client.responses.get(status, "Unknown status")
            raise response.error(status, _redact(text), value)
        if invalid:
            content = "HTML" if is_html else "a body"
            text = f"{host} sent {content} that is not JSON: {invalid}"
            raise response.error(500, text) from invalid
        return value

    def connection_error(self, request: _Request, error: Exception) -> ModuleException:
        """The error of a request without a response, or without a complete one."""
        if type(error) in (http.client.BadStatusLine, http.client.UnknownProtocol):
            # it shows what came, in which a proxy may repeat its password
            error.args = ("not an HTTP response",)
        error.args = tuple(map(self.redact_key, error.args))  # tracebacks show it as the cause
        error.__context__ = None  # tracebacks would show this, too
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
        elif file := getattr(error, "filename", None):  # of the TLS settings
            reason = f"{reason}: {file}"
        text = f"The request to {request.url.netloc} failed: {' '.join(reason.split())[:300]}"
        headers = request.response.header_values() if request.response else None
        failure = ModuleException(500, text, None, False, headers)
        connecting = (OSError, http.client.BadStatusLine, http.client.IncompleteRead)
        permanent = (ssl.SSLCertVerificationError, _URLRejected)
        if not request.sent and isinstance(error, connecting):
            is_permanent = isinstance(error, permanent) or getattr(error, "filename", None)
            failure._retriable = not is_permanent
        return failure


def _redact_key(api_key: Optional[str], text: Any) -> Any:
    """The text without the key, which a server may repeat."""
    if api_key and len(api_key) >= 4 and isinstance(text, str):
        return re.sub(f"(?i){re.escape(api_key)}", "***", text)
    return text


def _describe(value: Any, depth: int = 2) -> str:
    """The message in the JSON of an error, as the platform and proxies write it; "" if none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        items = (_describe(item, depth) for item in value if not isinstance(item, list))
        return "; ".join(filter(None, items))
    if not isinstance(value, dict):
        return ""
    if isinstance(value.get("msg"), str):  # of a 422: where, and what is wrong
        path = value.get("loc")
        steps = path if isinstance(path, list) else [path]
        where = ".".join(str(step) for step in steps if isinstance(step, (str, int)))
        return f"{where}: {value['msg']}" if where else value["msg"]
    names = ("detail", "message", "error") if depth else ()
    return next(filter(None, (_describe(value.get(name), depth - 1) for name in names)), "")


def _parse_retry_after(value: str) -> Optional[float]:
    """The seconds of a Retry-After, which is a number or a date (RFC 9110, section 10.2.3)."""
    value = value.strip()
    if re.fullmatch("[0-9]+", value):
        return float(value)  # infinity for hundreds of digits
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # not a date
        moment = parsedate_to_datetime(value)
        moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc)
        return max(0.0, moment.timestamp() - time.time())
    return None


# ---- Server-sent events --------------------------------------------------------------------------


class ServerSentEvent(NamedTuple):
    """An event of a stream; `id` and `retry` (milliseconds) are the last ones seen so far."""

    event: str
    data: str
    id: str
    retry: Optional[int]

    def __repr__(self) -> str:
        return _repr(self, self._asdict())


def iter_sse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """The events of a `text/event-stream` whose bytes come in chunks, cut anywhere. Does no I/O.

    WHATWG HTML, section 9.2.6, "Interpreting an event stream". ValueError: an event over 16 MiB.
    """
    return itertools.chain.from_iterable(map(_Parser().feed, chunks))


class _Parser:
    """The state of a stream between two chunks."""

    def __init__(self, last_id: str = "", retry: Optional[int] = None) -> None:
        self.last_id, self.retry = last_id, retry
        self._bom = b"\xef\xbb\xbf"  # removed once, at the start of the stream
        self._pending, self._size = bytearray(), 0  # an incomplete event; its bytes as received
        self._ended_with_cr = False  # an LF that follows belongs to the CR

    def feed(self, chunk: bytes) -> Iterable[ServerSentEvent]:
        """The events that this chunk completes."""
        complete, arrived = b"", len(chunk)
        if self._ended_with_cr or b"\n" in chunk or b"\r" in chunk:  # else it completes nothing
            if self._ended_with_cr and chunk[:1] == b"\n":  # a CRLF over two chunks is one end
                chunk, self._ended_with_cr = chunk[1:], False
            if chunk:
                self._ended_with_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            # a blank line ends an event; it may lie across two chunks
            if b"\n\n" in chunk or (chunk[:1] == b"\n" and self._pending[-1:] == b"\n"):
                complete, _, chunk = b"".join([self._pending, chunk]).rpartition(b"\n\n")
                complete = complete.removeprefix(self._bom)
                self._pending, self._size, self._bom = bytearray(), 0, b""
                arrived = len(chunk)
        self._pending += chunk
        self._size += arrived
        return self._events(complete) if complete or self._size > _MAX_EVENT else ()

    def _events(self, complete: bytes) -> Iterator[ServerSentEvent]:
        sizes = map(len, complete.split(b"\n\n") if len(complete) > _MAX_EVENT else ())
        too_large = [number for number, size in enumerate(sizes) if size > _MAX_EVENT]
        end = too_large[0] if too_large else None
        for block in complete.decode("utf-8", "replace").split("\n\n")[:end]:
            if block.startswith("data: ") and "\n" not in block:  # usual: twice as fast
                yield ServerSentEvent("message", block[6:], self.last_id, self.retry)
            elif event := self._event(block):
                yield event
        if too_large or self._size > _MAX_EVENT:
            raise ValueError(f"an event of more than {_MAX_EVENT // 2**20} MiB")

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
            elif name == "retry" and re.fullmatch("[0-9]{1,4000}", value):  # int() takes 4300
                self.retry = int(value)
        return ServerSentEvent(kind, "\n".join(data), self.last_id, self.retry) if data else None


# ---- Events --------------------------------------------------------------------------------------

_EVENT_RECORDS: dict[str, type[_Record]] = {
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
_decode_json = json.JSONDecoder().raw_decode  # json.loads would take a third longer


@dataclass(repr=False, eq=False)
class TaskUpdateEvent(_Record):
    """One event. `data` is a `Task`, `ToolCallRequest` or `ToolCallResult`, else the JSON received.

    `raw` is the envelope as received; unless `data` is a `Task`, they share objects. `task_id` may
    be that of a sub-agent's task.
    """

    type: TaskUpdateEventType
    task_id: Optional[str] = None
    organization_id: Optional[str] = None
    time: _Time = None
    data: Any = None
    raw: dict[str, Any] = field(default_factory=dict)
    extra: _Object = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        required: Mapping[str, Any] = {},
        configuration: Optional[Configuration] = None,
    ) -> TaskUpdateEvent:
        """The event of an envelope; ValueError if that has no string `type`.

        `required` completes a task that lacks required fields.
        """
        kind, body = data.get("type"), data.get("data")
        if not isinstance(kind, str):
            raise ValueError("an event must have a string as its type")
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
    """Reads the events of a task, over as many connections as needed."""

    def __init__(self, task: Task) -> None:
        if not task.events_streaming:
            raise ValueError(
                "no events: create the task with events_streaming=True, or wait_finished()"
            )
        self.task, self.configuration = task, task.configuration
        self.transport = self.configuration._transport
        self.scope, self.parser = _CancelScope(), _Parser()
        items, self.task_id = task._items(), task.id
        self.required = _to_json({name: items[name] for name in _REQUIRED if name in items})
        self.seen: deque[int] = deque(maxlen=_REPLAY_WINDOW)  # hashes of the data of events
        self.maybe_repeated: set[int] = set()  # until the first new event of a connection
        self.connected_seen = self.finished = False
        self.silence_limit = float("inf")

    def batches(self) -> Generator[list[TaskUpdateEvent], None, None]:
        """The events, in lists of those that came together, until the task or the scope ends."""
        try:
            if self.task.is_finished:
                self.silence_limit = _FINAL_SILENCE
            while not (self.finished or self.scope.cancelled.is_set()):
                yield from self._connection()
        except Exception:
            if not self.scope.cancelled.is_set():
                raise

    def _connection(self) -> Iterator[list[TaskUpdateEvent]]:
        """The events of one connection; then the last event, if the task's status is final."""
        response = self.transport.retry(self._connect, _RETRY_STREAM, self._pause())
        if response:
            with response:
                yield from self._read(response)
        if self.finished or self.scope.cancelled.is_set():
            return
        # The end of a connection proves nothing, however clean it looks: the status does.
        # Few at a time: 200 streams that end together would hold up other events for 90 ms
        has_turn = self.transport.status_turns.acquire(timeout=1.0)
        try:
            args = "GET", _STATUS_ROUTE, self.task_id
            task = Task._request_task(self.configuration, *args, policy=_RETRY_STREAM)
        finally:
            if has_turn:
                self.transport.status_turns.release()
        if task.is_finished:
            self.finished = True
            yield [self._last_event(task)]
        elif response and response.status == 204:
            raise response.error(204, f"The server has no events, but the task is {task.status}")
        else:
            _wait(self._pause())

    def _pause(self) -> float:
        """The seconds between two connections: the server's `retry`, from 0.1 to 30."""
        milliseconds = 500 if self.parser.retry is None else self.parser.retry
        return min(max(milliseconds, 100), 30_000) / 1000

    def _connect(self, failures: int) -> Optional[_Response]:
        """A 2xx response; None if none came although the request was sent, which is not counted."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        last_id = self.parser.last_id.encode()  # in UTF-8, by the standard
        if re.fullmatch(rb"[^\0-\x1f\x7f]{1,4096}", last_id):
            headers["Last-Event-ID"] = last_id.decode("latin-1")  # http.client encodes it back
        timeout = min(self.configuration.idle_timeout, self.silence_limit)
        url = self.configuration._events_url(self.task)
        request = self.transport.request("GET", url, headers, timeout=timeout)
        try:
            response = self.transport.open(request)
        except _REQUEST_ERRORS as error:
            if request.sent and isinstance(error, _TIMEOUTS + _CONNECTION_ERRORS):
                return None
            raise self.transport.connection_error(request, error) from error
        if not 200 <= response.status < 300:
            with response:
                response.sock.settimeout(_ERROR_BODY_SECONDS)
                response.deadline = time.monotonic() + _ERROR_BODY_SECONDS
                response.body = response.read_all(65536)
            self.transport.parse_response(response)  # it raises
        return response

    def _read(self, response: _Response) -> Iterator[list[TaskUpdateEvent]]:
        """The events of one connection, until it ends, in whatever way."""
        headers, status = response.headers, response.status
        kind = headers.get_content_type() if "Content-Type" in headers else "no Content-Type"
        if status != 204 and (status, kind) != (200, "text/event-stream"):
            if "Content-Type" not in headers and response.ends_with_connection:
                with contextlib.suppress(*_REQUEST_ERRORS):
                    if not response.read_some():
                        return  # the connection broke after the head
            text = f"The stream's response is {status} {kind}, not 200 text/event-stream"
            raise response.error(500, text)
        self.parser = _Parser(self.parser.last_id, self.parser.retry)
        self.maybe_repeated = set(self.seen)
        response.deadline = time.monotonic() + self.silence_limit
        try:
            for chunk in iter(response.read_some, b""):
                batch: list[TaskUpdateEvent] = []
                try:
                    for message in self.parser.feed(chunk):
                        event = self._deduplicate(message, response)
                        if event:
                            batch.append(event)
                        if event and isinstance(event.data, Task):  # many may need much memory
                            yield batch
                            batch = []
                            response.deadline = time.monotonic() + self.silence_limit
                except (ValueError, ModuleException):
                    if batch:
                        yield batch  # the events before it
                    raise
                if batch:
                    yield batch
                    response.deadline = time.monotonic() + self.silence_limit
                if self.finished:
                    return
        except (OSError, http.client.HTTPException):
            pass  # cut off, or silent for too long: the status tells how to go on
        except ValueError as error:
            raise response.error(500, f"The stream sent {error}") from error

    def _deduplicate(
        self, message: ServerSentEvent, response: _Response
    ) -> Optional[TaskUpdateEvent]:
        """The event of a message; None if it is a repetition after a reconnect, or not an event."""
        digest = hash(message.data)
        if digest in self.maybe_repeated or self.finished:
            return None
        event = self._parse(message, response)
        if event is None:
            return None
        if event.type == "connected":  # every connection starts with one
            if self.connected_seen:
                return None
            self.connected_seen = True
        else:
            self.maybe_repeated.clear()
            self.seen.append(digest)
        self.finished = event.type == "task_finished" and event.task_id == self.task_id
        return event

    def _parse(self, message: ServerSentEvent, response: _Response) -> Optional[TaskUpdateEvent]:
        """The event of a message; a warning if it is not one."""
        value: Any = message.data.strip(" \t\n\r")
        try:
            parsed, end = _decode_json(value)
            if end == len(value):
                value = parsed
            if isinstance(value, dict):
                return TaskUpdateEvent.from_dict(value, self.required, self.configuration)
        except (ValueError, RecursionError):
            pass  # it is not JSON, or not an event
        reason = _redact(_describe(value)) if message.event == "error" else ""
        value = _redact(value)
        text = reason or (value if isinstance(value, str) else _encode(value))
        text = self.transport.redact_key(" ".join(text.split()))[:200]
        if message.event == "error":
            raise response.error(500, f"The stream sent an error: {text}", value)
        _warn("skipped a message that is not an event: %a", text)  # %a: no control characters
        return None

    def _last_event(self, task: Task) -> TaskUpdateEvent:
        """The last event, made from the task because the stream did not bring it."""
        data = {**self.required, **json.loads(task._baseline)}
        now = datetime.now(timezone.utc).isoformat()
        envelope = {
            "type": "task_finished",
            "task_id": self.task_id,
            "organization_id": data.get("organization_id"),
            "time": data.get("finished_at") or data.get("updated_at") or now,
            "data": data,
        }
        return TaskUpdateEvent.from_dict(envelope, {}, self.configuration)

    def pump(self, put: Callable[[Any], object], slots: threading.Semaphore) -> None:
        """Pass the batches to an event loop, from a thread; the last item is None or an error.

        `put` may be called from any thread; `slots` counts the batches that may still be queued.
        """
        last: Optional[BaseException] = None
        _current_scope.set(self.scope)
        try:
            with contextlib.closing(self.batches()) as batches:
                for batch in batches:
                    put(batch)
                    slots.acquire()
                    if self.scope.cancelled.is_set():
                        break
        except BaseException as error:  # raised again where the consumer is
            last = error
        with contextlib.suppress(RuntimeError):  # the loop was closed under the stream
            put(last)
        last = None  # its traceback refers to this frame: a reference cycle


def _close_stream(scope: _CancelScope, batches: Generator[Any, None, None]) -> None:
    scope.cancel()
    with contextlib.suppress(ValueError):  # another thread is in it, and was woken up
        batches.close()


class _Events(Iterator[TaskUpdateEvent]):
    """An iterator over a task's events. `close()`, from any thread, ends it and its connection."""

    def __init__(self, stream: _Stream) -> None:
        self._scope, batches = stream.scope, stream.batches()
        self._events = itertools.chain.from_iterable(batches)
        self._close = weakref.finalize(self, _close_stream, stream.scope, batches)
        self._context = contextvars.copy_context()
        self._context.run(_current_scope.set, stream.scope)

    def __next__(self) -> TaskUpdateEvent:
        if self._scope.cancelled.is_set():
            raise StopIteration
        try:
            # in a context of its own: the scope is not that of what the consumer does in between
            return self._context.run(next, self._events)
        except ValueError:
            if self._scope.cancelled.is_set():  # another thread is closing it
                raise StopIteration from None
            raise

    def close(self) -> None:
        """Leave the stream. It may be called again."""
        self._close()

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AsyncEvents(AsyncIterator[TaskUpdateEvent]):
    """The async iterator. `aclose()`, from any coroutine, ends it and its connection."""

    def __init__(self, stream: _Stream) -> None:
        self._stream, self._scope = stream, stream.scope
        self._batch: Iterator[TaskUpdateEvent] = iter(())
        # the pump puts a batch, then takes a slot: with N - 1 slots, N batches wait at most
        self._slots = threading.Semaphore(_PUMP_SLOTS - 1)
        self._queue: Any = None  # of batches; made in the event loop of the first `__anext__`
        self._put: Callable[[Any], object] = lambda item: None  # into the queue, from any thread

    async def __anext__(self) -> TaskUpdateEvent:
        for event in self._batch:
            return event
        if self._scope.cancelled.is_set():
            raise StopAsyncIteration
        if self._queue is None:
            self._start()
        try:
            item = await self._queue.get()
            self._slots.release()
            if isinstance(item, list):
                self._batch = iter(item)
                return next(self._batch)
            raise item or StopAsyncIteration
        except BaseException:
            await self.aclose()  # it also wakes other coroutines that wait
            raise
        finally:
            item = None  # an error, whose traceback refers to this frame: a reference cycle

    def _start(self) -> None:
        import asyncio

        queue: Any = asyncio.Queue()
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        put = functools.partial(call_soon, queue.put_nowait)
        pump = self._stream.pump
        threading.Thread(target=pump, args=(put, self._slots), daemon=True).start()
        self._queue, self._put = queue, put

    def _cancel(self) -> None:
        self._scope.cancel()
        self._batch = iter(())
        self._slots.release()  # wakes the pump

    async def aclose(self) -> None:
        """Leave the stream. It may be called again."""
        self._cancel()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._put(None)  # for a coroutine that waits

    async def __aenter__(self) -> _AsyncEvents:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._cancel()


# ---- Files: their URLs are not trusted -----------------------------------------------------------

_KINDS = {
    "image": ".jpg .jpeg .png .gif .bmp .tiff .webp",
    "pdf": ".pdf",
    "text": (
        ".txt .csv .json .xml .html .htm .md .rst .yaml .yml .py .js .ts .java .c .cpp .h .cs .go "
        ".rb .php .sh .svg .tsv .log .ini .toml .tex .ipynb .eml"
    ),
}
_EXTENSION_KINDS = {
    extension: kind for kind, extensions in _KINDS.items() for extension in extensions.split()
}
_MIME_KINDS = {
    "application/pdf": "pdf",
    "application/json": "text",
    "application/xml": "text",
    "image/svg+xml": "text",  # models do not accept it as an image
    "image": "image",  # any other subtype of these two
    "text": "text",
}
# not public, although `is_global` is True for them on some versions of Python
_NOT_PUBLIC = (
    "192.0.0.0/24",  # IETF protocol assignments, RFC 6890, 2.2.2; Oracle Cloud's metadata service
    "168.63.129.16/32",  # Azure's metadata service
    "2001::/23",  # IETF protocol assignments, RFC 2928
    "3fff::/20",  # documentation, RFC 9637
)
# encodings of text; Python has others, too: unicode_escape, and punycode, which is quadratic
_CHARSET = re.compile(
    r"(?i)utf[-_]?(8|16|32).*|u8|(us-)?ascii|(iso[-_]?)?8859.*|iso-ir.*|latin[-_]?\d|windows.*"
    r"|cp\d+|koi8.*|gb.*|hz.*|big5.*|shift.*|s?jis.*|euc.*|iso[-_]?2022.*|ks_c.*|tis.?620"
)
_BYTE_ORDER_MARKS = {  # UTF-32 first: one of its marks starts with one of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
_Fetched = Union[tuple[bytes, Optional[str]], Exception]  # a content and its charset, or an error


def _file_kind(attachment: Mapping[str, Any]) -> str:
    """`image`, `pdf`, `text` or another: by the `kind`, else the MIME type, else the extension."""
    kind, mime = attachment.get("kind"), str(attachment.get("mime") or "").lower()
    if isinstance(kind, str) and kind != "unknown":
        return kind
    mime = mime.partition(";")[0].strip()
    by_mime = _MIME_KINDS.get(mime) or _MIME_KINDS.get(mime.partition("/")[0])
    return by_mime or _EXTENSION_KINDS.get(_extension(attachment["url"]), "")


def _extension(url: str) -> str:
    """The extension of the URL's path, in lower case; "" if it has none."""
    path = re.sub("(?s)^[^/?#]*://[^/?#]*|[?#].*", "", url)
    return os.path.splitext(path)[1].lower()


def _require_public(host: str, addresses: Iterable[tuple[Any, ...]]) -> None:
    """Reject a host if any of its addresses, as getaddrinfo returns them, is not public."""
    import ipaddress

    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            # the embedded IPv4 address: RFC 4291, 2.5.5.2; RFC 3056, 2; RFC 6052, 2.1
            nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
            embedded = ipaddress.IPv4Address(ip.packed[12:]) if nat64 else None
            ip = ip.ipv4_mapped or ip.sixtofour or embedded or ip
        special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
        listed = any(ip in ipaddress.ip_network(network) for network in _NOT_PUBLIC)
        if special or listed or not ip.is_global:
            raise _URLRejected(
                f"the address of {host} is not public; see Configuration.trusted_file_hosts"
            )


def _check_host(url: _URL, flags: int = 0) -> None:
    """Reject a URL whose host has an address that is not public."""
    is_local = f".{url.host}".endswith(".localhost")  # RFC 6761, section 6.3
    name = "127.0.0.1" if is_local else url.host
    with contextlib.suppress(socket.gaierror):  # no address: there is nothing to reject
        _require_public(url.host, socket.getaddrinfo(name, None, flags=flags))


def _is_allowed(configuration: Configuration, url: str, deadline: float) -> bool:
    """Whether agno may fetch the URL by the same rules; a warning says why not."""
    try:
        if time.monotonic() > deadline or _is_cancelled():
            raise _URLRejected("there was no time left to check it")
        parsed = _parse_url(url)
        if parsed.host not in configuration.trusted_file_hosts:
            _check_host(parsed)
        return True
    except ValueError as error:
        _warn_of_refusal(url, error)
        return False


def _warn_of_refusal(url: str, error: Exception) -> None:
    reason = error if isinstance(error, _URLRejected) else "it is not valid"
    shown = re.split("[?#]", _redact(url))[0][:200]
    _warn("the URL of a file was refused: %a: %s", shown, reason)


def _fetch_files(configuration: Configuration, urls: list[str]) -> list[_Fetched]:
    """The content of each URL, or the error of its download, in order."""
    downloads = _Downloads(configuration, urls)
    scopes = [_CancelScope() for _ in urls[:_FILE_THREADS]]
    threads: list[threading.Thread] = []
    deadline = time.monotonic() + configuration.timeout
    try:
        with contextlib.suppress(RuntimeError):  # no more threads: the started ones do the work
            for scope in scopes:
                thread = threading.Thread(target=downloads.run, args=(scope, deadline), daemon=True)
                thread.start()
                threads.append(thread)
        if not threads:
            downloads.run(_current_scope.get(), deadline)
        for thread in threads:
            while thread.is_alive() and not _is_cancelled() and time.monotonic() < deadline:
                thread.join(min(0.1, max(0.0, deadline - time.monotonic())))
    finally:
        downloads.queue.clear()
        for scope in scopes:
            scope.cancel()
    return list(downloads.results)


class _Downloads:
    """The files of one call, shared by its threads."""

    def __init__(self, configuration: Configuration, urls: list[str]) -> None:
        self.transport, self.lock = configuration._transport, threading.Lock()
        self.queue, self.sizes = deque(enumerate(urls)), [0] * len(urls)  # bytes of each file
        self.results: list[_Fetched] = [TimeoutError("not fetched in time") for _ in urls]

    def run(self, scope: _CancelScope, deadline: float) -> None:
        _current_scope.set(scope)
        with contextlib.suppress(IndexError):  # the queue is empty
            while time.monotonic() < deadline:
                number, url = self.queue.popleft()
                try:
                    self.results[number] = self.fetch(number, url)
                except Exception as error:  # of whatever kind: the other files are not affected
                    self.results[number], self.sizes[number] = error, 0
                    if isinstance(error, _URLRejected):
                        _warn_of_refusal(url, error)

    def fetch(self, number: int, url: str) -> tuple[bytes, Optional[str]]:
        """The content and its charset."""
        content, timeout = bytearray(), self.transport.timeout
        headers = {"Accept": "*/*", "User-Agent": _USER_AGENT}
        request = _Request("GET", _parse_url(url), headers, timeout, untrusted=True)
        with self.transport.open(request) as response:
            if response.status != 200:
                raise response.error(response.status, f"the server responded {response.status}")
            for part in iter(response.read_some, b""):
                content += part
                self.count(number, len(content))
            if _is_cancelled():  # which looks like the end of a response without a length
                raise http.client.IncompleteRead(b"")
            kind = response.headers.get("Content-Type", "")
            charset = re.search(r'(?i);\s*charset\s*=[\s"]*([^\s;"]{1,40})', kind)
            return bytes(content), charset and charset[1]

    def count(self, number: int, size: int) -> None:
        """Note the size of a file so far; an error if it, or the sum of all, is too large."""
        with self.lock:  # so that only the file that exceeds the sum fails
            self.sizes[number] = size
            if size > _MAX_FILE or sum(self.sizes) > _MAX_FILES:
                self.sizes[number] = 0
                raise ModuleException(413, "the file is too large: over 10 MiB, or 32 MiB in all")


def _decode_file(fetched: _Fetched) -> str:
    """The text of a file, or an error text that reveals nothing about this network."""
    if isinstance(fetched, ModuleException) and fetched.answered:
        return f"Error: {fetched.description}"
    if isinstance(fetched, Exception):
        return "Error: the file could not be fetched"
    content, charset = fetched
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    with contextlib.suppress(LookupError, ValueError):  # unknown, or with a NUL in its name
        if charset and _CHARSET.fullmatch(charset):
            return content.decode(charset, "replace")
    return content.decode("utf-8", "replace")


def _agno_pdf(
    configuration: Configuration, file_class: Any, url: str, fetched: _Fetched, deadline: float
) -> Any:
    """agno's File with the bytes; without bytes, one with the URL, if agno may fetch that."""
    if isinstance(fetched, Exception) or not fetched[0]:
        if isinstance(fetched, _URLRejected) or not _is_allowed(configuration, url, deadline):
            return None  # with a warning
        return file_class(url=url)
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w. ()+,-]", "_", name)[-255:].strip(". ") or "file.pdf"
    names = {"filename": name, "name": name, "format": "pdf"}  # the last two: agno 1, and Bedrock
    return file_class(content=fetched[0], mime_type="application/pdf", **names)


# cut here: above is the library, below the local platform and the terminal program ----------------

__all__ += ["LocalPlatform", "main"]

# ---- Local platform ------------------------------------------------------------------------------

_AgentRun = Generator[tuple[str, Any], None, Any]  # yields (event type, data), returns the result


def _object_at(value: Any, *path: str) -> _Object:
    """The JSON object at this path of names, or an empty one."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _local_agent(task: _Object) -> _AgentRun:
    """The built-in agent: thinks, calls a tool and answers in chunks, in about a second."""
    topic = str(task["input"]["text"])[:60]
    thought = {"input": {"title": "Plan", "thought": "one search will do"}}
    yield "think", {"request_id": "r1", "operation_id": "think", "payload": thought}
    call: _Object = {"request_id": "r2", "operation_id": "find", "tool_name": "search"}
    call["payload"] = {"query": topic}
    yield "tool_call_request", call
    yield "tool_call_result", {**call, "result": {"hits": 3}, "is_error": False}
    answer = f"A simulated answer to: {topic}\nIt has three hits, and nothing left this machine."
    for word in re.findall(r"\s*\S+", answer):
        time.sleep(0.05)
        yield "chunk", word
    return answer


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


class _LocalRun:
    """A run of the local platform: its task as JSON, its activity log and its events."""

    def __init__(self, agent_id: str, body: _Object, lock: Any) -> None:
        import uuid

        now, given = _utc_now(), _drop_none(body)
        task_input = {"text": None, "files": [], "user": None, **_drop_none(given.get("input", {}))}
        user, parent = task_input["user"], given.pop("parent_execution_id", None)
        self.task: _Object = {
            "id": str(uuid.uuid4()),
            "result": None,
            **given,
            "agent_id": agent_id,
            "organization_id": "local-org",
            "input": task_input,
            "status": "pending",
            "created_at": now,
            "updated_at": now,
            "parent_execution": parent,
            "parent_task_id": parent,  # this and the next one are for lists and their filters
            "user_id": _object_at(user).get("id"),
        }
        self.log = {"id": self.task["id"], "created_at": now, "messages": [], "user": user}
        self.events: list[bytes] = []  # in the form in which they are sent
        self.over, self.changed = False, threading.Condition(lock)

    def emit(self, kind: str, data: Any, entry: Optional[_Object] = None) -> bool:
        """Add an event and its log entry; after the end of the run add nothing and return False."""
        if kind in ("think", "analyze"):
            entry = {"type": kind, **_object_at(data, "payload", "input")}
        elif kind in ("tool_call_result", "sub_agent_trigger", "auth_event"):
            entry = _object_at(data)
        with self.changed:
            if not self.over:
                now, messages = _utc_now(), self.log["messages"]
                event = {
                    "type": kind,
                    "task_id": self.task["id"],
                    "organization_id": "local-org",
                    "time": now,
                    "data": data,
                }
                lines = f"id: {len(self.events) + 1}\ndata: {json.dumps(event)}\n\n"
                self.events.append(lines.encode())
                if entry:
                    messages.append({**entry, "id": f"a{len(messages) + 1}", "created_at": now})
                self.changed.notify_all()
            return not self.over

    def change(self, changes: _Object, late: bool = False) -> _Object:
        """Change the task; after the end of its run only if `late`, or to leave `paused`.

        The first final status ends the run.
        """
        with self.changed:
            if late or not self.over or self.task["status"] == "paused":
                self.task.update(changes, updated_at=_utc_now())
            if not self.over and AgentExecutionStatus(str(self.task["status"])).is_final:
                self.task["finished_at"] = self.task["updated_at"]
                message = {"role": "agent", "content": {"text": self.task["result"], "files": None}}
                completed = self.task["status"] == "completed"
                self.emit("task_finished", self.task, message if completed else None)
                self.over = True
            return self.task

    def execute(self, agent: Callable[[_Object], _AgentRun]) -> None:
        """Run the agent to its end, or to its first event after the task was stopped."""
        self.emit("task_updated", self.change({"status": "executing", "started_at": _utc_now()}))
        try:
            events = agent(_to_json(self.task))
            try:
                kind, data = next(events)
                while self.emit(kind, data):
                    kind, data = next(events)
            except StopIteration as end:
                is_text = isinstance(end.value, (str, type(None)))
                result = end.value if is_text else json.dumps(end.value)
                self.change({"status": "completed", "result": result})
        except BaseException as error:  # also SystemExit, which ends only this agent
            self.change({"status": "failed", "result": str(error) or repr(error)})

    def stream(self, seen: int) -> Iterator[bytes]:
        """The events after the first `seen` ones, as they are added, to the end of the run."""
        pending = [b"retry: 100\n\n"]
        while pending:
            yield b"".join(pending)
            with self.changed:
                while not self.over and len(self.events) <= seen:
                    self.changed.wait()
                pending = self.events[seen:]
            seen += len(pending)


class LocalPlatform:
    """A platform on a free port of 127.0.0.1, in this process: to try things out, and for tests.

    It serves during its `with` block. `configuration` and `environ` lead to it; `tasks` maps ids
    to tasks as JSON; `requests` lists the requests received: (method, path with query, headers
    with names in lower case, parsed body or None). `agent(task)` is a generator that yields (event
    type, data) and returns the result, text or JSON; if it raises, the task is `failed` and the
    error is its result.
    """

    def __init__(self, agent: Optional[Callable[[_Object], _AgentRun]] = None) -> None:
        self.tasks: dict[str, _Object] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self._runs: dict[str, _LocalRun] = {}
        self._agent, self._lock = agent or _local_agent, threading.RLock()

    def __enter__(self) -> LocalPlatform:
        from http.server import BaseHTTPRequestHandler
        from socketserver import ThreadingTCPServer  # HTTPServer would look up the host's name

        class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: the end of the connection ends a stream
            disable_nagle_algorithm = True
            do_GET = do_POST = do_PATCH = do_DELETE = lambda handler: self._serve(handler)
            log_message: Any = lambda *_: None

        class Server(ThreadingTCPServer):
            daemon_threads, request_queue_size = True, 512
            handle_error: Any = lambda *_: None  # the client has left

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.configuration = Configuration("local-key", "local-org", self.url)
        self.configuration._transport.proxies = {}  # none, whatever the environment says
        self.environ = {
            "XPANDER_API_KEY": "local-key",
            "XPANDER_ORGANIZATION_ID": "local-org",
            "XPANDER_BASE_URL": self.url,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for run in list(self._runs.values()):
            run.change({"status": "stopped"})  # which ends its streams
        self.configuration.close()

    def _serve(self, handler: Any) -> None:
        """Respond to one request, with JSON or a stream."""
        length = re.fullmatch("[0-9]{1,8}", handler.headers.get("Content-Length", ""))
        text = handler.rfile.read(int(length[0]) if length else 0)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            try:
                body = json.loads(text or "null")
                self.requests.append((handler.command, handler.path, headers, body))
                status, content = self._route(f"{handler.command} {handler.path}", headers, body)
            except KeyError:
                status, content = 404, {"detail": "Task not found"}
            except Exception as error:
                status, content = 400, {"detail": f"unexpected JSON: {error}"}
            streamed = isinstance(content, Iterator)
            chunks = content if streamed else [json.dumps(content).encode()]
        handler.send_response(status)
        handler.send_header("Content-Type", "text/event-stream" if streamed else "application/json")
        handler.end_headers()
        handler.wfile.writelines(chunks)  # each as soon as it is there

    def _route(self, request: str, headers: dict[str, str], body: Any) -> tuple[int, Any]:
        """The status and the content, JSON or an iterator of bytes, for a request."""
        if headers.get("x-api-key") != "local-key":
            return 401, {"detail": "Invalid API key"}
        route, _, query = request.partition("?")
        runs, seen = self._runs, int(headers.get("last-event-id", 0))
        stopped = {"status": "stopped", "is_manually_stopped": True}
        routes: _Object = {
            "POST /agent-execution/([^/]+)": lambda id: self._create(id, body),
            "GET /agent-execution/executions/history/([^/]+)": lambda id: self._list(id, query),
            "GET /agent-execution/([^/]+)/status": lambda id: self.tasks[id],
            "PATCH /agent-execution/([^/]+)/update": lambda id: runs[id].change(body, late=True),
            "DELETE /agent-execution/([^/]+)": lambda id: runs[id].change(stopped),
            "GET /activity/[^/]+/([^/]+)": lambda id: runs[id].log,
            "GET /[^/]+/agent-execution/([^/]+)/events": lambda id: runs[id].stream(seen),
        }
        for pattern, handle in routes.items():
            if found := re.fullmatch(pattern, route):
                return 200, handle(urllib.parse.unquote(found[1]))
        return 404, {"detail": "Not Found"}

    def _create(self, agent_id: str, body: _Object) -> _Object:
        run = _LocalRun(agent_id, body, self._lock)
        task, task_id = run.task, run.task["id"]
        if earlier := self._runs.get(task_id):  # `id` continues it
            earlier.change({"status": "stopped"})
            run.log = earlier.log
        self._runs[task_id], self.tasks[task_id] = run, task
        run.emit("connected", {})
        content = {name: task["input"][name] for name in ("text", "files")}
        run.emit("task_created", task, {"role": "user", "content": content})
        threading.Thread(target=run.execute, args=(self._agent,), daemon=True).start()
        return task

    def _list(self, agent_id: str, query: str) -> list[_Object]:
        filters = {**urllib.parse.parse_qs(query), "agent_id": [agent_id]}
        return [
            {name: task.get(name) for name in TasksListItem.__annotations__ if name != "extra"}
            for task in self.tasks.values()
            if all(task.get(name) in values for name, values in filters.items())
        ]


# ---- Terminal ------------------------------------------------------------------------------------

_COMMANDS = {"demo": 0, "run": 2, "watch": 1, "show": 1, "log": 1, "stop": 1, "list": 1}
_HELP = """\
commands (or: python3 xtask.py COMMAND ...):
  xtask demo                   a simulated task: no account, no network
  xtask run AGENT_ID PROMPT    create a task and watch it; "-" reads the prompt
                               from standard input; "--" goes before a prompt
                               that starts with "-"
  xtask watch TASK_ID          what a task does, live, then its result
  xtask log TASK_ID            what a task did: its activity log
  xtask show TASK_ID           a task as it is now
  xtask stop TASK_ID           stop a task
  xtask list AGENT_ID          the tasks of an agent

settings: XPANDER_API_KEY, XPANDER_ORGANIZATION_ID, XPANDER_BASE_URL
exit codes: 0 done, 1 the task failed or was stopped, or a call failed,
2 wrong usage or no key, 130 Ctrl-C"""
# For events and log entries: the label, what the task does after it, and the values to show.
_TIMELINE = {
    "task_created": ("created", "waiting to start", "title"),
    "task_updated": ("updated", "working", "status internal_status title"),
    "task_finished": ("finished", "working", "id status title"),
    "tool_call_request": ("call", "calling a tool", "tool_name payload"),
    "tool_call_result": ("result", "working", "tool_name result"),
    "think": ("think", "thinking", "title thought action"),
    "analyze": ("analyze", "thinking", "title analysis result"),
    "sub_agent_trigger": ("sub-agent", "waiting for a sub-agent", "agent_id query"),
    "auth_event": ("login", "waiting for a login", "type server_name message"),
    "user": ("user", "", "text files"),
    "agent": ("agent", "", ""),
}
_ENTRY_EVENTS = {  # log entries that are shown like an event
    AgentActivityThreadToolCall: "tool_call_result",
    AgentActivityThreadAuth: "auth_event",
    AgentActivityThreadSubAgentTrigger: "sub_agent_trigger",
}


# control characters except tab and line feed, and those that change the direction of text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def _printable(value: Any) -> str:
    """Text in which control characters, and those that cannot be encoded, are replaced."""
    text = value if isinstance(value, str) else json.dumps(_redact(value), ensure_ascii=False)
    text = _CONTROL.sub("\ufffd", text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _one_line(value: Any) -> str:
    """A value on one line, without secrets."""
    return " ".join(_printable(_redact(value)).split())


def _truncate(text: str) -> str:
    """As much of the text as fits in a row of the terminal; some characters take two columns."""
    import shutil
    import unicodedata

    left = max(8, shutil.get_terminal_size().columns - 1)  # some terminals wrap a full row
    for index, character in enumerate(text):
        left -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if left < 0:
            return text[: index - 3] + "..."
    return text


def _format_time(time: Any, form: str = "%H:%M:%S") -> str:
    try:
        return f"{time.astimezone():{form}}"
    except (AttributeError, OverflowError, OSError, ValueError):
        return "--:--:--"  # not a date-time, or out of range for local time


def _elapsed(task: Task, end: Any) -> str:
    """Minutes and seconds from the start of a task, if both times are known."""
    start = task.started_at or task.created_at
    if not (isinstance(start, datetime) and isinstance(end, datetime)):
        return "-:--"
    return "%d:%02d" % divmod(max(0, (end - start).total_seconds()), 60)


def _format_row(time: Any, kind: str, data: Any) -> str:
    """A row for an event or a log entry; an answer, or the URL of a login, follows in full."""
    label, _, names = _TIMELINE.get(kind, (_one_line(kind), "", ""))
    inner = _object_at(data, "payload", "input") or _object_at(data, "data")
    values = {**_object_at(data, "content"), **inner, **_object_at(data)}
    shown = [values.get(name) for name in names.split()] if values and kind in _TIMELINE else [data]
    text = ": ".join(_one_line(value) for value in shown if value not in (None, "", [], {}))
    label = "failed" if values.get("is_error") is True else label
    below = values.get({"agent": "text", "auth_event": "url"}.get(kind, ""))
    row = _truncate(f"{_format_time(time)}  {label:<10} {text}".rstrip()) + "\n"
    return f"{row}{_printable(below)}\n" if below else row


def _format_log(log: AgentActivityThread) -> str:
    rows = []
    for entry in log.messages if isinstance(log.messages, list) else []:
        kind = getattr(entry, "role", getattr(entry, "type", getattr(entry, "action", "other")))
        kind = _ENTRY_EVENTS.get(type(entry), kind if isinstance(kind, str) else "other")
        rows.append(_format_row(getattr(entry, "created_at", None), kind, _to_json(entry)))
    return "".join(rows)


def _format_task(task: Task) -> str:
    """A row for each field that is set, and below them the result in full."""
    rows = [
        _truncate(f"{_one_line(name):<22} {_one_line(value)}") + "\n"
        for name, value in _redact(task.to_dict()).items()
        if name != "result" and value not in (None, False, "", [], {})
    ]
    return "".join(rows) + ("" if task.result is None else _printable(task.result) + "\n")


def _format_item(item: TasksListItem) -> str:
    created = _format_time(item.created_at, "%Y-%m-%d %H:%M")
    row = f"{created:<16}  {_one_line(item.status or ''):<10}  {_one_line(item.id)}  "
    return _truncate((row + _one_line(item.title or "")).rstrip()) + "\n"


class _Screen:
    """Standard output: JSON for programs, or text; on a terminal with a status row below it.

    The status row shows the elapsed time and the activity, and is rewritten in place.
    """

    task: Any = None  # the one that is watched
    live, mid_line, status_row, activity = False, False, "", "working"

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.lock, self.stopped = as_json, threading.Lock(), threading.Event()
        self.answer: list[str] = []  # its chunks

    def write(self, text: str) -> None:
        """Print text, and the status row below it unless the text ends within a line."""
        if self.as_json:
            return
        with self.lock:
            self.mid_line = not text.endswith("\n") if text else self.mid_line
            erase = f"\r{' ' * len(self.status_row)}\r" if self.status_row else ""
            self.status_row = ""
            if self.live and not self.mid_line:
                elapsed = _elapsed(self.task, datetime.now(timezone.utc))
                self.status_row = _truncate(f"{elapsed}  {self.activity}")
            print(erase + text + self.status_row, end="", flush=True)

    def tick(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed: the main thread sees that, too
            while not self.stopped.wait(1):
                self.write("")

    def show(self, record: Any, render: Callable[[Any], str]) -> None:
        if self.as_json:  # in ASCII: any output can encode it, and it has no control characters
            print(json.dumps(record.to_dict()), flush=True)
        else:
            self.write(render(record))

    def show_event(self, event: TaskUpdateEvent) -> None:
        own = event.task_id == self.task.id
        if self.as_json:
            print(json.dumps(event.raw), flush=True)
        elif own and event.type == "chunk":
            self.activity = "answering"
            self.answer.append(_printable(event.data or ""))
            self.write(self.answer[-1])
        elif event.type != "connected" and not (own and event.type == "task_finished"):
            self.activity = _TIMELINE.get(event.type, ("", "working"))[1]
            row = _format_row(event.time, event.type, event.raw.get("data"))
            self.write("\n" * self.mid_line + row)

    def watch(self, task: Task) -> None:
        """Show the events of a task to its end; of a task without a stream, only its end."""
        self.task, self.live = task, bool(sys.stdout) and sys.stdout.isatty()
        threading.Thread(target=self.tick, daemon=True).start()
        try:
            self.write(f"{_format_time(task.created_at)}  task       {_one_line(task.id)}\n")
            task = self.follow(task)
        finally:
            self.live = False
            self.stopped.set()
            self.write("\n" * self.mid_line)
        elapsed, status = "after " + _elapsed(task, task.finished_at), _one_line(task.status)
        self.write(_format_row(task.finished_at, status, elapsed))
        result = "" if task.result is None else _printable(task.result)
        if result.strip() not in ("", "".join(self.answer).strip()):  # not shown yet
            self.write(f"\n{result}\n")
        if task.status != "completed":
            raise RuntimeError(f"the task ended as {status}")

    def follow(self, task: Task) -> Task:
        """Show the events, and return the finished task."""
        if not task.events_streaming:
            end = task.wait_finished().to_dict()
            envelope = {"type": "task_finished", "task_id": task.id, "data": end}
            self.show_event(TaskUpdateEvent.from_dict(envelope))
            return task
        with task.events() as events:
            for event in events:
                self.show_event(event)
        last = event.data  # it may lack fields, and what is loaded may be older
        if isinstance(last, Task) and last.is_finished:
            return Task.from_dict({**task.reload().to_dict(), **_drop_none(last.to_dict())})
        return task.wait_finished(10)


def _run_command(words: list[str], files: list[str], as_json: bool) -> None:
    command, screen = words[0], _Screen(as_json)
    if command == "demo":
        with LocalPlatform() as platform:
            task = Task.create(
                "demo-agent",
                "What can this file do?",
                configuration=platform.configuration,
                events_streaming=True,
            )
            screen.watch(task)
            screen.write("\nActivity log\n")
            screen.write(_format_log(task.get_activity_log()))
    elif command == "run":
        prompt = words[2]
        if prompt == "-":
            prompt = sys.stdin.read().rstrip("\n") if sys.stdin else ""
        screen.watch(Task.create(words[1], prompt, files, events_streaming=True))
    elif command == "list":
        for item in Task.list(words[1]):
            screen.show(item, _format_item)
    else:
        task = Task.load(words[1])
        if command == "watch":
            screen.watch(task)
        elif command == "log":
            screen.show(task.get_activity_log(), _format_log)
        else:
            screen.show(task.stop() if command == "stop" else task, _format_task)


def _show_version() -> None:
    import hashlib
    import importlib.machinery

    # the loader also reads from a zip file
    loader = getattr(__spec__, "loader", None)
    loader = loader or importlib.machinery.SourceFileLoader("xtask", __file__)
    print(f"xtask {__version__}\nsha256 {hashlib.sha256(loader.get_data(__file__)).hexdigest()}")


def _run_program(argv: list[str]) -> None:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:  # argparse's own prints the usage and exits
            raise ValueError(f"{message}; see xtask --help")

    parser = Parser("xtask", epilog=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", metavar="COMMAND", nargs="*", help="see below; options may stand anywhere")
    add("--file", metavar="URL", action="append", default=[], help="of run: a file; repeatable")
    add("--json", action="store_true", help="one JSON object, or one a line; secrets are shown")
    add("--version", action="store_true", help="the version, and the SHA-256 of this file")
    options = parser.parse_intermixed_args(argv)
    words, files = options.words, options.file
    if options.version:
        _show_version()
    elif not words or len(words) != 1 + _COMMANDS.get(words[0], -1) or files and words[0] != "run":
        parser.error(f"wrong usage: {' '.join(words) or 'no command'}")
    else:
        _run_command(words, files, options.json)


def main(argv: Optional[list[str]] = None) -> int:
    """The terminal program; returns the exit code. `argv` replaces the process's arguments."""
    code = 0
    try:
        with contextlib.suppress(SystemExit):  # of argparse, after the help
            _run_program(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        pass  # the reader of the output has left
    except Exception as exc:
        unset = isinstance(exc, ModuleException) and not exc.answered and exc.status_code < 500
        code = 2 if unset or isinstance(exc, ValueError) else 1
        with contextlib.suppress(AttributeError, OSError):  # standard error is closed
            sys.stderr.write(f"xtask: {_one_line(str(exc) or repr(exc))}\n")
    try:
        print(end="", flush=True)
    except (OSError, ValueError):  # else the interpreter flushes at its exit, and reports it
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
