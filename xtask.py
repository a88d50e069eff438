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

Copy this file into your project; MIT-0 asks for no notice. `__version__` says which one you hold;
to update, replace the file. What stands below the line with the words "cut here" (a local platform
for tests and the terminal program) may be cut off. Python 3.9 or newer, no other package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import random
import re
import select
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import (
    IO, Any, AsyncGenerator, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping,
    NamedTuple, NoReturn, Optional, Set, Tuple, Type, TypeVar, Union,
)

__version__ = "1.0.0"

__all__ = [
    "AgentActivityThread", "AgentActivityThreadAuth", "AgentActivityThreadMessage",
    "AgentActivityThreadMessageContent", "AgentActivityThreadOtherEntry",
    "AgentActivityThreadReasoning", "AgentActivityThreadReasoningType",
    "AgentActivityThreadSubAgentTrigger", "AgentActivityThreadToolCall", "AgentExecutionInput",
    "AgentExecutionStatus", "Configuration", "ModuleException", "OutputFormat",
    "ServerSentEvent", "Task", "TasksListItem", "TaskUpdateEvent", "TaskUpdateEventType",
    "ToolCallRequest", "ToolCallRequestReasoning", "ToolCallResult", "User", "iter_sse",
]

# ---------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------

_MAX_EVENT = 16 * 2**20  # bytes between two blank lines of a stream
_MAX_ANSWER = 64 * 2**20  # bytes of a JSON answer
_MAX_FILE = 10 * 2**20  # bytes of one input file
_MAX_FILES = 32 * 2**20  # bytes of all input files of one call
_FILE_THREADS = 8
_MAX_REDIRECTS = 5
_CONNECT_TIMEOUT = 10.0  # seconds
_MAX_RETRY_AFTER = 60.0  # seconds; a server that asks for more gets no second try
_KEEP_SECONDS = 20.0  # an idle connection is younger than the idle limit of any load balancer
_KEEP_CONNECTIONS = 32
_REPLAY_WINDOW = 10_000  # events remembered, to skip what is sent again after a reconnect
_RELAY_BYTES = 256 * 1024  # event data that may wait for an async consumer
_FINAL_SILENCE = 5.0  # seconds after which the stream of a finished task counts as over

# ---------------------------------------------------------------------------
# Errors and warnings
# ---------------------------------------------------------------------------


class ModuleException(Exception):
    """No answer from the platform, or one that says no.

    `status_code` is the HTTP status, 500 where there is none; `description` says what happened;
    `details` is the parsed body of the answer or None; `answered` is False where no server said
    it (no connection, a time-out, a setting that is missing). The cause is chained.
    """

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


class _Refused(OSError):
    """An address that a stranger's URL may not reach."""


def _warn(message: str, *arguments: Any) -> None:
    import logging  # 19 ms of import that most runs never need

    logging.getLogger(__name__).warning(message, *arguments)


_SECRET_NAMES = {"access_token", "user_tokens", "user_oidc_token", "api_key", "x-api-key"}
_URL_QUERY = re.compile(r"(https?://[^\s?#\"'<>]*)\?[^\s#\"'<>]*", re.IGNORECASE)


def _mask(value: Any) -> Any:
    """The value with secrets and the queries of URLs hidden, for everything a person may see."""
    if isinstance(value, dict):
        return {k: "***" if k in _SECRET_NAMES and v else _mask(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item) for item in value]
    if isinstance(value, str) and not isinstance(value, Enum):
        return _URL_QUERY.sub(r"\1?***", value)
    return value


# ---------------------------------------------------------------------------
# Enums
# ---------------------------------------------------------------------------


class _OpenEnum(str, Enum):
    """A `str` enum that takes values newer than itself: they become members outside the list."""

    # Without these two an f-string prints `Name.member` before Python 3.12, the value after.
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]

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
    """What the result of a task is written in."""

    Text = "text"
    Markdown = "markdown"
    Json = "json"
    Html = "html"
    Voice = "voice"


class TaskUpdateEventType(_OpenEnum):
    """The type of an event. To add one, add a line; typed data is chosen in `_event_data`."""

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


class AgentActivityThreadReasoningType(_OpenEnum):
    """The two kinds of reasoning in an activity log."""

    Think = "think"
    Analyze = "analyze"


# ---------------------------------------------------------------------------
# Records: JSON objects as dataclasses, without loss
# ---------------------------------------------------------------------------

_R = TypeVar("_R", bound="_Record")
_T = TypeVar("_T")
_Load = Callable[[Any], Any]
_Time = Union[datetime, str, None]

# RFC 3339, section 5.6, with the zone left out at times and up to nine digits of a fraction
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)?", re.ASCII
)


def _time(value: Any) -> Any:
    """An aware datetime (no zone means UTC); what does not parse stays as it came."""
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
    except ValueError:  # before Python 3.11 for any fraction but of 3 or 6 digits
        match = _RFC3339.fullmatch(value)
        if not match:
            return value
        day, clock, fraction, zone = match.groups()
        zone = "+00:00" if zone in (None, "Z", "z") else zone
        try:
            moment = datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0')[:6]:0<6}{zone}")
        except ValueError:
            return value
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _plain(value: Any) -> Any:
    """The value as JSON has it: fresh containers, records as dicts, enums and times as strings."""
    if isinstance(value, _Record):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Plan(NamedTuple):
    """How the records of a class are read and written."""

    loads: Dict[str, Optional[_Load]]  # what converts the JSON value of each field, if anything
    defaults: Dict[str, Any]
    factories: List[Tuple[str, Callable[[], Any]]]


_plans: Dict[type, _Plan] = {}


def _plan(cls: type) -> _Plan:
    plan = _plans.get(cls)
    if plan is None:
        plan = _plans[cls] = _Plan({}, {}, [])
        for f in dataclasses.fields(cls):
            if f.name in ("extra", "raw"):
                continue
            plan.loads[f.name] = f.metadata.get("load")
            plan.defaults[f.name] = None if f.default is dataclasses.MISSING else f.default
            if f.default_factory is not dataclasses.MISSING:
                plan.factories.append((f.name, f.default_factory))
    return plan


def _as(load: _Load, default: Any = None) -> Any:
    """A dataclass field whose JSON value is converted by `load` (None stays None)."""
    return field(default=default, metadata={"load": load})


def _as_record(cls: Type[_R], default: Any = None) -> Any:
    """A field that holds a record; anything but a JSON object stays as it came."""
    return _as(lambda value: cls.from_dict(value) if isinstance(value, dict) else value, default)


def _as_enum(cls: Type[Enum], default: Any = None) -> Any:
    """A field that holds an enum; anything but a string stays as it came."""
    return _as(lambda value: cls(value) if isinstance(value, str) else value, default)


class _Record:
    """What the dataclasses that come from the server share. `extra` holds what has no name here."""

    extra: Dict[str, Any]
    _wire: Mapping[str, Any] = {}  # the object as it came: which keys, and how times were spelled

    @classmethod
    def from_dict(cls: Type[_R], data: Mapping[str, Any]) -> _R:
        """The record of a JSON object. Nothing is refused and nothing is lost."""
        loads, defaults, factories = _plan(cls)
        self = cls.__new__(cls)
        state = self.__dict__
        state.update(defaults)
        for name, factory in factories:
            state[name] = factory()
        extra = state["extra"] = {}
        state["_wire"] = data
        for name, value in data.items():
            if name in loads:
                load = loads[name]
                state[name] = value if load is None or value is None else load(value)
            else:
                extra[name] = value
        return self

    def to_dict(self) -> Dict[str, Any]:
        """The JSON object: every key that came, and every field that is set."""
        loads, defaults, factories = _plan(type(self))
        unset = {**defaults, **{name: factory() for name, factory in factories}}
        wire = self._wire
        out: Dict[str, Any] = {}
        for name, load in loads.items():
            value = getattr(self, name)
            if name in wire and load and isinstance(value, datetime) and load(wire[name]) == value:
                out[name] = wire[name]  # the server's own spelling
            elif name in wire or value != unset[name]:
                out[name] = _plain(value)
        return {**out, **_plain(self.extra)}

    def __repr__(self) -> str:
        shown = [f"{name}={_mask(getattr(self, name))!r}" for name in _plan(type(self)).defaults]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(repr=False)
class User(_Record):
    """Who a task is run for. `email` is what the platform requires."""

    email: Optional[str] = None
    id: Optional[str] = None
    first_name: Optional[str] = None
    last_name: Optional[str] = None
    additional_attributes: Optional[Dict[str, Any]] = None
    timezone: Optional[str] = None
    display_name: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentExecutionInput(_Record):
    """What a task was asked: a text, URLs of files, and the user who asks."""

    text: Optional[str] = None
    files: Optional[List[str]] = None
    user: Optional[User] = _as_record(User)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class ToolCallRequestReasoning(_Record):
    """Why a tool is called."""

    title: Optional[str] = None
    description: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class ToolCallRequest(_Record):
    """A tool that the agent calls; also the data of `think` and `analyze` (`payload["input"]`)."""

    request_id: str
    operation_id: str
    tool_call_id: Optional[str] = None
    graph_node_id: Optional[str] = None
    tool_name: Optional[str] = None
    payload: Any = None
    reasoning: Optional[ToolCallRequestReasoning] = _as_record(ToolCallRequestReasoning)
    plan_task_id: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class ToolCallResult(ToolCallRequest):
    """What a tool answered."""

    result: Any = None
    is_error: Optional[bool] = None


# ---------------------------------------------------------------------------
# Activity log
# ---------------------------------------------------------------------------


@dataclass(repr=False)
class AgentActivityThreadMessageContent(_Record):
    """A message's text and the URLs of its files."""

    text: Optional[str] = None
    files: Optional[List[str]] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadMessage(_Record):
    """What the user (`role` "user") or the agent (`role` "agent") said."""

    id: str
    created_at: _Time = _as(_time)
    role: str = ""
    content: AgentActivityThreadMessageContent = _as_record(AgentActivityThreadMessageContent)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadToolCall(_Record):
    """A tool that was called, with its result."""

    id: str
    created_at: _Time = _as(_time)
    tool_name: str = ""
    payload: Any = None
    is_error: Optional[bool] = None
    reasoning: Optional[ToolCallRequestReasoning] = _as_record(ToolCallRequestReasoning)
    result: Any = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadReasoning(_Record):
    """A thought of the agent."""

    id: str
    created_at: _Time = _as(_time)
    type: AgentActivityThreadReasoningType = _as_enum(AgentActivityThreadReasoningType)
    title: Optional[str] = None
    confidence: Optional[float] = None
    thought: Optional[str] = None
    action: Optional[str] = None
    result: Optional[str] = None
    analysis: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadSubAgentTrigger(_Record):
    """Another agent that was asked."""

    id: str
    created_at: _Time = _as(_time)
    agent_id: Optional[str] = None
    query: str = ""
    files: Optional[List[str]] = None
    reasoning: Optional[ToolCallRequestReasoning] = _as_record(ToolCallRequestReasoning)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadAuth(_Record):
    """A login: `type` is not_supported, login_required, token_issue or token_ready."""

    id: str
    created_at: _Time = _as(_time)
    type: str = ""
    data: Any = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadOtherEntry(_Record):
    """An entry of a kind that is newer than this file: all of it but two keys is in `extra`."""

    id: str
    created_at: _Time = _as(_time)
    extra: Dict[str, Any] = field(default_factory=dict)


_Entry = Union[
    AgentActivityThreadMessage, AgentActivityThreadToolCall, AgentActivityThreadReasoning,
    AgentActivityThreadSubAgentTrigger, AgentActivityThreadAuth, AgentActivityThreadOtherEntry,
]
_AUTH_TYPES = ("not_supported", "login_required", "token_issue", "token_ready")
_REASONING_TEXTS = ("title", "thought", "action", "result", "analysis")


