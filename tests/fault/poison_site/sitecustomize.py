"""A process with this folder on PYTHONPATH dies when it opens a tar that POISON names: a unit that kills workers."""

import os
import signal
import sys

POISON = tuple(f"tars/{name}.tar" for name in os.environ.get("POISON", "00002").split())


def die_of_poison(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(POISON):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(die_of_poison)
