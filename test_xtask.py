"""Tests of xtask.py: real HTTP on 127.0.0.1, nothing of the module replaced but its clock.

Run them with the command at the top of README.md. XTASK_UNDER_TEST names another copy of the
library to test (the one cut at its line, say); the local platform always comes from the whole file.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import inspect
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
import weakref
import zipfile
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

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
    sys.implementation.name != "cpython", reason="memory, and what is closed when it is not used any more")

KEY = "secret-key-0123456789"
ORG = "org-1"
MIB = 2**20


@pytest.fixture(scope="session", autouse=True)
def clean_process():
    """No setting of the library's, and nothing that each collection of garbage would look at in vain."""
    if hasattr(gc, "freeze"):  # CPython's
        gc.freeze()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in list(os.environ):
            if name.upper().startswith("XPANDER_") or name.upper().endswith("_PROXY") or name == "IS_STG":
                monkeypatch.delenv(name)
        yield


@pytest.fixture
def platform():
    """The local platform with its built-in agent; other agents: `with local(agent) as platform`."""
    with local() as running:
        yield running


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and localhost: its `file`, and a server's `context`."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    file, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                    "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", file,
                    "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return types.SimpleNamespace(file=file, context=context)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that the library takes, noted and not waited for."""
    noted = []
    monkeypatch.setattr(xtask, "_wait", lambda seconds, scope=None: noted.append(seconds))
    return noted


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
    options.setdefault("api_key", KEY)
    options.setdefault("organization_id", ORG)
    return xtask.Configuration(base_url=url, **options)


@contextlib.contextmanager
def refusing(**options):
    """A configuration whose connections are refused: its port is bound, so that nobody else gets it."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        with configuration("http://127.0.0.1:%d" % deaf.getsockname()[1], **options) as config:
            yield config


class RawServer:
    """Raw sockets on 127.0.0.1: each connection is handled by `script(connection, number)`.

    A script is a plain function over a `RawConnection`; `requests` is what arrived, in order:
    (method, path, headers with lower-case names, body bytes). `connections` counts what was accepted.
    """

    def __init__(self, script, context=None):
        self.script, self.context = script, context
        self.requests, self.connections, self.open = [], 0, set()
        self.closed = queue.Queue()  # the number of each connection that the client closed
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
            thread = threading.Thread(target=self.serve, args=(sock, self.connections), daemon=True)
            self.threads.append(thread)
            thread.start()

    def serve(self, sock, number):
        raw = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each part goes out at once
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
            data = self.sock.recv(65536)
            if not data:
                self.server.closed.put(self.number)
                return None
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        while len(self.buffer) < length:
            self.buffer += self.sock.recv(65536)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.server.requests.append((method, path, headers, body))
        return method, path, headers, body

    def answer(self, status=200, body=b"", headers=(), reason="X"):
        """A whole answer with its Content-Length; a dict or a list is sent as JSON."""
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), [("Content-Type", "application/json"), *headers]
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
        envelope = {"type": type, "task_id": task_id, "organization_id": ORG, "time": "2026-03-02T09:15:01Z"}
        envelope["data"] = data
        self.send(f"{head}data: {json.dumps(envelope)}\n\n")

    def wait_closed(self):
        """Block until the client closes the connection, and note it."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.server.closed.put(self.number)

    def reset(self):
        """End the connection with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


def task_dict(**changes):
    """A task as a server tells it, with the fields that every task has and those given."""
    return {"id": "t-1", "agent_id": "a-1", "organization_id": ORG, "input": {"text": "Hi", "files": []},
            "created_at": "2025-11-06T06:41:54.048626Z", "status": "executing",
            "events_streaming": True, **changes}


def make_task(config, **changes):
    return xtask.Task.from_dict(task_dict(**changes), config)


def everything_told(error):
    """What a person can get to see of an exception."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join([*lines, repr(error), str(error)])


def run_python(code, *arguments, python=sys.executable, **options):
    """A Python process of its own, with the folder of the file under test on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(UNDER_TEST or FILE).parent)
    environment.update(options.pop("env", {}))
    return subprocess.run([python, *options.pop("flags", ()), "-c", code, *arguments], env=environment,
                          capture_output=True, text=True, timeout=30, **options)


def at_once(call, *cases):
    """What the call gives for each case, all at the same time: for those that start a process each."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(call, cases))


class Worker:
    """A Python process that does one job after another: a line of JSON has the arguments of `code`'s `job`.

    A form feed, which no job may write, stands behind what each writes. Warnings are errors.
    """

    LOOP = """
for line in sys.stdin:
    job(*json.loads(line))
    for stream in (sys.stdout, sys.stderr):
        print(end="\\f", file=stream, flush=True)
"""

    def __init__(self, code, **env):
        env = {"PYTHONPATH": str(LIBRARY.parent), **env}
        self.process = start(code=code + self.LOOP, env=env, stdin=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            assert finish(self.process) == (0, "", ""), "also at its end"

    def do(self, *arguments):
        """(stdout, stderr) of one job."""
        too_late = threading.Timer(60, self.process.kill)
        too_late.start()
        try:
            self.process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self.process.stdin.flush()
            return [self.told(pipe) for pipe in (self.process.stdout, self.process.stderr)]
        finally:
            too_late.cancel()

    def told(self, pipe):
        data = b""
        while not data.endswith(b"\f"):
            more = pipe.read1(65536)
            assert more, f"ended: {self.process.stderr.read().decode()}"
            data += more
        return data[:-1]


# ---------------------------------------------------------------------------
# Form
# ---------------------------------------------------------------------------

LIBRARY = Path(UNDER_TEST or FILE)
both_faces = pytest.mark.parametrize("face", ["sync", "async"])

PUBLIC = """
AgentActivityThread AgentActivityThreadAuth AgentActivityThreadMessage AgentActivityThreadMessageContent
AgentActivityThreadOtherEntry AgentActivityThreadReasoning AgentActivityThreadReasoningType
AgentActivityThreadSubAgentTrigger AgentActivityThreadToolCall AgentExecutionInput AgentExecutionStatus
Configuration ModuleException OutputFormat ServerSentEvent Task TaskUpdateEvent TaskUpdateEventType
TasksListItem ToolCallRequest ToolCallRequestReasoning ToolCallResult User iter_sse""".split()

# Run with the folder of the copy, the name to import and the URL of a local platform: a task's whole life.
LIFE = """
import sys
folder, name, url = sys.argv[1:]
sys.path.insert(0, folder)
module = __import__(name, fromlist=["Task"])
with module.Configuration("local-key", "local-org", url) as configuration:
    task = module.Task.create("agent", "2+2?", configuration=configuration, events_streaming=True)
    print([str(event.type) for event in task.events()][-1])
    task.title = "Sums"
    print(task.save().title, task.reload().result, len(task.get_activity_log().messages))
    try:
        module.Task.load("none", configuration)
    except module.ModuleException as error:
        print(error)
"""
LIVED = ["task_finished", "Sums 4 2", "[404] Task not found"]


def quick(task):
    """An agent that answers at once."""
    yield "chunk", "4"
    return "4"


async def collect(events):
    return [event async for event in events]


def call(face, owner, name, *arguments, **options):
    """A method's answer, or that of its async twin in an event loop of its own; a list for `events`."""
    got = getattr(owner, name if face == "sync" else "a" + name)(*arguments, **options)
    if face == "sync":
        return list(got) if name == "events" else got
    return asyncio.run(collect(got) if name == "events" else got)


def replies(*answers):
    """A script that gives each request the next answer, and the last one to all that follow.

    An answer: the arguments of `RawConnection.answer`, or a function that is called with the connection.
    """
    left = list(answers)

    def script(connection, number):
        while connection.request():
            answer = left.pop(0) if len(left) > 1 else left[0]
            answer(connection) if callable(answer) else connection.answer(*answer)

    return script


def answering(*answers):
    """A server that gives these answers in turn, over any connections."""
    return RawServer(replies(*answers))


def both_faces_at_once(test):
    """As `both_faces`, side by side in one test: for those that wait."""
    def run(**given):
        at_once(lambda face: test(face=face, **given), "sync", "async")

    taken = inspect.signature(test)
    others = [parameter for name, parameter in taken.parameters.items() if name != "face"]
    run.__signature__ = taken.replace(parameters=others)
    return run


def numbered(names):
    """Ids of a table whose rows have no name of their own."""
    return [f"{number}-{name}" for number, name in enumerate(names)]


def alone(folder):
    """A copy of the library, with nothing beside it."""
    folder.mkdir(parents=True)
    (folder / "xtask.py").write_bytes(LIBRARY.read_bytes())
    return folder


@pytest.mark.parametrize("flags", [("-I", "-S", "-W", "error"), ("-O",), ("-OO",)], ids=" ".join)
def test_the_file_alone_lives_through_a_task_under(flags, tmp_path):
    folder = alone(tmp_path / "alone")
    with local(quick) as platform:
        done = run_python(LIFE, str(folder), "xtask", platform.url, flags=("-B", *flags), cwd=folder)
    assert (done.stderr, done.stdout.splitlines(), done.returncode) == ("", LIVED, 0)
    assert os.listdir(folder) == ["xtask.py"], "no file is written"


def test_the_file_lives_in_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "copies.zip", "w") as archive:
        archive.write(LIBRARY, "xtask.py")
    with local(quick) as platform:
        done = run_python(LIFE, str(tmp_path / "copies.zip"), "xtask", platform.url, flags=("-W", "error"))
    assert (done.stderr, done.stdout.splitlines(), done.returncode) == ("", LIVED, 0)


def test_copies_work_side_by_side_in_one_process(tmp_path):
    folder = alone(tmp_path / "copies")
    package = alone(folder / "app" / "_vendor")
    for place in (package, package.parent):
        (place / "__init__.py").write_text("")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.write(LIBRARY, "zipped/xtask.py")
    code = """
import pickle, sys
sys.path[:0] = sys.argv[1:3]
import xtask
from app._vendor import xtask as vendored
from zipped import xtask as zipped
copies = [xtask, vendored, zipped]
tasks = []
for module in copies:
    configuration = module.Configuration("local-key", "local-org", sys.argv[3])
    tasks.append(module.Task.create("agent", "2+2?", configuration=configuration, events_streaming=True))
for module, task in zip(copies, tasks):
    assert type(pickle.loads(pickle.dumps(task))) is module.Task
    for event in task.events():
        assert type(event) is module.TaskUpdateEvent
    assert event.data.result == "4"
    try:
        module.Task.load("none", task.configuration)
    except module.ModuleException:
        pass
    task.configuration.close()
assert len({module.Task for module in copies}) == len({task.id for task in tasks}) == 3
print(*(module.__name__ for module in copies))
"""
    with local(quick) as platform:
        done = run_python(code, str(folder), str(tmp_path / "more.zip"), platform.url, flags=("-W", "error"))
    assert (done.stderr, done.stdout) == ("", "xtask app._vendor.xtask zipped.xtask\n")


def test_the_import_loads_nothing_that_a_single_call_can_do_without(tmp_path):
    unwanted = ("asyncio", "argparse", "http.server", "concurrent.futures", "logging", "zipfile", "unittest")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
import xtask
print(*(set(sys.modules) - before))
"""
    done = run_python(code, str(LIBRARY.parent), flags=("-I", "-S"))
    assert "json" in done.stdout.split(), done.stderr
    assert not set(unwanted) & set(done.stdout.split())


def test_the_interpreter_is_left_as_it_was():
    code = """
import os, signal, socket, sys, threading, urllib.request, warnings
def state():
    return (socket.getdefaulttimeout(), urllib.request._opener, list(warnings.filters), sys.excepthook,
            threading.excepthook, sys.getrecursionlimit(), sys.getswitchinterval(), dict(os.environ),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE), os.getcwd(),
            [thread.name for thread in threading.enumerate()])
