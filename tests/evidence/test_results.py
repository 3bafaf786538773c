"""Evidence is resumable, and is never mixed with evidence under other settings."""

import json

import pytest
import yaml
from rlo_core.errors import RunError


def test_a_key_is_measured_once_and_found_again_by_a_later_process(tmp_path):
    from runner import Results

    calls = []

    def measure():
        calls.append(1)
        return {"value": 3}

    path = tmp_path / "evidence_x.jsonl"
    assert Results(path, {"steps": 1}).measure("a", measure) == {"key": "a", "value": 3}
    again = Results(path, {"steps": 1})
    assert again.measure("a", measure) == {"key": "a", "value": 3}
    assert len(calls) == 1


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    from runner import Results, load_results

    path = tmp_path / "evidence_x.jsonl"
    Results(path, {}).measure("a", lambda: {"value": 1})
    with path.open("a") as handle:
        handle.write('{"key": "b", "val')
    results = Results(path, {})
    assert list(results.records) == ["a"]
    results.measure("b", lambda: {"value": 2})
    assert [r["value"] for r in load_results(path)[1]] == [1, 2]


def test_other_settings_are_refused_and_another_list_of_what_to_run_is_not(tmp_path):
    from runner import Results

    path = tmp_path / "evidence_x.jsonl"
    Results(path, {"steps": 1, "groups": [1]})
    Results(path, {"steps": 1, "groups": [1, 2]})
    message = (
        "evidence_x.jsonl was begun with another configuration; "
        "give another --out, or remove it to start anew"
    )
    with pytest.raises(RunError, match=f"^{message}$"):
        Results(path, {"steps": 2, "groups": [1]})


def test_a_model_that_was_measured_keeps_its_recipe_and_a_new_one_may_be_added(tmp_path):
    from runner import Results, load_results

    def config(**models):
        return {"models": {n: {"epochs": e, "lr": lr} for n, (e, lr) in models.items()}}

    path = tmp_path / "evidence_x.jsonl"
    Results(path, config(vit=(5, [0.1]))).measure("a", lambda: {"model": "vit"})
    later = config(vit=(5, [0.1, 0.2]), resnet=(3, [0.1]))
    assert list(Results(path, later).records) == ["a"]
    assert load_results(path)[0]["config"] == later
    Results(path, config(vit=(5, [0.1]), resnet=(4, [0.1])))  # not measured yet
    with pytest.raises(RunError, match="was begun with another configuration"):
        Results(path, config(vit=(6, [0.1])))


def test_the_first_line_has_machine_versions_and_configuration(tmp_path):
    from runner import Results

    path = tmp_path / "evidence_x.jsonl"
    Results(path, {"steps": 1})
    header = json.loads(path.read_text().splitlines()[0])
    assert header["config"] == {"steps": 1}
    assert {"machine", "versions", "when"} <= set(header)


def test_a_configuration_that_is_a_list_is_refused(tmp_path):
    from runner import load_config

    path = tmp_path / "x.yaml"
    path.write_text("- 1\n")
    with pytest.raises(RunError, match="^configuration must be a mapping, got list in x.yaml$"):
        load_config(path)


def test_every_shipped_configuration_names_losses_that_exist(evidence):
    from rlo_core import create_loss

    for file in sorted((evidence / "configs").glob("*.yaml")):
        config = yaml.safe_load(file.read_text())
        groups = [config[g] if isinstance(g, str) else g for g in config.get("groups", [])]
        losses = [loss for group in groups for loss in group["losses"] if loss != "elr"]
        for loss in losses + config.get("losses", []) + config.get("step_cost", []):
            create_loss(loss)


def test_committed_results_belong_to_the_shipped_configurations(evidence):
    """A table in docs/evidence.md is of settings that a reader can run."""
    from runner import load_results, settings_of

    names = {
        "regression": "regression",
        "vision": "vision-cpu",
        "vision_head": "vision-head-cpu",
        "language": "language-cpu",
        "quantization": "quantization-cpu",
    }
    for name, config in names.items():
        path = evidence.parent / "results" / f"evidence_{name}.jsonl"
        if path.exists():
            settings = yaml.safe_load((evidence / "configs" / f"{config}.yaml").read_text())
            header, records = load_results(path)
            assert settings_of(header["config"], records) == settings_of(settings, records)
