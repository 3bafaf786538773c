"""What is locked has hashes and licences, and a wheel comes with its bill of materials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("name", ["dev", "dev-py310"])
def test_the_hashed_lock_has_the_versions_of_the_plain_one_and_no_address(
    root: Path, name: str
) -> None:
    text = (root / "constraints" / f"{name}.hashes.txt").read_text()
    entries = re.findall(
        r"^(\S+==\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    assert "".join(f"{pin} \\\n{hashes}" for pin, hashes in entries) == text
    plain = (root / "constraints" / f"{name}.txt").read_text().splitlines()
    assert sorted(pin for pin, _ in entries) == sorted(plain)


def test_the_licence_of_every_locked_package_is_stated(root: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "audit.py"), "--licences-only", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert {"name", "version", "licence"} == set(found[0])
    stated = {one["name"]: one["licence"] for one in found}
    assert stated["torch"]
    assert done.returncode == 0, done.stderr


def test_the_bill_of_materials_of_a_wheel_names_it_by_its_hash_and_all_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cyclonedx")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import hashlib
    import importlib

    sbom = importlib.import_module("sbom")
    wheel = tmp_path / "rlo_timm-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rlo_timm/__init__.py", "")
    out = sbom.write_bill(wheel)
    assert out.name == "rlo_timm-0.1.0-py3-none-any.cdx.json"
    bill = json.loads(out.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    own = bill["metadata"]["component"]
    assert own["purl"].startswith("pkg:pypi/rlo-timm@")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert own["hashes"] == [{"alg": "SHA-256", "content": digest}]
    parts = {part["name"]: part for part in bill["components"]}
    assert {"rlo-core", "torch", "timm", "lightning", "jinja2"} <= set(parts)  # jinja2: an extra
    assert "pytest" not in parts
    assert parts["timm"]["licenses"]
    known = {part["bom-ref"] for part in [own, *bill["components"]]}
    needs = {entry["ref"]: set(entry.get("dependsOn", [])) for entry in bill["dependencies"]}
    assert set(needs) == known
    assert all(others <= known for others in needs.values())
    assert any(ref.startswith("torch==") for ref in needs[own["bom-ref"]])


def test_newest_and_oldest_versions_are_tried_on_a_schedule(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "upstream.yml").read_text())
    assert workflow[True]["schedule"][0]["cron"]
    assert {"newest", "oldest", "audit"} == set(workflow["jobs"])


def test_the_release_and_what_contributors_read_agree_on_what_is_published(root: Path) -> None:
    release = (root / ".github" / "workflows" / "release.yml").read_text()
    text = (root / "CONTRIBUTING.md").read_text()
    assert "dist/*.whl" in release
    assert "sdist" not in release
    assert "builds the wheels and publishes them" in text
    assert "dist/*.cdx.json" in release
