"""The recipe finetune given bad input: an exit code of its class, a message that names the place, nothing trained."""

import json
import shutil

import pytest
import torch
from recipe_runs import ONE_STEP, RESUME, dataset_of, run_here, write_rows

from torchmask.models import from_config, from_pretrained, save_pretrained


def test_an_empty_dataset(fails, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    fails(dataset_of(tmp_path / "empty.jsonl"), code=3, match=r"D05.*empty\.jsonl")


def test_a_row_without_the_columns_lists_those_found(fails, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    match = r"D04.*odd\.jsonl:1.*question.*reply"
    fails(dataset_of(tmp_path / "odd.jsonl", "instruct_dataset"), code=3, match=match)


def test_a_row_longer_than_max_seq_len(fails):
    match = r"D09.*row \d+ of .*train\.jsonl has \d+ tokens, max_seq_len is 40.*truncate, split or drop"
    fails("packing.max_seq_len=40", code=3, match=match)


def test_no_trained_token_at_all_stops_before_training(fails, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]
    write_rows(tmp_path / "none.jsonl", rows)
    fails(dataset_of(tmp_path / "none.jsonl"), code=3, match="D11")


def test_an_unknown_key_is_named_with_the_nearest(fails):
    fails("bach_size=4", code=2, match=r"C0[12].*bach_size.*batch_size")


def test_choices_are_checked_before_anything_is_read(fails, tmp_path):
    wrong = ["packing.strategy=bestfit", "dtype=bf61", "bf16_updates=none", "packing.over_length=cut"]
    text = fails(*wrong, code=2, match=r"C03.*did you mean best_fit")
    assert text.count("error[C03]") == 4 and not (tmp_path / "out").exists()


def test_another_runs_output_folder(workplace, tmp_path, capfd, unbroken):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert run_here(workplace, copy) == 2
    assert "already holds a run" in capfd.readouterr().err


def test_a_truncated_weight_file_is_named(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    fails(f"model.folder={base}", code=4, match=r"W01.*model\.safetensors")


def test_a_missing_weight_file(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    (base / "model.safetensors").unlink()
    fails(f"model.folder={base}", code=4, match=r"W03.*model\.safetensors")


def test_weights_of_another_shape_name_the_tensor(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    match = r"W05.*mlp\.gate_proj\.weight: the file has \[64, 32\], the model \[48, 32\]"
    fails(f"model.folder={base}", code=4, match=match)


def test_an_unknown_family_lists_the_known(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    (base / "config.json").write_text('{"model_type": "rwkv"}')
    fails(f"model.folder={base}", code=4, match=r"'rwkv'.*known: .*llama")


def test_the_tokenizer_of_another_model(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    config = {**json.loads((base / "config.json").read_text()), "vocab_size": 100}
    save_pretrained(from_config(config), base)
    fails(f"model.folder={base}", code=4, match=r"D15.*100 embeddings")


def test_the_validation_rows_are_checked_against_the_vocabulary_too(fails, workplace, tmp_path):
    config = {**json.loads((workplace / "base/config.json").read_text()), "vocab_size": 200}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = f"model={{_component_: torchmask.models.from_config, config: {tmp_path}/config.json}}"
    folder = f"tokenizer.folder={workplace}/base"
    for name, text in (("low", "aaaa"), ("high", "a a a")):  # the blank is the byte-level token 220
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text * 5}])
    train, val = (
        dataset_of(f"{tmp_path}/{name}.jsonl, add_eos: false", "text_completion_dataset", key=key)
        for name, key in (("low", "dataset"), ("high", "dataset_val"))
    )
    fails(model, folder, train, val, *ONE_STEP, code=4, match="D15.*200 embeddings")


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_a_clip_norm_that_would_not_clip_is_refused(fails, value):
    fails(f"clip_grad_norm={value}", code=2, match="C13.*clip_grad_norm")


def test_a_missing_question_file_is_found_before_anything_is_tokenised(fails, tmp_path):
    source = f"evaluate={{source: {tmp_path}/none.json}}"
    fails(source, code=3, match=r"D05.*none\.json")


def test_a_configuration_cannot_name_what_writes_files(fails, tmp_path):
    target = tmp_path / "canary"
    writers = ("models.weights.save_weights", "models.save_pretrained", "training.loss_png", "training.write_record")
    for name in writers:
        component = f"metric_logger={{_component_: torchmask.{name}, folder: {target}}}"
        fails(component, code=2, match="C07.*refused")
    assert not target.exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    model = from_pretrained(base)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)  # finite, as files must be, and too large for a product
    save_pretrained(model, base)
    fails(f"model.folder={base}", code=5, match=r"R01.*step 1.*not updated")


def test_resuming_with_another_optimizer_shows_the_difference(workplace, tmp_path, capfd, unbroken):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert run_here(workplace, copy, RESUME, "optimizer.lr=0.5") == 2
    assert "0.5" in capfd.readouterr().err