def _entry_class(entry: Mapping[str, Any]) -> Type[_Record]:
    """The kind of an entry: nothing but its keys tells it, the first match in this order."""
    kind = entry.get("type")
    if "role" in entry and "content" in entry:
        fits = entry["role"] in ("user", "agent") and isinstance(entry["content"], dict)
        return AgentActivityThreadMessage if fits else AgentActivityThreadOtherEntry
    if "tool_name" in entry:
        fits = isinstance(entry["tool_name"], str)
        return AgentActivityThreadToolCall if fits else AgentActivityThreadOtherEntry
    if kind == "think" or kind == "analyze":
        fits = all(isinstance(entry.get(name), (str, type(None))) for name in _REASONING_TEXTS)
        return AgentActivityThreadReasoning if fits else AgentActivityThreadOtherEntry
    if "query" in entry:
        fits = isinstance(entry["query"], str)
        return AgentActivityThreadSubAgentTrigger if fits else AgentActivityThreadOtherEntry
    if isinstance(kind, str) and kind in _AUTH_TYPES and "data" in entry:
        return AgentActivityThreadAuth
    return AgentActivityThreadOtherEntry


def _entries(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [_entry_class(e).from_dict(e) if isinstance(e, dict) else e for e in value]


@dataclass(repr=False)
class AgentActivityThread(_Record):
    """What a task did: its `messages`, oldest first. Route: GET /activity/{agent_id}/{task_id}."""

    id: str
    created_at: _Time = _as(_time)
    messages: List[_Entry] = field(default_factory=list, metadata={"load": _entries})
    user: Optional[User] = _as_record(User)
    extra: Dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------


def _environment(name: str) -> Optional[str]:
    return os.environ.get(name, "").strip() or None


def _default_base_url() -> str:
    staging = (_environment("IS_STG") or "").lower() == "true"
    return "https://inbound.stg.xpander.ai" if staging else "https://inbound.xpander.ai"


# Neither "@" (a user name), nor "%" and "\\", which parsers of URLs read in two ways
_HOST_AND_PORT = re.compile(r"[^\s@%\\]+")


def _clean_base_url(url: str) -> str:
    """The URL with a scheme and without what a root has no use for; ValueError if it is none."""
    parts = urllib.parse.urlsplit(url if "://" in url else "https://" + url)
    if parts.scheme not in ("http", "https") or not _HOST_AND_PORT.fullmatch(parts.netloc):
        raise ValueError("base_url must be an http or https URL with a host and no user name")
    parts.port  # raises ValueError for one that is no number
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


@dataclass(frozen=True, init=False)
class Configuration:
    """Where the platform is and who asks. Immutable; shared by any number of tasks and threads.

    Unset values come from XPANDER_API_KEY, XPANDER_ORGANIZATION_ID and XPANDER_BASE_URL, when the
    object is made. `timeout`: the longest single wait for the network, in seconds. `max_retries`:
    further tries of a request, in a row. `idle_timeout`: seconds of silence after which a stream
    is opened anew. `ssl_context`: instead of `ssl.create_default_context()`.
    `trusted_file_hosts`: hosts from which files are fetched although their address is not public.
    A pickle carries the key.
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
        api_key = (api_key or "").strip() or _environment("XPANDER_API_KEY")
        organization_id = (organization_id or "").strip() or _environment("XPANDER_ORGANIZATION_ID")
        base_url = (base_url or "").strip() or _environment("XPANDER_BASE_URL") or _default_base_url()
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII: look for stray characters around it")
        hosts = [trusted_file_hosts] if isinstance(trusted_file_hosts, str) else trusted_file_hosts
        self.__dict__.update(  # frozen: setting an attribute would raise
            api_key=api_key,
            organization_id=organization_id,
            base_url=_clean_base_url(base_url),
            timeout=timeout,
            max_retries=max_retries,
            idle_timeout=idle_timeout,
            ssl_context=ssl_context,
            trusted_file_hosts=tuple(host.lower() for host in hosts),
        )

    def close(self) -> None:
        """Close the idle connections. The configuration stays usable."""
        transport = self.__dict__.get("_transport")
        if transport:
            transport.close()

    def __enter__(self) -> Configuration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: Any) -> Configuration:
        return self  # immutable, and its connections are there to be shared

    def __getstate__(self) -> Dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_transport"}

    @property
    def _wires(self) -> _Transport:
        transport = self.__dict__.get("_transport")
        # setdefault is atomic: of two threads that come here at once, both get the same one
        return transport or self.__dict__.setdefault("_transport", _Transport(self))  # type: ignore[no-any-return]

    @property
    def _is_controller(self) -> bool:
        parts = urllib.parse.urlsplit(self.base_url)
        by_path = parts.path.split("/")[1:2] == ["agent-controller"]
        return "agent-controller" in (parts.hostname or "") or parts.port == 9016 or by_path

    def _organization(self, fallback: Optional[str] = None) -> str:
        organization = self.organization_id or fallback
        if not organization:
            raise ModuleException(
                400, "No organization: set XPANDER_ORGANIZATION_ID or organization_id", answered=False
            )
        return _quote(organization, "organization_id")

    def _api_url(self, *path: str) -> str:
        """A route under the API root; an agent controller has the organization in it."""
        root = [self.base_url, self._organization()] if self._is_controller else [self.base_url]
        return "/".join([*root, *path])

    def _events_url(self, task: Task) -> str:
        """The route of a task's events: another host for the cloud, another port for local work."""
        parts = urllib.parse.urlsplit(self.base_url)
        base = self.base_url
        if parts.hostname in ("inbound.xpander.ai", "inbound.stg.xpander.ai"):
            base = "https://" + parts.hostname.replace("inbound", "agent-controller", 1)
        elif parts.port == 8085 and parts.hostname in ("localhost", "127.0.0.1", "::1"):
            base = "http://localhost:9016"
        organization = self._organization(task.organization_id)
        return f"{base}/{organization}/agent-execution/{_quote(task.id, 'task id')}/events"


_shared: Dict[Tuple[Optional[str], ...], Configuration] = {}
_ENVIRONMENT = ("XPANDER_API_KEY", "XPANDER_ORGANIZATION_ID", "XPANDER_BASE_URL", "IS_STG")


def _default_configuration() -> Configuration:
    """The one configuration of this environment, so that calls in a loop share a connection."""
    key = tuple(map(os.environ.get, _ENVIRONMENT))
    found = _shared.get(key)
    if not found:
        if len(_shared) >= 16:
            _shared.clear()  # an environment that keeps changing must not fill the memory
        found = _shared.setdefault(key, Configuration())
    return found


def _quote(value: str, name: str) -> str:
    """A value as one segment of a path (RFC 3986, section 3.3)."""
    if not isinstance(value, str) or not value.strip() or value in (".", ".."):
        raise ValueError(f"{name} must be a string that is not empty")
    return urllib.parse.quote(value, safe="")


# ---------------------------------------------------------------------------
# Task
# ---------------------------------------------------------------------------

_REQUIRED = ("id", "agent_id", "organization_id", "input", "created_at")


async def _in_thread(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """All that the async twins do."""
    import asyncio  # 60 ms of import that sync programs never need

    return await asyncio.to_thread(function, *arguments, **options)


@dataclass(repr=False)
class TasksListItem(_Record):
    """A task as `Task.list` tells it; `load()` gives the whole one."""

    id: str
    agent_id: Optional[str] = None
    organization_id: Optional[str] = None
    status: Optional[AgentExecutionStatus] = _as_enum(AgentExecutionStatus)
    user_id: Optional[str] = None
    parent_task_id: Optional[str] = None
    triggering_agent_id: Optional[str] = None
    created_at: _Time = _as(_time)
    updated_at: _Time = _as(_time)
    source_node_type: Optional[str] = None
    result: Optional[str] = None
    title: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    def load(self) -> Task:
        """The whole task, with the configuration of the list."""
        return Task.load(self.id, self.__dict__.get("_configuration"))

    async def aload(self) -> Task:
        """`load`, async."""
        return await _in_thread(self.load)


@dataclass(repr=False)
class Task(_Record):
    """A task of the platform: the fields of its OpenAPI schema `AgentExecution`.

    Change fields, then `save()`. What has no field here is in `extra`, and is kept. To add a field,
    add a line to the list below. Errors of all calls: `ModuleException`, `ValueError`.
    """

    id: str
    agent_id: str
    organization_id: str
    input: AgentExecutionInput = _as_record(AgentExecutionInput)
    created_at: _Time = _as(_time)
    updated_at: _Time = _as(_time)
    started_at: _Time = _as(_time)
    paused_at: _Time = _as(_time)
    finished_at: _Time = _as(_time)
    status: Optional[AgentExecutionStatus] = _as_enum(AgentExecutionStatus)
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
    output_format: Optional[OutputFormat] = _as_enum(OutputFormat)
    think_mode: Optional[str] = None
    mcp_servers: Optional[List[Dict[str, Any]]] = field(default_factory=list)
    hitl_request: Optional[Dict[str, Any]] = None
    pending_eca_request: Optional[Dict[str, Any]] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    # -- as data

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], configuration: Optional[Configuration] = None
    ) -> Task:
        """The task of a JSON object, as the server last told it: `save()` compares with this."""
        told = json.dumps(data)
        return cls._from_told(json.loads(told), told, configuration)  # shares nothing with `data`

    @classmethod
    def _from_told(
        cls, data: Mapping[str, Any], told: Union[str, bytes], configuration: Optional[Configuration]
    ) -> Task:
        """The task of JSON that is ours alone, and its text: parsed again only if it is saved."""
        task = super().from_dict(data)
        task.__dict__.update(_told_text=told, _configuration=configuration)
        return task

    @classmethod
    def _from_answer(cls, answer: _Answer, configuration: Configuration) -> Task:
        if isinstance(answer.value, dict) and isinstance(answer.value.get("id"), str):
            return cls._from_told(answer.value, answer.body, configuration)
        raise answer.unexpected("a task")

    def __repr__(self) -> str:
        title = _mask(self.title)
        if isinstance(title, str) and len(title) > 60:
            title = title[:59] + "…"
        return f"Task(id={self.id!r}, status={self._status_text!r}, title={title!r})"

    @property
    def _status_text(self) -> Optional[str]:
        return str(self.status) if self.status is not None else None

    @property
    def configuration(self) -> Configuration:
        """What the calls of this task use: the one it was made with, else the environment's."""
        return self.__dict__.get("_configuration") or _default_configuration()

    @configuration.setter
    def configuration(self, configuration: Optional[Configuration]) -> None:
        self.__dict__["_configuration"] = configuration

    @property
    def is_finished(self) -> bool:
        """Whether the status is final; for one that is new, whether `finished_at` is set."""
        if self.status in list(AgentExecutionStatus):
            return AgentExecutionStatus(self.status).is_final
        return self.finished_at is not None

    # -- make and find

    @classmethod
    def load(cls, task_id: str, configuration: Optional[Configuration] = None) -> Task:
        """The task with this id. Route: GET /agent-execution/{task_id}/status.

        Called on a task (`task.load(...)`) it still loads another one, with its second argument or
        the default configuration; `task.reload()` is what brings a task up to date.
        """
        return cls._fetch(task_id, configuration or _default_configuration())

    @classmethod
    async def aload(cls, task_id: str, configuration: Optional[Configuration] = None) -> Task:
        """`load`, async."""
        return await _in_thread(cls.load, task_id, configuration)

    @classmethod
    def create(
        cls,
        agent_id: str,
        prompt: str = "",
        file_urls: Optional[List[str]] = None,
        *,
        configuration: Optional[Configuration] = None,
        **options: Any,
    ) -> Task:
        """A new task for an agent. Route: POST /agent-execution/{agent_id}, sent once.

        Options are the platform's create keys (`events_streaming`, `output_format`, `title`, ...),
        None ones are left out; `id=` continues a task, `user=` is a `User` or its dict,
        `agent_version=` picks a version. Without prompt, files and id: ValueError.
        """
        if not (prompt or file_urls or options.get("id")):
            raise ValueError("a task needs a prompt, file_urls or the id of a task to continue")
        configuration = configuration or _default_configuration()
        url = configuration._api_url("agent-execution", _quote(agent_id, "agent_id"))
        asked = {"text": prompt, "files": file_urls or None, "user": options.pop("user", None)}
        version = options.pop("agent_version", None)
        body = {"input": {k: v for k, v in asked.items() if v is not None}, **options}
        answer = configuration._wires.call(
            "POST",
            url,
            _plain({key: value for key, value in body.items() if value is not None}),
            headers={} if version is None else {"x-agent-version": str(version)},
        )
        return cls._from_answer(answer, configuration)

    @classmethod
    async def acreate(
        cls,
        agent_id: str,
        prompt: str = "",
        file_urls: Optional[List[str]] = None,
        *,
        configuration: Optional[Configuration] = None,
        **options: Any,
    ) -> Task:
        """`create`, async."""
        return await _in_thread(
            cls.create, agent_id, prompt, file_urls, configuration=configuration, **options
        )

    @classmethod
    def list(
        cls, agent_id: str, *, configuration: Optional[Configuration] = None, **filters: Any
    ) -> List[TasksListItem]:
        """An agent's tasks. Route: GET /agent-execution/executions/history/{agent_id}.

        Filters: `user_id`, `parent_task_id`, `triggering_agent_id`, `status`, `internal_status`.
        """
        configuration = configuration or _default_configuration()
        agent = _quote(agent_id, "agent_id")
        url = configuration._api_url("agent-execution", "executions", "history", agent)
        query = {key: _plain(value) for key, value in filters.items() if value is not None}
        answer = configuration._wires.call(
            "GET", url + ("?" + urllib.parse.urlencode(query) if query else "")
        )
        found = answer.value
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise answer.unexpected("a list of objects")
        items = [TasksListItem.from_dict(item) for item in found]
        for item in items:
            item.__dict__["_configuration"] = configuration
        return items

    @classmethod
    async def alist(
        cls, agent_id: str, *, configuration: Optional[Configuration] = None, **filters: Any
    ) -> List[TasksListItem]:
        """`list`, async."""
        return await _in_thread(cls.list, agent_id, configuration=configuration, **filters)

    # -- change

    def save(self) -> Task:
        """Send the fields that differ from what the server last told, and take its answer.

        Changes deep inside nested values count; None is sent as null. What you change while the
        save is under way stays changed. With nothing to send it reloads. A failed save keeps the
        changes for the next one. Route: PATCH /agent-execution/{task_id}/update.
        """
        return self._save(self._changes())

    async def asave(self) -> Task:
        """`save`, async."""
        return await _in_thread(self.save)

    def set_status(
        self, status: Union[AgentExecutionStatus, str], result: Optional[str] = None
    ) -> Task:
        """Send the status, the result if given, and all other unsaved changes."""
        if status not in list(AgentExecutionStatus):
            known = ", ".join(AgentExecutionStatus)
            raise ValueError(f"{str(status)!r} is not a status: use one of {known}")
        self.status = AgentExecutionStatus(status)
        changes: Dict[str, Any] = {"status": self.status.value}
        if result is not None:
            self.result = changes["result"] = result
        return self._save({**self._changes(), **changes})

    async def aset_status(
        self, status: Union[AgentExecutionStatus, str], result: Optional[str] = None
    ) -> Task:
        """`set_status`, async."""
        return await _in_thread(self.set_status, status, result)

    def stop(self) -> Task:
        """Stop the task and take its new status. Route: DELETE /agent-execution/{task_id}."""
        answer = self.configuration._wires.call("DELETE", self._url())
        # nothing (204), or "not there" to a second try after the first one was lost: ask
        return self.reload() if answer.value is None else self._take(answer)

    async def astop(self) -> Task:
        """`stop`, async."""
        return await _in_thread(self.stop)

    def reload(self) -> Task:
        """The server's state, into this object. Unsaved changes are dropped."""
        return self._replace(self._fetch(self.id, self.configuration))

    async def areload(self) -> Task:
        """`reload`, async."""
        return await _in_thread(self.reload)

    # -- follow

    def wait_finished(self, timeout: Optional[float] = None) -> Task:
        """Reload, with a growing pause of 0.5 to 5 s, until the status is final.

        `timeout` in seconds; then `TimeoutError`.
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

    def events(self) -> Generator[TaskUpdateEvent, None, None]:
        """The task's events, each when it arrives; the last one is its `task_finished`.

        Dropped and silent connections are replaced; each event comes once. Anything that ends the
        stream before the task is over is a `ModuleException`. ValueError at the call if the task
        has no `events_streaming`. To leave early, wrap it in `contextlib.closing`.
        Route: GET /{organization_id}/agent-execution/{task_id}/events under the events root.
        """
        self._check_streaming()
        return _events(self)

    def aevents(self) -> AsyncGenerator[TaskUpdateEvent, None]:
        """`events`, async; each stream is read by a daemon thread of its own."""
        self._check_streaming()
        return _aevents(self)

    def get_activity_log(self) -> AgentActivityThread:
        """What the task did. None yet: `ModuleException` 404. Route: GET /activity/{agent}/{task}."""
        configuration = self.configuration
        url = configuration._api_url(
            "activity", _quote(self.agent_id, "agent_id"), _quote(self.id, "task id")
        )
        answer = configuration._wires.call("GET", url)
        if answer.value is None:
            raise ModuleException(404, "No activity log yet")
        if not isinstance(answer.value, dict):
            raise answer.unexpected("an activity log")
        return AgentActivityThread.from_dict(answer.value)

    async def aget_activity_log(self) -> AgentActivityThread:
        """`get_activity_log`, async."""
        return await _in_thread(self.get_activity_log)

    # -- files

    def get_files(self) -> List[Any]:
        """The PDFs: `agno.media.File` with their bytes where agno is installed, else URLs."""
        urls = self._files(_PDF)
        try:
            from agno.media import File  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        files = zip(urls, _fetch_files(self.configuration, urls))
        made = [_agno_pdf(self.configuration, File, url, got) for url, got in files]
        return [file for file in made if file is not None]

    async def aget_files(self) -> List[Any]:
        """`get_files`, async."""
        return await _in_thread(self.get_files)

    def get_images(self) -> List[Any]:
        """The images: `agno.media.Image` with their URL where agno is installed, else URLs."""
        urls = self._files(_IMAGES)
        try:
            from agno.media import Image  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        # agno would fetch what we hand it, so the same rules hold
        return [Image(url=url) for url in urls if _may_fetch(self.configuration, url)]

    async def aget_images(self) -> List[Any]:
        """`get_images`, async."""
        return await _in_thread(self.get_images)

    def get_human_readable_files(self) -> List[Dict[str, str]]:
        """`{"url", "content"}` of each readable file, in order; 8 fetched at a time.

        At most 10 MiB each, 32 MiB and the configuration's `timeout` seconds for the call; one
        that fails has the content "Error: ...". With `disable_attachment_injection`: URLs alone.
        """
        urls = self._files(_READABLE)
        if self.disable_attachment_injection:
            return [{"url": url} for url in urls]
        contents = map(_text_of, _fetch_files(self.configuration, urls))
        return [{"url": url, "content": content} for url, content in zip(urls, contents)]

    async def aget_human_readable_files(self) -> List[Dict[str, str]]:
        """`get_human_readable_files`, async."""
        return await _in_thread(self.get_human_readable_files)

    def to_message(self) -> str:
        """The input as one text for a model: the text, the URLs, the readable files' contents."""
        text = getattr(self.input, "text", None)
        lines = [text] if text else []
        urls = self._files()
        if urls:
            lines.append("Files: " + ", ".join(urls))
        readable = self.get_human_readable_files()
        if readable:
            lines += ["Files contents:", *map(json.dumps, readable)]
        return "\n".join(lines)

    async def ato_message(self) -> str:
        """`to_message`, async."""
        return await _in_thread(self.to_message)

    # -- what the calls above share

    def _files(self, kind: Optional[Tuple[str, ...]] = None) -> List[str]:
        """The URLs of the input, or those whose path ends in an extension of that kind."""
        files = getattr(self.input, "files", None)
        urls = [url for url in files if isinstance(url, str)] if isinstance(files, list) else []
        return urls if kind is None else [url for url in urls if _extension(url) in kind]

    def _url(self, *path: str) -> str:
        return self.configuration._api_url("agent-execution", _quote(self.id, "task id"), *path)

    def _check_streaming(self) -> None:
        if not self.events_streaming:
            raise ValueError(
                "this task has no events: create it with events_streaming=True, or wait_finished()"
            )

    @classmethod
    def _fetch(
        cls, task_id: str, configuration: Configuration, line: Optional[_Line] = None
    ) -> Task:
        url = configuration._api_url("agent-execution", _quote(task_id, "task id"), "status")
        answer = configuration._wires.call("GET", url, line=line)
        return cls._from_answer(answer, configuration)

    def _changes(self) -> Dict[str, Any]:
        """The top-level fields that differ, as JSON, from what the server last told."""
        return _difference(self._told(), self.to_dict())

    def _told(self) -> Dict[str, Any]:
        """What the server last told: parsed only when it is asked for."""
        return json.loads(self.__dict__.get("_told_text", "{}"))  # type: ignore[no-any-return]

    def _save(self, changes: Dict[str, Any]) -> Task:
        if isinstance(self.internal_status, str) and len(self.internal_status) > 255:
            raise ValueError("internal_status has more than the 255 characters the platform takes")
        if not changes:
            return self.reload()
        before = self.to_dict()
        answer = self.configuration._wires.call("PATCH", self._url("update"), changes)
        if answer.value is None:  # saved, but nothing told
            return self._replace(self._fetch(self.id, self.configuration), before)
        return self._take(answer, before)

    def _take(self, answer: _Answer, before: Optional[Dict[str, Any]] = None) -> Task:
        return self._replace(self._from_answer(answer, self.configuration), before)

    def _replace(self, newer: Task, before: Optional[Dict[str, Any]] = None) -> Task:
        """Become the newer one, but for the fields that were changed since `before`."""
        old = {**self.__dict__, **self.extra}
        meanwhile = _difference(before, self.to_dict()) if before else {}
        configuration = self.__dict__.get("_configuration")
        self.__dict__.update(newer.__dict__, _configuration=configuration)
        for name in meanwhile:
            home = self.__dict__ if name in _plan(Task).defaults else self.extra
            home[name] = old[name]
        return self

    def _pauses(self, timeout: Optional[float]) -> Iterator[float]:
        """The pauses between two looks at the status, until it is final."""
        ends = float("inf") if timeout is None else time.monotonic() + timeout
        pause = 0.0
        while not self.is_finished:
            left = ends - time.monotonic()
            if pause and left <= 0:
                raise TimeoutError(f"task {self.id} is still {self._status_text} after {timeout} s")
            yield max(0.0, min(pause, left))
            pause = min(max(0.5, pause * 1.5), 5.0)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> Dict[str, Any]:
    """The items of `new` that differ from `old` as JSON: True is not 1, key order does not count."""

    def same(a: Any, b: Any) -> bool:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)

    return {k: v for k, v in new.items() if k not in old or not same(old[k], v)}


