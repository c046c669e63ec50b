# The commands of README.md, CONTRIBUTING.md and docs/ under short names; tests/test_packaging.py holds them together.
.PHONY: help install quickstart sample test test-fast paper-test lint kernels backends bench paper report floors benchmarks gpu

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install:  ## the library, every framework that the tests need, and the tools
	pip install -e ".[test]"

quickstart:  ## a minute on a CPU core: the table of the digits, and quickstart.png
	python examples/quickstart.py

sample:  ## new images of two prototypes of the quickstart
	python examples/sample.py 3 7

test:  ## the library's tests, about ten minutes
	pytest --numprocesses=auto --dist=loadfile

test-fast:  ## those to run while you work, about three minutes
	pytest --numprocesses=auto --dist=loadfile -m "not slow"

paper-test:  ## the comparison's tests
	pip install -r examples/paper/requirements.txt
	pytest examples/paper/tests

lint:  ## style and types
	pre-commit run --all-files

kernels:  ## compile the CPU kernels
	python -m proto_reg build cpu

backends:  ## which backends run here, and why not
	python -m proto_reg backends

bench:  ## time every backend on this machine
	python -m proto_reg bench

paper:  ## the comparison on the digits; kill it and start it again: it goes on
	python -m examples.paper run --config digits --out my-runs

report:  ## its page
	python -m examples.paper report --results my-runs

floors:  ## the extras at their lowest versions
	tests/floors.sh

benchmarks:  ## pytest-benchmark
	pytest tests/benchmarks --benchmark-enable

gpu:  ## everything that only a GPU shows
	bash tests/gpu/run.sh
