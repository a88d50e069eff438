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
to update, replace the file. What stands below the cutting line (a local platform for tests and the
terminal program) may be cut off. Python 3.9 or newer, no other package.
"""

from __future__ import annotations

import contextlib
import contextvars
import email.utils
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
import urllib.request
import weakref
from collections import deque
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from typing import (
    TYPE_CHECKING, Any, AsyncGenerator, Callable, Coroutine, Deque, Dict, Generator, Iterable, Iterator, List,
    Mapping, NamedTuple, Optional, Set, Tuple, Type, TypeVar, Union, cast,
)

if TYPE_CHECKING:
    from typing import ParamSpec  # new in Python 3.10: only type checkers read it here

    _P = ParamSpec("_P")

__version__ = "1.0.0"

__all__ = [
    "AgentActivityThread", "AgentActivityThreadAuth", "AgentActivityThreadMessage",
    "AgentActivityThreadMessageContent", "AgentActivityThreadOtherEntry", "AgentActivityThreadReasoning",
    "AgentActivityThreadReasoningType", "AgentActivityThreadSubAgentTrigger", "AgentActivityThreadToolCall",
    "AgentExecutionInput", "AgentExecutionStatus", "Configuration", "ModuleException", "OutputFormat",
    "ServerSentEvent", "Task", "TasksListItem", "TaskUpdateEvent", "TaskUpdateEventType", "ToolCallRequest",
    "ToolCallRequestReasoning", "ToolCallResult", "User", "iter_sse",
]

# ---- Limits ------------------------------------------------------------------------------------------------

_MAX_EVENT = 16 * 2**20  # bytes between two blank lines of a stream
_MAX_HEAD = 64 * 2**10  # bytes of an answer's head
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
_RELAY_BATCHES = 4  # reads of a stream (64 KiB or one event) that may wait for an async consumer
_FINAL_SILENCE = 5.0  # seconds after which the stream of a finished task counts as over
_REFUSAL_SECONDS = 2.0  # for the body of a refused stream, whose status alone is enough

# ---- Errors and warnings -----------------------------------------------------------------------------------


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
        self.status_code, self.description = status_code, description
        self.details, self.answered = details, answered

    def _with(self, retry_after: Optional[float]) -> ModuleException:  # no local keeps what is raised
        self._retry_after = retry_after
        return self

    def __str__(self) -> str:
        return f"[{self.status_code}] {self.description}"

    def __repr__(self) -> str:  # without the details, which may hold anything
        return f"{type(self).__name__}({self.status_code}, {self.description!r})"


class _Refused(OSError, ValueError):
    """A URL that is not opened: none for HTTP, or a stranger's to a place that he may not reach."""


def _warn(message: str, *arguments: Any) -> None:
    import logging  # 19 ms of import that most runs never need

    logging.getLogger(__name__).warning(message, *arguments)


_SECRETS = ("access_token", "user_tokens", "user_oidc_token", "api_key", "x-api-key")
# in a text: a string, one of JSON within JSON, or from an object or a list on, whose end is not sought, all
_SECRET_IN_JSON = re.compile(
    rf'(?s)("(?:{"|".join(_SECRETS)})\\*"\s*:\s*)(?:"(?:[^"\\]|\\.)*"?|\\+"[^"]*"?|[\[{{]\s*[^\s\]}}].*)'
)
# of a string that is a URL, all from its "?" on; within a text, up to the next "://", which keeps it linear
_URL_QUERY = re.compile(r"(?is)(\A[a-z][a-z\d+.-]*://[^?]*)\?.*|(://(?:[^\s?#\"'<>:]|:(?!//))*)\?[^\s#\"'<>]*")


def _mask(value: Any, depth: int = 100) -> Any:
    """The value with secrets and the queries of URLs hidden, for everything a person may see."""
    if isinstance(value, (dict, list, tuple)) and not depth:
        return "..."
    if isinstance(value, dict):
        return {_mask(k): "***" if k in _SECRETS and v else _mask(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item, depth - 1) for item in value]
    if isinstance(value, str) and not isinstance(value, Enum):
        value = value if len(value) <= 65536 else value[:65536] + "..."  # hiding takes 165 bytes a character
        return _SECRET_IN_JSON.sub(r'\1"***"', _URL_QUERY.sub(r"\1\2?***", value))
    return value


def _repr(of: Any, values: Mapping[str, Any]) -> str:
    shown = [f"{name}={_mask(value)!r}" for name, value in values.items()]
    return f"{type(of).__name__}({', '.join(shown)})"


# ---- Enums -------------------------------------------------------------------------------------------------


class _OpenEnum(str, Enum):
    """A `str` enum that takes values newer than itself: they become members outside the list."""

    __str__ = str.__str__  # or an f-string prints `Name.member` before Python 3.12, the value after

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


class AgentActivityThreadReasoningType(_OpenEnum):
    """The two kinds of reasoning in an activity log."""

    Think = "think"
    Analyze = "analyze"


# ---- Records: JSON objects as dataclasses, without loss ----------------------------------------------------

_R = TypeVar("_R", bound="_Record")
_T = TypeVar("_T")
_Time = Union[datetime, str, None]
_Text = Union[str, bytes]  # of JSON
_OLD_TIMES = sys.version_info < (3, 11)


def _time(value: Any) -> Any:
    """An aware datetime (no zone means UTC); what does not parse stays as it came."""
    if not isinstance(value, str) or not value.isascii():
        return value
    spelled = value.upper()  # which knows no "z"
    if _OLD_TIMES:  # a fraction of 3 or 6 digits alone, and no "Z"
        spelled = re.sub(r"\.\d+", lambda fraction: f"{fraction[0]:0<7}"[:7], spelled.replace("Z", "+00:00"))
    try:
        moment = datetime.fromisoformat(spelled)
    except (ValueError, IndexError):  # the second: PyPy, for less than a date
        return value
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _plain(value: Any) -> Any:
    """The value as JSON has it: fresh containers, records as objects, enums and times as strings."""
    return json.loads(_encode(value))


def _default(value: Any) -> Any:
    if isinstance(value, _Record):
        return value._items()
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_encode = json.JSONEncoder(default=_default).encode
_ordered = json.JSONEncoder(sort_keys=True).encode


def _as(load: Callable[[Any], Any], kind: type, **options: Any) -> Any:
    """A field whose JSON value is converted by `load`; of another type than that it stays as it came."""
    return field(**(options or {"default": None}), metadata={"load": (kind, load)})


class _Record:
    """What the dataclasses that come from the server share. `extra` holds what has no name here."""

    extra: Dict[str, Any]
    _wire: Mapping[str, Any] = {}  # the object as it came: which keys, and how times were spelled
    _told: _Text = "{}"  # of a task: what the server last told, as text: few tasks are saved
    _configuration: Optional[Configuration] = None  # which it was loaded with, if it can load more

    @classmethod
    @functools.cache
    def _plan(cls: type) -> Tuple[Dict[str, Any], List[Tuple[str, type, Callable[[Any], Any]]]]:
        """The fields with their defaults, but for `extra` and `raw`; what converts JSON of which type."""
        own = [f for f in fields(cls) if f.name not in ("extra", "raw")]
        defaults = {f.name: getattr(cls, f.name, [] if f.default_factory is list else None) for f in own}
        return defaults, [(f.name, *f.metadata["load"]) for f in own if "load" in f.metadata]

    @classmethod
    def from_dict(cls: Type[_R], data: Mapping[str, Any]) -> _R:
        """The record of a JSON object. Nothing is refused and nothing is lost."""
        defaults, loads = cls._plan()
        self = cls.__new__(cls)
        self.__dict__ = state = {**defaults, **data}
        more = len(state) > len(defaults)  # it has names that are not ours
        extra = {name: state.pop(name) for name in data if name not in defaults} if more else {}
        state["extra"], state["_wire"] = extra, data
        for name, kind, load in loads:
            value = state[name]
            if isinstance(value, kind):
                state[name] = load(value)
        return self

    def to_dict(self) -> Dict[str, Any]:
        """The JSON object: every key that came, and every field that is set."""
        return _plain(self)  # type: ignore[no-any-return]

    def _items(self) -> Dict[str, Any]:
        wire, out = self._wire, {}
        for name, default in self._plan()[0].items():
            value = getattr(self, name)
            if name in wire or value != default:
                unchanged = isinstance(value, datetime) and value == _time(wire.get(name))
                out[name] = wire[name] if unchanged else value  # times in the server's spelling
        return {**out, **self.extra}

    def __repr__(self) -> str:
        return _repr(self, {name: getattr(self, name) for name in self._plan()[0]})


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
    user: Optional[User] = _as(User.from_dict, dict)
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
    reasoning: Optional[ToolCallRequestReasoning] = _as(ToolCallRequestReasoning.from_dict, dict)
    plan_task_id: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class ToolCallResult(ToolCallRequest):
    """What a tool answered."""

    result: Any = None
    is_error: Optional[bool] = None


# ---- Activity log ------------------------------------------------------------------------------------------


@dataclass(repr=False)
class AgentActivityThreadMessageContent(_Record):
    """A message's text and the URLs of its files."""

    text: Optional[str] = None
    files: Optional[List[str]] = None
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class _Entry(_Record):
    """What all parts of an activity log have."""

    id: str
    created_at: _Time = _as(_time, str)
    extra: Dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class AgentActivityThreadMessage(_Entry):
    """What the user (`role` "user") or the agent (`role` "agent") said."""

    role: str = ""
    content: AgentActivityThreadMessageContent = _as(AgentActivityThreadMessageContent.from_dict, dict)


@dataclass(repr=False)
class AgentActivityThreadToolCall(_Entry):
    """A tool that was called, with its result."""

    tool_name: str = ""
    payload: Any = None
    is_error: Optional[bool] = None
    reasoning: Optional[ToolCallRequestReasoning] = _as(ToolCallRequestReasoning.from_dict, dict)
    result: Any = None


