"""ICC profiles for tests, written as the specification (ICC.1:2001, version 2) lays them out."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.3127, 0.3290)
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz_of(point):
    x, y = point
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries):
    """(3, 3): linear RGB to XYZ under D65."""
    columns = np.stack([xyz_of(point) for point in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz_of(D65))


def adapted(matrix):
    """The same under D50, by Bradford."""
    scale = (BRADFORD @ D50) / (BRADFORD @ xyz_of(D65))
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ matrix


def srgb_to_linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values):
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def rgb_profile(primaries, gamma=None):
    """A matrix profile under D65 with one gamma, or sRGB's curve for None."""
    curve = _gamma(gamma) if gamma else _table(srgb_to_linear(np.linspace(0, 1, 1024)))
    tags = {b"wtpt": _xyz(D50)}
    for letter, column in zip(b"rgb", adapted(to_xyz(primaries)).T, strict=True):
        tags[bytes([letter]) + b"XYZ"] = _xyz(column)
        tags[bytes([letter]) + b"TRC"] = curve
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma):
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _gamma(gamma)})


def cmyk_profile():
    """Inks that darken Lab linearly: a table (lut8Type) of the 16 corners."""
    corners = np.array([[(place >> shift) & 1 for shift in (3, 2, 1, 0)] for place in range(16)])
    cyan, magenta, yellow, black = corners.T
    lightness = 255 * (1 - 0.3 * cyan - 0.3 * magenta - 0.1 * yellow) * (1 - 0.9 * black)
    a, b = 128 + 60 * (magenta - cyan) * (1 - black), 128 + 60 * (yellow - cyan) * (1 - black)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(int(65536 * value) for value in np.eye(3).flatten()))
    table = np.stack([lightness, a, b], axis=1).clip(0, 255).astype(np.uint8).tobytes()
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": lut})


def _xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * float(value)) for value in values))


def _gamma(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def _table(values):
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + (values * 65535).round().astype(">u2").tobytes()


def _profile(kind, space, connection, tags):
    name = b"test\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"desc": described, b"cprt": b"text" + bytes(4) + b"none\0", **tags}
    body, entries, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        entries += tag + struct.pack(">2I", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    body = struct.pack(">I", len(tags)) + entries + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), bytes(4), 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:] + bytes(48)
    assert len(header) == 128
    return header + body
