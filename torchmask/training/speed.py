"""How fast a run goes, from one look to the next."""

import time

from torchmask.training.metrics import peak_memory_gib, token_rates
from torchmask.training.run import Run


class Speed:
    """Counts tokens and seconds from one `take` to the next."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.restart()

    def add(self, *, num_tokens: float, num_trained_tokens: float, num_slots: float) -> None:
        """What one optimizer step computed, summed over the ranks."""
        self._tokens += int(num_tokens)
        self._trained += int(num_trained_tokens)
        self._slots += int(num_slots)

    def take(self) -> dict[str, float]:
        """Rates since the last call, and the most memory held so far; counting begins anew."""
        rates = token_rates(
            num_tokens=self._tokens,
            num_trained_tokens=self._trained,
            num_slots=self._slots,
            seconds=time.perf_counter() - self._since,
            world_size=self._run.world_size,
        )
        self.restart()
        return {**rates, "peak_memory_gib": peak_memory_gib(self._run.device)}

    def restart(self) -> None:
        """Forgets what was counted, for instance after time went into something else."""
        self._tokens = self._trained = self._slots = 0
        self._since = time.perf_counter()
