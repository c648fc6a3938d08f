PYTHON ?= python3
VENV := .venv
JOBS ?= 2
RUN := $(VENV)/bin/python
# Two jobs of one thread each beat one of two on small models.
export OMP_NUM_THREADS ?= 1
# Nothing here needs the Hub; offline, its client does not retry.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-controls demo-lora demo-photos benchmark-demo test test-slow quality tiny-sd clean

demo: $(VENV)/.ready
	$(RUN) -m demo.run

demo-controls: $(VENV)/.ready
	$(RUN) -m demo.run --controls

demo-lora: $(VENV)/.ready
	$(RUN) -m demo.lora

demo-photos: $(VENV)/.ready
	$(RUN) -m demo.photos

benchmark-demo: $(VENV)/.ready
	$(RUN) -m demo.pictures runs/benchmark-demo/data
	$(RUN) -m ietagc_diffusers benchmark --config configs/benchmark_demo.yaml --jobs 2

test: $(VENV)/.ready
	$(RUN) -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

quality: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/types && mkdir -p build/types/ietagc_diffusers
	ln -s $(CURDIR)/ietagc_diffusers/* $(CURDIR)/eval $(CURDIR)/sscd build/types/ietagc_diffusers
	cd build/types && $(CURDIR)/$(RUN) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

tiny-sd: $(VENV)/.ready
	OMP_NUM_THREADS=2 $(RUN) -m demo.tiny_sd

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (diffusers 0.42 asks for it), found " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build runs
