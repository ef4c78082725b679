"""One of two processes that restore and save together: python orbax_process.py ADDRESS NUM ID FOLDER.

Restores FOLDER/one over both, cut and in stages, says what it read and whether its part is right, and saves what both
hold to FOLDER/both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

address, num, process, folder = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)

import numpy as np  # noqa: E402
import tensorstore  # noqa: E402

from jaxpaged import distributed  # noqa: E402
from jaxpaged.integrations import orbax  # noqa: E402
from jaxpaged.model.head_layout import fit_leaf  # noqa: E402
from jaxpaged.model.params import dummy_params, flatten, map_specs  # noqa: E402
from jaxpaged.model.sharding import parallel  # noqa: E402


def bytes_read() -> int:
    """From files, by tensorstore, which reads for Orbax."""
    (found,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read") or (None,)
    return 0 if found is None else int(found["values"][0]["value"])


distributed.start(address, int(num), int(process))
mesh = parallel(int(num)).mesh
told: dict[str, Any] = {"read": [], "right": []}
for placement in (parallel(int(num)), parallel(layers=int(num))):
    before = bytes_read()
    spec, params = orbax.load(Path(folder, "one"), placement=placement)
    told["read"].append(bytes_read() - before)
    given = dict(flatten(dummy_params(spec, seed=1)))
    pairs = [
        (shard.data, fit_leaf(np.asarray(given[path]), path, spec, placement.num_shards("attention"))[shard.index])
        for path, leaf in flatten(params)
        for shard in leaf.addressable_shards
    ]
    told["right"].append(len(pairs) > 0 and all(np.array_equal(found, want) for found, want in pairs))
own = map_specs(lambda path, _: jax.device_put(given[path], orbax._spread(given[path].shape, mesh, ["model"])), spec)
orbax.save(Path(folder, "both"), spec, own)
print(json.dumps(told), flush=True)
