"""A TCP proxy on the loopback address that refuses, delays and cuts connections, for servers that do nothing of it."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # lingering for 0 s is how a close becomes an RST


@dataclass(frozen=True)
class Trouble:
    """What becomes of one connection: it is cut after so many bytes in both directions together (0: refused); each
    piece of up to 64 KB takes `delay` seconds."""

    cut: int | None = None
    delay: float = 0.0


class FaultyProxy:
    """Passes connections on to `port` of this machine. `troubles` are those of the next connections, one each; after
    them all is well. In a `with` statement."""

    def __init__(self, port: int):
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._troubles: Iterator[Trouble] = iter(())
        self.met = 0  # troubles so far

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def trouble(self, troubles: Iterable[Trouble]) -> None:
        self._troubles = iter(troubles)

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                trouble = next(self._troubles, None)
                self.met += trouble is not None
                threading.Thread(target=self._serve, args=(client, trouble or Trouble()), daemon=True).start()

    def _serve(self, client: socket.socket, trouble: Trouble) -> None:
        left = [trouble.cut]  # bytes until it is cut, shared by both directions

        def pass_on(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(1 << 16):
                    time.sleep(trouble.delay)
                    if left[0] is not None:
                        piece, left[0] = piece[: left[0]], left[0] - len(piece)
                    target.sendall(piece)
                    if left[0] is not None and left[0] <= 0:
                        break
            for end in (source, target):
                with contextlib.suppress(OSError):
                    if left[0] is not None and left[0] <= 0:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                        end.close()
                    else:
                        end.shutdown(socket.SHUT_RDWR)

        if trouble.cut == 0:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            return client.close()
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
            pass_on(server, client)
