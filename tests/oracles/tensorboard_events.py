"""What a TensorBoard event file holds: tensorboard_events.py FILE

Prints one line an item, split at tabs: the version, a session's begin with its step, each value with step, tag and value.
Written from the description of TFRecord and of event.proto and summary.proto alone; needs nothing but Python. Checks both
masked CRC-32C of every record, bit by bit from the polynomial.
"""
import struct
import sys


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data, at):
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data):
    """(number, value) of a protobuf message: int, 8 bytes, 4 bytes or bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(data, at)
        elif kind == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            length = {1: 8, 5: 4}[kind]
            value, at = data[at : at + length], at + length
        yield number, value


with open(sys.argv[1], "rb") as file:
    data = file.read()
at = 0
while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    (crc,) = struct.unpack_from("<I", data, at + 8)
    assert crc == masked(data[at : at + 8]), f"checksum of the length at {at}"
    body = data[at + 12 : at + 12 + length]
    (crc,) = struct.unpack_from("<I", data, at + 12 + length)
    assert crc == masked(body), f"checksum of the record at {at}"
    at += 16 + length
    event = dict(fields(body))
    (wall_time,) = struct.unpack("<d", event[1])
    assert wall_time > 1.7e9, f"a time before 2023: {wall_time}"
    step = event.get(2, 0)
    if 3 in event:
        print("version", event[3].decode(), sep="\t")
    if 7 in event:
        assert dict(fields(event[7]))[1] == 1, "not SessionLog.START"
        print("start", step, sep="\t")
    for number, value in fields(event.get(5, b"")):
        assert number == 1, f"field {number} of a summary"
        scalar = dict(fields(value))
        print("value", step, scalar[1].decode(), repr(struct.unpack("<f", scalar[2])[0]), sep="\t")
