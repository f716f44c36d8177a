# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLD := .venv-oldest
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: install demo test test-oldest quick check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/train_llama.py

test: $(STAMP)
	$(BIN)/python $(PYTEST)

# Two minutes on two cores: every room, without generated code and large models.
quick: $(STAMP)
	$(BIN)/python $(PYTEST) -m 'not inductor and not slow'

# The suite on the lowest torch that pyproject.toml promises.
test-oldest: $(OLD)/.installed
	$(OLD)/bin/python $(PYTEST)

$(OLD)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLD)
	grep -v '^torch==' constraints.txt > $(OLD)/constraints.txt
	$(OLD)/bin/pip install --quiet -c $(OLD)/constraints.txt torch==$(OLDEST)
	$(OLD)/bin/pip install --quiet -c $(OLD)/constraints.txt -e '.[dev]'
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST)

clean:
	rm -rf $(VENV) $(OLD) out build dist
