"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

# what XLA's CPU backend does at every step: a thread asks for the same bytes again
PROGRAM = """
import ctypes, resource, sys, threading
from smalti.launch import memory
if sys.argv[1] == 'keep':
  memory.keep_pages()

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def steps(count, size=2**26):
  for _ in range(count):
    place = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(place, 1, size)
    libc.free(place)

def run():
  steps(2)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  steps(5)
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_pages_are_faulted_in_once():
  kept, free = (int(subprocess.run([sys.executable, '-c', PROGRAM, mode], check=True,
                                   capture_output=True, text=True).stdout)
                for mode in ('keep', 'free'))
  assert kept < 100 < free  # 64 MiB are 16,384 pages, or 32 large ones, five times
