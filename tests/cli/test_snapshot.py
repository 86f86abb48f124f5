from torchmask.cli.main import main


def test_trained_text_stands_in_brackets_with_its_weight(data_config, talks, capsys):
    assert main(["snapshot", "--config", data_config(talks)]) == 0
    out = capsys.readouterr().out
    assert "assistant\n[[Ada<|im_end|>]]\n" in out
    assert "assistant\n[[0.5:Rome ... yes<|im_end|>]]\n" in out
    assert "assistant\nnow<|im_end|>\n" in out
    assert out.startswith("# torchmask snapshot, 3 documents: ")
    assert "## look.yaml.jsonl:1: 4 of" in out


def test_no_folder_of_this_machine_is_in_it(data_config, talks, capsys, tmp_path):
    assert main(["snapshot", "--config", data_config(talks)]) == 0
    assert str(tmp_path) not in capsys.readouterr().out


def test_brackets_of_the_data_are_escaped(data_config, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "[[Paris]] is nice [[x]]"}]}
    ]
    assert main(["snapshot", "--config", data_config(rows)]) == 0
    assert r"[[\[\[Paris\]\] is nice \[\[x\]\]<|im_end|>]]" in capsys.readouterr().out


def test_a_kept_snapshot_that_still_holds_is_unchanged(data_config, talks, tmp_path, capsys):
    config, kept = data_config(talks), str(tmp_path / "kept.md")
    assert main(["snapshot", "--config", config, "-n", "2", "-o", kept]) == 0
    assert main(["snapshot", "--config", config, "--check", kept]) == 0
    assert "unchanged" in capsys.readouterr().out


def test_a_changed_mask_is_shown_as_a_diff_and_fails(data_config, talks, tmp_path, capsys):
    config, kept = data_config(talks), str(tmp_path / "kept.md")
    assert main(["snapshot", "--config", config, "-n", "2", "-o", kept]) == 0
    assert main(["snapshot", "--config", config, "--check", kept, "dataset.roles_to_train=[user]"]) == 1
    out = capsys.readouterr().out
    assert "-[[Ada<|im_end|>]]" in out and "+Ada<|im_end|>" in out and "+[[Who?<|im_end|>]]" in out


def test_what_is_no_snapshot_is_refused(data_config, talks, tmp_path, capsys):
    config = data_config(talks)
    assert main(["snapshot", "--config", config, "--check", str(tmp_path / "none.md")]) == 2
    assert "make it: `torchmask snapshot" in capsys.readouterr().err
    (tmp_path / "other.md").write_text("hello")
    assert main(["snapshot", "--config", config, "--check", str(tmp_path / "other.md")]) == 2
    assert "is no snapshot" in capsys.readouterr().err
