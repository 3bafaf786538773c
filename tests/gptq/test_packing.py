"""Packed codes are one little-endian bit stream a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlo_gptq.packed.packing import pack_codes, packed_words, unpack_codes
from rlo_gptq.packed.unpack_table import unpack_values


def reference_words(row: list[int], bits: int) -> list[int]:
    """The stream as one Python integer, cut into signed words."""
    stream = sum(code << (bits * index) for index, code in enumerate(row))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(packed_words(len(row), bits))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_packing_equals_the_bits_of_one_big_integer_and_unpacks_to_the_same(bits, data):
    columns = data.draw(st.integers(1, 70))
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [reference_words(row, bits) for row in rows]
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


def test_a_2_bit_matrix_takes_an_eighth_of_float16():
    packed = pack_codes(torch.zeros(64, 128, dtype=torch.uint8), 2)
    assert packed.numel() * packed.element_size() * 8 == 64 * 128 * 2


def test_a_code_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"codes must be in 0\.\.3 for 2 bits, got 0\.\.4"):
        pack_codes(torch.tensor([[0, 4]]), 2)


def test_unpacking_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"packed must be int32 of shape \(rows, 2\) for 17 codes"):
        unpack_codes(torch.zeros(1, 1, dtype=torch.int32), 2, 17)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [1, 7, 32, 43, 96, 172])
def test_a_table_reads_the_codes_that_shifting_reads(bits, columns):
    packed = torch.randint(-(2**31), 2**31 - 1, (5, packed_words(columns, bits)), dtype=torch.int32)
    expected = unpack_codes(packed, bits, columns).float()
    for zero in (0.0, 1.5):
        assert torch.equal(unpack_values(packed, bits, columns, zero), expected - zero)