# ---------------------------------------------------------------------------
# Transport
# ---------------------------------------------------------------------------

_BROKEN = (ConnectionError, http.client.IncompleteRead, ssl.SSLEOFError, socket.gaierror)
_TIMEOUTS = (socket.timeout, TimeoutError)  # two classes before Python 3.10


def _wait(seconds: float, line: Optional[_Line] = None) -> None:
    """All waiting of the library's threads; ends early when the line is hung up."""
    (line.hung_up if line else threading.Event()).wait(seconds)


class _Line:
    """Holds the socket of a request, so that another thread can hang up."""

    def __init__(self) -> None:
        self.hung_up = threading.Event()
        self.connected = False
        self._socket: Optional[socket.socket] = None

    def hold(self, sock: socket.socket) -> None:
        self._socket = sock
        if self.hung_up.is_set():
            raise ConnectionAbortedError("the stream was left")

    def release(self) -> None:
        self._socket = None

    def hang_up(self) -> None:
        self.hung_up.set()
        if self._socket:
            try:
                # close() would not wake a blocked read. Past SSLSocket's own shutdown(), which
                # takes the TLS layer away under the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                pass  # not connected any more, or not yet: then hold() comes


class _Request(urllib.request.Request):
    """A request, and how it may be carried out."""

    guarded = False  # the URL is a stranger's: judge each address before connecting
    proxied = False
    tunnel_headers: Mapping[str, str] = {}  # what the proxy alone may see
    keep = False  # over a kept connection, which is kept again
    hops = 0

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], line: _Line, data: Optional[bytes] = None
    ) -> None:
        super().__init__(url, data, method=method)
        self.line = line
        self.place = urllib.parse.urlsplit(url).netloc  # `host` is the proxy's when there is one
        for name, value in headers.items():
            self.add_unredirected_header(name, value)  # add_header's would follow any redirect

    def set_proxy(self, host: str, type: str) -> None:
        super().set_proxy(host, type)
        self.proxied = True
        password = self.get_header("Proxy-authorization")
        if password and self.type == "https":
            self.remove_header("Proxy-authorization")
            self.tunnel_headers = {"Proxy-Authorization": password}


