"""`torchmask prove --config NAME|PATH`: that packing changes no loss and no gradient, shown on the user's own data.

The same documents go through a small random model in fp64 three times: one a row, packed flat, and packed with shared
prefixes, with the reference attention and with the one that training uses on a CPU. A certificate says what was
measured and on what, by hashes, so that it can be made again.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import torchmask
from torchmask.cli.open_config import DataConfig
from torchmask.data.inspection import segments_of
from torchmask.data.packing import PackedDataset, Placement
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError

NLL_BOUND, GRADIENT_BOUND = 1e-12, 1e-10
"""Property P3: the largest difference of one target's loss, and of a gradient's entry relative to the largest entry."""

LEAK_TESTS = 16
"""About so many for each kind of rows, spread over them."""
MAX_LOGITS = 2**31
"""Above so many logits in all, the model's vocabulary is the ids in use, renumbered: packing cannot tell."""

Integers = npt.NDArray[np.int64]


class Layout(NamedTuple):
    """One way to lay the documents out: its name, its rows, or why there are none."""

    name: str
    rows: PackedDataset | None
    why_not: str = ""


def prove(data: DataConfig, *, num_documents: int, output: str, seed: int = 0) -> int:
    """Measures, prints a table and writes the certificate.

    Args:
        data: the configuration's data.
        num_documents: how many documents, drawn by `seed`.
        output: the certificate's file.
        seed: of the documents and the model's weights.

    Returns:
        0 where all bounds hold, 1 where one does not.
    """
    chosen = draw_documents(data, num_documents, seed)
    layouts = lay_out(data, chosen)
    renumbered, vocab_size = _vocabulary(chosen, data.tokenizer.vocab_size)
    results, model_config = _measure(layouts, renumbered, vocab_size, seed)
    holds = all(result["holds"] for result in results)
    certificate = {
        "holds": holds,
        "bounds": {"nll": NLL_BOUND, "gradient": GRADIENT_BOUND, "leaks": 0},
        "results": results,
        "not_measured": {layout.name: layout.why_not for layout in layouts if layout.why_not},
        "documents": {"count": len(chosen), "of": len(data.samples), "tokens": len(chosen.tokens), "seed": seed},
        "model": {**model_config, "dtype": "fp64", "ids": "in use, renumbered" if renumbered is not None else "all"},
        **_identity(data, chosen),
    }
    Path(output).write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_table(results, len(chosen), len(data.samples)))
    for layout in layouts:
        if layout.why_not:
            print(f"{layout.name} rows were not measured: {layout.why_not}")
    print(f"{'all bounds hold' if holds else 'A BOUND IS MISSED'}; certificate: {output}")
    return 0 if holds else 1


