"""`jaxpaged plan` says of devices that are not there what holds of those that are, and refuses in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import pytest

from jaxpaged import LLM, EngineConfig
from jaxpaged.__main__ import main
from jaxpaged.bench.shapes import SHAPES
from jaxpaged.convert.families import FAMILIES
from jaxpaged.engine.forecast import Forecaster, Speeds
from jaxpaged.model.params import dummy_params
from jaxpaged.model.sharding import ShardingRules

SMOLLM2 = SHAPES["smollm2-135m"] | {"num_hidden_layers": 2, "vocab_size": 1024}
GEMMA = {
    **{"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "sliding_window": 8},
    **{"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 128, "rms_norm_eps": 1e-6},
    **{"query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6},
    **{"rope_local_base_freq": 1e4, "tie_word_embeddings": True},
}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": 64, "warmup": False}


def spec_of(config):
    return FAMILIES[config["model_type"]].spec(config)


def bytes_by_device(tree):
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return {d: sum(s.data.nbytes for s in shards if s.device == d) for d in {s.device for s in shards}}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("size", "context"), [(2, 1), (2, 2), pytest.param(4, 1, marks=SLOW), (8, 1)])
@pytest.mark.parametrize(
    ("config", "pool"), [(SMOLLM2, "int8"), pytest.param(GEMMA, "auto", marks=SLOW)], ids=["smollm2", "gemma"]
)
def test_memory_is_what_the_arrays_take_on_every_device(config, pool, size, context):
    spec = spec_of(config)
    sizes = {"tensor_parallel_size": size, "prefill_context_parallel_size": context}
    settings = EngineConfig(cache_dtype=pool, **sizes, **SMALL)
    forecaster = Forecaster(spec, "float32", settings)
    found = forecaster.fit(forecaster.weight_bytes() + (64 << 20))
    llm = LLM((spec, dummy_params(spec)), config=replace(settings, num_pages=found.num_pages))
    assert set(bytes_by_device(llm.engine.params).values()) == {found.weight_bytes}
    assert set(bytes_by_device(llm.engine.runner.cache).values()) == {found.pool_bytes}
    assert llm.engine.runner.max_model_len == found.max_model_len


@pytest.mark.parametrize("config", [SMOLLM2, GEMMA], ids=["smollm2", "gemma"])
def test_memory_of_pipeline_stages_is_what_the_fullest_devices_hold(config):
    spec = spec_of(config)
    settings = EngineConfig(pipeline_parallel_size=2, tensor_parallel_size=2, **SMALL)
    forecaster = Forecaster(spec, "float32", settings)
    found = forecaster.fit(forecaster.weight_bytes() + (64 << 20))
    llm = LLM((spec, dummy_params(spec)), config=replace(settings, num_pages=found.num_pages))
    weights, pools = (bytes_by_device(tree) for tree in (llm.engine.params, llm.engine.runner.cache))
    held = {device: (weights[device] + pools[device], weights[device]) for device in weights}
    assert max(held.values()) == (found.weight_bytes + found.pool_bytes, found.weight_bytes)
    assert len(held) == 4 and max(weights.values()) == forecaster.weight_bytes()


def test_pages_fill_the_share_of_the_memory_that_is_asked_for_and_not_more_than_is_of_use():
    forecaster = Forecaster(spec_of(SMOLLM2), "bfloat16", EngineConfig(memory_utilization=0.5))
    memory = 256 << 20
    found = forecaster.fit(memory)
    assert 0 <= int(memory * 0.48) - found.weight_bytes - found.pool_bytes == found.free_bytes < found.page_bytes
    assert found.num_tokens == 16 * (found.num_pages - 1)
    plenty = forecaster.fit(80 << 30)
    assert plenty.num_full_seqs == 64 and plenty.free_bytes > 30 << 30


def test_a_decode_step_reads_every_weight_but_the_embedding_and_all_keys_that_are_seen():
    spec = spec_of(SHAPES["llama-3-8b"])
    step = Forecaster(spec, "bfloat16", EngineConfig(tensor_parallel_size=8)).decode_step(64, 1000)
    layer = 4096 * (32 + 8 + 8 + 32) * 128 + 3 * 4096 * 14336
    products = (32 * layer + 4096 * 128256) // 8
    assert step.weight_bytes == 2 * (products + 65 * 4096)
    assert step.kv_bytes == 32 * 64 * 1000 * 2 * 128 * 2
    assert step.flops == 2 * 64 * products + 32 * 4 * 64 * 1000 * 4 * 128
    assert (step.num_sums, step.sum_bytes) == (65, 512 << 10)
    assert step.link_bytes == 65 * 2 * 7 * (512 << 10) // 8
    assert step.total(Speeds(1e12, 1e30, 1e9)) == pytest.approx(step.flops / 1e12 + step.link_bytes / 1e9)


def test_a_decode_step_computes_the_experts_that_are_chosen_and_reads_each_once():
    spec = spec_of(SHAPES["mixtral-8x7b"])
    one, many = (Forecaster(spec, "bfloat16", EngineConfig()).decode_step(n, 8) for n in (1, 64))
    expert, attention, head = 3 * 4096 * 14336, 4096 * (32 + 8 + 8 + 32) * 128, 4096 * 32000
    others = 32 * (attention + 4096 * 8 + 2 * 4096) + head + 4096
    assert one.weight_bytes == 2 * (others + 32 * 2 * expert)
    assert many.weight_bytes == pytest.approx(2 * (others + 32 * 8 * expert), rel=1e-6)
    assert many.flops - 64 * 32 * 4 * 8 * 32 * 128 == 2 * 64 * (others - 65 * 4096 + 32 * 2 * expert)


@pytest.mark.parametrize("rules", [None, ShardingRules(experts="model")], ids=["cut", "whole"])
def test_devices_have_equal_shares_of_the_experts(rules):
    whole, cut = (
        Forecaster(spec_of(SHAPES["qwen3-30b-a3b"]), "bfloat16", EngineConfig(tensor_parallel_size=n), rules=rules)
        for n in (1, 4)
    )
    assert 61e9 < whole.weight_bytes() < 61.2e9
    kept = 48 * (2 * 2048 + 2 * 128 + 2048 * 128) + 2048  # norms and routers
    assert cut.weight_bytes() == (whole.weight_bytes() - 2 * kept) // 4 + 2 * kept
    assert (whole.decode_step(8, 64).num_sums, cut.decode_step(8, 64).num_sums) == (0, 97)


def test_a_pipeline_stage_reads_its_weights_for_each_group_and_hands_on_a_row_for_each_sequence():
    spec = spec_of(SHAPES["llama-3-8b"])
    one, two = (
        Forecaster(spec, "bfloat16", EngineConfig(pipeline_parallel_size=n)).decode_step(64, 1000) for n in (1, 2)
    )
    layers = 16 * (4096 * (32 + 8 + 8 + 32) * 128 + 3 * 4096 * 14336 + 2 * 4096)
    assert two.weight_bytes == 2 * 2 * (layers + 4096 * 128256 + 4096)  # the last stage's, of bfloat16, for two groups
    assert 2 * two.kv_bytes == one.kv_bytes
    first = Forecaster(spec, "bfloat16", EngineConfig(pipeline_parallel_size=2))
    assert first._decode_step(first.stages[0], 64, 1000).link_bytes == 64 * 4096 * 2


def test_prompts_split_over_devices_split_the_keys_that_a_step_reads_too_and_gather_what_attention_gave():
    one, split = (
        Forecaster(spec_of(SHAPES["llama-3-8b"]), "bfloat16", EngineConfig(prefill_context_parallel_size=n))
        for n in (1, 4)
    )
    assert one.weight_bytes() == split.weight_bytes()
    one, split = one.decode_step(64, 1000), split.decode_step(64, 1000)
    assert one.kv_bytes == 4 * split.kv_bytes
    assert (one.link_bytes, split.link_bytes) == (0, 32 * 3 * 64 * 4096 * 2 // 4)


@pytest.mark.parametrize(("size", "num_pages"), [(1, 65_536), (8, 65_537)])
def test_the_largest_8_bit_pool_that_a_kernel_reads_is_one_devices(size, num_pages):
    config = EngineConfig(tensor_parallel_size=size, cache_dtype="fp8", max_num_seqs=128)
    assert Forecaster(spec_of(SHAPES["llama-3-8b"]), "bfloat16", config).fit(160 << 30).num_pages == num_pages


def test_a_window_bounds_what_is_read():
    forecaster = Forecaster(spec_of(GEMMA), "bfloat16", EngineConfig())
    few, many = (forecaster.decode_step(1, n).kv_bytes for n in (8, 100))
    assert many - few == 92 * few // 16  # one layer of two


@pytest.fixture
def plan(capsys):
    """Runs the command: (exit status, lines)."""

    def run(*argv):
        try:
            status = main(["plan", *map(str, argv)])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        return status, (out + err).splitlines()

    return run


def test_without_parallel_sizes_all_are_compared(plan):
    status, lines = plan("llama-3-70b", "--devices", 8)
    assert status == 0
    assert [line.split()[:2] for line in lines[2:5]] == [["2", "4"], ["4", "2"], ["8", "1"]]
    assert lines[5].startswith(
        "tensor parallel 1 x data parallel 8 does not fit: weights take 141,107,412,992 bytes of"
    )
    assert "given, not measured" in lines[-1]


def test_with_parallel_sizes_one_is_told_in_full(plan):
    status, lines = plan("llama-3-8b", "--devices", 8, "--tensor-parallel-size", 4, "--kv-cache-dtype", "fp8")
    assert status == 0 and lines[1] == "fits with tensor parallel 4 x data parallel 2"
    assert any(line.split() == ["weights", "3.74", "GiB"] for line in lines)
    assert any(line.endswith("65 all-reduces of 512.00 KiB") for line in lines)


def test_a_model_that_fits_nowhere_is_status_1(plan):
    status, lines = plan("llama-3-8b", "--devices", 1, "--memory", "10GiB")
    assert status == 1
    assert lines[1].endswith("take more devices, or larger ones")


def test_a_config_alone_is_enough_and_says_the_dtype(plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {"torch_dtype": "float16"}))
    status, lines = plan(tmp_path, "--devices", 2)
    assert status == 0 and lines[0] == f"{tmp_path}, weights of float16, on 2 devices of 80.00 GiB"


REFUSED = [
    (["/no/such/model", "--devices", 2], "/no/such/model does not exist"),
    (["tiny", "--devices", 0], "--devices is 0; it must be at least 1"),
    (["tiny", "--devices", 6, "--tensor-parallel-size", 4], "--devices is 6, which --tensor-parallel-size 4 does not"),
    (
        ["tiny", "--devices", 6, "--prefill-context-parallel-size", 4],
        "--prefill-context-parallel-size 4 does not make",
    ),
    (["tiny", "--devices", 2, "--memory", "80 potatoes"], "--memory is '80 potatoes'; write it as 80GiB"),
    (["tiny", "--devices", 2, "--flops", "nan"], "--flops is nan; it must be a finite number above 0"),
    (["tiny", "--devices", 2, "--page-size", 12], "page_size is 12; it must be a power of two"),
    (["tiny"], "the following arguments are required: --devices"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_one_line_and_status_2(plan, argv, message):
    status, lines = plan(*argv)
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_what_cannot_be_shared_or_held_is_said_of_each_way(plan):
    status, lines = plan("tiny", "--devices", 3, "--max-model-len", 512, "--memory", "2MB")
    assert status == 0  # one device has room, and three cannot share the vocabulary
    assert "vocab is 128 (embed.w), which the 3 devices" in lines[3]
    status, lines = plan("tiny", "--devices", 1, "--max-model-len", 512, "--memory", "250KB")
    assert status == 1 and "lower max_model_len to" in lines[1]
