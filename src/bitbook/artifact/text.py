"""A short text, such as a plan, in few bytes: an adaptive model that has read an example first.

    text ─bit by bit─► 5 contexts ─► 5 chances ─logistic mixing─► one chance ─► arithmetic coder ─► bytes

A plan of 250 characters says about 35 bytes of news; the rest is JSON, the names of recipes and fields, and
repetition.  Each context (the last 1, 2, 4 and 6 bytes; the word within its place in a list) keeps the chance
of the next bit; a mixer weighs their log odds (Mahoney 2005, "Adaptive weighing of context models").  Before
the text, the model reads `EXAMPLE`, which is part of the format: its words, never its statistics, are given.
All arithmetic is in integers, so that every platform gives the same bytes.
"""

from __future__ import annotations

import functools

import numpy as np

from bitbook.coding.compiled import compiled
from bitbook.coding.logistic import LIMIT, SQUASH, STRETCH
from bitbook.coding.range_coder import POSITION, code_bit, decoder, encoder, finish, finished
from bitbook.errors import CorruptArtifact, PlanError

LONGEST = 1 << 20
"""Bytes of the longest text, so that decoding takes about a second at most."""

EXAMPLE = rb"""
{"coder":"Fixed","recipes":["Binary"],"tensors":{"weight":[[2,3],0]}}
{"recipes":[["ECSQ",3,{"points":["Uniform",6]}],["Uniform",8,{"scale":["Float","float16"]}]],
"tensors":{"layers.0.bias":[[6],0],"layers.0.weight":[[6,5],1],"layers.1.bias":[[7],0],"layers.1.weight":[[7,6],1]}}
{"coder":"Context","recipes":[["Codebook",256,{"block":[1,-1],"centroids":["Uniform",5]}],"Ternary"],
"tensors":{"conv1.bias":[[16],"F32"],"conv1.weight":[[16,3,3,3],0],"conv2.bias":[[32],"F32"],
"conv2.weight":[[32,16,3,3],0],"fc.bias":[[10],"F32"],"fc.weight":[[10,64],1]}}
{"activations":[["Uniform",8,{"symmetric":false}],{"range":"calibrated","recipe":["Uniform",4],"rule":"absmax"}],
"aliases":{"decoder.weight":"embedding.weight"},"inputs":{"linear1":0,"linear2":1},
"recipes":[["Pruned",100,{"values":["Uniform",4,{"block":[1,-1],"pad":true,"scale":["Float","bfloat16"]}]}]],
"tensors":{"embedding.weight":[[9,8],0],"encoder.norm1.bias":[[8],"BF16"],"encoder.norm1.num_batches_tracked":[[],"I64"],
"encoder.norm1.running_mean":[[8],"F16"],"encoder.norm1.running_var":[[8],"F16"],"encoder.norm1.weight":[[8],"F32"]}}
""".replace(b",\n", b",").lstrip()

_END = ord("\n")  # ends a text, and every line of the example
_CONTEXTS = 5
_SLOTS = 1 << 16  # of each context
_FEWEST = 1 << 14  # initial weight of each context, in 1/65536
_RATE = 24  # of the mixer, in 2^-18
_SLOWEST = 72  # bits after which a slot stops slowing down


def encode(text: bytes) -> bytes:
    """The bytes of a text; raises `PlanError` for one that is too long or has more than one line."""
    if len(text) > LONGEST or _END in text:
        raise PlanError(f"a text of {len(text)} bytes cannot be coded; use one line of at most {LONGEST}")
    symbols = _after_example(len(text) + 1)
    symbols[len(EXAMPLE) :] = np.frombuffer(text + bytes([_END]), np.uint8)
    buffer = np.zeros(16 * len(text) + 64, np.uint8)  # no bit costs more than two bytes
    coder = encoder()
    _code(coder, buffer, symbols, len(EXAMPLE), *_fresh())
    data = finish(coder, buffer)
    assert data is not None, f"the buffer of {len(buffer)} bytes is too short for {coder[POSITION]}"
    return data


