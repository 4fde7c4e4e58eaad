"""python train.py CONFIG [KEY=VALUE ...]"""

from ldm.cli import run_verb

if __name__ == "__main__":
    run_verb("train", program="train.py")
