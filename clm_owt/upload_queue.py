"""Uploads beside the training: one at a time, the newest first, tried again after a failure that may pass."""

import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Before the second and the third attempt, beside the few seconds for which clients themselves repeat some requests.
RETRY_PAUSES = (10.0, 30.0)


class UploadQueue:
    """Hands folders to `upload`, in a thread of its own, at least `interval` seconds after the last success. A newer
    folder replaces one that waits, also for its next attempt.

    upload: gives the line that is said of a success; failed: the line that is said once a folder is given up, and
    whether it is to stay; will_not_pass: whether an error is for good. A folder that has arrived or was replaced is
    removed.
    """

    def __init__(
        self,
        name: str,
        upload: Callable[[Path], str],
        failed: Callable[[Path, Exception], tuple[str, bool]],
        will_not_pass: Callable[[Exception], bool],
        say: Callable[[str], None],
        interval: float = 0.0,
    ):
        self._upload, self._failed, self._will_not_pass, self._say = upload, failed, will_not_pass, say
        self._interval = interval
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._closed = False
        # A daemon, since nothing may keep a stopped run from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def offer(self, folder: Path) -> None:
        """Upload `folder`, which belongs to the queue from here on."""
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting)
            self._waiting = folder
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more comes: the last folder need not wait, since the interval is for those in between."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether all is done, within so many seconds. To be called once it is closed."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        not_before = -math.inf
        while (folder := self._next(not_before)) is not None:
            if self._deliver(folder):
                not_before = time.monotonic() + self._interval

    def _next(self, not_before: float) -> Path | None:
        """The newest folder, when the time has come; None when there will be no more."""
        with self._changed:
            while self._waiting is None or (not self._closed and time.monotonic() < not_before):
                if self._waiting is None and self._closed:
                    return None
                self._changed.wait(None if self._waiting is None else not_before - time.monotonic())
            folder, self._waiting = self._waiting, None
            return folder

    def _deliver(self, folder: Path) -> bool:
        """Upload, and again after growing pauses, until it has arrived, cannot, or a newer one waits."""
        pauses = iter(RETRY_PAUSES)
        while True:
            try:
                said = self._upload(folder)
            except Exception as error:
                pause = None if self._will_not_pass(error) else next(pauses, None)
                if pause is None:
                    said, stays = self._failed(folder, error)
                    self._say(said)
                    if not stays:
                        shutil.rmtree(folder, ignore_errors=True)
                    return False
                with self._changed:
                    if self._changed.wait_for(lambda: self._waiting is not None, pause):
                        shutil.rmtree(folder)
                        return False
            else:
                shutil.rmtree(folder)
                self._say(said)
                return True
