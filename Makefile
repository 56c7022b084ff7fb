# What each target needs, it sets up first. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
# CUDA is compiled where there is a GPU to run it, unless FASTLM_CUDA says otherwise.
FASTLM_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)
export FASTLM_CUDA

.PHONY: help
help:  ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: inplace
inplace:  ## Build the compiled modules into fastlm/ with the Python on PATH, for work on the C++ sources
	cmake -S . -B build/inplace -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$(command -v python)" \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"
	cmake --build build/inplace --parallel
	cmake --install build/inplace --prefix .
