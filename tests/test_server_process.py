"""The server as a process: stopped, killed, out of file descriptors, soaked; what it listens at and never calls."""

from __future__ import annotations

import ast
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from running_server import ROOT, address_of, jaxpaged_serve
from tiny_chat_model import write_chat_model

LONG = {"prompt": "ban", "temperature": 0, "max_tokens": 300, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("process") / "model")


@contextmanager
def serving(folder, *flags):
    process = jaxpaged_serve(folder, *flags)
    try:
        yield process, address_of(process)
    finally:
        process.kill()
        assert len(process.communicate()[1].splitlines()) < 100, "a log that is flooded"


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses, in hexadecimal, and ports of the process's listening sockets, of any kind."""
    names = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            names.add(link.readlink().name)
    found = set()
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in names and (kind.startswith("udp") or fields[3] == "0A"):
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    unix = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
    found |= {("unix", 0) for f in unix if f"socket:[{f[6]}]" in names and int(f[3], 16) & 0x10000}
    return found


@pytest.mark.slow
def test_one_listening_socket_survives_a_stop_and_want_of_descriptors(folder):
    with serving(folder) as (process, url):
        port = int(url.rsplit(":", 1)[1])
        httpx.post(f"{url}/v1/completions", json=LONG, timeout=120)  # compiles
        assert listening(process.pid) == {("0100007F", port)}

        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(httpx.TimeoutException):
                httpx.get(f"{url}/health", timeout=0.5)
            process.send_signal(signal.SIGCONT)
            assert [line for line in lines if line][-1] == "data: [DONE]"

        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 64))
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(120)]
        time.sleep(0.3)
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) >= 60, "none is left to accept with"
        for client in clients:
            client.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert httpx.get(f"{url}/health", timeout=5).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.slow
def test_killed_server_breaks_its_connections_and_leaves_its_port_free(folder):
    with serving(folder) as (process, url):
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.kill()
            list(lines)
        assert process.wait(10) == -signal.SIGKILL
    port = url.rsplit(":", 1)[1]
    with serving(folder, "--port", port) as (_, again):
        assert again == url and httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
@pytest.mark.long
def test_soak_of_half_a_minute(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "0.5", "--rate", "15", "--model", str(folder)]
    done = subprocess.run([*command, "--output", str(rows)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in rows.read_text().splitlines())
    assert row["requests"] > 200 and row["server_errors"] == 0 and row["exit_status"] == 0
    assert row["pages_held_at_the_end"] == 0 and row["compilations"] == 0
    assert row["descriptors_last"] <= row["descriptors_first"] + 1
    assert row["threads_last"] <= row["threads_first"] + 4
    assert row["resident_bytes_last"] - row["resident_bytes_first"] < 16 << 20


def test_nothing_is_unpickled_evaluated_or_executed():
    """Nor `assert` used as a check, for which ruff's S101 stands."""
    banned_calls, banned_modules = {"eval", "exec", "compile", "__import__"}, {"pickle", "marshal", "shelve", "dill"}
    files = [path for folder in ("jaxpaged", "kernels", "convert") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert called not in banned_calls, f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned_modules, f"{path}:{node.lineno}"
            assert not isinstance(node, ast.keyword) or not (
                node.arg == "allow_pickle" and getattr(node.value, "value", None) is True
            ), path