def draw_documents(data: DataConfig, count: int, seed: int) -> Samples:
    """So many of the documents that are in the packs, in about eight runs of neighbours, which often begin alike."""
    packs = data.packs
    kept = sorted({placement.sample for i in range(len(packs)) for placement in packs.documents(i)})
    size = max(1, count // 8)
    runs = np.random.default_rng(seed).permutation(-(-len(kept) // size))
    drawn = [i for run in runs.tolist() for i in range(run * size, min((run + 1) * size, len(kept)))][:count]
    return packs.samples.select([kept[i] for i in sorted(drawn)])


def lay_out(data: DataConfig, samples: Samples) -> list[Layout]:
    """The documents one a row, flat and shared, cut as the configuration cuts them."""
    options: dict[str, Any] = {"epoch_repack": False}
    strategy = data.packing["strategy"]
    if strategy == "split":  # cuts at row ends, so each layout would cut elsewhere
        options["over_length"] = "split" if data.packing["over_length"] == "error" else data.packing["over_length"]
    flat = "best_fit" if strategy in ("none", "split") else strategy
    unshared = {**options, "share_prefixes": False, "max_share": None}
    layouts = [
        Layout("one a row", data.pack(samples, strategy="none", **unshared)),
        Layout("flat", data.pack(samples, strategy=flat, **unshared)),
    ]
    try:
        tree = flat if flat in ("best_fit", "first_fit") else "best_fit"
        layouts.append(Layout("shared", data.pack(samples, strategy=tree, share_prefixes=True, **options)))
    except ConfigError as error:  # what the configuration asks for does not go with trees
        layouts.append(Layout("shared", None, error.message))
    return layouts


def target_keys(rows: PackedDataset, i: int) -> Integers:
    """[T] int64: document and place of the token that each slot predicts; -1 where it predicts another document's.

    The prediction of the next document's first token (edge E2) belongs to no document, so it is in no comparison.
    """
    keys = np.full(len(rows[i].tokens), -1, np.int64)
    for placement in rows.documents(i):
        size = placement.stop - placement.start
        following = np.arange(placement.start + 1, placement.stop + 1)
        own = following < rows.samples.lengths[placement.sample]
        keys[placement.slot : placement.slot + size] = np.where(own, (placement.sample << 32) + following, -1)
    return keys


def leak_tests(placements: Sequence[Placement], num_slots: int) -> list[tuple[Integers, Integers]]:
    """For each stretch of a row's documents: its slots, and the slots that nothing in it may reach.

    Those are all but its own and, for a prefix that documents share, those of the documents behind it.
    """
    segments = segments_of(placements)
    tests = []
    for i, segment in enumerate(segments):
        last = i
        while last + 1 < len(segments) and segments[last + 1].depth > segment.depth:
            last += 1
        end = segments[last].slot + segments[last].stop - segments[last].start
        watched = np.concatenate([np.arange(segment.slot), np.arange(end, num_slots)])
        if len(watched):
            tests.append((np.arange(segment.slot, segment.slot + segment.stop - segment.start), watched))
    return tests


def _vocabulary(samples: Samples, vocab_size: int) -> tuple[Integers | None, int]:
    """New ids by old ones and how many there are; None where the whole vocabulary can be afforded."""
    size = max(vocab_size, int(samples.tokens.max(initial=0)) + 1)
    if len(samples.tokens) * size <= MAX_LOGITS:
        return None, size
    used = np.unique(samples.tokens)
    new = np.zeros(size, np.int64)
    new[used] = np.arange(len(used))
    return new, len(used)


def _measure(
    layouts: Sequence[Layout], new_ids: Integers | None, vocab_size: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One result for each layout and attention backend, and the model's configuration."""
    from torchmask.evaluation.proof import compare, count_leaks, measure
    from torchmask.models import from_config

    longest = max(layout.rows.max_seq_len for layout in layouts if layout.rows is not None)
    config = _tiny_model(vocab_size, longest)
    model = from_config(config, dtype="fp64", seed=seed)
    results, reference = [], None
    for backend in ("dense", "sdpa"):
        model.attention = backend
        for layout in layouts:
            if layout.rows is None:
                continue
            batches = [_batch(layout.rows, i, new_ids) for i in range(len(layout.rows))]
            keys = [target_keys(layout.rows, i) for i in range(len(layout.rows))]
            measured = measure(model, zip(batches, keys))
            reference = reference or measured
            apart = compare(reference, measured)
            tested = leaks = 0
            if backend == "dense":
                for i, batch in enumerate(batches):
                    tests = leak_tests(layout.rows.documents(i), batch.tokens.shape[1])
                    tests = tests[:: -(-len(tests) * len(batches) // LEAK_TESTS) or 1]
                    leaks += count_leaks(model, batch, tests, vocab_size=vocab_size, seed=seed)
                    tested += len(tests)
            fits = apart.nll <= NLL_BOUND and apart.gradient <= GRADIENT_BOUND
            results.append(
                {
                    "layout": layout.name,
                    "attention": backend,
                    "rows": len(layout.rows),
                    "slots": int(layout.rows.row_lengths.sum()),
                    "targets": len(measured.keys),
                    "max_nll_difference": apart.nll,
                    "max_gradient_difference": apart.gradient,
                    "targets_missing": apart.num_missing,
                    "leak_tests": tested,
                    "leaks": leaks,
                    "holds": fits and not leaks and not apart.num_missing,
                }
            )
    return results, config


def _tiny_model(vocab_size: int, max_seq_len: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": max_seq_len,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def _batch(rows: PackedDataset, i: int, new_ids: Integers | None) -> Any:
    """A row as a batch of its own, its ids renumbered where the model has fewer."""
    from dataclasses import replace

    from torchmask.data import collate

    pack = rows[i]
    if new_ids is not None:
        labels = np.where(pack.labels >= 0, new_ids[np.maximum(pack.labels, 0)], pack.labels)
        pack = replace(pack, tokens=new_ids[pack.tokens].astype(np.int32), labels=labels.astype(np.int32))
    return collate([pack])


def _table(results: Sequence[Mapping[str, Any]], count: int, total: int) -> str:
    lines = [f"{count:,} of {total:,} documents, a random model in fp64; differences from one document a row (dense)"]
    head = ("rows", "attention", "number", "slots", "targets", "max |nll diff|", "max |grad diff|", "leaks", "")
    table = [head]
    for r in results:
        leaks = f"{r['leaks']} of {r['leak_tests']}" if r["leak_tests"] else "-"
        numbers = (f"{r['rows']:,}", f"{r['slots']:,}", f"{r['targets']:,}")
        apart = (f"{r['max_nll_difference']:.1e}", f"{r['max_gradient_difference']:.1e}")
        table.append((r["layout"], r["attention"], *numbers, *apart, leaks, "holds" if r["holds"] else "MISSED"))
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    for row in table:
        cells = (
            cell.ljust(w) if k < 2 or k == len(head) - 1 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths))
        )
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


# What was measured


def _identity(data: DataConfig, samples: Samples) -> dict[str, Any]:
    """Hashes of everything that the result depends on."""
    values = {key: data.values[key] for key in ("tokenizer", data.key)} | {"packing": data.packing}
    folder = Path(data.tokenizer.folder)
    return {
        "config": {"name": data.name, "recipe": data.recipe, "sha256": _sha256(_canonical(values))},
        "tokenizer": {"folder": folder.name, "files": _file_hashes(folder)},
        "template": _template(data.tokenizer),
        "data": {
            "fingerprint": data.samples.fingerprint,
            "measured": samples.fingerprint,
            "sources": {
                Path(name).name: _file_hash(Path(name)) for name in data.samples.sources if Path(name).is_file()
            },
        },
        "versions": {
            "torchmask": torchmask.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "tokenizers")},
        },
    }


def _template(tokenizer: Any) -> dict[str, Any]:
    """The chat format in use: a native one by name, a folder's own template by hash."""
    if tokenizer.chat_format is not None or not tokenizer.has_chat_format:
        return {"name": tokenizer.chat_format}
    from torchmask.tokenizers.template_files import read_templates

    return {"name": "the tokenizer's own", "sha256": _sha256(_canonical(read_templates(Path(tokenizer.folder))))}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    """Of the files that make a tokenizer: small ones by type, never weights."""
    wanted = ("tokenizer", "vocab", "merges", "special_tokens", "chat_template", "added_tokens")
    return {
        path.name: _file_hash(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.startswith(wanted)
    }


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
