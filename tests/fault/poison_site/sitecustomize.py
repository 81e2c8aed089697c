"""Any process with this folder on PYTHONPATH dies when it opens 00002.tar of a corpus: a unit that kills workers."""

import os
import signal
import sys


def die_of_poison(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith("tars/00002.tar"):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(die_of_poison)
