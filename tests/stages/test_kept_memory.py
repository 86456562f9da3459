import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
import numpy as np
from stages.memory import keep_memory

def step():
    blocks = [np.ones(2**18) for _ in range(20)]  # 2 MiB each

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)

def measured():
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()

measured()
keep_memory()
measured()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_a_thread_keeps_the_memory_of_a_step_for_the_next():
    """A step that takes 40 MiB and frees them, told in page faults (pages may be large)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 400 and kept < 50, done.stderr
