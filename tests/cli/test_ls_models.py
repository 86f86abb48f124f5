"""`torchmask ls --models`: every family with its builders, for a terminal of 80 columns."""

from itertools import pairwise

import pytest

from torchmask import models
from torchmask.cli.main import main


@pytest.fixture
def lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ls", "--models"]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_family_is_shown_with_its_models_and_all_its_builders(lines):
    starts = [i for i, line in enumerate(lines) if line and line[0] != " "]
    entries = {lines[a].split()[0]: " ".join(lines[a:b]).split() for a, b in pairwise(starts[1:-1])}
    assert entries.keys() == models.FAMILIES.keys()
    for name, family in models.FAMILIES.items():
        assert entries[name] == [name, *family.title.split(), *models.builders_of(family)]


def test_no_line_is_wider_than_the_terminal(lines):
    assert max(map(len, lines)) <= 80


def test_the_last_line_leads_to_the_page_of_the_families(lines):
    assert lines[-1].endswith("docs/families.md.")
