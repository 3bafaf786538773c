"""The workflows cannot run here, but they are parsed and the commands that they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> dict[Any, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_triggers_jobs_and_steps_that_run_or_use_something(path: Path) -> None:
    document = load(path)
    assert document["name"] == path.stem
    assert document[True]  # `on` is a boolean to YAML
    assert document["permissions"] == {"contents": "read"}
    for name, job in document["jobs"].items():
        assert job["runs-on"], name
        for needed in [job.get("needs", [])]:
            assert set([needed] if isinstance(needed, str) else needed) <= set(document["jobs"])
    for step in steps(path):
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step["uses"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_commands_of_a_workflow_are_targets_and_files_of_this_repository(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps(path):
        for command in re.split(r"&&|\n", step.get("run", "")):
            program, *arguments = shlex.split(command) or [""]
            if program == "make":
                for target in arguments:
                    assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE)
            elif program == "bash":
                assert (ROOT / arguments[0]).is_file(), command
            else:
                assert not program, f"a command that nothing here checks: {command}"


def test_the_matrix_covers_every_python_that_the_packages_accept() -> None:
    matrix = load(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]
    assert matrix["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]


def test_a_release_is_published_without_a_stored_token() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    publish = load(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_fields_with_labels_of_their_own(path: Path) -> None:
    form = load(path)
    if path.name == "config.yml":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    identifiers = [field["id"] for field in fields]
    assert len(identifiers) == len(set(identifiers))


def test_the_citation_names_the_version_and_the_licence_of_the_packages() -> None:
    citation = load(ROOT / "CITATION.cff")
    source = (ROOT / "packages" / "rlo-core" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in source
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["authors"][0]["family-names"] == "Wang"
