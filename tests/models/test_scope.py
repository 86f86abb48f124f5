"""What is refused, by name and with a way out."""

import json

import pytest

from torchmask.models import from_config, from_pretrained, load_pretrained, save_pretrained

TINY = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
RECURRENT, IMAGES, ENCODER, UNKNOWN = "linear attention", "images", "encoder", "not a family torchmask knows"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        *(
            ({"model_type": name}, RECURRENT)
            for name in ("mamba", "jamba", "qwen3_next", "falcon_h1", "granitemoehybrid")
        ),
        *(({"model_type": name}, IMAGES) for name in ("llava", "qwen2_vl", "gemma3", "mllama", "llama4")),
        *(({"model_type": name}, ENCODER) for name in ("bert", "t5", "deberta-v2")),
        ({"model_type": "new_vl", "vision_config": {}}, IMAGES),
        ({"model_type": "new_hybrid", "layer_types": ["full_attention", "linear_attention"]}, RECURRENT),
        ({"model_type": "new_state_space", "mamba_d_state": 16}, RECURRENT),
        ({"model_type": "new_translator", "is_encoder_decoder": True}, ENCODER),
        ({"model_type": "new"}, UNKNOWN),
        (
            {"model_type": "gemma3"},
            "out of torchmask's scope; its text part alone, saved as a 'gemma3_text', is within",
        ),
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "saved as a 'qwen3',"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "saved as a 'ministral3',"),
    ],
)
def test_families_of_another_kind_are_told_what_they_are(config, reason):
    with pytest.raises(ValueError, match=rf"{config.get('model_type')}.*{reason}.*known: .*llama") as caught:
        from_config({**TINY, "model_type": None, **config})
    assert caught.value.id == "W10"


@pytest.mark.parametrize(("typo", "meant"), [("llamma", "llama"), ("lama", "llama"), ("Qwen3", "qwen3")])
def test_a_misspelt_type_is_told_with_the_name_that_may_have_been_meant(typo, meant):
    with pytest.raises(ValueError, match=rf"fix: did you mean '{meant}'\? .*docs/families\.md, 'Adding a family'"):
        from_config({**TINY, "model_type": typo})


def test_a_type_that_is_like_no_other_is_told_how_to_add_it():
    with pytest.raises(ValueError, match=r"fix: use a model of a known family, or add its own: docs/families\.md"):
        from_config({**TINY, "model_type": "new"})


@pytest.mark.parametrize("missing", [{"model_type": None}, {}])
def test_a_missing_type_is_told_as_missing(missing):
    content = {**{key: value for key, value in TINY.items() if key != "model_type"}, **missing}
    with pytest.raises(ValueError, match=r"model_type is missing; known: .*\n  fix: take the config\.json that was"):
        from_config(content)


@pytest.mark.parametrize(
    ("quantised", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 3}, "an unnamed method"),
    ],
)
def test_quantised_checkpoints_are_refused_by_the_methods_name(tmp_path, quantised, method):
    model = from_config(TINY)
    save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "quantization_config": quantised}))
    for load in (from_pretrained, lambda folder: load_pretrained(model, folder)):
        with pytest.raises(ValueError, match=rf"(?s)quantised by {method};.*fix: get the checkpoint") as caught:
            load(tmp_path)
        assert caught.value.id == "W11"


def test_what_was_read_from_mxfp4_is_exported_as_what_it_became(tmp_path):
    save_pretrained(from_config({**TINY, "quantization_config": {"quant_method": "mxfp4"}}), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    from_pretrained(tmp_path)
