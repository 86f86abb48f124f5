import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchmask.cli.main import main
from torchmask.cli.open_config import DataConfig
from torchmask.data import mapped

CONFIG = """\
# finetune: a test
output_dir: {folder}/out
model: {{_component_: torchmask.models.from_pretrained, folder: {tokenizer}}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {tokenizer}}}
dataset: {{_component_: torchmask.data.instruct_dataset, source: {folder}/rows.jsonl, chat: false}}
packing: {{max_seq_len: 64}}
"""


@pytest.fixture
def config(assets, tmp_path, monkeypatch):
    """A configuration whose data is kept under tmp_path/cache."""
    monkeypatch.setenv("TORCHMASK_CACHE", str(tmp_path / "cache"))
    rows = [{"input": f"What is {i}?", "output": f"It is {i}."} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = assets / "checkpoints/stories260k"
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path, tokenizer=tokenizer))
    return str(tmp_path / "c.yaml")


def listed(capsys):
    capsys.readouterr()
    assert main(["data", "ls", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_build_makes_what_a_run_with_the_cache_on_opens(config, capsys):
    assert main(["data", "build", "--config", config, "--num-workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "50 documents" in out and "set dataset.cache=true" in out
    made = {entry["key"] for entry in listed(capsys)}
    assert len(made) == 2
    assert main(["data", "build", "--config", config, "dataset.cache=true"]) == 0
    assert "set dataset.cache" not in capsys.readouterr().out
    assert {entry["key"] for entry in listed(capsys)} == made


def test_overrides_make_other_entries(config, capsys):
    for override in ("packing.max_seq_len=128", "dataset.masking_strategy=train_on_all"):
        assert main(["data", "build", "--config", config, override]) == 0
    capsys.readouterr()
    kinds = sorted(entry["facts"]["kind"] for entry in listed(capsys))
    assert kinds == ["rows", "rows", "samples", "samples"]


def test_ls_shows_size_documents_tokens_source_and_age(config, capsys, tmp_path):
    assert main(["data", "ls"]) == 0
    assert capsys.readouterr().out == f"nothing in {tmp_path / 'cache'}\n"
    main(["data", "build", "--config", config])
    capsys.readouterr()
    assert main(["data", "ls", "--check"]) == 0
    out = capsys.readouterr().out
    assert "2 entries" in out and f"{tmp_path}/rows.jsonl" in out and "rows of 64 slots of" in out
    (samples,) = [entry for entry in listed(capsys) if entry["facts"]["kind"] == "samples"]
    assert samples["documents"] == 50 and f"{samples['tokens']:,}" in out and samples["key"][:12] in out


def test_ls_tells_of_damage(config, capsys):
    main(["data", "build", "--config", config])
    capsys.readouterr()
    (samples,) = [entry for entry in listed(capsys) if entry["facts"]["kind"] == "samples"]
    path = Path(samples["folder"], "tokens.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    assert main(["data", "ls"]) == 0 and "DAMAGED" not in capsys.readouterr().out
    assert main(["data", "ls", "--check"]) == 1 and "DAMAGED" in capsys.readouterr().out
    path.with_name("header.json").write_text("{}")
    assert main(["data", "ls"]) == 1 and "DAMAGED: header.json is not a header" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["samples", "rows"])
def test_build_checks_every_byte_of_what_is_there_and_builds_damaged_entries_again(config, capsys, monkeypatch, kind):
    monkeypatch.setattr(mapped, "SMALL", 0)
    main(["data", "build", "--config", config])
    (entry,) = [entry for entry in listed(capsys) if entry["facts"]["kind"] == kind]
    folder = Path(entry["folder"])
    path = max(folder.glob("*.bin"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    mapped._keep_stamps(folder, mapped._stamps(folder))
    assert main(["data", "ls", "--check"]) == 1
    assert main(["data", "build", "--config", config]) == 0
    capsys.readouterr()
    assert main(["data", "ls", "--check"]) == 0 and "2 entries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(["dataset.num_workers=0"], 0), (["--num-workers", "0", "dataset.num_workers=3"], 0), (["--num-workers", "1"], 1)],
)
def test_the_number_of_workers_is_the_options_or_the_configurations(config, monkeypatch, words, wanted):
    seen = []
    build = DataConfig.build_samples

    def watching(self, tokenizer, **changes):
        seen.append(changes["num_workers"])
        return build(self, tokenizer, **{**changes, "num_workers": 0})

    monkeypatch.setattr(DataConfig, "build_samples", watching)
    assert main(["data", "build", "--config", config, *words]) == 0
    assert main(["data", "build", "--config", config]) == 0
    assert seen == [wanted, len(os.sched_getaffinity(0))]


def test_the_cache_may_be_a_folder_that_is_not_there_yet(config, capsys, tmp_path):
    new = tmp_path / "new" / "folder"
    assert main(["data", "build", "--config", config, f"dataset.cache={new}"]) == 0, capsys.readouterr().err
    assert len(list((new / "data").glob("*/header.json"))) == 2
    assert main(["inspect", "--json", "--config", config, f"dataset.cache={tmp_path / 'other'}"]) == 0


def test_rm_takes_keys_age_or_everything(config, capsys):
    main(["data", "build", "--config", config])
    main(["data", "build", "--config", config, "packing.max_seq_len=128"])
    capsys.readouterr()
    entries = listed(capsys)
    rows = [entry for entry in entries if entry["facts"]["kind"] == "rows"]
    assert main(["data", "rm", rows[0]["key"][:8]]) == 0 and len(listed(capsys)) == 2
    assert main(["data", "rm", "--older-than", "1h"]) == 0 and len(listed(capsys)) == 2
    (samples,) = [entry["key"] for entry in entries if entry["facts"]["kind"] == "samples"]
    assert main(["data", "rm", samples]) == 0
    assert "removed 2 of 2" in capsys.readouterr().out
    assert listed(capsys) == []
    main(["data", "build", "--config", config])
    time.sleep(0.01)
    assert main(["data", "rm", "--older-than", "0m"]) == 0
    capsys.readouterr()
    assert listed(capsys) == []
    assert main(["data", "rm", "--all"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm"], "say what to remove"),
        (["rm", "abc", "--all"], "say what to remove"),
        (["rm", "abc"], "no entry 'abc'"),
        (["rm", "--older-than", "long"], "'long' is no age"),
    ],
)
def test_what_cannot_be_removed_is_said(config, capsys, words, message):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_bad_rows_end_a_build_with_their_place(config, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n{"input"\n')
    assert main(["data", "build", "--config", config]) == 3
    assert f"{tmp_path}/rows.jsonl:2: not valid JSON" in capsys.readouterr().err


def test_the_data_verbs_do_not_import_torch(config):
    code = f"import sys; from torchmask.cli.main import main; main(['data', 'build', '--config', {config!r}]); " \
        "main(['data', 'ls']); sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
