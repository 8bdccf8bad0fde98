# `make demo` and `make test` work on a machine with Python 3.11 and nothing else: each creates .venv first.
PYTHON ?= python3
BIN := .venv/bin

# The demo's input and output. `make demo DATA=folder OUT=folder RECIPE=file` takes other sounds the same way.
DATA ?= manifests/sample
OUT ?= runs/demo
RECIPE ?= manifests/recipes/sample_mn04.toml
# As in an archive, most clips have no labels: a fifth keeps its own. A fifth of the clips takes five times the recipe's
# epochs for about as many steps, on the same curve of the learning rate.
FEW := --label-share 0.2
AS_MANY_STEPS := --epochs 240 --evaluate-every 60 --schedule.warmup-epochs 30 --schedule.ramp-down-start-epoch 70 --schedule.ramp-down-epochs 160
# What the distilled student is asked about at the end.
TAGGED ?= manifests/sample/audio/z7lz6wMBUKL.opus
TEACHERS := --teacher passt_tiny=manifests/sample/passt_tiny.safetensors ast_tiny=manifests/sample/ast_tiny.safetensors

.PHONY: demo study test cluster-test check ffmpeg chromium onnxruntime-web lock clean

# Both students train at once, with a thread each: faster on two cores, and the same figures on any number.
demo: export OMP_NUM_THREADS = 1
demo: .venv/ready
	rm -rf $(OUT)
	$(BIN)/pipeline ingest audioset --segments $(DATA)/balanced_train_segments.csv --audio $(DATA)/audio --out $(OUT)/train --clips-per-shard 64
	$(BIN)/pipeline ingest audioset --segments $(DATA)/eval_segments.csv --audio $(DATA)/audio --out $(OUT)/eval --clips-per-shard 64
	$(BIN)/pipeline teacher-logits --data $(OUT)/train $(TEACHERS) --store $(OUT)/train-logits
	$(BIN)/pipeline teacher-logits --data $(OUT)/eval $(TEACHERS) --store $(OUT)/eval-logits
	$(BIN)/pipeline train-student --config $(RECIPE) $(FEW) $(AS_MANY_STEPS) --data $(OUT)/train --eval-data $(OUT)/eval --run $(OUT)/labels-only > $(OUT)/labels-only.log 2>&1 & alone=$$!; \
	$(BIN)/pipeline train-student --config $(RECIPE) $(FEW) --data $(OUT)/train --store $(OUT)/train-logits --eval-data $(OUT)/eval --run $(OUT)/distilled || { kill $$alone; exit 1; }; \
	wait $$alone || { cat $(OUT)/labels-only.log; exit 1; }
	$(BIN)/pipeline compare --run $(OUT)/distilled $(OUT)/labels-only --store $(OUT)/eval-logits --data $(OUT)/eval --out $(OUT)/report
	$(BIN)/pipeline tag $(TAGGED) --checkpoint $(OUT)/distilled/best.safetensors

# What distillation brings, with all labels, some and none, on a folder in AudioSet's layout: `make study DATA=folder
# OUT=folder`. TEACHER_STORE=FILE takes logits that somebody else made (Parquet, or a store) in place of the tiny teachers;
# EPOCHS, SEEDS, JOBS, RECIPE and PARTS ("labels weight temperature form mixup") say how much is tried. RECORD=FILE keeps
# what is finished, on whatever machine: the same study goes on from it with the rest. STUDY_FLAGS="--label-share 0.25" compares
# settings with a quarter of the labels.
SEEDS ?= 3
JOBS ?= 2
PARTS ?= labels
study: OUT = runs/study
study: RECIPE = manifests/recipes/study_mn02.toml
study: .venv/ready
	$(BIN)/python -m benchmarks.study --data $(DATA) --out $(OUT) --recipe $(RECIPE) --seeds $(SEEDS) --jobs $(JOBS) --parts $(PARTS) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(RECORD),--record $(RECORD)) $(if $(TEACHER_STORE),--store $(TEACHER_STORE),$(TEACHERS)) $(STUDY_FLAGS)

# Two processes with a thread each: on two cores half the time, and no more memory than a laptop has.
test: .venv/ready ffmpeg chromium onnxruntime-web
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Machines that come and go, for real: containers of the Dockerfile's image, by podman or Docker. Some fifteen minutes.
cluster-test: .venv/ready
	$(BIN)/python -m pytest -v tests/cluster_machines.py

# FFmpeg's command line is the independent decoder of the tests, Chromium opens the pages that are written; the tests that
# need one skip where it can't be had.
ffmpeg chromium:
	@command -v $@ > /dev/null \
		|| { export DEBIAN_FRONTEND=noninteractive; timeout 300 sh -c 'apt-get update && apt-get install --yes --no-install-recommends $@' > /dev/null 2>&1; } \
		|| echo 'make: no $@, and apt-get could not install it: tests that need it skip'

# What computes in the browser, of the version that pages are written for, from npm.
ORT_WEB = $(shell sed -n 's/^RUNTIME_VERSION = "\(.*\)"/\1/p' pipeline/pages/listening_page.py)
onnxruntime-web: .venv/ready
	@test -d .venv/onnxruntime-web/$(ORT_WEB) \
		|| { mkdir -p .venv/onnxruntime-web && cd .venv/onnxruntime-web && timeout 300 npm pack --silent onnxruntime-web@$(ORT_WEB) > /dev/null 2>&1 \
			&& tar -xzf onnxruntime-web-$(ORT_WEB).tgz package/dist/ort.wasm.bundle.min.mjs package/dist/ort-wasm-simd-threaded.wasm && rm onnxruntime-web-$(ORT_WEB).tgz && mv package/dist $(ORT_WEB) && rm -r package; } \
		|| echo 'make: npm could not fetch onnxruntime-web $(ORT_WEB): tests that need it skip'

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# The lock holds uv itself, so the environment that pip starts is the one that uv completes.
.venv/ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --compile-bytecode requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --quiet --output-file requirements.lock

clean:
	rm -rf .venv runs