@dataclass(repr=False)
class AgentActivityThreadReasoning(_Entry):
    """A thought of the agent."""

    type: AgentActivityThreadReasoningType = _as(AgentActivityThreadReasoningType, str)
    title: Optional[str] = None
    confidence: Optional[float] = None
    thought: Optional[str] = None
    action: Optional[str] = None
    result: Optional[str] = None
    analysis: Optional[str] = None


@dataclass(repr=False)
class AgentActivityThreadSubAgentTrigger(_Entry):
    """Another agent that was asked."""

    agent_id: Optional[str] = None
    query: str = ""
    files: Optional[List[str]] = None
    reasoning: Optional[ToolCallRequestReasoning] = _as(ToolCallRequestReasoning.from_dict, dict)


@dataclass(repr=False)
class AgentActivityThreadAuth(_Entry):
    """A login: `type` is not_supported, login_required, token_issue or token_ready."""

    type: str = ""
    data: Any = None


class AgentActivityThreadOtherEntry(_Entry):
    """An entry of a kind that is newer than this file: all of it but two keys is in `extra`."""


def _entry(entry: Any) -> Any:
    """An entry as the first kind, in this order, that its keys name: nothing else tells it."""
    if not isinstance(entry, dict):
        return entry
    kind = entry.get("type")
    found: Type[_Entry] = AgentActivityThreadAuth
    if "role" in entry and "content" in entry:
        found = AgentActivityThreadMessage
        fits = entry["role"] in ("user", "agent") and isinstance(entry["content"], dict)
    elif "tool_name" in entry:
        found, fits = AgentActivityThreadToolCall, isinstance(entry["tool_name"], str)
    elif kind in ("think", "analyze"):
        texts = map(entry.get, ("title", "thought", "action", "result", "analysis"))
        found, fits = AgentActivityThreadReasoning, {*map(type, texts)} <= {str, type(None)}
    elif "query" in entry:
        found, fits = AgentActivityThreadSubAgentTrigger, isinstance(entry["query"], str)
    else:
        fits = "data" in entry and kind in ("not_supported", "login_required", "token_issue", "token_ready")
    return (found if fits else AgentActivityThreadOtherEntry).from_dict(entry)


@dataclass(repr=False)
class AgentActivityThread(_Entry):
    """What a task did: its `messages`, oldest first. Route: GET /activity/{agent_id}/{task_id}."""

    messages: List[_Entry] = _as(lambda entries: [*map(_entry, entries)], list, default_factory=list)
    user: Optional[User] = _as(User.from_dict, dict)


# ---- Configuration -----------------------------------------------------------------------------------------


def _setting(given: Optional[str], variable: str) -> Optional[str]:
    return (given or "").strip() or os.environ.get(variable, "").strip() or None


@dataclass(frozen=True, init=False)
class Configuration:
    """Where the platform is and who asks. Immutable; shared by any number of tasks and threads.

    Unset values come from XPANDER_API_KEY, XPANDER_ORGANIZATION_ID and XPANDER_BASE_URL, when the
    object is made. `timeout`: the longest single wait for the network, in seconds. `max_retries`:
    further tries of a request, in a row. `idle_timeout`: seconds of silence after which a stream
    is opened anew. `ssl_context`: instead of `ssl.create_default_context()`. `trusted_file_hosts`:
    hosts to fetch files from although their address is not public. A pickle carries the key.
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
        self, api_key: Optional[str] = None, organization_id: Optional[str] = None,
        base_url: Optional[str] = None, *, timeout: float = 60.0, max_retries: int = 2,
        idle_timeout: float = 90.0, ssl_context: Optional[ssl.SSLContext] = None,
        trusted_file_hosts: Iterable[str] = (),
    ) -> None:
        api_key = _setting(api_key, "XPANDER_API_KEY")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII: look for stray characters around it")
        if not all(isinstance(it, (int, float)) and 0 < it < 2**21 for it in (timeout, idle_timeout)):
            raise ValueError("timeout and idle_timeout must be numbers of seconds above 0 and below 24 days")
        if not isinstance(max_retries, int):
            raise ValueError("max_retries must be a whole number")
        staging = "stg." if os.environ.get("IS_STG", "").strip().lower() == "true" else ""
        root = (_setting(base_url, "XPANDER_BASE_URL") or f"https://inbound.{staging}xpander.ai").partition("?")[0]
        root = root if "://" in root else f"https://{root}"
        hosts = [trusted_file_hosts] if isinstance(trusted_file_hosts, str) else trusted_file_hosts
        self.__dict__.update(  # frozen: setting an attribute would raise
            api_key=api_key, organization_id=_setting(organization_id, "XPANDER_ORGANIZATION_ID"),
            base_url=_clean_url(root, "base_url").rstrip("/"), timeout=timeout, max_retries=max_retries,
            idle_timeout=idle_timeout, ssl_context=ssl_context,
            trusted_file_hosts=tuple(host.lower() for host in hosts),
        )

    def close(self) -> None:
        """Close the idle connections. The configuration stays usable."""
        self._transport.close()

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
        return state.get("_transport") or state.setdefault("_transport", _Transport(self))  # type: ignore

    def _call(self, method: str, route: str, ids: Mapping[str, Any], **options: Any) -> _Answer:
        """Call a route under the API root, which names the organization on an agent controller."""
        parts = urllib.parse.urlsplit(self.base_url)
        controller = "agent-controller" in (parts.hostname or "") or parts.port == 9016
        if controller or parts.path.split("/")[1:2] == ["agent-controller"]:
            route, ids = "/{organization_id}" + route, {"organization_id": self.organization_id, **ids}
        return self._transport.call(method, self.base_url + _path(route, ids), **options)

    def _events_url(self, task: Task) -> str:
        """The route of a task's events: another host for the cloud, another port for local work."""
        parts, base = urllib.parse.urlsplit(self.base_url), self.base_url
        if parts.hostname in ("inbound.xpander.ai", "inbound.stg.xpander.ai"):
            base = "https://" + parts.hostname.replace("inbound", "agent-controller", 1)
        elif parts.port == 8085 and parts.hostname in ("localhost", "127.0.0.1", "::1"):
            base = "http://localhost:9016"
        ids = {"organization_id": self.organization_id or task.organization_id, "task_id": task.id}
        return base + _path("/{organization_id}/agent-execution/{task_id}/events", ids)


def _path(route: str, ids: Mapping[str, Any]) -> str:
    """A route with its ids filled in, each a whole segment (RFC 3986, section 3.3)."""
    for name, value in ids.items():
        if name == "organization_id" and not value:
            reason = "No organization: set XPANDER_ORGANIZATION_ID or organization_id"
            raise ModuleException(400, reason, answered=False)
        if not isinstance(value, str) or value.strip() in ("", ".", ".."):
            raise ValueError(f"{name} must be a string that is not empty")
    return route.format(**{name: urllib.parse.quote(value, safe="") for name, value in ids.items()})


_shared: Dict[Tuple[Optional[str], ...], Configuration] = {}


def _default_configuration() -> Configuration:
    """The one configuration of this environment, so that calls in a loop share a connection."""
    names = ("XPANDER_API_KEY", "XPANDER_ORGANIZATION_ID", "XPANDER_BASE_URL", "IS_STG")
    key = tuple(map(os.environ.get, names))
    if len(_shared) >= 16 and key not in _shared:
        _shared.clear()  # an environment that keeps changing must not fill the memory
    return _shared.get(key) or _shared.setdefault(key, Configuration())  # atomic: all threads get the same


