"""Llamas as Meta publishes them: params.json, and consolidated.00.pth or several for tensor-parallel inference.

Two things differ from the Hub's layout beyond names. Every file holds its part of each matrix, along one dimension or
the other: the shapes tell which, as all parts together make our parameter (Llama 2 cuts the embedding by columns,
Llama 3 by rows). And rotary positions turn neighbouring channels (2i, 2i + 1) of a head where ours turn channels
(i, i + C/2), so the rows of q and k lie in another order.

Reference: https://github.com/meta-llama/llama-models, models/llama3/model.py (`apply_rotary_emb`, `FeedForward`).

Legend: C head_dim, D embed_dim, N files.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchmask.errors import WeightsError
from torchmask.models.conversions import Layout, Piece, Shape, pattern_of
from torchmask.models.weight_files import FileTensor, open_files
from torchmask.models.weights import heads_differ

DERIVED = ("rope.freqs",)
WEIGHT_NAMES = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "layers.{}.attn_norm.weight": "layers.{}.attention_norm.weight",
    "layers.{}.attn.q_proj.weight": "layers.{}.attention.wq.weight",
    "layers.{}.attn.k_proj.weight": "layers.{}.attention.wk.weight",
    "layers.{}.attn.v_proj.weight": "layers.{}.attention.wv.weight",
    "layers.{}.attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "layers.{}.mlp_norm.weight": "layers.{}.ffn_norm.weight",
    "layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
PARAMS_FILE = "params.json"
_COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor", "rope_high_freq_factor")
_OPTIONAL = ("n_kv_heads", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor", "rope_high_freq_factor")
_GET = "take the params.json that was published with these weights"
_ROTATED = ("attn.q_proj.weight", "attn.k_proj.weight")
_REFUSED = {
    "vision_chunk_size": "a model of images, which is out of torchmask's scope",
    "moe_args": "a mixture of experts",
    "quantization_args": "quantised",
    "lora_args": "an adapter",
}


def is_meta_folder(folder: Path) -> bool:
    """Whether the folder is a checkpoint of Meta's, and not one in Hugging Face layout."""
    return (
        (folder / PARAMS_FILE).is_file()
        and not (folder / "config.json").exists()
        and any(folder.glob("consolidated*.pth"))
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json that a folder of Meta's would have.

    What params.json does not say is taken from the tensors (vocabulary, whether the head is the embedding) and from the
    generation it is of (longest sequence, factor of the scaled rope), as the Hub's config.json files have it.

    Raises:
        WeightsError: W05 for a params.json that describes no Llama, W03 or W06 for missing or refused weights.
    """
    params = _read_params(folder / PARAMS_FILE)
    parts = open_parts(folder, params["dim"])
    first = next(iter(parts.values()))
    if "tok_embeddings.weight" not in first or len(first["tok_embeddings.weight"].shape) != 2:
        held = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(first.items())[:5]) or "nothing"
        message = f"no matrix tok_embeddings.weight in {next(iter(parts))}; it holds {held}"
        raise WeightsError("W05", message, where=str(folder), fix="name a folder of a Llama as Meta publishes it")
    return _config(params, list(parts.values()))


def _read_params(file: Path) -> dict[str, Any]:
    try:
        params = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(params, dict):
            raise ValueError("it is not a JSON object")
        unread = [what for key, what in _REFUSED.items() if params.get(key) not in (None, -1)]
        if unread:
            raise ValueError(f"it is {unread[0]}")
        _check_params(params)
    except ValueError as error:
        raise WeightsError("W05", f"params.json describes no Llama: {error}", where=str(file), fix=_GET) from error
    return params


def _check_params(params: dict[str, Any]) -> None:
    for key in (*_COUNTS, *_NUMBERS):
        value, kind = params.get(key), (int if key in _COUNTS else int | float)
        if key not in params and key not in _OPTIONAL:
            raise ValueError(f"it has no {key!r}")
        if value is None and key in _OPTIONAL:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            what = "a whole number above 0" if key in _COUNTS else "a number above 0"
            raise ValueError(f"{key} is {value!r}; it must be {what}")
    vocab_size = params.get("vocab_size", -1)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be a whole number, -1 where the weights say it")
    num_heads, num_kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    if params["dim"] % num_heads:
        raise ValueError(f"n_heads is {num_heads}, which does not divide dim, {params['dim']}")
    if num_heads % num_kv_heads:
        raise ValueError(f"n_kv_heads is {num_kv_heads}, which does not divide n_heads, {num_heads}")


def _config(params: dict[str, Any], parts: list[dict[str, FileTensor]]) -> dict[str, Any]:
    dim, num_heads = params["dim"], params["n_heads"]
    vocab_size, (rows, columns) = params.get("vocab_size", -1), parts[0]["tok_embeddings.weight"].shape
    if vocab_size <= 0:
        vocab_size = rows * len(parts) if columns == dim else rows  # cut by rows (or whole), or by columns
    tied = not has_own_head(parts)
    rope_theta, scaled = params.get("rope_theta") or 10_000.0, params.get("use_scaled_rope", False)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": _intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": params.get("n_kv_heads") or num_heads,
        "head_dim": dim // num_heads,
        "max_position_embeddings": 131_072 if scaled else {500_000: 8192, 1_000_000: 16_384}.get(int(rope_theta), 4096),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(rope_theta),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    if scaled:
        # Meta's code has one factor, 8, for all; the Hub has 32 for Llama 3.2's small models, the tied ones.
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor") or (32.0 if tied else 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
            "original_max_position_embeddings": 8192,
        }
    first, last = (128_000, 128_001) if vocab_size == 128_256 else (1, 2)
    return {**config, "bos_token_id": first, "eos_token_id": last}


def has_own_head(parts: list[dict[str, FileTensor]]) -> bool:
    """Whether any file's part of the head differs from its part of the embedding; all rows are compared.

    Where the two are cut along different dimensions they count as two: no published model that ties them is.
    """
    return any(heads_differ(part.get("output.weight"), part.get("tok_embeddings.weight")) for part in parts)


def _intermediate_size(params: dict[str, Any]) -> int:
    """Two thirds of four times the width, by the model's factor, up to the next multiple.

    >>> _intermediate_size({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3})  # Llama 3 8B
    14336
    """
    size = int(2 * 4 * params["dim"] / 3)
    size = int((params.get("ffn_dim_multiplier") or 1.0) * size)
    return -(-size // params["multiple_of"]) * int(params["multiple_of"])


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, in order.

    Raises:
        WeightsError: W03, one is missing.
    """
    files = sorted(folder.glob("consolidated*.pth"))
    missing = sorted({_file_name(i) for i in range(len(files))} - {file.name for file in files})
    if missing and [file.name for file in files] != ["consolidated.pth"]:
        found = ", ".join(file.name for file in files)
        message = f"{missing[0]} is missing; the folder holds {found}"
        raise WeightsError("W03", message, where=str(folder), fix="download the files that are missing")
    return files


def _file_name(i: int) -> str:
    return f"consolidated.{i:02d}.pth"


def open_parts(folder: Path, dim: int) -> dict[str, dict[str, FileTensor]]:
    """The tensors of each file of a folder, by the file's name, then their own.

    Args:
        dim: D; every file holds an equal part of the D rows of wq, so the first tells how many files there are to be.

    Raises:
        WeightsError: W03, a file is missing; W05, there is one too many; W06 for refused files.
    """
    files = checkpoint_files(folder)
    parts = {file.name: open_files([file]) for file in files}
    query = parts[files[0].name].get("layers.0.attention.wq.weight")
    num_rows, num_columns = query.shape if query is not None and len(query.shape) == 2 else (0, 0)
    if query is None or num_columns != dim or not num_rows or dim % num_rows or dim // num_rows == len(files):
        return parts  # what does not fit otherwise is told by name and shape
    each = f"of the {dim} rows of {query.name} {files[0].name} holds {num_rows}, so there are {dim // num_rows} files"
    found = f"the folder has {', '.join(parts)}"
    if len(files) < dim // num_rows:
        message, fix = f"{_file_name(len(files))} is missing: {each}; {found}", "download the files that are missing"
        raise WeightsError("W03", message, where=str(folder), fix=fix)
    raise WeightsError("W05", f"{each}; {found}", where=str(folder), fix="remove the files of another model")


def join_parts(
    parts: dict[str, dict[str, FileTensor]], hub_layout: Layout, head_dim: int
) -> tuple[dict[str, FileTensor], Layout]:
    """The tensors of all files, by file and name, and where in them our parameters are.

    Args:
        parts: as `open_parts` gives them.
        hub_layout: of the same model in the Hub's files, for the names and shapes of our parameters.
        head_dim: C.
    """
    tensors = {f"{file}: {name}": tensor for file, part in parts.items() for name, tensor in part.items()}
    first = next(iter(parts.values()))
    layout: Layout = {}
    for ours, pieces in hub_layout.items():
        pattern, layer = pattern_of(ours)
        if pattern not in WEIGHT_NAMES:
            continue
        name = WEIGHT_NAMES[pattern].replace("{}", layer)
        whole = tuple(axis.stop for axis in pieces[-1].ours)
        part = first[name].shape if name in first else whole
        rotated = head_dim if ours.endswith(_ROTATED) else None
        layout[ours] = _pieces([f"{file}: {name}" for file in parts], whole, part, rotated)
    read = {piece.hub for pieces in layout.values() for piece in pieces}
    names = {hub.split(": ")[1] for hub in read}
    # What several files hold alike (norms, and keys of fewer heads than files) is read from the first of them.
    return {key: t for key, t in tensors.items() if key in read or key.split(": ")[1] not in names}, layout


def _pieces(hubs: list[str], whole: Shape, part: Shape, head_dim: int | None) -> tuple[Piece, ...]:
    """A parameter out of N files that hold parts of equal shape, each a stretch of one dimension.

    Args:
        hubs: the tensor's name in each of them.
        whole: shape of our parameter.
        part: shape in each file.
        head_dim: C where the rows of each head are in the order of Meta's rope.
    """
    cut_dims = [dim for dim, (all_of_it, some) in enumerate(zip(whole, part)) if all_of_it != some]
    dim = cut_dims[0] if cut_dims else 0
    size = min(part[dim], whole[dim])
    num_parts = max(1, whole[dim] // size)
    hubs = hubs[:: max(1, len(hubs) // num_parts)]  # parts that several files hold alike
    if len(part) != len(whole) or len(cut_dims) > 1 or num_parts != len(hubs) or size * num_parts != whole[dim]:
        num_parts, size = 1, whole[dim]  # they do not fit: asked for whole, the shapes will be told
    everything = tuple(range(length) for length in whole)
    pieces = []
    for i in range(num_parts):
        box = list(everything)
        box[dim] = range(i * size, (i + 1) * size)
        theirs = list(everything)
        theirs[dim] = range(size)
        pieces.append(Piece(hubs[i], tuple(box), tuple(theirs)))
    return tuple(pieces) if head_dim is None else tuple(p for piece in pieces for p in _by_halves(piece, head_dim))


def _by_halves(piece: Piece, head_dim: int) -> list[Piece]:
    """Whole heads whose channel pairs are neighbours, as two pieces a head: first of each pair, then second."""
    rows, half = piece.ours[0], head_dim // 2
    halves = []
    for start in range(0, len(rows), head_dim):
        for i in (0, 1):
            own = range(rows.start + start + i * half, rows.start + start + (i + 1) * half)
            theirs = range(start + i, start + head_dim, 2)
            halves.append(replace(piece, ours=(own, *piece.ours[1:]), theirs=(theirs, *piece.theirs[1:])))
    return halves
