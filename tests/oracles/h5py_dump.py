"""What h5py sees in the index of a checkpoint: h5py_dump.py INDEX.h5 OUT_DIR

Prints one line a dataset (name, shape, numpy type, whether virtual) and the root attributes, and writes the values of the
n-th dataset as little-endian float32 to OUT_DIR/n.bin. Needs h5py and numpy; shares no code with the library.
"""
import sys

import h5py
import numpy as np

index, out = sys.argv[1], sys.argv[2]
with h5py.File(index, "r") as file:
    for name, value in file.attrs.items():
        print("attribute", name, value.decode() if isinstance(value, bytes) else value, sep="\t")
    names = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for n, name in enumerate(names):
        dataset = file[name]
        np.asarray(dataset[...], dtype="<f4").tofile(f"{out}/{n}.bin")
        shape = ",".join(str(extent) for extent in dataset.shape)
        print("dataset", name, shape, dataset.dtype, dataset.id.get_type().get_size(), dataset.is_virtual, sep="\t")
