"""Jobs without libraries, for tests of the worker process: `python -m small_jobs DESCRIPTOR` runs them."""

import os
import socket
import sys
import time
from pathlib import Path

from pipelines.errors import InputError
from webui.inference_worker import serve

LANES = {"steps": "slow", "append": "slow", "answer": "quick"}


def on_gpu():
    return "ON_GPU" in os.environ


def process_id():
    return os.getpid()


def answer(text):
    return text


def refuse(sentence):
    raise InputError(sentence)


def fail():
    raise KeyError("no such thing")


def unpicklable():
    return lambda: None


def steps(report, count, log):
    """Report numbers, and write each to the file `log` before."""
    for number in range(count):
        with Path(log).open("a") as file:
            file.write(f"{number}\n")
        report(number)
        time.sleep(0.01)


def append(log, text):
    with Path(log).open("a") as file:
        file.write(f"{text}\n")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.modules[__name__])
    os._exit(0)