def _given(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values that are not None, as JSON."""
    return {name: value for name, value in _plain(values).items() if value is not None}


# ---- Task --------------------------------------------------------------------------------------------------

_REQUIRED = ("id", "agent_id", "organization_id", "input", "created_at")


def _twin(method: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The async twin of a method. One that is cancelled hangs up, so that its thread ends, too."""
    function: Any = getattr(method, "__func__", method)  # of a class method
    owner, _, name = function.__qualname__.rpartition(".")

    @functools.wraps(function)
    async def twin(*arguments: Any, **options: Any) -> _T:
        import asyncio  # 60 ms of import that sync programs never need

        def run() -> Any:
            _twins_line.set(line)  # in the thread's own copy of the context
            return getattr(arguments[0], name)(*arguments[1:], **options)

        line = _Line()
        try:
            return await asyncio.to_thread(run)
        finally:
            line.hang_up()

    twin.__name__, twin.__qualname__, twin.__doc__ = f"a{name}", f"{owner}.a{name}", f"`{name}`, async."
    return twin


@dataclass(repr=False)
class TasksListItem(_Record):
    """A task as `Task.list` tells it; `load()` gives the whole one."""

    id: str
    agent_id: Optional[str] = None
    organization_id: Optional[str] = None
    status: Optional[AgentExecutionStatus] = _as(AgentExecutionStatus, str)
    user_id: Optional[str] = None
    parent_task_id: Optional[str] = None
    triggering_agent_id: Optional[str] = None
    created_at: _Time = _as(_time, str)
    updated_at: _Time = _as(_time, str)
    source_node_type: Optional[str] = None
    result: Optional[str] = None
    title: Optional[str] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    def load(self) -> Task:
        """The whole task, with the configuration of the list."""
        return Task.load(self.id, self._configuration)

    aload = _twin(load)


@dataclass(repr=False)
class Task(_Record):
    """A task of the platform: the fields of its OpenAPI schema `AgentExecution`.

    Change fields, then `save()`. What has no field here is in `extra`, and is kept. To add a field, add
    a line to the list below (a list: like `sub_executions`). Errors of all calls: `ModuleException`,
    `ValueError`.
    """

    id: str
    agent_id: str
    organization_id: str
    input: AgentExecutionInput = _as(AgentExecutionInput.from_dict, dict)
    created_at: _Time = _as(_time, str)
    updated_at: _Time = _as(_time, str)
    started_at: _Time = _as(_time, str)
    paused_at: _Time = _as(_time, str)
    finished_at: _Time = _as(_time, str)
    status: Optional[AgentExecutionStatus] = _as(AgentExecutionStatus, str)
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
    sub_executions: Optional[List[str]] = _as(list, list, default_factory=list)
    finished_sub_executions: Optional[List[str]] = _as(list, list, default_factory=list)
    is_manually_stopped: Optional[bool] = False
    events_streaming: Optional[bool] = False
    used_mutating_tools: Optional[bool] = False
    is_continuous: Optional[bool] = False
    disable_attachment_injection: Optional[bool] = False
    payload_extension: Optional[Dict[str, Any]] = None
    output_schema: Optional[Dict[str, Any]] = None
    output_format: Optional[OutputFormat] = _as(OutputFormat, str)
    think_mode: Optional[str] = None
    mcp_servers: Optional[List[Dict[str, Any]]] = _as(list, list, default_factory=list)
    hitl_request: Optional[Dict[str, Any]] = None
    pending_eca_request: Optional[Dict[str, Any]] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], configuration: Optional[Configuration] = None) -> Task:
        """The task of a JSON object, as the server last told it: `save()` compares with this."""
        told = _encode(dict(data))
        return cls._of(json.loads(told), told, configuration)  # shares nothing with `data`

    @classmethod
    def _of(cls, data: Mapping[str, Any], told: _Text, configuration: Any) -> Task:
        task = super().from_dict(data)
        task._told, task._configuration = told, configuration
        return task

    def __repr__(self) -> str:
        return f"Task(id={self.id!r}, status={_plain(self.status)!r}, title={_mask(self.title)!r:.60})"

    @property
    def configuration(self) -> Configuration:
        """What the calls of this task use: the one it was made with, else the environment's."""
        return self._configuration or _default_configuration()

    @configuration.setter
    def configuration(self, configuration: Optional[Configuration]) -> None:
        self._configuration = configuration

    @property
    def is_finished(self) -> bool:
        """Whether the status is final; for one that is new, whether `finished_at` is set."""
        known = self.status in list(AgentExecutionStatus)
        return AgentExecutionStatus(self.status).is_final if known else self.finished_at is not None

    @classmethod
    def load(cls, task_id: str, configuration: Optional[Configuration] = None) -> Task:
        """The task with this id. Route: GET /agent-execution/{task_id}/status.

        Called on a task it still takes its second argument or the default configuration: see `reload`.
        """
        return cls._ask(configuration or _default_configuration(), {"task_id": task_id})

    @classmethod
    def create(
        cls, /, agent_id: str, prompt: str = "", file_urls: Optional[List[str]] = None, *,
        configuration: Optional[Configuration] = None, **options: Any,
    ) -> Task:
        """A new task for an agent. Route: POST /agent-execution/{agent_id}, sent once.

        Options are the platform's create keys (`events_streaming`, `output_format`, `title`, ...),
        None ones are left out; `id=` continues a task, `user=` is a `User` or its dict,
        `agent_version=` picks a version. Without prompt, files and id: ValueError.
        """
        if not (prompt or file_urls or options.get("id")):
            raise ValueError("a task needs a prompt, file_urls or the id of a task to continue")
        asked = {"text": prompt, "files": file_urls or None, "user": options.pop("user", None)}
        asked_version = options.pop("agent_version", None)
        version = "" if asked_version is None else str(asked_version)
        if not (version.isascii() and version.isprintable()):
            raise ValueError("agent_version must be printable ASCII")
        configuration, ids = configuration or _default_configuration(), {"agent_id": agent_id}
        body = _given({"input": _given(asked), **options})
        headers = {"x-agent-version": version} if version else {}
        return cls._ask(configuration, ids, "POST", "/agent-execution/{agent_id}", body=body, headers=headers)

    @classmethod
    def list(
        cls, /, agent_id: str, *, configuration: Optional[Configuration] = None, **filters: Any
    ) -> List[TasksListItem]:
        """An agent's tasks. Route: GET /agent-execution/executions/history/{agent_id}.

        Filters: `user_id`, `parent_task_id`, `triggering_agent_id`, `status`, `internal_status`.
        """
        configuration = configuration or _default_configuration()
        query = urllib.parse.urlencode(_given(filters))
        route = "/agent-execution/executions/history/{agent_id}" + (f"?{query}" if query else "")
        answer = configuration._call("GET", route, {"agent_id": agent_id})
        if not isinstance(answer.value, list) or not all(isinstance(item, dict) for item in answer.value):
            raise answer.unexpected("a list of objects")
        items = [TasksListItem.from_dict(item) for item in answer.value]
        for item in items:
            item._configuration = configuration
        return items

    def save(self) -> Task:
        """Send the fields that differ from what the server last told, and take its answer.

        Deep changes count, None is null; what changes meanwhile stays changed, and a failed save keeps
        all for the next. Nothing to send: it reloads. Route: PATCH /agent-execution/{task_id}/update.
        """
        return self._save({})

    def set_status(self, status: Union[AgentExecutionStatus, str], result: Optional[str] = None) -> Task:
        """Send the status, the result if given, and all other unsaved changes."""
        if status not in list(AgentExecutionStatus):
            raise ValueError(f"{str(status)!r} is not a status: use one of {', '.join(AgentExecutionStatus)}")
        changes = _given({"status": status, "result": result})
        self.__dict__.update(changes, status=AgentExecutionStatus(status))
        return self._save(changes)

    def stop(self) -> Task:
        """Stop it; other unsaved changes than the status stay. Route: DELETE /agent-execution/{task_id}."""
        told = self._told
        before = {**json.loads(told), "status": _plain(self.status)}
        return self._take(told, before, "DELETE", "/agent-execution/{task_id}")

    def reload(self) -> Task:
        """The server's state, into this object. Unsaved changes are dropped."""
        return self._take(self._told)

    def wait_finished(self, timeout: Optional[float] = None) -> Task:
        """Reload to the task's end, in pauses growing from 0.5 to 5 s.

        `TimeoutError` once `timeout` seconds are over, which is looked at after each reload.
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

        Broken and silent connections are replaced, each event comes once; any other end than the task's
        is a `ModuleException`. ValueError at the call without `events_streaming`. To leave early, use
        `contextlib.closing`. Events root, GET /{organization_id}/agent-execution/{task_id}/events.
        """
        return _events(_Stream(self))

    def aevents(self) -> AsyncGenerator[TaskUpdateEvent, None]:
        """`events`, async; each stream is read by a daemon thread of its own."""
        return _aevents(_Stream(self))

    def get_activity_log(self) -> AgentActivityThread:
        """What the task did. None yet: `ModuleException` 404. Route: GET /activity/{agent_id}/{task_id}."""
        ids = {"agent_id": self.agent_id, "task_id": self.id}
        answer = self.configuration._call("GET", "/activity/{agent_id}/{task_id}", ids)
        if answer.value in (None, {}):
            raise ModuleException(404, "No activity log yet")
        if not isinstance(answer.value, dict):
            raise answer.unexpected("an activity log")
        return AgentActivityThread.from_dict(answer.value)

    def get_files(self) -> List[Any]:
        """The PDFs: `agno.media.File` with their bytes where agno is installed, else URLs."""
        urls = self._files([".pdf"])
        try:
            from agno.media import File  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        make = functools.partial(_agno_pdf, self.configuration, File)
        return [file for file in map(make, urls, _fetch_files(self.configuration, urls)) if file is not None]

    def get_images(self) -> List[Any]:
        """The images: `agno.media.Image` with their URL where agno is installed, else URLs."""
        urls = self._files(_IMAGES)
        try:
            from agno.media import Image  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            return urls
        # agno would fetch what we hand it, so the same rules hold
        return [Image(url=url) for url in urls if _may_fetch(self.configuration, url)]

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

    def to_message(self) -> str:
        """The input as one text for a model: the text, the URLs, the readable files' contents."""
        urls, readable = self._files(), self.get_human_readable_files()
        lines = [getattr(self.input, "text", None), "Files: " + ", ".join(urls) if urls else None]
        lines += ["Files contents:", *map(json.dumps, readable)] if readable else []
        return "\n".join(map(str, filter(None, lines)))

    # The async twins; `aevents` and `await_finished` are beside theirs.
    aload = classmethod(_twin(load))
    acreate = classmethod(_twin(create))
    alist = classmethod(_twin(list))
    asave = _twin(save)
    aset_status = _twin(set_status)
    astop = _twin(stop)
    areload = _twin(reload)
    aget_activity_log = _twin(get_activity_log)
    aget_files = _twin(get_files)
    aget_images = _twin(get_images)
    aget_human_readable_files = _twin(get_human_readable_files)
    ato_message = _twin(to_message)

    def _files(self, kind: Optional[List[str]] = None) -> List[str]:
        """The URLs of the input, or those whose path ends in an extension of that kind."""
        files = getattr(self.input, "files", None)
        urls = [url for url in files if isinstance(url, str)] if isinstance(files, list) else []
        return urls if kind is None else [url for url in urls if _extension(url) in kind]

    @classmethod
    def _ask(cls, configuration: Configuration, ids: Dict[str, str], *request: str, **options: Any) -> Task:
        """The task that a route answers with; as it is now, where a change is answered with nothing."""
        method, route = request or ("GET", "/agent-execution/{task_id}/status")
        answer = configuration._call(method, route, ids, **options)
        if answer.value is None and method in ("PATCH", "DELETE"):
            return cls._ask(configuration, ids)
        if isinstance(answer.value, dict) and isinstance(answer.value.get("id"), str):
            return cls._of(answer.value, answer.text, configuration)
        raise answer.unexpected("a task")

    def _save(self, always: Dict[str, Any]) -> Task:
        """Send what differs from what the server last told, and these values even if they do not."""
        with self._lock("saves"):  # two on their way may arrive in any order
            while True:  # until all is of one moment
                told, before = self._told, self.to_dict()
                known = {name: value for name, value in json.loads(told).items() if name not in always}
                with self._lock("answers"):
                    if told is self._told:  # without `always`: the next save, too, sends it if this one fails
                        told = self._told = json.dumps(known) if always else told
                        break
            if isinstance(self.internal_status, str) and len(self.internal_status) > 255:
                raise ValueError("internal_status has more than the 255 characters the platform takes")
            changed = _changed(known, before)
            changes = {**{name: before[name] for name in before if name in changed}, **always}
            update = ("PATCH", "/agent-execution/{task_id}/update") if changes else ()
            return self._take(told, before, *update, body=changes or None)

    def _lock(self, what: str) -> Any:
        """A lock of this task and this process: a fork may copy one that is held."""
        return self.__dict__.setdefault(f"_lock of {what} in {os.getpid()}", threading.RLock())

    def __getstate__(self) -> Dict[str, Any]:
        return {name: value for name, value in self.__dict__.copy().items() if not name.startswith("_lock")}

    def _take(
        self, told: _Text, before: Optional[Dict[str, Any]] = None, *request: str, **options: Any
    ) -> Task:
        """Become the task that is answered, but for what was changed since `before`, if that is given.

        `told` is what the server had told then; `request` is a method and a route, else the status's.
        """
        ids, seen = {"task_id": self.id}, told
        newer = self._ask(self.configuration, ids, *request, **options)
        while not self._become(newer, seen, told, before):
            # another call's answer came between, which may be the newer one
            seen, newer = self._told, self._ask(self.configuration, ids)
        return self

    def _become(self, newer: Task, seen: _Text, told: _Text, before: Optional[Dict[str, Any]]) -> bool:
        """Take the state of `newer`, if what the server told last is still what was `seen`."""
        now = object.__new__(type(self))  # as copy.copy() does, which asks subclasses what to leave out
        now.__dict__ = self.__dict__.copy()
        if before is not None:
            newer._keep(now, told, before)
        newer._configuration = self._configuration
        with self._lock("answers"):  # in which nothing of a subclass is called
            if self._told is not seen:
                return False
            here = self.__dict__.copy() if before is not None else {}
            late = {name: value for name, value in here.items() if value is not now.__dict__.get(name)}
            self.__dict__.update({**newer.__dict__, **late})  # at once, for whoever reads meanwhile
            return True

    def _keep(self, now: Task, told: _Text, before: Dict[str, Any]) -> None:
        """Take into this answer what was changed since `before` in the task that is here `now`."""
        values = now.to_dict()
        changed = _changed(before, values)
        if now._told is not told:  # what is as the server told it is no change of the user's
            changed &= _changed(json.loads(now._told), values)
        for name in changed:
            is_field = name in self._plan()[0]
            ours, its = (now.__dict__, self.__dict__) if is_field else (now.extra, self.extra)
            if name in ours:  # what was taken out of `extra` may come back
                its[name] = ours[name]

    def _pauses(self, timeout: Optional[float]) -> Iterator[float]:
        """The pauses between two looks at the status, until it is final."""
        ends = float("inf") if timeout is None else time.monotonic() + timeout
        pause = 0.0
        while not self.is_finished:
            left = ends - time.monotonic()
            if pause and left <= 0:
                raise TimeoutError(f"task {self.id} is still {self.status} after {timeout} s")
            yield max(0.0, min(pause, left))
            pause = min(max(0.5, pause * 1.5), 5.0)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Set[str]:
    """The names of what is in one alone, or differs as JSON: True is not 1, key order does not count."""
    both = [name for name in old.keys() & new.keys() if old[name] is not new[name]]
    return (old.keys() ^ new.keys()) | {name for name in both if _ordered(old[name]) != _ordered(new[name])}


