"""Telling the service manager how the daemon is: the datagrams of sd_notify(3), without its library."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Self

#: systemd drops a longer datagram as a whole; the rest of ours takes less than 100 bytes
LONGEST_STATUS_BYTES = 2000


class Notifier:
    """Sends what the service manager waits for; without one, every call does nothing.

    Sending never blocks and never raises: a manager that does not listen is no reason to stop working.
    Every call returns whether a datagram went out.
    """

    def __init__(self, address: bytes | None = None, interval_s: float | None = None) -> None:
        """Send to `address`, a path, or a zero byte and an abstract name; None for no service manager.

        Args:
            address: of a Unix datagram socket.
            interval_s: after so long without a ping the manager takes us for dead; None: it does not watch.
        """
        self._address = address
        self.interval_s = interval_s
        self._status: str | None = None
        self._pinged_s: float | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Return the notifier that NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID ask for; they stay set.

        The watchdog is left alone when WATCHDOG_PID names another process, as it does in a child of the
        service. An address of another kind (vsock) counts as none.
        """
        found = os.environ if environment is None else environment
        name = os.fsencode(found.get("NOTIFY_SOCKET", ""))
        if not name.startswith((b"/", b"@")):
            return cls()
        address = b"\0" + name[1:] if name.startswith(b"@") else name
        return cls(address, _watchdog_s(found))

    def ready(self, status: str) -> bool:
        """Tell that the start, or the loading of new settings, is over."""
        return self._send_status("READY=1\n", status)

    def status(self, text: str) -> bool:
        """Show `text` in `systemctl status`; sent only when it differs from what was sent last."""
        return text != self._status and self._send_status("", text)

    def reloading(self) -> bool:
        """Tell that new settings are being loaded; `ready` must follow."""
        # systemd compares this with its own clock, to know which request for a reload we answer
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> bool:
        """Tell that the daemon is on its way out."""
        return self._send("STOPPING=1")

    def ping(self, now_s: float) -> bool:
        """Tell the watchdog that we live, if half of its interval has passed since the last time.

        Args:
            now_s: by the monotonic clock, which like the watchdog stands still during suspend.
        """
        if self.interval_s is None:
            return False
        if self._pinged_s is not None and now_s - self._pinged_s < self.interval_s / 2:
            return False
        if not self._send("WATCHDOG=1"):
            return False  # the next call tries again
        self._pinged_s = now_s
        return True

    def _send_status(self, before: str, text: str) -> bool:
        line = "".join(character if character.isprintable() else " " for character in text)
        short = line.encode("utf-8", "replace")[:LONGEST_STATUS_BYTES].decode("utf-8", "ignore")
        if not self._send(f"{before}STATUS={short}"):
            return False
        self._status = text
        return True

    def _send(self, message: str) -> bool:
        if self._address is None:
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode("utf-8"), self._address)
            return True
        return False


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    interval, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    if not (interval.isascii() and interval.isdecimal() and len(interval) < 20):
        return None
    return int(interval) / 1e6 or None
