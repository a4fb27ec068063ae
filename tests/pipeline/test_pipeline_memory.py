"""What a plan says of memory, against what the job takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_small

# The growth of anonymous memory by one job, after a small one has loaded what every job needs; and what its plan said.
MEASURED = """
import json, sys, threading, time
from pathlib import Path
import fp4
from fp4.pipeline import Job, Request

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

small, model, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
fp4.quantize(small, out + "-small", **options | {"samples": 2, "seq_len": 64})
planned = Job(Request(model, out, **options)).needs.memory
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
fp4.quantize(model, out, **options)
done.set()
watcher.join()
print(json.dumps([planned, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory of a process on Linux alone")
@pytest.mark.parametrize(("scheme", "method"), [("nvfp4a16", "rtn"), ("nvfp4", "rtn"), ("nvfp4", "gptq")])
def test_the_plan_is_right_within_a_factor_of_two(scheme: str, method: str, tmp_path: Path) -> None:
    """Blocks of SmolLM2-135M's shape; its embedding is larger than four of them."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    more = {"num_hidden_layers": 2, "vocab_size": 49152, "max_position_embeddings": 1024}
    model = save_small("llama", tmp_path / "model", **shape | more)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    options = {"scheme": scheme, "method": method, "data": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 512}
    arguments = [
        save_small("llama", tmp_path / "small"),
        model,
        tmp_path / "out",
        json.dumps(options | {"device": "cpu"}),
    ]
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured / 2 < planned < 2 * measured