# ---- Transport ---------------------------------------------------------------------------------------------

_BROKEN = (ConnectionError, http.client.IncompleteRead, ssl.SSLEOFError, socket.gaierror)
_TIMEOUTS = (socket.timeout, TimeoutError)  # two classes before Python 3.10
# Of a request that is under way; ValueError: a host or a port, of a redirect too, that is none
_FAILURES = (OSError, http.client.HTTPException, ValueError)
# After which answers, and for want of an answer after which causes, the same request is sent again
_Again = Tuple[Tuple[int, ...], Tuple[Type[Exception], ...]]
_AGAIN: _Again = (429, 502, 503, 504), _BROKEN
_AGAIN_POST: _Again = (429,), (ConnectionRefusedError,)  # what it did before a connection broke is not known
_AGAIN_STREAM: _Again = (429, *range(500, 600)), _TIMEOUTS + _BROKEN
# RFC 9112, sections 4 and 5; a line that is no field is passed over
_STATUS_LINE = re.compile(rb"HTTP/1\.(\d) +([1-9]\d\d)(?!\S)[^\r\n]*\r?\n")
_FIELD, _FOLD = re.compile(r"(?m)^([!-9;-~]+):([^\r\n]*)\r?$"), re.compile(r"\r?\n[ \t]+")
_NO_LINE = b"\r\n", b"\n", b""
_LENGTH = re.compile(r"([0-9]{1,18})(?:[ \t]*,[ \t]*\1)*")  # section 6.3: the same one several times is one
_CHUNK_HEAD = re.compile(rb"[\r\n]*0*([0-9A-Fa-f]{1,15})(?:[; \t][^\n]*)?\r?\n")  # RFC 9112, section 7.1
_jitter = random.SystemRandom().uniform  # the generator that `random.seed` sets is the program's
# A host first; neither "@" (a user name), nor what parsers of URLs read in two ways
_HOST_AND_PORT = re.compile(r"(?!:)[^\s\0-\x20\x7f@%\\/?#]+")


def _wait(seconds: float, line: Optional[_Line] = None) -> None:
    """Every pause between two requests; ends early when the line is hung up."""
    (line.hung_up if line else threading.Event()).wait(seconds)


class _Line:
    """The socket that a thread waits for, one after the other: `hang_up`, from any thread, ends it all."""

    def __init__(self) -> None:
        self.hung_up, self.connected = threading.Event(), False
        self.socket: Optional[socket.socket] = None

    def hold(self, sock: socket.socket) -> None:
        self.socket = sock
        if self.hung_up.is_set():
            raise ConnectionAbortedError("it was hung up")

    def hang_up(self) -> None:
        self.hung_up.set()
        if sock := self.socket:
            # close() would not wake a blocked read, and SSLSocket's own shutdown() takes the TLS layer
            # away under the thread that reads
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


_twins_line: contextvars.ContextVar[Optional[_Line]] = contextvars.ContextVar("line", default=None)


class _Request(urllib.request.Request):
    """A request, and how it may be carried out."""

    guarded = False  # the URL is a stranger's: judge each address before connecting
    keep = False  # over a kept connection, which is kept again
    was_sent = False  # before, over a kept connection that broke
    hops = 0  # redirects that led here

    def __init__(self, method: str, url: str, headers: Mapping[str, str], line: _Line) -> None:
        super().__init__(url, None, dict(headers), method=method)
        self.line, self.given = line, headers  # those of ours: urllib adds its own, and a proxy's password
        self.place = self.host  # the URL's own: `host` is where to connect, the proxy's once there is one

    @property
    def proxied(self) -> bool:
        return self.host != self.place


