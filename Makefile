.PHONY: style quality test bench third-party

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

third-party:  ## transformers' own tests with GRTrainer in Trainer's place: make third-party TRANSFORMERS=FOLDER
	python tests/third_party/compare.py $(TRANSFORMERS)
