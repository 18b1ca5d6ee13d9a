"""`python -m sgl_npu` is the command `sgl-npu`."""

from sgl_npu.compiler.cli import main

main()
