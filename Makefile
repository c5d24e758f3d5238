PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
# Output of the demo; any writable folder.
OUT ?= demo-output

# Random residual programs that `make fuzz` tries, and the seed they are drawn from.
FUZZ ?= 2000
SEED ?= 1

.PHONY: install demo test test-quick fuzz check docs wheel clean

install: $(STAMP)

# torch goes in first and alone, pinned, so that nothing later resolves it to a build with CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf,plot,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/attnres-fx demo --output $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=40

# Each test with its first parameter set, without the slow ones.
test-quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Random residual programs against their definition; the seed of a failure is in the name of its test.
fuzz: $(STAMP)
	@echo "$(FUZZ) programs from seed $(SEED); the same again: make fuzz FUZZ=$(FUZZ) SEED=$(SEED)"
	ATTNRES_FUZZ=$(FUZZ) ATTNRES_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -n 2 --dist worksteal tests/passes/streams/test_random_programs.py

# The site is built from sources alone, without importing them, in seconds: so `check` builds it, strictly.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel must import, and run the demo, where nothing of this checkout can be seen.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel-site dist/*.whl
	mkdir -p build/empty
	cd build/empty && PYTHONPATH=../wheel-site ../../$(BIN)/python -P -c "import attnres_fx, pathlib; where = pathlib.Path(attnres_fx.__file__).resolve(); assert 'wheel-site' in str(where), where; print('imported', attnres_fx.__version__, 'from the wheel')"
	cd build/empty && PYTHONPATH=../wheel-site ../../$(BIN)/python -P -c "import sys; from attnres_fx.cli import main; sys.exit(main())" demo --size tiny --steps 3 --more-steps 2 --output demo-output

clean:
	rm -rf $(VENV) build dist *.egg-info
