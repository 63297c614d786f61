# make demo   set up a virtual environment, run SFT, reward model and PPO on the bundled model, and report on them
# make test   the same, then the whole test suite
# make test-deepspeed  train with DeepSpeed on the CPU, in an environment of its own
# make check  lint and types
# make docs   the documentation as a site, into site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo/ppo
SETTINGS ?=
JOBS ?= 2

.PHONY: demo test test-deepspeed check docs clean

demo: $(VENV)/installed $(RUN)
	$(BIN)/alignkit chat $(RUN) --prompt "How do I get red wine out of a carpet?"
	$(BIN)/alignkit report $(dir $(RUN))

# One thread a process: threads of several processes on the same cores wait for each other.
test: demo
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

test-deepspeed: $(VENV)/installed
	$(BIN)/python scripts/test_deepspeed.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=plugins $(BIN)/lint-imports

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

$(RUN): | $(VENV)/installed
	$(BIN)/alignkit train --plugin ppo --output $(@D) --resume $(SETTINGS)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo,qlora,examples]'
	$(BIN)/alignkit demo
	touch $@

clean:
	rm -rf $(VENV) runs site