before = state()
""" + LIFE + """
sys.path.remove(folder)
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
logging = sys.modules.get("logging")
assert not logging or not logging.getLogger().handlers
"""
    with local(quick) as platform:
        done = run_python(code, str(LIBRARY.parent), "xtask", platform.url)
    assert (done.stderr, done.stdout.splitlines()) == ("", LIVED)


def test_the_head_says_what_it_is_its_version_its_licence_and_how_to_update():
    head = FILE.read_text("utf-8")[:3000]
    assert "SPDX-License-Identifier: MIT-0" in head and "to update" in head.lower()
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', head, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", xtask.__version__)


LIMITS = {  # as they are promised, in bytes and seconds
    "_MAX_EVENT": 16 * MIB, "_MAX_ANSWER": 64 * MIB, "_MAX_FILE": 10 * MIB, "_MAX_FILES": 32 * MIB,
    "_FILE_THREADS": 8, "_MAX_REDIRECTS": 5, "_CONNECT_TIMEOUT": 10, "_MAX_RETRY_AFTER": 60,
    "_KEEP_SECONDS": 20, "_REPLAY_WINDOW": 10_000, "_FINAL_SILENCE": 5,
}




def test_the_public_names_are_those_of_the_contract_and_all_others_are_private():
    below = [] if UNDER_TEST else ["LocalPlatform", "main"]
    assert sorted(xtask.__all__) == sorted(PUBLIC + below)
    assert all(hasattr(xtask, name) for name in xtask.__all__)
    others = bound_names(ast.parse(LIBRARY.read_text("utf-8"))) - set(xtask.__all__)
    assert [name for name in others if not name.startswith("_")] == []


def bound_names(tree):
    """The names that a module's own statements define, imports aside."""
    targets = [target for node in tree.body for target in getattr(node, "targets", [])]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {node.name for node in tree.body if hasattr(node, "name")} | {
        node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def cut():
    """The text above the line and the text below it."""
    lines = FILE.read_text("utf-8").splitlines(True)
    [at] = [number for number, line in enumerate(lines) if "cut here" in line]  # once, whoever looks for it
    return "".join(lines[:at]), "".join(lines[at:])


@needs_whole_file
def test_nothing_above_the_line_names_anything_below_it():
    above, below = cut()
    used = {node.id for node in ast.walk(ast.parse(above)) if isinstance(node, ast.Name)}
    own = bound_names(ast.parse(below))
    assert {"LocalPlatform", "main"} <= own and not own & used
    assert not re.search(r"\bLocalPlatform\b|\bargparse\b|http\.server", above)


def test_no_private_attribute_of_the_standard_library_is_used_nor_the_file_imported_by_name():
    tree = ast.parse(LIBRARY.read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    assert "xtask" not in names | {getattr(node, "module", "") for node in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            assert not (isinstance(root, ast.Name) and root.id in names), ast.dump(node)
    assert not [name for name in names if name.startswith("_")]


TWINS = {
    xtask.Task: "load create list save set_status stop reload wait_finished events get_activity_log "
                "get_files get_images get_human_readable_files to_message",
    xtask.TasksListItem: "load",
}


@pytest.mark.parametrize("owner", TWINS, ids=lambda owner: owner.__name__)
def test_every_call_has_its_twin_with_the_same_arguments_and_no_other_call_is_public(owner):
    names = TWINS[owner].split()
    public = {name for name, value in vars(owner).items() if not name.startswith("_") and
              (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)))}
    assert public - {"from_dict", "to_dict"} == {*names, *("a" + name for name in names)}
    for name in names:
        sync, twin = getattr(owner, name), getattr(owner, "a" + name)
        assert inspect.iscoroutinefunction(twin) == (name != "events")
        assert not inspect.iscoroutinefunction(sync)
        assert inspect.signature(sync).parameters == inspect.signature(twin).parameters, name
        assert sync.__doc__ and twin.__doc__.count("\n") == 0 and f"`{name}`" in twin.__doc__, name


def test_type_hints_resolve_everywhere_although_a_method_is_called_list():
    for name in xtask.__all__:
        value = getattr(xtask, name)
        assert typing.get_type_hints(value) or name not in ("Task", "Configuration", "iter_sse")
        for member in vars(value).values() if inspect.isclass(value) else ():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(member) and member.__module__ == xtask.__name__:
                typing.get_type_hints(member)
    assert typing.get_type_hints(xtask.Task)["sub_executions"] == typing.Optional[typing.List[str]]


# ---------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------

# The platform's sample payloads, whole.
TASK_SAMPLE = json.loads("""
{"id": "333897e5-1c35-4598-a6ad-af5e0c101c84", "agent_id": "38551c1d-a16b-454f-84d4-68f431ba608b",
"organization_id": "91fbe9bc-35b3-41e8-b59d-922fb5a0f031", "input": {"text":
"What is 2+2? Just answer with the number.", "files": [], "user": null}, "status": "completed",
"internal_status": null, "last_executed_node_id": null, "agent_version": null, "created_at":
"2025-11-06T06:41:54.048626Z", "updated_at": "2025-11-06T06:41:57.507601Z", "started_at": null, "paused_at":
null, "finished_at": "2025-11-06T06:41:57.507601Z", "result": "4", "parent_execution": null,
"sub_executions": [], "finished_sub_executions": [], "is_manually_stopped": false, "payload_extension":
null, "hitl_request": null, "pending_eca_request": null, "source": "api", "worker_id": null,
"additional_context": null, "expected_output": null, "output_format": "text", "output_schema": null,
"events_streaming": false, "used_mutating_tools": false, "is_continuous": false, "mcp_servers": [],
"triggering_agent_id": null, "title": "API Test - Simple Math", "think_mode": "default",
"disable_attachment_injection": false}""")

NEWER_TASK_SAMPLE = json.loads("""
{"id": "5f0c2d5e-7a43-4c11-9a53-0f4a4c1b9a10", "agent_id": "38551c1d-a16b-454f-84d4-68f431ba608b",
"organization_id": "91fbe9bc-35b3-41e8-b59d-922fb5a0f031", "input": {"text":
"Analyse the attached sales data", "files": ["https://files.example.com/q3/report.pdf?sig=abc",
"https://files.example.com/q3/chart.PNG", "https://files.example.com/q3/sales.csv",
"https://files.example.com/q3/archive.zip"], "user": {"id": "u-17", "first_name": "Ada", "last_name": null,
"email": "ada@example.com", "additional_attributes": {"tier": "gold"}, "timezone": "Europe/London",
"display_name": "Ada"}}, "status": "executing", "internal_status": null, "last_executed_node_id": null,
"agent_version": null, "created_at": "2025-11-06T06:41:54.048626Z", "updated_at":
"2026-03-02T09:15:42+00:00", "started_at": null, "paused_at": null, "finished_at": null, "result": null,
"parent_execution": null, "sub_executions": ["7f3d0a55-61a4-4ef2-9fd7-5f6f8f7a2b7e"],
"finished_sub_executions": [], "is_manually_stopped": false, "payload_extension": {"request_id":
"REQ-2026-001"}, "hitl_request": {"wait_node_id": "node-9"}, "pending_eca_request": {"connector_name":
"Google Drive", "auth_url": "https://auth.example.com/eca"}, "source": "api", "worker_id": null,
"additional_context": null, "expected_output": null, "output_format": "json", "output_schema": {"type":
"object", "required": ["summary"], "properties": {"summary": {"type": "string"}}}, "events_streaming": true,
"used_mutating_tools": false, "is_continuous": false, "mcp_servers": [{"type": "remote", "name": "weather",
"url": "https://mcp.example.com", "transport": "streamable-http", "auth_type": "none"}],
"triggering_agent_id": null, "title": "Quarterly sales", "think_mode": "default",
"disable_attachment_injection": false, "deep_planning": {"enabled": true, "enforce": false, "started": true,
"tasks": [{"id": "p1", "title": "Read the files", "completed": true}, {"id": "p2", "title": "Summarise",
"completed": false}]}, "tokens": {"completion_tokens": 120, "prompt_tokens": 900}, "used_tools":
["web-search"], "duration": 12.5, "execution_attempts": 1, "llm_model_name": null}""")

ACTIVITY_SAMPLE = json.loads("""
{"id": "5f0c2d5e-7a43-4c11-9a53-0f4a4c1b9a10", "created_at": "2026-03-02T09:15:41.900Z", "user": {"id":
"u-17", "first_name": "Ada", "last_name": null, "email": "ada@example.com", "additional_attributes":
{"tier": "gold"}, "timezone": "Europe/London", "display_name": "Ada"}, "messages": [{"id": "a1",
"created_at": "2026-03-02T09:15:41.900Z", "role": "user", "content": {"text":
"Analyse the attached sales data", "files": ["https://files.example.com/q3/sales.csv"]}}, {"id": "a2",
"created_at": "2026-03-02T09:15:43Z", "type": "think", "title": "Plan", "confidence": 0.8, "thought":
"Two files, one table.", "action": "Search first", "result": null, "analysis": null}, {"id": "a3",
"created_at": "2026-03-02T09:15:46Z", "tool_name": "web-search", "payload": {"q": "Q3 sales EMEA"},
"is_error": false, "reasoning": {"title": "Look up the market", "description": null}, "result": {"hits":
3}}, {"id": "a4", "created_at": "2026-03-02T09:15:47Z", "agent_id": "b1", "query": "Check the currency",
"files": [], "reasoning": {"title": "Currency", "description": null}}, {"id": "a5", "created_at":
"2026-03-02T09:15:48Z", "type": "login_required", "data": {"url": "https://login.example.com/x",
"server_url": "https://mcp.example.com", "server_name": "weather"}}, {"id": "a6", "created_at":
"2026-03-02T09:15:49Z", "agent_id": "gw", "action": "ask_user_questions", "reasoning": "needs a period",
"title": "Which period?", "description": ""}, {"id": "a7", "created_at": "2026-03-02T09:15:50Z", "type":
"analyze", "title": "Check", "confidence": 1, "analysis": "Totals add up."}, {"id": "a8", "created_at":
"2026-03-02T09:15:53Z", "role": "agent", "content": {"text": "Sales rose by 12 %.", "files": null}}]}""")
CALLED = json.loads("""
{"request_id": "req-1", "operation_id": "web-search", "tool_call_id": "call_9", "graph_node_id": null,
"tool_name": "web-search", "payload": {"body_params": {"q": "Q3 sales — EMEA"}}, "reasoning": {"title":
"Look up the market", "description": "The file lacks the region"}, "plan_task_id": "p1"}""")
THOUGHT = {"title": "Plan", "confidence": 0.8, "thought": "Two files, one table.", "action": "Search first"}
LOGIN_DATA = {"url": "https://login.example.com/x", "server_url": "https://mcp.example.com",
              "server_name": "weather"}
ASKED = {"agent_id": "b1", "query": "Check the currency", "files": [],
         "reasoning": {"title": "Currency", "description": None}}
FINISH_SAMPLE = {"status": "completed", "finished_at": "2026-03-02T09:15:53Z",
                 "result": '{"summary": "Sales rose by 12 %."}'}
EVENTS_SAMPLE = [  # second, type, data
    (1, "connected", {}),
    (1, "task_created", {**NEWER_TASK_SAMPLE, "status": "pending"}),
    (2, "task_updated", NEWER_TASK_SAMPLE),
    (3, "think", {"request_id": "req-0", "operation_id": "think", "tool_name": "think",
                  "payload": {"input": THOUGHT}}),
    (4, "tool_call_request", CALLED),
    (6, "tool_call_result", {**CALLED, "result": {"hits": 3}, "is_error": False}),
    (7, "sub_agent_trigger", ASKED),
    (8, "auth_event", {"type": "login_required", "data": LOGIN_DATA}),
    (9, "chunk", "Sales rose "),
    (9, "chunk", "by 12\u00a0%.\u2028Details follow."),
    (10, "live_surface_created", {"card_id": "c1", "title": "Chart"}),
    (11, "task_finished", {**NEWER_TASK_SAMPLE, **FINISH_SAMPLE}),
]


def sample_envelopes():
    ids = {"task_id": NEWER_TASK_SAMPLE["id"], "organization_id": NEWER_TASK_SAMPLE["organization_id"]}
    return [{"type": kind, **ids, "time": f"2026-03-02T09:15:{second:02}.125000+00:00", "data": data}
            for second, kind, data in EVENTS_SAMPLE]


def sample_stream():
    """The sample's stream: a comment, `retry`, ids, and a ping between two events."""
    parts = [": stream open\nretry: 2000\n\n"]
    for number, envelope in enumerate(sample_envelopes(), 1):
        parts.append(f"id: {number}\ndata: {json.dumps(envelope, ensure_ascii=False)}\n\n")
        parts.append(": ping\n\n" if number == 4 else "")
    return "".join(parts).encode()


def as_json(value):
    """A value as text, for a comparison that tells True from 1 and 1 from 1.0."""
    return json.dumps(value, sort_keys=True)


def utc(*numbers):
    return datetime(*numbers, tzinfo=timezone.utc)


@pytest.mark.parametrize("sample", [TASK_SAMPLE, NEWER_TASK_SAMPLE], ids=["task", "newer task"])
def test_the_samples_of_a_task_round_trip_without_loss(sample):
    task = xtask.Task.from_dict(sample)
    assert as_json(task.to_dict()) == as_json(sample)
    assert as_json(xtask.Task.from_dict(task.to_dict()).to_dict()) == as_json(sample)


def test_the_sample_of_a_task_comes_out_typed():
    task = xtask.Task.from_dict(TASK_SAMPLE)
    assert task.status is xtask.AgentExecutionStatus.Completed and task.is_finished
    assert task.output_format is xtask.OutputFormat.Text
    assert task.created_at == utc(2025, 11, 6, 6, 41, 54, 48626) and task.started_at is None
    assert type(task.input) is xtask.AgentExecutionInput
    assert (task.input.text, task.input.files, task.input.user) == (TASK_SAMPLE["input"]["text"], [], None)
    assert (task.result, task.title, task.think_mode) == ("4", "API Test - Simple Math", "default")
    assert (task.mcp_servers, task.is_manually_stopped, task.extra) == ([], False, {})


def test_the_sample_of_a_newer_server_comes_out_typed_with_what_is_new_in_extra():
    task = xtask.Task.from_dict(NEWER_TASK_SAMPLE)
    assert task.status == "executing" and not task.is_finished and task.events_streaming is True
    assert task.updated_at == utc(2026, 3, 2, 9, 15, 42)
    assert type(task.input.user) is xtask.User and task.input.user.email == "ada@example.com"
    assert task.input.user.additional_attributes == {"tier": "gold"} and task.input.user.last_name is None
    assert task.output_schema["required"] == ["summary"] and task.mcp_servers[0]["name"] == "weather"
    assert task.hitl_request == {"wait_node_id": "node-9"}
    assert task.pending_eca_request["connector_name"] == "Google Drive"
    assert set(task.extra) == {"deep_planning", "tokens", "used_tools", "duration", "execution_attempts",
                               "llm_model_name"}


def test_the_sample_of_an_activity_log_round_trips_and_comes_out_typed():
    thread = xtask.AgentActivityThread.from_dict(ACTIVITY_SAMPLE)
    assert as_json(thread.to_dict()) == as_json(ACTIVITY_SAMPLE)
    assert type(thread.user) is xtask.User and thread.created_at == utc(2026, 3, 2, 9, 15, 41, 900000)
    kinds = "Message Reasoning ToolCall SubAgentTrigger Auth OtherEntry Reasoning Message"
    assert " ".join(type(entry).__name__[19:] for entry in thread.messages) == kinds
    asked, thought, tool, agent, login, other, check, said = thread.messages
    assert all(type(entry.created_at) is datetime for entry in thread.messages)
    assert [entry.id for entry in thread.messages] == [f"a{number}" for number in range(1, 9)]
    assert type(asked.content) is xtask.AgentActivityThreadMessageContent and asked.role == "user"
    assert asked.content.files == ["https://files.example.com/q3/sales.csv"] and said.content.files is None
    assert thought.type is xtask.AgentActivityThreadReasoningType.Think and thought.confidence == 0.8
    assert (thought.thought, thought.action, check.type) == (THOUGHT["thought"], "Search first", "analyze")
    assert (tool.tool_name, tool.payload, tool.result, tool.is_error) == (
        "web-search", {"q": "Q3 sales EMEA"}, {"hits": 3}, False)
    assert type(tool.reasoning) is xtask.ToolCallRequestReasoning and tool.reasoning.description is None
    assert (agent.query, agent.files, agent.reasoning.title) == ("Check the currency", [], "Currency")
    assert (login.type, login.data) == ("login_required", LOGIN_DATA)
    assert other.extra["action"] == "ask_user_questions" and other.extra["reasoning"] == "needs a period"


@both_faces
def test_the_sample_stream_comes_through_typed_and_without_loss(face):
    def script(connection, number):
        connection.request()
        connection.start_stream()
        connection.send(sample_stream())

    with RawServer(script) as server:
        task = xtask.Task.from_dict(NEWER_TASK_SAMPLE, server.config)
        events = call(face, task, "events")
    assert [as_json(event.raw) for event in events] == list(map(as_json, sample_envelopes()))
    assert [as_json(event.to_dict()) for event in events] == list(map(as_json, sample_envelopes()))
    assert [event.type for event in events] == [kind for _, kind, _ in EVENTS_SAMPLE]
    assert all(type(event.type) is xtask.TaskUpdateEventType for event in events)
    assert all(event.task_id == task.id and event.organization_id == task.organization_id for event in events)
    assert events[0].time == utc(2026, 3, 2, 9, 15, 1, 125000)
    kinds = [dict, xtask.Task, xtask.Task, xtask.ToolCallRequest, xtask.ToolCallRequest, xtask.ToolCallResult,
             dict, dict, str, str, dict, xtask.Task]
    assert [type(event.data) for event in events] == kinds
    assert events[1].data.status == "pending" and events[1].data.configuration is server.config
    assert events[3].data.payload["input"]["confidence"] == 0.8 and events[3].data.reasoning is None
    assert events[4].data.reasoning.title == "Look up the market" and events[4].data.plan_task_id == "p1"
    assert events[5].data.result == {"hits": 3} and events[5].data.is_error is False
    assert events[9].data == "by 12\u00a0%.\u2028Details follow."
    assert events[11].data.is_finished and json.loads(events[11].data.result)["summary"]


# The field table: what a server may send for each field of a task.
STRINGS = ("result title source additional_context expected_output last_executed_node_id agent_version "
           "parent_execution triggering_agent_id worker_id internal_status think_mode").split()
TIMES = "updated_at started_at paused_at finished_at".split()
BOOLEANS = ("is_manually_stopped events_streaming used_mutating_tools is_continuous "
            "disable_attachment_injection").split()
LISTS = "sub_executions finished_sub_executions".split()
OBJECTS = "payload_extension output_schema hitl_request pending_eca_request".split()
STATUSES = "pending executing paused error failed completed stopped queued running cancelled".split()
TEXTS = ["", "x", "naïve — \u2028\U0001f600", "null", "2025-11-06T06:41:54Z", "a\nb", "\x00", "9" * 300]


def random_time(rng):
    """A moment as some server spells it, and the aware datetime that it is."""
    moment = datetime(2025, 1, 1) + timedelta(seconds=rng.randrange(10**8))
    digits = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    fraction = "".join(rng.choice("0123456789") for _ in range(digits))
    zone, minutes = rng.choice([("Z", 0), ("", 0), ("+00:00", 0), ("+05:30", 330), ("-08:00", -480)])
    spelled = moment.strftime("%Y-%m-%dT%H:%M:%S") + ("." + fraction if digits else "") + zone
    microseconds = int((fraction + "000000")[:6])
    return spelled, moment.replace(microsecond=microseconds, tzinfo=timezone(timedelta(minutes=minutes)))


def random_value(rng, depth=0):
    """Any JSON value."""
    makers = [lambda: None, lambda: rng.random() < 0.5, lambda: rng.choice([0, 1, -1, 2**60]),
              lambda: rng.choice([0.5, 1.0, 1e300]), lambda: rng.choice(TEXTS)]
    if depth < 3:
        makers.append(lambda: [random_value(rng, depth + 1) for _ in range(rng.randrange(3))])
        makers.append(lambda: {rng.choice(["a", "id", "status", "extra", "é"]): random_value(rng, depth + 1)
                               for _ in range(rng.randrange(3))})
    return rng.choice(makers)()


def random_task(seed):
    """An object drawn from the table, and its date-times as they should come out."""
    rng, times = random.Random(seed), {}
    task = {name: rng.choice(["1", "a b", "é"]) for name in ("id", "agent_id", "organization_id")}
    task["created_at"], times["created_at"] = random_time(rng)
    user = {"email": "a@example.com", "timezone": "UTC", "additional_attributes": random_value(rng), "new": 1}
    task["input"] = {"text": rng.choice([None, *TEXTS]),
                     "files": rng.choice([None, [], ["https://e.com/a.txt"]]),
                     "user": rng.choice([None, user]), "attachments": random_value(rng), "principal": None}
    for name in rng.sample(sorted(task["input"]), rng.randrange(3)):
        del task["input"][name]
    optional = {
        "status": rng.choice(STATUSES),
        "output_format": rng.choice("text markdown json html voice hologram".split()),
        "mcp_servers": [random_value(rng)] * rng.randrange(2),
        **{name: rng.choice(TEXTS)[:255] for name in STRINGS},
        **{name: rng.random() < 0.5 for name in BOOLEANS},
        **{name: rng.sample(TEXTS, rng.randrange(3)) for name in LISTS},
        **{name: {"a": random_value(rng)} for name in OBJECTS},
        **{name: random_value(rng) for name in "deep_planning tokens duration extra raw load".split()},
    }
    for name in TIMES:
        optional[name], times[name] = random_time(rng)
    for name, value in optional.items():
        lot = rng.random()
        if lot < 0.6:
            task[name] = value
        elif lot < 0.75:
            task[name], times[name] = None, None
        else:
            times[name] = None
    return task, times


def draws(count):
    """A test that takes a seed, as one that goes through so many seeds."""

    def decorate(test):
        def test_each():
            for seed in range(count):
                test(seed)

        return test_each

    return decorate


@draws(150)
def test_a_random_task_comes_out_typed_and_goes_back_without_loss(seed):
    payload, times = random_task(seed)
    before = as_json(payload)
    task = xtask.Task.from_dict(payload)
    assert as_json(task.to_dict()) == before == as_json(payload)
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert as_json(twin.to_dict()) == before
    for name in ("created_at", *TIMES):
        moment = getattr(task, name)
        assert moment == times[name] and (moment is None or moment.tzinfo), name
    assert type(task.input) is xtask.AgentExecutionInput
    assert type(task.input.user) is (xtask.User if payload["input"].get("user") else type(None))
    for name, kind in (("status", xtask.AgentExecutionStatus), ("output_format", xtask.OutputFormat)):
        assert getattr(task, name) == payload.get(name)
        assert getattr(task, name) is None or type(getattr(task, name)) is kind
    fields = {field.name for field in dataclasses.fields(xtask.Task)} - {"extra"}
    assert task.extra == {name: value for name, value in payload.items() if name not in fields}
    repr(task)


@draws(60)
def test_a_task_of_values_of_the_wrong_type_still_loads_without_loss(seed):
    rng = random.Random(seed)
    payload, _ = random_task(seed)
    for name in rng.sample(sorted(payload), 8):
        payload[name] = random_value(rng)
    assert as_json(xtask.Task.from_dict(payload).to_dict()) == as_json(payload)
    repr(xtask.Task.from_dict(payload))


def test_a_task_as_it_was_loaded_is_never_sent_back():
    payloads = [random_task(seed)[0] for seed in range(40)]
    with answering(*[(200, payload) for payload in payloads for _ in range(2)]) as server:
        for payload in payloads:
            task = xtask.Task.load("t-1", server.config).save()
            assert as_json(task.to_dict()) == as_json(payload)
    assert {method for method, *_ in server.requests} == {"GET"}


@draws(40)
def test_a_random_activity_log_and_a_random_event_go_back_without_loss(seed):
    rng = random.Random(seed)
    entries = [dict(entry) for entry in ACTIVITY_SAMPLE["messages"]] + [random_value(rng) for _ in range(3)]
    for entry in entries[:8]:
        for name in rng.sample(sorted(entry), rng.randrange(3)):
            entry[name] = random_value(rng)
        entry.pop(rng.choice(sorted(entry)))
        entry.update(extra=random_value(rng), created_at=random_time(rng)[0])
    log = {"id": "t", "created_at": random_time(rng)[0], "messages": entries, "user": None, "pages": 2}
    assert as_json(xtask.AgentActivityThread.from_dict(log).to_dict()) == as_json(log)
    for envelope in sample_envelopes():
        envelope.update(data=random_value(rng), time=random_time(rng)[0], version=2, extra=1)
        event = xtask.TaskUpdateEvent.from_dict(envelope)
        assert event.extra == {"version": 2, "extra": 1} and "version" not in repr(event)
        if not isinstance(event.data, xtask.Task):  # a trimmed one is filled up: the raw one is not
            assert as_json(event.to_dict()) == as_json(envelope)
        assert as_json(event.raw) == as_json(envelope)


MESSAGE = {"role": "user", "content": {"text": "Hi", "files": None}}
ENTRY_KINDS = [  # the entry's own keys, and the kind that they tell: the first match, if it fits
    ({**MESSAGE, "tool_name": "x"}, "Message"),
    ({**MESSAGE, "role": "system"}, "OtherEntry"),
    ({**MESSAGE, "content": "Hi"}, "OtherEntry"),
    ({"role": "user"}, "OtherEntry"),
    ({"tool_name": "x", "payload": None, "is_error": False, "reasoning": None, "result": None}, "ToolCall"),
    ({"tool_name": "x", "type": "think", "title": "y"}, "ToolCall"),
    ({"tool_name": None}, "OtherEntry"),
    ({"type": "think", "title": "x", "query": "y"}, "Reasoning"),
    ({"type": "analyze", "title": "x", "analysis": "y"}, "Reasoning"),
    ({"type": "think", "title": "x", "thought": {"no": "text"}}, "OtherEntry"),
    ({"type": "think", "analysis": 1}, "OtherEntry"),
    ({"type": "ponder", "title": "x"}, "OtherEntry"),
    ({"query": "x", "type": "login_required", "data": {}}, "SubAgentTrigger"),
    ({"query": ["x"]}, "OtherEntry"),
    ({"type": "not_supported", "data": {}}, "Auth"),
    ({"type": "login_required", "data": {}}, "Auth"),
    ({"type": "token_issue", "data": None}, "Auth"),
    ({"type": "token_ready", "data": {"access_token": "x"}}, "Auth"),
    ({"type": "token_lost", "data": {}}, "OtherEntry"),
    ({"type": ["think"], "data": {}}, "OtherEntry"),
    ({"agent_id": "gw", "action": "ask"}, "OtherEntry"),
    ({}, "OtherEntry"),
]


@pytest.mark.parametrize("entry, kind", ENTRY_KINDS, ids=numbered(row[1] for row in ENTRY_KINDS))
def test_the_keys_of_an_entry_tell_its_kind_and_nothing_of_it_is_lost(entry, kind):
    entry = {"id": "a1", "created_at": "2026-03-02T09:15:48Z", **entry, "new": {"deep": [1]}}
    log = {"id": "t", "created_at": "2026-03-02T09:15:41Z", "messages": [entry]}
    thread = xtask.AgentActivityThread.from_dict(log)
    assert type(thread.messages[0]).__name__ == "AgentActivityThread" + kind
    assert thread.messages[0].extra["new"] == {"deep": [1]} and thread.messages[0].id == "a1"
    assert thread.to_dict() == log


MOMENTS = [
    ("2025-11-06T06:41:54Z", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-06T06:41:54", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-06t06:41:54z", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-06 06:41:54Z", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-06T08:41:54+02:00", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-05T22:11:54-08:30", utc(2025, 11, 6, 6, 41, 54)),
    ("2025-11-06T06:41:54.1Z", utc(2025, 11, 6, 6, 41, 54, 100000)),
    ("2025-11-06T06:41:54.04862Z", utc(2025, 11, 6, 6, 41, 54, 48620)),
    ("2025-11-06T06:41:54.048626Z", utc(2025, 11, 6, 6, 41, 54, 48626)),
    ("2025-11-06T06:41:54.048626999Z", utc(2025, 11, 6, 6, 41, 54, 48626)),
    ("2025-11-06T06:41:54.999999999+00:00", utc(2025, 11, 6, 6, 41, 54, 999999)),
    ("2025-11-06T06:41:54.1234567", utc(2025, 11, 6, 6, 41, 54, 123456)),
    ("2025-02-30T06:41:54Z", None),
    ("2025-11-06T06:41:60Z", None),
    ("2025-11-06T٠٦:41:54Z", None),
    ("yesterday", None),
    ("2", None),
    ("", None),
]


@pytest.mark.parametrize("spelled, moment", MOMENTS, ids=[spelled or "empty" for spelled, _ in MOMENTS])
def test_a_date_time_is_aware_or_stays_text_and_keeps_its_spelling(spelled, moment):
    task = xtask.Task.from_dict(task_dict(finished_at=spelled))
    assert task.finished_at == (spelled if moment is None else moment)
    assert moment is None or task.finished_at.utcoffset() is not None
    assert task.to_dict()["finished_at"] == spelled


def test_a_date_time_that_was_changed_is_told_in_iso_format():
    task = xtask.Task.from_dict(task_dict(finished_at="2025-11-06T06:41:54.1Z"))
    task.finished_at += timedelta(hours=1)
    assert task.to_dict()["finished_at"] == "2025-11-06T07:41:54.100000+00:00"
    task.finished_at = datetime(2026, 1, 2, 3)  # no zone means UTC
    assert task.to_dict()["finished_at"] == "2026-01-02T03:00:00+00:00"


ENUMS = {
    "AgentExecutionStatus": "Pending=pending Executing=executing Paused=paused Error=error Failed=failed "
                            "Completed=completed Stopped=stopped",
    "OutputFormat": "Text=text Markdown=markdown Json=json Html=html Voice=voice",
    "TaskUpdateEventType": "Connected=connected TaskCreated=task_created TaskUpdated=task_updated "
                           "TaskFinished=task_finished Chunk=chunk ToolCallRequest=tool_call_request "
                           "ToolCallResult=tool_call_result Think=think Analyze=analyze "
                           "SubAgentTrigger=sub_agent_trigger AuthEvent=auth_event PlanUpdated=plan_updated "
                           "TaskCompactization=task_compactization ContextStatus=context_status",
    "AgentActivityThreadReasoningType": "Think=think Analyze=analyze",
}


@pytest.mark.parametrize("name", ENUMS)
def test_an_enum_is_text_and_takes_a_value_outside_it(name):
    enum = getattr(xtask, name)
    members = dict(pair.split("=") for pair in ENUMS[name].split())
    assert {member.name: member.value for member in enum} == members
    newer, values = enum("newer-than-this"), [*members.values(), "newer-than-this"]
    for member, value in zip([*(getattr(enum, key) for key in members), newer], values):
        assert isinstance(member, str) and member == value == member.value and hash(member) == hash(value)
        assert f"{member} {member:>20}" == f"{value} {value:>20}" and str(member) == "%s" % member == value
        assert json.dumps(member) == json.dumps(value)
        for twin in (copy.deepcopy(member), pickle.loads(pickle.dumps(member)), enum(value)):
            assert twin == member and type(twin) is enum and twin.value == value
    assert newer not in list(enum) and len(enum) == len(members) and "newer" in repr(newer)


def test_in_progress_is_another_name_of_executing():
    assert xtask.AgentExecutionStatus.InProgress is xtask.AgentExecutionStatus.Executing


@pytest.mark.parametrize("status", STATUSES)
def test_error_failed_completed_and_stopped_are_final(status):
    final = status in ("error", "failed", "completed", "stopped")
    assert xtask.AgentExecutionStatus(status).is_final is final


FINISHED_OR_NOT = [  # status, finished_at, whether the task is finished
    ("completed", None, True), ("stopped", None, True), ("executing", "2026-03-02T09:15:41Z", False),
    ("cancelled", None, False), ("cancelled", "2026-03-02T09:15:41Z", True), ("queued", None, False),
    (None, None, False),
]


@pytest.mark.parametrize("status, finished_at, finished", FINISHED_OR_NOT)
def test_a_task_is_finished_by_its_status_or_outside_the_enum_by_its_date(status, finished_at, finished):
    task = xtask.Task.from_dict(task_dict(status=status, finished_at=finished_at))
    assert task.is_finished is finished
    task.status = "failed"  # a plain string, as a script may set it
    assert task.is_finished


def test_what_a_server_leaves_out_is_false_an_empty_list_or_none():
    task = xtask.Task.from_dict({"id": "t-1", "input": {}})
    assert all(getattr(task, name) is False for name in BOOLEANS)
    assert all(getattr(task, name) == [] for name in (*LISTS, "mcp_servers"))
    others = (*STRINGS, *TIMES, *OBJECTS, "status", "output_format", "agent_id")
    assert all(getattr(task, name) is None for name in others)
    task.sub_executions.append("x")
    assert task.to_dict()["sub_executions"] == ["x"]
    assert xtask.Task.from_dict({"id": "t-1"}).sub_executions == []


def test_a_task_is_made_of_any_mapping_and_of_dates():
    made = xtask.Task.from_dict(types.MappingProxyType(task_dict(created_at=utc(2026, 1, 2))))
    assert made.to_dict() == task_dict(created_at="2026-01-02T00:00:00+00:00")


def test_a_task_shares_nothing_with_the_object_it_was_made_from():
    payload = task_dict(input={"text": "Hi", "files": ["https://e.com/a.txt"]}, tokens={"prompt": [1]})
    task = xtask.Task.from_dict(payload)
    task.input.files.append("https://e.com/b.txt")
    task.extra["tokens"]["prompt"].append(2)
    task.to_dict()["input"]["files"].append("https://e.com/c.txt")
    assert payload["input"]["files"] == ["https://e.com/a.txt"] and payload["tokens"] == {"prompt": [1]}
    assert len(task.input.files) == 2


def test_a_task_made_by_hand_tells_what_was_set():
    task = xtask.Task(id="t", agent_id="a", organization_id="o", input=xtask.AgentExecutionInput(text="Hi"),
                      created_at=utc(2026, 1, 2), title="Made")
    assert task.to_dict() == {"id": "t", "agent_id": "a", "organization_id": "o", "input": {"text": "Hi"},
                              "created_at": "2026-01-02T00:00:00+00:00", "title": "Made"}
    assert xtask.User(email="a@e.com", extra={"new": 1}).to_dict() == {"email": "a@e.com", "new": 1}


def test_what_json_cannot_hold_is_a_type_error_that_names_it():
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        xtask.User(additional_attributes={"tags": {"a"}}).to_dict()


RECORDS = [name for name in PUBLIC if name.startswith(("AgentActivityThread", "ToolCall")) and name !=
           "AgentActivityThreadReasoningType"] + ["User", "AgentExecutionInput", "TasksListItem", "Task"]


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_keeps_what_has_no_name_in_extra(name):
    record = getattr(xtask, name)
    keys = [field.name for field in dataclasses.fields(record) if field.name != "extra"]
    for payload in ({"id": "1", "new": [1], "extra": {"extra": 1}}, dict.fromkeys(keys), {}):
        made = record.from_dict(payload)
        assert made.to_dict() == payload
        assert made.extra == {key: value for key, value in payload.items() if key not in keys}
        assert made == record.from_dict(payload)
        if not payload:
            assert all(getattr(made, key) in (None, False, "", []) for key in keys)
        if name != "Task":  # whose repr is shorter
            assert repr(made) == f"{name}({', '.join(f'{key}={getattr(made, key)!r}' for key in keys)})"
        assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made


def test_equality_is_about_the_data_not_the_configuration():
    one, other = make_task(None), make_task(configuration("http://127.0.0.1:9"))
    assert one == other and one.to_dict() == other.to_dict()
    other.title = "x"
    assert one != other


def test_copies_and_forms_of_a_loaded_task_work_and_show_no_key():
    with answering((200, NEWER_TASK_SAMPLE)) as server:
        task = xtask.Task.load("t-1", server.config)
        copied, pickled = copy.deepcopy(task), pickle.loads(pickle.dumps(task))
        shallow = copy.copy(task)
        for twin in (copied, pickled, shallow):
            assert twin == task and as_json(twin.to_dict()) == as_json(NEWER_TASK_SAMPLE)
            assert twin.reload() == task and twin.save() is twin  # it has its configuration, too
            twin.configuration.close()
        copied.input.files.append("x")
        copied.output_schema["x"] = 1
        assert as_json(task.to_dict()) == as_json(NEWER_TASK_SAMPLE)
        plain = dataclasses.asdict(task)
        assert plain["input"]["user"]["email"] == "ada@example.com" and "configuration" not in plain
        assert set(plain) == {field.name for field in dataclasses.fields(xtask.Task)}
        item = xtask.TasksListItem.from_dict(NEWER_TASK_SAMPLE)
        error = xtask.ModuleException(404, "Task not found")
        shown = [task, copied, pickled, plain, server.config, item, error, task.to_dict(), vars(error),
                 typing.get_type_hints(xtask.Task), pickled.configuration, copy.deepcopy(server.config)]
        assert all(KEY not in f"{value!r} {value}" for value in shown)
    assert {headers["x-api-key"] for _, _, headers, _ in server.requests} == {KEY}


def test_the_repr_of_a_task_is_one_short_line_of_id_status_and_title():
    assert repr(make_task(None, title="Sums")) == "Task(id='t-1', status='executing', title='Sums')"
    long = repr(make_task(None, title="Sums\n" * 1000, result="secret result"))
    assert "\n" not in long and len(long) < 140 and "result" not in long


SECRETS = [
    ("an access token", "auth_event", {"type": "token_ready", "data": {"access_token": "s3cret"}}),
    ("a file's query", "task_updated", task_dict(input={"files": ["https://e.com/a?sig=s3cret"]})),
    ("tokens of a user", "chunk", {"user_tokens": {"a": "s3cret"}, "user_oidc_token": "s3cret"}),
]


@pytest.mark.parametrize("kind, data", [row[1:] for row in SECRETS], ids=[row[0] for row in SECRETS])
def test_no_repr_shows(kind, data):
    event = xtask.TaskUpdateEvent.from_dict({"type": kind, "data": data})
    data = event.data.input if isinstance(event.data, xtask.Task) else event.data
    assert "s3cret" not in repr(event) and (isinstance(data, (dict, str)) or "s3cret" not in repr(data))
    assert "s3cret" in json.dumps(event.raw)  # which carries what the platform sent








def test_a_repr_takes_time_linear_in_what_a_server_sent():
    run = "import xtask; repr(xtask.Task.from_dict({'id': 't', 'title': 'http://' * 150_000}))"
    assert run_python(run).returncode == 0, "within its time-out"


def test_a_repr_shows_what_is_no_secret():
    shown = {"query": ["x", {"city": "Rome", "access_token": None}], "api_key": "s3cret"}
    hidden = {"query": ["x", {"city": "Rome", "access_token": None}], "api_key": "***"}
    assert repr(hidden) in repr(xtask.ToolCallRequest("r", "o", payload=shown))


def test_a_log_that_is_made_by_hand_has_no_messages_and_shares_none():
    first, second = xtask.AgentActivityThread("t"), xtask.AgentActivityThread("u")
    first.messages.append(1)
    assert (first.messages, second.messages) == ([1], [])


@pytest.mark.parametrize("start, end", ["[]", ('{"a":', "}")], ids=["lists", "objects"])
def test_a_repr_of_what_is_nested_hundreds_deep_is_cut(start, end):
    deep = json.loads(start * 600 + "1" + end * 600)
    assert "..." in repr(xtask.ToolCallRequest("r", "o", payload=deep))


def test_events_are_equal_by_what_they_say_not_by_how_it_was_told():
    told = xtask.TaskUpdateEvent.from_dict({"type": "chunk", "task_id": "t", "data": "x"})
    assert told == xtask.TaskUpdateEvent.from_dict({"type": "chunk", "data": "x"}, {"id": "t"})
    assert told != xtask.TaskUpdateEvent.from_dict({"type": "chunk", "data": "x"})


def test_changing_the_task_of_an_event_changes_neither_its_envelope_nor_another_event():
    required = {"id": "t-1", "input": {"text": "Hi", "files": []}}
    envelope = {"type": "task_updated", "data": {"status": "executing", "output_schema": {"a": 1}}}
    first, second = (xtask.TaskUpdateEvent.from_dict(envelope, required) for _ in range(2))
    first.data.output_schema["b"] = 2
    first.data.input.files.append("https://e.com/a")
    assert first.raw == envelope and envelope["data"]["output_schema"] == {"a": 1}
    assert (second.data.output_schema, second.data.input.files) == ({"a": 1}, [])
    assert required["input"]["files"] == []


def test_the_repr_of_an_activity_entry_hides_tokens():
    entry = {"id": "a", "created_at": "x", "type": "token_ready", "data": {"access_token": "s3cret"}}
    thread = xtask.AgentActivityThread.from_dict({"id": "t", "created_at": None, "messages": [entry]})
    assert "s3cret" not in repr(thread) + repr(thread.messages) and "token_ready" in repr(thread)


def test_a_module_exception_says_what_happened_and_pickles():
    error = xtask.ModuleException(404, "Task not found", {"detail": "Task not found"}, answered=True)
    for twin in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert str(twin) == "[404] Task not found" and type(twin) is xtask.ModuleException
        assert (twin.status_code, twin.description, twin.details, twin.answered) == (
            404, "Task not found", {"detail": "Task not found"}, True)
    bare = xtask.ModuleException(500, "x")
    assert (bare.details, bare.answered) == (None, True)


# ---------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------

A, B = ("message", "a", "", None), ("message", "b", "", None)


def message(data, id="", retry=None, event="message"):
    return (event, data, id, retry)


# One rule of the WHATWG standard's "Interpreting an event stream" in each line: the rule, a stream that
# tells whether it is kept, and the events of it: (event, data, id, retry).
STREAMS = [
    ("the standard's first example", b"data: YHOO\ndata: +2\ndata: 10\n\n", [message("YHOO\n+2\n10")]),
    ("the standard's second example",
     b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
     [message("first event", "1"), message("second event"), message(" third event")]),
    ("the standard's third example", b"data\n\ndata\ndata\n\ndata:", [message(""), message("\n")]),
    ("the standard's fourth example", b"data:test\n\ndata: test\n\n", [message("test"), message("test")]),
    # lines
    ("LF ends a line", b"data: a\ndata: b\n\n", [message("a\nb")]),
    ("CR ends a line", b"data: a\rdata: b\r\r", [message("a\nb")]),
    ("CRLF ends one line, not two", b"data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
    ("CRLF then CR is a blank line", b"data: a\r\n\rdata: b\n\n", [A, B]),
    ("CR then CRLF is a blank line", b"data: a\r\r\ndata: b\n\n", [A, B]),
    ("LF then CRLF is a blank line", b"data: a\n\r\ndata: b\n\n", [A, B]),
    ("LF then CR is a blank line", b"data: a\n\rdata: b\n\n", [A, B]),
    ("CRLF then LF is a blank line", b"data: a\r\n\ndata: b\n\n", [A, B]),
    ("a CR at the very end counts", b"data: a\n\r", [A]),
    ("the LF of a CRLF is no blank line", b"event: x\r\ndata: a\r\n\r\n", [message("a", event="x")]),
    ("many blank lines dispatch once", b"\n\r\n\rdata: a\n\n\n\r\n\r\r\n\n\ndata: b\n\n\n\n", [A, B]),
    ("a vertical tab ends no line", b"data: a\x0bdata: b\n\n", [message("a\x0bdata: b")]),
    ("a form feed ends no line", b"data: a\x0cdata: b\n\n", [message("a\x0cdata: b")]),
    ("FS, GS and RS end no line", b"data: a\x1cb\x1db\x1eb\n\n", [message("a\x1cb\x1db\x1eb")]),
    ("U+0085 ends no line", "data: a\u0085data: b\n\n".encode(), [message("a\u0085data: b")]),
    ("U+2028 ends no line", "data: a\u2028data: b\n\n".encode(), [message("a\u2028data: b")]),
    ("U+2029 ends no line", "data: a\u2029\u2029data: b\n\n".encode(), [message("a\u2029\u2029data: b")]),
    ("lines of any length", b"data: " + b"x" * 3000 + b"\n\n", [message("x" * 3000)]),
    # decoding
    ("one leading BOM is stripped", b"\xef\xbb\xbfdata: a\n\n", [A]),
    ("a BOM before a comment", b"\xef\xbb\xbf: x\ndata: a\n\n", [A]),
    ("a BOM before a blank line", b"\xef\xbb\xbf\n\ndata: a\n\n", [A]),
    ("a second BOM is part of the name", b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [B]),
    ("a later BOM is not stripped", b"data: a\n\n\xef\xbb\xbfdata: x\n\ndata: b\n\n", [A, B]),
    ("a BOM after a blank line is a later one", b"\n\n\xef\xbb\xbfdata: x\n\ndata: b\n\n", [B]),
    ("a BOM after the end of a line is a later one", b"\n\xef\xbb\xbfdata: x\n\ndata: b\n\n", [B]),
    ("a BOM in a value stays", b"data: \xef\xbb\xbfa\n\n", [message("\ufeffa")]),
    ("half a BOM is bad UTF-8", b"\xef\xbbdata: x\n\ndata: b\n\n", [B]),
    ("UTF-8 always", "data: é€\U0001f600\n\n".encode(), [message("é€\U0001f600")]),
    ("a bad byte is replaced", b"data: a\xffb\n\n", [message("a\ufffdb")]),
    ("a cut character is replaced once", b"data: \xf0\x9f\x98\ndata: \xe2\x82\n\n",
     [message("\ufffd\n\ufffd")]),
    ("overlong forms are replaced", b"data: \xc0\xafa\n\n", [message("\ufffd\ufffda")]),
    ("a surrogate is replaced", b"data: \xed\xa0\x80\n\n", [message("\ufffd\ufffd\ufffd")]),
    ("Latin-1 is bad UTF-8, and no field is lost", b"data: caf\xe9\ndata: b\n\n", [message("caf\ufffd\nb")]),
    ("NUL in data stays", b"data: a\0b\n\n", [message("a\0b")]),
    # comments
    ("a comment is ignored", b": ping\ndata: a\n: pong\n\n", [A]),
    ("a bare colon is a comment", b":\ndata: a\n:\n\n", [A]),
    ("a comment may look like a field", b":data: x\ndata: a\n\n", [A]),
    ("a comment alone is no event", b": ping\n\n:\n\n: pong\n\ndata: a\n\n", [A]),
    ("a comment ends no event", b"data: a\n:\ndata: b\n\n", [message("a\nb")]),
    # fields
    ("one space after the colon is stripped", b"data:  a\n\n", [message(" a")]),
    ("no space is needed", b"data:a\n\n", [A]),
    ("a tab is not stripped", b"data:\ta\n\n", [message("\ta")]),
    ("trailing spaces stay", b"data: a \n\n", [message("a ")]),
    ("the first colon alone splits", b"data: a:b: c\n\n", [message("a:b: c")]),
    ("a colon may start the value", b"data::a\n\n", [message(":a")]),
    ("a line without a colon is a name", b"data\n\n", [message("")]),
    ("names are compared as they stand", b"Data: x\n DATA: x\ndata : x\n data: x\ndata: a\n\n", [A]),
    ("unknown names are ignored", b"foo: x\nbar\ndatax: y\ndat: z\ndata: a\n\n", [A]),
    ("a line of spaces is a name, no blank line", b"data: a\n \ndata: b\n\n", [message("a\nb")]),
    # data
    ("data lines are joined with LF", b"data: a\ndata:\ndata: b\ndata\n\n", [message("a\n\nb\n")]),
    ("the last LF of the data is stripped once", b"data: a\ndata:\ndata:\n\n", [message("a\n\n")]),
    ("an empty data line is dispatched", b"data:\n\n", [message("")]),
    ("without a data line nothing is dispatched", b"event: x\nid: 7\nretry: 9\n\ndata: a\n\n",
     [message("a", "7", 9)]),
    ("an unfinished event at the end is dropped", b"data: a\n\ndata: b\n", [A]),
    ("an unfinished line at the end is dropped", b"data: a\n\ndata: b", [A]),
    ("an empty stream has no events", b"", []),
    # event
    ("the event's name", b"event: x\ndata: a\n\n", [message("a", event="x")]),
    ("the name counts after the data, too", b"data: a\nevent: x\n\n", [message("a", event="x")]),
    ("the last name counts", b"event: x\nevent: y\ndata: a\n\n", [message("a", event="y")]),
    ("an empty name is message", b"event: x\nevent:\ndata: a\n\n", [A]),
    ("the name is forgotten after an event", b"event: x\ndata: a\n\ndata: b\n\n",
     [message("a", event="x"), B]),
    ("the name is forgotten after an empty event", b"event: x\n\ndata: b\n\n", [B]),
    # id
    ("the id is kept over events", b"id: 1\ndata: a\n\ndata: b\n\n", [message("a", "1"), message("b", "1")]),
    ("the id of an event without data is kept", b"id: 1\n\ndata: a\n\n", [message("a", "1")]),
    ("the last id counts", b"id: 1\ndata: a\nid: 2\n\n", [message("a", "2")]),
    ("an empty id resets it", b"id: 1\ndata: a\n\nid:\ndata: b\n\n", [message("a", "1"), B]),
    ("an id without a colon resets it", b"id: 1\ndata: a\n\nid\ndata: b\n\n", [message("a", "1"), B]),
    ("an id with NUL is ignored", b"id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n",
     [message("a", "1"), message("b", "1")]),
    ("one space of an id is stripped", b"id:  1 \ndata: a\n\n", [message("a", " 1 ")]),
    # retry
    ("retry is a number", b"retry: 1500\ndata: a\n\ndata: b\n\n",
     [message("a", "", 1500), message("b", "", 1500)]),
    ("retry may be zero and have leading ones", b"retry: 0\ndata: a\n\nretry: 007\ndata: b\n\n",
     [message("a", "", 0), message("b", "", 7)]),
    ("the last retry counts", b"retry: 1\nretry: 2\ndata: a\n\n", [message("a", "", 2)]),
    ("retry of anything but digits is ignored",
     b"retry: 5\nretry: +1\nretry: -1\nretry: 1.5\nretry: 1e3\nretry: 0x1\nretry: 1_0\nretry: 1 \nretry:  1\n"
     b"retry: x\ndata: a\n\n", [message("a", "", 5)]),
    ("an empty retry is ignored", b"retry: 5\nretry:\nretry\ndata: a\n\n", [message("a", "", 5)]),
    ("retry of other digits is ignored", "retry: 5\nretry: ١\nretry: ²\ndata: a\n\n".encode(),
     [message("a", "", 5)]),
]


@pytest.mark.parametrize("stream, events", [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS])
def test_rule_with_the_stream_in_one_piece_and_a_byte_at_a_time_and_cut_at_random(stream, events):
    assert list(xtask.iter_sse([stream])) == events
    assert list(xtask.iter_sse(stream[n : n + 1] for n in range(len(stream)))) == events
    rng = random.Random(stream)
    for _ in range(30):
        cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(1, 8)))  # empty pieces, too
        pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)])]
        assert list(xtask.iter_sse(pieces)) == events, pieces


def test_all_rules_after_one_another_cut_at_random():
    """The state that one stream leaves must not change how the next is cut."""
    rng = random.Random(7)
    for _ in range(60):
        chosen = rng.sample([stream for _, stream, _ in STREAMS if len(stream) < 200], 8)
        whole = b"\n\n".join([*chosen, b""])
        expected = list(xtask.iter_sse([whole]))
        cuts = sorted(rng.randrange(len(whole)) for _ in range(20))
        pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)])]
        assert list(xtask.iter_sse(pieces)) == expected, pieces


def test_the_sample_stream_parses_however_it_is_cut():
    stream = sample_stream()
    for size in (1, 7, 1000, len(stream)):
        events = list(xtask.iter_sse(stream[n : n + size] for n in range(0, len(stream), size)))
        assert [json.loads(event.data) for event in events] == sample_envelopes()
        assert [(event.event, event.id, event.retry) for event in events] == [
            ("message", str(number), 2000) for number in range(1, 13)]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n", b"\r\n\r", b"\n\r"], ids=repr)
@pytest.mark.parametrize("size", [1, 100])
def test_an_event_is_handed_over_before_more_is_asked_for(end, size):
    asked = []

    def chunks():
        stream = b"data: a" + end
        for start in range(0, len(stream), size):
            yield stream[start : start + size]
        asked.append("more")

    events = xtask.iter_sse(chunks())
    assert next(events).data == "a" and not asked
    assert list(events) == [] and asked


def test_an_event_is_a_named_tuple():
    [event] = xtask.iter_sse([b"id: 1\nevent: x\nretry: 5\ndata: a\n\n"])
    assert event == xtask.ServerSentEvent(event="x", data="a", id="1", retry=5)
    assert (event.event, event.data, event.id, event.retry) == tuple(event)


def test_a_retry_of_thousands_of_digits_raises_nothing():
    [event] = xtask.iter_sse([b"retry: " + b"9" * 6000 + b"\ndata: a\n\n"])
    assert event.data == "a"


