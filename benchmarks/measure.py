"""What the benchmarks share: interleaved timing, the memory limit, a description of the machine, saved results.

A run whose own readings contradict each other ends with an error and saves nothing (:func:`refuse_broken`).

All contenders take turns (A B A B ...), so that a change of the machine's speed meets each of them alike, and the time
of each is its fastest operation's: what other programs add to the rest says nothing about a kernel. Contenders get
their weights from a set larger than the last-level cache.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

#: One operation; called with a running number, by which it picks one of its weights.
Operation = Callable[[int], object]


def interleaved(
    contenders: Mapping[str, Operation],
    repetitions: int = 7,
    seconds: float = 0.03,
    pause: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of the fastest operation of each contender.

    A turn lasts ``seconds`` or one operation, whichever is longer. Before it the process sleeps for ``pause``, in which
    the spinning worker threads of another library fall asleep. ``clock`` may be ``time.process_time`` where other
    processes take the machine's time and one thread is measured.
    """
    counters = dict.fromkeys(contenders, 0)
    fastest = dict.fromkeys(contenders, math.inf)
    for name, operation in contenders.items():
        operation(0)
        counters[name] = 1
    for _ in range(repetitions):
        for name, operation in contenders.items():
            time.sleep(pause)
            operation(counters[name])  # wakes this library's threads
            counters[name] += 1
            before = clock()
            end = before + seconds
            while True:
                operation(counters[name])
                counters[name] += 1
                after = clock()
                fastest[name] = min(fastest[name], after - before)
                if after >= end:
                    break
                before = after
    return fastest


def read_pass(megabytes: int = 256, large_pages: bool = True) -> tuple[Operation, int]:
    """An operation that reads memory once and writes nothing, and its bytes: the limit of memory.

    It takes about as long as a matrix does, from a buffer larger than the cache. ``large_pages``: it lies in them where
    the system gives them, as packed weights do; a checkpoint's own weights lie in ordinary ones.
    """
    buffer = torch.empty(megabytes * 2**18, dtype=torch.int32)
    if large_pages:
        torch.ops.fp4.cpu_prefer_large_pages(buffer)
    parts = buffer.fill_(1).split(2**22)
    return lambda i: parts[i % len(parts)].max(), 2**24


#: How often the largest reading of the memory's bandwidth may hold the smallest within one run.
LARGEST_JUMP = 4 / 3


def shares_above_one(
    bytes_read: Mapping[str, float], seconds: Mapping[str, float], read_gbs: float
) -> dict[str, float]:
    """The contenders that read faster than memory does, with their shares of its bandwidth.

    ``bytes_read``: what one operation of a contender reads at least, for those of ``seconds`` where it is known.
    """
    shares = {name: count / seconds[name] / 1e9 / read_gbs for name, count in bytes_read.items()}
    return {name: share for name, share in shares.items() if share > 1}


def refuse_broken(readings: Sequence[tuple[str, float]], above_one: Mapping[str, float]) -> None:
    """End with an error where a run's readings cannot all be true.

    Args:
        readings: cases with the GB/s of reading memory beside them; of one kind of pages.
        above_one: shares of memory's bandwidth above 1, by case and contender.

    Raises:
        SystemExit: a share is above 1, or the largest reading is more than a third above the smallest.
    """
    if above_one:
        name, share = max(above_one.items(), key=lambda item: item[1])
        raise SystemExit(
            f"broken measurement: {name} read {share:.2f} times as fast as memory was read beside it, expected at most "
            "1; nothing was saved, measure again on a machine without other work"
        )
    if not readings:
        return
    (low, least), (high, most) = min(readings, key=_second), max(readings, key=_second)
    if most > LARGEST_JUMP * least:
        raise SystemExit(
            f"broken measurement: memory was read at {least:.1f} GB/s beside {low} and at {most:.1f} beside {high}, "
            "expected at most a third between cases; nothing was saved, measure again on a machine without other work"
        )


def _second(item: tuple[str, float]) -> float:
    return item[1]


# Of the flags in /proc/cpuinfo, those that decide which kernels a CPU runs and how fast.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def features(cpuinfo: str) -> str:
    """The kind of CPU by what it can, from the text of /proc/cpuinfo; empty where it does not say."""
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.split(":", 1)[-1].split()
    }
    return ", ".join(name for name in _FEATURES if name in flags)


def machine() -> dict[str, Any]:
    """CPU, threads and versions that the numbers belong to."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
        kind = features(info.read_text())
        cpu = f"{cpu} ({kind})" if kind else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "fp4", "llama-cpp-python"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{cpu}, {torch.get_num_threads()} threads",
        "versions": versions,
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def verdict(ratio: float | None, target: float) -> str:
    """How a ratio compares with its target, e.g. ``1.31 (>= 1.2: pass)`` or ``1.02 (>= 1.2: 15% short)``.

    None is a peer that is not installed, or that this run did not measure.
    """
    if ratio is None:
        return "not measured"
    outcome = "pass" if ratio >= target else f"{100 * (1 - ratio / target):.0f}% short"
    return f"{ratio:.2f} (>= {target:g}: {outcome})"


def save(
    name: str, title: str, sections: Mapping[str, str], data: Mapping[str, Any], about: dict[str, Any] | None = None
) -> None:
    """Write ``results/<name>.md`` for people and ``results/<name>.json`` for programs.

    ``about`` tells date, hardware and versions; :func:`machine` by default.
    """
    RESULTS.mkdir(exist_ok=True)
    about = about or machine()
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    script = f"`benchmarks/{Path(sys.argv[0]).name}`"
    text = [f"# {title}", "", f"{script}, {about['date']}, {about['hardware']}; {versions}.", ""]
    for heading, body in sections.items():
        text += [f"## {heading}", "", body, ""]
    (RESULTS / f"{name}.md").write_text("\n".join(text))
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": about, **data}, indent=1) + "\n")


@dataclass
class Growth:
    """How far the process's own memory rose at its highest, in bytes; set when the block ends."""

    bytes: int = 0


@contextlib.contextmanager
def memory_growth() -> Iterator[Growth]:
    """Watches anonymous resident memory (RssAnon: what the process allocated; pages of mapped files are the page
    cache's) every millisecond."""
    growth, done = Growth(), threading.Event()
    before = peak = _anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        done.set()
        watcher.join()
        growth.bytes = peak - before


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon line; this benchmark needs Linux")
