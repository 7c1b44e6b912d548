"""Images, text and instructions. Needs the extra `scripts`."""

from ..errors import extra

with extra("scripts"):
    import datasets  # noqa: F401
    import PIL  # noqa: F401
    import pyarrow  # noqa: F401
