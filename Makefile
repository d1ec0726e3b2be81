# make demo   the whole chain on the two tiny trained checkpoints: export, run, parity
# make test   lint, types, C++ tests (also for Arm, emulated), Python tests, and what can be tested of GPUs without one
# make pyview the import tree of a working checkout, for mypy and editors
# make kernel the compiled kernels of a working checkout, in build/csrc
# make node   what the tests of JavaScript need of npm, in build/node (440 MB); without Node they are skipped
# make docs   the site, in build/docs: a link that leads nowhere or a page that no index lists is an error
# make mutations  do the tests notice the deliberate mistakes of tests/mutations? Long, and no part of `make test`;
#             ONLY=files tries one area, or the files whose path has the word
# make coverage  which lines of Python the tests run, by package, and the files with most lines left; takes an hour
# make python310  what runs on a device with Python 3.10 (JetPack 6), on a real one: PYTHON310=python3.10
# make test-windows  everything compiled for Windows by zig and run under wine; skipped where they are missing. Takes 7
#             minutes after `make wheels`, more without it, and is no part of `make test`
# make wheels wheels and C archives for every platform, in dist/, cross-compiled and checked; PLATFORMS=linux-aarch64 makes
#             those of one. make wheels-reproducible builds twice, in two folders, and compares the bytes
# make release VERSION=0.3.0  check that everything is ready for this version, then tag it; nothing is pushed
#
# Building and testing need Python 3.11 or newer, a C++17 compiler (GCC or Clang) and CMake. The first run makes .venv; after that it is
# made again only when the build files change. New Python files need no new install, new folders beside edgelm/ do.
# pip's own variables work (PIP_INDEX_URL, PIP_FIND_LINKS, ...); where PyTorch's CPU index is among them, its small CPU
# build is taken in place of the CUDA one.

