"""Runs in vLLM's environment for serve.py: generates as often as it is asked to.

    python serve_worker.py '{"directory": ..., "dtype": ..., "prompts": [[token, ...], ...],
        "tokens": n, "eager": true}'

Writes a line of JSON when it is ready, {"vllm": version, "kernels": [...]}, or {"why": ...} where
vLLM refuses the directory. Then answers each line with one: {"seconds": of CPU time}.
"""

import json
import os
import sys
import time

# One process and one thread, of which the CPU time tells, whatever else the machine does.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import vllm


def kernels(model):
    schemes = (module.scheme for module in model.modules() if hasattr(module, "scheme"))
    return sorted({type(scheme.kernel).__name__ for scheme in schemes})


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM writes its log there

    def say(**values):
        print(json.dumps(values), file=out, flush=True)

    job = json.loads(sys.argv[1])
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    try:
        llm = vllm.LLM(
            job["directory"],
            skip_tokenizer_init=True,
            enforce_eager=job["eager"],
            max_model_len=len(job["prompts"][0]) + job["tokens"],
            dtype=job["dtype"],
            kv_cache_memory_bytes=1 << 28,
            enable_prefix_caching=False,  # each round does all the work
        )
    except Exception as error:
        return say(why=f"{type(error).__name__}: {error}")
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    assert torch.get_num_threads() == 1
    say(vllm=vllm.__version__, kernels=llm.apply_model(kernels)[0])
    for _ in sys.stdin:
        start = time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        say(seconds=time.process_time() - start)


if __name__ == "__main__":
    main()
