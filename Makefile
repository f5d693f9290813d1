# make demo | make test | make test-thorough | make docs | make test-faults | make test-nodes | make test-families | make test-browser | make bench | make lint. Each sets up .venv first; nothing outside it is touched but the cache of the demo model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers

.PHONY: setup demo docs test test-thorough test-faults test-nodes test-families test-browser screenshots bench lint format clean

setup: $(STAMP)

# torch comes first and by name: an index that offers a CPU build then wins over the default CUDA one.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# Two at a time: most of what a test of a whole run takes is waiting for processes that start.
test: setup
	$(BIN)/python -m pytest tests -n 2 --dist worksteal

# More cases of whole runs: all methods by all numbers of workers, more families, every way of keeping; half an hour.
test-thorough: setup
	$(BIN)/python -m pytest tests -m thorough -n 2 --dist worksteal

# Some hundred kills and disk errors, each in a run of its own: about an hour.
test-faults: setup
	$(BIN)/python -m pytest tests/faults --all-faults

# Every family with four recipes, end to end; writes docs/families.md.
test-families: setup
	$(BIN)/python -m pytest tests/all_families

# Nodes with networks, disks and processes of their own, some of which lose their power; `ray up` over ssh, and a job in
# Slurm, where sshd, rsync, nft and Slurm are installed: needs root.
test-nodes: setup
	$(BIN)/python -m pytest tests/nodes tests/deploy -rs

# The report in a real browser: Chromium must be installed, as by `apt-get install chromium` on Debian.
test-browser: setup
	$(BIN)/python -m pytest tests/browser

# What the documentation shows of the report, of a run on the demo's model.
screenshots: setup
	rm -rf build/report
	$(BIN)/python examples/report.py build/report
	$(BIN)/python -m pytest tests/browser -k screenshots --report build/report/report.html --screenshots docs/images

# Beside other tools on the same work, and against the machine's limit: some two hours, on a machine that does nothing
# else, with 5 GB of disk. WikiText-2 is to be given:
# make bench CALIBRATION=wikitext2-valid.txt TEXT=wikitext2-raw-test.txt
bench: setup $(PEERS)/.installed
	$(BIN)/python benchmarks/peers.py --calibration $(CALIBRATION) --text $(TEXT) --peer-python $(PEERS)/bin/python
	$(BIN)/python benchmarks/solve.py
	$(BIN)/python benchmarks/scaling.py measure --folder $(or $(TMPDIR),/tmp)
	$(BIN)/python benchmarks/large_block.py --folder $(or $(TMPDIR),/tmp)
	$(BIN)/python benchmarks/growth.py --folder $(or $(TMPDIR),/tmp)
	$(BIN)/python benchmarks/report.py

$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	touch $@

# The site in build/docs; a link or an anchor that leads nowhere is an error.
docs: setup
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
