# What each target needs, it sets up first. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
# pip with the versions that CI tests. Its own settings hold: to take torch's smaller CPU-only build,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PIP     = $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt
DEMO    = --data stdlib --minutes 4.5 --fit-width
# CUDA is compiled where there is a GPU to run it, unless FASTLM_CUDA says otherwise.
FASTLM_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)
export FASTLM_CUDA
# A change of what is built is another wheel.
WHEEL   = $(VENV)/wheel-$(FASTLM_CPU)-cuda-$(FASTLM_CUDA)$(subst ;,-,$(CUDAARCHS))
SOURCES := $(shell find csrc cmake fastlm -type f ! -name '*.pyc' ! -name '*.so' ! -name build_report.txt) \
           pyproject.toml CMakeLists.txt $(wildcard README.md LICENSE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(VENV)/demo  ## Train a small GPT on the Python library's sources, at most 5 minutes on 2 cores
	cd $(VENV) && bin/fastlm train $(DEMO) --out "$(CURDIR)/runs/demo" --overwrite $(ARGS)

# Tests import the installed package, as users do. They run in another folder, since every Python that a test starts
# finds the working directory's fastlm first, and the sources are not built.
TESTS   = tests
PYTEST  = cd $(VENV) && bin/pytest --rootdir "$(CURDIR)" --config-file "$(CURDIR)/pyproject.toml"
.PHONY: test
test: $(VENV)/test  ## Run the tests on the installed package; TESTS=tests/ops and ARGS="-k relu" choose some
	$(PYTEST) $(TESTS:%="$(CURDIR)/%") $(ARGS)

# torch's own memory is the sanitizer's too, so that what kernels read and write beyond their tensors is seen. Not what
# compiles (the compiler's processes would inherit the sanitizer), nor the reference.
SANITIZED = tests/ops tests/optim tests/kernels/test_attention_cpu.py
.PHONY: sanitize
sanitize: $(VENV)/test  ## Run the ops' tests on CPU kernels built with the address and undefined behaviour sanitizers
	rm -rf build/sanitize
	FASTLM_SANITIZE=ON FASTLM_CUDA=OFF $(PY) -m pip wheel -qq --no-deps --wheel-dir build/sanitize .
	$(PY) -m pip install -qq --no-deps --target build/sanitize/package build/sanitize/*.whl
	export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$(CURDIR)/build/sanitize/package" \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)"; \
	$(PYTEST) -q -s $(SANITIZED:%="$(CURDIR)/%") -k 'not compile and not opcheck and not reference and not transforms' $(ARGS)

.PHONY: bench
bench: $(VENV)/test  ## Measure the ops and the training step beside torch; ARGS="attention --quick" and the like
	cd $(VENV) && bin/fastlm bench --out "$(CURDIR)/runs/bench" $(ARGS)

.PHONY: features
features: $(VENV)/test  ## Write docs/features.md anew: what each backend does, found by running it
	mkdir -p build && cd $(VENV) && bin/python -W ignore "$(CURDIR)/tests/ops/feature_matrix.py" > "$(CURDIR)/build/features.md"
	mv build/features.md docs/features.md

# An hour, and 20 GiB of memory.
.PHONY: nightly
nightly: export FASTLM_PROPERTY_CASES = 2000
nightly: export FASTLM_TEST_LARGE = 1
nightly: TESTS = tests/ops/test_properties.py tests/ops/test_past_32_bits.py
nightly: test  ## Run 2,000 random cases of every op, and ops on more than 2^31 elements

.PHONY: lint
lint: $(VENV)/lint  ## Check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

.PHONY: wheel
wheel: $(WHEEL) $(VENV)/torch  ## Build the wheel and the source distribution into dist/
	$(PIP) build
	$(PY) -m build --quiet --sdist --outdir dist .
	cp $(VENV)/dist/*.whl dist/
	@ls dist

.PHONY: clean
clean:  ## Remove what the other targets made, training runs and results excepted
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find fastlm tests bench -name __pycache__ -prune -exec rm -rf {} +
	rm -f fastlm/_cpu*.so fastlm/_cuda*.so fastlm/build_report.txt

.PHONY: inplace
inplace:  ## Build the compiled modules into fastlm/ with the Python on PATH, for work on the C++ sources
	cmake -S . -B build/inplace -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$(command -v python)" \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"
	cmake --build build/inplace --parallel
	cmake --install build/inplace --prefix .

# --- what the targets set up ------------------------------------------------------------------------------------------
# Each file in $(VENV) marks a step that is done.
.PHONY: check
check:
	@missing() { echo "fastlm needs $$1. On Debian and Ubuntu:"; echo "apt install python3-venv python3-dev make g++"; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || missing "Python 3.10 or newer, and there is no '$(PYTHON)'"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  missing "Python 3.10 or newer ('make PYTHON=...' names one), and $(PYTHON) is $$("$(PYTHON)" --version 2>&1)"; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || missing "the venv module of $(PYTHON)"; \
	"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  missing "the headers of $(PYTHON) (Python.h)"; \
	command -v $(firstword $(CXX)) >/dev/null || missing "a C++ compiler, and there is no '$(firstword $(CXX))'"

$(VENV)/venv: | check
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# torch comes first and alone, so that nothing that follows chooses another build of it.
$(VENV)/torch: $(VENV)/venv constraints.txt
	$(PIP) torch
	@touch $@

$(WHEEL): $(VENV)/venv $(SOURCES)
	rm -rf $(VENV)/dist $(VENV)/wheel-*
	$(PY) -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir $(VENV)/dist .
	@touch $@

# $(1): extras. The second step is for a wheel of the same version with other contents.
define install
$(PIP) "$$(echo $(VENV)/dist/fastlm-*.whl)[$(1)]"
$(PIP) --force-reinstall --no-deps $(VENV)/dist/fastlm-*.whl
@touch $@
endef

$(VENV)/demo: $(VENV)/torch $(WHEEL)
	$(call install,train)

$(VENV)/test: $(VENV)/torch $(WHEEL)
	$(call install,train$(COMMA)triton$(COMMA)test$(COMMA)bench)

$(VENV)/lint: $(VENV)/venv constraints.txt
	$(PIP) ruff
	@touch $@

COMMA := ,

include gpu.mk