class _Response(http.client.HTTPResponse):
    connection: Optional[_Connection] = None  # that may be kept, once the body is read
    left = 0  # bytes that are still to come of the current chunk; -1 after the last one
    size_line = b""  # what came of the line that gives the next chunk's size

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        # 8 KiB, the default, would cut a burst of events into many reads
        self.fp = sock.makefile("rb", buffering=65536)  # type: ignore[assignment]

    def read_some(self) -> bytes:
        """What has arrived of the body, b"" at its end; IncompleteRead if it was cut off.

        `read1()` gives one HTTP chunk at a time, and servers send one event in each: taking them
        apart here (RFC 9112, section 7.1) halves the CPU of a burst.
        """
        if not self.chunked:
            return self.read1(65536)
        parts: List[bytes] = []
        while not parts and self.left >= 0:
            data = self.fp.read1(65536)
            if not data:
                raise http.client.IncompleteRead(b"")
            self._take_apart(self.size_line + data, parts)
        return b"".join(parts)

    def _take_apart(self, data: bytes, parts: List[bytes]) -> None:
        """Append what the data holds of chunks to parts, and remember where it stopped."""
        place, self.size_line = 0, b""
        while place < len(data):
            if self.left:
                part = data[place : place + self.left]
                parts.append(part)
                place += len(part)
                self.left -= len(part)
                continue
            end = data.find(b"\n", place)
            if end < 0:
                self.size_line = data[place:]
                break
            line, place = data[place:end].rstrip(b"\r"), end + 1
            if line:  # an empty one ends the chunk before it
                size = re.match(rb"[0-9A-Fa-f]{1,15}(?![^; \t])", line)
                if not size:
                    raise http.client.HTTPException("a chunk without a size")
                self.left = int(size[0], 16) or -1
                if self.left < 0:
                    return
        if len(self.size_line) > 4096:
            raise http.client.LineTooLong("chunk size")

    def abandon(self) -> None:
        """Close it and its connection, whatever is still unread."""
        self.close()
        if self.connection:
            self.connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection that judges addresses, and whose socket the request's line holds."""

    response_class = _Response

    def __init__(self, request: _Request, context: Optional[ssl.SSLContext], trusted: Iterable[str]) -> None:
        parts = urllib.parse.urlsplit("//" + request.host)
        host = parts.hostname or ""
        super().__init__(host, parts.port or (443 if context else 80), timeout=request.timeout)
        self.origin, self.context = request, context
        self.judged = request.guarded and not request.proxied and host not in trusted

    def connect(self) -> None:
        line = self.origin.line
        self.sock = _dial(self.host, self.port, self.judged, line)
        if self.context:
            if self.origin.proxied and self.origin.type == "https":
                _ask_for_tunnel(self.sock, self.origin.place, self.origin.tunnel_headers)
            host = urllib.parse.urlsplit(self.origin.full_url).hostname
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=host, do_handshake_on_connect=False
            )
            line.hold(self.sock)
            self.sock.do_handshake()
        self.sock.settimeout(self.timeout)
        line.connected = True


def _dial(host: str, port: int, judged: bool, line: _Line) -> socket.socket:
    """A socket connected to the first address of the host that answers."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if judged and not all(_is_public(str(address[0])) for *_, address in found):
        raise _Refused(f"the address of {host} is not public; see Configuration.trusted_file_hosts")
    ends = time.monotonic() + _CONNECT_TIMEOUT
    failure: OSError = OSError(f"{host} has no address")
    for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found):
        sock = socket.socket(family, kind, protocol)
        try:
            line.hold(sock)
            sock.settimeout(max(0.1, (ends - time.monotonic()) / left))
            sock.connect(address)
            line.hold(sock)  # a hang-up while connecting looks like success
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.settimeout(_CONNECT_TIMEOUT)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError) or line.hung_up.is_set():
                raise
            failure = error
    raise failure


def _ask_for_tunnel(sock: socket.socket, place: str, headers: Mapping[str, str]) -> None:
    """CONNECT through a proxy (RFC 9110, section 9.3.6)."""
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}", *map(": ".join, headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)  # one more would be the origin's
        if not byte or len(head) > 65536:
            raise ConnectionAbortedError("the proxy closed the connection")
        head += byte
    status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 1)[-1]
    if not status.startswith("200"):
        raise OSError(f"the proxy refused the tunnel: {status}")


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs, and keeps connections for the next request to the same place."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, context: Optional[ssl.SSLContext], trusted: Tuple[str, ...]) -> None:
        super().__init__()
        self._context, self._trusted = context, trusted
        # (place, connection, when it was given back, by which process). No lock: a list's append
        # and pop are atomic, and a lock that another thread holds at a fork stays locked for ever.
        self.idle: List[Tuple[Tuple[str, str, str], _Connection, float, int]] = []

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        assert isinstance(request, _Request)
        return self._exchange(request, None)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        assert isinstance(request, _Request)
        if self._context is None:
            self._context = ssl.create_default_context()  # 20 ms: once, and only for https
        return self._exchange(request, self._context)

    def _exchange(self, request: _Request, context: Optional[ssl.SSLContext]) -> _Response:
        if request.guarded and request.proxied:
            _judge_literal(request, self._trusted)
        kept = self._take(_place_of(request)) if request.keep else None
        if kept:
            try:
                return self._send(kept, request)
            except _BROKEN:  # closed by the server while it lay idle: no answer was lost
                pass
        return self._send(_Connection(request, context, self._trusted), request)

    def _send(self, connection: _Connection, request: _Request) -> _Response:
        headers = dict(request.header_items())
        if not request.keep:
            headers["Connection"] = "close"
        try:
            if connection.sock:
                request.line.hold(connection.sock)
            connection.request(request.get_method(), request.selector, request.data, headers)
            response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        assert isinstance(response, _Response)
        response.msg = response.reason  # type: ignore[assignment]  # as urllib's own handlers do
        if request.keep:
            response.connection = connection
        elif connection.sock:
            connection.sock.close()  # the response holds it open until it is closed itself
            connection.sock = None
        return response

    def _take(self, place: Tuple[str, str, str]) -> Optional[_Connection]:
        """A kept connection to that place; what cannot be used any more is closed."""
        for _ in range(len(self.idle)):
            try:
                entry = self.idle.pop()
            except IndexError:  # another thread was faster
                break
            of, connection, since, process = entry
            # wall clock: the monotonic one stands still while a host is frozen
            fresh = 0 <= time.time() - since < _KEEP_SECONDS and process == os.getpid()
            if not fresh or _is_readable(connection.sock):
                connection.close()
            elif of == place:
                return connection
            else:
                self.idle.insert(0, entry)
        return None

    def give_back(self, request: _Request, response: _Response) -> None:
        """Keep the connection of an answer that was read to its end."""
        connection = response.connection
        if connection and connection.sock and response.isclosed() and len(self.idle) < _KEEP_CONNECTIONS:
            self.idle.append((_place_of(request), connection, time.time(), os.getpid()))
        elif connection:
            connection.close()


def _place_of(request: _Request) -> Tuple[str, str, str]:
    return request.type, request.host, request.place


def _is_readable(sock: Any) -> bool:
    """Whether an idle connection has something to say: its end, or what nobody asked for."""
    try:
        return bool(select.select([sock], [], [], 0)[0])
    except (OSError, ValueError):  # ValueError: closed, or a descriptor that select cannot take
        return True


def _close_all(idle: List[Tuple[Any, _Connection, float, int]]) -> None:
    while idle:
        idle.pop()[1].close()


class _Redirects(urllib.request.BaseHandler):
    """Follows GET to the same origin, or for files to any; leaves every other status alone."""

    def http_error_302(
        self, request: _Request, response: _Response, code: int, message: str, headers: Any
    ) -> Any:
        response.abandon()
        target = urllib.parse.urljoin(request.full_url, headers.get("Location", ""))
        if not request.guarded and (request.get_method() != "GET" or not _same_origin(request.full_url, target)):
            raise ModuleException(
                code, f"{request.place} redirects {request.get_method()} elsewhere: check XPANDER_BASE_URL"
            )
        if request.hops >= _MAX_REDIRECTS:
            raise ModuleException(code, f"redirected more than {_MAX_REDIRECTS} times")
        headers = {k: v for k, v in request.unredirected_hdrs.items() if k != "Host"}
        following = _Request("GET", _clean_url(target), headers, request.line)
        following.guarded, following.hops = request.guarded, request.hops + 1
        return self.parent.open(following, timeout=request.timeout)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def http_error_default(self, request: Any, response: Any, *_: Any) -> Any:
        return response


def _same_origin(one: str, other: str) -> bool:
    """RFC 6454, section 5: scheme, host and port."""
    first, second = urllib.parse.urlsplit(one), urllib.parse.urlsplit(other)
    ports = {"http": 80, "https": 443}
    return (first.scheme, first.hostname, first.port or ports.get(first.scheme)) == (
        second.scheme, second.hostname, second.port or ports.get(second.scheme)
    )


def _clean_url(url: str) -> str:
    """A URL that can be sent: http or https, no user name, everything else percent-encoded."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not _HOST_AND_PORT.fullmatch(parts.netloc):
        raise _Refused("only http and https URLs with a host and without a user name are fetched")
    place = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path = urllib.parse.quote(parts.path or "/", safe="/%!$&'()*+,;=:@~")
    query = urllib.parse.quote(parts.query, safe="/%!$&'()*+,;=:@~?")
    return urllib.parse.urlunsplit((parts.scheme, place, path, query, ""))


class _Answer(NamedTuple):
    """What the platform said: a JSON value (None for an empty body), its text, and who said it."""

    value: Any
    body: bytes
    place: str

    def unexpected(self, wanted: str) -> ModuleException:
        names = {dict: "an object without an id", list: "a list", str: "a string", type(None): "nothing"}
        got = names.get(type(self.value), "a number or a boolean")
        text = f"{self.place} answered with {got} where {wanted} was due"
        return ModuleException(500, text, self.value)


