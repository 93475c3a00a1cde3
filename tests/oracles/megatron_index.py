"""Reads and writes Megatron's .bin/.idx with numpy and struct alone, after the layout of
megatron/core/datasets/indexed_dataset.py (_IndexWriter, _IndexReader, IndexedDatasetBuilder).

    megatron_index.py read PREFIX               dtype, sequences, documents; then a line of tokens for each document
    megatron_index.py write PREFIX DTYPE SPEC   SPEC is a JSON file: documents as lists of sequences as lists of tokens
"""

import json
import struct
import sys

import numpy as np

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


def read(prefix):
    with open(prefix + ".idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        (version,) = struct.unpack("<Q", file.read(8))
        assert version == 1, version
        (code,) = struct.unpack("<B", file.read(1))
        (n_sequences,) = struct.unpack("<Q", file.read(8))
        (n_indices,) = struct.unpack("<Q", file.read(8))
        offset = file.tell()
    index = np.memmap(prefix + ".idx", mode="r", order="C")
    lengths = np.frombuffer(index, dtype=np.int32, count=n_sequences, offset=offset)
    pointers = np.frombuffer(index, dtype=np.int64, count=n_sequences, offset=offset + lengths.nbytes)
    indices = np.frombuffer(index, dtype=np.int64, count=n_indices, offset=offset + lengths.nbytes + pointers.nbytes)
    assert offset + lengths.nbytes + pointers.nbytes + indices.nbytes == index.size
    assert lengths.shape[0] == n_sequences == indices[-1]
    tokens = np.memmap(prefix + ".bin", mode="r", order="C")
    dtype = DTYPES[code]
    print(np.dtype(dtype).name, n_sequences, n_indices - 1, sep="\t")
    for first, end in zip(indices[:-1], indices[1:]):
        document = []
        for sequence in range(first, end):
            document.extend(np.frombuffer(tokens, dtype=dtype, count=lengths[sequence], offset=pointers[sequence]).tolist())
        print(*document, sep="\t")


def write(prefix, dtype, spec):
    dtype = np.dtype(dtype).type
    code = next(code for code, known in DTYPES.items() if known == dtype)
    lengths, indices = [], [0]
    with open(spec) as file:
        documents = json.load(file)
    with open(prefix + ".bin", "wb") as file:
        for document in documents:
            for sequence in document:
                array = np.array(sequence, dtype=dtype)
                file.write(array.tobytes(order="C"))
                lengths.append(array.size)
            indices.append(len(lengths))
    pointers, at = [], 0
    for length in lengths:
        pointers.append(at)
        at += length * dtype().itemsize
    with open(prefix + ".idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(lengths)))
        file.write(struct.pack("<Q", len(indices)))
        file.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        file.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
        file.write(np.array(indices, dtype=np.int64).tobytes(order="C"))


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