class _Response(http.client.HTTPResponse):
    """An answer whose body is read as it arrives, whatever frames it (RFC 9112, section 6.3)."""

    fp: Any = None  # or a Ctrl-C in the constructor leaves what cannot be closed
    connection: Optional[_Connection] = None
    left = 0  # bytes still to come of the current chunk
    rest = b""  # what came of the next chunk's size, or after the last chunk or the body
    ended = False  # the last chunk came

    def begin(self) -> None:
        """Read the head (RFC 9112, sections 4 and 5).

        http.client takes one that was cut off for a whole one, and its e-mail parser costs a sixth of a call.
        """
        for _ in range(10):  # interim answers (RFC 9110, section 15.2): http.client skips 100 alone
            line = self.fp.readline(_MAX_HEAD)
            head = bytearray(line)
            while head.startswith(b"HTTP/") and line not in _NO_LINE and len(head) < _MAX_HEAD:
                line = self.fp.readline(_MAX_HEAD - len(head))
                head += line
            status = _STATUS_LINE.match(head)
            if not status or status[2] == b"101" or status[2][:1] != b"1":  # the second is a last one
                break
        else:
            status = None  # none but interim ones
        if not head:
            raise http.client.RemoteDisconnected("it hung up without an answer")
        if not line.endswith(b"\n") and len(head) < _MAX_HEAD:
            raise http.client.IncompleteRead(line)
        if not status or line not in _NO_LINE:
            raise http.client.HTTPException("what it sent has no head of HTTP/1, or a very long one")
        self.version, self.status = 10 if status[1] == b"0" else 11, int(status[2])
        self.headers = http.client.HTTPMessage()
        for name, value in _FIELD.findall(_FOLD.sub(" ", head.decode("latin-1"))):
            self.headers[name] = value.strip(" \t")
        names = "Transfer-Encoding", "Content-Length", "Connection"
        self._frame(*(", ".join(self.headers.get_all(name, [])).lower() for name in names))

    def _frame(self, coding: str, length: str, connection: str) -> None:
        """Where the body ends (section 6.3), and whether that is sure enough for another answer to follow."""
        self.chunked, sized = coding == "chunked", _LENGTH.fullmatch(length)
        if coding not in ("", "identity", "chunked") or length and not (sized or self.chunked):
            raise http.client.HTTPException("its Transfer-Encoding or Content-Length is none that is known")
        self.length = int(sized[1]) if sized and not self.chunked else None
        sure = self.length is not None or self.chunked and not length and self.version == 11
        if self.status < 200 or self.status in (204, 304):
            # a 204 that tells of a body may send one; after a 101 it is another protocol
            sure = self.status >= 200 and not (self.chunked or self.length)
            self.length = 0
        stays = "close" not in connection and (self.version == 11 or "keep-alive" in connection)
        self.will_close = not (sure and stays)

    def read_some(self) -> bytes:
        """What has arrived of the body, b"" at its end; IncompleteRead if it was cut off."""
        if self.chunked and self.length is None:  # a 204 has the length 0, whatever it says of chunks
            return self._read_chunks()
        if self.length == 0:
            return b""
        part: bytes = self.fp.read1(65536)
        if self.length is not None:
            if not part:
                raise http.client.IncompleteRead(part)
            part, self.rest = part[: self.length], part[self.length :]
            self.length -= len(part)
        return part

    def _read_chunks(self) -> bytes:
        """The data of all chunks that arrived: http.client's one at a time doubles the CPU of a burst."""
        data = b""
        while not data and not self.ended:
            arrived = self.fp.read1(65536)
            if not arrived:
                raise http.client.IncompleteRead(arrived)
            arrived = self.rest + arrived
            place, parts = self.left, [arrived[: self.left]]
            while not self.ended and (head := _CHUNK_HEAD.match(arrived, place)):
                place = head.end() + int(head[1], 16)  # which may be beyond what arrived
                parts.append(arrived[head.end() : place])
                self.ended = place == head.end()
            data, self.rest, self.left = b"".join(parts), arrived[place:], max(0, place - len(arrived))
            if not self.ended and (len(self.rest) > 4096 or b"\n" in self.rest.lstrip(b"\r\n")):
                raise http.client.HTTPException("a chunk without a size")
        return data

    def read_all(self, body: bytearray, limit: int = _MAX_ANSWER, seconds: float = float("inf")) -> None:
        """Append the body to `body`, to its end or just over a limit; what came is there if this fails."""
        ends = time.monotonic() + seconds
        for part in iter(self.read_some, b""):
            body += part
            if len(body) > limit or time.monotonic() > ends:
                return

    def close(self) -> None:
        """Close it and its connection, if that was not given back."""
        super().close()
        if self.connection:
            self.connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection that judges addresses, and whose socket the request's line holds."""

    response_class = _Response
    idle_since = 0.0  # wall clock: the monotonic one stands still while a host is frozen

    def __init__(self, request: _Request, context: Optional[ssl.SSLContext], trusted: Iterable[str]) -> None:
        self.default_port = 443 if context else 80
        super().__init__(request.host, timeout=request.timeout)
        self.opened_by, self.context, self.process = request, context, os.getpid()
        self.route = request.type, request.host, request.place  # equal for all requests that it serves
        self.judged = request.guarded and not request.proxied and self.host.lower().rstrip(".") not in trusted

    def connect(self) -> None:
        request, line = self.opened_by, self.opened_by.line
        longest = min(_CONNECT_TIMEOUT, request.timeout or _CONNECT_TIMEOUT)
        self.sock = _dial(self.host, self.port, self.judged, line, longest)
        if self.context:
            parts = urllib.parse.urlsplit(request.full_url)
            self.sock.settimeout(longest)
            if request.proxied:
                self._ask_for_tunnel(request.place if parts.port else f"{request.place}:443")
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
            line.hold(self.sock)
            self.sock.do_handshake()
        self.sock.settimeout(self.timeout)
        line.connected = True

    def _ask_for_tunnel(self, place: str) -> None:
        """CONNECT through a proxy (RFC 9110, section 9.3.6)."""
        secret = self.opened_by.get_header("Proxy-authorization")
        secret = f"Proxy-Authorization: {secret}\r\n" if secret else ""
        self.sock.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{secret}\r\n".encode("latin-1"))
        # its buffer takes nothing of the origin's, which speaks second under TLS
        with _Response(self.sock, method="CONNECT") as answer:
            answer.begin()
            if answer.status != 200:
                reason = http.client.responses.get(answer.status, "")  # its own may repeat the password
                raise OSError(f"the proxy refused the tunnel: {answer.status} {reason}")

    def is_usable(self) -> bool:
        """Whether it is fresh, of this process and silent: an idle one only says that it ends."""
        if 0 <= time.time() - self.idle_since < _KEEP_SECONDS and self.process == os.getpid():
            try:
                self.sock.setblocking(False)
                self.sock.recv(1)
            except (BlockingIOError, ssl.SSLWantReadError):
                self.sock.settimeout(self.timeout)
                return True
            except OSError:
                pass  # closed meanwhile
        return False


def _dial(host: str, port: int, judged: bool, line: _Line, seconds: float) -> socket.socket:
    """A socket connected to the first address of the host that answers."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if judged:
        _judge_addresses(host, found)
    ends = time.monotonic() + seconds
    while found:
        family, kind, protocol, _, address = found.pop(0)
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)  # which fails on a host without this family
            line.hold(sock)
            sock.settimeout(max(0.1, (ends - time.monotonic()) / (len(found) + 1)))
            sock.connect(address)
            line.hold(sock)  # a hang-up while connecting looks like success
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            if not found or not isinstance(error, OSError) or line.hung_up.is_set():
                raise
    raise OSError(f"{host} has no address")


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs, keeps connections for the next request, and follows redirects."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, context: Optional[ssl.SSLContext], trusted: Tuple[str, ...]) -> None:
        super().__init__()
        self._context, self._trusted = context, trusted
        # No lock: a list's append and remove are atomic, and a lock that another thread holds at
        # a fork stays locked for ever.
        self.idle: List[_Connection] = []

    def close(self) -> None:
        with contextlib.suppress(IndexError):  # until there is none, whoever took it
            while True:
                self.idle.pop().close()

    def http_open(self, request: Any) -> _Response:
        if request.type != urllib.parse.urlsplit(request.full_url).scheme:
            raise _Refused("a proxy for http URLs must be an http URL itself")
        if request.guarded and request.proxied:
            # names are the proxy's to resolve; an address that is written out can be judged
            _judge_host(request.full_url, self._trusted, socket.AI_NUMERICHOST)
        if kept := self._kept(request):
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # closed while it lay idle
                return self._send(kept, request)
            request.was_sent = True
        if request.type == "https" and self._context is None:
            self._context = ssl.create_default_context()  # 20 ms: once, and only for https
        context = self._context if request.type == "https" else None
        return self._send(_Connection(request, context, self._trusted), request)

    def _kept(self, request: _Request) -> Optional[_Connection]:
        """An idle connection that serves the request; those that cannot be used any more are closed."""
        for connection in self.idle[::-1]:
            if request.keep and connection.route == (request.type, request.host, request.place):
                with contextlib.suppress(ValueError):  # another thread was faster
                    self.idle.remove(connection)
                    if connection.is_usable():
                        return connection
                    connection.close()
        return None

    def _send(self, connection: _Connection, request: _Request) -> _Response:
        headers = dict(request.header_items())
        if connection.context:
            headers.pop("Proxy-authorization", None)  # which the proxy of a tunnel alone may see
        if not request.keep:
            headers["Connection"] = "close"
        try:
            if connection.sock:
                request.line.hold(connection.sock)
            connection.request(request.get_method(), request.selector, request.data, headers)
            response = cast(_Response, connection.getresponse())
        except BaseException:
            connection.close()
            raise
        response.connection = connection
        return response

    def give_back(self, request: _Request, response: _Response) -> None:
        """Keep the connection of an answer that was read to its end."""
        connection = response.connection
        whole = response.rest == (b"\r\n" if response.ended else b"")  # no trailers, no further answer
        may_stay = request.keep and whole and len(self.idle) < _KEEP_CONNECTIONS
        if connection and connection.sock and may_stay:  # one that is to close has no socket any more
            # so that no hang-up reaches whoever uses it next, and no large body stays with it
            response.connection = request.line.socket = request.data = None
            response.close()
            connection.idle_since = time.time()
            self.idle.append(connection)

    def http_response(self, request: Any, response: _Response) -> Any:
        """urllib asks this of each answer: follows GET to the same origin, or for files to any."""
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        method, url = request.get_method(), request.full_url
        location = response.headers.get("Location", "").encode("latin-1").decode("utf-8", "replace")
        target = urllib.parse.urljoin(url, urllib.parse.quote(location, safe="/%!$&'()*+,;=:@~?#[]"))
        if not request.guarded and (method != "GET" or _origin(url) != _origin(target)):
            text = f"{request.place} redirects {method} elsewhere: check XPANDER_BASE_URL"
            raise ModuleException(response.status, text)
        if request.hops >= _MAX_REDIRECTS:
            raise ModuleException(response.status, f"redirected more than {_MAX_REDIRECTS} times")
        following = _Request("GET", _clean_url(target, "a redirect"), request.given, request.line)
        following.guarded, following.keep, following.hops = request.guarded, request.keep, request.hops + 1
        return self.parent.open(following, timeout=request.timeout)

    https_open, https_response = http_open, http_response


def _origin(url: str) -> Tuple[str, Optional[str], Optional[int]]:
    """RFC 6454, section 5: scheme, host and port."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _clean_url(url: str, name: str = "a file's URL") -> str:
    """A URL that can be sent: http or https, no user name, everything else percent-encoded."""
    if len(url) > 2048 and not url.isascii():  # normalising one takes time by the square of its length
        raise _Refused(f"{name} has more than 2048 characters, some of them not ASCII")
    parts = urllib.parse.urlsplit(url.strip())
    place = parts.netloc.lower() if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    if parts.scheme not in ("http", "https") or not _HOST_AND_PORT.fullmatch(place):  # IDNA makes "%", too
        raise _Refused(f"{name} must be an http or https URL with a host and without a user name")
    _ = parts.port  # raises ValueError for one that is no number
    rest = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    rest = urllib.parse.quote(rest, safe="/%!$&'()*+,;=:@~?")  # a path has no "?" of its own
    return f"{parts.scheme}://{place.rstrip(':')}{rest}"


class _Answer(NamedTuple):
    """What the platform said: a JSON value (None for an empty body), its text, and who said it."""

    value: Any
    text: bytes
    place: str

    def unexpected(self, wanted: str) -> ModuleException:
        got = f"{self.place} answered with {type(self.value).__name__}"
        return ModuleException(500, f"{got} where {wanted} was due", self.value)


