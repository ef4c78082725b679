"""Every family against transformers: logits, greedy tokens through the paged cache, names, configs of both dialects."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    CASES,
    LLAMA3,
    LONG,
    NUM_GENERATED,
    SHAPE,
    Case,
    transformers_reference,
    weight,
    write_checkpoint,
)

from jaxpaged import LLM, SamplingParams
from jaxpaged.convert.families import FAMILIES, family_of, llama
from jaxpaged.convert.rules import Rule, hf_shapes, load_leaves, rules_for, store_tensors
from jaxpaged.errors import CheckpointError
from jaxpaged.model.cache import init_cache
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import Params, check_params, flatten, map_specs
from jaxpaged.model.spec import Block, Decoder, ExpertGroups, LinearScaling, Moe, Norm, Rope, from_json, to_json
from jaxpaged.model.step import StepInputs, forward

Golden = Callable[[str, Callable[[], Mapping[str, np.ndarray]]], Mapping[str, np.ndarray]]

PAGE_SIZE = 4
CHUNK = 7
# The engine compiles several steps for each, so a few stand for all in the fast tests.
IN_ENGINE = ("llama_dynamic", "gemma2")
# What happens when a sequence outgrows its ropes is the engine's doing, not a step's.
BY_STEPS = [case for case in CASES.values() if not case.name.endswith("_outgrown")]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Tiny(NamedTuple):
    spec: Decoder
    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]
    params: Params


@cache
def tiny(name: str) -> Tiny:
    """The case's model, converted."""
    config = CASES[name].config
    family = family_of(config)
    spec = family.spec(config)
    rules = family.rules(spec, ())
    shapes = hf_shapes(rules, spec)
    leaves = dict(load_leaves(rules, lambda tensor: weight(tensor, shapes[tensor])))
    return Tiny(spec, rules, shapes, map_specs(lambda path, leaf: jnp.asarray(leaves[path]), spec))


@pytest.fixture
def reference(golden: Golden) -> Callable[[Case], Mapping[str, np.ndarray]]:
    """What transformers says of a case."""
    return lambda case: golden(f"families/{case.name}", lambda: computed_reference(case.name))


@cache
def computed_reference(name: str) -> Mapping[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CASES[name].config, tiny(name).shapes)
        return transformers_reference(Path(folder), CASES[name])


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@every_case
def test_dense_logits_equal_transformers(case: Case, reference: Callable[[Case], Mapping[str, np.ndarray]]) -> None:
    model = tiny(case.name)
    assert_same_logits(apply(model.params, jnp.asarray(case.tokens()), model.spec), reference(case)["logits"])


@pytest.mark.parametrize("case", BY_STEPS, ids=[case.name for case in BY_STEPS])
def test_paged_steps_equal_transformers(case: Case, reference: Callable[[Case], Mapping[str, np.ndarray]]) -> None:
    want = reference(case)
    continuations = [want[f"ids_{i}"].tolist() for i in range(len(case.prompts()))]

    got = paged_logits(tiny(case.name), case.prompts(), continuations)

    for i, logits in enumerate(got):
        assert_same_logits(logits, want[f"logits_{i}"])
        assert logits.argmax(-1).tolist() == continuations[i]


