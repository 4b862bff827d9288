"""Compiled kernels: one C++ file per extension module, built by ``setup.py``."""
