"""A report as one HTML file: text, pictures as SVG, style and script inside, nothing loaded from anywhere."""

from sgl_npu.compiler.html.page import SIZE_LIMIT, page

__all__ = ["SIZE_LIMIT", "page"]
