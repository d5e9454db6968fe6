import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rag_retrieval.core import signals
from rag_retrieval.core.signals import (
    Interrupted,
    StopRequest,
    exit_code,
    ignore_stop_in_worker,
    interrupt,
    on_signals,
)


def test_exit_codes_are_those_of_shells():
    assert (exit_code(signal.SIGTERM), exit_code(signal.SIGINT)) == (143, 130)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_is_noted_and_earlier_handlers_come_back(number):
    before, request = signal.getsignal(number), StopRequest()
    with on_signals(request.note):
        assert request.number == 0
        os.kill(os.getpid(), number)
        assert request.number == number
    assert signal.getsignal(number) is before


def test_a_signal_before_training_is_an_exception_that_knows_its_number():
    with pytest.raises(Interrupted) as caught, on_signals(interrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert caught.value.number == signal.SIGTERM and isinstance(caught.value, KeyboardInterrupt)


def test_outside_the_main_thread_nothing_changes():
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def look():
        with on_signals(interrupt):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_signal_that_arrives_twice_is_one_and_a_second_later_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    request = StopRequest()
    request.note(signal.SIGINT, None)
    request.note(signal.SIGTERM, None)
    assert not left and request.number == signal.SIGINT
    monkeypatch.setattr(signals, "REPEAT", -1.0)
    request.note(signal.SIGTERM, None)
    assert left == [143]


def test_a_second_signal_really_ends_the_process():
    program = (
        "import time\nfrom rag_retrieval.core.signals import StopRequest, on_signals\nrequest = StopRequest()\n"
        "with on_signals(request.note):\n    print('ready', flush=True)\n"
        "    while not request.number:\n        time.sleep(0.01)\n    print('noted', flush=True)\n    time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"noted\n"
    time.sleep(signals.REPEAT + 0.1)  # what comes sooner after the first is taken for the same signal
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def wait_as_worker(ready, done) -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # as another library's fork handler
    ignore_stop_in_worker(0)
    ready.set()
    done.wait(60)


def test_a_worker_outlives_signals_that_are_sent_to_all():
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    worker = context.Process(target=wait_as_worker, args=(ready, done), daemon=True)
    worker.start()
    assert ready.wait(60)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    done.set()
    worker.join(60)
    assert worker.exitcode == 0
