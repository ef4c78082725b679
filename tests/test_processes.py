"""Several real processes run one model: the tokens of one device, each its share of the bytes, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import staged_weights_process as staged
from conftest import CACHE
from real_model import smollm2_gguf
from tiny_models import CASES, write_checkpoint
from training_process import GREEDY, PROMPTS, SETTINGS, SPEC, trained, weights

from jaxpaged import LLM
from jaxpaged.config import PARALLEL_SIZES
from jaxpaged.convert.families import family_of
from jaxpaged.convert.rules import hf_shapes
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder

pytestmark = pytest.mark.slow

CONFIG = CASES["llama"].config | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
}
CONFIG |= {"num_key_value_heads": 4, "max_position_embeddings": 128}
LONGEST = 300  # seconds that processes may take for all they do, on a machine that does other things too
PATIENCE = 10  # seconds after which no process may be left
ADDRESS = "where they meet"
HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """One for each command, with an address where they meet; killed at the end, or if they take long."""

    def __init__(self, *commands: Sequence[str]) -> None:
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONUNBUFFERED": "1"}
        self.all = [
            subprocess.Popen(
                [sys.executable, *(address if word == ADDRESS else word for word in command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for command in commands
        ]
        self.end = threading.Timer(LONGEST, self.kill)
        self.end.start()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.end.cancel()
        self.kill()
        for process in self.all:
            process.communicate()

    def kill(self) -> None:
        for process in self.all:
            process.kill()

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


def mesh(tensor: int = 1, data: int = 1, context: int = 1, stages: int = 1) -> dict[str, int]:
    return dict(zip(PARALLEL_SIZES, (tensor, data, context, stages), strict=True))


def run(model: Path, num: int, meshes: list[dict[str, int]], *linger: str, devices: int = 1) -> Processes:
    """Processes with so many devices each, which make an LLM on one mesh after the other."""
    more = str(model), str(devices), json.dumps(meshes), *linger
    return Processes(*([str(HERE / "process.py"), ADDRESS, str(num), str(index), *more] for index in range(num)))


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    with run(model, 1, [mesh()]) as one:
        told = one.told(0)
    assert told["read"] == told["stored"]
    assert len(set(map(str, told["tokens"]))) == len(told["tokens"])
    return told


@pytest.mark.parametrize(
    ("num", "stages", "lost", "meanwhile"),
    [
        pytest.param(2, 1, 1, "steps", marks=pytest.mark.long),
        (2, 1, 1, "idle"),
        (4, 1, 0, "steps"),
        (2, 2, 1, "steps"),
        pytest.param(4, 2, 3, "steps", marks=pytest.mark.long),
    ],
)
def test_processes_answer_as_one_and_end_as_one(
    model: Path, alone: dict[str, Any], num: int, stages: int, lost: int, meanwhile: str
) -> None:
    with run(model, num, [mesh(num // stages, stages=stages)], meanwhile) as processes:
        told = [processes.told(index) for index in range(num)]
        assert told[0]["tokens"] == alone["tokens"]
        assert told[0]["again"] == alone["again"]
        for each in told:
            assert each["read"] <= 1.1 * each["stored"] / num
        if stages > 1:
            made, unplanned = told[0]["moves"]
            assert made > 5
            assert unplanned == 0, "moves that a warm-up would not have compiled"
        time.sleep(0.5)
        processes.all[lost].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for process in (p for index, p in enumerate(processes.all) if index != lost):
            process.wait(timeout=max(0.1, killed + PATIENCE - time.monotonic()))
            assert process.returncode != 0
            assert process.stderr is not None
            message = process.stderr.read()
            # JAX's own message comes where nothing runs, and may be first where the lost one had JAX's service.
            by_jax = "another task died" in message and (meanwhile == "idle" or lost == 0)
            assert by_jax or "another one has gone" in message
        print(f"{num} processes, {lost} killed at {meanwhile}: all gone after {time.monotonic() - killed:.1f} s")


@pytest.mark.parametrize(
    ("num", "devices", "meshes"),
    [
        (2, 2, [mesh(2, data=2), mesh(2, context=2), mesh(2, stages=2)]),
        pytest.param(4, 1, [mesh(2, data=2), mesh(context=4), mesh(data=4)], marks=pytest.mark.long),
    ],
)
def test_data_shards_split_prompts_and_stages_over_processes_give_the_tokens_of_one_device(
    model: Path, alone: dict[str, Any], num: int, devices: int, meshes: list[dict[str, int]]
) -> None:
    with run(model, num, meshes, devices=devices) as processes:
        for sizes in meshes:
            told = [processes.told(index) for index in range(num)]
            assert told[0]["tokens"] == alone["tokens"], sizes
            assert told[0]["again"] == alone["again"], sizes
            assert all(each["read"] <= each["stored"] for each in told), sizes  # though several devices here have it
        assert [process.wait() for process in processes.all] == [0] * num


def test_followers_return_when_the_leader_is_done(model: Path) -> None:
    with run(model, 2, [mesh(2)]) as processes:
        out, err = processes.all[1].communicate()
        assert "the leader is done" in out, err
        assert processes.all[1].returncode == 0
        assert processes.all[0].wait() == 0


def test_processes_that_were_given_different_settings_end_and_say_so(model: Path) -> None:
    command = [str(HERE / "process.py"), ADDRESS, "2"]
    meshes = [json.dumps([mesh(2) | {"page_size": size}]) for size in (8, 4)]
    with Processes(*([*command, str(index), str(model), "1", each] for index, each in enumerate(meshes))) as processes:
        for process in processes.all:
            _, err = process.communicate()
            assert "ConfigError: the 2 processes were given different models or settings; give all the same" in err
            assert process.returncode != 0


def test_smollm2_answers_from_the_command_line_of_two_processes() -> None:
    command = ["-m", "jaxpaged", "generate", str(smollm2_gguf()), "What is the capital of France?", "--chat", "--json"]
    command += ["--temperature", "0", "--max-tokens", "8", "--max-num-batched-tokens", "64", "--max-model-len", "64"]
    command += ["--num-pages", "16", "--no-warmup", "--tensor-parallel-size", "2", "--num-processes", "2"]
    command += ["--coordinator-address", ADDRESS, "--process-id"]
    with Processes([*command, "0"], [*command, "1"]) as processes:
        leader, follower = (process.communicate() for process in processes.all)
        assert [process.returncode for process in processes.all] == [0, 0], (leader[1], follower[1])
    (line,) = (line for line in leader[0].splitlines() if line.startswith("{"))
    assert json.loads(line)["outputs"][0]["text"] == "The capital of France is Paris."
    assert "Paris" not in follower[0]


def told_by_two(script: str) -> list[dict[str, Any]]:
    """What a script's leader and follower say, who then end well."""
    command = [str(HERE / script), ADDRESS, "2"]
    with Processes([*command, "0"], [*command, "1"]) as processes:
        told = [processes.told(index) for index in range(2)]
        assert [process.wait() for process in processes.all] == [0, 0]
    return told


