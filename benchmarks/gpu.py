"""What only a GPU can show, in one command that ends within eight minutes on one card and writes one file.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --tiny --out gpu.json     # do its parts run? Its figures say nothing

Every section is a process of its own with a time limit, and each of its parts is guarded: what fails or takes too long
stands in the file as an error, beside what the others found. The file is written again after every part.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

TOTAL = 465.0  # seconds for all sections
SECTIONS = {  # seconds at most; a section that comes late gets what is left
    "attention": 50.0,
    "encoder": 105.0,
    "decoder": 105.0,
    "caching": 65.0,
    "checks": 50.0,
    "engines": 90.0,
}
SHOWN = 300  # characters of an error

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.section_file is not None:
        return run_section(options)
    from speed_report import machine, versions

    written = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = {"command": written, "machine": machine(options.device), "versions": versions(), "sections": {}}
    started = time.monotonic()
    for name in options.sections:
        left = options.seconds - (time.monotonic() - started)
        limit = SECTIONS[name] * max(1.0, options.seconds / TOTAL)
        result["sections"][name] = start_section(name, options, min(limit, left))
        result["seconds"] = round(time.monotonic() - started, 1)
        write(options.out, result)
        print(describe(name, result["sections"][name]), flush=True)
    return int(any("error" in part for section in result["sections"].values() for part in [section, *parts(section)]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of two layers and a few texts")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all sections together (465)")
    parser.add_argument("--out", type=Path, required=True, help="file for the results, as JSON")
    parser.add_argument("--section-file", type=Path, help=argparse.SUPPRESS)  # of the process of one section
    return parser.parse_args(arguments)


def start_section(name: str, options: argparse.Namespace, seconds: float) -> dict:
    """What the section found, as far as it came."""
    if seconds <= 0:
        return {"error": "not started: no time was left"}
    file = options.out.with_name(f".{options.out.name}.{name}")
    file.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        process = subprocess.run(
            command_of(name, options, file), capture_output=True, text=True, timeout=seconds,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible_devices(options.device)},
        )  # fmt: skip
        error = f"exit code {process.returncode}: {process.stderr[-SHOWN:]}" if process.returncode else None
    except subprocess.TimeoutExpired:
        error = f"stopped after its {seconds:.0f} seconds"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}}
    file.unlink(missing_ok=True)
    return found | {"seconds": round(time.monotonic() - started, 1)} | ({"error": error} if error else {})


def visible_devices(device: str) -> str:
    """One card: the other trainer would take all of several, and both take one where they see it."""
    return "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def command_of(name: str, options: argparse.Namespace, file: Path) -> list[str]:
    command = [sys.executable, __file__, "--sections", name, "--device", options.device, "--out", str(options.out)]
    return [*command, *(["--tiny"] if options.tiny else []), "--section-file", str(file)]


def run_section(options: argparse.Namespace) -> int:
    """In the section's own process: its parts one after another. An error of one leaves the others."""
    from gpu_sections import PARTS, prepare

    prepare(options)
    found: dict[str, dict] = {}
    for name, part in PARTS[options.sections[0]].items():
        started = time.monotonic()
        try:
            found[name] = part(options)
        except Exception as error:  # whatever a part raises is a result
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:SHOWN]}
        found[name]["seconds_of_part"] = round(time.monotonic() - started, 1)
        write(options.section_file, {"parts": found})
    return 0


def write(file: Path, values: dict) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def parts(section: dict) -> list[dict]:
    return list(section.get("parts", {}).values())


def describe(name: str, section: dict) -> str:
    """For a person: a line for each part, without its nested figures."""
    lines = [f"{name}: {section.get('seconds', 0)} s" + (f", {section['error']}" if "error" in section else "")]
    for part, values in section.get("parts", {}).items():
        flat = {key: value for key, value in values.items() if not isinstance(value, (dict, list))}
        lines.append(f"  {part}: " + ", ".join(f"{key} {shown(value)}" for key, value in flat.items()))
    return "\n".join(lines)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
