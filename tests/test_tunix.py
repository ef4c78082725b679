"""google-tunix's own GRPO learner, its rollouts made by an engine that holds the trainer's arrays."""

# ruff: noqa: E402  # nothing more is imported where Tunix is absent

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of Tunix and what it brings
]
pytest.importorskip("tunix", reason="needs google-tunix, which brings 1.6 GB: `make test-tunix` installs and runs it")

from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.integrations.tunix import Policy, Rollout
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e3, 8)), Mlp(32, "silu"), _NORM)
SPEC = Decoder(12, 32, 32, (_BLOCK,) * 2, _NORM, 32, tied_head=False)
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(autouse=True)
def tunix_promotes():
    """In threads of its own, too."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class Letters:
    """A token for each of nine letters."""

    def encode(self, text):
        return [3 + "abcdefghi".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcdefghi"[i - 3] if i > 2 else "." for i in ids)

    def bos_id(self):
        return BOS

    def eos_id(self):
        return EOS

    def pad_id(self):
        return PAD


def config(**changes):
    settings = {"max_tokens_to_generate": 6, "max_prompt_length": 8, "temperature": 1.0, "return_logprobs": True}
    return RolloutConfig(**(settings | changes))


def rollout(policy, **changes):
    return Rollout(rollout_actor=policy, tokenizer=Letters(), rollout_config=config(**changes))


def policy(seed=0):
    return Policy(SPEC, dummy_params(SPEC, seed))


def pointers(params):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


def test_logprobs_of_the_sampler_of_scoring_and_of_tunix_are_the_same():
    from tunix.rl import common

    actor = policy()
    worker = rollout(actor)
    assert pointers(worker.llm.engine.params) == pointers(actor.to_params())
    out = worker.generate(["abc", "a", "fedcba", "a"], config(seed=jax.random.key(3)))
    again = worker.generate(["abc", "a", "fedcba", "a"], config(seed=jax.random.key(3)))
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in again.tokens]
    assert out.tokens[1].tolist() != out.tokens[3].tolist()
    assert out.left_padded_prompt_tokens[0].tolist() == [PAD] * 4 + [BOS, 3, 4, 5]
    answers = jnp.asarray([[*t.tolist(), *[PAD] * (6 - len(t))] for t in out.tokens], jnp.int32)
    prompts = jnp.asarray(out.left_padded_prompt_tokens)
    ours = worker.get_per_token_logps(prompts, answers)
    from flax import nnx

    theirs = common.compute_per_token_logps(*nnx.split(actor), prompts, answers, PAD, EOS)
    for row, (tokens, logprobs) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
        inside = [i for i, t in enumerate(tokens) if t != PAD]  # Tunix masks what is drawn as padding
        if len(inside) == len(tokens):
            np.testing.assert_allclose(ours[row, : len(tokens)], logprobs, atol=1e-5)
            np.testing.assert_allclose(theirs[row, : len(tokens)], logprobs, atol=1e-5)
    assert float(jnp.abs(ours[:, -1] * (answers[:, -1] == PAD)).max()) == 0


def test_what_does_not_fit_says_so():
    from flax import nnx

    with pytest.raises(ConfigError, match="the actor is a Linear; give Rollout its spec and family"):
        rollout(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(RequestError, match="a prompt has 10 tokens but max_prompt_length is 8; raise it"):
        rollout(policy()).generate(["abcabcabc"], config())


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_grpo_learner_trains_and_the_engine_answers_with_its_arrays(tmp_path, num_iterations):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    seen = []

    def reward(prompts, completions, **_):
        """How much of the answer is the letter e."""
        assert len(prompts) == len(completions)
        each = [text.count("e") / 6 for text in completions]
        seen.append(float(np.mean(each)))
        return each

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=policy(),
        reference=policy(),
        tokenizer=Letters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=Rollout,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(2e-2), eval_every_n_steps=1000, max_steps=12 * num_iterations
            ),
            rollout_config=config(),
        ),
    )
    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(num_generations=8, num_iterations=num_iterations, beta=0.01),
        reward_fns=reward,
    )
    rng = np.random.default_rng(0)
    batches = [
        {"prompts": np.asarray(["".join(rng.choice(list("abcdefghi"), 3)) for _ in range(4)])} for _ in range(12)
    ]
    before = jax.tree.map(np.asarray, cluster.rollout.llm.engine.params)
    learner.train(batches)
    cluster.rollout.generate(["abc"], config())
    engine = cluster.rollout.llm.engine
    assert engine.runner.param_version >= 12
    assert pointers(engine.params) == pointers(cluster.actor_trainer.model.to_params())
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, engine.params)), strict=True)]
    assert min(moved) > 1e-4
    assert np.mean(seen[-3:]) > 1.5 * np.mean(seen[:3]), seen
