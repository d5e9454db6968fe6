"""CPU time of exported folders beside their torch model, and the share that each operator of ONNX Runtime has in it.

    OMP_NUM_THREADS=1 python benchmarks/onnx_operators.py --model runs/e/model runs/e/onnx runs/e/int8

CPU seconds of all threads, not wall time: they compare on a machine that others use too, as long as all sides take
turns. Texts have equal lengths, so that padding costs nothing.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from rag_retrieval.infer.benchmark import Subject, texts_of, turns
from rag_retrieval.infer.onnx_folder import MODEL_FILE

SHOWN = 8  # operators of a folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True, help="folders; the first is what others are compared with")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--texts", type=int, default=16, help="of one forward")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    subjects = [Subject(folder, None, "cpu") for folder in options.model]
    texts = texts_of(subjects[0], options.tokens, options.texts)
    seconds: list[list[float]] = [[] for _ in subjects]
    for subject in subjects:
        subject.compute(texts)
    for place, subject in turns(subjects, options.rounds):
        start = time.process_time()
        subject.compute(texts)
        seconds[place].append(time.process_time() - start)
    first = float(np.median(seconds[0]))
    for subject, own in zip(subjects, seconds, strict=True):
        median = float(np.median(own))
        spread, of = f"{min(own):.3f}-{max(own):.3f}", f"{len(texts)} texts of {options.tokens} tokens"
        print(f"{subject.name}: {median:.3f} CPU seconds ({spread}) for {of}, {first / median:.2f} times the first")
        if subject.runtime != "torch":
            shares = operator_shares(subject, texts)
            print("    " + ", ".join(f"{name} {share:.0%}" for name, share in shares.most_common(SHOWN)))


def operator_shares(subject: Subject, texts: list[str]) -> Counter:
    """Of the time of all operators in one forward after the first."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.enable_profiling, settings.log_severity_level = True, 3
    settings.intra_op_num_threads = 1
    file = Path(subject.folder) / MODEL_FILE
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    ids = np.ones((len(texts), len(subject.encoded(texts)[0])), np.int64)
    inputs = {node.name: ids for node in session.get_inputs()}
    for _ in range(3):
        session.run(None, inputs)
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    times: Counter = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"]
    whole = sum(times.values())
    return Counter({name: own / whole for name, own in times.items()})


if __name__ == "__main__":
    main()