class _Transport:
    """What a configuration keeps open: one opener, and in its handler the idle connections."""

    def __init__(self, configuration: Configuration, proxies: Optional[Dict[str, str]] = None) -> None:
        self.timeout, self.max_retries = configuration.timeout, configuration.max_retries
        self._key = configuration.api_key
        self._handler = _Handler(configuration.ssl_context, configuration.trusted_file_hosts)
        self._opener = urllib.request.OpenerDirector()
        self._opener.addheaders = [("User-Agent", f"xtask/{__version__}")]
        for handler in (
            urllib.request.ProxyHandler(proxies),  # None: by urllib's rules
            self._handler,
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)
        weakref.finalize(self, _close_all, self._handler.idle)

    def close(self) -> None:
        _close_all(self._handler.idle)

    def open(self, request: _Request, timeout: float) -> _Response:
        """The one place that opens connections."""
        response = self._opener.open(request, timeout=timeout)
        assert isinstance(response, _Response)
        return response

    def request(
        self, method: str, url: str, headers: Mapping[str, str], line: _Line, data: Optional[bytes] = None
    ) -> _Request:
        """A request with the key: for the API and the events, never for files."""
        if not self._key:
            raise ModuleException(401, "No API key: set XPANDER_API_KEY or api_key", answered=False)
        return _Request(method, url, {"x-api-key": self._key, **headers}, line, data)

    def call(
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Optional[Mapping[str, str]] = None,
        line: Optional[_Line] = None,
    ) -> _Answer:
        """The answer to a JSON request, after further tries where those are safe."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        sent = {"Accept": "application/json", **(headers or {})}
        if data is not None:
            sent["Content-Type"] = "application/json"
        attempt = 0
        while True:
            request = self.request(method, url, sent, line or _Line(), data)
            request.keep = method != "POST"
            try:
                return self._once(request)
            except ModuleException as error:
                if method == "DELETE" and attempt and error.status_code == 404:
                    return _Answer(None, b"", request.place)  # the first try did it, and its answer was lost
                pause = _pause_after(error, attempt) if _may_repeat(method, error) else None
                if pause is None or attempt >= self.max_retries:
                    raise
            _wait(pause, line)
            attempt += 1

    def _once(self, request: _Request) -> _Answer:
        place = request.place
        try:
            response = self.open(request, self.timeout)
            try:
                body = _read_all(response)
            except BaseException:
                response.abandon()
                raise
            request.line.release()  # the next to use the connection is somebody else
            self._handler.give_back(request, response)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self.no_answer(place, error) from error
        return _Answer(self.judge(response, body, place), body, place)

    def judge(self, response: _Response, body: bytes, place: str) -> Any:
        """`_answer`, with the key taken out of what a server may have put it into."""
        try:
            return _answer(response.status, response.headers, body, place)
        except ModuleException as error:
            error.description = self._hide(error.description)
            error.args = (error.status_code, error.description, *error.args[2:])
            raise

    def no_answer(self, place: str, error: Exception) -> ModuleException:
        error.args = tuple(map(self._hide, error.args))
        return _no_answer(place, error)

    def _hide(self, text: Any) -> Any:
        """The text without the key, which a server may have put there."""
        hide = self._key and len(self._key) >= 8 and isinstance(text, str)
        return text.replace(self._key, "***") if hide else text


def _read_all(response: _Response) -> bytes:
    """A whole body; IncompleteRead if it was cut off, OSError if it is too large."""
    if response.length is not None and response.length <= _MAX_ANSWER:
        return response.read()
    parts: List[bytes] = []
    size = 0
    while size <= _MAX_ANSWER:
        part = response.read(65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    raise OSError(f"the answer is over {_MAX_ANSWER // 2**20} MiB")


def _answer(status: int, headers: Any, body: bytes, place: str) -> Any:
    """The JSON value of an answer (None for an empty one), or a ModuleException."""
    try:
        value = json.loads(body) if body.strip() else None
        broken: Optional[Exception] = None
    except (ValueError, RecursionError) as error:
        value, broken = None, error
    if 200 <= status < 300:
        if broken:
            what = "HTML" if _is_html(headers, body) else "something"
            raise ModuleException(500, f"{place} answered with {what} that is not JSON") from broken
        return value
    failure = ModuleException(status, _describe(status, headers, body, value), value)
    failure._retry_after = _retry_after(headers.get("Retry-After"))
    raise failure


def _is_html(headers: Any, body: bytes) -> bool:
    return "html" in headers.get("Content-Type", "").lower() or body.lstrip()[:1] == b"<"


def _describe(status: int, headers: Any, body: bytes, value: Any) -> str:
    """What an error says in the forms that the platform and proxies use, in one line."""
    if isinstance(value, dict):
        said = [value.get(name) for name in ("detail", "message", "error")]
        for text in said:
            if isinstance(text, str) and text.strip():
                return text.strip()
            if isinstance(text, list) and text and all(isinstance(item, dict) for item in text):
                return "; ".join(map(_describe_invalid, text))
    elif isinstance(value, str) and value.strip():
        return value.strip()
    elif value is None and body.strip() and not _is_html(headers, body):
        return " ".join(body[:2000].decode("utf-8", "replace").split())[:200]
    return http.client.responses.get(status, "Unknown status")


def _describe_invalid(item: Dict[str, Any]) -> str:
    """One entry of a 422: where, and what is wrong there."""
    where = item.get("loc")
    path = ".".join(map(str, where)) if isinstance(where, list) else str(where)
    return f"{path}: {item.get('msg', 'invalid')}"


def _retry_after(value: Optional[str]) -> Optional[float]:
    """RFC 9110, section 10.2.3: seconds, or a date."""
    if not value:
        return None
    if re.fullmatch("[0-9]+", value.strip()):
        return float(value.strip()[:300])  # more digits make an infinity in either case
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _may_repeat(method: str, error: ModuleException) -> bool:
    """Whether the same request may be sent again after this."""
    if error.answered:
        return error.status_code in ((429,) if method == "POST" else (429, 502, 503, 504))
    # what a POST did before its connection broke is not known
    return isinstance(error.__cause__, ConnectionRefusedError if method == "POST" else _BROKEN)


def _pause_after(error: ModuleException, attempt: int) -> Optional[float]:
    """Seconds to the next try, as the server asked or growing and jittered; None if it asks too much."""
    asked = error._retry_after
    if asked is None:
        return min(8.0, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
    return asked if asked <= _MAX_RETRY_AFTER else None


def _no_answer(place: str, error: Exception) -> ModuleException:
    """The failure of a request that no server answered, or not to the end."""
    reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = (
            f"its certificate is not trusted ({error.verify_message}): "
            "name the authority in SSL_CERT_FILE or in Configuration(ssl_context=...)"
        )
    elif isinstance(error, _TIMEOUTS):
        reason = "no answer in time; see Configuration(timeout=...)"
    elif isinstance(error, http.client.IncompleteRead):
        reason = "the answer was cut off"
    return ModuleException(
        500, f"No answer from {place}: {' '.join(reason.split())}", answered=False
    )


# ---------------------------------------------------------------------------
# Server-sent events
# ---------------------------------------------------------------------------


class ServerSentEvent(NamedTuple):
    """An event of a stream; `id` and `retry` (milliseconds) are the last seen so far."""

    event: str
    data: str
    id: str
    retry: Optional[int]


def iter_sse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """The events of a `text/event-stream` that comes in chunks cut anywhere.

    WHATWG HTML, section 9.2.6, "Interpreting an event stream". ValueError for an event of over
    16 MiB. Does no I/O.
    """
    feed = _Parser().feed
    for chunk in chunks:
        yield from feed(chunk)


class _Parser:
    """The state of a stream between two chunks."""

    def __init__(self, last_id: str = "", retry: Optional[int] = None) -> None:
        self.last_id, self.retry = last_id, retry
        self._pending: List[bytes] = []  # joined once an event is whole: linear at any chunk size
        self._size = 0
        self._ended_cr = False  # the last byte was a CR: an LF that follows belongs to it
        self._started = False

    def feed(self, chunk: bytes) -> Iterable[ServerSentEvent]:
        """The events that this chunk completes."""
        events: Iterable[ServerSentEvent] = ()
        if b"\n" in chunk or b"\r" in chunk or self._ended_cr:  # others complete nothing
            chunk = self._normal(chunk)
            blank = chunk[:1] == b"\n" and self._pending and self._pending[-1].endswith(b"\n")
            if blank or b"\n\n" in chunk:
                whole, _, chunk = b"".join([*self._pending, chunk]).rpartition(b"\n\n")
                self._pending, self._size = [], 0
                events = self._events(whole)
        if chunk:
            self._pending.append(chunk)
            self._size += len(chunk)
            if self._size > _MAX_EVENT:
                raise ValueError(f"an event of over {_MAX_EVENT // 2**20} MiB")
        return events

    def _normal(self, chunk: bytes) -> bytes:
        """The chunk with LF for each end of a line, a CRLF over two chunks counted once."""
        if self._ended_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
            self._ended_cr = False
        if chunk:
            self._ended_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in chunk else chunk

    def _events(self, whole: bytes) -> Iterator[ServerSentEvent]:
        if not self._started:
            self._started = True
            whole = whole[3:] if whole.startswith(b"\xef\xbb\xbf") else whole
        if len(whole) > _MAX_EVENT and max(map(len, whole.split(b"\n\n"))) > _MAX_EVENT:
            raise ValueError(f"an event of over {_MAX_EVENT // 2**20} MiB")
        for block in whole.decode("utf-8", "replace").split("\n\n"):
            if block.startswith("data: ") and "\n" not in block:  # nearly all: half the time
                yield ServerSentEvent("message", block[6:], self.last_id, self.retry)
                continue
            event = self._event(block)
            if event:
                yield event

    def _event(self, block: str) -> Optional[ServerSentEvent]:
        kind, data = "", []
        for line in block.split("\n"):  # not splitlines(), which splits at U+2028 too
            name, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value
            elif name == "id" and "\0" not in value:
                self.last_id = value
            elif name == "retry" and re.fullmatch("[0-9]{1,4000}", value):
                self.retry = int(value)
        if not data:
            return None
        return ServerSentEvent(kind or "message", "\n".join(data), self.last_id, self.retry)


# ---------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------


@dataclass(repr=False)
class TaskUpdateEvent(_Record):
    """One event. `data` is a `Task`, a `ToolCallRequest`, a `ToolCallResult`, or the JSON that came.

    `raw` is the envelope as it came; `task_id` may be that of a sub-agent's task.
    """

    type: TaskUpdateEventType
    task_id: Optional[str] = None
    organization_id: Optional[str] = None
    time: _Time = _as(_time)
    data: Any = None
    raw: Dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        required: Optional[Mapping[str, Any]] = None,
        configuration: Optional[Configuration] = None,
    ) -> TaskUpdateEvent:
        """The event of an envelope; `required` fills in what trimmed tasks leave out."""
        kind = data["type"]
        task_id = data.get("task_id") or (required or {}).get("id")
        body = data.get("data")
        if isinstance(body, dict):
            body = _event_data(kind, body, required, task_id, configuration)
        return cls(
            _EVENT_TYPES.get(kind) or TaskUpdateEventType(kind),
            task_id,
            data.get("organization_id"),
            _time(data.get("time")),
            body,
            data if isinstance(data, dict) else dict(data),
        )

    @property
    def _wire(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.raw

    @property
    def extra(self) -> Dict[str, Any]:  # type: ignore[override]
        """What the envelope holds beside the five."""
        known = _plan(type(self)).defaults
        return {key: value for key, value in self.raw.items() if key not in known}


_EVENT_TYPES = {kind.value: kind for kind in TaskUpdateEventType}
_EVENT_RECORDS: Dict[str, Type[_Record]] = {
    "task_created": Task,
    "task_updated": Task,
    "task_finished": Task,
    "tool_call_request": ToolCallRequest,
    "tool_call_result": ToolCallResult,
    "think": ToolCallRequest,
    "analyze": ToolCallRequest,
}


def _event_data(
    kind: str,
    data: Dict[str, Any],
    required: Optional[Mapping[str, Any]],
    task_id: Any,
    configuration: Optional[Configuration],
) -> Any:
    """The data of an event, typed where its type and its shape allow."""
    record = _EVENT_RECORDS.get(kind)
    if record is Task:
        data = {**(required or {}), "id": task_id, **data}
        return Task._from_told(data, json.dumps(data), configuration)
    if record and isinstance(data.get("request_id"), str) and isinstance(data.get("operation_id"), str):
        return record.from_dict(data)
    return data


_decode = json.JSONDecoder().decode  # json.loads asks each time what it is asked for


class _Stream:
    """One reader of a task's events: what it knows over all its connections."""

    def __init__(self, task: Task) -> None:
        self.configuration = task.configuration
        self.required = {name: _plain(getattr(task, name)) for name in _REQUIRED}
        self.task_id = task.id
        self.url = self.configuration._events_url(task)
        self.line = _Line()
        idle = self.configuration.idle_timeout
        self.idle_timeout = min(idle, _FINAL_SILENCE) if task.is_finished else idle
        self.last_id = ""
        self.retry: Optional[int] = None  # milliseconds
        self.seen: Deque[int] = deque(maxlen=_REPLAY_WINDOW)  # hashes of data
        self.replayed: Set[int] = set()  # those seen, while what comes may be a repetition
        self.shook_hands = self.finished = self.no_content = False
        self.failures = 0  # connections that failed, in a row
        self.weight = 0  # characters of data read so far

    def batches(self) -> Generator[List[TaskUpdateEvent], None, None]:
        """The events, as many at a time as came together, until the task is over."""
        while True:
            response = self._connect()
            if response:
                try:
                    yield from self._read(response)
                finally:
                    response.abandon()
            if self.finished:
                return
            # An end proves nothing, however clean it looks: the status does.
            task = Task._fetch(self.task_id, self.configuration, self.line)
            if task.is_finished:
                yield [self._finish(task)]
                return
            if self.no_content:
                status = task._status_text
                raise ModuleException(204, f"The server has no events, but the task is {status}")
            if response:
                retry = 500 if self.retry is None else self.retry
                _wait(min(max(retry, 100), 30_000) / 1000, self.line)
            self.replayed = set(self.seen)

    def _connect(self) -> Optional[_Response]:
        """An open stream; None where there is none and the status must decide."""
        while True:
            try:
                response = self._open()
                break
            except ModuleException as error:
                silent = isinstance(error.__cause__, _TIMEOUTS)
                if silent and self.line.connected:
                    return None
                again = silent or isinstance(error.__cause__, _BROKEN)
                if error.answered:
                    again = error.status_code == 429 or 500 <= error.status_code < 600
                pause = _pause_after(error, self.failures) if again else None
                self.failures += 1
                if pause is None or self.failures > self.configuration.max_retries:
                    raise
            _wait(pause, self.line)
        if response and response.headers.get_content_type() != "text/event-stream":
            response.abandon()
            kind = response.headers.get_content_type()
            raise ModuleException(500, f"The stream's answer is {kind}, not text/event-stream")
        return response

    def _open(self) -> Optional[_Response]:
        transport = self.configuration._wires
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if 0 < len(self.last_id.encode()) <= 1024 and not re.search("[\0-\x1f\x7f]", self.last_id):
            # UTF-8, as the standard has it, in the latin-1 that http.client wants
            headers["Last-Event-ID"] = self.last_id.encode().decode("latin-1")
        self.line.connected = False
        request = transport.request("GET", self.url, headers, self.line)
        try:
            response = transport.open(request, self.idle_timeout)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise transport.no_answer(request.place, error) from error
        try:
            return self._judge(response, request.place)
        except BaseException:
            response.abandon()
            raise

    def _judge(self, response: _Response, place: str) -> Optional[_Response]:
        """The response if it is 200, None for 204, else a ModuleException that says what it was."""
        if response.status == 200:
            return response
        self.no_content = response.status == 204
        try:
            body = response.read(65536)
        except (OSError, http.client.HTTPException):
            body = b""  # the status says enough
        self.configuration._wires.judge(response, body, place)
        if not self.no_content:
            raise ModuleException(response.status, f"{place} answered with no stream")
        response.abandon()
        return None

    def _read(self, response: _Response) -> Iterator[List[TaskUpdateEvent]]:
        """The events of one connection, until it ends in whatever way."""
        parser = _Parser(self.last_id, self.retry)
        while not self.finished:
            try:
                chunk = response.read_some()
            except (OSError, http.client.HTTPException):
                return  # cut off, or silent
            if not chunk:
                return
            try:
                batch = self._events(parser.feed(chunk))
            except ValueError as error:
                raise ModuleException(500, f"The stream sent {error}") from error
            self.last_id, self.retry = parser.last_id, parser.retry
            if batch:
                yield batch

    def _events(self, messages: Iterable[ServerSentEvent]) -> List[TaskUpdateEvent]:
        batch = []
        for _, data, _, _ in messages:
            mark = hash(data)
            self.failures = 0
            if mark in self.replayed:
                continue
            event = self._event(data)
            if event is None:
                continue
            kind = event.type
            if kind == "connected":  # each connection sends one
                if self.shook_hands:
                    continue
                self.shook_hands = True
            else:
                self.replayed = set()
                self.seen.append(mark)
            self.weight += len(data)
            batch.append(event)
            if kind == "task_finished" and event.task_id == self.task_id:
                self.finished = True
                break
        return batch

    def _event(self, data: str) -> Optional[TaskUpdateEvent]:
        try:
            envelope = _decode(data)
            if isinstance(envelope, dict) and isinstance(envelope.get("type"), str):
                return TaskUpdateEvent.from_dict(envelope, self.required, self.configuration)
        except (ValueError, RecursionError):
            pass
        _warn("skipped what is not an event: %d characters that are no envelope", len(data))
        return None

    def _finish(self, task: Task) -> TaskUpdateEvent:
        """The last event, made from the task when the stream did not bring it."""
        self.finished = True
        ended = task.finished_at or task.updated_at or datetime.now(timezone.utc)
        envelope = {
            "type": "task_finished", "task_id": task.id, "organization_id": task.organization_id,
            "time": _plain(ended), "data": task._told(),
        }
        event = TaskUpdateEvent.from_dict({**envelope, "data": None})
        event.data, event.raw = task, envelope
        return event


