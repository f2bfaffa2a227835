"""What a job that starts processes of its own writes to stderr."""

import subprocess
import sys

import pytest

CODE = """
import logging, subprocess, sys
from pipeline.terminal import quiet_children
logging.basicConfig(level=logging.INFO, format="%(message)s")
child = [sys.executable, "-c", "import sys; print('noise', file=sys.stderr)"]
try:
    with quiet_children():
        subprocess.run(child)
        print("ours", file=sys.stderr)
        logging.info("logged")
        {fault}
finally:
    print("after", file=sys.stderr)
    logging.info("logged after")
    subprocess.run(child)
"""


@pytest.mark.parametrize(("fault", "code"), [("pass", 0), ("sys.exit(3)", 3)])
def test_children_are_quiet_while_they_should_be_and_we_are_never(fault, code):
    done = subprocess.run([sys.executable, "-c", CODE.format(fault=fault)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.split()) == (code, ["ours", "logged", "after", "logged", "after", "noise"])
