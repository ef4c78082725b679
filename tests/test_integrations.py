"""Weights to and from flax nnx, linen, equinox and Orbax: trained there for a step, then served here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.convert.families import FAMILIES
from jaxpaged.convert.rules import store_tensors
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.integrations import trees
from jaxpaged.model.params import dummy_params, flatten
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 2, _NORM, 16, tied_head=False)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 12)), jnp.int32)


def weights(seed=1):
    return jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=seed))


def loss(params, tokens=TOKENS):
    logprobs = jax.nn.log_softmax(SPEC.apply(params, tokens[:, :-1]))
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], 2).mean()


def nested(named, split="."):
    tree = {}
    for name, leaf in named:
        *above, last = name.split(split)
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def hf_tree(params, family="llama"):
    ours = dict(flatten(params))
    return nested(store_tensors(FAMILIES[family].rules(SPEC, ()), ours.__getitem__))


def flax_tree(params):
    """In linen's dialect: layers_0, kernels [in, out], embedding, scale."""

    def dialect(name, leaf):
        name = name.replace("layers.", "layers_").removesuffix(".weight")
        if "embed" in name:
            return f"{name}.embedding", leaf
        return (f"{name}.scale", leaf) if leaf.ndim == 1 else (f"{name}.kernel", leaf.T)

    ours = dict(flatten(params))
    return nested(dialect(*each) for each in store_tensors(FAMILIES["llama"].rules(SPEC, ()), ours.__getitem__))


def serve(params):
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "num_pages": 17, "page_size": 4}
    return LLM((SPEC, params), warmup=False, **settings)


def answer(llm):
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return output.outputs[0].token_ids


def greedy(params):
    tokens = list(PROMPT)
    apply = jax.jit(SPEC.apply)
    for length in range(len(PROMPT), len(PROMPT) + 8):
        padded = jnp.asarray(tokens + [0] * (16 - length), jnp.int32)
        tokens.append(int(apply(params, padded)[length - 1].argmax()))
    return tokens[len(PROMPT) :]


