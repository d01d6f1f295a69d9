# Needs a Python from 3.11 to 3.13, make and git. Everything is installed into .venv.

PYTHONS := 3.11 3.12 3.13
# The first of these that starts: a shim of pyenv is on the path even where its Python is not chosen.
PYTHON ?= $(or $(firstword $(foreach version,$(PYTHONS),$(shell python$(version) -c 'print("python$(version)")' \
	2> /dev/null))),$(error no Python from 3.11 to 3.13 is on the path: name one with PYTHON=...))
# A directory for another Python or ENGINE than .venv was made with: make test VENV=.venv-3.13 PYTHON=python3.13
VENV ?= .venv
# gpu for machines with NVIDIA GPUs; a virtual environment holds one of the two.
ENGINE ?= cpu
DEVICE ?= cuda
# Of the random models of gpu-bench: tiny, 1b or 8b.
SHAPE ?= 1b
UV_VERSION := 0.13.9
# Two processes, each of which runs whole files, in their order: those of one file share what they have made.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := build/models.stamp
KNOWLEDGE_BASE := build/emoji/knowledge_base.stamp
GAZETTEER := build/gazetteer/knowledge_base.stamp
DEMONSTRATIONS := build/emoji/demonstrations.stamp

# Python may keep what it has compiled: every stage of a job is a process that imports torch.
unexport PYTHONDONTWRITEBYTECODE

# Nothing reports its use to anybody, and models are read from local directories only.
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE = 1
export RAY_USAGE_STATS_ENABLED = 0
export VLLM_NO_USAGE_STATS = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo gazetteer-demo train-demo cluster-trial test test-unit test-pythons gpu-check gpu-bench test-all test-chaos \
	check format lint hygiene types bench bench-decode docs site requirements dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create .venv with the pinned requirements and this project

demo: $(KNOWLEDGE_BASE) $(DEMONSTRATIONS) ## link a few mentions of emoji, pictures and text, with real models
	$(BIN)/python examples/demo.py

gazetteer-demo: $(GAZETTEER) ## link names of places that several places have, by the text alone
	rm -rf build/gazetteer/linked
	$(BIN)/gemel link examples/gazetteer/link.toml
	$(BIN)/gemel evaluate build/gazetteer/linked

train-demo: $(KNOWLEDGE_BASE) $(DEMONSTRATIONS) ## make the demo's feature mapper anew
	rm -rf build/emoji/training build/emoji/examples
	$(BIN)/python jobs/train.py jobs/configs/emoji.toml
	cp build/emoji/training/feature_mapper/mapper.* examples/emoji/feature_mapper/

cluster-trial: $(KNOWLEDGE_BASE) $(DEMONSTRATIONS) ## link and train a little on a Ray cluster of two nodes on this machine
	PATH=$(CURDIR)/$(BIN):$$PATH cluster/local_trial.sh

test: test-unit ## run the fast tests, those without a model or Ray first
	$(BIN)/pytest $(PARALLEL) -m "not heavy and not unit"

test-unit: $(INSTALLED) ## run the tests that need neither a model nor Ray; COVERAGE=--cov measures what they reach
	$(BIN)/pytest $(PARALLEL) -m unit $(shell grep -rl --include='test_*.py' pytest.mark.unit tests) $(COVERAGE)

test-pythons: ## lint, check types and run the unit tests on each Python that is installed, in .venv-3.11 and so on
	@set -e; for version in $(PYTHONS); do \
		if python$$version -c '' 2> /dev/null; then \
			$(MAKE) lint types test-unit VENV=.venv-$$version PYTHON=python$$version; \
		else \
			echo "python$$version is not on the path: left out"; \
		fi; \
	done

gpu-check: $(INSTALLED) ## check what a GPU changes; ENGINE=gpu installs for it, DEVICE=cpu tries the checks
	$(BIN)/pytest tests -m gpu --device $(DEVICE) -v --tb=line
	test $(DEVICE) = cpu || VLLM_USE_V2_MODEL_RUNNER=0 $(BIN)/pytest tests/decoding/test_engines.py -m gpu --device $(DEVICE) \
		-v --tb=line

gpu-bench: $(INSTALLED) ## measure what a GPU does; DEVICE=cpu SHAPE=tiny tries it, without a GPU's kernels
	@set -e; for part in device $(if $(filter cuda,$(DEVICE)),kernels) hostcost mask training encoder transformers_engine vllm; do \
		DEVICE=$(DEVICE) SHAPE=$(SHAPE) $(BIN)/python -m benchmarks.gpu $$part; \
	done

