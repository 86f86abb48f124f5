"""The rows of one optimizer step out of a stream, when it may end or fail on some devices and not on others."""

from dataclasses import dataclass
from itertools import islice

from torchmask.data.batch import filler
from torchmask.data.layout import Pack
from torchmask.data.streaming import PackedStream
from torchmask.errors import TorchmaskError


@dataclass(frozen=True, eq=False)
class StepRows:
    """What a device takes in a step.

    Attributes:
        packs: as many as were wanted; where the stream ends the last ones are fillers without targets, so that all
            devices take the same number of micro-batches until none has a row.
        num_rows: how many are no fillers.
        problem: what is wrong with the data; then all are fillers, and the devices have to end together.
    """

    packs: list[Pack]
    num_rows: int
    problem: TorchmaskError | None = None

    @property
    def is_end(self) -> bool:
        """Whether this device has nothing more to say."""
        return not self.num_rows and self.problem is None


def take_rows(stream: PackedStream, count: int) -> StepRows:
    """The next `count` rows of a stream.

    >>> from torchmask.data import StreamPart
    >>> from torchmask.data.sample import Sample, Samples
    >>> build = lambda source: Samples.from_samples([Sample([1, 5, 2], [1, 0, 0]) for row in source])
    >>> taken = take_rows(PackedStream([StreamPart(build, [{"n": 1}])], max_seq_len=4), 2)
    >>> [pack.tokens.tolist() for pack in taken.packs], taken.num_rows
    ([[1, 5, 2], [0]], 1)
    """
    try:
        packs = list(islice(stream, count))
    except TorchmaskError as problem:
        return StepRows([filler()] * count, 0, problem)
    return StepRows(packs + [filler()] * (count - len(packs)), len(packs))
