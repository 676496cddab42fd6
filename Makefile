# make serve ARGS="model=gpt-oss-20b model.path=/models/gpt-oss-20b +tp=2"
PYTHON ?= python3
BIN := .venv/bin
comma := ,
GPU := $(shell command -v nvidia-smi)
RUNTIME := .$(if $(GPU),[hopper])
SWEEP := .[sweep$(if $(GPU),$(comma)hopper)]
TESTS := .[test$(if $(GPU),$(comma)hopper)]

.PHONY: help install serve sweep test fuzz fuzz-forms attack soak gpu-test gpu-bench lint format bench-host bench-http \
	demo-train demo-eval clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(BIN)/.runtime ## the server and what it needs, into .venv (with the GPU packages where there is a GPU)

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '$(RUNTIME)'
	@touch $@

$(BIN)/.tests: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '$(TESTS)'
	@touch $@ $(BIN)/.runtime $(BIN)/.sweep

$(BIN)/.sweep: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '$(SWEEP)'
	@touch $@ $(BIN)/.runtime

serve: $(BIN)/.runtime ## run the server: make serve ARGS="model=gpt-oss-20b model.path=/models/gpt-oss-20b"
	$(BIN)/python serve.py $(ARGS)

sweep: $(BIN)/.sweep ## measure configurations and decide: make sweep ARGS="buckets=latency,balanced sweep.concurrency=1,4"
	$(BIN)/python sweep.py -m $(or $(ARGS),+sweep=quick)

test: $(BIN)/.tests ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n logical --maxprocesses 8 --dist loadfile $(ARGS)

fuzz: $(BIN)/.tests ## 100,000 token streams and 20,000 request bodies through the server, the engine faked
	$(BIN)/python -m tests.serve.fuzz $(ARGS)

fuzz-forms: $(BIN)/.tests ## 10,000 answers held to random forms, written by random logits, at all endpoints
	$(BIN)/python -m tests.serve.fuzz_forms $(ARGS)

gpu-test: $(BIN)/.tests ## what needs an H100
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-bench: $(BIN)/.tests ## steps and kernels on an H100 against the memory floor; writes benchmarks/h100.json or h200.json
	$(BIN)/python -m tests.gpu.bench $(ARGS)
	for kernels in linear experts attention prefill sampler ranks; do $(BIN)/python -m tests.gpu.bench_$$kernels || exit; done

lint: $(BIN)/.tests ## ruff, the formatters and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z "*.cu" "*.cuh" | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/mypy serve.py

format: $(BIN)/.tests ## rewrite the files as the formatters want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -z "*.cu" "*.cuh" | xargs -0 $(BIN)/clang-format -i

attack: $(BIN)/.tests ## hostile clients and signals against the demo server, and a report: make attack MINUTES=10
	$(BIN)/python -m tests.attack.run --minutes $(or $(MINUTES),10)

soak: $(BIN)/.tests ## honest and hostile traffic, then memory, pages and files: make soak MINUTES=30
	$(BIN)/python -m tests.attack.run --soak --minutes $(or $(MINUTES),30)

bench-host: $(BIN)/.tests ## host cost of a step, the model left out
	$(BIN)/python -m tests.bench_host

bench-http: $(BIN)/.tests ## tokens a second through the HTTP path, the engine faked
	$(BIN)/python -m tests.bench_http

demo-train: $(BIN)/.tests ## train the demo model anew on an H100, ten minutes: make demo-train ARGS="--out build/demo"
	$(BIN)/python -m demo.training.train --minutes 10 --out build/demo $(ARGS)

demo-eval: $(BIN)/.tests ## held-out questions to a running server: make demo-eval ARGS="--url http://127.0.0.1:8000"
	$(BIN)/python -m demo.training.evaluate $(ARGS)

clean: ## remove the virtual environment
	rm -rf .venv *.egg-info
