# Two commands need nothing but Python 3.11 and pip: `make demo` and `make test`. Everything lands in .venv, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-deps
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' docker/cpu-lock.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# Whole runs wait for processes to start: a second worker tests meanwhile. By files, as tests/conftest.py says.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

IMAGE := ocrm-ray:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-ray$(shell sed -n 's/^ray==//p' docker/cpu-lock.txt)

.PHONY: demo test lint format bench-setup image-cpu image-gpu deploy-code clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime.stamp
	$(PY) -m ocrm_ray study configs/study/demo.yaml

test: $(VENV)/dev.stamp
	$(PY) -m pytest $(IN_TWO) --durations 40

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# What the comparison in tests/bench needs beyond the two locks; the environment itself stays as it is.
bench-setup: $(VENV)/bench.stamp

# The CPU build of torch is on PyTorch's own index; only where pip does not find it by itself is that index named.
$(VENV)/runtime.stamp: docker/cpu-lock.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"Python 3.11 is needed, {sys.executable} is {v}: make PYTHON=/path/to/python3.11")'
	@echo "setting up $(VENV): about 3 GB, a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r docker/cpu-lock.txt || ($(PIP) --index-url $(TORCH_INDEX) '$(TORCH)' && $(PIP) -r docker/cpu-lock.txt)
	@echo "building DeepSpeed's communication op, once"
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/torch_extensions $(PY) -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()' >$(VENV)/op-build.log 2>&1 \
		|| echo "the op did not build (see $(VENV)/op-build.log); DeepSpeed goes on without it"
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp docker/dev-lock.txt
	$(PIP) -r docker/dev-lock.txt
	touch $@

$(VENV)/bench.stamp: $(VENV)/runtime.stamp docker/bench-lock.txt
	rm -rf $(VENV)/bench
	$(PIP) --target $(VENV)/bench -r docker/bench-lock.txt
	touch $@

# Images of what the code needs, and the code for a cluster that gets it from a config map: see deploy/README.md.
image-cpu:
	docker build --build-arg TORCH_INDEX=$(TORCH_INDEX) -f docker/Dockerfile.cpu -t $(IMAGE)-cpu docker

image-gpu:
	docker build -f docker/Dockerfile.gpu -t $(IMAGE)-gpu docker

deploy-code:
	git archive --format zip --prefix ocrm-ray/ -o deploy/kuberay/base/ocrm-ray.zip HEAD ocrm_ray actors configs

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