def paged_logits(model: Tiny, prompts: list[list[int]], continuations: list[list[int]]) -> list[np.ndarray]:
    """Logits after each prompt and after each token of its continuation but the last.

    All run side by side, as in the engine: prompts in chunks under a budget of `CHUNK` tokens a step, which begin and
    end inside of pages, while those that are through decode a token each.
    """
    texts = [np.array(prompt + more[:-1], np.int32) for prompt, more in zip(prompts, continuations, strict=True)]
    prompt_lens, num_texts = [len(prompt) for prompt in prompts], len(prompts)
    pages_each = -(-max(map(len, texts)) // PAGE_SIZE)
    # Pages dealt out in turn, so that no sequence's pages lie side by side; page 0 is the null page.
    tables = 1 + np.arange(num_texts * pages_each, dtype=np.int32).reshape(pages_each, num_texts).T
    kv_cache = init_cache(model.spec, tables.size + 1, PAGE_SIZE, "float32")
    # Compiling is most of this test's time, and half of that the compiler's own optimisations.
    step = jax.jit(
        forward, static_argnames="spec", donate_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
    )
    computed = [0] * num_texts
    logits: list[list[np.ndarray]] = [[] for _ in texts]
    while any(c < len(text) for c, text in zip(computed, texts, strict=True)):
        inputs, counts = mixed_step(texts, prompt_lens, tables, computed)
        kv_cache, out = step(model.params, kv_cache, inputs, jnp.zeros(1, jnp.int32), model.spec)
        for i, count in enumerate(counts):
            computed[i] += count
            if count and computed[i] >= prompt_lens[i]:
                logits[i].append(np.asarray(out.logits[i]))
    return [np.stack(rows) for rows in logits]


def mixed_step(
    texts: list[np.ndarray], prompt_lens: list[int], tables: np.ndarray, computed: list[int]
) -> tuple[StepInputs, list[int]]:
    """One step, and how many tokens of each text it computes: a row per text to decode in, then `CHUNK` for prompts.

    Every step has the same shapes: texts that do not decode, or have no chunk, are rows of length 0.
    """
    num_texts, size = len(texts), len(texts) + CHUNK
    tokens, positions, rope_lens = (np.zeros(size, np.int32) for _ in range(3))
    slots = np.full(size, tables.size * 10 * PAGE_SIZE, np.int32)
    kv_lens = np.zeros(2 * num_texts, np.int32)
    ends, counts, logit_rows = [num_texts], [], []
    for i, start in enumerate(computed):
        decodes = start >= prompt_lens[i]
        wanted = len(texts[i]) - start if decodes else prompt_lens[i] - start
        count = min(wanted, 1 if decodes else size - ends[-1])
        first = i if decodes else ends[-1]
        rows, places = slice(first, first + count), np.arange(start, start + count, dtype=np.int32)
        tokens[rows], positions[rows] = texts[i][places], places
        rope_lens[rows] = np.maximum(prompt_lens[i], places + 1)
        slots[rows] = tables[i, places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
        kv_lens[i if decodes else num_texts + i] = start + count if count else 0
        ends.append(ends[-1] if decodes else ends[-1] + count)
        counts.append(count)
        logit_rows.append(max(first + count - 1, 0))
    inputs = StepInputs(
        token_ids=jnp.asarray(tokens),
        feedback=jnp.full(size, -1, jnp.int32),
        positions=jnp.asarray(positions),
        rope_lens=jnp.asarray(rope_lens),
        slots=jnp.asarray(slots),
        page_table=jnp.asarray(np.concatenate([tables, tables])),
        kv_lens=jnp.asarray(kv_lens),
        cu_q_lens=jnp.asarray(np.array(ends, np.int32) - num_texts),
        logit_rows=jnp.asarray(np.array(logit_rows, np.int32)),
    )
    return inputs, counts


def _marks(name: str) -> list[pytest.MarkDecorator]:
    """Of variants of one family one is enough for CI: their logits and paged steps are compared in the fast tests."""
    return [pytest.mark.slow, *([pytest.mark.long] if name.startswith("llama_") else [])]


@pytest.mark.parametrize("name", [n if n in IN_ENGINE else pytest.param(n, marks=_marks(n)) for n in CASES])
def test_engine_generates_what_transformers_does(
    name: str, reference: Callable[[Case], Mapping[str, np.ndarray]], tmp_path: Path
) -> None:
    case = CASES[name]
    folder = write_checkpoint(tmp_path / "model", case.config, tiny(name).shapes)
    longest = max(map(len, case.prompts())) + NUM_GENERATED
    llm = LLM(
        folder, page_size=PAGE_SIZE, max_model_len=longest, max_num_seqs=4, max_num_batched_tokens=CHUNK, warmup=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_GENERATED, ignore_eos=True)

    outputs = llm.generate(case.prompts(), params, use_tqdm=False)

    want = reference(case)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [want[f"ids_{i}"].tolist() for i in range(len(outputs))]


def every_mixer(**changes: Any) -> Callable[[Decoder], Decoder]:
    return every_block(lambda block: replace(block, mixer=replace(block.mixer, **changes)))


def every_rope(**changes: Any) -> Callable[[Decoder], Decoder]:
    def change(block: Block) -> Block:
        assert block.mixer.rope is not None
        return replace(block, mixer=replace(block.mixer, rope=replace(block.mixer.rope, **changes)))

    return every_block(change)


def every_scaling(**changes: Any) -> Callable[[Decoder], Decoder]:
    def change(block: Block) -> Block:
        rope = block.mixer.rope
        assert rope is not None and rope.scaling is not None
        return replace(block, mixer=replace(block.mixer, rope=replace(rope, scaling=replace(rope.scaling, **changes))))

    return every_block(change)


def every_mixture(**changes: Any) -> Callable[[Decoder], Decoder]:
    def change(block: Block) -> Block:
        return replace(block, ffn=replace(block.ffn, **changes)) if isinstance(block.ffn, Moe) else block

    return every_block(change)


def every_block(change: Callable[[Block], Block]) -> Callable[[Decoder], Decoder]:
    return lambda spec: replace(spec, blocks=tuple(change(block) for block in spec.blocks))


WRONG: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "theta": ("llama", every_rope(theta=600.0)),
    "interleaved": ("llama", every_rope(interleaved=True)),
    "rotated part": ("gpt_neox", every_rope(dim=4)),
    "scale": ("gemma2", every_mixer(scale=0.2)),
    "scale by layer": ("gpt2_scaled_by_layer_untied", every_mixer(scale=1.0)),
    "window off by one": ("mistral", every_mixer(window=6)),
    "no window": ("mistral", every_mixer(window=None)),
    "windows in the wrong layers": (
        "qwen2_layer_types",
        lambda spec: replace(spec, blocks=tuple(reversed(spec.blocks))),
    ),
    "softcap": ("gemma2", every_mixer(softcap=2.2)),
    "logit softcap": ("gemma2", lambda spec: replace(spec, logit_softcap=5.5)),
    "another eps of the norm over all heads": ("olmoe", every_mixer(qk_norm=Norm("rms", 1.0))),
    "no qk norm": ("qwen3", every_mixer(qk_norm=None)),
    "qk norm of the plain kind": ("gemma3", every_mixer(qk_norm=Norm("rms", 1e-6))),
    "norm of the plain kind": ("gemma", every_block(lambda block: replace(block, norm=Norm("rms", 1e-6)))),
    "embed scale": ("gemma", lambda spec: replace(spec, embed_scale=1.0)),
    "residual parallel": ("gpt_neox", every_block(lambda block: replace(block, residual="serial"))),
    "residual serial": ("gpt_neox_serial", every_block(lambda block: replace(block, residual="parallel"))),
    "residual post": ("opt_350m", every_block(lambda block: replace(block, residual="serial"))),
    "residual sandwich": ("gemma2", every_block(lambda block: replace(block, residual="serial"))),
    "activation": ("gpt2", every_block(lambda block: replace(block, ffn=replace(block.ffn, act="gelu")))),
    "fewer experts a token": ("mixtral", every_mixture(top_k=1)),
    "more experts a token": ("qwen3_moe", every_mixture(top_k=4)),
    "weights that do not add up to 1": ("mixtral", every_mixture(renormalize=False)),
    "weights that add up to 1": ("qwen2_moe", every_mixture(renormalize=True)),
    "no shared expert": ("qwen2_moe", every_mixture(shared=None)),
    "shared expert without its gate": ("qwen2_moe", every_mixture(shared_gate=False)),
    "no bias for whom to choose": ("deepseek_v3", every_mixture(selection_bias=False)),
    "no groups of experts": ("deepseek_v2", every_mixture(groups=None)),
    "more groups of experts": ("deepseek_v3", every_mixture(groups=ExpertGroups(4, 3, 2))),
    "groups as good as their best": ("deepseek_v3", every_mixture(groups=ExpertGroups(4, 2, 1))),
    "groups as good as their two best": ("deepseek_v2", every_mixture(groups=ExpertGroups(4, 2, 2))),
    "softmax for sigmoids": ("deepseek_v3_halves", every_mixture(scoring="softmax")),
    "experts without their scale": ("deepseek_v2", every_mixture(scale=1.0)),
    "scale without mscale": ("deepseek_v3", every_mixer(scale=0.25)),
    "mscale of what is rotated": ("deepseek_v2", every_scaling(attention_factor=1.0)),
    "latents' rope not interleaved": ("deepseek_v2", every_rope(interleaved=False)),
    "latents' rope interleaved": ("deepseek_v3_halves", every_rope(interleaved=True)),
    "another eps of the latents' norm": ("deepseek_v2", every_mixer(norm=Norm("rms", 1e-3))),
    "learned positions": ("opt", lambda spec: replace(spec, learned_positions=1)),
    "rope where there is none": ("smollm3", every_mixer(rope=Rope(100.0, 12))),
    "linear factor": ("llama_linear", every_scaling(factor=3.9)),
    "dynamic factor": ("llama_dynamic", every_scaling(factor=3.5)),
    "llama3 factor": ("llama_llama3", every_scaling(factor=3.5)),
    "yarn factor": ("llama_yarn", every_scaling(factor=3.5)),
    "yarn attention factor": ("llama_yarn", every_scaling(attention_factor=1.0)),
    "longrope factors": ("phi3_longrope", every_scaling(long_factor=tuple(LONG["short_factor"]))),
    "longrope attention factor": ("phi3_longrope", every_scaling(attention_factor=1.0)),
}


@pytest.mark.parametrize(("name", "change"), WRONG.values(), ids=WRONG.keys())
def test_wrong_spec_is_noticed(
    name: str, change: Callable[[Decoder], Decoder], reference: Callable[[Case], Mapping[str, np.ndarray]]
) -> None:
    model, case = tiny(name), CASES[name]
    wrong = change(model.spec)

    logits = np.asarray(apply(model.params, jnp.asarray(case.tokens()), wrong))

    assert abs(logits - reference(case)["logits"]).max() > 1e-3, "ten times what passes"


@every_case
def test_tensors_survive_the_round_trip(case: Case) -> None:
    model = tiny(case.name)
    leaves = dict(flatten(model.params))

    back = dict(store_tensors(model.rules, lambda path: np.asarray(leaves[path])))

    assert not check_params(model.spec, model.params)
    assert back.keys() == model.shapes.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, weight(name, model.shapes[name]), err_msg=name)


