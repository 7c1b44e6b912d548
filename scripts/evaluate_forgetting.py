"""For `python` and `accelerate launch`: the script is `hf_gr/scripts/evaluate_forgetting.py`."""

from hf_gr.cli.script import run
from hf_gr.scripts.evaluate_forgetting import main

if __name__ == "__main__":
    run(main)
