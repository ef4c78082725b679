"""Adapters beside the model: each request's tokens are those of weights into which its adapter was merged."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running_server import running
from safetensors.numpy import load_file, save_file
from test_engine import FRESH, PARAMS, PROMPTS, SPEC, _no_compilation, make, run
from test_speculative import GREEDY, Known
from tiny_chat_model import write_chat_model
from tiny_models import CASES, transformers_reference, write_checkpoint

from jaxpaged import LLM, BeamSearchParams, EngineConfig, LoRARequest, RequestError, SamplingParams, ShardingRules
from jaxpaged.__main__ import main
from jaxpaged.convert.families import family_of
from jaxpaged.convert.load import load
from jaxpaged.convert.peft import read_adapter
from jaxpaged.convert.rules import hf_shapes
from jaxpaged.engine import exports
from jaxpaged.engine.forecast import Forecaster
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.functional import Factors, apply, init_adapter, with_adapter
from jaxpaged.model.lora import adaptable

RANK = 3


def random_adapter(seed, rank=RANK, paths=None):
    rng = np.random.default_rng(seed)
    shapes = {path: leaf.shape for path, leaf in adaptable(SPEC).items() if paths is None or path in paths}
    return {
        path: Factors(
            rng.normal(0, 0.3, (rows, rank)).astype(np.float32), rng.normal(0, 0.3, (rank, columns)).astype(np.float32)
        )
        for path, (rows, columns) in shapes.items()
    }


ADAPTERS = {
    "a": random_adapter(1),
    "b": random_adapter(2, rank=1, paths=("layers.0.mixer.q", "layers.1.ffn.down")),
    "c": random_adapter(3),
}
NAMES = [None, "a", "b", "c"]
EACH = [NAMES[index % 4] for index in range(len(PROMPTS))]


def merged(adapter, params=PARAMS):
    """The params with the products added to their weights."""

    def weight(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        module = ".".join(names[:-1])
        return leaf + adapter[module].a @ adapter[module].b if names[-1] == "w" and module in adapter else leaf

    return jax.tree_util.tree_map_with_path(weight, params)


def serving(max_loras=3, **settings):
    llm = make(enable_lora=True, max_loras=max_loras, max_lora_rank=4, **settings)
    for name, adapter in ADAPTERS.items():
        llm.update_lora(name, adapter)
    return llm


def ask(llm, names=EACH, params=GREEDY, prompts=PROMPTS):
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=names)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def llm():
    return serving(warmup=True)


@pytest.fixture(scope="module")
def by_merging():
    """An engine of its own for each adapter."""
    weights = {None: PARAMS} | {name: merged(adapter) for name, adapter in ADAPTERS.items()}
    return {name: make(params) for name, params in weights.items()}


@pytest.fixture(scope="module")
def expected(by_merging):
    """What the prompts give with the adapters of EACH."""
    return [[run(by_merging[name], [prompt], GREEDY)[0]] for prompt, name in zip(PROMPTS, EACH, strict=True)]


CUTS = {
    "three adapters and none": {},
    "alone": {"max_num_seqs": 1},
    "one slot, for which they wait": {"max_loras": 1},
}


SLOW = {
    "chunked": {"max_num_batched_tokens": 7},
    "preempted": {"num_pages": 20, "max_model_len": 60},
    "cut over two devices": {"tensor_parallel_size": 2},
    "two data shards of two devices, two slots": {"data_parallel_size": 2, "tensor_parallel_size": 2, "max_loras": 2},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "prompts split": {"prefill_context_parallel_size": 2},
    "heads that do not divide": {"tensor_parallel_size": 3, "sharding_rules": ShardingRules(vocab=None)},
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in CUTS.items()),
        *(pytest.param(settings, id=name, marks=pytest.mark.slow) for name, settings in SLOW.items()),
    ],
)
def test_each_request_of_a_mixed_batch_gets_the_tokens_of_merged_weights(expected, settings):
    llm = serving(**settings)
    assert ask(llm) == expected
    stats = llm.engine.stats()
    assert stats.pages_held == 0
    assert (stats.num_preemptions > 0) == ("num_pages" in settings)


def test_an_adapter_changes_what_is_said(llm):
    assert len({tuple(answer) for (answer,) in ask(llm, NAMES, prompts=PROMPTS[:1] * 4)}) == 4


@pytest.mark.slow
def test_drafts_of_a_request_with_an_adapter_come_true(expected):
    known = Known([prompt + answer for prompt, (answer,) in zip(PROMPTS, expected, strict=True)])
    llm = serving(speculative_config={"method": known, "num_speculative_tokens": 6})
    assert ask(llm) == expected
    assert llm.engine.stats().num_accepted_tokens > 50


def test_completions_and_beams_have_their_requests_adapter(llm, by_merging):
    several = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10)
    assert ask(llm, params=several) == [
        ask(by_merging[name], None, several, [p])[0] for p, name in zip(PROMPTS, EACH, strict=True)
    ]
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    found = llm.beam_search(PROMPTS[:4], beams, use_tqdm=False, lora_request=EACH[:4])
    for output, prompt, name in zip(found, PROMPTS, EACH[:4], strict=False):
        (alone,) = by_merging[name].beam_search([prompt], beams, use_tqdm=False)
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in alone.outputs]


def test_scores_and_embeddings_are_the_adapters(llm, by_merging):
    ours, theirs = llm.score(PROMPTS, lora_request="a"), by_merging["a"].score(PROMPTS)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    vectors = llm.embed(PROMPTS, use_tqdm=False, lora_request="a")
    np.testing.assert_allclose(vectors, by_merging["a"].embed(PROMPTS, use_tqdm=False), atol=1e-3)


def test_factors_are_of_the_weights_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), FRESH)
    llm = make(params, enable_lora=True, max_lora_rank=4)
    llm.update_lora("c", ADAPTERS["c"], scale=0.25)
    assert {leaf.dtype for leaf in jax.tree.leaves(llm.engine.runner.adapters)} == {np.dtype(jnp.bfloat16)}
    adapter = {path: Factors(a, b * 0.25) for path, (a, b) in ADAPTERS["c"].items()}
    wanted, (found,) = make(merged(adapter, FRESH)).score(PROMPTS[1]), llm.score(PROMPTS[1], lora_request="c")
    np.testing.assert_allclose(found, wanted[0], atol=0.1)


def test_a_page_serves_requests_with_the_same_numbers_of_the_same_adapter_only():
    llm, prompt = serving(), PROMPTS[3]

    def cached(name):
        (output,) = llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=name)
        return output.num_cached_tokens

    assert [cached(name) for name in NAMES] == [0] * 4
    assert min(cached(name) for name in NAMES) > 0
    llm.update_lora("a", ADAPTERS["c"])
    assert [cached(name) > 0 for name in NAMES] == [True, False, True, True]
    llm.remove_lora("a")
    llm.update_lora("a", ADAPTERS["c"])
    assert cached("a") == 0


def test_nothing_compiles_when_adapters_are_changed_and_mixed(llm, expected):
    before = llm.engine.stats().num_compilations
    with _no_compilation():
        for name in ("d", "e", "a"):
            llm.update_lora(name, ADAPTERS["a"], scale=0.5)
        ask(llm, ["d", "e", "a", None, "b", "c", "d", "e"])
        llm.update_lora("a", ADAPTERS["a"])
        assert ask(llm) == expected
    assert llm.engine.stats().num_compilations == before
    llm.remove_lora("d")
    llm.remove_lora("e")


@pytest.mark.slow
def test_an_engine_compiles_one_function_more_with_adapters_than_without():
    without, with_them = (
        make(enable_lora=enabled, warmup=True, max_num_seqs=2).engine.stats().num_compilations
        for enabled in (False, True)
    )
    assert with_them == without + 1


@pytest.mark.parametrize("policy", ["keep", "recompute", "abort"])
def test_an_update_reaches_requests_under_way(by_merging, policy):
    engine = serving().engine
    for name in NAMES:
        engine.add_request(str(name), PROMPTS[0], GREEDY, lora_request=name)
    for _ in range(10):
        engine.step()
    engine.update_lora("a", ADAPTERS["c"], policy=policy)
    done = {}
    while engine.has_unfinished:
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    for name in (None, "b", "c"):
        assert [done[str(name)].token_ids] == run(by_merging[name], [PROMPTS[0]], GREEDY)
    if policy == "abort":
        assert done["a"].finish_reason == "abort"
        return
    first = done["a"].weight_versions.index(1)
    assert 5 < first < 15
    said = done["a"].token_ids
    assert said[:first] == run(by_merging["a"], [PROMPTS[0]], GREEDY)[0][:first]
    assert said != run(by_merging["a"], [PROMPTS[0]], GREEDY)[0]
    if policy == "recompute":
        rest = SamplingParams(temperature=0, max_tokens=24 - first)
        assert [said[first:]] == run(by_merging["c"], [PROMPTS[0] + said[:first]], rest)


def test_the_adapter_used_longest_ago_gives_up_its_slot():
    llm = serving(max_loras=2)
    for name in ("a", "b", "a", "c"):
        ask(llm, name, prompts=PROMPTS[:1])
    assert {a.request.lora_name: a.slot for a in llm.engine.adapters._known.values()} == {"a": 0, "b": None, "c": 1}


@pytest.mark.slow
def test_a_trained_adapter_is_the_engines(llm):
    tokens = jnp.asarray([PROMPTS[1], PROMPTS[1][::-1]])

    def loss(adapter):
        logits = SPEC.apply(with_adapter(PARAMS, adapter), tokens)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], 2)
        return -chosen.mean()

    adapter = init_adapter(SPEC, 4, jax.random.key(0), ["layers.0.mixer.v", "layers.1.ffn.up"])
    assert loss(adapter) == loss({})
    for _ in range(5):
        adapter = jax.tree.map(lambda x, g: x - 0.2 * g, adapter, jax.grad(loss)(adapter))
    llm.update_lora("trained", adapter)
    scores = llm.score(tokens.tolist(), lora_request="trained")
    assert -np.mean(scores) == pytest.approx(float(loss(adapter)), rel=1e-4)
    assert -np.mean(scores) < loss({}) - 0.1
    llm.remove_lora("trained")


def test_what_cannot_be_an_adapter_is_refused_and_changes_nothing(llm, expected):
    path = "layers.0.mixer.q"
    a, b = ADAPTERS["a"][path]
    for given, told in (
        ({"layers.0.mixer.qq": (a, b)}, "layers.0.mixer.qq is no linear that takes one; did you mean"),
        ({path: (a.T, b)}, r"layers.0.mixer.q has factors \(3, 32\) and \(3, 32\), needs \(32, r\) and \(r, 32\)"),
        ({path: (np.tile(a, 2), np.tile(b, (2, 1)))}, "has rank 6 but max_lora_rank is 4; raise it"),
        ({path: (a * np.nan, b)}, "layers.0.mixer.q holds numbers that are not finite in float32"),
    ):
        with pytest.raises(ConfigError, match=told):
            llm.update_lora("a", given)
    with pytest.raises(ConfigError, match="policy is 'drop'; known: keep, recompute, abort"):
        llm.update_lora("a", ADAPTERS["a"], policy="drop")
    assert ask(llm) == expected


def test_a_request_for_no_known_adapter_is_refused(llm):
    for asked, told in (
        ("aa", "there is no adapter 'aa'; did you mean 'a'"),
        (LoRARequest("new", 9), "there is no adapter 'new' and no lora_path"),
        (LoRARequest("new", 1, "/tmp"), "lora_int_id 1 is 'a' already; choose another"),
        (LoRARequest("a", 1, "/tmp"), r"does not fit the adapter of that name, .*remove_lora\('a'\) first"),
        (LoRARequest("new", 9, "/tmp"), "the model came as arrays, without them; give the adapter as arrays"),
        (["a", "b"], "8 prompts but 2 lora_requests; give one, or one for each"),
    ):
        with pytest.raises(RequestError, match=told):
            ask(llm, asked)
    with pytest.raises(RequestError, match="enable_lora is False; set enable_lora=True"):
        ask(make(), "a")
    with pytest.raises(RequestError, match="lora_int_id is 0; it must be a whole number of at least 1"):
        LoRARequest("a", 0)


def test_what_adapters_do_not_work_with_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="enable_lora does not work with batch_invariant yet"):
        make(enable_lora=True, batch_invariant=True)
    with pytest.raises(ConfigError, match="enable_lora does not work with pipeline_parallel_size 2 yet; leave it out"):
        make(enable_lora=True, pipeline_parallel_size=2)
    config = make().engine.config
    with pytest.raises(ConfigError, match="steps with adapters are not exported yet"):
        exports.write(tmp_path, SPEC, "float32", type(config)(num_pages=9, enable_lora=True), ["cpu"])


# Folders as PEFT writes them

FOLDERS = {
    "llama": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_4h_to_h"),
}


def write_adapter(folder, base, modules, rank=2, scale=1.5, **settings):
    """A folder as PEFT saves it, for every layer's modules; the base's tensors with `scale` times B A added."""
    folder.mkdir(parents=True)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for name in sorted(weights):
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or not module.endswith(modules):
            continue
        out, width = weights[name].shape[::-1] if "c_" in module else weights[name].shape
        rng = np.random.default_rng(len(tensors))
        a, b = rng.normal(0, 0.3, (rank, width)), rng.normal(0, 0.3, (out, rank))
        for which, factor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{which}.weight"] = factor.astype(np.float32)
        delta = scale * b @ a
        weights[name] = (weights[name] + (delta.T if "c_" in module else delta)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "bias": "none", "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return weights


def write_base(folder, case):
    family = family_of(case.config)
    spec = family.spec(case.config)
    return write_checkpoint(folder, case.config, hf_shapes(family.rules(spec, ()), spec))


@pytest.mark.torch
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_tokens_with_a_folders_adapter_are_transformers_own(name, tmp_path):
    case = CASES[name]
    base = write_base(tmp_path / "base", case)
    weights = write_adapter(tmp_path / "adapter", base, FOLDERS[name])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text((base / "config.json").read_text())
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    want = transformers_reference(tmp_path / "merged", case)

    model = load(base)
    adapter = read_adapter(tmp_path / "adapter", model.spec, model.config)
    logits = apply(with_adapter(model.params, adapter), jnp.asarray(case.tokens()), model.spec)
    np.testing.assert_allclose(logits, want["logits"], atol=2e-4, rtol=1e-4)
    if name not in ("llama", "phi3"):  # each is an engine of its own
        return
    llm = LLM(base, enable_lora=True, warmup=False, max_num_seqs=4, num_pages=64, page_size=4)
    mine = LoRARequest("mine", 1, tmp_path / "adapter")
    found = ask(llm, mine, SamplingParams(temperature=0, max_tokens=8), case.prompts())
    assert found == [[want[f"ids_{i}"].tolist()] for i in range(len(case.prompts()))]
    assert llm.list_loras() == [mine]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", CASES["llama"])


def test_the_scale_is_alpha_over_rank_or_its_root_or_a_modules_own(base, tmp_path):
    model, modules = load(base), ("self_attn.q_proj", "mlp.up_proj")
    plain = {"peft_type": "LORA", "lora_alpha": 8}
    for index, (settings, scales) in enumerate(
        (
            (plain, (2.0, 2.0)),
            (plain | {"use_rslora": True}, (4.0, 4.0)),
            (plain | {"alpha_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}}, (0.5, 2.0)),
        )
    ):
        folder = tmp_path / str(index)
        write_adapter(folder, base, modules, rank=4, **settings)
        adapter = read_adapter(folder, model.spec, model.config)
        stored = load_file(folder / "adapter_model.safetensors")
        for module, path, scale in zip(modules, ("mixer.q", "ffn.up"), scales, strict=True):
            b = stored[f"base_model.model.model.layers.0.{module}.lora_B.weight"]
            np.testing.assert_allclose(adapter[f"layers.0.{path}"].b, b.T * scale, rtol=1e-6)


REFUSED = {
    "no config": ("cannot read .*adapter_config.json: No such file.*; name a folder that PEFT", None, {}),
    "another kind": ("peft_type is 'IA3'; only 'LORA' is served", "self_attn.q_proj", {"peft_type": "IA3"}),
    "dora": ("use_dora is True, and DoRA's magnitudes are not served", "self_attn.q_proj", {"use_dora": True}),
    "modules": ("modules_to_save is .'lm_head'.*merge", "self_attn.q_proj", {"modules_to_save": ["lm_head"]}),
    "biases": ("bias is 'all', and trained biases are not served", "self_attn.q_proj", {"bias": "all"}),
    "pissa": (
        "init_lora_weights is 'pissa_niter_4', which",
        "mlp.up_proj",
        {"init_lora_weights": "pissa_niter_4"},
    ),
    "no alpha": ("lora_alpha is None; it must be a finite number", "mlp.up_proj", {"lora_alpha": None}),
    "the head": ("changes lm_head, which takes no adapter here", "lm_head", {}),
}


@pytest.mark.parametrize(("told", "module", "settings"), REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_would_be_served_wrongly_is_refused_in_one_line(base, tmp_path, told, module, settings):
    folder, model = tmp_path / "adapter", load(base)
    if module is None:
        folder.mkdir()
    else:
        write_adapter(folder, base, (module,), **settings)
    with pytest.raises(CheckpointError, match=told) as error:
        read_adapter(folder, model.spec, model.config)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_model_is_refused(base, tmp_path):
    other = write_base(tmp_path / "other", CASES["llama_9_heads_3_kv_head_dim_24"])
    write_adapter(tmp_path / "adapter", other, ("q_proj",))
    model = load(base)
    with pytest.raises(CheckpointError, match=r"do not fit layers.0.mixer.q \[48, 48\]; the adapter"):
        read_adapter(tmp_path / "adapter", model.spec, model.config)


def test_experts_take_no_adapter():
    spec = family_of(CASES["mixtral"].config).spec(CASES["mixtral"].config)
    assert {path.rpartition(".")[0] for path in adaptable(spec)} == {"layers.0.mixer", "layers.1.mixer"}


def test_memory_for_adapters_is_planned():
    settings = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 4, "page_size": 4}
    engine = make(**settings).engine
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.adapters))
    with_them, without = (
        Forecaster(SPEC, "float32", EngineConfig(**settings | {"enable_lora": enabled})).fit(2**24)
        for enabled in (True, False)
    )
    assert (with_them.adapter_bytes, without.adapter_bytes) == (taken, 0)
    assert with_them.pool_bytes + with_them.free_bytes == without.pool_bytes + without.free_bytes - taken


# Over HTTP and from the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that can chat, an adapter for it, and the two merged."""
    root = tmp_path_factory.mktemp("served")
    write_chat_model(root / "model")
    shutil.copytree(root / "model", root / "merged")
    weights = write_adapter(root / "adapter", root / "model", ("q_proj", "v_proj", "up_proj"))
    save_file(weights, root / "merged" / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def server(folders):
    modules = [LoRARequest("tuned", 1, folders / "adapter")]
    settings = {"enable_lora": True, "max_loras": 2, "lora_modules": modules}
    with running(folders / "model", settings=settings, enable_admin=True) as server:
        yield server


ASKED = {"max_tokens": 12, "temperature": 0}


def test_model_in_a_request_chooses_the_adapter(server, folders):
    with running(folders / "merged") as merged:
        for path, asked in (
            ("/v1/completions", {"prompt": "ban", **ASKED}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ban"}], **ASKED}),
            ("/v1/responses", {"input": "ban", "max_output_tokens": 12, "temperature": 0}),
            ("/v1/embeddings", {"input": "ban"}),
        ):
            tuned, base, wanted = (
                s.post(path, model=model, **asked).json()
                for s, model in ((server, "tuned"), (server, "tiny"), (merged, "tiny"))
            )
            assert tuned["model"] == "tuned"
            said, other, want = (_said(reply) for reply in (tuned, base, wanted))
            assert said == pytest.approx(want, abs=1e-4) if path.endswith("embeddings") else said == want
            assert said != other


def _said(reply):
    if "output" in reply:
        return reply["output"][0]["content"][0]["text"]
    return reply["data"][0]["embedding"] if "data" in reply else _text(reply["choices"][0])


def _text(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_adapters_are_models_with_a_parent_and_come_and_go(server, folders):
    def names():
        return {m["id"]: m.get("parent") for m in server.http.get("/v1/models").json()["data"]}

    assert names() == {"tiny": None, "tiny-too": None, "tuned": "tiny"}
    assert server.http.get("/v1/models/tuned").json()["root"] == str(folders / "adapter")
    more = {"lora_name": "more", "lora_path": str(folders / "adapter")}
    assert server.post("/v1/load_lora_adapter", **more).status_code == 200
    assert server.post("/v1/load_lora_adapter", **more | {"lora_name": "tiny"}).status_code == 400
    assert names()["more"] == "tiny"
    tuned, again = (server.post("/v1/completions", model=m, prompt="ban", **ASKED).json() for m in ("tuned", "more"))
    assert _said(tuned) == _said(again)
    assert server.post("/v1/unload_lora_adapter", lora_name="more").status_code == 200
    assert "more" not in names()
    gone = server.post("/v1/completions", model="more", prompt="ban")
    assert gone.status_code == 404 and "known: tiny, tiny-too, tuned" in gone.json()["error"]["message"]
    assert server.post("/v1/unload_lora_adapter", lora_name="more").status_code == 400
    missing = server.post("/v1/load_lora_adapter", lora_name="none", lora_path="/nowhere/at/all")
    assert missing.status_code == 400 and "does not exist" in missing.json()["error"]["message"]


def test_generate_answers_with_an_adapters_folder(folders, capsys):
    def said(model, *flags):
        asked = [str(folders / model), "ban", "--temperature", "0", "--max-tokens", "12"]
        assert main(["generate", *asked, "--num-pages", "64", "--max-model-len", "128", "--no-warmup", *flags]) == 0
        return capsys.readouterr().out

    tuned = said("model", "--lora-path", str(folders / "adapter"))
    assert tuned == said("merged")
    assert tuned != said("model")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lora-modules", "a=/nowhere"], "--lora-modules names a but --enable-lora is not given; give it"),
        (["--enable-lora", "--lora-modules", "a=/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--enable-lora", "--lora-modules", "a=/tmp", "a=/tmp"], "--lora-modules names a more than once"),
        (["--enable-lora", "--lora-modules", "a"], "'a' names no adapter; write NAME=PATH"),
    ],
)
def test_flags_that_name_no_adapter_are_refused_before_the_model_is_loaded(flags, told, capsys):
    try:
        status = main(["serve", "no-model", *flags])
    except SystemExit as ended:
        status = ended.code
    assert status != 0
    assert told in capsys.readouterr().err
