# For a machine with a CUDA GPU and no network: builds into a Python that has torch, and leaves a few small files.
#   make gpu PYTHON=/opt/torch/bin/python RESULTS=results COMMIT=$(git rev-parse HEAD)
RESULTS ?= gpu-results
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)
# Machine code for the GPUs that are there; the letter brings Hopper's own instructions.
GPU_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr -d . | \
              sed 's/^90$$/90a/; s/$$/-real/' | paste -sd';' -)
GPU_TESTS ?= tests/cuda/test_kernels.py tests/cuda/test_gpu.py tests/cuda/test_fuzz.py
# Seconds that each part may take, the sanitizer per tool: ten minutes in all. Longer runs give their own, and name one
# part: make gpu-test GPU_TESTS="tests/cuda tests/kernels tests/ops" GPU_TEST_SECONDS=540
GPU_BUILD_SECONDS    ?= 180
GPU_TEST_SECONDS     ?= 120
GPU_HOPPER_SECONDS   ?= 50
GPU_SANITIZE_SECONDS ?= 30
GPU_BENCH_SECONDS    ?= 110
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) /usr/local/cuda/bin/compute-sanitizer)
GPU_PYTHON = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
# Run from the results, so that Python finds the installed package and not the sources.
# What Triton's tuner finds stays there too, and not with the user.
IN_RESULTS = cd "$(RESULTS)" && export PYTHONPATH= PYTHONDONTWRITEBYTECODE=1 FASTLM_CACHE_DIR="$$PWD/cache" &&

.PHONY: gpu gpu-build gpu-test gpu-hopper gpu-triton gpu-fuzz gpu-sanitize gpu-bench
gpu: gpu-build  ## Build, test, sanitize and measure on a CUDA GPU, with PYTHON's torch and no network
	@status=0; for part in test hopper sanitize bench; do $(MAKE) --no-print-directory gpu-$$part || status=1; done; exit $$status

gpu-build:  ## Build the CUDA module for the GPUs of this machine and install fastlm into PYTHON
	mkdir -p "$(RESULTS)"
	@[ -n "$${CUDAARCHS:=$(GPU_ARCHS)}" ] || { echo "nvidia-smi names no GPU; set CUDAARCHS, such as 90a-real"; exit 1; }
	FASTLM_CUDA=ON CUDAARCHS="$${CUDAARCHS:-$(GPU_ARCHS)}" timeout $(GPU_BUILD_SECONDS) "$(GPU_PYTHON)" -m pip install -v --no-index --no-build-isolation \
	  --no-deps --force-reinstall . > "$(RESULTS)/build.log" 2>&1 || { tail -n 60 "$(RESULTS)/build.log"; exit 1; }
	$(IN_RESULTS) "$(GPU_PYTHON)" "$(CURDIR)/tests/cuda/versions.py" "$(COMMIT)" > versions.json
	@cat "$(RESULTS)/versions.json"

gpu-test:  ## Run the GPU tests on the fastlm that PYTHON has
	mkdir -p "$(RESULTS)"
	$(IN_RESULTS) timeout $(GPU_TEST_SECONDS) "$(GPU_PYTHON)" -m pytest -q -p no:cacheprovider \
	  -k "not emulated and not hopper and not sm90" --junitxml=test.xml $(GPU_TESTS:%="$(CURDIR)/%")

# By themselves: a kernel that hangs or traps takes its process with it.
gpu-hopper:  ## Run the tests of attention's kernels for Hopper
	mkdir -p "$(RESULTS)"
	$(IN_RESULTS) timeout $(GPU_HOPPER_SECONDS) "$(GPU_PYTHON)" -m pytest -q -p no:cacheprovider \
	  -k "not emulated and (hopper or sm90)" --junitxml=hopper.xml "$(CURDIR)/tests/cuda"

gpu-triton:  ## Run the tests of Triton's kernels, most of whose time is compiling, within seven minutes
	$(MAKE) --no-print-directory gpu-test GPU_TESTS=tests/kernels GPU_TEST_SECONDS=420

gpu-fuzz:  ## Ten times as many random calls of each CUDA kernel as gpu-test makes, within nine minutes
	FASTLM_FUZZ_CASES=500 $(MAKE) --no-print-directory gpu-test GPU_TESTS=tests/cuda/test_fuzz.py GPU_TEST_SECONDS=400
	FASTLM_FUZZ_CASES=500 $(MAKE) --no-print-directory gpu-hopper GPU_HOPPER_SECONDS=140

gpu-sanitize:  ## Run each CUDA kernel under NVIDIA's four sanitizers
	mkdir -p "$(RESULTS)"
	$(IN_RESULTS) export PYTORCH_NO_CUDA_MEMORY_CACHING=1 && : > sanitizer.log && status=0 && \
	for tool in memcheck racecheck initcheck synccheck; do \
	  echo "=== $$tool" >> sanitizer.log; \
	  timeout $(GPU_SANITIZE_SECONDS) "$(SANITIZER)" --tool $$tool --error-exitcode 9 --print-limit 20 \
	    "$(GPU_PYTHON)" "$(CURDIR)/tests/cuda/sanitize.py" >> sanitizer.log 2>&1; \
	  code=$$?; echo "=== $$tool: exit $$code" | tee -a sanitizer.log; [ $$code = 0 ] || status=1; \
	done; exit $$status

gpu-bench:  ## Measure the ops and the training step on the GPU
	mkdir -p "$(RESULTS)"
	$(IN_RESULTS) timeout $(GPU_BENCH_SECONDS) "$(GPU_PYTHON)" -m fastlm.cli bench --device cuda --quick --out .
