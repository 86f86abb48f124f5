"""docs/families.md, "Adding a family": the listing is a family's file as it stands."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchmask import models
from torchmask.models import from_config, from_pretrained, granite, read_config, save_pretrained
from torchmask.models.family import build_model

REPO = Path(__file__).resolve().parents[2]
GRANITES = sorted((REPO / "tests" / "models" / "configs").glob("granite_*.json"))


def listing():
    section = (REPO / "docs" / "families.md").read_text().split("## Adding a family")[1]
    [block] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture
def module(tmp_path, monkeypatch):
    file = tmp_path / "new_family.py"
    file.write_text(listing())
    spec = importlib.util.spec_from_file_location("new_family", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "new_family", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", GRANITES, ids=lambda path: path.stem)
def test_the_listing_reads_builds_and_writes_a_model(module, case, tmp_path):
    config = read_config(case)
    spec = module.spec_from_config(config)
    assert spec == granite.spec_from_config(config)
    assert module.spec_from_config(module.config_from_spec(spec)) == spec
    model = build_model(module.FAMILY, spec, dtype="fp32", device="cpu", seed=1)
    assert model.hub_config == granite.config_from_spec(spec)
    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert module.FAMILY.layout(model) == granite.FAMILY.layout(from_config(config, device="meta"))


def test_the_listings_size_is_the_published_one(module):
    assert module.granite_3_3_2b(device="meta").spec == models.granite_3_3_2b(device="meta").spec
    assert module.FAMILY.title == granite.FAMILY.title and module.FAMILY.derived == granite.FAMILY.derived


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["rules", "format"])
def test_the_listing_passes_ruff_as_a_file_of_the_package(command):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    name = str(REPO / "torchmask" / "models" / "new_family.py")  # for the rules of files there; it is not written
    result = subprocess.run(
        [ruff, *command, "--stdin-filename", name, "-"], input=listing(), capture_output=True, text=True, cwd=REPO
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_steps_name_what_tests_ask_for():
    section = (REPO / "docs" / "families.md").read_text().split("## Adding a family")[1]
    for named in re.findall(r"`((?:tests|torchmask|tools)/[^`\s]*)`", section):
        assert (REPO / named).exists(), named
    for needed in ("`__all__`", "tests/models/sizes/", "tests/models/facts/", "`FAMILIES`", "row in the table"):
        assert needed in section
