"""Tests of xtask.py: real HTTP on 127.0.0.1, with nothing of the module replaced but its clock.

A book with chapters in the order of xtask.py: first the servers and helpers that several chapters
use, then the form of the file, records, the parser, calls, saving, events, leaving, transport,
files, the local platform, the terminal, and the README. The README says how to run them all; some
of them: `python -m pytest -k "part of a name"`. XTASK_UNDER_TEST in the environment names another
copy of the library to test (one that was cut at its line, say); the local platform always comes
from the whole file.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pickle
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import types
import typing
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

# ---- Servers and helpers -------------------------------------------------------------------------
# The module under test, servers that follow a script, and small helpers of several chapters.

HERE = Path(__file__).resolve().parent
FILE = HERE / "xtask.py"


def load_module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


whole = load_module(FILE, "xtask")
UNDER_TEST = os.environ.get("XTASK_UNDER_TEST")
xtask = load_module(UNDER_TEST, "xtask_cut") if UNDER_TEST else whole
needs_whole_file = pytest.mark.skipif(bool(UNDER_TEST), reason="about what is below the line")
needs_cpython = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="memory, and objects that are collected at once"
)

KEY = "secret-key-0123456789"
ORG = "org-1"
MIB = 2**20


@pytest.fixture(scope="session", autouse=True)
def clean_process():
    """No setting or proxy from outside; garbage collections skip what the imports made."""
    if hasattr(gc, "freeze"):  # CPython's
        gc.freeze()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in list(os.environ):
            if re.match("XPANDER_|IS_STG$|.*_PROXY$", name.upper()):
                monkeypatch.delenv(name)
        yield


@pytest.fixture
def platform():
    """The local platform with its built-in agent; other agents: `with local(agent) as platform`."""
    with local() as running:
        yield running


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 and localhost: its `file`, and the `context` of a server."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    file, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    )
    files = ["-keyout", key, "-out", file]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return types.SimpleNamespace(file=file, context=context)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that the library makes: recorded, not waited for."""
    recorded = []
    monkeypatch.setattr(xtask, "_wait", lambda seconds, scope=None: recorded.append(seconds))
    return recorded


@pytest.fixture
def no_agno(monkeypatch):
    monkeypatch.setitem(sys.modules, "agno", None)
    monkeypatch.setitem(sys.modules, "agno.media", None)


@contextlib.contextmanager
def local(agent=None, **options):
    """A local platform, and `platform.config`: a configuration of the module under test for it."""
    with whole.LocalPlatform(agent) as running:
        options.setdefault("api_key", running.environ["XPANDER_API_KEY"])
        options.setdefault("organization_id", running.environ["XPANDER_ORGANIZATION_ID"])
        running.config = configuration(running.url, **options)
        with running.config:
            yield running


def configuration(url, **options):
    return xtask.Configuration(base_url=url, **{"api_key": KEY, "organization_id": ORG, **options})


@contextlib.contextmanager
def refusing(**options):
    """A configuration whose connections are refused: its port is bound, so nobody else gets it."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        with configuration(f"http://127.0.0.1:{deaf.getsockname()[1]}", **options) as config:
            yield config


class RawServer:
    """Raw sockets on 127.0.0.1: each connection is handled by `script(connection, number)`.

    A script is a plain function over a `RawConnection`; `requests` is what arrived, in order:
    (method, path, headers with lower-case names, body bytes). `connections` counts what was
    accepted, `closed` holds the numbers of the connections that the client closed.
    """

    def __init__(self, script, context=None):
        self.script, self.context = script, context
        self.requests, self.connections, self.open = [], 0, set()
        self.closed = queue.Queue()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        self.config = configuration(self.url, timeout=10)
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.config.close()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.open.add(sock)
            arguments = sock, self.connections
            self.threads.append(threading.Thread(target=self.serve, args=arguments, daemon=True))
            self.threads[-1].start()

    def serve(self, sock, number):
        raw = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each part is sent at once
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
                self.open.discard(raw)
                self.open.add(sock)
            self.script(RawConnection(self, sock, number), number)
        except OSError:
            pass
        finally:
            self.open.discard(sock)
            sock.close()
            raw.close()


class RawConnection:
    def __init__(self, server, sock, number):
        self.server, self.sock, self.number, self.buffer = server, sock, number, b""

    def request(self):
        """The next request, or None when the client closed the connection."""
        while b"\r\n\r\n" not in self.buffer:
            data = b""
            with contextlib.suppress(ConnectionResetError):  # which ends it as well
                data = self.sock.recv(65536)
            if not data:
                self.server.closed.put(self.number)
                return None
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        while len(self.buffer) < length:
            self.buffer += self.sock.recv(65536)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.server.requests.append((method, path, headers, body))
        return method, path, headers, body

    def answer(self, status=200, body=b"", headers=(), reason="X"):
        """A whole response with its Content-Length; a dict or a list is sent as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = [("Content-Type", "application/json"), *headers]
        head = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in headers]
        self.sock.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)

    def start_stream(self):
        """The head of an event stream that ends with its connection."""
        self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")

    def send(self, data):
        self.sock.sendall(data if isinstance(data, bytes) else data.encode())

    def event(self, type, data=None, task_id="t-1", id=None):
        head = f"id: {id}\n" if id is not None else ""
        envelope = {"type": type, "task_id": task_id, "organization_id": ORG, "data": data}
        self.send(f"{head}data: {json.dumps({**envelope, 'time': '2026-03-02T09:15:01Z'})}\n\n")

    def wait_closed(self):
        """Block until the client closes the connection, and record it."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.server.closed.put(self.number)

    def reset(self):
        """End the connection with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


def task_dict(**changes):
    """A task as a server sends it: the fields that every task has, and those given."""
    return {
        "id": "t-1",
        "agent_id": "a-1",
        "organization_id": ORG,
        "input": {"text": "Hi", "files": []},
        "created_at": "2025-11-06T06:41:54.048626Z",
        "status": "executing",
        "events_streaming": True,
        **changes,
    }


def make_task(config, **changes):
    return xtask.Task.from_dict(task_dict(**changes), config)


def everything_told(error):
    """What a person can get to see of an exception."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join([*lines, repr(error), str(error)])


def run_python(code, *arguments, python=sys.executable, flags=(), env=None, **options):
    """Run code in a Python process of its own, with the file under test on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(UNDER_TEST or FILE).parent)
    options = {"capture_output": True, "text": True, "timeout": 30, **options}
    command = [python, *flags, "-c", code, *arguments]
    return subprocess.run(command, env={**environment, **(env or {})}, **options)


def at_once(call, *cases):
    """The results of the call for each case, all at the same time: for calls that wait."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(call, cases))


def sse(type, data=None, id=None, task_id="t-1"):
    """One event of a stream, as text."""
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}data: {json.dumps({'type': type, 'task_id': task_id, 'data': data})}\n\n"


FINISHED = sse("task_finished", task_dict(status="completed", result="4"))


def plays(*parts, then=lambda connection: None):
    """A script that starts a stream and sends these parts; `then` may hold the connection open."""

    def script(connection):
        connection.start_stream()
        for part in parts:
            connection.send(part)
        then(connection)

    return script


def repeats(text):
    def script(connection):
        while True:  # until the client leaves
            connection.send(text)
            time.sleep(0.02)

    return script


def answers(status, body=b"", headers=()):
    return lambda connection: connection.answer(status, body, headers)


silent = RawConnection.wait_closed


@contextlib.contextmanager
def feed(*scripts, context=None, **options):
    """A server of the task t-1: its n-th connection for events runs the n-th script, or the last.

    `streams` holds the headers of the requests for events; all others get `status` and `task`.
    """

    def script(connection, _):
        for _, path, headers, _ in iter(connection.request, None):
            if path.endswith("/events"):
                server.streams.append(headers)
                return scripts[min(len(server.streams), len(scripts)) - 1](connection)
            connection.answer(server.status, server.task)

    with RawServer(script, context) as server:
        server.streams, server.status, server.task = [], 200, task_dict()
        server.config = configuration(server.url, **{"idle_timeout": 10, **options})
        yield server


def follow(server, face="sync", each=lambda event: None, **changes):
    """All events of the server's task, sync or async; `each` sees one as soon as it arrives."""
    task = make_task(server.config, **changes)
    before, events = task.to_dict(), []

    def take(event):
        events.append(event)
        each(event)

    async def take_all():
        async for event in task.aevents():
            take(event)

    if face == "async":
        asyncio.run(take_all())
    else:
        for event in task.events():
            take(event)
    assert task.to_dict() == before  # watching does not change it
    assert events[-1].type == "task_finished"
    return events


def chunks(events):
    return [event.data for event in events if event.type == "chunk"]


# ---- Form ----------------------------------------------------------------------------------------
# The file as a whole: that it works alone, wherever it is copied; its two parts, names and twins.

LIBRARY = Path(UNDER_TEST or FILE)
PUBLIC = re.findall(
    r"\w+",
    """
AgentActivityThread AgentActivityThreadAuth AgentActivityThreadMessage
AgentActivityThreadMessageContent AgentActivityThreadOtherEntry AgentActivityThreadReasoning
AgentActivityThreadReasoningType AgentActivityThreadSubAgentTrigger AgentActivityThreadToolCall
AgentExecutionInput AgentExecutionStatus Configuration ModuleException OutputFormat
ServerSentEvent Task TaskUpdateEvent TaskUpdateEventType TasksListItem ToolCallRequest
ToolCallRequestReasoning ToolCallResult User iter_sse""",
)
CALLS_OF = {
    "Task": "load create list save set_status stop reload wait_finished events get_activity_log "
    "get_files get_images get_human_readable_files to_message",
    "TasksListItem": "load",
}
# Arguments: the folder or archive of the copy, the name to import, the URL of a local platform.
LIFE = """
import importlib, sys
folder, name, url = sys.argv[1:]
sys.path.insert(0, folder)
module = importlib.import_module(name)
with module.Configuration("local-key", "local-org", url) as config:
    task = module.Task.create("agent", "2+2?", configuration=config, events_streaming=True)
    print([str(event.type) for event in task.events()][-1])
    task.title = "Sums"
    print(task.save().title, task.reload().result, len(task.get_activity_log().messages))
    try:
        module.Task.load("none", config)
    except module.ModuleException as error:
        print(error)
"""
STATE = """
import os, signal, socket, sys, threading, urllib.request, warnings
def state():
    return (socket.getdefaulttimeout(), urllib.request._opener, list(warnings.filters),
            sys.excepthook, threading.excepthook, sys.getrecursionlimit(), dict(os.environ),
            sys.getswitchinterval(), signal.getsignal(signal.SIGINT), os.getcwd(),
            [thread.name for thread in threading.enumerate()])
before = state()
"""
STATE_AFTER = """
sys.path.remove(folder)
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
logging = sys.modules.get("logging")
assert not logging or not logging.getLogger().handlers
"""
TWO_COPIES = """
import pickle, sys
sys.path[:0] = sys.argv[1:3]
import xtask
from app._vendor import xtask as vendored
made = []
for module in (xtask, vendored):
    config = module.Configuration("local-key", "local-org", sys.argv[3])
    made.append(module.Task.create("a", "2+2?", configuration=config, events_streaming=True))
for module, task in zip((xtask, vendored), made):
    assert type(pickle.loads(pickle.dumps(task))) is module.Task
    assert {type(event) for event in task.events()} == {module.TaskUpdateEvent}
    try:
        module.Task.load("none", task.configuration)
    except module.ModuleException:
        task.configuration.close()
assert xtask.Task is not vendored.Task
"""


def four(task):
    """An agent that answers at once."""
    yield "chunk", "4"
    return "4"


def halves():
    """The text above the line, and the text from the line on."""
    above, line, below = FILE.read_text("utf-8").partition("\n# cut here")
    assert line and "\n# cut here" not in below
    return above + "\n", below


def copy_to(folder, kind):
    """What to put on the path, and the name to import, for a copy of that kind."""
    text = halves()[0] if kind == "cut" else LIBRARY.read_text("utf-8")
    name = {"file": "xtask", "cut": "xtask"}.get(kind, "app._vendor.xtask")
    target = folder.joinpath(*name.split(".")).with_suffix(".py")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, "utf-8")
    for parent in list(target.parents)[: name.count(".")]:
        (parent / "__init__.py").touch()
    if kind == "zip":
        return shutil.make_archive(str(folder.parent / "copies"), "zip", folder), name
    return str(folder), name


# fmt: off
COPIES = [  # the kind of a copy, and the interpreter's flags
    ("file",    "-I -S -W error"),
    ("file",    "-O"),
    ("file",    "-OO"),
    ("package", "-I -W error"),
    ("zip",     "-I -W error"),
    ("cut",     "-I -S -W error"),
]
# fmt: on


@pytest.mark.parametrize("kind, flags", COPIES)
def test_a_copy_alone_does_all_that_a_task_needs(kind, flags, tmp_path):
    path, name = copy_to(tmp_path / "copy", kind)
    before = sorted((tmp_path / "copy").rglob("*"))
    with local(four) as platform:
        done = run_python(LIFE, path, name, platform.url, flags=["-B", *flags.split()])
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == ["task_finished", "Sums 4 2", "[404] Task not found"]
    assert sorted((tmp_path / "copy").rglob("*")) == before, "it writes no file"


def test_two_copies_work_in_one_process(tmp_path):
    paths = [copy_to(tmp_path / kind, kind)[0] for kind in ("file", "package")]
    with local(four) as platform:
        done = run_python(TWO_COPIES, *paths, platform.url, flags=["-W", "error"])
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_tasks_whole_life_leaves_the_interpreter_as_it_was():
    with local(four) as platform:
        code = STATE + LIFE + STATE_AFTER
        done = run_python(code, str(LIBRARY.parent), LIBRARY.stem, platform.url)
    assert (done.stderr, done.returncode) == ("", 0)


def test_the_import_loads_only_what_every_program_needs():
    code = "import sys; old = set(sys.modules); import xtask; print(*set(sys.modules) - old)"
    loaded = run_python(code, flags=["-S"]).stdout.split()
    assert "json" in loaded
    heavy = re.findall(r"[\w.]+", "asyncio argparse http.server concurrent.futures logging")
    assert [name for name in heavy if name in loaded] == []


def test_the_head_names_the_version_and_the_licence():
    text = LIBRARY.read_text("utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT-0\n")
    [version] = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', text[:4000], re.M)
    assert version == xtask.__version__ and "update" in xtask.__doc__
    project = HERE / "pyproject.toml"  # a copied pair of files may be without it
    assert not project.exists() or 'license = "MIT-0"' in project.read_text("utf-8")


def defined_names(text):
    """The names that a module's own statements define, imports aside."""
    table = {
        node for node in ast.parse(text).body if not isinstance(node, (ast.Import, ast.ImportFrom))
    }
    bound = [
        t for node in table for t in getattr(node, "targets", [getattr(node, "target", None)]) if t
    ]
    stored = {
        name.id for target in bound for name in ast.walk(target) if isinstance(name, ast.Name)
    }
    return stored | {node.name for node in table if hasattr(node, "name")}


def test_all_other_names_than_the_public_ones_start_with_an_underscore():
    expected = PUBLIC + ([] if UNDER_TEST else ["LocalPlatform", "main"])
    assert sorted(xtask.__all__) == sorted(expected)
    assert all(hasattr(xtask, name) for name in expected)
    names = defined_names(LIBRARY.read_text("utf-8")) - set(expected)
    assert [name for name in names if not name.startswith("_")] == []


def test_nothing_above_the_line_names_anything_below_it():
    above, below = halves()
    used = {node.id for node in ast.walk(ast.parse(above)) if isinstance(node, ast.Name)}
    below_alone = defined_names(below.partition("\n")[2]) - {"__all__"}
    assert below_alone >= {"LocalPlatform", "main"} and not below_alone & used
    assert not re.search(r"\b(LocalPlatform|argparse|http\.server)\b", above)


def test_the_file_does_not_import_itself_or_use_private_parts_of_the_standard_library():
    tree = ast.parse(LIBRARY.read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {
        getattr(node, "module", None) or alias.name for node in imports for alias in node.names
    }
    assert "json" in modules and not [name for name in modules if re.match("xtask|_(?!_)", name)]
    names = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
            root = ast.dump(node.value).rpartition("Name(id='")[2].partition("'")[0]
            assert isinstance(node.value, ast.Call) or root not in names, f"{root}.{node.attr}"


@pytest.mark.parametrize("owner", CALLS_OF)
def test_every_call_has_an_async_twin_with_the_same_arguments_and_one_line_of_docstring(owner):
    cls, names = getattr(xtask, owner), CALLS_OF[owner].split()
    public = {
        name for name, value in vars(cls).items() if name[0] != "_" and callable(getattr(cls, name))
    }
    public -= {"from_dict", "to_dict"} | {
        name for name in public if inspect.isclass(getattr(cls, name))
    }
    assert public == {*names, *("a" + name for name in names)}
    for name in names:
        call, twin = getattr(cls, name), getattr(cls, "a" + name)
        assert inspect.iscoroutinefunction(twin) == (
            name != "events"
        ) and not inspect.iscoroutinefunction(call)
        assert inspect.signature(call).parameters == inspect.signature(twin).parameters, name
        assert inspect.ismethod(call) == inspect.ismethod(twin), name
        assert call.__doc__ and "\n" not in twin.__doc__ and f"`{name}`" in twin.__doc__, name


def test_type_hints_resolve_everywhere_although_a_method_is_called_list():
    for value in map(xtask.__dict__.get, PUBLIC):
        members = vars(value).values() if inspect.isclass(value) else [value]
        for member in [value, *members]:
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if getattr(member, "__module__", None) == xtask.__name__ and callable(member):
                typing.get_type_hints(member)
    hints = typing.get_type_hints(xtask.Task)
    assert hints["sub_executions"] == typing.Optional[list[str]]


# ---- Records -------------------------------------------------------------------------------------
# Enums, date-times, records and what is newer than they are, events and activity logs as values,
# configurations and errors as values, and what no `repr` shows.

RECORDS = [
    *(name for name in PUBLIC if re.match("ToolCall|Agent(Activity.*[^e]$|ExecutionInput)", name)),
    *("AgentActivityThreadMessage", "Task", "TaskUpdateEvent", "TasksListItem", "User"),
]
TEXT_FIELDS = re.findall(
    r"\w+",
    """
internal_status result title source additional_context expected_output last_executed_node_id
agent_version parent_execution triggering_agent_id worker_id think_mode llm_model_provider
llm_model_name llm_reasoning_effort conversation_id instructions_override""",
)
TIME_FIELDS = re.findall(r"\w+", "created_at updated_at started_at paused_at finished_at")
FLAGS = re.findall(
    r"\w+",
    """
is_manually_stopped events_streaming used_mutating_tools is_continuous
disable_attachment_injection""",
)
OBJECTS = re.findall(
    r"\w+", "payload_extension output_schema hitl_request pending_eca_request tokens deep_planning"
)
LISTS = re.findall(r"\w+", "sub_executions finished_sub_executions mcp_servers")
STATUSES = re.findall(
    r"\w+", "pending executing paused error failed completed stopped queued running cancelled"
)
TEXTS = ["", "x", "naïve \u2014 \u2028\U0001f600", "null", "2025-11-06T06:41:54Z", "a\nb", "\0"]


def exact(value):
    """JSON text, which unlike == tells True from 1 and 1 from 1.0."""
    return json.dumps(value, sort_keys=True)


def utc(*numbers):
    return datetime(*numbers, tzinfo=timezone.utc)


def duplicates(record):
    return [copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))]


# -- enums and date-times


def camel(values):
    return " ".join(f"{value.title().replace('_', '')}={value}" for value in values.split())


EVENT_TYPES = """
connected task_created task_updated task_finished chunk tool_call_request tool_call_result think
analyze sub_agent_trigger auth_event plan_updated task_compactization context_status
agent_gateway_decision process_state_changed process_update gateway_steer_applied
ask_user_questions sub_task_created sub_task_updated sub_task_finished invite_member member_invited
ask_for_secret secret_saved live_surface_created inline_card"""
ENUMS = {
    "AgentExecutionStatus": camel(" ".join(STATUSES[:7])),
    "OutputFormat": camel("text markdown json html voice"),
    "TaskUpdateEventType": camel(EVENT_TYPES),
    "AgentActivityThreadReasoningType": camel("think analyze"),
}


@pytest.mark.parametrize("name", ENUMS)
def test_an_enum_is_text_and_takes_a_value_newer_than_itself(name):
    enum = getattr(xtask, name)
    members = dict(pair.split("=") for pair in ENUMS[name].split())
    assert {member.name: member.value for member in enum} == members
    newer = enum("newer-than-this")
    for member in (*enum, newer):
        value = member.value
        assert type(value) is str and member == value and hash(member) == hash(value)
        assert (
            f"{member} {member:>20}" == f"{value} {value:>20}"
            and str(member) == "%s" % member == value
        )
        assert json.dumps(member) == json.dumps(value) and enum(value) == member
        assert all(twin == member and type(twin) is enum for twin in duplicates(member))
    assert newer not in list(enum) and "newer" in repr(newer)
    with pytest.raises(ValueError):
        enum(5)


def test_in_progress_is_an_alias_of_executing():
    assert xtask.AgentExecutionStatus.InProgress is xtask.AgentExecutionStatus.Executing


# fmt: off
DATE_TIMES = [  # as a server spells it, and as `isoformat` does in UTC
    ("2025-11-06T06:41:54Z",                "2025-11-06T06:41:54+00:00"),
    ("2025-11-06T06:41:54",                 "2025-11-06T06:41:54+00:00"),
    ("2025-11-06t06:41:54z",                "2025-11-06T06:41:54+00:00"),
    ("2025-11-06 06:41:54Z",                "2025-11-06T06:41:54+00:00"),
    ("2025-11-06T08:41:54+02:00",           "2025-11-06T06:41:54+00:00"),
    ("2025-11-05T22:11:54.5-08:30",         "2025-11-06T06:41:54.500000+00:00"),
    ("2025-11-06T06:41:54.1Z",              "2025-11-06T06:41:54.100000+00:00"),
    ("2025-11-06T06:41:54.04862Z",          "2025-11-06T06:41:54.048620+00:00"),
    ("2025-11-06T06:41:54.048626Z",         "2025-11-06T06:41:54.048626+00:00"),
    ("2025-11-06T06:41:54.999999999+00:00", "2025-11-06T06:41:54.999999+00:00"),
    ("2025-11-06T06:41:54.1234567",         "2025-11-06T06:41:54.123456+00:00"),
]
NOT_DATE_TIMES = [
    "2025-02-30T06:41:54Z", "2025-11-06T06:41:60Z", "2025-11-06T٠٦:41:54Z", "now",
    "2", "", 5, ["2025-11-06"],
]
# fmt: on


@pytest.mark.parametrize("status", [*STATUSES, None])
def test_a_task_is_finished_by_its_status_or_for_a_new_one_by_its_date(status):
    final = status in ("error", "failed", "completed", "stopped")
    dated = final or status in ("queued", "running", "cancelled", None)
    task = make_task(None, status=status)
    assert task.is_finished is final is xtask.AgentExecutionStatus(status or "").is_final
    task.finished_at = "2026-03-02T09:15:41Z"
    assert task.is_finished is dated
    task.status = "failed"  # a plain string, as a script may set it
    assert task.is_finished


@pytest.mark.parametrize("spelled, moment", DATE_TIMES)
def test_a_date_time_is_aware_and_keeps_its_spelling(spelled, moment):
    task = make_task(None, finished_at=spelled)
    assert task.finished_at.astimezone(timezone.utc).isoformat() == moment
    assert task.finished_at.tzinfo and task.to_dict()["finished_at"] == spelled


@pytest.mark.parametrize("value", NOT_DATE_TIMES)
def test_a_date_time_that_does_not_parse_stays_as_it_came(value):
    task = make_task(None, finished_at=value)
    assert task.finished_at == task.to_dict()["finished_at"] == value


def test_a_date_time_that_was_changed_is_written_in_iso_format():
    task = make_task(None, finished_at="2025-11-06T06:41:54.1Z")
    task.finished_at += timedelta(hours=1)
    assert task.to_dict()["finished_at"] == "2025-11-06T07:41:54.100000+00:00"
    task.finished_at = datetime(2026, 1, 2, 3)  # no zone means UTC
    assert task.to_dict()["finished_at"] == "2026-01-02T03:00:00+00:00"


# -- payloads of every shape


