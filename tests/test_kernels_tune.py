"""Tuning keeps what is faster and right, writes what the kernels read, and refuses to run where no GPU is."""

from __future__ import annotations

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.kernels import tiles, trial, tune
from jaxpaged.kernels.tiles import Device, tiles_for
from jaxpaged.kernels.trial import Shape, decode_shape, prompt_shape
from jaxpaged.kernels.tune import Candidate, Case, Choice, best

H200 = Device("gpu", "NVIDIA H200", 9.0, 132)
CASE = Case("decode", 4, 128, "bfloat16")
RULE, GOOD, BETTER, UNEVEN = (Candidate("triton", None, 64, 4, stages) for stages in (5, 3, 2, 4))
SHAPES = [decode_shape(1, 100), decode_shape(2, 100)]


def fake(**seconds):
    """A clock that says so of each shape in turn; what has no time does not compile or answers wrongly."""
    names = {"rule": RULE, "good": GOOD, "better": BETTER, "uneven": UNEVEN}
    return lambda shape, those: {
        names[n]: t[SHAPES.index(shape)] for n, t in seconds.items() if names[n] in those and t[SHAPES.index(shape)]
    }


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        ({"good": (0.9, 0.9), "better": (0.8, 0.8)}, Choice(BETTER, 0.8)),
        ({"good": (0.9, 0.9), "better": (0.8, None)}, Choice(GOOD, 0.9)),
        ({"good": (0.9, 0.9), "uneven": (0.5, 1.1)}, Choice(GOOD, 0.9)),
        ({"good": (0.98, 0.98)}, None),
        ({}, None),
    ],
    ids=["the fastest", "right on every shape", "slower on none", "within the margin", "nothing else"],
)
def test_the_fastest_that_is_right_everywhere_is_chosen(seconds, want):
    found = best(RULE, [RULE, GOOD, BETTER, UNEVEN], SHAPES, fake(rule=(1.0, 1.0), **seconds))
    assert found == (want if want is None else Choice(want.candidate, pytest.approx(want.ratio)))


def test_a_rule_that_fails_is_an_error_and_no_row():
    with pytest.raises(RuntimeError, match="the rule's sizes fail on Shape"):
        best(RULE, [GOOD], SHAPES, fake(good=(1.0, 1.0)))


def test_what_is_written_is_what_the_kernels_take(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-h200.json"
    path.write_text(json.dumps({"decode": [{**CASE.conditions, "block_k": 16}, {"head_dim": 64, "num_warps": 2}]}))
    tune.write(path, {CASE: Candidate("triton", None, 128, 8, 3)})
    assert len(json.loads(path.read_text())["decode"]) == 2
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    choose = partial(tiles_for, "decode", H200, group=4, pool=jnp.bfloat16)
    assert choose(head_dim=128)[1:] == (128, 8, 3)
    assert choose(head_dim=64).num_warps == 2


def test_the_cpu_is_not_tuned():
    with pytest.raises(SystemExit, match="tuning measures a GPU and JAX runs on cpu"):
        tune.main([])


def test_a_wrong_answer_has_no_time(monkeypatch):
    def chain(shape, inputs, **how):
        out = trial.expected(shape, inputs) * (1.0 if how["num_stages"] == RULE.num_stages else 1.02)
        return lambda times: (out, out)

    monkeypatch.setattr(trial, "chain", chain)
    shape = decode_shape(1, 20, heads=2, kv_heads=1, head_dim=16)
    assert tune.measure(shape, [RULE, GOOD], interpret=True).keys() == {RULE}


def test_nothing_is_no_answer():
    want = np.ones((2, 3), np.float32)
    assert trial.error(want * 1.005, want) < trial.MAX_ERROR
    assert not trial.error(np.zeros_like(want), want) < trial.MAX_ERROR
    assert not trial.error(np.full_like(want, np.nan), want) < trial.MAX_ERROR


def test_shapes_know_their_bytes_and_operations():
    shape = Shape((1, 3), (100, 50), heads=4, kv_heads=2, head_dim=8)
    assert shape.kind == "mixed" and shape.num_decodes == 1
    assert shape.decode_bytes == 100 * 2 * 2 * 8 * 2
    assert shape.chunk_flops == 4 * 4 * 8 * (48 + 49 + 50)
    assert prompt_shape(2, 4).kind == "ragged" and decode_shape(3, 4).kind == "decode"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_mixed_trial_agrees_with_the_reference(dtype):
    shape = Shape((1, 3), (40, 20), heads=2, kv_heads=1, head_dim=16, dtype=dtype)
    inputs = trial.make_inputs(shape)
    first, _ = trial.chain(shape, inputs)(1)
    assert trial.error(first, trial.expected(shape, inputs)) < trial.MAX_ERROR


@pytest.mark.slow
def test_the_command_tries_every_backend_in_the_interpreter(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    tune.main(["--interpret", "--cases", "decode,2,16,float32", "ragged,2,16,int8", "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["decode", "ragged"]
    assert output.exists() or "nothing beats the rule" in lines[-1]
