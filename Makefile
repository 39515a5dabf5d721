# Every command in the README. Each target does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_TESTS ?= tests
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help install data demo test test-all test-oldest torch mkdocs wheel wheel-check release lint docker-check bench \
	experiments docs docs-serve clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(INSTALLED)  ## Make .venv and install everything into it

$(INSTALLED): setup.cfg setup.py pyproject.toml $(wildcard keras_bn/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[serving,models,test,lint]'
	touch $@
	@$(BIN)/keras-bn --version

data: $(INSTALLED)  ## Fetch Fashion-MNIST, or check what DATA=path names
	$(BIN)/python -m models.data $(if $(DATA),--data '$(DATA)')

demo: $(INSTALLED)  ## Train, export, serve and ask: all of it, once
	$(BIN)/python -m models.demo $(if $(DATA),--data '$(DATA)')

torch: $(INSTALLED)
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[torch]' 2>/dev/null || \
		echo "No CPU build of PyTorch is to be had here: tests/conformance/test_torch.py will not compare with it."

test: torch  ## Run all tests but the slow ones
	-$(BIN)/python -m models.data
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: torch  ## Run all tests
	-$(BIN)/python -m models.data
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz,docs]'
	$(BIN)/python -m pytest -n 2

test-oldest:  ## Run the tests of the library with the oldest packages that setup.cfg allows
	mkdir -p build
	$(PYTHON) -m tests.lower_bounds > build/oldest.txt
	test -x .venv-oldest/bin/python || $$($(PYTHON) -m tests.pythons 3.10) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/oldest.txt \
		--editable '.[serving,models,test]'
	.venv-oldest/bin/python -m pytest -n 2 -m 'not slow' $(OLDEST_TESTS)

wheel: $(INSTALLED)  ## Build sdist and wheel into dist/
	$(BIN)/python -m tests.wheel dist

wheel-check: wheel  ## Install that wheel for each Python from 3.10 to 3.13 that is here, and use it as the README does
	$(BIN)/python -m tests.wheel dist --check

release: $(INSTALLED)  ## Build sdist and wheel into dist/, check and install them, and print the release notes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	$(BIN)/python -m tests.release dist

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docker-check: $(INSTALLED)  ## Check what Docker and Kubernetes run; TF_SERVING_BINARY=/path/to/tensorflow_model_server asks it too
	$(BIN)/python -m serving.check $(if $(TF_SERVING_BINARY),--tf_serving_binary '$(TF_SERVING_BINARY)') \
		$(if $(PYTHON_IMAGE),--python_image '$(PYTHON_IMAGE)') \
		$(if $(TF_SERVING_IMAGE),--tf_serving_image '$(TF_SERVING_IMAGE)')

bench: $(INSTALLED)  ## Measure everything beside its peers (an hour); see benchmarks/RESULTS.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[serving,models,bench,interop]'
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.layer --unknown_batch --dtypes float32 --axes last --tasks training inference
	$(BIN)/python -m benchmarks.network
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.replicas
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.interop

experiments: $(INSTALLED)  ## Measure what is claimed of batch norm (under an hour); see docs/experiments/README.md
	-$(BIN)/python -m models.data
	$(BIN)/python -m models.experiments all

mkdocs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'

docs: export NO_MKDOCS_2_WARNING := 1
docs: mkdocs  ## Make the site of docs/ in build/site; a dead link is an error
	$(BIN)/python -m mkdocs build --quiet
	@echo build/site/index.html

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: mkdocs  ## Show that site at http://127.0.0.1:8000/ while pages are changed
	$(BIN)/python -m mkdocs serve

clean:  ## Remove what the other targets made, but the data
	rm -rf $(VENV) .venv-oldest .demo build dist *.egg-info