SHAPES = {
    "one long line": lambda size: b"data: " + b"x" * size + b"\n\n",
    "one event of many lines": lambda size: b"data: x\n" * (size // 8) + b"\n",
    "one event of many CRLF lines": lambda size: b"data: x\r\n" * (size // 9) + b"\r\n",
    "one comment": lambda size: b":" + b"x" * size + b"\n\n",
    "many small events": lambda size: b"data: x\n\n" * (size // 9),
    "many lines that are no field": lambda size: b"x\r" * (size // 2) + b"\r",
    "blank lines": lambda size: b"\n" * size,
    "no end of a line": lambda size: b"x" * size,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_byte_a_chunk_takes_steps_in_proportion_to_the_bytes(shape):
    """A step is a Python call, or a byte that a method of bytes or str had before it: no clock is read."""

    def steps(size):
        stream, count = SHAPES[shape](size), 0

        def profile(frame, kind, argument):
            nonlocal count
            owner = getattr(argument, "__self__", None) if kind == "c_call" else None
            count += 1 + (len(owner) if isinstance(owner, (bytes, bytearray, str)) else 0)

        chunks = [stream[n : n + 1] for n in range(len(stream))]
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            for _ in xtask.iter_sse(chunks):
                pass
        finally:
            sys.setprofile(before)
        return count

    few, many = steps(4_000), steps(16_000)
    assert many < 5 * few and many < 60 * 16_000


LIMIT = 16 * MIB


def pieces_of(stream, size):
    return (stream[n : n + size] for n in range(0, len(stream), size))


@pytest.mark.parametrize("size", [64 * 1024, 64 * MIB], ids=["64 KiB a chunk", "one chunk"])
@pytest.mark.parametrize("part", [b"data: " + b"x" * 994, b": " + b"x" * 998, b"data: " + b"\xc3\xa9" * 497],
                         ids=["data", "comment", "é"])
def test_an_event_may_be_16_mib_with_every_byte_counted(part, size):
    line = part + b"\n"
    fits, bursts = line * (LIMIT // len(line) - 1), line * (LIMIT // len(line) + 1)
    list(xtask.iter_sse(pieces_of(b"data: a\n\n" + fits + b"\ndata: b\n\n", size)))
    events = xtask.iter_sse(pieces_of(b"data: a\n\n" + bursts + b"\ndata: b\n\n", size))
    assert next(events).data == "a", "what came before it is not lost"
    with pytest.raises(ValueError, match="16 MiB"):
        list(events)


def test_bad_bytes_count_once_however_they_are_replaced():
    line = b"data: " + b"\xff" * 9 * MIB + b"\n\n"
    assert [len(event.data) for event in xtask.iter_sse([line + line])] == [9 * MIB, 9 * MIB]


def test_many_events_in_one_chunk_may_be_more_than_16_mib():
    stream = (b"data: " + b"x" * MIB + b"\n\n") * 20
    assert [len(event.data) for event in xtask.iter_sse([stream])] == [MIB] * 20


@pytest.mark.parametrize("piece", [b"x" * 64 * 1024, b":x\r\n" * 16 * 1024], ids=["line", "comments"])
def test_an_event_that_never_ends_is_given_up_after_16_mib(piece):
    taken = []

    def chunks():
        while True:
            taken.append(len(piece))
            yield piece

    with pytest.raises(ValueError, match="16 MiB"):
        list(xtask.iter_sse(chunks()))
    assert LIMIT < sum(taken) <= LIMIT + 2 * 64 * 1024


def test_of_an_event_that_never_ends_each_byte_counts_even_one_at_a_time(monkeypatch):
    monkeypatch.setattr(xtask, "_MAX_EVENT", 1000)
    taken = []
    with pytest.raises(ValueError):
        list(xtask.iter_sse(taken.append(n) or b"\r\n:"[n % 3 : n % 3 + 1] for n in range(3, 3000)))
    assert 1000 <= len(taken) <= 1001


# ---------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------

LOG = {"id": "t-1", "created_at": "2026-03-02T09:15:41Z", "messages": [], "user": None}
ITEM = {"id": "t-9", "agent_id": "a-1", "organization_id": ORG, "status": "completed", "new": 1}
FILES = ["/a.txt", "/b.pdf", "/c.PNG"]


def play(connection, number):
    """Answers each route of the platform; files are text."""
    for method, path, _, body in iter(connection.request, None):
        if path in FILES:
            connection.answer(200, b"content of " + path.encode(), [("Content-Type", "text/plain")])
        elif "/executions/history/" in path:
            connection.answer(200, [ITEM])
        elif "/activity/" in path:
            connection.answer(200, LOG)
        elif method == "DELETE":
            connection.answer(200, task_dict(status="stopped"))
        elif path.endswith("/events"):
            connection.start_stream()
            of = "t/1" if "%2F" in path else "t-1"
            connection.event("task_finished", task_dict(status="completed"), of)
            return
        else:
            connection.answer(200, {**task_dict(), **(json.loads(body) if method == "PATCH" else {})})


STATUS, UPDATE = ("GET", "/agent-execution/t-1/status", None), "/agent-execution/t-1/update"
HISTORY, NEW = "/agent-execution/executions/history/a-1", "/agent-execution/a-1"
HI = {"text": "Hi"}
ROUTES = [  # owner, call, arguments, options, the requests that arrive: method, path, JSON body
    ("class", "load", ("t-1",), {}, [STATUS]),
    ("class", "load", ("../a/b?c=d#e é%2f",), {},
     [("GET", "/agent-execution/..%2Fa%2Fb%3Fc%3Dd%23e%20%C3%A9%252f/status", None)]),
    ("class", "create", ("a-1", "Hi"), {}, [("POST", NEW, {"input": HI})]),
    ("class", "create", ("a/1", "Hi"), {}, [("POST", "/agent-execution/a%2F1", {"input": HI})]),
    ("class", "create", ("a-1", "Hi", ["https://e.com/a"]), {},
     [("POST", NEW, {"input": {"text": "Hi", "files": ["https://e.com/a"]}})]),
    ("class", "create", ("a-1", "Hi"), {"id": "t-1", "title": None, "output_format": "json", "newer": [1]},
     [("POST", NEW, {"input": HI, "id": "t-1", "output_format": "json", "newer": [1]})]),
    ("class", "create", ("a-1", "Hi"),
     {"output_format": xtask.OutputFormat.Markdown, "events_streaming": True, "run_locally": False,
      "output_schema": {"a": None}},
     [("POST", NEW, {"input": HI, "output_format": "markdown", "events_streaming": True, "run_locally": False,
                     "output_schema": {"a": None}})]),
    ("class", "create", ("a-1", "Hi"), {"user": {"email": "a@e.com"}},
     [("POST", NEW, {"input": {"text": "Hi", "user": {"email": "a@e.com"}}})]),
    ("class", "create", ("a-1", "Hi"), {"user": xtask.User(email="a@e.com", first_name="Ada")},
     [("POST", NEW, {"input": {"text": "Hi", "user": {"email": "a@e.com", "first_name": "Ada"}}})]),
    ("class", "list", ("a-1",), {}, [("GET", HISTORY, None)]),
    ("class", "list", ("a 1",),
     {"user_id": "u&1", "status": xtask.AgentExecutionStatus.Error, "internal_status": None},
     [("GET", "/agent-execution/executions/history/a%201?user_id=u%261&status=error", None)]),
    ("class", "list", ("a-1",), {"parent_task_id": "p", "triggering_agent_id": "g", "internal_status": "x"},
     [("GET", HISTORY + "?parent_task_id=p&triggering_agent_id=g&internal_status=x", None)]),
    ("item", "load", (), {}, [("GET", "/agent-execution/t-9/status", None)]),
    ("task", "save", (), {}, [STATUS]),
    ("changed task", "save", (), {}, [("PATCH", UPDATE, {"title": "New"})]),
    ("task", "set_status", ("completed",), {}, [("PATCH", UPDATE, {"status": "completed"})]),
    ("task", "set_status", ("executing",), {}, [("PATCH", UPDATE, {"status": "executing"})]),
    ("changed task", "set_status", (xtask.AgentExecutionStatus.Failed, "No"), {},
     [("PATCH", UPDATE, {"status": "failed", "result": "No", "title": "New"})]),
    ("task", "stop", (), {}, [("DELETE", "/agent-execution/t-1", None)]),
    ("task", "reload", (), {}, [STATUS]),
    ("done task", "wait_finished", (), {}, []),
    ("task", "get_activity_log", (), {}, [("GET", "/activity/a-1/t-1", None)]),
    ("task", "get_files", (), {}, []),
    ("task", "get_images", (), {}, []),
    ("task", "get_human_readable_files", (), {}, [("GET", "/a.txt", None)]),
    ("task", "to_message", (), {}, [("GET", "/a.txt", None)]),
]
ANSWERS = {  # what a call returns, beside the calls that return a task
    "list": lambda got: [type(item) for item in got] == [xtask.TasksListItem] and got[0].to_dict() == ITEM,
    "get_activity_log": lambda got: type(got) is xtask.AgentActivityThread and got.to_dict() == LOG,
    "get_files": lambda got: [url[-6:] for url in got] == ["/b.pdf"],
    "get_images": lambda got: [url[-6:] for url in got] == ["/c.PNG"],
    "get_human_readable_files": lambda got: [sorted(file) for file in got] == [["content", "url"]] and (
        got[0]["content"], got[0]["url"][-6:]) == ("content of /a.txt", "/a.txt"),
    "to_message": lambda got: got.startswith("Hi\nFiles: http") and got.endswith('"content of /a.txt"}'),
}


def arrived(server):
    return [(method, path, json.loads(body) if body else None) for method, path, _, body in server.requests]


@both_faces
@pytest.mark.parametrize("owner, name, arguments, options, requests", ROUTES,
                         ids=numbered(row[1] for row in ROUTES))
def test_what_arrives_of_a_call_and_its_twin(owner, name, arguments, options, requests, face, no_agno):
    with RawServer(play) as server:
        config = configuration(server.url + "/", trusted_file_hosts=["127.0.0.1"])
        if owner == "class":
            got = call(face, xtask.Task, name, *arguments, configuration=config, **options)
        elif owner == "item":
            [item] = xtask.Task.list("a-1", configuration=config)
            server.requests.clear()
            got = call(face, item, name)
        else:
            asked = {"text": "Hi", "files": [server.url + path for path in FILES]}
            task = make_task(config, input=asked, status="stopped" if owner == "done task" else "executing")
            task.title = "New" if owner == "changed task" else None
            got = call(face, task, name, *arguments, **options)
            assert name in ANSWERS or got is task
        config.close()
    assert arrived(server) == requests
    assert ANSWERS.get(name, lambda got: type(got) is xtask.Task and got.configuration is config)(got)
    for _, path, headers, body in server.requests:
        assert headers["host"] == f"127.0.0.1:{server.port}" and "x-agent-version" not in headers
        assert headers["user-agent"] == f"xtask/{xtask.__version__}"
        assert headers.get("x-api-key") == (None if path in FILES else KEY)
        assert path in FILES or headers["accept"] == "application/json"
        assert headers.get("content-type") == ("application/json" if body else None)


@both_faces
def test_an_agents_version_goes_into_its_header(face):
    with RawServer(play) as server:
        call(face, xtask.Task, "create", "a-1", "Hi", configuration=server.config, agent_version=3)
    [(_, _, headers, body)] = server.requests
    assert headers["x-agent-version"] == "3" and json.loads(body) == {"input": HI}


@pytest.mark.parametrize("version", ["1\n2", "\u2603"])
def test_an_agents_version_that_no_header_can_carry_is_refused_before_any_request(version):
    with RawServer(play) as server:
        with pytest.raises(ValueError, match="agent_version"):
            xtask.Task.create("a-1", "Hi", configuration=server.config, agent_version=version)
        assert server.connections == 0


@pytest.mark.parametrize("organization", [None, "org/2"])
@both_faces
def test_events_are_asked_for_under_the_events_root(face, organization):
    with RawServer(play) as server, xtask.Configuration(KEY, organization, server.url) as config:
        task = make_task(config, id="t/1")
        before = as_json(task.to_dict())
        finished = call(face, task, "events")
    [(method, path, headers, body)] = server.requests
    organization = organization.replace("/", "%2F") if organization else ORG  # the task's own serves
    assert (method, path, body) == ("GET", f"/{organization}/agent-execution/t%2F1/events", b"")
    assert (headers["accept"], headers["cache-control"]) == ("text/event-stream", "no-store")
    assert headers["x-api-key"] == KEY
    assert "last-event-id" not in headers and headers["connection"] == "close"
    assert headers["user-agent"] == f"xtask/{xtask.__version__}"
    assert [event.type for event in finished] == ["task_finished"]
    assert as_json(task.to_dict()) == before, "events do not change the task"


@pytest.mark.parametrize("streaming", [False, None])
def test_events_of_a_task_without_streaming_are_refused_at_the_call(streaming):
    task = make_task(configuration("http://127.0.0.1:9"), events_streaming=streaming)
    for name in ("events", "aevents"):
        with pytest.raises(ValueError, match="events_streaming"):
            getattr(task, name)()


# base_url, the root of the API and the root of the events of an organization "org-1"
CLOUD, STAGING = "agent-controller.xpander.ai", "agent-controller.stg.xpander.ai"
ROOTS = [
    (None, "https://inbound.xpander.ai", f"https://{CLOUD}/org-1"),
    ("https://inbound.xpander.ai/", "https://inbound.xpander.ai", f"https://{CLOUD}/org-1"),
    ("inbound.stg.xpander.ai", "https://inbound.stg.xpander.ai", f"https://{STAGING}/org-1"),
    ("https://agent-controller.my.com", "https://agent-controller.my.com/org-1", "the same"),
    ("https://my-agent-controller-2.com", "https://my-agent-controller-2.com/org-1", "the same"),
    ("http://10.0.0.1:9016", "http://10.0.0.1:9016/org-1", "the same"),
    ("https://my.com/agent-controller/", "https://my.com/agent-controller/org-1", "the same"),
    ("https://my.com/agent-controller/v2", "https://my.com/agent-controller/v2/org-1", "the same"),
    ("https://my.com/a/agent-controller", "https://my.com/a/agent-controller", "the same/org-1"),
    ("https://my.com/agent-controllers", "https://my.com/agent-controllers", "the same/org-1"),
    ("https://my.com/x9016", "https://my.com/x9016", "the same/org-1"),
    ("http://localhost:8085", "http://localhost:8085", "http://localhost:9016/org-1"),
    ("http://127.0.0.1:8085/", "http://127.0.0.1:8085", "http://localhost:9016/org-1"),
    ("http://[::1]:8085", "http://[::1]:8085", "http://localhost:9016/org-1"),
    ("http://my.com:8085", "http://my.com:8085", "the same/org-1"),
    ("http://localhost:8086", "http://localhost:8086", "the same/org-1"),
    ("my.com:8000/base//", "https://my.com:8000/base", "the same/org-1"),
    ("my.com/base?x=1#y", "https://my.com/base", "the same/org-1"),
    ("my.com/base?x=http://y", "https://my.com/base", "the same/org-1"),
    ("https://MY.com/Base/", "https://my.com/Base", "the same/org-1"),
    ("https://evil.com/inbound.xpander.ai", "https://evil.com/inbound.xpander.ai", "the same/org-1"),
    ("https://inbound.xpander.ai.evil.com", "https://inbound.xpander.ai.evil.com", "the same/org-1"),
]


@pytest.mark.parametrize("base_url, api, events", ROOTS, ids=[str(root[0]) for root in ROOTS])
def test_the_roots_of_the_api_and_of_the_events(base_url, api, events, certificate, monkeypatch):
    asked = []

    def everywhere(connection, number):
        """A proxy that answers for every host, over TLS behind a CONNECT."""
        for method, target, headers, _ in iter(connection.request, None):
            if method == "CONNECT":
                assert target in (headers["host"], headers["host"] + ":443")
                connection.send("HTTP/1.1 200 OK\r\n\r\n")
                with certificate.context.wrap_socket(connection.sock, server_side=True) as connection.sock:
                    return everywhere(connection, number)
            asked.append(target if "://" in target else "https://" + headers["host"] + target)
            if target.endswith("/events"):
                connection.start_stream()
                return connection.event("task_finished", task_dict(status="completed"))
            connection.answer(200, task_dict())

    trusting = ssl.create_default_context(cafile=certificate.file)
    trusting.check_hostname = False
    with RawServer(everywhere) as proxy, configuration(base_url, ssl_context=trusting) as config:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        list(xtask.Task.load("t-1", config).events())
    events = events.replace("the same", api)
    assert asked == [api + STATUS[1], events + "/agent-execution/t-1/events"]


def test_an_agent_controller_is_asked_with_the_organization_in_its_path():
    with RawServer(play) as server, configuration(server.url + "/agent-controller/") as config:
        task = xtask.Task.load("t-1", config)
        task.title = "x"
        task.save().stop().get_activity_log()
        xtask.Task.create("a-1", "Hi", configuration=config)
        xtask.Task.list("a-1", configuration=config)
        list(task.events())
    root = "/agent-controller/org-1"
    assert [(method, path.replace(root, "", 1)) for method, path, _, _ in server.requests] == [
        ("GET", STATUS[1]), ("PATCH", UPDATE), ("DELETE", "/agent-execution/t-1"),
        ("GET", "/activity/a-1/t-1"),
        ("POST", NEW), ("GET", HISTORY), ("GET", "/agent-execution/t-1/events")]
    assert all(path.startswith(root + "/") for _, path, _, _ in server.requests)


def test_a_configuration_reads_the_environment_when_it_is_made(monkeypatch):
    monkeypatch.setenv("XPANDER_API_KEY", "  from-environment\n")
    monkeypatch.setenv("XPANDER_ORGANIZATION_ID", "   ")
    monkeypatch.setenv("XPANDER_BASE_URL", "")
    monkeypatch.setenv("IS_STG", "true")
    made = xtask.Configuration()
    assert (made.api_key, made.organization_id) == ("from-environment", None)
    assert made.base_url.rstrip("/") == "https://inbound.stg.xpander.ai"
    monkeypatch.setenv("XPANDER_BASE_URL", " my.com/ ")
    monkeypatch.setenv("XPANDER_ORGANIZATION_ID", "o")
    monkeypatch.setenv("XPANDER_API_KEY", "other")
    assert (made.api_key, made.organization_id) == ("from-environment", None)
    newer = xtask.Configuration()
    assert (newer.api_key, newer.organization_id) == ("other", "o")
    assert newer.base_url.rstrip("/") == "https://my.com"
    given = xtask.Configuration("k", "p", "http://h")
    assert (given.api_key, given.organization_id, given.base_url) == ("k", "p", "http://h")
    monkeypatch.delenv("XPANDER_BASE_URL")
    monkeypatch.setenv("IS_STG", "false")
    assert xtask.Configuration().base_url.rstrip("/") == "https://inbound.xpander.ai"


def test_the_shared_configuration_is_that_of_the_environment_as_it_is(monkeypatch):
    made = []
    for name, value in (("IS_STG", "false"), ("IS_STG", "true"), ("XPANDER_BASE_URL", "http://h"),
                        ("XPANDER_API_KEY", "k"), ("XPANDER_ORGANIZATION_ID", "o")):
        monkeypatch.setenv(name, value)
        made.append(make_task(None).configuration)
        assert make_task(None).configuration is made[-1]
    cloud = ["https://inbound.xpander.ai", "https://inbound.stg.xpander.ai"]
    assert [config.base_url for config in made] == cloud + ["http://h"] * 3
    assert (made[-1].api_key, made[-1].organization_id) == ("k", "o") and len(set(map(id, made))) == 5


@pytest.fixture
def restless_threads():
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_come_at_once_share_the_configuration_of_the_environment(monkeypatch, restless_threads):
    def make():
        together.wait(10)
        made.append(make_task(None).configuration)

    for number in range(20):
        monkeypatch.setenv("XPANDER_BASE_URL", f"http://only-here-{number}.test")
        together, made = threading.Barrier(8), []
        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(made) == 8 and len(set(map(id, made))) == 1


def test_a_configuration_is_frozen_has_the_defaults_of_the_contract_and_shows_no_key():
    made = configuration("http://h")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.api_key = "x"
    assert (made.timeout, made.max_retries, made.idle_timeout) == (60.0, 2, 90.0)
    assert (made.ssl_context, tuple(made.trusted_file_hosts)) == (None, ())
    assert KEY not in repr(made) + str(made) and "org-1" in repr(made)
    assert configuration("http://h", trusted_file_hosts="Files.test").trusted_file_hosts == ("files.test",)
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made)
    with pytest.raises(TypeError):
        xtask.Configuration("k", "o", "http://h", 5)


@pytest.mark.parametrize("name", ["timeout", "idle_timeout"])
@pytest.mark.parametrize("seconds", [0, 0.0, -1, None, "5", float("nan"), float("inf"), 2**32 / 1000])
def test_a_time_that_nobody_can_wait_is_refused(name, seconds):
    with pytest.raises(ValueError, match="^timeout and idle_timeout are seconds: above 0"):
        xtask.Configuration(KEY, ORG, **{name: seconds})


@pytest.mark.parametrize("number", [None, "2", 1.5])
def test_a_number_of_retries_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="^max_retries must be a whole number$"):
        xtask.Configuration(KEY, ORG, max_retries=number)


@pytest.mark.parametrize("key", ["kéy-s3cret", "a\ns3cret", "a\0s3cret", "s3cret\u200bkey", "s3cret\x7f",
                                 "s3cret\ns3cret", "s3cret\0", "s3cret\u200b"])
def test_a_key_of_anything_but_printable_ascii_is_refused_and_not_printed(key):
    for url in (None, "http://127.0.0.1:9"):
        with pytest.raises(ValueError, match="ASCII") as caught:
            xtask.Configuration(key, ORG, url)
        assert "s3cret" not in everything_told(caught.value)


@both_faces
def test_without_a_configuration_all_calls_share_the_environments(face, monkeypatch):
    with RawServer(play) as server:
        for name, value in (("API_KEY", "key-1"), ("ORGANIZATION_ID", ORG), ("BASE_URL", server.url)):
            monkeypatch.setenv("XPANDER_" + name, value)
        tasks = [call(face, xtask.Task, "load", "t-1") for _ in range(3)]
        tasks[0].title = "x"
        call(face, tasks[0], "save")
        [item] = call(face, xtask.Task, "list", "a-1")
        call(face, item, "load")
        assert server.connections == 1
        shared = tasks[0].configuration
        assert tasks[2].configuration is shared and xtask.Task.from_dict(task_dict()).configuration is shared
        monkeypatch.setenv("XPANDER_API_KEY", "key-2")
        other = call(face, xtask.Task, "load", "t-1")
        call(face, tasks[0], "reload")
        assert other.configuration is not shared and tasks[0].configuration is shared
        shared.close()
        other.configuration.close()
    keys = [headers["x-api-key"] for _, _, headers, _ in server.requests]
    assert keys == ["key-1"] * 6 + ["key-2", "key-1"]


def test_load_on_an_instance_takes_its_second_argument_and_names_reload():
    with RawServer(play) as server:
        task = make_task(configuration("http://127.0.0.1:9"))
        other = task.load("t-1", server.config)
        assert other is not task and other.configuration is server.config
        task.configuration = server.config
        assert task.reload() is task and task.configuration is server.config
    assert "reload" in xtask.Task.load.__doc__


# -- save


def change_nothing(task):
    """Values of another form, the same as JSON."""
    task.title, task.input.files = task.title, list(task.input.files)
    task.output_schema = dict(reversed(task.output_schema.items()))
    task.status = "executing"


def append_to_extra(task):
    task.extra["tokens"]["used"].append(2)


CHANGES = [  # what is done to a task, and the body of the save that follows (None: a reload)
    ("nothing", lambda task: None, None),
    ("other forms of the same", change_nothing, None),
    ("there and back", lambda task: (setattr(task, "title", "x"), setattr(task, "title", "Sums")), None),
    ("a field", lambda task: setattr(task, "internal_status", "half"), {"internal_status": "half"}),
    ("None is null", lambda task: setattr(task, "title", None), {"title": None}),
    ("a list deep inside", lambda task: task.input.files.append("b"),
     {"input": {"text": "Hi", "files": ["a", "b"]}}),
    ("a key deep inside", lambda task: task.output_schema.update(x=1),
     {"output_schema": {"b": 1, "a": 1, "x": 1}}),
    ("True is not 1", lambda task: task.output_schema.update(a=True), {"output_schema": {"b": 1, "a": True}}),
    ("1.0 is not 1", lambda task: task.output_schema.update(a=1.0), {"output_schema": {"b": 1, "a": 1.0}}),
    ("a field that was not sent", lambda task: setattr(task, "worker_id", "w"), {"worker_id": "w"}),
    ("an enum", lambda task: setattr(task, "output_format", xtask.OutputFormat.Json),
     {"output_format": "json"}),
    ("a date", lambda task: setattr(task, "finished_at", utc(2026, 1, 2)),
     {"finished_at": "2026-01-02T00:00:00+00:00"}),
    ("a user", lambda task: setattr(task.input, "user", xtask.User(email="e")),
     {"input": {"text": "Hi", "files": ["a"], "user": {"email": "e"}}}),
    ("a key without a field", append_to_extra, {"tokens": {"used": [1, 2]}}),
    ("a new key", lambda task: task.extra.update(newer=True), {"newer": True}),
    ("two fields", lambda task: (setattr(task, "title", ""), setattr(task, "is_continuous", True)),
     {"title": "", "is_continuous": True}),
]


@pytest.mark.parametrize("change, body", [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_save_sends_only_what_differs_from_what_the_server_last_told(change, body):
    told = task_dict(title="Sums", input={"text": "Hi", "files": ["a"]}, output_schema={"b": 1, "a": 1},
                     tokens={"used": [1]}, created_at="2025-11-06T06:41:54.048626999Z")
    with answering((200, told)) as server:
        task = xtask.Task.load("t-1", server.config)
        change(task)
        assert task.save() is task
        assert as_json(task.to_dict()) == as_json(told), "the server's answer is taken"
        task.save()
    sent = [("GET", None) if body is None else ("PATCH", as_json(body))]
    got = [(method, body and as_json(body)) for method, _, body in arrived(server)]
    assert got == [("GET", None), *sent, ("GET", None)]


def test_what_is_nested_hundreds_deep_is_loaded_changed_and_saved():
    deep = json.loads('{"a": ' * 600 + "1" + "}" * 600)
    with answering((200, task_dict(payload_extension=deep))) as server:
        task = xtask.Task.load("t-1", server.config)
        task.title = "New"
        task.save()
        task.payload_extension["b"] = 2
        task.save()
    assert arrived(server)[1][2] == {"title": "New"}
    assert arrived(server)[2][2] == {"payload_extension": {**deep, "b": 2}}


def test_a_status_that_moved_on_the_server_is_not_rolled_back():
    with answering((200, task_dict()), (200, task_dict(status="completed", result="4"))) as server:
        task = xtask.Task.load("t-1", server.config)
        task.internal_status = "reading"
        task.save()
    assert arrived(server)[1][2] == {"internal_status": "reading"}
    assert (task.status, task.result, task.internal_status) == ("completed", "4", None)


@both_faces
@pytest.mark.parametrize(
    "failure", [(500, b"no"), (422, {"detail": []}), (200, b"<html>"), (200, b"null"), "broken"], ids=str)
def test_a_failed_save_loses_nothing(failure, face):
    def refuse(connection):
        return connection.reset() if failure == "broken" else connection.answer(*failure)

    answers = [refuse, (200, task_dict(title="New")), (200, task_dict(title="New"))]
    if failure == (200, b"null"):  # saved, but nothing told: the state is asked for
        answers.insert(1, (503, b""))
    with answering(*answers) as server, configuration(server.url, max_retries=0) as config:
        task = make_task(config, title="Old")
        task.title, task.input.files = "New", ["a"]
        with pytest.raises(xtask.ModuleException):
            call(face, task, "save")
        assert (task.title, task.input.files) == ("New", ["a"])
        server.requests.clear()
        call(face, task, "save")
        task.save()
    asked = {"text": "Hi", "files": ["a"]}
    assert [(method, body) for method, _, body in arrived(server)] == [
        ("PATCH", {"title": "New", "input": asked}), ("GET", None)]


def test_a_field_set_back_while_the_save_was_under_way_stays_so():
    def change_back(connection):
        task.title = None
        task.mcp_servers.clear()
        connection.answer(200, task_dict(title="New", mcp_servers=[{"name": "a"}]))

    with answering(change_back, (200, task_dict())) as server:
        task = make_task(server.config)
        task.title, task.mcp_servers = "New", [{"name": "a"}]
        task.save()
        assert (task.title, task.mcp_servers) == (None, [])
        task.save()
    assert [body for _, _, body in arrived(server)] == [
        {"title": "New", "mcp_servers": [{"name": "a"}]}, {"title": None, "mcp_servers": []}]


@both_faces
def test_a_field_changed_while_the_save_was_under_way_keeps_its_change(face):
    saving, changed = threading.Event(), threading.Event()

    def hold(connection):
        saving.set()
        assert changed.wait(10)
        connection.answer(200, task_dict(title="Saved", internal_status="told", tokens=1, result="4"))

    final = (200, task_dict(title="Newer", internal_status="told"))
    with answering(hold, final) as server:
        task = make_task(server.config, tokens=0)
        task.title = "Saved"
        thread = threading.Thread(target=call, args=(face, task, "save"))
        thread.start()
        assert saving.wait(10)
        task.title, task.extra["new"] = "Newer", True
        task.input.files.append("late")
        changed.set()
        thread.join(10)
        assert (task.title, task.input.files, task.extra) == ("Newer", ["late"], {"tokens": 1, "new": True})
        assert (task.internal_status, task.result) == ("told", "4"), "the other fields are the server's"
        task.save()
    assert [body for _, _, body in arrived(server)] == [
        {"title": "Saved"}, {"title": "Newer", "input": {"text": "Hi", "files": ["late"]}, "new": True}]


def test_what_is_taken_out_of_extra_while_the_save_is_under_way_is_the_servers_again():
    def take_out(connection):
        del task.extra["tokens"]
        connection.answer(200, task_dict(title="New", tokens=2))

    with answering(take_out) as server:
        task = make_task(server.config, tokens=1)
        task.title = "New"
        assert task.save().extra == {"tokens": 2}


def test_a_status_that_could_not_be_set_is_kept_and_sent_by_the_next_save():
    with answering((403, {"detail": "Not yours"}), (200, task_dict(status="executing"))) as server:
        task = make_task(server.config)
        with pytest.raises(xtask.ModuleException):
            task.set_status("executing")
        assert type(task.status) is xtask.AgentExecutionStatus
        task.save()
    assert [body for _, _, body in arrived(server)] == [{"status": "executing"}] * 2


@pytest.mark.parametrize("answer", [(204, b""), (200, b"")], ids=["204", "empty"])
def test_a_save_that_is_answered_with_nothing_asks_for_the_state(answer):
    with answering(answer, (200, task_dict(title="New", result="4"))) as server:
        task = make_task(server.config)
        task.title = "New"
        assert task.save() is task and task.result == "4"
    assert [method for method, *_ in arrived(server)] == ["PATCH", "GET"]


@both_faces
def test_an_internal_status_may_have_255_characters(face):
    with RawServer(play) as server:
        task = make_task(server.config, internal_status="old")
        for name, arguments in (("save", ()), ("set_status", ("failed",))):
            task.internal_status = "é" * 256
            with pytest.raises(ValueError, match="^internal_status .*255"):
                call(face, task, name, *arguments)
        assert server.connections == 0
        task.internal_status = "é" * 255
        assert call(face, task, "save").internal_status == "é" * 255
        assert server.connections == 1


@both_faces
@pytest.mark.parametrize("status", ["finished", "", "Completed", None, 5])
def test_a_status_that_is_none_is_refused_before_any_request(status, face):
    with RawServer(play) as server:
        task = make_task(server.config)
        with pytest.raises(ValueError, match="is not a status: use one of pending, .*, completed, stopped$"):
            call(face, task, "set_status", status)
        assert task.status == "executing" and server.connections == 0


@both_faces
def test_a_status_that_could_not_be_set_is_sent_by_the_next_save(face):
    with answering((500, b""), (200, task_dict(status="failed", result="No"))) as server:
        task = make_task(server.config)
        with pytest.raises(xtask.ModuleException):
            call(face, task, "set_status", "failed", "No")
        call(face, task, "save")
    assert [body for _, _, body in arrived(server)] == [{"status": "failed", "result": "No"}] * 2


def test_what_has_no_form_in_json_is_refused_before_any_request():
    with RawServer(play) as server:
        task = make_task(server.config)
        task.extra["share"] = float("nan")
        with pytest.raises(ValueError, match="JSON"):
            task.save()
        assert server.connections == 0


def test_a_result_that_is_empty_text_is_sent_and_one_that_is_not_given_is_not():
    with RawServer(play) as server:
        make_task(server.config, result="old").set_status("completed", "")
        make_task(server.config, result="old").set_status("completed")
    assert [body for _, _, body in arrived(server)] == [
        {"status": "completed", "result": ""}, {"status": "completed"}]


@both_faces
def test_a_reload_drops_what_was_not_saved(face):
    with answering((200, task_dict(title="Server's", newer=1))) as server:
        task = make_task(server.config, older=1)
        task.title, task.worker_id = "Mine", "w"
        assert call(face, task, "reload") is task
        assert task.to_dict() == task_dict(title="Server's", newer=1) and task.worker_id is None


def test_a_change_made_while_a_save_had_nothing_to_send_stays():
    asked, go_on = threading.Event(), threading.Event()

    def script(connection, number):
        connection.request()
        asked.set()
        go_on.wait(5)
        connection.answer(200, task_dict(title="old"))

    with RawServer(script) as server:
        task = make_task(server.config, title="old")
        saving = threading.Thread(target=task.save)
        saving.start()
        assert asked.wait(5)
        task.title = "new"
        go_on.set()
        saving.join(5)
        assert task.title == "new"


# -- stop, wait, list, log


@both_faces
@pytest.mark.parametrize("answer", [(204, b""), (200, b""), (200, b"null")], ids=["204", "empty", "null"])
def test_a_stop_without_a_body_asks_for_the_status(answer, face):
    with answering(answer, (200, task_dict(status="stopped"))) as server:
        task = make_task(server.config)
        assert call(face, task, "stop") is task and task.status == "stopped"
    assert [method for method, *_ in server.requests] == ["DELETE", "GET"]


@pytest.mark.parametrize("broken", ["no answer", 503])
def test_not_there_to_a_second_try_of_a_stop_is_settled_by_the_status(broken, pauses):
    def lose(connection):
        return connection.answer(503, b"") if broken == 503 else connection.reset()

    with answering(lose, (404, {"detail": "gone"}), (200, task_dict(status="stopped"))) as server:
        assert make_task(server.config).stop().status == "stopped"
    assert [method for method, *_ in server.requests] == ["DELETE", "DELETE", "GET"]


@both_faces
def test_not_there_to_the_first_try_of_a_stop_is_an_error(face):
    with answering((404, {"detail": "Task not found"})) as server:
        task = make_task(server.config)
        with pytest.raises(xtask.ModuleException, match="Task not found"):
            call(face, task, "stop")
    assert len(server.requests) == 1 and task.status == "executing"


@both_faces
def test_waiting_looks_again_with_a_growing_pause_until_the_status_is_final(face, pauses, monkeypatch):
    async def note(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    with answering(*[(200, task_dict())] * 12, (200, task_dict(status="failed", result="No"))) as server:
        task = make_task(server.config)
        assert call(face, task, "wait_finished") is task and (task.status, task.result) == ("failed", "No")
    assert [path for _, path, *_ in server.requests] == [STATUS[1]] * 13
    pauses = [pause for pause in pauses if pause]
    assert pauses[0] == 0.5 and pauses[-1] == 5.0 and pauses == sorted(pauses) and len(set(pauses)) > 4


@both_faces
def test_waiting_too_long_is_a_timeout_error_that_says_how_the_task_stands(face):
    with RawServer(play) as server:
        with pytest.raises(TimeoutError, match="^task t-1 is still executing after 0.05 s$"):
            call(face, make_task(server.config), "wait_finished", timeout=0.05)
    assert server.requests


def test_an_item_of_a_list_is_typed():
    items = [{**ITEM, "created_at": "2026-03-02T09:15:41Z", "status": "queued"},
             {"id": "t-2", "status": None}]
    with answering((200, items)) as server:
        got = xtask.Task.list("a-1", configuration=server.config)
    assert [item.to_dict() for item in got] == items
    assert (got[0].status, type(got[0].status), got[1].status) == ("queued", xtask.AgentExecutionStatus, None)
    assert got[0].created_at == utc(2026, 3, 2, 9, 15, 41) and got[0].extra == {"new": 1}


@both_faces
@pytest.mark.parametrize(
    "answer", [(404, {"detail": "No log"}), (200, b""), (200, b"null"), (200, b"{}"), (204, b"")], ids=str)
def test_no_activity_log_yet_is_a_404(answer, face):
    with answering(answer) as server:
        with pytest.raises(xtask.ModuleException) as caught:
            call(face, make_task(server.config), "get_activity_log")
    assert caught.value.status_code == 404


@both_faces
def test_a_whole_life_on_the_local_platform(face):
    with local(quick) as platform:
        task = call(face, xtask.Task, "create", "agent", "2+2?", ["https://e.com/a.txt"], id="mine",
                    title="Sums", events_streaming=True, configuration=platform.config)
        assert (task.id, task.agent_id, task.title, task.input.text) == ("mine", "agent", "Sums", "2+2?")
        assert call(face, task, "wait_finished", 10).result == "4"
        task.output_schema = {"x": [1]}
        assert call(face, task, "save").output_schema == {"x": [1]}
        [item] = call(face, xtask.Task, "list", "agent", status="completed", configuration=platform.config)
        assert call(face, item, "load") == task == call(face, xtask.Task, "load", "mine", platform.config)
        assert [entry.role for entry in call(face, task, "get_activity_log").messages] == ["user", "agent"]
        assert call(face, task, "stop").status == "completed"


@needs_whole_file
def test_leaving_the_local_platform_does_not_wait_for_a_client_that_does_not_read():
    def talkative(task):
        for _ in range(400):
            yield "chunk", "x" * 100_000  # far more than the buffers between take

    with local(talkative) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config, events_streaming=True)
        with contextlib.closing(task.events()) as events:
            assert next(events).type == "connected" and task.wait_finished(30).is_finished
            began = time.monotonic()
            platform.__exit__()
            assert time.monotonic() - began < 10


@needs_whole_file
def test_an_id_of_a_task_that_still_runs_ends_its_run_on_the_local_platform():
    def endless(task):
        while True:
            yield "chunk", "x"
            time.sleep(0.01)

    with local(endless) as platform:
        options = {"configuration": platform.config, "events_streaming": True}
        task = xtask.Task.create("a-1", "Hi", **options)
        with contextlib.closing(task.events()) as events:
            next(events)
            assert xtask.Task.create("a-1", "And?", id=task.id, **options).id == task.id
            assert [event.data.status for event in events if event.type == "task_finished"] == ["stopped"]


@needs_whole_file
def test_however_an_agent_ends_its_task_does_on_the_local_platform():
    def leaving(task):
        yield "chunk", "x"
        sys.exit("out")

    with local(leaving) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config).wait_finished(10)
        assert (task.status, task.result) == ("failed", "out")
        task.input = None
        assert task.save().input is None and task.get_activity_log().user is None


@needs_whole_file
def test_a_result_that_is_no_json_fails_its_task_on_the_local_platform():
    def agent(task):
        yield "chunk", "x"
        return {1, 2}

    with local(agent) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config).wait_finished(10)
    assert task.status == "failed" and "JSON" in task.result


@needs_whole_file
def test_events_that_look_like_the_platforms_own_leave_no_message_in_the_local_log():
    def agent(task):
        yield "task_created", {"input": {"text": "not the user's"}}
        yield "task_finished", {"status": "completed"}
        return "4"

    with local(agent) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config).wait_finished(10)
        said = [entry.content.text for entry in task.get_activity_log().messages]
    assert (task.status, said) == ("completed", ["Hi", "4"])


@needs_whole_file
@pytest.mark.parametrize("event, said", [
    (("chunk", "x", {"k": 1}), "unpack"), ("chunk", "unpack"), ({1}, "unpack"), (("chunk", {1}), "JSON"),
    (None, "None")], ids=str)
def test_what_is_no_event_fails_the_local_task(event, said):
    def agent(task):
        task["tags"] = {1}  # the agent's own copy
        yield event

    with local(agent) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config).wait_finished(10)
        assert task.status == "failed" and said in task.result
        assert [entry.content.text for entry in task.get_activity_log().messages] == ["Hi"]


@needs_whole_file
def test_nobody_is_served_after_the_end_of_the_local_platform():
    with local(quick, max_retries=0) as platform:
        task = xtask.Task.create("a-1", "Hi", configuration=platform.config).wait_finished(10)
        platform.__exit__()
        with pytest.raises(xtask.ModuleException, match="refused"):
            task.reload()


@needs_whole_file
@pytest.mark.parametrize("body", [b"{", b"[1]", b'"x"'])
def test_what_is_no_task_is_a_400_on_the_local_platform(body):
    with local(quick) as platform:
        url, headers = platform.url + "/agent-execution/a-1", {"x-api-key": "local-key"}
        request = urllib.request.Request(url, body, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.error.HTTPError) as caught:
            opener.open(request, timeout=10)
        with caught.value as answer:
            assert answer.code == 400 and "JSON" in json.loads(answer.read())["detail"]


def late(state, held):
    """A server of one task, whose first answer to a method waits for `go_on`, and its effect, too."""
    def script(connection, number):
        for method, _, _, body in iter(connection.request, None):
            told = json.dumps(state)
            if method == held and not server.held.is_set():
                server.held.set()
                server.go_on.wait(10)
            if method != "GET":
                changes = json.loads(body or b'{"status": "stopped"}')
                state.update(changes, updated_at=str(len(server.requests)))
                told = json.dumps(state)
            connection.answer(200, json.loads(told))

    server = RawServer(script)
    server.held, server.go_on = threading.Event(), threading.Event()
    return server


def in_background(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread








class Trap(dict):
    """Does something when it is copied, or made JSON of: a thread that is as quick as can be."""

    do = staticmethod(lambda: None)

    def items(self):
        self.do()
        return super().items()

    def __iter__(self):  # which newer versions of PyPy make JSON by
        self.do()
        return super().__iter__()

    def __deepcopy__(self, memo):
        self.do()
        return dict(self)










@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_task_that_was_being_saved_at_a_fork_can_be_saved_in_the_child():
    with late(task_dict(), "PATCH") as server:
        task = make_task(server.config)
        task.title = "x"
        saving = in_background(task.save)
        assert server.held.wait(10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is what this is about
            child = os.fork()
        if not child:
            signal.alarm(20)  # which ends it
            with contextlib.suppress(BaseException):
                os._exit(0 if task.save().title == "x" else 1)
            os._exit(2)
        status = os.waitpid(child, 0)[1]
        server.go_on.set()
        saving.join(10)
    assert status == 0


@pytest.mark.parametrize("twin", [
    lambda task: task.areload(), lambda task: task.await_finished(), lambda task: task.aget_activity_log(),
    lambda task: xtask.Task.acreate("a-1", "Hi", configuration=task.configuration),
    lambda task: task.aget_human_readable_files()], ids=list("rwlcf"))
def test_a_twin_that_is_cancelled_ends_its_thread_too(twin):
    with RawServer(lambda connection, _: [connection.request(), connection.wait_closed()]) as server:
        config = configuration(server.url, timeout=60, trusted_file_hosts=["127.0.0.1"])
        task = make_task(config, input={"text": "Hi", "files": [server.url + "/a.txt"]})

        async def main():
            waiting = asyncio.ensure_future(twin(task))
            while not server.requests:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()

        began = time.monotonic()
        asyncio.run(main())  # which waits for the threads of the twins
        assert time.monotonic() - began < 10 and len(server.requests) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="create_task() takes no context")
def test_a_twin_that_is_cancelled_hangs_up_on_no_other_call_of_its_context():
    def script(connection, number):
        connection.request()
        if number < 3:
            return connection.wait_closed()
        connection.answer(200, task_dict(title="new"))

    async def main():
        waiting = []
        for count in (1, 2):
            waiting.append(asyncio.get_running_loop().create_task(task.areload(), context=context))
            while len(server.requests) < count:
                await asyncio.sleep(0.01)
        for twin in waiting:
            twin.cancel()
            await asyncio.wait([twin])

    context = contextvars.copy_context()
    with RawServer(script) as server:
        task = make_task(configuration(server.url))
        asyncio.run(main())
        assert context.run(task.reload).title == "new"




def test_what_a_subclass_leaves_out_of_its_pickles_is_reloaded_and_not_sent():
    class Lean(xtask.Task):
        def __getstate__(self):
            return {"id": self.id}

    answers = [task_dict(payload_extension={"n": number}) for number in (1, 2)]
    with answering(*[(200, answer) for answer in answers]) as server:
        task = Lean.from_dict(task_dict(payload_extension={"n": 0}), server.config)
        assert task.reload().payload_extension == {"n": 1}
        task.title = "x"
        task.save()
    assert arrived(server)[-1][2] == {"title": "x"} and task.payload_extension == {"n": 2}


def test_a_status_that_was_refused_here_is_sent_by_the_next_save():
    with answering((200, task_dict(internal_status="short"))) as server:
        task = make_task(server.config)
        task.internal_status = "x" * 256
        with pytest.raises(ValueError, match="255"):
            task.set_status("executing")
        task.internal_status = "short"
        task.save()
    assert arrived(server)[-1][2] == {"internal_status": "short", "status": "executing"}


def test_stopping_keeps_unsaved_changes_for_the_next_save():
    told = task_dict(title="old")

    def script(connection, number):
        while connection.request():
            method, _, _, body = connection.server.requests[-1]
            changed = json.loads(body) if method == "PATCH" else {}
            connection.answer(200, {**told, "status": "stopped", **changed})

    with RawServer(script) as server:
        task = xtask.Task.from_dict(told, server.config)
        task.title, task.status = "mine", "paused"
        assert task.stop() is task and (task.status, task.title) == ("stopped", "mine")
        task.save()
    assert [json.loads(body or b"null") for _, _, _, body in server.requests] == [None, {"title": "mine"}]


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

INVALID = {"detail": [{"loc": ["body", "input", 0], "msg": "field required", "type": "missing"},
                      {"loc": ["query"], "msg": "too long", "type": "long"}]}
PAGE = b"<!DOCTYPE html><html><body>nginx</body></html>"
HTML = [("Content-Type", "text/html")]
NO_JSON, NO_TASK = "not JSON", "where a task was expected"
ANSWERED = [  # status, body, headers; status_code, what the text says, details
    (400, {"detail": "Not deployed"}, (), 400, "[400] Not deployed", {"detail": "Not deployed"}),
    (401, {"message": "Invalid key"}, (), 401, "[401] Invalid key", {"message": "Invalid key"}),
    (403, {"error": "Not yours", "code": 7}, (), 403, "[403] Not yours", {"error": "Not yours", "code": 7}),
    (404, {"detail": "Task not found"}, (), 404, "[404] Task not found", {"detail": "Task not found"}),
    (409, {"detail": None, "message": " Busy "}, (), 409, "[409] Busy",
     {"detail": None, "message": " Busy "}),
    (400, {"error": "third", "message": "second", "detail": "first"}, (), 400, "[400] first",
     {"error": "third", "message": "second", "detail": "first"}),
    (400, {"detail": {"deep": 1}}, (), 400, "[400] Bad Request", {"detail": {"deep": 1}}),
    (422, INVALID, (), 422, "[422] body.input.0: field required; query: too long", INVALID),
    (422, {"detail": []}, (), 422, None, {"detail": []}),
    (422, {"detail": [{"loc": "query"}, {"msg": "bad"}]}, (), 422, "[422] query: invalid; None: bad",
     {"detail": [{"loc": "query"}, {"msg": "bad"}]}),
    (418, b"plain\r\n text", (), 418, "[418] plain text", None),
    (400, b"long " * 100, (), 400, "[400] " + "long " * 39 + "long ", None),
    (400, b"caf\xe9", (), 400, "[400] caf\ufffd", None),
    (400, b'"just text"', (), 400, "[400] just text", "just text"),
    (400, [1], (), 400, "[400] Bad Request", [1]),
    (400, b"null", (), 400, None, None),
    (500, {"detail": "Boom"}, (), 500, "[500] Boom", {"detail": "Boom"}),
    (500, b"", (), 500, "[500] Internal Server Error", None),
    (500, PAGE, HTML, 500, "[500] Internal Server Error", None),
    (403, PAGE, (), 403, "[403] Forbidden", None),
    (404, b'{"detail": "cut', (), 404, None, None),
    (599, b"", (), 599, None, None),
    (300, b"", (), 300, "[300] Multiple Choices", None),
    (200, PAGE, HTML, 500, "sent HTML that is not JSON", None),
    (200, b"sorry", HTML, 500, "sent HTML that is not JSON", None),
    (200, b'{"id": "t-1", "sta', (), 500, "sent something that is not JSON", None),
    (200, b"\xff\xfe\xfd", (), 500, NO_JSON, None),
    (200, b"[" * 100_000, (), 500, NO_JSON, None),
    (200, b"null", (), 500, NO_TASK, None),
    (200, b"", (), 500, NO_TASK, None),
    (200, [task_dict()], (), 500, NO_TASK, [task_dict()]),
    (200, b'"text"', (), 500, NO_TASK, "text"),
    (200, b"5", (), 500, NO_TASK, 5),
    (200, {"detail": "no task"}, (), 500, NO_TASK, {"detail": "no task"}),
    (200, {"id": 5}, (), 500, NO_TASK, {"id": 5}),
]


@both_faces
@pytest.mark.parametrize("status, body, headers, code, text, details", ANSWERED,
                         ids=numbered(row[0] for row in ANSWERED))
def test_an_answer_that_is_no_task_is_a_module_exception(status, body, headers, code, text, details, face):
    with answering((status, body, headers)) as server:
        with pytest.raises(xtask.ModuleException) as caught:
            call(face, xtask.Task, "load", "t-1", server.config)
    error = caught.value
    assert (error.status_code, error.answered) == (code, True)
    assert as_json(error.details) == as_json(details)
    if text:
        assert str(error) == text if text.startswith("[") else text in str(error)
    assert str(error) == f"[{code}] {error.description}" and "\n" not in str(error) and len(str(error)) <= 206
    assert "<html" not in str(error) and len(server.requests) == 1
    assert pickle.loads(pickle.dumps(error)).details == error.details
    if code != status:
        assert str(error).startswith(f"[500] 127.0.0.1:{server.port} sent "), "the host is named"


def half_a_head(connection):
    connection.send("HTTP/1.1 200 OK\r\nContent-Ty")


def broken_off(connection):
    connection.reset()


def half_a_line(connection):
    connection.send("HTT")


def half_a_body(connection):
    connection.send('HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"id": "t-1"}')


def half_a_chunk(connection):
    connection.send('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"id": "t-1"}\r\n')


def no_http(connection):
    connection.send("220 mail.example.com ESMTP\r\n\r\n")


def says_nothing(connection):
    connection.wait_closed()


@pytest.mark.parametrize(
    "failure", [broken_off, half_a_line, half_a_head, half_a_body, half_a_chunk, no_http, says_nothing],
    ids=lambda failure: failure.__name__)
@both_faces_at_once
def test_no_answer_or_half_of_one_is_a_500_that_no_server_said(failure, face):
    def script(connection, number):
        connection.request()
        failure(connection)

    with RawServer(script) as server, configuration(server.url, max_retries=0, timeout=0.3) as config:
        with pytest.raises(xtask.ModuleException) as caught:
            call(face, xtask.Task, "load", "t-1", config)
    error = caught.value
    assert (error.status_code, error.details, error.answered) == (500, None, False)
    assert f"127.0.0.1:{server.port}" in str(error) and len(str(error)) > 30 and KEY not in str(error)
    assert error.__cause__ is not None, "the cause is chained"
    assert failure is not says_nothing or "timeout" in str(error)


BY_ITS_END = [  # method, head of an answer without a body or a length; what comes of it, methods that arrived
    ("GET", "HTTP/1.0 404 Not Found", "[404] Not Found", ["GET"]),
    ("GET", "HTTP/1.1 401 Unauthorized", "[401] Unauthorized", ["GET"]),
    ("POST", "HTTP/1.0 500 Internal Server Error", "[500] Internal Server Error", ["POST"]),
    ("DELETE", "HTTP/1.0 200 OK", "completed", ["DELETE", "GET"]),
    ("PATCH", "HTTP/1.1 200 OK\r\nServer: x", "completed", ["PATCH", "GET"]),
    ("POST", "HTTP/1.0 429 Too Many Requests", "completed", ["POST", "POST"]),
    ("GET", "HTTP/1.0 503 Service Unavailable\r\nRetry-After: 7", "completed", ["GET", "GET"]),
]


@pytest.mark.parametrize("method, head, told, methods", BY_ITS_END)
def test_an_answer_without_a_body_that_ends_with_its_connection_is_an_answer(
        method, head, told, methods, pauses):
    def first(connection):
        connection.send(head + "\r\n\r\n")
        connection.sock.close()

    with answering(first, *[(200, task_dict(status="completed"))] * 2) as server:
        task = make_task(server.config)
        calls = {"GET": task.reload, "DELETE": task.stop, "PATCH": lambda: task.set_status("completed"),
                 "POST": lambda: xtask.Task.create("a-1", "Hi", configuration=server.config)}
        try:
            got = calls[method]().status
        except xtask.ModuleException as error:
            assert error.answered
            got = str(error)
    assert (got, [method for method, *_ in server.requests]) == (told, methods)
    assert "Retry-After" not in head or pauses == [7]


CUT_HEADS = ["HT", "HTTP/1.1 2", "HTTP/1.1 200 O", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nContent-Ty",
             "HTTP/1.1 103 Wait\r\n\r\nHTTP/1.1 2"]


@pytest.mark.parametrize("head", CUT_HEADS)
def test_an_answer_that_was_cut_off_in_its_head_is_a_broken_connection(head, pauses):
    def cut(connection):
        connection.send(head)
        connection.sock.close()

    with answering(cut, OK) as server:
        assert CALLS["GET"](server.config).internal_status == "saved"
    assert len(server.requests) == 2 and len(pauses) == 1


@both_faces
def test_a_refused_connection_names_the_host_and_the_reason(face):
    with refusing(max_retries=0) as config, pytest.raises(xtask.ModuleException) as caught:
        call(face, xtask.Task, "create", "a-1", "Hi", configuration=config)
    error = caught.value
    assert (error.status_code, error.answered) == (500, False)
    assert config.base_url.strip("/").partition("//")[2] in str(error) and "refused" in str(error).lower()
    assert isinstance(error.__cause__, ConnectionRefusedError)


EVERY_CALL = [
    ("class", "load", ("t-1",)), ("class", "create", ("a-1", "Hi")), ("class", "list", ("a-1",)),
    ("task", "save", ()), ("changed", "save", ()), ("task", "set_status", ("failed",)), ("task", "stop", ()),
    ("task", "reload", ()), ("task", "wait_finished", ()), ("task", "get_activity_log", ()),
]
every_call = pytest.mark.parametrize(
    "owner, name, arguments", EVERY_CALL, ids=[f"{owner}-{name}" for owner, name, _ in EVERY_CALL])


def call_with(config, face, owner, name, arguments):
    if owner == "class":
        return call(face, xtask.Task, name, *arguments, configuration=config)
    task = make_task(config)
    task.title = "New" if owner == "changed" else None
    return call(face, task, name, *arguments)


@both_faces
@every_call
@pytest.mark.parametrize("answer, code", [((403, {"detail": "Not yours"}), 403), ((200, b"5"), 500),
                                          ((200, PAGE), 500)], ids=["403", "number", "HTML"])
def test_every_call_and_its_twin_raises_what_the_server_says(owner, name, arguments, answer, code, face):
    with answering(answer) as server:
        with pytest.raises(xtask.ModuleException) as caught:
            call_with(server.config, face, owner, name, arguments)
    assert (caught.value.status_code, caught.value.answered) == (code, True)
    assert code == 500 or str(caught.value) == "[403] Not yours"
    assert len(server.requests) == 1


@both_faces
@every_call
def test_a_missing_key_says_what_to_set_and_sends_nothing(owner, name, arguments, face):
    with RawServer(play) as server:
        config = xtask.Configuration(None, ORG, server.url)
        with pytest.raises(xtask.ModuleException, match="XPANDER_API_KEY") as caught:
            call_with(config, face, owner, name, arguments)
        assert server.connections == 0
    assert (caught.value.status_code, caught.value.answered) == (401, False)


@both_faces
@every_call
def test_a_missing_organization_says_what_to_set_and_sends_nothing(owner, name, arguments, face):
    with RawServer(play) as server:
        config = xtask.Configuration(KEY, None, server.url + "/agent-controller")
        missing = r"^\[400\] No organization: set XPANDER_ORGANIZATION_ID or organization_id$"
        with pytest.raises(xtask.ModuleException, match=missing) as caught:
            call_with(config, face, owner, name, arguments)
        assert server.connections == 0
    assert (caught.value.status_code, caught.value.answered) == (400, False)


@both_faces
@pytest.mark.parametrize(
    "key, status, says", [(None, 401, "XPANDER_API_KEY"), (KEY, 400, "XPANDER_ORGANIZATION_ID")])
def test_events_without_a_key_or_any_organization_say_what_to_set(key, status, says, face):
    with RawServer(play) as server:
        task = make_task(xtask.Configuration(key, None, server.url), organization_id=None if key else ORG)
        with pytest.raises(xtask.ModuleException, match=says) as caught:
            call(face, task, "events")
        assert server.connections == 0
    assert (caught.value.status_code, caught.value.answered) == (status, False)


@both_faces
@pytest.mark.parametrize("empty", ["", "  ", None, 5])
@pytest.mark.parametrize("name, says", [("load", "task"), ("create", "agent_id"), ("list", "agent_id")])
def test_an_empty_id_is_a_value_error_and_no_request(name, says, empty, face):
    prompt = ["Hi"] if name == "create" else []
    with RawServer(play) as server:
        with pytest.raises(ValueError, match=f"^{says}.* must be a string that is not empty$"):
            call(face, xtask.Task, name, empty, *prompt, configuration=server.config)
        assert server.connections == 0


@both_faces
@pytest.mark.parametrize("id", ["", ".", ".."])
@pytest.mark.parametrize("name", ["save", "stop", "reload", "get_activity_log", "events"])
def test_a_task_with_an_id_that_no_path_can_hold_is_not_asked_for(name, id, face):
    with RawServer(play) as server:
        task = make_task(server.config)
        task.id = id
        with pytest.raises(ValueError, match="id"):
            call(face, task, name)
        assert server.connections == 0


@both_faces
def test_a_task_without_prompt_files_or_id_is_a_value_error_that_names_them(face):
    with RawServer(play) as server:
        for arguments, options in (((), {}), (("",), {}), (("", []), {"title": "x", "id": ""})):
            with pytest.raises(ValueError, match="prompt.*file_urls.*id"):
                call(face, xtask.Task, "create", "a-1", *arguments, configuration=server.config, **options)
        assert server.connections == 0
        call(face, xtask.Task, "create", "a-1", id="t-1", configuration=server.config)
        call(face, xtask.Task, "create", "a-1", file_urls=["https://e.com/a"], configuration=server.config)
    continued, files = (body for _, _, body in arrived(server))
    assert continued["id"] == "t-1" and files["input"]["files"] == ["https://e.com/a"]


@pytest.mark.parametrize("answer", [(200, {"items": []}), (200, [1]), (200, b"null"), (200, b"")], ids=str)
def test_a_list_that_is_none_is_a_module_exception(answer):
    with answering(answer) as server:
        with pytest.raises(xtask.ModuleException, match="a list") as caught:
            xtask.Task.list("a-1", configuration=server.config)
    assert caught.value.status_code == 500


@pytest.mark.parametrize(
    "url",
    ["ftp://my.com", "file:///etc/passwd", "http://", "https://user:s3cret@my.com", "http://my.com:port",
     "http://:8080"])
def test_a_base_url_that_is_none_is_a_value_error_at_once(url):
    with pytest.raises(ValueError) as caught:
        configuration(url)
    assert str(caught.value).startswith("base_url must be ") or url.endswith("port")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", [KEY, "s3cretly"])
def test_a_server_that_repeats_the_key_does_not_make_it_into_the_message(key):
    with answering((401, {"detail": f"Bad key {key}."})) as server:
        with pytest.raises(xtask.ModuleException) as caught:
            xtask.Task.load("t-1", configuration(server.url, api_key=key))
    assert (str(caught.value), caught.value.answered) == ("[401] Bad key ***.", True)
    assert key not in repr(caught.value)


# ---------------------------------------------------------------------------
# Streams: every event once, in order, to the end
# ---------------------------------------------------------------------------

def sse(type, data=None, id=None, task_id="t-1"):
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}data: {json.dumps({'type': type, 'task_id': task_id, 'data': data})}\n\n"


FINISHED = sse("task_finished", task_dict(status="completed", result="4"))


def plays(*parts, then=lambda connection: None):
    """A script: the head of a stream, these parts, and the end of the connection, unless `then` holds it."""
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
    """A server of the task t-1: its n-th connection for events runs the n-th script, later ones the last.

    `streams` holds the headers that asked for events, `task` and `status` are what the others are told.
    """
    def script(connection, _):
        for _, path, headers, _ in iter(connection.request, None):
            if path.endswith("/events"):
                server.streams.append(headers)
                return scripts[min(len(server.streams), len(scripts)) - 1](connection)
            connection.answer(server.status, server.task)

    with RawServer(script, context) as server:
        server.streams, server.status, server.task = [], 200, task_dict()
        server.config = configuration(server.url, **{"idle_timeout": 10, **options})  # 10: a safety net
        yield server


def follow(server, face="sync", each=lambda event: None, **changes):
    """All events of the server's task, by either face; `each` sees one as soon as it is there."""
    task = make_task(server.config, **changes)
    before = task.to_dict()
    events = []

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
    assert [e.type for e in events].count("task_finished") and events[-1].type == "task_finished"
    return events


def chunks(events):
    return [event.data for event in events if event.type == "chunk"]


# -- live


def test_first_event_is_there_while_the_server_holds_back_the_second():
    gate, released = threading.Event(), []

    def agent(task):
        yield "chunk", "1"
        released.append(gate.wait(5))
        yield "chunk", "2"

    with local(agent) as platform:
        task = xtask.Task.create("a-1", "Hi", events_streaming=True, configuration=platform.config)
        got = []
        for event in task.events():
            if event.type == "chunk":
                got.append((event.data, gate.is_set()))
                gate.set()
    assert got == [("1", False), ("2", True)] and released == [True]


def test_first_event_is_there_and_the_loop_is_free_while_the_server_holds_back_the_second():
    gate, released = threading.Event(), []

    def agent(task):
        yield "chunk", "1"
        released.append(gate.wait(5))
        yield "chunk", "2"

    async def tick():
        for _ in range(5):
            await asyncio.sleep(0.01)
        gate.set()

    async def main():
        task = await xtask.Task.acreate("a-1", "Hi", events_streaming=True, configuration=platform.config)
        async for event in task.aevents():
            if event.type == "chunk":
                got.append((event.data, gate.is_set()))
                if event.data == "1":
                    ticking = asyncio.ensure_future(tick())  # runs while the loop waits for the second
        await ticking

    got = []
    with local(agent) as platform:
        asyncio.run(main())
    assert got == [("1", False), ("2", True)] and released == [True]


PLAIN = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n{}\r\n"
CHUNKED = PLAIN.format("Transfer-Encoding: chunked\r\n")


def framed(text, more=""):
    """The text as one chunk of a chunked body."""
    return f"{len(text.encode()):x}{more}\r\n{text}\r\n"


SPLIT = sse("brand_new", {"a": "ü\u4e2d"}) + FINISHED
BODIES = [
    pytest.param(PLAIN.format("") + SPLIT, id="plain"),
    pytest.param(CHUNKED + framed(": hi\n\n") + framed(SPLIT) + "0\r\n\r\n", id="chunked"),
    pytest.param(CHUNKED + "".join(map(framed, SPLIT)) + "0\r\n\r\n", id="a-character-a-chunk"),
    pytest.param(CHUNKED + framed(SPLIT[:99], ";a=b") + framed(SPLIT[99:], " ;c"), id="chunk-extensions"),
]


@both_faces
@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("body", BODIES)
def test_an_answer_in_pieces_of_any_size_gives_the_same_events(face, body, size):
    def trickle(connection):
        data = body.encode()
        for start in range(0, len(data), size):
            connection.send(data[start:start + size])
        silent(connection)

    with feed(trickle, answers(410), idle_timeout=5) as server:
        events = follow(server, face)
    assert [(e.type, e.data) for e in events[:-1]] == [("brand_new", {"a": "ü\u4e2d"})]
    assert events[-1].data.result == "4"


# -- cut in the middle of an event


CUTS = [  # header of the answer, framing, end of the connection
    pytest.param("", str, RawConnection.reset, id="reset"),
    pytest.param("", str, lambda connection: None, id="closed"),
    pytest.param("Content-Length: 99999\r\n", str, lambda connection: None, id="short-of-its-length"),
    pytest.param("Transfer-Encoding: chunked\r\n", framed, lambda connection: None, id="chunked-unended"),
    pytest.param("Transfer-Encoding: chunked\r\n", framed, RawConnection.reset, id="chunked-reset"),
]


@both_faces
@pytest.mark.parametrize("header, frame, end", CUTS)
def test_cut_in_an_event_it_resumes_by_id_and_six_of_six_come_once_in_order(face, pauses, header, frame, end):
    third = threading.Event()

    def cut(connection):
        connection.send(PLAIN.format(header))
        for n in (1, 2, 3):
            connection.send(frame(sse("chunk", str(n), id=n)))
        assert third.wait(5)  # a reset may destroy what was not read yet
        connection.send(frame(sse("chunk", "4", id=4)[:-3]))
        end(connection)

    def resume(connection):
        after = int(server.streams[-1]["last-event-id"])  # 3: the fourth was not dispatched
        plays(*(sse("chunk", str(n), id=n) for n in range(after + 1, 7)), FINISHED)(connection)

    with feed(cut, resume) as server:
        events = follow(server, face, lambda event: third.set() if event.data == "3" else None)
        assert [headers.get("last-event-id") for headers in server.streams] == [None, "3"]
    assert chunks(events) == list("123456")
    assert events[-1].data.result == "4"


@both_faces
@pytest.mark.parametrize("again", ["123456", "456"], ids=["replayed-from-the-start", "not-replayed"])
def test_cut_in_an_event_without_ids_six_of_six_come_once_in_order(face, pauses, again):
    first = plays(sse("connected", {"n": 1}), *(sse("chunk", n) for n in "123"), sse("chunk", "4")[:-1])
    second = plays(sse("connected", {"n": 2}), *(sse("chunk", n) for n in again), FINISHED)
    with feed(first, second) as server:
        events = follow(server, face)
    assert chunks(events) == list("123456")
    assert [e.data for e in events if e.type == "connected"] == [{"n": 1}]


def test_over_tls_a_cut_stream_resumes_too(certificate, pauses):
    trusting = ssl.create_default_context(cafile=certificate.file)
    cut = plays(*(sse("chunk", n, id=n) for n in "123"), sse("chunk", "4", id=4)[:-3])
    rest = plays(*(sse("chunk", n) for n in "456"), FINISHED)
    with feed(cut, rest, context=certificate.context, ssl_context=trusting) as server:
        assert chunks(follow(server)) == list("123456")
        assert [headers.get("last-event-id") for headers in server.streams] == [None, "3"]


def test_equal_events_of_one_connection_are_kept_and_skipping_ends_with_the_first_new_one(pauses):
    first = plays(*(sse("chunk", n) for n in "aab"))
    second = plays(*(sse("chunk", n) for n in "aabXab"), FINISHED)
    with feed(first, second) as server:
        assert "".join(chunks(follow(server))) == "aabXab"


def test_the_last_ten_thousand_events_are_remembered_over_all_connections(pauses):
    first = plays("".join(sse("chunk", str(n)) for n in range(10_001)))
    replay = plays(sse("chunk", "10000"), sse("chunk", "1"))
    older = plays(sse("chunk", "0"), FINISHED)
    with feed(first, replay, older) as server:
        assert chunks(follow(server)) == [*map(str, range(10_001)), "0"]


def test_the_same_data_of_another_event_is_told_apart_byte_for_byte(pauses):
    one = 'data: {"type": "chunk", "task_id": "t-1", "data": 1}\n\n'
    with feed(plays(one), plays(one.replace(": 1}", ":  1}"), FINISHED)) as server:
        assert chunks(follow(server)) == [1, 1]


@both_faces
@pytest.mark.parametrize("last", [sse("task_finished", {"status": "completed"}), ""], ids=["sent", "made"])
def test_what_a_trimmed_task_leaves_out_is_as_the_server_spelled_it(face, last):
    with feed(plays(last)) as server:
        server.task = {"id": "t-1", "status": "completed"}
        event = follow(server, face)[-1]
    whole_task = task_dict(status="completed")
    required = ("id", "agent_id", "organization_id", "input", "created_at", "status")
    assert event.data.to_dict() == {name: whole_task[name] for name in required}
    assert event.organization_id == (None if last else ORG)


@needs_cpython
def test_the_error_of_a_stream_is_freed_with_its_last_reference():
    async def fail(task):
        try:
            async for _ in task.aevents():
                pass
        except xtask.ModuleException as error:
            return weakref.ref(error)

    with feed(answers(404)) as server:
        gc.disable()
        try:
            error = asyncio.run(fail(make_task(server.config)))
            assert error() is None
        finally:
            gc.enable()


@both_faces
def test_trimmed_tasks_that_come_together_do_not_fill_the_memory_with_copies_of_the_input(face):
    tracemalloc = pytest.importorskip("tracemalloc")  # CPython's
    trimmed = sse("task_updated", {"status": "executing"})
    with feed(plays(trimmed * 150 + FINISHED)) as server:
        task = make_task(server.config, input={"text": "x" * 200_000})

        async def take_all():
            return [event.data.input.text[:2] async for event in task.aevents()]

        tracemalloc.start()
        try:
            got = asyncio.run(take_all()) if face == "async" else [
                event.data.input.text[:2] for event in task.events()]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert got == [*["xx"] * 150, "Hi"] and peak < 20 * MIB


# -- ids and retry


@both_faces
def test_the_id_is_sent_again_when_a_connection_dropped_before_its_first_id(face, pauses):
    first, second, third = plays(sse("chunk", "1", id=7)), plays(": ping\n\n"), plays(sse("chunk", "2"))
    with feed(first, second, third, plays(FINISHED)) as server:
        assert chunks(follow(server, face)) == ["1", "2"]
        assert [headers.get("last-event-id") for headers in server.streams] == [None, "7", "7", "7"]


@pytest.mark.parametrize("id, sent", [
    pytest.param("a\x01b", None, id="control-character"),
    pytest.param("a\x7fb", None, id="delete"),
    pytest.param("a\tb", None, id="tab"),
    pytest.param("x" * 1025, None, id="over-1-KiB"),
    pytest.param("ü" * 513, None, id="over-1-KiB-as-UTF-8"),
    pytest.param("x" * 1024, "x" * 1024, id="1-KiB"),
    pytest.param("ü-\u4e2d", "ü-\u4e2d".encode().decode("latin-1"), id="UTF-8"),
    pytest.param("a\u00a0b", "a\u00a0b".encode().decode("latin-1"), id="no-break-space"),
    pytest.param("", None, id="empty-resets"),
])
def test_an_id_that_no_header_can_carry_is_not_sent_and_breaks_nothing(pauses, id, sent):
    first = plays(sse("chunk", "0", id=6), sse("chunk", "1", id=id))
    with feed(first, plays(sse("chunk", "2"), FINISHED)) as server:
        assert chunks(follow(server)) == ["0", "1", "2"]
        assert [headers.get("last-event-id") for headers in server.streams] == [None, sent]


def test_retry_0_gives_at_most_ten_connections_a_second():
    times = []
    first = plays("retry: 0\n\n", then=lambda connection: times.append(time.monotonic()))
    last = plays(FINISHED, then=lambda connection: times.append(time.monotonic()))
    with feed(first, first, first, last) as server:
        follow(server)
    assert len(times) == 4 and times[-1] - times[0] >= 0.3


@pytest.mark.parametrize("retry, low, high", [
    ("0", 0.1, 0.1), ("7", 0.1, 0.1), ("250", 0.25, 0.25), ("3000", 3, 3), ("86400000", 30, 30),
    ("9" * 400, 30, 30), ("soon", 0.1, 30), ("", 0.1, 30),
])
def test_the_pause_after_a_stream_is_the_servers_retry_from_a_tenth_to_30_seconds(pauses, retry, low, high):
    # the second connection does not name it: what the first one said still holds
    with feed(plays(f"retry: {retry}\n\n"), plays(sse("chunk", "1")), plays(FINISHED)) as server:
        follow(server)
    assert len(pauses) == 2 and all(low <= pause <= high for pause in pauses)


# -- silence


@pytest.mark.parametrize("start", [plays(then=silent), silent], ids=["after-its-head", "before-its-head"])
@both_faces_at_once
def test_after_idle_timeout_the_status_is_loaded_and_the_stream_reopened(face, pauses, start):
    with feed(start, plays(sse("chunk", "1"), FINISHED), idle_timeout=0.2, max_retries=0) as server:
        assert chunks(follow(server, face)) == ["1"]
        paths = [path.rpartition("/")[2] for _, path, _, _ in server.requests]
        assert paths == ["events", "status", "events"]
        assert server.closed.get(timeout=5) == 1  # the silent one


def test_keep_alive_comments_count_as_life():
    def breathe(connection):
        connection.start_stream()
        for _ in range(9):
            time.sleep(0.1)
            connection.send(":\n\n")
        connection.send(FINISHED)

    with feed(breathe, idle_timeout=0.6) as server:
        follow(server)
        assert len(server.streams) == len(server.requests) == 1


# -- what counts as a failure


@both_faces
def test_twenty_clean_closes_do_not_end_the_stream_while_the_task_executes(face, pauses):
    with feed(*[plays()] * 20, plays(sse("chunk", "1"), FINISHED), max_retries=1) as server:
        assert chunks(follow(server, face)) == ["1"]
        assert len(server.streams) == 21 and len(pauses) == 20


@both_faces
@pytest.mark.parametrize("status", [429, 500, 502, 503, 599])
def test_failed_connections_in_a_row_end_it_with_their_status(face, pauses, status):
    with feed(plays(sse("chunk", "1")), answers(status, {"detail": "down"}), max_retries=1) as server:
        got = []
        with pytest.raises(xtask.ModuleException) as caught:
            follow(server, face, got.append)
        assert (caught.value.status_code, caught.value.description) == (status, "down")
        assert chunks(got) == ["1"] and len(server.streams) == 3


@both_faces
def test_refused_connections_in_a_row_end_it_without_an_answer(face, pauses):
    with refusing(max_retries=3) as config, pytest.raises(xtask.ModuleException) as caught:
        follow(types.SimpleNamespace(config=config), face)
    assert (caught.value.status_code, caught.value.answered) == (500, False)
    assert "127.0.0.1" in str(caught.value) and isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert len(pauses) == 3


@both_faces
@pytest.mark.parametrize("head", [*CUT_HEADS, "", None], ids=repr)
def test_a_connection_that_ends_before_its_answer_is_followed_by_a_status_load(head, face, pauses):
    def end(connection):
        return connection.reset() if head is None else connection.send(head)

    with feed(plays(sse("chunk", "1", id=1)), *[end] * 4, plays(FINISHED), max_retries=1) as server:
        assert chunks(follow(server, face)) == ["1"]
        assert [headers.get("last-event-id") for headers in server.streams] == [None, *["1"] * 5]
        assert pauses == [0.5] * 5 and [path for _, path, *_ in server.requests].count(STATUS[1]) == 5
    with feed(plays(sse("chunk", "1")), end) as server:
        server.task = task_dict(status="completed", result="4")
        assert follow(server, face)[-1].data.result == "4" and len(server.streams) == 1


def test_the_pause_grows_from_the_servers_retry_over_connections_that_failed(pauses):
    with feed(plays("retry: 4000\n\n"), answers(503), answers(503), answers(503), plays(FINISHED),
              max_retries=3) as server:
        follow(server)
    assert pauses[0] == 4 and 4 <= pauses[1] <= 8 <= pauses[2] <= 16 <= pauses[3] <= 30


def test_an_event_resets_the_count_of_failures(pauses):
    down, up = answers(503), [plays(sse("chunk", n)) for n in "123"]
    broken = RawConnection.reset
    with feed(down, up[0], down, up[1], down, up[2], broken, plays(FINISHED), max_retries=1) as server:
        assert chunks(follow(server)) == list("123")


def test_the_pause_grows_over_failed_connections_and_is_jittered(pauses):
    with feed(*[answers(503)] * 6, plays(FINISHED), max_retries=6) as server:
        follow(server)
        first = list(pauses)
    with feed(*[answers(503)] * 6, plays(FINISHED), max_retries=6) as server:
        follow(server)
    assert len(first) == 6 and first[0] < first[2] < first[4] and all(0 < pause <= 30 for pause in pauses)
    assert pauses[:6] != pauses[6:]


@pytest.mark.parametrize("status, value, pause", [
    (429, "3", 3), (503, "7", 7), (500, "2", 2), (429, "61", None), (503, "3600", None),
])
def test_retry_after_is_obeyed_up_to_a_minute(pauses, status, value, pause):
    with feed(answers(status, b"", [("Retry-After", value)]), plays(FINISHED)) as server:
        if pause is None:
            with pytest.raises(xtask.ModuleException):
                follow(server)
            assert pauses == [] and len(server.streams) == 1
        else:
            follow(server)
            assert pauses == [pause]


@both_faces
@pytest.mark.parametrize("script, status, says", [
    *((answers(status, {"detail": "no way"}), status, "no way") for status in (400, 401, 403, 404, 410, 422)),
    (answers(200, b"<html>Sign in</html>", [("Content-Type", "text/html")]), 500, "text/html"),
    (answers(200, {"id": "t-1"}), 500, "application/json"),
    (answers(302, b"", [("Location", "http://127.0.0.2:9/")]), 302, "redirects"),
])
def test_other_answers_raise_at_once(face, pauses, script, status, says):
    with feed(script) as server:
        with pytest.raises(xtask.ModuleException, match=says) as caught:
            follow(server, face)
        assert caught.value.status_code == status
        assert len(server.requests) == 1 and pauses == []


@pytest.mark.parametrize("then", [lambda connection: connection.wait_closed(), repeats(" ")],
                         ids=["silent", "trickling"])
def test_an_error_whose_body_does_not_end_is_raised_with_what_it_said(then, monkeypatch):
    def script(connection, number):
        connection.request()
        connection.send('HTTP/1.1 401 no\r\n\r\n{"detail": "bad key"}')
        then(connection)

    assert xtask._REFUSAL_SECONDS == 2
    monkeypatch.setattr(xtask, "_REFUSAL_SECONDS", 0.2)  # the same with less patience
    with RawServer(script) as server:
        started = time.monotonic()
        with pytest.raises(xtask.ModuleException, match=r"\[401\] bad key"):
            list(make_task(server.config).events())
        assert time.monotonic() - started < 5  # not idle_timeout, which is 90 s




def test_a_key_in_the_content_type_of_a_stream_does_not_make_it_into_the_message():
    with feed(answers(200, b"", [("Content-Type", f"text/{KEY}")])) as server:
        says = r" The stream's response is 200 text/\*\*\*, not 200 text/event-stream$"
        with pytest.raises(xtask.ModuleException, match=says):
            follow(server)


NO_ENVELOPES = ["no JSON", "{}", '{"type": 5}', '["type"]', '"type"', "null", '{"type": "chunk"} {}',
                '{"type": "chunk"', '{"type": ["chunk"]}', "[" * 100_000]


@both_faces
def test_what_is_no_envelope_is_skipped_with_a_warning_and_nothing_else_is(face, caplog):
    parts = [f"data: {text}\n\n" for text in NO_ENVELOPES]
    spaced = 'data:  \t{"type": "newer", "data": 1} \n\n'
    with feed(plays(*parts, spaced, sse("chunk", "1"), *parts, FINISHED)) as server:
        events = follow(server, face)
    assert [event.type for event in events] == ["newer", "chunk", "task_finished"]
    warned = [record for record in caplog.records if record.name == xtask.__name__]
    assert len(warned) == 2 * len(NO_ENVELOPES) and {record.levelname for record in warned} == {"WARNING"}
    assert warned[0].getMessage() == "skipped what is not an event: 7 characters that are no envelope"


def test_good_connections_between_those_that_fail_end_the_row(pauses):
    quiet, failing = plays(": nothing yet\n\n"), answers(503)
    with feed(failing, quiet, failing, quiet, failing, quiet, plays(FINISHED), max_retries=1) as server:
        assert [event.type for event in follow(server)] == ["task_finished"]
        assert len(server.streams) == 7


@pytest.mark.parametrize("ask", [lambda task: list(task.events()), lambda task: task.reload()],
                         ids=["events", "reload"])
def test_a_pause_stays_a_pause_after_any_number_of_failures(ask, pauses):
    with refusing(max_retries=1100) as config, pytest.raises(xtask.ModuleException):
        ask(make_task(config))
    assert len(pauses) == 1100 and all(0 < pause <= 16 for pause in pauses)  # 2.0**1024 would be no float


# -- the end


ENDS = [  # a stream that does not bring the task's last event
    pytest.param(plays(sse("chunk", "1")), id="closed"),
    pytest.param(plays(sse("chunk", "1"), then=RawConnection.reset), id="reset"),
    pytest.param(plays(sse("chunk", "1"), sse("task_finished", {}, task_id="t-2")), id="only-anothers-end"),
    pytest.param(answers(204), id="204"),
    pytest.param(plays(sse("chunk", "1"), then=silent), id="silent"),
    pytest.param(silent, id="silent-before-its-head"),
]


@pytest.mark.parametrize("script", ENDS)
@both_faces_at_once
def test_when_the_server_says_that_the_task_is_final_the_last_event_is_made_from_it(face, script):
    with feed(script, answers(410), idle_timeout=0.1) as server:
        server.task = task_dict(status="failed", result="why", finished_at="2025-11-06T06:42:00Z", new=[1])
        last = follow(server, face)[-1]
        assert len(server.streams) == 1
    assert isinstance(last, xtask.TaskUpdateEvent) and last.type is xtask.TaskUpdateEventType.TaskFinished
    assert (last.task_id, last.organization_id) == ("t-1", ORG)
    assert (last.time, last.raw["time"]) == (last.data.finished_at, "2025-11-06T06:42:00Z")
    assert isinstance(last.data, xtask.Task) and last.data.to_dict() == server.task
    assert (last.data.status, last.data.result) == ("failed", "why")


@both_faces
def test_204_while_the_task_still_runs_is_an_error_that_says_so(face, pauses):
    with feed(answers(204)) as server:
        with pytest.raises(xtask.ModuleException, match=r"^\[204\] .*no events, but the task is executing"):
            follow(server, face)
        assert len(server.streams) == 1


@both_faces
def test_an_end_whose_status_cannot_be_loaded_is_that_error(face, pauses):
    with feed(plays(sse("chunk", "1"))) as server:
        server.status, server.task = 404, {"detail": "Task not found"}
        with pytest.raises(xtask.ModuleException, match=r"\[404\] Task not found"):
            follow(server, face)


@both_faces
@pytest.mark.parametrize("mine", [FINISHED, 'data: {"type": "task_finished"}\n\n'], ids=["named", "unnamed"])
def test_only_this_tasks_end_ends_it_although_the_server_keeps_the_connection_open(face, mine):
    theirs = sse("task_finished", {"result": "half"}, task_id="t-2")
    after = sse("chunk", "never seen")
    open_end = plays(theirs + sse("chunk", "1") + mine + after, then=silent)
    with feed(open_end, answers(410), idle_timeout=3) as server:
        events = follow(server, face)
        assert server.closed.get(timeout=5) == 1
        assert len(server.requests) == 1
    assert [e.type for e in events] == ["task_finished", "chunk", "task_finished"]
    assert (events[0].task_id, events[-1].task_id) == ("t-2", "t-1")
    assert (events[0].data.id, events[0].data.agent_id, events[-1].task_id) == ("t-2", "a-1", "t-1")


@both_faces
def test_of_a_task_that_was_final_already_five_seconds_of_silence_are_the_end(face, monkeypatch):
    assert xtask._FINAL_SILENCE == 5
    monkeypatch.setattr(xtask, "_FINAL_SILENCE", 0.25)  # the same with less patience
    with feed(plays(sse("chunk", "1"), then=silent), idle_timeout=20) as server:
        server.task = task_dict(status="completed", result="4")
        began = time.monotonic()
        events = follow(server, face, status="completed")
        assert [e.type for e in events] == ["chunk", "task_finished"] and events[-1].data.result == "4"
        assert 0.24 <= time.monotonic() - began < 10


@both_faces_at_once
def test_of_a_task_that_was_final_already_comments_alone_are_silence_too(face, monkeypatch):
    monkeypatch.setattr(xtask, "_FINAL_SILENCE", 0.25)
    with feed(plays(sse("chunk", "1"), then=repeats(": ping\n\n")), idle_timeout=20) as server:
        server.task = task_dict(status="completed", result="4")
        assert [e.type for e in follow(server, face, status="completed")] == ["chunk", "task_finished"]
        assert len(server.streams) == 1


@both_faces_at_once
def test_of_a_task_that_was_final_already_no_event_is_lost_to_impatience(face, monkeypatch):
    def slowly(connection):
        for number in range(6):
            connection.send(sse("chunk", str(number)))
            time.sleep(0.1)
        connection.send(FINISHED)

    monkeypatch.setattr(xtask, "_FINAL_SILENCE", 0.4)
    with feed(plays(then=slowly)) as server:
        server.task = task_dict(status="completed")
        assert chunks(follow(server, face, status="completed")) == list("012345")


def test_of_a_task_that_was_final_already_the_time_the_consumer_takes_is_no_silence(monkeypatch):
    gate, got = threading.Event(), []

    def second(connection):
        gate.wait(10)
        connection.send(sse("chunk", "2") + FINISHED)

    def slowly(event):
        got.append(event)
        if len(got) == 1:
            time.sleep(0.5)
            gate.set()

    monkeypatch.setattr(xtask, "_FINAL_SILENCE", 0.3)
    with feed(plays(sse("chunk", "1"), then=second)) as server:
        server.task = task_dict(status="completed")
        assert chunks(follow(server, each=slowly, status="completed")) == ["1", "2"]


# -- leaving


LEAVING = """
import asyncio, inspect, json, logging, ssl, sys, threading, time, urllib.request
import xtask

logging.getLogger("asyncio").setLevel(logging.ERROR)  # not that a callback was slow on a busy machine

def ask(what):  # the witness answers once the server has seen it
    if witness:
        urllib.request.urlopen(witness + what).close()

async def stuck():
    await asyncio.sleep(0.02)
    if not first:
        ask("there")

def breaking():
    for event in task.events():
        began = time.monotonic()
        break
    return began

def closing():
    events = task.events()
    next(events)
    began = time.monotonic()
    events.close()
    return began

async def breaking_async():
    async for event in task.aevents():
        began = time.monotonic()
        break
    return began

async def aclosing():
    events = task.aevents()
    await events.__anext__()
    await stuck()
    began = time.monotonic()
    await events.aclose()
    return began

async def cancelling():
    there = asyncio.Event()
    async def follow():
        async for event in task.aevents():
            there.set()
    following = asyncio.ensure_future(follow())
    if first:
        await there.wait()
    await stuck()
    began = time.monotonic()
    following.cancel()
    try:
        await following
    except asyncio.CancelledError:
        return began

async def waiting_for():
    events = task.aevents()
    if first:
        await events.__anext__()
    following = asyncio.ensure_future(events.__anext__())
    await stuck()
    began = time.monotonic() + 0.02
    try:
        await asyncio.wait_for(following, 0.02)
    except asyncio.TimeoutError:
        return began

def job(url, certificate, data, *given):
    global task, witness, first
    witness, first = given
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    task = xtask.Task.from_dict(data, xtask.Configuration("key", "org-1", url, ssl_context=context))
    ways = [breaking, closing, breaking_async, aclosing] if first else []
    took = {}
    for way in [*ways, cancelling, waiting_for]:
        for _ in range(3):
            began = asyncio.run(way()) if inspect.iscoroutinefunction(way) else way()
            took.setdefault(way.__name__, []).append(time.monotonic() - began)
            ask("closed")
            until = time.monotonic() + 5
            while threading.enumerate() != [threading.main_thread()] and time.monotonic() < until:
                time.sleep(0.001)
            assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    print(json.dumps(took))
"""


class Seen:
    """What a server saw of streams that are to be left: that one got there, and that it was closed."""

    def __init__(self):
        self.there, self.closed = queue.Queue(), queue.Queue()

    def hold(self, connection, *_):
        self.there.put(1)
        connection.wait_closed()
        self.closed.put(1)

    def tell(self, connection, _):
        what = connection.request()[1][1:]
        getattr(self, what).get(timeout=10)
        connection.answer(200, {})


@pytest.fixture(scope="module")
def check_leaving():
    """Runs all ways to leave a stream; the best of three counts, so that a busy machine does not."""
    with Worker(LEAVING) as worker:

        def check(url, seen=None, first=False, certificate=None):
            with contextlib.ExitStack() as stack:
                witness = stack.enter_context(RawServer(seen.tell)).url + "/" if seen else None
                out, err = worker.do(url, certificate, task_dict(), witness, first)
            took = json.loads(out)
            assert err == b"" and len(took) == (6 if first else 2)
            assert all(min(times) < 0.2 for times in took.values()), took

        yield check


@needs_cpython
def test_leaving_a_silent_stream_is_prompt_and_leaves_nothing_behind(check_leaving):
    seen = Seen()
    with feed(plays(sse("chunk", "1"), then=seen.hold)) as server:
        check_leaving(server.url, seen, first=True)


@needs_cpython
def test_leaving_a_silent_stream_over_tls_is_prompt_and_leaves_nothing_behind(certificate, check_leaving):
    seen = Seen()
    with feed(plays(sse("chunk", "1"), then=seen.hold), context=certificate.context) as server:
        check_leaving(server.url, seen, first=True, certificate=certificate.file)


def test_leaving_a_request_without_an_answer_is_prompt_and_leaves_nothing_behind(check_leaving):
    seen = Seen()
    with feed(seen.hold) as server:
        check_leaving(server.url, seen)


def test_leaving_an_unanswered_tls_handshake_is_prompt_and_leaves_nothing_behind(check_leaving):
    seen = Seen()
    with RawServer(seen.hold) as server:
        check_leaving(server.url.replace("http:", "https:"), seen)


def test_leaving_between_two_tries_is_prompt_and_leaves_nothing_behind(check_leaving):
    seen, unavailable = Seen(), answers(503, b"", [("Retry-After", "30")])
    with feed(lambda connection: (unavailable(connection), seen.hold(connection))) as server:
        check_leaving(server.url, seen)


def test_leaving_a_connect_without_an_answer_is_prompt_and_leaves_nothing_behind(check_leaving):
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than the queue of a listener that accepts none
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        with stack.enter_context(socket.socket()) as probe:
            probe.settimeout(0.1)
            try:
                probe.connect(listener.getsockname())
            except OSError:
                pass
            else:
                pytest.skip("this system's queue has no end")
        check_leaving("http://127.0.0.1:%d" % listener.getsockname()[1])


def test_leaving_before_the_first_event_was_asked_for_opens_nothing():
    async def leave():
        await task.aevents().aclose()

    with feed(silent) as server:
        task = make_task(server.config)
        task.events().close()
        asyncio.run(leave())
        assert server.connections == 0


def test_leaving_hangs_up_on_no_connection_that_another_call_uses(monkeypatch):
    # the status load between two streams took a kept connection, and gave it back for others
    paused, resumed, asked, answered = (threading.Event() for _ in range(4))

    def script(connection, number):
        for method, path, _, _ in iter(connection.request, None):
            if path.endswith("/events"):
                return plays(sse("chunk", "1"))(connection)
            if method == "PATCH":
                patched.append(number)
                asked.set()
                answered.wait(5)
            connection.answer(200, task_dict(title="New"))

    async def main():
        events = task.aevents()
        await events.__anext__()
        assert await asyncio.to_thread(paused.wait, 5)
        saving = asyncio.ensure_future(saved.asave())
        assert await asyncio.to_thread(asked.wait, 5)
        await events.aclose()
        answered.set()
        resumed.set()
        await saving

    patched = []
    monkeypatch.setattr(xtask, "_wait", lambda seconds, scope=None: (paused.set(), resumed.wait(5)))
    with RawServer(script) as server:
        task, saved = make_task(server.config), make_task(server.config)
        saved.title = "New"
        asyncio.run(main())
        assert patched == [2] and saved.title == "New"  # once, over the connection of the status load


CLOSED_LOOP = """
import asyncio, gc, json, sys, threading, time, xtask
held = []
for url, what in json.loads(sys.argv[1]):
    config = xtask.Configuration("k", "o", url, idle_timeout=0.3)
    task = xtask.Task.from_dict({"id": "t-1", "events_streaming": True, "status": "executing"}, config)
    loop = asyncio.new_event_loop()
    events = task.aevents()
    loop.run_until_complete(events.__anext__())
    loop.close()
    if what == "hold":
        held.append(events)
    else:
        del events
        gc.collect()
    ends = time.monotonic() + 5
    while threading.active_count() > 1 and time.monotonic() < ends:
        time.sleep(0.01)
    print(threading.active_count())
"""




def test_a_loop_whose_streams_were_left_is_not_kept():
    async def main():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async for _ in make_task(server.config).aevents():
            break

    def script(connection, number):
        connection.request()
        connection.start_stream()
        connection.event("chunk", "1")
        for _ in range(200):  # or until the client leaves
            connection.send(sse("chunk", "x" * 50_000))

    loops = []
    with RawServer(script) as server:
        for _ in range(100):
            asyncio.run(main())
        ends = time.monotonic() + 5
        while any(loop() for loop in loops) and time.monotonic() < ends:
            gc.collect()
            time.sleep(0.01)
    assert [loop for loop in loops if loop()] == []


@pytest.mark.parametrize("when", ["in-the-pause", "while-it-loads"])
def test_cancelling_await_finished_is_immediate_and_nothing_goes_on_waiting(when):
    loading, gate, status = threading.Event(), threading.Event(), ["executing"]

    def script(connection, _):
        for _ in iter(connection.request, None):
            if when == "while-it-loads":
                loading.set()
                gate.wait(5)
            connection.answer(200, task_dict(status=status[0]))
            loading.set()

    async def main():
        waiting = asyncio.ensure_future(make_task(server.config).await_finished())
        assert await asyncio.to_thread(loading.wait, 5)
        await asyncio.sleep(0.05)  # of the half second between two loads
        asked, began = len(server.requests), time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        took = time.monotonic() - began
        status[0] = "completed"
        gate.set()  # asyncio.run() waits for the thread of a load that is under way
        return took, asked

    with RawServer(script) as server:
        took, asked = asyncio.run(main())
        assert took < 0.2 and asked == len(server.requests) == 1


# -- many


def test_200_streams_at_once_deliver_and_a_load_answers_among_them():
    gate = threading.Event()

    def held(connection):
        connection.start_stream()
        connection.send(sse("chunk", "1"))
        gate.wait(20)
        connection.send(sse("chunk", "2") + FINISHED)

    async def one(task):
        async for event in task.aevents():
            got.append(event.data)
            if len(got) == 200:
                all_started.set()

    async def main():
        nonlocal all_started
        all_started = asyncio.Event()
        task = make_task(server.config)
        streams = [asyncio.ensure_future(one(task)) for _ in range(200)]
        await asyncio.wait_for(all_started.wait(), 15)
        loaded.append(await asyncio.wait_for(xtask.Task.aload("t-1", server.config), 5))
        gate.set()
        await asyncio.wait_for(asyncio.gather(*streams), 15)

    got, loaded, all_started = [], [], None
    before = set(threading.enumerate())
    with feed(held) as server:
        try:
            asyncio.run(main())
        finally:
            gate.set()
    assert got[:200] == ["1"] * 200 and got.count("2") == 200 and len(got) == 600
    assert loaded[0].id == "t-1"
    until = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_a_consumer_that_stops_reading_stalls_the_servers_writes_and_loses_nothing():
    stalled, resumed = threading.Event(), threading.Event()
    sent, total = [0], 600

    def flood(connection):
        connection.start_stream()
        sock = connection.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.setblocking(False)
        event = sse("chunk", "x" * 60_000).encode()
        data = memoryview(event * total + FINISHED.encode())
        while data:
            if not select.select([], [sock], [], 0.5)[1]:
                stalled.set()
                assert resumed.wait(10)
                continue
            count = sock.send(data[:65536])
            sent[0] += count
            data = data[count:]
        sock.setblocking(True)

    async def main():
        events = task.aevents()
        assert (await events.__anext__()).type == "chunk"
        assert await asyncio.to_thread(stalled.wait, 10), f"{sent[0]} bytes went out"
        held_at.append(sent[0])
        resumed.set()
        return 1 + len([event async for event in events if event.type == "chunk"])

    held_at = []
    with feed(flood) as server:
        task = make_task(server.config)
        try:
            assert asyncio.run(main()) == total
        finally:
            resumed.set()
    assert held_at[0] < 20 * 2**20


def test_a_burst_does_not_wake_the_loop_once_per_event():
    async def main():
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given, **options: (woken.append(1), wake(*given, **options))
        return len([event async for event in make_task(server.config).aevents()])

    woken = []
    with feed(plays("".join(sse("chunk", str(n)) for n in range(3000)) + FINISHED)) as server:
        assert asyncio.run(main()) == 3001
    assert len(woken) < 300


# -- bounded


@both_faces
@pytest.mark.parametrize("part", ["x" * 2**20, "\ndata: " + "x" * 2**20, "\n: " + "x" * 2**20],
                         ids=["one-line", "many-lines", "comments"])
def test_an_event_that_never_ends_raises_at_16_mib(face, part):
    def endless(connection):
        try:
            connection.start_stream()
            connection.send(sse("chunk", "1") + "data: ")
            for _ in range(64):
                connection.send(part)
            endings.put("all was taken")
        except OSError:
            endings.put("closed by the client")

    endings, got = queue.Queue(), []
    with feed(endless) as server:
        with pytest.raises(xtask.ModuleException, match="16 MiB") as caught:
            follow(server, face, got.append)
        # at once: the frames of an exception that somebody keeps would hold the connection open
        assert endings.get(timeout=5) == "closed by the client" and caught.tb
        assert len(server.requests) == 1 and chunks(got) == ["1"]


def test_an_event_of_nearly_16_mib_is_delivered():
    text = "x" * (16 * 2**20 - 1000)
    with feed(plays(sse("chunk", text) + FINISHED)) as server:
        assert chunks(follow(server)) == [text]


GROWTH = """
import asyncio, json, resource, sys
import xtask

def peak():
    try:
        with open("/proc/self/status") as status:
            return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size // 1024 if sys.platform == "darwin" else size

url, face, data = json.loads(sys.argv[1])
task = xtask.Task.from_dict(data, xtask.Configuration("key", "org-1", url))
count = start = 0

def take(event):
    global count, start
    count += 1
    start = start or peak()

async def all_async():
    async for event in task.aevents():
        take(event)

if face == "async":
    asyncio.run(all_async())
else:
    for event in task.events():
        take(event)
print(json.dumps([count, peak() - start]))
"""


@needs_cpython
@pytest.mark.skipif(os.name == "nt", reason="reads the memory's peak as Unix tells it")
def test_a_hundred_thousand_events_grow_the_process_by_less_than_10_mib():
    def stream(connection):
        connection.start_stream()
        for _ in range(100):
            connection.send(thousand)
        connection.send(FINISHED)

    thousand = "".join(sse("chunk", str(n), id=n) for n in range(1000))

    with feed(stream) as server:
        given = [json.dumps([server.url, face, task_dict()]) for face in ("sync", "async")]
        ended = at_once(functools.partial(run_python, GROWTH), *given)
    assert [(done.stderr, done.returncode) for done in ended] == [("", 0)] * 2
    for count, grown in (json.loads(done.stdout) for done in ended):
        assert count == 100_001 and grown < 10 * 1024


# -- Ctrl-C


INTERRUPTED = """
import asyncio, json, signal, sys
import xtask

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
url, face, data = json.loads(sys.argv[1])
task = xtask.Task.from_dict(data, xtask.Configuration("key", "org-1", url))

async def follow():
    async for event in task.aevents():
        pass

if face == "async":
    asyncio.run(follow())
for event in task.events():
    pass
"""

QUIET = [  # streams with nothing to say: silent, unanswered, between two tries
    plays(sse("chunk", "1")), lambda connection: None, answers(503, b"", [("Retry-After", "30")]),
]


def interrupt(process, turn=None):
    """Ctrl-C, once it waits: between CPython's look for signals and a wait one would be seen too late.

    The answer is what `communicate` gives, and the seconds until it did; processes may take turns by a lock.
    """
    time.sleep(0.2)
    with turn or contextlib.nullcontext():
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=15), time.monotonic() - began


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_the_process_within_a_second_with_one_plain_keyboard_interrupt():
    def run(script, face):
        def quiet(connection):
            script(connection)
            reached.set()
            connection.wait_closed()

        reached = threading.Event()
        with feed(quiet) as server:
            given = json.dumps([server.url, face, task_dict()])
            with subprocess.Popen([sys.executable, "-X", "dev", "-W", "error", "-c", INTERRUPTED, given],
                                  env=environment, stderr=subprocess.PIPE, text=True) as process:
                try:
                    assert reached.wait(15)
                    all_reached.wait(15)
                    (_, stderr), took = interrupt(process, one_by_one)
                finally:
                    process.kill()
        assert took < 1 and process.returncode == -signal.SIGINT
        assert stderr.rstrip().endswith("KeyboardInterrupt") and "Exception ignored" not in stderr
        assert "never retrieved" not in stderr and "destroyed" not in stderr
        if face == "sync":  # asyncio.run() itself shows the cancellation it turned it into
            assert stderr.count("KeyboardInterrupt") == stderr.count("Traceback") == 1
            assert "During handling" not in stderr

    environment = {**os.environ, "PYTHONPATH": str(Path(UNDER_TEST or FILE).parent)}
    cases = [*((script, "sync") for script in QUIET), (QUIET[0], "async")]
    all_reached, one_by_one = threading.Barrier(len(cases)), threading.Lock()
    at_once(lambda case: run(*case), *cases)


# ---------------------------------------------------------------------------
# Transport
# ---------------------------------------------------------------------------


def echo(connection, number):
    """Answers as a platform that has every task: with the id asked for, and with what a save sent."""
    for _, path, _, body in iter(connection.request, None):
        sent = json.loads(body or b"{}")
        connection.answer(200, {**task_dict(), **sent, "id": path.split("/")[2]})


OK = (200, task_dict(internal_status="saved"))


class Dialled(list):
    """The addresses that sockets were told to connect to."""

    port = None  # of this machine, where connections to other machines end


@pytest.fixture
def dialled(monkeypatch):
    """Notes every address that is connected to, and lets no connection leave this machine."""
    seen, connect = Dialled(), socket.socket.connect
    seen.threads = set()

    def spy(sock, address):
        seen.append(address[0])
        seen.threads.add(threading.current_thread())
        if not address[0].startswith(("127.", "::1", "0.0.0.0")):
            if not seen.port:
                raise ConnectionRefusedError("off this machine")
            address = ("127.0.0.1", seen.port)
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", spy)
    return seen


@pytest.fixture
def names(monkeypatch):
    """Invented host names: a dict from name to a list of lists of addresses, one list per look-up."""
    table, real = {}, socket.getaddrinfo

    def look_up(host, port, *given, **options):
        flags = options.get("flags", given[3] if len(given) > 3 else 0)
        if host not in table or flags & socket.AI_NUMERICHOST:
            return real(host, port, *given, **options)
        addresses = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kind = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(kind[":" in a], socket.SOCK_STREAM, 6, "", (a, port or 0)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


def save(task, text="saved"):
    task.internal_status = text
    return task.save()


CALLS = {
    "GET": lambda config: make_task(config).reload(),
    "PATCH": lambda config: save(make_task(config)),
    "DELETE": lambda config: make_task(config).stop(),
    "POST": lambda config: xtask.Task.create("a-1", "Hi", configuration=config),
}
SAFE = ["GET", "PATCH", "DELETE"]


# -- kept connections


def test_a_kept_connection_that_breaks_within_an_answer_counts_as_a_failure(pauses):
    def script(connection, number):
        for at, _ in enumerate(iter(connection.request, None)):
            if at or number > 1:
                return connection.send("HTTP/1.1 200 O")
            connection.answer(200, task_dict())

    with RawServer(script) as server, configuration(server.url, max_retries=0) as config:
        task = xtask.Task.load("t-1", config)
        with pytest.raises(xtask.ModuleException, match="cut off"):
            task.reload()
    assert (server.connections, len(server.requests), pauses) == (1, 2, [])


def test_an_address_of_a_family_that_this_host_lacks_is_passed_over(monkeypatch, names):
    class Socket(socket.socket):
        def __init__(self, family=-1, *given, **options):
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *given, **options)

    names["both.test"] = [["::1", "127.0.0.1"]]
    with RawServer(echo) as server:
        monkeypatch.setattr(socket, "socket", Socket)
        with configuration(server.url.replace("127.0.0.1", "both.test"), max_retries=0) as config:
            assert xtask.Task.load("t-1", config).id == "t-1"


def test_a_hundred_loads_and_saves_open_one_connection():
    with RawServer(echo) as server:
        task = make_task(server.config)
        for number in range(50):
            assert xtask.Task.load(f"t-{number}", server.config).id == f"t-{number}"
            assert save(task, f"step {number}").internal_status == f"step {number}"
        assert (server.connections, len(server.requests)) == (1, 100)
        assert not any("close" in headers.get("connection", "") for _, _, headers, _ in server.requests)


def test_sixteen_threads_at_once_get_their_own_answers():
    with RawServer(echo) as server:
        start, wrong = threading.Barrier(16), []

        def work(name):
            start.wait(10)
            for number in range(25):
                wanted = f"{name}-{number}"
                if xtask.Task.load(wanted, server.config).id != wanted:
                    wrong.append(wanted)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert wrong == [] and len(server.requests) == 400
        assert server.connections <= 16


@pytest.mark.parametrize("method", SAFE)
def test_an_idle_connection_that_the_server_closed_is_replaced_unseen(method, pauses):
    def script(connection, number):
        connection.request()
        connection.answer(*OK)  # then hangs up

    with RawServer(script) as server:
        with configuration(server.url, max_retries=0) as config:
            for _ in range(5):
                CALLS[method](config)
        assert [request[0] for request in server.requests] == [method] * 5  # each arrived once
        assert (server.connections, pauses) == (5, [])


@pytest.mark.parametrize("method", SAFE)
def test_a_kept_connection_that_breaks_before_the_answer_is_replaced_uncounted(method, pauses):
    with answering(OK, RawConnection.reset, OK) as server:
        with configuration(server.url, max_retries=0) as config:
            CALLS[method](config)
            CALLS[method](config)
        assert (server.connections, len(server.requests), pauses) == (2, 3, [])


def test_a_new_connection_that_breaks_counts_as_a_try(pauses):
    with answering(RawConnection.reset) as server:
        with configuration(server.url, max_retries=0) as config:
            with pytest.raises(xtask.ModuleException) as failed:
                CALLS["GET"](config)
        assert (failed.value.status_code, failed.value.answered) == (500, False)
        assert (server.connections, pauses) == (1, [])


def test_what_nobody_asked_for_on_an_idle_connection_is_no_answer():
    idle, said = threading.Event(), threading.Event()

    def script(connection, number):
        connection.request()
        connection.answer(*OK)
        if number == 1:
            idle.wait(10)
            connection.send("HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            said.set()
            connection.request()

    with RawServer(script) as server:
        CALLS["GET"](server.config)
        idle.set()
        assert said.wait(10)
        assert CALLS["GET"](server.config).internal_status == "saved"
        assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.parametrize("seconds, connections", [(19, 1), (21, 2), (3600, 2)])
def test_a_connection_idle_for_over_20_seconds_of_wall_clock_is_not_reused(seconds, connections, monkeypatch):
    with RawServer(echo) as server:
        CALLS["GET"](server.config)
        now = time.time  # the clock that a frozen host finds moved on when it thaws
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        CALLS["GET"](server.config)
        assert server.connections == connections


FORK = """
import os, sys, xtask
config = xtask.Configuration("key", "org", sys.argv[1])
def loads(name):
    asked = [f"{name}-{n}" for n in range(30)]
    assert [xtask.Task.load(i, config).id for i in asked] == asked
loads("before")
child = os.fork()
if not child:
    failed = True
    try:
        loads("child")
        failed = False
    finally:
        os._exit(failed)
loads("parent")
assert os.waitpid(child, 0)[1] == 0
loads("after")
config.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_and_its_parent_never_share_a_connection():
    carried = {}

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            asked = path.split("/")[2]
            carried.setdefault(asked.split("-")[0], set()).add(number)
            connection.answer(200, task_dict(id=asked))

    with RawServer(script) as server:
        done = run_python(FORK, server.url, flags=("-X", "dev", "-W", "error"))
    assert (done.returncode, done.stderr) == (0, "")
    assert carried["before"] == carried["parent"] == carried["after"] == {1}
    assert carried["child"] == {2}


def test_a_post_always_takes_a_new_connection():
    with RawServer(echo) as server:
        CALLS["GET"](server.config)
        for _ in range(3):
            CALLS["POST"](server.config)
        CALLS["GET"](server.config)
        assert server.connections == 4  # and the first one was still there for the last load


@pytest.mark.parametrize("leave", ["close", "with", "collected"])
def test_a_configuration_closes_its_idle_connections(leave):
    with RawServer(echo) as server:
        config = configuration(server.url)
        CALLS["GET"](config)
        if leave != "collected":
            if leave == "close":
                config.close()
            else:
                with config:
                    pass
            assert server.closed.get(timeout=5) == 1
            CALLS["GET"](config)  # it stays usable
            config.close()
        gc.collect()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            del config
            gc.collect()
        assert warned == []  # no ResourceWarning of a socket that was forgotten
        assert server.closed.get(timeout=5) == server.connections


def test_an_answer_that_was_cut_off_does_not_leave_its_connection_to_the_next(pauses):
    def short(connection):
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
        connection.sock.shutdown(socket.SHUT_WR)

    with answering(OK, short, OK) as server:
        for _ in range(2):
            assert make_task(server.config).reload().internal_status == "saved"
        assert (server.connections, len(pauses)) == (2, 1)


def test_a_stream_has_tcp_keep_alive(monkeypatch):
    dialled, connect = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, a: (dialled.append(s), connect(s, a))[1])

    def script(connection, number):
        connection.request()
        connection.start_stream()
        connection.event("chunk", "a")
        connection.wait_closed()

    with RawServer(script) as server, contextlib.closing(make_task(server.config).events()) as events:
        assert next(events).data == "a"
        assert dialled[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert dialled[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- tries


def unavailable(*headers):
    return 503, {"detail": "busy"}, headers


def limited(value):
    return 429, {"detail": "slow down"}, [("Retry-After", value)]


def in_seconds(seconds):
    """An HTTP date: its text rounds down to the second."""
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("method", SAFE)
@pytest.mark.parametrize("first", [unavailable(), (502, b""), (504, b"<html>"), limited("3"),
                                   RawConnection.reset],
                         ids=["503", "502", "504", "429", "broken"])
def test_a_bad_minute_is_ridden_over(method, first, pauses):
    with answering(first, first, OK) as server:
        assert CALLS[method](server.config).internal_status == "saved"
        assert [request[0] for request in server.requests] == [method] * 3
        assert len(pauses) == 2 and min(pauses) > 0


def test_the_tries_end_after_max_retries_with_the_last_answer(pauses):
    with answering(unavailable()) as server:
        with configuration(server.url, max_retries=3) as config:
            with pytest.raises(xtask.ModuleException) as failed:
                CALLS["GET"](config)
    assert str(failed.value) == "[503] busy" and failed.value.answered
    assert (len(server.requests), len(pauses)) == (4, 3)


def test_a_pause_leaves_the_random_numbers_of_the_program_alone(pauses):
    before = random.getstate()
    with refusing(max_retries=1) as config, pytest.raises(xtask.ModuleException):
        xtask.Task.load("t-1", config)
    assert pauses and random.getstate() == before


def test_the_pause_grows_and_is_jittered(pauses):
    with answering(unavailable()) as server, configuration(server.url, max_retries=4) as config:
        for _ in range(2):
            with pytest.raises(xtask.ModuleException):
                CALLS["GET"](config)
    first, second = pauses[:4], pauses[4:]
    assert first[0] < first[2] and first[1] < first[3] and second[0] < second[2]
    assert first != second and min(pauses) > 0 and max(pauses) < 30


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("value, least, most", [("7", 7, 7), ("60", 60, 60), ("0", 0, 0), ("date", 25, 30),
                                                ("past", 0, 0)])
def test_retry_after_is_obeyed_in_both_its_forms(method, value, least, most, pauses):
    header = {"date": in_seconds(30), "past": "Sun, 06 Nov 1994 08:49:37 GMT"}.get(value, value)
    with answering(limited(header), OK) as server:
        assert CALLS[method](server.config).internal_status == "saved"
    assert len(pauses) == 1 and least <= pauses[0] <= most


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "\u00b2", "Sun, 99 Nov 1994",
                                   "Jan ( , x 1:2:3 GMT"])
def test_a_retry_after_in_no_known_form_leaves_the_pause_to_us(value, pauses):
    with answering(limited(value), OK) as server:
        assert CALLS["GET"](server.config).internal_status == "saved"
    assert len(pauses) == 1 and 0 < pauses[0] < 10


@pytest.mark.parametrize("value", ["61", "9" * 400, "9" * 5000, "date"])
def test_a_retry_after_of_over_a_minute_raises_at_once(value, pauses):
    with answering(limited(in_seconds(90) if value == "date" else value), OK) as server:
        with pytest.raises(xtask.ModuleException, match="slow down") as failed:
            CALLS["GET"](server.config)
    assert (failed.value.status_code, pauses, len(server.requests)) == (429, [], 1)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 501])
def test_an_answer_that_would_not_change_is_asked_for_once(method, status, pauses):
    with answering((status, {"detail": "no"})) as server:
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS[method](server.config)
        assert (failed.value.status_code, len(server.requests), pauses) == (status, 1, [])


@pytest.mark.parametrize("first", [(502, b""), (503, b""), (504, b""), RawConnection.reset], ids=str)
def test_a_post_that_may_have_been_done_is_sent_once(first, pauses):
    with answering(first, OK) as server:
        with pytest.raises(xtask.ModuleException):
            CALLS["POST"](server.config)
        assert (len(server.requests), pauses) == (1, [])


@pytest.mark.parametrize("method", CALLS)
def test_a_refused_connection_is_tried_again_also_for_a_post(method, pauses):
    with refusing() as config, pytest.raises(xtask.ModuleException) as failed:
        CALLS[method](config)
    assert (failed.value.status_code, failed.value.answered, len(pauses)) == (500, False, 2)
    place = config.base_url.strip("/").partition("//")[2]
    assert place in str(failed.value) and "refused" in str(failed.value).lower()
    assert isinstance(failed.value.__cause__, OSError)


def test_a_time_out_is_not_tried_again_and_says_what_to_set(pauses):
    def check(method):
        with answering(RawConnection.wait_closed) as server:
            with configuration(server.url, timeout=0.1) as config:
                with pytest.raises(xtask.ModuleException) as failed:
                    CALLS[method](config)
            assert (server.connections, pauses, failed.value.answered) == (1, [], False)
        assert f"127.0.0.1:{server.port}" in str(failed.value) and "timeout" in str(failed.value)

    at_once(check, *CALLS)


def test_a_name_without_an_address_is_told_by_name(names, pauses):
    names["nowhere.invalid"] = [[]]
    with configuration("http://nowhere.invalid") as config, pytest.raises(xtask.ModuleException) as failed:
        CALLS["GET"](config)
    assert (failed.value.status_code, failed.value.answered) == (500, False)
    assert "nowhere.invalid" in str(failed.value) and "not known" in str(failed.value)


def test_the_next_address_of_a_name_is_tried_when_the_first_one_refuses(names, pauses):
    with RawServer(echo) as server:
        names["two.test"] = [["::1", "127.0.0.1"]]  # nothing listens on the first one
        with configuration(f"http://two.test:{server.port}") as config:
            assert CALLS["GET"](config).id == "t-1"
        assert (server.connections, pauses) == (1, [])


@pytest.mark.parametrize("framing", ["Content-Length: 70000000", "X-Length: unknown"])
def test_an_answer_over_64_mib_is_not_swallowed(framing, pauses):
    sent = []

    def endless(connection):
        connection.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n")
        piece = b" " * 2**20
        while len(sent) < 200:
            connection.send(piece)
            sent.append(1)

    with answering(endless) as server:
        with pytest.raises(xtask.ModuleException, match="64 MiB") as failed:
            CALLS["GET"](server.config)
        assert (failed.value.status_code, len(server.requests), pauses) == (500, 1, [])
        assert failed.value.answered and f"127.0.0.1:{server.port}" in str(failed.value)
    assert len(sent) < 100


def test_a_stop_whose_answer_was_lost_on_a_kept_connection_is_settled_by_the_status():
    def script(connection, number):
        while connection.request():
            deletes = [method for method, *_ in connection.server.requests].count("DELETE")
            if connection.server.requests[-1][0] != "DELETE":
                connection.answer(200, task_dict(status="stopped" if deletes else "executing"))
            elif deletes == 1:
                return
            else:
                connection.answer(404, {"detail": "not there"})

    with RawServer(script) as server:
        assert xtask.Task.load("t-1", server.config).stop().status == "stopped"


# -- the key


def moved(url, status=302):
    return status, b"", [("Location", url)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["http://localhost:{port}/x", "http://127.0.0.1:{other}/x",
                                   "//127.0.0.1:{other}/x", "https://127.0.0.1:{port}/x",
                                   "http://localhost.evil.invalid/x"])
def test_a_redirect_off_the_origin_is_an_error_and_the_key_stays(status, where, pauses, dialled):
    with RawServer(echo) as stranger, answering(None) as server:
        target = where.format(port=server.port, other=stranger.port)
        server.script = replies(moved(target, status))
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS["GET"](server.config)
        assert (failed.value.status_code, failed.value.answered) == (status, True)
        assert f"127.0.0.1:{server.port}" in str(failed.value)
        assert (stranger.connections, server.connections, dialled, pauses) == (0, 1, ["127.0.0.1"], [])


def test_a_redirect_from_https_to_http_is_an_error_and_the_key_stays(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate.file)
    with RawServer(echo) as plain, RawServer(replies(None), certificate.context) as server:
        server.script = replies(moved(f"http://127.0.0.1:{server.port}/x"), moved(plain.url + "/x"))
        for _ in range(2):
            with pytest.raises(xtask.ModuleException) as failed:
                CALLS["GET"](server.config)
            assert failed.value.status_code == 302
        assert plain.connections == 0 and len(server.requests) == 2


@pytest.mark.parametrize("method", ["PATCH", "DELETE", "POST"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_only_a_get_is_redirected(method, status, pauses):
    with answering(moved("/elsewhere", status), OK) as server:
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS[method](server.config)
        assert (failed.value.status_code, len(server.requests), pauses) == (status, 1, [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_origin_is_followed_with_the_key(status):
    with answering(moved("/elsewhere?a=b", status), OK) as server:
        assert CALLS["GET"](server.config).internal_status == "saved"
        assert server.requests[1][1] == "/elsewhere?a=b"
        assert server.requests[1][2]["x-api-key"] == KEY
        assert "connection" not in server.requests[1][2], "or it could serve no other"


@pytest.mark.parametrize("of", ["redirect", "file"])
def test_a_host_name_that_takes_long_to_normalise_is_refused(of):
    name = "\u0301" * 15_000 + "\u0323" * 15_000  # some 4 s, as slow as the square of the length
    began = time.process_time()
    with answering(moved(f"http://a{name}/x".encode().decode("latin-1")), OK) as server:
        if of == "redirect":
            with pytest.raises(xtask.ModuleException):
                CALLS["GET"](server.config)
        else:
            task = make_task(server.config, input={"text": "", "files": [f"http://a{name}/x.txt"]})
            assert task.get_human_readable_files()[0]["content"].startswith("Error: ")
    assert time.process_time() - began < 2


def test_a_redirect_without_end_ends(pauses):
    with answering(moved("/again")) as server:
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS["GET"](server.config)
        assert failed.value.status_code == 302 and len(server.requests) == 6


def test_an_event_stream_takes_the_key_to_no_other_origin():
    with RawServer(echo) as stranger, answering(moved(stranger.url + "/events")) as server:
        with pytest.raises(xtask.ModuleException):
            list(make_task(server.config).events())
        assert (stranger.connections, len(server.requests)) == (0, 1)


@pytest.mark.parametrize("answer", [(401, {"detail": f"bad key {KEY}"}), (400, f"what is {KEY}?".encode()),
                                    (422, {"detail": [{"loc": ["header", KEY], "msg": f"{KEY} is wrong"}]}),
                                    moved(f"http://{KEY}.invalid/{KEY}?{KEY}"), (200, f"{KEY}".encode()),
                                    (200, [KEY]), (200, {"detail": KEY}),
                                    RawConnection.reset],
                         ids=["detail", "text", "422", "redirect", "no JSON", "list", "no task", "reset"])
def test_no_failure_tells_the_key(answer, pauses, caplog):
    caplog.set_level(logging.DEBUG)
    with answering(answer) as server:
        task = make_task(server.config)
        with pytest.raises(xtask.ModuleException) as failed:
            task.reload()
        told = everything_told(failed.value) + caplog.text
        assert KEY not in told and KEY not in repr((server.config, task, task.configuration))
    # the test's own source lines are in the traceback: they name KEY, not what it holds
    assert server.requests[0][2]["x-api-key"] == KEY


def test_no_failure_tells_a_short_key():
    with answering((401, {"detail": "bad key secret"})) as server:
        config = configuration(server.url, api_key="secret")
        with pytest.raises(xtask.ModuleException, match=r"^\[401\] bad key \*\*\*$"):
            CALLS["GET"](config)


def test_what_is_no_http_is_not_repeated(pauses):
    def nonsense(connection):
        connection.send(f"{KEY}\r\n\r\n")
        connection.sock.close()

    with answering(nonsense) as server:
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS["GET"](server.config)
    told = str(failed.value) + repr(failed.value)
    assert failed.value.status_code == 500 and f"127.0.0.1:{server.port}" in told
    assert KEY not in told and "\n" not in told and "\\n" not in told




HEADS = {
    "nested messages": "Content-Type: message/rfc822\r\r" * 1200 + "\r\n\r\n",
    "nested parts": "Content-Type: multipart/mixed; boundary=b\r\r--b\r" * 3000 + "\r\n\r\n",
    "more headers": "a: b\r\n" * 300 + "\r\n",
    "a long header": "a: " + "b" * 70_000 + "\r\n\r\n",
    "a long line": "b" * 70_000,
}






def test_a_101_is_a_last_answer_also_of_its_connection(pauses):
    def script(connection, number):
        while connection.request():
            connection.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")

    with RawServer(script) as server:
        for connections in (1, 2):
            with pytest.raises(xtask.ModuleException) as failed:
                CALLS["GET"](server.config)
            assert (failed.value.status_code, failed.value.answered) == (101, True)
            assert server.connections == connections


def test_connecting_takes_no_longer_than_any_other_wait():
    with socket.create_server(("127.0.0.1", 0)) as silent_under_tls:
        url = "https://127.0.0.1:%d" % silent_under_tls.getsockname()[1]
        began = time.monotonic()
        with configuration(url, timeout=0.2, max_retries=0) as config, pytest.raises(xtask.ModuleException):
            CALLS["GET"](config)
    assert time.monotonic() - began < 5


# -- TLS


@pytest.mark.parametrize("method", CALLS)
def test_a_certificate_that_is_not_trusted_is_refused_once_and_says_what_to_set(certificate, method, pauses):
    with RawServer(echo, certificate.context) as server:
        with pytest.raises(xtask.ModuleException) as failed:
            CALLS[method](server.config)
        assert (server.requests, server.connections, pauses) == ([], 1, [])
    assert (failed.value.status_code, failed.value.answered) == (500, False)
    place = f"127.0.0.1:{server.port}"
    advice = r"name the authority in SSL_CERT_FILE or in Configuration\(ssl_context"
    says = rf"\[500\] No response from {place}: its certificate is not trusted \(.+\): {advice}"
    assert re.match(says, str(failed.value))


def test_a_certificate_for_another_name_is_refused(certificate, names, pauses):
    context = ssl.create_default_context(cafile=certificate.file)
    with RawServer(echo, certificate.context) as server:
        names["other.test"] = [["127.0.0.1"]]
        with configuration(f"https://other.test:{server.port}", ssl_context=context) as config:
            with pytest.raises(xtask.ModuleException, match="other.test.*certificate"):
                CALLS["GET"](config)
        assert server.requests == []


def test_tls_through_ssl_cert_file_makes_one_context_and_one_handshake(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate.file)
    made, create = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: (made.append(1), create(*a, **k))[1])
    with RawServer(echo, certificate.context) as server:
        for _ in range(100):
            assert CALLS["GET"](server.config).id == "t-1"
        assert server.connections == 1
        CALLS["POST"](server.config)
        assert (server.connections, len(made)) == (2, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_through_ssl_context_makes_one_handshake(certificate, host):
    context = ssl.create_default_context(cafile=certificate.file)
    with RawServer(echo, certificate.context) as server:
        with configuration(f"https://{host}:{server.port}", ssl_context=context) as config:
            for _ in range(100):
                assert CALLS["GET"](config).id == "t-1"
        assert server.connections == 1


def test_loads_in_a_loop_without_a_configuration_make_one_handshake(certificate, monkeypatch):
    with RawServer(echo, certificate.context) as server:
        for name, value in {"SSL_CERT_FILE": certificate.file, "XPANDER_API_KEY": KEY,
                            "XPANDER_ORGANIZATION_ID": ORG, "XPANDER_BASE_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        for number in range(100):
            task = xtask.Task.load(f"id-{number}")
            assert task.id == f"id-{number}"
        task.configuration.close()
        assert (server.connections, len(server.requests)) == (1, 100)
        monkeypatch.setenv("XPANDER_API_KEY", "another-key")  # another environment, other connections
        xtask.Task.load("id").configuration.close()
        assert server.connections == 2 and server.requests[-1][2]["x-api-key"] == "another-key"


# -- proxies


class Proxy(RawServer):
    """A proxy that asks for a password if it has one, tunnels to this machine and answers plain requests."""

    def __init__(self, password=None):
        self.basic = password and "Basic " + base64.b64encode(password.encode()).decode()
        super().__init__(self.proxy)
        place = "{}@127.0.0.1:{}" if password else "{}127.0.0.1:{}"
        self.address = "http://" + place.format((password or "").replace("/", "%2F"), self.port)

    def proxy(self, connection, number):
        for method, target, headers, _ in iter(connection.request, None):
            if self.basic and headers.get("proxy-authorization") != self.basic:
                asked = headers.get("proxy-authorization", "")
                connection.answer(407, b"", [("Proxy-Authenticate", "Basic")], reason=f"Who is {asked}?")
            elif method == "CONNECT":
                return self.tunnel(connection, int(target.rpartition(":")[2]))
            elif target.endswith("moved.txt"):
                connection.answer(302, b"", [("Location", "http://169.254.169.254/a.txt")])
            elif target.endswith(".txt"):
                connection.answer(200, b"through the proxy")
            else:
                connection.answer(200, task_dict(id=target.split("/")[4]))

    def tunnel(self, connection, port):
        with socket.create_connection(("127.0.0.1", port), 5) as other:
            connection.send("HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
            ends = {connection.sock: other, other: connection.sock}
            while True:
                for end in select.select(list(ends), [], [], 10)[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)


@pytest.mark.parametrize("password", [None, "user:pass/word"])
def test_plain_http_goes_through_http_proxy(password, monkeypatch):
    with Proxy(password) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        with configuration("http://api.invalid") as config:  # a name that the proxy alone can know
            for number in range(5):
                assert xtask.Task.load(f"t-{number}", config).id == f"t-{number}"
        assert proxy.connections == 1
        method, target, headers, _ = proxy.requests[0]
        assert (method, target) == ("GET", "http://api.invalid/agent-execution/t-0/status")
        assert (headers["host"], headers.get("proxy-authorization")) == ("api.invalid", proxy.basic)


@pytest.mark.parametrize("password", [None, "user:pass/word"])
def test_https_goes_through_a_tunnel_of_https_proxy(password, certificate, monkeypatch):
    context = ssl.create_default_context(cafile=certificate.file)
    with Proxy(password) as proxy, RawServer(echo, certificate.context) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.address)
        with configuration(f"https://localhost:{server.port}", ssl_context=context) as config:
            for _ in range(5):
                assert CALLS["GET"](config).id == "t-1"
        (method, target, headers, _), = proxy.requests
        assert (method, target) == ("CONNECT", f"localhost:{server.port}")
        assert headers.get("proxy-authorization") == proxy.basic
        assert "x-api-key" not in headers  # what the proxy need not know
        assert len(server.requests) == 5 and server.connections == 1
        for _, path, headers, _ in server.requests:
            assert path == "/agent-execution/t-1/status" and headers["x-api-key"] == KEY
            assert "proxy-authorization" not in headers  # what the platform need not know


def test_a_tunnel_names_the_port_that_the_url_leaves_out(monkeypatch):
    def refuse(connection, number):
        connection.request()
        connection.answer(403, b"", reason="No")

    with RawServer(refuse) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with configuration("https://api.invalid", max_retries=0) as config:
            with pytest.raises(xtask.ModuleException, match="refused the tunnel: 403 Forbidden$"):
                CALLS["GET"](config)
        (method, target, headers, _), = proxy.requests
    assert (method, target, headers["host"]) == ("CONNECT", "api.invalid:443", "api.invalid:443")


def test_an_event_stream_goes_through_the_tunnel_too(certificate, monkeypatch):
    def script(connection, number):
        connection.request()
        connection.start_stream()
        connection.event("task_finished", task_dict(status="completed"))
        connection.wait_closed()

    context = ssl.create_default_context(cafile=certificate.file)
    with Proxy() as proxy, RawServer(script, certificate.context) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.address)
        with configuration(server.url, ssl_context=context) as config:
            assert [event.type for event in make_task(config).events()] == ["task_finished"]
        assert [request[0] for request in proxy.requests] == ["CONNECT"]


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "*", "other.test,127.0.0.1"])
def test_no_proxy_goes_straight(no_proxy, monkeypatch):
    with Proxy() as proxy, RawServer(echo) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert CALLS["GET"](server.config).id == "t-1"
        assert (proxy.connections, server.connections) == (0, 1)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("address", ["http://user:wrong-pass@127.0.0.1:{}",
                                     "socks5://user:wrong-pass@127.0.0.1:{}",
                                     "http://user:wrong-pass@127.0.0.1:1",
                                     "http:/user:wrong-pass@127.0.0.1:9", "http://user:wrong-pass"])
def test_a_proxy_that_does_not_let_us_through_is_told_without_its_password(scheme, address, monkeypatch,
                                                                           pauses):
    with Proxy("user:right-pass") as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", address.format(proxy.port))
        with configuration(f"{scheme}://api.invalid") as config:
            with pytest.raises(xtask.ModuleException) as failed:
                CALLS["GET"](config)
        told = everything_told(failed.value)
        assert "wrong-pass" not in told and base64.b64encode(b"user:wrong-pass").decode() not in told
        assert failed.value.status_code in (407, 500)


# -- framing


def test_interim_answers_are_passed_over_and_not_taken_for_the_next_requests():
    def script(connection, number):
        while connection.request():
            connection.send("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\n")
            connection.answer(200, task_dict(id=connection.server.requests[-1][1].split("/")[2]))

    with RawServer(script) as server:
        assert [xtask.Task.load(name, server.config).id for name in "abc"] == ["a", "b", "c"]
        assert server.connections == 1


BODY = json.dumps(task_dict(title="read")).encode()

# A head ("|" is a CRLF, # the body's length), and how many connections two calls take; 0: it is none.
HEADS_OF_ANSWERS = {
    "as usual": ("HTTP/1.1 200 OK|Content-Length: #||", 1),
    "no reason": ("HTTP/1.1 200|Content-Length: #||", 1),
    "a space for a reason": ("HTTP/1.1 200 |Content-Length: #||", 1),
    "a letter outside ASCII": ("HTTP/1.1 200 Schön|X: ö|ö: x|Content-Length: #||", 1),
    "a later minor version": ("HTTP/1.9 200 OK|Content-Length: #||", 1),
    "lines that end in LF": ("HTTP/1.1 200 OK\nContent-Length: #\n\n", 1),
    "a name in capitals": ("HTTP/1.1 200 OK|CONTENT-LENGTH: #||", 1),
    "space around a value": ("HTTP/1.1 200 OK|Content-Length:\t  # \t||", 1),
    "no space before a value": ("HTTP/1.1 200 OK|Content-Length:#||", 1),
    "a field over several lines": ("HTTP/1.1 200 OK|X: 1| \tContent-Length: 3|\t2|Content-Length: #||", 1),
    "a value on the next line": ("HTTP/1.1 200 OK|Content-Length:| #||", 1),
    "lines that are no fields": ("HTTP/1.1 200 OK|no field|: x|Content-Length : 3|Content-Length: #||", 1),
    "a CR within a field": ("HTTP/1.1 200 OK|Content-Length: 3\rX: y|Content-Length: #||", 1),
    "empty fields": ("HTTP/1.1 200 OK|X:|Y: |Content-Length: #||", 1),
    "spaces without end": (f"HTTP/1.1 200 OK|X: {' ' * 60_000}y|Content-Length: #||", 1),
    "it closes": ("HTTP/1.1 200 OK|Connection: Close|Content-Length: #||", 2),
    "HTTP/1.0 closes": ("HTTP/1.0 200 OK|Content-Length: #||", 2),
    "HTTP/1.0 that stays": ("HTTP/1.0 200 OK|Connection: Keep-Alive|Content-Length: #||", 1),
    "HTTP/1.0 in two minds": ("HTTP/1.0 200 OK|Connection: keep-alive, close|Content-Length: #||", 2),
    "in two minds": ("HTTP/1.1 200 OK|Connection: keep-alive|Connection: close|Content-Length: #||", 2),
    "no length": ("HTTP/1.1 200 OK||", 2),
    "an empty length": ("HTTP/1.1 200 OK|Content-Length:||", 2),
    "a length twice": ("HTTP/1.1 200 OK|Content-Length: #|Content-Length: # , #||", 1),
    "two lengths": ("HTTP/1.1 200 OK|Content-Length: 3|Content-Length: #||", 0),
    "two lengths in one": ("HTTP/1.1 200 OK|Content-Length: #, 3||", 0),
    "a length that is none": ("HTTP/1.1 200 OK|Content-Length: -7||", 0),
    "a length of many digits": (f"HTTP/1.1 200 OK|Content-Length: {'9' * 5000}||", 0),
    "a coding that changes nothing": ("HTTP/1.1 200 OK|Transfer-Encoding: Identity|Content-Length: #||", 1),
    "a coding before chunked": ("HTTP/1.1 200 OK|Transfer-Encoding: gzip|Transfer-Encoding: chunked||", 0),
    "a coding after chunked": ("HTTP/1.1 200 OK|Transfer-Encoding: chunked|Transfer-Encoding: gzip||", 0),
    "another version": ("HTTP/2 200 OK|Content-Length: #||", 0),
    "another protocol": ("ICY 200 OK|Content-Length: #||", 0),
    "a status of four digits": ("HTTP/1.1 2000 OK|Content-Length: #||", 0),
    "a status below all": ("HTTP/1.1 020 OK|Content-Length: #||", 0),
    "no status": ("HTTP/1.1 OK|Content-Length: #||", 0),
    "a coding that is unknown": ("HTTP/1.1 200 OK|Transfer-Encoding: gzip|Content-Length: #||", 0),
    "many lines": (f"HTTP/1.1 200 OK|{'a: b|' * 300}Content-Length: #||", 1),
    "a long head": (f"HTTP/1.1 200 OK|{('a: ' + 'b' * 995 + '|') * 65}Content-Length: #||", 1),
    "too many lines": (f"HTTP/1.1 200 OK|{'a: b|' * 12_000}Content-Length: #||", 0),
    "a very long line": (f"HTTP/1.1 200 OK {'x' * 70_000}|Content-Length: #||", 0),
}




# What comes after such a head is the next answer, unless the connection is not used again.
UNSURE_HEADS = {
    "chunks and a length": "HTTP/1.1 200 OK|Transfer-Encoding: chunked|Content-Length: 3||{chunks}",
    "chunks in HTTP/1.0": "HTTP/1.0 200 OK|Transfer-Encoding: chunked|Connection: keep-alive||{chunks}",
    "a 204 with a length": "HTTP/1.1 204 No Content|Content-Length: 4||",
    "a 204 with chunks": "HTTP/1.1 204 No Content|Transfer-Encoding: chunked||",
}




def test_no_length_of_a_line_makes_a_body_of_what_follows_it():
    honest = json.dumps(task_dict(title="honest"))
    forged = honest.replace("honest", "forged")

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            line = "X: " + "a" * int(path.split("/")[2])
            lines = "HTTP/1.1 200 OK", line, forged, f"Content-Length: {len(honest)}", "", honest
            connection.send("\r\n".join(lines))

    with RawServer(script) as server, configuration(server.url, max_retries=0) as config:
        for length in [9, *range(2**16 - 30, 2**16 + 5), 2**17 - 1, 2**17]:
            try:
                assert xtask.Task.load(str(length), config).title == "honest"
            except xtask.ModuleException as error:
                assert length > 9 and "head" in str(error)


ODD_HEADS = {
    "a negative chunk": ("200 OK", "-1\r\n" + " " * 99),
    "a 304 with a chunk without end": ("304 N", "1" * 5000),
    "a chunk of no size": ("200 OK", "size\r\n"),
    "a size without end": ("200 OK", "1;" + "x" * 5000),
    "a date beyond all": ("429 N\r\nRetry-After: Mon, 01 Jan 99999999999 00:00:00 GMT", "0\r\n\r\n"),
}


@pytest.mark.parametrize("status, body", ODD_HEADS.values(), ids=ODD_HEADS)
def test_odd_framing_is_a_module_exception(status, body, pauses):
    def script(connection, number):
        connection.request()
        connection.send(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
        if not status.startswith("429"):  # which is asked for again
            connection.wait_closed()

    with RawServer(script) as server, pytest.raises(xtask.ModuleException) as caught:
        xtask.Task.load("t-1", server.config)
    assert "in time" not in str(caught.value)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_what_a_server_sends_after_an_answer_is_nobodys_answer(secure, certificate):
    def script(connection, number):
        while connection.request():
            texts = json.dumps(task_dict(title="x" * 9000)), json.dumps(task_dict(title="y"))
            head = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}"
            connection.send("".join(head.format(len(text), text) for text in texts))  # in one TLS record

    with RawServer(script, certificate.context if secure else None) as server:
        context = ssl.create_default_context(cafile=certificate.file)
        with configuration(server.url, ssl_context=context) as config:
            titles = [xtask.Task.load("t-1", config).title[:1] for _ in range(3)]
    assert titles == ["x"] * 3


CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", ["{:x}", "{:016x}", "{:X} ; a=b"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_is_whole_with_its_last_chunk(method, size):
    def script(connection, number):
        connection.request()
        text = json.dumps(task_dict())
        connection.send(f"{CHUNKED}{size.format(len(text))}\r\n{text}\r\n0\r\n")  # and no line end more
        connection.wait_closed()

    with RawServer(script) as server:
        began = time.monotonic()
        CALLS[method](server.config)
        assert time.monotonic() - began < 5 and len(server.requests) == 1


@pytest.mark.parametrize("cut", [0, 30])
def test_an_answer_that_nobody_asked_for_is_nobodys(cut):
    def script(connection, number):
        while connection.request():
            body = json.dumps(task_dict())
            whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            connection.send(whole + whole.replace("t-1", "bad")[: cut or None])

    with RawServer(script) as server:
        assert [xtask.Task.load("t-1", server.config).id for _ in range(3)] == ["t-1"] * 3
        assert server.connections == 3


def test_a_connection_that_is_to_close_is_not_kept_whatever_came_before_the_answer():
    def script(connection, number):
        connection.request()
        connection.send("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        connection.answer(200, task_dict(), [("Connection", "close")])
        connection.wait_closed()

    with RawServer(script) as server:
        for _ in range(2):
            xtask.Task.load("t-1", server.config)
        assert server.connections == 2


def test_a_proxy_of_https_itself_is_refused_before_it_gets_a_byte(monkeypatch):
    with RawServer(play) as proxy:
        monkeypatch.setenv("http_proxy", f"https://user:s3cret@127.0.0.1:{proxy.port}")
        with configuration("http://platform.test", max_retries=0) as config:
            with pytest.raises(xtask.ModuleException, match="must have a URL that starts with http://") as caught:
                xtask.Task.load("t-1", config)
        assert proxy.connections == 0 and "s3cret" not in "".join(traceback.format_exception(
            type(caught.value), caught.value, caught.value.__traceback__))


def test_a_204_ends_with_its_head_whatever_it_says_of_chunks():
    def script(connection, number):
        while connection.request():
            if connection.server.requests[-1][0] == "DELETE":
                connection.send("HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n\r\n")
            else:
                connection.answer(200, task_dict(status="stopped"))

    with RawServer(script) as server:
        assert make_task(server.config).stop().status == "stopped"


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------


def site(pages):
    """A script that serves pages by path: bytes, the arguments of an answer, or a function."""

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            page = pages[path.partition("?")[0]]
            if callable(page):
                return page(connection)  # and hang up
            connection.answer(*((200, page) if isinstance(page, bytes) else page))

    return script


def task_with(config, *files, **changes):
    return make_task(config, input={"text": changes.pop("text", None), "files": list(files)}, **changes)


def read_files(server, *paths, **options):
    """The contents that `get_human_readable_files()` gives for paths on a trusted server, or for URLs."""
    options.setdefault("trusted_file_hosts", ("127.0.0.1",))
    urls = [path if ":" in path else server.url + path for path in paths]
    with configuration(server.url, **options) as config:
        got = task_with(config, *urls).get_human_readable_files()
    assert [item["url"] for item in got] == urls
    return [item["content"] for item in got]


FAILED = "Error: the file could not be fetched"


# -- which addresses

PRIVATE = """
    127.0.0.1 127.1 127.0.1 127.255.255.254 0x7f.1 0x7f000001 0177.0.0.1 017700000001 2130706433 0 0.0.0.0
    localhost LOCALHOST \uff11\uff12\uff17.0.0.1 127\u30020\u30020\u30021
    \u2460\u2461\u2466.\u24ea.\u24ea.\u2460
    [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::FFFF:7f00:1] [::127.0.0.1]
    [64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::7f00:1]
    [2002:7f00:1::] [2002:a00:1::1] [2002:a9fe:a9fe::]
    10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 169.254.169.254 169.254.170.2 [fd00:ec2::254]
    [::ffff:169.254.169.254] [::ffff:10.0.0.1] [fe80::1] [fc00::1] [ff02::1] [2001:db8::1]
    224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 198.18.0.1 192.0.2.1
    [::ffff:224.0.0.1] [64:ff9b::e000:1] [64:ff9b::f000:1] [2002:e000:1::] 10.0.0.1.test 6to4.test mixed.test
""".split()


@pytest.mark.parametrize("host", PRIVATE)
def test_a_private_address_sees_no_byte_however_it_is_spelled(host, dialled, names, caplog):
    names.update({"10.0.0.1.test": [["10.0.0.1"]], "6to4.test": [["2002:7f00:1::"]],
                  "mixed.test": [["127.0.0.1", "10.0.0.1"]]})
    with RawServer(site({"/a.txt": b"secret"})) as server:
        url = f"http://{host}:{server.port}/a.txt?token=hidden"
        assert read_files(server, url, trusted_file_hosts=()) == [FAILED]
        assert (dialled, server.connections) == ([], 0)
    assert "trusted_file_hosts" in caplog.text and "hidden" not in caplog.text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "inner.test", "INNER.test"])
def test_a_trusted_host_works(host, names):
    names["inner.test"] = [["127.0.0.1"]]
    with RawServer(site({"/a.txt": b"hello"})) as server:
        url = f"http://{host}:{server.port}/a.txt"
        assert read_files(server, url, trusted_file_hosts=(host,)) == ["hello"]
        assert read_files(server, url, trusted_file_hosts=("other.test",)) == [FAILED]
        assert server.connections == 1


@pytest.mark.parametrize("url", ["file://{path}", "FILE://{path}", "file:{path}", "{path}", "data:,a.txt",
                                 "ftp://127.0.0.1:{port}/a.txt", "gopher://127.0.0.1:{port}/a.txt",
                                 "//127.0.0.1:{port}/a.txt", "http:/a.txt", "http:///a.txt", "unix:/a.txt",
                                 "http://127.0.0.1:x/a.txt",
                                 "http://\0/a.txt", "http://..a/a.txt", "http://127.0.0.%31:{port}/a.txt",
                                 "http://%6cocalhost:{port}/a.txt", "http://[fe80::1%25lo]/a.txt",
                                 "http://x@127.0.0.1:{port}/a.txt", "http://127.0.0.\uff0531:{port}/a.txt",
                                 "http://127.0.0.\ufe6a31:{port}/a.txt", "http://localhos\uff0574:{port}/a.txt",
                                 "http://127.0.0.1:{port}\\.x.test/a.txt"])
def test_what_is_no_http_url_is_not_opened(url, tmp_path, dialled):
    path = tmp_path / "a.txt"
    path.write_text("secret")
    with RawServer(site({"/a.txt": b"secret"})) as server:
        given = url.format(path=path, port=server.port)
        with configuration(server.url, trusted_file_hosts=("127.0.0.1",)) as config:
            assert task_with(config, given).get_human_readable_files() == [{"url": given, "content": FAILED}]
        assert (server.connections, dialled) == (0, [])


@pytest.mark.parametrize("target", ["http://localhost:{port}/b.txt", "http://127.1:{port}/b.txt",
                                    "//[::1]:{port}/b.txt", "http://169.254.169.254/b.txt", "file://{path}",
                                    "ftp://127.0.0.1:{port}/b.txt",
                                    "data:,b.txt", "http://127.0.0.%31:{port}/b.txt",
                                    "http://[::ffff:127.0.0.1]:{port}/b.txt"])
def test_a_redirect_is_judged_again(target, tmp_path, dialled):
    path = tmp_path / "b.txt"
    path.write_text("secret")
    with RawServer(site({"/b.txt": b"secret"})) as inner, RawServer(site({})) as outer:
        location = target.format(port=inner.port, path=path)
        outer.script = site({"/a.txt": moved(location)})
        assert read_files(outer, "/a.txt") == [FAILED]
        assert (inner.connections, outer.connections, dialled) == (0, 1, ["127.0.0.1"])


def test_five_redirects_are_followed_and_no_sixth():
    pages = {f"/{n}.txt": moved(f"/{n + 1}.txt", 301 + n % 2) for n in range(6)}
    with RawServer(site({**pages, "/6.txt": b"arrived"})) as server:
        first, second = read_files(server, "/1.txt", "/0.txt")
        assert first == "arrived"
        assert second.startswith("Error: ") and "127.0.0.1" not in second
        assert len(server.requests) == 6 + 6


def test_a_redirect_to_a_url_of_megabytes_costs_nothing():
    began = time.process_time()
    with RawServer(site({"/a.txt": moved("/" + "\xff" * 4_000_000), "/b.txt": b"good"})) as server:
        assert read_files(server, "/a.txt", "/b.txt") == [FAILED, "good"]
        assert [path for _, path, *_ in server.requests if path not in ("/a.txt", "/b.txt")] == []
    assert time.process_time() - began < 2


def test_a_redirect_to_another_host_asks_that_host_by_its_name(names):
    names["inner.test"] = [["127.0.0.1"]]
    with RawServer(site({"/b.txt": b"hello"})) as inner, RawServer(site({})) as outer:
        outer.script = site({"/a.txt": moved(f"http://inner.test:{inner.port}/b.txt")})
        assert read_files(outer, "/a.txt", trusted_file_hosts=("127.0.0.1", "inner.test")) == ["hello"]
        assert inner.requests[0][2]["host"] == f"inner.test:{inner.port}"


@pytest.mark.parametrize("scheme, port", [("http", 80), ("https", 443)])
def test_a_url_without_a_port_goes_to_the_ports_of_its_scheme(scheme, port, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: asked.append(given[:2]) or [])
    with configuration(f"{scheme}://nowhere.test", max_retries=0) as config:
        with pytest.raises(xtask.ModuleException, match="nowhere.test has no address"):
            xtask.Task.load("t-1", config)
    assert asked == [("nowhere.test", port)]


def test_the_judged_address_is_the_one_that_is_connected_to(names, dialled):
    names["rebind.test"] = [["93.184.216.34"], ["127.0.0.1"]]  # another answer to a second look-up
    with RawServer(site({"/a.txt": b"hello"})) as server:
        dialled.port = server.port
        assert read_files(server, "http://rebind.test/a.txt") == ["hello"]
        assert dialled == ["93.184.216.34"]
        assert server.requests[0][2]["host"] == "rebind.test"


def test_a_name_with_a_public_and_a_private_address_leads_to_no_private_one(names, dialled):
    names["mixed.test"] = [["93.184.216.34", "10.0.0.1"]]
    with RawServer(site({})) as server:
        read_files(server, "http://mixed.test/a.txt")
    assert "10.0.0.1" not in dialled


@pytest.mark.parametrize("host", ["93.184.216.34", "[::ffff:93.184.216.34]", "[64:ff9b::5db8:d822]",
                                  "[2002:5db8:d822::1]", "[2606:2800:220:1::1]"])
def test_a_public_address_is_allowed(host, dialled, caplog):
    with RawServer(site({})) as server:
        assert read_files(server, f"http://{host}/a.txt") == [FAILED]  # the fixture refuses to go there
    assert len(dialled) == 1 and "trusted_file_hosts" not in caplog.text


def test_a_refused_address_and_a_failed_one_read_alike(dialled):
    with socket.socket() as deaf, RawServer(site({"/cut.txt": RawConnection.reset})) as server:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        got = read_files(server, f"http://127.0.0.1:{port}/closed.txt", f"http://localhost:{port}/a.txt",
                         "http://10.0.0.1/a.txt", "http://93.184.216.34/off.txt", "/cut.txt")
    assert got == [FAILED] * 5


def test_a_files_server_gets_no_key(caplog):
    with RawServer(site({"/a.txt": moved("/b.txt"), "/b.txt": b"hello"})) as server:
        assert read_files(server, "/a.txt") == ["hello"]
        assert len(server.requests) == 2 and KEY not in repr(server.requests)
        assert {request[0] for request in server.requests} == {"GET"}


LITERALS = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]",
            "169.254.169.254", "10.0.0.1", "\uff11\uff12\uff17.0.0.1"]


@pytest.mark.parametrize("host", LITERALS)
def test_through_a_proxy_a_private_literal_is_refused(host, monkeypatch):
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        assert read_files(proxy, f"http://{host}/a.txt", trusted_file_hosts=()) == [FAILED]
        assert proxy.connections == 0


@pytest.mark.parametrize("host", ["files.invalid", "93.184.216.34", "127.0.0.1", "[2606:2800:220:1::1]"])
def test_through_a_proxy_names_public_literals_and_trusted_hosts_work(host, monkeypatch, names):
    names["files.invalid"] = [["127.0.0.1"]]  # what it is here is not what it is to the proxy
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        assert read_files(proxy, f"http://{host}/a.txt") == ["through the proxy"]
        assert proxy.requests[0][1] == f"http://{host}/a.txt"


def test_through_a_proxy_a_redirect_is_judged_again(monkeypatch):
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        assert read_files(proxy, "http://files.invalid/moved.txt") == [FAILED]
        assert len(proxy.requests) == 1


def test_files_come_over_tls(certificate):
    context = ssl.create_default_context(cafile=certificate.file)
    with RawServer(site({"/a.txt": b"hello"}), certificate.context) as server:
        assert read_files(server, "/a.txt", ssl_context=context) == ["hello"]
        assert read_files(server, "/a.txt") == [FAILED]


# -- bounded, in order, decoded

def stuck(connection):
    connection.send("HTTP/1.1 200 OK\r\n\r\nx")
    connection.wait_closed()


def test_a_file_without_end_is_cut_at_10_mib():
    sent = []

    def endless(connection):
        connection.send("HTTP/1.1 200 OK\r\n\r\n")
        while len(sent) < 64:
            connection.send(b"x" * MIB)
            sent.append(1)

    with RawServer(site({"/endless.txt": endless, "/good.txt": b"good"})) as server:
        first, second = read_files(server, "/endless.txt", "/good.txt")
        assert (first, second) == ("Error: the file is too large", "good")
    assert len(sent) < 40


def test_what_a_file_that_failed_held_is_free_for_the_others(monkeypatch):
    monkeypatch.setattr(xtask, "_MAX_FILES", 100)
    monkeypatch.setattr(xtask, "_FILE_THREADS", 1)
    cut_off = "HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + "x" * 80
    files = {"/cut.txt": lambda connection: connection.send(cut_off), "/good.txt": b"y" * 90}
    with RawServer(site(files)) as server:
        assert read_files(server, "/cut.txt", "/good.txt") == [FAILED, "y" * 90]


def test_ten_mib_are_allowed_and_no_byte_more():
    with RawServer(site({"/fits.txt": b"x" * 10 * MIB, "/over.txt": b"x" * (10 * MIB + 1)})) as server:
        fits, over = read_files(server, "/fits.txt", "/over.txt")
        assert len(fits) == 10 * MIB and over.startswith("Error: ")


def test_what_is_over_32_mib_in_all_fails_and_the_others_arrive():
    together = threading.Barrier(5)

    def big(connection):
        connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {8 * MIB}\r\n\r\n")
        connection.send(b"x" * (6 * MIB))  # 30 MiB in all
        together.wait(10)
        connection.send(b"x" * (2 * MIB))

    with RawServer(site({f"/{n}.txt": big for n in range(5)})) as server:
        got = read_files(server, *(f"/{n}.txt" for n in range(5)))
    arrived = [content for content in got if not content.startswith("Error: ")]
    assert 3 <= len(arrived) <= 4 and {len(content) for content in arrived} == {8 * MIB}


def test_a_file_that_trickles_is_given_up_when_the_time_is_over():
    over = threading.Event()

    def trickle(connection):
        connection.send("HTTP/1.1 200 OK\r\n\r\n")
        while not over.wait(0.1):
            connection.send("x")

    with RawServer(site({"/trickle.txt": trickle, "/good.txt": b"good"})) as server:
        started = time.monotonic()
        assert read_files(server, "/trickle.txt", "/good.txt", timeout=0.5) == [FAILED, "good"]
        assert time.monotonic() - started < 3
        for thread in server.threads[1:]:
            thread.join(5)
        ended = not any(thread.is_alive() for thread in server.threads[1:])
        over.set()
    assert ended  # its socket was shut down


def test_ten_slow_files_are_fetched_eight_at_a_time_and_cost_one_time_out():
    pages = {f"/{n}.txt": stuck for n in range(10)}
    with RawServer(site(pages)) as server:
        before, started = threading.active_count(), time.monotonic()
        assert read_files(server, *pages, timeout=0.4) == [FAILED] * 10
        assert time.monotonic() - started < 3
        assert {server.closed.get(timeout=5) for _ in range(8)} == set(range(1, 9))  # sockets were shut down
        assert server.connections == 8
        for thread in server.threads[1:]:
            thread.join(5)
        assert threading.active_count() <= before


def test_the_good_ones_among_slow_ones_arrive_in_order():
    pages = {f"/slow{n}.txt": stuck for n in range(7)}
    pages.update({f"/good{n}.txt": b"good %d" % n for n in range(4)})
    order = ["/good0.txt", "/slow0.txt", "/slow1.txt", "/good1.txt", "/slow2.txt", "/slow3.txt", "/slow4.txt",
             "/good2.txt", "/slow5.txt", "/slow6.txt", "/good3.txt"]
    with RawServer(site(pages)) as server:
        got = read_files(server, *order, timeout=1.0)
    assert got == [FAILED if "slow" in path else f"good {path[5]}" for path in order]


def test_a_thousand_urls_start_eight_threads(dialled):
    gate, lock, now, most = threading.Event(), threading.Lock(), [], []

    def page(connection):
        with lock:
            now.append(1)
            most.append(len(now))
            if len(now) == 8:
                gate.set()
        assert gate.wait(10)  # the first eight are there at once
        with lock:
            now.pop()
        connection.answer(200, b"x")

    with RawServer(lambda connection, number: connection.request() and page(connection)) as server:
        got = read_files(server, *(f"/{n}.txt" for n in range(1000)))
        assert got == ["x"] * 1000
    assert len(dialled.threads) == 8 and max(most) == 8


def raw(text):
    return lambda connection: connection.send(text)


@pytest.mark.parametrize("page", [(404, b"secret page"), (500, b"secret page"), (204, b""), (206, b"part"),
                                  raw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"),
                                  raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n"),
                                  raw("no HTTP at all\r\n\r\n"), RawConnection.reset],
                         ids=["404", "500", "204", "206", "cut", "cut chunks", "no HTTP", "reset"])
def test_a_file_that_fails_says_so_and_the_others_are_not_lost(page):
    with RawServer(site({"/bad.txt": page, "/good.txt": b"good"})) as server:
        first, bad, last = read_files(server, "/good.txt", "/bad.txt", "/good.txt")
    assert (first, last) == ("good", "good")
    assert bad.startswith("Error: ") and "127.0.0.1" not in bad and "secret" not in bad


@pytest.mark.parametrize("content_type, content, text", [
    ("text/plain; charset=utf-8", "\u00e9\u20ac".encode(), "\u00e9\u20ac"),
    ("text/plain", "\u00e9\u20ac".encode(), "\u00e9\u20ac"),
    (None, "\u00e9\u20ac".encode(), "\u00e9\u20ac"),
    ("text/plain; charset=ISO-8859-1", b"\xe9", "\u00e9"),
    ("text/plain; charset=latin-1", b"\xe9", "\u00e9"),
    ("text/plain; charset=iso-8859-15", b"\xa4", "\u20ac"),
    ('text/csv; charset="windows-1252"', b"\x80", "\u20ac"),
    ("text/plain; charset=cp1251", b"\xcf", "\u041f"),
    ("text/plain; charset=koi8-r", b"\xf0", "\u041f"),
    ("text/plain; charset=Shift_JIS", b"\x82\xa0", "\u3042"),
    ("text/plain; charset=euc-jp", b"\xa4\xa2", "\u3042"),
    ("text/plain; charset=euc-jp", b"\xa4\xa2\xff", "\u3042\ufffd"),
    ("text/plain; charset=iso-2022-jp", b"\x1b$B$\"\x1b(B", "\u3042"),
    ("text/plain; charset=gb18030", b"\xd6\xd0", "\u4e2d"),
    ("text/plain; charset=big5", b"\xa4\xa4", "\u4e2d"),
    ("text/plain; charset=euc-kr", b"\xb0\xa1", "\uac00"),
    ("text/plain; charset=utf-16", "\u00e9".encode("utf-16"), "\u00e9"),
    ("text/plain; charset=us-ascii", b"a\xe9", "a\ufffd"),
    ("text/plain; charset=utf-8", b"a\xffb", "a\ufffdb"),
    ("text/plain; charset=nonsense", "\u00e9".encode(), "\u00e9"),
    ("text/plain; charset=utf-999", "\u00e9".encode(), "\u00e9"),
    ("text/plain; charset=rot13", b"abc", "abc"),
    ("text/plain; charset=zip", b"abc", "abc"),
    ("text/plain; charset=base64", b"YWJj", "YWJj"),
    ("text/plain; charset=unicode_escape", b"\\x41", "\\x41"),
    ("text/plain; charset=idna", b"xn--a", "xn--a"),
    ("text/plain; charset=\"utf-8\0\"", b"abc", "abc"),
    ("text/plain; charset=nonsense", b"a\xffb", "a\ufffdb"),
    ("text/plain; charset*=utf-8''x; charset*0=a", "\u00e9".encode(), "\u00e9"),
])
def test_a_file_is_decoded_by_its_charset(content_type, content, text):
    headers = [("Content-Type", content_type)] if content_type else []
    with RawServer(site({"/a.txt": (200, content, headers)})) as server:
        assert read_files(server, "/a.txt") == [text]


def test_a_url_is_sent_percent_encoded_once():
    with answering((200, b"x")) as server:
        assert read_files(server, "/\u00e9 b/%41.txt?q=\u00fc r&s=%20#part") == ["x"]
        assert server.requests[0][1] == "/%C3%A9%20b/%41.txt?q=%C3%BC%20r&s=%20"
        assert (server.requests[0][2]["accept"], server.requests[0][2]["connection"]) == ("*/*", "close")


@pytest.mark.parametrize("spelled, asked",
                         [(b"/\xc3\xa9.txt", "/%C3%A9.txt"), (b"/\xe9.txt", "/%EF%BF%BD.txt")])
def test_a_redirect_may_spell_its_target_in_utf_8(spelled, asked):
    target = spelled.decode("latin-1")  # as the raw server and http.client have it
    with RawServer(site({"/a.txt": moved(target), asked: b"hello"})) as server:
        assert read_files(server, "/a.txt") == ["hello"]


# -- the message

KINDS = {"/a.txt": "read", "/b.JSON?v=1.pdf#x.png": "read", "/c.PDF": "pdf", "/d.pdf?x=.txt": "pdf",
         "/e.jpeg": "image", "/f.WebP#a.txt": "image", "/g.zip": "other", "/h": "other", "/txt": "other",
         "/i.txt.gz": "other", "/m.d/n": "other"}
for kind, extensions in {
    "read": "txt csv json xml html htm md rst yaml yml py js ts java c cpp h cs go rb php sh",
    "image": "jpg jpeg png gif bmp tiff webp svg",
    "other": "docx mp3 tif jsonl pyc p",
}.items():
    KINDS.update((f"/of.{extension}", kind) for extension in extensions.split())


def test_the_kind_of_a_file_is_the_extension_of_its_path(no_agno, dialled):
    urls = {f"https://files.test{path}": kind for path, kind in KINDS.items()}
    urls.update({"https://files.pdf": "other", "https://files.txt?a": "other", "a.csv": "read"})
    with configuration("http://127.0.0.1:1") as config:
        task = task_with(config, *urls, disable_attachment_injection=True)
        assert task.get_files() == [url for url in urls if urls[url] == "pdf"]
        assert task.get_images() == [url for url in urls if urls[url] == "image"]
        assert task.get_human_readable_files() == [{"url": url} for url in urls if urls[url] == "read"]
    assert dialled == []


U = "http://127.0.0.1:{port}"
READ = '{{"url": "' + U + '/r.txt", "content": "caf\\u00e9\\n\\"x\\""}}'
EMPTY = '{{"url": "' + U + '/empty.csv", "content": ""}}'


@pytest.mark.parametrize("text, files, changes, message", [
    ("Hi\nthere ", None, {}, "Hi\nthere "),
    ("Hi", [], {}, "Hi"),
    (None, None, {}, ""),
    ("", [], {}, ""),
    (None, ["/a.pdf", "/b.png"], {}, f"Files: {U}/a.pdf, {U}/b.png"),
    ("", ["/a.zip"], {}, f"Files: {U}/a.zip"),
    ("Hi", ["/a.pdf"], {}, f"Hi\nFiles: {U}/a.pdf"),
    ("Hi", ["/r.txt"], {}, f"Hi\nFiles: {U}/r.txt\nFiles contents:\n{READ}"),
    (None, ["/r.txt", "/a.pdf", "/empty.csv"], {},
     f"Files: {U}/r.txt, {U}/a.pdf, {U}/empty.csv\nFiles contents:\n{READ}\n{EMPTY}"),
    ("Hi", ["/a.pdf", "/r.txt"], {"disable_attachment_injection": True},
     f'Hi\nFiles: {U}/a.pdf, {U}/r.txt\nFiles contents:\n{{{{"url": "{U}/r.txt"}}}}'),
    ("Hi", ["/a.pdf"], {"disable_attachment_injection": True}, f"Hi\nFiles: {U}/a.pdf"),
])
def test_the_message_byte_for_byte(text, files, changes, message):
    pages = {"/r.txt": 'caf\u00e9\n"x"'.encode(), "/empty.csv": b""}
    with RawServer(site(pages)) as server:
        urls = files and [server.url + path for path in files]
        with configuration(server.url, trusted_file_hosts=["127.0.0.1"]) as config:
            task = make_task(config, input={"text": text, "files": urls}, **changes)
            assert task.to_message() == message.format(port=server.port)
            assert asyncio.run(task.ato_message()) == task.to_message()
        if changes:
            assert server.connections == 0


def test_a_file_that_fails_stands_in_the_message_as_an_error():
    with RawServer(site({"/a.txt": (404, b"")})) as server:
        with configuration(server.url, trusted_file_hosts=["127.0.0.1"]) as config:
            message = task_with(config, server.url + "/a.txt", "http://127.1/b.txt", text="Hi").to_message()
    lines = message.split("\n")
    assert lines[:3] == ["Hi", f"Files: {server.url}/a.txt, http://127.1/b.txt", "Files contents:"]
    assert json.loads(lines[3])["content"].startswith("Error: ")
    assert json.loads(lines[4]) == {"url": "http://127.1/b.txt", "content": FAILED}


def test_a_text_that_is_none_is_in_the_message_as_it_came():
    task = xtask.Task.from_dict(task_dict(input={"text": {"a": 1}, "files": None}))
    assert task.to_message() == "{'a': 1}"


# -- agno


class StandIn:
    """What agno's media classes share: the fields, and that one of the sources must not be empty."""

    def __init__(self, **given):
        if not (given.get("url") or given.get("content")):
            raise ValueError("at least one source is needed")
        self.__dict__.update({"url": None, "content": None, "filename": None, "mime_type": None}, **given)


@pytest.fixture(params=["stand-in", "installed"])
def media(request, monkeypatch):
    """agno.media: one of ours, so that the rules are tested everywhere, and the real one where it is."""
    if request.param == "installed":
        return pytest.importorskip("agno.media")
    media = types.ModuleType("agno.media")
    media.File, media.Image = type("File", (StandIn,), {}), type("Image", (StandIn,), {})
    monkeypatch.setitem(sys.modules, "agno", types.ModuleType("agno"))
    monkeypatch.setitem(sys.modules, "agno.media", media)
    return media


@pytest.fixture
def with_files(media):
    """Calls a method of a task whose files are at the paths of a trusted server, or at URLs."""

    def call(server, method, *paths, **options):
        urls = [path if ":" in path else server.url + path for path in paths]
        with configuration(server.url, trusted_file_hosts=["127.0.0.1"], **options) as config:
            return getattr(task_with(config, *urls), method)()

    return call


def test_agno_gets_a_pdf_with_its_bytes_its_name_and_its_type(media, with_files):
    pages = {"/x/My%20report.pdf": b"%PDF a", "/b.PDF": (200, b"%PDF b", [("Content-Type", "text/html")])}
    with RawServer(site(pages)) as server:
        first, second = with_files(server, "get_files", "/x/My%20report.pdf?sig=1", "/b.PDF")
    assert type(first) is type(second) is media.File
    pdf = "application/pdf"
    assert (first.content, first.filename, first.mime_type) == (b"%PDF a", "My report.pdf", pdf)
    assert (second.content, second.filename, second.mime_type) == (b"%PDF b", "b.PDF", pdf)


@pytest.mark.parametrize("path", ["/..%2F..%2Fetc%2Fpasswd.pdf", "/a%00b%0d%0a.pdf", "/a%22%3Cb%3E%5C.pdf",
                                  "/.pdf.pdf"])
def test_agno_gets_a_clean_file_name(path, with_files):
    with RawServer(site({path: b"%PDF"})) as server:
        (file,) = with_files(server, "get_files", path)
    assert file.content == b"%PDF" and file.filename.endswith(".pdf")
    assert not set(file.filename) & set("/\\\0\r\n\"<>")


def test_agno_gets_the_url_of_a_pdf_that_could_not_be_fetched_so_that_nothing_is_lost(media, with_files):
    pages = {"/gone.pdf": (404, b""), "/empty.pdf": b"", "/a.pdf": b"%PDF", "/big.pdf": b"x" * (10 * MIB + 1)}
    with RawServer(site(pages)) as server:
        got = with_files(server, "get_files", *pages)
        assert [type(file) for file in got] == [media.File] * 4
        assert [file.url for file in got] == [server.url + "/gone.pdf", server.url + "/empty.pdf", None,
                                              server.url + "/big.pdf"]


def test_agno_gets_an_image_with_its_url_unfetched(media, with_files):
    with RawServer(site({})) as server:
        got = with_files(server, "get_images", "/a.png?x=1", "/b.jpg")
        assert [(type(image), image.url) for image in got] == [(media.Image, server.url + "/a.png?x=1"),
                                                               (media.Image, server.url + "/b.jpg")]
        assert server.requests == []


@pytest.mark.parametrize("method, end", [("get_files", "pdf"), ("get_images", "png")])
@pytest.mark.parametrize("url", ["http://localhost:{port}/a.{end}?token=hidden",
                                 "http://127.1/a.{end}?hidden",
                                 "http://169.254.169.254/a.{end}?hidden", "http://127.0.0.%31/a.{end}?hidden",
                                 "http://[::ffff:127.0.0.1]:{port}/a.{end}?hidden",
                                 "http://127.0.0.1\\.x.test/a.{end}?hidden", "file:///etc/hidden/a.{end}",
                                 "ftp://93.184.216.34/hidden/a.{end}", "http://e.com:hidden/a.{end}",
                                 "http://[::1/hidden/a.{end}"])
def test_agno_does_not_get_a_url_that_our_rules_refuse(method, end, url, with_files, caplog, dialled):
    with RawServer(site({f"/ok.{end}": b"%PDF"})) as server:
        got = with_files(server, method, url.format(port=server.port, end=end), f"/ok.{end}")
    assert len(got) == 1 and (got[0].content == b"%PDF" or got[0].url == f"{server.url}/ok.{end}")
    assert set(dialled) <= {"127.0.0.1"} and server.connections <= 1
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", xtask.__name__)
    assert "hidden" not in caplog.text


def test_agno_does_not_get_a_refused_url_that_the_time_did_not_suffice_for(with_files, caplog):
    pages = {f"/{n}.pdf": stuck for n in range(8)}
    with RawServer(site(pages)) as server:
        got = with_files(server, "get_files", *pages, "http://169.254.169.254/a.pdf", timeout=0.4)
    assert [file.url for file in got] == [server.url + path for path in pages]
    assert len(caplog.records) == 1


def test_agno_does_not_get_a_pdf_that_redirects_to_a_private_address(with_files, dialled):
    with RawServer(site({"/a.pdf": moved("http://10.0.0.1/a.pdf")})) as server:
        assert with_files(server, "get_files", "/a.pdf") == []
    assert dialled == ["127.0.0.1"]


# ---------------------------------------------------------------------------
# Terminal and README
# ---------------------------------------------------------------------------

README = HERE / "README.md"
HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\re\x08f\x00g\x7fh"  # sets a title, clears, colours, goes back
WIDE = "Größe 漢字 😀 \ud83d end"  # with half a surrogate pair, as JSON can carry it
LONG = "long " * 60
RESULT = "first line\n\tsecond line\n" + "word " * 50
LOGIN_URL = "https://login.example.com/authorize?state=" + "s" * 120
# A program of its own as a shell starts it, with SIGINT on.
PROGRAM = """
import signal, sys, xtask
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(xtask.main(sys.argv[1:]))
"""
# Runs one after another, whose pauses take no time; the exit code stands behind the output.
RUNS = """
import json, os, sys, xtask
xtask._wait = lambda seconds, scope=None: None
before = dict(os.environ)

def job(environ, words):
    os.environ.clear()
    os.environ.update(before, **environ)
    print(end=f"\\v{xtask.main(words)}")
"""


def quick_agent(task):
    """Every kind of event that has a line of its own, at once."""
    thought = {"title": "Plan it", "confidence": 0.9, "thought": "Two steps", "action": "Search"}
    yield "think", {"request_id": "r1", "operation_id": "think", "payload": {"input": thought}}
    call = {"request_id": "r2", "operation_id": "find", "tool_name": "web-search", "payload": {"q": LONG}}
    yield "tool_call_request", call
    yield "tool_call_result", {**call, "result": {"hits": 3}, "is_error": False}
    yield "tool_call_result", {**call, "tool_name": "mailer", "result": "no such box", "is_error": True}
    yield "sub_agent_trigger", {"agent_id": "helper-7", "query": "Check the currency", "files": []}
    login = {"url": LOGIN_URL, "server_name": "weather", "access_token": "tok-123"}
    yield "auth_event", {"type": "login_required", "data": login}
    yield "newer_kind", {"card": "chart"}
    yield "chunk", RESULT[:15]
    yield "chunk", RESULT[15:]
    return RESULT


def hostile_agent(text):
    """All that an agent can send, made of one text."""

    def agent(task):
        thought = {"title": text, "thought": text}
        yield "think", {"request_id": "r1", "operation_id": text, "payload": {"input": thought}}
        call = {"request_id": "r2", "operation_id": text, "tool_name": text, "payload": {text: text}}
        yield "tool_call_request", call
        yield "tool_call_result", {**call, "result": text}
        yield "sub_agent_trigger", {"agent_id": text, "query": text}
        yield "auth_event", {"type": "login_required", "data": {"url": f"https://x/{text}", "message": text}}
        yield f"kind{text}", text
        task.update(internal_status=text)
        yield "task_updated", task
        yield "chunk", text
        return text

    return agent


def program_environment(environ=(), **more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment.update(PYTHONPATH=str(HERE), PYTHONIOENCODING="utf-8", COLUMNS="100")
    return {**environment, **dict(environ), **more}


def start(*arguments, code=PROGRAM, environ=(), env=(), **options):
    """The terminal program as a process of its own, with warnings as errors."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
                            env=program_environment(environ, **dict(env)), **options)


def finish(process, encoding="utf-8", timeout=20):
    """(exit code, stdout, stderr) of a run that was started; none may show a traceback or hang."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return (process.returncode, *texts(out or b"", err or b"", encoding))


def texts(out, err, encoding="utf-8"):
    """What was written, as text; none may show a traceback or a warning."""
    out, err = out.decode(encoding), err.decode()
    assert "Traceback" not in out + err and "Exception ignored" not in err and "Warning" not in err, err
    return out, err


def terminal(*arguments, encoding="utf-8", **options):
    """(exit code, stdout, stderr) of one run."""
    with start(*arguments, **options) as process:
        return finish(process, encoding)


@pytest.fixture(scope="module")
def terminals():
    """A function for [(exit code, stdout, stderr)] of many runs, for which one process starts; `environ` is
    one for all or a list with one for each."""
    with contextlib.ExitStack() as stack:
        @functools.lru_cache(None)
        def worker(encoding):
            return stack.enter_context(Worker(RUNS, PYTHONIOENCODING=encoding))

        def run(words, environ, encoding):
            out, err = texts(*worker(encoding).do(environ, words), encoding)
            out, _, code = out.rpartition("\v")
            return int(code), out, err

        def run_all(commands, environ, encoding="utf-8"):
            environs = environ if isinstance(environ, list) else [environ] * len(commands)
            return [run(*given, encoding) for given in zip(commands, environs)]

        yield run_all


def played(platform, prompt="Sum up", agent_id="my-agent", **options):
    """A task that the platform has played to its end."""
    task = whole.Task.create(agent_id, prompt, configuration=platform.configuration, events_streaming=True,
                             **options)
    list(task.events())
    return task.reload()


def masked(text):
    """A timeline without what differs from run to run: times, durations and ids."""
    text = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text)
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", re.sub(r"after \d+:\d\d", "after M:SS", text))


def one_error_line(err):
    return err.startswith("xtask: ") and err.endswith("\n") and err.count("\n") == 1


# What each command shows a person, beside exit code 0 and an empty stderr.
SHOWN = {
    "run": ["Plan it", "web-search", "mailer", "no such box", "helper-7", "Check the currency", "weather",
            LOGIN_URL, "newer_kind", "completed", RESULT],
    "watch": ["Plan it", "web-search", "helper-7", LOGIN_URL, "completed", RESULT],
    "show": ["completed", "Quarter", RESULT],
    "log": ["Sum up", "Plan it", "web-search", "mailer", "helper-7", LOGIN_URL, RESULT],
    "stop": ["completed", "Quarter"],
    "list": ["completed", "Quarter"],
}


def words_of(command, task):
    """The whole command: of a played task, or that plays another."""
    return [command, *{"run": ["my-agent", "Sum up"], "list": ["my-agent"]}.get(command, [task.id])]


@needs_whole_file
def test_each_command_tells_a_person_what_happened(terminals):
    with local(quick_agent) as platform:
        task = played(platform, title="Quarter")
        ran = terminals([words_of(command, task) for command in SHOWN], platform.environ)
    for (command, shown), (code, out, err) in zip(SHOWN.items(), ran):
        assert (code, err) == (0, ""), command
        assert [text for text in shown if text not in out] == [], command
        assert "\x1b" not in out and "\r" not in out, "no colours, and no live line in a pipe"
        assert "tok-123" not in out and platform.environ["XPANDER_API_KEY"] not in out


@needs_whole_file
def test_json_is_what_the_platform_sent(terminals):
    with local(quick_agent) as platform:
        task = played(platform)
        ran = terminals([[*words_of(command, task), "--json"] for command in SHOWN], platform.environ)
        assert all((code, err) == (0, "") and out.isascii() for code, out, err in ran)
        lines = {command: list(map(json.loads, out.splitlines())) for command, (_, out, _) in zip(SHOWN, ran)}
        assert lines["watch"] == [event.raw for event in task.events()]
        assert "tok-123" in json.dumps(lines["watch"]), "programs get what came, secrets included"
        assert [event["type"] for event in lines["run"]] == [event["type"] for event in lines["watch"]]
        last, told = lines["run"][-1], platform.tasks[task.id]
        assert last["data"] == platform.tasks[last["task_id"]]
        assert lines["show"] == [told] == lines["stop"]
        assert lines["log"] == [task.get_activity_log().to_dict()]
        assert [item["id"] for item in lines["list"]] == list(platform.tasks)
        shown = {key: value for key, value in lines["list"][0].items() if key in told}
        assert shown == {key: told[key] for key in shown}


@needs_whole_file
def test_demo_needs_no_account_and_ignores_a_proxy_and_its_output_is_the_readmes():
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:9", "COLUMNS": "80"}
    with start("demo", env=nowhere) as people, start("demo", "--json", cwd=str(HERE)) as programs:
        (code, out, err), (json_code, lines, json_err) = finish(people), finish(programs)
    assert (code, err) == (0, "")
    for words in ("Plan", "search", "completed", "Activity log"):
        assert words in out
    samples = re.findall(r"^```text\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)
    assert len(samples) == 1 and masked(out).startswith(masked(samples[0]))
    events = [json.loads(line) for line in lines.splitlines()]  # one a line, and nothing else
    assert (json_code, json_err, events[-1]["type"]) == (0, "", "task_finished")


@needs_whole_file
def test_run_sends_the_prompt_and_all_files_and_hides_their_queries(terminals):
    with local(quick_agent) as platform:
        urls = ["https://files.example.com/a.csv?sig=hush", "https://files.example.com/b.pdf"]
        files = [word for url in urls for word in ("--file", url)]
        code, out, _ = terminal("run", "agent/7", "Größe", *files, environ=platform.environ)
        method, path, _, body = platform.requests[0]
        assert (code, method, path) == (0, "POST", "/agent-execution/agent%2F7")
        assert body == {"input": {"text": "Größe", "files": urls}, "events_streaming": True}
        [task_id] = platform.tasks
        more = terminals([["show", task_id], ["log", task_id]], platform.environ)
        shown = out + "".join(out for _, out, _ in more)
        assert "a.csv" in shown and "hush" not in shown


@needs_whole_file
def test_an_answer_that_came_in_chunks_is_shown_once(terminals):
    def agent(task):
        yield "chunk", "the wh"
        yield "chunk", None
        yield "chunk", "ole answer"
        return {"another": "another one", "none": None}.get(task.get("title"), "the whole answer\n")

    with local(agent) as platform:
        tasks = [played(platform, title=title) for title in ("the same", "another", "none")]
        ran = terminals([["watch", task.id] for task in tasks], platform.environ)
    told = [re.sub(r"(?m)^[\d:]{8}.*$", "", out).split() for _, out, _ in ran]
    assert told == [["the", "whole", "answer", *more] for more in ([], ["another", "one"], [])]
    assert not ran[0][1].endswith("\n\n") and not ran[2][1].endswith("\n\n")


@needs_whole_file
def test_a_task_that_ended_otherwise_is_exit_code_1_and_one_line(terminals):
    def failing(task):
        yield "chunk", "half an ans"
        raise RuntimeError("out of paper")

    with local(failing) as platform:
        task = played(platform)
        commands = [words_of(command, task) for command in ("run", "watch")]
        ran = terminals([*commands, *([*words, "--json"] for words in commands)], platform.environ)
    assert all(code == 1 and one_error_line(err) and "failed" in err for code, _, err in ran)
    for _, out, _ in ran[:2]:
        assert "half an ans\n" in out and "out of paper" in out, "the error's line starts on its own"


@needs_whole_file
def test_watch_of_a_task_without_a_stream_waits_for_its_end():
    gate = threading.Event()

    def agent(task):
        gate.wait(10)
        yield "chunk", "x"
        return "the result"

    with local(agent) as platform:
        task = whole.Task.create("a", "b", configuration=platform.configuration)
        with start("watch", task.id, environ=platform.environ) as process:
            process.stdout.readline()
            gate.set()
            out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, b"") and b"the result" in out


@needs_whole_file
def test_watch_shows_the_whole_result_when_the_last_event_is_trimmed():
    trimmed = {"id": "t-1", "status": "completed"}

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            if path.endswith("/status"):
                connection.answer(200, task_dict(status="completed", result="all of it"))
                continue
            connection.start_stream()
            connection.event("chunk", "of another", task_id="t-2")
            connection.event("task_finished", {"id": "t-2", "status": "failed"}, task_id="t-2")
            connection.event("chunk", "of this one")
            connection.event("task_finished", trimmed)
            return

    with RawServer(script) as server:
        code, out, err = terminal("watch", "t-1", environ=server_environ(server))
    assert (code, err) == (0, "") and "all of it" in out
    assert "of this one\n" in out and "\nof another" not in out, "the answer is this task's alone"


def server_environ(server):
    return {"XPANDER_API_KEY": KEY, "XPANDER_ORGANIZATION_ID": ORG, "XPANDER_BASE_URL": server.url}


@needs_whole_file
@pytest.mark.parametrize(
    "arguments, unset, said",
    [
        ([], (), "command"),
        (["dance"], (), "dance"),
        (["show"], (), "--help"),
        (["run", "agent"], (), "--help"),
        (["run", "agent", ""], (), "prompt"),
        (["list"], (), "--help"),
        (["show", "a", "b"], (), "--help"),
        (["show", "a", "--file", "u"], (), "--help"),
        (["show", "a", "--colour"], (), "colour"),
        (["show", "", "--json"], (), "task_id"),
        (["show", "\udcff"], (), ""),
        (["show", "t-1"], ("XPANDER_API_KEY",), "XPANDER_API_KEY"),
        (["run", "a", "b"], ("XPANDER_API_KEY",), "XPANDER_API_KEY"),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, (list, tuple)) else None,
)
def test_wrong_usage_and_no_key_are_exit_code_2_and_one_line(arguments, unset, said, monkeypatch, capsys):
    with local(quick_agent) as platform:
        for name in platform.environ.keys() - unset:
            monkeypatch.setenv(name, platform.environ[name])
        code, (out, err) = whole.main(arguments), capsys.readouterr()
        assert (code, out, platform.requests) == (2, "", [])
    assert one_error_line(err) and said in err


@needs_whole_file
def test_a_setting_that_cannot_be_is_one_line_and_no_traceback(terminals):
    settings = [("XPANDER_API_KEY", "k\xe9y-hush"), ("XPANDER_BASE_URL", "http://["),
                ("XPANDER_BASE_URL", "ftp://x")]
    environs = [{"XPANDER_API_KEY": KEY, "XPANDER_ORGANIZATION_ID": ORG, name: value}
                for name, value in settings]
    for code, out, err in terminals([["show", "t-1"]] * len(settings), environs):
        assert code in (1, 2) and out == "" and one_error_line(err) and "hush" not in err


FAILURES = [
    (400, {"detail": "no such field"}, "no such field"),
    (401, {"message": "bad key"}, "bad key"),
    (403, {"error": "not yours"}, "not yours"),
    (404, {"detail": "Task not found"}, "Task not found"),
    (422, {"detail": [{"loc": ["body", "id"], "msg": "too short", "type": "x"}]}, "body.id: too short"),
    (500, b"Internal\nServer\nError", "500"),
    (503, b"<html><body>Down</body></html>", "503"),
    (200, b"<html><body>Sign in</body></html>", "[500]"),
    (200, b'{"id": "t-1", "agent', "[500]"),
    (200, b"null", "[500]"),
    (200, b"[]", "[500]"),
    (200, b'"x"', "[500]"),
    (200, b"", "[500]"),
    (404, {"detail": HOSTILE}, "404"),
    (200, b"[" * 100_000, "[500]"),
    (200, b'{"id": ' + b"1" * 10_000 + b"}", "[500]"),
]


@needs_whole_file
def test_what_the_platform_says_wrong_is_exit_code_1_and_one_line(terminals):
    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            connection.answer(*FAILURES[int(path.split("/")[-2])][:2])

    with RawServer(script) as server:
        ran = terminals([["show", str(number)] for number in range(len(FAILURES))], server_environ(server))
    for (code, _, err), (_, _, said) in zip(ran, FAILURES):
        assert code == 1 and one_error_line(err) and said in err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", err) and KEY not in err


@needs_whole_file
def test_what_the_network_does_wrong_is_exit_code_1_and_one_line(terminals):
    def resets(connection, number):
        connection.request()
        connection.reset()

    def cuts(connection, number):
        if connection.request():
            half_a_body(connection)

    with RawServer(resets) as reset, RawServer(cuts) as cut, refusing() as refused:
        with RawServer(lambda connection, number: half_a_body(connection)) as plain:
            urls = [reset.url, cut.url, refused.base_url, plain.url.replace("http:", "https:"),
                    "http://xtask.invalid"]
            environs = [{**server_environ(reset), "XPANDER_BASE_URL": url} for url in urls]
            ran = terminals([["list", "a"]] * len(urls), environs)
    for url, (code, out, err) in zip(urls, ran):
        assert (code, out) == (1, "") and one_error_line(err) and "[500]" in err, url


@needs_whole_file
def test_a_stream_that_fails_is_exit_code_1_and_one_line(terminals):
    heads = {"t-500": "500 X\r\n", "t-404": "404 X\r\n", "t-200": "200 X\r\nContent-Type: text/html\r\n"}

    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            task_id = path.split("/")[-2]
            if path.endswith("/status"):
                connection.answer(200, task_dict(id=task_id))
            else:
                connection.send(f"HTTP/1.1 {heads[task_id]}Content-Length: 2\r\n\r\nhm")

    with RawServer(script) as server:
        ran = terminals([["watch", task_id] for task_id in heads], server_environ(server))
    for task_id, (code, out, err) in zip(heads, ran):
        assert code == 1 and one_error_line(err) and task_id in out


# -- pipes, Ctrl-C


def held_agent(gate, *events):
    """Plays the events, then waits for the gate, then ends."""

    def agent(task):
        yield from events
        gate.wait(20)
        yield "chunk", "after the gate"
        return "done"

    return agent


@needs_whole_file
def test_a_reader_that_leaves_ends_a_live_watch_quietly():
    def leave(words):
        with start("watch", task.id, *words, environ=platform.environ) as process:
            assert process.stdout.readline()  # head -1
            process.stdout.close()
            both_left.wait(10)
            gate.set()
            assert process.wait(10) == 0 and process.stderr.read() == b"", words

    gate, both_left = threading.Event(), threading.Barrier(2)
    with local(held_agent(gate)) as platform:
        task = whole.Task.create("a", "b", configuration=platform.configuration, events_streaming=True)
        at_once(leave, [], ["--json"])


@needs_whole_file
def test_a_pipe_that_is_closed_from_the_start_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with local(quick_agent) as platform:
        task = played(platform)
        commands = [*(words_of(command, task) for command in SHOWN), ["demo"]]
        commands += [["--help"], ["--version"], ["watch", task.id, "--json"], ["list", "my-agent", "--json"]]
        running = [start(*words, environ=platform.environ, stdout=writing) for words in commands]
        os.close(writing)
        ended = [(process.communicate(timeout=20)[1], process.returncode) for process in running]
    assert ended == [(b"", 0)] * len(commands)


@needs_whole_file
@pytest.mark.skipif(os.name != "posix", reason="file descriptors as a shell closes them")
def test_output_that_is_closed_or_full_shows_no_traceback():
    with local(quick_agent) as platform:
        task = played(platform)

        def shell(words):
            arguments = [sys.executable, "-m", "xtask", *words[1:]]
            return subprocess.run(["sh", "-c", f'exec "$@" {words[0]}', "sh", *arguments], timeout=20,
                                  env=program_environment(platform.environ), capture_output=True)

        closed = [(">&-", "show", task.id), (">&-", "log", task.id, "--json"), (">&-", "watch", task.id)]
        full = [(">/dev/full", *words) for words in (["show", task.id], ["--help"], ["--version"])]
        full *= os.path.exists("/dev/full")
        silent, *ran = at_once(shell, ("2>&-", "show", "missing"), *closed, *full)
    assert (silent.returncode, silent.stdout) == (1, b"")
    for ended in ran[:3]:
        assert ended.returncode in (0, 1) and b"Traceback" not in ended.stderr
    for ended in ran[3:]:
        assert ended.returncode == 1 and one_error_line(ended.stderr.decode())


@needs_whole_file
def test_ctrl_c_is_exit_code_130_and_no_traceback():
    def run(words):
        with start(*words, environ=platform.environ) as process:
            assert process.stdout.readline()
            (_, err), _ = interrupt(process)
        assert process.returncode == 130 and b"Traceback" not in err and b"Exception" not in err, words

    gate = threading.Event()
    with local(held_agent(gate)) as platform:
        task = whole.Task.create("a", "b", configuration=platform.configuration, events_streaming=True)
        at_once(run, ["watch", task.id], ["watch", "--json", task.id], ["run", "my-agent", "Hi"])
        gate.set()


@needs_whole_file
def test_ctrl_c_during_a_request_is_exit_code_130():
    asked = threading.Event()

    def script(connection, number):
        connection.request()
        asked.set()
        connection.wait_closed()

    with RawServer(script) as server, start("show", "t-1", environ=server_environ(server)) as process:
        assert asked.wait(10)
        (out, err), _ = interrupt(process)
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in err


# -- what reaches the terminal


def strings(value):
    """All strings in a JSON value."""
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in strings(item)]
    return [value] if isinstance(value, str) else []


@needs_whole_file
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["people", "json"])
def test_an_event_without_data_is_shown(option, monkeypatch, capsys):
    with feed(plays('data: {"type": "chunk"}\n\ndata: {"type": "newer"}\n\n' + FINISHED)) as server:
        server.task = task_dict(status="completed", result="4")
        for name, value in (("API_KEY", KEY), ("ORGANIZATION_ID", ORG), ("BASE_URL", server.url)):
            monkeypatch.setenv(f"XPANDER_{name}", value)
        assert whole.main(["watch", "t-1", *option]) == 0
    out, err = capsys.readouterr()
    assert "newer" in out and err == ""


