"""`torchmask inspect`: the terminal, JSON, SVG; the page is tested where its markup is written."""

import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from torchmask.cli.main import main
from torchmask.cli.open_config import open_config
from torchmask.cli.terminal import document_text, print_indented, trained_style
from torchmask.data.inspection import look_at
from torchmask.data.readable import Readable


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_documents_are_shown_in_signs_where_there_are_no_colours(data_config, talks, capsys):
    assert main(["inspect", "--config", data_config(talks), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "[[Ada<|im_end|>]]⏎" in out
    assert re.search(r"\[\[0.5:.*Rome.*<\|im_end\|>\]\]", out)
    assert "look.yaml.jsonl:1  " in out and "2 of 3 documents" in out


def test_the_view_ends_in_ledger_lengths_and_dead_rows(data_config, talks, capsys):
    assert main(["inspect", "--config", data_config(talks)]) == 0
    out = capsys.readouterr().out
    assert "data: 3 documents of" in out and "documents by length, in tokens" in out
    assert re.search(r"rows that teach nothing\n  all_masked: 1  look.yaml.jsonl:3", out)
    assert main(["inspect", "--config", data_config(talks), "--no-summary"]) == 0
    assert "documents by length" not in capsys.readouterr().out


def test_json_has_a_line_for_each_document_with_its_columns(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["inspect", "--config", config, "--json"]) == 0
    rows = [json.loads(line) for line in lines(capsys)]
    samples = open_config(config).samples
    assert len(rows) == 3
    for row, sample in zip(rows, samples):
        assert row["tokens"] == sample.tokens.tolist() and row["mask"] == sample.mask.tolist()
        assert len(row["weights"]) == len(row["rules"]) == len(sample)
    assert rows[0]["row"].endswith("look.yaml.jsonl:1")
    assert rows[0]["rules"][0] == "bos" and rows[0]["rules"][-3:].count("eos") == 1
    trained = [w for w, flag in zip(rows[1]["weights"], rows[1]["mask"]) if not flag & 1]
    assert set(trained) == {0.5}


def test_json_weights_are_null_where_every_target_has_weight_one(data_config, talks, capsys):
    assert main(["inspect", "--config", data_config(talks[:1]), "--json"]) == 0
    assert json.loads(lines(capsys)[0])["weights"] is None


def test_json_of_packs_has_a_line_for_each_row(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["inspect", "--config", config, "--packs", "--json"]) == 0
    [row] = [json.loads(line) for line in lines(capsys)]
    pack = open_config(config).packs[0]
    for name in ("tokens", "labels", "positions", "visible_until"):
        assert row[name] == getattr(pack, name).tolist()
    assert row["weights"] == pytest.approx(pack.weights.tolist())
    assert [(d["sample"], d["start"], d["parent"]) for d in row["documents"]] == [(0, 0, None), (1, 0, None)]
    assert {"row", "stop", "slot"} <= row["documents"][0].keys()


def test_json_of_a_tree_says_whose_branch_a_document_is(data_config, capsys):
    same = "a long question that both of them begin with, word by word, " * 3
    rows = [
        {"messages": [{"role": "user", "content": same + end}, {"role": "assistant", "content": "yes"}]}
        for end in ("one", "two")
    ]
    data = open_config(data_config(rows))
    from torchmask.data.inspection import pack_line

    line = pack_line(data.pack(share_prefixes=True), 0)
    first, second = line["documents"]
    assert second["parent"] == 0 and second["start"] > 40 and second["slot"] == first["stop"]


def test_a_row_of_the_source_is_chosen_by_number_or_place(data_config, talks, capsys):
    config = data_config(talks)
    for row in ("2", "look.yaml.jsonl:2"):
        assert main(["inspect", "--config", config, "--row", row, "--json"]) == 0
        [line] = lines(capsys)
        assert json.loads(line)["row"].endswith(":2")


def test_a_row_that_is_not_there_is_an_error_with_those_that_are(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["inspect", "--config", config, "--row", "9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[C16] --row: no document comes from row 9") and "jsonl:3" in error
    assert main(["inspect", "--config", config, "--packs", "--row", "1"]) == 2
    assert "packed rows have the numbers 0 to 0" in capsys.readouterr().err


def test_packs_are_shown_with_the_place_of_each_document(data_config, talks, capsys):
    assert main(["inspect", "--config", data_config(talks), "--packs", "--ids", "--no-summary"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"row 0  \d+ of 256 slots · 2 documents", out)
    assert "look.yaml.jsonl:2  slots" in out and "<|im_end|>(2)" in out


def test_errors_overrides_and_trust_are_those_of_a_run(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["inspect", "--config", config, "packing.max_seq_len=four"]) == 2
    assert "error[C03]" in capsys.readouterr().err
    assert main(["inspect", "--config", config, "packing.max_seq_len=8"]) == 3
    assert "error[D09]" in capsys.readouterr().err
    assert main(["inspect", "--config", config, "dataset._component_=os.system"]) == 2
    assert "error[C07]" in capsys.readouterr().err
    assert main(["inspect", "--config", config, "dataset.masking_strategy=train_on_all", "--json", "-n", "1"]) == 0
    assert json.loads(lines(capsys)[0])["mask"].count(0) > 6


def test_a_recipe_without_data_is_refused_by_name(capsys):
    assert main(["inspect", "--config", "generate", "checkpoint_dir=."]) == 2
    assert "recipe generate has no" in capsys.readouterr().err


def test_validation_data_is_looked_at_on_request(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["inspect", "--config", config, "--val"]) == 2
    assert "error[C05] " in capsys.readouterr().err
    words = ["inspect", "--config", config, "--val", "--json", "dataset_val=${dataset}"]
    assert main(words) == 0
    assert len(lines(capsys)) == 3


def test_looking_imports_no_torch(data_config, talks, tmp_path):
    config = data_config(talks)
    words = [["--json"], ["--packs", "--json"], [], ["--html", str(tmp_path / "page.html")]]
    code = "import sys; from torchmask.cli.main import main\n"
    code += "".join(f"assert main({['inspect', '--config', config, *more]!r}) == 0\n" for more in words)
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_picture_is_complete_in_itself(data_config, talks, tmp_path, capsys):
    picture = tmp_path / "mask.svg"
    assert main(["inspect", "--config", data_config(talks), "--svg", str(picture), "--no-summary"]) == 0
    text = picture.read_text(encoding="utf-8")
    assert text.startswith("<svg") and "http://www.w3.org/2000/svg" in text
    assert not re.search(r"url\(\"?http|@font-face|src:", text)
    assert "Ada" in re.sub(r"<[^>]+>\s*", "", text) and "torchmask&#160;inspect" in text


def test_stronger_weights_are_darker_and_negative_ones_red():
    def brightness(weight):
        return sum(trained_style(weight).bgcolor.triplet)

    assert brightness(0.1) > brightness(0.5) > brightness(1) > brightness(2)
    assert trained_style(-1).bgcolor.triplet.red > trained_style(-1).bgcolor.triplet.green


def test_colours_follow_the_mask_token_by_token(data_config, talks):
    data = open_config(data_config(talks))
    document = look_at(data.samples, 1)
    read = Readable(document.tokens.tolist(), data.tokenizer.id_to_piece, data.control)
    text = document_text(document, read)
    coloured = {k for span in text.spans if getattr(span.style, "bgcolor", None) for k in range(span.start, span.end)}
    shown = "".join(text.plain[k] for k in sorted(coloured)).replace(" ", "")
    assert shown == "Rome...yes<|im_end|>"


def test_a_pipe_gets_whole_lines(data_config, talks, capsys):
    data = open_config(
        data_config([{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 80}]}])
    )
    document = look_at(data.samples, 0)
    read = Readable(document.tokens.tolist(), data.tokenizer.id_to_piece)
    console = Console(width=40, force_terminal=False)
    print_indented(console, document_text(document, read, colours=False))
    longest = max(lines(capsys), key=len)
    assert longest.count("word") == 80
