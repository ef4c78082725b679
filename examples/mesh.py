"""One model over several devices: `python examples/mesh.py [MODEL]`; without GPUs, eight parts of this CPU play them.

The mesh is your program's own. The sharding rules say which axis cuts heads, ffn and vocabulary, and along which
sequences and pages are split.
"""

from __future__ import annotations

import jax
import numpy as np
from any_model import open_llm
from jax.sharding import Mesh

from jaxpaged import SamplingParams, ShardingRules


def main() -> None:
    """Half of the devices cut the model, twice, each half for other requests."""
    if jax.config.values["jax_num_cpu_devices"] < 2:
        jax.config.update("jax_num_cpu_devices", 8)
    devices = np.asarray(jax.devices())
    num_cuts = max(1, len(devices) // 2)
    mesh = Mesh(devices[: 2 * num_cuts].reshape(-1, num_cuts), ("split", "cut"))

    rules = ShardingRules.on("cut", data="split")
    llm = open_llm(mesh=mesh, sharding_rules=rules, max_model_len=256, max_num_seqs=4, warmup=False)
    outputs = llm.generate(["Once upon a time", "The sea is"], SamplingParams(temperature=0, max_tokens=16))
    for output in outputs:
        print(repr(output.prompt), "->", repr(output.outputs[0].text))

    weights, pools = jax.tree.leaves(llm.engine.params), jax.tree.leaves(llm.engine.runner.cache)
    for name, arrays in (("weights", weights), ("page pool", pools)):
        here = sum(a.addressable_shards[0].data.nbytes for a in arrays)
        print(f"{name}: {here:,} of {sum(a.nbytes for a in arrays):,} bytes on each of {mesh.size} devices")


if __name__ == "__main__":
    main()