@needs_whole_file
def test_events_of_any_shape_are_shown(terminals):
    shapes = [None, 1, True, "x", [], {}, [1, {}], {"payload": 3}, {"payload": {"input": [1]}}, {"data": "x"},
              {"type": 5, "data": {"url": 7}}, {"type": "login_required", "data": {"url": 7}},
              {"tool_name": {"a": 1}}, {"is_error": "no", "result": [None]},
              {"content": None, "role": "agent"}, {"title": 7, "status": []}]
    kinds = [*whole.TaskUpdateEventType, "", "newer"]

    def agent(task):
        for kind in kinds:
            if kind != "task_finished":
                yield from ((kind, shape) for shape in shapes)
        return {"a": [1]}

    with local(agent) as platform:
        task = played(platform)
        commands = [["watch", task.id], ["watch", task.id, "--json"], ["log", task.id]]
        for code, out, err in terminals(commands, platform.environ):
            assert (code, err) == (0, "") and len(out.splitlines()) > len(shapes)


ODD = [{}, {"result": {"a": 1}}, {"created_at": 7, "started_at": "soon", "finished_at": []}, {"title": [1]},
       {"status": 7, "finished_at": "2025-11-06T06:41:54Z"}, {"status": None, "finished_at": "yesterday"},
       {"input": None, "extra": {"x": 1}}, {"created_at": "9999-12-31T23:59:59Z", "id": None},
       {"payload_extension": json.loads('{"a":' * 450 + "1" + "}" * 450)}]
