"""How many rows decode at once: fewer after a shortage of memory, and more again when it is over."""

RECOVERY_STEPS = 1000
"""Steps without a shortage after which twice as many rows are tried."""


class DecodeLimit:
    """`rows` at once; starts with the whole batch of `max_rows`."""

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._good_steps = 0

    def ran_out(self, rows: int) -> None:
        """Memory did not suffice for so many rows: half of them from now on."""
        self.rows = -(-rows // 2)
        self._good_steps = 0

    def step_done(self) -> None:
        """A step is over."""
        if self.rows == self._max_rows:
            return
        self._good_steps += 1
        if self._good_steps >= RECOVERY_STEPS:
            self.rows = min(2 * self.rows, self._max_rows)
            self._good_steps = 0