def answers(spec: Decoder, params: Params) -> list[list[int]]:
    """The tokens of one process."""
    llm = LLM((spec, params), warmup=False, **SETTINGS)
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_stages_in_processes_take_new_weights_and_refuse_those_that_would_have_to_move() -> None:
    leader, follower = told_by_two("staged_weights_process.py")
    weights_of = partial(weights, spec=staged.SPEC)
    first, larger, second = (
        answers(staged.SPEC, params) for params in (weights_of(1), trained(weights_of(1)), weights_of(2))
    )
    assert leader["first"] == leader["woken"] == first
    assert (leader["larger"], leader["second"]) == (larger, second)
    assert len({str(leader[name]) for name in ("first", "second", "larger")}) == 3
    assert "embed.w lies on other devices than its pipeline stage" in leader["refused"] == follower["refused"]


def test_processes_that_train_hand_each_its_part_of_the_new_weights_to_the_engine() -> None:
    leader, follower = told_by_two("training_process.py")
    first, second, third = (answers(SPEC, params) for params in (weights(1), weights(2), trained(weights(2))))
    assert len({str(tokens) for tokens in (first, second, third)}) == 3
    assert leader["first"] == leader["woken by all"] == first
    assert leader["second"] == leader["unchanged"] == leader["woken"] == second
    assert leader["third"] == third
    assert follower["refused"].startswith("the new params do not fit: missing head.w (16, 40)")
    assert leader["refused"].startswith("process 1 of 2 was given params or a policy that do not fit")
    for wrong, right in (leader, follower), (follower, leader):
        assert wrong["policy"][wrong is follower] == "policy is 'wait'; known: keep, recompute, abort"
        other = f"process {int(wrong is follower)} of 2 was given params or a policy that do not fit"
        assert right["policy"][wrong is follower].startswith(other)
    assert leader["alone"].startswith("process 1 of 2 only follows; call llm.release()")
    assert leader["under way"] == 0
    assert leader["early"].startswith("the weights were deleted, or donated to another function")
    assert leader["over"] == len(PROMPTS)
    assert all(versions == sorted(versions) and set(versions) == {1, 2} for versions in leader["versions"])
    for each in (leader, follower):
        early, late = each["arrays"]
        assert late <= early + 4, "what calls gave is held on to"
        assert each["freed"] == each["freed by all"] == each["owned"]
        assert each["without"] == "sleep(2) let go of the weights; call wake_up(params)"
