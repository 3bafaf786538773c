"""The Python entry points do what the commands do."""

from __future__ import annotations

import json

import pytest
import rlo_gptq
from click.testing import CliRunner
from rlo_core.errors import RLOError
from rlo_gptq.cli.main import main
from rlo_gptq.models.digests import file_digests


def test_quantize_and_evaluate_give_what_the_commands_give(model_folder, text_file, tmp_path):
    model = model_folder("llama-gqa-tied")
    made = rlo_gptq.quantize(model, text_file, save=tmp_path / "a", nsamples=4, seqlen=32)
    arguments = ["quantize", str(model), str(text_file), "--save", str(tmp_path / "b"), "--json"]
    arguments += ["--wbits", "2", "--incoh-processing", "--nsamples", "4", "--seqlen", "32"]
    document = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert made is not None
    assert isinstance(made, rlo_gptq.QuantizeResult)
    for name in ("layers", "bits", "mean_proxy", "worst_layer", "bytes", "embedding"):
        assert getattr(made, name) == document[name]
    names = [tmp_path / folder / "model.safetensors" for folder in ("a", "b")]
    assert file_digests(names[:1]) == file_digests(names[1:])

    again = rlo_gptq.quantize(model, text_file, save=tmp_path / "a", nsamples=4, seqlen=32)
    assert again is not None
    assert again.already_done
    assert again.worst_proxy == made.worst_proxy

    measured = rlo_gptq.evaluate(tmp_path / "a", text_file, context=32, max_tokens=320)
    arguments = ["eval", str(tmp_path / "b"), str(text_file), "--context", "32", "--json"]
    said = json.loads(CliRunner().invoke(main, [*arguments, "--max-tokens", "320"]).stdout)
    assert isinstance(measured, rlo_gptq.EvalResult)
    assert (measured.perplexity, measured.tokens) == (said["perplexity"], 310)


def test_what_is_refused_raises_one_line(tmp_path):
    with pytest.raises(RLOError, match="no model at"):
        rlo_gptq.quantize("./nowhere", "text.txt", save=tmp_path / "q")
    with pytest.raises(ValueError, match="embed_bits must be one of"):
        rlo_gptq.quantize("./nowhere", "text.txt", save=tmp_path / "q", embed_bits=7)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = rlo_gptq.quantise
