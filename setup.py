"""The C extension; everything else is declared in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "hpcft.ckpt._engine",
            sources=["c_ext/module.c", "c_ext/engine.c", "c_ext/ring.c", "c_ext/crc32c.c"],
            depends=["c_ext/engine.h", "c_ext/ring.h", "c_ext/crc32c.h"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
        )
    ]
)