@every_case
def test_spec_survives_json(case: Case) -> None:
    spec = tiny(case.name).spec
    assert from_json(to_json(spec)) == spec


@every_case
def test_config_as_transformers_saves_it_gives_the_same_spec(case: Case, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = dict(case.config)
    AutoConfig.for_model(config.pop("model_type"), **config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert family_of(saved).spec(saved) == tiny(case.name).spec


@pytest.mark.torch
@every_case
def test_tensors_as_transformers_saves_them_are_those_of_the_rules(case: Case, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(case.config)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    spec = tiny(case.name).spec
    assert hf_shapes(family_of(case.config).rules(spec, saved), spec) == saved


def test_fused_tensors_are_read_once() -> None:
    model = tiny("phi3")
    read: list[str] = []

    def note(name: str) -> np.ndarray:
        read.append(name)
        return weight(name, model.shapes[name])

    assert len(list(load_leaves(model.rules, note))) > len(read)
    assert sorted(read) == sorted(model.shapes)


def test_table_that_forgets_a_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not say where these leaves come from: head\.w"):
        rules_for(tiny("llama").spec, {ours: theirs for ours, theirs in llama.TABLE.items() if ours != "head"})


RENAMED = {
    "gpt2 without transformer.": ("gpt2", "transformer.", ""),
    "opt without model.": ("opt", "model.decoder.", "decoder."),
    "gpt_neox with lm_head": ("gpt_neox", "embed_out.", "lm_head."),
}


@pytest.mark.parametrize(("name", "old", "new"), RENAMED.values(), ids=RENAMED.keys())
def test_other_spelling_of_the_names_is_read(name: str, old: str, new: str) -> None:
    model = tiny(name)
    tensors = {n.replace(old, new): weight(n, shape) for n, shape in model.shapes.items()}
    assert tensors.keys() != model.shapes.keys()

    rules = family_of(CASES[name].config).rules(model.spec, tensors)

    assert hf_shapes(rules, model.spec).keys() == tensors.keys()
    for path, leaf in load_leaves(rules, tensors.__getitem__):
        np.testing.assert_array_equal(leaf, dict(flatten(model.params))[path], err_msg=path)


@pytest.mark.parametrize(
    ("body", "head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
    ids=["as published", "as saved since"],
)
def test_language_model_inside_gemma3_is_read(body: str, head: str) -> None:
    model = tiny("gemma3")
    config = {"model_type": "gemma3", "text_config": CASES["gemma3"].config, "vision_config": {}}
    names = [name.replace("lm_head.", head).replace("model.", body, 1) for name in model.shapes]
    family = family_of(config)

    assert family.spec(config) == model.spec
    assert sorted(hf_shapes(family.rules(model.spec, names), model.spec)) == sorted(names)
    assert family.ignores("vision_tower.vision_model.embeddings.patch_embedding.weight", model.spec)
    assert not any(family.ignores(name, model.spec) for name in names)


def test_published_gemma3_config_may_say_next_to_nothing() -> None:
    config = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    spec = family_of(config).spec(config)
    local, wide = spec.blocks[4].mixer, spec.blocks[5].mixer
    assert (spec.vocab_size, spec.max_positions, spec.tied_head) == (262208, 131072, True)
    assert (local.heads, local.kv_heads, local.head_dim, local.window, local.rope) == (8, 4, 256, 1024, Rope(1e4, 256))
    assert (wide.window, wide.rope) == (None, Rope(1e6, 256, scaling=LinearScaling(8.0)))


def longrope(**rope: Any) -> dict[str, Any]:
    return {"model_type": "phi3", **SHAPE, "original_max_position_embeddings": 16, "rope_scaling": {**LONG, **rope}}


@pytest.mark.parametrize(("said", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)])
def test_mistral_window_left_out_is_not_the_same_as_null(said: dict[str, Any], window: int | None) -> None:
    config = {"model_type": "mistral", **SHAPE, **said}
    assert {block.mixer.window for block in family_of(config).spec(config).blocks} == {window}


def test_windows_of_a_mixture_are_where_the_config_says() -> None:
    config = {**CASES["qwen2_moe"].config, "layer_types": ["full_attention", "sliding_attention"] * 2}
    both = tiny("qwen2_moe").spec, family_of(config).spec(config)
    assert [[b.mixer.window for b in spec.blocks] for spec in both] == [[5, None, 5, None], [None, 5, None, 5]]
    assert [isinstance(block.ffn, Moe) for block in both[0].blocks] == [False, True, False, False]


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_long_rope_under_its_first_names_is_read(old: str) -> None:
    config = longrope(type=old)
    assert family_of(config).spec(config) == tiny("phi3_longrope").spec


@pytest.mark.parametrize(
    ("name", "max_positions"),
    [
        ("llama", 64),
        ("llama_linear", 256),
        ("llama_dynamic", 64),
        ("llama_yarn", 64),
        ("llama_llama3", 64),
        ("gemma3", 64),
    ],
)
def test_scaled_rope_lengthens_what_the_config_counts_before_scaling(name: str, max_positions: int) -> None:
    assert tiny(name).spec.max_positions == max_positions


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama_biases_tied", "lm_head.weight"),
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox_serial", "embed_out.weight"),
    ],
)
def test_tensors_that_hold_no_weights_are_ignored(name: str, tensor: str) -> None:
    model = tiny(name)
    assert tensor not in model.shapes
    assert family_of(CASES[name].config).ignores(tensor, model.spec)


@every_case
def test_no_weight_is_ignored(case: Case) -> None:
    model, family = tiny(case.name), family_of(case.config)
    assert [name for name in model.shapes if family.ignores(name, model.spec)] == []


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown activation": ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    "unknown rope": ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type = 'mrope'"),
    "rope without factor": ("llama", {"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
    "rope that is no object": ("llama", {"rope_scaling": "linear"}, "rope_scaling = 'linear' must be an object"),
    "long rope of another length": ("phi3_longrope", {"head_dim": 8}, "must be a list of 4 entries, found 6"),
    "lopsided llama3": (
        "llama",
        {"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4}},
        "below high_freq",
    ),
    "odd rotary part": ("phi", {"partial_rotary_factor": 0.3}, "rotates 3 of 12 head dimensions"),
    "missing size": ("llama", {"hidden_size": None}, "lacks hidden_size"),
    "size that is text": ("llama", {"hidden_size": "48"}, "hidden_size = '48' must be a whole number"),
    "negative size": (
        "llama",
        {"num_hidden_layers": -1},
        "num_hidden_layers = -1 must be a whole number",
    ),
    "absurd size": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "flag that is text": ("llama", {"attention_bias": "yes"}, "attention_bias = 'yes' must be true or false"),
    "uneven heads": (
        "llama",
        {"num_attention_heads": 5},
        "hidden_size = 48 is not a multiple of",
    ),
    "uneven kv heads": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
    "infinite eps": ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps = inf must be a finite number"),
    "unknown layer type": ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "has 'chunked_attention'"),
    "too few layer types": ("gemma2", {"layer_types": ["full_attention"]}, "must be a list of 2 entries, found 1"),
    "encoder": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    "norms without weights": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    "clipped queries": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 bounds"),
    "more experts a token than there are": ("mixtral", {"num_experts_per_tok": 7}, "a whole number from 1 to 6"),
    "absurd number of experts": ("qwen3_moe", {"num_experts": 10**9}, "num_experts = 1000000000 must be"),
    "dense layer that is not there": ("qwen2_moe", {"mlp_only_layers": [4]}, "mlp_only_layers = [4] must be a list"),
    "tied head with a bias": ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    "unknown family": ("llama", {"model_type": "mamba"}, "'mamba' is not a known architecture; known: deepseek_v2, "),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_we_cannot_run_is_refused_by_name_and_value(name: str, changes: dict[str, Any], message: str) -> None:
    config = {**CASES[name].config, **changes}
    with pytest.raises(CheckpointError) as caught:
        family_of(config).spec(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_family_has_a_case() -> None:
    assert {case.config["model_type"] for case in CASES.values()} | {"gemma3"} == FAMILIES.keys()