ODD_ENTRIES = [1, None, "x", {}, {"role": "agent", "content": 3}, {"role": "agent", "content": {"text": [1]}},
               {"tool_name": None, "payload": 1, "is_error": 1, "reasoning": 2, "result": 3},
               {"type": [], "data": 3}, *ODD]


@needs_whole_file
def test_tasks_and_logs_of_any_shape_are_shown(terminals):
    def script(connection, number):
        for _, path, _, _ in iter(connection.request, None):
            odd = ODD[int(re.findall(r"t-(\d)", path)[0])]
            task = {**task_dict(status="completed", events_streaming=False), **odd}
            log = {"id": 3, "messages": ODD_ENTRIES, "user": None, **odd}
            connection.answer(200, log if "/activity/" in path else [task] if "/history/" in path else task)

    commands = [[command, f"t-{n}"] for command in ("watch", "show", "log", "list", "stop")
                for n in range(len(ODD))]
    with RawServer(script) as server:
        ran = terminals(commands, server_environ(server))
    for command, (code, _, err) in zip(commands, ran):
        assert (code, err) == (0, "") or code == 1 and one_error_line(err), (command, err)
    assert [code for code, _, _ in ran[:2]] == [0, 0], "a result that is no text is shown all the same"


@needs_whole_file
def test_control_characters_are_shown_as_a_sign_and_never_sent(terminals):
    with local(hostile_agent(HOSTILE)) as platform:
        task = played(platform, title=HOSTILE, user={"email": HOSTILE})
        commands = [words_of(command, task) for command in ("list", "show", "log", "stop", "watch", "run")]
        ran = terminals([[*words, *json_too] for words in commands for json_too in ([], ["--json"])],
                        platform.environ)
    for code, out, err in ran[::2]:
        assert (code, err) == (0, "")
        assert {sign for sign in out if unicodedata.category(sign) == "Cc"} <= {"\n", "\t"}
        assert "a\ufffd]0;owned\ufffdb" in out
    for code, out, err in ran[1::2]:
        assert (code, err) == (0, "") and HOSTILE in strings(json.loads(out.splitlines()[-1]))
        assert {sign for sign in out if unicodedata.category(sign) == "Cc"} <= {"\n"}


