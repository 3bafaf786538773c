"""Each command from its configuration to its results, its run folders and the page made of them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from rlo_core.runs.report import write_report


def run(command, config, folder, *arguments):
    """Run a command on a configuration; return its records and the page of its runs."""
    from runner import load_results

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    out, runs = folder / "evidence.jsonl", folder / "runs"
    options = ["--out", str(out), "--runs", str(runs), *map(str, arguments)]
    result = CliRunner().invoke(command, [str(file), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    records = load_results(out)[1]
    page = write_report(sorted(runs.iterdir()), folder / "report.html")
    again = CliRunner().invoke(command, [str(file), *options], catch_exceptions=False)
    assert again.exit_code == 0
    assert load_results(out)[1] == records  # nothing is measured twice
    return records, page.read_text()


@pytest.fixture
def images(tmp_path):
    """Thirty-two random images a split, in the form of the CIFAR-10 files."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = []
        for label in range(32):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"img": {"bytes": file.getvalue()}, "label": label % 10})
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-1.parquet")
    return tmp_path


def test_vision_tunes_on_the_first_seed_and_repeats_at_the_best_rate(images, monkeypatch):
    import vision

    monkeypatch.setattr(vision, "COST_ROUNDS", 2)
    config = {
        "device": "cpu",
        "train_images": 24,
        "validation_images": 8,
        "test_images": 16,
        "batch_size": 8,
        "weight_decay": 0.0,
        "warmup": 0.2,
        "seeds": [0, 1],
        "models": {
            "vit": {
                "build": "vit",
                "options": {"width": 8, "depth": 1, "heads": 1, "patch": 16},
                "epochs": 2,
                "lr": [0.001, 0.01],
                "target_accuracy": 0.0,
            }
        },
        "step_cost": ["ce", "rlo:k=3"],
        "groups": [{"model": "vit", "noise": [0.5], "losses": ["rlo:k=3"]}],
    }
    records, page = run(vision.main, config, images, "--data", images)
    cost, *trained = records
    assert set(cost["step_seconds"]) == {"ce", "rlo:k=3"}
    assert [(r["lr"], r["seed"]) for r in trained[:2]] == [(0.001, 0), (0.01, 0)]
    best = max(trained[:2], key=lambda r: r["validation_accuracy"])["lr"]
    assert [(r["lr"], r["seed"]) for r in trained[2:]] == [(best, 1)]
    assert all(r["epochs_to_target"] == 1 and len(r["curve"]) == 2 for r in trained)
    assert "vit_noise=0.5_rlo-k=3_lr=0.01_seed=0" in page
    assert "test_ece" in page


def test_language_reports_true_perplexity_of_a_model_from_scratch(shared_data, tmp_path):
    """Two losses from the same start: the figures are of cross entropy, so both begin near 512."""
    from language import main

    tokenizer = str(shared_data / "stories260k")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small cat. " * 400)
    options = {"vocab_size": 512, "hidden_size": 8, "intermediate_size": 16}
    options |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    job = {"kind": "llama", "options": options, "tokenizer": tokenizer, "text": str(text)}
    job |= {"steps": 20, "batch": 2, "context": 32, "warmup": 0.1, "weight_decay": 0.0}
    config = {
        "device": "cpu",
        "held_out": 0.2,
        "eval_tokens": 256,
        "seeds": [0],
        "jobs": {"tiny": {**job, "lr": [1e-6]}},
        "groups": [{"job": "tiny", "losses": ["ce", "rlo:k=3"]}],
    }
    records, page = run(main, config, tmp_path, "--models", tmp_path)
    assert [r["loss"] for r in records] == ["ce", "rlo:k=3"]
    for record in records:
        assert record["perplexity"]["test"] == pytest.approx(512, rel=0.05)
    lines = (tmp_path / "runs" / "tiny_ce_lr=1e-06_seed=0" / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in lines.splitlines() if "objective" in line]
    assert steps == [10, 20]
    assert "test_perplexity" in page


def test_regression_logs_how_every_solver_nears_the_optimum(tmp_path):
    from regression import main

    config = {
        "tables": ["wine"],
        "seeds": [0],
        "test_share": 0.3,
        "k": [3],
        "forms": ["convex", "bounded"],
        "C": [0.1, 1.0],
        "inner_folds": 2,
        "max_iter": 200,
        "path_C": 1.0,
        "path_max_iter": 500,
        "path_solvers": ["gd", "lbfgs"],
        "path_iterations": [0],
        "path_seeds_below": {},
    }
    records, page = run(main, config, tmp_path)
    assert [r["model"] for r in records] == ["lr", "convex/k=3", "bounded/k=3"]
    for record, loss in zip(records, ["lr", "convex_k=3", "bounded_k=3"], strict=True):
        lines = (tmp_path / "runs" / f"wine_{loss}_seed=0" / "metrics.jsonl").read_text()
        logged = [json.loads(line) for line in lines.splitlines()]
        for solver, count in record["iterations"].items():
            gaps = [line["relative_gap"] for line in logged if line["split"] == solver]
            assert gaps[count - 1] <= 1e-4 < gaps[count - 2]
    assert "iterations_gd" in page
