import resource
import signal

import pytest

from clm_owt.tracking.append_only_file import AppendOnlyFile


@pytest.fixture
def size_limit():
    """Sets the largest size in bytes to which this process may extend a file, as a full disk does; None: no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python ignores it, but not every runner of it

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, previous)


def test_what_does_not_fit_waits_is_announced_once_and_is_written_in_one_piece_later(tmp_path, size_limit):
    said = []
    file = AppendOnlyFile(tmp_path / "metrics.jsonl", said.append)
    file.write("first\n")
    size_limit(9)
    file.write("second\n")
    file.write("third\n")
    assert file.path.read_text() == "first\n"  # and not the three bytes that fit
    assert said == [f"{file.path} cannot be written (File too large): its new lines wait in memory"]
    assert file.flush().strerror == "File too large"
    size_limit(None)
    file.write("fourth\n")
    assert file.path.read_text() == "first\nsecond\nthird\nfourth\n"
    assert file.flush() is None and len(said) == 1