def same(a, b):
    return all(
        x.unsafe_buffer_pointer() == y.unsafe_buffer_pointer()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tree", [hf_tree, flax_tree, lambda p: {"params": flax_tree(p)}])
def test_a_familys_names_give_our_params_and_come_back(tree):
    params = weights()
    theirs = tree(params)
    equal(trees.to_params(theirs, SPEC, "llama"), params)
    pattern = jax.tree.map(jnp.zeros_like, theirs)
    equal(trees.to_tree(params, SPEC, pattern, "llama"), theirs)


def test_fused_tensors_go_both_ways_without_leaving_the_device():
    params = weights()
    pattern = hf_tree(params, "phi3")
    there = jax.jit(lambda params: trees.to_tree(params, SPEC, pattern, "phi3"))
    back = jax.jit(lambda tree: trees.to_params(tree, SPEC, "phi3"))
    equal(back(there(params)), params)


def test_our_own_names_hand_over_the_arrays_themselves():
    params = weights()
    assert same(trees.to_params({"params": params}, SPEC), params)
    equal(trees.to_tree(params, SPEC, {"params": weights(2)}), {"params": params})


def test_what_does_not_fit_is_listed():
    tree = hf_tree(weights())
    tree["lm_head"] = {"weight": jnp.zeros((40, 15)), "extra": jnp.zeros(3)}
    del tree["model"]["norm"]
    with pytest.raises(ConfigError) as error:
        trees.to_params(tree, SPEC, "llama")
    for part in ("missing model.norm.weight (16,)", "unexpected lm_head.extra (3,)", "(40, 15), needs (40, 16)"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="name the family if they are Hugging Face's"):
        trees.to_params(hf_tree(weights()), SPEC)
    with pytest.raises(ConfigError, match="family is 'lama'; known: deepseek_v2"):
        trees.to_params(tree, SPEC, "lama")
    with pytest.raises(ConfigError, match=r"no place for lm_head\.weight"):
        trees.to_tree(weights(), SPEC, {"model": hf_tree(weights())["model"]}, "llama")


@pytest.mark.slow
def test_an_nnx_module_is_trained_and_its_arrays_are_served():
    nnx = pytest.importorskip("flax.nnx")
    from jaxpaged.integrations.nnx import Model

    params = weights()
    llm = serve(params)
    before = answer(llm)
    assert before == greedy(params)
    model = Model(SPEC, params)
    assert same(model.to_params(), params)
    optimizer = nnx.Optimizer(model, optax.sgd(3.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: loss(m.to_params()))(model))

    step(model, optimizer)
    llm.engine.update_params(model.to_params())
    assert same(llm.engine.params, model.to_params())
    assert answer(llm) == greedy(model.to_params())
    assert answer(llm) != before


@pytest.mark.slow
def test_an_nnx_model_with_layers_of_its_own_is_served():
    nnx = pytest.importorskip("flax.nnx")

    class Group(nnx.Module):
        pass

    def module(node):
        """Real nnx layers under Hugging Face's names."""
        match node:
            case {"kernel": kernel}:
                layer = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
                layer.kernel[...] = kernel
            case {"embedding": table}:
                layer = nnx.Embed(*table.shape, rngs=nnx.Rngs(0))
                layer.embedding[...] = table
            case {"scale": scale}:
                layer = nnx.RMSNorm(*scale.shape, rngs=nnx.Rngs(0))
                layer.scale[...] = scale
            case _:
                layer = Group()
                for name, child in node.items():
                    setattr(layer, name, module(child))
        return layer

    params = weights()
    theirs = module(flax_tree(params))
    equal(trees.to_params(nnx.state(theirs, nnx.Param), SPEC, "llama"), params)
    nnx.update(theirs, trees.to_tree(weights(2), SPEC, nnx.state(theirs, nnx.Param), "llama"))
    equal(trees.to_params(theirs, SPEC, "llama"), weights(2))


@pytest.mark.slow
def test_linen_variables_are_trained_and_served():
    nn = pytest.importorskip("flax.linen")

    class Served(nn.Module):
        """Linen's own layers, whose variables bear Hugging Face's names in its dialect."""

        def setup(self):
            self.lm_head = nn.Dense(40, use_bias=False)

        def __call__(self, hidden):
            return self.lm_head(hidden)

    params = weights()
    head = Served().init(jax.random.key(0), jnp.zeros((1, 16)))["params"]["lm_head"]
    variables = {"params": flax_tree(params) | {"lm_head": head}}
    llm = serve(trees.to_params(variables, SPEC, "llama"))
    before = answer(llm)

    def linen_loss(variables):
        return loss(trees.to_params(variables, SPEC, "llama"))

    gradients = jax.jit(jax.grad(linen_loss))(variables)
    variables = jax.tree.map(lambda w, g: w - 3 * g, variables, gradients)
    llm.engine.update_params(trees.to_params(variables, SPEC, "llama"))
    assert answer(llm) == greedy(trees.to_params(variables, SPEC, "llama"))
    assert answer(llm) != before


@pytest.mark.slow
def test_an_equinox_module_is_trained_and_served():
    eqx = pytest.importorskip("equinox")

    class Group(eqx.Module):
        children: dict

    class Norm(eqx.Module):
        weight: jax.Array

    def module(node):
        if node.keys() != {"weight"}:
            return {name: module(child) for name, child in node.items()}
        weight = node["weight"]
        if weight.ndim == 1:
            return Norm(weight)
        linear = eqx.nn.Linear(weight.shape[1], weight.shape[0], use_bias=False, key=jax.random.key(0))
        return eqx.tree_at(lambda layer: layer.weight, linear, weight)

    class Served(eqx.Module):
        model: dict
        lm_head: eqx.nn.Linear

        def to_params(self):
            return trees.to_params(self, SPEC, "llama")

    theirs = Served(**module(hf_tree(weights())))
    llm = serve(theirs.to_params())
    before = answer(llm)
    gradients = eqx.filter_jit(eqx.filter_grad(lambda m: loss(m.to_params())))(theirs)
    theirs = eqx.apply_updates(theirs, jax.tree.map(lambda g: -3 * g, gradients))
    llm.engine.update_params(theirs.to_params())
    assert answer(llm) == greedy(theirs.to_params())
    assert answer(llm) != before


@pytest.mark.slow
def test_orbax_keeps_a_model_and_reads_what_others_kept(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    from jaxpaged.integrations import orbax

    params = weights()
    orbax.save(tmp_path / "ours", SPEC, params)
    spec, loaded = orbax.load(tmp_path / "ours")
    assert spec == SPEC
    equal(loaded, params)
    with pytest.raises(CheckpointError, match="exists; choose another place"):
        orbax.save(tmp_path / "ours", SPEC, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", {"model": flax_tree(weights(2)), "step": 7})
    equal(orbax.load_tree(tmp_path / "theirs", SPEC, "llama", inside="model"), weights(2))
    with pytest.raises(CheckpointError, match="holds model, step, and no params; name one of them"):
        orbax.load_tree(tmp_path / "theirs", SPEC, "llama", inside="params")
    llm = serve(params)
    llm.engine.update_params(orbax.load_tree(tmp_path / "theirs", SPEC, "llama", inside="model"))
    assert answer(llm) == greedy(weights(2))