def _events(task: Task) -> Generator[TaskUpdateEvent, None, None]:
    for batch in _Stream(task).batches():
        yield from batch


class _Relay:
    """Hands batches from a stream's thread to an event loop, and holds the thread when it is full.

    Without a lock, which would cost more than the rest: each side first writes what the other
    reads, then reads what the other writes, so that one of them sees what both did at once.
    """

    def __init__(self, stream: _Stream, loop: Any) -> None:
        self.stream, self.loop = stream, loop
        self.batches: Deque[Tuple[int, List[TaskUpdateEvent]]] = deque()
        self.taken = 0  # the stream's weight at the last batch that was taken
        self.room = threading.Event()
        self.waiting: Any = None  # the future of a consumer that has nothing to do
        self.error: Optional[BaseException] = None
        self.ended = False

    def run(self) -> None:
        """The thread: reads the stream until it ends or is left."""
        stream, left = self.stream, self.stream.line.hung_up
        try:
            with contextlib.closing(stream.batches()) as batches:
                for batch in batches:
                    self.batches.append((stream.weight, batch))
                    self.wake()
                    while stream.weight - self.taken > _RELAY_BYTES and not left.is_set():
                        self.room.clear()
                        if stream.weight - self.taken > _RELAY_BYTES and not left.is_set():
                            self.room.wait()
                    if left.is_set():
                        break
        except BaseException as error:  # raised again where the consumer is
            self.error = error
        self.ended = True
        self.wake()

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting:
            try:
                self.loop.call_soon_threadsafe(_resolve, waiting)
            except RuntimeError:  # the loop was closed under the stream
                self.stream.line.hang_up()

    async def take(self) -> List[TaskUpdateEvent]:
        """The next batch; an empty one at the end."""
        while not self.batches:
            self.waiting = waiting = self.loop.create_future()
            if self.ended and not self.batches:
                return []
            if not self.batches:  # looked at again, now that the thread can see who waits
                await waiting
        self.taken, batch = self.batches.popleft()
        if self.stream.weight - self.taken < _RELAY_BYTES // 2 and not self.room.is_set():
            self.room.set()
        return batch

    async def leave(self) -> None:
        """Hang up, and see the thread off; one inside a name look-up ends with it."""
        import asyncio

        for _ in range(10):
            self.stream.line.hang_up()  # again: it may have been about to connect
            self.room.set()
            self.waiting = waiting = self.loop.create_future()
            if self.ended:
                break
            await asyncio.wait([waiting], timeout=0.015)


def _resolve(future: Any) -> None:
    if not future.done():
        future.set_result(None)


async def _aevents(task: Task) -> AsyncGenerator[TaskUpdateEvent, None]:
    import asyncio

    relay = _Relay(_Stream(task), asyncio.get_running_loop())
    threading.Thread(target=relay.run, name=f"events of {task.id}", daemon=True).start()
    try:
        while True:
            batch = await relay.take()
            for event in batch:
                yield event
            if not batch:
                break
        if relay.error:
            raise relay.error
    finally:
        await relay.leave()


# ---------------------------------------------------------------------------
# Files: URLs that come from strangers
# ---------------------------------------------------------------------------

_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp", ".svg")
_PDF = (".pdf",)
_READABLE = (
    ".txt", ".csv", ".json", ".xml", ".html", ".htm", ".md", ".rst", ".yaml", ".yml", ".py", ".js",
    ".ts", ".java", ".c", ".cpp", ".h", ".cs", ".go", ".rb", ".php", ".sh",
)
# the text encodings among Python's codecs, which has others: zip, rot13, unicode_escape
_CHARSET = re.compile(
    r"utf.*|u8|(us-)?ascii|(iso[-_]?)?8859.*|iso-ir.*|latin[-_]?\d|windows.*|cp\d+|koi8.*"
    r"|gb.*|hz.*|big5.*|shift.*|s?jis.*|euc.*|iso[-_]?2022.*|ks_c.*|tis.?620",
    re.IGNORECASE,
)


class _Fetched(NamedTuple):
    content: bytes
    charset: Optional[str]


def _extension(url: str) -> str:
    """The extension of the URL's path, lower-cased; "" where there is none."""
    start, scheme, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    return os.path.splitext(rest.partition("/")[2] if scheme else start)[1].lower()


def _is_public(address: str) -> bool:
    """Whether an address is global, and neither multicast nor reserved.

    For IPv6 addresses that stand for an IPv4 one (RFC 4291 2.5.5.2, RFC 6052 2.1, RFC 3056 2)
    that one counts.
    """
    import ipaddress

    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        packed = ip.packed
        if packed[:12] in (b"\0" * 10 + b"\xff\xff", b"\0\x64\xff\x9b" + b"\0" * 8):
            ip = ipaddress.IPv4Address(packed[12:])
        elif packed[:2] == b"\x20\x02":
            ip = ipaddress.IPv4Address(packed[2:6])
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _judge_literal(request: _Request, trusted: Iterable[str]) -> None:
    """Behind a proxy names are not ours to resolve; an address that is written out can be judged."""
    host = urllib.parse.urlsplit(request.full_url).hostname or ""
    if host in trusted:
        return
    local = host == "localhost" or host.endswith(".localhost")
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        found = []  # a name
    if local or not all(_is_public(str(address[0])) for *_, address in found):
        raise _Refused(f"the address of {host} is not public; see Configuration.trusted_file_hosts")


def _may_fetch(configuration: Configuration, url: str) -> bool:
    """Whether our rules let somebody else fetch the URL; a warning says why not."""
    try:
        request = _Request("GET", _clean_url(url), {}, _Line())
        host = urllib.parse.urlsplit(request.full_url).hostname or ""
        for *_, address in socket.getaddrinfo(host, None):
            if host not in configuration.trusted_file_hosts and not _is_public(str(address[0])):
                raise _Refused(f"the address of {host} is not public; see Configuration.trusted_file_hosts")
    except _Refused as error:
        return not _is_refused(error)
    except ValueError:
        return False  # no URL
    except OSError:
        pass  # no address to refuse
    return True


def _is_refused(got: Union[_Fetched, Exception]) -> bool:
    if isinstance(got, _Refused):
        _warn("a file was left out: %s", got)
    return isinstance(got, _Refused)


def _fetch_files(
    configuration: Configuration, urls: List[str]
) -> List[Union[_Fetched, Exception]]:
    """The content of each URL, or why there is none, in order and in time."""
    work = _FileWork(configuration, urls)
    threads = [
        threading.Thread(target=work.run, args=(line,), daemon=True) for line in work.lines
    ]
    ends = time.monotonic() + configuration.timeout
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
    finally:
        work.queue.clear()
        for line in work.lines:
            line.hang_up()
    for thread in threads:
        thread.join(0.1)  # one inside a name look-up ends with it
    late = TimeoutError("not fetched in time")
    return [work.results.get(number, late) for number in range(len(urls))]


class _FileWork:
    """What the threads of one call share."""

    def __init__(self, configuration: Configuration, urls: List[str]) -> None:
        self.transport, self.timeout = configuration._wires, configuration.timeout
        self.queue = deque(enumerate(urls))
        self.lines = [_Line() for _ in range(min(len(urls), _FILE_THREADS))]
        self.results: Dict[int, Union[_Fetched, Exception]] = {}
        self.budget = _MAX_FILES
        self.lock = threading.Lock()

    def run(self, line: _Line) -> None:
        while True:
            try:
                number, url = self.queue.popleft()
            except IndexError:
                return
            try:
                self.results[number] = self.fetch(url, line)
            except (OSError, ValueError, http.client.HTTPException, ModuleException) as error:
                self.results[number] = error

    def fetch(self, url: str, line: _Line) -> _Fetched:
        request = _Request("GET", _clean_url(url), {"Accept": "*/*"}, line)
        request.guarded = True
        response = self.transport.open(request, self.timeout)
        try:
            if response.status != 200:
                raise ModuleException(response.status, "the server has no such file")
            return _Fetched(self.read(response, line), response.headers.get_content_charset())
        finally:
            response.abandon()

    def read(self, response: _Response, line: _Line) -> bytes:
        parts: List[bytes] = []
        try:
            for part in iter(response.read_some, b""):
                parts.append(part)
                with self.lock:
                    self.budget -= len(part)
                if sum(map(len, parts)) > _MAX_FILE or self.budget < 0:
                    raise ModuleException(413, "the file is too large")
            # read1() takes a body that was cut off, by us too, for a whole one
            if response.length or line.hung_up.is_set():
                raise http.client.IncompleteRead(b"")
            return b"".join(parts)
        except BaseException:
            with self.lock:
                self.budget += sum(map(len, parts))
            raise


