"""What torchtune's users type, and what to type here."""

_FINETUNE = (
    "full_finetune_single_device",
    "full_finetune_distributed",
)
_LORA = (
    "lora_finetune_single_device",
    "lora_finetune_distributed",
    "lora_finetune_distributed_multi_dataset",
)
_GENERATE = ("generate", "generate_v2", "dev/generate_v2", "dev/generate_v2_distributed")
_NOT_YET = {
    "lora_dpo_single_device": "preference training (DPO)",
    "lora_dpo_distributed": "preference training (DPO)",
    "full_dpo_distributed": "preference training (DPO)",
    "ppo_full_finetune_single_device": "reinforcement learning (PPO)",
    "knowledge_distillation_single_device": "knowledge distillation",
    "knowledge_distillation_distributed": "knowledge distillation",
    "qat_distributed": "quantization-aware training",
    "qat_single_device": "quantization-aware training",
    "qat_lora_finetune_distributed": "quantization-aware training",
    "quantize": "quantization of a checkpoint",
    "eleuther_eval": "evaluation with lm-eval",
    "dev/early_exit_finetune_distributed": "early-exit training",
    "dev/grpo_full_finetune_distributed": "reinforcement learning (GRPO)",
    "dev/async_grpo_full_finetune_distributed": "reinforcement learning (GRPO)",
}


def torchtune_answer(name: str, known: list[str]) -> str | None:
    """What to use instead of a torchtune recipe, or None if the name is not one of torchtune's.

    Args:
        name: as typed.
        known: recipes that exist here.
    """
    options = "--nproc-per-node N " if "distributed" in name else ""
    if name in _FINETUNE:
        return f"one recipe serves one device and many: `torchmask run {options}finetune --config NAME`"
    if name in _LORA:
        return f"LoRA is not there yet; full fine-tuning is `torchmask run {options}finetune --config NAME`"
    if name in _GENERATE:
        return "`torchmask run generate --config NAME`, which runs in one process"
    if name in _NOT_YET:
        return f"{_NOT_YET[name]} is not there yet; `torchmask ls` shows what is: {', '.join(known)}"
    return None
