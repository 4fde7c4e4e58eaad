"""python sample.py MODEL [options]"""

from ldm.cli import run_verb

if __name__ == "__main__":
    run_verb("sample", program="sample.py")
