# The README uses `make demo` and `make test`; `make help` lists all targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: demo test check prose bench bench-gateway bench-models bench-routing bench-failover docs format clean help

demo: $(VENV)/.installed  ## install, then measure the bundled model and write a report (under 3 minutes)
	$(BIN)/promptai demo

# Three workers keep two cores busy, since many tests wait for processes; tests that measure time follow alone, also when
# another has failed. A status above 1 is Ctrl-C or an error of pytest itself. Without byte code each of 400 processes
# would compile the package again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.dev  ## install what is missing, then the whole test suite
	@$(BIN)/pytest -m "not timed" --numprocesses=$(WORKERS) --dist=worksteal; first=$$?; \
		test $$first -le 1 || exit $$first; \
		$(BIN)/pytest -m timed $$(grep -rl --include='*.py' 'mark\.timed' tests); last=$$?; \
		test $$last -eq 0 && exit $$first; exit $$last

check: $(VENV)/.dev  ## lint, types, floors, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

prose: $(VENV)/.dev  ## list vague subjects, programs that talk and duplicate public class names
	$(BIN)/python docs/prose.py -v

bench: $(VENV)/.dev  ## accuracy and cost of the measuring harness (absolute figures)
	$(BIN)/python benchmarks/harness.py

bench-models: $(VENV)/.dev  ## forecasts of models against measurements (absolute figures)
	$(BIN)/python benchmarks/forecast.py

bench-routing: $(VENV)/.dev  ## gain of cache-aware routing: simulated boards on virtual time, then HTTP beside LiteLLM
	PYTHONPATH=tests $(BIN)/python -m benchmarks.routing

bench-failover: $(VENV)/.dev  ## kill engines in the middle of 1000 answers, and check that nothing is lost
	PYTHONPATH=tests $(BIN)/python benchmarks/failover.py

bench-gateway: $(VENV)/.dev  ## overhead of the gateway beside LiteLLM (absolute figures)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.gateway_cost

docs: $(VENV)/.dev  ## generate the reference pages from the code
	$(BIN)/python docs/generate.py

format: $(VENV)/.dev  ## format with ruff and apply its fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/  /' | sort

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "promptai needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	@touch $@
