"""What torchmask does not read, told by name: families of another kind, and quantised checkpoints."""

from collections.abc import Collection
from typing import Any

from torchmask.errors import WeightsError

_RECURRENT = """
    bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax nemotron_h
    olmo_hybrid plamo2 qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv rwkv5 rwkv6 rwkv7 xlstm zamba
    zamba2
"""
_MULTIMODAL = """
    aria aya_vision blip_2 chameleon cohere2_vision deepseek_vl deepseek_vl_v2 emu3 florence2 fuyu gemma3 gemma3n gemma4
    glm4v glm4v_moe got_ocr2 granite_speech idefics idefics2 idefics3 instructblip internvl internvl_chat janus kosmos-2
    llama4 llava llava_next llava_next_video llava_onevision minicpmv mistral3 mllama molmo molmo2 ovis2 paligemma
    perception_lm phi3_v phi4_multimodal phi4mm pixtral qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe
    qwen3_omni_moe qwen3_vl qwen3_vl_moe smolvlm video_llava vipllava voxtral
"""
_NOT_DECODERS = """
    albert bart bert bigbird_pegasus deberta deberta-v2 distilbert electra longt5 m2m_100 marian mbart modernbert mpnet
    mt5 pegasus roberta switch_transformers t5 t5gemma umt5 whisper xlm-roberta
"""
_KINDS = {
    "is recurrent or a hybrid with linear attention, which is out of torchmask's scope": _RECURRENT,
    "is a model of images, sound or video too, which is out of torchmask's scope": _MULTIMODAL,
    "is an encoder or has one, and torchmask is for decoders": _NOT_DECODERS,
}
_TEXT_ALONE = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe"}
_FRIENDS = ("vision_config", "audio_config", "speech_config", "vision_tower", "mm_vision_tower")
_STATES = ("ssm_cfg", "mamba_d_state", "mamba_d_conv", "state_size", "linear_conv_kernel_dim")


def out_of_scope(config: dict[str, Any], known: Collection[str] = ()) -> str | None:
    """Why a family that torchmask does not know will not be known, as the end of a sentence; None = it might be one.

    Told by name, and of other names by the keys that only such configurations have.

    Args:
        config: the content of a config.json.
        known: the types that torchmask knows, which the text part of a model of images may be of.

    >>> out_of_scope({"model_type": "mamba"})
    "is recurrent or a hybrid with linear attention, which is out of torchmask's scope"
    """
    model_type = config.get("model_type")
    recurrent, multimodal, encoder = _KINDS
    for kind, names in _KINDS.items():
        if model_type in names.split():
            inner = config.get("text_config")
            said = inner.get("model_type") if isinstance(inner, dict) else None
            text = said if said in known else _TEXT_ALONE.get(str(model_type))
            return f"{kind}; its text part alone, saved as a {text!r}, is within it" if text else kind
    layer_types = config.get("layer_types")
    if any(key in config for key in _FRIENDS):
        return multimodal
    if any(key in config for key in _STATES) or (isinstance(layer_types, list) and "linear_attention" in layer_types):
        return recurrent
    return encoder if config.get("is_encoder_decoder") else None


def refuse_quantised(config: dict[str, Any], where: str) -> None:
    """Raises if config.json says that the weights are quantised in a way that is not read.

    Raises:
        WeightsError: W11 with the method's name.
    """
    quantised = config.get("quantization_config") or config.get("compression_config")
    if not quantised:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method is None and isinstance(quantised, dict) and {"load_in_4bit", "load_in_8bit"} & quantised.keys():
        method = "bitsandbytes"
    if method == "mxfp4":
        return
    raise WeightsError(
        "W11",
        f"the weights are quantised by {method or 'an unnamed method'}; read are fp64, fp32, fp16, bf16 and MXFP4",
        where=where,
        fix="get the checkpoint from before it was quantised, or dequantise it with the library that made it",
    )