PYTHON ?= python3
PYTHON310 ?= python3.10
VENV ?= .venv
# pip and `make kernel` share the build folder build/csrc: each kernel is compiled once. By itself pip would take Ninja,
# and empty the folder for each isolated environment: scikit-build-core is installed first.
export CMAKE_GENERATOR ?= Unix Makefiles
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
# Tests start hundreds of processes; each would compile EdgeLM's Python again, for up to 0.3 s.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HARNESS := $(VENV)/.harness
NODE := build/node/.installed
CPP := $(shell find runtimes/csrc tests examples -name '*.cc' -o -name '*.h' -o -name '*.hpp' -o -name '*.cuh' -o -name '*.c')
GPU_TESTS := tests/cuda tests/engines tests/gpu
OTHER_TESTS := tests/unit tests/serving tests/arm $(GPU_TESTS)  # what has a target of its own
KERNEL_SOURCES := runtimes/csrc/CMakeLists.txt \
    $(foreach folder,. kernels kernels/* ort ort/* cuda/host cuda/host/* cuda/driver cuda/tensorrt system,$(wildcard runtimes/csrc/$(folder)/*.h runtimes/csrc/$(folder)/*.cc))

.PHONY: demo test lint types docs test-cpp test-arm test-windows test-python test-unit test-serving test-export test-gpu test-cuda test-engines install pyview kernel node mutations coverage python310 wheels wheels-reproducible release clean

demo: $(INSTALLED)
	$(BIN)/edgelm demo

# First what fails quickly, then two targets at a time, the longest first: one alone often leaves a core idle.
test: lint kernel $(HARNESS) node
	+$(MAKE) --jobs 2 --output-sync=target --old-file=kernel test-cuda test-export test-unit test-arm test-cpp test-serving test-engines docs types

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: $(INSTALLED) pyview
	cd build/pyview && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p edgelm

docs: $(INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs

kernel:
	cmake -S runtimes/csrc -B build/csrc -DEDGELM_BUILD_TESTS=ON
	cmake --build build/csrc

# Once as it is used, once under AddressSanitizer and UndefinedBehaviorSanitizer.
test-cpp: kernel
	ctest --test-dir build/csrc --output-on-failure
	cmake -S runtimes/csrc -B build/csrc-sanitize -DEDGELM_BUILD_TESTS=ON -DEDGELM_SANITIZE=ON
	cmake --build build/csrc-sanitize --target edgelm_tests
	ctest --test-dir build/csrc-sanitize --output-on-failure --parallel 2

# The same for 64-bit Arm, by the compiler of the releases and emulated; needs qemu-user. Then Python there.
test-arm: $(INSTALLED) kernel
	PYTHON=$(BIN)/python runtimes/csrc/tests/arm.sh
	$(BIN)/pytest -q -rs tests/arm

# The same for Windows, cross-compiled and run under wine, and parity of the tiny bundles; needs ziglang and wine64.
test-windows: $(INSTALLED) kernel
	PYTHON=$(BIN)/python EDGELM=$(BIN)/edgelm runtimes/csrc/tests/windows/run.sh

test-python: test-unit test-serving test-export

test-unit: $(INSTALLED) $(HARNESS) kernel
	$(BIN)/pytest -q tests/unit

# The server, batches of requests, and what clients send.
test-serving: $(INSTALLED) kernel
	$(BIN)/pytest -q -rs tests/serving

# The rest, most of which exports bundles.
test-export: $(INSTALLED) $(HARNESS) node kernel
	$(BIN)/pytest -q $(foreach folder,$(OTHER_TESTS),--ignore $(folder))

# What is for GPUs, without one: kernels emulated and compiled for every device; then engines. Beside the rest: much of it
# waits for one compiler.
test-gpu: test-cuda test-engines

test-cuda: $(INSTALLED) $(HARNESS)
	$(BIN)/pytest -q -rs tests/cuda

test-engines: $(INSTALLED) $(HARNESS)
	$(BIN)/pytest -q -rs $(filter-out tests/cuda,$(GPU_TESTS))

install: $(INSTALLED)

# onnxruntime-node's binaries for the CPU are in the package; its install script would fetch those for CUDA.
node: $(if $(shell command -v npm),$(NODE))

$(NODE): tests/node/package.json tests/node/package-lock.json
	mkdir -p build/node
	cp tests/node/package.json tests/node/package-lock.json build/node/
	npm ci --prefix build/node --ignore-scripts --no-audit --no-fund
	touch $@

$(INSTALLED): pyproject.toml constraints.txt $(KERNEL_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("building and testing EdgeLM need Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# Without isolation packages that come as sources need a setuptools that builds wheels by itself.
	$(BIN)/python -m pip install --constraint constraints.txt scikit-build-core 'setuptools>=70.1'
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --config-settings build-dir=build/csrc --editable '.[dev]'
	touch $@

# lm-evaluation-harness with what the tests touch: 385 MB. SciPy, scikit-learn and others of its metrics make it 620.
$(HARNESS): $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps lm_eval
	$(BIN)/python -m pip install --constraint constraints.txt datasets pytablewriter requests sacrebleu
	touch $@

# Links, not copies, set in place: others may be running from the tree.
pyview:
	mkdir -p build/pyview/edgelm
	find build/pyview/edgelm -xtype l -delete
	for f in edgelm/*; do ln -sfn ../../../$$f build/pyview/edgelm/; done
	for d in export quant runtimes; do ln -sfn ../../../$$d build/pyview/edgelm/$$d; done

mutations: $(INSTALLED)
	$(BIN)/python tests/mutations/run.py --jobs 2 $(if $(ONLY),--only $(ONLY))

coverage: $(INSTALLED) $(HARNESS) node kernel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt coverage
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/unit
	$(BIN)/coverage run -m pytest -q tests/serving
	$(BIN)/coverage run -m pytest -q $(foreach folder,$(OTHER_TESTS),--ignore $(folder))
	$(BIN)/coverage run -m pytest -q $(GPU_TESTS)
	$(BIN)/coverage combine --quiet
	for package in edgelm quant export runtimes; do $(BIN)/coverage report --include "$$package/*" | tail -1; done
	$(BIN)/coverage report --sort=cover

# Without torch and ONNX Runtime, as on a board. Needs a C++ compiler, also to emulate the kernels.
python310:
	$(PYTHON310) -m venv build/python310
	build/python310/bin/python -m pip install --quiet . 'nvidia-cuda-nvrtc-cu12==12.6.*' 'nvidia-cuda-nvrtc==13.0.*' 'pytest>=8.4'
	build/python310/bin/pytest -q tests/cuda/test_driver_calls.py tests/cuda/test_kernel_images.py tests/cuda/test_nvrtc.py tests/cuda/test_moe.py
	cd build/python310 && bin/edgelm parity ../../tests/export/older_bundles/fox-tensorrt --runtime cuda-emulated
	cd build/python310 && bin/edgelm doctor | grep -F 'this is Python 3.10; with Python 3.11 or newer'

wheels: $(INSTALLED)
	$(BIN)/python runtimes/csrc/dist/build.py $(PLATFORMS)

wheels-reproducible: $(INSTALLED)
	$(BIN)/python runtimes/csrc/dist/build.py --reproducible $(PLATFORMS)

release:
	.github/release.sh $(VERSION)

clean:
	rm -rf build $(VENV)
