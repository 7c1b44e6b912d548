.PHONY: style quality test slow fast coverage docs test-lowest third-party bench

style:  ## rewrite the code to the house style
	ruff check --fix .
	ruff format .

quality:  ## what CI checks
	ruff check .
	ruff format --check .
	codespell
	mypy

test:
	python -m pytest

slow:  ## what `test` leaves out; CI runs all but the presets
	python -m pytest -m slow

fast:  ## the math and the flags
	python -m pytest tests/optim tests/test_config.py

coverage:  ## what the tests do not reach, worker processes included
	python -m pytest --cov --cov-report=term-missing:skip-covered

docs:  ## the generated tables, and the site in build/site
	python docs/generate.py
	mkdocs build --strict

LOWEST_PYTHON ?= python3.11
LOWEST_TESTS ?= $(addprefix tests/,trainer/test_trainer.py optim/test_ire.py trainer/test_ire_training.py cli)

test-lowest:  ## the lower bounds of pyproject.toml, all together (torch has CUDA there: about 7 GB)
	$(LOWEST_PYTHON) -m venv build/lowest
	build/lowest/bin/pip install -c constraints-lowest.txt -e ".[test]"
	build/lowest/bin/python -m pytest -o filterwarnings=default $(LOWEST_TESTS)

bench:  ## the table of costs, some 30 minutes of an idle machine; PEERS are folders with timm, kornia, torchvision
	python benchmarks/costs.py $(if $(PEERS),--peers $(PEERS))

third-party:  ## transformers' own trainer tests with GRTrainer in Trainer's place; TRANSFORMERS is a checkout
	python tests/third_party/compare.py $(TRANSFORMERS)