def random_value(rng, depth=0):
    """Any JSON value."""
    values = [None, True, False, 0, 1, -1, 2**60, 0.5, 1.0, 1e300, *TEXTS]
    if depth < 3 and rng.random() < 0.4:
        inner = [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return rng.choice([inner, dict(zip(rng.sample(["a", "id", "extra", "é"], 4), inner))])
    return rng.choice(values)


def random_task(rng):
    """A task of any age of server, with and without what is optional, and newer than we know."""
    user = {"email": "a@e.com", "additional_attributes": {"a": 1}, "new": random_value(rng)}
    given = {
        "input": {
            "text": rng.choice(TEXTS),
            "files": ["https://e.com/a.txt"],
            "user": user,
            "attachments": [{"url": "u", "kind": "pdf"}],
            "principal": {"kind": "slack"},
            "lang": "de",
        },
        "id": "t",
        "agent_id": "é",
        "status": rng.choice(STATUSES),
        "output_format": rng.choice(["json", "voice", "hologram"]),
        "used_tools": ["search"],
        "duration": rng.choice([12.5, 3, 0]),
        **{name: rng.choice(TEXTS) for name in TEXT_FIELDS},
        **{name: rng.choice(DATE_TIMES)[0] for name in TIME_FIELDS},
        **{name: rng.random() < 0.5 for name in FLAGS},
        **{name: [random_value(rng)] for name in LISTS},
        **{name: {"a": random_value(rng)} for name in OBJECTS},
        **{
            name: random_value(rng)
            for name in ("served_model", "extra", "_new", "save", "raw", "é")
        },
    }
    for record in (given["input"]["user"], given["input"], given):
        for name in list(record):
            lot = rng.random()
            if lot < 0.2:
                del record[name]
            elif lot < 0.35:
                record[name] = None
            elif lot < 0.38:
                record[name] = random_value(rng)
    return given


def check_lossless(record, payload):
    """Everything that came can be read, as an attribute or in `extra`, and goes back as it came."""
    names = {field.name for field in dataclasses.fields(record)} - {"extra"}
    assert exact(record.extra) == exact({k: v for k, v in payload.items() if k not in names})
    for name in payload:
        if name in names:
            assert hasattr(record, name)
        elif not name.startswith("_") and not hasattr(type(record), name) and name != "extra":
            assert getattr(record, name) is record.extra[name]
    for same in (record, *duplicates(record)):
        assert exact(same.to_dict()) == exact(payload)
        assert same == record
    assert {*dataclasses.asdict(record)} == names | {"extra"}
    assert repr(record)


def check_type(payload, record, name, source, kind):
    came = payload.get(name)
    assert type(getattr(record, name)) is (kind if isinstance(came, source) else type(came))


@pytest.mark.parametrize("block", range(4))
def test_any_task_loads_is_typed_and_goes_back_without_loss(block):
    for seed in range(block * 50, block * 50 + 50):
        payload = random_task(random.Random(seed))
        before = exact(payload)
        task = xtask.Task.from_dict(payload)
        check_lossless(task, payload)
        check_type(payload, task, "status", str, xtask.AgentExecutionStatus)
        check_type(payload, task, "output_format", str, xtask.OutputFormat)
        check_type(payload, task, "input", dict, xtask.AgentExecutionInput)
        if isinstance(task.input, xtask.AgentExecutionInput):
            check_type(payload["input"], task.input, "user", dict, xtask.User)
        assert exact(payload) == before, "it shares nothing with the payload"


def test_a_task_has_the_fields_of_the_platform_with_their_defaults():
    task = xtask.Task.from_dict({"id": "t-1"})
    assert [getattr(task, name) for name in FLAGS] == [False] * len(FLAGS)
    assert [getattr(task, name) for name in LISTS] == [[]] * len(LISTS)
    none = [*TEXT_FIELDS, *TIME_FIELDS, *OBJECTS, "status", "output_format", "duration", "agent_id"]
    assert {name: getattr(task, name) for name in none} == dict.fromkeys(none)
    assert not task.used_tools and task.extra == {} and task.to_dict() == {"id": "t-1"}
    task.sub_executions.append("x")
    assert task.to_dict()["sub_executions"] == ["x"]
    assert xtask.Task.from_dict({"id": "t-1"}).sub_executions == []
    given = xtask.AgentExecutionInput()
    assert not given.attachments and given.principal is given.user is given.text is None


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_keeps_what_has_no_name_here(name):
    cls = getattr(xtask, name)
    keys = [field.name for field in dataclasses.fields(cls) if field.name not in ("extra", "raw")]
    first = {"type": "x"} if name == "TaskUpdateEvent" else {}  # an envelope has a type
    for payload in ({"id": "1", "new": [1], "extra": {"extra": 1}, "_x": 2, "to_dict": 3}, {}):
        payload = {**first, **payload}
        record = cls.from_dict(payload)
        if name != "TaskUpdateEvent":  # whose `raw` is one more field
            check_lossless(record, payload)
        assert exact(record.to_dict()) == exact(payload) and callable(record.to_dict)
        assert getattr(record, "new", None) == payload.get("new")
        record.extra["later"] = "x"
        assert record.later == "x" == copy.deepcopy(record).later
        assert not hasattr(record, "never") and getattr(record, "never", 5) == 5
        with pytest.raises(AttributeError, match="never"):
            assert record.never
        if name not in ("Task", "TasksListItem"):
            assert repr(record).startswith(f"{name}({keys[0]}=")
    secret = cls.from_dict({**first, keys[-1]: {"access_token": "s3cret"}})
    assert "s3cret" not in repr(secret) and "s3cret" in exact(secret.to_dict())
    nulls = {**dict.fromkeys(keys), **first}
    assert cls.from_dict(nulls).to_dict() == nulls


@pytest.mark.parametrize(
    "make", [make_task, lambda _: xtask.AgentExecutionInput("Hi"), lambda _: xtask.User("e")]
)
def test_what_is_in_extra_is_written_as_an_attribute_where_a_save_sends_it(make):
    record = make(None)
    record.extra["served_model"] = "x"
    record.served_model = "y"
    assert record.extra == {"served_model": "y"} and record.to_dict()["served_model"] == "y"
    before = record.to_dict()
    with pytest.raises(AttributeError, match=r"""extra\[["']sevred_model["']\]"""):
        record.sevred_model = "z"
    assert record.to_dict() == before and not hasattr(record, "sevred_model")
    del record.extra["served_model"]
    assert not hasattr(record, "served_model") and "served_model" not in record.to_dict()


@dataclasses.dataclass(repr=False)
class OwnTask(xtask.Task):
    note: str = "none"
    score: typing.Optional[int] = None
    marks: typing.Dict[str, int] = dataclasses.field(default_factory=dict)
    cache = None

    @property
    def loud(self):
        return self.note.upper()

    @loud.setter
    def loud(self, note):
        self.note = note.lower()


def test_a_subclass_has_fields_defaults_and_attributes_of_its_own():
    first, second = (OwnTask.from_dict(task_dict(score=3, new=1)) for _ in range(2))
    first.marks["a"] = 1
    first.cache, first.loud = {"not": "sent"}, "SOFT"
    assert (second.note, second.score, second.marks, second.cache) == ("none", 3, {}, None)
    assert first.loud == "SOFT" and first.new == 1 and first.extra == {"new": 1}
    assert first.to_dict() == task_dict(score=3, new=1, note="soft", marks={"a": 1})
    assert all(twin == first and twin.marks == {"a": 1} for twin in duplicates(first))
    assert isinstance(first, xtask.Task) and first != second
    with pytest.raises(AttributeError):
        first.mark = 1


def test_a_record_made_by_hand_writes_what_was_set():
    asked = xtask.AgentExecutionInput(text="Hi", user=xtask.User("a@e.com", extra={"new": 1}))
    task = xtask.Task(
        id="t", agent_id="a", organization_id="o", input=asked, created_at=utc(2026, 1, 2)
    )
    task.title, task.status = "Made", xtask.AgentExecutionStatus.Paused
    assert task.to_dict() == {
        "id": "t",
        "agent_id": "a",
        "organization_id": "o",
        "title": "Made",
        "status": "paused",
        "input": {"text": "Hi", "user": {"email": "a@e.com", "new": 1}},
        "created_at": "2026-01-02T00:00:00+00:00",
    }
    assert task == xtask.Task.from_dict(task.to_dict())
    mapping = types.MappingProxyType(task_dict(created_at=utc(2026, 1, 2)))
    assert xtask.Task.from_dict(mapping).created_at == utc(2026, 1, 2)
    log, other = xtask.AgentActivityThread("t"), xtask.AgentActivityThread("t")
    log.messages.append(1)
    assert other.messages == []
    with pytest.raises(TypeError):
        xtask.User(additional_attributes={"tags": {"a"}}).to_dict()


def test_records_are_equal_by_their_data_alone():
    one, other = make_task(None), make_task(configuration("http://127.0.0.1:9"))
    assert one == other and one.to_dict() == other.to_dict()
    assert (
        xtask.User.from_dict({"email": None, "id": "1"}) == xtask.User(id="1") != xtask.User(id="2")
    )
    assert xtask.User.from_dict({"new": 1}) != xtask.User.from_dict({"new": 2}) != xtask.User()
    assert xtask.ToolCallRequest("1", "2") != xtask.ToolCallResult("1", "2")
    spelled = [{"type": "chunk", "time": f"2026-01-02T03:04:05{zone}"} for zone in ("Z", "+00:00")]
    first, second = map(xtask.TaskUpdateEvent.from_dict, spelled)
    assert first == second and first.raw != second.raw


def test_a_task_shares_nothing_with_the_payload_it_was_made_from():
    payload = task_dict(input={"text": "Hi", "files": ["a"]}, tokens={"total": [1]}, new={"a": [1]})
    before = exact(payload)
    task = xtask.Task.from_dict(payload)
    for value in (
        task.input.files,
        task.tokens["total"],
        task.new["a"],
        task.to_dict()["new"]["a"],
    ):
        value.append("b")
    copy.deepcopy(task).input.files.append("c")
    assert (
        exact(payload) == before and task.input.files == ["a", "b"] and task.new == {"a": [1, "b"]}
    )


# -- events and activity logs

ENVELOPE_ROWS = r"""
Task            task_created      {"status": "paused", "input": {"text": "Hi", "files": []}}
Task            task_updated      {}
Task            task_finished     {"id": "t-9", "new": 1}
str             task_finished     "t-9"
NoneType        task_updated      null
str             chunk             "by 12\u00a0%"
dict            chunk             {"request_id": "r", "operation_id": "o"}
ToolCallRequest tool_call_request {"request_id": "", "operation_id": "", "reasoning": {"title": ""}}
ToolCallRequest think             {"request_id": "", "operation_id": "", "payload": {"input": {}}}
ToolCallRequest analyze           {"request_id": "", "operation_id": "", "reasoning": {"title": ""}}
ToolCallResult  tool_call_result  {"request_id": "r", "operation_id": "o", "result": [3]}
dict            tool_call_result  {"request_id": 5, "operation_id": "o"}
dict            tool_call_request {"request_id": "r", "operation_id": null}
dict            think             {"request_id": "r"}
list            think             [{"request_id": "r", "operation_id": "o"}]
dict            sub_agent_trigger {"agent_id": "b", "query": "Q"}
dict            sub_task_finished {"id": "t-9", "status": "completed"}
dict            ask_for_secret    {"questions": []}
int             not-known-yet     5
"""
ENTRY_ROWS = """
Message         {"role": "user", "content": {"text": "Hi", "files": null}}
Message         {"role": "agent", "content": {}, "tool_name": "x", "type": "think"}
OtherEntry      {"role": "system", "content": {"text": "Hi"}}
OtherEntry      {"role": "user", "content": "Hi"}
OtherEntry      {"role": "user"}
ToolCall        {"tool_name": "x", "payload": null, "is_error": false, "reasoning": {"title": "Y"}}
ToolCall        {"tool_name": "x", "type": "think", "query": "Q"}
OtherEntry      {"tool_name": null, "query": "Q"}
Reasoning       {"type": "think", "title": "x", "confidence": 0.8, "thought": "y", "action": null}
Reasoning       {"type": "analyze", "title": "x", "confidence": 1, "analysis": "z", "query": "Q"}
OtherEntry      {"type": "think", "title": "x", "thought": {"not": "text"}}
OtherEntry      {"type": "analyze", "analysis": 1}
OtherEntry      {"type": "think", "action": []}
OtherEntry      {"type": "think", "title": 5}
OtherEntry      {"type": "think", "result": {}}
OtherEntry      {"type": "ponder", "title": "x"}
SubAgentTrigger {"agent_id": "b", "query": "Q", "files": [], "reasoning": {"title": null}}
SubAgentTrigger {"agent_id": "b", "query": null, "files": [], "reasoning": {"title": "Y"}}
SubAgentTrigger {"query": "Q", "type": "login_required", "data": {}}
SubAgentTrigger {"query": "Q", "action": "something_else"}
OtherEntry      {"query": ["Q"]}
OtherEntry      {"agent_id": "b", "files": [], "reasoning": {"title": "Y"}}
Auth            {"type": "not_supported", "data": {}}
Auth            {"type": "login_required", "data": {"url": "u"}}
Auth            {"type": "token_issue", "data": null}
Auth            {"type": "token_ready", "data": {"access_token": "x"}}
OtherEntry      {"type": "token_lost", "data": {}}
OtherEntry      {"type": "token_ready"}
OtherEntry      {"type": ["think"], "data": {}}
OtherEntry      {"action": "create_execution", "agent_id": "b", "query": "Q", "reasoning": "two"}
OtherEntry      {"action": "ask_execution", "tool_name": "x", "reasoning": "one is missing"}
OtherEntry      {"action": "stop_execution", "role": "user", "content": {"text": "Hi"}}
OtherEntry      {"action": "continue_execution", "type": "think", "title": "x", "query": null}
OtherEntry      {"action": "get_executions_result", "type": "token_ready", "data": {}}
OtherEntry      {"action": "ask_user_questions", "reasoning": "which period?"}
OtherEntry      {}
"""
ENVELOPES = [line.split(None, 2) for line in ENVELOPE_ROWS.strip().splitlines()]
ENTRIES = [line.split(None, 1) for line in ENTRY_ROWS.strip().splitlines()]


@pytest.mark.parametrize("kind, type, data", ENVELOPES)
def test_the_data_of_an_event_is_typed_by_its_type_and_nothing_of_it_is_lost(kind, type, data):
    envelope = {"type": type, "task_id": "t-1", "organization_id": ORG, "version": 2}
    envelope.update(time="2026-03-02T09:15:01.5+00:00", data=json.loads(data))
    before = exact(envelope)
    event = xtask.TaskUpdateEvent.from_dict(envelope)
    assert event.data.__class__.__name__ == kind and event.type == type
    assert isinstance(event.type, xtask.TaskUpdateEventType)
    assert (event.task_id, event.organization_id, event.version) == ("t-1", ORG, 2)
    assert event.time == utc(2026, 3, 2, 9, 15, 1, 500000) and event.extra == {"version": 2}
    assert not re.search("raw|version", repr(event))
    if kind == "Task":
        assert {**envelope["data"], **event.data.to_dict()} == event.data.to_dict()
        assert event.data.id == envelope["data"].get("id", "t-1")
        event.data.status = event.data.extra["mine"] = "changed"
    else:
        assert exact(event.to_dict()) == before
        assert "reasoning" not in data or event.data.reasoning.title == ""
    assert exact(event.raw) == exact(envelope) == before
    assert all(twin == event and twin.raw == event.raw for twin in duplicates(event))


@pytest.mark.parametrize("kind, entry", ENTRIES)
def test_the_keys_of_an_entry_tell_its_kind_and_nothing_of_it_is_lost(kind, entry):
    entry = {"id": "a1", "created_at": "2026-03-02T09:15:48Z", **json.loads(entry), "new": [1]}
    log = {"id": "t", "created_at": None, "messages": [entry], "user": {"email": "e"}}
    thread = xtask.AgentActivityThread.from_dict(log)
    check_lossless(thread, log)
    [made] = thread.messages
    assert type(made) is getattr(xtask, "AgentActivityThread" + kind)
    assert made.created_at == utc(2026, 3, 2, 9, 15, 48) and thread.user.email == "e"
    typed = {
        "content": "AgentActivityThreadMessageContent",
        "reasoning": "ToolCallRequestReasoning",
    }
    for name, value in entry.items():
        if name in typed and kind != "OtherEntry":
            assert type(getattr(made, name)) is getattr(xtask, typed[name])
        elif name != "created_at":
            assert getattr(made, name) == value


@pytest.mark.parametrize("block", range(2))
def test_any_activity_log_and_any_event_go_back_without_loss(block):
    for seed in range(block * 30, block * 30 + 30):
        rng = random.Random(seed)
        entries = [{**json.loads(rng.choice(ENTRIES)[1]), "id": "a"} for _ in range(6)]
        for entry in entries:
            entry[rng.choice([*entry, "extra", "new"])] = random_value(rng)
        messages = rng.choice([[*entries, random_value(rng)], random_value(rng)])
        log = {"id": "t", "created_at": rng.choice(DATE_TIMES)[0], "messages": messages, "pages": 2}
        check_lossless(xtask.AgentActivityThread.from_dict(log), log)
        envelope = {"type": rng.choice(ENVELOPES)[1], "data": random_value(rng), "extra": 1}
        event = xtask.TaskUpdateEvent.from_dict(envelope)
        assert exact(event.raw) == exact(envelope) and event.extra == {"extra": 1}
        assert isinstance(event.data, xtask.Task) or exact(event.to_dict()) == exact(envelope)


# -- configurations and errors


# fmt: off
ENVIRONMENTS = [  # variables, arguments, and (key, organization, URL) of the configuration
    ("", [], (None, None, "https://inbound.xpander.ai")),
    ("IS_STG=true", [], (None, None, "https://inbound.stg.xpander.ai")),
    ("IS_STG=false", [], (None, None, "https://inbound.xpander.ai")),
    ("API_KEY=  k\n|ORGANIZATION_ID= |BASE_URL=", [], ("k", None, "https://inbound.xpander.ai")),
    ("ORGANIZATION_ID=o|BASE_URL= my.com/ |IS_STG=true", [], (None, "o", "https://my.com")),
    ("API_KEY=k|BASE_URL=b.c", ["x", "y", "http://h:1/a/"], ("x", "y", "http://h:1/a")),
    ("API_KEY=k|ORGANIZATION_ID=o", ["", " "], ("k", "o", "https://inbound.xpander.ai")),
]
UNUSABLE = [  # of a configuration: the setting, and values for it
    ("timeout", [0, -1, None, "5", float("nan"), float("inf")]),
    ("idle_timeout", [0, -0.5, None, "5", float("nan"), float("inf")]),
    ("max_retries", [None, "2", 1.5, -1]),
    ("base_url", ["ftp://h", "http://", "http://h:99999", "http://a b", "my.com/a?b=http://c"]),
    ("trusted_file_hosts", [["h:80"], "http://h/", [""], ["a b"]]),
    ("organization_id", [5]),
    ("api_key", ["k\u00e9y", "a\nb", "key\x7f"]),
]
# fmt: on


@pytest.mark.parametrize("variables, arguments, settings", ENVIRONMENTS)
def test_a_configuration_takes_what_is_not_given_from_the_environment(
    variables, arguments, settings, monkeypatch
):
    for name, value in re.findall(r"(\w+)=([^|]*)", variables):
        monkeypatch.setenv(name if name == "IS_STG" else "XPANDER_" + name, value)
    made = xtask.Configuration(*arguments)
    monkeypatch.setenv("XPANDER_API_KEY", "later")
    assert (made.api_key, made.organization_id, made.base_url.rstrip("/")) == settings


@pytest.mark.parametrize("name, values", UNUSABLE)
def test_a_setting_that_cannot_work_is_a_value_error_that_names_it(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"(?i){name}"):
            xtask.Configuration(**{"api_key": KEY, name: value})


def test_a_configuration_is_a_value():
    made = configuration("http://h", headers={"X-Team": "s3cret"}, trusted_file_hosts=["f.test"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.timeout = 5
    with pytest.raises(TypeError):
        xtask.Configuration("k", "o", "http://h", 5)
    assert dict(made.headers) == {"X-Team": "s3cret"} and tuple(made.trusted_file_hosts) == (
        "f.test",
    )
    assert all(twin == made and hash(twin) == hash(made) for twin in duplicates(made))
    assert made != configuration("http://h") != configuration("http://h", timeout=0.5)
    assert KEY not in repr(made) and "s3cret" not in repr(made) and ORG in repr(made)
    plain = configuration("http://h")
    assert (plain.timeout, plain.max_retries, plain.idle_timeout) == (60.0, 2, 90.0)
    assert plain.ssl_context is None and not plain.headers and not plain.trusted_file_hosts
    assert list(configuration("http://h", trusted_file_hosts="f.test").trusted_file_hosts) == [
        "f.test"
    ]


def test_a_task_and_its_duplicates_keep_the_configuration_and_show_no_key():
    config = configuration("http://127.0.0.1:9", headers={"X-Team": "s3cret"})
    task = make_task(config)
    assert task.configuration is config and "configuration" not in dataclasses.asdict(task)
    for twin in (task, *duplicates(task)):
        assert twin.configuration == config
        shown = f"{twin!r} {twin} {dataclasses.asdict(twin)} {twin.to_dict()} {twin.configuration}"
        assert KEY not in shown and "s3cret" not in shown
    task.configuration = other = configuration("http://127.0.0.1:10")
    assert task.configuration is other


def test_an_error_is_a_value_that_says_what_happened():
    body, headers = {"detail": "Task not found"}, {"x-request-id": "r-1"}
    error = xtask.ModuleException(404, "Task not found", body, True, headers)
    for twin in (error, *duplicates(error)):
        assert type(twin) is xtask.ModuleException and str(twin) == "[404] Task not found"
        assert (twin.status_code, twin.description, twin.details) == (404, "Task not found", body)
        assert (twin.answered, twin.headers) == (True, headers)
    bare = xtask.ModuleException(500, "x")
    assert (bare.details, bare.answered, bare.headers) == (None, True, None)
    assert "500" in repr(bare) and isinstance(bare, Exception)


# -- what no repr shows

# fmt: off
HIDDEN = [
    "https://h/x.pdf?sig=s3cret", "HTTPS://h/x?a=b; n='r'&sig=s3cret", "s3://b/k.pdf?sig=s3cret",
    "http://user:s3cret@proxy.test:8080", "http://user:s3cret@h/?",
    {"access_token": "s3cret"}, {"user_oidc_token": "s3cret"},
    [{"deep": {"user_tokens": ["s3cret"]}}], {"api_key": "s3cret", "x-api-key": "s3cret"},
    {"https://e.com/a?sig=s3cret": 1}, [[("https://h/x?s3cret",)]], "https://h/x#token=s3cret",
    [{"headers": {"Authorization": "Bearer s3cret", "X-API-Key": "s3cret"}}],
]
# fmt: on


@pytest.mark.parametrize("value", HIDDEN, ids=repr)
def test_no_repr_shows_a_secret_wherever_it_is(value):
    records = [
        xtask.ToolCallResult("r", "o", payload=value, result=[value]),
        xtask.TaskUpdateEvent.from_dict({"type": "auth_event", "data": value}),
        xtask.AgentExecutionInput(value, [value], xtask.User(additional_attributes={"a": value})),
        xtask.AgentActivityThread("t", messages=[xtask.AgentActivityThreadAuth("a", data=value)]),
        make_task(None, title=value),
    ]
    assert "s3cret" not in repr(records) + str(records[0])
    assert "s3cret" in exact([record.to_dict() for record in records[:3]]), "it is only hidden"


def test_a_repr_shows_what_is_no_secret():
    shown = {
        "q": ["x", {"city": "Rome", "access_token": None}],
        "url": "https://e.com/a",
        "ask": "why? now",
    }
    assert repr(shown) in repr(xtask.ToolCallRequest("r", "o", payload=shown))
    assert "https://e.com/a.pdf?" in repr(
        xtask.AgentExecutionInput(files=["https://e.com/a.pdf?sig=x"])
    )
    [event] = xtask.iter_sse([b'id: 1\ndata: {"n": 1}\n\n'])
    assert "id='1'" in repr(event) and "message" in repr(event)


def test_the_repr_of_a_task_is_one_short_line_of_id_status_and_title():
    assert repr(make_task(None, title="Sums")) == "Task(id='t-1', status='executing', title='Sums')"
    long = repr(make_task(None, title="Sums\n" * 1000, result="the result"))
    assert "\n" not in long and len(long) < 140 and "the result" not in long


def test_a_repr_takes_values_of_any_size_and_depth():
    deep = 1
    for _ in range(5000):
        deep = [deep]
    values = [deep, "http://" * 150_000, "?" * 10**6, {"a" * 10**6: ["https://h/?" + "x" * 10**6]}]
    start = time.thread_time()
    assert repr([xtask.ToolCallRequest("r", "o", payload=value) for value in values])
    assert time.thread_time() - start < 5


EVERY_RECORD = [each for each in map(vars(xtask).get, PUBLIC) if hasattr(each, "from_dict")]


@pytest.mark.parametrize("cls", EVERY_RECORD)
def test_no_repr_shows_a_secret_that_has_no_name_here(cls):
    record = cls.from_dict({"type": "new", "new": {"access_token": "s3cret"}})
    assert record.new == {"access_token": "s3cret"} and "s3cret" not in repr(record)


# ---- The parser ----------------------------------------------------------------------------------
# `iter_sse`: the rules of the WHATWG standard's "Interpreting an event stream", one in each row,
# however the stream is cut into chunks; how large an event may be, and what parsing costs.


def parsed(data, id="", retry=None, event="message"):
    return event, data, id, retry


# fmt: off
DATA_RULES = [  # the rule, a stream, and the data of its events
    # the standard's own examples
    ("several data lines", b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    ("empty data", b"data\n\ndata\ndata\n\ndata:", ["", "\n"]),
    ("one optional space", b"data:test\n\ndata: test\n\n", ["test", "test"]),
    # ends of lines
    ("LF", b"data: a\ndata: b\n\n", ["a\nb"]),
    ("CR", b"data: a\rdata: b\r\r", ["a\nb"]),
    ("CRLF is one end", b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
    ("CRLF CR is a blank line", b"data: a\r\n\rdata: b\n\n", ["a", "b"]),
    ("CR CRLF is a blank line", b"data: a\r\r\ndata: b\n\n", ["a", "b"]),
    ("LF CRLF is a blank line", b"data: a\n\r\ndata: b\n\n", ["a", "b"]),
    ("LF CR is a blank line", b"data: a\n\rdata: b\n\n", ["a", "b"]),
    ("CRLF LF is a blank line", b"data: a\r\n\ndata: b\n\n", ["a", "b"]),
    ("CR at the very end", b"data: a\n\r", ["a"]),
    ("many blank lines", b"\n\r\n\rdata: a\n\n\n\r\n\r\r\n\n\ndata: b\n\n\n\n", ["a", "b"]),
    ("no other control ends a line", b"data: a\x0bdata: b\x0cdata: c\x1c\x1d\x1ed\n\n",
     ["a\x0bdata: b\x0cdata: c\x1c\x1d\x1ed"]),
    ("nor U+0085, U+2028, U+2029", "data: a\u0085b\u2028data: c\u2029\n\n".encode(),
     ["a\u0085b\u2028data: c\u2029"]),
    # decoding
    ("BOM at the start", b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    ("BOM before a comment", b"\xef\xbb\xbf: x\ndata: a\n\n", ["a"]),
    ("BOM before a blank line", b"\xef\xbb\xbf\n\ndata: a\n\n", ["a"]),
    ("second BOM", b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"]),
    ("later BOM", b"data: a\n\n\xef\xbb\xbfdata: x\n\ndata: b\n\n", ["a", "b"]),
    ("BOM after a line's end", b"\n\xef\xbb\xbfdata: x\n\ndata: b\n\n", ["b"]),
    ("BOM in a value", b"data: \xef\xbb\xbfa\n\n", ["\ufeffa"]),
    ("half a BOM", b"\xef\xbbdata: x\n\ndata: b\n\n", ["b"]),
    ("UTF-8", "data: é€\U0001f600\n\n".encode(), ["é€\U0001f600"]),
    ("bad byte", b"data: a\xffb\n\n", ["a\ufffdb"]),
    ("cut characters", b"data: \xf0\x9f\x98\ndata: \xe2\x82\n\n", ["\ufffd\n\ufffd"]),
    ("overlong form", b"data: \xc0\xafa\n\n", ["\ufffd\ufffda"]),
    ("surrogate", b"data: \xed\xa0\x80\n\n", ["\ufffd\ufffd\ufffd"]),
    ("Latin-1", b"data: caf\xe9\ndata: b\n\n", ["caf\ufffd\nb"]),
    ("NUL in data", b"data: a\0b\n\n", ["a\0b"]),
    # comments and fields
    ("comments", b": ping\ndata: a\n:\n:data: x\ndata: b\n\n: pong\n\n", ["a\nb"]),
    ("comments alone", b": ping\n\n:\n\n: pong\n\ndata: a\n\n", ["a"]),
    ("spaces", b"data:  a \ndata:\tb\n\n", [" a \n\tb"]),
    ("first colon", b"data: a:b: c\ndata::d\n\n", ["a:b: c\n:d"]),
    ("names as they are",
     b"Data: x\n DATA: x\ndata : x\n data: x\ndatax: x\ndat\ndata: a\n\n", ["a"]),
    ("line of spaces", b"data: a\n \ndata: b\n\n", ["a\nb"]),
    ("empty data lines", b"data: a\ndata:\ndata\ndata: b\ndata\n\ndata:\n\n", ["a\n\n\nb\n", ""]),
    ("unfinished event", b"data: a\n\ndata: b\n", ["a"]),
    ("unfinished line", b"data: a\n\ndata: b", ["a"]),
    ("empty stream", b"", []),
]
FIELD_RULES = [  # the rule, a stream, and (event, data, id, retry) of its events
    ("the standard's example",
     b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third\n\n",
     [parsed("first event", "1"), parsed("second event"), parsed(" third")]),
    ("event", b"event: x\ndata: a\n\ndata: b\n\n", [parsed("a", event="x"), parsed("b")]),
    ("event after the data", b"data: a\r\nevent: x\r\nevent: y\r\n\r\n", [parsed("a", event="y")]),
    ("empty event", b"event: x\nevent:\ndata: a\n\n", [parsed("a")]),
    ("event without data", b"event: x\n\ndata: b\n\n", [parsed("b")]),
    ("no data", b"event: x\nid: 7\nretry: 9\n\ndata: a\n\n", [parsed("a", "7", 9)]),
    ("id is kept", b"id: 1\ndata: a\n\ndata: b\n\n", [parsed("a", "1"), parsed("b", "1")]),
    ("last id", b"id: 1\ndata: a\nid:  2 \n\n", [parsed("a", " 2 ")]),
    ("empty id", b"id: 1\ndata: a\n\nid:\ndata: b\n\n", [parsed("a", "1"), parsed("b")]),
    ("id with NUL", b"id: 1\n\nid: 2\0\ndata: a\n\n", [parsed("a", "1")]),
    ("retry is kept", b"retry: 1500\ndata: a\n\ndata: b\n\n",
     [parsed("a", retry=1500), parsed("b", retry=1500)]),
    ("retry of digits", b"retry: 0\ndata: a\n\nretry: 1\nretry: 007\ndata: b\n\n",
     [parsed("a", retry=0), parsed("b", retry=7)]),
    ("retry of anything else",
     "retry: 5\nretry: +1\nretry: -1\nretry: 1.5\nretry: 1e3\nretry: 0x1\nretry: 1_0\nretry: 1 \n"
     "retry:  1\nretry: x\nretry:\nretry\nretry: ١\nretry: ²\ndata: a\n\n".encode(),
     [parsed("a", retry=5)]),
]
# fmt: on
SSE_RULES = [(stream, [parsed(each) for each in data]) for _, stream, data in DATA_RULES]
SSE_RULES += [(stream, events) for _, stream, events in FIELD_RULES]


def cut_at(stream, cuts):
    """The stream in chunks, some of them empty."""
    cuts = sorted(cuts)
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)])]


@pytest.mark.parametrize(
    "stream, events", SSE_RULES, ids=[row[0] for row in [*DATA_RULES, *FIELD_RULES]]
)
def test_a_rule_of_the_standard_holds_however_the_stream_is_cut(stream, events):
    rng, size = random.Random(stream), len(stream)
    cuts = [[], range(size), [size // 2] * 2]
    cuts += [[rng.randrange(size + 1) for _ in range(rng.randrange(1, 8))] for _ in range(30)]
    for chosen in cuts:
        assert list(xtask.iter_sse(cut_at(stream, chosen))) == events, chosen


def test_streams_after_one_another_are_one_stream_however_it_is_cut():
    rng = random.Random(7)
    for _ in range(50):
        stream = b"\n\n".join(row[0] for row in rng.sample(SSE_RULES, 8))
        expected = list(xtask.iter_sse([stream]))
        cuts = [rng.randrange(len(stream)) for _ in range(20)]
        assert list(xtask.iter_sse(cut_at(stream, cuts))) == expected, cuts


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n", b"\r\n\r", b"\n\r"], ids=repr)
@pytest.mark.parametrize("size", [1, 100])
def test_an_event_is_there_before_more_bytes_are_asked_for(end, size):
    stream, asked = b"data: a" + end, []

    def bytes_of():
        yield from (stream[n : n + size] for n in range(0, len(stream), size))
        asked.append("more")

    events = xtask.iter_sse(bytes_of())
    assert next(events).data == "a" and not asked
    assert list(events) == [] and asked


def test_an_event_is_a_named_tuple():
    [event] = xtask.iter_sse([b"id: 1\nevent: x\nretry: 5\ndata: a\n\n"])
    assert event == xtask.ServerSentEvent(event="x", data="a", id="1", retry=5)
    assert (event.event, event.data, event.id, event.retry) == tuple(event)
    [event] = xtask.iter_sse([b"retry: " + b"9" * 6000 + b"\ndata: a\n\n"])
    assert event.data == "a"


# -- limits and costs

SIXTEEN = 16 * MIB
LINES = {
    "data": b"data: " + b"x" * 32761 + b"\n",
    "comment": b": " + b"x" * 32765 + b"\n",
    "two-byte data": b"data: " + b"\xc3\xa9" * 16380 + b"\n",
    "bad bytes": b"data: " + b"\xff" * 32761 + b"\n",
}


@pytest.mark.parametrize("size", [64 * 1024, 64 * MIB], ids=["64 KiB", "one"])
@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
def test_an_event_may_have_16_mib_with_every_byte_counted(line, size):
    def events_of(count):
        stream = b"data: a\n\n" + line * count + b"\ndata: b\n\n"
        return xtask.iter_sse(stream[n : n + size] for n in range(0, len(stream), size))

    assert [event.data[:1] for event in events_of(SIXTEEN // len(line) - 1)][-1] == "b"
    events = events_of(SIXTEEN // len(line) + 1)
    assert next(events).data == "a", "what came before it is not lost"
    with pytest.raises(ValueError, match="16 MiB"):
        list(events)


@pytest.mark.parametrize("piece", [b"x" * 65536, b":x\r\n" * 16384, b"data\n" * 13000], ids=len)
def test_an_event_that_never_ends_is_given_up_after_16_mib(piece):
    taken = []

    def endless():
        while True:
            taken.append(len(piece))
            yield piece

    with pytest.raises(ValueError, match="16 MiB"):
        list(xtask.iter_sse(endless()))
    assert SIXTEEN - len(piece) <= sum(taken) <= SIXTEEN + 2 * 65536


def test_a_chunk_may_hold_more_than_16_mib_of_events():
    stream = (b"data: " + b"x" * MIB + b"\n\n") * 20
    assert [len(event.data) for event in xtask.iter_sse([stream])] == [MIB] * 20


SHAPES = [  # streams of about 2**18 bytes, which come byte by byte
    b"data: " + b"x" * 2**18 + b"\n\n",
    b"data: x\n" * 2**15 + b"\n",
    b"data: x\r\n" * 2**15 + b"\r\n",
    b":" + b"x" * 2**18 + b"\n\n",
    b"x\r" * 2**17 + b"\r",
    b"\n" * 2**18,
    b"x" * 2**18,
]


@pytest.mark.parametrize("stream", SHAPES, ids=lambda stream: repr(stream[:9]))
def test_bytes_that_come_one_by_one_cost_no_more_than_their_number(stream):
    start = time.thread_time()
    for _ in xtask.iter_sse(stream[n : n + 1] for n in range(len(stream))):
        pass
    assert time.thread_time() - start < 5, "joined again at every chunk it would take minutes"


def test_a_field_of_another_name_is_ignored_whatever_its_value():
    stream = b"retry: 5\nwait: 100\nids: 7\nevents: x\ndata: a\n\n"
    assert list(xtask.iter_sse([stream])) == [parsed("a", retry=5)]


# ---- Calls ---------------------------------------------------------------------------------------
# What each call sends and gives back, the URLs, waiting, what errors say, logging, cancelling.

STATUS_PATH, HISTORY_PATH = "/agent-execution/t-1/status", "/agent-execution/executions/history/a-1"
EMPTY_LOG = {"id": "t-1", "created_at": "2026-03-02T09:15:41Z", "messages": [], "user": None}
LIST_ITEM = {"id": "t-9", "agent_id": "a-1", "organization_id": ORG, "status": "queued", "new": 1}
HTML_PAGE = b"<!DOCTYPE html><html><body>nginx</body></html>"


def answer_calls(connection, number):
    """Answers each route of the platform; a task comes back with what was sent."""
    for _, path, _, body in iter(connection.request, None):
        if path.endswith("/events"):
            return plays(sse("connected"))(connection)
        task = task_dict(**{"status": "completed", **json.loads(body or "{}")})
        other = [LIST_ITEM] if "/history/" in path else EMPTY_LOG if "/activity/" in path else None
        connection.answer(200, other or task)


def replying(*replies):
    """A server that gives each request the next reply, and the last one to all that follow.

    A reply: the arguments of `RawConnection.answer`, or a function of the connection.
    """
    left = list(replies)

    def script(connection, number):
        while connection.request():
            reply = left.pop(0) if left[1:] else left[0]
            reply(connection) if callable(reply) else connection.answer(*reply)

    return RawServer(script)


def sent_bodies(server):
    """The JSON bodies that arrived, None for a request without one."""
    return [json.loads(body or "null") for *_, body in server.requests]


def make_call(task, call):
    """What a call gives that is written as its name and arguments; of `events`, the first one."""
    name, *arguments = call.split()
    if name in ("load", "create", "list"):
        id = task.id if name == "load" else task.agent_id
        return getattr(xtask.Task, name)(id, *arguments, configuration=task.configuration)
    answer = getattr(task, name)(*arguments)
    if name == "events":
        with contextlib.closing(answer):
            return next(answer)
    return answer


# fmt: off
ROUTES = [
    ("load",              "GET {root}/agent-execution/{id}/status"),
    ("create Hi",         "POST {root}/agent-execution/{id}"),
    ("list",              "GET {root}/agent-execution/executions/history/{id}"),
    ("save",              "GET {root}/agent-execution/{id}/status"),
    ("set_status failed", "PATCH {root}/agent-execution/{id}/update"),
    ("stop",              "DELETE {root}/agent-execution/{id}"),
    ("reload",            "GET {root}/agent-execution/{id}/status"),
    ("wait_finished",     "GET {root}/agent-execution/{id}/status"),
    ("get_activity_log",  "GET {root}/activity/{id}/{id}"),
    ("events",            "GET {events}/agent-execution/{id}/events"),
]
EVERY_CALL = [call for call, _ in ROUTES]
# A base_url, the root of the API, the root of the events
ROOTS = """
https://inbound.xpander.ai/       BASE          https://agent-controller.xpander.ai/org-1
inbound.stg.xpander.ai            https://BASE  https://agent-controller.stg.xpander.ai/org-1
https://agent-controller.my.com   BASE/org-1    BASE/org-1
https://my-agent-controller2.com  BASE/org-1    BASE/org-1
http://10.0.0.1:9016              BASE/org-1    BASE/org-1
https://my.com/agent-controller/  BASE/org-1    BASE/org-1
https://e.com/agent-controller/a  BASE/org-1    BASE/org-1
https://e.com/a/agent-controller  BASE          BASE/org-1
https://my.com/agent-controllers  BASE          BASE/org-1
https://my.com/x9016              BASE          BASE/org-1
http://localhost:8085             BASE          http://localhost:9016/org-1
http://127.0.0.1:8085/            BASE          http://localhost:9016/org-1
http://[::1]:8085                 BASE          http://localhost:9016/org-1
http://my.com:8085                BASE          BASE/org-1
http://localhost:8086             BASE          BASE/org-1
my.com:8000/base//                https://BASE  https://BASE/org-1
my.com/base#z                     https://my.com/base   https://my.com/base/org-1
https://MY.com/Base               https://my.com/Base   https://my.com/Base/org-1
https://e.com/inbound.xpander.ai  BASE          BASE/org-1
https://inbound.xpander.ai.e.com  BASE          BASE/org-1
"""
# fmt: on


@pytest.mark.parametrize("base", ["/", "/agent-controller/"])
@pytest.mark.parametrize(
    "id, escaped", [("t-1", "t-1"), ("../a?b=c#d é%2f", "..%2Fa%3Fb%3Dc%23d%20%C3%A9%252f")]
)
@pytest.mark.parametrize("call, route", ROUTES)
def test_each_call_is_one_request_with_whole_ids_and_the_key(call, route, id, escaped, base):
    with (
        RawServer(answer_calls) as server,
        configuration(server.url + base, organization_id=id) as config,
    ):
        make_call(make_task(config, id=id, agent_id=id), call)
    [(method, path, headers, body)] = server.requests
    events = f"{base}{escaped}"
    root = "" if base == "/" else events
    assert f"{method} {path}" == route.format(id=escaped, root=root, events=events)
    streams = call == "events"
    assert headers["accept"] == ("text/event-stream" if streams else "application/json")
    assert headers.get("content-type") == ("application/json" if body else None)
    assert headers["x-api-key"] == KEY and headers["host"] == f"127.0.0.1:{server.port}"
    assert headers["user-agent"] == f"xtask/{xtask.__version__}"
    assert "x-agent-version" not in headers


@pytest.mark.parametrize("roots", ROOTS.strip().splitlines())
def test_the_roots_of_the_api_and_of_the_events(roots, monkeypatch, caplog):
    base_url = roots.split()[0]
    _, api, events = roots.replace("BASE", base_url.rstrip("/")).split()
    caplog.set_level("DEBUG", xtask.__name__)
    with replying((403,)) as proxy, configuration(base_url) as config:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        for call in ("reload", "events"):
            with pytest.raises(xtask.ModuleException, match="403"):
                make_call(make_task(config), call)
    assert f"GET {api}{STATUS_PATH}" in caplog.text
    assert f"GET {events}/agent-execution/t-1/events" in caplog.text


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize(
    "key, organization, status, says",
    [
        (None, ORG, 401, "XPANDER_API_KEY"),
        (KEY, None, 400, "set XPANDER_ORGANIZATION_ID or organization_id$"),
    ],
)
def test_a_setting_that_is_missing_is_named_and_nothing_sent(call, key, organization, status, says):
    with RawServer(answer_calls) as server:
        config = xtask.Configuration(key, organization, server.url + "/agent-controller")
        with pytest.raises(xtask.ModuleException, match=says) as caught:
            make_call(make_task(config, organization_id=None), call)
        assert server.connections == 0
    assert (caught.value.status_code, caught.value.answered) == (status, False)


def test_calls_without_a_configuration_share_one_per_set_of_environment_values(monkeypatch):
    with RawServer(answer_calls) as server:
        monkeypatch.setenv("XPANDER_API_KEY", "key-1")
        monkeypatch.setenv("XPANDER_ORGANIZATION_ID", ORG)
        monkeypatch.setenv("XPANDER_BASE_URL", server.url)
        task, made = xtask.Task.load("t-1"), xtask.Task.from_dict(task_dict())
        [item] = xtask.Task.list("a-1")
        first = task.configuration
        assert first is item.load().configuration is made.configuration
        assert first is xtask.Task.create("a-1", "Hi").configuration
        monkeypatch.setenv("XPANDER_API_KEY", "key-2")
        with made.configuration as second, first:
            assert (second.api_key, task.reload().configuration) == ("key-2", first)
    assert [headers["x-api-key"] for _, _, headers, _ in server.requests] == ["key-1"] * 5


# -- create and list

# fmt: off
OPTIONS = [  # of `create`, and the body that arrives
    ({}, '{"input": {"text": "Hi"}}'),
    ({"file_urls": ["a", "b"]}, '{"input": {"text": "Hi", "files": ["a", "b"]}}'),
    ({"user": {"id": None}}, '{"input": {"text": "Hi", "user": {"id": null}}}'),
    ({"user": xtask.User(email="a")}, '{"input": {"text": "Hi", "user": {"email": "a"}}}'),
    ({"attachments": [{"url": "a"}]}, '{"input": {"text": "Hi", "attachments": [{"url": "a"}]}}'),
    ({"principal": {"kind": "user"}}, '{"input": {"text": "Hi", "principal": {"kind": "user"}}}'),
    ({"id": "t-2", "user": None, "title": None}, '{"input": {"text": "Hi"}, "id": "t-2"}'),
    ({"output_format": xtask.OutputFormat.Html},
     '{"input": {"text": "Hi"}, "output_format": "html"}'),
    ({"output_schema": {"a": None}}, '{"input": {"text": "Hi"}, "output_schema": {"a": null}}'),
    ({"run_locally": False, "new": ""},
     '{"input": {"text": "Hi"}, "run_locally": false, "new": ""}'),
    ({"agent_version": 3}, '{"input": {"text": "Hi"}}'),
    ({"agent_version": None}, '{"input": {"text": "Hi"}}'),
    ({"prompt": "", "file_urls": ["a"]}, '{"input": {"text": "", "files": ["a"]}}'),
    ({"prompt": "", "attachments": [{}]}, '{"input": {"text": "", "attachments": [{}]}}'),
    ({"prompt": "", "id": "t-2"}, '{"input": {"text": ""}, "id": "t-2"}'),
]
NO_TASK = "a task needs a prompt, file_urls, attachments or an id to continue$"
REFUSED = [  # a call, its arguments and options, and what the ValueError says
    ("create", ["a-1"], {}, NO_TASK),
    ("create", ["a-1", "", []], {"title": "x", "id": "", "attachments": []}, NO_TASK),
    ("create", ["a-1", "Hi"], {"user_details": {}}, r"\buser\b"),
    ("create", ["a-1", "Hi"], {"existing_task_id": "t-1"}, r"\bid\b"),
    ("create", ["a-1", "Hi"], {"tool_call_payload_extension": {}}, r"\bpayload_extension\b"),
    ("create", ["a-1", "Hi"], {"input": {"text": "Ho"}}, "prompt"),
    ("create", ["a-1", "Hi"], {"agent_version": "1\n2"}, "agent_version"),
    ("create", ["", "Hi"], {}, "agent_id"),
    ("list", ["a-1"], {"filters": {"status": "error"}}, "status"),
    ("list", ["  "], {}, "agent_id"),
    ("load", [""], {}, "id"),
]
QUERIES = [  # filters of `list`, and the query
    ({"user_id": None}, ""),
    ({"user_id": "u&1 é", "parent_task_id": "p"}, "?user_id=u%261+%C3%A9&parent_task_id=p"),
    ({"status": xtask.AgentExecutionStatus.Error, "a": ""}, "?status=error&a="),
    ({"status": ["new", xtask.AgentExecutionStatus.Failed]}, "?status=new&status=failed"),
    ({"archived": True, "mine": False, "limit": 5}, "?archived=true&mine=false&limit=5"),
    ({"archived": [True, False]}, "?archived=true&archived=false"),
]
# fmt: on


@pytest.mark.parametrize("options, body", OPTIONS)
def test_the_options_of_create_are_sent_but_for_none(options, body):
    with RawServer(answer_calls) as server:
        task = xtask.Task.create("a-1", configuration=server.config, **{"prompt": "Hi", **options})
        assert task.configuration is server.config
    [arrived] = sent_bodies(server)
    arrived["input"].setdefault("text", "")
    assert arrived == json.loads(body)
    version = options.get("agent_version")
    assert server.requests[0][2].get("x-agent-version") == (version and str(version))


@pytest.mark.parametrize("name, arguments, options, says", REFUSED)
def test_wrong_arguments_are_a_value_error_before_any_request(name, arguments, options, says):
    with RawServer(answer_calls) as server:
        with pytest.raises(ValueError, match=says):
            getattr(xtask.Task, name)(*arguments, configuration=server.config, **options)
        assert server.connections == 0


@pytest.mark.parametrize("call", ["save", "stop", "reload", "get_activity_log", "events"])
def test_a_task_whose_id_fits_in_no_path_is_a_value_error(call):
    with RawServer(answer_calls) as server:
        for id in ("", ".", "..", " "):
            with pytest.raises(ValueError, match="id"):
                make_call(make_task(server.config, id=id), call)
        assert server.connections == 0


@pytest.mark.parametrize("filters, query", QUERIES)
def test_the_filters_of_a_list_are_its_query(filters, query):
    with RawServer(answer_calls) as server:
        [item] = xtask.Task.list("a-1", configuration=server.config, **filters)
        assert type(item) is xtask.TasksListItem and item.to_dict() == LIST_ITEM
        assert item.load().configuration is server.config
    assert [path for _, path, *_ in server.requests] == [
        HISTORY_PATH + query,
        "/agent-execution/t-9/status",
    ]


# -- reload, stop, wait and the activity log


def test_a_reload_drops_what_was_not_saved():
    with replying((200, task_dict(title="Server's", newer=1))) as server:
        task = make_task(server.config, older=1)
        task.title, task.worker_id = "Mine", "w"
        assert task.reload() is task and task.configuration is server.config
        assert task.to_dict() == task_dict(title="Server's", newer=1)
        assert task.worker_id is None and task.extra == {"newer": 1}


@pytest.mark.parametrize("reply", [(204,), (200,), (200, b"null")], ids=str)
def test_a_stop_that_is_answered_without_a_body_asks_for_the_status(reply):
    with replying(reply, (200, task_dict(status="stopped"))) as server:
        task = make_task(server.config)
        assert task.stop() is task and task.status == "stopped"
    assert [request[0] for request in server.requests] == ["DELETE", "GET"]


def wait_by(face, task, **options):
    if face == "sync":
        return task.wait_finished(**options)
    return asyncio.run(task.await_finished(**options))


both_waits = pytest.mark.parametrize("face", ["sync", "async"])


@both_waits
def test_waiting_looks_with_growing_pauses_until_the_status_is_final(face, pauses, monkeypatch):
    async def note(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    with replying(
        *[(200, task_dict(status="paused"))] * 12, (200, task_dict(status="failed"))
    ) as server:
        task = make_task(server.config)
        assert wait_by(face, task) is task and task.status == "failed"
    assert [request[1] for request in server.requests] == [STATUS_PATH] * 13
    pauses = [pause for pause in pauses if pause]
    assert pauses == sorted(pauses) and pauses[0] == 0.5 and pauses[-2:] == [5.0, 5.0]


@both_waits
@pytest.mark.parametrize("status", ["paused", "completed"])
def test_waiting_ends_where_a_person_is_needed_if_that_is_asked_for(face, status, pauses):
    replies = (200, task_dict(status="executing")), (200, task_dict(status=status))
    with replying(*replies) as server:
        task = make_task(server.config, status="paused")  # which may be old
        assert wait_by(face, task, or_paused=True).status == status
        assert len(server.requests) == 2


@both_waits
@pytest.mark.parametrize("timeout", [0, 0.05])
def test_waiting_too_long_is_a_timeout_error_that_says_how_the_task_stands(face, timeout):
    with replying((200, task_dict(status="paused"))) as server:
        with pytest.raises(TimeoutError, match=f"t-1 .*paused.*{timeout}"):
            wait_by(face, make_task(server.config), timeout=timeout)
        assert server.requests


@pytest.mark.parametrize(
    "reply",
    [(404, {"detail": "No log"}), (200,), (200, b"null"), (200, {}), (200, []), (204,)],
    ids=str,
)
def test_no_activity_log_yet_is_a_404(reply):
    with replying(reply) as server:
        with pytest.raises(xtask.ModuleException) as caught:
            make_task(server.config).get_activity_log()
    assert caught.value.status_code == 404


def test_an_activity_log_is_given_whole():
    with RawServer(answer_calls) as server:
        assert make_task(server.config).get_activity_log().to_dict() == EMPTY_LOG


# -- errors

# fmt: off
ERRORS = [  # the status and the body of an answer, and the description (None: any)
    (400, b'{"detail": "Not deployed"}', "Not deployed"),
    (401, b'{"message": "Invalid key"}', "Invalid key"),
    (403, b'{"error": "Not yours", "code": 7}', "Not yours"),
    (409, b'{"detail": null, "message": " Busy "}', "Busy"),
    (400, b'{"error": "third", "message": "second", "detail": "first"}', "first"),
    (400, b'{"error": {"message": "Deep", "code": 7}}', "Deep"),
    (400, b'{"detail": {"error": "Deep"}}', "Deep"),
    (404, b'{"message": {"detail": "Deep"}}', "Deep"),
    (400, b'{"detail": {"error": {"message": "Too deep"}}}', "Bad Request"),
    (400, b'{"detail": {"code": 1}}', "Bad Request"),
    (400, b'{"detail": "", "error": 5}', "Bad Request"),
    (422, b'{"detail": [{"loc": ["body", "input", 0], "msg": "required", "type": "missing"}]}',
     "body.input.0: required"),
    (422, b'{"detail": [{"loc": ["a"], "msg": "no"}, {"loc": ["b"], "msg": "long"}]}',
     "a: no; b: long"),
    (422, b'{"detail": []}', None),
    (422, b'{"detail": [{"loc": "query"}, {"msg": "bad"}, {"loc": [null], "msg": 5}]}', None),
    (422, b'{"detail": [1, {"msg": "bad"}]}', None),
    (400, b'{"detail": [{"message": "bad agent"}, "bad key"]}', "bad agent; bad key"),
    (418, b"plain\r\n text", "plain text"),
    (400, b"long" * 100, "long" * 50),
    (400, b"caf\xe9", "caf\ufffd"),
    (400, b'"JSON text"', "JSON text"),
    (400, b"[1]", "Bad Request"),
    (400, b"null", None),
    (500, b"", "Internal Server Error"),
    (500, HTML_PAGE, "Internal Server Error"),
    (403, b"\n" + HTML_PAGE, "Forbidden"),
    (404, b'{"detail": "cut', None),
    (300, b"", "Multiple Choices"),
    (599, b"", None),
]
UNEXPECTED = [  # calls, and the body of an answer of status 200 that they cannot use
    (["reload", "list", "get_activity_log"],
     [HTML_PAGE, b"sorry", b'{"id": "t-1", "sta', b"\xff", b"[" * 100_000, b"5"]),
    (["load", "create Hi", "stop", "reload"],
     [b'{"detail": "no task"}', b'{"id": 5}', b'[{"id": "t-1"}]', b'"text"']),
    (["load", "create Hi", "reload"], [b"", b"null"]),
    (["list"], [b"", b"null", b"[1]", b'{"items": []}']),
    (["get_activity_log"], [b"[1]"]),
]
OTHER_ANSWERS = [  # a call, and an answer that it cannot use
    ("reload", 200, HTML_PAGE, ()), ("list", 200, {}, ()), ("events", 200, {}, ()),
    ("reload", 302, b"", [("Location", "http://e.com")]),
    ("reload", 200, b"x", [("Content-Encoding", "br")]),
]
# fmt: on


def parsed_body(body):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(body)


def failed_call(server, call):
    """The exception of a call."""
    with pytest.raises(xtask.ModuleException) as caught:
        make_call(make_task(server.config), call)
    return caught.value


@pytest.mark.parametrize("status, body, description", ERRORS)
def test_an_error_says_what_the_server_says(status, body, description):
    with replying((status, body)) as server:
        error = failed_call(server, "load")
    assert (error.status_code, error.details, error.answered) == (status, parsed_body(body), True)
    assert error.description == (description or error.description) != ""
    assert str(error) == f"[{status}] {error.description}" and len(server.requests) == 1
    assert "\n" not in str(error) and "<html" not in str(error)
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.details, twin.answered) == (str(error), error.details, True)


@pytest.mark.parametrize("calls, bodies", UNEXPECTED)
def test_an_answer_of_another_kind_is_a_500_that_names_the_host(calls, bodies):
    for call in calls:
        for body in bodies:
            with replying((200, body)) as server:
                error = failed_call(server, call)
            assert (error.status_code, error.details, error.answered) == (
                500,
                parsed_body(body),
                True,
            )
            assert f"127.0.0.1:{server.port}" in str(error) and "<html" not in str(error)


@pytest.mark.parametrize(
    "call, status, body, headers", [*((c, 403, b"No", ()) for c in EVERY_CALL), *OTHER_ANSWERS]
)
def test_an_error_of_any_call_carries_the_headers_of_its_answer(call, status, body, headers):
    with replying((status, body, [*headers, ("X-Request-ID", "r-1")])) as server:
        error = failed_call(server, call)
    assert error.status_code == (500 if status == 200 else status) and len(server.requests) == 1
    assert error.answered and error.headers["x-request-id"] == "r-1"
    assert pickle.loads(pickle.dumps(error)).headers == error.headers


def test_the_error_of_an_answer_that_is_cut_off_carries_its_headers():
    def cut(connection):
        connection.send("HTTP/1.1 200 OK\r\nX-Request-ID: r-1\r\nContent-Length: 9\r\n\r\nx")
        connection.sock.close()

    with replying(cut) as server, configuration(server.url, max_retries=0) as config:
        with pytest.raises(xtask.ModuleException, match="cut off") as caught:
            xtask.Task.load("t-1", config)
    assert caught.value.headers["x-request-id"] == "r-1" and not caught.value.answered


def test_no_connection_is_a_500_that_names_the_host_and_chains_its_cause():
    with refusing(max_retries=0) as config, pytest.raises(xtask.ModuleException) as caught:
        xtask.Task.load("t-1", config)
    error = caught.value
    assert (error.status_code, error.details, error.answered) == (500, None, False)
    assert config.base_url[7:] in str(error) and "refused" in str(error).lower()
    assert isinstance(error.__cause__, ConnectionRefusedError) and error.headers is None


# -- logging and cancelling


def test_debug_logging_has_a_line_for_each_request(caplog, pauses):
    caplog.set_level("DEBUG", xtask.__name__)
    with (
        replying((503,), (200, [LIST_ITEM]), plays(FINISHED)) as server,
        refusing(max_retries=0) as nobody,
    ):
        xtask.Task.list("a-1", configuration=server.config, user_id="s3cret")
        make_call(make_task(server.config), "events")
        with pytest.raises(xtask.ModuleException):
            make_task(nobody).stop()
    expected = f"""
        GET {server.url}{HISTORY_PATH} 503
        GET {server.url}{HISTORY_PATH} 200
        GET {server.url}/org-1/agent-execution/t-1/events 200
        DELETE {nobody.base_url}/agent-execution/t-1 refused"""
    assert len(caplog.messages) == 4
    for message, words in zip(caplog.messages, expected.strip().splitlines()):
        assert all(word in message.replace("Refused", "refused") for word in words.split())
        assert re.search(r"\d ?ms\b", message)
    assert "s3cret" not in caplog.text and KEY not in caplog.text


def test_a_program_that_does_not_import_logging_does_not_pay_for_it():
    code = """if True:
        import sys, xtask
        config = xtask.Configuration("k", "o", sys.argv[1])
        print(xtask.Task.load("t-1", config).id, "logging" in sys.modules)"""
    with RawServer(answer_calls) as server:
        ran = run_python(code, server.url)
    assert (ran.stdout, ran.stderr) == ("t-1 False\n", "")


@pytest.mark.parametrize("call", ["areload", "await_finished", "aget_activity_log", "asave"])
def test_cancelling_a_twin_ends_its_thread_too(call):
    async def main():
        waiting = asyncio.ensure_future(getattr(make_task(server.config), call)())
        while not server.requests:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    with replying(silent) as server:
        began = time.monotonic()
        asyncio.run(main())  # it waits for the threads of the executor
        assert time.monotonic() - began < 5 and server.closed.get(timeout=5)


def test_an_error_of_any_length_is_told_in_one_short_line():
    with serving("x" * 9000 + "||", max_retries=0) as server:
        assert len(str(fails(server.config))) < 400


def test_debug_logging_tells_how_long_a_request_took(caplog):
    caplog.set_level("DEBUG")
    with replying((200, task_dict())) as server:
        began = time.monotonic()
        make_call(make_task(server.config), "reload")
        most = (time.monotonic() - began) * 1000
    assert 0 <= float(re.search(r"([\d.]+) ?ms", caplog.text)[1]) <= most + 1


# ---- Saving --------------------------------------------------------------------------------------
# What a save sends and keeps, attributes beyond the fields, status and stop, copies and subclasses.

UPDATE_PATH = "/agent-execution/t-1/update"


def arrivals(server):
    """What arrived: the JSON body of a PATCH, else the method."""
    return [
        json.dumps(json.loads(body), sort_keys=True) if body else method
        for method, _, _, body in server.requests
    ]


def updating(state):
    """A server of one task that takes what is saved."""

    def script(connection, number):
        for _, _, _, body in iter(connection.request, None):
            state.update(json.loads(body or "{}"))
            connection.answer(200, dict(state))

    return RawServer(script)


LOADED_TASK = task_dict(
    title="Sums",
    created_at="2025-11-06T06:41:54.048626999Z",
    input={"text": "Hi", "files": ["a"], "user": {"plan": "x"}, "lang": "de"},
    output_schema={"b": 1, "a": [1]},
    tokens={"total_tokens": 1},
    served_model={"name": "m"},
    save="the name of a method",
)
# fmt: off
CHANGES = [  # what is done to a task, and the JSON that the save sends ("GET": it reloads)
    ("pass", "GET"),
    ("task.title = 'x'; task.title = 'Sums'", "GET"),
    ("task.status = 'executing'; task.input.files = ['a']; task.created_at += timedelta(0)", "GET"),
    ("task.output_schema = {'a': [1], 'b': 1}; task.tokens = {'total_tokens': 1}", "GET"),
    ("task.internal_status = 'half'", '{"internal_status": "half"}'),
    ("task.title = None", '{"title": null}'),
    ("task.title = ''", '{"title": ""}'),
    ("task.title = False", '{"title": false}'),
    ("task.events_streaming = 1", '{"events_streaming": 1}'),
    ("task.output_schema['b'] = True", '{"output_schema": {"a": [1], "b": true}}'),
    ("task.output_schema['b'] = 1.0", '{"output_schema": {"a": [1], "b": 1.0}}'),
    ("task.output_schema['a'].append(2)", '{"output_schema": {"a": [1, 2], "b": 1}}'),
    ("del task.output_schema['a']", '{"output_schema": {"b": 1}}'),
    ("task.input.text = 'Yo'; task.input.user = None",
     '{"input": {"files": ["a"], "lang": "de", "text": "Yo", "user": null}}'),
    ("task.input.lang = 'en'; task.input.user = User(email='f')",
     '{"input": {"files": ["a"], "lang": "en", "text": "Hi", "user": {"email": "f"}}}'),
    ("task.input.user.plan = 'y'",
     '{"input": {"files": ["a"], "lang": "de", "text": "Hi", "user": {"plan": "y"}}}'),
    ("task.output_format = OutputFormat.Json", '{"output_format": "json"}'),
    ("task.finished_at = datetime(2026, 1, 2)", '{"finished_at": "2026-01-02T00:00:00+00:00"}'),
    ("task.mcp_servers.append({})", '{"mcp_servers": [{}]}'),
    ("task.tokens = {'total_tokens': 2}", '{"tokens": {"total_tokens": 2}}'),
    ("task.served_model = 5", '{"served_model": 5}'),
    ("task.served_model = None", '{"served_model": null}'),
    ("task.served_model['size'] = 1", '{"served_model": {"name": "m", "size": 1}}'),
    ("task.extra['served_model']['size'] = 1", '{"served_model": {"name": "m", "size": 1}}'),
    ("task.extra['new'] = [True]", '{"new": [true]}'),
    ("task.extra['new'] = 1; task.new = 2", '{"new": 2}'),
    ("task.extra['save'] = 1", '{"save": 1}'),
    ("task.extra['new'] = None; task.is_continuous = True", '{"is_continuous": true, "new": null}'),
]
FAILURES = [  # of a save: the first answer, and what arrives after that
    ((500, b"no"), []), ((422, {"detail": []}), []), ((200, b"<html>"), []), ((200, [1]), []),
    ((200, b"null"), ["GET"]), ((204,), ["GET"]), (RawConnection.reset, []),
]
MEANWHILE = [  # what is done while a save of title="New" is under way; the JSON of the next save
    ("pass", "GET"),
    ("task.title = 'Newer'", '{"title": "Newer"}'),
    ("task.title = 'Old'", '{"title": "Old"}'),
    ("task.title = 'Newer'; task.title = 'New'", "GET"),
    ("task.worker_id = 'w'; task.result = 'mine'", '{"result": "mine", "worker_id": "w"}'),
    ("task.input.files.append('a')", '{"input": {"files": ["a"], "text": "Hi"}}'),
    ("task.served_model = 'y'", '{"served_model": "y"}'),
    ("task.extra.update(served_model='y', new=1)", '{"new": 1, "served_model": "y"}'),
    ("task.mcp_servers = [{'name': 'a'}]", '{"mcp_servers": [{"name": "a"}]}'),
]
# fmt: on


def run_change(task, code):
    """Run what a user would write."""
    exec(code, {**vars(xtask), **globals(), "task": task})


def after_change(state, body):
    return state if body == "GET" else {**state, **json.loads(body)}


@pytest.mark.parametrize("code, body", CHANGES)
def test_a_save_sends_the_top_level_fields_that_differ_from_what_the_server_last_told(code, body):
    with updating(copy.deepcopy(LOADED_TASK)) as server:
        task = xtask.Task.load("t-1", server.config)
        run_change(task, code)
        assert task.save() is task and task.to_dict() == after_change(LOADED_TASK, body)
        task.save()
    assert arrivals(server) == ["GET", body, "GET"]
    assert server.requests[1][1] == (STATUS_PATH if body == "GET" else UPDATE_PATH)


def test_each_field_is_sent_when_it_changes():
    names = [field.name for field in dataclasses.fields(xtask.Task)]
    with replying((200, task_dict())) as server:
        task = make_task(server.config)
        for name in names:
            if name not in ("id", "extra"):
                setattr(task, name, "other")
                task.save()
    expected = [{name: "other"} for name in names if name not in ("id", "extra")]
    assert sent_bodies(server) == expected and len(expected) > 40


def test_a_save_takes_the_servers_answer_and_rolls_nothing_back():
    with replying((200, task_dict(status="completed", result="4", new=1))) as server:
        task = make_task(server.config, served_model="x")
        task.internal_status = "reading"
        task.save()
        assert task.to_dict() == task_dict(status="completed", result="4", new=1)
        assert task.internal_status is None and task.configuration is server.config
    assert arrivals(server) == ['{"internal_status": "reading"}']


def test_what_is_nested_hundreds_deep_is_saved():
    deep = json.loads('{"a": ' * 600 + "1" + "}" * 600)
    with updating(task_dict(payload_extension=deep)) as server:
        task = xtask.Task.load("t-1", server.config)
        task.payload_extension["b"] = 2
        task.save()
    assert sent_bodies(server)[1] == {"payload_extension": {**deep, "b": 2}}


@pytest.mark.parametrize("failure, more", FAILURES)
def test_a_failed_save_loses_nothing(failure, more):
    replies = [failure, *[(503,) for _ in more], (200, task_dict(title="New"))]
    with replying(*replies) as server, configuration(server.url, max_retries=0) as config:
        task = make_task(config, title="Old", served_model="x")
        task.title, task.extra["served_model"] = "New", "y"
        task.input.files.append("a")
        state = task.to_dict()
        with pytest.raises(xtask.ModuleException):
            task.save()
        assert task.to_dict() == state
        task.save().save()
    body = '{"input": {"files": ["a"], "text": "Hi"}, "served_model": "y", "title": "New"}'
    assert arrivals(server) == [body, *more, body, "GET"]


@pytest.mark.parametrize("reply", [(204,), (200,), (200, b"null")], ids=str)
def test_a_save_that_is_answered_without_a_body_asks_for_the_state(reply):
    with replying(reply, (200, task_dict(title="New", result="4"))) as server:
        task = make_task(server.config)
        task.title = "New"
        assert task.save() is task and task.result == "4"
        task.save()
    assert arrivals(server) == ['{"title": "New"}', "GET", "GET"]


def held_save(*replies):
    """A server that answers the first request once `go_on` is set."""

    def hold(connection):
        server.go_on.wait(10)
        connection.answer(*replies[0])

    server = replying(hold, *replies[1:])
    server.go_on = threading.Event()
    return server


async def change_while_saving(task, code, server):
    """Change a task when its save has arrived, then let the server go on."""
    saving = asyncio.ensure_future(task.asave())
    while not server.requests:
        await asyncio.sleep(0.005)
    run_change(task, code)
    server.go_on.set()
    return await saving


@pytest.mark.parametrize("code, body", MEANWHILE)
@pytest.mark.parametrize("old, first", [("Old", '{"title": "New"}'), ("New", "GET")])
def test_what_is_changed_while_a_save_is_under_way_stays_changed(old, first, code, body):
    answer = task_dict(title="New", result="4", served_model="x")
    with held_save((200, answer)) as server:
        task = make_task(server.config, title=old, served_model="x")
        task.title = "New"
        assert asyncio.run(change_while_saving(task, code, server)) is task
        assert task.to_dict() == after_change(answer, body), "the rest is the server's"
        task.save()
    assert arrivals(server) == [first, body]


def test_what_is_changed_while_a_save_fails_is_sent_with_the_rest():
    with held_save((403,), (200, task_dict())) as server:
        task = make_task(server.config)
        task.title = "New"
        with pytest.raises(xtask.ModuleException):
            asyncio.run(change_while_saving(task, "task.worker_id = 'w'", server))
        task.save()
    assert arrivals(server) == ['{"title": "New"}', '{"title": "New", "worker_id": "w"}']


def test_a_cancelled_save_loses_nothing():
    async def cancel_save():
        saving = asyncio.ensure_future(task.asave())
        while not server.requests:
            await asyncio.sleep(0.005)
        saving.cancel()
        await asyncio.wait([saving])

    with replying(silent, (200, task_dict(title="New"))) as server:
        task = make_task(server.config)
        task.title = "New"
        asyncio.run(cancel_save())
        task.save().save()
    assert arrivals(server) == ['{"title": "New"}', '{"title": "New"}', "GET"]


# -- attributes beyond the fields


def test_a_misspelt_name_is_an_attribute_error_that_says_how_to_add_one():
    task = make_task(None, input={"text": "Hi", "user": {"email": "e"}})
    for record in (task, task.input, task.input.user):
        with pytest.raises(AttributeError, match=r"""extra\[.?.titel.?.\]"""):
            record.titel = "x"
        with pytest.raises(AttributeError, match="titel"):
            _ = record.titel
        assert getattr(record, "titel", 5) == 5 and "titel" not in str(record.to_dict())
        record.extra["titel"] = "x"
        assert record.titel == "x"
        record.titel = "y"
        assert record.extra == {"titel": "y"} and record.to_dict()["titel"] == "y"


# -- status and stop


@pytest.mark.parametrize("result", [None, "", "No"])
@pytest.mark.parametrize("status", ["executing", xtask.AgentExecutionStatus.Failed])
def test_setting_a_status_always_sends_it_with_all_other_changes(status, result):
    with replying((500,), (200, task_dict(status=status.lower()))) as server:
        task = make_task(server.config, result="old")
        task.title = "New"
        with pytest.raises(xtask.ModuleException):
            task.set_status(status, result)
        assert task.status == status and type(task.status) is xtask.AgentExecutionStatus
        assert task.save() is task
        task.set_status(status)
    body = {"status": status.lower(), "title": "New"}
    body.update({} if result is None else {"result": result})
    assert sent_bodies(server) == [body, body, {"status": status.lower()}]


@pytest.mark.parametrize("status", ["finished", "", "Completed", None, 5])
def test_what_names_no_status_is_refused_before_any_request(status):
    with replying((500,)) as server:
        task = make_task(server.config)
        with pytest.raises(ValueError, match="pending.*stopped"):
            task.set_status(status)
        assert task.status == "executing" and server.connections == 0


def test_an_internal_status_may_have_255_characters():
    with updating(task_dict()) as server:
        task = make_task(server.config)
        task.internal_status = "é" * 256
        for call in (task.save, lambda: task.set_status("failed")):
            with pytest.raises(ValueError, match=r"internal_status.*255"):
                call()
        assert server.connections == 0
        task.internal_status = "é" * 255
        assert task.save().internal_status == "é" * 255


@pytest.mark.parametrize("value, error", [(float("nan"), ValueError), ({1}, TypeError)], ids=str)
def test_what_has_no_form_in_json_is_refused_before_any_request(value, error):
    with replying((500,)) as server:
        task = make_task(server.config)
        task.payload_extension = {"deep": [value]}
        with pytest.raises(error, match="JSON|set"):
            task.save()
        assert server.connections == 0


def test_a_nan_that_the_server_sent_does_not_keep_a_task_from_being_saved():
    with updating({**task_dict(), "duration": float("nan")}) as server:
        task = xtask.Task.load("t-1", server.config)
        task.title = "New"
        assert task.save().title == "New"
    assert sent_bodies(server) == [None, {"title": "New"}]


@pytest.mark.parametrize("first", [RawConnection.reset, (503,)], ids=["broken", "503"])
def test_a_404_to_the_second_try_of_a_stop_is_settled_by_the_status(first, pauses):
    with replying(first, (404,), (200, task_dict(status="stopped"))) as server:
        assert make_task(server.config).stop().status == "stopped"
    assert arrivals(server) == ["DELETE", "DELETE", "GET"]


def test_a_404_to_the_first_try_of_a_stop_is_an_error():
    with replying((404, {"detail": "Task not found"})) as server:
        task = make_task(server.config)
        with pytest.raises(xtask.ModuleException, match="Task not found"):
            task.stop()
        assert task.status == "executing"
    assert arrivals(server) == ["DELETE"]


def test_a_stop_of_a_task_whose_status_did_not_come_has_the_new_one():
    with replying((200, task_dict(status="stopped"))) as server:
        assert xtask.Task.from_dict({"id": "t-1"}, server.config).stop().status == "stopped"


def test_a_stop_keeps_the_unsaved_changes_but_for_the_status():
    with replying((200, task_dict(title="Old", status="stopped", result="half"))) as server:
        task = make_task(server.config, title="Old")
        task.title, task.status = "New", "paused"
        assert task.stop() is task
        assert (task.title, task.status, task.result) == ("New", "stopped", "half")
        task.save()
    assert arrivals(server) == ["DELETE", '{"title": "New"}']


# -- copies and subclasses


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))]
)
def test_a_copy_saves_its_own_changes_alone(duplicate):
    with updating(task_dict(served_model="x")) as server:
        task = xtask.Task.load("t-1", xtask.Configuration(KEY, ORG, server.url))
        task.title = "Old"
        twin = duplicate(task)
        assert twin == task and twin.configuration == task.configuration
        twin.title, twin.extra = "New", {"served_model": "y"}
        assert (task.title, twin.configuration.api_key) == ("Old", KEY)
        with twin.configuration, task.configuration:
            twin.save().save()
            task.save()
    body = '{"served_model": "y", "title": "New"}'
    assert arrivals(server) == ["GET", body, "GET", '{"title": "Old"}']


class Noted(xtask.Task):
    """A subclass with a method, a class attribute and a property."""

    handler = None

    @property
    def shout(self):
        return self.title.upper()

    @shout.setter
    def shout(self, text):
        self.title = text.lower()


@dataclasses.dataclass(repr=False)
class Colored(Noted):
    color: str = "red"
    notes: list = dataclasses.field(default_factory=lambda: ["first"])


def test_a_subclass_keeps_its_own_fields_and_attributes():
    with updating(task_dict(title="Sums")) as server:
        task, other = (Colored.load("t-1", server.config) for _ in range(2))
        task.handler = print
        task.save()
        assert (type(task), task.handler, task.shout, task.color) == (Colored, print, "SUMS", "red")
        task.notes.append("second")
        assert other.notes == ["first"], "each record has its own"
        task.shout, task.color = "LOUD", "blue"
        assert task.save() is task and (task.handler, task.title) == (print, "loud")
        assert (task.color, task.notes) == ("blue", ["first", "second"])
        with pytest.raises(AttributeError):
            task.colour = "green"
    body = '{"color": "blue", "notes": ["first", "second"], "title": "loud"}'
    assert arrivals(server) == ["GET", "GET", "GET", body]


def test_a_key_with_an_underscore_is_reached_in_extra_alone():
    task = make_task(None, _new=1)
    with pytest.raises(AttributeError):
        task._new = 2
    assert not hasattr(task, "_new") and task.extra == {"_new": 1}


# ---- Events ------------------------------------------------------------------------------------
# A task's stream: live, complete to its end, resumed, each event once, errors at once, bounded.

either_face = pytest.mark.parametrize("face", ["sync", "async"])


def one_chunk(data):
    return b"%x ;a=b\r\n%s\r\n" % (len(data), data)


def compressed(wbits, frame=bytes):
    """Compresses one part after the other, each flushed so that it can be read at once."""

    def start():
        compressor = zlib.compressobj(wbits=wbits)
        flush = functools.partial(compressor.flush, zlib.Z_SYNC_FLUSH)
        return lambda part: frame(compressor.compress(part) + flush())

    return start


# fmt: off
FRAMINGS = {  # headers, and what makes the function that encodes one part after the other
    "until it closes": ("", lambda: bytes),
    "of a length": ("Content-Length: 99999\r\n", lambda: bytes),
    "in chunks": ("Transfer-Encoding: chunked\r\n", lambda: one_chunk),
    "gzip": ("Content-Encoding: gzip\r\n", compressed(31)),
    "deflate": ("Content-Encoding: deflate\r\n", compressed(15)),
    "gzip in chunks": (
        "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", compressed(31, one_chunk)),
}
# fmt: on


def framed(framing, parts, after=lambda connection: None, size=MIB):
    """A script: a stream whose parts are sent in this framing, in pieces of this size."""
    headers, start = FRAMINGS[framing]

    def script(connection):
        frame, head = (
            start(),
            "HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n",
        )
        connection.send(f"{head}{headers}\r\n")
        for part in parts:
            data = frame(part.encode())
            for offset in range(0, len(data), size):
                connection.send(data[offset : offset + size])
        after(connection)

    return script


def numbered(numbers):
    return [sse("chunk", str(n), id=n) for n in numbers]


def fails_to_follow(server, face="sync", each=lambda event: None, **changes):
    with pytest.raises(xtask.ModuleException) as caught:
        follow(server, face, each, **changes)
    return caught.value


@pytest.mark.parametrize("face", ["events", "aevents"])
@pytest.mark.parametrize("streaming", [False, None])
def test_a_task_without_a_stream_is_refused_at_the_call(face, streaming):
    task = make_task(configuration("http://e.test"), events_streaming=streaming)
    with pytest.raises(ValueError, match="events_streaming=True"):
        getattr(task, face)()


# Live


@either_face
@pytest.mark.parametrize("size", [1, MIB])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_each_event_is_there_before_the_server_sends_the_next(framing, size, face):
    arrived, in_time = threading.Semaphore(0), []

    def parts():
        for event in sse("brand_new", {"a": "ü\u4e2d"}), sse("chunk", "1"), FINISHED:
            yield event
            in_time.append(arrived.acquire(timeout=2))

    with feed(framed(framing, parts(), size=size), answers(410)) as server:
        events = follow(server, face, lambda event: arrived.release())
    assert [event.data for event in events[:-1]] == [{"a": "ü\u4e2d"}, "1"]
    assert (
        events[-1].data.result == "4" and in_time[:2] == [True] * 2
    )  # it may leave before the third


# Resuming


def closed(connection):
    pass


# fmt: off
CUTS = [
    ("until it closes", closed), ("until it closes", RawConnection.reset), ("of a length", closed),
    ("in chunks", closed), ("in chunks", RawConnection.reset), ("gzip in chunks", closed),
    ("gzip", RawConnection.reset), ("gzip", closed),
]
# fmt: on


@either_face
@pytest.mark.parametrize("framing, end", CUTS)
def test_a_stream_that_is_cut_within_an_event_goes_on_after_the_last_whole_one(
    framing, end, face, pauses
):
    third = threading.Event()

    def parts():
        yield from numbered([1, 2, 3])
        third.wait(2)  # a reset may destroy what was not read yet
        yield sse("chunk", "4", id=4)[:-3]

    rest = plays(*numbered([4, 5, 6]), FINISHED)
    with feed(framed(framing, parts(), end), rest, answers(410)) as server:
        events = follow(server, face, lambda event: event.data == "3" and third.set())
        assert [headers.get("last-event-id") for headers in server.streams] == [None, "3"]
        asked = [f"{method} {path.rpartition('/')[2]}" for method, path, _, _ in server.requests]
        assert asked == ["GET events", "GET status", "GET events"]
    assert chunks(events) == list("123456")


def test_a_stream_over_tls_goes_on_too(certificate, pauses):
    trusting = ssl.create_default_context(cafile=certificate.file)
    cut = plays(*numbered([1, 2]), sse("chunk", "3")[:-3])
    rest = plays(*numbered([3]), FINISHED)
    with feed(cut, rest, context=certificate.context, ssl_context=trusting) as server:
        assert chunks(follow(server)) == list("123")


# fmt: off
LAST_IDS = [  # what each connection sends, and the ids that the next ones are asked with
    ([sse("chunk", 1, id=7), ": ping\n\n", sse("chunk", 2)], ["7", "7", "7"]),
    (["id: 8\n\n", "retry: 200\n\n"], ["8", "8"]),
    ([sse("chunk", 1, id=7) + "id: 9\ndata: cut"], ["7"]),
    ([sse("chunk", 1, id="ü-\u4e2d")], ["ü-\u4e2d".encode().decode("latin-1")]),
    ([sse("chunk", 1, id=7), sse("chunk", 2, id="")], ["7", None]),
    ([sse("chunk", 1, id=7), sse("chunk", 2, id="\x01"), sse("chunk", 3, id=4)], ["7", None, "4"]),
    ([sse("chunk", 1, id="a\x7fb")], [None]),
]
# fmt: on


@pytest.mark.parametrize("sent, ids", LAST_IDS)
def test_a_connection_is_asked_for_with_the_last_id_of_any(sent, ids, pauses):
    with feed(*map(plays, sent), plays(FINISHED)) as server:
        follow(server)
        assert [headers.get("last-event-id") for headers in server.streams] == [None, *ids]


# fmt: off
RETRIES_OF_STREAMS = [  # `retry`, and the least and the most pause
    ("0", 0.1, 0.1), ("100", 0.1, 0.1), ("250", 0.25, 0.25), ("3000", 3, 3), ("30001", 30, 30),
    ("9" * 400, 30, 30), ("soon", 0.1, 30), ("", 0.1, 30),
]
# fmt: on


@pytest.mark.parametrize("retry, least, most", RETRIES_OF_STREAMS)
def test_the_pause_is_the_servers_retry_within_bounds(retry, least, most, pauses):
    # the second connection does not name it: what the first one said still holds
    with feed(plays(f"retry: {retry}\n\n"), plays(sse("chunk", 1)), plays(FINISHED)) as server:
        follow(server)
    assert len(pauses) == 2 and all(least <= pause <= most for pause in pauses)


@either_face
@pytest.mark.parametrize("start", [silent, plays(then=silent)], ids=["no head", "no event"])
def test_a_silent_connection_is_closed_and_replaced(start, face, pauses):
    rest = plays(sse("chunk", "1"), FINISHED)
    with feed(start, rest, idle_timeout=0.2, max_retries=0) as server:
        assert chunks(follow(server, face)) == ["1"]
        assert server.closed.get(timeout=5) == 1 and len(server.streams) == 2


def test_comments_are_no_silence():
    def breathe(connection):
        for _ in range(12):
            time.sleep(0.05)
            connection.send(":\n\n")
        connection.send(FINISHED)

    with feed(plays(then=breathe), idle_timeout=0.4) as server:
        follow(server)
        assert len(server.requests) == 1


def half_a_head(connection):
    connection.send("HTTP/1.1 200 OK\r\nContent-Ty")


def half_a_type(connection):
    connection.send("HTTP/1.1 200 OK\r\nContent-Type: text/ev")


def half_a_coding(connection):
    connection.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gz")


def half_a_204(connection):
    connection.send("HTTP/1.1 204 No")


DOWN, QUIET = answers(503), plays(": nothing yet\n\n")

# fmt: off
PATIENT = [  # connections before the one that ends the task; `max_retries`
    ([plays()] * 20, 0),
    ([closed] * 3, 0), ([RawConnection.reset] * 3, 0), ([half_a_head, half_a_type], 0),
    ([half_a_coding, half_a_204], 0),
    ([DOWN, QUIET] * 3, 1), ([DOWN, plays(sse("chunk", 1)), DOWN, plays(sse("chunk", 2)), DOWN], 1),
    ([DOWN, closed] * 3, 1), ([DOWN, DOWN, RawConnection.reset, DOWN, DOWN], 2),
]
STATUS_FAILURES = [(500,), (429,), RawConnection.reset, RawConnection.wait_closed]
# fmt: on


@pytest.mark.parametrize("scripts, max_retries", PATIENT)
def test_only_failed_connections_in_a_row_are_counted(scripts, max_retries, pauses):
    with feed(*scripts, plays(FINISHED), max_retries=max_retries) as server:
        follow(server)
        assert len(server.streams) == len(scripts) + 1 and len(pauses) == len(scripts)


@either_face
@pytest.mark.parametrize("failure", STATUS_FAILURES, ids=["500", "429", "reset", "silent"])
def test_a_status_that_does_not_come_between_two_connections_is_asked_for_again(
    failure, face, pauses
):
    replies = [plays(sse("chunk", "1")), failure, (200, task_dict()), plays(FINISHED)]

    def script(connection, number):
        while connection.request():
            reply = replies.pop(0)
            if callable(reply):
                return reply(connection)
            connection.answer(*reply)

    with RawServer(script) as server:
        server.config = configuration(server.url, timeout=0.3, idle_timeout=10)
        assert chunks(follow(server, face)) == ["1"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_status_that_fails_for_good_ends_the_stream_after_max_retries(status, pauses):
    with feed(plays(sse("chunk", "1")), max_retries=2) as server:
        server.status = status
        assert fails_to_follow(server).status_code == status
        assert len(server.requests) == 1 + 3


@either_face
@pytest.mark.parametrize("status", [429, 500, 502, 503, 599])
def test_failed_connections_in_a_row_end_it_with_their_status(status, face, pauses):
    down, got = answers(status, {"detail": "down"}, [("X-Request-Id", "r-1")]), []
    with feed(plays(sse("chunk", "1")), down, max_retries=1) as server:
        error = fails_to_follow(server, face, got.append)
        assert (error.status_code, error.description) == (status, "down")
        assert error.headers["x-request-id"] == "r-1"
        assert chunks(got) == ["1"] and len(server.streams) == 3


# fmt: off
CONNECT_ERRORS = [
    ConnectionRefusedError("refused"), OSError(errno.EHOSTUNREACH, "no route"),
    socket.timeout("timed out"),
    OSError(errno.ENETUNREACH, "unreachable"), socket.gaierror(socket.EAI_AGAIN, "no name"),
]
# fmt: on


@pytest.mark.parametrize("failures", [2, 3])
@pytest.mark.parametrize("cause", CONNECT_ERRORS, ids=str)
def test_connecting_may_fail_in_any_way(cause, failures, pauses, monkeypatch):
    def failing(real):
        left = [cause] * failures
        return lambda *arguments, **options: (
            raises(left.pop()) if left else real(*arguments, **options)
        )

    def raises(error):
        raise error

    if isinstance(cause, socket.gaierror):
        monkeypatch.setattr(socket, "getaddrinfo", failing(socket.getaddrinfo))
    else:
        monkeypatch.setattr(socket.socket, "connect", failing(socket.socket.connect))
    with feed(plays(sse("chunk", "1"), FINISHED), max_retries=2) as server:
        if failures == 2:
            assert chunks(follow(server)) == ["1"]
        else:
            error = fails_to_follow(server)
            assert (error.status_code, error.answered) == (500, False) and "127.0.0.1" in str(error)
    assert len(pauses) == 2


def test_the_pause_grows_and_is_jittered_over_connections_that_failed(pauses):
    for _ in range(2):
        with feed(plays("retry: 300\n\n"), *[DOWN] * 6, plays(FINISHED), max_retries=6) as server:
            follow(server)
    first, second = pauses[:7], pauses[7:]
    assert first[0] == second[0] == 0.3 <= min(pauses) and max(pauses) <= 30
    assert first[1] < first[3] < first[5] and first[1:] != second[1:]


def test_any_number_of_failures_may_be_allowed(pauses):
    with refusing(max_retries=1100) as config:
        fails_to_follow(types.SimpleNamespace(config=config))
    assert len(pauses) == 1100 and all(0 < pause <= 30 for pause in pauses)


# fmt: off
LATERS = [(429, "3", [3]), (503, "7", [7]), (500, "60", [60]), (429, "61", []), (503, "3600", [])]
# fmt: on


@pytest.mark.parametrize("status, value, taken", LATERS)
def test_a_stream_obeys_retry_after_up_to_a_minute(status, value, taken, pauses):
    with feed(answers(status, b"", [("Retry-After", value)]), plays(FINISHED)) as server:
        if taken:
            follow(server)
        else:
            assert fails_to_follow(server).status_code == status
        assert pauses == taken


# Once


# fmt: off
REPLAYS = [  # the chunks of each connection, and those that are yielded
    (["123", "123456"], "123456"), (["123", "456"], "123456"), (["aaba"], "aaba"),
    (["aab", "aabXab"], "aabXab"),
    (["ab", "ba", "c"], "abc"), (["12", "", "123"], "123"), (["12", "34", "12345"], "12345"),
    (["12", "1", "3", "123", "4"], "1234"), (["1", "23", "21", "231"], "123"),
    (["aa", "aab"], "aab"),
]
# fmt: on


@pytest.mark.parametrize("sent, got", REPLAYS)
def test_what_is_sent_again_after_a_reconnect_is_skipped(sent, got, pauses):
    streams = [
        [sse("connected", n), *(sse("chunk", c) for c in text)] for n, text in enumerate(sent)
    ]
    streams[-1].append(FINISHED)
    with feed(*(plays("".join(parts)) for parts in streams)) as server:
        events = follow(server)
    assert "".join(chunks(events)) == got
    assert [event.data for event in events if event.type == "connected"] == [0]


def test_the_last_ten_thousand_events_are_remembered(pauses):
    first = plays("".join(sse("chunk", n) for n in range(10_001)))
    with feed(first, plays(sse("chunk", 1)), plays(sse("chunk", 0)), plays(FINISHED)) as server:
        assert chunks(follow(server)) == [*range(10_001), 0]


# Nothing dropped

IDS = {"request_id": "r-1", "operation_id": "o-1"}

# fmt: off
TYPED = [  # an event's type, its data, and the class of what comes
    *((f"task_{end}", {"status": "paused"}, "Task") for end in ["created", "updated", "finished"]),
    ("task_updated", "text", "str"), ("task_updated", [{}], "list"),
    ("sub_task_updated", {"id": "x"}, "dict"),
    *((kind, IDS, "ToolCallRequest") for kind in ["tool_call_request", "think", "analyze"]),
    ("tool_call_result", {**IDS, "new": [1]}, "ToolCallResult"),
    ("brand_new", IDS, "dict"),
    *(("tool_call_result", {**IDS, name: None}, "dict") for name in IDS), ("think", {}, "dict"),
    ("tool_call_request", {**IDS, "request_id": 5}, "dict"),
    ("chunk", "", "str"), ("chunk", None, "NoneType"),
]
# fmt: on


def test_the_type_of_an_event_and_its_data_decide_what_comes():
    sent = [{"type": kind, "data": data, "task_id": "t-2", "x": 1} for kind, data, _ in TYPED]
    with feed(
        plays(*(f"data: {json.dumps(envelope)}\n\n" for envelope in sent), FINISHED)
    ) as server:
        events = follow(server)[:-1]
    assert [type(event.data).__name__ for event in events] == [name for *_, name in TYPED]
    assert [event.raw for event in events] == sent
    assert [event.to_dict() for event in events[3:]] == sent[3:]  # those that are not trimmed
    assert {(event.task_id, event.extra["x"]) for event in events} == {("t-2", 1)}


@either_face
@pytest.mark.parametrize(
    "last", ['data: {"type": "task_finished", "data": {"result": "4"}}\n\n', ""]
)
def test_what_a_trimmed_task_leaves_out_is_taken_from_the_streamed_one(last, face):
    other = sse("task_updated", {"status": "paused"}, task_id="t-2")
    with feed(plays(other, last)) as server:
        server.task = {"id": "t-1", "status": "completed", "result": "4"}
        first, event = follow(server, face)
    required = {
        key: task_dict()[key] for key in ("agent_id", "organization_id", "input", "created_at")
    }
    assert event.data.to_dict() == {**required, "id": "t-1", "result": "4", **event.data.to_dict()}
    assert (event.task_id, first.task_id) == ("t-1", "t-2")
    assert first.data.to_dict() == {**required, "id": "t-2", "status": "paused"}


# fmt: off
NO_ENVELOPES = [  # what is no envelope, what a warning shows of it, and what no warning shows
    *((text, text, "!") for text in [
        "no JSON", "{}", '{"type": 5}', '["type"]', "null",
        '{"type": "chunk"} {}', '{"type": ["chunk"]}', '{"type": "chunk"',
        '{"data": {"type": "chunk"}}']),
    ("[" * 100_000, "[" * 200, "[" * 201), ("ab" * 150, "ab" * 100, "ab" * 101),
    ('{"access_token": "s3cret"}', "access_token", "s3cret"),
    (json.dumps({"access_token": "s3cret", "pad": "x" * 300}), "access_token", "s3cret"),
    ('"type"', "type", "!"), ('"https://e.test/x?sig=s3cret"', "https://e.test/x", "s3cret"),
    ("no \x1b[2J", "no ", "\x1b"),
    (f"not {KEY}", "not ", KEY), ("x" * 185 + KEY, "x" * 185, KEY[:9]),
]
# fmt: on


def test_no_depth_of_an_event_ends_the_stream():
    deep = [
        '{"type": "task_updated", "data": {"id": "t-1", "a": ' + "[" * n + "]" * n + "}}"
        for n in range(300, 1100)
    ]
    with feed(plays(*(f"data: {text}\n\n" for text in deep), FINISHED)) as server:
        assert follow(server)[0].type == "task_updated"


def test_what_is_no_envelope_is_skipped_with_a_warning_that_shows_its_start(caplog):
    caplog.set_level("WARNING")
    spaced = 'data:  \t{"type": "newer", "data": 1} \n\n'
    with feed(
        plays(*(f"data: {text}\n\n" for text, *_ in NO_ENVELOPES), spaced, FINISHED)
    ) as server:
        assert [event.type for event in follow(server)] == ["newer", "task_finished"]
    warned = [record for record in caplog.records if record.name == xtask.__name__]
    assert len(warned) == len(NO_ENVELOPES) and {each.levelname for each in warned} == {"WARNING"}
    for record, (_, shown, hidden) in zip(warned, NO_ENVELOPES):
        assert shown in record.getMessage() and hidden not in record.getMessage()


# fmt: off
TOLD_ERRORS = [  # the data of an `event: error`, and what the error says
    ({"detail": "model is down"}, "model is down"),
    ({"error": {"message": "too long"}}, "too long"),
    ({"message": "no more"}, "no more"), ("overloaded", "overloaded"),
    ({"type": 5, "error": "odd"}, "odd"),
    ({"detail": f"not {KEY}"}, r"not \*\*\*"), ({}, ""), ("<html>", ""),
]
# fmt: on


@either_face
@pytest.mark.parametrize("data, says", TOLD_ERRORS)
def test_an_error_event_is_an_error_with_its_words_after_the_events_before_it(data, says, face):
    text, got = data if isinstance(data, str) else json.dumps(data), []
    with feed(plays(f"{sse('chunk', '1')}event: error\ndata: {text}\n\n{FINISHED}")) as server:
        error = fails_to_follow(server, face, got.append)
        assert re.search(says, error.description) and (error.status_code, error.answered) == (
            500,
            True,
        )
        assert chunks(got) == ["1"] and len(server.requests) == 1


def test_an_envelope_is_an_event_whatever_the_stream_names_it():
    named = [f"event: {name}\n{sse('chunk', name)}" for name in ("error", "other")]
    with feed(plays(*named, "event: error\n\n", FINISHED)) as server:
        assert chunks(follow(server)) == ["error", "other"]


# Errors at once


# fmt: off
ANSWERS_AT_ONCE = [
    *((answers(status, {"detail": "no"}), status, "no$") for status in [300, 400, 401, 404, 410]),
    (answers(200, b"<html>Sign in", [("Content-Type", "text/html")]), 500, "text/html"),
    (answers(200, {"id": "t-1"}), 500, "application/json"),
    (answers(200, b"<html>"), 500, "no Content-Type"),
    (lambda connection: connection.send("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"),
     500, "text/html"),
    (answers(200, b"", [("Content-Type", f"text/{KEY.upper()}")]), 500, r"text/\*\*\*"),
    (answers(201, FINISHED.encode(), [("Content-Type", "text/event-stream")]), 500, "201"),
    (answers(302, b"", [("Location", "http://127.0.0.2:9/")]), 302, "redirect"),
]
# fmt: on


@either_face
@pytest.mark.parametrize("script, status, says", ANSWERS_AT_ONCE)
def test_an_answer_that_is_no_stream_raises_at_once(script, status, says, face, pauses):
    with feed(script) as server:
        error = fails_to_follow(server, face)
        assert error.status_code == status and re.search(says, str(error))
        assert (error.answered, len(server.requests), pauses) == (True, 1, [])


def test_an_error_whose_body_does_not_end_is_raised_with_what_came_of_it():
    def refused(case):
        def script(connection):
            play(connection, f"HTTP/1.1 401 no|{start}")
            case[1](connection)

        start = case[0] + '{"detail": "bad key"}'

        with feed(script, timeout=0.5) as server:
            began = time.monotonic()
            return str(fails_to_follow(server)), time.monotonic() - began < 5  # not idle_timeout

    chunked = "Transfer-Encoding: chunked||15|"
    cases = ("|", silent), ("|", repeats(" ")), (chunked, repeats("0"))
    assert at_once(refused, *cases) == [("[401] bad key", True)] * 3


# Complete to the end


# fmt: off
ENDS = {  # streams that do not bring the last event of the task
    "closed": plays(sse("chunk", "1")),
    "reset": plays(sse("chunk", "1"), then=RawConnection.reset),
    "another task's end": plays(sse("task_finished", {}, task_id="t-2")),
    "204": answers(204),
    "silent": plays(sse("chunk", "1"), then=silent),
    "no head": silent,
}
# fmt: on


@either_face
@pytest.mark.parametrize("end", ENDS)
def test_of_a_final_task_the_last_event_is_made_from_it(end, face):
    with feed(ENDS[end], answers(410), idle_timeout=0.1) as server:
        finished = "2025-11-06T06:42:00Z"
        server.task = task_dict(status="failed", result="why", finished_at=finished, new=[1])
        last = follow(server, face)[-1]
        assert len(server.streams) == 1
    assert (
        type(last) is xtask.TaskUpdateEvent and last.type is xtask.TaskUpdateEventType.TaskFinished
    )
    assert (last.task_id, last.organization_id, last.time) == ("t-1", ORG, last.data.finished_at)
    assert type(last.data) is xtask.Task and last.data.to_dict() == server.task == last.raw["data"]
    assert last.data.configuration is server.config


# fmt: off
NO_ENDS = [  # a stream, the status and the body of the task's load, and the error
    (answers(204), 200, task_dict(), "executing"),
    (plays(), 404, {"detail": "Task not found"}, r"^\[404\] Task not found"),
    (plays(), 200, [], r"^\[500\]"),
]
# fmt: on


@either_face
@pytest.mark.parametrize("script, status, body, says", NO_ENDS)
def test_an_end_that_nothing_explains_is_an_error(script, status, body, says, face, pauses):
    with feed(script) as server:
        server.status, server.task = status, body
        assert re.search(says, str(fails_to_follow(server, face)))
        assert len(server.streams) == 1


@either_face
@pytest.mark.parametrize("mine", [FINISHED, 'data: {"type": "task_finished"}\n\n'])
def test_only_the_end_of_this_task_ends_it_although_the_connection_stays_open(mine, face):
    theirs = sse("task_finished", {"result": "half"}, task_id="t-2")
    open_end = plays(theirs + sse("chunk", "1") + mine + sse("chunk", "2"), then=silent)
    with feed(open_end, answers(410)) as server:
        events = [(event.type, event.task_id) for event in follow(server, face)]
        assert server.closed.get(timeout=5) == 1 and len(server.requests) == 1
    assert events == [("task_finished", "t-2"), ("chunk", "t-1"), ("task_finished", "t-1")]


def test_of_a_task_that_was_final_already_five_seconds_without_an_event_are_the_end():
    def later(*seconds):
        def script(connection):
            for n, pause in enumerate(seconds):
                time.sleep(pause)
                connection.send(sse("chunk", n))

        return script

    def watch(face, then, busy=0):
        def consume(event):
            time.sleep(busy if event.data == "first" else 0)

        with feed(plays(sse("chunk", "first"), then=then), answers(410), idle_timeout=20) as server:
            server.task, began = task_dict(status="completed"), time.monotonic()
            got = chunks(follow(server, face, consume, status="completed"))
            return got[1:] if 4.9 < time.monotonic() - began < 8 else None

    # fmt: off
    cases = [
        ("sync", silent), ("async", silent), ("sync", repeats(": ping\n\n")),
        ("sync", later(2.7, 2.7)), ("sync", later(5.3), 5.2),  # a consumer's own time is no silence
    ]
    # fmt: on
    assert at_once(lambda case: watch(*case), *cases) == [[], [], [], [0, 1], [0]]


# Bounded


@either_face
@pytest.mark.parametrize("part", ["x", "\ndata: ", "\n: "], ids=["a line", "lines", "comments"])
def test_an_event_over_16_mib_is_an_error(part, face):
    def endless(connection):
        try:
            for _ in range(64):
                connection.send(part + "x" * MIB)
            ends.put("it was taken")
        except OSError:
            ends.put("closed")

    ends, got = queue.Queue(), []
    with feed(plays(sse("chunk", "1") + "data: ", then=endless)) as server:
        error = fails_to_follow(server, face, got.append)
        # although somebody keeps the error, whose traceback holds the frames
        assert ends.get(timeout=5) == "closed" and "16 MiB" in error.description
        assert (error.status_code, len(server.requests), chunks(got)) == (500, 1, ["1"])


def test_an_event_of_nearly_16_mib_is_delivered():
    text = "x" * (16 * MIB - 1000)
    with feed(plays(sse("chunk", text) + FINISHED)) as server:
        assert chunks(follow(server)) == [text]


@needs_cpython
def test_memory_does_not_grow_with_the_stream():
    tracemalloc = pytest.importorskip("tracemalloc")
    sizes = []

    def thousands(connection):
        for start in range(0, 22_000, 1000):
            connection.send("".join(sse("chunk", n, id=n) for n in range(start, start + 1000)))
        connection.send(FINISHED)

    async def watch():
        async for event in make_task(server.config).aevents():
            if event.data in (12_000, 21_999):
                sizes.append(tracemalloc.get_traced_memory()[0])

    with feed(plays(then=thousands)) as server:
        tracemalloc.start()
        try:
            asyncio.run(watch())
        finally:
            tracemalloc.stop()
    assert sizes[1] - sizes[0] < MIB / 4


# Many


def test_200_streams_run_in_one_loop_while_a_load_answers():
    gate = threading.Event()

    def held(connection):
        gate.wait(20)
        connection.send(sse("chunk", "2") + FINISHED)

    async def watch(task):
        async for event in task.aevents():
            got.append(event.data)
            if len(got) == 200:
                there.set()

    async def main():
        nonlocal there
        there, task = asyncio.Event(), make_task(server.config)
        streams = [asyncio.ensure_future(watch(task)) for _ in range(200)]
        await asyncio.wait_for(there.wait(), 15)
        assert (await asyncio.wait_for(xtask.Task.aload("t-1", server.config), 5)).id == "t-1"
        gate.set()
        await asyncio.wait_for(asyncio.gather(*streams), 15)

    got, there = [], None
    with feed(plays(sse("chunk", "1"), then=held)) as server:
        try:
            asyncio.run(main())
        finally:
            gate.set()
    assert got[:200] == ["1"] * 200 and got.count("2") == 200 and len(got) == 600


@either_face
def test_a_consumer_that_stops_reading_stops_the_reading_and_loses_nothing(face):
    stalled, sent = threading.Event(), [0]

    def flood(connection):
        data = memoryview(sse("chunk", "x" * 60_000).encode() * 600 + FINISHED.encode())
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        while data:
            if not stalled.is_set() and not select.select([], [connection.sock], [], 0.3)[1]:
                sent.append(len(data))
                stalled.set()
            count = connection.sock.send(data[:16384])
            data = data[count:]

    def first(event):
        assert stalled.wait(15)

    with feed(plays(then=flood)) as server:
        assert len(chunks(follow(server, face, first))) == 600
    assert sent[-1] > 16 * MIB


def test_an_error_event_is_told_in_its_words_alone():
    with feed(plays('event: error\ndata: {"code": 7, "detail": "model is down"}\n\n')) as server:
        assert fails_to_follow(server).description.endswith(": model is down")


def test_a_stream_without_content_is_an_error_of_that_status():
    with feed(answers(204)) as server:
        error = fails_to_follow(server)
    assert (error.status_code, error.answered) == (204, True)


# ---- Leaving -----------------------------------------------------------------------------------
# A stream is left at any moment, from anywhere: at once, cleanly, and nobody waits for it.


def wait_until(true):
    ends = time.monotonic() + 10
    while not true() and time.monotonic() < ends:
        time.sleep(0.001)
    assert true()


@contextlib.contextmanager
def leaving_cleanly():
    """No thread stays, no warning is given, and Python itself has nothing to print."""
    before, noise = set(threading.enumerate()), []

    def log(record):
        if record.levelno >= logging.ERROR:  # not that a busy machine was slow
            noise.append(record)

    with warnings.catch_warnings(record=True) as warned, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(sys, "unraisablehook", noise.append)
        patch.setattr(threading, "excepthook", noise.append)
        patch.setattr(logging.getLogger("asyncio"), "handle", log)
        yield
        wait_until(lambda: set(threading.enumerate()) <= before)
        gc.collect()
        assert [*map(str, warned), *noise] == []


UNCONNECTED_STATES = ["looking a name up", "connecting"]
WAITING_STATES = ["handshaking", "unanswered", "idle", "loading the status", "between two tries"]


def test_a_stream_that_was_closed_makes_no_more_requests():
    with feed(plays(sse("chunk", "1"), then=silent)) as server:
        events = xtask.Task.load("t-1", server.config).events()
        arrived, got = threading.Event(), []
        reader = threading.Thread(target=lambda: [got.append(e) or arrived.set() for e in events])
        reader.start()
        assert arrived.wait(5)
        events.close()
        reader.join(5)
        xtask.Task.load("t-1", server.config)  # over the connection of the first load
        paths = [path.rpartition("/")[2] for _, path, *_ in server.requests]
        assert (paths, server.connections) == (["status", "events", "status"], 2)


@contextlib.contextmanager
def stream_that_waits(state):
    """A task whose stream gets into this state and stays there, and an event: it is there.

    In the end no thread of the client and none of its connections is open any more.
    """
    there, gate = threading.Event(), threading.Event()

    def hold(connection):
        there.set()
        connection.wait_closed()

    def script(connection, number):
        if state == "handshaking":
            return hold(connection)
        for _, path, _, _ in iter(connection.request, None):
            if state == "between two tries":
                connection.answer(503, b"", [("Retry-After", "30")])
            elif state == "unanswered" or path.endswith("/status"):
                return hold(connection)
            else:
                then = hold if state == "idle" else lambda connection: None
                return plays(sse("chunk", "1"), then=then)(connection)

    def held(real, before):
        def wait(*arguments, **options):
            there.set()
            before and gate.wait(10)
            return real(*arguments, **options)

        return wait

    with leaving_cleanly(), pytest.MonkeyPatch.context() as patch, RawServer(script) as server:
        threads = set(threading.enumerate())
        if state == "between two tries":
            patch.setattr(xtask, "_wait", held(xtask._wait, False))
        elif state == "looking a name up":
            patch.setattr(socket, "getaddrinfo", held(socket.getaddrinfo, True))
        elif state == "connecting":
            patch.setattr(socket.socket, "connect", held(socket.socket.connect, True))
        url = server.url.replace("http:", "https:") if state == "handshaking" else server.url
        with configuration(url, timeout=10, idle_timeout=10) as config:
            try:
                yield make_task(config), there
            finally:
                gate.set()
            wait_until(lambda: set(threading.enumerate()) <= {*threads, *server.threads})
        if server.connections:
            server.closed.get(timeout=5)


async def collect_events(events):
    return [event.data async for event in events]


def leave_by_close(task, there, unconnected):
    events, got = task.events(), []
    reader = threading.Thread(target=got.extend, args=[events])
    reader.start()
    assert there.wait(5)
    began = time.monotonic()
    events.close()
    if not unconnected:
        reader.join(5)
    took = time.monotonic() - began
    events.close()
    assert list(events) == [] and len(got) <= 1
    return took


def leave_by_task(way):
    async def main(task, there):
        events = task.aevents()
        following = asyncio.ensure_future(collect_events(events))
        assert await asyncio.to_thread(there.wait, 5)
        began = time.monotonic()
        if way in ("a task", "a thread"):
            if way == "a thread":
                await asyncio.to_thread(lambda: asyncio.run(events.aclose()))
            await events.aclose()
            await events.aclose()
            assert await following in ([], ["1"]) and await collect_events(events) == []
        elif way == "cancel":
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
        return began  # else the end of the loop cancels it

    return lambda task, there, _: -asyncio.run(main(task, there)) + time.monotonic()


def test_all_tasks_that_wait_for_an_event_are_woken():
    async def main():
        events = make_task(server.config).aevents()
        waiting = [asyncio.ensure_future(collect_events(events)) for _ in range(3)]
        assert await asyncio.to_thread(asked.wait, 5)
        await events.aclose()
        return await asyncio.wait_for(asyncio.gather(*waiting), 5)

    asked = threading.Event()
    with feed(lambda connection: (asked.set(), connection.wait_closed())) as server:
        assert asyncio.run(main()) == [[], [], []]


WAYS_FROM_ELSEWHERE = {
    "close": leave_by_close,
    **{way: leave_by_task(way) for way in ["a task", "a thread", "cancel", "the end of the loop"]},
}


@pytest.mark.parametrize("way", WAYS_FROM_ELSEWHERE)
@pytest.mark.parametrize("state", [*UNCONNECTED_STATES, *WAITING_STATES])
def test_a_stream_that_waits_is_left_at_once_from_elsewhere(state, way):
    def leave():
        with stream_that_waits(state) as (task, there):
            return WAYS_FROM_ELSEWHERE[way](task, there, state in UNCONNECTED_STATES)

    assert any(leave() < 0.2 for _ in range(3))  # a busy machine may be slow once


def raise_key_error(_):
    raise KeyError


def leave_sync(task, taken, way):
    events = task.events()
    for _ in range(taken):
        next(events)
    began = time.monotonic()
    if way == "close":
        events.close()
    elif way == "elsewhere":
        thread = threading.Thread(target=events.close)
        thread.start()
        thread.join(5)
    else:
        with contextlib.suppress(KeyError), events as entered:
            assert entered is events
            way == "an error" and raise_key_error(events)
    took = time.monotonic() - began
    events.close()
    assert list(events) == []
    return took


def leave_async(task, taken, way):
    async def main():
        events = task.aevents()
        for _ in range(taken):
            await events.__anext__()
        began = time.monotonic()
        if way == "close":
            await events.aclose()
        elif way == "elsewhere":
            await asyncio.ensure_future(events.aclose())
        else:
            with contextlib.suppress(KeyError):
                async with events as entered:
                    assert entered is events
                    way == "an error" and raise_key_error(events)
        took = time.monotonic() - began
        await events.aclose()
        assert await collect_events(events) == []
        return took

    return asyncio.run(main())


# fmt: off
MOMENTS = {  # what the server sends, how often, and how many events are taken before leaving
    "not started": ("", 0, 0),
    "amid a batch": (sse("chunk", 1) * 3, 1, 1), "idle": (sse("chunk", 1), 1, 1),
    "amid a flood": (sse("chunk", "x" * 60_000), 1000, 2), "after the last event": (FINISHED, 1, 1),
}
# fmt: on


@pytest.mark.parametrize("leave", [leave_sync, leave_async])
@pytest.mark.parametrize("way", ["close", "elsewhere", "with", "an error"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stream_is_left_between_two_events(moment, way, leave):
    text, times, taken = MOMENTS[moment]

    def left():
        with leaving_cleanly(), feed(plays(*[text] * times, then=silent)) as server:
            took = leave(make_task(server.config), taken, way)
            assert server.connections == bool(taken)
            wait_until(lambda: not server.open)
            return took

    assert any(left() < 0.2 for _ in range(3))


@either_face
def test_a_stream_that_ended_stays_at_its_end(face):
    async def main():
        async with task.aevents() as events:
            assert len(await collect_events(events)) == 2 and await collect_events(events) == []
        assert await collect_events(events) == []

    text = sse("chunk", "1") + 'data: {"type": "task_finished", "data": {}}\n\n'
    with leaving_cleanly(), feed(plays(text)) as server:
        task = make_task(server.config)
        if face == "async":
            asyncio.run(main())
        else:
            with task.events() as events:
                assert len(list(events)) == 2 and list(events) == []
            assert list(events) == []


def test_a_stream_that_failed_is_at_its_end_and_may_be_closed():
    async def main(events):
        with pytest.raises(xtask.ModuleException):
            await collect_events(events)
        assert await collect_events(events) == []
        await events.aclose()

    with leaving_cleanly(), feed(answers(404)) as server:
        events = make_task(server.config).events()
        with pytest.raises(xtask.ModuleException):
            next(events)
        assert list(events) == []
        events.close()
        asyncio.run(main(make_task(server.config).aevents()))


@either_face
def test_break_closes_the_connection_when_the_stream_is_collected(face):
    async def main():
        async for event in task.aevents():
            got.append(event.data)
            break
        gc.collect()
        await asyncio.to_thread(server.closed.get, timeout=5)

    got = []
    with leaving_cleanly(), feed(plays(sse("chunk", "1") * 3, then=silent)) as server:
        task = make_task(server.config)
        if face == "async":
            asyncio.run(main())
        else:
            for event in task.events():
                got.append(event.data)
                break
            gc.collect()  # at once on CPython
            server.closed.get(timeout=5)
    assert got == ["1"]


def test_with_closes_a_stream_that_is_still_held():
    async def leave():
        async with make_task(server.config).aevents() as events:
            await events.__anext__()
        return await asyncio.to_thread(server.closed.get, timeout=5)  # `events` is held

    with feed(plays(sse("chunk", "1"), then=silent)) as server:
        with make_task(server.config).events() as events:
            next(events)
        assert [server.closed.get(timeout=5), asyncio.run(leave())] == [1, 2]


def test_a_timer_limits_a_stream():
    with leaving_cleanly(), feed(plays(sse("chunk", "1"), then=silent)) as server:
        with make_task(server.config).events() as events:
            timer = threading.Timer(0.1, events.close)
            timer.start()
            assert [event.data for event in events] == ["1"]
        server.closed.get(timeout=5)


@pytest.mark.parametrize("limit", ["wait_for", "timeout"])
def test_asyncio_limits_a_stream(limit):
    async def follow_all(got):
        async with make_task(server.config).aevents() as events:
            async for event in events:
                got.append(event.data)

    async def main():
        got = []
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            if limit == "wait_for":
                await asyncio.wait_for(follow_all(got), 0.2)
            else:
                async with asyncio.timeout(0.2):
                    await follow_all(got)
        await asyncio.to_thread(server.closed.get, timeout=5)
        return got

    if not hasattr(asyncio, limit):
        pytest.skip("asyncio.timeout is new in Python 3.11")
    with leaving_cleanly(), feed(plays(sse("chunk", "1"), then=silent)) as server:
        assert asyncio.run(main()) == ["1"]


def test_leaving_closes_no_connection_that_another_call_uses(monkeypatch):
    # the status load before the pause took a connection, and gave it back for the save
    paused, asked, answered = (threading.Event() for _ in range(3))

    def script(connection, number):
        for method, path, _, _ in iter(connection.request, None):
            if path.endswith("/events"):
                return plays(sse("chunk", "1"))(connection)
            if method == "PATCH":
                saves.append(number)
                asked.set()
                answered.wait(5)
            connection.answer(200, task_dict(title="New"))

    def pause(*_):
        paused.set()
        answered.wait(5)

    saves = []
    monkeypatch.setattr(xtask, "_wait", pause)
    with leaving_cleanly(), RawServer(script) as server:
        events, saved = make_task(server.config).events(), make_task(server.config)
        saved.title = "New"
        threads = [threading.Thread(target=call) for call in (lambda: list(events), saved.save)]
        threads[0].start()
        assert paused.wait(5)
        threads[1].start()
        assert asked.wait(5)
        events.close()
        answered.set()
        for thread in threads:
            thread.join(5)
        assert saves == [2]  # once, over the connection of the status load


@pytest.mark.parametrize("then", [repeats(sse("chunk", "x" * 4096)), repeats(":\n\n"), silent])
def test_a_loop_that_is_closed_under_a_stream_leaves_no_thread(then):
    with leaving_cleanly(), feed(plays(sse("chunk", "1"), then=then), idle_timeout=0.3) as server:
        before = set(threading.enumerate())
        events, loop = make_task(server.config).aevents(), asyncio.new_event_loop()
        assert loop.run_until_complete(events.__anext__()).data == "1"
        loop.close()
        del events
        gc.collect()
        wait_until(lambda: set(threading.enumerate()) <= {*before, *server.threads})


@pytest.mark.skipif(os.name == "nt", reason="signals")
@either_face
@pytest.mark.parametrize("state", [*UNCONNECTED_STATES, *WAITING_STATES])
def test_ctrl_c_is_one_plain_keyboard_interrupt(state, face):
    def interrupt(there, over):
        there.wait(5)
        if not over.wait(0.05):  # once it waits: a signal just before would be seen after the wait
            began.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    began, over = [], threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stream_that_waits(state) as (task, there):
            threading.Thread(target=interrupt, args=[there, over]).start()
            with pytest.raises(KeyboardInterrupt) as caught:
                try:
                    if face == "async":
                        asyncio.run(collect_events(task.aevents()))
                    else:
                        list(task.events())
                finally:
                    over.set()
            assert time.monotonic() - began[0] < 1
            if face == "sync":  # asyncio.run() makes its own of a cancellation
                assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    finally:
        signal.signal(signal.SIGINT, before)


EXITS = """
import asyncio, socket, sys, threading, time, xtask

def task(url):
    data = {"id": "t-1", "events_streaming": True, "status": "executing"}
    return xtask.Task.from_dict(data, xtask.Configuration("key", "org", url))

async def first(url, cancel):
    reading = asyncio.ensure_future(task(url).aevents().__anext__())
    if cancel:
        await asyncio.sleep(0.1)
        reading.cancel()
    else:
        await reading

def look_up(*arguments, **options):
    time.sleep(60)

url = sys.argv[1]
for event in task(url).events():
    break
open_to_the_end = task(url).events(), task(url).events()
next(open_to_the_end[0])
threading.Thread(target=list, args=[open_to_the_end[1]], daemon=True).start()
asyncio.run(first(url, cancel=False))
socket.getaddrinfo = look_up
asyncio.run(first("http://e.test", cancel=True))
"""


def test_streams_hold_up_no_exit_and_print_nothing():
    with feed(plays(sse("chunk", "1"), then=silent)) as server:
        done = run_python(EXITS, server.url, flags=["-X", "dev", "-W", "error"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- Transport -----------------------------------------------------------------------------------
# Connections and their reuse, retries, codings and limits, the key, redirects, names, TLS, proxies.

READ = json.dumps(task_dict(title="read"))
FULL = "HTTP/1.1 200 OK|Content-Length: #||$"
MOVED = [301, 302, 303, 307, 308]
METHODS = {
    "GET": lambda config: make_task(config).reload(),
    "PATCH": lambda config: make_task(config).set_status("completed"),
    "DELETE": lambda config: make_task(config).stop(),
    "POST": lambda config: xtask.Task.create("a-1", "Hi", configuration=config),
    "events": lambda config: list(make_task(config).events()),
}
SAFE = ["GET", "PATCH", "DELETE"]
CALLS = [*SAFE, "POST"]


def rows(text):
    """The lines of a table, each split where two or more spaces are."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]


def play(connection, response):
    """Send what a text describes: "|" is a CRLF, "$" a task, "#" and "@" its length (decimal, hex).

    It may end with EOF, which closes the connection, or RST. A number is a whole response.
    """
    if response.isdigit():
        return connection.answer(int(response))
    head, _, end = response.replace("|", "\r\n").partition("$")
    head = head.replace("#", str(len(READ))).replace("@", f"{len(READ):x}")
    text = head + (READ + end if "$" in response else "")
    connection.send(re.sub("EOF|RST", "", text).encode("latin-1"))
    if "RST" in text:
        connection.reset()
    elif "EOF" in text:
        connection.sock.close()


def respond(connection, path, body):
    """The response of a platform that has every task: with the id asked for, and what was sent."""
    if path.endswith("/events"):
        return plays(FINISHED)(connection)
    name = re.search("agent-execution/([^/]+)|$", path)[1] or "t-1"
    connection.answer(200, {**task_dict(), **json.loads(body or "{}"), "id": name})


@contextlib.contextmanager
def serving(*responses, context=None, **options):
    """A server that gives these responses in turn, on any connections, and then a platform's.

    A response is a text for `play`, or a function that is called with the connection.
    """
    left = iter(responses)

    def script(connection, number):
        try:
            for _, path, _, body in iter(connection.request, None):
                response = next(left, None)
                if response is None:
                    respond(connection, path, body)
                elif isinstance(response, str):
                    play(connection, response)
                else:
                    response(connection)
        finally:
            connection.sock.close()

    with RawServer(script, context) as server:
        server.config = configuration(server.url, **{"timeout": 10, **options})
        yield server


def fails(config, method="GET"):
    """The exception of a call that fails."""
    with pytest.raises(xtask.ModuleException) as failed:
        METHODS[method](config)
    return failed.value


def trusting(url, certificate, **options):
    context = ssl.create_default_context(cafile=certificate.file)
    return configuration(url, **{"timeout": 10, "ssl_context": context, **options})


@pytest.fixture
def network(monkeypatch):
    """A name service that knows every name, and a network that fails as a test says.

    `asked` are the names with their ports, `addresses` and `port` what all of them have (None: the
    port asked for); `failures` are raised by the next look-ups (gaierror) and connects (others).
    """
    net = types.SimpleNamespace(asked=[], addresses=["127.0.0.1"], port=None, failures=[])
    connect = socket.socket.connect

    def fail(lookup):
        if net.failures and isinstance(net.failures[0], socket.gaierror) == lookup:
            raise net.failures.pop(0)

    def look_up(host, port, *_, **__):
        net.asked.append(f"{host}:{port}")
        fail(lookup=True)
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        found = [(kinds[":" in address], (address, net.port or port)) for address in net.addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", address) for kind, address in found]

    def stub(sock, address):
        fail(lookup=False)
        return connect(sock, address)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", stub)
    return net


# Kept connections


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_a_hundred_calls_in_a_row_open_one_connection(secure, certificate):
    with serving(context=certificate.context if secure else None) as server:
        with trusting(server.url, certificate) as config:
            for number in range(50):
                assert xtask.Task.load(f"t-{number}", config).id == f"t-{number}"
                assert METHODS["PATCH"](config).status == "completed"
        assert (server.connections, len(server.requests)) == (1, 100)


def test_sixteen_threads_on_one_configuration_get_their_own_answers():
    with serving() as server:
        start = threading.Barrier(16)

        def load(name):
            start.wait(10)
            wanted = [f"{name}-{number}" for number in range(25)]
            return wanted == [xtask.Task.load(id, server.config).id for id in wanted]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert all(pool.map(load, range(16)))
        opened = server.connections
        METHODS["GET"](server.config)  # takes one that another thread has opened
        assert opened == server.connections <= 16


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("method", SAFE)
@pytest.mark.parametrize("responses", [[FULL + "EOF"], [FULL, "EOF"], [FULL, "RST"]], ids=str)
def test_a_kept_connection_that_breaks_before_an_answer_is_replaced_uncounted(
    responses, method, secure, certificate, pauses
):
    with serving(*responses, context=certificate.context if secure else None) as server:
        with trusting(server.url, certificate, max_retries=0) as config:
            for _ in range(2):
                METHODS[method](config)
        assert (server.connections, len(server.requests), pauses) == (2, len(responses) + 1, [])


def test_a_create_whose_answer_is_cut_off_within_its_head_is_not_answered(pauses):
    with serving("HTTP/1.1 400 O|EOF") as server:
        error = fails(server.config, "POST")
        assert (error.status_code, error.answered, len(server.requests)) == (500, False, 1)


@pytest.mark.parametrize("responses", [["EOF"], [FULL, "HTTP/1.1 200 OEOF"], [FULL, "EOF", "EOF"]])
def test_a_new_connection_or_an_answer_that_breaks_counts(responses, pauses):
    with serving(*responses, max_retries=0) as server:
        for _ in responses[:-1][:1]:
            METHODS["GET"](server.config)
        error = fails(server.config)
        assert (error.status_code, error.answered, len(server.requests)) == (
            500,
            False,
            len(responses),
        )


@pytest.mark.parametrize("before", [[], [FULL]], ids=["new", "kept"])
def test_a_stop_whose_answer_was_lost_is_settled_by_the_status(before, pauses):
    with serving(*before, "EOF", "404", answers(200, task_dict(status="stopped"))) as server:
        task = make_task(server.config)
        for _ in before:
            task.reload()
        assert task.stop().status == "stopped"


@pytest.mark.parametrize("seconds, connections", [(19, 1), (21, 2), (3600, 2)])
def test_a_connection_idle_for_over_20_seconds_of_wall_clock_is_not_reused(
    seconds, connections, monkeypatch
):
    with serving() as server:
        METHODS["GET"](server.config)
        now = time.time  # the clock that moves on while a host is frozen
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        METHODS["GET"](server.config)
        assert server.connections == connections


FORK = """
import os, sys, xtask
config = xtask.Configuration("key", "org", sys.argv[1])
def loads(name):
    assert all(xtask.Task.load(id, config).id == id for id in [name + "-1", name + "-2"])
loads("before")
child = os.fork()
if not child:
    try:
        loads("child")
        os._exit(0)
    finally:
        os._exit(1)
loads("parent")
assert os.waitpid(child, 0)[1] == 0
loads("after")
config.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_and_its_parent_never_share_a_connection():
    used = {}

    def note(connection):
        path = connection.server.requests[-1][1]
        used.setdefault(path.split("/")[2].split("-")[0], set()).add(connection.number)
        respond(connection, path, b"")

    with serving(*[note] * 8) as server:
        done = run_python(FORK, server.url, flags=("-X", "dev", "-W", "error"))
    assert (done.returncode, done.stderr) == (0, "")
    assert used == {"before": {1}, "parent": {1}, "after": {1}, "child": {2}}


FORK_AMID_A_STREAM = """
import os, sys, xtask
task = xtask.Task.load("t-1", xtask.Configuration("key", "org", sys.argv[1]))
events = task.events()
next(events)
if not os.fork():
    sys.exit()
os.wait()
task.reload()
print(len(list(events)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_ends_leaves_the_parents_stream_open():
    def rest(connection):
        while len(server.requests) < 3:  # until the child has ended
            time.sleep(0.01)
        connection.send(FINISHED)

    with feed(plays(sse("chunk", "1"), then=rest)) as server:
        done = run_python(FORK_AMID_A_STREAM, server.url)
        assert (done.stdout, len(server.streams)) == ("1\n", 1)


def test_a_post_always_takes_a_new_connection():
    with serving() as server:
        for method in ["GET", "POST", "POST", "GET"]:
            METHODS[method](server.config)
        assert server.connections == 3


@pytest.mark.parametrize("way", ["close", "with", "collected"])
def test_a_configuration_closes_its_idle_connections(way):
    with serving() as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        config = configuration(server.url)
        METHODS["GET"](config)
        if way == "with":
            with config:
                pass
        elif way == "close":
            config.close()
            config.close()
        else:
            del config
            gc.collect()
        assert server.closed.get(timeout=5) == 1
        if way != "collected":
            METHODS["GET"](config)  # it stays usable
            config.close()
    assert warned == []


# What an answer may look like, and how many connections two such answers take

# fmt: off
HEADS = rows("""
    HTTP/1.1 200 OK|Content-Length: #||$                                                       1
    HTTP/1.1 200|Content-Length: #||$                                                          1
    HTTP/1.1 200 Sch\u00f6n|X: \u00f6|content-LENGTH:#||$                                      1
    HTTP/1.1 200 OK|Transfer-Encoding: chunked||@|$|0||                                        1
    HTTP/1.1 200 OK|Transfer-Encoding: Chunked||00@;a=b|$|0;c||                                1
    HTTP/1.1 100 Continue||HTTP/1.1 200 OK|Content-Length: #||$                                1
    HTTP/1.1 103 Early Hints|Link: x||HTTP/1.1 102 X||HTTP/1.1 200 OK|Content-Length: #||$     1
    HTTP/1.1 103 Early Hints||HTTP/1.1 200 OK|Connection: close|Content-Length: #||$           2
    HTTP/1.1 200 OK|Connection: Close|Content-Length: #||$                                     2
    HTTP/1.1 200 OK|Connection: x, close|Content-Length: #||$                                  2
    HTTP/1.0 200 OK|Content-Length: #||$                                                       2
    HTTP/1.1 200 OK||$EOF                                                                      2
    HTTP/1.1 200 OK|Content-Length: #||$X                                                      2
    HTTP/1.1 200 OK|Content-Length: #||$HTTP/1.1 200 OK|Content-Length: 2||{}                  2
    HTTP/1.1 200 OK|Transfer-Encoding: chunked||@|$|0||HTTP/1.1 200 OK|Content-Length: 2||{}   2
""")
# fmt: on


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("response, connections", HEADS)
def test_an_answer_is_read_to_its_end_and_no_further(response, connections, secure, certificate):
    with serving(response, response, context=certificate.context if secure else None) as server:
        with trusting(server.url, certificate, max_retries=0) as config:
            assert [METHODS["GET"](config).title for _ in range(2)] == ["read", "read"]
        assert server.connections == int(connections)


def test_what_arrives_on_an_idle_connection_is_no_answer():
    idle, arrived = threading.Event(), threading.Event()

    def late(connection):
        play(connection, FULL)
        idle.wait(10)
        play(connection, "HTTP/1.1 408 Request Timeout|Content-Length: 0||")
        arrived.set()

    with serving(late) as server:
        METHODS["GET"](server.config)
        idle.set()
        assert arrived.wait(10)
        METHODS["GET"](server.config)
        assert (server.connections, len(server.requests)) == (2, 2)


NO_HTTP = [
    "ICY 200 OK||",
    "HTTP/1.1 OK||",
    f"{KEY}||",
    f"HTTP/1.1 {KEY}||",
    "HTTP/1.1 200 OK|Transfer-Encoding: chunked||-1|" + " " * 99,
    f"HTTP/1.1 200 OK|Transfer-Encoding: chunked||{KEY}|",
    "HTTP/1.1 200 OK|Transfer-Encoding: chunked||8000000000000000|",
    "HTTP/1.1 200 OK|Transfer-Encoding: chunked||1;" + "x" * 70_000,
    "HTTP/1.1 200 OK|" + "a: b|" * 12_000 + "|",
    "HTTP/1.1 200 OK|a: " + "b" * 70_000 + "||",
    "HTTP/1.1 200 OK|" + "Content-Type: multipart/mixed; boundary=b\r\r--b\r" * 3000 + "||",
    "HTTP/1.1 200 OK|Content-Type: multipart/mixed; boundary*=x; boundary*0=y||",
    "HTTP/1.1 100 Continue||" * 5000,
    "HTTP/1.1 102 Processing||" * 5000,
]


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("response", NO_HTTP, ids=lambda text: text[:60])
def test_what_is_no_http_is_an_error_and_not_repeated(response, call, pauses):
    with serving(*[response + "EOF"] * 9, max_retries=0) as server:
        error = fails(server.config, call)
    assert error.status_code == 500
    assert KEY not in everything_told(error) and not re.search(r"\n|\\n|\\r", str(error))


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("status", [100, 102])
def test_interim_answers_without_end_are_an_error(status, call, pauses):
    def endless(connection):
        while True:  # until the client leaves
            play(connection, f"HTTP/1.1 {status} X||" * 100)

    with serving(*[endless] * 9, max_retries=0) as server:
        assert not fails(server.config, call).answered


def test_an_answer_counts_although_the_server_stops_reading(pauses):
    def script(connection, number):
        connection.sock.recv(65536)
        play(connection, 'HTTP/1.1 413 X|Content-Length: 17||{"detail": "big"}')
        there.wait(10)

    there = threading.Event()
    with RawServer(script) as server, configuration(server.url, timeout=0.3) as config:
        with pytest.raises(xtask.ModuleException, match=r"\[413\] big"):
            make_task(config).set_status("completed", "x" * 8 * MIB)
        there.set()
        assert (server.connections, pauses) == (1, [])


# Retries

# fmt: off
RETRIES = rows("""
    429                                                          GET PATCH DELETE POST
    502                                                          GET PATCH DELETE
    503                                                          GET PATCH DELETE
    504                                                          GET PATCH DELETE
    EOF                                                          GET PATCH DELETE
    RST                                                          GET PATCH DELETE
    HTTP/1.1 200 OK|Content-Length: #EOF                         GET PATCH DELETE
    HTTP/1.1 200 OK|Content-Length: 999||$EOF                    GET PATCH DELETE
    HTTP/1.1 200 OK|Content-Length: 999||$RST                    GET PATCH DELETE
    HTTP/1.1 200 OK|Transfer-Encoding: chunked||@|$|EOF          GET PATCH DELETE
    HTTP/1.1 200 OK|Transfer-Encoding: chunked||999|$EOF         GET PATCH DELETE
    HTTP/1.1 200 OK|Transfer-Encoding: chunked||EOF              GET PATCH DELETE
    HTTP/1.1 103 Early Hints|Link: x||EOF                        GET PATCH DELETE
    HTTP/1.1 200 OEOF                                            GET PATCH DELETE
    HTTP/1.1 200 OK|Content-Encoding: gzEOF                      GET PATCH DELETE
    HTTP/1.1 204 No ContEOF                                      GET PATCH DELETE
""") + [(str(status), "none") for status in [400, 401, 403, 404, 408, 409, 422, 500, 501, 505]]
# fmt: on


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("first, methods", RETRIES)
def test_a_request_is_sent_again_by_its_method_and_the_cause(first, methods, method, pauses):
    with serving(first) as server:
        if method in methods:
            METHODS[method](server.config)
            assert len(pauses) == 1 and pauses[0] > 0
        else:
            error = fails(server.config, method)
            assert (error.status_code, error.answered) == (
                int(first) if first.isdigit() else 500,
                first.isdigit(),
            )
            assert pauses == []
        sent = [(method, body) for method, _, _, body in server.requests]
    assert sent == [(method, sent[0][1])] * (1 + len(pauses))


def test_retries_end_after_max_retries_with_pauses_that_grow_jittered(pauses):
    random_numbers = random.getstate()
    with serving(*["503"] * 10, max_retries=4) as server:
        errors = [fails(server.config) for _ in range(2)]
        assert str(errors[0]) == "[503] Service Unavailable" and len(server.requests) == 10
    first, second = pauses[:4], pauses[4:]
    assert first[0] < first[2] and first[1] < first[3] and second[0] < second[2]
    assert first != second and min(pauses) > 0 and max(pauses) < 30
    assert random.getstate() == random_numbers  # which are the program's


# fmt: off
RETRY_AFTER = [  # a value, or seconds from now as a date; the least and the most pause, None: none
    ("0", 0, 0), ("7", 7, 7), (" 60 ", 60, 60), (30, 25, 30), (-99, 0, 0),
    ("Sunday, 06-Nov-94 08:49:37 GMT", 0, 0),
    ("61", None, None), ("9" * 5000, None, None), (90, None, None),
    ("soon", 0.1, 5), ("-1", 0.1, 5), ("1.5", 0.1, 5), ("\u00b2", 0.1, 5),
    ("Sun, 99 Nov 1994", 0.1, 5), ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0.1, 5),
    ("Jan ( , x 1:2:3 GMT", 0.1, 5), ("\x1c5", 0.1, 5),
]
# fmt: on


@pytest.mark.parametrize("status, method", [(429, "POST"), (503, "GET")])
@pytest.mark.parametrize("value, least, most", RETRY_AFTER)
def test_retry_after_is_obeyed_up_to_a_minute(value, least, most, status, method, pauses):
    if isinstance(value, int):
        value = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=value), usegmt=True)
    with serving(f"HTTP/1.1 {status} X|Retry-After: {value}|Content-Length: 0||") as server:
        if least is None:
            assert fails(server.config, method).status_code == status and pauses == []
        else:
            METHODS[method](server.config)
            assert len(pauses) == 1 and least <= pauses[0] <= most


def test_a_time_out_is_not_tried_again_and_says_what_to_set(pauses):
    for method, first in itertools.product(CALLS, [[], [FULL]]):  # on a new or a reused connection
        with serving(*first, silent, timeout=0.1) as server:
            for _ in first:
                METHODS["GET"](server.config)
            error = fails(server.config, method)
            assert (len(server.requests), pauses) == (1 + len(first), []) and not error.answered
        says = (
            f"127.0.0.1:{server.port} failed: no response in time; see Configuration(timeout=...)"
        )
        assert str(error).endswith(says)


def test_timeout_is_for_a_single_wait(pauses):
    def slow(connection):
        for part in "HTTP/1.1 200 OK|", "Content-Length: #||", "$":
            time.sleep(0.2)
            play(connection, part)

    with serving(slow, timeout=0.4) as server:
        assert METHODS["GET"](server.config).title == "read"


# Connecting: nothing was sent, so that every request may be sent again


REASONS = """
    ECONNREFUSED ECONNRESET ECONNABORTED EHOSTUNREACH
    ENETUNREACH ENETDOWN EADDRNOTAVAIL ETIMEDOUT
"""
UNCONNECTED = [
    *[OSError(getattr(errno, name), name) for name in REASONS.split()],
    socket.timeout("timed out"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", UNCONNECTED, ids=repr)
def test_a_failed_connect_is_tried_again(error, method, network, pauses):
    with serving() as server, configuration(f"http://platform.test:{server.port}") as config:
        network.failures = [error] * 2
        METHODS[method](config)
        assert (len(pauses), len(network.asked), server.connections) == (2, 3, 1)
        network.failures = [error] * 9
        last = fails(config, "POST")
    assert (last.status_code, last.answered, len(pauses)) == (500, False, 4)
    assert "platform.test" in str(last) and isinstance(last.__cause__, type(error))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("response", ["EOF", "RST", "HTTP/1.1 400 Bad Request||EOF"])
def test_a_handshake_that_breaks_is_a_failed_connect(response, method, certificate, pauses):
    def script(connection, number):
        if number < 3:
            connection.sock.recv(65536)
            server.context = certificate.context if number == 2 else None  # for the next one
            return play(connection, response)
        for _, path, _, body in iter(connection.request, None):
            respond(connection, path, body)
            if path.endswith("/events"):
                return

    with RawServer(script) as server:
        with trusting(server.url.replace("http", "https"), certificate) as config:
            METHODS[method](config)
        assert (len(pauses), len(server.requests)) == (2, 1)


def test_a_silent_handshake_is_a_failed_connect(pauses):
    with RawServer(lambda connection, number: connection.wait_closed()) as server:
        url = server.url.replace("http", "https")
        with configuration(url, timeout=0.1) as config:
            assert "timeout" in str(fails(config, "POST")) and len(pauses) == 2


def test_connecting_takes_ten_seconds_over_all_addresses(network, monkeypatch):
    now, waits = time.monotonic, []

    def time_out(sock, address):
        waits.append(sock.gettimeout())
        raise socket.timeout("timed out")

    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(waits))
    monkeypatch.setattr(socket.socket, "connect", time_out)
    network.addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with configuration("http://platform.test", max_retries=0) as config:
        fails(config)
    assert len(waits) == 3 and sum(waits) < 10.5


@pytest.mark.parametrize("error", ["ECONNREFUSED", "EAFNOSUPPORT", "ETIMEDOUT"])
def test_the_next_address_is_tried_where_one_fails(error, network, pauses):
    network.addresses *= 2
    network.failures = [OSError(getattr(errno, error), error)]
    with serving() as server, configuration(f"http://platform.test:{server.port}") as config:
        METHODS["GET"](config)
        assert (network.failures, server.connections, pauses) == ([], 1, [])


# Answers before the request was sent, codings, limits


# fmt: off
EARLY = rows("""
    413   HTTP/1.1 413 X|Content-Length: 17||{"detail": "big"}EOF                     big
    413   HTTP/1.1 413 X|Transfer-Encoding: chunked||11|{"detail": "big"}|0||EOF      big
    413   HTTP/1.1 413 X|Content-Length: 999||{"detail": "biEOF                       .
    413   HTTP/1.1 413 X|Content-Length: 17||{"detail": "big"}                        big
    401   HTTP/1.1 401 X|Connection: close||EOF                                       Unauthorized
""")
# fmt: on


@pytest.mark.parametrize("method", ["PATCH", "POST"])
@pytest.mark.parametrize("status, response, says", EARLY)
def test_an_answer_counts_while_the_body_is_still_being_sent(
    status, response, says, method, pauses
):
    def script(connection, number):
        if number == 1:
            connection.request()
            play(connection, FULL)
        connection.sock.recv(65536)
        play(connection, response)
        connection.wait_closed()

    with RawServer(script) as server:
        task = make_task(server.config).reload()
        with pytest.raises(xtask.ModuleException) as failed:
            if method == "PATCH":  # on the same connection
                task.set_status("completed", "x" * 8 * MIB)
            else:
                xtask.Task.create("a-1", "x" * 8 * MIB, configuration=server.config)
        assert (failed.value.status_code, failed.value.answered) == (int(status), True)
        assert re.search(says, failed.value.description)
        assert (server.connections, pauses) == (1 + (method == "POST"), [])


def encoded(coding, encode, status=200, text=READ, type="application/json"):
    """A response with this body, and what says how it is encoded."""

    def respond(connection):
        headers = [("Content-Encoding", coding), ("Content-Type", type)]
        connection.answer(status, encode(text.encode()), headers)

    return respond


# fmt: off
CODINGS = [
    ("gzip", gzip.compress), ("GZip", gzip.compress), ("deflate", zlib.compress),
    ("identity", bytes), ("aws-chunked", bytes), ("", bytes),
]
BROKEN_CODINGS = [
    ("br", bytes), ("zstd", bytes), ("compress", bytes), ("gzip, br", gzip.compress),
    ("gzip", bytes), ("deflate", bytes), ("gzip", zlib.compress),
    ("gzip", lambda data: gzip.compress(data)[:40]),
    ("deflate", lambda data: zlib.compress(data)[:9]),
]
# fmt: on


@pytest.mark.parametrize("coding, encode", CODINGS)
def test_a_compressed_answer_is_decoded(coding, encode):
    missing = encoded(coding, encode, 404, '{"detail": "not there"}')
    with serving(*[encoded(coding, encode)] * 2, missing) as server:
        assert [METHODS["GET"](server.config).title for _ in range(2)] == ["read", "read"]
        assert str(fails(server.config)) == "[404] not there"
        assert server.connections == 1


@pytest.mark.parametrize("size", [65535, 65536, 131072])  # around what is decoded at a time
def test_a_compressed_answer_of_any_size_is_decoded(size):
    text = json.dumps(task_dict(title=""))
    text = text.replace('"title": ""', f'"title": "{"x" * (size - len(text))}"')
    with serving(encoded("gzip", gzip.compress, text=text)) as server:
        assert METHODS["GET"](server.config).title.strip("x") == "" and len(text) == size


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("coding, encode", BROKEN_CODINGS)
def test_an_unknown_or_broken_coding_is_an_error_at_once(coding, encode, status, call, pauses):
    text, type = (FINISHED, "text/event-stream") if call == "events" else (READ, "application/json")
    with serving(encoded(coding, encode, status, text, type)) as server:
        error = fails(server.config, call)
        assert error.status_code == (500 if status == 200 else 400) and error.answered
        assert coding in error.description
        assert error.headers["content-encoding"] == coding
        assert (len(server.requests), pauses) == (1, [])


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("call", ["GET", "events"])
def test_a_coding_that_never_gives_content_is_an_error(call, status, pauses):
    def endless(connection):
        play(connection, f"HTTP/1.1 {status} X|Content-Type: text/event-stream")
        play(connection, "|Content-Encoding: gzip||")
        while True:  # until the client leaves
            connection.send(gzip.compress(b"") * 100)

    with serving(endless, max_retries=0) as server:
        error = fails(server.config, call)
    assert error.status_code == {200: 500, 403: 403}[status] and "gzip" in error.description


@pytest.mark.parametrize("coding, wbits", [("gzip", 31), ("deflate", 15)])
def test_compressed_events_arrive_as_they_are_flushed(coding, wbits):
    arrived = queue.Queue()

    def script(connection):
        compressor = zlib.compressobj(wbits=wbits)
        play(connection, "HTTP/1.1 200 OK|Content-Type: text/event-stream|")
        play(connection, f"Content-Encoding: {coding}|Transfer-Encoding: chunked||")
        for part in sse("chunk", "a"), sse("chunk", "b"), FINISHED:
            data = compressor.compress(part.encode()) + compressor.flush(zlib.Z_SYNC_FLUSH)
            connection.send(b"%x\r\n%s\r\n" % (len(data), data))
            arrived.get(timeout=5)

    with feed(script, answers(404)) as server:
        assert chunks(follow(server, each=arrived.put)) == ["a", "b"]


BOMBS = """
import os, re, resource, sys, xtask

def peak():  # in KiB; the first is the process's own, the second may be that of its parent
    if os.path.exists("/proc/self/status"):
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

trusted = {"trusted_file_hosts": ["127.0.0.1"]}
config = xtask.Configuration("key", "org", sys.argv[1], max_retries=0, **trusted)
task = xtask.Task.load("t-1", config)
for call in task.reload, lambda: list(task.events()), task.get_human_readable_files:
    before = peak()
    try:
        print(call()[0]["content"])
    except xtask.ModuleException as error:
        print(error)
    assert peak() - before < 300e3, peak() - before
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the module resource")
def test_a_bomb_is_an_error_and_does_not_fill_the_memory():
    def bomb(connection):
        compressor = zlib.compressobj(wbits=31)
        play(connection, "HTTP/1.1 200 OK|Content-Type: text/event-stream|Content-Encoding: gzip||")
        for _ in range(2):  # the second part may follow any number of times
            part = compressor.compress(b"x" * MIB) + compressor.flush(zlib.Z_FULL_FLUSH)
            connection.send(part)
        for _ in range(900):
            connection.send(part)
        connection.wait_closed()

    def load(connection):
        files = ["http://127.0.0.1:%d/a.txt" % connection.server.port]
        connection.answer(200, task_dict(input={"text": "", "files": files}))

    with serving(load, bomb, bomb, bomb) as server:
        done = run_python(BOMBS, server.url)
    call, stream, file = done.stdout.splitlines() or [done.stderr] * 3
    assert "64 MiB" in call and "[500]" in stream and "Error: " in file and not done.stderr


@pytest.mark.parametrize("framing", ["Content-Length: 70000000||", "X: y||"])
def test_an_answer_over_64_mib_is_an_error(framing, pauses):
    sent = []

    def endless(connection):
        play(connection, "HTTP/1.1 200 OK|" + framing)
        while len(sent) < 200:
            connection.send(b" " * MIB)
            sent.append(1)

    with serving(endless) as server:
        error = fails(server.config)
        assert "64 MiB" in str(error) and f"127.0.0.1:{server.port}" in str(error)
        assert (error.status_code, error.answered, len(server.requests), pauses) == (
            500,
            True,
            1,
            [],
        )
    assert len(sent) < 100


# The key, further headers, redirects


def test_the_key_and_the_headers_go_to_the_api_and_the_events_alone(network):
    headers = {
        "X-Team": "blue",
        "X-API-KEY": "other",
        "user-agent": "x",
        "HOST": "y",
        "content-length": "3",
    }
    with serving() as server:
        network.port = server.port
        options = {"headers": headers, "trusted_file_hosts": ["files.test"]}
        with configuration("http://localhost:8085", **options) as config:
            METHODS["PATCH"](config)
            METHODS["events"](config)
            files = ["http://files.test/a.txt"]
            make_task(config, input={"text": "", "files": files}).get_human_readable_files()
        asked = [request[2] for request in server.requests]
    assert [each["host"] for each in asked] == ["localhost:8085", "localhost:9016", "files.test"]
    assert [each.get("x-api-key") for each in asked] == [KEY, KEY, None]
    assert [each.get("x-team") for each in asked] == ["blue", "blue", None]
    assert {each["user-agent"] for each in asked} == {f"xtask/{xtask.__version__}"}
    assert json.loads(server.requests[0][3]) == {"status": "completed"}


def test_no_repr_shows_the_key_or_the_values_of_headers():
    config = configuration("http://e.test", headers={"X-Team": "s3cret"})
    shown = repr((config, make_task(config), copy.copy(config)))
    assert KEY not in shown and "s3cret" not in shown
    assert hash(config) == hash(configuration("http://e.test", headers={"X-Team": "s3cret"}))


# fmt: off
BAD_SETTINGS = [
    {"api_key": "s3cret\u00e9"}, {"api_key": "s3cret\nx"}, {"api_key": "s3cret\x7f"},
    {"headers": {"X": "s3cret\u00e9"}}, {"headers": {"X": "s3cret\r\nY: z"}},
    {"headers": {"X": "s3cret\x00"}}, {"headers": {"": "s3cret"}},
    {"headers": {"X Y": "s3cret"}}, {"headers": {"X:": "s3cret"}},
    {"headers": {"\u00dc": "s3cret"}}, {"headers": {"X\n": "s3cret"}},
]
# fmt: on


@pytest.mark.parametrize("options", BAD_SETTINGS, ids=repr)
def test_a_key_or_header_that_cannot_be_sent_is_a_value_error_that_does_not_show_it(options):
    with pytest.raises(ValueError) as refused:
        xtask.Configuration(**{"api_key": KEY, **options})
    assert "s3cret" not in str(refused.value)


LEAKS = [
    f'HTTP/1.1 401 X||{{"detail": "bad key {KEY}"}}',
    f"HTTP/1.1 400 X||what is {KEY}?",
    f'HTTP/1.1 422 X||{{"detail": [{{"loc": ["{KEY}"], "msg": "{KEY}"}}]}}',
    f"HTTP/1.1 400 X||{'x' * 192}{KEY}",
    f"HTTP/1.1 302 X|Location: http://{KEY}.test/{KEY}?{KEY}||",
    f"HTTP/1.1 200 X||{KEY}",
    f'HTTP/1.1 200 X||["{KEY}"]',
    f'HTTP/1.1 200 X||{{"detail": "{KEY}"}}',
    f"HTTP/1.1 200 X|Content-Encoding: {KEY}||",
    f"HTTP/1.1 200 X|Content-Type: {KEY}||",
    f'HTTP/1.1 400 X||{{"detail": "no https://e.test/a.pdf?sig={KEY}"}}',
]


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("response", LEAKS, ids=lambda text: text[9:60])
def test_no_failure_shows_the_key(response, call, pauses, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(*[response + "EOF"] * 9) as server:
        error = fails(server.config, call)
    assert KEY[:5] not in everything_told(error) + caplog.text


# fmt: off
REDIRECTS = rows("""
    /x?a=b                               followed
    x                                    followed
    http://platform.test:{port}/x        followed
    HTTP://PLATFORM.Test.:{port}/x       followed
    //platform.test:{port}/x             followed
    /schön                          followed
    http://platform.test/x               refused
    https://platform.test:{port}/x       refused
    http://other.test:{port}/x           refused
    //other.test:{port}/x                refused
    http://platform.test.evil.test/x     refused
    http://platform.test:{port}@evil.test/x     refused
    http://127.0.0.1:{port}/x            refused
    file:///etc/hostname                 refused
    ftp://platform.test:{port}/x         refused
    http://[x/                           refused
    http://platform.test:x/              refused
    LONG                                 refused
""")
# fmt: on


def moved(location, status=302):
    location = location.replace("LONG", "/" + "\xfc" * 30_000)
    return lambda connection: connection.answer(
        status, b"", [("Location", location.format(port=connection.server.port))]
    )


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("location, outcome", REDIRECTS)
def test_the_key_follows_no_redirect_off_its_origin(location, outcome, call, network, pauses):
    with serving(moved(location)) as server:
        with configuration(f"http://platform.test:{server.port}") as config:
            if outcome == "followed" and call == "GET":
                METHODS["GET"](config)
            elif outcome == "followed":
                with contextlib.closing(make_task(config).events()) as events:
                    with contextlib.suppress(xtask.ModuleException):  # /x is no stream here
                        next(events)
            else:
                assert fails(config, call).status_code in (302, 500)
        asked = server.requests
    names = {name.replace(".:", ":") for name in network.asked}
    assert names == {f"platform.test:{server.port}"} and pauses == []
    assert [each[2]["x-api-key"] for each in asked] == [KEY] * (2 if outcome == "followed" else 1)


@pytest.mark.parametrize("status", MOVED)
@pytest.mark.parametrize("method", CALLS)
def test_only_a_get_is_redirected(method, status, pauses):
    with serving(moved("/x", status)) as server:
        if method == "GET":
            METHODS["GET"](server.config)
        else:
            assert fails(server.config, method).status_code == status
        assert len(server.requests) == (2 if method == "GET" else 1) and pauses == []


def test_a_redirect_to_a_host_name_that_takes_long_to_normalise_is_refused():
    name = "a" + "\u0301" * 15_000 + "\u0323" * 15_000  # seconds: the square of the length
    began = time.process_time()
    with serving(moved(f"http://{name}/x".encode().decode("latin-1"))) as server:
        fails(server.config)
    assert time.process_time() - began < 2


# Host names and TLS


# fmt: off
HOSTS = rows("""
    http://platform.test            platform.test:80            platform.test
    http://PLATFORM.Test.:80/       platform.test.:80           platform.test
    http://platform.test:443        platform.test:443           platform.test:443
    http://[::1]:80                 ::1:80                      [::1]
    http://b\u00fccher.test.:8080/  xn--bcher-kva.test.:8080    xn--bcher-kva.test:8080
    https://localhost               localhost:443               localhost
    https://LOCALHOST.:443/         localhost.:443              localhost
    https://localhost.:80           localhost.:80               localhost:80
    https://B\u00dcCHER.test        xn--bcher-kva.test:443      xn--bcher-kva.test
""")
# fmt: on


@pytest.mark.parametrize("url, asked, host", HOSTS)
def test_a_host_name_has_one_form_but_for_the_final_dot_of_a_look_up(
    url, asked, host, certificate, network, monkeypatch
):
    shown, secure = [], url.startswith("https")

    def note(sock, name, context):
        shown.append(name)

    monkeypatch.setattr(certificate.context, "sni_callback", note)
    with serving(context=certificate.context if secure else None) as server:
        network.port = server.port
        with trusting(url, certificate) as config:
            config.ssl_context.check_hostname = "localhost" in host
            METHODS["GET"](config)
        assert (network.asked, server.requests[0][2]["host"]) == ([asked], host)
        assert shown == ([host.partition(":")[0]] if secure else [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "host, options", [("127.0.0.1", {"ssl_context": None}), ("other.test", {})]
)
def test_a_bad_certificate_is_an_error_at_once(host, options, method, certificate, network, pauses):
    with serving(context=certificate.context) as server:
        with trusting(f"https://{host}:{server.port}", certificate, **options) as config:
            error = fails(config, method)
        assert (server.requests, server.connections, pauses) == ([], 1, [])
    assert (error.status_code, error.answered) == (500, False)
    for part in host, "certificate", "SSL_CERT_FILE", "ssl_context":
        assert part in str(error)


@pytest.mark.parametrize("given", [True, False])
def test_one_tls_context_is_made_where_none_is_given_and_offers_alpn(
    given, certificate, monkeypatch
):
    made, protocols, create = [], [], ssl.create_default_context

    def spy(*given, **options):
        made.append(1)
        return create(*given, **options)

    def note(connection):
        protocols.append(connection.sock.selected_alpn_protocol())
        play(connection, FULL)

    monkeypatch.setenv("SSL_CERT_FILE", certificate.file)
    certificate.context.set_alpn_protocols(["http/1.1"])
    with serving(note, context=certificate.context) as server:
        with trusting(
            server.url, certificate, **({} if given else {"ssl_context": None})
        ) as config:
            monkeypatch.setattr(ssl, "create_default_context", spy)
            for call in METHODS.values():
                call(config)
    assert (made, protocols) == (([], [None]) if given else ([1], ["http/1.1"]))


@needs_cpython  # PyPy's error does not name it
def test_a_file_that_is_the_reason_is_named(certificate, monkeypatch, tmp_path, pauses):
    name = str(tmp_path / "missing" / "keys.log")
    monkeypatch.setenv("SSLKEYLOGFILE", name)
    with serving(context=certificate.context) as server:
        assert name in str(fails(server.config))


# Proxies


BASIC = "Basic " + base64.b64encode(b"user:s3cret/").decode()
USER = "user:s3cret%2F@"


def tunnel(certificate, status=200):
    """What a proxy does with CONNECT; it plays the origin, too."""

    def respond(connection):
        connection.send(f"HTTP/1.1 {status} X\r\n\r\n")
        connection.sock = certificate.context.wrap_socket(connection.sock, server_side=True)

    return respond


@pytest.mark.parametrize("user, basic", [("", None), (USER, BASIC)])
def test_http_goes_through_http_proxy(user, basic, monkeypatch):
    with serving() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{user}127.0.0.1:{proxy.port}")
        with configuration("http://api.test") as config:
            for call in METHODS.values():
                call(config)
        assert proxy.connections == 3  # one is kept, a POST and a stream take their own
    assert proxy.requests[0][1] == "http://api.test/agent-execution/t-1/status"
    for _, _, headers, _ in proxy.requests:
        assert (headers["host"], headers.get("proxy-authorization")) == ("api.test", basic)


@pytest.mark.parametrize(
    "status, user, basic", [(200, "", None), (201, USER, BASIC), (204, "", None)]
)
def test_https_goes_through_a_tunnel_of_https_proxy(status, user, basic, certificate, monkeypatch):
    opened = tunnel(certificate, status)
    with serving(opened, None, None, None, opened, None, opened) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{user}127.0.0.1:{proxy.port}")
        with trusting("https://localhost", certificate) as config:
            for call in METHODS.values():
                call(config)
    connects = [request for request in proxy.requests if request[0] == "CONNECT"]
    others = [request[2] for request in proxy.requests if request[0] != "CONNECT"]
    assert (len(connects), len(others), proxy.connections) == (3, 5, 3)
    for _, target, headers, _ in connects:
        assert target == headers["host"] == "localhost:443" and "x-api-key" not in headers
        assert headers.get("proxy-authorization") == basic
    for headers in others:
        assert headers["x-api-key"] == KEY and "proxy-authorization" not in headers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("response", ["502", "503", "504", "EOF", "RST", "HTTP/1.1 200 XEOF"])
def test_a_proxy_that_fails_is_a_failed_connect(response, method, certificate, monkeypatch, pauses):
    with serving(response, response, tunnel(certificate)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with trusting("https://localhost", certificate) as config:
            METHODS[method](config)
        assert (len(pauses), len(proxy.requests)) == (2, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", ["302", "403", "500"])
def test_a_proxy_that_refuses_is_an_error_at_once(status, method, monkeypatch, pauses):
    with serving(status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with configuration("https://localhost") as config:
            assert status in str(fails(config, method))
        assert (pauses, len(proxy.requests)) == ([], 1)


def test_what_a_proxy_repeats_of_its_password_is_not_shown(monkeypatch, pauses):
    with serving(*["czNjcmV0 s3cret||"] * 9) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//:s3cret@"))
        with configuration("https://localhost") as config:
            shown = everything_told(fails(config, "GET"))
    assert "s3cret" not in shown and "czNjcmV0" not in shown


@pytest.mark.parametrize("value", ["api.test", "*", "x.test, api.test", ".test", "test", "x.test"])
def test_no_proxy_names_hosts_to_connect_to_directly(value, network, monkeypatch):
    with serving() as proxy, serving() as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", value)
        with configuration(f"http://api.test:{server.port}") as config:
            METHODS["GET"](config)
        direct = value != "x.test"
        assert (len(server.requests), len(proxy.requests)) == (direct, not direct)


# fmt: off
PROXIES = [
    "http://{}", "https://{}", "socks://{}", "socks4://{}", "socks5://{}", "socks5h://{}", "ftp://{}",
    "http:/{}", "http://{}:x", "http://user:s3cret%2F@", "http://user:s3cret%2F@[x:80",
]
# fmt: on


@pytest.mark.parametrize("call", ["GET", "events"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("address", PROXIES)
def test_a_password_goes_to_no_proxy_that_is_not_spoken_to_and_is_never_shown(
    address, scheme, call, network, monkeypatch, caplog, pauses
):
    caplog.set_level(logging.DEBUG)
    with serving(f"HTTP/1.1 407 {BASIC}|X: {BASIC}|Content-Length: 0||") as proxy:
        monkeypatch.setenv(
            f"{scheme}_proxy".upper(), address.format(f"{USER}127.0.0.1:{proxy.port}")
        )
        with configuration(f"{scheme}://api.test") as config:
            error = fails(config, call)
        spoken_to = address == "http://{}"
        assert proxy.connections == int(spoken_to)
    says = re.search("407" if spoken_to else "http", str(error))
    assert says or not address.endswith("//{}")
    shown = everything_told(error) + caplog.text
    assert "s3cret" not in shown and BASIC.split()[1] not in shown


def test_an_answer_without_content_keeps_its_connection():
    with serving("HTTP/1.1 204 No Content||") as server:
        METHODS["DELETE"](server.config)
        assert (len(server.requests), server.connections) == (2, 1)


def test_a_kept_connection_that_was_reset_meanwhile_is_replaced(pauses):
    def reset_later(connection):
        play(connection, FULL)
        answered.wait(10)
        connection.reset()
        gone.set()

    answered, gone = threading.Event(), threading.Event()
    with serving(reset_later, max_retries=0) as server:
        METHODS["GET"](server.config)
        answered.set()
        assert gone.wait(10)
        METHODS["GET"](server.config)
        assert server.connections == 2


def test_a_kept_connection_that_breaks_amid_an_answer_is_a_broken_one():
    def half(connection):
        play(connection, "HTTP/1.1 200 OK|Content-Le")
        time.sleep(0.05)  # a reset may destroy what was not read yet
        connection.reset()

    with serving(FULL, half, max_retries=0) as server:
        METHODS["GET"](server.config)
        fails(server.config, "PATCH")
        assert [method for method, *_ in server.requests] == ["GET", "PATCH"]


@pytest.mark.parametrize("method", ["save", "create"])
def test_a_connection_that_is_reset_amid_a_large_body_is_a_broken_one(method, pauses):
    def script(connection, number):
        connection.sock.recv(1)
        connection.reset()

    with RawServer(script) as server:
        task = make_task(server.config)
        task.result = "x" * 8 * MIB
        with pytest.raises(xtask.ModuleException) as caught:
            if method == "save":
                task.save()
            else:
                xtask.Task.create("a-1", task.result, configuration=server.config)
        assert not caught.value.answered and isinstance(caught.value.__cause__, ConnectionError)
        assert server.connections == (3 if method == "save" else 1)


def test_the_first_pause_is_under_a_second(pauses):
    with serving("503") as server:
        METHODS["GET"](server.config)
    assert 0.1 < pauses[0] < 1


def test_an_address_of_a_kind_that_this_host_lacks_is_skipped(monkeypatch):
    look_up = socket.getaddrinfo
    other = (99, socket.SOCK_STREAM, 6, "", ("x", 1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given: [other, *look_up(*given)])
    with serving(max_retries=0) as server:
        assert METHODS["GET"](server.config).id == "t-1"


# ---- Files ---------------------------------------------------------------------------------------
# Which files a task has, the addresses a stranger's URL may lead to, limits, texts, agno, messages.


def file_server(pages, context=None):
    """A server of files by path: bytes, the arguments of an answer, raw text, or a function."""

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            page = pages.get(path.partition("?")[0], (404,))
            if callable(page):
                return page(connection)
            if isinstance(page, str):
                return connection.send(page)
            connection.answer(*((200, page) if isinstance(page, bytes) else page))

    return RawServer(script, context)


def file_moved(location, status=302):
    return status, b"", [("Location", location)]


def with_files(call, base, *files, **options):
    """What a call of a task gives whose files are paths under a trusted base, or whole URLs."""
    urls = [file if ":" in file else base + file for file in files]
    options = {"trusted_file_hosts": ["127.0.0.1"], "timeout": 10, **options}
    with configuration(base, **options) as config:
        return getattr(make_task(config, input={"text": "Hi", "files": urls}), call)()


def contents(base, *files, **options):
    found = with_files("get_human_readable_files", base, *files, **options)
    return [item["content"] for item in found]


def is_error(content):
    return content.startswith("Error: ")


@pytest.fixture
def web(monkeypatch):
    """A web of invented hosts, none of which is really connected to.

    `names` has the addresses of each name, and `later` those that change after a look-up; `dialled`
    are the addresses connected to. All but 127.0.0.1 are unreachable, or lead to the local `port`.
    A look-up takes `delay` seconds.
    """
    web = types.SimpleNamespace(names={}, later={}, dialled=[], port=None, delay=0)
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def stub_look_up(host, port, family=0, type=0, proto=0, flags=0):
        addresses = web.names.get(host.rstrip("."))
        if not addresses or flags & socket.AI_NUMERICHOST:
            return look_up(host, port, family, type, proto, flags)
        web.names.update(web.later)
        time.sleep(web.delay)
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
            for a in addresses
        ]

    def stub_connect(sock, address):
        web.dialled.append(address[0])
        if address[0] != "127.0.0.1":
            if not web.port:
                raise OSError(errno.EHOSTUNREACH, f"No route to host {address[0]}")
            address = "127.0.0.1", web.port
        return connect(sock, address)

    monkeypatch.setattr(socket, "getaddrinfo", stub_look_up)
    monkeypatch.setattr(socket.socket, "connect", stub_connect)
    return web


class AgnoMedium:
    """What agno's media classes have in common: fields, and a source that must not be empty."""

    url = content = filename = name = format = mime_type = None

    def __init__(self, **fields):
        assert fields.get("url") or fields.get("content")
        self.__dict__.update(fields)


@pytest.fixture
def agno(monkeypatch):
    media = types.ModuleType("agno.media")
    media.File, media.Image = type("File", (AgnoMedium,), {}), type("Image", (AgnoMedium,), {})
    monkeypatch.setitem(sys.modules, "agno", types.ModuleType("agno"))
    monkeypatch.setitem(sys.modules, "agno.media", media)
    return media


# Which files


def kinds_of(**fields):
    """The URLs of each kind for a task with this input; texts without their contents."""
    task = make_task(None, input={"text": "", **fields}, disable_attachment_injection=True)
    texts = task.get_human_readable_files()
    assert all(list(item) == ["url"] for item in texts)
    kinds = {"image": task.get_images(), "pdf": task.get_files()}
    return {**kinds, "text": [item["url"] for item in texts]}


EXTENSIONS = {
    "image": """/a.jpg /a.jpeg /a.png /a.gif /a.bmp /a.tiff /a.webp /a.WebP#b.txt
        /v1.0/a.JPG?x=/b.pdf""",
    "pdf": "/a.pdf /a.PDF /a.pdf?x=.txt /a.txt/b.pdf",
    "text": """/a.txt /a.csv /a.json /a.xml /a.html /a.htm /a.md /a.rst /a.yaml /a.yml /a.py /a.js
        /a.ts /a.java /a.c /a.cpp /a.h /a.cs /a.go /a.rb /a.php /a.sh /a.svg /a.tsv /a.log /a.ini
        /a.toml /a.tex /a.ipynb /a.eml /a.TXT /b.JSON?v=1.pdf#x.png""",
    "none": """/a.zip /a /txt /a.txt.gz /a.txt/b /a.docx /a.mp3 /a.tif /a.jsonl /a.pyc /a.p .pdf
        .txt?a /a?b.txt /a#b.png""",
}
ATTACHMENTS = """
    image     -                 /u/1       image
    image     text/plain        /u/1.pdf   image
    pdf       -                 /u/1       pdf
    pdf       image/png         /u/1.txt   pdf
    text      application/zip   /u/1.png   text
    document  text/plain        /u/1.txt   -
    audio     image/png         /u/1.png   -
    video     application/pdf   /u/1.pdf   -
    archive   -                 /u/1.txt   -
    unknown   image/webp        /u/1.txt   image
    unknown   application/pdf   /u/1.txt   pdf
    unknown   text/x-new        /u/1.pdf   text
    -         image/png         /u/1       image
    -         image/svg+xml     /u/1.png   text
    -         application/pdf   /u/1       pdf
    -         text/csv          /u/1.pdf   text
    -         application/json  /u/1.pdf   text
    -         application/xml   /u/1       text
    -         application/zip   /u/1.pdf   pdf
    unknown   audio/mpeg        /u/1.PNG   image
    unknown   -                 /u/1.svg   text
    -         -                 /u/1.md?x  text
    -         -                 /u/1       -
    unknown   video/mp4         /u/1       -
"""


def test_the_kind_of_a_url_is_its_extension(no_agno):
    urls = {
        kind: ["https://files.test" + path for path in paths.split()]
        for kind, paths in EXTENSIONS.items()
    }
    kinds = kinds_of(files=sum(urls.values(), []))
    assert {**kinds, "none": urls["none"]} == urls


@pytest.mark.parametrize("row", ATTACHMENTS.strip().splitlines())
def test_the_kind_of_an_attachment_is_its_kind_else_its_mime_type_else_its_extension(row, no_agno):
    kind, mime, path, result = (None if cell == "-" else cell for cell in row.split())
    attachment = {"url": "https://files.test" + path, "kind": kind, "mime": mime}
    found = kinds_of(attachments=[attachment])
    assert [kind for kind in found if found[kind]] == ([result] if result else [])


def test_attachments_come_before_the_files_that_are_not_among_them(no_agno):
    first, second, third = (f"https://files.test/{n}.txt" for n in range(3))
    attachments = [{"url": second}, None, "x.txt", {"name": "y.txt"}, {"url": 5}]
    attachments += [{"url": third, "kind": "pdf"}, {"url": "https://files.test/u", "kind": "audio"}]
    fields = {"files": [third, first, 5, second], "attachments": attachments}
    assert kinds_of(**fields) == {"image": [], "pdf": [third], "text": [second, first]}
    message = make_task(None, input=fields, disable_attachment_injection=True).to_message()
    urls = f"{second}, {third}, https://files.test/u, {first}"
    contents = f'{{"url": "{second}"}}\n{{"url": "{first}"}}'
    assert message == f"Files: {urls}\nFiles contents:\n{contents}"


# Addresses


PUBLIC_ADDRESSES, PRIVATE_ADDRESSES, SPELLED = map(
    str.split,
    [
        """
        1.1.1.1 9.255.255.255 11.0.0.1 93.184.216.34 100.63.255.255 100.128.0.1 126.0.0.1 128.0.0.1
        168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.1 172.15.255.255 172.32.0.1 192.0.1.1
        192.167.255.255 192.169.0.1 198.17.255.255 198.20.0.1 223.255.255.255
        2001:200::1 2002:5db8:d822::1 2400::1 2606:2800:220:1::1 3ffe::1 3fff:1000::1
        ::ffff:93.184.216.34 64:ff9b::5db8:d822
        """,
        """
        0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254
        169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.0 192.0.0.1 192.0.0.9 192.0.0.10
        192.0.0.170 192.0.0.192 192.0.0.255 192.0.2.1 192.168.1.1 198.18.0.1 198.19.255.255
        198.51.100.1 203.0.113.1 168.63.129.16 224.0.0.1 233.252.0.1 239.1.1.1 240.0.0.1
        255.255.255.255 :: ::1 ::127.0.0.1 100::1 2001:: 2001::1 2001:1::1 2001:1::2 2001:2::1
        2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff:ffff::1 2001:db8::1
        3fff::1 3fff:fff:ffff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 ff0e::1
        64:ff9b:1::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
        ::ffff:168.63.129.16 ::ffff:192.0.0.9 ::ffff:224.0.0.1 ::ffff:240.0.0.1 64:ff9b::7f00:1
        64:ff9b::a9fe:a9fe 64:ff9b::a83f:8110 64:ff9b::c000:9 64:ff9b::e000:1 64:ff9b::f000:1
        2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe:: 2002:a83f:8110::1 2002:c000:c0::
        2002:e000:1::
        """,
        """
        127.1 127.0.1 0x7f.1 0x7f000001 0177.0.0.1 017700000001 2130706433 0 10.1 0xa9fea9fe
        127.0.0.1. \uff11\uff12\uff17.0.0.1 127\u30020\u30020\u30021 \u2460\u2461\u2466.0.0.\u2460
        [0:0:0:0:0:0:0:1] [::FFFF:7f00:1] [64:FF9B::127.0.0.1]
        """,
    ],
)


def hosts_of(addresses, web, named):
    """The address of each host: of names that have it, or of literals."""
    if not named:
        return {f"[{address}]" if ":" in address else address: address for address in addresses}
    hosts = {f"h{number}.test": address for number, address in enumerate(addresses)}
    web.names.update((host, [address]) for host, address in hosts.items())
    return hosts


@pytest.mark.parametrize("named", [True, False], ids=["names", "literals"])
def test_files_come_from_public_addresses_alone(named, web, caplog):
    urls = [
        f"http://{host}/a.txt"
        for host in hosts_of(PUBLIC_ADDRESSES + PRIVATE_ADDRESSES, web, named)
    ]
    found = contents("http://platform.test", *urls, trusted_file_hosts=())
    assert set(web.dialled) == set(PUBLIC_ADDRESSES) and all(map(is_error, found))
    assert caplog.text.count("trusted_file_hosts") == len(PRIVATE_ADDRESSES)
    assert not [address for address in PRIVATE_ADDRESSES if address in str(found)]


@pytest.mark.parametrize("named", [True, False], ids=["names", "literals"])
def test_agno_gets_images_from_public_addresses_alone(named, web, agno):
    hosts = hosts_of(PUBLIC_ADDRESSES + PRIVATE_ADDRESSES, web, named)
    urls = [f"http://{host}/a.png" for host in hosts]
    found = with_files("get_images", "http://platform.test", *urls, trusted_file_hosts=())
    assert [hosts[image.url.split("/")[2]] for image in found] == PUBLIC_ADDRESSES


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_through_a_proxy_literals_alone_are_checked(scheme, web, monkeypatch):
    web.names["private.test"] = ["127.0.0.1"]  # what it is here is not what it is to the proxy
    hosts = [
        *hosts_of(PUBLIC_ADDRESSES + PRIVATE_ADDRESSES, web, named=False),
        *SPELLED,
        "a.localhost",
        "private.test",
        "10.9.9.9",
    ]
    with RawServer(lambda connection, _: connection.request() and connection.answer()) as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", proxy.url)
        urls = [f"{scheme}://{host}/a.txt" for host in hosts]
        contents("http://platform.test", *urls, trusted_file_hosts=["10.9.9.9"])
        reached = {re.sub("http://|/a.txt|:443$", "", request[1]) for request in proxy.requests}
    assert reached == {*hosts_of(PUBLIC_ADDRESSES, web, named=False), "private.test", "10.9.9.9"}


def test_no_spelling_of_a_private_address_is_reached(web):
    urls = [f"http://{host}/a.txt" for host in [*SPELLED, "localhost", "LOCALHOST."]]
    assert all(map(is_error, contents("http://platform.test", *urls, trusted_file_hosts=())))
    assert web.dialled == []


def test_the_checked_address_is_the_one_that_is_connected_to(web):
    web.names["rebind.test"], web.later["rebind.test"] = ["93.184.216.34"], ["127.0.0.1"]
    with file_server({"/a.txt": b"hello"}) as server:
        web.port = server.port
        assert contents(server.url, "http://rebind.test/a.txt") == ["hello"]
        assert web.dialled == ["93.184.216.34"]
        assert server.requests[0][2]["host"] == "rebind.test"


@pytest.mark.parametrize("order", [1, -1])
def test_a_private_address_beside_a_public_one_is_not_connected_to(order, web):
    web.names["mixed.test"] = ["10.0.0.1", "93.184.216.34"][::order]
    contents("http://platform.test", "http://mixed.test/a.txt")
    assert "10.0.0.1" not in web.dialled


TRUSTED = """
    inner.test          INNER.test           yes
    Inner.TEST.         inner.test           yes
    inner.test          inner.test.          yes
    b\u00fccher.test         xn--bcher-kva.test   yes
    xn--bcher-kva.test  B\u00dcCHER.test          yes
    10.0.0.7            10.0.0.7             yes
    ::1                 [::1]                yes
    [::1]               [::1]                yes
    inner.test          x.inner.test         no
    test                inner.test           no
    10.0.0.7            inner.test           no
    other.test          inner.test           no
"""


@pytest.mark.parametrize("row", TRUSTED.strip().splitlines())
def test_a_trusted_host_is_trusted_in_any_spelling(row, web):
    setting, host, trusted = row.split()
    for name in ("inner.test", "x.inner.test", "xn--bcher-kva.test"):
        web.names[name] = ["10.0.0.7"]
    (found,) = contents(
        "http://platform.test", f"http://{host}/a.txt", trusted_file_hosts=[setting]
    )
    assert bool(web.dialled) == (trusted == "yes") and is_error(found) and "10.0.0.7" not in found


NOT_HTTP = """
    file://{path} FILE://{path} file:{path} data:,a.txt ftp://127.0.0.1:{port}/a.txt unix:/a.txt
    gopher://127.0.0.1:{port}/a.txt http:///a.txt http:/a.txt //127.0.0.1:{port}/a.txt
    http://127.0.0.1:x/a.txt http://127.0.0.1:99999/a.txt http://..a/a.txt http://\0/a.txt
    http://127.0.0.%31:{port}/a.txt http://%6cocalhost:{port}/a.txt http://[fe80::1%25lo]/a.txt
    http://127.0.0.\uff0531:{port}/a.txt http://127.0.0.1:{port}\\.x.test/a.txt http://[::1/a.txt
    http://x@127.0.0.1:{port}/a.txt
"""
REFUSED_TARGETS = """
    http://localhost:{port}/b.txt http://127.1:{port}/b.txt //[::1]:{port}/b.txt
    http://10.0.0.1/b.txt http://169.254.169.254/b.txt http://private.test/b.txt file://{path}
    ftp://127.0.0.1:{port}/b.txt data:,b.txt http://127.0.0.%31:{port}/b.txt
    http://[::ffff:127.0.0.1]:{port}/b.txt
"""


@pytest.mark.parametrize("url", NOT_HTTP.split())
def test_what_is_no_http_url_is_not_opened(url, web):
    with file_server({"/a.txt": b"secret"}) as server:
        assert is_error(
            *contents(server.url, url.format(path=f"{HERE}/README.md", port=server.port))
        )
        assert (web.dialled, server.connections) == ([], 0)


@pytest.mark.parametrize("target", REFUSED_TARGETS.split())
def test_a_redirect_is_checked_again(target, web, agno):
    web.names["private.test"] = ["192.168.1.1"]
    pages = {}
    with file_server({"/b.txt": b"secret"}) as inner, file_server(pages) as outer:
        moved = file_moved(target.format(path=__file__, port=inner.port))
        pages.update({"/a.txt": moved, "/a.pdf": moved})
        assert is_error(*contents(outer.url, "/a.txt"))
        assert with_files("get_files", outer.url, "/a.pdf") == []  # agno would follow it
        assert (web.dialled, inner.connections) == (["127.0.0.1"] * 2, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_five_redirects_are_followed_and_no_sixth(status):
    pages = {f"/{n}.txt": file_moved(f"{n + 1}.txt", status) for n in range(6)}
    with file_server({**pages, "/6.txt": b"arrived"}) as server:
        assert contents(server.url, "/1.txt") == ["arrived"]
        assert contents(server.url, "/0.txt") == ["Error: redirected more than 5 times"]
        assert len(server.requests) == 6 + 6


def test_a_redirect_to_another_host_asks_that_host_by_its_name(web):
    web.names["inner.test"] = ["127.0.0.1"]
    pages = {"/b/\u00e9.txt".encode().decode("latin-1"): b"hello", "/b/%C3%A9.txt": b"hello"}
    with file_server(pages) as server:
        target = f"http://INNER.test:{server.port}/b/\u00e9.txt".encode().decode("latin-1")
        pages["/a.txt"] = file_moved(target)
        trusted = ["127.0.0.1", "inner.test"]
        assert contents(server.url, "/a.txt", trusted_file_hosts=trusted) == ["hello"]
        assert server.requests[1][2]["host"] == f"inner.test:{server.port}"


def test_a_url_is_percent_encoded_once():
    with file_server({"/%C3%A9%20b/%41.txt": b"hello"}) as server:
        assert contents(server.url, "/\u00e9 b/%41.txt?q=\u00fc r&s=%20#part") == ["hello"]
        assert server.requests[0][1].endswith("?q=%C3%BC%20r&s=%20")


def test_files_get_neither_the_key_nor_the_headers():
    with file_server({"/a.txt": file_moved("/b.txt"), "/b.txt": b"hello"}) as server:
        assert contents(server.url, "/a.txt", headers={"X-Gateway": "hidden"}) == ["hello"]
        assert [method for method, *_ in server.requests] == ["GET", "GET"]
        assert not re.search(f"{KEY}|(?i:x-gateway|hidden|x-api-key)", repr(server.requests))


def test_a_client_certificate_goes_to_trusted_hosts_alone(certificate, web, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate.file)  # the context for strangers trusts it
    key = str(Path(certificate.file).with_name("key.pem"))
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context = ssl.create_default_context()
    for each in (server_context, context):
        each.load_cert_chain(certificate.file, key)
        each.load_verify_locations(certificate.file)
    server_context.verify_mode = ssl.CERT_OPTIONAL
    web.names["localhost"] = ["93.184.216.34"]
    shown = []

    def page(connection):
        shown.append(connection.sock.getpeercert())
        connection.answer(200, b"hello")

    with file_server({"/a.txt": page}, server_context) as server:
        web.port = server.port
        urls = [f"https://{host}:{server.port}/a.txt" for host in ("127.0.0.1", "localhost")]
        for url in urls:
            assert contents("http://platform.test", url, ssl_context=context) == ["hello"]
    assert shown[0] and not shown[1]


# Limits


def file_stuck(connection):
    connection.send("HTTP/1.1 200 OK\r\n\r\nx")
    connection.wait_closed()


@pytest.fixture
def limit_threads(monkeypatch):
    """Lets the thread of the test start only so many more threads."""
    start, testing = threading.Thread.start, threading.current_thread()

    def limit(count):
        def stub(thread):
            if threading.current_thread() is testing:
                if not left:
                    raise RuntimeError("can't start new thread")
                left.pop()
            return start(thread)

        left = [1] * count
        monkeypatch.setattr(threading.Thread, "start", stub)

    return limit


def zipped(data):
    return 200, gzip.compress(data, 1), [("Content-Encoding", "gzip")]


@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["plain", "gzip"])
def test_a_file_may_have_10_mib_and_no_byte_more(wrap):
    pages = {"/fits.txt": wrap(b"x" * 10 * MIB), "/over.txt": wrap(b"x" * (10 * MIB + 1))}
    with file_server({**pages, "/good.txt": b"good"}) as server:
        fits, over, good = contents(server.url, *pages, "/good.txt")
    assert (len(fits), good) == (10 * MIB, "good") and is_error(over)


def test_the_files_of_a_call_may_have_32_mib_without_those_that_failed(limit_threads):
    cut = "HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + "x" * 9 * MIB
    pages = {"/cut.txt": cut, **{f"/{n}.txt": b"x" * 8 * MIB for n in range(4)}, "/5.txt": b"x"}
    with file_server(pages) as server:
        limit_threads(0)  # one after another
        cut, *fit, over = contents(server.url, *pages)
    assert is_error(cut) and [len(file) for file in fit] == [8 * MIB] * 4 and is_error(over)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_threads_do_the_work_where_no_more_start(count, limit_threads):
    pages = {f"/{n}.txt": b"%d" % n for n in range(9)}
    with file_server(pages) as server:
        limit_threads(count)
        assert contents(server.url, *pages) == list("012345678")


def test_eight_files_are_fetched_at_a_time():
    together, counted, now, most = threading.Barrier(8), threading.Barrier(8), [], []

    def page(connection):
        now.append(1)
        together.wait(10)
        time.sleep(0.05)  # for a ninth one, which must not come
        most.append(len(now))
        counted.wait(10)
        now.pop()
        connection.answer(200, b"x")

    pages = {f"/{n}.txt": page for n in range(40)}
    with file_server(pages) as server:
        assert contents(server.url, *pages) == ["x"] * 40
    assert max(most) == 8


def test_slow_files_cost_one_timeout_and_what_came_in_time_is_kept():
    def trickle(connection):
        connection.send("HTTP/1.1 200 OK\r\n\r\n")
        repeats("x")(connection)

    pages = {"/first.txt": b"good", **{f"/{n}.txt": (trickle, file_stuck)[n % 2] for n in range(8)}}
    with file_server({**pages, "/last.txt": b"too late"}) as server:
        began = time.monotonic()
        first, *slow = contents(server.url, *pages, "/last.txt", timeout=1)
        assert first == "good" and [is_error(content) for content in slow] == [True] * 9
        assert time.monotonic() - began < 4 and server.connections == 9
        for thread in server.threads[1:]:
            thread.join(5)
            assert not thread.is_alive()  # its connection was closed


def test_the_callers_own_thread_looks_at_the_time_between_two_files(limit_threads):
    def slow(connection):
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for _ in range(8):
            time.sleep(0.05)
            connection.send("x")

    pages = {"/slow.txt": slow, "/good.txt": b"good"}
    with file_server(pages) as server:
        limit_threads(0)
        assert is_error(contents(server.url, *pages, timeout=0.3)[1])
        assert [path for _, path, *_ in server.requests] == ["/slow.txt"]


def test_a_cancelled_twin_leaves_its_files_at_once():
    async def cancel():
        waiting = asyncio.ensure_future(task.ato_message())
        while len(server.requests) < 2:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert {server.closed.get(timeout=5) for _ in files} == {1, 2}

    with file_server({"/1.txt": file_stuck, "/2.txt": RawConnection.wait_closed}) as server:
        config = configuration(server.url, trusted_file_hosts=["127.0.0.1"])
        files = [server.url + "/1.txt", server.url + "/2.txt"]
        task = make_task(config, input={"text": "Hi", "files": files})
        asyncio.run(cancel())


# Contents


BAD_FILES = """
    HTTP/1.1 404 X|Content-Length: 6||secret
    HTTP/1.1 500 X|Content-Length: 6||secret
    HTTP/1.1 204 X||
    HTTP/1.1 206 X|Content-Length: 6||secret
    HTTP/1.1 302 X|Content-Length: 0||
    HTTP/1.1 302 X|Location: http://private.test/|Content-Length: 0||
    HTTP/1.1 200 X|Content-Ty
    HTTP/1.1 200 X|Content-Length: 9||secret
    HTTP/1.1 200 X|Transfer-Encoding: chunked||6|secret|
    HTTP/1.1 200 X|Content-Encoding: br|Content-Length: 6||secret
    HTTP/1.1 200 X|Content-Encoding: gzip|Content-Length: 6||secret
    HTTP/1.1 200 X|Content-Encoding: deflate|Content-Length: 3||x^K
    no HTTP at all||
"""
ENCODED = """
    utf-8              \xc3\xa9\xe2\x82\xac      \u00e9\u20ac
    -                  \xc3\xa9\xe2\x82\xac      \u00e9\u20ac
    ISO-8859-1         \xe9                      \u00e9
    latin-1            \xe9                      \u00e9
    "windows-1252"     \x80                      \u20ac
    koi8-r             \xf0                      \u041f
    cp1251             \xcf                      \u041f
    Shift_JIS          \x82\xa0                  \u3042
    euc-jp             \xa4\xa2\xff              \u3042\ufffd
    iso-2022-jp        \x1b$B$"\x1b(B            \u3042
    gb18030            \xd6\xd0                  \u4e2d
    big5               \xa4\xa4                  \u4e2d
    utf-16le           \xe9\0                    \u00e9
    us-ascii           a\xe9                     a\ufffd
    utf-8              a\xffb                    a\ufffdb
    nonsense           \xc3\xa9\xff              \u00e9\ufffd
    utf-999            \xc3\xa9                  \u00e9
    rot13              abc                       abc
    zip                abc                       abc
    base64             YWJj                      YWJj
    unicode_escape     \\x41                     \\x41
    idna               xn--a                     xn--a
    "utf-8\0"          abc                       abc
    -                  \xef\xbb\xbfname;city     name;city
    utf-8              \xef\xbb\xbfa\xff         a\ufffd
    latin-1            \xef\xbb\xbf\xc3\xa9      \u00e9
    -                  \xff\xfea\0\xe9\0         a\u00e9
    -                  \xfe\xff\0a\0\xe9         a\u00e9
    utf-16             \xff\xfea\0               a
    utf-16le           \xff\xfea\0               a
    utf-8              \xfe\xff\0a\0             a\ufffd
"""


@pytest.mark.parametrize("page", BAD_FILES.strip().splitlines())
def test_a_file_that_fails_says_so_and_the_others_are_not_lost(page, web):
    web.names["private.test"] = ["192.168.77.1"]
    pages = {"/good.txt": b"good", "/bad.txt": page.strip().replace("|", "\r\n")}
    with file_server(pages) as server:
        first, bad, last = contents(server.url, "/good.txt", "/bad.txt", "/good.txt?2")
    assert (first, last) == ("good", "good") and is_error(bad)
    assert not re.search(r"127\.0\.0\.1|192\.168|secret", bad)


@pytest.mark.parametrize("row", ENCODED.strip().split("\n"))
def test_a_file_is_decoded_by_its_mark_else_its_charset_else_as_utf_8(row):
    charset, data, text = re.split(" {2,}", row.strip(" "))
    headers = [] if charset == "-" else [("Content-Type", f"text/plain; charset={charset}")]
    with file_server({"/a.txt": (200, data.encode("latin-1"), headers)}) as server:
        assert contents(server.url, "/a.txt") == [text]


@pytest.mark.parametrize("coding, encode", [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_file_is_decoded(coding, encode, agno):
    headers = [("Content-Encoding", coding), ("Content-Type", "text/plain; charset=latin-1")]
    page = (200, encode(b"caf\xe9"), headers)
    with file_server({"/a.txt": page, "/a.pdf": page}) as server:
        assert contents(server.url, "/a.txt") == ["caf\u00e9"]
        assert with_files("get_files", server.url, "/a.pdf")[0].content == b"caf\xe9"


# agno


PDFS = [  # a path, the page, and the content, file name and URL (True: its own) that agno gets
    ("/x/My%20report.pdf?sig=1", b"%PDF a", b"%PDF a", "My report.pdf", None),
    ("/b.PDF", (200, b"%PDF b", [("Content-Type", "text/html")]), b"%PDF b", "b.PDF", None),
    ("/gone.pdf", (404,), None, None, True),
    ("/empty.pdf", b"", None, None, True),
    ("/cut.pdf", RawConnection.reset, None, None, True),
]
REFUSED_URLS = """
    http://127.1/a.{0}?hidden http://localhost/a.{0}?hidden http://10.0.0.1/a.{0}?hidden
    http://private.test/a.{0}?hidden http://127.0.0.%31/a.{0}?hidden http://[::1/a.{0}?hidden
    http://[::ffff:127.0.0.1]/a.{0}?hidden http://127.0.0.1\\.x.test/a.{0}?hidden
    file:///etc/a.{0}?hidden ftp://93.184.216.34/a.{0}?hidden http://e.test:x/a.{0}?hidden
    http://u:hidden@127.1/a.{0}
"""


@pytest.mark.parametrize("path, page, content, name, url", PDFS)
def test_agno_gets_a_pdf_with_its_bytes_or_else_its_url(path, page, content, name, url, agno):
    with file_server({path.partition("?")[0]: page}) as server:
        (file,) = with_files("get_files", server.url, path)
    assert type(file) is agno.File
    assert (file.content, file.filename, file.url) == (content, name, url and server.url + path)
    assert (file.name, file.format) == (name, name and "pdf")
    assert file.mime_type == (content and "application/pdf")


NAMES = ["..%2F..%2Fetc%2Fp.pdf", "a%00b%0d%0a.pdf", "a%22%3Cb%3E%5C.pdf", ".pdf", "", "%2e%2e"]


@pytest.mark.parametrize("name", NAMES)
def test_agno_gets_a_clean_file_name(name, agno):
    with file_server({f"/{name}": b"%PDF"}) as server:
        given = {"url": f"{server.url}/{name}", "kind": "pdf"}
        with configuration(server.url, trusted_file_hosts=["127.0.0.1"]) as config:
            (file,) = make_task(config, input={"attachments": [given]}).get_files()
    assert file.filename.endswith("pdf") and not set(file.filename) & set('/\\\0\r\n"<>')


@pytest.mark.parametrize("call, end", [("get_files", "pdf"), ("get_images", "png")])
def test_agno_does_not_get_a_refused_url(call, end, agno, web, caplog):
    web.names["private.test"] = ["10.0.0.1"]
    urls = REFUSED_URLS.format(end).split()
    with file_server({}) as server:
        found = with_files(call, server.url, *urls, f"/a.{end}?x")
    assert [item.url for item in found] == [f"{server.url}/a.{end}?x"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(urls)
    assert "hidden" not in caplog.text and set(web.dialled) <= {"127.0.0.1"}


def test_looking_up_names_for_agno_ends_in_time_too(agno, web, caplog):
    urls = [f"http://{n}.test/a.png" for n in range(30)]
    web.names.update({f"{n}.test": ["93.184.216.34"] for n in range(30)})
    web.delay = 0.05
    found = with_files("get_images", "http://platform.test", *urls, timeout=0.3)
    assert 0 < len(found) < 30 and len(caplog.records) == 30 - len(found)
    assert "no time left" in caplog.text


def test_a_refused_pdf_is_left_out_also_where_the_time_is_over(agno, caplog):
    pages = {f"/{n}.pdf": file_stuck for n in range(8)}
    with file_server(pages) as server:
        private = "http://169.254.169.254/a.pdf"
        found = with_files("get_files", server.url, *pages, private, timeout=0.3)
        assert [file.url for file in found] == [server.url + path for path in pages]
    assert "not public; see Configuration.trusted_file_hosts\n" in caplog.text


# The message


MESSAGES = [  # the text, the files, and the message ("@" is the server)
    ("Hi\nthere ", None, "Hi\nthere "),
    ("Hi", [], "Hi"),
    (None, None, ""),
    ("", [], ""),
    (None, ["/a.pdf", "/b.png"], "Files: @/a.pdf, @/b.png"),
    ("", ["/a.zip"], "Files: @/a.zip"),
    ("Hi", ["/a.pdf"], "Hi\nFiles: @/a.pdf"),
    (
        "Hi",
        ["/e.csv", "/a.pdf", "/r.txt?"],
        """Hi
Files: @/e.csv, @/a.pdf, @/r.txt?
Files contents:
{"url": "@/e.csv", "content": ""}
{"url": "@/r.txt?", "content": "caf\\u00e9\\n\\"x\\""}""",
    ),
    (
        None,
        ["/r.txt"],
        """Files: @/r.txt
Files contents:
{"url": "@/r.txt", "content": "caf\\u00e9\\n\\"x\\""}""",
    ),
]


@pytest.mark.parametrize("text, files, message", MESSAGES)
def test_the_message_has_the_text_the_urls_and_the_contents(text, files, message):
    with file_server({"/r.txt": b'caf\xc3\xa9\n"x"', "/e.csv": b""}) as server:
        urls = files and [server.url + path for path in files]
        with configuration(server.url, trusted_file_hosts=["127.0.0.1"]) as config:
            task = make_task(config, input={"text": text, "files": urls})
            assert task.to_message() == message.replace("@", server.url)
        server.requests.clear()
        task.disable_attachment_injection = True
        without = re.sub(', "content": .*}', "}", message)
        assert task.to_message() == without.replace("@", server.url) and not server.requests


@pytest.mark.parametrize("charset", ["", "; charset=utf-32", "; charset=utf-8"])
@pytest.mark.parametrize(
    "data", [b"\xff\xfe\0\0a\0\0\0\xe9\0\0\0", b"\0\0\xfe\xff\0\0\0a\0\0\0\xe9"]
)
def test_a_file_in_utf_32_is_decoded_by_its_mark(data, charset):
    page = (200, data, [("Content-Type", f"text/plain{charset}")])
    with file_server({"/a.txt": page}) as server:
        assert contents(server.url, "/a.txt") == ["a\u00e9"]


@pytest.mark.parametrize("value", [None, "text", [], {}])
def test_a_task_without_an_input_has_an_empty_message(value):
    assert make_task(configuration("http://e.test"), input=value).to_message() == ""


# ---- Local platform ------------------------------------------------------------------------------
# Its routes, what an agent may do, and how a run ends; the chapters before use it all the time.


def local_agent(*events, result="4", error=None, gate=None):
    """An agent that yields events, waits for the gate, raises the error or returns the result."""

    def agent(task):
        task["tags"] = {1}  # the agent's own copy
        yield from events
        assert not gate or gate.wait(10)
        if error:
            raise error
        return result

    return agent


def local_create(platform, prompt="Hi", **options):
    return xtask.Task.create("a-1", prompt, configuration=platform.config, **options)


def local_request(platform, path, body=None, method=None, **headers):
    """(status, text) of a request that no Task sends."""
    headers = {"x-api-key": "local-key", **headers}
    request = urllib.request.Request(platform.url + path, body, headers, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.read().decode()


@needs_whole_file
def test_the_local_platform_records_what_arrives_and_no_proxy_comes_between(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with local(local_agent()) as platform:
        task = whole.Task.create("a/1", "Hi", configuration=platform.configuration)
        [(method, path, _, body)] = platform.requests
        assert (method, path) == ("POST", "/agent-execution/a%2F1")
        assert body == {"input": {"text": "Hi"}}
        for name, value in platform.environ.items():
            monkeypatch.setenv(name, value)
        whole.Task.load(task.id)
        assert platform.requests[1][3] is None


@needs_whole_file
def test_null_create_keys_count_as_left_out():
    body = b'{"id": null, "title": null, "input": {"text": "Hi", "files": null}}'
    with local(local_agent()) as platform:
        task = json.loads(local_request(platform, "/agent-execution/a-1", body)[1])
        assert task["id"] in platform.tasks and "title" not in task
    assert task["input"] == {"text": "Hi", "files": [], "user": None}


@needs_whole_file
def test_a_paused_task_can_be_stopped_and_a_finished_one_stays_as_it_is():
    gate = threading.Event()
    with local(local_agent(("chunk", "x"), gate=gate)) as platform:
        task = local_create(platform, events_streaming=True)
        task.set_status("paused")
        assert task.stop().status == "stopped" and task.is_manually_stopped is True
        assert list(task.events())[-1].data.status == "stopped"
        task.set_status("paused")  # also after its run
        assert task.stop().status == "stopped"
        gate.set()
        finished = local_create(platform).wait_finished(10)
        assert finished.stop().status == "completed" and not finished.is_manually_stopped
        assert task.reload().result is None  # what its agent returned after the stop


LOCAL_ENDS = [  # an agent, the status of its task, and a part of the result
    # fmt: off
    (local_agent(("task_created", {"input": {"text": "No"}})), "completed", "4"),
    (local_agent(result=None), "completed", None),
    (local_agent(result={"a": [1]}), "completed", '{"a": [1]}'),
    (local_agent(result={1, 2}), "failed", "JSON"),
    (local_agent(error=ValueError("no paper")), "failed", "no paper"),
    (local_agent(error=SystemExit()), "failed", "SystemExit()"),
    (local_agent(("chunk", "x", {"k": 1})), "failed", "unpack"),
    (local_agent("chunk"), "failed", "unpack"),
    (local_agent(None), "failed", "None"),
    (local_agent(("chunk", {1})), "failed", "JSON"),
    # fmt: on
]


@needs_whole_file
@pytest.mark.parametrize("agent, status, result", LOCAL_ENDS)
def test_a_local_run_ends_as_its_agent_does(agent, status, result):
    with local(agent) as platform:
        task = local_create(platform, events_streaming=True)
        *_, last = task.events()
        assert last.data == task.reload() and task.finished_at
        said = [message.content.text for message in task.get_activity_log().messages]
    assert task.status == status and (task.result == result or result in task.result)
    assert said == ["Hi"] + [task.result] * (status == "completed")


@needs_whole_file
def test_the_local_activity_log_grows_as_the_agent_goes():
    events, kinds = (
        [
            ("analyze", {"payload": {"input": {"title": "Plan"}}}),
            ("tool_call_request", {"tool_name": "add"}),
            ("tool_call_result", {"tool_name": "add"}),
            ("sub_agent_trigger", {"query": "Check"}),
            ("auth_event", {"type": "login_required", "data": {}}),
        ],
        [],
    )

    def agent(task):
        for event in events:
            yield event
            log = xtask.Task.load(task["id"], platform.config).get_activity_log()
            kinds.append([type(entry).__name__[19:] for entry in log.messages])

    with local(agent) as platform:
        list(local_create(platform, events_streaming=True).events())
    assert [len(names) for names in kinds] == [2, 2, 3, 4, 5]
    assert kinds[-1] == ["Message", "Reasoning", "ToolCall", "SubAgentTrigger", "Auth"]


@needs_whole_file
def test_an_id_continues_a_local_task_and_its_log():
    gate = threading.Event()
    with local(local_agent(gate=gate)) as platform:
        task = local_create(platform, events_streaming=True)
        with task.events() as events:
            next(events)
            again = local_create(platform, "And?", id=task.id)
            assert list(events)[-1].data.status == "stopped"
        gate.set()
        said = [entry.content.text for entry in again.wait_finished(10).get_activity_log().messages]
    assert said == ["Hi", "And?", "4"]


@needs_whole_file
def test_local_lists_are_filtered():
    with local(local_agent()) as platform:
        user = {"email": "ada@example.com", "id": "u-1"}
        mine = local_create(platform, user=user, parent_execution_id="p-1")
        mine.wait_finished(10)
        other = local_create(platform)
        find = functools.partial(xtask.Task.list, configuration=platform.config)
        assert [item.id for item in find("a-1")] == [mine.id, other.id]
        [item] = find("a-1", user_id="u-1", parent_task_id="p-1", status=["failed", "completed"])
        assert (item.id, item.result) == (mine.id, "4")
        assert find("a-1", status="failed") == find("a-2") == []


LOCAL_REQUESTS = r"""
POST  | /agent-execution/a-1                   | {            |                 | 400 | JSON
POST  | /agent-execution/a-1                   | [1]          |                 | 400 | JSON
POST  | /agent-execution/a-1                   | {"input": 3} |                 | 400 | JSON
PATCH | /agent-execution/mine/update           | 3            |                 | 400 | JSON
GET   | /agent-execution/t-9/status            |              |                 | 404 | not found
GET   | /agents                                |              |                 | 404 | Not Found
GET   | /agent-execution/mine/status           |              | x-api-key other | 401 | Invalid
GET   | /local-org/agent-execution/mine/events |              | Last-Event-ID 3 | 200 | 100~~id: 4~
"""


@needs_whole_file
@pytest.mark.parametrize("row", LOCAL_REQUESTS.strip().splitlines())
def test_the_local_platform_answers_other_clients(row):
    method, path, body, header, status, part = re.split(r" *\| ", row)
    with local(local_agent()) as platform:
        local_create(platform, id="mine").wait_finished(10)
        headers = dict([header.split()]) if header else {}
        got, text = local_request(platform, path, body.encode(), method, **headers)
    assert got == int(status) and part in text.replace("\n", "~")


@needs_whole_file
def test_nobody_is_served_after_the_local_platform_was_left_and_no_reader_holds_it_up():
    def endless(task):
        while True:
            yield "chunk", "x" * 100_000  # far more than the buffers between take

    with local(endless, max_retries=0) as platform:
        task = local_create(platform, events_streaming=True)
        with task.events() as events:
            next(events)
            platform.__exit__()
        with pytest.raises(xtask.ModuleException, match="refused"):
            task.reload()


# ---- Terminal ------------------------------------------------------------------------------------
# Commands for people and as JSON, exit codes, pipes, Ctrl-C, and what may reach a terminal.

TERMINAL_TEXT = (  # hostile, and wide
    "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\re\x08f\x00g\x7fh\u202ei 漢字 😀 \ud83d end"
)
TERMINAL_RESULT = "first line\n\tsecond line\n" + "word " * 50
TERMINAL_PROGRAM = """
import signal, sys, xtask
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it off
sys.exit(xtask.main(sys.argv[1:]))
"""
TERMINAL_EVENTS = """
think             {"payload": {"input": {"title": "TITLE", "thought": "Two steps"}}}
tool_call_request {"tool_name": "web-search", "payload": {"q": "TITLE"}}
tool_call_result  {"tool_name": "web-search", "result": {"TITLE": 3}, "is_error": false}
tool_call_result  {"tool_name": "mail", "result": "no such box", "is_error": true}
sub_agent_trigger {"agent_id": "helper-7", "query": "TITLE"}
auth_event {"type": "token_ready", "data": {"url": "https://a.b/TITLE", "access_token": "tok-1"}}
task_updated      {"internal_status": "TITLE"}
newer_kind        {"card": "TITLE", "access_token": "tok-1"}
""".strip().splitlines()
TERMINAL_SHOWN = {  # what each command shows of a task with all those events
    "run": "Plan it,Two steps,web-search,failed,no such box,helper-7,newer_kind,completed",
    "watch": "Plan it,web-search,failed,helper-7,newer_kind,completed  after",
    "log": "user       Sum up,Plan it,web-search,failed,helper-7,agent",
    "show": "completed,Plan it,a.csv",
    "stop": "completed,Plan it,a.csv",
    "list": "completed,Plan it",
}


def terminal_agent(title="Plan it", result=TERMINAL_RESULT):
    """An agent with every kind of event that has a row of its own, and texts for them."""

    def agent(task):
        for line in TERMINAL_EVENTS:
            kind, data = line.replace("TITLE", json.dumps(title)[1:-1]).split(None, 1)
            yield kind, json.loads(data)
        yield title, title
        yield "chunk", result[:15]
        yield "chunk", result[15:]
        return result

    return agent


def terminal_words(command, task_id):
    return [command, *{"run": ["a-1", "Sum up"], "list": ["a-1"]}.get(command, [task_id])]


def terminal_task(platform, **options):
    options = {"configuration": platform.config, "events_streaming": True, **options}
    return xtask.Task.create("a-1", "Sum up", ["https://example.com/a.csv?sig=hush"], **options)


@contextlib.contextmanager
def terminal_played(agent, **options):
    """A local platform, and a task that it has played to its end."""
    with local(agent) as platform:
        task = terminal_task(platform, **options)
        list(task.events())
        yield platform, task.reload()


@pytest.fixture
def terminal(monkeypatch, capsys):
    """A function that runs a command in this process: (exit code, stdout, stderr)."""

    def run(words, server=None, columns="100", **environ):
        if server:
            environ = {"XPANDER_API_KEY": KEY, "XPANDER_BASE_URL": server.url}
            environ.update(getattr(server, "environ", {}))
        for name, value in {"COLUMNS": columns, **environ}.items():
            monkeypatch.setenv(name, value)
        return whole.main(words), *capsys.readouterr()

    return run


def terminal_process(*words, environ=(), **options):
    """A command in a process of its own, with warnings as errors."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    paths = {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", TERMINAL_PROGRAM, *words]
    return subprocess.Popen(command, env={**os.environ, **dict(environ), **paths}, **options)


def is_error_line(err, part=""):
    """Whether it is one line for people, with this in it, and without control characters."""
    return re.fullmatch(r"xtask: [^\x00-\x1f\x7f-\x9f]+\n", err) and KEY not in err and part in err


@needs_whole_file
def test_each_command_shows_a_person_what_happened(terminal):
    with terminal_played(terminal_agent(), title="Plan it") as (platform, task):
        for command, shown in TERMINAL_SHOWN.items():
            code, out, err = terminal(terminal_words(command, task.id), platform)
            assert (code, err) == (0, "")
            assert [text for text in shown.split(",") if text not in out] == [], command
            assert not re.search(r"\x1b|\r|tok-1|hush|local-key", out)  # no colours, no secrets
            assert command == "list" or f"{TERMINAL_RESULT}\n" in out
            assert "failed" not in shown or "\nhttps://a.b/Plan it\n" in out


@needs_whole_file
def test_json_is_what_the_platform_sent(terminal):
    with terminal_played(terminal_agent()) as (platform, task):
        lines = {}
        for command in TERMINAL_SHOWN:
            words = [*terminal_words(command, task.id), "--json"]
            code, out, err = terminal(words, platform)
            assert (code, err, out.isascii()) == (0, "", True)
            lines[command] = list(map(json.loads, out.splitlines()))
        assert lines["watch"] == [event.raw for event in task.events()]
        assert lines["show"] == lines["stop"] == [platform.tasks[task.id]]
        assert lines["log"] == [task.get_activity_log().to_dict()]
        assert [item["id"] for item in lines["list"]] == list(platform.tasks)


TERMINAL_RUNS = """
--json run a-1 Größe --file u-1 --file=u-2         | stdin | Größe
run --file u-1 a-1 --json Größe --file u-2         | stdin | Größe
run --file u-1 --file u-2 a-1 - --json             | 1~~2~ | 1~~2
run --file u-1 --file u-2 --json a-1 -- --version  | stdin | --version
--file u-1 --file u-2 --json -- run a-1 -          | --    | --
"""


@needs_whole_file
@pytest.mark.parametrize("row", TERMINAL_RUNS.strip().splitlines())
def test_options_may_stand_anywhere_and_a_prompt_may_come_from_stdin(row, terminal, monkeypatch):
    words, stdin, prompt = re.split(r" +\| ", row.replace("~", "\n"))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: stdin))
    with local(terminal_agent()) as platform:
        code, out, _ = terminal(words.split(), platform)
        asked = {"input": {"text": prompt, "files": ["u-1", "u-2"]}, "events_streaming": True}
        assert (code, platform.requests[0][3]) == (0, asked)
        assert json.loads(out.splitlines()[0])["type"] == "connected"


TERMINAL_ENDS = r"""
{"status": "completed"}                        | {"status": "completed", "result": "all"} | 0 | all
{"status": "completed", "result": "all"}       | {"status": "executing"}                  | 0 | all
{"status": "failed", "result": "all"}          | {"status": "executing", "result": "old"} | 1 | all
{"status": "executing"}                        | {"status": "completed", "result": "all"} | 0 | all
null                                           | {"status": "stopped", "result": "all"}   | 1 | all
{"status": "completed", "result": "of this\n"} | {"status": "completed", "result": "all"} | 0 |
{"status": "completed"}                        | {"status": "completed", "result": null}  | 0 |
"""


@needs_whole_file
@pytest.mark.parametrize("row", TERMINAL_ENDS.strip().splitlines())
def test_watch_believes_the_end_that_the_last_event_tells(row, terminal):
    """The rows: its data, the task as it is loaded then, the exit code, what follows the chunks."""
    data, loaded, code, more = row.split("|")
    stream = [sse("chunk", "of another", task_id="t-2"), sse("task_finished", task_id="t-2")]
    stream += [sse("chunk", text) for text in ("of ", None, "this")]
    with feed(plays(*stream, sse("task_finished", json.loads(data)))) as server:
        server.task = task_dict(**json.loads(loaded))
        got, out, err = terminal(["watch", "t-1"], server)
    assert got == int(code) and (is_error_line(err, "the task ended as") if got else err == "")
    answer = re.sub(r"(?m)^[\d:-]+  .*\n", "", out)
    assert answer == "of this\n" + f"\n{more.strip()}\n" * bool(more.strip())


@needs_whole_file
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_watch_of_a_task_without_a_stream_waits_for_its_end(options, terminal, pauses):
    def script(connection, _):
        for status in ("executing", "paused", "completed"):
            assert connection.request()
            connection.answer(200, task_dict(status=status, events_streaming=False))

    with RawServer(script) as server:
        code, out, err = terminal(["watch", "t-1", *options], server)
    assert (code, err) == (0, "") and "completed" in out.splitlines()[-1]


TERMINAL_MISUSES = """
                   | no command
dance              | dance; see xtask --help
show               | --help
run agent          | --help
run agent ''       | prompt
run agent -        | prompt
list               | --help
show a b           | --help
show a --file u    | --help
run a b --file     | --file
show a --json=1    | --json
show a --colour    | --colour
run a '-x\x1b\udcff' | -x\ufffd?
show '' --json     | task_id
"""


@needs_whole_file
@pytest.mark.parametrize("row", TERMINAL_MISUSES[1:].splitlines())
def test_wrong_usage_is_exit_code_2_and_one_line(row, terminal, monkeypatch):
    words, part = row.split("|")
    monkeypatch.setattr(sys, "stdin", None)  # as where it is closed
    with local() as platform:
        code, out, err = terminal(shlex.split(words), platform)
        assert (code, out, platform.requests) == (2, "", [])
    assert is_error_line(err, part.strip())


TERMINAL_FAILURES = r"""
422 | {"detail": [{"loc": ["a"], "msg": "too short"}]}  | a: too short
404 | {"detail": "a\u001b]0;owned\u0007b\u009b\n\ud83d"} | ]0;owned
401 | {"detail": "bad key secret-key-0123456789"}       | bad key
200 | null                                              | [500]
200 | <html>Sign in</html>                              | [500]
"""


@needs_whole_file
@pytest.mark.parametrize("row", TERMINAL_FAILURES.strip().splitlines())
def test_a_call_that_fails_is_exit_code_1_and_one_line(row, terminal):
    status, body, part = re.split(" +[|] ", row)
    with feed() as server:
        server.status, server.task = int(status), body.encode()
        code, out, err = terminal(["show", "t-1"], server)
    assert (code, out) == (1, "") and is_error_line(err, part)


@needs_whole_file
def test_a_stream_that_fails_is_exit_code_1_and_one_line(terminal):
    with feed(answers(404, {"detail": "no stream"})) as server:
        code, out, err = terminal(["watch", "t-1"], server)
    assert code == 1 and is_error_line(err, "no stream")


@needs_whole_file
def test_a_missing_or_wrong_setting_is_exit_code_2_and_one_line(terminal):
    for name, value in (("API_KEY", ""), ("API_KEY", "k\xe9y-hush"), ("BASE_URL", "http://[")):
        environ = {"XPANDER_API_KEY": KEY, f"XPANDER_{name}": value}
        code, out, err = terminal(["show", "t-1"], **environ)
        assert (code, out) == (2, "") and is_error_line(err) and name in err.upper()
        assert "hush" not in err


def terminal_held(gate, *events):
    def agent(task):
        yield from events
        gate.wait(20)
        yield "chunk", "after the gate"

    return agent


@needs_whole_file
def test_a_reader_that_leaves_ends_a_live_watch_quietly():
    gate = threading.Event()
    with local(terminal_held(gate)) as platform:
        words = ["watch", terminal_task(platform).id, "--json"]
        with terminal_process(*words, environ=platform.environ) as process:
            assert process.stdout.readline()  # as `head -1` does
            process.stdout.close()
            gate.set()
            assert process.wait(20) == 0 and process.stderr.read() == b""


@needs_whole_file
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="files as Linux has them")
@pytest.mark.parametrize("words", ["--help", "list a-1 --json", "watch TASK"])
def test_output_that_is_closed_or_full_shows_no_traceback(words):
    def run(code, script, words=words):
        words = words.replace("TASK", task.id).split()
        command = ["sh", "-c", script, "sh", sys.executable, "-m", "xtask", *words]
        environ = {**os.environ, **platform.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
        assert done.returncode == code and done.stdout == ""
        return done.stderr

    with terminal_played(terminal_agent()) as (platform, task):
        assert run(0, '{ "$@"; echo $? >&2; } | :').strip() == "0"
        assert "Traceback" not in run(0, 'exec "$@" >&-')
        if words != "--help":  # argparse itself ignores an output that fails
            assert is_error_line(run(1, 'exec "$@" >/dev/full'))
        assert run(1, 'exec "$@" 2>&-', "show missing") == ""


TERMINAL_SHAPES = json.loads("""[
    null, 1, true, "x", [], {}, [1, {}], {"payload": 3}, {"payload": {"input": [1]}},
    {"data": {"url": 7}}, {"type": 5, "data": "x"}, {"tool_name": {"a": 1}, "result": [null]},
    {"is_error": "no"}, {"content": null, "role": "agent"}, {"title": 7, "status": []},
    {"action": "stop_execution"}
]""")
TERMINAL_TASKS = """
{"result": {"a": 1}}
{"created_at": 7, "started_at": "soon", "finished_at": [], "title": [1], "id": null}
{"created_at": "9999-12-31T23:59:59Z", "finished_at": "2025-11-06T06:41:54Z"}
{"input": null, "agent_id": null, "messages": 5}
{"status": 7, "finished_at": "2025-11-06T06:41:54Z"}
"""


@needs_whole_file
def test_events_of_any_shape_are_shown(terminal):
    def agent(task):
        for kind in ["", "newer", *whole.TaskUpdateEventType]:
            if kind != "task_finished":
                yield from ((kind, shape) for shape in TERMINAL_SHAPES)
        return {"a": [1]}

    with terminal_played(agent) as (platform, task):
        for words in (["watch", task.id], ["watch", task.id, "--json"], ["log", task.id]):
            code, out, err = terminal(words, platform)
            assert (code, err) == (0, "") and len(out.splitlines()) > len(TERMINAL_SHAPES)


@needs_whole_file
@pytest.mark.parametrize("odd", TERMINAL_TASKS.strip().splitlines())
def test_tasks_and_logs_of_any_shape_are_shown(odd, terminal):
    task = task_dict(status="completed", events_streaming=False, messages=TERMINAL_SHAPES)
    task.update(json.loads(odd))
    with feed() as server:
        for command in TERMINAL_SHOWN:
            server.task = [task] if command == "list" else task
            code, out, err = terminal(terminal_words(command, "t-1"), server)
            assert (code, err) == (0, "") or is_error_line(err)
            assert command != "log" or code or "stop_execution" in out


@needs_whole_file
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_text_can_be_shown_and_none_steers_the_terminal(
    encoding, terminal, tmp_path, monkeypatch
):
    agent = terminal_agent(TERMINAL_TEXT, TERMINAL_TEXT)
    with terminal_played(agent, title=TERMINAL_TEXT) as (platform, task):
        for command in TERMINAL_SHOWN:
            with open(tmp_path / "out", "w", encoding=encoding) as stdout:
                monkeypatch.setattr(sys, "stdout", stdout)
                code, _, err = terminal(terminal_words(command, task.id), platform, "300")
            out = (tmp_path / "out").read_text(encoding)
            assert (code, err) == (0, "") and " end\n" in out and re.search(r"a.\]0;owned.b", out)
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


def terminal_cells(row):
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in row)


@needs_whole_file
def test_rows_are_cut_to_the_width_and_an_answer_and_a_login_never(terminal):
    long = "long " * 12 + "漢字" * 40
    uncut = {f"https://a.b/{long}", *TERMINAL_RESULT.splitlines()}
    with terminal_played(terminal_agent(long), title=long) as (platform, task):
        for command in TERMINAL_SHOWN:
            out = terminal(terminal_words(command, task.id), platform, "60")[1]
            rows = set(out.splitlines()) - uncut
            assert 56 < max(map(terminal_cells, rows)) < 60
            assert command == "list" or f"{TERMINAL_RESULT}\n" in out


@contextlib.contextmanager
def pseudo_terminal(*words, environ):
    """The program on a terminal, and `read(until)`: the rows that all it wrote has left."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # what the program wrote, with no carriage return put in
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    shown = b""

    def read(until):
        nonlocal shown
        while not re.search(until, shown):
            assert select.select([ours], [], [], 15)[0], shown
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        return list(map(row, shown.decode().split("\n")))

    def row(text):
        left = ""
        for part in text.split("\r"):
            left = part + left[len(part) :]
        assert terminal_cells(left) < 60
        return left.strip()

    options = {"environ": {**environ, "COLUMNS": "60"}, "stdout": theirs}
    with terminal_process(*words, **options) as process:
        os.close(theirs)
        yield process, read
        process.kill()
    os.close(ours)


@needs_whole_file
@pytest.mark.parametrize("end", ["completed", "ctrl-c"])
def test_the_status_row_is_rewritten_in_place_and_gone_at_the_end(end):
    gate = threading.Event()
    chunks = [("chunk", "one line\nand "), ("chunk", "another")]
    call = ("tool_call_request", {"tool_name": TERMINAL_TEXT * 3})
    with local(terminal_held(gate, *chunks, ("newer", TERMINAL_TEXT), call)) as platform:
        task = terminal_task(platform)
        with pseudo_terminal("watch", task.id, environ=platform.environ) as (process, read):
            *before, status = read(rb"0:0[1-9]  calling a tool")  # it counts on
            assert re.fullmatch(r"0:0\d  calling a tool", status)
            if end == "ctrl-c":
                process.send_signal(signal.SIGINT)
            else:
                gate.set()
            code, rows = process.wait(20), read(b"all of it")
            assert code == (130 if end == "ctrl-c" else 0) and process.stderr.read() == b""
            gate.set()
    assert rows[: len(before)] == before  # what stood there stands there still
    assert before[-4:-2] == ["one line", "and another"] and "owned" in before[-2]
    assert rows[-1] == "" and rows[len(before) : -2] == ["after the gate"] * (end == "completed")


@needs_whole_file
def test_help_names_every_command_and_fits_a_screen(terminal):
    for words in (["--help"], ["-h"], ["watch", "--help"]):
        code, out, err = terminal(words, columns="80")
        assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
        names = re.findall(r"(?m)^ +xtask (.*?)   ", out)
        assert [name.split()[0] for name in names] == ["demo", *TERMINAL_SHOWN]
        assert re.search("(?s)--file URL.*--json.*secrets.*--version.*XPANDER_API_KEY.*130", out)


@needs_whole_file
def test_version_tells_the_sha_256_of_the_file_also_out_of_a_zip(tmp_path, terminal):
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    expected = f"xtask {whole.__version__}\nsha256 {digest}\n"
    assert terminal(["--version"]) == (0, expected, "")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as bundle:
        bundle.write(FILE, "xtask.py")
    code = "import xtask; xtask.main(['--version'])"
    done = run_python(code, env={"PYTHONPATH": str(tmp_path / "bundle.zip")}, cwd=tmp_path)
    assert done.stdout == expected


@needs_whole_file
def test_demo_needs_no_account_and_leaves_no_thread(terminal):
    threads = set(threading.enumerate())
    code, out, err = terminal(["demo"], HTTP_PROXY="http://127.0.0.1:9")
    assert (code, err) == (0, "") and "completed  after" in out and "Activity log" in out
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()


# ---- README --------------------------------------------------------------------------------------
# Its blocks run against the local platform, it names what there is and leaves nothing public out;
# scripts as the official SDK's users write them, moved by its table, run too.

README = HERE / "README.md"
README_TEXT = README.read_text("utf-8") if README.exists() else ""
needs_readme = pytest.mark.skipif(not README_TEXT or bool(UNDER_TEST), reason="about the README")
NEWER_PYTHON = {"asyncio.timeout": (3, 11), "aclosing": (3, 10)}
NOT_HERE = (
    r"^xtask |pip|pytest|\.ci/|ruff|mypy|\bgit\b|curl|size\.py"  # the network, and other programs
)
COMMANDS = "demo run watch show log stop list"


def played(task):
    """An agent that does a little of everything, at once."""
    ids = {"request_id": "r-1", "operation_id": "search", "tool_name": "search"}
    yield "think", {**ids, "payload": {"input": {"title": "Plan", "thought": "One search."}}}
    yield "tool_call_request", {**ids, "payload": {"q": "Q3"}}
    yield "tool_call_result", {**ids, "payload": {"q": "Q3"}, "result": 3, "is_error": False}
    yield "chunk", "It is 4."
    return "It is 4."


def readme_blocks(kind):
    """(the heading above it, its text) of each block of that kind."""
    for block in re.finditer(rf"^( *)```{kind}\n(.*?)^\1```$", README_TEXT, re.S | re.M):
        heading = re.findall(r"^#+ (.*)", README_TEXT[: block.start()], re.M)[-1]
        yield heading, re.sub(rf"^{block[1]}", "", block[2], flags=re.M)


def run_on_a_platform(command, folder, text=None):
    """(exit code, stdout, stderr) of a program that finds a platform of its own in the environment.

    In the text of a shell script TASK_ID stands for a task that is over, AGENT_ID for its agent.
    """
    with local(played) as platform:
        if text:
            task = xtask.Task.create("my-agent", "Hi", configuration=platform.config)
            text = text.replace("TASK_ID", task.wait_finished(10).id).replace(
                "AGENT_ID", "my-agent"
            )
            command = [*command, text]
        paths = {"PYTHONPATH": str(HERE), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        environment = {**os.environ, **platform.environ, **paths, "PYTHONIOENCODING": "utf-8"}
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8"}
        done = subprocess.run(command, env=environment, cwd=folder, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


@needs_readme
def test_each_python_block_of_the_readme_runs(tmp_path):
    """Files are asked for from this machine instead, so that they are refused with a warning."""
    refused = re.compile(r"trusted_file_hosts|^DEBUG:xtask:|^Executing <.*> took [\d.]+ seconds$")

    def run(block):
        script = tmp_path / f"script{blocks.index(block)}.py"
        script.write_text(
            block[1].replace("https://files.example.com", "http://127.0.0.1:9"), "utf-8"
        )
        flags = ["-S", "-X", "dev", "-W", "error"]
        return run_on_a_platform([sys.executable, *flags, str(script)], tmp_path)

    blocks = [
        block
        for block in readme_blocks("python")
        if all(
            sys.version_info >= since or name not in block[1]
            for name, since in NEWER_PYTHON.items()
        )
    ]
    assert len(blocks) > 9
    for (heading, _), (code, out, err) in zip(blocks, at_once(run, *blocks)):
        errors = [line for line in err.splitlines() if not refused.search(line)]
        assert (code, errors) == (0, []) and out.strip(), heading


@needs_readme
@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_each_shell_block_of_the_readme_runs(tmp_path):
    """In a folder with a copy of the file, without lines that need a network or other programs."""

    def run(block):
        folder = tmp_path / str(blocks.index(block))
        folder.mkdir()
        shutil.copy(FILE, folder)
        python = folder / "python3"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        lines = [line for line in block[1].splitlines() if not re.search(NOT_HERE, line)]
        ran = run_on_a_platform(["sh", "-euc"], folder, "\n".join(["true", *lines]))
        if "sed " in block[1]:
            made = [path.read_text("utf-8") for path in folder.rglob("*.py")]
            assert halves()[0] in made, "the command cuts the file at its line"
        return ran

    blocks = list(readme_blocks("sh"))
    for (heading, text), (code, out, err) in zip(blocks, at_once(run, *blocks)):
        assert code == 0 and "Traceback" not in err, (heading, err)
        assert out.strip() or "xtask.py" not in text or "sed " in text, heading
    shown = re.findall(r"^python3 xtask\.py (\S+)", "\n".join(text for _, text in blocks), re.M)
    assert {*shown} >= {*re.findall(r"\w+", COMMANDS), "--version"}


@needs_readme
def test_the_readme_names_the_calls_that_there_are_and_all_of_them():
    fields = set(xtask.Task.__dataclass_fields__)
    public = {name for name in dir(xtask.Task) if name[0] != "_"} - fields
    named = set(re.findall(r"\b[Tt]ask\.([a-z]\w*)", README_TEXT))
    assert named - public - fields - {"model_dump", "served_model"} == set()
    calls = [name for name in public if name[0] != "a" or name[1:] not in public]
    assert [name for name in calls if not re.search(rf"[.`]{name}\b", README_TEXT)] == []


@needs_readme
def test_the_readme_tells_all_settings_with_their_defaults():
    section = README_TEXT.split("\n## Configuration\n")[1].split("\n## ")[0]
    parameters = inspect.signature(xtask.Configuration).parameters
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", section, re.M)
    assert sorted(name for name, _ in rows) == sorted(parameters)
    for name, told in rows:
        if isinstance(parameters[name].default, (int, float)):
            assert str(parameters[name].default) in told, name
    variables = r"XPANDER_[A-Z_]+|IS_STG"
    source = set(re.findall(variables, LIBRARY.read_text("utf-8")))
    assert set(re.findall(variables, section)) == source == set(re.findall(variables, README_TEXT))


@needs_readme
def test_the_readme_and_the_help_name_the_same_exit_codes(capsys):
    assert xtask.main(["--help"]) == 0
    for text in (README_TEXT, capsys.readouterr().out):
        codes = text.replace("\n", " ").lower().split("exit code")[1][:600]
        assert re.findall(r"\b(?:0|1|2|130)\b", codes)[:4] == ["0", "1", "2", "130"]


@needs_readme
# -- scripts of the official SDK's users, moved by the README's table


@contextlib.contextmanager
def environment_of(agent, monkeypatch):
    """A local platform that scripts find in the environment."""
    with local(agent) as platform:
        for name, value in platform.environ.items():
            monkeypatch.setenv(name, value)
        yield platform
        make_task(None).configuration.close()


def test_a_script_that_monitors_a_batch(monkeypatch):
    def agent(task):
        yield "chunk", "working"
        if "3" in task["input"]["text"]:
            raise ValueError("no data for 3")
        return task["input"]["text"].upper()

    async def monitor():
        user = {"id": "u-1", "email": "ada@example.com"}
        created = [xtask.Task.acreate("reports", f"Report {n}", user=user) for n in range(5)]
        waits = [task.await_finished(timeout=30) for task in await asyncio.gather(*created)]
        results = {}
        for done in asyncio.as_completed(waits):
            task = await done
            results[task.input.text] = str(task.status), task.result
        listed = await xtask.Task.alist("reports", status="completed", user_id="u-1")
        return results, [await item.aload() for item in listed]

    with environment_of(agent, monkeypatch):
        results, completed = asyncio.run(monitor())
    assert results.pop("Report 3") == ("failed", "no data for 3")
    assert results == {t.input.text: ("completed", t.input.text.upper()) for t in completed}
    assert len(results) == 4 and completed[0].input.user.email == "ada@example.com"


def test_a_script_whose_handler_sets_tokens_and_the_result(monkeypatch):
    handled = threading.Event()

    def agent(task):
        yield "chunk", "a handler elsewhere does the work"
        handled.wait(10)

    def on_task(task):
        task.tokens = {"prompt_tokens": 812, "completion_tokens": 64, "total_tokens": 876}
        task.used_tools, task.duration = ["search"], 12.5
        task.extra["served_model"] = "m-1"
        task.result = task.input.text.upper()
        task.status = xtask.AgentExecutionStatus.Completed
        task.save()

    with environment_of(agent, monkeypatch) as platform:
        task = xtask.Task.create("worker", "Sum up", payload_extension={"request_id": "R-1"})
        on_task(xtask.Task.load(task.id))
        [sent] = [body for method, _, _, body in platform.requests if method == "PATCH"]
        again = xtask.Task.load(task.id)
        handled.set()
    assert {name: getattr(again, name) for name in sent} == sent
    assert sorted(sent) == ["duration", "result", "served_model", "status", "tokens", "used_tools"]
    assert again.is_finished and again.payload_extension == {"request_id": "R-1"}


def test_a_script_that_analyses_a_log_with_gateway_entries(monkeypatch):
    actions = ["create_execution", "ask_execution", "get_executions_result"]

    def agent(task):
        for n, verb in enumerate(["create_execution", "ask_execution", "get_executions_result"]):
            entry = {
                "action": verb,
                "agent_id": f"ag-{n}",
                "reasoning": "two offers",
                "title": "Go",
            }
            yield "sub_agent_trigger", {**entry, "query": "Read offer A"}
        yield "sub_agent_trigger", {"agent_id": "ag-3", "query": None, "reasoning": {"title": "B"}}
        return (yield from played(task))

    with environment_of(agent, monkeypatch):
        task = xtask.Task.create("analyst", "Compare the offers").wait_finished(timeout=30)
        entries = task.get_activity_log().messages
    kinds = [type(entry).__name__.replace("AgentActivityThread", "") for entry in entries]
    steps = ["SubAgentTrigger", "Reasoning", "ToolCall", "Message"]
    assert kinds == ["Message", *["OtherEntry"] * 3, *steps]
    others = [e for e in entries if isinstance(e, xtask.AgentActivityThreadOtherEntry)]
    assert [entry.action for entry in others] == actions and others[0].reasoning == "two offers"
    assert (entries[4].query, entries[4].reasoning.title) == (None, "B")
    assert entries[-1].content.text == "It is 4."


def test_a_script_that_follows_a_stream_with_a_login(monkeypatch):
    signed_in = threading.Event()

    def agent(task):
        login = {"url": "https://login.example.com/x", "server_name": "weather"}
        yield "auth_event", {"type": "login_required", "data": login}
        assert signed_in.wait(10), "the event arrives while the task waits for the login"
        yield "auth_event", {"type": "token_ready", "data": {"access_token": "s3cret"}}
        yield "chunk", "It is "
        yield "chunk", "sunny."
        return "It is sunny."

    async def main():
        opened, answer = [], ""
        task = await xtask.Task.acreate("weather", "Rome?", events_streaming=True)
        async for event in task.aevents():
            assert "s3cret" not in repr(event)
            if event.type == xtask.TaskUpdateEventType.Chunk:
                answer += event.data
            elif event.type == "auth_event" and event.data["type"] == "login_required":
                opened.append(event.data["data"]["url"])
                signed_in.set()
        return opened, answer, event.data.result

    with environment_of(agent, monkeypatch):
        opened, answer, result = asyncio.run(main())
    assert opened == ["https://login.example.com/x"] and answer == result == "It is sunny."


# ---- The library cut at its line -----------------------------------------------------------------
# The chapters up to the events once more, with a copy that ends at the line.


@needs_whole_file
def test_the_library_cut_at_its_line_passes_its_tests(tmp_path):
    (tmp_path / "xtask.py").write_text(halves()[0], "utf-8")
    names = [name for name in globals() if name.startswith("test_")]  # in the order of this file
    names = names[: names.index(test_a_task_without_a_stream_is_refused_at_the_call.__name__)]
    names = [name for name in names if not re.search("16_mib|one_by_one", name)]  # they take long
    options = ["-qx", "-p", "no:cacheprovider", "--assert=plain", "--disable-warnings"]
    tests = [f"{Path(__file__).name}::{name}" for name in names]
    environment = {**os.environ, "XTASK_UNDER_TEST": str(tmp_path / "xtask.py")}
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 150
