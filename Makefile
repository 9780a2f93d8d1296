# Two commands do everything on a fresh machine:
#
#   make bench    the main job: compare strategies on the bundled model
#   make test     style, types and tests
#
# Both first create $(VENV). What goes into it can be chosen:
#
#   make test TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 VENV=.venv-old

VENV = .venv
TORCH = torch==2.13.0
TRANSFORMERS = transformers>=5.17
TRITON =
EXTRA = dev
OLDEST = transformers==5.17.0
TESTS =
NOTEBOOKS =
HOST_TESTS = $(addprefix tests/, kernels/test_proofs.py test_laws.py test_support.py test_interception.py \
	test_decoder_site.py test_refusals.py test_zoo.py) $(wildcard tests/test_adapters_*.py)
# Its interpreter cannot count with numpy 2.4 and newer.
OLDEST_TRITON = triton==3.6.0 numpy<2.4
oldest = VENV=.venv-oldest EXTRA=test TRANSFORMERS='$(OLDEST)' TRITON='$(OLDEST_TRITON)'
usable = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
PYTHON = $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p $(usable) && echo $$p && break; done)

bin = $(VENV)/bin
installed = $(VENV)/.installed
wanted = $(strip $(TORCH) $(TRANSFORMERS) $(TRITON))

.PHONY: bench test test-oldest install install-oldest pytest lint types docs notebooks format clean

bench: $(installed)
	$(bin)/vtc bench --model tiny-llava --spec fastervlm --spec divprune --spec todre --keep 0.5,0.25,0.11 \
		--limit 500 --overwrite --out results/tiny-llava

test: lint types pytest

# What other releases of transformers and Triton can break, under the oldest that have to pass. Which combination a law
# is tried on matters less there, so it is every third.
test-oldest:
	$(MAKE) pytest $(oldest) TESTS='--every 3 $(HOST_TESTS)'

install: $(installed)

install-oldest:
	$(MAKE) install $(oldest)

pytest: $(installed)
	$(bin)/pytest -n auto --dist worksteal $(TESTS)

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(installed)
	$(bin)/mypy

# The site, in site/; its theme would advertise a successor.
docs: $(installed)
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict

# Run them, and write what they print and draw to docs/notebooks/.
notebooks: $(installed)
	$(bin)/python notebooks/render.py $(NOTEBOOKS)

format: $(installed)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf build dist *.egg-info .venv .venv-oldest

# Ask again for an install when other versions are wanted than those in the environment.
$(shell [ "$$(cat $(installed) 2>/dev/null)" = '$(wanted)' ] || rm -f $(installed))

# torch goes first, so that nothing that depends on it chooses another build.
$(installed): setup.cfg pyproject.toml
	@'$(PYTHON)' $(usable) || { echo 'vtc needs Python 3.10 or newer, with venv: make PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Installing into $(VENV): about a minute'
	@'$(PYTHON)' -m venv $(VENV)
	@$(bin)/pip install -qq --disable-pip-version-check '$(TORCH)'
	@$(bin)/pip install -qq --disable-pip-version-check '$(TORCH)' '$(TRANSFORMERS)' -e '.[$(EXTRA)]'
	@[ "$$(uname)" != Linux ] || [ -z '$(TRITON)' ] || \
		$(bin)/pip install -qq --disable-pip-version-check --no-deps $(foreach package,$(TRITON),'$(package)')
	@echo '$(wanted)' > $@
