"""Several real processes run one model: the tokens of one device, each its share of the bytes, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CACHE
from tiny_models import CASES, write_checkpoint

from jaxpaged.convert.families import family_of
from jaxpaged.convert.rules import hf_shapes

pytestmark = pytest.mark.slow

PROCESS = Path(__file__).with_name("process.py")
CONFIG = CASES["llama"].config | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
}
CONFIG |= {"num_key_value_heads": 4, "max_position_embeddings": 128}
PATIENCE = 10  # seconds after which no process may be left


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """`num` of them, killed at the end whatever happens."""

    def __init__(self, model: Path, num: int, *linger: str) -> None:
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONUNBUFFERED": "1"}
        self.all = [
            subprocess.Popen(
                [sys.executable, str(PROCESS), address, str(num), str(process), str(model), "1", *linger],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for process in range(num)
        ]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.all:
            process.kill()
            process.communicate()

    def told(self, index: int) -> dict[str, Any]:
        """What a process says when it has loaded, or answered."""
        stdout, stderr = self.all[index].stdout, self.all[index].stderr
        assert stdout is not None
        assert stderr is not None
        while line := stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(stderr.read())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = family_of(CONFIG)
    spec = family.spec(CONFIG)
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, hf_shapes(family.rules(spec, ()), spec))


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    with Processes(model, 1) as one:
        told = one.told(0)
    assert told["read"] == told["stored"]
    assert len(set(map(str, told["tokens"]))) == len(told["tokens"])
    return told


@pytest.mark.parametrize(
    ("num", "lost", "meanwhile"), [pytest.param(2, 1, "steps", marks=pytest.mark.long), (2, 1, "idle"), (4, 0, "steps")]
)
def test_processes_answer_as_one_and_end_as_one(
    model: Path, alone: dict[str, Any], num: int, lost: int, meanwhile: str
) -> None:
    with Processes(model, num, meanwhile) as processes:
        told = [processes.told(index) for index in range(num)]
        assert told[0]["tokens"] == alone["tokens"]
        assert told[0]["again"] == alone["again"]
        for each in told:
            assert each["read"] <= 1.1 * each["stored"] / num
        time.sleep(0.5)
        processes.all[lost].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for process in (p for index, p in enumerate(processes.all) if index != lost):
            process.wait(timeout=max(0.1, killed + PATIENCE - time.monotonic()))
            assert process.returncode != 0
            assert process.stderr is not None
            message = process.stderr.read()
            assert "another one has gone" in message or "another task died" in message
        print(f"{num} processes, {lost} killed at {meanwhile}: all gone after {time.monotonic() - killed:.1f} s")


def test_followers_return_when_the_leader_is_done(model: Path) -> None:
    with Processes(model, 2) as processes:
        out, err = processes.all[1].communicate(timeout=120)
        assert "the leader is done" in out, err
        assert processes.all[1].returncode == 0
        assert processes.all[0].wait(timeout=10) == 0