def _text_of(got: Union[_Fetched, Exception]) -> str:
    """A file's text, or an error that tells whoever typed the URL nothing about this network."""
    if isinstance(got, _Fetched):
        name = got.charset or ""
        if _CHARSET.fullmatch(name):
            try:
                return got.content.decode(name, "replace")
            except (LookupError, ValueError):  # ValueError: a NUL in the name
                pass
        return got.content.decode("utf-8", "replace")
    _is_refused(got)
    if isinstance(got, ModuleException):
        return f"Error: {got.description}"
    return "Error: the file could not be fetched"


def _agno_pdf(
    configuration: Configuration, file_class: Any, url: str, got: Union[_Fetched, Exception]
) -> Any:
    """agno's File: with the bytes, or with the URL where there are none and agno may fetch it."""
    if not isinstance(got, _Fetched) or not got.content:
        allowed = not _is_refused(got) and _may_fetch(configuration, url)
        return file_class(url=url) if allowed else None
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w. ()+,-]", "_", name)[-255:]
    return file_class(content=got.content, filename=name, mime_type="application/pdf")


# ===========================================================================
# cut here: all above is the library, all below the local platform and the terminal program
# ===========================================================================


__all__ += ["LocalPlatform", "main"]

# ---------------------------------------------------------------------------
# Local platform
# ---------------------------------------------------------------------------

_LocalAgent = Callable[[Dict[str, Any]], Generator[Tuple[str, Any], None, Any]]


def _local_time() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _local_agent(task: Dict[str, Any]) -> Generator[Tuple[str, Any], None, str]:
    """The built-in agent: thinks, calls a tool and answers in chunks, in about a second."""
    about = str(task["input"]["text"])[:60]
    thought = {"title": "Plan", "confidence": 0.9, "thought": "One search will do.", "action": "Search"}
    yield "think", {"request_id": "r1", "operation_id": "think", "payload": {"input": thought}}
    time.sleep(0.08)
    call = {"request_id": "r2", "operation_id": "find", "tool_name": "search", "payload": {"query": about}}
    yield "tool_call_request", call
    time.sleep(0.08)
    yield "tool_call_result", {**call, "result": {"hits": 3}, "is_error": False}
    answer = f"A played answer to: {about}\nIt found three hits, and nothing left this machine."
    for start in range(0, len(answer), 12):
        time.sleep(0.08)
        yield "chunk", answer[start : start + 12]
    return answer


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _within(value: Any, *names: str) -> Dict[str, Any]:
    """The object at this path of names; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _local_entry(kind: str, data: Any) -> Optional[Dict[str, Any]]:
    """The entry that an agent's event leaves in the activity log, if any."""
    if kind in ("think", "analyze"):
        names = ("title", "confidence", "thought", "action", "result", "analysis")
        return {"type": kind, **dict.fromkeys(names), **_within(data, "payload", "input")}
    if kind == "tool_call_result":
        kept = ("tool_name", "payload", "is_error", "reasoning", "result")
        return {name: _within(data).get(name) for name in kept}
    return _within(data) if kind in ("sub_agent_trigger", "auth_event") else None


class _LocalRun:
    """One run of a task: its events as they go over the wire, its log, and its agent's play."""

    def __init__(self, task: Dict[str, Any], lock: Any, log: List[Dict[str, Any]]) -> None:
        self.task, self.log, self.over = task, log, False
        self.events: List[bytes] = []
        self.changed = threading.Condition(lock)  # one a run, so that an event wakes its own readers only
        self.emit("connected", {})
        self.emit("task_created", task)

    def emit(self, kind: str, data: Any) -> bool:
        """Add an event and its entry in the log; or nothing, and return False, when the run is over."""
        with self.changed:
            if not self.over:
                ids = {"task_id": self.task["id"], "organization_id": "local-org"}
                text = json.dumps({"type": kind, **ids, "time": _local_time(), "data": data})
                self.events.append(f"id: {len(self.events) + 1}\ndata: {text}\n\n".encode())
                self.note(_local_entry(kind, data))
                self.changed.notify_all()
            return not self.over

    def note(self, entry: Optional[Dict[str, Any]]) -> None:
        if entry:
            self.log.append({"id": f"a{len(self.log) + 1}", "created_at": _local_time(), **entry})

    def end(self, **changes: Any) -> None:
        """End the run, if it is not over, with changes of the task (its status is one) and the last event."""
        with self.changed:
            if not self.over:
                self.task.update(changes, finished_at=_local_time(), updated_at=_local_time())
                if self.task["status"] == "completed":
                    self.note({"role": "agent", "content": {"text": self.task["result"], "files": None}})
                self.emit("task_finished", self.task)
                self.over = True

    def play(self, agent: _LocalAgent) -> None:
        """Run the agent to its end, or to its first event after the end of the run."""
        with self.changed:
            if self.over:
                return
            self.task.update(status="executing", started_at=_local_time(), updated_at=_local_time())
            self.note({"role": "user", "content": {key: self.task["input"][key] for key in ("text", "files")}})
            self.emit("task_updated", self.task)
        try:
            events = agent(self.task)
            while self.emit(*next(events)):
                pass
            events.close()
        except StopIteration as end:
            self.end(status="completed", result=None if end.value is None else _text(end.value))
        except Exception as error:
            self.end(status="failed", result=str(error) or repr(error))

    def stream(self, seen: int) -> Iterator[bytes]:
        """What follows the first `seen` events, as it comes, and an empty piece once the run is over."""
        fresh = [b"retry: 100\n\n"]
        while fresh:
            yield b"".join(fresh)
            with self.changed:
                while not self.over and len(self.events) <= seen:
                    self.changed.wait()
                fresh = self.events[seen:]
            seen += len(fresh)
        yield b""


