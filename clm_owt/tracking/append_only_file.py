"""Files that a run appends to, on a disk that may be full for a while."""

from collections.abc import Callable
from pathlib import Path


class AppendOnlyFile:
    """A text file that grows by whole pieces. What the disk has no room for is kept in memory, and tried again with
    the next piece and at the end. `say` prints a line to the terminal."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path = path
        self._say = say
        self._waiting = b""

    def write(self, piece: str) -> None:
        """Append a piece. The first of several failures is announced, none is raised."""
        announced = bool(self._waiting)
        self._waiting += piece.encode()
        error = self.flush()
        if error and not announced:
            self._say(f"{self.path} cannot be written ({error.strerror}): its new lines wait in memory")

    def flush(self) -> OSError | None:
        """Append all that waits, or nothing; gives the error that was in the way."""
        if not self._waiting:
            return None
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    left = memoryview(self._waiting)
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            return error
        self._waiting = b""
        return None
