"""Fixtures of the verbs that look at data."""

import json
import shutil

import pytest

from torchmask.config.built_in import built_in_folder

TINY = built_in_folder("configs") / "tiny" / "base"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory):
    """The tiny base with ChatML: the same ids, other names of two special tokens and another template."""
    folder = tmp_path_factory.mktemp("chatml") / "base"
    shutil.copytree(TINY, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|user|>", "<|im_start|>").replace("<|end|>", "<|im_end|>"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def data_config(tmp_path, chatml_folder):
    """Writes rows and a configuration that trains on them; returns the configuration's path."""

    def write(rows, *, name="look.yaml", component="chat_dataset", tokenizer=None, dataset=(), packing=()):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = tokenizer or chatml_folder
        config = {
            "output_dir": str(tmp_path / "out"),
            "model": {"_component_": "torchmask.models.from_pretrained", "folder": str(chatml_folder)},
            "tokenizer": {
                "_component_": "torchmask.tokenizers.from_pretrained",
                "folder": str(tokenizer or chatml_folder),
            },
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
