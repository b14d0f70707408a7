# make setup   create the environment in .venv    make demo    train and evaluate on digits and points, about 8 minutes
# make test    run the whole test suite           make check   run ruff, pyright and the fast tests
# make lint    run ruff and pyright
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check


.PHONY: setup setup-dev demo test check lint clean digits-orders fashion-orders estimators reproduce fid-nfe \
	sample-devices cost cost-h100 cost-gpu faults devices fuzz smoke ncsn baselines precision diagnostics \
	preconditioning

setup: $(VENV)/.run-installed
setup-dev: $(VENV)/.dev-installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt $(VENV)/.run-installed
	$(PIP) -r requirements-dev.txt
	@touch $@

# Every line is a command that can be interrupted; make demo resumes.
DIGITS := $(BIN)/python main.py --config=configs/digits/ncsnpp.py
MORE := --config.training.init_from=runs/order1 --config.training.batch_size=32 --config.training.n_iters=4800
ORDER3 := --config.training.score_matching_order=3 $(MORE)
BOARD := $(BIN)/python main.py --config=configs/toy/checkerboard_demo.py
BOARD3 := --config.training.score_matching_order=3
demo: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(DIGITS) --workdir=runs/order1 --mode=eval
	$(DIGITS) --workdir=runs/order3 --mode=train $(ORDER3)
	$(DIGITS) --workdir=runs/order3 --mode=eval
	@$(BIN)/python main.py --workdir=runs/order3 --compare=runs/order1 --mode=report
	$(BOARD) --workdir=runs/board1 --mode=train
	$(BOARD) --workdir=runs/board1 --mode=eval
	$(BOARD) --workdir=runs/board3 --mode=train $(BOARD3)
	$(BOARD) --workdir=runs/board3 --mode=eval
	@$(BIN)/python main.py --workdir=runs/board3 --compare=runs/board1 --mode=report

# The tests start many processes. They share the bytecode, even where the environment says to write none.
test: setup-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2

# Runs ruff, pyright and the fast tests, for the loop between two edits. It takes under two minutes.
check: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Compares the orders on digits, and writes docs/results/digits.md. It takes about an hour on two cores, and resumes.
digits-orders: setup
	$(BIN)/python -m experiments.digits_orders

# Compares the orders on FashionMNIST, and writes docs/results/orders.md. It takes hours on two cores, and resumes. The
# data must be prepared first, see configs/fashion/ncsnpp.py.
fashion-orders: setup
	$(BIN)/python -m experiments.fashion_orders

# Compares preconditioned scores with published ones on the digits, and writes docs/results/preconditioning.md. It takes
# about half an hour on two idle cores, and resumes.
preconditioning: setup
	$(BIN)/python -m experiments.preconditioning

# Compares the noise of the estimators of orders 2 and 3 with its closed form, and writes docs/results/estimators.md.
estimators: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(BIN)/python -m experiments.estimators

# Runs the paper's synthetic experiments, and writes docs/results/synthetic.md. It takes about a quarter of an hour on an
# idle core, and resumes.
reproduce: setup
	$(BIN)/python -m experiments.reproduce

# Measures FID against evaluations for each sampler, on the first model of the demo, and writes docs/results/samples.md.
# It takes an hour or two on two idle cores, mostly for predictor-corrector sampling, and resumes.
fid-nfe: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(BIN)/python -m experiments.fid_nfe

# Compares Langevin dynamics without and with annealing, and writes docs/results/ncsn.md. It takes about a quarter of an
# hour on one idle core, and resumes.
ncsn: setup
	$(BIN)/python -m experiments.ncsn

# Compares the paper's alternatives to high-order score matching, and writes docs/results/baselines.md. It takes about ten
# minutes on one idle core, and resumes.
baselines: setup
	$(BIN)/python -m experiments.baselines

# Compares the demo's two models by noise level, and writes docs/results/diagnostics.md. It takes about ten minutes on two
# idle cores, half of them to train the models, and resumes.
diagnostics: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(DIGITS) --workdir=runs/order3 --mode=train $(ORDER3)
	$(DIGITS) --workdir=runs/order1_more --mode=train $(MORE)
	$(DIGITS) --workdir=runs/order1 --mode=diagnose
	$(DIGITS) --workdir=runs/order1_more --mode=diagnose $(MORE)
	$(DIGITS) --workdir=runs/order3 --mode=diagnose $(ORDER3)
	$(DIGITS) --workdir=runs/order1 --mode=diagnose --eval_folder=diagnose_96_steps --config.eval.ode_steps=96 \
		--config.eval.diagnose_images=16 --config.eval.diagnose_starts=1
	$(BIN)/python -m experiments.diagnostics

# Draws 10,000 digits on 1 and on 4 devices with two interruptions each, and checks that the images are the same.
sample-devices: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(BIN)/python -m experiments.sample_devices

# Measures a training step of a small network for every order, for docs/results/cost.md. It takes a quarter of an hour on
# two idle cores, mostly to compile, and resumes.
cost: setup
	$(BIN)/python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py --config.model.nf=32 \
		--config.model.num_res_blocks=1 --config.model.ch_mult="(1, 2)" --config.training.batch_size=8 \
		--workdir=runs/cost --mode=cost

# Compares bfloat16 with float32: losses, gradients and bits/dim, and writes docs/results/precision.md. It takes about ten
# minutes on two idle cores, and resumes.
precision: setup
	$(DIGITS) --workdir=runs/order1 --mode=train
	$(BIN)/python -m experiments.precision

# Predicts the memory of a training step on an H100, without one, for docs/results/cost.md. It takes hours on two cores, and
# resumes. It needs 10 GB of memory. The packages for GPUs need 6 GB of disk, and have a separate environment.
cost-h100: .venv-gpu/.installed
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m experiments.cifar10_cost

# Measures the training steps of the CIFAR-10 networks on a GPU of this machine, for docs/results/cost.md. It takes hours,
# mostly to compile, and resumes.
cost-gpu: .venv-gpu/.installed
	.venv-gpu/bin/python -m experiments.cifar10_cost --measure

.venv-gpu/.installed: requirements-gpu.txt requirements.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@touch $@

# Kills small trainings of each order at 30 random moments, and compares them with uninterrupted ones. It resumes.
faults: setup
	$(BIN)/python -m experiments.faults --kills=30

# Trains, evaluates and resumes small runs on 1, 2, 4 and 8 devices and in 2 processes, and compares them. It resumes.
devices: setup
	$(BIN)/python -m experiments.devices

# Gives main.py 300 kinds of bad input, and checks that each answer is one line that names the culprit.
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases=300 --processes=10

# Checks the installation: a tiny run is trained, evaluated and reported, in a minute or two.
SMOKE := $(BIN)/python main.py --config=configs/digits/smoke.py --workdir=runs/smoke
smoke: setup
	$(SMOKE) --mode=selftest
	$(SMOKE) --mode=train --config.training.n_iters=20
	$(SMOKE) --mode=eval --config.eval.enable_sampling=False
	$(BIN)/python main.py --workdir=runs/smoke --mode=report

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