class _Transport:
    """What a configuration keeps open: one opener, and in its handler the idle connections."""

    def __init__(self, configuration: Configuration, proxies: Optional[Dict[str, str]] = None) -> None:
        self.timeout, self.max_retries = configuration.timeout, configuration.max_retries
        self._key = configuration.api_key
        self._handler = _Handler(configuration.ssl_context, configuration.trusted_file_hosts)
        self.opener = urllib.request.OpenerDirector()  # the one place that opens connections
        self.opener.addheaders = [("User-Agent", f"xtask/{__version__}")]
        # ProxyHandler(None) goes by urllib's rules
        for handler in urllib.request.ProxyHandler(proxies), self._handler, urllib.request.UnknownHandler():
            self.opener.add_handler(handler)
        self.close = self._handler.close  # of the idle connections; whoever waits for an answer keeps his
        weakref.finalize(self, self.close)

    def request(self, method: str, url: str, headers: Mapping[str, str], line: _Line) -> _Request:
        """A request with the key: for the API and the events, never for files."""
        if not self._key:
            raise ModuleException(401, "No API key: set XPANDER_API_KEY or api_key", answered=False)
        return _Request(method, url, {"x-api-key": self._key, **headers}, line)

    def call(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] = {},
        line: Optional[_Line] = None,
    ) -> _Answer:
        """The JSON that answers a request, after further tries where those are safe."""
        line = line or _twins_line.get() or _Line()

        def once(failures: int) -> _Answer:
            request = self.request(method, url, {"Accept": "application/json", **headers}, line)
            request.keep = method != "POST"
            if body is not None:
                request.data = json.dumps(body, allow_nan=False).encode()
                request.add_header("Content-Type", "application/json")
            answer = bytearray()
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    response.read_all(answer)
                    if len(answer) > _MAX_ANSWER:
                        what = f"{request.place} answered with more than {_MAX_ANSWER // 2**20} MiB"
                        raise ModuleException(500, what)
                    self._handler.give_back(request, response)
            except _FAILURES as error:
                raise self.no_answer(request.place, error) from error
            if method == "DELETE" and response.status == 404 and (failures or request.was_sent):
                return _Answer(None, b"", request.place)  # the first try did it, its answer was lost
            return _Answer(self.judge(response, answer, request.place), bytes(answer), request.place)

        return self.persist(once, _AGAIN_POST if method == "POST" else _AGAIN, line)

    def persist(self, once: Callable[[int], _T], again: _Again, line: _Line, first: float = 0.5) -> _T:
        """What `once` gives, called with the number of failures so far; the pauses grow, jittered."""
        failures = 0  # in a row
        while True:
            try:
                return once(failures)
            except ModuleException as error:
                growing = min(30.0, first * 2.0 ** min(failures, 4) * _jitter(0.5, 1.0))
                pause = growing if error._retry_after is None else error._retry_after
                answered, cause = error.answered, error.__cause__
                fits = error.status_code in again[0] if answered else isinstance(cause, again[1])
                over = failures >= self.max_retries or line.hung_up.is_set()
                if not fits or over or pause > _MAX_RETRY_AFTER:
                    raise
            _wait(pause, line)  # here, so that a Ctrl-C is one plain traceback
            failures += 1

    def judge(self, response: _Response, body: bytearray, place: str) -> Any:
        """The JSON value of an answer (None for an empty one), or a ModuleException."""
        status, headers = response.status, response.headers
        broken: Optional[Exception] = None
        try:
            value = json.loads(body) if body.strip() else None
        except (ValueError, RecursionError) as error:
            value, broken = None, error
        if 200 <= status < 300 and not broken:
            return value
        html = "html" in headers.get("Content-Type", "").lower() or body.lstrip()[:1] == b"<"
        if 200 <= status < 300:
            what = "HTML" if html else "something"
            raise ModuleException(500, f"{place} answered with {what} that is not JSON") from broken
        text = self.hide(body[:2000].decode("utf-8", "replace")) if broken and not html else ""
        description = _mask(_describe(status, value, " ".join(text.split())[:200]))
        after = _retry_after(headers.get("Retry-After", ""))
        raise ModuleException(status, self.hide(description), value)._with(after)

    def no_answer(self, place: str, error: Exception) -> ModuleException:
        """The failure of a request that no server answered, or not to the end."""
        error.args = tuple(map(self.hide, error.args))  # which a traceback shows as the cause
        error.__context__ = None  # which it shows, too
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate is not trusted ({error.verify_message}): name the authority in " \
                "SSL_CERT_FILE or in Configuration(ssl_context=...)"
        elif isinstance(error, _TIMEOUTS):
            reason = "no answer in time; see Configuration(timeout=...)"
        elif isinstance(error, http.client.IncompleteRead):
            reason = "the answer was cut off"
        elif isinstance(error, (ValueError, http.client.InvalidURL)) and not isinstance(error, _Refused):
            reason = "the URL, of a redirect or a proxy, is none"  # which may hold a proxy's password
            error.args = (reason,)
        reason = " ".join(reason.split())[:300]
        return ModuleException(500, f"No answer from {place}: {reason}", answered=False)

    def hide(self, text: Any) -> Any:
        """The text without the key, which a server may have put there."""
        known = self._key and len(self._key) >= 4 and isinstance(text, str)
        return text.replace(self._key, "***") if known else text


def _describe(status: int, value: Any, plain: str) -> str:
    """What an error says in the forms that the platform and proxies use: JSON, plain text, nothing."""
    said = value if isinstance(value, dict) else {"detail": value}
    for text in map(said.get, ("detail", "message", "error")):
        if isinstance(text, str) and text.strip():
            return text.strip()
        if isinstance(text, list) and text and all(isinstance(item, dict) for item in text):
            places = [item.get("loc") for item in text]  # of a 422
            paths = [".".join(map(str, place)) if isinstance(place, list) else place for place in places]
            return "; ".join(f"{path}: {item.get('msg', 'invalid')}" for path, item in zip(paths, text))
    return plain or http.client.responses.get(status, "Unknown status")


def _retry_after(value: str) -> Optional[float]:
    """RFC 9110, section 10.2.3: seconds, or a date."""
    if re.fullmatch("[0-9]+", value.strip()):
        return float(value)  # of hundreds of digits: an infinity
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # it is no date
        moment = email.utils.parsedate_to_datetime(value)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() - time.time())
    return None


# ---- Server-sent events ------------------------------------------------------------------------------------


class ServerSentEvent(NamedTuple):
    """An event of a stream; `id` and `retry` (milliseconds) are the last seen so far."""

    event: str
    data: str
    id: str
    retry: Optional[int]

    def __repr__(self) -> str:
        return _repr(self, self._asdict())


def iter_sse(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """The events of a `text/event-stream` in chunks cut anywhere; ValueError for one of over 16 MiB.

    WHATWG HTML, section 9.2.6, "Interpreting an event stream". Does no I/O.
    """
    return itertools.chain.from_iterable(map(_Parser().feed, chunks))


class _Parser:
    """The state of a stream between two chunks."""

    def __init__(self, last_id: str = "", retry: Optional[int] = None) -> None:
        self.last_id, self.retry = last_id, retry
        self._bom = b"\xef\xbb\xbf"  # which only the first event may start with
        self._pending, self._size = bytearray(), 0  # of an event that is not whole: linear in any chunks
        self._ended_cr = False  # an LF that follows belongs to it

    def feed(self, chunk: bytes) -> Iterable[ServerSentEvent]:
        """The events that this chunk completes."""
        whole, arrived = b"", len(chunk)
        if self._ended_cr or b"\n" in chunk or b"\r" in chunk:  # others complete nothing
            if self._ended_cr and chunk[:1] == b"\n":  # a CRLF over two chunks counts once
                chunk, self._ended_cr = chunk[1:], False
            if chunk:
                self._ended_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            blank = chunk[:1] == b"\n" == self._pending[-1:]
            if blank or b"\n\n" in chunk:
                whole, _, chunk = b"".join([self._pending, chunk]).rpartition(b"\n\n")
                whole = whole.removeprefix(self._bom)
                self._pending, self._size, self._bom = bytearray(), 0, b""
                arrived = len(chunk)
        self._pending += chunk
        self._size += arrived
        return self._events(whole) if whole or self._size > _MAX_EVENT else ()

    def _events(self, whole: bytes) -> Iterator[ServerSentEvent]:
        sizes = map(len, whole.split(b"\n\n") if len(whole) > _MAX_EVENT else ())
        fitting = next((number for number, size in enumerate(sizes) if size > _MAX_EVENT), None)
        for block in whole.decode("utf-8", "replace").split("\n\n")[:fitting]:
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


# ---- Events ------------------------------------------------------------------------------------------------


class TaskUpdateEventType(_OpenEnum):
    """The type of an event. To add one, add a line; and below, its class, if its data is to be typed."""

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


_EVENT_RECORDS: Dict[str, Type[_Record]] = {
    "task_created": Task, "task_updated": Task, "task_finished": Task, "think": ToolCallRequest,
    "analyze": ToolCallRequest, "tool_call_request": ToolCallRequest, "tool_call_result": ToolCallResult,
}
_EVENT_TYPES = {kind.value: kind for kind in TaskUpdateEventType}  # calling the enum is far slower
_ENVELOPE = {"type", "task_id", "organization_id", "time", "data"}


@dataclass(repr=False)
class TaskUpdateEvent(_Record):
    """One event. `data` is a `Task`, a `ToolCallRequest`, a `ToolCallResult`, or the JSON that came.

    `raw` is the envelope as it came, with the same objects as `data` but for tasks; `task_id` may be that of
    a sub-agent's task.
    """

    type: TaskUpdateEventType
    task_id: Optional[str] = None
    organization_id: Optional[str] = None
    time: _Time = None
    data: Any = None
    raw: Dict[str, Any] = field(default_factory=dict, compare=False)
    extra: Dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], required: Mapping[str, Any] = {},
        configuration: Optional[Configuration] = None,
    ) -> TaskUpdateEvent:
        """The event of an envelope; `required` fills in what trimmed tasks leave out."""
        kind, body = data["type"], data.get("data")
        task_id, record = data.get("task_id") or required.get("id"), _EVENT_RECORDS.get(kind)
        if record and isinstance(body, dict):
            if record is Task:
                told = {**required, **({"id": task_id} if task_id else {}), **body}
                body = Task.from_dict(told, configuration)  # a copy, so that `raw` stays as it came
            elif isinstance(body.get("request_id"), str) and isinstance(body.get("operation_id"), str):
                body = record.from_dict(body)
        extra = {} if data.keys() <= _ENVELOPE else {k: v for k, v in data.items() if k not in _ENVELOPE}
        kind = _EVENT_TYPES.get(kind) or TaskUpdateEventType(kind)
        raw = data if isinstance(data, dict) else dict(data)
        event = cls(kind, task_id, data.get("organization_id"), _time(data.get("time")), body, raw, extra)
        event._wire = data
        return event