@needs_whole_file
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_no_text_is_too_strange_for_the_output(encoding, terminals):
    with local(hostile_agent(WIDE)) as platform:
        task = played(platform, title=WIDE)
        commands = [words_of(command, task) for command in ("run", "show", "log", "list")]
        for code, out, err in terminals(commands, platform.environ, encoding):
            assert (code, err) == (0, "") and " end" in out


@needs_whole_file
def test_long_values_are_cut_to_the_width_and_the_result_and_the_login_never(terminals):
    commands = ["run", "watch", "log", "show", "list"]
    with local(quick_agent) as platform:
        task, environ = played(platform, title=LONG), {**platform.environ, "COLUMNS": "60"}
        ran = terminals([words_of(command, task) for command in commands], environ)
    whole_lines = {LOGIN_URL, RESULT.splitlines()[-1]}
    for command, (code, out, _) in zip(commands, ran):
        assert code == 0
        assert [line for line in out.splitlines() if len(line) > 60 and line not in whole_lines] == []
        assert command in ("log", "list") or RESULT in out


def cells(sign):
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 0 if unicodedata.combining(sign) else 1


class Screen:
    """Just enough of a terminal to tell what is left to read on it."""

    def __init__(self, width):
        self.width, self.rows, self.column = width, [[]], 0

    def feed(self, text):
        for part in re.split(r"(\x1b\[[02]?K|[\r\n])", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.rows.append([])
                self.column = 0
            elif part.startswith("\x1b["):
                del self.rows[-1][0 if "2" in part else self.column :]
            else:
                for sign in part:
                    self.put(sign)

    def put(self, sign):
        assert unicodedata.category(sign) != "Cc", f"{sign!r} would steer the terminal"
        if self.column + cells(sign) > self.width:
            self.rows.append([])
            self.column = 0
        row = self.rows[-1]
        row.extend(" " * (self.column - len(row)))
        row[self.column : self.column + cells(sign)] = [sign, ""][: cells(sign)]
        self.column += cells(sign)

    def text(self):
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")


@contextlib.contextmanager
def pseudo_terminal(*arguments, environ, width=60):
    """The program on a pseudo-terminal of that width: (process, read(until) -> all that was shown)."""
    fcntl, pty, struct = pytest.importorskip("fcntl"), pytest.importorskip("pty"), __import__("struct")
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # what the program wrote, with no carriage return put in
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    shown = []

    def read(until=None):
        """Read until the pattern has been shown, or to the program's end."""
        ends = time.monotonic() + 15
        while until is None or not re.search(until, "".join(shown)):
            assert select.select([ours], [], [], max(0, ends - time.monotonic()))[0], "".join(shown)
            try:
                data = decoder.decode(os.read(ours, 65536))
            except OSError:  # Linux: the other side is closed
                data = ""
            shown.append(data)
            if not data and until is None:
                break
            assert data or until is None, f"ended without {until}"
        return "".join(shown)

    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, *arguments]
    environment = program_environment(environ)
    del environment["COLUMNS"]
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    try:
        with process:
            yield process, read
            process.kill()
    finally:
        os.close(ours)


