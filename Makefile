# `make` lists the targets. Each of them makes .venv first, once, and again when a file that it is made of changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Stands in .venv from the first step of an installation to its last: found later, it means a half-made .venv.
UNFINISHED := $(VENV)/.unfinished

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# pip compiles its files one after another, compileall on every core. What does not compile, such as a template that only
# looks like Python, is no failure.
$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@for python in python3.11 python3.12 python3 none; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2> /dev/null; then break; fi; \
	done; \
	if [ "$$python" = none ]; then \
	  echo "make: Python 3.11 or 3.12 is needed; python3 is $$(python3 --version 2> /dev/null || echo missing)." \
	    "Install python3.11 with its venv module, and run make again." >&2; \
	  exit 1; \
	fi; \
	if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	  echo "Making $(VENV) with $$python"; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	touch $(UNFINISHED); \
	echo "Installing into $(VENV): the first time this can take some minutes"; \
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e './client[c2pa,media,web]' -e '.[dev,training]'; \
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true; \
	rm $(UNFINISHED); \
	touch $@

.PHONY: install
install: $(INSTALLED) ## Make .venv with everything in it

.PHONY: demo
demo: $(INSTALLED) ## Stream six seconds of speech to a server on this machine, and write the video
	@$(BIN)/live-avatar demo

.PHONY: talk
talk: $(INSTALLED) ## Talk to the avatar on a page in your browser, until Ctrl-C
	@$(BIN)/live-avatar talk

# Processes that run the tests, each a file at a time: more than two cores, since tests wait for servers. 0: none but pytest.
WORKERS := 4

# The type checker uses one core for a minute, so it runs beside the tests.
.PHONY: test
test: style ## Run the linter, the type checker and the tests that are not slow
	@$(BIN)/mypy & types=$$!; code=0; \
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile || code=$$?; \
	wait $$types || { echo "The type checker has found errors: see above." >&2; code=1; }; \
	exit $$code

.PHONY: test-slow
test-slow: $(INSTALLED) ## Run the tests marked slow
	@$(BIN)/pytest -q -m slow

# checkov has an environment of its own: it pins packages that .venv has newer.
CHECKOV := .k8s/.checkov-3.3.30

$(CHECKOV): | $(INSTALLED)
	@echo "Installing checkov into .k8s"; \
	$(BIN)/python -m venv --clear .k8s; \
	.k8s/bin/python -m pip install -qq --disable-pip-version-check checkov==$(lastword $(subst -, ,$@)); \
	touch $@

.PHONY: prepare-k8s
prepare-k8s: $(INSTALLED) $(CHECKOV)

.PHONY: test-k8s
test-k8s: prepare-k8s ## Check k8s/ and docker/ whole, with rehearsals (as root; says which Debian packages are missing)
	@$(BIN)/pytest -q -m "not slow" tests/k8s

# The frameworks of voice agents have an environment of their own, without torch, and with versions that .venv cannot have.
INTEGRATIONS := .venv-integrations
FRAMEWORKS := $(INTEGRATIONS)/.installed
ADAPTERS := $(addprefix client/live_avatar_client/,conversation.py livekit.py pipecat.py playout.py)

$(FRAMEWORKS): client/pyproject.toml constraints-integrations.txt | $(INSTALLED)
	@echo "Installing LiveKit Agents and Pipecat into $(INTEGRATIONS)"; \
	$(BIN)/python -m venv --clear $(INTEGRATIONS); \
	$(INTEGRATIONS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-integrations.txt \
	  -e './client[livekit,pipecat]' grpc-stubs mypy pytest types-protobuf; \
	touch $@

.PHONY: test-integrations
test-integrations: $(FRAMEWORKS) ## Check the adapters to LiveKit Agents and Pipecat, with a server that runs in .venv
	@$(INTEGRATIONS)/bin/mypy --follow-imports=silent $(ADAPTERS) client/examples
	@$(BIN)/live-avatar export --preset tiny --output artifacts/tiny
	@$(INTEGRATIONS)/bin/python -m pytest -q --confcutdir=tests/integrations tests/integrations

MINUTES := 60

.PHONY: soak
soak: $(INSTALLED) ## Let sessions come and go for an hour (MINUTES=60), and check every frame
	@$(BIN)/live-avatar export --preset tiny --output artifacts/tiny
	@$(BIN)/python -m perf.soak --artifacts artifacts/tiny --minutes $(MINUTES) --report out/soak.json

.PHONY: style
style: $(INSTALLED) ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: lint
lint: style ## Check style, formatting and types
	@$(BIN)/mypy

.PHONY: format
format: $(INSTALLED) ## Format the code, and fix what the linter can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: export
export: $(INSTALLED) ## Export the tiny avatar's graphs to artifacts/
	@$(BIN)/live-avatar export --preset tiny --output artifacts/tiny

.PHONY: clean
clean: ## Remove what the commands made (out/, artifacts/, caches); .venv, .venv-integrations and .k8s stay
	@rm -rf out artifacts .perf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
