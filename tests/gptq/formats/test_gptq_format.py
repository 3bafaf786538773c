import pytest
import torch
from rlo_gptq.formats.gptq import FormatError, GridLayer, pack_layer, unpack_layer


def stream_by_hand(column: list[int], bits: int) -> list[int]:
    """The definition, in Python's own big integers."""
    whole = sum(code << (i * bits) for i, code in enumerate(column))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(len(column) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_qweight_and_qzeros_are_the_streams_computed_with_big_integers(make_layer, bits) -> None:
    layer = make_layer(bits)
    tensors = pack_layer("x", layer, "gptq_v2")
    for row in range(3):
        codes = layer.codes[row].tolist()
        assert tensors["qweight"][:, row].tolist() == stream_by_hand(codes, bits)
        zeros = [int(zero) for zero in layer.zeros[:, row]]
        assert tensors["qzeros"][row].tolist() == stream_by_hand(zeros, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_survives_version_2_with_any_zero(make_layer, bits: int) -> None:
    before = make_layer(bits)
    after = unpack_layer(
        "x", pack_layer("x", before, "gptq_v2"), bits=bits, checkpoint_format="gptq_v2"
    )
    assert torch.equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_layer_survives_version_1(make_layer, bits: int) -> None:
    before = make_layer(bits, zero=1 << (bits - 1))
    tensors = pack_layer("x", before, "gptq")
    assert torch.equal(
        unpack_layer("x", tensors, bits=bits, checkpoint_format="gptq").dequantize(),
        before.dequantize(),
    )


def test_version_1_refuses_the_zeros_that_readers_misread(make_layer) -> None:
    with pytest.raises(
        FormatError, match="must have zeros of 2, got \\[0, 0\\], which readers misread"
    ):
        pack_layer("model.layers.0.mlp.up_proj", make_layer(2, zero=0.0), "gptq")


def test_a_half_integer_zero_is_refused_with_the_way_out(make_layer) -> None:
    with pytest.raises(
        FormatError, match="'x': the GPTQ format needs integer zeros, got 1.5; quantize with"
    ):
        pack_layer("x", make_layer(2, zero=1.5), "gptq_v2")


def test_a_width_that_ends_inside_a_word_is_refused() -> None:
    odd = GridLayer(
        torch.zeros(64, 172, dtype=torch.uint8),
        torch.ones(64, 1),
        torch.full((64, 1), 8.0),
        torch.zeros(172, dtype=torch.int64),
        4,
    )
    with pytest.raises(FormatError, match="its input width must be a multiple of 32 .* got 172"):
        pack_layer("down_proj", odd, "gptq")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qweight", lambda t: t[:, :-1], "x.qweight must have 64 columns as scales has, got 63"),
        ("qzeros", lambda t: t[:-1], "x.qzeros must have 3 rows as scales has, got 2"),
        ("g_idx", lambda t: t + 3, r"x.g_idx must be in \[0, 3\), got \[3, 5\]"),
        ("g_idx", lambda t: t[:-1], r"x.g_idx must be integer of shape \(96,\)"),
        ("scales", lambda t: t * float("nan"), "x.scales must be finite floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(make_layer, key, change, message) -> None:
    tensors = pack_layer("x", make_layer(4), "gptq_v2")
    tensors[key] = change(tensors[key])
    with pytest.raises(FormatError, match=message):
        unpack_layer("x", tensors, bits=4, checkpoint_format="gptq_v2")
