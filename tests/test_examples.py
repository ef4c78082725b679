"""Every example runs as its first line says, on a tiny model here and on SmolLM2 among the slow tests."""

from __future__ import annotations

import importlib
import io
import runpy
import sys
from pathlib import Path

import jax
import pytest
from real_model import smollm2_gguf
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged.engine.runner import Runner

EXAMPLES = Path(__file__).parents[1] / "examples"

EXPECTED = {
    "quickstart": ["'The capital of France is' -> ", "chat: ", "drawn 1: ", "  1. ", "mean log probability"],
    "chat": ["> "],
    "structured": ["city: {'name': ", "blue: ", "time: "],
    "speculative": ["one by one: ", "as before: ", " guesses came true", "  the same tokens"],
    "lora": ["  pirate: The capital of France is' a fine harbour, arr!", "after 40 steps"],
    "logits_processor": ["'Once upon a time' -> ", "'The weather today is' -> "],
    "custom_sampler": ["'Once upon a time' -> "],
    "batch": ["What is the colour of carrot? ", "32 requests, ", "prompt tokens came from the prefix cache"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("examples") / "model")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script and gives what it printed."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(Runner, "warm_up", lambda runner, **_: None)  # they compile what they meet

    def script(name, *argv, stdin="Hi\nAnd you?\n"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs_on_a_given_model(run, folder, name):
    printed = run(name, folder)
    assert [part for part in EXPECTED[name] if part not in printed] == []


def test_examples_fall_back_to_a_tiny_model(run, monkeypatch):
    any_model = importlib.import_module("any_model")
    monkeypatch.setattr(any_model, "find_spec", lambda package: None)
    assert run("chat").startswith("> ")
    assert "bytes on each of 8 devices" in run("mesh")


def test_openai_client_talks_to_the_server(run, folder):
    with running(folder) as server:
        printed = run("openai_client", f"{server.url}/v1")
    prompt_tokens = len(server.engine.tokenizer.encode("user:What is the capital of France?\nassistant:"))
    assert f"[{prompt_tokens} + " in printed
    assert len(printed.splitlines()) >= 3 and printed.splitlines()[-1].count(" -") == 3


def test_custom_family_is_written_loaded_and_served(run):
    from jaxpaged.convert.families import FAMILIES

    try:
        printed = run("custom_family")
    finally:
        FAMILIES.pop("tandem", None)
    prompt, generated = printed.split(" -> ")
    assert prompt == "[5, 6, 7]"
    assert len(generated.split(",")) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in ("quickstart", "structured") else pytest.param(n, marks=pytest.mark.long) for n in EXPECTED]
)
def test_example_runs_on_the_real_model(run, name):
    printed = run(name, smollm2_gguf())
    assert [part for part in EXPECTED[name] if part not in printed] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < (150 if path.stem == "grpo" else 60)


@pytest.fixture
def grpo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes ints and floats
        yield importlib.import_module("grpo")


@pytest.mark.slow
def test_every_ratio_is_1_before_an_update(grpo):
    _, drifts = grpo.train(num_steps=6, seed=0)
    assert drifts == [0.0] * 6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_at_least_doubles_the_reward(grpo, seed):
    rewards, drifts = grpo.train(num_steps=60, seed=seed)
    assert sum(rewards[-10:]) >= 2 * sum(rewards[:10])
    assert set(drifts) == {0.0}


def test_the_reward_is_drawn(grpo, tmp_path):
    pytest.importorskip("matplotlib")
    grpo.draw([0.1] * 12, str(tmp_path / "reward.png"))
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
