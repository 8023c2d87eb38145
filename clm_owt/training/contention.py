"""Whether other programs use a run's cores: its threads then wait for a core, and for each other."""

import time
from pathlib import Path

import torch

# Seconds before it is judged, and the share of them that counts as much. Where two programs shared two cores a step on
# two threads took seven times as long.
WINDOW = 10.0
MUCH = 0.5


class Contention:
    """Measures how long the threads of this process are ready to run and get no core, on Linux."""

    def __init__(self) -> None:
        self._began, self._delay = time.monotonic(), run_delay()
        self._said = False

    def warning(self) -> str | None:
        """What to say of the last WINDOW seconds or more, once in a run; None while there is nothing to say."""
        now, delay = time.monotonic(), run_delay()
        if self._said or delay is None or now - self._began < WINDOW:
            return None
        share = (delay - self._delay) / (now - self._began)
        self._began, self._delay = now, delay
        if share < MUCH:
            return None
        self._said = True
        threads = torch.get_num_threads()
        fewer = f", or start with OMP_NUM_THREADS={threads // 2}, since {threads} threads wait for each other"
        return (
            f"other programs use these cores: the threads of this run waited {share:.1f} s in each second for one; "
            f"end those programs{fewer if threads > 1 else ''}"
        )


def run_delay() -> float | None:
    """Seconds that the threads of this process have waited for a core since they began; None where Linux does not
    count them. (Of /proc/<pid>/task/<tid>/schedstat the second number, in nanoseconds.)"""
    try:
        stats = [file.read_text().split() for file in Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(stat[1]) for stat in stats) / 1e9 if stats else None
    except (OSError, IndexError, ValueError):  # a thread that has just ended
        return None
