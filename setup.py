"""The C extension; everything else is declared in pyproject.toml."""

from setuptools import Extension, setup

_PARTS = ("engine", "ring", "crc32c", "copy")

setup(
    ext_modules=[
        Extension(
            "hpcft.ckpt._engine",
            sources=[f"c_ext/{name}.c" for name in ("module", *_PARTS)],
            depends=[f"c_ext/{name}.h" for name in _PARTS],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
        )
    ]
)
