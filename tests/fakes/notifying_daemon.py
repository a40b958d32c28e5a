"""A stand-in for `nightpressd`: speaks to the service manager as the daemon does, and has a stopped worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

WRONG_SETTINGS = 78


def notify(*lines: str) -> None:
    """Send assignments to the service manager that started us."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall("\n".join(lines).encode("utf-8", "surrogateescape"))


def settings_are_wrong() -> bool:
    """Say whether the settings file has the key that the test puts there."""
    folder = os.environ.get("NIGHTPRESS_CONFIG_DIR", "")
    file = Path(folder) / "nightpress.toml"
    return file.is_file() and "no_such_setting" in file.read_text(encoding="utf-8")


def main() -> int:
    """Run until SIGTERM."""
    if settings_are_wrong():
        return WRONG_SETTINGS
    stop, reload = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    signal.signal(signal.SIGHUP, lambda _number, _frame: reload.set())
    worker = subprocess.Popen(["sleep", "600"])
    worker.send_signal(signal.SIGSTOP)
    notify("READY=1", "STATUS=up")
    every_s = min(int(os.environ.get("WATCHDOG_USEC", "4000000")) / 4e6, 0.25)
    while not stop.wait(every_s):
        notify("WATCHDOG=1")
        if reload.is_set():
            reload.clear()
            notify("RELOADING=1", "STATUS=reading the settings again")
            notify("READY=1", "STATUS=reloaded")
    notify("STOPPING=1")
    return 0  # the worker is left to the service manager, which must not leave it behind


if __name__ == "__main__":
    sys.exit(main())
