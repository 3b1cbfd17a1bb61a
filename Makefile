# make: install the package with all that belongs to it into .venv. make demo: train a small model for a few minutes,
# draw and score ensembles for data/testing, compare them with those of shipped weights; http://localhost:8097 shows it.
# make test: run the quick tests. make test-long: run all others, which start many processes, a browser, a notebook, a
# benchmark or an install. make lint: ruff. make visdom: the server for the live view of runs, http://localhost:8097.
# They install into .venv first, in the versions of constraints.txt. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
DEMO := results/demo
# visdom's build needs the constraints, too: older pips read the first variable for that, newer ones the second
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip

# bfloat16 pays where the processor has it
BF16 := $(shell grep -qsE "avx512_bf16|amx_bf16" /proc/cpuinfo && echo True || echo False)
# A model small enough for a laptop: it sees the central 64 x 64 pixels and predicts the mask rather than the noise.
DEMO_FLAGS := --image_size 64 --fit crop --image_channels 1 --num_channels 32 --channel_mult 1,1,2,4 --num_res_blocks 1 \
  --num_heads 1 --attention_resolutions 8 --num_filters 8,16,32 --predict_xstart True --noise_schedule cosine \
  --lr 1e-3 --lr_anneal_steps 1200 --batch_size 4 --ema_rate 0.99 --use_bf16 $(BF16)

.PHONY: install demo test test-long lint visdom clean

install: .venv/installed

# phantoms are made on the spot: the 24 example cases alone would be learnt by heart
demo: .venv/installed
	$(BIN)/python scripts/make_phantoms.py --output_dir $(DEMO)/training --count 2000 --seed 1
	mkdir -p $(DEMO)/training/example && cp -r data/training/. $(DEMO)/training/example
	$(BIN)/python scripts/segmentation_train.py --data_dir $(DEMO)/training --results_dir $(DEMO) $(DEMO_FLAGS) --sample_interval 300 \
	  --visdom start
	$(BIN)/python scripts/segmentation_sample.py --data_dir data/testing --model_path $(DEMO)/emasavedmodel_0.99_001200.pt \
	  --results_dir $(DEMO) --fit crop --num_ensemble 16 --batch_size auto --sampler best --use_bf16 $(BF16) --visdom connect
	$(BIN)/python scripts/segmentation_sample.py --data_dir data/testing --model_path pretrained:phantoms \
	  --results_dir $(DEMO)/energy --fit crop --num_ensemble 16 --batch_size auto --spread False
	$(BIN)/python scripts/segmentation_evaluate.py $(DEMO) $(DEMO)/energy --data_dir data/testing --fit crop
	$(BIN)/python scripts/segmentation_evaluate.py --data_dir data/testing --samples_dir $(DEMO) --fit crop

test: .venv/installed
	$(PYTEST) -m "not long" tests

test-long: .venv/installed
	$(PYTEST) -m long tests

lint: .venv/installed
	$(BIN)/ruff check .

visdom: .venv/installed
	$(BIN)/python -m guided_diffusion.live.server

.venv/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --editable ".[all,dev]"
	touch $@

clean:
	rm -rf .venv $(DEMO) build *.egg-info
