# Each target works on a fresh clone: the first makes a virtual environment, the next ones use it again.

PYTHON ?= python3# makes the environment; if it can import torch >= 2.11, that torch is used as it is
VENV   ?= .venv
TORCH  ?=#           what else to install, in pip's words; empty: see tools/venv.sh
ARGS   ?=#           passed on to pytest, the demo or the benchmark
# Test processes: most of the time goes into compilation, on one core each. A GPU is not shared.
JOBS   ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo logical)

RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal
OLD_TRANSFORMERS := 5.17.0# the oldest supported; its tests run beside those of the newest
HF_TESTS := tests/test_model_hf.py tests/test_main.py::test_explain_tiny
# What the newest alone is tested with: variants in which the model's own code plays no part.
NEWEST_ONLY := fp16 or symbolic-floats or fp32-cache

.PHONY: help demo examples test test-old-transformers bench lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    compile a small DeepSeek-V4, print what was fused and how far it is from eager"
	@echo "make examples  the other example: DeepSeek's own form of the model"
	@echo "make test    run the tests; those that need a GPU are skipped without one"
	@echo "make bench   time the operators; needs an NVIDIA GPU"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make clean   remove the virtual environment"
	@echo
	@echo "make test-old-transformers   the Hugging Face tests with transformers $(OLD_TRANSFORMERS)"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter, TORCH='torch==2.11.0' the torch to install if it has none,"
	@echo "JOBS=0 runs the tests in one process, ARGS='-k hc_pre' is passed on. Changing PYTHON or TORCH needs 'make clean' first."

demo: $(VENV)/.ready
	@echo "==> examples/demo.py"
	@$(RUN) examples/demo.py $(ARGS)

examples: $(VENV)/.ready
	@echo "==> examples/deepseek.py"
	@$(RUN) examples/deepseek.py

test: $(VENV)/.ready
	@echo "==> pytest"
	@$(PYTEST) $(ARGS)

test-old-transformers: $(VENV)/transformers-$(OLD_TRANSFORMERS)
	@echo "==> pytest with transformers $(OLD_TRANSFORMERS): $(HF_TESTS)"
	@PYTHONPATH=$< $(RUN) -c 'import transformers as t; assert t.__version__ == "$(OLD_TRANSFORMERS)", t.__version__'
	@PYTHONPATH=$< $(PYTEST) $(HF_TESTS) -k 'not ($(NEWEST_ONLY))' $(ARGS)

bench: $(VENV)/.ready
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make bench needs an NVIDIA GPU, and nvidia-smi finds none"; exit 1; }
	@for each in hyper_connection indexer indexer_scores compressor fp8_linear; do echo "==> benchmarks/$$each.py"; \
	$(RUN) benchmarks/$$each.py $(ARGS) || exit; done
	@echo "==> the tables of README.md and docs/measurements.md"
	@$(RUN) benchmarks/render.py

lint: $(VENV)/.ready
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV)

$(VENV)/.ready: pyproject.toml tools/venv.sh
	@PYTHON='$(strip $(PYTHON))' VENV='$(strip $(VENV))' TORCH='$(strip $(TORCH))' bash tools/venv.sh
	@touch $@

# In a folder of its own, with what it depends on: it needs an older huggingface_hub than the newest does.
$(VENV)/transformers-$(OLD_TRANSFORMERS): $(VENV)/.ready
	@echo "==> transformers $(OLD_TRANSFORMERS)"
	@rm -rf $@
	@$(RUN) -m pip install -qq --no-compile --target $@ transformers==$(OLD_TRANSFORMERS)
	@$(RUN) -m compileall -q -j 0 -x 'transformers/models/(?!auto/|deepseek_v4/)' $@ >/dev/null || true
	@touch $@
