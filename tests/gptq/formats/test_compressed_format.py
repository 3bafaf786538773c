import pytest
import torch
from rlo_gptq.formats.compressed import group_size_of, pack_layer, quantization_config
from rlo_gptq.formats.gptq import FormatError, GridLayer

compressed_tensors = pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 96])
def test_the_library_decompresses_what_we_pack(make_layer, bits, symmetric, group_size) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    layer = make_layer(bits, 1 << (bits - 1) if symmetric else None, group_size)
    size = group_size_of("x", layer)
    config = quantization_config(bits=bits, group_size=size, symmetric=symmetric, ignore=[])
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    packed = pack_layer("x", layer, symmetric=symmetric, dtype=torch.float32)
    weight = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(weight, layer.dequantize())


def test_groups_that_are_not_runs_are_refused(make_layer) -> None:
    layer = make_layer(4, 8.0)
    shuffled = GridLayer(layer.codes, layer.scales, layer.zeros, layer.group_of.flip(0), 4)
    with pytest.raises(FormatError, match="'x': groups must be runs of equal length, got 3 groups"):
        pack_layer("x", shuffled, symmetric=True)


def test_a_half_integer_zero_is_refused(make_layer) -> None:
    with pytest.raises(FormatError, match="compressed-tensors needs integer zeros, got 1.5"):
        pack_layer("x", make_layer(2, 1.5), symmetric=False)