TOOL = {"request_id": "r", "operation_id": "o", "tool_name": "web-search", "payload": {"q": WIDE + LONG}}


@needs_whole_file
def test_the_live_line_shows_is_gone_at_the_end_and_overwrites_nothing():
    gate = threading.Event()
    events = [
        ("think", {"request_id": "r", "operation_id": "o", "payload": {"input": {"title": "漢字" * 40}}}),
        ("chunk", "one line\nand "),
        ("chunk", "another"),
        ("newer_kind", HOSTILE),
        ("tool_call_request", TOOL),
    ]
    with local(held_agent(gate, *events)) as platform:
        task = whole.Task.create("a", "b", configuration=platform.configuration, events_streaming=True)
        with pseudo_terminal("watch", task.id, environ=platform.environ) as (process, read):
            screen = Screen(60)
            screen.feed(read(r"\d:\d\d\s+call[^\r\n]*$"))
            live = screen.text().splitlines()[-1]
            assert re.match(r"\s*\d+:\d\d +calling", live), "the time, and what it does now"
            first = screen.text().splitlines()[:-1]
            gate.set()
            screen = Screen(60)
            screen.feed(read())
            assert process.wait(10) == 0 and process.stderr.read() == b""
        last = screen.text()
        assert last.splitlines()[: len(first)] == first, "what stood there stands there still"
        assert live not in last
        code, out, _ = terminal("watch", task.id, environ=platform.environ, env={"COLUMNS": "60"})
    plain = "\n".join(line.rstrip() for line in out.splitlines())
    assert code == 0 and masked(last) == masked(plain).rstrip("\n")


