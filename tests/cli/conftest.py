"""Fixtures of the verbs that look at data."""

import json

import pytest

from torchmask.config.built_in import built_in_folder

TINY = built_in_folder("configs") / "tiny" / "base"


@pytest.fixture
def data_config(tmp_path):
    """Writes rows and a configuration that trains on them; returns the configuration's path."""

    def write(rows, *, name="look.yaml", component="chat_dataset", tokenizer=None, dataset=(), packing=()):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "output_dir": str(tmp_path / "out"),
            "model": {"_component_": "torchmask.models.from_pretrained", "folder": str(TINY)},
            "tokenizer": {"_component_": "torchmask.tokenizers.from_pretrained", "folder": str(tokenizer or TINY)},
            "dataset": {"_component_": f"torchmask.data.{component}", "source": str(source), **dict(dataset)},
            "packing": {"max_seq_len": 256, **dict(packing)},
        }
        path = tmp_path / name
        path.write_text("# finetune: a test\n" + json.dumps(config), encoding="utf-8")
        return str(path)

    return write


def talk(question, answer, **flags):
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flags}]}


@pytest.fixture
def talks():
    """Three rows: one plain, one weighted, one of which nothing is trained."""
    return [talk("Who?", "Ada"), talk("Where <b>?", "Rome ... yes", weight=0.5), talk("When?", "now", weight=0)]
