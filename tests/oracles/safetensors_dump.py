"""What the reference safetensors package sees in a directory: safetensors_dump.py HF_DIR OUT_DIR

Prints one line a tensor (name, shape, type) and writes the values of the n-th as little-endian float32 to OUT_DIR/n.bin.
Needs safetensors and numpy (bf16 is widened by hand, numpy has none); shares no code with the library.
"""
import glob
import json
import os
import sys

import numpy as np
from safetensors import deserialize

source, out = sys.argv[1], sys.argv[2]
index = os.path.join(source, "model.safetensors.index.json")
where = json.load(open(index))["weight_map"] if os.path.exists(index) else None
n = 0
for path in sorted(glob.glob(os.path.join(source, "*.safetensors"))):
    for name, info in deserialize(open(path, "rb").read()):
        assert where is None or where[name] == os.path.basename(path), name
        raw, dtype = bytes(info["data"]), info["dtype"]
        if dtype == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4")
        values.tofile(f"{out}/{n}.bin")
        print("tensor", name, ",".join(map(str, info["shape"])), dtype, sep="\t")
        n += 1
