import json

from torchmask.cli.main import main

LONGER = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so"}]}


def counts(words, capsys):
    code = main(["diff", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_equal_configurations_have_no_difference(data_config, talks, capsys):
    config = data_config(talks)
    assert main(["diff", config, config]) == 0
    assert "no difference: 3 documents" in capsys.readouterr().out


def test_an_override_alone_is_compared_with_the_configuration_itself(data_config, talks, capsys):
    code, found = counts([data_config(talks[:2]), "dataset.masking_strategy=train_on_all"], capsys)
    assert code == 1 and found["differing"] == found["documents"] == 2
    assert found["only_second_trains"] == found["trained"] > 0 and found["only_first_trains"] == 0
    assert found["ids"] == found["weights"] == found["hidden"] == 0


def test_weights_and_hidden_tokens_are_told_apart_from_training(data_config, talks, capsys):
    config = data_config(talks[:1])
    lighter = "dataset.spans=[{regex: Ada, weight: 0.5}]"
    _, found = counts([config, lighter], capsys)
    assert found["weights"] > 0 and found["trained"] == found["hidden"] == 0
    _, found = counts([config, "dataset.spans=[{regex: Ada, visible: false}]"], capsys)
    assert found["hidden"] > 0 and found["trained"] == found["weights"] == 0
    [example] = found["examples"]
    assert example["row"].endswith(":1") and len(example["first"]["tokens"]) == found["hidden"]


def test_weights_that_only_one_of_them_has_but_that_are_one_are_no_difference(data_config, talks, capsys):
    config = data_config(talks[:1])
    code, found = counts([config, "dataset.spans=[{regex: Ada, weight: 1.0}]"], capsys)
    assert code == 0 and found["differing"] == 0


def test_other_ids_are_counted_by_document(data_config, talks, capsys):
    first = data_config(talks, name="a.yaml")
    code, found = counts([first, "dataset.new_system_prompt=Be brief."], capsys)
    assert code == 1 and found["ids"] == 3 and found["trained"] == 0
    assert found["examples"][0]["what"] == "ids differ"


def test_documents_of_one_of_them_are_counted(data_config, talks, capsys):
    config = data_config(talks)
    code, found = counts([config, "dataset.max_rows=2"], capsys)
    assert code == 1 and (found["only_first"], found["only_second"], found["documents"]) == (1, 0, 2)


def test_examples_show_both_sides(data_config, talks, capsys):
    assert main(["diff", data_config(talks[:1]), "dataset.masking_strategy=train_on_all"]) == 1
    out = capsys.readouterr().out
    assert "tokens trained by the second only" in out
    assert "  - Who?<|im_end|>⏎" in out and "  + [[Who?<|im_end|>]]⏎" in out


def test_overrides_change_both_of_two_configurations(data_config, talks, capsys):
    configs = [data_config(talks, name=name) for name in ("a.yaml", "b.yaml")]
    _, found = counts([*configs, "dataset.max_rows=1"], capsys)
    assert found["only_first"] == found["only_second"] == 1  # their sources have different names


def test_one_configuration_without_overrides_is_refused_with_the_form(data_config, talks, capsys):
    assert main(["diff", data_config(talks)]) == 2
    assert "torchmask diff A.yaml B.yaml" in capsys.readouterr().err
