# `make quickstart` and `make test` need nothing but Python 3.11 or 3.12: each makes or reuses .venv.
# TORCH names the build of PyTorch, TORCH_INDEX the package index that has it, for example
#   make quickstart TORCH=torch==2.13.0 TORCH_INDEX=<PyTorch's index for your CUDA version>
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: quickstart test test-families lint benchmark clean
.DEFAULT_GOAL := quickstart

quickstart: .venv/installed
	.venv/bin/python -m pipeline run sweeps/quickstart.yaml

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-families: .venv/installed
	.venv/bin/python -m pytest -m '' tests/families tests/stages/models/test_families.py \
	    tests/pipeline/test_whole_search.py tests/pipeline/test_readme_commands.py

lint: .venv/installed
	.venv/bin/python -m ruff check .

# DENSE and MOE name Hugging Face folders, for example of a quickstart's store.
benchmark: .venv/installed-benchmark
	.venv/bin/python benchmarks/multiple_choice.py $(DENSE) $(MOE)
	.venv/bin/python benchmarks/generation.py $(DENSE) $(MOE)
	.venv/bin/python benchmarks/perplexity.py $(DENSE) $(MOE)
	.venv/bin/python benchmarks/training.py $(MOE)
	.venv/bin/python benchmarks/routes.py $(MOE)
	.venv/bin/python benchmarks/budgets.py
	.venv/bin/python benchmarks/search.py
	.venv/bin/python benchmarks/image_attacks.py
	.venv/bin/python benchmarks/request_memory.py

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or 3.12; make PYTHON=/path/to/it"; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	.venv/bin/python -m pip install -q $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt
	.venv/bin/python -m pip install -q -e '.[test]' -c constraints.txt
	touch $@

.venv/installed-benchmark: .venv/installed
	.venv/bin/python -m pip install -q -e '.[benchmark]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
