"""Runs in vLLM's environment: makes shards of training tokens; arguments as JSON.

python generate_worker.py '[[model, output, {argument: value, ...}], ...]'
"""

import json
import sys

from analog_integrations.optimum.generate import main_generate


def main():
    for model, output, arguments in json.loads(sys.argv[1]):
        main_generate(model, output, backend="vllm", **arguments)


if __name__ == "__main__":
    main()