test-all: $(KNOWLEDGE_BASE) $(DEMONSTRATIONS) ## run all tests, those with real models included, on more examples
	$(BIN)/pytest -m "" --hypothesis-profile=thorough

test-chaos: $(INSTALLED) ## link while processes and a node are killed at random; a few minutes
	$(BIN)/pytest -m chaos

check: lint types hygiene test ## everything that has to pass before a commit

format: $(INSTALLED) ## rewrite the code in the house format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(INSTALLED) ## check format, lint rules, import layers and the workflows of the public host
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --no-progress .github

hygiene: $(INSTALLED) ## check line ends, white space, sizes and syntax of all files, as pre-commit does
	SKIP=lint,types $(BIN)/pre-commit run --all-files

types: $(INSTALLED) ## check types
	$(BIN)/mypy

bench: $(KNOWLEDGE_BASE) $(DEMONSTRATIONS) $(GAZETTEER) ## measure the accuracy of the score; WIKIDIVERSE=DIRECTORY holds that corpus
	$(BIN)/python -m benchmarks.accuracy alone $(WIKIDIVERSE)
	$(BIN)/python -m benchmarks.accuracy score $(WIKIDIVERSE) --shipped-weights

bench-decode: $(MODELS) ## measure decoding; WIKIDIVERSE as for bench, TITLES=FILE: a Parquet file of names
	$(BIN)/python -m benchmarks.decoding $(WIKIDIVERSE) $(TITLES)

docs: $(INSTALLED) ## write the figures, the results and the reference of the documents anew
	PYTHONPATH=. $(BIN)/python tools/documents.py

site: $(INSTALLED) ## build the documents as a site, in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

requirements: $(INSTALLED) ## resolve requirements-cpu.txt and requirements-gpu.txt anew
	$(call resolve,cpu,$(EXTRAS))
	$(call resolve,gpu,$(EXTRAS) aws)

# What both files hold beside the engine.
EXTRAS := report train import serve demo dev
COMPILE := $(BIN)/uv pip compile --quiet --no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml

# One file of pins serves all of PYTHONS: those of the newest; the others have to resolve to the same.
define resolve
$(COMPILE) $(addprefix --extra ,$(1) $(2)) --upgrade --python-version $(lastword $(PYTHONS)) \
	--output-file requirements-$(1).txt
@set -e; for version in $(filter-out $(lastword $(PYTHONS)),$(PYTHONS)); do \
	$(COMPILE) $(addprefix --extra ,$(1) $(2)) --python-version $$version --constraint requirements-$(1).txt \
		| diff requirements-$(1).txt -; \
done
endef

dist: $(INSTALLED) ## build the wheel and the source distribution, in dist/
	$(BIN)/uv build --quiet

clean: ## remove what was built; virtual environments stay
	rm -rf build dist gemel_engine.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(INSTALLED): requirements-$(ENGINE).txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --requirement requirements-$(ENGINE).txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

$(MODELS): examples/demo_models.py | $(INSTALLED)
	$(BIN)/python examples/demo_models.py build/models
	touch $@

$(KNOWLEDGE_BASE): examples/emoji/entities.parquet $(MODELS)
	rm -rf $(basename $@)
	$(BIN)/gemel build-kb examples/emoji/entities.parquet $(basename $@) --tokenizer build/models/smollm2-135m \
		--mention-encoder build/models/minilm --image-encoder build/models/efficientnet-lite2
	touch $@

$(GAZETTEER): examples/gazetteer/build_corpus.py examples/gazetteer/sentences.txt $(MODELS)
	$(BIN)/python examples/gazetteer/build_corpus.py --output-dir build/gazetteer
	rm -rf $(basename $@)
	$(BIN)/gemel build-kb build/gazetteer/entities.parquet $(basename $@) \
		--tokenizer build/models/smollm2-135m --mention-encoder build/models/minilm
	touch $@

$(DEMONSTRATIONS): examples/emoji/train.parquet examples/emoji/entities.parquet $(MODELS)
	rm -rf $(basename $@)
	$(BIN)/gemel build-demonstrations examples/emoji/train.parquet examples/emoji/entities.parquet \
		$(basename $@) --mention-encoder build/models/minilm --image-encoder build/models/efficientnet-lite2
	touch $@
