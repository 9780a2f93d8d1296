# Two commands do everything on a fresh machine:
#
#   make bench    the main job: compare strategies on the bundled model
#   make test     style, types and tests
#
# Both first create $(VENV). What goes into it can be chosen:
#
#   make test TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 VENV=.venv-old
#
# A third, on a machine with an NVIDIA GPU, does what only that can do; see below:
#
#   make gpu GPU_PYTHON=python3

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

.PHONY: bench test test-oldest install install-oldest pytest lint types docs notebooks format clean \
	gpu gpu-tests gpu-kernels gpu-tune gpu-models gpu-races

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

# What only an NVIDIA GPU can say, in $(GPU_OUT): tests, the table of the kernels, models of ordinary size, races. A step
# that fails does not stop the others; each can be run alone. $(GPU_PYTHON) may be an interpreter that has everything.
GPU_OUT = results/gpu
GPU_PYTHON = $(bin)/python
GPU_KERNELS =
GPU_MODELS = llava-1.5-7b llava-next-7b llava-onevision-7b qwen2.5-vl-7b
GPU_BENCH = --device cuda --dtype bfloat16 --repeats 5
gpu_ready = $(if $(filter $(bin)/%,$(GPU_PYTHON)),$(installed))
into = 2>&1 | tee $(GPU_OUT)/$(1).txt
gpu-% gpu-model/%: SHELL = bash
gpu-% gpu-model/%: .SHELLFLAGS = -o pipefail -c

gpu: $(gpu_ready)
	$(MAKE) --keep-going gpu-tests gpu-kernels gpu-models gpu-races

gpu-tests: $(gpu_ready)
	@mkdir -p $(GPU_OUT)
	{ code=0; \
		$(GPU_PYTHON) -m pytest -n 8 --dist worksteal -q tests/kernels/test_kernels.py -p on_gpu $(TESTS) || code=1; \
		$(GPU_PYTHON) -m pytest -n 8 --dist worksteal -q tests/gpu.py $(TESTS) || code=1; \
		$(GPU_PYTHON) -m pytest -q -k gpu $(addprefix tests/test_,select.py strategies.py decoder_strategies.py) || code=1; \
		exit $$code; } $(call into,tests)

gpu-kernels: $(gpu_ready)
	$(GPU_PYTHON) benchmarks/kernels.py $(GPU_KERNELS) --out $(GPU_OUT)/kernels.md

# Launch parameters other than those that the library chooses. Not part of `gpu`.
gpu-tune: $(gpu_ready)
	$(GPU_PYTHON) benchmarks/kernels.py --tune $(GPU_KERNELS) --out $(GPU_OUT)/tuning.md

gpu-models: $(addprefix gpu-model/,$(GPU_MODELS))

gpu-model/%: $(gpu_ready)
	@mkdir -p $(GPU_OUT)
	$(GPU_PYTHON) -m vtc bench --random-weights $* $(gpu_strategies) $(GPU_BENCH) --overwrite --out $(GPU_OUT)/$* \
		$(call into,$*)

gpu-model/llava-1.5-7b: gpu_strategies = --keep 64 --spec fastervlm --spec divprune --spec todre --spec fastv
gpu-model/llava-next-7b: gpu_strategies = --keep 0.11 --spec fastervlm --spec divprune --spec todre --spec globalcom2
gpu-model/llava-onevision-7b: gpu_strategies = --keep 0.15 --frames 32 --spec fastervlm:saliency=received \
	--spec divprune --spec holitom --spec fastv
gpu-model/qwen2.5-vl-7b: gpu_strategies = --keep 0.11 --size 1344x1008 --spec fastervlm:saliency=received \
	--spec divprune --spec todre:pivot=received --spec fastv

# racecheck sees races in shared memory, memcheck sees what is outside of allocations, which must not be shared out then.
ours = nearest greedy dpp score average normaliser received assign merge spread peak
gpu-races: $(gpu_ready)
	@mkdir -p $(GPU_OUT)
	command -v compute-sanitizer > /dev/null || { echo 'compute-sanitizer is not on the PATH: skipped'; exit 0; }; \
	failed=0; for tool in racecheck memcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 --require-cuda-init no \
			--report-api-errors no $(foreach kernel,$(ours),--kernel-name kne=$(kernel)_kernel) \
			$(GPU_PYTHON) benchmarks/kernels.py --check --minutes 4 --only 'LLaVA-1.5 1 x' --only 'per frame' \
			--only CLIP --only SigLIP --only 'last token' --out $(GPU_OUT)/$$tool.md $(call into,$$tool) || failed=1; \
	done; exit $$failed

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
