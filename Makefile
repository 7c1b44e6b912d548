.PHONY: style quality test bench

style:  ## rewrite the code to the house style
	ruff check --fix .
	ruff format .

quality:  ## what CI checks
	ruff check .
	ruff format --check .

test:
	python -m pytest

bench:
	python benchmarks/gr_step.py
