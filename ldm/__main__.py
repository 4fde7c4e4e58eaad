"""`python -m ldm VERB ...`, the same as the console command `ldm`."""

from ldm.cli import main

main()
