"""Everything is declared in pyproject.toml; this file is the place for C extensions."""

from setuptools import setup

setup()
