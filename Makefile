# Every command in the README. Each target does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help install data demo test test-all lint docker-check bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(INSTALLED)  ## Make .venv and install everything into it

$(INSTALLED): setup.cfg setup.py pyproject.toml $(wildcard keras_bn/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[serving,models,test,lint]'
	@ls keras_bn/ops/_operations.* > /dev/null 2>&1 || \
		echo 'keras_bn goes without its compiled operations, which need a C++ compiler: all works, only slower.'
	touch $@

data: $(INSTALLED)  ## Fetch Fashion-MNIST, or check what DATA=path names
	$(BIN)/python -m models.data $(if $(DATA),--data '$(DATA)')

demo: $(INSTALLED)  ## Train, export, serve and ask: all of it, once
	$(BIN)/python -m models.demo $(if $(DATA),--data '$(DATA)')

test: $(INSTALLED)  ## Run all tests but the slow ones
	-$(BIN)/python -m models.data
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: $(INSTALLED)  ## Run all tests
	-$(BIN)/python -m models.data
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docker-check: $(INSTALLED)  ## Check what Docker and Kubernetes run; build and ask the images where buildah is
	$(BIN)/python -m serving.check $(if $(PYTHON_IMAGE),--python_image '$(PYTHON_IMAGE)') \
		$(if $(TF_SERVING_IMAGE),--tf_serving_image '$(TF_SERVING_IMAGE)')

bench: $(INSTALLED)  ## Measure everything beside its peers (an hour); see benchmarks/RESULTS.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[serving,models,bench]'
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.layer --unknown_batch --dtypes float32 --axes last --tasks training inference
	$(BIN)/python -m benchmarks.network
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.serving

clean:  ## Remove what the other targets made, but the data
	rm -rf $(VENV) .demo build dist *.egg-info
