"""One of two processes that restore and save together: python orbax_process.py ADDRESS NUM ID FOLDER.

Restores FOLDER/one over both, says what it read and whether its part is right, and saves what both hold to FOLDER/both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

address, num, process, folder = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)

import numpy as np  # noqa: E402
import tensorstore  # noqa: E402

from jaxpaged import distributed  # noqa: E402
from jaxpaged.integrations import orbax  # noqa: E402
from jaxpaged.model.params import dummy_params, flatten  # noqa: E402
from jaxpaged.model.sharding import parallel  # noqa: E402

distributed.start(address, int(num), int(process))
placement = parallel(int(num))
spec, params = orbax.load(Path(folder, "one"), placement=placement)
(read,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
given = dummy_params(spec, seed=1)
right = all(
    np.array_equal(shard.data, np.asarray(want)[shard.index])
    for (path, leaf), (_, want) in zip(flatten(params), flatten(given), strict=True)
    if leaf.shape == want.shape
    for shard in leaf.addressable_shards
)
own = jax.tree.map(lambda w: jax.device_put(w, orbax._spread(w.shape, placement.mesh, ["model"])), given)
orbax.save(Path(folder, "both"), spec, own)
print(json.dumps({"read": read["values"][0]["value"], "right": right}), flush=True)