@needs_whole_file
def test_the_live_line_counts_on_while_nothing_happens_and_ctrl_c_leaves_a_clean_row():
    gate = threading.Event()
    with local(held_agent(gate, ("tool_call_request", TOOL))) as platform:
        task = whole.Task.create("a", "b", configuration=platform.configuration, events_streaming=True)
        with pseudo_terminal("watch", task.id, environ=platform.environ) as (process, read):
            read(r"0:0[1-9]\s+calling")  # a second later it says so
            process.send_signal(signal.SIGINT)
            screen = Screen(60)
            screen.feed(read())
            assert process.wait(10) == 130 and b"Traceback" not in process.stderr.read()
        gate.set()
    assert not re.search(r"^\d+:\d\d\s", screen.text().splitlines()[-1]), "the live line is gone"


@needs_whole_file
def test_escape_sequences_do_not_reach_a_pseudo_terminal():
    def look(command):
        words = words_of(command, task)
        with pseudo_terminal(*words, environ=platform.environ, width=120) as (process, read):
            screen = Screen(120)
            screen.feed(read())  # fails at a character that would steer it
            assert process.wait(10) == 0 and "owned" in screen.text(), command

    with local(hostile_agent(HOSTILE)) as platform:
        task = played(platform, title=HOSTILE)
        at_once(look, "run", "log", "show", "list")


# -- help and version


@needs_whole_file
def test_help_fits_a_screen_and_has_an_example_of_each_command(terminals):
    ran = terminals([["--help"], ["watch", "--help"], ["-h"]], {})
    code, out, err = ran[0]
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) <= 24 and max(map(len, lines)) <= 80
    for command in ("demo", "run AGENT_ID", "watch TASK_ID", "show TASK_ID", "log TASK_ID", "stop TASK_ID",
                    "list AGENT_ID"):
        assert re.search(rf"(xtask|xtask\.py) {command}", out), command
    assert "secret" in out, "it says what --json shows"
    assert ran[1][0] == 0 and ran[2][1] == out


@needs_whole_file
def test_version_is_the_version_and_the_sha_256_of_the_file_also_out_of_a_zip(tmp_path):
    expected = (0, [whole.__version__, hashlib.sha256(FILE.read_bytes()).hexdigest()])
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as bundle:
        bundle.write(FILE, "xtask.py")
    by_path = "import runpy, sys; sys.argv = ['', '--version']; runpy.run_path({!r}, None, '__main__')"
    (code, out, _), zipped, loaded = at_once(
        lambda run: run(),
        lambda: terminal("--version"),
        lambda: run_python("import xtask; xtask.main(['--version'])", cwd=str(tmp_path),
                           env={"PYTHONPATH": str(tmp_path / "bundle.zip")}),
        lambda: run_python(by_path.format(str(FILE))))
    assert (code, [word for word in out.split() if re.fullmatch(r"[\d.]+|[0-9a-f]{64}", word)]) == expected
    assert (zipped.stdout, zipped.stderr) == (out, "")
    assert loaded.stdout == out, "without a loader, as profilers run it"


@needs_whole_file
def test_main_returns_every_code_and_leaves_no_trace_in_the_process(capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the agent that is played thinks at once
    threads = set(threading.enumerate())
    codes = [whole.main(words) for words in (["--version"], [], ["--help"], ["show", "x"])]
    assert codes == [0, 2, 0, 2]
    assert "XPANDER_API_KEY" in capsys.readouterr().err
    assert whole.main(["demo"]) == 0 and set(threading.enumerate()) == threads


# -- README


def readme_blocks(kind):
    """(the heading above it, text) of each block of that kind."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""  # a copy may be without it
    found = re.finditer(rf"^( *)```{kind}\n(.*?)^\1```$", text, re.S | re.M)
    return [(re.findall(r"^#+ (.*)", text[: block.start()], re.M)[-1], block.group(2)) for block in found]


def readme_commands():
    """The lines of the README that start the program, as they stand there."""
    lines = "".join(body for _, body in readme_blocks("sh")).splitlines()
    return [line.strip() for line in lines if line.strip().startswith("python3 xtask.py ")]


def all_at_once(commands, agent=quick_agent):
    """[(exit code, stdout, stderr)] of programs that run at the same time, each with a platform of its own.

    A command may be a function of its platform.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            platform = stack.enter_context(local(agent))
            command = command(platform) if callable(command) else command
            running.append(stack.enter_context(subprocess.Popen(
                command, env=program_environment(platform.environ), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)))
            stack.callback(running[-1].kill)
        ended = [(*process.communicate(timeout=30), process.returncode) for process in running]
    return [(code, out, err) for out, err, code in ended]


@needs_whole_file
def test_each_python_block_of_the_readme_runs(tmp_path):
    """In a process of its own, without site-packages. File URLs lead to this machine, so that they are
    refused, which a warning tells; asyncio's debug mode may tell that a callback was slow on this machine."""
    expected = re.compile(r"trusted_file_hosts|^Executing <.*> took [\d.]+ seconds$")
    blocks, commands = readme_blocks("python"), []
    for number, (_, body) in enumerate(blocks):
        script = tmp_path / f"script{number}.py"
        script.write_text(body.replace("https://files.example.com", "http://127.0.0.1:9"), encoding="utf-8")
        commands.append([sys.executable, "-S", "-X", "dev", "-W", "error", str(script)])
    for (title, _), (code, out, err) in zip(blocks, all_at_once(commands)):
        errors = [line for line in err.splitlines() if not expected.search(line)]
        assert (code, errors) == (0, []) and out.strip(), title


@needs_whole_file
def test_each_command_of_the_readme_runs():
    """AGENT_ID is any agent, TASK_ID a task that is over; `python3` is this Python."""
    words = {"AGENT_ID": "my-agent", "python3": sys.executable, "xtask.py": str(FILE)}

    def command(line, platform):
        known = {"TASK_ID": played(platform).id, **words}
        return [known.get(word, word) for word in shlex.split(line)]

    lines = readme_commands()
    ran = all_at_once([functools.partial(command, line) for line in lines])
    for line, (code, out, err) in zip(lines, ran):
        assert (code, err) == (0, "") and out.strip(), line


@needs_whole_file
def test_the_readme_shows_every_command_and_runs_the_tests_in_one_line():
    assert {line.split()[2] for line in readme_commands()} >= {"demo", "--version", *SHOWN}
    first, second = readme_blocks("sh")[0][1].splitlines()
    assert first == "python3 xtask.py demo" and "venv" in second and second.endswith("pytest -q")


@needs_whole_file
def test_the_readme_names_only_what_there_is():
    text = README.read_text(encoding="utf-8")
    methods = {name for _, name in re.findall(r"\b(Task|task)\.([a-z]\w*)", text)}
    only_official = {"model_dump"}
    fields = whole.Task.__dataclass_fields__
    assert [name for name in methods - only_official - {*fields} if not hasattr(whole.Task, name)] == []
    table = text[text.index("\n## Configuration") : text.index("\n## What it promises")]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert documented == list(inspect.signature(whole.Configuration).parameters)
    for name in ("timeout", "max_retries", "idle_timeout"):
        default = inspect.signature(whole.Configuration).parameters[name].default
        assert re.search(rf"^\| `{name}` \|[^|]*\| {default}: ", table, re.M)


@needs_whole_file
def test_the_licence_stands_at_the_head_of_the_file_and_in_the_project():
    assert FILE.read_text(encoding="utf-8").splitlines()[0] == "# SPDX-License-Identifier: MIT-0"
    project = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license = "MIT-0"' in project and 'xtask = "xtask:main"' in project and "flit_core" in project


# ---------------------------------------------------------------------------
# The library cut at its line
# ---------------------------------------------------------------------------

CUT_SECTIONS = ("Form", "Data", "The parser", "Calls", "Errors", "Transport", "Files")  # those that are quick
# What takes its time by the amount alone: the same code runs with less in the tests beside it.
CUT_LEAVES_OUT = """
test_a_byte_a_chunk_takes_steps_in_proportion_to_the_bytes test_an_event_may_be_16_mib_with_every_byte_counted
test_bad_bytes_count_once_however_they_are_replaced test_many_events_in_one_chunk_may_be_more_than_16_mib
test_a_thousand_urls_start_eight_threads""".split()


def standing_under(sections):
    """The names of the tests that stand under these banners."""
    banner = r"^# -{75}\n# (.+)\n# -{75}$"
    _, *parts = re.split(banner, Path(__file__).read_text("utf-8"), flags=re.MULTILINE)
    bodies = [body for title, body in zip(parts[::2], parts[1::2]) if title in sections]
    return re.findall(r"^def (test_\w+)", "\n".join(bodies), re.MULTILINE)


@pytest.fixture(scope="session", autouse=True)
def run_of_the_cut_library(request, tmp_path_factory):
    """A run of the library's tests on the cut library, in a process beside this one, with its output.

    It takes longer than any test, so it is started first, if its test is among those that were chosen.
    """
    chosen = [getattr(item, "function", None) for item in request.session.items]
    if UNDER_TEST or test_the_library_cut_at_its_line_passes_its_tests not in chosen:
        yield
        return
    folder = tmp_path_factory.mktemp("cut")
    (folder / "xtask.py").write_text(cut()[0], "utf-8")
    tests = [f"{__file__}::{name}" for name in standing_under(CUT_SECTIONS) if name not in CUT_LEAVES_OUT]
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "--assert=plain", *tests]
    with open(folder / "output", "w+", encoding="utf-8") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                              env={**os.environ, "XTASK_UNDER_TEST": str(folder / "xtask.py")}) as process:
            yield process, folder / "output"
            process.kill()


@needs_whole_file  # so that the run inside does not start another
def test_the_library_cut_at_its_line_passes_its_tests(run_of_the_cut_library):
    process, output = run_of_the_cut_library
    code, said = process.wait(timeout=120), output.read_text("utf-8")
    assert code == 0, said[-3000:]
    assert int(re.search(r"(\d+) passed", said)[1]) > 500
    assert set(CUT_LEAVES_OUT) <= set(standing_under(CUT_SECTIONS)), "each of them is still there"