_decode = json.JSONDecoder().raw_decode  # json.loads takes a third longer


class _Stream:
    """One reader of a task's events: what it knows over all its connections."""

    def __init__(self, task: Task) -> None:
        if not task.events_streaming:
            raise ValueError("no events: create the task with events_streaming=True, or wait_finished()")
        self.task, self.configuration = task, task.configuration
        self.transport = self.configuration._transport
        self.line, self.parser = _Line(), _Parser()
        self.seen: Deque[int] = deque(maxlen=_REPLAY_WINDOW)  # hashes of data
        self.shook_hands = self.finished = False

    def batches(self) -> Generator[List[TaskUpdateEvent], None, None]:
        """The events, as many at a time as came together, until the task is over."""
        self.task_id, self.url = self.task.id, self.configuration._events_url(self.task)
        self.required = _plain({k: v for k, v in self.task._items().items() if k in _REQUIRED})
        self.patience = _FINAL_SILENCE if self.task.is_finished else float("inf")  # seconds without an event
        while True:
            yield []  # before each connection, so that `relay` sees that its loop is closed
            first = 0.5 if self.parser.retry is None else 2 * self._retry()
            response = self.transport.persist(self._open, _AGAIN_STREAM, self.line, first)
            if response:
                with response:
                    yield from self._read(response)
            if self.finished:
                return
            # An end proves nothing, however clean it looks: the status does.
            task = Task._ask(self.configuration, {"task_id": self.task_id}, line=self.line)
            if task.is_finished:
                yield [self._last(task)]
                return
            if response and response.status == 204:
                raise ModuleException(204, f"The server has no events, but the task is {task.status}")
            _wait(self._retry(), self.line)

    def _retry(self) -> float:
        """Seconds from a connection to the next one."""
        return min(max(500 if self.parser.retry is None else self.parser.retry, 100), 30_000) / 1000

    def _open(self, _: int) -> Optional[_Response]:
        """A 2xx answer; None where the server took the connection and said nothing, or hung up."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        last_id = self.parser.last_id.encode()  # UTF-8, as the standard has it
        if re.fullmatch(rb"[^\0-\x1f\x7f]{1,1024}", last_id):
            headers["Last-Event-ID"] = last_id.decode("latin-1")  # which is what http.client sends
        self.line.connected = False
        request = self.transport.request("GET", self.url, headers, self.line)
        try:
            idle_timeout = min(self.configuration.idle_timeout, self.patience)
            response: _Response = self.transport.opener.open(request, timeout=idle_timeout)
        except _FAILURES as error:
            if isinstance(error, _TIMEOUTS + _BROKEN) and self.line.connected:
                return None
            raise self.transport.no_answer(request.place, error) from error
        if not 200 <= response.status < 300:
            body = bytearray()
            with response, contextlib.suppress(*_FAILURES):
                if self.line.socket:
                    self.line.socket.settimeout(_REFUSAL_SECONDS)
                response.read_all(body, 65536, _REFUSAL_SECONDS)
            self.transport.judge(response, body, request.place)  # which raises
        return response

    def _read(self, response: _Response) -> Iterator[List[TaskUpdateEvent]]:
        """The events of one connection, until it ends in whatever way."""
        kind, status = response.headers.get_content_type(), response.status
        if status != 204 and (status, kind) != (200, "text/event-stream"):
            text = f"The stream's answer is {status} {kind}, not 200 text/event-stream"
            raise ModuleException(500, self.transport.hide(text))
        self.parser = _Parser(self.parser.last_id, self.parser.retry)
        self.replayed = set(self.seen)  # while what comes may be a repetition
        spoke = time.monotonic()
        try:
            for chunk in iter(response.read_some, b""):
                batch: List[TaskUpdateEvent] = []
                for event in filter(None, map(self._fresh, self.parser.feed(chunk))):
                    batch.append(event)
                    if isinstance(event.data, Task):  # each has a copy of the input, which may be large
                        yield batch
                        batch, spoke = [], time.monotonic()
                yield batch
                spoke = time.monotonic() if batch else spoke  # the consumer's own time is no silence
                if self.finished or time.monotonic() - spoke > self.patience:
                    return  # the second: nothing but comments
        except (OSError, http.client.HTTPException):
            pass  # cut off, or silent
        except ValueError as error:
            raise ModuleException(500, f"The stream sent {error}") from error

    def _fresh(self, message: ServerSentEvent) -> Optional[TaskUpdateEvent]:
        """The event of a message, if it is one and was not seen on an earlier connection."""
        mark = hash(message.data)
        event = None if mark in self.replayed or self.finished else self._event(message.data)
        if event is None or event.type == "connected" and self.shook_hands:  # each connection sends one
            return None
        if event.type == "connected":
            self.shook_hands = True
        else:
            self.replayed.clear()
            self.seen.append(mark)
        self.finished = event.type == "task_finished" and event.task_id == self.task_id
        return event

    def _event(self, data: str) -> Optional[TaskUpdateEvent]:
        try:
            data = data.strip(" \t\n\r")
            envelope, end = _decode(data)
            if end == len(data) and isinstance(envelope, dict) and isinstance(envelope.get("type"), str):
                return TaskUpdateEvent.from_dict(envelope, self.required, self.configuration)
        except (ValueError, RecursionError):
            pass
        _warn("skipped what is not an event: %d characters that are no envelope", len(data))
        return None

    def _last(self, task: Task) -> TaskUpdateEvent:
        """The last event, made from the task, where the stream did not bring it."""
        told, now = json.loads(task._told), datetime.now(timezone.utc).isoformat()
        data = {**self.required, **told}
        ids = {"task_id": self.task_id, "organization_id": data.get("organization_id")}
        ended = data.get("finished_at") or data.get("updated_at") or now
        event = TaskUpdateEvent.from_dict({"type": "task_finished", **ids, "time": ended})
        # nearly always the first: a copy costs 200 streams 6 % more CPU
        event.data = task if data.keys() == told.keys() else Task.from_dict(data, self.configuration)
        event.raw["data"] = data
        return event

    def relay(self, loop: Any, put: Callable[[Any], None], room: threading.Semaphore) -> None:
        """Put the batches into an event loop's queue, from a thread; None or an error is the last word."""
        last: Optional[BaseException] = None
        try:
            with contextlib.closing(self.batches()) as batches:
                for batch in batches:
                    if batch:
                        put(batch)
                        while not room.acquire(timeout=1.0) and not loop.is_closed():
                            pass
                    if loop.is_closed() or self.line.hung_up.is_set():
                        return
        except BaseException as error:  # raised again where the consumer is
            last = error
        with contextlib.suppress(RuntimeError):  # the loop was closed under the stream
            put(last)
        last = None  # its traceback holds this frame


def _bell(loop: Any) -> Callable[[Any, Any], None]:
    """Puts items into queues of a loop, from any thread, and wakes the loop once for what several have.

    To wake it for one by one costs 200 streams a tenth more CPU.
    """
    waiting: Deque[Tuple[Any, Any]] = deque()
    rung = threading.Lock()

    def deliver() -> None:
        rung.release()  # first: who found it held before knows that his item is delivered now
        while waiting:
            queue, item = waiting.popleft()
            queue.put_nowait(item)

    def put(queue: Any, item: Any) -> None:
        waiting.append((queue, item))
        if rung.acquire(blocking=False):
            loop.call_soon_threadsafe(deliver)

    return put


# One for each loop that has streams; weak, because a bell refers to its loop and would keep it for ever
_bells: weakref.WeakValueDictionary[Any, Callable[[Any, Any], None]] = weakref.WeakValueDictionary()


def _events(stream: _Stream) -> Generator[TaskUpdateEvent, None, None]:
    with contextlib.closing(stream.batches()) as batches:
        yield from itertools.chain.from_iterable(batches)


async def _aevents(stream: _Stream) -> AsyncGenerator[TaskUpdateEvent, None]:
    import asyncio

    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop, room = asyncio.get_running_loop(), threading.Semaphore(_RELAY_BATCHES)
    put = functools.partial(_bells.setdefault(loop, _bell(loop)), queue)
    thread = threading.Thread(target=stream.relay, args=(loop, put, room), daemon=True)
    thread.start()
    try:
        while batch := await queue.get():
            room.release()
            if isinstance(batch, BaseException):
                raise batch
            for event in batch:
                yield event
    finally:
        batch = None  # an error, whose traceback holds this frame
        for exponent in range(8):  # some 0.1 s: a thread inside a name look-up ends with it
            stream.line.hang_up()  # again: it may have been about to connect
            room.release()  # one too many harms nothing: the thread is at its end
            thread.join(0 if exponent else 0.005)  # nearly always enough, also for a loop that is closing
            if not thread.is_alive() or loop.is_closed():
                break
            await asyncio.sleep(0.0005 * 2**exponent)


# ---- Files: URLs that come from strangers ------------------------------------------------------------------

_IMAGES = ".jpg .jpeg .png .gif .bmp .tiff .webp .svg".split()
_READABLE = ".txt .csv .json .xml .html .htm .md .rst .yaml .yml".split() + \
    ".py .js .ts .java .c .cpp .h .cs .go .rb .php .sh".split()
