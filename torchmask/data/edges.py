"""The edges of documents in packs: what an EOS policy makes of their stop tokens, between them and at their ends.

The edges are those of docs/packing.md. E1 is applied here to samples that no tokenizer's policy has seen; E2, the
prediction of the next document's first token, and virtual stop tokens, which are labels without a slot, are facts about
fragments and not about tokens. E3 and E6 are never trained and need no code; E5 is `Fragments.continues`.

Legend: N samples, S tokens of all samples, F fragments.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from torchmask.data.eos import EosPolicy
from torchmask.data.fragments import Bools, Fragments, Integers, Targets
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError
from torchmask.messages import MaskFlag


def policy_of(eos: EosPolicy | str | Mapping[str, Any] | None, samples: Samples) -> EosPolicy:
    """The policy that packs ask for: a whole one, the name of a preset, some of the fields on top of the policy that
    the samples were made with, or None = that one.

    Raises:
        ConfigError: as `EosPolicy`.
    """
    if eos is None:
        return samples.eos
    return EosPolicy.of({**asdict(samples.eos), **eos} if isinstance(eos, Mapping) else eos)


def apply_stop_policy(samples: Samples, policy: EosPolicy) -> Samples:
    """The samples with their stop tokens trained as the policy says (E1); themselves where it says nothing new.

    Rows that a tokenizer made have had their policy applied, to every turn. Of other samples only the token that ends
    each document is known (`Samples.stops`), so only that one changes.

    Raises:
        ConfigError: C09, another policy for stop tokens than the rows were tokenised with.
    """
    made = samples.eos
    changes = [
        f"{name} {getattr(policy, name)}"
        for name in ("train_on_eos", "train_on_eot", "weight")
        if getattr(policy, name) != getattr(made, name)
    ]
    if not changes:
        return samples
    if samples.rule_names:
        raise ConfigError(
            "C09",
            f"the rows were tokenised with another EOS policy than the packs ask for: {', '.join(changes)}",
            fix="set eos or eos_policy in the dataset; packs take it from there",
        )
    places = (samples.offsets[:-1] + samples.stops)[samples.stops >= 0]
    mask = samples.mask.copy()
    weights = None if samples.weights is None else samples.weights.copy()
    if policy.train_on_eos == "none":
        mask[places] |= np.uint8(MaskFlag.LOSS)
    elif policy.train_on_eos == "all":
        mask[places] &= np.uint8(~np.uint8(MaskFlag.LOSS))
        if weights is not None:
            weights[places] = np.where(weights[places] == 0, 1, weights[places])
    if policy.weight != 1:
        weights = np.ones(len(mask), np.float32) if weights is None else weights
        weights[places] *= policy.weight
        if policy.weight == 0:
            mask[places] |= np.uint8(MaskFlag.LOSS)
    return replace(samples, mask=mask, weights=weights, eos=policy, home=None)


def make_stops_virtual(
    samples: Samples, fragments: Fragments, targets: Targets, trimmed: Integers
) -> tuple[Fragments, Bools]:
    """Whole documents without a slot for their stop token, which stays the label of the token before it.

    Tokens after the stop (a line break of the chat format) go with it, and are added to `trimmed` ([N], in place). A
    document without a stop, of nothing else, or with targets after it stays as it is.

    Returns:
        the fragments, and [N] bool: whose stop takes no slot.
    """
    stops = samples.stops[fragments.samples].astype(np.int64)
    virtual = (stops >= 1) & (stops < fragments.stops)
    some = targets.count(fragments) > 0
    virtual[some] &= targets.last(fragments.select(some)) <= stops[some]
    np.add.at(trimmed, fragments.samples[virtual], (fragments.stops - stops - 1)[virtual])
    of_document = np.zeros(len(samples), bool)
    of_document[fragments.samples[virtual]] = True
    shorter = replace(
        fragments, stops=np.where(virtual, stops, fragments.stops), continues=fragments.continues | virtual
    )
    return shorter, of_document


def boundaries(samples: Samples, fragments: Fragments, rows: Integers) -> Bools:
    """[F] bool: the last slot of the fragment predicts the first token of the next document in its row (E2).

    So it does where its document has a stop token and ends here, uncut, and the next one begins here. In a tree the
    next document is the next in depth-first order, whose first token is that of the tree.

    Args:
        fragments: in the order of the rows.
        rows: [R + 1] int64, the first fragment of each row.
    """
    stops = samples.stops[fragments.samples]
    ends = (stops >= 0) & (stops < fragments.stops) & ~fragments.continues
    # Tokens that were trimmed changed no loss; those that were cut off did.
    begins = (fragments.starts == 0) | fragments.keeps_first
    result = np.zeros(len(fragments), bool)
    result[:-1] = ends[:-1] & begins[1:]
    result[rows[1:] - 1] = False
    return result
