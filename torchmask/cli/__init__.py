"""The `torchmask` command. Nothing here imports torch, OmegaConf or numpy before a verb needs them."""