# the text encodings among Python's codecs, which has others: zip, rot13, unicode_escape
_CHARSET = re.compile(
    r"(?i)utf.*|u8|(us-)?ascii|(iso[-_]?)?8859.*|iso-ir.*|latin[-_]?\d|windows.*|cp\d+|koi8.*"
    r"|gb.*|hz.*|big5.*|shift.*|s?jis.*|euc.*|iso[-_]?2022.*|ks_c.*|tis.?620"
)
_Got = Union[Tuple[bytes, Optional[str]], Exception]  # a file's content and charset, or why there is none


def _extension(url: str) -> str:
    """The extension of the URL's path, lower-cased; "" where there is none."""
    start, scheme, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    return os.path.splitext(rest.partition("/")[2] if scheme else start)[1].lower()


def _judge_addresses(host: str, found: Iterable[Tuple[Any, ...]]) -> None:
    """Refuse a host of which any address, as getaddrinfo gives them, is not public."""
    import ipaddress

    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):  # the IPv4 one in it: RFC 4291 2.5.5.2, 3056 2, 6052 2.1
            nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
            ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(ip.packed[12:]) if nat64 else ip)
        if ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False) or not ip.is_global:
            raise _Refused(f"the address of {host} is not public; see Configuration.trusted_file_hosts")


def _judge_host(url: str, trusted: Iterable[str], flags: int = 0) -> None:
    """Refuse a URL whose host is not trusted and has an address that is not public."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    local = f".{host}".endswith(".localhost")  # RFC 6761, section 6.3
    if host not in trusted:
        with contextlib.suppress(socket.gaierror):  # no address to refuse
            _judge_addresses(host, socket.getaddrinfo("127.0.0.1" if local else host, None, flags=flags))


def _may_fetch(configuration: Configuration, url: str) -> bool:
    """Whether our rules let somebody else fetch the URL; a warning says why not."""
    try:
        _judge_host(_clean_url(url), configuration.trusted_file_hosts)
        return True
    except ValueError as error:
        _warn("a file was left out: %s", error if isinstance(error, _Refused) else "its URL is none")
        return False


def _fetch_files(configuration: Configuration, urls: List[str]) -> List[_Got]:
    """The content of each URL, or why there is none, in order and in time."""
    work = _FileWork(configuration, urls)
    lines = [_Line() for _ in urls[:_FILE_THREADS]]
    threads = [threading.Thread(target=work.run, args=(line,), daemon=True) for line in lines]
    ends, caller = time.monotonic() + configuration.timeout, _twins_line.get() or _Line()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not caller.hung_up.is_set() and time.monotonic() < ends:
                thread.join(min(0.1, ends - time.monotonic()))
    finally:
        work.todo.clear()
        for line in lines:
            line.hang_up()
    for thread in threads:
        thread.join(0.1)  # one inside a name look-up ends with it
    return list(work.results)


class _FileWork:
    """What the threads of one call share."""

    def __init__(self, configuration: Configuration, urls: List[str]) -> None:
        self.transport, self.lock = configuration._transport, threading.Lock()
        self.todo, self.held = deque(enumerate(urls)), [0] * len(urls)  # bytes of each file
        self.results: List[_Got] = [TimeoutError("not fetched in time") for _ in urls]

    def run(self, line: _Line) -> None:
        with contextlib.suppress(IndexError):  # nothing is left to do
            while True:
                number, url = self.todo.popleft()
                try:
                    self.results[number] = self.fetch(number, url, line)
                except Exception as error:  # whatever strangers' bytes bring about, it is about one file
                    self.results[number], self.held[number] = error, 0
                    if isinstance(error, _Refused):
                        _warn("a file was left out: %s", error)

    def fetch(self, number: int, url: str, line: _Line) -> Tuple[bytes, Optional[str]]:
        request, content = _Request("GET", _clean_url(url), {"Accept": "*/*"}, line), bytearray()
        request.guarded = True
        with self.transport.opener.open(request, timeout=self.transport.timeout) as response:
            if response.status != 200:
                raise ModuleException(response.status, "the server has no such file")
            for part in iter(response.read_some, b""):
                with self.lock:  # so that of several files the one that is too much fails alone
                    content += part
                    self.held[number] = len(content)
                    if len(content) > _MAX_FILE or sum(self.held) > _MAX_FILES:
                        self.held[number] = 0
                        raise ModuleException(413, "the file is too large")
            if line.hung_up.is_set():  # our own hang-up looks like the end of a file without a length
                raise http.client.IncompleteRead(b"")
            kind = response.headers.get("Content-Type", "")
            said = re.search(r'(?i);\s*charset\s*=[\s"]*([^\s;"]{1,40})', kind)
            return bytes(content), said and said[1]


def _text_of(got: _Got) -> str:
    """A file's text, or an error that tells whoever typed the URL nothing about this network."""
    if isinstance(got, ModuleException) and got.answered:
        return f"Error: {got.description}"
    if isinstance(got, Exception):
        return "Error: the file could not be fetched"
    content, charset = got
    with contextlib.suppress(LookupError, ValueError):  # ValueError: a NUL in the name
        if charset and _CHARSET.fullmatch(charset):
            return content.decode(charset, "replace")
    return content.decode("utf-8", "replace")


def _agno_pdf(configuration: Configuration, file_class: Any, url: str, got: _Got) -> Any:
    """agno's File: with the bytes, or with the URL where there are none and agno may fetch it."""
    if isinstance(got, Exception) or not got[0]:
        allowed = not isinstance(got, _Refused) and _may_fetch(configuration, url)
        return file_class(url=url) if allowed else None
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w. ()+,-]", "_", name)[-255:]
    return file_class(content=got[0], filename=name, mime_type="application/pdf")


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
    call = {"request_id": "r2", "operation_id": "find", "tool_name": "search", "payload": {"query": about}}
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

        now, asked = _local_time(), {"text": None, "files": None, "user": None, **(given.get("input") or {})}
        super().__init__({"id": str(uuid.uuid4()), "result": None, **given, "input": asked})
        self.update(agent_id=agent_id, organization_id="local-org", status="pending", created_at=now)
        self.update(updated_at=now, parent_execution=self.pop("parent_execution_id", None))
        # what a list tells of it, and is asked for
        self.update(parent_task_id=self["parent_execution"], user_id=(asked["user"] or {}).get("id"))
        self.log = {"id": self["id"], "created_at": now, "messages": [], "user": asked["user"]}
        self.events: List[bytes] = []  # as they go over the wire
        self.over, self.changed = False, threading.Condition(lock)  # its own, to wake its own readers only

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
            events = agent(_plain(self))
            try:
                kind, data = next(events)
                while self.emit(kind, data):
                    kind, data = next(events)
            except StopIteration as end:
                result = end.value if isinstance(end.value, (str, type(None))) else json.dumps(end.value)
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
        from socketserver import ThreadingTCPServer  # HTTPServer asks the name service for the host's name

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
        self.configuration.__dict__["_transport"] = _Transport(self.configuration, proxies={})
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
            "PATCH /agent-execution/([^/]+)/update": lambda name: self.tasks[name].change(body, late=True),
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
        return [{name: task.get(name) for name in TasksListItem._plan()[0]} for task in found]


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
_LEFT_BY: Dict[type, str] = {  # entries of a log that are the data of an event, and are told as it is
    AgentActivityThreadToolCall: "tool_call_result", AgentActivityThreadAuth: "auth_event",
    AgentActivityThreadSubAgentTrigger: "sub_agent_trigger",
}


def _text(value: Any) -> str:
    """A value as text that neither steers a terminal nor fails to be encoded for standard output."""
    text = value if isinstance(value, str) else json.dumps(_mask(value), ensure_ascii=False)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _one_line(value: Any) -> str:
    """A value for people, on one line and without secrets."""
    return " ".join(_text(_mask(value)).split())


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
    uncut = known.get("text") if kind == "agent" else known.get("url") if kind == "auth_event" else None
    return _cut(f"{_clock(when)}  {label:<10} {told}".rstrip()) + (f"\n{_text(uncut)}\n" if uncut else "\n")


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
            print(json.dumps(told.raw if isinstance(told, TaskUpdateEvent) else told.to_dict()), flush=True)
        elif isinstance(told, AgentActivityThread):
            for entry in told.messages if isinstance(told.messages, list) else []:
                kind = _LEFT_BY.get(type(entry)) or getattr(entry, "role", getattr(entry, "type", "other"))
                self.write(_tell(getattr(entry, "created_at", None), str(kind), _plain(entry)))
        elif isinstance(told, TasksListItem):
            facts = _clock(told.created_at, "%Y-%m-%d %H:%M"), told.status or "", told.id, told.title or ""
            self.write(_cut("{:<16}  {:<10}  {}  {}".format(*map(_one_line, facts)).rstrip()) + "\n")
        elif isinstance(told, Task):
            for name, value in _mask(told.to_dict()).items():
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
            self.write(f"{_clock(task.created_at)}  task       {_one_line(task.id)}\n")  # to watch it again
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
        self.write(_tell(task.finished_at, str(task.status), "after " + _span(task, task.finished_at)))
        result = "" if task.result is None else _text(task.result)
        if result.strip() not in ("", "".join(self.answer).strip()):  # not shown yet
            self.write(f"\n{result}\n")
        if task.status != "completed":
            raise RuntimeError(f"the task ended as {task.status}")

    def tick(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the output is closed: the main thread will see
            while not self.left.wait(1):
                self.write("")


def _obey(command: str, words: List[str], files: List[str], as_json: bool) -> None:
    screen = _Screen(as_json)
    if command == "demo":
        with LocalPlatform() as platform:
            prompt, configuration = "What can this file do?", platform.configuration
            task = Task.create("demo-agent", prompt, configuration=configuration, events_streaming=True)
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
    options, files = [name for name, _ in found], [value for name, value in found if name == "--file"]
    if "--version" in options:
        # what imported it reads it, also out of a zip file
        loader: Any = __spec__.loader if __spec__ else importlib.machinery.SourceFileLoader("xtask", __file__)
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
        unset = isinstance(error, ModuleException) and not error.answered and error.status_code < 500
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
