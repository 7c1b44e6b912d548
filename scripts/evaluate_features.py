"""For `python` and `accelerate launch`: the script is `hf_gr/scripts/evaluate_features.py`."""

from hf_gr.cli.script import run
from hf_gr.scripts.evaluate_features import main

if __name__ == "__main__":
    run(main)
