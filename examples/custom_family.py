"""Serve an architecture that jaxpaged has never heard of: a spec, a table of names, one line to register.

`python examples/custom_family.py [FOLDER]`. Without a folder a checkpoint of the made-up family is written first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxpaged import LLM, SamplingParams
from jaxpaged.convert.families import FAMILIES, Family
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for, store_tensors
from jaxpaged.model.params import dummy_params, flatten
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

QKV = ("mixer.q", "mixer.k", "mixer.v")
LAYER: Table = {"norm1": "norm", QKV: "attn.qkv", "mixer.o": "attn.out", "ffn.up": "wide", "ffn.down": "narrow"}
TABLE: Table = {"embed": "tokens", "norm": "last_norm", **each_layer("stack.{i}.", LAYER)}
CONFIG = {"model_type": "tandem", "width": 64, "layers": 3, "heads": 4, "vocabulary": 300, "window": 32}


def spec(config: Mapping[str, Any]) -> Decoder:
    """Attention and MLP side by side, heads that see a short window, fused q, k and v."""
    width, heads = config["width"], config["heads"]
    dim, norm = width // heads, Norm("layer", 1e-5)
    mixer = Attention(heads, heads, dim, scale=dim**-0.5, rope=Rope(10_000.0, dim), window=config["window"])
    block = Block(mixer, Mlp(4 * width, act="relu", gated=False), norm, residual="parallel_one_norm")
    return Decoder(config["vocabulary"], width, 512, (block,) * config["layers"], norm, width, tied_head=True)


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """Which tensor holds which of our leaves; used to load and, here, to write."""
    return rules_for(spec, TABLE)


def main() -> None:
    """Register, write a checkpoint, load it, generate."""
    FAMILIES["tandem"] = Family(spec, rules)
    with tempfile.TemporaryDirectory() as folder:
        leaves = dict(flatten(dummy_params(spec(CONFIG))))
        tensors = dict(store_tensors(rules(spec(CONFIG), ()), lambda path: np.array(leaves[path])))
        save_file({name: tensor.copy("C") for name, tensor in tensors.items()}, Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(sys.argv[1] if len(sys.argv) > 1 else folder, max_num_seqs=2)
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
        print(f"{output.prompt_token_ids} -> {output.outputs[0].token_ids}")


if __name__ == "__main__":
    main()
