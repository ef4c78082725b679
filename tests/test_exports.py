"""Engines that start from exported steps: the same tokens, the pool still donated, and nothing of the model traced."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpaged import LLM, EngineConfig, SamplingParams
from jaxpaged.__main__ import main
from jaxpaged.engine import exports
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.model.params import dummy_params, flatten
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope, to_json

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 64, 0.125, Rope(1e4, 64)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,), _NORM, 16, tied_head=False)
CONFIG = EngineConfig(max_num_seqs=1, max_num_batched_tokens=16, num_pages=513, page_size=4, warmup=False)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1),
    SamplingParams(temperature=0.9, seed=1, max_tokens=8, logprobs=2, logit_bias={3: 2.0}),
    SamplingParams(temperature=0.7, seed=2, max_tokens=8, top_p=0.9, allowed_token_ids=[1, 2, 3, 5, 8]),
]


@pytest.fixture(scope="module")
def weights():
    return jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("exports")
    (folder / "spec.json").write_text(to_json(SPEC))
    save_file({path: np.array(leaf) for path, leaf in flatten(weights)}, folder / "model.safetensors")
    exports.write(folder, SPEC, np.float32, CONFIG, ["cpu"])
    return folder


def generate(llm):
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def test_an_export_answers_alike_without_tracing_the_model(exported, weights, monkeypatch):
    expected = generate(LLM((SPEC, weights), config=CONFIG))

    def untouched(*args, **kwargs):
        raise AssertionError("traced")

    for name in ("decoder.hidden_states", "step.hidden_states", "sampling.sample", "cache.write"):
        monkeypatch.setattr(f"jaxpaged.model.{name}", untouched)
    with pytest.raises(AssertionError, match="traced"):
        generate(LLM((SPEC, weights), config=CONFIG))
    llm = LLM.from_export(exported, seed=7)
    assert generate(llm) == expected


def test_the_pool_is_updated_in_place(exported, weights):
    runner, traced = (llm.engine.runner for llm in (LLM.from_export(exported), LLM((SPEC, weights), config=CONFIG)))
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.cache))
    for bucket in runner.buckets[:2]:
        ours, theirs = (r.functions.forward(bucket).memory_analysis() for r in (runner, traced))
        assert ours.alias_size_in_bytes >= pool
        assert ours.temp_size_in_bytes <= theirs.temp_size_in_bytes + 1024 < pool  # jax 0.12 places some otherwise


def test_what_does_not_fit_is_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"max_num_seqs is 8 but .* was compiled for 1; leave it out"):
        LLM.from_export(exported, max_num_seqs=8)
    with pytest.raises(ConfigError, match="has no field 'max_seqs'"):
        LLM.from_export(exported, max_seqs=8)
    with pytest.raises(CheckpointError, match="is no export"):
        LLM.from_export(tmp_path)
    manifest = json.loads((exported / "export.json").read_text())
    for change, message in (
        ({"format": 9}, "has format 9, this jaxpaged reads 1"),
        ({"jaxpaged": "0.0.1"}, r"was written by jaxpaged 0\.0\.1, this is"),
        ({"jax": "9.9.9"}, r"was exported by jax 9\.9\.9, this is .*; install that or a newer one"),
        ({"devices": {"tpu": {}}}, "was exported for tpu, this is a cpu; export the model again for it"),
    ):
        (tmp_path / "export.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=message):
            exports.read(tmp_path)
    (tmp_path / "export.json").write_text(
        json.dumps(manifest | {"config": manifest["config"] | {"num_pages": 514, "warmup": True}})
    )
    for name in ("steps", "spec.json", "model.safetensors"):
        (tmp_path / name).symlink_to(exported / name)
    with pytest.raises(CheckpointError, match="does not fit this engine"):
        LLM.from_export(tmp_path)
    with pytest.raises(ConfigError, match="num_pages is not set, and the pool's size is compiled in"):
        exports.write(tmp_path, SPEC, np.float32, replace(CONFIG, num_pages=None), ["cpu"])


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
@pytest.mark.slow
def test_any_machine_exports_for_any_other(tmp_path):
    config = replace(CONFIG, page_size=16)
    exports.write(tmp_path, SPEC, np.dtype("bfloat16"), config, ["cuda", "tpu"], gpu="NVIDIA H200")
    cuda, tpu = (
        jax.export.deserialize(bytearray((tmp_path / "steps" / platform / "forward-4-0-0-0.bin").read_bytes()))
        for platform in ("cuda", "tpu")
    )
    assert (cuda.platforms, tpu.platforms) == (("cuda",), ("tpu",))
    assert "__gpu$xla.gpu.triton" in cuda.mlir_module()
    assert "triton" not in tpu.mlir_module()
    assert json.loads((tmp_path / "export.json").read_text())["devices"]["cuda"]["capability"] == 9.0
    with pytest.raises(CheckpointError, match="was exported for cuda, tpu, this is a cpu"):
        exports.read(tmp_path)
    with pytest.raises(ConfigError, match="cannot export for 'rocm'; known: cpu, cuda, tpu"):
        exports.write(tmp_path / "more", SPEC, np.float32, config, ["rocm"])


def test_the_command_writes_a_folder_that_llm_starts_from(exported, weights, tmp_path, capsys):
    numbers = {"max-num-seqs": 1, "max-num-batched-tokens": 16, "num-pages": 513, "page-size": 4}
    flags = ["--no-warmup", *(f"--{name}={number}" for name, number in numbers.items())]
    assert main(["export", str(exported), str(tmp_path / "done"), *flags]) == 0
    assert "functions for cpu" in capsys.readouterr().out
    llm = LLM.from_export(tmp_path / "done")
    (output,) = llm.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)
    (expected,) = LLM((SPEC, weights), config=CONFIG).generate(PROMPTS[0], PARAMS[0], use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert main(["export", str(exported), str(tmp_path / "more"), "--platforms", "rocm", *flags]) == 2
    assert "cannot export for 'rocm'" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_model_with_a_single_kv_head_is_written_down_too(tmp_path):
    block = replace(_BLOCK, mixer=replace(_BLOCK.mixer, kv_heads=1))
    assert exports.write(tmp_path, replace(SPEC, blocks=(block,)), np.float32, CONFIG, ["cpu"]) > 0
