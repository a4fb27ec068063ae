# Everything runs in an environment of its own under .venv; nothing outside this folder is changed.
PYTHON ?= python3
VENV ?= .venv
# The pinned CPU-friendly torch. On a machine with a GPU name the build for it, e.g. TORCH="torch==2.13.0 --index-url ...".
TORCH ?= torch==2.13.0
# The oldest Transformers that is tested, beside the newest.
OLDEST_TRANSFORMERS ?= 5.17.0
MODEL ?=
PIP = $(VENV)/bin/pip install -q
PYTEST = $(VENV)/bin/python -m pytest -rs
BOTH_CORES = -n 2 --dist worksteal
export TOKENIZERS_PARALLELISM = false
# The environments below are for CPUs and Triton: compiling the CUDA kernels takes minutes, and `make cuda` does it.
FP4_CUDA ?= 0
export FP4_CUDA

.PHONY: demo test lint types pytest pytest-oldest pytest-triton pytest-lm-eval parity cuda sanitize bench-cpu bench-gpu bench-quality bench-quantize clean

demo: $(VENV)/demo
	$(VENV)/bin/python examples/demo.py $(MODEL)

test: lint types pytest pytest-oldest pytest-triton pytest-lm-eval parity

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/test
	$(VENV)/bin/mypy

pytest: $(VENV)/test
	$(PYTEST) $(BOTH_CORES)

# The parts that meet Transformers, once more under the oldest supported one.
pytest-oldest: $(VENV)/oldest
	PYTHONPATH=$(VENV)/oldest $(PYTEST) $(BOTH_CORES) tests/test_quantizer.py tests/test_damaged.py \
		tests/test_saving.py tests/test_new_layers.py tests/test_training.py tests/test_gradient.py tests/test_hostile.py \
		tests/test_experts.py tests/test_experts_loading.py tests/test_fp8_experts.py tests/test_resizing.py \
		tests/test_adapters.py tests/test_copies.py

# The Triton kernels on the CPU by Triton's interpreter, then their compilation for GPUs that need not be there.
pytest-triton: $(VENV)/parity
	PYTHONPATH=$(VENV)/parity TRITON_INTERPRET=1 $(PYTEST) $(BOTH_CORES) tests/test_triton_kernels.py \
		tests/test_triton_experts.py tests/test_gpu_benchmarks.py
	PYTHONPATH=$(VENV)/parity $(PYTEST) $(BOTH_CORES) tests/test_triton_compile.py

# lm-eval's own hf model on quantized checkpoints, offline.
pytest-lm-eval: $(VENV)/lm-eval
	PYTHONPATH=$(VENV)/lm-eval $(PYTEST) tests/test_lm_eval.py

# Against other tools: FP-Quant's own Triton kernels, run by Triton's interpreter, then what compressed-tensors, ModelOpt
# and auto-round make of checkpoints.
parity: $(VENV)/parity $(VENV)/parity-checkpoints
	PYTHONPATH=$(VENV)/parity $(PYTEST) tests/parity/test_fp_quant.py
	PYTHONPATH=$(VENV)/parity-checkpoints $(PYTEST) $(BOTH_CORES) tests/parity --ignore tests/parity/test_fp_quant.py

# The CUDA library, and what can be said about it without a GPU. Needs nvcc >= 12.8. Objects are kept in build/cuda, or
# where FP4_BUILD_CACHE says: from nothing about eleven minutes of two cores and 18 GB, from there less than one.
cuda: $(VENV)/test $(VENV)/disassembler
	FP4_CPU=0 FP4_CUDA=1 $(VENV)/bin/python setup.py build_ext --inplace
	FP4_REQUIRE_CUDA=1 PYTHONPATH=$(VENV)/disassembler $(PYTEST) $(BOTH_CORES) tests/test_cutlass_*.py

sanitize:
	sh csrc/cpu/sanitize.sh

bench-cpu: $(VENV)/demo
	$(VENV)/bin/python benchmarks/cpu_linear.py --save cpu_linear
	$(VENV)/bin/python benchmarks/cpu_generate.py --compile --save cpu_generate
	$(VENV)/bin/python benchmarks/cpu_experts.py --save cpu_experts
	$(VENV)/bin/python benchmarks/cpu_summary.py

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

# --- environments

BUILD_INPUTS := pyproject.toml setup.py setup_cuda.py csrc/binding_cpu.cpp $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77"
	$(PIP) $(TORCH)
	touch $@

# Without build isolation, so that torch is not downloaded a second time for the build alone.
$(VENV)/demo: $(VENV)/torch $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e ".[demo,report]"
	touch $@

$(VENV)/test: $(VENV)/torch $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/oldest: $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ transformers==$(OLDEST_TRANSFORMERS)
	$(PIP) --target $@ "huggingface_hub<2"

# Without dependencies: fp_quant asks for a CUDA build of torch, which its kernels do not need under the interpreter.
$(VENV)/parity: $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ fp_quant==0.3.2 triton==3.7.1 scipy==1.17.1

# Without dependencies too: these tools pin other versions of Transformers and bring tools for training and evaluation.
$(VENV)/parity-checkpoints: $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ auto-round==0.16.1 compressed-tensors==0.19.0 loguru==0.7.3 \
		nvidia-modelopt==0.47.0 nvidia-ml-py==13.615.71 omegaconf==2.4.0 antlr4-python3-runtime==4.13.2 pulp==3.3.2 \
		py-cpuinfo==9.0.0 pydantic-settings==2.16.3 scipy==1.17.1 threadpoolctl==3.8.0
	PYTHONPATH=$@ $(VENV)/bin/python -c "import auto_round, compressed_tensors, modelopt.torch.quantization"

# Without dependencies, most of which are for tasks and metrics that no test has.
$(VENV)/lm-eval: $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ lm-eval==0.4.13 sacrebleu==2.6.0 portalocker==4.4.2 lxml==6.1.3 \
		colorama==0.4.6 tabulate==0.10.0

$(VENV)/disassembler: $(VENV)/test
	rm -rf $@
	$(PIP) --no-deps --target $@ nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.5.37
