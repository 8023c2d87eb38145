"""What a run says while it waits for data."""

from types import SimpleNamespace

from clm_owt.data import builder


def test_each_wait_is_said_by_itself_once_it_passes_two_seconds(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(builder.time, "monotonic", lambda: now[0])
    idle = SimpleNamespace(check=lambda waiting_for: None, new_lines=list)
    check = builder.WaitingCheck(SimpleNamespace(check=lambda: None), idle, lambda *lines: said.extend(lines))

    def wait(what: str, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            check(what)
            now[0] += 0.1

    wait("the tokenizer", 1.5)
    assert said == []
    wait("the validation blocks", 11)
    assert said == [f"waiting for the validation blocks: {seconds} s so far" for seconds in (2, 10)]
    wait("shard 0 of the training blocks", 3)
    assert said[2:] == ["waiting for shard 0 of the training blocks: 2 s so far"]
    now[0] += 60  # training
    wait("shard 0 of the training blocks", 1.5)
    assert len(said) == 3