class LocalPlatform:
    """The platform on a free port of 127.0.0.1, in this process: for trying things out and for tests.

    It serves while its `with` block lasts. `configuration` and `environ` lead to it, `tasks` maps ids to
    tasks as JSON, `requests` holds what arrived: (method, path with query, headers with names in lower
    case, parsed body or None). `agent(task)` is a generator that yields (event type, data) and returns
    the result, text or JSON; if it raises, the task has failed, with the error as its result.
    """

    def __init__(self, agent: Optional[_LocalAgent] = None) -> None:
        self.tasks: Dict[str, Dict[str, Any]] = {}
        self.requests: List[Tuple[str, str, Dict[str, str], Any]] = []
        self._agent = agent or _local_agent
        self._lock = threading.RLock()
        self._runs: Dict[str, _LocalRun] = {}
        self._threads: Dict[threading.Thread, Optional[socket.socket]] = {}

    def __enter__(self) -> LocalPlatform:
        self._server, self._open = _local_server(self), True
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]
        self.configuration = Configuration("local-key", "local-org", self.url)
        # A proxy in the environment must not come between; __dict__, because it is frozen.
        self.configuration.__dict__["_transport"] = _Transport(self.configuration, proxies={})
        self.environ = {"XPANDER_API_KEY": "local-key", "XPANDER_ORGANIZATION_ID": "local-org"}
        self.environ.update(XPANDER_BASE_URL=self.url, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        socket.create_connection(self._server.server_address).close()  # wakes the accepting thread
        self._accepting.join()
        self._server.server_close()
        with self._lock:
            threads, runs = dict(self._threads), list(self._runs.values())
        for connection in threads.values():
            try:
                if connection:
                    connection.shutdown(socket.SHUT_RDWR)  # close() would not wake its reader
            except OSError:
                pass  # closed already
        for run in runs:
            run.end(status="stopped")
        for thread in threads:
            thread.join(0.5)  # not for ever: an agent may be stuck
        self.configuration.close()

    def _accept(self) -> None:
        while self._open:
            self._server.handle_request()

    def _start(self, connection: Optional[socket.socket], target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        with self._lock:
            self._threads = {old: its for old, its in self._threads.items() if old.is_alive()}
            thread.start()
            self._threads[thread] = connection

    def _receive(self, method: str, path: str, headers: Dict[str, str], raw: bytes) -> Tuple[int, Any]:
        """The status and the answer to a request: JSON as bytes, or a stream as an iterator of bytes."""
        body, status = json.loads(raw or b"null"), 200
        with self._lock:
            self.requests.append((method, path, headers, body))
            try:
                answer = self._route(method, path, headers, body or {})
            except ModuleException as error:
                answer, status = error.details or {"detail": error.description}, error.status_code
            return status, answer if isinstance(answer, Iterator) else json.dumps(answer).encode()

    def _route(self, method: str, path: str, headers: Dict[str, str], body: Any) -> Any:
        if headers.get("x-api-key") != "local-key":
            raise ModuleException(401, "Invalid API key")
        place, _, query = path.partition("?")
        routes: Tuple[Tuple[str, Callable[..., Any], Any], ...] = (
            ("POST /agent-execution/([^/]+)", self._create, body),
            ("GET /agent-execution/executions/history/([^/]+)", self._list, urllib.parse.parse_qs(query)),
            ("GET /activity/[^/]+/([^/]+)", self._activity, None),
            ("GET /[^/]+/agent-execution/([^/]+)/events", self._events, headers.get("last-event-id", "")),
            ("GET /agent-execution/([^/]+)/status", self._change, {}),
            ("PATCH /agent-execution/([^/]+)/update", self._change, body),
            ("DELETE /agent-execution/([^/]+)", self._stop, None),
        )
        for pattern, answer, given in routes:
            found = re.fullmatch(pattern, f"{method} {place}")
            if found:
                return answer(urllib.parse.unquote(found[1]), given)
        raise ModuleException(404, "Not Found")

    def _create(self, agent_id: str, given: Dict[str, Any]) -> Dict[str, Any]:
        import uuid

        asked = {"text": None, "files": None, "user": None, **(given.get("input") or {})}
        if not (asked["text"] or asked["files"] or given.get("id")):
            fault = {"loc": ["body", "input"], "msg": "text, files or an id is needed", "type": "missing"}
            raise ModuleException(422, "Invalid", {"detail": [fault]})
        task = dataclasses.asdict(Task("", agent_id, "local-org", AgentExecutionInput()))
        task.update(task.pop("extra"), id=str(uuid.uuid4()), created_at=_local_time(), updated_at=_local_time())
        task.update(status="pending", source="api", output_format="text", think_mode="default")
        task.update({**given, "input": asked})
        task["parent_execution"] = task.pop("parent_execution_id", None)
        log = self._runs[task["id"]].log if task["id"] in self._runs else []  # an id continues a task
        self._runs[task["id"]] = run = _LocalRun(task, self._lock, log)
        self.tasks[task["id"]] = task
        self._start(None, run.play, self._agent)
        return task

    def _change(self, task_id: str, changes: Dict[str, Any]) -> Dict[str, Any]:
        if task_id not in self.tasks:
            raise ModuleException(404, "Task not found")
        task, run = self.tasks[task_id], self._runs.get(task_id)
        if run and not run.over and AgentExecutionStatus(str(changes.get("status"))).is_final:
            run.end(**changes)
        elif changes:
            task.update(changes, updated_at=_local_time())
        return task

    def _stop(self, task_id: str, _: None) -> Dict[str, Any]:
        task = self._change(task_id, {})
        if not AgentExecutionStatus(task["status"]).is_final:
            stopped = {"status": "stopped", "is_manually_stopped": True, "finished_at": _local_time()}
            self._change(task_id, stopped)
        return task

    def _list(self, agent_id: str, filters: Dict[str, List[str]]) -> List[Dict[str, Any]]:
        names = [item.name for item in dataclasses.fields(TasksListItem) if item.name != "extra"]
        items = []
        for task in self.tasks.values():
            user = task["input"].get("user") or {}
            more = {"parent_task_id": task.get("parent_execution"), "source_node_type": task.get("source")}
            known = {**task, **more, "user_id": user.get("id")}
            if all(known.get(name) in some for name, some in {**filters, "agent_id": [agent_id]}.items()):
                items.append({name: known.get(name) for name in names})
        return items

    def _activity(self, task_id: str, _: None) -> Dict[str, Any]:
        task, run = self._change(task_id, {}), self._runs.get(task_id)
        if not run or not run.log:
            raise ModuleException(404, "No activity log yet")
        user = task["input"].get("user")
        return {"id": task_id, "created_at": task["created_at"], "messages": run.log, "user": user}

    def _events(self, task_id: str, last_id: str) -> Iterator[bytes]:
        self._change(task_id, {})
        seen = int(last_id) if re.fullmatch("[0-9]{1,9}", last_id) else 0
        return self._runs[task_id].stream(seen) if task_id in self._runs else iter([b""])


def _local_server(platform: LocalPlatform) -> Any:
    """A server on a free port of 127.0.0.1 that asks the platform, with a thread for each connection."""
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingTCPServer  # HTTPServer asks the name service for the host's name

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body leave in one packet
        disable_nagle_algorithm = True

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = platform._receive(self.command, self.path, headers, raw)
            whole = isinstance(answer, bytes)
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if whole else "text/event-stream")
            length = ("Content-Length", str(len(answer))) if whole else ("Transfer-Encoding", "chunked")
            self.send_header(*length)
            self.end_headers()
            for piece in [answer] if whole else answer:
                self.wfile.write(piece if whole else b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingTCPServer):
        request_queue_size = 512

        def process_request(self, request: Any, client_address: Any) -> None:
            platform._start(request, self.process_request_thread, request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # a client that left is no error
                super().handle_error(request, client_address)

    return Server(("127.0.0.1", 0), Handler)


# ---------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------

_HELP = """\
usage: xtask COMMAND ... [--json]          (or: python3 xtask.py COMMAND ...)

Follow the tasks of agents on the xpander.ai platform.

  xtask demo                          a whole run here: no account, no network
  xtask run AGENT_ID "Sum this up" --file https://example.com/sales.csv
                                      create a task and watch it
  xtask watch TASK_ID                 what a task does, live, then its result
  xtask show TASK_ID                  a task as it is now
  xtask log TASK_ID                   what it did: its activity log
  xtask stop TASK_ID                  stop it
  xtask list AGENT_ID                 the tasks of an agent

--json     for programs: one JSON object, or one a line for run, watch, demo and
           list, as the platform sent it, with the secrets that are in it
--version  the version, and the SHA-256 of this file

Settings: XPANDER_API_KEY, XPANDER_ORGANIZATION_ID, XPANDER_BASE_URL.
Exit codes: 0 done, 1 the task ended otherwise or a call failed, 2 wrong usage
or no key, 130 Ctrl-C."""
_WORDS = {"demo": 0, "run": 2, "watch": 1, "show": 1, "log": 1, "stop": 1, "list": 1}
# Events and entries of the log: a label, what the task does after it, where its facts are, and which.
_TOLD: Dict[str, Tuple[str, str, Tuple[str, ...], Tuple[str, ...]]] = {
    "task_created": ("created", "waiting to start", (), ("title",)),
    "task_updated": ("updated", "working", (), ("status", "internal_status", "title")),
    "task_finished": ("finished", "working", (), ("id", "status", "title")),
    "tool_call_request": ("call", "calling a tool", (), ("tool_name", "payload")),
    "tool_call_result": ("result", "working", (), ("tool_name", "result")),
    "think": ("think", "thinking", ("payload", "input"), ("title", "thought", "action")),
    "analyze": ("analyze", "thinking", ("payload", "input"), ("title", "analysis", "result")),
    "sub_agent_trigger": ("sub-agent", "waiting for a sub-agent", (), ("agent_id", "query")),
    "auth_event": ("login", "waiting for a login", ("data",), ("type", "server_name", "message")),
    "user": ("user", "", ("content",), ("text", "files")),
    "agent": ("agent", "", ("content",), ()),
}


def _width() -> int:
    import shutil

    return max(20, shutil.get_terminal_size().columns - 1)  # a full row makes some terminals wrap


def _cut(text: str) -> str:
    """As much of a line as fits into the terminal, whose cells are not characters."""
    import unicodedata

    left = _width()
    for index, sign in enumerate(text):
        left -= 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        if left < 0:
            return text[: index - 3] + "..."
    return text


def _printable(text: str) -> str:
    """Text that neither steers a terminal nor fails to be encoded for standard output."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _one_line(value: Any) -> str:
    """A value for people, on one line and without secrets."""
    return " ".join(_printable(_text(_mask(value))).split())


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


class _Screen:
    """Standard output for people: lines, the answer's text, on a terminal a live line below them."""

    def __init__(self, task: Optional[Task] = None) -> None:
        self.task, self.doing = task, "waiting"
        self._live = bool(task and sys.stdout and sys.stdout.isatty())
        self._drawn = self._in_line = False
        self._lock, self._left = threading.Lock(), threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Screen:
        if self._live:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._live:
            self._ticker.join()
        self._live = False
        self.write("\n" if self._in_line else "")

    def _tick(self) -> None:
        try:
            while not self._left.wait(1):
                self.write("")
        except (OSError, ValueError):
            pass  # the output is closed; the main thread will see

    def write(self, text: str) -> None:
        """Text as it is. The live line moves down, and is away while the text stands within a line."""
        with self._lock:
            wipe = "\r" + " " * _width() + "\r" if self._drawn else ""
            self._in_line = not text.endswith("\n") if text else self._in_line
            self._drawn = self._live and not self._in_line
            now = datetime.now(timezone.utc)
            live = _cut(f"{_span(self.task, now)}  {self.doing}") if self._drawn and self.task else ""
            print(wipe + _printable(text) + live, end="", flush=True)

    def line(self, when: Any, label: str, *facts: Any) -> None:
        told = ": ".join(_one_line(fact) for fact in facts if fact not in (None, "", [], {}))
        self.write("\n" * self._in_line + _cut(f"{_clock(when)}  {label:<10} {told}".rstrip()) + "\n")

    def tell(self, when: Any, kind: str, data: Any) -> None:
        """A line for an event or an entry of the log; the answer and a login's URL follow it uncut."""
        label, self.doing, place, names = _TOLD.get(kind, (_one_line(kind), "working", (), ()))
        known = {**_within(data), **_within(data, *place)}
        facts = [known.get(name) for name in names] if known and kind in _TOLD else [data]
        self.line(when, "failed" if known.get("is_error") is True else label, *facts)
        if kind == "agent":
            self.whole(known.get("text"))
        elif kind == "auth_event" and known.get("type") == "login_required":
            self.whole(known.get("url"))

    def whole(self, value: Any) -> None:
        if value is not None:
            self.write(_text(value) + "\n")


def _put(value: Any) -> None:
    """JSON for programs; ASCII alone, so that it can be encoded and steers no terminal."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def _complain(error: object, code: int) -> int:
    try:
        print("xtask:", _one_line(str(error) or repr(error)), file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody is there to read it
    return code


def _follow(task: Task, as_json: bool) -> int:
    """Show a task's events to its end, which alone is shown of a task without a stream."""
    from contextlib import closing

    done = None
    with _Screen(None if as_json else task) as screen:
        if not as_json:
            screen.write(f"{_clock(task.created_at)}  task       {task.id}\n")  # whole: to watch it again
        if task.events_streaming:
            with closing(task.events()) as events:
                for event in events:
                    done = _show_event(screen, event, task, as_json)
        # A large task comes trimmed in its last event.
        if not (isinstance(done, Task) and done.is_finished and done.result is not None):
            done = task.wait_finished()
            if as_json and not task.events_streaming:
                ids = {"task_id": done.id, "organization_id": done.organization_id}
                _put({"type": "task_finished", **ids, "time": _local_time(), "data": done.to_dict()})
    if not as_json:
        screen.line(done.finished_at, _one_line(done.status), "after " + _span(done, done.finished_at))
        screen.write("\n")
        screen.whole(done.result)
    return 0 if done.status == "completed" else _complain(f"the task ended as {done.status}", 1)


def _show_event(screen: _Screen, event: TaskUpdateEvent, task: Task, as_json: bool) -> Any:
    """Show one event; returns its data."""
    data, own = event.raw.get("data"), event.task_id == task.id
    if as_json:
        _put(event.raw)
    elif event.type == "chunk" and own and isinstance(data, str):
        screen.doing = "answering"
        screen.write(data)
    elif event.type != "connected" and not (event.type == "task_finished" and own):
        screen.tell(event.time, str(event.type), data)
    return event.data


def _show(told: Union[Task, TasksListItem, AgentActivityThread], as_json: bool) -> None:
    if as_json:
        _put(told.to_dict())
    elif isinstance(told, AgentActivityThread):
        _show_log(told)
    elif isinstance(told, TasksListItem):
        facts = _clock(told.created_at, "%Y-%m-%d %H:%M"), told.status or "", told.id, told.title or ""
        _Screen().write(_cut("{:<16}  {:<10}  {}  {}".format(*map(_one_line, facts)).rstrip()) + "\n")
    else:
        for name, value in _mask(told.to_dict()).items():
            if name != "result" and value not in (None, False, "", [], {}):
                _Screen().write(_cut(f"{_one_line(name):<22} {_one_line(value)}") + "\n")
        _Screen().whole(told.result)


def _show_log(log: AgentActivityThread) -> None:
    kinds = {
        AgentActivityThreadToolCall: "tool_call_result",
        AgentActivityThreadSubAgentTrigger: "sub_agent_trigger",
        AgentActivityThreadAuth: "auth_event",
    }
    for entry in log.messages if isinstance(log.messages, list) else []:
        kind = kinds.get(type(entry)) or getattr(entry, "role", None) or getattr(entry, "type", "other")
        data = entry.to_dict() if hasattr(entry, "to_dict") else entry
        _Screen().tell(getattr(entry, "created_at", None), str(kind), data)


def _demo(as_json: bool) -> int:
    with LocalPlatform() as platform:
        prompt, configuration = "What can this file do?", platform.configuration
        task = Task.create("demo-agent", prompt, configuration=configuration, events_streaming=True)
        code = _follow(task, as_json)
        if not as_json:
            print("\nActivity log", flush=True)
            _show_log(task.get_activity_log())
    return code


def _version() -> int:
    import hashlib

    source = globals()["__loader__"].get_data(__file__)  # a loader reads out of a zip file, too
    print(f"xtask {__version__}\nsha256 {hashlib.sha256(source).hexdigest()}")
    return 0


def _run(argv: List[str]) -> int:
    import getopt

    try:
        found, words = getopt.gnu_getopt(argv, "h", ["help", "version", "json", "file="])
    except getopt.GetoptError as error:
        raise ValueError(f"{error}; see xtask --help") from None
    options, files = [name for name, _ in found], [value for name, value in found if name == "--file"]
    if "--version" in options:
        return _version()
    if "-h" in options or "--help" in options:
        print(_HELP)
        return 0
    command, given, as_json = words[0] if words else "", words[1:], "--json" in options
    if len(given) != _WORDS.get(command) or files and command != "run":
        raise ValueError(f"wrong usage: {' '.join(words) or 'no command'}; see xtask --help")
    return _obey(command, given, files, as_json)


def _obey(command: str, given: List[str], files: List[str], as_json: bool) -> int:
    if command == "demo":
        return _demo(as_json)
    if command == "run":
        return _follow(Task.create(given[0], given[1], files, events_streaming=True), as_json)
    if command == "list":
        for item in Task.list(given[0]):
            _show(item, as_json)
        return 0
    task = Task.load(given[0])
    if command == "watch":
        return _follow(task, as_json)
    if command == "stop":
        task.stop()
    _show(task.get_activity_log() if command == "log" else task, as_json)
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """The terminal program, with the process's own arguments unless others are given: its exit code."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0  # the reader has all it wanted
    except ModuleException as error:
        unset = not error.answered and error.status_code in (400, 401)
        code = _complain(error, 2 if unset else 1)
    except (ValueError, OSError, RecursionError) as error:
        code = _complain(error, 2 if isinstance(error, ValueError) else 1)
    try:
        print(end="", flush=True)
    except OSError:  # the interpreter, too, would flush what is left, and complain
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
