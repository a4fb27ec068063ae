"""The inline assembly that Triton's interpreter cannot run, by a model of its instructions from the PTX manual."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[2] / "src" / "fp4" / "backends" / "triton" / "codec.py"
Words = np.ndarray


def prmt(a: Words, b: Words, selector: int) -> Words:
    """Byte i of the result is byte ``selector[4 i : 4 i + 3]`` of the eight bytes of a (the lower ones) and b."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        assert nibble < 8, "the sign is not replicated"
        byte = both >> np.uint64(8 * nibble) & np.uint64(0xFF)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def run(assembly: str, inputs: list[Words]) -> Words:
    """What a snippet of 32-bit instructions leaves in ``$0``."""
    registers = {f"${i + 1}": words for i, words in enumerate(inputs)}

    def value(operand: str) -> Words:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for statement in assembly.strip(" {}\n").split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, target, *operands = words
        if name == "prmt.b32":
            registers[target] = prmt(value(operands[0]), value(operands[1]), int(operands[2], 0))
        else:
            operation = {"shr.u32": np.right_shift, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or}[name]
            registers[target] = operation(value(operands[0]), value(operands[1])).astype(np.uint32)
    return registers["$0"]


def test_signs_go_to_the_highest_bits_of_their_nibbles() -> None:
    text = SOURCE.read_text()
    function = text[text.index("def _sign_bits") :]
    found = re.search(r'"""(\{.*?\})"""', function, re.S)
    assert found is not None
    generator = np.random.default_rng(0)
    # Every pattern of signs, over words whose other bits are random.
    signs = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.uint32)
    inputs = [generator.integers(0, 1 << 31, 256, dtype=np.uint32) | (signs[:, i] << 31) for i in range(8)]
    expected = sum((signs[:, i].astype(np.uint64) << np.uint64(4 * i + 3)) for i in range(8))
    assert np.array_equal(run(found[1], inputs).astype(np.uint64), expected)