def decode(data: bytes | memoryview) -> bytes:
    """The text again; raises `CorruptArtifact` for bytes that `encode` does not write."""
    buffer = np.array(memoryview(data), np.uint8)
    symbols = _after_example(LONGEST + 1)
    coder = decoder(buffer)
    stop = _code(coder, buffer, symbols, len(EXAMPLE), *_fresh())
    if symbols[stop - 1] != _END:
        raise CorruptArtifact(f"a text does not end within {LONGEST} bytes")
    if not finished(coder, buffer):
        raise CorruptArtifact("a text ends before its bytes do, or after them")
    return symbols[len(EXAMPLE) : stop - 1].tobytes()


def _after_example(size: int) -> np.ndarray:
    """The example and room for a text of `size` bytes behind it."""
    symbols = np.zeros(len(EXAMPLE) + size, np.uint8)
    symbols[: len(EXAMPLE)] = np.frombuffer(EXAMPLE, np.uint8)
    return symbols


def _fresh() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model as it is after reading the example: chances, how often each was used, weights."""
    chances, uses, weights = _primed()
    return chances.copy(), uses.copy(), weights.copy()


@functools.cache
def _primed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chances = np.full(_CONTEXTS * _SLOTS, 1 << 15, np.uint16)
    uses = np.zeros(_CONTEXTS * _SLOTS, np.uint8)
    weights = np.full((_CONTEXTS + 1, _CONTEXTS + 1), _FEWEST, np.int64)
    _code(encoder(), np.zeros(0, np.uint8), _after_example(0), 0, chances, uses, weights)
    return chances, uses, weights


@compiled
def _code(coder, buffer, text, start, chances, uses, weights):
    """Code `text[start:]`, in either direction, up to its end, or from 0 all of it; returns where it stopped."""
    inputs = np.zeros(_CONTEXTS + 1, np.int64)
    inputs[_CONTEXTS] = 256  # a constant
    slots = np.zeros(_CONTEXTS, np.int64)
    hashes = np.zeros(_CONTEXTS, np.int64)
    mask = (1 << 30) - 1
    word = _END
    depth = commas = 0  # brackets that are open, and commas within the innermost, since the last colon
    recent = np.int64(0)  # the last 6 bytes
    for at in range(len(text)):
        if at >= 1:
            byte = int(text[at - 1])
            recent = recent << 8 & 0xFFFFFFFFFFFF | byte
            if 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte == 95:
                word = word * 271 + byte & mask
            else:
                word = byte
                if byte == 58:  # :
                    depth = commas = 0
                elif byte == 91:  # [
                    depth += 1
                    commas = 0
                elif byte == 93:  # ]
                    depth -= 1
                elif byte == 44:  # ,
                    commas += 1
        if at < start:
            continue
        hashes[0] = recent & 0xFF
        hashes[1] = recent & 0xFFFF
        hashes[2] = recent & 0xFFFFFFFF
        hashes[3] = recent
        hashes[4] = word * 31 + commas * 977 + depth * 7
        for i in range(_CONTEXTS):
            hashes[i] = (hashes[i] % 1000003 * 7919 + i * 104729) % 1000003
        symbol = 1
        for shift in range(7, -1, -1):
            seen = 0
            dot = np.int64(0)
            for i in range(_CONTEXTS):
                slot = i * _SLOTS + ((hashes[i] * 256 + symbol) * 0x9E3779B1 >> 24) % _SLOTS
                slots[i] = slot
                inputs[i] = STRETCH[chances[slot]] if uses[slot] else 0
                seen += 1 if uses[slot] else 0
            for i in range(_CONTEXTS + 1):
                dot += inputs[i] * weights[seen, i]
            one = np.int64(SQUASH[min(max(dot >> 16, -LIMIT), LIMIT) + LIMIT])
            bit = code_bit(coder, buffer, int(text[at]) >> shift & 1, one)
            error = (bit << 16) - one
            for i in range(_CONTEXTS + 1):
                weights[seen, i] += inputs[i] * error * _RATE >> 18
            for i in range(_CONTEXTS):
                slot = slots[i]
                used = min(int(uses[slot]) + 1, _SLOWEST)
                chance = int(chances[slot])
                uses[slot] = used
                chances[slot] = chance + (bit * 65535 - chance) * 2 // (2 * used + 1)
            symbol = symbol << 1 | bit
        text[at] = symbol & 0xFF
        if start and text[at] == _END:
            return at + 1
    return len(text)
