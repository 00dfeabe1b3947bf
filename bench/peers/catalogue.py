"""The peers: what to install, and a few settings of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bitbook

Setting = Mapping[str, Any]


class Peer(NamedTuple):
    """One tool."""

    name: str
    program: str
    """`by_<program>.py` here, which runs in the environment of that name."""
    version: str
    requirements: Sequence[str]
    settings: Mapping[str, Sequence[Setting]]
    """By network."""


# What the programs share; where torch's folder has them, nothing is installed.
_SHARED = ("safetensors==0.8.0", "packaging")


OWN = "bitbook"
"""The program that runs in the interpreter of the bench."""


def own_version() -> str:
    """bitbook's, and a hash of its source but for studies and commands: with another source it is measured again."""
    source = Path(bitbook.__file__).parent
    others = (source / "study", source / "cli")
    text = b"".join(p.read_bytes() for p in sorted(source.rglob("*.py")) if not set(others) & set(p.parents))
    return f"{bitbook.__version__}+{hashlib.sha256(text).hexdigest()[:8]}"


def _grid(
    resnet20: Sequence[Setting],
    resnet44: Sequence[Setting],
    stories: Sequence[Setting],
    resnet8: Sequence[Setting] | None = None,
) -> dict[str, Sequence[Setting]]:
    """By network; a ResNet-8 gets what a ResNet-20 does, if nothing else."""
    return {
        "ResNet-20": resnet20,
        "ResNet-44": resnet44,
        "ResNet-8": resnet20 if resnet8 is None else resnet8,
        "stories260K": stories,
    }


def _everywhere(*settings: Setting, large: Sequence[int]) -> dict[str, Sequence[Setting]]:
    """The same settings for all networks, but on ResNet-44 only those of these positions."""
    return _grid(settings, [settings[i] for i in large], settings)


def _bits(*bits: int, **more: Any) -> list[Setting]:
    return [{"bits": b, **more} for b in bits]


_PALETTES = _everywhere(
    {"bits": 6},
    {"bits": 4, "ends": 8},
    {"bits": 4, "group": 16},
    {"bits": 4, "table": 8},
    {"bits": 8, "dim": 2, "table": 8, "ends": 8},  # 256 pairs are more than some first layers have
    {"bits": 6, "dim": 2},
    large=(0, 1, 4),
)

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "bitbook",
            OWN,
            own_version(),
            (),
            _grid(
                [{"step": step} for step in (0.6, 0.4, 0.3, 0.2)],
                [{"step": step} for step in (0.3, 0.5)],
                [{"step": step} for step in (0.05, 0.08, 0.11, 0.15, 0.2)],
                [{"step": step} for step in (0.15, 0.25, 0.35, 0.5)],
            ),
        ),
        Peer(
            "bitbook, calibrated",
            OWN,
            own_version(),
            (),
            _grid(
                [{"step": step, "examples": 500, "trellis": True} for step in (0.9, 0.7, 0.5)],
                [{"step": step, "examples": 500, "trellis": True} for step in (0.7, 1.0)],
                [{"step": step, "examples": 100, "trellis": True} for step in (0.05, 0.08, 0.11, 0.15, 0.2)],
                [{"step": step, "examples": 500, "trellis": True} for step in (0.2, 0.3, 0.45, 0.65)],
            ),
        ),
        Peer(
            "torchao",
            "torchao",
            "0.18.0",
            ("torchao==0.18.0", *_SHARED),
            _grid(
                [{"kind": "int8", "bits": 8}],
                [{"kind": "int8", "bits": 8}],
                [
                    {"kind": "int8", "bits": 8},
                    {"kind": "int4", "bits": 4, "group": 32},
                    {"kind": "int4", "bits": 4, "group": 64},
                    {"kind": "intx", "bits": 4, "group": 32},
                    {"kind": "intx", "bits": 4},
                ],
            ),
        ),
        Peer(
            "optimum-quanto",
            "quanto",
            "0.2.7",
            ("optimum-quanto==0.2.7", *_SHARED),
            _everywhere(
                {"bits": 8},
                {"bits": 4},
                {"bits": 4, "ends": 8},
                {"bits": 4, "optimizer": "hqq"},
                {"bits": 2, "ends": 8},
                large=(0, 1, 3),
            ),
        ),
        Peer(
            "hqq",
            "hqq",
            "0.2.8.post1",
            ("hqq==0.2.8.post1", *_SHARED),
            _grid(
                _bits(4, group=64),
                _bits(4, group=64),
                [*_bits(8, 4, 3, group=64), {"bits": 4, "group": 32}, {"bits": 2, "group": 16}],
            ),
        ),
        Peer(
            "bitsandbytes",
            "bitsandbytes",
            "0.50.2",
            ("bitsandbytes==0.50.2", *_SHARED),
            _grid(
                [{"kind": "nf4", "block": 64, "double": False}],
                [{"kind": "nf4", "block": 64, "double": False}],
                [
                    {"kind": "int8"},
                    {"kind": "nf4", "block": 32, "double": False},
                    {"kind": "nf4", "block": 64, "double": False},
                    {"kind": "nf4", "block": 64, "double": True},
                    {"kind": "fp4", "block": 64, "double": False},
                ],
            ),
        ),
        Peer("coremltools", "coremltools", "9.0", ("coremltools==9.0", "scikit-learn==1.9.1", *_SHARED), _PALETTES),
        Peer(
            "coreai-opt",
            "coreai",
            "0.3.0",
            ("coreai-opt==0.3.0", "coreai-core==1.0.0b3", "coreai-torch==0.4.3", "scikit-learn==1.9.1", *_SHARED),
            _PALETTES,
        ),
        Peer(
            "k-means + zstd",
            "zstd",
            "zstandard 0.25.0",
            ("zstandard==0.25.0", "numpy==2.4.6", *_SHARED),
            _everywhere(*_bits(6, 5, 4, kind="kmeans"), *_bits(4, 3, kind="kmeans", ends=8), large=(0, 1, 3)),
        ),
        Peer(
            "rounding + zstd",
            "zstd",
            "zstandard 0.25.0",
            ("zstandard==0.25.0", "numpy==2.4.6", *_SHARED),
            _everywhere(*_bits(8, 6, 5, 4, kind="uniform"), *_bits(3, kind="uniform", ends=8), large=(1, 2, 3)),
        ),
        # Without its needs: they are for training and bring another torch and torchvision.
        Peer(
            "NNCodec",
            "nncodec",
            "2.1.3",
            ("--no-deps", "nncodec==2.1.3", "numpy==1.26.4", *_SHARED),
            _grid(
                [{"qp": qp} for qp in (-28, -26, -24, -22, -20, -19)],
                [{"qp": qp} for qp in (-26, -23, -20)],
                [{"qp": qp} for qp in (-30, -28, -26, -24, -22, -21)],
                [{"qp": qp} for qp in (-34, -32, -30, -28, -26, -24)],
            ),
        ),
    )
}
