"""Runs in vLLM's environment for generate.py: samples as often as it is asked to.

    python generate_worker.py '{"directory": ..., "rows": n, "length": n}'

Writes a line of JSON when it is ready, {"vllm": version}. Then answers each line with one:
{"seconds": of CPU time}.
"""

import json
import os
import sys
import time
from pathlib import Path

# One thread, of which the CPU time tells, whatever else the machine does.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from analog_integrations.vllm.sampler import VllmSampler
from analog_plugin.data.shards.records import ShardRequest


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM writes its log there

    def say(**values):
        print(json.dumps(values), file=out, flush=True)

    job = json.loads(sys.argv[1])
    request = ShardRequest(
        model=job["directory"], fingerprint="of no matter", vocabulary=2**17,
        tokens=job["rows"] * job["length"], sequence_length=job["length"], shards=1, seed=0,
        bos_token_id=1, temperature=1.0, batch_size=job["rows"], backend="vllm",
    )  # fmt: skip
    sampler = VllmSampler(Path(job["directory"]), request)
    assert sampler.made_with.threads == 1
    say(versions=sampler.made_with.versions)
    for seed, _ in enumerate(sys.stdin):
        start = time.process_time()
        sampler.sample(job["rows"], seed)
        say(seconds=time.process_time() - start)


if __name__ == "__main__":
    main()
