"""For `python` and `accelerate launch`: the script is `hf_gr/scripts/pretrain_barlow_twins.py`."""

from hf_gr.cli.script import run
from hf_gr.scripts.pretrain_barlow_twins import main

if __name__ == "__main__":
    run(main)
