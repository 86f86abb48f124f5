"""What no count of parameters shows of a builder: rope bases, epsilons, lengths, windows, scalings and multipliers.

A row of `facts/` has values as found in the source that it names, in the words of `DecoderSpec` (a rope scaling in
those of config.json), and `unverified`: facts for which no source was found.

- `config.json`: copies in public repositories (MLC LLM, Tenstorrent's tt-metal, AI Configurator, benchmarks, issues).
- litgpt, torchtune, Megatron Bridge, MindFormers, LLM-Analysis, Bonsai, OLMo-core, transformers: their tables and
  defaults, most of which name the file.
- GGUF: metadata of a converted file, as llama.cpp prints them.
- model card: lengths and patterns that config.json of that time does not say.
"""

from pathlib import Path

import pytest

from torchmask import models
from torchmask.models import read_config
from torchmask.models.rope_config import scaling_entry

HERE = Path(__file__).parent
FACTS = {name: row for path in sorted((HERE / "facts").glob("*.json")) for name, row in read_config(path).items()}
USUAL = {"max_seq_len", "norm_eps", "rope_base", "sliding_window"}


def spec_of(name):
    return getattr(models, name)(device="meta").spec


def rotates(spec):
    return not spec.learned_positions and any(spec.rope_of(i) is not None for i in range(spec.num_layers))


@pytest.mark.parametrize("name", FACTS)
def test_a_named_builder_has_the_published_facts(name):
    spec = spec_of(name)
    published = {key: value for key, value in FACTS[name].items() if key not in ("from", "unverified")}
    for key, value in published.items():
        ours = getattr(spec, key)
        if key == "rope_scaling" and value is not None:
            entry = scaling_entry(ours)
            ours = {each: entry[each] for each in value}
        elif isinstance(value, float):
            value = pytest.approx(value, rel=1e-12)
        assert (list(ours) if isinstance(ours, tuple) else ours) == value, key


def test_every_builder_has_each_usual_fact_or_says_that_it_is_unverified():
    builders = {name for family in models.FAMILIES.values() for name in models.builders_of(family)}
    assert builders == FACTS.keys()
    for name, row in FACTS.items():
        wanted = USUAL if rotates(spec_of(name)) else USUAL - {"rope_base"}
        unverified = set(row.get("unverified", ()))
        assert wanted <= row.keys() | unverified, name
        assert not row.keys() & unverified, name


def test_the_docs_name_the_builders_with_unverified_values():
    page = (HERE.parents[1] / "docs" / "families.md").read_text()
    for name, row in FACTS.items():
        assert (f"`{name}`" in page) == ("unverified" in row), name
