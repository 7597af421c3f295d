"""Runs in vLLM's environment: what it makes of directories, greedily; JSON in and out.

    python worker.py < job.json > report.json

A job is {"runs": [[directory, dtype], ...], "prompts": [[token, ...], ...], "tokens": n}. The
report has for each run either {"error": ...}, where vLLM refuses the directory, or

    {"layers": {class: [scheme, kernel]}     of the quantized linear layers
     "generated": [[token, ...], ...]        for each prompt
     "logprobs": [[[...], ...], ...]}        of the whole vocabulary, at each step, for each prompt
"""

import gc
import json
import os
import sys

# The model lives in this process, so that its layers and its errors can be seen.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def run(directory, dtype, prompts, tokens):
    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + tokens,
        max_logprobs=-1,
        dtype=dtype,
        kv_cache_memory_bytes=1 << 26,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=-1
    )
    made = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return {
        "layers": llm.apply_model(quantized_layers)[0],
        "generated": [list(row.outputs[0].token_ids) for row in made],
        "logprobs": [
            [
                [step[token].logprob for token in range(len(step))]
                for step in row.outputs[0].logprobs
            ]
            for row in made
        ],
    }


def quantized_layers(model):
    schemes = {type(m).__name__: m.scheme for m in model.modules() if hasattr(m, "scheme")}
    return {
        layer: [type(scheme).__name__, type(scheme.kernel).__name__]
        for layer, scheme in schemes.items()
    }


def main():
    job = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM writes its log there
    report = []
    for directory, dtype in job["runs"]:
        try:
            report.append(run(directory, dtype, job["prompts"], job["tokens"]))
        except Exception as error:
            report.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    json.dump(report, out)


if __name__ == "__main__":
    main()
