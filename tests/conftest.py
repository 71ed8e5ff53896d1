"""Tests run on the CPU, so that they are the same on every machine."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, and for every child
